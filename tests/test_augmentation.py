"""Augmentation: OpenCV's and Pillow's numbers, nothing changed by strength 0, batches from seed and step alone."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from bigmodel.data.augmentation import (
    Affine,
    Color,
    Compose,
    Crop,
    Cutout,
    Flip,
    Noise,
    PictureBatches,
    adjust_colors,
    affine_matrices,
    mixup,
    ordered_batches,
    warp,
)

cv2 = pytest.importorskip("cv2")

floats = partial(st.floats, allow_subnormal=False)  # the package has the processor flush those to zero
STEPS = (Crop(2), Flip(), Affine(30, 0.2, 0.3, 20), Color(0.5, 0.5, 0.5), Noise(0.3), Cutout(5))
NOTHING = (Crop(0), Flip(0.0), Affine(), Color(), Noise(0.0), Cutout(0))
SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(3, 20), st.integers(3, 20))
MAPS = dict(degrees=floats(-180, 180), right=floats(-10, 10), down=floats(-10, 10), scale=floats(0.5, 2),
            shear=floats(-40, 40), height=st.integers(8, 50), width=st.integers(8, 50))


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_pixels(shape, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=chance(seed))


def smooth_picture(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).random((height, width, 3), dtype=np.float32)
    return np.ascontiguousarray(cv2.GaussianBlur(noise, (0, 0), sigmaX=2))


def as_pixels(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


def as_picture(pixels: torch.Tensor) -> np.ndarray:
    return pixels[0].permute(1, 2, 0).numpy()


def one_map(height, width, degrees, right, down, scale, shear) -> torch.Tensor:
    numbers = [torch.tensor([value], dtype=torch.float64) for value in (degrees, scale, shear)]
    shift = torch.tensor([[right, down]], dtype=torch.float64)
    return affine_matrices((height, width), numbers[0], shift, *numbers[1:])


def warp_with_opencv(picture: np.ndarray, matrix: torch.Tensor) -> np.ndarray:
    return cv2.warpAffine(picture, matrix[0].numpy(), picture.shape[1::-1],
                          flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT)


# Affine: OpenCV

def largest_step(picture: np.ndarray) -> float:
    """How much neighbouring pixels differ at most, along rows and columns together, with the black outside."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)))
    return float(sum(np.abs(np.diff(padded, axis=axis)).max() for axis in (0, 1)))


@given(**MAPS)
def test_warp_is_opencvs_but_for_its_rounding_of_places(height, width, **amounts):
    picture, matrix = smooth_picture(height, width), one_map(height, width, **amounts)
    ours, theirs = as_picture(warp(as_pixels(picture), matrix)), warp_with_opencv(picture, matrix)
    assert np.abs(ours - theirs).max() <= largest_step(picture) * 1.1 / 64 + 1e-5  # it reads up to 1/64 pixel beside


@given(**MAPS)
def test_at_places_that_opencv_does_not_round_both_are_equal(height, width, **amounts):
    picture, matrix = smooth_picture(height, width), (one_map(height, width, **amounts) * 32).round() / 32
    apart = np.abs(as_picture(warp(as_pixels(picture), matrix)) - warp_with_opencv(picture, matrix))
    assert apart.max() < 1e-5


@pytest.mark.parametrize("wrong", ["corners", "forward", "half a pixel", "swapped"])
def test_a_wrong_map_is_caught(wrong):
    picture, matrix = smooth_picture(40, 50), one_map(40, 50, 20.0, 3.0, 1.0, 1.2, 5.0)
    theirs, step = warp_with_opencv(picture, matrix), largest_step(picture) * 1.1 / 64 + 1e-5
    broken = matrix.clone()
    if wrong == "half a pixel":
        broken[:, :, 2] += 0.5
    elif wrong == "swapped":
        broken = broken[:, [1, 0]]
    elif wrong == "forward":
        broken = torch.from_numpy(cv2.invertAffineTransform(matrix[0].numpy()))[None]
    else:  # coordinates as if -1 and 1 were the centres of the outer pixels
        theta = torch.nn.functional.affine_grid(matrix.float(), [1, 3, 40, 50], align_corners=True)
        ours = torch.nn.functional.grid_sample(as_pixels(picture), theta, align_corners=True)
        assert np.abs(as_picture(ours) - theirs).max() > step
        return
    assert np.abs(as_picture(warp(as_pixels(picture), broken)) - theirs).max() > step


@given(degrees=floats(-360, 360), scale=floats(0.3, 3), height=st.integers(2, 60), width=st.integers(2, 60))
def test_rotation_and_scale_are_opencvs(degrees, scale, height, width):
    theirs = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    ours = one_map(height, width, degrees, 0.0, 0.0, scale, 0.0)[0].numpy()
    assert np.allclose(ours, cv2.invertAffineTransform(theirs), atol=1e-9)


@given(**MAPS)
def test_matrices_undo_shear_then_turn_and_scale_then_shift(height, width, degrees, right, down, scale, shear):
    angle, centre = np.radians(degrees), np.array([(width - 1) / 2, (height - 1) / 2])
    lean, turn = np.array([[1, np.tan(np.radians(shear))], [0, 1]]), np.array([[np.cos(angle), np.sin(angle)],
                                                                               [-np.sin(angle), np.cos(angle)]])
    point = np.array([3.0, 5.0])
    there = scale * turn @ lean @ (point - centre) + centre + (right, down)
    back = one_map(height, width, degrees, right, down, scale, shear)[0].numpy() @ [*there, 1]
    assert np.allclose(back, point, atol=1e-6)


def test_directions_are_as_described():
    pixels = torch.zeros(1, 1, 9, 9)
    pixels[0, 0, 4, 6] = 1  # to the right of the centre
    brightest = lambda **amounts: divmod(int(warp(pixels, one_map(9, 9, **(dict(  # noqa: E731
        degrees=0.0, right=0.0, down=0.0, scale=1.0, shear=0.0) | amounts)).float()).argmax()), 9)
    assert brightest(degrees=90.0) == (2, 4) and brightest(scale=2.0) == (4, 8)  # counter-clockwise: up
    assert brightest(right=1.0) == (4, 7) and brightest(down=2.0) == (6, 6)
    lower = torch.zeros(1, 1, 9, 9)
    lower[0, 0, 6, 4] = 1
    assert warp(lower, one_map(9, 9, 0.0, 0.0, 0.0, 1.0, 45.0).float())[0, 0, 6].argmax() == 6


# Colours: Pillow and OpenCV

@given(factor=floats(0, 2), kind=st.sampled_from([0, 1, 2]), seed=st.integers(0, 5), grey=st.booleans())
def test_colors_are_pillows(factor, kind, seed, grey):
    picture = np.random.default_rng(seed).integers(0, 256, (12, 15, 1 if grey else 3), dtype=np.uint8)
    factors = [torch.tensor([factor if i == kind else 1.0]) for i in range(3)]
    ours = as_picture(adjust_colors(as_pixels(picture) / 255, *factors)) * 255
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
    theirs = np.asarray(enhance(Image.fromarray(picture.squeeze())).enhance(factor)).reshape(picture.shape)
    assert np.abs(ours - theirs).max() < 1.01 + 0.5 * max(1, abs(1 - factor))  # Pillow rounds down, and the grey before


def test_bgr_for_rgb_is_caught():
    picture = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    one, none = torch.ones(1), torch.zeros(1)
    ours = as_picture(adjust_colors(as_pixels(picture).flip(1) / 255, one, one, none)) * 255
    theirs = np.asarray(ImageEnhance.Color(Image.fromarray(picture)).enhance(0.0))[:, :, ::-1]
    assert np.abs(ours - theirs).max() > 20


@given(factor=floats(0, 3))
def test_brightness_is_opencvs(factor):
    picture = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    one = torch.ones(1)
    ours = as_picture(adjust_colors(as_pixels(picture) / 255, factor * one, one, one)) * 255
    assert np.abs(ours - cv2.convertScaleAbs(picture, alpha=factor)).max() < 0.51


def test_grey_is_opencvs():
    picture = np.random.default_rng(0).random((12, 15, 3), dtype=np.float32)
    one, none = torch.ones(1), torch.zeros(1)
    ours = as_picture(adjust_colors(as_pixels(picture), one, one, none))
    assert np.abs(ours - cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[:, :, None]).max() < 1e-6


@pytest.mark.parametrize("channels", [2, 4])
def test_colors_need_one_or_three_channels(channels):
    with pytest.raises(ValueError, match=f"have {channels} channels; expected 1 .* or 3"):
        Color(0.1, 0.1, 0.1)(torch.rand(2, channels, 4, 4), chance())


# Every step

@given(shape=SHAPES, seed=st.integers(0, 1000), step=st.sampled_from([*STEPS, Compose(*STEPS)]))
def test_every_step_keeps_shape_and_range_and_depends_on_its_generator_alone(shape, seed, step):
    pixels, state = some_pixels(shape, seed), torch.get_rng_state()
    before = pixels.clone()
    changed = step(pixels, chance(seed))
    assert changed.shape == pixels.shape and changed.dtype == pixels.dtype and changed.is_contiguous()
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-6 and changed.isfinite().all()
    assert torch.equal(pixels, before), "what was given has been changed"
    assert torch.equal(changed, step(pixels, chance(seed)))
    assert torch.equal(torch.get_rng_state(), state)


@given(shape=SHAPES, seed=st.integers(0, 1000), step=st.sampled_from([*NOTHING, Compose(), Compose(*NOTHING)]))
def test_strength_zero_changes_nothing_at_all(shape, seed, step):
    pixels = some_pixels(shape, seed)
    assert torch.equal(step(pixels, chance(seed)), pixels)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_every_step_changes_pictures_and_each_in_its_own_way(step):
    pixels = some_pixels((1, 3, 16, 16)).repeat(32, 1, 1, 1)
    changed = step(pixels, chance())
    kinds = len({tuple(picture.flatten().tolist()) for picture in changed})
    assert not torch.equal(changed, pixels) and kinds == 2 if isinstance(step, Flip) else kinds > 10


@pytest.mark.parametrize("step, fixed", [(Affine(20, 0.1, 0.1, 5), "degrees"), (Color(0.2, 0.3, 0.4), "contrast")])
def test_turning_one_knob_leaves_the_chance_of_the_others(step, fixed):
    off = replace(step, **{fixed: 0.0})
    noise = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for augment, generator in zip((step, off), noise):
        augment(some_pixels((4, 3, 8, 8)), generator)
    assert torch.equal(noise[0].get_state(), noise[1].get_state())


@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_a_batch_is_its_pictures_one_by_one(shape, seed):
    pixels, (count, _, height, width) = some_pixels(shape, seed), shape
    numbers = torch.rand(7, count, generator=chance(seed))
    maps = affine_matrices((height, width), numbers[0] * 360, numbers[1:3].T * 4, 0.5 + numbers[3], numbers[4] * 40)
    together = warp(pixels, maps), adjust_colors(pixels, *numbers[4:] * 2)
    for i in range(count):
        only = slice(i, i + 1)
        assert torch.equal(warp(pixels[only], maps[only]), together[0][only])
        assert torch.allclose(adjust_colors(pixels[only], *numbers[4:, only] * 2), together[1][only], atol=1e-6)


def test_an_exact_picture_among_warped_ones_stays_exact():
    pixels = some_pixels((3, 3, 11, 7))
    maps = torch.stack([torch.eye(2, 3), torch.eye(2, 3) * 1.1, torch.eye(2, 3)])
    changed = warp(pixels, maps)
    assert torch.equal(changed[[0, 2]], pixels[[0, 2]]) and not torch.allclose(changed[1], pixels[1])


@given(shape=SHAPES, padding=st.integers(0, 2), seed=st.integers(0, 1000))
def test_crops_are_windows_of_the_padded_picture(shape, padding, seed):
    pixels, (_, _, height, width) = some_pixels(shape, seed), shape
    padded = torch.nn.functional.pad(pixels, [padding] * 4)
    for picture, frame in zip(Crop(padding)(pixels, chance(seed)), padded):
        assert any(torch.equal(picture, frame[:, top:top + height, left:left + width])
                   for top in range(2 * padding + 1) for left in range(2 * padding + 1))


def test_crops_reach_every_place_equally_often():
    pixels = torch.zeros(9000, 1, 5, 5)
    pixels[:, :, 2, 2] = 1
    places = Crop(1)(pixels, chance()).flatten(1).argmax(1).bincount(minlength=25).reshape(5, 5)
    assert places[1:4, 1:4].sum() == 9000 and places[1:4, 1:4].min() > 850


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_flips_are_mirror_images_as_often_as_asked(probability):
    pixels = some_pixels((4000, 1, 2, 3))
    changed = Flip(probability)(pixels, chance())
    flipped = (changed == pixels.flip(-1)).flatten(1).all(1)
    assert torch.equal(changed[~flipped], pixels[~flipped]) and abs(flipped.float().mean() - probability) < 0.03


@given(size=st.integers(0, 30), height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 1000))
def test_cutout_makes_one_rectangle_that_is_a_square_within_the_picture(size, height, width, seed):
    holes = Cutout(size)(torch.ones(8, 3, height, width), chance(seed)) == 0
    assert (holes == holes[:, :1]).all()
    for hole in holes[:, 0]:
        rows, columns = hole.any(1).nonzero().flatten().tolist(), hole.any(0).nonzero().flatten().tolist()
        assert hole.sum() == len(rows) * len(columns)
        assert bool(rows) == (size > 0) and len(rows) <= min(size, height) and len(columns) <= min(size, width)
        for places, side in ((rows, height), (columns, width)):
            assert not places or places == list(range(places[0], places[-1] + 1))
            assert not places or len(places) == size or places[0] == 0 or places[-1] == side - 1  # cut by the border


def test_noise_has_the_strength_that_it_says():
    grey = torch.full((2000, 1, 16, 16), 0.5)
    spread = (Noise(0.1)(grey, chance()) - grey).flatten(1).std(1)
    assert spread.min() < 0.01 and 0.09 < spread.max() < 0.12 and abs(spread.mean() - 0.05) < 0.003


def test_affine_draws_within_its_strengths():
    pixels = torch.zeros(500, 1, 41, 41)
    pixels[:, :, 20, 36] = 1  # 16 to the right of the centre
    places = Affine(degrees=30)(pixels, chance()).flatten(1).argmax(1)
    down, right = places // 41 - 20, places % 41 - 20
    angles = torch.atan2(-down.float(), right.float()).rad2deg()
    assert 25 < angles.max() < 34 and -34 < angles.min() < -25
    pixels = torch.zeros(500, 1, 40, 20)
    pixels[:, :, 20, 10] = 1
    places = Affine(translate=0.1)(pixels, chance()).flatten(1).argmax(1)
    down, right = places // 20 - 20, places % 20 - 10
    assert (down.max(), down.min(), right.max(), right.min()) == (4, -4, 2, -2)


def test_compose_does_its_steps_in_order():
    pixels = some_pixels((8, 3, 12, 12))
    steps, generator = (Noise(0.2), Cutout(6)), chance()
    expected = steps[1](steps[0](pixels, generator), generator)
    assert torch.equal(Compose(*steps)(pixels, chance()), expected)
    assert not torch.equal(Compose(*steps[::-1])(pixels, chance()), expected)
    assert Compose(*steps) == Compose(*steps) and "Cutout(size=6)" in repr(Compose(*steps))


@pytest.mark.parametrize("make, message", [
    (lambda: Crop(-1), "padding of Crop is -1"), (lambda: Flip(1.5), "probability of Flip is 1.5.*to 1"),
    (lambda: Affine(scale=1.0), "scale of Affine"), (lambda: Affine(shear=90.0), "shear of Affine"),
    (lambda: Affine(translate=5), "translate of Affine is 5.*to 1"),
    (lambda: Affine(degrees=float("nan")), "degrees of Affine is nan"),
    (lambda: Color(contrast=2.0), "contrast of Color"),
    (lambda: Noise(-0.1), "std of Noise"), (lambda: Cutout(-3), "size of Cutout")])
def test_strengths_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
@pytest.mark.parametrize("pixels, found", [
    (torch.zeros(2, 3, 6, 8, dtype=torch.uint8), r"torch.uint8 of shape \(2, 3, 6, 8\)"),
    (torch.zeros(3, 6, 8), r"torch.float32 of shape \(3, 6, 8\)"),
    (torch.zeros(2, 3, 6, 8).long(), "torch.int64"), (torch.zeros(1, 2, 3, 6, 8), r"torch.float32 of shape \(1, 2,")])
def test_pixels_that_are_no_floats_with_four_axes(step, pixels, found):
    with pytest.raises(ValueError, match=f"pixels are {found}.*; expected numbers from 0 to 1, as floats") as caught:
        step(pixels, chance())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("padding", [6, 9])
def test_a_crop_larger_than_the_picture(padding):
    with pytest.raises(ValueError, match="out of sight; expected a padding below 6"):
        Crop(padding)(torch.rand(2, 1, 6, 8), chance())


# Mixup

@given(shape=SHAPES, alpha=floats(0.01, 10), classes=st.integers(1, 12), seed=st.integers(0, 1000))
def test_mixup_mixes_pictures_and_targets_in_the_same_shares(shape, alpha, classes, seed):
    count = shape[0]
    targets = torch.randint(classes, (count,), generator=chance(seed))
    marked = torch.eye(count)[:, :, None, None].repeat(1, 1, 2, 3)  # as many channels as pictures: a picture's own is 1
    pixels, soft = mixup(marked, targets, classes, alpha, chance(seed))
    assert soft.shape == (count, classes) and soft.dtype == torch.float32 and soft.min() >= 0
    assert torch.allclose(soft.sum(1), torch.ones(count), atol=1e-6)
    shares = pixels[:, :, 0, 0]  # how much of which picture
    assert torch.allclose(shares @ torch.nn.functional.one_hot(targets, classes).float(), soft, atol=1e-6)
    assert torch.equal(mixup(marked, targets, classes, alpha, chance(seed))[0], pixels)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_draws_from_the_beta_distribution(alpha):
    marked, targets = torch.eye(2).repeat(10_000, 1)[:, :, None, None], torch.arange(2).repeat(10_000)
    shares = mixup(marked, targets, 2, alpha, chance())[1]
    mixed = shares[(shares > 0).all(1)][:, 0]
    assert abs(mixed.mean() - 0.5) < 0.01 and abs(mixed.var() - 1 / (4 * (2 * alpha + 1))) < 0.004


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_mixup_needs_a_positive_alpha(alpha):
    with pytest.raises(ValueError, match="alpha of mixup is .*; expected a number above 0"):
        mixup(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), 2, alpha, chance())


@pytest.mark.parametrize("targets", [[0, 3], [-1, 0]])
def test_mixup_refuses_classes_that_do_not_exist(targets):
    with pytest.raises(ValueError, match="expected classes from 0 to 2"):
        mixup(torch.rand(2, 1, 4, 4), torch.tensor(targets), 3, 1.0, chance())


# Batches

def numbered(count: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures whose pixels and targets both say which picture it is."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, channels, 4, 5)
    return pixels, torch.arange(count)


def make(count: int = 37, **settings) -> PictureBatches:
    return PictureBatches(*numbered(count), **(dict(batch_size=8, augment=Compose(*STEPS)) | settings))


@given(count=st.integers(1, 200), batch_size=st.integers(1, 50), seed=st.integers(0, 50), epoch=st.integers(0, 4))
def test_in_an_epoch_every_picture_is_used_once_in_an_order_of_its_own(count, batch_size, seed, epoch):
    batches = PictureBatches(*numbered(count), batch_size, seed, mean=(0.0,), std=(1.0,))
    first, last = epoch * count, (epoch + 1) * count
    steps = range(first // batch_size, -(-last // batch_size))
    pixels, targets = (torch.cat(part) for part in zip(*(batches[step] for step in steps)))
    assert len(targets) == len(steps) * batch_size and torch.equal((pixels[:, 0, 0, 0] * 255).round().long(), targets)
    start = first - steps[0] * batch_size
    assert sorted(targets[start:start + count].tolist()) == list(range(count))
    assert batches.batches_per_epoch == -(-count // batch_size) and batches.pictures_per_batch == batch_size


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(make(30, batch_size=30, seed=seed)[step][1].tolist()) for seed in range(5) for step in range(20)]
    assert len(set(orders)) == 100


@settings(max_examples=40)
@given(seed=st.integers(0, 2**40), steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=3),
       alpha=st.sampled_from([0, 1]))
def test_a_step_needs_nothing_but_its_number(seed, steps, alpha):
    used = make(seed=seed, mixup=float(alpha), num_classes=37)
    for step in range(3):
        used[step]
    torch.rand(3), np.random.rand(3)  # what others draw does not matter either
    state = torch.get_rng_state()
    for step in steps:
        for ours, fresh in zip(used[step], make(seed=seed, mixup=float(alpha), num_classes=37)[step]):
            assert torch.equal(ours, fresh)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_process_makes_the_same_batch():
    code = ("import torch; from bigmodel.data.augmentation import *;"
            "pixels = (torch.arange(37 * 64) % 251).to(torch.uint8).reshape(37, 1, 8, 8);"
            "augment = Compose(Crop(2), Flip(), Affine(9), Color(0.2), Noise(0.1), Cutout(3));"
            "batches = PictureBatches(pixels, torch.arange(37), 8, 3, augment, mixup=1.0, num_classes=37);"
            "found = [part.double().sum().item() for part in batches[1234]]")
    there = subprocess.run([sys.executable, "-c", f"{code}; print(found)"], check=True, capture_output=True, text=True)
    exec(code, here := {})
    assert np.allclose(eval(there.stdout), here["found"], rtol=1e-9)


def test_the_same_picture_is_augmented_anew_each_time():
    pixels, targets = (torch.arange(100) * 2).to(torch.uint8).reshape(1, 1, 10, 10), torch.zeros(1, dtype=torch.long)
    batches = PictureBatches(pixels, targets, 16, augment=Affine(40))
    seen = {tuple(picture.flatten().tolist()) for step in range(10) for picture in batches[step][0]}
    assert len(seen) == 160


def test_a_stateful_generator_would_not_be_pure():
    generator, step = chance(), Noise(0.1)  # negative control: the stream that PictureBatches avoids
    first = step(torch.rand(2, 1, 4, 4), generator)
    assert not torch.equal(step(torch.rand(2, 1, 4, 4), generator), first)


@pytest.mark.parametrize("channels, mean, std", [
    (1, (0.3,), (0.4,)), (3, (0.5,), (0.25,)), (3, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)), (3, (0.1, 0.2, 0.3), (0.5,))])
def test_pictures_are_normalised_at_last(channels, mean, std):
    pixels, targets = numbered(6, channels)
    expected = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for inputs, labels in (PictureBatches(pixels, targets, 6, mean=mean, std=std)[0],
                           *ordered_batches(pixels, targets, 4, mean, std)):
        assert torch.allclose(inputs, expected[labels], atol=1e-6) and inputs.dtype == torch.float32


def test_normalising_is_the_preprocessors():
    images = pytest.importorskip("bigmodel.data.images")
    preprocessor = images.Preprocessor(5, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    pixels, targets = numbered(6, 3)
    ours = next(iter(ordered_batches(pixels, targets, 6, preprocessor.mean, preprocessor.std)))[0]
    assert torch.equal(ours, preprocessor.normalize(pixels))


def test_ordered_batches_hold_every_picture_once_and_can_be_iterated_again():
    state, batches = torch.get_rng_state(), ordered_batches(*numbered(10), batch_size=4)
    for _ in range(2):
        assert [targets.tolist() for _, targets in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integers_are_targets(dtype):
    pixels, targets = numbered(5)
    for batch in (PictureBatches(pixels, targets.to(dtype), 5)[0], *ordered_batches(pixels, targets.to(dtype), 5)):
        assert batch[1].dtype == torch.int64


@pytest.mark.parametrize("change, message", [
    (dict(pixels=torch.zeros(0, 1, 4, 5).byte(), targets=torch.zeros(0).long()), "at least one picture"),
    (dict(pixels=torch.rand(6, 1, 4, 5)), "pixels are torch.float32.*expected .*torch.uint8"),
    (dict(pixels=torch.zeros(6, 4, 5, dtype=torch.uint8)), r"of shape \(6, 4, 5\); expected"),
    (dict(targets=torch.arange(5)), r"targets are torch.int64 of shape \(5,\); expected 6 integers"),
    (dict(targets=torch.zeros(6, 2, dtype=torch.long)), "expected 6 integers"),
    (dict(targets=torch.rand(6)), "targets are torch.float32"),
    (dict(targets=torch.ones(6) > 0), "targets are torch.bool"),
    (dict(targets=torch.arange(6) - 1), "targets from -1 to 4; expected classes from 0 on"),
    (dict(batch_size=0), "batch_size is 0"), (dict(mean=(0.5, 0.5)), r"mean is \(0.5, 0.5\) .* for 1 channel"),
    (dict(std=(0.0,)), "every std above 0"), (dict(mean=()), "expected one number")])
def test_sets_that_make_no_sense(change, message):
    pixels, targets = numbered(6)
    for build in (PictureBatches, ordered_batches):
        with pytest.raises(ValueError, match=message) as caught:
            build(**(dict(pixels=pixels, targets=targets, batch_size=2) | change))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [
    (dict(num_classes=5), "targets from 0 to 5; expected classes from 0 to 4"),
    (dict(targets=torch.arange(6) - 1, num_classes=6), "targets from -1 to 4"),
    (dict(mixup=0.2), "num_classes None"), (dict(mixup=-0.2, num_classes=6), "mixup is -0.2"),
    (dict(mixup=float("nan"), num_classes=6), "mixup is nan")])
def test_classes_that_make_no_sense(change, message):
    pixels, targets = numbered(6)
    with pytest.raises(ValueError, match=message):
        PictureBatches(**(dict(pixels=pixels, targets=targets, batch_size=2) | change))


def test_a_negative_step_is_no_step_and_iterating_goes_on():
    with pytest.raises(IndexError, match="expected 0 or more"):
        make()[-1]
    assert len(list(zip(range(20), make()))) == 20
