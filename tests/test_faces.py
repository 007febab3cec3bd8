"""bigmodel.applications.faces: OpenCV's windows one by one, its suppression, its files; a detector finds a face."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel.applications import faces as module
from bigmodel.applications.faces import (
    Cascade,
    detect_faces,
    find_windows,
    iou,
    non_maximum_suppression,
    pyramid,
    read_cascade,
    to_grey,
    train_cascade,
    write_cascade,
)
from bigmodel.models.boosting import BoostedStumps, Windows, haar_features

ASTRONAUT = skimage.data.astronaut()
PORTRAIT = np.ascontiguousarray(ASTRONAUT[50:174, 160:290])  # the head and little else
EVERY = haar_features(20, smallest=4)
COINS = np.ascontiguousarray(skimage.data.coins()[70:170, 230:384])
PATCHES = (skimage.data.lfw_subset() * 255).round().astype(np.uint8)


def opencvs(name):
    return f"{cv2.data.haarcascades}haarcascade_{name}.xml"


@pytest.fixture(scope="module")
def cascade():
    return read_cascade(opencvs("frontalface_default"))


def raw_windows(path, grey, scale_factor=1.1, min_size=30):
    found = cv2.CascadeClassifier(str(path)).detectMultiScale(grey, scaleFactor=scale_factor, minNeighbors=0,
                                                              minSize=(min_size, min_size))
    return sorted(np.reshape(found, (-1, 4)).tolist())


def our_windows(cascade, grey, *options):
    return sorted(find_windows(cascade, grey, *options)[0].tolist())


# --- boxes

def random_boxes(seed, count, whole=True):
    generator = np.random.default_rng(seed)
    if whole:
        return np.concatenate([generator.integers(-5, 25, (count, 2)), generator.integers(1, 25, (count, 2))], 1)
    return np.concatenate([generator.normal(0, 10, (count, 2)), generator.random((count, 2)) * 20 + 0.1], 1)


def masks(boxes):
    """Each box as a mask of pixels."""
    drawn = np.zeros((len(boxes), 60, 60), bool)
    for mask, (x, y, width, height) in zip(drawn, boxes + [5, 5, 0, 0]):
        mask[y:y + height, x:x + width] = True
    return drawn.reshape(len(boxes), 3600)


@given(seed=st.integers(0, 10**6), count=st.integers(0, 8), others=st.integers(0, 8))
def test_iou_counts_pixels(seed, count, others):
    first, second = random_boxes(seed, count), random_boxes(seed + 1, others)
    one, two = masks(first)[:, None], masks(second)[None]
    np.testing.assert_allclose(iou(first, second), (one & two).sum(-1) / (one | two).sum(-1))


@given(seed=st.integers(0, 10**6), shift=st.integers(-1000, 1000), scale=st.integers(1, 1000))
def test_iou_is_symmetric_and_knows_no_place_or_scale(seed, shift, scale):
    first, second = random_boxes(seed, 5, whole=False), random_boxes(seed + 1, 6, whole=False)
    found = iou(first, second)
    assert ((0 <= found) & (found <= 1)).all()
    np.testing.assert_allclose(iou(second, first), found.T)
    np.testing.assert_allclose(np.diag(iou(first, first)), 1)
    moved = [(boxes + [shift, -shift, 0, 0]) * (scale / 10) for boxes in (first, second)]
    np.testing.assert_allclose(iou(*moved), found, atol=1e-9)


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [0, 0, 5, -1], [0, 0, np.nan, 5], [np.inf, 0, 5, 5]])
def test_a_box_without_area_is_refused(box):
    with pytest.raises(ValueError, match="a box has no area"):
        iou(np.array([box], float), random_boxes(0, 2))


def opencvs_choice(boxes, scores, overlap):
    return list(cv2.dnn.NMSBoxes(boxes.tolist(), scores.tolist(), score_threshold=0, nms_threshold=overlap))


@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), levels=st.integers(1, 40),
       overlap=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]))  # numbers that float32 and float64 share
@settings(max_examples=400)
def test_suppression_is_opencvs(seed, count, levels, overlap):
    boxes = random_boxes(seed, count)
    scores = np.random.default_rng(seed).integers(1, levels + 1, count) / levels  # many ties
    assert non_maximum_suppression(boxes, scores, overlap).tolist() == opencvs_choice(boxes, scores, overlap)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), overlap=st.integers(50, 950))
def test_suppression_is_opencvs_for_boxes_of_any_size(seed, count, overlap):
    boxes = random_boxes(seed, count, whole=False)
    scores, overlap = np.random.default_rng(seed).random(count) + 0.01, overlap / 1000
    assert non_maximum_suppression(boxes, scores, overlap).tolist() == opencvs_choice(boxes, scores, overlap)


def test_ties_and_touching_the_threshold_matter():  # the control of the tests above
    boxes, scores = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]]), np.array([0.5, 0.5, 0.5])
    assert non_maximum_suppression(boxes, scores, 0.5).tolist() == [0, 1] == opencvs_choice(boxes, scores, 0.5)
    assert non_maximum_suppression(boxes[::-1], scores, 0.5).tolist() == [0, 1]
    assert non_maximum_suppression(boxes, scores, 0.49).tolist() == [0]


@given(seed=st.integers(0, 10**6), count=st.integers(0, 40), overlap=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_what_stays_is_apart_and_what_goes_has_a_reason(seed, count, overlap):
    boxes, scores = random_boxes(seed, count), np.random.default_rng(seed).random(count)
    kept = non_maximum_suppression(boxes, scores, overlap)
    table = iou(boxes, boxes)
    assert (table[np.ix_(kept, kept)] <= overlap)[~np.eye(len(kept), dtype=bool)].all()
    for gone in np.setdiff1d(np.arange(count), kept):
        assert any(table[gone, stays] > overlap and scores[stays] >= scores[gone] for stays in kept)


def test_scores_must_be_numbers():
    with pytest.raises(ValueError, match="NaN"):
        non_maximum_suppression(random_boxes(0, 2), np.array([0.5, np.nan]))


# --- pictures and floors

@given(st.integers(0, 10**6))
def test_grey_is_opencvs(seed):
    picture = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)
    assert np.array_equal(to_grey(picture), cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    assert not np.array_equal(to_grey(picture), cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))


@given(seed=st.integers(0, 10**6), size=st.tuples(st.integers(10, 90), st.integers(10, 90)),
       new=st.tuples(st.integers(5, 90), st.integers(5, 90)))
@settings(max_examples=300)
def test_shrinking_is_opencvs_to_the_bit(seed, size, new):
    grey = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    expected = cv2.resize(grey, new[::-1], interpolation=cv2.INTER_LINEAR_EXACT)
    assert np.array_equal(module._shrink(grey, *new), expected)


def test_floors_shrink_by_the_factor_until_one_window_is_left():
    floors = list(pyramid(to_grey(ASTRONAUT)[:300], 24, 1.3, min_size=50))
    scales = [scale for scale, _ in floors]
    np.testing.assert_allclose(np.diff(np.log(scales)), np.log(1.3), rtol=1e-5)
    assert 24 * scales[0] >= 49.5 > 24 * scales[0] / 1.3 and scales[-1] * 24 <= 300.5 < scales[-1] * 24 * 1.3
    assert all(abs(smaller.shape[1] * scale - 512) <= scale for scale, smaller in floors)


@pytest.mark.parametrize("factor", [1.0, 0.9, float("nan")])
def test_a_factor_that_does_not_shrink_is_refused(factor):
    with pytest.raises(ValueError, match="scale_factor"):
        list(pyramid(to_grey(PORTRAIT), 24, factor))


# --- the cascade

@pytest.mark.parametrize("name, picture", [
    ("frontalface_default", to_grey(PORTRAIT)), ("frontalface_alt", to_grey(PORTRAIT)), ("eye", to_grey(PORTRAIT)),
    ("frontalface_alt_tree", to_grey(PORTRAIT)), ("frontalcatface", to_grey(skimage.data.chelsea()[40:220, 90:300])),
    ("profileface", COINS), ("frontalface_default", COINS), ("frontalface_default", skimage.data.page()[:90, :150]),
    ("frontalface_default", to_grey(PORTRAIT)[:95, 15:110])],  # its largest window reaches over the edge
    ids=lambda value: value if isinstance(value, str) else f"{value.shape}")
@pytest.mark.parametrize("options", [(1.1, 30), (1.25, 24)])
def test_our_windows_are_opencvs(name, picture, options):
    picture = np.ascontiguousarray(picture)
    assert our_windows(read_cascade(opencvs(name)), picture, *options) == raw_windows(opencvs(name), picture, *options)


def random_cascade(seed):
    """Two stages that say yes to half of all windows each."""
    generator = np.random.default_rng(seed)
    stages = [BoostedStumps(EVERY[generator.choice(len(EVERY), 3)], generator.normal(0, 0.02, 3).astype(np.float32),
                            generator.normal(0, 1, (3, 2)).astype(np.float32), float(generator.normal(0, 0.3)))
              for _ in range(2)]
    return Cascade(20, tuple(stages))


def random_picture(seed):
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, generator.integers(5, 20, 2), np.uint8)
    return cv2.resize(small, tuple(map(int, generator.integers(25, 90, 2))), interpolation=cv2.INTER_CUBIC)


@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1.05, 1.1, 1.25, 2.0]), least=st.sampled_from([0, 20, 33]))
@settings(max_examples=80)
def test_any_cascade_finds_the_same_windows_in_opencv(tmp_path_factory, seed, factor, least):
    path, cascade, grey = tmp_path_factory.mktemp("random") / "any.xml", random_cascade(seed), random_picture(seed)
    write_cascade(cascade, path)
    if list(pyramid(grey, 20, factor, least)):
        assert our_windows(cascade, grey, factor, least) == raw_windows(path, grey, factor, least)
    else:  # then OpenCV takes smaller windows than it was asked for
        assert our_windows(cascade, grey, factor, least) == []


@pytest.mark.parametrize("breakage", ["neighbours", "rows", "shrink", "threshold", "flat", "edge"])
def test_each_detail_of_opencvs_matters(breakage, monkeypatch, tmp_path):  # the control of the tests above
    looked_at = module._looked_at
    changed = {"neighbours": ("_looked_at",
                              lambda passed, *rows: looked_at(np.maximum(passed, 1), *rows) * (passed > 0)),
               "rows": ("_looked_at", lambda passed, high, step, stripes: looked_at(passed, 2 * high, step, stripes)),
               "flat": ("_is_flat", lambda windows: np.zeros(len(windows), bool)),
               "shrink": ("_shrink", lambda grey, height, width: cv2.resize(grey, (width, height), interpolation=3))}
    if breakage in changed:
        monkeypatch.setattr(module, *changed[breakage])
    differs = 0
    for seed in range(12):
        cascade, grey = random_cascade(seed), random_picture(seed) // (8 if breakage == "flat" else 1)
        write_cascade(cascade, tmp_path / "any.xml")
        theirs = raw_windows(tmp_path / "any.xml", grey, 1.1, 20)
        if breakage == "threshold":
            cascade = replace(cascade, stages=(*cascade.stages[:1], replace(cascade.stages[1], threshold=0.4)))
        boxes, _ = find_windows(cascade, grey, 1.1, 20)
        if breakage == "edge":
            boxes[:, 2] = boxes[:, 3] = boxes[:, 2:].max(1)
        differs += sorted(boxes.tolist()) != theirs
    assert differs


def test_passed_counts_the_stages(cascade):
    windows = Windows(to_grey(PORTRAIT)[None], 24, 4)
    passed, scores = cascade.passed(windows)
    flat = windows.contrast <= 10 * 22 * 22
    assert np.array_equal(passed == -1, flat) and (scores[flat] == 0).all()
    for number, stage in enumerate(cascade.stages[:3]):
        reached = windows.keep(passed >= number)
        assert np.array_equal(stage.scores(reached) >= 0, passed[passed >= number] > number)


# --- files

def same(first, second):
    return first.size == second.size and len(first.stages) == len(second.stages) and all(
        np.array_equal(one.features, two.features) and np.array_equal(one.thresholds, two.thresholds)
        and np.array_equal(one.votes, two.votes) and one.threshold == two.threshold
        for one, two in zip(first.stages, second.stages))


def test_what_is_written_is_read(cascade, tmp_path):
    path = tmp_path / "a face ü.xml"
    write_cascade(cascade, path)
    assert same(read_cascade(path), cascade)
    assert raw_windows(path, to_grey(PORTRAIT)) == raw_windows(opencvs("frontalface_default"), to_grey(PORTRAIT))


LBP = f"{next(iter(skimage.data.__path__))}/lbpcascade_frontalface_opencv.xml"


@pytest.mark.parametrize("path, message", [
    (opencvs("frontalface_alt2"), "has trees of several questions"), (opencvs("smile"), "has tilted features"),
    (opencvs("fullbody"), "has tilted features, or a window that is not square"),
    (opencvs("license_plate_rus_16stages"), "is damaged, or no Haar cascade"), (LBP, "is damaged, or no Haar cascade")])
def test_what_cannot_be_represented_is_named(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_cascade(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "no XML", "<a>", "<opencv_storage></opencv_storage>",
                                     "<opencv_storage><cascade></cascade></opencv_storage>"])
def test_a_damaged_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "broken.xml"
    path.write_text(content)
    with pytest.raises(ValueError, match="broken.xml is damaged"):
        read_cascade(path)


def test_a_file_cut_short_is_one_clear_error(tmp_path):
    whole = open(opencvs("eye"), "rb").read()
    path = tmp_path / "short.xml"
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(ValueError, match="short.xml is damaged"):
            read_cascade(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.xml"):
        read_cascade(tmp_path / "nothing.xml")


# --- finding faces

def test_the_astronauts_face_is_where_opencv_finds_it(cascade):
    theirs = cv2.CascadeClassifier(opencvs("frontalface_default")).detectMultiScale(
        to_grey(PORTRAIT), scaleFactor=1.1, minNeighbors=5, minSize=(30, 30))
    boxes, counts = detect_faces(cascade, PORTRAIT)
    assert len(boxes) == len(theirs) == 1 and iou(boxes, theirs)[0, 0] > 0.9 and counts[0] > 15


def test_more_neighbours_leave_fewer_faces(cascade):
    found = [detect_faces(cascade, np.dstack([COINS] * 3), min_neighbors=count) for count in (0, 5, 1000)]
    numbers = [len(boxes) for boxes, _ in found]
    assert numbers[0] > numbers[1] > numbers[2] == 0
    for (boxes, counts), least in zip(found, (0, 5, 1000)):
        assert len(boxes) == len(counts) and (counts > least).all() and (np.diff(counts) <= 0).all()
        assert boxes.shape[1] == 4


@pytest.mark.parametrize("picture", [np.full((60, 60, 3), 127, np.uint8), ASTRONAUT[:40, 300:340],
                                     np.ascontiguousarray(PORTRAIT[::-1])], ids=["flat", "wall", "upside down"])
def test_where_there_is_no_face_none_is_found(cascade, picture):
    boxes, counts = detect_faces(cascade, picture)
    assert boxes.shape == (0, 4) and counts.shape == (0,)


@pytest.mark.parametrize("picture, message", [
    (to_grey(PORTRAIT), r"RGB, uint8 .* got uint8 \(124, 130\)"),
    (np.dstack([PORTRAIT, PORTRAIT[..., 0]]), r"got uint8 \(124, 130, 4\)"),
    (PORTRAIT[..., :1], r"got uint8 \(124, 130, 1\)"), (PORTRAIT / 255, r"got float64 \(124, 130, 3\)"),
    (PORTRAIT[None], r"got uint8 \(1, 124, 130, 3\)"), (PORTRAIT[:0], r"got uint8 \(0, 130, 3\)"),
    ("astronaut.png", "got str"), (None, "got NoneType"), (PORTRAIT[:23], "130 x 23 pixels, less than a window of 24")])
def test_anything_but_a_picture_in_rgb_is_one_clear_error(cascade, picture, message):
    with pytest.raises(ValueError, match=message) as caught:
        detect_faces(cascade, picture)
    assert "\n" not in str(caught.value)


# --- training

@pytest.fixture(scope="module")
def trained():
    pictures = [to_grey(skimage.data.coffee()), to_grey(skimage.data.stereo_motorcycle()[0]), skimage.data.text()]
    faces = np.concatenate([PATCHES[:100], PATCHES[:100, :, ::-1]])
    options = {"rounds": (5, 10, 20, 30, 40, 60), "negatives": 800, "num_features": 1000}
    return faces, pictures, options, train_cascade(faces, pictures, **options)


def test_our_own_cascade_finds_the_astronauts_face(trained):
    boxes, _ = detect_faces(trained[-1], PORTRAIT, min_neighbors=2)
    assert len(boxes) and iou(boxes[:1], np.array([[17, 16, 95, 95]]))[0, 0] > 0.4


def test_faces_pass_and_mistakes_become_rare(trained):
    faces, pictures, options, cascade = trained
    passed, _ = cascade.passed(Windows(faces, 25))
    assert (passed == len(cascade.stages)).mean() >= 0.995 ** len(cascade.stages) - 0.01
    passed, _ = cascade.passed(Windows(pictures[0][None], 25, 3))
    assert (passed == len(cascade.stages)).mean() < 0.002 < (passed >= 1).mean()


def test_opencv_runs_our_cascade(trained, tmp_path):
    write_cascade(trained[-1], tmp_path / "own.xml")
    for grey in (to_grey(PORTRAIT), COINS):
        assert our_windows(trained[-1], grey) == raw_windows(tmp_path / "own.xml", grey)
    assert our_windows(trained[-1], to_grey(PORTRAIT))


def test_training_depends_on_the_seed_alone(trained):
    faces, pictures, options, _ = trained
    few = options | {"rounds": (3, 5), "num_features": 200}
    first, again, other = (train_cascade(faces, pictures[2:], seed=seed, **few) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("pictures", [[], [np.zeros((100, 100), np.uint8)]])
def test_pictures_that_teach_nothing_are_refused(pictures):
    with pytest.raises(ValueError, match="hold next to no windows"):
        train_cascade(PATCHES[:20], pictures, num_features=50)
