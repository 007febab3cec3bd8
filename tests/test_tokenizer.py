"""Byte-level BPE: the same merges as `tokenizers`, the same ids as tiktoken and Hugging Face, any Unicode and back.

Each parity test has a control beside it: break the thing on purpose, and the comparison must fail."""

import copy
import json
import pickle
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bigmodel.data.bpe as bpe
from bigmodel.core import find_data
from bigmodel.data.bpe import (
    BYTE_ORDER,
    SPLIT_PATTERN,
    count_words,
    from_printable,
    learn_merges,
    merge_symbols,
    merge_table,
    printable,
    read_tiktoken,
    recover_merges,
    split_words,
    to_symbols,
)
from bigmodel.data.corpus import load_corpus
from bigmodel.data.tokenizer import BPE, StreamDecoder, Tokenizer

# The Thousand Character Classic (6th century), the beginning, and of the Analects of Confucius: public domain.
THOUSAND = """天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。寒來暑往，秋收冬藏。閏餘成歲，律呂調陽。
雲騰致雨，露結為霜。金生麗水，玉出崑岡。劍號巨闕，珠稱夜光。果珍李柰，菜重芥薑。海鹹河淡，鱗潛羽翔。龍師火帝，鳥官人皇。始制文字，乃服衣裳。推位讓國，有虞陶唐。"""
ANALECTS = """子曰：「學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍，不亦君子乎？」
有子曰：「其為人也孝弟，而好犯上者，鮮矣；不好犯上，而好作亂者，未之有也。君子務本，本立而道生。孝弟也者，其為仁之本與！」
子曰：「巧言令色，鮮矣仁！」曾子曰：「吾日三省吾身：為人謀而不忠乎？與朋友交而不信乎？傳不習乎？」
子曰：「弟子入則孝，出則弟，謹而信，汎愛眾，而親仁。行有餘力，則以學文。」"""
TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # every character but lone surrogates


def chinese() -> str:
    """A longer Chinese text: the clauses of the two classics in random order."""
    clauses = [clause + "，" for clause in (THOUSAND + ANALECTS).replace("\n", "，").split("，")]
    return "".join(random.Random(0).choices(clauses, k=4000))


def every_character() -> list[str]:
    """All characters of Unicode 3.2: what came later, a library may not know yet as a letter, and cut elsewhere."""
    return [chr(code) for code in range(0x110000)
            if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs")]


def data(name: str) -> Path:
    """A file of real data, or a skip that says what is missing."""
    try:
        return find_data(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shakespeare() -> str:
    return data("tinyshakespeare.txt").read_text()


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return Tokenizer.from_tiktoken(data("gpt2.tiktoken"))


@pytest.fixture(scope="session")
def sources() -> list[str]:
    return load_corpus("python-source")[:40]


@pytest.fixture(scope="session")
def trained(sources: list[str]) -> Tokenizer:
    return Tokenizer.train([*sources[:10], chinese()], 1500, ("<|endoftext|>", "<|user|>"))


# --- training

def reference_merges(texts: list[str], vocab_size: int) -> list[tuple[bytes, bytes]]:
    """What Hugging Face's byte-level trainer learns."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=[],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return [tuple(map(from_printable, pair)) for pair in json.loads(theirs.to_str())["model"]["merges"]]


@pytest.fixture(scope="session", params=["shakespeare", "python source", "chinese", "python reference"])
def corpus(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "shakespeare":
        return [request.getfixturevalue("shakespeare")[:400_000]]
    if request.param == "python source":
        return request.getfixturevalue("sources")
    return [chinese()] if request.param == "chinese" else load_corpus("python-reference")


@pytest.mark.parametrize("vocab_size", [500, 4000])
def test_same_merges_as_tokenizers(corpus: list[str], vocab_size: int) -> None:
    ours = learn_merges(count_words(corpus), vocab_size - 256)
    theirs = reference_merges(corpus, vocab_size)
    assert ours == theirs
    assert len(ours) == min(vocab_size - 256, len(theirs))


@given(st.lists(st.text("ab c", max_size=40), max_size=8), st.integers(0, 60))
def test_same_merges_as_tokenizers_where_ties_are_everywhere(texts: list[str], num_merges: int) -> None:
    assert learn_merges(count_words(texts), num_merges) == reference_merges(texts, 256 + num_merges)


def test_control_ties_turned_round(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = bytes(reversed(BYTE_ORDER))
    monkeypatch.setattr(bpe, "BYTE_ORDER", backwards)
    monkeypatch.setattr(bpe, "_TO_SYMBOL", bytes(backwards.index(byte) for byte in range(256)))
    assert learn_merges(count_words(corpus), 3744) != reference_merges(corpus, 4000)


def test_control_counts_not_kept_up_to_date(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    merge_everywhere = bpe._merge_everywhere

    def forgetful(pair: str, new: str, words: list, weights: list, counts: dict, places: dict) -> set[str]:
        before = dict(counts)
        born = merge_everywhere(pair, new, words, weights, counts, places)
        counts.update({old: count for old, count in before.items() if old not in born})  # what has gone still counts
        return born

    monkeypatch.setattr(bpe, "_merge_everywhere", forgetful)
    assert learn_merges(count_words(corpus), 244) != reference_merges(corpus, 500)


def plain_merges(words: dict[str, int], num_merges: int) -> list[bytes]:
    """BPE by the book: count everything, take the best, start again."""
    spelled, tokens = {to_symbols(word): count for word, count in words.items()}, [bytes([b]) for b in BYTE_ORDER]
    for _ in range(num_merges):
        counts: dict[str, int] = {}
        for word, count in spelled.items():
            for pair in map("".join, zip(word, word[1:])):
                counts[pair] = counts.get(pair, 0) + count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        spelled = {word.replace(best, chr(len(tokens))): count for word, count in spelled.items()}
        tokens.append(tokens[ord(best[0])] + tokens[ord(best[1])])
    return tokens[256:]


@given(st.dictionaries(st.text("abé", min_size=1, max_size=12), st.integers(1, 5), max_size=12), st.integers(0, 40))
def test_index_and_heap_change_nothing(words: dict[str, int], num_merges: int) -> None:
    assert [left + right for left, right in learn_merges(words, num_merges)] == plain_merges(words, num_merges)


def test_a_shorter_training_is_the_beginning_of_a_longer(corpus: list[str]) -> None:
    words = count_words(corpus)
    assert learn_merges(words, 500)[:200] == learn_merges(words, 200)


def test_train_reads_a_generator_once_and_one_text_as_one(sources: list[str]) -> None:
    merges = Tokenizer.train(sources[:3], 400).merges
    assert Tokenizer.train((text for text in sources[:3]), 400).merges == merges
    assert Tokenizer.train("low lower", 258).merges == Tokenizer.train(["low lower"], 258).merges == [(b"l", b"o")]


def test_train_says_when_it_is_asked_too_much() -> None:
    with pytest.raises(ValueError, match="vocab_size is 256; expected at least 257"):
        Tokenizer.train("text", 256)
    with pytest.warns(UserWarning, match="pairs for 260 tokens only, not for 300"):
        assert Tokenizer.train("text", 300).vocab_size == 260
    with pytest.raises(ValueError, match="U\\+D800 at position 1, a lone surrogate"):
        Tokenizer.train("a\ud800", 300)


# --- splitting

@given(TEXT)
def test_split_loses_nothing(text: str) -> None:
    assert "".join(split_words(text)) == text


def test_split_is_gpt2s_on_every_character() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    every = every_character()
    for between in ("", "a", " 1", "\n"):
        for start in range(0, len(every), 50_000):
            text = between.join(every[start:start + 50_000])
            theirs = [len(piece) for piece, _ in split.pre_tokenize_str(text)]  # one character for each byte
            assert [len(piece.encode()) for piece in split_words(text)] == theirs


@given(st.binary())
def test_printable_is_there_and_back(token: bytes) -> None:
    assert from_printable(printable(token)) == token
    assert printable(token).isprintable() and " " not in printable(token)


# --- encoding and decoding

@given(TEXT)
def test_round_trip_of_any_unicode(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text
    assert trained.decode(trained.encode(text, allow_special=True)) == text
    assert trained.decode_bytes(trained.encode(text)) == text.encode()


@given(st.text("abn \n'語é", max_size=60))
def test_long_and_short_pieces_follow_the_same_rule(trained: Tokenizer, text: str) -> None:
    """One place at a time by heap, or all places of a pair at once: the order of ranks is the same."""
    symbols = text.encode().decode("latin-1").translate(trained._base)
    slow = symbols
    while found := [trained._table[pair] for pair in map("".join, zip(slow, slow[1:])) if pair in trained._table]:
        _, pair, new = min(found)
        slow = slow.replace(pair, new)
    assert merge_symbols(symbols, trained._table) == slow


def tiktoken_gpt2(gpt2: Tokenizer):  # noqa: ANN201
    tiktoken = pytest.importorskip("tiktoken")
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=read_tiktoken(data("gpt2.tiktoken")),
                             special_tokens={"<|endoftext|>": 50256})


def test_same_ids_as_tiktoken_with_gpt2s_vocabulary(gpt2: Tokenizer, shakespeare: str, sources: list[str]) -> None:
    theirs = tiktoken_gpt2(gpt2)
    every = "".join(every_character())
    for text in (shakespeare, *sources[:15], chinese(), every, " a".join(every[:70_000])):
        assert gpt2.encode(text) == theirs.encode_ordinary(text)
    marked = "one<|endoftext|>two"
    assert gpt2.encode(marked) == theirs.encode_ordinary(marked)
    assert gpt2.encode(marked, allow_special=True) == theirs.encode(marked, allowed_special="all")


@given(TEXT)
def test_same_ids_as_tiktoken_on_any_text(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.encode(text) == tiktoken_gpt2_cached(gpt2).encode_ordinary(text)


def tiktoken_gpt2_cached(gpt2: Tokenizer, made: list = []):  # noqa: ANN201, B006
    if not made:
        made.append(tiktoken_gpt2(gpt2))
    return made[0]


def test_control_one_merge_out_of_place(gpt2: Tokenizer, shakespeare: str) -> None:
    """Two neighbouring ranks exchanged, " t" and " a": other ids."""
    swapped = [*gpt2.merges]
    swapped[0], swapped[400] = swapped[400], swapped[0]
    with pytest.raises(ValueError, match="merge 0 joins"):  # it needs a token that has not been made
        BPE(swapped, gpt2.special_tokens, gpt2.ids)
    swapped = [*gpt2.merges[2:1000], *gpt2.merges[:2], *gpt2.merges[1000:]]
    swapped = [merge for merge in swapped if all(len(part) == 1 for part in merge)] + \
              [merge for merge in swapped if not all(len(part) == 1 for part in merge)]
    broken = BPE(swapped, gpt2.special_tokens, gpt2.ids)
    assert broken.encode(shakespeare[:10_000]) != tiktoken_gpt2(gpt2).encode_ordinary(shakespeare[:10_000])


def test_gpt2_as_published(gpt2: Tokenizer) -> None:
    assert gpt2.vocab_size == 50257 and gpt2.end_of_text == 50256
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.token_bytes(43453) == b" SolidGoldMagikarp"
    assert gpt2.merges[:4] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e"), (b"i", b"n")]


@pytest.mark.parametrize("word", ["a" * 100_000, "ab" * 50_000, "".join(random.Random(0).choices("acgt", k=100_000))])
def test_long_words_take_no_quadratic_time(trained: Tokenizer, word: str) -> None:
    """The number of steps, counted: at most a few for each byte."""
    looked_up = 0

    class Counting(dict):
        def __contains__(self, pair: object) -> bool:
            nonlocal looked_up
            looked_up += 1
            return super().__contains__(pair)

    merged = merge_symbols(to_symbols(word), Counting(trained._table))
    assert looked_up < 4 * len(word)
    assert trained.decode(list(map(ord, merged))) == word


def test_special_tokens_are_text_unless_allowed(trained: Tokenizer) -> None:
    end, user = trained.special_tokens["<|endoftext|>"], trained.special_tokens["<|user|>"]
    assert (end, user) == (1498, 1499) and trained.end_of_text == end and trained.vocab_size == 1500
    text = "<|user|> who <|endoftext|><|endoftext|>"
    assert not {end, user} & set(trained.encode(text))
    assert trained.encode(text, allow_special=True) == [user, *trained.encode(" who "), end, end]
    assert trained.decode([user, end]) == "<|user|><|endoftext|>"


def test_special_tokens_may_contain_one_another() -> None:
    tokenizer = BPE([], ("<s>", "<s><s>", "a|b"))
    assert tokenizer.encode("<s><s><s>a|b", allow_special=True) == [257, 256, 258]
    assert BPE([], ()).encode("<s>", allow_special=True) == BPE([], ()).encode("<s>")
    assert tokenizer.end_of_text == 256 and BPE([], ()).end_of_text is None
    for bad in ("", "!", "Ġ"):
        with pytest.raises(ValueError, match="empty or an ordinary token"):
            BPE([], (bad,))


def test_bad_input_gets_one_clear_line(trained: Tokenizer) -> None:
    for text, where in (("\udfff", 0), ("ab\ud83d語", 2)):
        with pytest.raises(ValueError, match=f"at position {where}, a lone surrogate") as error:
            trained.encode(text)
        assert "\n" not in str(error.value)
    for number in (1500, -1, 10**9):
        with pytest.raises(ValueError, match=f"token id {number} is not in .* ids run from 0 to 1499"):
            trained.decode([3, number])
    with pytest.raises(ValueError, match="token id 1500"):
        StreamDecoder(trained).push(1500)


def test_decode_takes_lists_arrays_and_tensors(trained: Tokenizer) -> None:
    numbers = trained.encode("def f(x): return x")
    for same in (numbers, tuple(numbers), np.array(numbers, np.uint16), torch.tensor(numbers), iter(numbers)):
        assert trained.decode(same) == "def f(x): return x"
    assert trained.decode([]) == ""
    assert trained.decode(trained.encode("語")[:1]) == "�" or len(trained.encode("語")) == 1


def test_memory_of_pieces_is_bounded() -> None:
    tokenizer = BPE([])
    tokenizer._pieces.capacity = 50
    text = " ".join(map(str, range(1000)))
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer._pieces) <= 50
    tokenizer.encode("short " + "a" * 10_000)
    assert max(map(len, tokenizer._pieces)) <= 100


def test_copies_and_pickles_work(trained: Tokenizer) -> None:
    for other in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert other.encode("class A: pass") == trained.encode("class A: pass")


def test_documents_become_one_row(trained: Tokenizer) -> None:
    row = trained.encode_documents(["one", "", "two"])
    assert row.dtype == np.uint16 and row.tolist() == [*trained.encode("one"), 1498, 1498, *trained.encode("two")]
    assert trained.encode_documents("one").tolist() == trained.encode("one")
    assert (trained.encode_documents(iter(["a", "b"])) == trained.encode_documents(["a", "b"])).all()
    assert trained.encode_documents([]).shape == (0,)
    for last, dtype in ((65_535, np.uint16), (65_536, np.int32)):
        row = Tokenizer([], {"<|endoftext|>": last}).encode_documents(["a", "b"])
        assert row.dtype == dtype and row[1] == last
    with pytest.raises(ValueError, match="no end-of-text token"):
        Tokenizer([], ()).encode_documents(["a", "b"])


# --- streams

@given(st.lists(st.integers(0, 1499), max_size=40))
def test_a_stream_joins_to_the_whole(trained: Tokenizer, numbers: list[int]) -> None:
    decoder = StreamDecoder(trained)
    assert "".join(map(decoder.push, numbers)) + decoder.flush() == trained.decode(numbers)


@given(TEXT)
def test_a_stream_of_text_never_shows_half_a_character(text: str) -> None:
    tokenizer = BPE([])
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(number) for number in tokenizer.encode(text)]
    assert "".join(pieces) == text and decoder.flush() == ""
    assert all("�" not in piece for piece in pieces) or "�" in text


def test_control_token_by_token() -> None:
    tokenizer = BPE([])
    assert "".join(tokenizer.decode([number]) for number in tokenizer.encode("é")) != "é"


# --- files

ODD = ["", " ", "\n\n\t  x ", "don't DON'T ’s", "语言 語言 日本語", "שלום مرحبا", "👩‍👩‍👧 e\u0301",
       "\x00\x1c\x85\xa0\u2003\ufeff", "a" * 3000]


def test_hugging_face_loads_what_is_saved(trained: Tokenizer, tmp_path: Path, sources: list[str]) -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    trained.model_max_length = 256
    beside = tmp_path / "a model’s folder"
    for folder in (tmp_path / "alone", beside):
        trained.save(folder)
        if folder == beside:
            (folder / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 1500, "n_positions": 256}')
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        assert len(auto) == 1500 and auto.eos_token_id == trained.end_of_text and auto.model_max_length == 256
        for text in [*ODD, *sources[:8]]:
            ours = trained.encode(text)
            assert ours == theirs.encode(text).ids == auto(text, verbose=False)["input_ids"]
            assert auto.decode(ours) == theirs.decode(ours, skip_special_tokens=False) == trained.decode(ours)
        marked = "<|user|> who <|endoftext|>"
        assert auto(marked)["input_ids"] == trained.encode(marked, allow_special=True)
        assert auto(marked, split_special_tokens=True)["input_ids"] == trained.encode(marked)
        again = Tokenizer.from_pretrained(folder)
        assert (again.ids, again.merges, again.special_tokens) == (trained.ids, trained.merges, trained.special_tokens)
        assert (again.end_of_text, again.model_max_length) == (trained.end_of_text, 256)
    trained.model_max_length = None


def test_what_hugging_face_saves_is_loaded(trained: Tokenizer, gpt2: Tokenizer, tmp_path: Path) -> None:
    """As transformers' own GPT-2 class writes it, and as its Auto class does."""
    transformers = pytest.importorskip("transformers")
    for tokenizer in (trained, gpt2):
        tokenizer.save(tmp_path / "ours")
        for name in ("AutoTokenizer", "GPT2Tokenizer"):
            theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours")
            theirs.save_pretrained(tmp_path / name)
            again = Tokenizer.from_pretrained(tmp_path / name)
            assert again.end_of_text == tokenizer.end_of_text and again.model_max_length is None
            for text in [*ODD, THOUSAND, Path(__file__).read_text(encoding="utf-8")]:
                assert again.encode(text) == tokenizer.encode(text)


def test_special_tokens_first_as_tokenizers_trains(sources: list[str], tmp_path: Path) -> None:
    """Ids need not begin with the bytes: `tokenizers` puts special tokens first, and merges may stand anywhere."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(sources, tokenizers.trainers.BpeTrainer(
        vocab_size=900, show_progress=False, special_tokens=["<pad>", "<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == {"<pad>": 0, "<end>": 1} and ours.end_of_text == 1 and ours.vocab_size == 900
    for text in [*ODD, *sources[:5]]:
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text


def broken(content: dict, path: str, value: object) -> dict:
    """The content of a tokenizer.json with one field changed."""
    changed = copy.deepcopy(content)
    *parents, last = path.split(".")
    inner = changed
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return changed


@pytest.mark.parametrize(("field", "value"), [
    ("model.type", "WordPiece"), ("model.type", "Unigram"), ("normalizer", {"type": "Lowercase"}),
    ("pre_tokenizer", None), ("pre_tokenizer", {"type": "Whitespace"}), ("pre_tokenizer.add_prefix_space", True),
    ("pre_tokenizer.use_regex", False), ("model.dropout", 0.1), ("model.continuing_subword_prefix", "##"),
    ("model.end_of_word_suffix", "</w>"), ("model.byte_fallback", True), ("model.ignore_merges", True),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
    ("post_processor", {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}),
    ("post_processor", {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}),
    ("added_tokens", [{"id": 1498, "content": "<x>", "special": False}]),
    ("added_tokens", [{"id": 1498, "content": "<mask>", "special": True, "lstrip": True}]),
])
def test_foreign_tokenizers_are_refused_by_field(trained: Tokenizer, tmp_path: Path, field: str, value: object) -> None:
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(broken(json.loads(path.read_text()), field, value)))
    with pytest.raises(ValueError, match=field.split(".")[-1] if value is not None else "pre_tokenizer.type") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("model.vocab", [], "has not the form"), ("model.merges", [["a", "b", "c"]], "expected pairs of tokens"),
    ("model.merges", ["a zzz"], "merge 0 joins"), ("model.merges", [["語", "b"]], "stands for no byte"),
    ("model.vocab", {"a": 0}, "lacks 255 of the 256 bytes"), ("added_tokens", 3, "has not the form"),
    ("added_tokens", [{"id": 0, "content": "<x>", "special": True}], "two tokens share an id"),
])
def test_damaged_fields_get_one_clear_line(trained: Tokenizer, tmp_path: Path, field: str, value: object, message: str
                                           ) -> None:
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(broken(json.loads(path.read_text()), field, value)))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_truncated_files_are_refused_at_any_length(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or cut short") as error:
            Tokenizer.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    for foreign in (b"[1, 2]", b"{}", b"\x89PNG\xff", b"null"):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="tokenizer.json"):
            Tokenizer.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no tokenizer.json in"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full_disk(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Tokenizer([]).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_merges_are_recovered_from_ranks(trained: Tokenizer, tmp_path: Path) -> None:
    assert recover_merges(trained.ids) == trained.merges
    with pytest.raises(ValueError, match="goes across a border of GPT-2's split pattern"):
        recover_merges(trained.ids | {b"(self": 5000, b"self(": 5001} | {b"self.(": 5002})
    with pytest.raises(ValueError, match="is not the join of two"):
        recover_merges({bytes([byte]): byte for byte in range(256)} | {b"abcd": 256})
    for content in (b"not base64!", b"IQ==", b"IQ== x", b"\xff\xfe\x00"):
        (tmp_path / "bad.tiktoken").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no .tiktoken file"):
            Tokenizer.from_tiktoken(tmp_path / "bad.tiktoken")
    (tmp_path / "cut.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="lacks some of the 256"):
        Tokenizer.from_tiktoken(tmp_path / "cut.tiktoken")


def test_merges_out_of_order_are_refused() -> None:
    ids = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257}
    assert merge_table([(b"a", b"b"), (b"ab", b"c")], ids)
    with pytest.raises(ValueError, match="merge 0 joins b'ab' and b'c'"):
        merge_table([(b"ab", b"c"), (b"a", b"b")], ids)
    with pytest.raises(ValueError, match="an id for their join"):
        merge_table([(b"a", b"x")], ids)


def test_the_pattern_is_gpt2s() -> None:
    assert SPLIT_PATTERN.pattern == r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
