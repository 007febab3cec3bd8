"""WordPiece: the same words, ids, offsets, pairs and files as BertTokenizer, and the same vocabulary as its trainer.

Each parity test has a control beside it: break the thing on purpose, and the comparison must fail."""

import json
import random
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigmodel.data.pieces as pieces_module
from bigmodel.data.corpus import load_corpus
from bigmodel.data.pieces import SPECIAL_TOKENS, Normalizer, learn_pieces, longest_match
from bigmodel.data.wordpiece import WordPiece

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# Letters newer than this Python's Unicode are made small by the library (of a later Unicode) only: left out.
ANY = st.characters(exclude_categories=["Cs", "Cn"])
HARD = st.sampled_from([
    *"aeiouns'.,!?-#[]$_ \t\n\0中한İẞΣǅﬁ\u3000\u0327\u200b\u200d\ufeff\ufffd🏽", "é", "e\u0301", "か\u3099",
    "👩‍👩‍👧", "[MASK]", "[mask]", "##", "hello ", "function"])
TEXT = st.lists(st.one_of(ANY, HARD, HARD), max_size=40).map("".join)
EXTRA = ["Ünïcödé é 中文字か 한국어 ẞ ﬁ #", "xyz " * 3]


def reference(tokenizer: WordPiece, **settings: Any) -> Any:
    """BertTokenizer with the same vocabulary."""
    return transformers.BertTokenizer(vocab=dict(tokenizer.vocab), do_lower_case=tokenizer.normalizer.lowercase,
                                      **settings)


@pytest.fixture(scope="session", params=[True, False], ids=["uncased", "cased"])
def both(request: pytest.FixtureRequest) -> tuple[WordPiece, Any]:
    ours = WordPiece.train([*load_corpus("python-reference")[:40], *EXTRA], 1500, lowercase=request.param)
    return ours, reference(ours)


@pytest.fixture(scope="session")
def tiny() -> WordPiece:
    return WordPiece([*SPECIAL_TOKENS, *"abc[].,#", "##a", "##b", "ab", "##bc", "mask"])


# --- words

@pytest.mark.parametrize("lowercase", [True, False])
def test_characters_are_cleaned_as_the_library_does(lowercase: bool) -> None:
    ours, theirs = Normalizer(lowercase), tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    cut = tokenizers.pre_tokenizers.BertPreTokenizer()
    kinds = {code: unicodedata.category(chr(code)) for code in range(0x110000)}
    every = [chr(code) for code, kind in kinds.items()  # of letters without case and symbols every seventh
             if kind not in ("Cs", "Cn", "Co") and (kind not in ("Lo", "So") or code % 7 == 0)]
    for start in range(0, len(every), 400):
        text = "a".join(every[start:start + 400])
        assert ours(text).split() == [word for word, _ in cut.pre_tokenize_str(theirs.normalize_str(text))]


def test_python_s_own_unicode_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    new_mark = "a\U00011930b"  # a vowel sign that Unicode 8 did not have; \u0898 is a mark of Unicode 14
    theirs = tokenizers.normalizers.BertNormalizer().normalize_str("a\u08d4b" + new_mark)
    assert Normalizer()("a\u08d4b" + new_mark) == theirs
    monkeypatch.setattr(pieces_module, "_NEWER", set())
    assert Normalizer()("a\u08d4b" + new_mark) != theirs


@given(TEXT)
def test_places_lead_back(text: str) -> None:
    for lowercase in (True, False):
        clean, places = Normalizer(lowercase).align(text)
        assert clean == Normalizer(lowercase)(text)
        assert len(places) == len(clean) and all(0 <= at < len(text) for at in places)
        for char, at in zip(clean, places):
            assert char == " " or lowercase or char == text[at]


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff"])
def test_lone_surrogates_are_refused(tiny: WordPiece, text: str) -> None:
    for encode in (tiny.encode, tiny.encode_with_offsets, tiny.encode_pair):
        with pytest.raises(ValueError, match=rf"U\+{ord(text[-1]):04X} at position {len(text) - 1}"):
            encode(text)


# --- training

def train_theirs(texts: list[str], vocab_size: int) -> list[str]:
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer = tokenizers.normalizers.BertNormalizer()
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    theirs.train_from_iterator(texts, tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False))
    return sorted(theirs.get_vocab(), key=theirs.get_vocab().get)


def count(texts: list[str]) -> Counter:
    return Counter(word for text in texts for word in Normalizer()(text).split())


def with_their_order(texts: list[str], theirs: list[str], vocab_size: int) -> list[str]:
    """What we learn when letters within words have the ids that the library has drawn for them in this run."""
    counted = count(texts)
    letters, inner = (len({letter for word in counted for letter in word[at:]}) for at in (0, 1))
    drawn = [piece[2:] for piece in theirs[5 + letters:5 + letters + inner]]
    return learn_pieces(counted, max(vocab_size, 5 + letters + inner), drawn)


@pytest.mark.parametrize("vocab_size", [300, 2000, 5000])
def test_same_vocabulary_as_the_library_s_trainer(vocab_size: int) -> None:
    texts = load_corpus("python-reference")
    theirs = train_theirs(texts, vocab_size)
    assert with_their_order(texts, theirs, vocab_size) == theirs
    assert with_their_order(texts[:-2], theirs, vocab_size) != theirs  # control: other texts


@given(st.lists(st.text("ab c", max_size=40), max_size=8), st.integers(5, 60))
def test_same_vocabulary_where_ties_are_everywhere(texts: list[str], vocab_size: int) -> None:
    theirs = train_theirs(texts, vocab_size)
    assert with_their_order(texts, theirs, vocab_size) == theirs


@given(st.lists(st.text("abc ", max_size=30), min_size=1, max_size=6), st.randoms())
def test_training_does_not_depend_on_the_order_of_texts(texts: list[str], order: random.Random) -> None:
    shuffled = order.sample(texts, len(texts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert WordPiece.train(texts, 60).tokens == WordPiece.train(shuffled, 60).tokens


def test_training_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="vocab_size is 8; expected at least 9"):
        WordPiece.train("ab ba", 8)
    with pytest.warns(UserWarning, match="pairs for 11 pieces only, not for 50"):
        WordPiece.train("ab ba", 50)
    with pytest.warns(UserWarning, match="5 pieces only"):
        assert WordPiece.train([], 50).tokens == list(SPECIAL_TOKENS)


# --- ids and offsets

@settings(max_examples=300)
@given(text=TEXT)
def test_same_ids_and_offsets(both: tuple[WordPiece, Any], text: str) -> None:
    ours, theirs = both
    for allow_special in (True, False):
        found = theirs(text, return_offsets_mapping=True, add_special_tokens=False,
                       split_special_tokens=not allow_special)
        ids, offsets = ours.encode_with_offsets(text, allow_special)
        assert ids == ours.encode(text, allow_special) == found["input_ids"]
        assert offsets == [tuple(pair) for pair in found["offset_mapping"]]


@pytest.mark.parametrize("size", [1, 99, 100, 101, 5000])
def test_very_long_words(both: tuple[WordPiece, Any], size: int) -> None:
    ours, theirs = both
    for letter in ("x", "é", "漢", "가"):
        found = theirs(letter * size, return_offsets_mapping=True)
        ids, offsets = ours.encode_with_offsets(letter * size)
        assert ours.join(ids)[0] == found["input_ids"] and offsets == found["offset_mapping"][1:-1]
    assert ours.encode("x" * 101) == [ours.unknown_id] != ours.encode("x" * 100)


@given(st.text("abé\u0327\u0301\u0323\u05b4\u0e38\u302e\u302f\u1b44\u3099\U0001d165", max_size=10))
def test_places_of_accents_in_any_order(tiny: WordPiece, text: str) -> None:
    theirs = reference(tiny)(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = tiny.encode_with_offsets(text)
    assert (ids, offsets) == (theirs["input_ids"], theirs["offset_mapping"])


def test_the_comparison_of_ids_can_fail(both: tuple[WordPiece, Any]) -> None:
    ours, theirs = both
    wrong = WordPiece(ours.vocab, lowercase=not ours.normalizer.lowercase)
    assert wrong.encode("Ünïcödé Function") != theirs("Ünïcödé Function", add_special_tokens=False)["input_ids"]
    swapped = WordPiece([*SPECIAL_TOKENS, *ours.tokens[5:][::-1]], ours.normalizer.lowercase)
    assert swapped.encode("function") != theirs("function", add_special_tokens=False)["input_ids"]


def test_text_is_text(tiny: WordPiece) -> None:
    assert tiny.encode("[MASK]") == [tiny.vocab["["], tiny.vocab["mask"], tiny.vocab["]"]]
    assert tiny.encode("a[MASK]b", allow_special=True) == [tiny.vocab["a"], tiny.mask_id, tiny.vocab["b"]]
    assert not set(tiny.encode(" ".join(SPECIAL_TOKENS[2:]))) & {tiny.cls_id, tiny.sep_id, tiny.mask_id}


def test_longest_match() -> None:
    vocab = {"ab": 0, "abc": 1, "##cde": 2, "##d": 3, "##e": 4}
    assert longest_match("abcde", vocab) == ["abc", "##d", "##e"]
    assert longest_match("abx", vocab) == longest_match("", vocab) == []


@settings(max_examples=200)
@given(text=TEXT)
def test_same_decoding(both: tuple[WordPiece, Any], text: str) -> None:
    ours, theirs = both
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids) == ours.decode(torch.tensor(ids)) == theirs.decode(ids)
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("number", [-1, 18])
def test_unknown_ids_are_refused(tiny: WordPiece, number: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {number} is not in this vocabulary, whose ids run from 0 to 17"):
        tiny.decode([number])


# --- pairs and batches

WORDS = st.lists(st.sampled_from(["function", "the", "xyz", "é", "unhashable", "."]),
                 min_size=1, max_size=15).map(" ".join)


@given(first=WORDS, second=st.none() | WORDS, length=st.integers(5, 40))
def test_same_pairs_and_truncation(both: tuple[WordPiece, Any], first: str, second: str | None, length: int) -> None:
    ours, theirs = both
    found = theirs(first, second, truncation=True, max_length=length)
    whole, _ = ours.encode_pair(first, second)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens, segments = ours.encode_pair(first, second, length)
    assert (tokens, segments) == (found["input_ids"], found["token_type_ids"])
    assert len(tokens) == min(len(whole), length)
    assert [f"; {len(whole) - len(tokens)} tokens cut off" in str(one.message) for one in caught] == (
        [True] if len(whole) > length else [])


def test_batches_are_padded_rows(both: tuple[WordPiece, Any]) -> None:
    ours, theirs = both
    texts = [("the function", "xyz"), "one", ("", "a b c d e f g"), ""]
    tokens, segments, mask = ours.encode_batch(texts)
    assert tokens.dtype == segments.dtype == torch.int64 and mask.dtype == torch.bool
    for row, text in enumerate(texts):
        expected = ours.encode_pair(*((text,) if isinstance(text, str) else text))
        assert (tokens[row][mask[row]].tolist(), segments[row][mask[row]].tolist()) == expected
        assert mask[row].sum() == len(expected[0]) and mask[row].int().diff().le(0).all()
    assert (tokens[~mask] == ours.pad_id).all() and (segments[~mask] == 0).all()
    found = theirs([pair[0] for pair in texts[:1]], [pair[1] for pair in texts[:1]], return_tensors="pt")
    assert ours.encode_batch(texts[:1])[0].equal(found["input_ids"])


def test_empty_batches_keep_their_shape(tiny: WordPiece) -> None:
    assert [tuple(part.shape) for part in tiny.encode_batch([])] == [(0, 0)] * 3


def test_truncation_is_counted_once_for_the_batch(tiny: WordPiece) -> None:
    with pytest.warns(UserWarning, match="longer than 4 tokens: 2 of 3 inputs; 4 tokens cut off in all") as caught:
        tiny.encode_batch(["a b c a", "a b", "a a a a"], context_length=4)
    assert len(caught) == 1


@pytest.mark.parametrize("texts, length", [(("a",), 1), (("a", "b"), 2), (("a", "b", "c"), 9), ((), 9)])
def test_impossible_inputs_are_refused(tiny: WordPiece, texts: tuple[str, ...], length: int) -> None:
    with pytest.raises(ValueError, match=rf"{len(texts)} texts for a context of {length}"):
        tiny.encode_batch([texts], length)


def test_no_room_is_none(tiny: WordPiece) -> None:
    with pytest.raises(ValueError, match="context of 0"):
        tiny.encode_pair("a", context_length=0)


# --- files

@settings(max_examples=20)
@given(text=TEXT)
def test_saved_for_both_sides(both: tuple[WordPiece, Any], tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    ours, _ = both
    folder = tmp_path_factory.getbasetemp() / f"größe {ours.normalizer.lowercase}"
    if not folder.exists():
        ours.save(folder)
    theirs, again = transformers.AutoTokenizer.from_pretrained(folder), WordPiece.from_pretrained(folder)
    assert type(theirs).__name__ == "BertTokenizer"
    assert theirs(text)["input_ids"] == ours.join(ours.encode(text, allow_special=True))[0]
    assert (again.tokens, again.normalizer.lowercase) == (ours.tokens, ours.normalizer.lowercase)


def test_tokenizers_reads_the_file_itself(both: tuple[WordPiece, Any], tmp_path: Path) -> None:
    both[0].save(tmp_path)
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = file.encode("Résumé of xyz", "中文 [MASK]")
    with_mask = both[0].join(both[0].encode("Résumé of xyz"), both[0].encode("中文 [MASK]", allow_special=True))
    assert (found.ids, found.type_ids) == with_mask


@pytest.mark.parametrize("length", [None, 128])
def test_reads_what_bert_tokenizer_saves(both: tuple[WordPiece, Any], tmp_path: Path, length: int | None) -> None:
    ours, _ = both
    reference(ours, **({} if length is None else {"model_max_length": length})).save_pretrained(tmp_path)
    again = WordPiece.from_pretrained(tmp_path)
    assert (again.tokens, again.normalizer.lowercase, again.model_max_length) == (
        ours.tokens, ours.normalizer.lowercase, length)
    again.save(tmp_path / "more")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "more").model_max_length == (length or int(1e30))


def test_vocab_txt_alone(both: tuple[WordPiece, Any], tmp_path: Path) -> None:
    ours, _ = both
    ours.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert WordPiece.from_pretrained(tmp_path).normalizer.lowercase == ours.normalizer.lowercase
    (tmp_path / "tokenizer_config.json").unlink()
    again = WordPiece.from_pretrained(tmp_path)
    assert again.tokens == ours.tokens and again.normalizer.lowercase
    (tmp_path / "vocab.txt").write_bytes((tmp_path / "vocab.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert WordPiece.from_pretrained(tmp_path).tokens == ours.tokens


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer.json and no vocab.txt in"):
        WordPiece.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, message", [
    (b"", "lacks \\[PAD\\]"), (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n", "lacks \\[MASK\\]"),
    ("\n".join([*SPECIAL_TOKENS, "a", "a"]).encode(), "'a' twice"),
    ("\n".join([*SPECIAL_TOKENS, "", "a"]).encode(), "empty"),
    (b"\xff\xfe[PAD]", "utf-8")])
def test_damaged_vocab_txt(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        WordPiece.from_pretrained(tmp_path)
    assert str(tmp_path / "vocab.txt") in str(caught.value) and "\n" not in str(caught.value)


def change(file: dict, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for part in parts:
        file = file[int(part) if part.isdigit() else part]
    file[last] = value


@pytest.mark.parametrize("name, path, value", [
    ("tokenizer.json", "model.type", "BPE"), ("tokenizer.json", "model.unk_token", "<unk>"),
    ("tokenizer.json", "model.continuing_subword_prefix", "@@"),
    ("tokenizer.json", "model.max_input_chars_per_word", 50),
    ("tokenizer.json", "normalizer.clean_text", False), ("tokenizer.json", "normalizer.handle_chinese_chars", False),
    ("tokenizer.json", "normalizer.strip_accents", False), ("tokenizer.json", "normalizer.type", "Lowercase"),
    ("tokenizer.json", "pre_tokenizer.type", "Whitespace"), ("tokenizer.json", "added_tokens.4.lstrip", True),
    ("tokenizer.json", "normalizer.lowercase", False), ("tokenizer_config.json", "do_lower_case", False),
    ("tokenizer_config.json", "tokenize_chinese_chars", False), ("tokenizer_config.json", "mask_token", "<mask>"),
    ("tokenizer_config.json", "strip_accents", False)])
def test_foreign_settings_are_named(tiny: WordPiece, tmp_path: Path, name: str, path: str, value: Any) -> None:
    tiny.save(tmp_path)
    WordPiece.from_pretrained(tmp_path)
    file = json.loads((tmp_path / name).read_text())
    change(file, path, value)
    (tmp_path / name).write_text(json.dumps(file))
    named = {"lowercase": "do_lower_case", "lstrip": "added_tokens"}.get(path.split(".")[-1], path.split(".")[-1])
    with pytest.raises(ValueError, match=named) as caught:
        WordPiece.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {}}', '{"model": null}',
                                     '{"model": {"type": "WordPiece", "vocab": 3}}'])
def test_damaged_tokenizer_json(tiny: WordPiece, tmp_path: Path, content: str) -> None:
    tiny.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json") as caught:
        WordPiece.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_token_outside_the_vocabulary_is_not_dropped(tiny: WordPiece, tmp_path: Path) -> None:
    theirs = reference(tiny)
    theirs.add_tokens(["<extra>"])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="added_tokens.*<extra>"):
        WordPiece.from_pretrained(tmp_path)
