"""Folders: each file is a picture of its class, an error in one line, or a named skip; splits do not leak."""

import io
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bigmodel.data.folders import PictureFolder
from bigmodel.data.images import Preprocessor, read_picture


def picture(seed: int, side: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, **counts: int) -> Path:
    """Class folders with that many pictures each, all different."""
    seed = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:03}.png").write_bytes(picture(seed := seed + 1))
    return folder


def refusal(folder, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        PictureFolder.find(folder, **options)
    assert type(caught.value) in (ValueError, FileNotFoundError) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def pets(tmp_path):
    return fill(tmp_path / "my pets 宠物", cat=5, dog=4, 鸟=3)


# Finding

def test_folders_are_classes(pets):
    found = PictureFolder.find(str(pets))
    assert found.classes == ("cat", "dog", "鸟") and len(found) == 12 and not found.skipped
    assert found.targets.tolist() == [0] * 5 + [1] * 4 + [2] * 3 and found.targets.dtype == torch.int64
    assert [path.parent.name for path in found.paths] == [found.classes[target] for target in found.targets]
    assert len(set(found.digests)) == 12
    assert found.describe() == "12 pictures in 3 classes: cat 5, dog 4, 鸟 3; 0 skipped"


def test_the_name_decides_nothing_but_the_class(pets):
    (pets / "cat" / "no extension").write_bytes(picture(100))
    (pets / "cat" / "wrong.txt").write_bytes(picture(101))
    assert len(PictureFolder.find(pets)) == 14


def test_what_file_managers_leave_is_passed_over(pets):
    for place in (pets, pets / "dog"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._001.png", ".hidden.png"):
            (place / name).write_bytes(b"\0\1\2")
        (place / "__MACOSX").mkdir()
    (pets / ".git").mkdir()
    found = PictureFolder.find(pets)
    assert found.classes == ("cat", "dog", "鸟") and len(found) == 12 and not found.skipped


def spoil(pets: Path, how: str) -> Path:
    """Add one file that cannot be used."""
    place = pets / "cat" / f"bad {how}.jpg"
    if how == "empty":
        place.write_bytes(b"")
    elif how == "cut short":
        place.write_bytes(picture(200, side=20)[:500])
    elif how == "text":
        place.write_text("a cat")
    elif how == "bomb":
        Image.new("1", (12000, 12000)).save(place, "PNG")
    elif how == "folder":
        place.mkdir()
    elif how == "dangling link":
        place.symlink_to(pets / "nowhere")
    elif how == "circle":
        place.symlink_to(place)
    elif how == "link to itself from inside":
        place.symlink_to(pets, target_is_directory=True)
    elif how == "pipe":
        os.mkfifo(place)
    elif how == "beside":
        (place := pets / "stray.png").write_bytes(picture(201))
    return place


SPOILS = ["empty", "cut short", "text", "bomb", "folder", "dangling link", "circle", "link to itself from inside",
          "pipe", "beside"]


@pytest.mark.parametrize("how", SPOILS)
def test_what_cannot_be_used_is_an_error_or_a_named_skip(pets, how):
    place = spoil(pets, how)
    assert str(place) in refusal(pets) and "unreadable='skip'" in refusal(pets)
    found = PictureFolder.find(pets, unreadable="skip")
    assert len(found) == 12 and [path for path, _ in found.skipped] == [place]
    assert str(place) in found.skipped[0][1] and "1 skipped" in found.describe() and str(place) in found.describe()


def test_errors_count_what_else_is_wrong(pets):
    places = [spoil(pets, how) for how in SPOILS]
    assert f"({len(places)} such files)" in refusal(pets)
    found = PictureFolder.find(pets, unreadable="skip")
    assert {path for path, _ in found.skipped} == set(places) and len(found) == 12


def test_folders_that_are_no_data_set(tmp_path, pets):
    assert "there is no folder" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "there is no folder" in refusal(tmp_path / "file")
    (tmp_path / "bare").mkdir()
    assert "no class folder" in refusal(tmp_path / "bare")
    assert "no class folder" in refusal(pets / "cat")
    assert "one class folder, 'cat'" in refusal(fill(tmp_path / "one", cat=3))
    assert "unreadable is 'ignore'" in refusal(pets, unreadable="ignore")


def test_a_class_without_pictures_is_an_error_even_when_skipping(pets):
    (pets / "eel").mkdir()
    for unreadable in ("raise", "skip"):
        assert "eel holds no picture" in refusal(pets, unreadable=unreadable)
    (pets / "eel" / "eel.png").write_bytes(b"")
    assert "eel holds no picture that can be used, and 1 other file(s)" in refusal(pets, unreadable="skip")


def test_classes_one_level_down_are_not_taken_for_pictures(tmp_path):
    fill(tmp_path / "set" / "train", cat=2, dog=2)
    fill(tmp_path / "set" / "test", cat=2, dog=2)
    assert "one level down?" in refusal(tmp_path / "set")
    assert "holds no picture" in refusal(tmp_path / "set", unreadable="skip")


def test_links_are_followed(tmp_path, pets):
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(pets / name, target_is_directory=True)
    assert len(PictureFolder.find(tmp_path / "linked")) == 9


def test_one_file_in_two_classes_has_no_label(pets):
    shutil.copy(pets / "cat" / "001.png", pets / "dog" / "my cat.png")
    shutil.copy(pets / "cat" / "002.png", pets / "cat" / "002 copy.png")  # in one class: harmless
    assert "is the same file as" in refusal(pets) and "lies in another class" in refusal(pets)
    found = PictureFolder.find(pets, unreadable="skip")
    assert {path.name for path, _ in found.skipped} == {"001.png", "my cat.png"} and len(found) == 12


def test_the_limit_of_pixels_is_the_callers(pets):
    assert "expected 1 to 35" in refusal(pets, max_pixels=35)
    assert len(PictureFolder.find(pets, max_pixels=36)) == 12


# labels.csv

def rows(pets: Path) -> list[str]:
    return [f"{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(pets.glob("*/*.png"))]


def write_labels(pets: Path, lines: list[str], head: str = "file,label", encoding: str = "utf-8") -> None:
    (pets / "labels.csv").write_bytes("\n".join([head, *lines]).encode(encoding))


@pytest.mark.parametrize("change", [
    lambda lines: lines, lambda lines: lines[::-1], lambda lines: [line.replace("/", "\\") for line in lines],
    lambda lines: ["./" + line for line in lines], lambda lines: lines + lines[:2] + [""],
    lambda lines: [",".join(f'"{part}"' for part in line.split(",")) for line in lines]])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_that_agree(pets, change, encoding):
    write_labels(pets, change(rows(pets)), encoding=encoding)
    assert len(PictureFolder.find(pets)) == 12


@pytest.mark.parametrize("change, says", [
    (lambda lines: [lines[0].replace(",cat", ",dog"), *lines[1:]],
     "about 1 file(s), first: cat/000.png is 'dog' there and lies in 'cat'"),
    (lambda lines: [line.replace(",cat", ",CAT") for line in lines], "about 5 file(s)"),
    (lambda lines: lines[1:], "cat/000.png is not listed"), (lambda lines: [], "about 12 file(s)"),
    (lambda lines: [*lines, "cat/999.png,cat"], "cat/999.png is nowhere"),
    (lambda lines: [*lines, lines[0].replace(",cat", ",dog")], "two labels"),
    (lambda lines: [*lines, "cat/000.png"], "incomplete")])
@pytest.mark.parametrize("unreadable", ["raise", "skip"])
def test_labels_that_disagree(pets, change, says, unreadable):
    write_labels(pets, change(rows(pets)))
    assert says in refusal(pets, unreadable=unreadable) and "labels.csv" in refusal(pets, unreadable=unreadable)


def test_labels_that_cannot_be_read(pets):
    write_labels(pets, rows(pets), head="name;class")
    assert "cannot be used" in refusal(pets)
    write_labels(pets, rows(pets), encoding="gb18030")
    assert "expected UTF-8" in refusal(pets)
    (pets / "labels.csv").write_bytes(b"")
    assert "cannot be used" in refusal(pets)
    (pets / "labels.csv").unlink()
    (pets / "labels.csv").mkdir()
    refusal(pets)


def test_labels_may_name_what_was_skipped(pets):
    spoil(pets, "empty")
    write_labels(pets, [*rows(pets), "cat/bad empty.jpg,cat"])
    assert len(PictureFolder.find(pets, unreadable="skip")) == 12


# Splitting

def sides(found: PictureFolder, **options) -> tuple[set[str], set[str]]:
    train, validation = found.split(**options)
    assert len(train) + len(validation) == len(found) and not set(train.paths) & set(validation.paths)
    assert train.classes == validation.classes == found.classes
    for part in (train, validation):
        assert [path.parent.name for path in part.paths] == [part.classes[target] for target in part.targets]
    return set(train.digests), set(validation.digests)


def pretend(counts: dict[str, int], seed: int = 0) -> PictureFolder:
    """A folder that was found, without files."""
    chance, names = random.Random(seed), tuple(sorted(counts))
    targets = [names.index(name) for name, count in counts.items() for _ in range(count)]
    digests = tuple(chance.randbytes(16).hex() for _ in targets)
    paths = tuple(Path(names[target], f"{number}.png") for number, target in enumerate(targets))
    return PictureFolder(Path(), names, paths, torch.tensor(targets), digests)


@given(counts=st.dictionaries(st.sampled_from("abcd"), st.integers(2, 40), min_size=2),
       share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_every_class_gets_its_share(counts, share, seed):
    found = pretend(counts, seed)
    train, validation = found.split(share, seed)
    sides(found, validation=share, seed=seed)
    for target, name in enumerate(found.classes):
        held_out = (validation.targets == target).sum().item()
        assert 1 <= held_out < counts[name] and abs(held_out - share * counts[name]) <= 1


@given(added=st.integers(0, 12), seed=st.integers(0, 9))
def test_added_pictures_move_at_most_as_many_others(added, seed):
    larger = pretend({"a": 30 + added}, seed)
    smaller = PictureFolder(Path(), ("a",), larger.paths[:30], larger.targets[:30], larger.digests[:30])
    before, after = smaller.split(0.2)[1].digests, larger.split(0.2)[1].digests
    assert len((set(before) ^ set(after)) & set(smaller.digests)) <= added


def test_names_order_and_place_play_no_part(tmp_path, pets):
    before = sides(PictureFolder.find(pets))
    moved = Path(shutil.move(pets, tmp_path / "elsewhere"))
    for number, path in enumerate(sorted(moved.glob("*/*.png"), reverse=True)):
        path.rename(path.with_name(f"renamed {number}.jpeg"))
    assert sides(PictureFolder.find(moved)) == before
    assert sides(PictureFolder.find(moved), seed=1) != before, "another seed, another split"


def test_equal_files_stay_together(pets):
    for number in range(3):
        shutil.copy(pets / "cat" / "000.png", pets / "cat" / f"copy {number}.png")
    for seed in range(10):
        train, validation = sides(PictureFolder.find(pets), seed=seed)
        assert not train & validation


def test_splits_that_cannot_be(pets):
    found = PictureFolder.find(pets)
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="expected a share"):
            found.split(share)
    with pytest.raises(ValueError, match="class 'b' has 1 different picture"):
        pretend({"a": 3, "b": 1}).split()


# Loading

def test_pictures_are_loaded_in_order(pets):
    found = PictureFolder.find(pets)
    for preprocessor, mode in ((Preprocessor((4, 7)), "RGB"), (Preprocessor(9, (0.5,), (0.5,)), "L")):
        pixels = found.load(preprocessor)
        assert pixels.shape == (12, preprocessor.num_channels, *preprocessor.size) and pixels.dtype == torch.uint8
        for row, path in zip(pixels, found.paths):
            assert np.array_equal(row.permute(1, 2, 0), preprocessor.resize(read_picture(path, mode)))
        expected = preprocessor([read_picture(path, mode) for path in found.paths])
        assert torch.equal(preprocessor.normalize(pixels), expected)


def test_a_picture_that_went_bad_since_is_named(pets):
    found = PictureFolder.find(pets)
    found.paths[3].write_bytes(b"")
    with pytest.raises(ValueError, match="003.png is empty"):
        found.load(Preprocessor(4))
    found.paths[3].unlink()
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        found.load(Preprocessor(4))


@settings(max_examples=5)
@given(seed=st.integers(0, 99))
def test_a_damaged_collection_is_read_or_listed(tmp_path_factory, seed):
    folder, chance = fill(tmp_path_factory.mktemp("damaged") / "set", a=12, b=12), random.Random(seed)
    for path in sorted(folder.glob("*/*.png"))[1::2]:
        content = bytearray(path.read_bytes())
        for _ in range(chance.randint(1, 9)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[:chance.randint(1, 2 * len(content))])
    found = PictureFolder.find(folder, unreadable="skip")
    assert len(found) + len(found.skipped) == 24 and len(found) >= 12
    assert found.load(Preprocessor(5)).shape == (len(found), 3, 5, 5)
    assert found.targets.tolist() == [found.classes.index(path.parent.name) for path in found.paths]
