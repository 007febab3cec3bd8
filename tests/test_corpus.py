"""The corpus: what is not text is refused, cleaning loses nothing visible, copies are found, splits do not leak."""

import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel.data.corpus import (
    QualityRules,
    clean,
    deduplicate,
    hash_text,
    jaccard,
    load_corpus,
    minhash,
    quality_problems,
    read_text,
    shingles,
    split,
    split_in_order,
)

WHOLE = st.characters(exclude_categories=["Cs"])  # every code point that an encoding accepts
ODD = st.sampled_from("\r\n\t \x0b\x0c\x00\x85\u2028\u200b\u200d\ufeff\u00ade\u0301😀")
MESSY = st.text(st.one_of(st.characters(), ODD))


@pytest.fixture(scope="module")
def reference():
    return load_corpus("python-reference")


# Reading

@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_reading_gives_every_character_back(tmp_path_factory, text, encoding):
    path = tmp_path_factory.mktemp("read") / "text.txt"
    path.write_bytes(text.encode(encoding))
    assert read_text(path) == text


@pytest.mark.parametrize("encoding, mark", [
    ("utf-16-be", b"\xfe\xff"), ("utf-16-le", b"\xff\xfe"), ("utf-32-be", b"\0\0\xfe\xff")])
def test_reading_believes_a_mark_in_either_byte_order(tmp_path, encoding, mark):
    (tmp_path / "text.txt").write_bytes(mark + "é中😀\r\n".encode(encoding))
    assert read_text(str(tmp_path / "text.txt")) == "é中😀\r\n"


@pytest.mark.parametrize("data, says", [
    (b"", "is empty (0 bytes)"), (b"\xef\xbb\xbf", "is empty (3 bytes)"), (b"PNG\0\1", "offset 3 is NUL"),
    ("hi".encode("utf-16-le"), "iconv -f UTF-16LE"), (b"caf\xe9 ol\xe9", "0xe9 at offset 3"),
    ("ab中".encode()[:-1], "at offset 2"), ("hi".encode("utf-16")[:-1], "not valid UTF-16")])
def test_what_is_not_text_is_refused_in_one_line(tmp_path, data, says):
    path = tmp_path / "dir with ünïcode" / "bad.txt"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_text(path)
    message = str(caught.value)
    assert says in message and str(path) in message and "\n" not in message


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "letters.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="did you mean 'letters.txt'"):
        read_text(tmp_path / "leters.txt")
    with pytest.raises(FileNotFoundError, match="check the spelling"):
        read_text(tmp_path / "nowhere" / "at all.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_text(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "secret.txt").touch(mode=0o000)
    with pytest.raises(PermissionError, match="change its permissions"):
        read_text(tmp_path / "secret.txt")


# Cleaning

def visible(text: str) -> str:
    """What can be seen, defined without any of the cleaner's own rules."""
    return unicodedata.normalize("NFC", "".join(c for c in text if c.isprintable() and not c.isspace()))


@settings(max_examples=400)
@given(MESSY)
def test_cleaning_twice_changes_nothing_more(text):
    once = clean(text)
    assert clean(once) == once


@settings(max_examples=400)
@given(st.text(st.one_of(WHOLE, st.sampled_from("\r\n \u200b\u200de\u0301"))))
def test_cleaning_loses_no_visible_character(text):
    assert visible(clean(text)) == visible(text)


@pytest.mark.parametrize("broken", [
    lambda text: unicodedata.normalize("NFKC", text), lambda text: text.encode("ascii", "ignore").decode(),
    lambda text: text.replace("½", "")])
def test_the_check_on_visible_characters_sees_a_loss(broken):
    assert visible(broken("2⁵ ½ é")) != visible("2⁵ ½ é")


@given(MESSY)
def test_clean_text_is_uniform(text):
    out = clean(text)
    out.encode("utf-8")  # no surrogates
    assert unicodedata.is_normalized("NFC", out)
    assert not set(out) & set("\r\x00\x0b\x0c\x85\u2028\u2029\ufeff\u200b\u00ad")
    assert all(line == line.rstrip(" \t") for line in out.split("\n")) and "\n\n\n\n" not in out


@pytest.mark.parametrize("before, after", [
    ("a\r\nb\rc\u2028d", "a\nb\nc\nd"), ("\ufeffx", "x"), ("e\u0301", "é"), ("\ud83d\ude00", "😀"),
    ("x  \n\n\n\n\n  y\t\n", "x\n\n\n  y"), ("a\ud83db", "a\ufffdb"), ("👩\u200d🚀", "👩\u200d🚀"),
    ("می\u200cخواهم", "می\u200cخواهم"), ("in\u200bvis\u00adible", "invisible"), ("  if x:\n\ty", "  if x:\n\ty"),
    ("", ""), (" \n \r\n", "")])
def test_cleaning_rule_by_rule(before, after):
    assert clean(before) == after


# Quality

def test_good_documents_pass_whatever_their_language(reference):
    good = ["语言模型从文字中学习。它读过的句子越多样，能写出的句子就越自然；它读过的错误越多，写出的错误也越多。" * 2,
            "Языковая модель учится на текстах, и чем они разнообразнее, тем лучше она пишет.", max(reference, key=len)]
    for text in good:
        assert quality_problems(text, QualityRules(min_characters=60)) == []


@pytest.mark.parametrize("text, problem", [
    ("short", "visible characters"), ("Home\nNews\nLog in\n" * 30, "repeated lines"), ("12 | 24\n" * 9, "letters"),
    ("ab" * 4000, "size"), ("\n".join(f"story {i} of…" for i in range(40)), "cut off"),
    ("text \ufffd\ufffd" * 40, "damaged"), ("", "visible characters"), ("\n\n", "visible characters")])
def test_bad_documents_are_named_for_what_is_wrong(text, problem):
    assert any(problem in found for found in quality_problems(text)), quality_problems(text)


def test_thresholds_are_arguments():
    assert quality_problems("a line\nof text", QualityRules(min_characters=5)) == []


# Duplicates

def test_fingerprints_are_the_same_everywhere():
    assert hash_text("To be, or not to be") == 0xb491dbd4d7495049
    assert hash_text("a", seed=1) != hash_text("a") != hash_text("a", seed=-1)
    assert hash_text("\ud83d") != hash_text("\ude00")


@given(st.text("abc ", max_size=60), st.text("abc ", max_size=60), st.integers(1, 5))
def test_hashed_shingles_measure_what_sets_of_strings_measure(a, b, size):
    def exact(text):
        text = " ".join(text.split()).ljust(size)
        return {text[i:i + size] for i in range(len(text) - size + 1)}

    truth = len(exact(a) & exact(b)) / len(exact(a) | exact(b))
    assert jaccard(shingles(a, size), shingles(b, size)) == truth


def pair_of_sets(similarity: float, size: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    values = np.unique(np.random.default_rng(1).integers(1 << 63, size=2 * size, dtype=np.uint64))
    shared = round(size * similarity)
    left = shared + (size - shared) // 2
    return values[:left], np.sort(np.concatenate([values[:shared], values[left:size]]))


@pytest.mark.parametrize("similarity", [0.0, 0.1, 0.5, 0.8, 0.95, 1.0])
def test_minhash_estimates_the_exact_index(similarity):
    a, b = pair_of_sets(similarity)
    exact = jaccard(a, b)
    assert abs(exact - similarity) < 0.001
    estimate = np.mean(minhash(a, 4096) == minhash(b, 4096))
    assert abs(estimate - exact) <= 4 * np.sqrt(exact * (1 - exact) / 4096) + 1e-9


def test_minhash_needs_the_same_functions_for_both():
    a, _ = pair_of_sets(1.0)
    assert np.mean(minhash(a, seed=0) == minhash(a, seed=0)) == 1
    assert np.mean(minhash(a, seed=0) == minhash(a, seed=1)) < 0.1  # negative control


@given(st.lists(st.text("ab", max_size=3), max_size=30))
def test_exact_duplicates_go_and_the_first_stay_in_order(documents):
    kept = deduplicate(documents)
    assert sorted(kept) == sorted(set(documents))
    assert [documents.index(text) for text in kept] == sorted(documents.index(text) for text in kept)


def test_near_duplicates_go_and_nothing_else(reference):
    long = [text for text in reference if len(text) > 1500]
    edited = [text.replace("a", "A", 3).replace("\n", "  ", 5) + " And one more sentence." for text in long]
    mixed = random.Random(0).sample(long + edited, 2 * len(long))
    kept = deduplicate(mixed, similarity=0.8)
    assert len(kept) == len(deduplicate(long, similarity=0.8))
    for text in set(mixed) - set(kept):
        assert max(jaccard(shingles(text), shingles(other)) for other in kept) >= 0.8
    assert len(deduplicate(mixed)) == len(set(mixed))  # negative control: a hash does not see them


def test_most_pairs_above_the_threshold_are_caught():
    rng, caught = random.Random(3), 0
    for _ in range(60):
        lines = ["".join(rng.choices("abcdefgh ", k=40)) for _ in range(60)]
        other = lines[:56] + ["".join(rng.choices("abcdefgh ", k=40)) for _ in range(4)]
        pair = ["\n".join(lines), "\n".join(other)]
        assert 0.8 < jaccard(*map(shingles, pair)) < 0.95
        caught += len(deduplicate(pair, similarity=0.8)) == 1
    assert caught >= 52


@pytest.mark.parametrize("similarity", [0.0, -1.0, 1.1])
def test_a_similarity_out_of_range_is_refused(similarity):
    with pytest.raises(ValueError, match="out of range"):
        deduplicate(["a"], similarity=similarity)


# Splitting

DOCUMENTS = st.lists(st.text(max_size=4), min_size=60, max_size=120, unique=True)


@given(DOCUMENTS, st.randoms(use_true_random=False), st.integers(0, 5))
def test_a_split_does_not_move_when_others_come_or_change_places(documents, rng, seed):
    train, held_out = split(documents, validation=0.4, seed=seed)
    assert sorted(train + held_out) == sorted(documents)
    shuffled = rng.sample(documents + ["a new one"], len(documents) + 1)
    assert set(split(shuffled, validation=0.4, seed=seed)[1]) - {"a new one"} == set(held_out)


def test_copies_stay_on_one_side_and_a_shuffle_parts_them():
    documents = [f"document {i}" for i in range(500)] * 2
    train, held_out = split(documents)
    assert not set(train) & set(held_out) and len(held_out) % 2 == 0
    shuffled = random.Random(0).sample(documents, 1000)
    assert set(shuffled[:900]) & set(shuffled[900:])  # negative control


def test_the_share_is_kept_near_enough():
    documents = [str(i) for i in range(10_000)]
    for share in (0.05, 0.1, 0.5):
        assert abs(len(split(documents, share)[1]) / 10_000 - share) < 4 * np.sqrt(share * (1 - share) / 10_000)
    assert split(documents, 0.1, seed=0)[1] != split(documents, 0.1, seed=1)[1]
    assert set(split(documents, 0.05)[1]) < set(split(documents, 0.1)[1])
    assert split(documents, 0.0) == (documents, [])


def test_splits_that_cannot_be_made():
    with pytest.raises(ValueError, match="leaves the validation side empty; .*split_in_order"):
        split(["one"])
    with pytest.raises(ValueError, match="out of range"):
        split(["one", "two"], validation=1.0)
    with pytest.raises(ValueError, match="out of range"):
        split_in_order("text", validation=-0.1)
    with pytest.raises(ValueError, match="a text of 0 character"):
        split_in_order("")
    with pytest.raises(TypeError):
        split("a string instead of a list")


@given(st.text(min_size=2), st.floats(0.01, 0.99))
def test_in_order_nothing_is_lost(text, share):
    try:
        train, held_out = split_in_order(text, share)
    except ValueError:
        return
    assert train + held_out == text and train and held_out


# Corpora

@pytest.mark.parametrize("name, documents, characters", [
    ("python-reference", 60, 300_000), ("python-docstrings", 5000, 1_000_000), ("python-source", 400, 5_000_000)])
def test_built_in_corpora_are_there_and_the_same_each_time(name, documents, characters):
    found = load_corpus(name)
    assert len(found) >= documents and sum(map(len, found)) >= characters and all(found)
    assert found == load_corpus(name)


def test_the_source_holds_neither_tests_nor_the_reference_text(reference):
    source = "\n".join(load_corpus("python-source"))
    assert max(reference, key=len)[:80] not in source
    assert "def test_sleep" not in source


def test_docstrings_are_read_without_importing_anything():
    code = ("import sys; from bigmodel.data.corpus import load_corpus; before = set(sys.modules);"
            "load_corpus('python-docstrings');"
            "assert not {'tkinter', 'this', 'antigravity', 'turtle'} & (set(sys.modules) - before)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_and_missing_corpora(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="one of python-reference, python-docstrings, python-source, shakespeare"):
        load_corpus("wikipedia")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # as in a Python that was cut down
    with pytest.raises(FileNotFoundError, match="installed without it"):
        load_corpus("python-reference")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="installed without it"):
        load_corpus("python-source")


@pytest.mark.skipif(not Path(os.environ.get("BIGMODEL_DATA", "nowhere"), "tinyshakespeare.txt").is_file(),
                    reason="BIGMODEL_DATA names no folder with tinyshakespeare.txt")
def test_shakespeare_splits_as_in_every_published_comparison():
    documents = load_corpus("shakespeare")
    train, held_out = split_in_order(documents[0])
    assert (len(documents), len(train), len(held_out)) == (1, 1_003_854, 111_540)
    assert visible(clean(documents[0])) == visible(documents[0])


def test_another_file_in_its_place_is_refused(monkeypatch, tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("To be")
    monkeypatch.setenv("BIGMODEL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="SHA-256"):
        load_corpus("shakespeare")
