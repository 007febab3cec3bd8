"""bigmodel.evaluation.language: each token counted once, units that compare, baselines that are proper."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigmodel.evaluation import language
from bigmodel.evaluation.language import LanguageScore, NGram, compressed_bits_per_byte, confidence_interval, score_text

TEXT = "To be, or not to be: that is the question. Gödel, Escher, 巴赫 — 不积跬步，无以至千里。" * 3
DOCUMENTS = [TEXT, "x", TEXT[40:90], "巴赫"]


class ByteTokenizer:
    """The simplest tokenizer: one token for each byte, then end-of-text."""
    end_of_text, vocab_size = 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


class BareTokenizer(ByteTokenizer):
    end_of_text, vocab_size = None, 256


class Recurrent(nn.Module):
    """A small causal model with a fixed reach of `reach` tokens: within it, any window gives the same prediction."""

    def __init__(self, vocab_size=257, reach=4, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.reach, self.tables = reach, nn.ModuleList(nn.Embedding(vocab_size, vocab_size) for _ in range(reach))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens):
        shifted = [nn.functional.pad(table(tokens), (0, 0, back, 0))[:, :tokens.shape[1]]
                   for back, table in enumerate(self.tables)]
        return self.dropout(sum(shifted))


def naive_bits(model, lines, context_length):
    """The reference: one forward call for each token, with as much context as fits."""
    nats = 0.0
    with torch.no_grad():
        for line in lines:
            for at in range(1, len(line)):
                logits = model(torch.tensor([line[max(0, at - context_length):at]]))
                nats -= getattr(logits, "logits", logits)[0, -1].double().log_softmax(-1)[line[at]].item()
    return nats / math.log(2)


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=256,
                        eos_token_id=256, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


# -- each token once ----------------------------------------------------------------------------------------------

@given(length=st.integers(0, 300), context_length=st.integers(1, 40), data=st.data())
def test_windows_count_each_prediction_once_and_fit(length, context_length, data):
    stride = data.draw(st.integers(1, context_length))
    spans = language._windows(length, context_length, stride)
    assert [at for _, end, first in spans for at in range(first, end)] == list(range(length))
    for begin, end, first in spans:
        assert begin <= first < end and end - begin <= context_length
        assert begin == 0 or first - begin >= context_length - stride


@pytest.mark.parametrize("context_length, stride", [(6, 1), (6, 2), (16, 8), (16, 12), (64, 5), (500, 500)])
def test_any_window_gives_the_same_score_where_the_overlap_covers_the_reach(context_length, stride):
    model = Recurrent(reach=4)
    expected = score_text(model, ByteTokenizer(), DOCUMENTS, context_length=1000)
    score = score_text(model, ByteTokenizer(), DOCUMENTS, context_length=context_length, stride=stride)
    for ours, reference in zip(score.token_nats, expected.token_nats, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_negative_control_counting_overlaps_twice_is_seen(monkeypatch):
    model = Recurrent(reach=4)
    honest = score_text(model, ByteTokenizer(), TEXT, context_length=16, stride=8)
    spans = language._windows(len(TEXT.encode()), 16, 8)
    double = [(begin, end, begin) for begin, end, _ in spans]
    assert [at for _, end, first in double for at in range(first, end)] != list(range(len(TEXT.encode())))
    counted_twice = sum(end - first for _, end, first in double)
    assert counted_twice > 1.8 * honest.tokens
    # and a later window overwriting what an earlier one has scored with more context changes the score
    monkeypatch.setattr(language, "_windows", lambda *_: double)
    assert abs(score_text(model, ByteTokenizer(), TEXT, context_length=16, stride=8).loss - honest.loss) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_nothing(gpt2, batch_size):
    expected = score_text(gpt2, ByteTokenizer(), DOCUMENTS, batch_size=8)
    score = score_text(gpt2, ByteTokenizer(), DOCUMENTS, batch_size=batch_size)
    assert score.document_nats == pytest.approx(expected.document_nats, rel=1e-6)


def test_stride_one_equals_the_loop_over_tokens(gpt2):
    score = score_text(gpt2, ByteTokenizer(), DOCUMENTS, stride=1)
    bits = naive_bits(gpt2, [[256, *document.encode()] for document in DOCUMENTS], 32)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert (score.tokens, score.bytes) == (size, size)
    assert score.bits_per_byte == pytest.approx(bits / size, rel=1e-6)


def test_equals_the_loss_of_transformers_on_a_short_text(gpt2):
    text = "Short enough to fit."
    line = torch.tensor([[256, *text.encode()]])
    with torch.no_grad():
        expected = gpt2(input_ids=line, labels=line).loss.item()
    score = score_text(gpt2, ByteTokenizer(), text)
    assert score.loss == pytest.approx(expected, abs=1e-6)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_documents_are_scored_apart(gpt2):
    together = score_text(gpt2, ByteTokenizer(), DOCUMENTS)
    for document, nats in zip(DOCUMENTS, together.token_nats, strict=True):
        alone, = score_text(gpt2, ByteTokenizer(), document).token_nats
        torch.testing.assert_close(alone, nats, atol=1e-5, rtol=1e-5)


def test_our_gpt_scores_as_transformers_with_the_same_weights(gpt2, tmp_path):
    from bigmodel.models.gpt import GPT
    gpt2.save_pretrained(tmp_path)
    ours = score_text(GPT.from_pretrained(tmp_path), ByteTokenizer(), DOCUMENTS)
    theirs = score_text(gpt2, ByteTokenizer(), DOCUMENTS)
    assert ours.document_nats == pytest.approx(theirs.document_nats, rel=1e-5)


# -- units --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("context_length", [4, 1000])
def test_a_uniform_model_over_bytes_needs_eight_bits_a_byte(context_length):
    def uniform(tokens):
        return torch.zeros(*tokens.shape, 256, dtype=torch.float64)
    score = score_text(uniform, BareTokenizer(), DOCUMENTS, context_length=context_length)
    assert score.bits_per_byte == pytest.approx(8, abs=1e-12)
    assert score.perplexity == pytest.approx(256)


def test_negative_control_characters_are_not_bytes():
    chinese = "不积跬步，无以至千里；不积小流，无以成江海。"
    score = score_text(lambda tokens: torch.zeros(*tokens.shape, 256), BareTokenizer(), chinese, context_length=8)
    by_characters = score.document_nats.sum() / math.log(2) / len(chinese)
    assert score.bits_per_byte == pytest.approx(8, abs=1e-6) and by_characters > 20


def test_the_tokenizer_does_not_change_the_unit():
    """A model over pairs of bytes which says the same as one over bytes gets the same bits per byte."""
    class Pairs(BareTokenizer):
        def encode(self, text):
            data = text.encode()
            return [256 * first + second for first, second in zip(data[::2], data[1::2], strict=True)]
        decode = property()

    text = "even, abcdef"
    pairs = score_text(lambda tokens: torch.zeros(*tokens.shape, 256 * 256), Pairs(), text, context_length=8)
    single = score_text(lambda tokens: torch.zeros(*tokens.shape, 256), BareTokenizer(), text, context_length=8)
    assert pairs.bits_per_byte == pytest.approx(single.bits_per_byte, rel=1e-6)
    assert pairs.perplexity == pytest.approx(single.perplexity**2, rel=1e-5)


def test_without_end_of_text_the_first_token_is_charged_and_the_rest_as_ever():
    model = Recurrent(vocab_size=256)
    score = score_text(model, BareTokenizer(), DOCUMENTS, context_length=12, stride=6)
    assert all(nats[0] == pytest.approx(math.log(256)) for nats in score.token_nats)
    rest = naive_bits(model, [list(document.encode()) for document in DOCUMENTS], 12)
    total = rest + 8 * len(DOCUMENTS)
    assert score.bits_per_byte == pytest.approx(total / score.bytes, rel=1e-5)


# -- the model is left as it was ------------------------------------------------------------------------------------

def test_dropout_is_off_inside_and_every_mode_is_restored():
    model = Recurrent(dropout=0.5)
    model.train()
    model.tables[1].eval()
    scores = [score_text(model, ByteTokenizer(), TEXT, context_length=16) for _ in range(2)]
    assert scores[0].loss == scores[1].loss
    assert model.training and model.dropout.training and not model.tables[1].training
    model.tables = None  # a model that fails in the middle
    with pytest.raises(TypeError):
        score_text(model, ByteTokenizer(), TEXT, context_length=16)
    assert model.training and model.dropout.training


# -- transformers' tokenizers ---------------------------------------------------------------------------------------

def _words(lowercase=False):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "the": 2, "cat": 3, "sat": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def test_a_tokenizer_of_transformers_adds_nothing_and_starts_the_document():
    score = score_text(lambda tokens: torch.zeros(*tokens.shape, 5), _words(), "the cat sat", context_length=4)
    assert score.tokens == 3 and score.loss == pytest.approx(math.log(5))


def test_special_tokens_that_stand_in_the_text_are_read_as_text():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from bigmodel.data.tokenizer import Tokenizer
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(["some text"], vocab_size=260, special_tokens=["<|endoftext|>"], show_progress=False)
    theirs = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, bos_token="<|endoftext|>")
    ours = Tokenizer.train(["some text"], vocab_size=260)
    for tokenizer in (theirs, ours):
        score = score_text(lambda tokens: torch.zeros(*tokens.shape, 260), tokenizer, "a<|endoftext|>b", 4)
        assert score.tokens > 5 and score.bytes == 15


def test_a_tokenizer_that_loses_text_is_reported():
    with pytest.warns(UserWarning, match="does not give the text back"):
        score_text(lambda tokens: torch.zeros(*tokens.shape, 5), _words(lowercase=True), "The cat", context_length=4)


# -- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, which", [("", "document 0 of 1"), ([], "the list is empty"),
                                         (["a", ""], "document 1 of 2")])
@pytest.mark.parametrize("what", [lambda text: score_text(Recurrent(), ByteTokenizer(), text, context_length=8),
                                  lambda text: NGram(2).fit([1, 2], 257).score(ByteTokenizer(), text),
                                  compressed_bits_per_byte])
def test_empty_text_is_one_clear_error(what, text, which):
    with pytest.raises(ValueError, match=f"^there is no text to score: {which}[^\n]*$"):
        what(text)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_would_skip_tokens_is_refused(stride):
    with pytest.raises(ValueError, match="expected 1 to context_length"):
        score_text(Recurrent(), ByteTokenizer(), TEXT, context_length=8, stride=stride)


def test_a_model_of_unknown_reach_and_a_foreign_tokenizer_are_named(gpt2):
    with pytest.raises(ValueError, match="pass context_length"):
        score_text(Recurrent(), ByteTokenizer(), TEXT)

    class Larger(ByteTokenizer):
        def encode(self, text):
            return [300 for _ in text]
        decode = property()
    with pytest.raises(ValueError, match="token 300 is outside the model's vocabulary of 257"):
        score_text(gpt2, Larger(), TEXT)


# -- n-grams --------------------------------------------------------------------------------------------------------

streams = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(stream=streams, context=st.lists(st.integers(0, 6), max_size=5), order=st.integers(1, 4))
def test_ngram_probabilities_are_positive_and_sum_to_one(stream, context, order):
    p = NGram(order).fit(stream, 7).probabilities(context)
    assert p.shape == (7,) and (p > 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(stream=streams, order=st.integers(1, 4))
def test_ngram_looks_at_no_more_than_its_order(stream, order):
    model = NGram(order).fit(stream, 7)
    context = stream[-10:]
    np.testing.assert_array_equal(model.probabilities(context), model.probabilities(context[len(context) - order + 1:]))


def test_ngram_by_hand():
    """abab: after a, b was seen twice, so that its discounted share is (2 - d) / 2, and the rest is shared out."""
    model = NGram(2).fit([0, 1, 0, 1], 3)
    discount = 1 / 3  # the runs are ab, twice, and ba, once: n1 = 1, n2 = 1 gives 1 / (1 + 2)
    unigram_discount = 0.9  # each of a, b stands after one kind of token: n1 = 2, n2 = 0 gives 1, capped at 0.9
    unigram_b = (1 - unigram_discount + unigram_discount * 2 / 3) / 2
    expected = (2 - discount + discount * unigram_b) / 2
    assert model.probabilities([0])[1] == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_score_equals_the_sum_by_hand_and_score_text(order):
    model = NGram(order).fit([x for document in DOCUMENTS for x in [256, *document.encode()]], 257)
    long = TEXT * 4  # longer than one window
    score = model.score(ByteTokenizer(), long)
    line = [256, *long.encode()]
    nats = -sum(math.log(model.probabilities(line[:at])[line[at]]) for at in range(1, len(line)))
    assert score.document_nats[0] == pytest.approx(nats, rel=1e-9)
    assert score_text(model, ByteTokenizer(), long).document_nats[0] == pytest.approx(nats, rel=1e-9)


def test_longer_memory_predicts_better():
    train = [x for _ in range(20) for x in [256, *TEXT.encode()]]
    scores = [NGram(order).fit(train, 257).score(ByteTokenizer(), TEXT).bits_per_byte for order in (1, 2, 3)]
    assert scores[0] > scores[1] > scores[2]


def test_ngram_errors():
    with pytest.raises(ValueError, match="order is 0"):
        NGram(0)
    with pytest.raises(ValueError, match="call fit"):
        NGram(2).probabilities([1])
    for tokens in ([], [7], [-1]):
        with pytest.raises(ValueError, match="expected at least one, and each from 0 to 6"):
            NGram(2).fit(tokens, 7)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_ngram_takes_lists_arrays_and_tensors(kind):
    assert NGram(2).fit(kind([0, 1, 0, 1]), 3).probabilities([0])[1] > 0.5


# -- compressors ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["gzip", "bz2", "lzma"])
def test_a_compressor_that_has_seen_the_text_needs_almost_nothing(method):
    text = "".join(chr(33 + (i * i * 7 + i // 3) % 90) for i in range(4000))
    cold = compressed_bits_per_byte(text, method)
    assert 0 < cold < 9
    assert compressed_bits_per_byte(text, method, given=text) < 0.55 * cold


def test_gzip_forgets_what_lies_more_than_32_kilobytes_back():
    rng = np.random.default_rng(0)
    text, filler = (bytes(rng.integers(33, 127, size, dtype=np.uint8)).decode() for size in (4000, 40_000))
    near, far = (compressed_bits_per_byte(text, "gzip", given=given) for given in (text, text + filler))
    assert near < 0.5 and far > 6
    assert compressed_bits_per_byte(text, "lzma", given=text + filler) < 0.5


def test_an_unknown_compressor_is_named():
    with pytest.raises(ValueError, match="unknown compressor 'zip'; expected one of gzip, bz2, lzma"):
        compressed_bits_per_byte("text", "zip")


# -- intervals ------------------------------------------------------------------------------------------------------

def _score(bits, size=100):
    nats = tuple(torch.full((size,), value * math.log(2), dtype=torch.float64) for value in bits)
    return LanguageScore(nats, (size,) * len(bits))


def test_the_interval_holds_the_score_and_narrows_with_more_documents():
    rng = np.random.default_rng(0)
    few, many = _score(rng.normal(2, 0.3, 20)), _score(rng.normal(2, 0.3, 500))
    for score in (few, many):
        low, high = confidence_interval(score)
        assert low < score.bits_per_byte < high
    assert np.diff(confidence_interval(many)) < 0.5 * np.diff(confidence_interval(few))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [low < 2 < high for low, high in (confidence_interval(_score(rng.normal(2, 0.3, 40)), seed=seed)
                                             for seed in range(200))]
    assert 0.88 < np.mean(hits) < 0.99


def test_a_paired_comparison_sees_what_two_intervals_cannot():
    bits = np.random.default_rng(0).normal(2, 0.5, 50)
    first, second = _score(bits), _score(bits + 0.05)
    assert confidence_interval(first)[1] > confidence_interval(second)[0]  # they overlap
    low, high = confidence_interval(first, second)
    assert low == pytest.approx(-0.05) and high == pytest.approx(-0.05)


def test_intervals_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="at least 2 documents"):
        confidence_interval(_score([2.0]))
    with pytest.raises(ValueError, match="different documents"):
        confidence_interval(_score([2.0, 3.0]), _score([2.0, 3.0], size=90))
