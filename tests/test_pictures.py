"""Classifiers of pictures: parity with transformers' pipeline, exact runs, the command line, and bad input."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigmodel import cli
from bigmodel.applications.pictures import (
    MODELS,
    PictureClassifier,
    PicturePlan,
    find_pictures,
    held_out_pictures,
    resume_pictures,
    small_model,
    start_pictures,
)
from bigmodel.data.folders import PictureFolder
from bigmodel.data.images import Preprocessor, read_picture
from bigmodel.pipeline import Plan, start_run, task_of

PROGRAM = [sys.executable, "-c", "from bigmodel.cli import main; main()"]
SETTINGS = {"steps": 8, "size": 16, "batch_size": 8}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def draw(path: Path, color: tuple[int, int, int], seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 90, (24, 20 + seed % 7, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise + np.array(color)).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a folder with spaces, ü and 中") / "my pictures"
    for name, color in (("red", (160, 0, 0)), ("green", (0, 160, 0)), ("dark blue", (0, 0, 100))):
        for number in range(12):
            draw(folder / name / f"{number}.png", color, number + 100 * color[0] + color[1])
    return folder


@pytest.fixture(scope="module")
def run(images) -> Path:
    folder = images.parent / "run"
    start_pictures(folder, images, **SETTINGS | {"steps": 40}).fit()
    return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("text")
    (place / "my.txt").write_text("".join(f"Line {i}: the cat sat on mat {i * 7 % 10}.\n" for i in range(300)))
    start_run(place / "run", str(place / "my.txt"), steps=2, vocab_size=300, num_layers=1, hidden_size=16, num_heads=2,
              context_length=16, batch_size=4).fit()
    return place / "run"


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Run the command line in this process: exit status, output, errors without notes."""
    monkeypatch.setattr(sys, "argv", ["bigmodel", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, "\n".join(line for line in err.splitlines() if not line.startswith("note: "))


def one_error(done: tuple[int, str, str]) -> str:
    status, _, err = done
    assert status == 1 and len(err.splitlines()) == 1 and err.startswith("error: "), done
    return err


# --- it learns, and predicts as transformers does

def test_it_learns_colors_and_says_so(run, images):
    classifier = PictureClassifier.from_pretrained(run)
    assert classifier.labels == ("dark blue", "green", "red"), "classes are sorted by name"
    assert classifier.score(PictureFolder.find(images)).accuracy > 0.9
    assert classifier.top(read_picture(images / "red/3.png"), 1)[0][0] == "red"
    upside_down = PictureClassifier(classifier.model, classifier.preprocessor, classifier.labels[::-1])  # control
    assert upside_down.score(PictureFolder.find(images)).accuracy < 0.6


def odd_pictures(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 9, 3), dtype=np.uint8)).resize((117, 43), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, picture, more in (("odd.jpg", blobs, {}), ("grey.png", blobs.convert("L"), {}),
                                ("opaque.png", blobs.convert("RGBA"), {}), ("palette.gif", blobs.convert("P"), {}),
                                ("cmyk.jpg", blobs.convert("CMYK"), {}), ("turned.jpg", blobs, {"exif": turned})):
        picture.save(folder / name, **more)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("model", ["resnet", "vit"])
@pytest.mark.parametrize("size", [16, 35])
def test_pipeline_of_transformers_predicts_the_same(model, size, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    start_pictures(tmp_path / "run", images, model=model, **SETTINGS | {"size": size}).fit()
    classifier = PictureClassifier.from_pretrained(tmp_path / "run")
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "run"))
    (tmp_path / "odd").mkdir()
    for path in odd_pictures(tmp_path / "odd"):
        ours = dict(classifier.top(read_picture(path)))
        theirs = {row["label"]: row["score"] for row in pipe(str(path))}
        assert ours.keys() == theirs.keys() == set(classifier.labels)
        assert max(abs(ours[name] - theirs[name]) for name in ours) < 1e-4, path.name
    blue_for_red = classifier.probabilities([read_picture(path)[:, :, ::-1].copy()])[0].tolist()  # control
    assert max(abs(a - ours[b]) for a, b in zip(blue_for_red, classifier.labels)) > 1e-4


def test_transparency_is_put_on_white_which_the_pipeline_does_not(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "clear.png")  # nothing to see, red beneath
    classifier, pipe = PictureClassifier.from_pretrained(run), transformers.pipeline("image-classification", str(run))
    seen = read_picture(tmp_path / "clear.png")
    assert (seen == 255).all()
    ours, shown = dict(classifier.top(seen)), {row["label"]: row["score"] for row in pipe(Image.fromarray(seen))}
    assert max(abs(ours[name] - shown[name]) for name in ours) < 1e-4, "what is seen is predicted the same"
    hidden = {row["label"]: row["score"] for row in pipe(str(tmp_path / "clear.png"))}
    assert max(abs(ours[name] - hidden[name]) for name in ours) > 1e-3, "the pipeline sees the red beneath"


def test_vgg_says_that_transformers_has_none(images, tmp_path):
    run = start_pictures(tmp_path / "run", images, model="vgg", **SETTINGS)
    run.fit()
    assert "transformers has no VGG" in run.report() and "pipeline" not in run.report()
    assert PictureClassifier.from_pretrained(tmp_path / "run").top(read_picture(images / "red/0.png"))[0][1] > 0


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_small_and_start_without_an_opinion(kind):
    torch.manual_seed(0)
    model = small_model(kind, 32, ("a", "b", "c", "d")).eval()
    assert 100_000 < model.num_parameters() < 600_000
    with torch.no_grad():
        shares = model(torch.randn(8, 3, 32, 32)).softmax(1)
    assert (shares - 0.25).abs().max() < 0.2


# --- exact runs

def test_same_seed_same_model(images, tmp_path):
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        start_pictures(tmp_path / name, images, seed=seed, **SETTINGS).fit()
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other


def losses(folder: Path) -> list[tuple[str, str]]:
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def test_killed_run_resumes_to_the_same_curve(images, tmp_path):
    settings = ["--images", images, "--steps", "60", "--size", "16", "--batch-size", "8", "--flip"]
    start_pictures(tmp_path / "whole", images, steps=60, size=16, batch_size=8, flip=True).fit()
    process = subprocess.Popen([*PROGRAM, "train", "--out", tmp_path / "killed", *map(str, settings)],
                               stdout=subprocess.DEVNULL, env=environment())
    while process.poll() is None and len(losses(tmp_path / "killed")) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed: give it more steps"
    done = subprocess.run([*PROGRAM, "train", "--out", tmp_path / "killed", "--resume"], capture_output=True, text=True,
                          env=environment(), timeout=120)
    assert done.returncode == 0 and "pictures/s" in done.stdout, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_interrupt_saves_and_says_how_to_go_on(images, tmp_path):
    endless = [*PROGRAM, "train", "--out", tmp_path / "run", "--images", images, "--steps", "100000", "--size", "16"]
    process = subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    while not (tmp_path / "run/log.csv").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and "bigmodel train --resume" in said, said
    assert PictureClassifier.from_pretrained(tmp_path / "run").labels == ("dark blue", "green", "red")


def test_minutes_become_steps(images, tmp_path):
    plan = start_pictures(tmp_path / "run", images, minutes=0.02, size=16).plan
    assert plan.steps >= 1 and PicturePlan.load(tmp_path / "run") == plan


def test_held_out_pictures_are_never_trained_on(run, images):
    made, held_out = resume_pictures(run), held_out_pictures(run)
    assert len(made.train.targets) + len(held_out) == 36
    seen = {row.numpy().tobytes() for row in made.train.pixels}
    assert not seen & {row.numpy().tobytes() for row in held_out.load(made.preprocessor)}


@pytest.mark.parametrize("change", ["add", "remove", "exchange", "rename"])
def test_changed_pictures_are_noticed(change, images, tmp_path):
    copy = tmp_path / "pictures"
    shutil.copytree(images, copy)
    start_pictures(tmp_path / "run", copy, **SETTINGS).fit()
    assert resume_pictures(tmp_path / "run").plan.steps == SETTINGS["steps"]
    if change == "add":
        draw(copy / "red/new.png", (160, 0, 0), 999)
    elif change == "remove":
        (copy / "red/0.png").unlink()
    elif change == "exchange":
        draw(copy / "red/0.png", (160, 0, 0), 999)
    else:
        (copy / "red").rename(copy / "rouge")
    for again in (resume_pictures, held_out_pictures):
        with pytest.raises(ValueError, match="have changed since this run began"):
            again(tmp_path / "run")


# --- tasks are told apart

def test_every_run_knows_its_task(run, text_run, tmp_path):
    assert task_of(run) == "pictures" and task_of(text_run) == "text" and task_of(tmp_path) is None
    old = json.loads((text_run / "run.json").read_text())
    old.pop("task")  # as runs were written before there were tasks
    shutil.copytree(text_run, tmp_path / "old")
    (tmp_path / "old/run.json").write_text(json.dumps(old))
    assert task_of(tmp_path / "old") == "text" and Plan.load(tmp_path / "old") == Plan.load(text_run)
    for plan, folder in ((Plan, run), (PicturePlan, text_run)):
        with pytest.raises(ValueError, match="does not describe a run on"):
            plan.load(folder)


def test_commands_say_which_task_they_are_for(run, text_run, images, monkeypatch, capsys):
    def error(*arguments):
        return one_error(call(monkeypatch, capsys, *arguments))

    assert "bigmodel generate" in error("predict", text_run, images / "red/0.png")
    assert "bigmodel predict" in error("generate", run)
    assert "--data is an option for text" in error("evaluate", run, "--data", "my.txt")
    assert "--images is an option for pictures" in error("evaluate", text_run, "--images", images)
    assert "--layers is an option for text" in error("train", "--images", images, "--out", "x", "--layers", "3")
    assert "--data is an option for text" in error("train", "--images", images, "--out", "x", "--data", "my.txt")
    assert "--flip is an option for pictures" in error("train", "--out", "x", "--flip")
    assert "--skip-unreadable is an option for pictures" in error("train", "--out", "x", "--skip-unreadable")


# --- the command line

def test_train_predict_evaluate(images, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train = ("train", "--images", images, "--out", run, "--steps", "30", "--size", "16")
    status, out, err = call(monkeypatch, capsys, *train)
    assert status == 0 and not err, err
    assert "30 to train on, 6 held out, 3 classes" in out and "always 'dark blue': 0.3333" in out
    two = (images / "red/1.png", images / "green/1.png")
    status, out, err = call(monkeypatch, capsys, "predict", run, *two, "--top", "2")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 6 and lines[0] == str(images / "red/1.png") and not err
    assert all(line.startswith("  ") and "%" in line for line in (lines[1], lines[2], lines[4], lines[5]))
    status, out, err = call(monkeypatch, capsys, "evaluate", run)
    assert status == 0 and "6 in 3 classes" in out and "dark blue" in out and "most confused" in out, err
    assert (run / "confusion.png").read_bytes().startswith(b"\x89PNG")
    matrix = tmp_path / "my matrix.png"
    status, out, err = call(monkeypatch, capsys, "evaluate", run, "--images", images, "--out", matrix)
    assert status == 0 and "36 in 3 classes" in out and matrix.exists()


def test_a_bad_picture_costs_one_line_and_the_others_are_answered(run, images, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "letter.jpg").write_text("dear all")
    whole = (images / "red/0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    bad = [tmp_path / name for name in ("empty.jpg", "letter.jpg", "cut.png", "nowhere.png")]
    status, out, err = call(monkeypatch, capsys, "predict", run, bad[0], images / "red/0.png", *bad[1:], "--top", "1")
    assert status == 1 and out.splitlines()[0] == str(images / "red/0.png") and len(out.splitlines()) == 2
    errors = err.splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") and path.name in line for line, path in zip(errors, bad))


def test_evaluating_on_the_training_folder_is_noted(run, images, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bigmodel", "evaluate", str(run), "--images", str(images)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "note: the model has learned from most of these pictures" in capsys.readouterr().err


def test_resumed_run_names_options_that_change_nothing(images, tmp_path, monkeypatch, capsys):
    start_pictures(tmp_path / "run", images, **SETTINGS)
    monkeypatch.setattr(sys, "argv", ["bigmodel", "train", "--resume", "--out", str(tmp_path / "run"), "--steps", "99"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    out, err = capsys.readouterr()
    assert "note: a resumed run goes on as it began; nothing is changed by --steps" in err and "8 steps" in out


def test_a_checkpoint_of_transformers_is_used_without_a_run(images, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                                       id2label={0: "red", 1: "green"}, label2id={"red": 0, "green": 1})
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "theirs")
    ask = ("predict", tmp_path / "theirs", images / "red/0.png")
    assert "preprocessor_config.json" in one_error(call(monkeypatch, capsys, *ask))
    transformers.ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "theirs")
    assert call(monkeypatch, capsys, *ask)[0] == 0
    assert "nothing is held out" in one_error(call(monkeypatch, capsys, "evaluate", tmp_path / "theirs"))
    unknown = one_error(call(monkeypatch, capsys, "evaluate", tmp_path / "theirs", "--images", images))
    assert "'dark blue', which the model does not know" in unknown


# --- bad input

def damage(folder: Path, how: str) -> None:
    if how == "corrupt":
        content = bytearray((folder / "red/0.png").read_bytes())
        content[60:] = content[60:][::-1]
        (folder / "red/0.png").write_bytes(content)
    elif how == "empty file":
        (folder / "red/0.png").write_bytes(b"")
    elif how == "text":
        (folder / "red/0.jpg").write_text("dear all")
    elif how == "one class":
        shutil.rmtree(folder / "red")
        shutil.rmtree(folder / "green")
    elif how == "empty class":
        (folder / "yellow").mkdir()
    elif how == "one picture":
        (folder / "yellow").mkdir()
        shutil.copy(folder / "red/0.png", folder / "yellow/0.png")
        (folder / "red/0.png").unlink()
    elif how == "two classes":
        shutil.copy(folder / "red/0.png", folder / "green/copy.png")
    elif how == "labels":
        (folder / "labels.csv").write_text("file,label\nred/0.png,green\n")
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("how", "says"), [
    ("corrupt", "0.png"), ("empty file", "0 bytes"), ("text", "0.jpg"), ("one class", "one class folder"),
    ("empty class", "yellow"), ("one picture", "yellow"), ("two classes", "another class"), ("labels", "labels.csv"),
    ("no folder", "there is no folder"),
])
def test_unusable_folders_leave_nothing_behind(how, says, images, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(images, folder)
    damage(folder, how)
    train = ("train", "--images", folder, "--out", tmp_path / "run", "--steps", "2", "--size", "16")
    assert says in one_error(call(monkeypatch, capsys, *train))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["corrupt", "empty file", "text"])
def test_unreadable_files_are_skipped_by_name_on_request(how, images, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(images, folder)
    damage(folder, how)
    status, out, _ = call(monkeypatch, capsys, "train", "--images", folder, "--out", tmp_path / "run", "--steps", "2",
                          "--size", "16", "--skip-unreadable")
    assert status == 0 and "skipped    1 file" in out and "red/0." in out
    assert resume_pictures(tmp_path / "run").plan.skip_unreadable
    status, _, said = call(monkeypatch, capsys, "evaluate", tmp_path / "run", "--images", folder)
    assert status == 1 and "red/0." in said and "--skip-unreadable" in said and "unreadable=" not in said
    status, out, _ = call(monkeypatch, capsys, "evaluate", tmp_path / "run", "--images", folder, "--skip-unreadable")
    assert status == 0 and "1 skipped" in out and "red/0." in out and "accuracy" in out


def test_settings_out_of_range(images, tmp_path, run, monkeypatch, capsys):
    def error(*arguments):
        return one_error(call(monkeypatch, capsys, "train", "--images", images, "--out", tmp_path / "run", *arguments))

    assert "unknown model 'alexnet'" in error("--model", "alexnet")
    assert "minutes" in error("--minutes", "0") and "minutes" in error("--minutes", "nan")
    assert "learning_rate" in error("--learning-rate", "-1", "--steps", "2")
    assert "too small" in error("--model", "vgg", "--size", "8", "--steps", "2")
    assert not (tmp_path / "run").exists(), "nothing may be left behind"
    inside = ("train", "--images", images, "--out", images / "run")
    assert "taken for a class" in one_error(call(monkeypatch, capsys, *inside))
    assert "already" in one_error(call(monkeypatch, capsys, "train", "--images", images, "--out", run))
    assert call(monkeypatch, capsys, "train", "--images", images, "--out", "x", "--size", "0")[0] == 2
    assert call(monkeypatch, capsys, "predict", run)[0] == 2, "no picture is a mistake of usage"


def test_no_pictures_and_equal_fingerprints(images):
    classifier = PictureClassifier(small_model("resnet", 16, ("a", "b")), Preprocessor(16), ("a", "b"))
    with pytest.raises(ValueError, match="no list of pictures"):
        classifier.probabilities([])
    found, mark = find_pictures(images)
    assert len(found) == 36 and find_pictures(images)[1] == mark


def replace_in(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda run: (run / "model.safetensors").unlink(), "model.safetensors"),
    (lambda run: (run / "model.safetensors").write_bytes(b"{" * 500), "safetensors"),
    (lambda run: (run / "config.json").unlink(), "config.json"),
    (lambda run: (run / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    (lambda run: replace_in(run / "config.json", '"resnet"', '"vit"'), "config.json"),
    (lambda run: replace_in(run / "config.json", '"resnet"', '"bert"'), "expected a classifier of pictures"),
    (lambda run: replace_in(run / "config.json", '"embedding_size": 32', '"embedding_size": 16'), "shape"),
    (lambda run: replace_in(run / "preprocessor_config.json", '"do_resize": true', '"do_resize": false'), "do_resize"),
    (lambda run: replace_in(run / "run.json", '"pictures"', '"poems"'), "poems"),
])
def test_damaged_runs(spoil, says, run, images, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    spoil(tmp_path / "run")
    assert says in one_error(call(monkeypatch, capsys, "predict", tmp_path / "run", images / "red/0.png"))


def test_weights_of_another_architecture(run, images, tmp_path):
    start_pictures(tmp_path / "vit", images, model="vit", **SETTINGS).fit()
    shutil.copytree(run, tmp_path / "mixed")
    shutil.copy(tmp_path / "vit/model.safetensors", tmp_path / "mixed/model.safetensors")
    with pytest.raises(ValueError, match="the weights do not fit the model"):
        PictureClassifier.from_pretrained(tmp_path / "mixed")


def test_a_run_trained_on_another_folder_is_scored_by_name_not_by_number(run, images, tmp_path):
    shutil.copytree(images, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer/dark blue")  # green and red would be classes 0 and 1 there
    score = PictureClassifier.from_pretrained(run).score(PictureFolder.find(tmp_path / "fewer"))
    assert score.accuracy > 0.85 and int(score.targets.min()) == 1
