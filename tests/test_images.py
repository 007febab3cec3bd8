"""Pictures: read as they are meant to be seen or refused in one line, and preprocessed exactly as transformers does."""

import io
import logging
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import types
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import bigmodel.data.images as images
from bigmodel.core import write_json
from bigmodel.data.images import MAX_PIXELS, Preprocessor, check_picture, load_pictures, read_picture


def noise(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def encode(picture, kind, **options) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def lossless(kind: str) -> dict[str, bool]:
    return {"lossless": True} if kind == "WEBP" else {}


def smooth(height=20, width=24) -> np.ndarray:
    slope = np.add.outer(np.arange(height) * 6, np.arange(width) * 5)[:, :, None] + np.array([0, 15, 5])
    return (slope % 256).astype(np.uint8)


def refusal(*arguments, **options) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_picture(*arguments, **options)
    assert type(caught.value) in (ValueError, FileNotFoundError) and "\n" not in str(caught.value)
    return str(caught.value)


# Reading what is meant

arrays = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 99))


@given(shape=arrays, kind=st.sampled_from(["PNG", "BMP", "TIFF", "GIF", "WEBP"]))
@settings(max_examples=60)
def test_what_is_written_without_loss_is_read_back(shape, kind):
    height, width, channels, seed = shape
    if kind == "GIF":
        channels = 1  # its palette has 256 entries
    pixels = noise(height, width, channels, seed=seed)
    content = encode(pixels.squeeze(-1) if channels == 1 else pixels, kind, **lossless(kind))
    found = read_picture(content)
    assert found.shape == (height, width, 3) and found.flags.writeable
    assert np.array_equal(found, np.broadcast_to(pixels, found.shape))
    if channels == 1 and kind != "WEBP":
        assert np.array_equal(read_picture(content, mode="L"), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(smooth(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert np.array_equal(read_picture(content), expected)
    assert expected.shape == ((24, 20, 3) if orientation > 4 else (20, 24, 3))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_picture(encode(smooth(), "PNG", exif=exif)), smooth())


def test_damaged_exif_does_not_keep_a_picture_from_being_read():
    content = encode(smooth(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert np.array_equal(read_picture(content), smooth())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(kind):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(deep / 257).astype(np.uint8)
    assert np.array_equal(read_picture(encode(deep, kind), "L")[:, :, 0], expected)
    assert np.array_equal(read_picture(encode(deep, kind)), expected[:, :, None].repeat(3, 2))
    clipped = np.asarray(Image.fromarray(deep).convert("L"))
    assert (clipped == 255).mean() > 0.99, "the control: Pillow's own conversion would make nearly all of it white"


def test_16_bits_in_the_other_byte_order_and_in_colour():
    deep = noise(6, 7, dtype=np.uint16)
    big = Image.frombytes("I;16B", (7, 6), deep.astype(">u2").tobytes())
    assert np.array_equal(read_picture(encode(big, "TIFF"), "L")[:, :, 0], np.round(deep / 257))
    colour = noise(6, 7, 3, dtype=np.uint16)
    content = cv2.imencode(".png", colour[:, :, ::-1])[1].tobytes()
    assert np.abs(read_picture(content) - colour / 257).max() <= 1  # Pillow keeps the upper eight bits


def test_32_bits_have_no_agreed_white():
    for mode in ("I", "F"):
        assert "32-bit" in refusal(encode(Image.new(mode, (3, 3), 7), "TIFF"))


def tiff(values: bytes, bits: int, photometric: int | None, height: int, width: int) -> bytes:
    """A grey TIFF written by hand: Pillow writes neither 12 bits nor 16 with white as zero."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, len(values))]
    tags = [tag for tag in tags if tag[1] is not None]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed(values: np.ndarray) -> bytes:
    """12-bit numbers, two in three bytes, each row filled up to a byte."""
    rows = ["".join(f"{value:012b}" for value in row) for row in values]
    return b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)


@pytest.mark.parametrize("width", [1, 6, 7])
def test_12_bits_of_a_tiff_are_scaled_to_white(width):
    deep = noise(5, width, dtype=np.uint16) >> 4
    deep[0, 0], deep[4, 0] = 4095, 0
    content = tiff(packed(deep), 12, 1, 5, width)
    assert np.array_equal(read_picture(content, "L")[:, :, 0], np.round(deep / (4095 / 255)))
    assert read_picture(content).max() == 255, "taken for 16 bits, white would be 16"
    check_picture(content)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_may_say_that_zero_is_white(bits):
    values = noise(4, 6, dtype=f"u{bits // 8}")
    for photometric in (0, 1):
        found = read_picture(tiff(values.tobytes(), bits, photometric, 4, 6), "L")[:, :, 0]
        expected = np.round(values / (257 if bits == 16 else 1))
        assert np.array_equal(found, expected if photometric else 255 - expected)


def test_numbers_of_a_tiff_whose_meaning_is_not_known_are_refused():
    for bits, photometric in ((10, 1), (14, 1), (12, 0), (16, None), (16, 7)):
        content = tiff(packed(noise(4, 6, dtype=np.uint16) >> 4) + bytes(99), bits, photometric, 4, 6)
        if (bits, photometric) == (16, None):
            assert read_picture(content).shape == (4, 6, 3)
        else:
            assert "is damaged" in refusal(content)


def test_colour_profiles_are_not_applied():
    from PIL import ImageCms

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(read_picture(encode(smooth(), "PNG", icc_profile=lab)), smooth())


@given(seed=st.integers(0, 1000))
def test_transparency_is_put_on_white(seed):
    pixels = noise(5, 6, 4, seed=seed)
    alpha = pixels[:, :, 3:] / 255
    expected = pixels[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(read_picture(encode(pixels, "PNG")) - expected).max() <= 1
    assert read_picture(encode(pixels, "PNG"), "L").shape == (5, 6, 1)


def test_transparency_without_an_alpha_channel():
    palette = Image.fromarray(smooth()).quantize(16)
    places, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    for content in (encode(palette, "PNG", transparency=3), encode(palette, "GIF", transparency=3, optimize=False)):
        found = read_picture(content)
        assert (found[places == 3] == 255).all() and np.array_equal(found[places != 3], colours[places != 3])
    half = read_picture(encode(palette, "PNG", transparency=bytes([128] * 16)))
    assert np.abs(half - (colours / 2 + 127.5)).max() <= 1.5
    grey = smooth()[:, :, 0]
    assert (read_picture(encode(grey, "PNG", transparency=30))[grey == 30] == 255).all()
    deep = grey.astype(np.uint16) * 257
    assert (read_picture(encode(deep, "PNG", transparency=30 * 257), "L")[grey == 30] == 255).all()
    rgb = tuple(map(int, smooth()[0, 0]))
    assert (read_picture(encode(smooth(), "PNG", transparency=rgb))[0, 0] == 255).all()
    assert (read_picture(encode(Image.new("1", (4, 4)), "PNG", transparency=0)) == 255).all()
    assert (read_picture(encode(Image.new("LA", (4, 4), (0, 0)), "PNG")) == 255).all()


def test_cmyk_and_other_colours():
    paper = Image.fromarray(smooth()).convert("CMYK")
    for kind, options in (("JPEG", {"quality": 95}), ("TIFF", {})):
        found = read_picture(encode(paper, kind, **options)).astype(int)
        assert np.abs(found - smooth()).mean() < 8, "inverted inks would be off by about 100"
    television = encode(Image.fromarray(smooth()).convert("YCbCr"), "TIFF")
    assert np.abs(read_picture(television).astype(int) - smooth()).max() < 4
    assert set(np.unique(read_picture(encode(Image.fromarray(smooth()).convert("1"), "PNG")))) <= {0, 255}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue", "green")]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **lossless(kind))
    assert np.array_equal(read_picture(content), np.asarray(frames[0]))


def test_paths_with_spaces_and_any_script(tmp_path):
    path = tmp_path / "我的 图片" / "cat #1 (копия) é.png"
    path.parent.mkdir()
    path.write_bytes(encode(smooth(), "PNG"))
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(read_picture(source), smooth())
    os.symlink(path, tmp_path / "link")
    assert np.array_equal(read_picture(tmp_path / "link"), smooth()), "links are followed, names decide nothing"
    path.write_bytes(b"")
    assert refusal(path).startswith(f"{path} is empty")


# Refusing

GOOD = {kind: encode(smooth(), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")}


@pytest.mark.parametrize("content, says", [
    (b"", "is empty (0 bytes)"),
    (b"Dear reader, this is a letter.", "is no picture that can be read: it begins with b'Dear reader, thi'"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),  # would be given to another program
    (b"P6 2 2 255 " + bytes(12), "is no picture"),  # PPM: not among the kinds allowed
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"), (b"\0" * 500, "is no picture"),
    *((content[:len(content) // 2], "is damaged or cut short") for content in GOOD.values()),
    *((content[:12], "is damaged or cut short") for content in GOOD.values())])
def test_what_cannot_be_read_is_named(tmp_path, content, says):
    path = tmp_path / "名 字.jpg"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} {says}")
    assert refusal(content).startswith(f"a picture of {len(content)} bytes {says}")
    with pytest.raises(ValueError):
        check_picture(path)


def test_paths_that_are_no_pictures(tmp_path, monkeypatch):
    assert refusal(tmp_path / "none.png") == f"there is no picture {tmp_path / 'none.png'}"
    assert "PictureFolder" in refusal(tmp_path)
    assert "cannot be opened" in refusal(tmp_path / ("x" * 300))
    refusal("null\0byte.png")
    os.symlink(tmp_path / "b", tmp_path / "a")
    assert "dangling" in refusal(tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    assert "cannot be opened" in refusal(tmp_path / "a"), "links in a circle"
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refusal(tmp_path / "pipe"), "reading a pipe would wait forever"
    (tmp_path / "secret.png").write_bytes(GOOD["PNG"])
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert refusal(tmp_path / "secret.png").endswith("(Permission denied); expected a picture file")
    assert "mode is 'RGBA'" in refusal(GOOD["PNG"], mode="RGBA")


@pytest.mark.parametrize("side", [9500, 14000])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)  # kilobytes that claim gigabytes
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warning must not come on top
        message = refusal(path)
    assert "bomb.png claims" in message and time.process_time() - start < 1


def test_the_limit_of_pixels_is_the_callers(tmp_path):
    assert read_picture(GOOD["PNG"], max_pixels=480).shape == (20, 24, 3)
    assert "claims 24 x 20 pixels; expected 1 to 479" in refusal(GOOD["PNG"], max_pixels=479)
    big = encode(Image.new("1", (9500, 9500)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_picture(big, max_pixels=2 * MAX_PIXELS)


@pytest.mark.parametrize("kind", GOOD)
def test_a_file_cut_anywhere_is_refused_or_whole(kind):
    content, whole = GOOD[kind], read_picture(GOOD[kind])
    for length in range(0, len(content), max(1, len(content) // 60)):
        try:
            found = read_picture(content[:length])
        except ValueError:
            continue
        assert found.shape == whole.shape
        assert np.array_equal(found, whole), f"{kind} cut after {length} of {len(content)} bytes"


def test_reading_leaves_warnings_and_logs_as_they_were(capfd):
    before = list(warnings.filters)
    damaged = bytearray(encode(Image.fromarray(smooth()).quantize(8), "PNG", transparency=bytes(8)))
    damaged[40] ^= 255
    for content in (GOOD["JPEG"], bytes(damaged), GOOD["TIFF"][:200]):
        try:
            read_picture(content)
        except ValueError:
            pass
    logging.getLogger("PIL.TiffImagePlugin").error("what Pillow logs about a file that nobody asked about")
    assert warnings.filters == before and capfd.readouterr() == ("", "")


def test_pictures_are_read_side_by_side():
    contents = [*GOOD.values(), b"", GOOD["PNG"][:300]] * 20

    def outcome(content):
        try:
            return read_picture(content).tobytes()
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, contents)) == [outcome(content) for content in contents]


# Fuzzing

def fuzz_seeds() -> dict[str, bytes]:
    rgb = Image.fromarray(smooth())
    with_alpha, exif = rgb.copy(), Image.Exif()
    with_alpha.putalpha(rgb.convert("L"))
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 50}
    deep = smooth()[:, :, 0].astype(np.uint16) * 257
    return {**GOOD, "alpha": encode(with_alpha, "PNG"), "deep": encode(deep, "PNG"),
            "palette": encode(rgb.quantize(8), "PNG", transparency=2), "turned": encode(rgb, "JPEG", exif=exif),
            "progressive": encode(rgb, "JPEG", progressive=True), "inks": encode(rgb.convert("CMYK"), "JPEG"),
            "frames": encode(rgb, "GIF", **frames), "moving": encode(rgb, "WEBP", **frames),
            "lossless": encode(with_alpha, "WEBP", lossless=True), "grey": encode(rgb.convert("L"), "BMP")}


def mutate(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(min(len(changed), chance.choice([40, 10**6])) or 1)  # headers are hit more often
        match chance.randrange(6):
            case 0:
                changed[place:place + 1] = chance.randbytes(1)
            case 1 if changed:
                changed[place] ^= 1 << chance.randrange(8)
            case 2:
                del changed[place:place + chance.randint(1, 20)]
            case 3:
                changed[place:place] = chance.randbytes(chance.randint(1, 8))
            case 4:
                changed[place:place + 4] = chance.choice([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"])
            case 5 if chance.random() < 0.3:
                del changed[place:]
    return bytes(changed)


def test_six_thousand_damaged_files_are_read_or_refused(capfd):
    chance, seeds, outcomes, slowest = random.Random(0), fuzz_seeds(), Counter(), 0.0
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6000):
            name = chance.choice(list(seeds))
            content, before = mutate(seeds[name], chance), time.process_time()
            mode, channels = chance.choice([("RGB", 3), ("L", 1)])
            try:
                found = read_picture(content, mode, max_pixels=1_000_000)
            except ValueError as error:
                assert type(error) is ValueError and "\n" not in str(error)
                assert str(error).startswith(f"a picture of {len(content)} bytes "), (number, name)
                outcomes[name, "refused"] += 1
            else:
                assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == channels and found.size
                outcomes[name, "read"] += 1
            slowest = max(slowest, time.process_time() - before)
    assert capfd.readouterr() == ("", ""), "no noise"
    assert slowest < 2 and time.process_time() - start < 25
    assert all(outcomes[name, "refused"] > 20 for name in seeds), "the control: mutations do harm"
    assert sum(outcomes[name, "read"] for name in seeds) > 500, "the control: not everything is refused"


def test_the_quick_check_says_what_reading_says():
    chance, large, differ = random.Random(1), {}, 0
    for kind in ("JPEG", "PNG", "WEBP"):
        large[kind] = encode(np.tile(smooth(), (9, 9, 1)), kind)
    for _ in range(300):
        content, outcomes = mutate(chance.choice(list(large.values())), chance), []
        for attempt in (read_picture, check_picture):
            try:
                attempt(content, max_pixels=1_000_000)
                outcomes.append(True)
            except ValueError:
                outcomes.append(False)
        differ += outcomes[0] != outcomes[1]
    assert differ <= 3  # a JPEG may hide a fault from one of its two decoders


# Preprocessing

@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), height=st.integers(1, 90), width=st.integers(1, 90),
       channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_preprocessing_equals_transformers(size, height, width, channels, seed):
    from transformers import ViTImageProcessorPil

    chance = np.random.default_rng(seed)
    mean, std = (tuple(map(float, chance.uniform(low, 1, channels))) for low in (0, 0.05))
    picture = noise(height, width, channels, seed=seed)
    theirs = ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, image_mean=mean, image_std=std)
    expected = theirs(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert torch.equal(Preprocessor(size, mean, std)([picture]), expected)


def test_the_comparison_would_notice():
    preprocessor, picture = Preprocessor((20, 30)), np.tile(noise(9, 11, 3), (7, 9, 1))
    right = preprocessor([picture])
    assert not torch.allclose(right, preprocessor([np.ascontiguousarray(picture[:, :, ::-1])]), atol=0.1), "BGR for RGB"
    careless = torch.from_numpy(cv2.resize(picture, (30, 20))).permute(2, 0, 1)[None]
    assert not torch.allclose(right, preprocessor.normalize(careless), atol=0.1), "aliasing"
    swapped = Preprocessor((30, 20))([picture]).transpose(2, 3)
    assert not torch.allclose(right, swapped, atol=0.1), "height for width"
    assert not torch.allclose(right, right + 3 / 127.5, rtol=0, atol=2.1 / 127.5), "three steps of 255"


@pytest.mark.parametrize("preprocessor", [
    Preprocessor(32), Preprocessor((7, 13), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Preprocessor((9, 4), (0.1307,), (0.3081,))])
def test_what_is_saved_transformers_loads_and_back(tmp_path, preprocessor):
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    preprocessor.save(tmp_path / "dir with 空格")
    assert Preprocessor.from_pretrained(tmp_path / "dir with 空格") == preprocessor
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "dir with 空格")
    theirs.save_pretrained(tmp_path / "again")
    assert Preprocessor.from_pretrained(tmp_path / "again") == preprocessor
    pictures = [noise(31, 17, preprocessor.num_channels, seed=seed) for seed in range(3)]
    on_pillow = ViTImageProcessorPil.from_pretrained(tmp_path / "dir with 空格")
    exact, near = (tool(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
                   for tool in (on_pillow, theirs))
    assert torch.equal(preprocessor(pictures), exact)
    two_steps = 2.1 / 255 / min(preprocessor.std)  # where torchvision is installed, its class is chosen
    assert torch.allclose(preprocessor(pictures), near, rtol=0, atol=two_steps)


@pytest.mark.parametrize("settings, says", [
    ({"resample": 3}, "resample = 3"), ({"do_center_crop": True}, "do_center_crop = True"),
    ({"do_resize": False}, "do_resize = False"), ({"do_normalize": False}, "do_normalize"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor"), ({"image_processor_type": "CLIPImageProcessor"}, "CLIP"),
    ({"feature_extractor_type": "ConvNextFeatureExtractor"}, "ConvNext"), ({"size": {"shortest_edge": 9}}, "shortest"),
    ({"size": 0}, "size"), ({"image_mean": 0.5}, "mean is 0.5"), ({"image_std": [0, 1, 1]}, "std"),
    ({"image_mean": [0.5]}, "mean"), ({"image_mean": ["a", "b", "c"]}, "mean is ['a'"), ({"image_mean": None}, "mean"),
    ({"size": "224"}, "size is '224'"), ({"size": {"height": None, "width": 3}}, "size"), ({"size": [8, 8, 8]}, "size"),
    ({"do_flip_channel_order": True}, "do_flip_channel_order = True"), ({"crop_pct": 0.875}, "crop_pct = 0.875"),
    ({"offset": True}, "offset"), ({"do_pad": True}, "do_pad"), ({"size_divisor": 32}, "size_divisor"),
    ({"default_to_square": False}, "default_to_square"), ({"data_format": "channels_last"}, "data_format")])
def test_settings_of_other_processors_are_refused_by_name(tmp_path, settings, says):
    half = [0.5] * 3
    write_json(tmp_path / "preprocessor_config.json", {"size": 8, "image_mean": half, "image_std": half, **settings})
    with pytest.raises(ValueError) as caught:
        Preprocessor.from_pretrained(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "preprocessor_config.json"))


def test_settings_of_older_transformers_are_read(tmp_path):
    write_json(tmp_path / "preprocessor_config.json", {
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": 224})
    assert Preprocessor.from_pretrained(tmp_path) == Preprocessor(224)
    write_json(tmp_path / "preprocessor_config.json", {  # as transformers 4 writes it from its fast class
        "crop_size": None, "data_format": "channels_first", "default_to_square": True, "device": None,
        "disable_grouping": None, "do_center_crop": None, "do_convert_rgb": None, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_processor_type":
        "ViTImageProcessorFast", "image_std": [0.5, 0.5, 0.5], "input_data_format": None, "resample": 2,
        "rescale_factor": 1 / 255, "return_tensors": None, "size": {"height": 9, "width": 7}})
    assert Preprocessor.from_pretrained(tmp_path) == Preprocessor((9, 7))
    with pytest.raises(FileNotFoundError):
        Preprocessor.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged or cut short"):
        Preprocessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [
    {"size": 0}, {"size": (4, -1)}, {"size": True}, {"mean": (0.5,)}, {"std": (0.5, 0.0, 0.5)},
    {"std": (1.0, -1.0, 1.0)}, {"mean": (float("nan"),) * 3}, {"mean": (0.5,) * 4, "std": (0.5,) * 4},
    {"mean": (), "std": ()}])
def test_a_preprocessor_that_cannot_work_is_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        Preprocessor(**{"size": 8, **fields})


@given(channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_normalising_can_be_undone_and_batches_change_nothing(channels, seed):
    preprocessor = Preprocessor((6, 5), (0.45,) * channels, (0.22,) * channels)
    pictures = [noise(6, 5, channels, seed=seed + i) for i in range(3)]
    batch = preprocessor(pictures)
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    back = ((batch * 0.22 + 0.45) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, np.stack(pictures))
    assert torch.equal(batch, torch.cat([preprocessor([picture]) for picture in pictures]))
    assert torch.equal(batch, preprocessor.normalize(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)))


def test_other_arrays_are_refused_also_where_no_type_is_checked():
    code = """if True:
        import numpy as np
        import torch
        from bigmodel.data.images import Preprocessor
        tool = Preprocessor(4)
        attempts = [lambda: tool(torch.zeros(2, 3, 5, 6, dtype=torch.uint8)),
                    lambda: tool.normalize(torch.rand(1, 3, 4, 4)),
                    lambda: tool.normalize(torch.zeros(1, 1, 4, 4, dtype=torch.uint8)),
                    lambda: tool.normalize(torch.zeros(3, 4, 4, dtype=torch.uint8)),
                    lambda: Preprocessor(np.int64(4)), lambda: Preprocessor(None), lambda: Preprocessor("32"),
                    lambda: Preprocessor(4, mean=0.5), lambda: Preprocessor(4, std=None),
                    lambda: Preprocessor(4, mean=("a", "b", "c")), lambda: Preprocessor(4, mean="abc")]
        for wrong in ([np.zeros((5, 5, 3))], [np.zeros((5, 5), np.uint8)], [np.zeros((5, 5, 4), np.uint8)], [],
                      [np.zeros((0, 5, 3), np.uint8)], np.zeros((5, 5, 3), np.uint8), ["cat.png"]):
            attempts.append(lambda wrong=wrong: tool(wrong))
        for attempt in attempts:
            try:
                print("accepted", attempt())
            except ValueError as error:
                print(error)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 18 and "accepted" not in run.stdout and all("expected" in line for line in lines)
    assert "float64 (5, 5, 3)" in lines[11] and "4 channels" in lines[13] and "got str" in lines[17]
    assert "float32 [1, 3, 4, 4]" in lines[1] and "size is None" in lines[5] and "mean is 0.5" in lines[7]


# Sets of pictures

def test_digits_are_scikit_learns_in_its_own_split():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    expected = train_test_split(digits.images, digits.target, shuffle=False, test_size=0.5)
    train, test = load_pictures("digits")
    for found, values, targets in ((train, expected[0], expected[2]), (test, expected[1], expected[3])):
        assert found.pixels.shape == (len(values), 1, 8, 8) and found.classes == tuple("0123456789")
        assert np.abs(found.pixels[:, 0].numpy() * (16 / 255) - values).max() < 0.5 / 15
        assert np.array_equal(found.targets, targets)
    assert (len(train.pixels), len(test.pixels), train.pixels.max().item()) == (898, 899, 255)


def test_digits_in_another_size_and_in_colour():
    plain, _ = load_pictures("digits")
    train, test = load_pictures("digits", size=(20, 12), channels=3)
    assert train.pixels.shape == (898, 3, 20, 12) and test.pixels.shape == (899, 3, 20, 12)
    assert torch.equal(train.pixels[:, 0], train.pixels[:, 2]) and train.pixels.is_contiguous()
    by_pillow = Image.fromarray(plain.pixels[5, 0].numpy()).resize((12, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(train.pixels[5, 1], by_pillow)


@pytest.mark.parametrize("options", [
    {"name": "mnist"}, {"name": "digits", "channels": 2}, {"name": "digits", "size": 0}])
def test_sets_that_do_not_exist(options):
    with pytest.raises(ValueError, match="expected"):
        load_pictures(**options)


@pytest.fixture
def cifar10():
    rows = noise(60, 3073)
    rows[:, 0] %= 10
    return rows


def as_pictures(rows):
    return rows[:, 1:].reshape(-1, 3, 32, 32)


def test_cifar10_from_its_archive(tmp_path, monkeypatch, cifar10):
    rows = np.concatenate([np.tile(cifar10[:50], (1000, 1)), np.tile(cifar10[50:], (1000, 1))])
    with tarfile.open(tmp_path / "cifar.tar.gz", "w") as archive:  # not compressed, for speed
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        for name, part in zip(names, np.split(rows, 6)):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            entry.size = part.nbytes
            archive.addfile(entry, io.BytesIO(part.tobytes()))
    monkeypatch.setattr(images, "find_data", lambda *_: tmp_path / "cifar.tar.gz")
    train, test = load_pictures("cifar10")
    assert train.pixels.shape == (50000, 3, 32, 32) and test.pixels.shape == (10000, 3, 32, 32)
    assert np.array_equal(train.pixels[:50], as_pictures(cifar10[:50])) and train.classes[3] == "cat"
    assert np.array_equal(test.pixels[:10], as_pictures(cifar10[50:]))
    assert np.array_equal(test.targets[:10], cifar10[50:, 0])


def missing(*_) -> Path:
    raise FileNotFoundError("data file 'cifar-10-binary.tar.gz' not found")


def test_cifar10_through_datasets(monkeypatch, cifar10):
    pictures = [Image.fromarray(x.transpose(1, 2, 0)) for x in as_pictures(cifar10)]
    part = {"img": pictures, "label": cifar10[:, 0].tolist()}
    hub = types.SimpleNamespace(load_dataset=lambda name: {"train": part, "test": part})
    monkeypatch.setattr(images, "find_data", missing)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    train, test = load_pictures("cifar10", channels=1, size=16)
    assert train.pixels.shape == test.pixels.shape == (60, 1, 16, 16)
    assert np.array_equal(load_pictures("cifar10")[0].pixels, as_pictures(cifar10))
    assert np.array_equal(train.targets, cifar10[:, 0])


def test_cifar10_without_network_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(images, "find_data", missing)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError) as caught:
        load_pictures("cifar10")
    message = str(caught.value)
    assert "cifar-10-binary.tar.gz" in message and "digits" in message and "\n" not in message
