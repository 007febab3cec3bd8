"""bigmodel.models.boosting: OpenCV's integral image, features by hand, stumps against brute force, AdaBoost's laws."""

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bigmodel.models.boosting import BoostedStumps, Windows, best_stump, boost, haar_features, integral_image

PATCHES = (skimage.data.lfw_subset() * 255).round().astype(np.uint8)
IS_FACE = np.arange(200) < 100
pictures = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def some_features(size, count, seed=0):
    every = haar_features(size, smallest=2)
    return every[np.random.default_rng(seed).choice(len(every), count, replace=False)]


# --- integral image

@given(pictures)
def test_the_integral_image_is_opencvs(pixels):
    assert np.array_equal(integral_image(pixels), cv2.integral(pixels))


@given(pictures, st.data())
def test_four_look_ups_are_the_sum_of_a_rectangle(pixels, data):
    height, width = pixels.shape
    top, left = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    bottom, right = data.draw(st.integers(top, height)), data.draw(st.integers(left, width))
    sums = integral_image(pixels)
    found = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    assert found == pixels[top:bottom, left:right].sum()


def test_a_stack_has_the_integral_images_of_its_pictures():
    for sums, pixels in zip(integral_image(PATCHES[:5]), PATCHES):
        assert np.array_equal(sums, integral_image(pixels))


def test_large_sums_do_not_overflow():
    assert integral_image(np.full((5000, 4000), 255, np.uint8))[-1, -1] == 255 * 5000 * 4000


# --- features

def test_a_window_of_24_pixels_has_162336_features():
    features = haar_features(24)
    assert len(features) == 162_336 == len(np.unique(features, axis=0))


@pytest.mark.parametrize("size, smallest", [(1, 1), (5, 1), (12, 2), (25, 5)])
def test_features_fit_and_are_balanced(size, smallest):
    features = haar_features(size, smallest)
    x, y, width, height, weight = np.moveaxis(features, 2, 0)
    assert ((x >= 0) & (y >= 0) & (x + width <= size) & (y + height <= size)).all()
    assert np.array_equal((width * height * weight).sum(1), np.zeros(len(features)))
    parts = (weight > 0)
    assert (width[parts] >= smallest).all() and (height[parts] >= smallest).all()


def by_hand(window, feature):
    """The value of one feature on one patch, from its definition."""
    inner = window[1:-1, 1:-1].astype(float)
    total = sum(weight * window[int(y):int(y + height), int(x):int(x + width)].sum(dtype=float)
                for x, y, width, height, weight in feature)
    return total / (inner.std() * inner.size)


@pytest.mark.parametrize("step", [1, 3])
def test_values_are_the_features_by_hand(step):
    picture = np.random.default_rng(0).integers(0, 256, (2, 21, 30), np.uint8)
    windows, features = Windows(picture, 12, step), some_features(12, 40)
    corners = [(number, y, x) for number in range(2) for y in range(0, 10, step) for x in range(0, 19, step)]
    assert len(windows) == len(corners) == np.prod(windows.grid)
    expected = [[by_hand(picture[n, y:y + 12, x:x + 12], feature) for n, y, x in corners] for feature in features]
    np.testing.assert_allclose(windows.values(features), expected, rtol=1e-4, atol=1e-6)


def test_light_and_contrast_change_nothing():
    features, dark = some_features(25, 50), PATCHES[:100] // 4
    lit = Windows(dark * 3 + 20, 25).values(features)
    np.testing.assert_allclose(lit, Windows(dark, 25).values(features), atol=2e-6)


def test_without_the_division_by_contrast_light_does_matter():  # the control of the test above
    features, dark = some_features(25, 50), PATCHES[:100] // 4
    before, after = Windows(dark, 25), Windows(dark * 3, 25)
    before.contrast = after.contrast = np.ones(100)
    assert np.abs(before.values(features) - after.values(features)).max() > 100


def test_kept_windows_are_those_windows():
    windows, features = Windows(PATCHES, 25), some_features(25, 9)
    mask = np.random.default_rng(1).random(200) < 0.3
    assert np.array_equal(windows.keep(mask).values(features), windows.values(features)[:, mask])
    assert np.array_equal(windows.keep(np.flatnonzero(mask)).values(features), windows.values(features)[:, mask])
    assert len(windows) == 200 and len(windows.keep(np.zeros(200, bool))) == 0


def test_a_picture_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="30 x 20 pixels, less than a window of 24 x 24"):
        Windows(np.zeros((1, 20, 30), np.uint8), 24)


# --- stumps

def least_error(values, is_face, weights):
    """Every threshold that divides two samples, both sides."""
    errors = []
    for row in values:
        for cut in np.unique(row)[1:]:
            wrong = weights[(row >= cut) != is_face].sum()
            errors += [wrong, 1 - wrong]
    return min(errors)


@given(seed=st.integers(0, 10_000), features=st.integers(1, 6), samples=st.integers(2, 25), levels=st.integers(2, 30))
@settings(max_examples=300)
def test_no_stump_is_better(seed, features, samples, levels):
    generator = np.random.default_rng(seed)
    values = generator.integers(0, levels, (features, samples)).astype(np.float32)  # many ties
    values[0, :2] = 0, 1
    is_face, weights = generator.random(samples) < 0.5, generator.random(samples)
    weights /= weights.sum()
    feature, threshold, upward, error = best_stump(values, is_face, weights)
    guess = (values[feature] >= np.float32(threshold)) == upward
    assert np.isclose(weights[guess != is_face].sum(), error)  # it is as good as it says
    assert np.isclose(error, least_error(values, is_face, weights))  # and nothing is better


def test_a_wrong_order_claims_errors_that_are_not_there():  # the control of the test above
    generator = np.random.default_rng(0)
    values, is_face, weights = generator.random((3, 40), np.float32), generator.random(40) < 0.5, np.full(40, 1 / 40)
    shuffled = generator.permuted(np.tile(np.arange(40), (3, 1)), axis=1)
    feature, threshold, upward, error = best_stump(values, is_face, weights, shuffled)
    guess = (values[feature] >= np.float32(threshold)) == upward
    assert not np.isclose(weights[guess != is_face].sum(), error)


@pytest.mark.parametrize("low, high", [(1.0, np.nextafter(np.float32(1), np.float32(2))), (-1e30, 1e30), (0.0, 1e-30)])
def test_the_threshold_divides_neighbours(low, high):
    values = np.float32([[low, high]])
    _, threshold, upward, error = best_stump(values, np.array([False, True]), np.array([0.5, 0.5]))
    assert upward and error == 0 and values[0, 0] < np.float32(threshold) <= values[0, 1]


def test_nothing_to_divide_is_an_error():
    with pytest.raises(ValueError, match="no feature differs"):
        best_stump(np.ones((3, 4), np.float32), np.array([True, False, True, False]), np.full(4, 0.25))


# --- boosting

@pytest.fixture(scope="module")
def measured():
    features = some_features(25, 300)
    return features, Windows(PATCHES, 25).values(features)


def votes_of(stumps, windows):
    return np.stack([np.where(windows.values(feature[None])[0] < threshold, *votes)
                     for feature, threshold, votes in zip(stumps.features, stumps.thresholds, stumps.votes)])


def test_after_each_round_its_stump_is_no_better_than_a_coin(measured):
    stumps = boost(*measured, IS_FACE, 12, np.random.default_rng(0))
    signs, weights = np.where(IS_FACE, 1, -1), np.full(200, 1 / 200)
    for votes in votes_of(stumps, Windows(PATCHES, 25)):
        weights = weights * np.exp(-signs * votes)
        weights /= weights.sum()
        assert np.isclose(weights[signs * votes < 0].sum(), 0.5, atol=1e-5)


def test_the_training_error_stays_below_its_bound(measured):
    stumps = boost(*measured, IS_FACE, 25, np.random.default_rng(0), tries=20)
    wrong = (votes_of(stumps, Windows(PATCHES, 25)).cumsum(0) > 0) != IS_FACE
    error = 1 / (1 + np.exp(2 * np.abs(stumps.votes[:, 1])))
    assert (wrong.mean(1) <= np.cumprod(2 * np.sqrt(error * (1 - error))) + 1e-6).all()
    assert wrong[-1].mean() < 0.02


def test_faces_and_others_begin_with_half_of_the_weight_each():
    values = np.float32([[0, 0, 0, 0, 0, 0, 1, 1]])  # of one face, 1 is above; of seven others, 6 are below
    is_face = np.arange(8) == 7
    stumps = boost(np.zeros((1, 3, 5), np.float32), values, is_face, 1, np.random.default_rng(0))
    error = 0.5 / 7
    assert np.isclose(stumps.votes[0, 1], 0.5 * np.log((1 - error) / error))


def test_scores_are_the_votes_less_the_threshold(measured):
    stumps, windows = boost(*measured, IS_FACE, 5, np.random.default_rng(0)), Windows(PATCHES, 25)
    raised = BoostedStumps(stumps.features, stumps.thresholds, stumps.votes, 1.5)
    np.testing.assert_allclose(stumps.scores(windows), votes_of(stumps, windows).sum(0), atol=1e-4)
    np.testing.assert_allclose(raised.scores(windows), stumps.scores(windows) - 1.5, atol=1e-5)


def test_the_same_seed_makes_the_same_committee(measured):
    first, same, other = (boost(*measured, IS_FACE, 5, np.random.default_rng(seed), tries=30) for seed in (0, 0, 1))
    assert np.array_equal(first.features, same.features) and np.array_equal(first.votes, same.votes)
    assert not np.array_equal(first.features, other.features)


def test_labels_at_random_teach_nothing(measured):  # the control: what is learned above is in the labels
    generator = np.random.default_rng(0)
    train = generator.permutation(200) < 100
    for labels, low, high in ((IS_FACE, 0.9, 1), (generator.permutation(IS_FACE), 0.3, 0.7)):
        stumps = boost(measured[0], measured[1][:, train], labels[train], 20, np.random.default_rng(0))
        right = np.mean((stumps.scores(Windows(PATCHES[~train], 25)) > 0) == labels[~train])
        assert low <= right <= high


@pytest.mark.parametrize("answers", [np.ones(200, bool), np.zeros(200, bool)])
def test_one_kind_of_sample_is_not_enough(measured, answers):
    with pytest.raises(ValueError, match="all samples are faces, or none is"):
        boost(*measured, answers, 3, np.random.default_rng(0))
