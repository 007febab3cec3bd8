"""bigmodel.deployment.generate: the same text cached, batched or streamed, and the same as transformers'."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel.data.tokenizer import Tokenizer
from bigmodel.deployment.generate import (
    complete,
    filter_logits,
    generate,
    keep_top_k,
    keep_top_p,
    pad_left,
    sample,
    stream,
    stream_text,
)
from bigmodel.models import gpt as gpt_module
from bigmodel.models.gpt import GPT, GPTConfig

VOCAB, CONTEXT = 61, 24
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [0, 0, 7, 7, 2]]
WAYS = {
    "greedy": {"temperature": 0},
    "plain": {"seed": 5},
    "cold": {"temperature": 0.7, "seed": 6},
    "top-k": {"temperature": 1.3, "top_k": 7, "seed": 7},
    "top-p": {"top_p": 0.8, "seed": 8},
    "both": {"top_k": 20, "top_p": 0.9, "seed": 9},
}


def make_gpt(vocab_size=VOCAB, context_length=CONTEXT, **changes):
    """A tiny GPT with weights large enough that its choices depend on all that it sees, in float64."""
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.3} | changes
    return GPT(GPTConfig(vocab_size, context_length, **config)).double().eval()


@pytest.fixture(scope="module")
def model():
    return make_gpt()


class Table(nn.Module):
    """The least a model can be: the scores of the next token depend on the last token alone."""

    def __init__(self, scores, context_length=8):
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.config = SimpleNamespace(vocab_size=len(scores), context_length=context_length)
        self.calls, self.modes = [], []

    def new_cache(self):
        return []

    def forward(self, tokens, attention_mask=None, cache=None):
        self.calls.append(tuple(tokens.shape))
        self.modes.append(self.training)
        return self.scores[tokens]


def reference(model, prompt, new_tokens, context=CONTEXT, when_full="slide"):
    """Greedy text by the plainest means: one whole forward pass for each token, and the rule for a full context."""
    window, text = list(prompt), []
    for _ in range(new_tokens):
        if len(window) > context:
            window = window[-(context // 2):]
        with torch.no_grad():
            text.append(model(torch.tensor([window]))[0, -1].argmax().item())
        window.append(text[-1])
        if when_full == "stop" and len(window) == context:
            break
    return text


# --- one text, however it is computed

@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("when_full", ["slide", "stop"])
def test_cached_is_uncached_and_a_batch_is_its_rows(model, way, when_full):
    batch = generate(model, PROMPTS, 70, when_full=when_full, **way)
    assert batch == generate(model, PROMPTS, 70, when_full=when_full, use_cache=False, **way)
    for prompt, text in zip(PROMPTS, batch, strict=True):
        assert generate(model, [prompt], 70, when_full=when_full, **way) == [text]
        assert list(stream(model, prompt, 70, when_full=when_full, **way)) == text
        assert len(text) == (70 if when_full == "slide" else CONTEXT - len(prompt))
    assert len({tuple(text) for text in batch}) == len(PROMPTS)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_stop_token_ends_its_own_row_only(model, way):
    free = generate(model, PROMPTS, 70, **way)
    stop = max(set(free[0]), key=lambda token: sum(token in text for text in free))
    for use_cache in (True, False):
        stopped = generate(model, PROMPTS, 70, stop_token=stop, use_cache=use_cache, **way)
        assert stopped == [text[:text.index(stop)] if stop in text else text for text in free]


@pytest.mark.parametrize("when_full", ["slide", "stop"])
def test_greedy_is_the_likeliest_token_each_time_even_beyond_the_context(model, when_full):
    for prompt in PROMPTS:
        assert generate(model, [prompt], 70, temperature=0, when_full=when_full) == [
            reference(model, prompt, 70, when_full=when_full)]


def test_prompts_longer_than_the_context_are_cut_as_texts_are(model):
    lengths = (CONTEXT - 1, CONTEXT, CONTEXT + 1, 5 * CONTEXT)
    prompts = [[token % VOCAB for token in range(length)] for length in lengths]
    assert generate(model, prompts, 9, temperature=0) == [reference(model, prompt, 9) for prompt in prompts]


@pytest.mark.parametrize("context_length", [1, 2, 3, 128])
def test_a_thousand_tokens_from_a_short_context(context_length):
    texts = generate(make_gpt(context_length=context_length), [[1], [2, 3, 4]], 1000, seed=0)
    assert [len(text) for text in texts] == [1000, 1000]
    assert len(set(texts[0][-100:])) > 10


def test_the_longer_text_begins_as_the_shorter_one(model):
    assert generate(model, PROMPTS, 30, seed=1) == [text[:30] for text in generate(model, PROMPTS, 50, seed=1)]


def test_seeds(model):
    prompt = PROMPTS[0]
    one, two = generate(model, [prompt, prompt], 20, seed=[1, 2])
    assert one != two
    assert [[one], [two]] == [generate(model, [prompt], 20, seed=seed) for seed in (1, 2)]
    assert generate(model, [prompt, prompt], 20, seed=2) == [two, two]
    torch.manual_seed(3)
    first, other = generate(model, [prompt, prompt], 20), generate(model, [prompt, prompt], 20)
    torch.manual_seed(3)
    assert first == generate(model, [prompt, prompt], 20) != other
    assert first[0] != first[1]


def test_no_prompts_no_texts(model):
    assert generate(model, []) == []


def test_seeded_text_leaves_the_global_dice_alone(model):
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    generate(model, PROMPTS, 5, seed=0)
    assert torch.rand(1) == expected


def test_only_the_prompt_is_read_at_once_then_one_token_at_a_time():
    table = Table(torch.eye(5).roll(1, 1), context_length=100)
    assert generate(table, [[0, 1, 2], [4]], 4, temperature=0) == [[3, 4, 0, 1], [0, 1, 2, 3]]
    assert table.calls == [(2, 3), (2, 1), (2, 1), (2, 1)]
    table.calls.clear()
    assert list(stream(table, [0, 1, 2], 9, temperature=0, stop_token=0)) == [3, 4]
    assert table.calls == [(1, 3), (1, 1), (1, 1)]  # and nothing is computed for what was not asked for


def test_a_stream_computes_only_what_is_taken_from_it():
    table = Table(torch.eye(5).roll(1, 1))
    tokens = stream(table, [0], 1000, temperature=0)
    assert [next(tokens), next(tokens)] == [1, 2]
    assert len(table.calls) == 2


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_given_back(training):
    table = Table(torch.eye(5)).train(training)
    generate(table, [[0]], 3)
    assert table.modes == [False] * 3 and table.training is training
    dropping = make_gpt(dropout=0.5).train(training)
    assert generate(dropping, PROMPTS, 20, temperature=0) == generate(make_gpt(), PROMPTS, 20, temperature=0)


def test_the_mode_is_given_back_after_an_error():
    table = Table(torch.full((5, 5), math.nan)).train()
    with pytest.raises(ValueError, match="NaN"):
        generate(table, [[0]], 3)
    assert table.training


def test_a_model_can_be_trained_after_it_has_written(model):
    fresh = make_gpt().train()
    generate(fresh, PROMPTS, 5)
    fresh(torch.tensor([PROMPTS[0]])).sum().backward()
    assert fresh.head.weight.grad.abs().sum() > 0


# --- negative controls: what these tests would say of a broken cache, mask or die

def test_a_cache_whose_positions_are_off_by_one_is_noticed(model, monkeypatch):
    expected = generate(model, PROMPTS, 10, temperature=0, use_cache=False)
    right = gpt_module._positions
    monkeypatch.setattr(gpt_module, "_positions", lambda tokens, mask, seen: right(tokens, mask, seen) - int(seen > 0))
    assert generate(model, PROMPTS, 10, temperature=0, use_cache=False) == expected
    assert generate(model, PROMPTS, 10, temperature=0) != expected


def test_padding_without_a_mask_is_noticed(model, monkeypatch):
    expected = generate(model, PROMPTS, 10, temperature=0)
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, tokens, attention_mask, cache: forward(self, tokens, None, cache))
    broken = generate(model, PROMPTS, 10, temperature=0)
    assert broken[2] == expected[2], "the longest prompt has no padding"
    assert [row for row in range(4) if broken[row] == expected[row]] == [2]


def test_one_die_for_all_rows_is_noticed():
    scores = torch.zeros(4, 50)
    own = sample(scores, generator=[torch.Generator().manual_seed(0) for _ in range(4)])
    shared = sample(scores, generator=torch.Generator().manual_seed(0))
    assert own.tolist() == [own[0].item()] * 4
    assert shared[0] == own[0] and len(set(shared.tolist())) > 1


# --- the same as transformers

CONFIGS = [
    {},
    {"n_inner": 24, "activation_function": "relu", "n_head": 1},
    {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=range(len(CONFIGS)))
def test_greedy_text_equals_transformers(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3,
              "bos_token_id": None, "eos_token_id": None} | changes
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    for prompts in (PROMPTS, PROMPTS[:1], [[7] * 20, [8, 9]]):
        tokens, mask = pad_left(prompts)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        with torch.no_grad():
            out = theirs.generate(tokens, attention_mask=mask.long(), max_new_tokens=30, do_sample=False,
                                  pad_token_id=0)
        expected = out[:, tokens.shape[1]:].tolist()
        for use_cache in (True, False):
            assert generate(ours, prompts, 30, temperature=0, use_cache=use_cache) == expected
        assert len({tuple(text) for text in expected}) == len(prompts)


def rows():
    """A few rows of scores, flat or steep."""
    def make(args):
        seed, size, spread = args
        return torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * spread
    return st.tuples(st.integers(0, 2**31), st.integers(1, 400), st.sampled_from([0.01, 1.0, 5.0, 30.0])).map(make)


@given(logits=rows(), top_k=st.integers(1, 500))
def test_top_k_equals_transformers(logits, top_k):
    from transformers import TopKLogitsWarper
    ours, theirs = filter_logits(logits, top_k=top_k), TopKLogitsWarper(top_k)(None, logits)
    distinct = [row for row in range(3) if len(set(logits[row].tolist())) == logits.shape[1]]
    assert torch.equal(ours[distinct], theirs[distinct])
    assert (ours.isfinite().sum(-1) == min(top_k, logits.shape[1])).all()


@given(logits=rows(), top_k=st.none() | st.integers(1, 300), top_p=st.floats(0.01, 1.0))
def test_top_p_equals_transformers(logits, top_k, top_p):
    """But where float32 cannot tell whether the mass is reached: there, one token more or less is right as well."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    ours = filter_logits(logits, top_k, top_p)
    theirs = logits if top_k is None else TopKLogitsWarper(top_k)(None, logits)
    before, order = theirs.double().softmax(-1).sort(descending=True, stable=True)
    before = before.cumsum(-1) - before
    unsure = ((before - top_p).abs() < 1e-5).scatter(-1, order, (before - top_p).abs() < 1e-5)
    theirs = TopPLogitsWarper(top_p)(None, theirs)
    assert torch.equal(ours[~unsure], theirs[~unsure])
    assert ours.isfinite().any(-1).all()


@given(logits=rows(), top_p=st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits, top_p):
    probabilities, kept = logits.double().softmax(-1), keep_top_p(logits, top_p).isfinite()
    for row in range(3):
        inside = probabilities[row][kept[row]]
        assert inside.sum() >= top_p - 1e-5
        assert inside.sum() - inside.min() < top_p + 1e-5
        assert inside.min() >= probabilities[row].masked_fill(kept[row], 0).max()


def test_flat_distributions_need_more_than_the_shortlist():
    flat = torch.zeros(1, 5000)
    assert keep_top_p(flat, 0.5).isfinite().sum() == 2500
    steep = torch.arange(5000.0).flip(0)[None]
    both = torch.cat([flat, steep])
    assert torch.equal(keep_top_p(both, 0.9)[1:], keep_top_p(steep, 0.9))  # a row's result is its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equal_scores_the_lowest_ids_stay(dtype):
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]], dtype=dtype)
    kept = keep_top_k(logits, 3)
    assert kept.dtype == dtype
    assert [row.isfinite().nonzero().flatten().tolist() for row in kept] == [[0, 1, 3], [0, 1, 2]]
    kept = keep_top_p(logits, 0.6)  # the two 2s hold 0.576 of the first row
    assert kept.dtype == dtype
    assert [row.isfinite().nonzero().flatten().tolist() for row in kept] == [[0, 1, 3], [0, 1, 2, 3]]
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


def test_filters_work_on_any_leading_shape():
    logits = torch.randn(2, 3, 50)
    for single in (keep_top_k(logits, 4)[1, 2], keep_top_k(logits[1, 2], 4)):
        assert torch.equal(single, keep_top_k(logits.flatten(0, 1), 4)[5])
    assert torch.equal(keep_top_p(logits, 0.5)[1, 2], keep_top_p(logits[1, 2], 0.5))


def test_what_is_removed_stays_removed():
    logits = torch.tensor([[5.0, -math.inf, 1.0, -math.inf]])
    for filtered in (keep_top_k(logits, 3), keep_top_p(logits, 0.9999999), filter_logits(logits, 3, 0.9999999)):
        assert torch.equal(filtered, logits)


# --- the die is fair

CRITICAL = 61.7  # chi-square with 30 degrees of freedom exceeds this once in about 1,700 times


@pytest.mark.parametrize("way", [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 12}, {"top_p": 0.85},
                                 {"temperature": 1.2, "top_k": 25, "top_p": 0.9}], ids=str)
def test_draws_follow_the_probabilities(way):
    torch.manual_seed(0)
    logits, draws = torch.randn(31).double() * 1.5, 40_000
    probabilities = filter_logits(logits / way.get("temperature", 1.0), way.get("top_k"), way.get("top_p")).softmax(-1)
    drawn = sample(logits.expand(draws, -1), generator=torch.Generator().manual_seed(1), **way)
    counts = torch.bincount(drawn, minlength=31).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = draws * probabilities[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert statistic < CRITICAL
    wrong = draws * F.normalize(probabilities[possible] + 0.01, p=1, dim=0)  # a die that is slightly loaded
    assert ((counts[possible] - wrong) ** 2 / wrong).sum().item() > CRITICAL


def test_a_lonely_survivor_is_always_drawn():
    logits = torch.full((1000, 50), -math.inf)
    logits[:, 17] = 3.0
    assert (sample(logits) == 17).all()
    assert (sample(torch.randn(1000, 50).sort().values, top_k=1) == 49).all()
    assert (sample(torch.randn(1000, 50).sort().values, top_p=1e-9) == 49).all()


def test_temperature_goes_to_greedy():
    logits = torch.randn(200, 50)
    likeliest = logits.argmax(-1)
    for temperature in (0, 0.0, 1e-300, 1e-6, 1e-4):
        assert torch.equal(sample(logits, temperature), likeliest)
    assert len(set(sample(logits * 1e-3, 1e30).tolist())) > 30, "very hot is uniform"
    assert sample(torch.tensor([[1.0, 2.0, 2.0]]), 0).tolist() == [1], "of two equal ones, the lower id"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_of_any_precision(dtype):
    logits = torch.randn(4, 50).to(dtype)
    dice = [torch.Generator().manual_seed(seed) for seed in range(4)]
    again = [torch.Generator().manual_seed(seed) for seed in range(4)]
    assert torch.equal(sample(logits, 0.9, 20, 0.9, dice), sample(logits.float(), 0.9, 20, 0.9, again))


# --- text

SENTENCES = ["naïve café, crème brûlée\n", "千里之行，始于足下。\n", "мир 🙂 труд 👩‍🚀 май\n", "plain\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(SENTENCES * 3, 262)  # 256 bytes, a few merges, end-of-text


def writing(tokenizer, text):
    """A model that writes this text and ends it, whatever it reads."""
    tokens = [*tokenizer.encode(text), tokenizer.end_of_text]

    class Writer(Table):
        def forward(self, ids, attention_mask=None, cache=None):
            cache.append(1)
            return F.one_hot(torch.tensor([[tokens[(len(cache) - 1) % len(tokens)]]]), tokenizer.vocab_size).double()

    return Writer(torch.zeros(tokenizer.vocab_size, 1), context_length=10_000)


@pytest.mark.parametrize("text", [*SENTENCES, "".join(SENTENCES)])
def test_streamed_text_is_the_text_and_never_half_a_character(tokenizer, text):
    model = writing(tokenizer, text)
    pieces = list(stream_text(model, tokenizer, "begin", 500, temperature=0))
    assert "".join(pieces) == text == complete(model, tokenizer, "begin", 500, temperature=0)
    assert all(pieces) and "\ufffd" not in "".join(pieces)
    if text == SENTENCES[1]:
        assert len(pieces) < len(tokenizer.encode(text)), "the test is about characters of several tokens"


def test_a_character_that_is_cut_off_is_marked(tokenizer):
    model = writing(tokenizer, "🙂")
    count = len(tokenizer.encode("🙂")) - 1
    pieces = list(stream_text(model, tokenizer, "begin", count, temperature=0))
    assert pieces == ["\ufffd"]


def test_text_equals_tokens(tokenizer):
    model = make_gpt(vocab_size=tokenizer.vocab_size)
    for prompt in ("naïve", "千"):
        tokens = generate(model, [tokenizer.encode(prompt)], 60, seed=3, stop_token=tokenizer.end_of_text)[0]
        assert complete(model, tokenizer, prompt, 60, seed=3) == tokenizer.decode(tokens)


def test_an_empty_text_begins_a_document(tokenizer):
    model = make_gpt(vocab_size=tokenizer.vocab_size)
    tokens = generate(model, [[tokenizer.end_of_text]], 20, seed=1, stop_token=tokenizer.end_of_text)[0]
    assert complete(model, tokenizer, "", 20, seed=1) == tokenizer.decode(tokens)
    bare = Tokenizer.train(SENTENCES, 260, special_tokens=())
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        complete(model, bare, "")


# --- bad input: one clear line, at once

BAD = {
    "prompt 1 is empty": {"prompts": [[1], []]},
    "prompt 1 holds token id 61; expected ids from 0 to 60": {"prompts": [[1], [2, 61]]},
    "prompt 0 holds token id -1": {"prompts": [[-1]]},
    "max_new_tokens is 0": {"max_new_tokens": 0},
    "max_new_tokens is -3": {"max_new_tokens": -3},
    "temperature is -0.1": {"temperature": -0.1},
    "temperature is inf": {"temperature": math.inf},
    "temperature is nan": {"temperature": math.nan},
    "top_k is 0": {"top_k": 0},
    "top_p is 0": {"top_p": 0},
    "top_p is 1.1": {"top_p": 1.1},
    "top_p is nan": {"top_p": math.nan},
    "stop_token is 61": {"stop_token": 61},
    "there are 2 seeds for 1 prompts": {"seed": [1, 2]},
    "prompt 0 has 24 tokens, which fill the context of 24": {"prompts": [[1] * 24], "when_full": "stop"},
}


@pytest.mark.parametrize("message, change", BAD.items(), ids=BAD)
def test_bad_requests_are_refused_before_any_work(message, change):
    table = Table(torch.zeros(VOCAB, VOCAB), context_length=CONTEXT)
    request = {"prompts": [[1]], "max_new_tokens": 5} | change
    with pytest.raises(ValueError, match=message) as caught:
        generate(table, **request)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)
    if len(request["prompts"]) == 1 and "seed" not in change:
        with pytest.raises(ValueError, match=message):
            stream(table, request.pop("prompts")[0], **request)  # without asking for a token
    assert table.calls == []


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_sample_and_filter_refuse_the_same_settings(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        sample(torch.randn(2, 5), **settings)
    if "temperature" not in settings:
        with pytest.raises(ValueError, match="is"):
            filter_logits(torch.randn(2, 5), **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_scores_that_are_no_numbers_are_refused(value, temperature):
    scores = torch.zeros(2, 5)
    scores[1, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample(scores, temperature)
