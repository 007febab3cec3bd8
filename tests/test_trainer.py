"""The trainer under faults and against references: what its lessons cannot show."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from bigmodel.models.gpt import GPT, GPTConfig
from bigmodel.training import runs, watching
from bigmodel.training.trainer import (
    Trainer,
    TrainerConfig,
    accumulate,
    make_adamw,
    micro_batches,
    next_token_loss,
    parameter_groups,
    scale_gradients,
    warmup_cosine,
)

STEPS = 24
HUNDREDTHS = st.integers(0, 100).map(lambda n: n / 100)  # st.floats refuses to work where denormals are off


class TiedWords(nn.Module):
    """A small language model with dropout and a tied head."""

    def __init__(self, vocab=50, hidden=16, dropout=0.2):
        super().__init__()
        self.words, self.mix, self.norm = nn.Embedding(vocab, hidden), nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(hidden, vocab, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.norm(self.drop(self.mix(self.words(tokens)).relu())))


class Windows:
    """Batches of a fixed walk through the vocabulary; each is a pure function of its number."""

    def __init__(self, batch=4, time=8, vocab=50):
        self.shape, self.vocab = (batch, time + 1), vocab

    def __getitem__(self, n):
        generator = torch.Generator().manual_seed(1000 + n)
        start = torch.randint(self.vocab, (self.shape[0], 1), generator=generator)
        tokens = (start + 3 * torch.arange(self.shape[1])) % self.vocab
        return tokens[:, :-1], tokens[:, 1:]


def noisy_loss(model, batch):
    """A loss that draws on all three random generators, as augmentations and samplers do."""
    total, count = next_token_loss(model, batch)
    return total * (1 + 0.1 * random.random() + 0.1 * np.random.rand()), count


def language_trainer(out=None, loss=noisy_loss, batches=None, model=None, validation=True, **fields):
    torch.manual_seed(5)
    config = TrainerConfig(**{"steps": STEPS, "save_every": 5, "log_every": 1, "evaluate_every": 8, **fields})
    held_out = [Windows()[n] for n in (901, 902)] if validation else None
    return Trainer(model or TiedWords(), loss, batches or Windows(), config, held_out, out, show=False)


class Stop(Exception):
    pass


class StopAt:
    """Batches that raise, or do something else, when the n-th one is fetched."""

    def __init__(self, n, action=None, batches=None):
        self.n, self.action, self.batches = n, action, batches or Windows()

    def __getitem__(self, n):
        if n == self.n:
            if self.action is None:
                raise Stop
            self.action()
        return self.batches[n]


def curve(rows):
    names = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm")  # all but the times
    return [tuple(row[name] for name in names) for row in rows]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def checkpoint_step(folder):
    with safe_open(folder / "trainer.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["record"])["step"]


@pytest.fixture(scope="module")
def uninterrupted():
    trainer = language_trainer()
    return curve(trainer.fit()), trainer.model


def interrupted_at(n, folder, **fields):
    with contextlib.suppress(Stop):
        language_trainer(folder, batches=StopAt(n), **fields).fit()


# ---------------------------------------------------------------- a process that dies

def child(folder, where, number):
    """Run or resume; die by SIGKILL in the middle of something."""
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    batches = Windows()
    if where == "update":
        batches = StopAt(number, die)
    elif where == "save":  # half of the checkpoint is on the disk, beside the old one
        count, write = [0], runs.write_tensors

        def half(path, tensors, metadata):
            count[0] += 1
            if count[0] == number:
                with runs_write_aside(path) as aside:
                    aside.write_bytes(b"\x40\0\0\0\0\0\0\0{")
                    die()
            write(path, tensors, metadata)
        runs.write_tensors = half
    elif where == "log":  # half a row is in the log
        line = watching._csv_line

        def torn(row):
            text = line(row)
            if row["step"] == number:
                with open(folder / "log.csv", "a") as file:
                    file.write(text[:9])
                die()
            return text
        watching._csv_line = torn
    resume = (folder / "trainer.safetensors").exists()
    language_trainer(folder, batches=batches).fit(resume=resume)


def runs_write_aside(path):
    from bigmodel.core import write_aside
    return write_aside(path)


def spawn(*arguments, **options):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()),
                   "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=environment, text=True, cwd=root,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_killed_again_and_again_ends_as_if_uninterrupted(tmp_path, uninterrupted):
    folder = tmp_path / "a run, été 跑"
    kills = [("update", random.randrange(2, 10)), ("save", 2), ("log", random.randrange(16, 21)), ("none", 0)]
    print(kills)
    for where, number in kills:
        process = spawn(folder, where, number)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == (0 if where == "none" else -signal.SIGKILL), errors
    expected, model = uninterrupted
    assert curve(watching.read_log(folder / "log.csv")) == expected
    resumed = language_trainer(folder)
    resumed.fit(resume=True)  # nothing left to do
    assert same_weights(resumed.model, model) and resumed.model.head.weight is resumed.model.words.weight


def test_sigint_from_outside_leaves_a_checkpoint_and_one_message(tmp_path, uninterrupted):
    process = spawn(tmp_path / "run", "slow", 0)
    assert process.stdout.readline() == "at 6\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert errors == "stopped after step 7 of 24; fit(resume=True) goes on\n"
    assert checkpoint_step(tmp_path / "run") == 7
    trainer = language_trainer(tmp_path / "run")
    assert curve(trainer.fit(resume=True)) == uninterrupted[0] and same_weights(trainer.model, uninterrupted[1])


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize("n", [0, 1, 5, 6, STEPS - 1])
def test_resume_is_exact(n, tmp_path, uninterrupted):
    interrupted_at(n, tmp_path)
    trainer = language_trainer(tmp_path)
    torch.rand(7), random.random(), np.random.rand()  # a resumed process starts from another random state
    assert curve(trainer.fit(resume=True)) == uninterrupted[0]
    assert same_weights(trainer.model, uninterrupted[1])
    assert curve(watching.read_log(tmp_path / "log.csv")) == uninterrupted[0]


@pytest.mark.parametrize("log_every, save_every", [(7, 5), (5, 7)])
def test_resume_between_two_rows_of_the_log(log_every, save_every, tmp_path):
    fields = {"log_every": log_every, "save_every": save_every}
    expected = language_trainer(**fields).fit()
    interrupted_at(18, tmp_path, **fields)
    assert curve(language_trainer(tmp_path, **fields).fit(resume=True)) == curve(expected)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize("lost", ["python", "numpy", "cpu"])
def test_control_a_resume_without_random_states_is_seen(lost, tmp_path, uninterrupted, monkeypatch):
    interrupted_at(13, tmp_path)
    trainer, restore, now = language_trainer(tmp_path), runs.restore_random_state, runs.random_state()
    monkeypatch.setattr(runs, "restore_random_state", lambda state: restore({**state, lost: now[lost]}))
    rows = curve(trainer.fit(resume=True))
    assert rows[:10] == uninterrupted[0][:10] and rows[11:] != uninterrupted[0][11:]


def test_control_a_resume_without_moments_is_seen(tmp_path, uninterrupted, monkeypatch):
    interrupted_at(13, tmp_path)
    monkeypatch.setattr(runs, "_load_optimizer", lambda state, tensors: None)
    assert curve(language_trainer(tmp_path).fit(resume=True))[12:] != uninterrupted[0][12:]


@given(seed=st.integers(0, 2**32 - 1), drawn=st.integers(0, 700))
@settings(max_examples=15, deadline=None)
def test_random_state_survives_json(seed, drawn):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    random.gauss(0, 1), np.random.randn(drawn | 1), torch.rand(drawn)
    draw = lambda: (random.gauss(0, 1), random.random(), *np.random.randn(3), *torch.randn(3).tolist())  # noqa: E731
    state = json.loads(json.dumps(runs.random_state()))
    first = draw()
    runs.restore_random_state(state)
    assert draw() == first


def test_ctrl_c_ends_after_the_step_and_the_run_goes_on(tmp_path, uninterrupted):
    trainer = language_trainer(tmp_path, batches=StopAt(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt, match="after step 8 of 24"):
        trainer.fit()
    assert checkpoint_step(tmp_path) == 8 and trainer.state.history[-1]["step"] == 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert curve(language_trainer(tmp_path).fit(resume=True)) == uninterrupted[0]


def test_ctrl_c_twice_ends_at_once_and_the_old_checkpoint_is_whole(tmp_path, uninterrupted):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        language_trainer(tmp_path, batches=StopAt(7, twice)).fit()
    assert checkpoint_step(tmp_path) == 5
    assert curve(language_trainer(tmp_path).fit(resume=True)) == uninterrupted[0]


def test_ctrl_c_without_a_folder_goes_on_in_memory(uninterrupted):
    trainer = language_trainer(batches=StopAt(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.batches.n = -1
    assert curve(trainer.fit(resume=True)) == uninterrupted[0]


def test_a_finished_or_foreign_run_is_not_overwritten_unasked(tmp_path):
    language_trainer(tmp_path, steps=2).fit()
    before = (tmp_path / "trainer.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        language_trainer(tmp_path, steps=2).fit()
    assert (tmp_path / "trainer.safetensors").read_bytes() == before
    assert len(language_trainer(tmp_path, steps=3).fit(overwrite=True)) == 3
    assert [row["step"] for row in watching.read_log(tmp_path / "log.csv")] == [1, 2, 3]


@pytest.mark.parametrize("change, name", [
    ({"learning_rate": 2e-3}, "learning_rate"), ({"steps": 25}, "steps"), ({"betas": (0.9, 0.99)}, "betas"),
    ({"seed": 1}, "seed"), ({"model": TiedWords(vocab=60)}, "words.weight"), ({"model": nn.Linear(2, 2)}, "class")])
def test_resuming_something_else_is_refused_by_name(change, name, tmp_path):
    interrupted_at(6, tmp_path)
    trainer = language_trainer(tmp_path, **change)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=f"'{name}'") as error:
        trainer.fit(resume=True)
    assert "\n" not in str(error.value) and trainer.state.step == 0
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())


def test_a_model_config_that_changes_no_shape_is_compared_too(tmp_path):
    def trainer(heads, **fields):
        config = GPTConfig(vocab_size=50, context_length=8, hidden_size=16, num_layers=1, num_heads=heads)
        return language_trainer(tmp_path, model=GPT(config), steps=2, **fields)
    trainer(2).fit()
    with pytest.raises(ValueError, match="num_heads.*2.*4"):
        trainer(4).fit(resume=True)


def test_how_often_one_looks_may_change(tmp_path, uninterrupted):
    interrupted_at(12, tmp_path, log_every=3, evaluate_every=4)
    rows = language_trainer(tmp_path, save_every=2).fit(resume=True)
    assert curve(rows)[-10:] == uninterrupted[0][-10:]


@pytest.mark.parametrize("out", [None, "empty"])
def test_nothing_to_resume(out, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="resume"):
        language_trainer(out and tmp_path / out).fit(resume=True)


# ---------------------------------------------------------------- disks

@contextlib.contextmanager
def disk_limit(size):
    """No file may grow beyond `size` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing(tmp_path, uninterrupted):
    interrupted_at(6, tmp_path)
    before = (tmp_path / "trainer.safetensors").read_bytes()
    with disk_limit(len(before) - 100), pytest.raises(OSError, match="step 5 is whole.*make room") as error:
        language_trainer(tmp_path).fit(resume=True)
    assert "\n" not in str(error.value)
    assert (tmp_path / "trainer.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.tmp"))
    assert curve(language_trainer(tmp_path).fit(resume=True)) == uninterrupted[0]


def test_a_folder_that_cannot_be_written_shows_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="step 0 could not be written") as error:
        language_trainer(tmp_path / "file" / "run", batches=StopAt(0)).fit()
    assert "\n" not in str(error.value)


@given(share=st.integers(0, 998).map(lambda n: n / 1000))
@settings(max_examples=25, deadline=None)
def test_a_cut_checkpoint_is_refused_in_one_line(share, cut_checkpoint):
    path, content = cut_checkpoint
    path.write_bytes(content[:int(len(content) * share)])
    trainer = language_trainer(path.parent)
    with pytest.raises(ValueError, match="trainer.safetensors") as error:
        trainer.fit(resume=True)
    assert "\n" not in str(error.value) and trainer.state.step == 0


@pytest.fixture(scope="module")
def cut_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    language_trainer(folder, steps=2).fit()
    return folder / "trainer.safetensors", (folder / "trainer.safetensors").read_bytes()


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({"weight": torch.zeros(2)}, tmp_path / "trainer.safetensors")
    with pytest.raises(ValueError, match="not the checkpoint of a run"):
        language_trainer(tmp_path).fit(resume=True)


@given(cut=st.integers(0, 200))
@settings(max_examples=20, deadline=None)
def test_a_torn_log_gives_its_whole_rows(cut, cut_checkpoint):
    path = cut_checkpoint[0].parent / "log.csv"
    whole, torn = path.read_text(), path.parent / "torn.csv"
    rows, head = watching.read_log(path), whole.index("\n") + 1
    torn.write_text(whole[:max(head, len(whole) - cut)])
    assert watching.read_log(torn) == rows[:torn.read_text().count("\n") - 1]


def test_the_file_holds_tied_weights_once_and_no_pickle(tmp_path):
    trainer = language_trainer(tmp_path, steps=2)
    trainer.fit()
    with safe_open(tmp_path / "trainer.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert ("model/words.weight" in names) != ("model/head.weight" in names)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"trainer.safetensors", "log.csv"}


def test_two_views_of_one_memory_are_kept_apart():
    base = torch.arange(6.0)
    unique, aliases = runs.untie({"a": base[:4], "b": base[2:], "c": base[:4], "empty": base[:0]})
    assert aliases == {"c": "a"} and unique["b"].tolist() == [2, 3, 4, 5]
    assert len({tensor.untyped_storage().data_ptr() for tensor in unique.values() if tensor.numel()}) == 2


# ---------------------------------------------------------------- the mathematics of an update

def weighted_squares(model, batch):
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).sum(), len(inputs)


def problem(rows, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(5, 1).double(), torch.randn(rows, 5).double(), torch.randn(rows, 1).double()


@given(cuts=st.sets(st.integers(1, 29), min_size=1, max_size=5), clip=st.sampled_from([None, 0.05, 1e3]))
@settings(max_examples=25, deadline=None)
def test_micro_batches_of_any_sizes_equal_one_batch(cuts, clip):
    gradients = []
    for edges in ([0, 30], [0, *sorted(cuts), 30]):
        model, inputs, targets = problem(30)
        parts = [(inputs[a:b], targets[a:b]) for a, b in zip(edges, edges[1:])]
        _, count = accumulate(model, weighted_squares, parts)
        norm = scale_gradients(model, count, clip)
        gradients.append(torch.cat([norm.reshape(1), *(p.grad.flatten() for p in model.parameters())]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    if clip == 0.05:
        assert gradients[1][1:].norm() <= 0.05 * (1 + 1e-9) < gradients[1][0]


def test_control_a_mean_of_means_is_not_the_mean():
    model, inputs, targets = problem(30)
    _, count = accumulate(model, weighted_squares, [(inputs, targets)])
    scale_gradients(model, count)
    right = model.weight.grad.clone()
    model.zero_grad()
    for part in (slice(0, 3), slice(3, 30)):
        (F.mse_loss(model(inputs[part]), targets[part]) / 2).backward()
    assert (model.weight.grad - right).norm() > 0.05 * right.norm()


class Halves:
    """The batches of `Windows`, each cut into two of different sizes, with some targets that do not count."""

    def __init__(self, pieces):
        self.pieces = pieces

    def __getitem__(self, n):
        inputs, targets = Windows(batch=6)[n // self.pieces]
        targets = targets.masked_fill(torch.arange(48).reshape(6, 8) % 5 > 2, -100)
        parts = [(inputs, targets)] if self.pieces == 1 else [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]
        return parts[n % self.pieces]


def test_accumulation_in_the_trainer_equals_one_batch():
    curves, models, model = [], [], TiedWords(dropout=0.0).double()
    for pieces in (1, 2):
        trainer = language_trainer(loss=next_token_loss, batches=Halves(pieces), accumulation=pieces,
                                   model=copy.deepcopy(model))
        curves.append(torch.tensor([row[:2] for row in curve(trainer.fit())], dtype=torch.float64))
        models.append(trainer.model)
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*curves, rtol=1e-9, atol=1e-11)


def test_a_trainer_equals_the_plain_loop():
    trainer = language_trainer(loss=next_token_loss, model=TiedWords(dropout=0.0), clip_norm=0.5, validation=False)
    torch.manual_seed(6)
    model = copy.deepcopy(trainer.model)
    decay = [model.words.weight, model.mix.weight]
    rest = [model.mix.bias, model.norm.weight, model.norm.bias]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), foreach=False)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, milestones=[2], schedulers=[
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 1, 2),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 3, 1e-4)])
    losses = []
    for step in range(STEPS):
        inputs, targets = Windows()[step]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    rows = trainer.fit()
    torch.testing.assert_close([row["loss"] for row in rows], losses, rtol=1e-5, atol=1e-6)
    for a, b in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@given(steps=st.integers(1, 400), share=HUNDREDTHS, final=HUNDREDTHS)
@settings(max_examples=60, deadline=None)
def test_schedule(steps, share, final):
    warmup = int(share * (steps - 1))
    rates = [warmup_cosine(step, steps, warmup, final) for step in range(steps)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates) and max(rates) == rates[warmup] == pytest.approx(1)
    assert rates[:warmup + 1] == sorted(rates[:warmup + 1])
    assert rates[warmup:] == pytest.approx(sorted(rates[warmup:], reverse=True))
    if steps - 1 > warmup:
        assert rates[-1] == pytest.approx(final)
    if warmup:
        assert np.diff(rates[:warmup + 1]) == pytest.approx(1 / (warmup + 1))


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 2, 3), nn.Linear(4, 4))
    model[4].requires_grad_(False)
    decay, rest = parameter_groups(model, 0.3)
    assert [list(p.shape) for p in decay["params"]] == [[5, 4], [4, 4], [2, 1, 3, 3]] and decay["weight_decay"] == 0.3
    assert [list(p.shape) for p in rest["params"]] == [[4], [4], [4], [2]] and rest["weight_decay"] == 0
    optimizer = make_adamw(model, TrainerConfig(steps=1, weight_decay=0.3, learning_rate=0.5))
    before = [p.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters()):
        torch.testing.assert_close(new, old * (0.85 if new.ndim >= 2 and new.requires_grad else 1.0))
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), 0.1)


@pytest.mark.parametrize("fields, name", [
    ({"steps": 0}, "steps"), ({"learning_rate": 0.0}, "learning_rate"), ({"learning_rate": math.nan}, "learning_rate"),
    ({"final_learning_rate": 1.5}, "final_learning_rate"), ({"warmup_steps": 9}, "warmup_steps"),
    ({"warmup_steps": -1}, "warmup_steps"), ({"weight_decay": -0.1}, "weight_decay"), ({"betas": (0.9, 1.0)}, "betas"),
    ({"clip_norm": 0.0}, "clip_norm"), ({"accumulation": 0}, "accumulation"), ({"precision": "float16"}, "precision"),
    ({"evaluate_every": 0}, "evaluate_every"), ({"save_every": 0}, "save_every"), ({"log_every": 0}, "log_every")])
def test_a_config_out_of_range_is_named(fields, name):
    with pytest.raises(ValueError, match=f"^{name} is .*; expected ") as error:
        TrainerConfig(**{"steps": 9, **fields})
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- what goes wrong in a loss

def test_an_exploding_loss_stops_before_it_reaches_weights_or_checkpoint(tmp_path):
    def loss(model, batch):
        total, count = next_token_loss(model, batch)
        return (total * float("inf") if trainer.state.step == 7 else total), count
    trainer = language_trainer(tmp_path, loss=loss)
    with pytest.raises(FloatingPointError, match="exploded at step 8 .*learning_rate") as error:
        trainer.fit()
    assert "\n" not in str(error.value) and checkpoint_step(tmp_path) == 5
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("loss, error", [
    (lambda model, batch: model(batch[0]).mean(), TypeError),
    (lambda model, batch: (model(batch[0]).sum() * 0, 0), FloatingPointError)])
def test_a_loss_that_is_no_sum_and_count(loss, error):
    with pytest.raises(error, match="expected .total, count|holds no target"):
        language_trainer(loss=loss).fit()


def test_too_few_batches_and_validation_that_runs_dry():
    with pytest.raises(ValueError, match="no batch 3"):
        language_trainer(batches=[Windows()[n] for n in range(3)]).fit()
    with pytest.raises(ValueError, match="only once"):
        Trainer(TiedWords(), next_token_loss, Windows(), TrainerConfig(steps=1), iter([Windows()[0]]))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        language_trainer(validation=False).evaluate()
    assert [batch for batch in micro_batches("abcdef", 1, 3)] == ["d", "e", "f"]


# ---------------------------------------------------------------- looking does not change what is looked at

def test_validation_leaves_the_training_alone(uninterrupted):
    seldom = language_trainer(validation=False)
    often = language_trainer(evaluate_every=1)
    assert [row[1] for row in curve(seldom.fit())] == [row[1] for row in curve(often.fit())]
    assert same_weights(seldom.model, often.model)


def test_validation_is_exact_and_without_dropout():
    trainer = language_trainer(loss=next_token_loss)
    trainer.validation = [Halves(2)[0], Halves(2)[1], Halves(2)[2]]
    inputs, targets = (torch.cat(parts) for parts in zip(*trainer.validation))
    trainer.model.eval()
    expected = F.cross_entropy(trainer.model(inputs).flatten(0, 1), targets.flatten()).item()
    for mode in (True, False):
        trainer.model.train(mode)
        assert trainer.evaluate() == pytest.approx(expected, rel=1e-6)
        assert trainer.model.training is mode and trainer.model.drop.training is mode


def test_a_run_leaves_the_mode_of_the_model(capsys):
    trainer, seen = language_trainer(steps=3, evaluate_every=1), []
    trainer.model.drop.register_forward_hook(lambda module, *_: seen.append(module.training))
    trainer.model.eval()
    trainer.show = True
    trainer.fit()
    assert not trainer.model.training and seen == [True, False, False] * 3
    assert capsys.readouterr() == ("", "")  # no terminal, no notebook: no output


def test_the_best_model_is_kept(tmp_path):
    config = GPTConfig(vocab_size=50, context_length=8, hidden_size=16, num_layers=1, num_heads=2)
    saved = []
    fields = {"learning_rate": 0.3, "clip_norm": None, "evaluate_every": 1, "keep_best": True}
    trainer = Trainer(GPT(config), next_token_loss, Windows(), TrainerConfig(steps=12, **fields), [Windows()[900]],
                      tmp_path, saved.append, show=False)
    rows = trainer.fit()
    losses = [row["validation_loss"] for row in rows]
    best = GPT.from_pretrained(tmp_path / "best")
    assert watching.mean_loss(best, next_token_loss, trainer.validation) == pytest.approx(min(losses), rel=1e-6)
    assert same_weights(GPT.from_pretrained(tmp_path), trainer.model)
    assert saved[0] == tmp_path and tmp_path / "best" in saved
    with pytest.raises(ValueError, match="keep_best needs"):
        language_trainer(tmp_path, keep_best=True)


def test_tensorboard_forgets_what_a_resume_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    interrupted_at(13, tmp_path)
    rows = language_trainer(tmp_path).fit(resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows]
    assert [event.step for event in events.Scalars("validation_loss")] == [8, 16, 24]


# ---------------------------------------------------------------- models that are no language models

def test_linear_regression_finds_the_slope(tmp_path):
    class Points:
        def __getitem__(self, n):
            generator = torch.Generator().manual_seed(n)
            x = torch.randn(16, 3, generator=generator)
            return {"x": x, "y": x @ torch.tensor([[1.0], [-2.0], [3.0]]) + 0.5}

    def squares(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).sum(), len(batch["x"])

    trainer = Trainer(nn.Linear(3, 1), squares, Points(), TrainerConfig(steps=300, learning_rate=0.1, weight_decay=0.0),
                      [Points()[999]], tmp_path, show=False)
    rows = trainer.fit()
    torch.testing.assert_close(trainer.model.weight, torch.tensor([[1.0, -2.0, 3.0]]), atol=0.02, rtol=0)
    assert rows[-1]["validation_loss"] < 1e-3 < rows[0]["loss"]


Pictures = namedtuple("Pictures", "images labels")


class Patterns:
    """Pictures with a bright upper, lower, left or right half, and noise."""

    def __getitem__(self, n):
        generator = torch.Generator().manual_seed(n)
        labels = torch.randint(4, (16,), generator=generator)
        images = 0.5 * torch.randn(16, 1, 8, 8, generator=generator)
        halves = torch.zeros(4, 1, 8, 8)
        halves[0, :, :4], halves[1, :, 4:], halves[2, :, :, :4], halves[3, :, :, 4:] = 1, 1, 1, 1
        return Pictures(images + halves[labels], labels)


def classification(model, batch):
    return F.cross_entropy(model(batch.images), batch.labels, reduction="sum"), len(batch.labels)


def test_an_image_classifier_learns_and_resumes_with_its_batch_norm(tmp_path):
    def trainer(out, batches=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
                              nn.Flatten(), nn.Linear(512, 4)).to(memory_format=torch.channels_last)
        config = TrainerConfig(steps=40, learning_rate=3e-3, save_every=10, evaluate_every=20)
        return Trainer(model, classification, batches or Patterns(), config, [Patterns()[999]], out, show=False)
    whole, broken = trainer(tmp_path / "whole"), trainer(tmp_path / "broken", StopAt(27, batches=Patterns()))
    rows = whole.fit()
    with pytest.raises(Stop):
        broken.fit()
    again = trainer(tmp_path / "broken")
    assert curve(again.fit(resume=True)) == curve(rows) and same_weights(again.model, whole.model)
    assert rows[-1]["validation_loss"] < 0.2 < rows[0]["loss"] and again.model[1].num_batches_tracked == 40


def test_another_optimizer_keeps_its_own_rate_and_resumes(tmp_path):
    def sgd(model, config):
        groups = [{"params": [model.words.weight], "lr": 0.5}, {"params": model.mix.parameters(), "lr": 0.1}]
        return torch.optim.SGD(groups, momentum=0.9)

    def trainer(out, batches=None):
        torch.manual_seed(5)
        config = TrainerConfig(steps=20, save_every=5, log_every=1)
        return Trainer(TiedWords(), noisy_loss, batches or Windows(), config, out=out, optimizer=sgd, show=False)
    expected = trainer(None).fit()
    with contextlib.suppress(Stop):
        trainer(tmp_path, StopAt(13)).fit()
    assert curve(trainer(tmp_path).fit(resume=True)) == curve(expected)
    assert max(row["learning_rate"] for row in expected) == 0.5


def test_bfloat16_computes_coarsely_and_keeps_weights_fine():
    fields = {"loss": next_token_loss, "model": TiedWords(dropout=0.0), "steps": 10}
    fine = language_trainer(**fields | {"model": copy.deepcopy(fields["model"])}, precision="float32").fit()
    trainer = language_trainer(**fields, precision="bfloat16")
    coarse = trainer.fit()
    assert [row["loss"] for row in coarse] != [row["loss"] for row in fine]
    assert coarse[-1]["loss"] == pytest.approx(fine[-1]["loss"], rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_batches_of_any_form_move_to_the_device():
    batch = {"a": torch.ones(2), "b": [torch.zeros(1), "text"], "c": Pictures(torch.ones(1), (torch.ones(1), 3))}
    moved = watching.to_device(batch, torch.device("meta"))
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["b"][1] == "text"
    assert isinstance(moved["c"], Pictures) and moved["c"].labels[0].is_meta and moved["c"].labels[1] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resume_is_exact_on_a_gpu(tmp_path):
    expected = language_trainer(log_every=4).fit()
    interrupted_at(13, tmp_path, log_every=4)
    assert curve(language_trainer(tmp_path, log_every=4).fit(resume=True)) == curve(expected)


def test_config_is_plain_data():
    config = TrainerConfig(steps=10, betas=(0.8, 0.9))
    assert TrainerConfig(**dataclasses.asdict(config)) == config and config.warmup == 1


if __name__ == "__main__":  # the process that dies
    folder, where, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if where == "slow":
        import time

        def pause():
            print("at 6", flush=True)
            time.sleep(5)  # until the signal comes
        try:
            language_trainer(folder, batches=StopAt(6, pause)).fit()
        except KeyboardInterrupt as stop:
            sys.exit(str(stop))
    else:
        child(folder, where, number)
