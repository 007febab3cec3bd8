"""The command line as a user meets it: whole runs, interruptions, and every kind of bad input, in real processes."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from bigmodel.cli import main; main()"]
TINY = ["--layers", "1", "--hidden-size", "16", "--heads", "2", "--context-length", "16", "--batch-size", "4",
        "--vocab-size", "300"]
SENTENCES = ["the cat sat on the mat", "a dog ran in the park", "rain falls softly on the town", "her ship came home"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def bigmodel(*arguments, text_in: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, input=text_in,
                          timeout=120, cwd=cwd, env=environment())


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a folder with spaces, ü and 中") / "my text.txt"
    path.write_text("".join(f"Line {i}: {SENTENCES[i * 7 % 4]}, and {SENTENCES[i * 5 % 3]}.\n" for i in range(300)))
    return path


@pytest.fixture(scope="module")
def run(text) -> Path:
    folder = text.parent / "run"
    done = bigmodel("train", "--data", text, "--out", folder, "--steps", "30", *TINY)
    assert done.returncode == 0, done.stderr
    sample = done.stdout.partition("\nsample ")[2].partition("\n\nnext ")[0].split()
    assert "bits per byte" in done.stdout and len(sample) > 5, done.stdout  # five words are the prompt
    return folder


def losses(folder: Path) -> list[tuple[str, str]]:
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def one_line_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_help_needs_no_torch():
    code = "import sys, bigmodel.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for command in ("train", "evaluate", "generate", "predict", "progress"):
        done = bigmodel(command, "--help")
        assert done.returncode == 0 and "Usage" in done.stdout
    assert "Examples" in bigmodel("train", "--help").stdout
    assert bigmodel("--version").stdout.startswith("bigmodel ")


def test_run_folder_is_loaded_by_transformers(run):
    transformers = pytest.importorskip("transformers")
    import torch

    from bigmodel.data.tokenizer import Tokenizer
    from bigmodel.models.gpt import GPT

    ids = torch.tensor([Tokenizer.from_pretrained(run).encode("Line 7: the cat")])
    assert transformers.AutoTokenizer.from_pretrained(run)("Line 7: the cat")["input_ids"] == ids[0].tolist()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run)
    with torch.no_grad():
        assert (theirs(ids[:, :16]).logits - GPT.from_pretrained(run)(ids[:, :16])).abs().max() < 1e-5


def test_evaluate_and_generate(run, text):
    table = bigmodel("evaluate", run)
    assert table.returncode == 0 and "bigrams" in table.stdout and "lzma" in table.stdout, table.stderr
    assert bigmodel("evaluate", run, "--data", text).returncode == 0
    first, again, other = (bigmodel("generate", run, "--prompt", "Line", "--tokens", "20", "--seed", seed).stdout
                           for seed in (1, 1, 2))
    assert first.startswith("Line") and first == again != other
    piped = bigmodel("generate", run, "--prompt", "-", "--tokens", "20", "--seed", "1", text_in="Line\n")
    assert piped.stdout == first


def test_killed_run_resumes_to_the_same_curve(text, tmp_path):
    settings = ["--data", text, "--steps", "60", *TINY]
    assert bigmodel("train", "--out", tmp_path / "whole", *settings).returncode == 0
    process = subprocess.Popen([*PROGRAM, "train", "--out", tmp_path / "killed", *map(str, settings)],
                               stdout=subprocess.DEVNULL, env=environment())
    while process.poll() is None and len(losses(tmp_path / "killed")) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed: give it more steps"
    resumed = bigmodel("train", "--out", tmp_path / "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_interrupt_saves_and_says_how_to_go_on(text, tmp_path):
    endless = [*PROGRAM, "train", "--out", tmp_path / "run", "--data", text, "--steps", "100000", *TINY]
    process = subprocess.Popen(endless, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    while not (tmp_path / "run/log.csv").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and "--resume" in said, said
    assert bigmodel("generate", tmp_path / "run", "--tokens", "5").returncode == 0


@pytest.mark.parametrize(("content", "says"), [
    (b"", "empty"),
    (b"\x7fELF\x00\x00\x01", "not text"),
    ("caf\u00e9 olé".encode("latin-1") * 50, "UTF-8"),
    (b"   \n\n ", "white space"),
    (b"too short", "token"),
])
def test_unusable_text(tmp_path, content, says):
    (tmp_path / "bad.txt").write_bytes(content)
    error = one_line_error(bigmodel("train", "--data", tmp_path / "bad.txt", "--out", tmp_path / "run", "--steps", "2"))
    assert says in error, error
    assert not list(tmp_path.glob("run/*")), "nothing may be left behind"


def test_unknown_paths_and_names(run, tmp_path):
    assert "nowhere.txt" in one_line_error(bigmodel("train", "--data", "nowhere.txt", "--out", tmp_path / "run"))
    unknown = bigmodel("train", "--data", "no-such-corpus", "--out", tmp_path / "run")
    assert "python-reference" in one_line_error(unknown)
    assert "bigmodel train" in one_line_error(bigmodel("generate", tmp_path / "nowhere"))
    assert "run.json" in one_line_error(bigmodel("train", "--resume", "--out", tmp_path / "nowhere"))
    assert "already" in one_line_error(bigmodel("train", "--out", run))


def test_settings_out_of_range(text, run, tmp_path):
    train = ("train", "--data", text, "--out", tmp_path / "run")
    assert "num_heads" in one_line_error(bigmodel(*train, "--heads", "5", "--hidden-size", "16"))
    assert "minutes" in one_line_error(bigmodel(*train, "--minutes", "-1"))
    assert "learning_rate" in one_line_error(bigmodel(*train, *TINY, "--steps", "2", "--learning-rate", "-1"))
    assert "top_p" in one_line_error(bigmodel("generate", run, "--top-p", "1.5"))
    assert "temperature" in one_line_error(bigmodel("generate", run, "--temperature", "-1"))
    assert not (tmp_path / "run").exists(), "nothing may be left behind"
    for arguments in (("train", "--steps", "0", "--out", "x"), ("train",), ("generate",), ("dance",)):
        done = bigmodel(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(("file", "damage", "says"), [
    ("model.safetensors", lambda data: data[:len(data) // 2], "model.safetensors"),
    ("model.safetensors", lambda data: b"not tensors at all", "model.safetensors"),
    ("config.json", lambda data: data[:20], "config.json"),
    ("config.json", lambda data: data.replace(b'"gpt2"', b'"bert"'), "model_type"),
    ("config.json", lambda data: data.replace(b'"n_embd": 16', b'"n_embd": 32'), "shape"),
    ("tokenizer.json", lambda data: data[:100], "tokenizer.json"),
])
def test_damaged_checkpoints(run, tmp_path, file, damage, says):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(damage((run / file).read_bytes()))
    assert says in one_line_error(bigmodel("generate", tmp_path / "run"))


def test_missing_weights_and_changed_text(run, text, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/model.safetensors").unlink()
    assert "model.safetensors" in one_line_error(bigmodel("generate", tmp_path / "run"))
    copy = tmp_path / "copy.txt"
    shutil.copy(text, copy)
    assert bigmodel("train", "--data", copy, "--out", tmp_path / "second", "--steps", "5", *TINY).returncode == 0
    copy.write_text(copy.read_text() + "something new\n")
    assert "changed" in one_line_error(bigmodel("train", "--resume", "--out", tmp_path / "second"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_full_disk_leaves_the_last_checkpoint_whole(text, tmp_path):
    folder = tmp_path / "run"
    train = ["train", "--data", text, "--out", folder, "--steps", "200", *TINY]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    done = subprocess.run([sys.executable, "-c", limit + ignore + PROGRAM[-1], *map(str, train)], capture_output=True,
                          text=True, env=environment(), timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr
    assert not list(folder.glob(".*.tmp")), "no half-written file may stay"
    assert "bigmodel train --resume" in done.stderr, done.stderr
    assert bigmodel("generate", folder, "--tokens", "5").returncode == 0
    assert bigmodel("train", "--resume", "--out", folder).returncode == 0
    assert losses(folder)[-1][0] == "200"
