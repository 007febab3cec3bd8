"""Batches: targets shifted by one, every token once an epoch, any step from the seed alone, files beyond memory."""

import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel.data.batches import IGNORED, SequentialBatches, TokenBatches, open_tokens, write_tokens

ROWS = dict(length=st.integers(2, 400), context_length=st.integers(1, 40), batch_size=st.integers(1, 9))
SIZES = dict(**ROWS, seed=st.integers(0, 10))


def fitting(length: int, context_length: int) -> int:
    return max(length, context_length + 1)


def epoch_of(batches: TokenBatches, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """All windows of an epoch, as (inputs, targets), in the order of use."""
    first = epoch * batches.windows
    pairs = []
    for place in range(first, first + batches.windows):
        step, line = divmod(place, batches.batch_size)
        inputs, targets = batches[step]
        pairs.append((inputs[line].numpy(), targets[line].numpy()))
    return pairs


# Training

@given(**SIZES)
def test_targets_are_the_inputs_shifted_by_one(length, context_length, batch_size, seed):
    row = np.arange(fitting(length, context_length)) * 7 % 1000
    batches = TokenBatches(np.arange(len(row)), context_length, batch_size, seed)  # a token says where it stands
    for step in (0, 1, 17):
        inputs, targets = batches[step]
        assert inputs.shape == targets.shape == (batch_size, context_length)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert_shifted(inputs, targets)
        values = TokenBatches(row, context_length, batch_size, seed)[step]
        assert np.array_equal(values[0], row[inputs.numpy()])
        assert np.array_equal(values[1], row[targets.numpy()])


def assert_shifted(inputs, targets):
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_wrong_shift_is_caught(shift):
    inputs, _ = TokenBatches(np.arange(200), 16, 4)[0]
    with pytest.raises(AssertionError):
        assert_shifted(inputs, inputs + shift)


@settings(max_examples=60)
@given(**SIZES, epoch=st.integers(0, 3))
def test_in_an_epoch_every_token_is_a_target_once_or_in_the_rest(length, context_length, batch_size, seed, epoch):
    length = fitting(length, context_length)
    batches = TokenBatches(np.arange(length), context_length, batch_size, seed)
    targets = np.concatenate([targets for _, targets in epoch_of(batches, epoch)])
    assert len(np.unique(targets)) == len(targets) == batches.windows * context_length
    left_out = length - 1 - len(targets)
    assert 0 <= left_out < 2 * context_length
    assert targets.max() - targets.min() + 1 == len(targets)  # one unbroken piece: the rest lies at the two ends


def test_random_starts_would_not_use_every_token():
    starts = np.random.default_rng(0).integers(10_000 - 10, size=1000)  # negative control
    assert len(np.unique(starts[:, None] + np.arange(10))) < 7_000


@given(**SIZES, steps=st.lists(st.integers(0, 10_000), min_size=1, max_size=5))
def test_a_step_needs_nothing_but_its_number(length, context_length, batch_size, seed, steps):
    row = np.arange(fitting(length, context_length))
    used = TokenBatches(row, context_length, batch_size, seed)
    for step in range(5):
        used[step]
    for step in steps:
        fresh = TokenBatches(row, context_length, batch_size, seed)[step]
        assert all(torch.equal(a, b) for a, b in zip(used[step], fresh))


def test_another_process_makes_the_same_batches():
    code = ("import numpy as np; from bigmodel.data.batches import TokenBatches;"
            "print(TokenBatches(np.arange(1000), 10, 4, seed=3)[123][0][:, 0].tolist())")
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert eval(there) == TokenBatches(np.arange(1000), 10, 4, seed=3)[123][0][:, 0].tolist()


def test_seeds_epochs_and_offsets_differ():
    batches = TokenBatches(np.arange(1000), 10, 99)
    starts = [batches[step][0][:, 0].numpy() for step in range(40)]  # one epoch each
    assert batches.windows == 99 and batches.batches_per_epoch == 1 and batches.tokens_per_batch == 990
    assert len({tuple(order) for order in starts}) == 40
    assert len({order.min() for order in starts}) > 5
    assert not torch.equal(batches[0][0], TokenBatches(np.arange(1000), 10, 99, seed=1)[0][0])


def test_over_epochs_the_ends_are_used_too():
    batches = TokenBatches(np.arange(205), 10, 19)
    used = np.concatenate([batches[step][1].numpy().ravel() for step in range(300)])
    assert set(used) == set(range(1, 205))


@pytest.mark.parametrize("kind", ["list", "uint8", "uint16", "int32", "uint32", "torch", "memmap", "range"])
def test_any_row_gives_the_same_batches(kind, tmp_path):
    row = np.arange(250)
    np.save(tmp_path / "row.npy", row.astype(np.uint16))
    given_as = {"list": row.tolist(), "torch": torch.from_numpy(row), "range": range(250),
                "memmap": np.load(tmp_path / "row.npy", mmap_mode="r")}
    tokens = given_as[kind] if kind in given_as else row.astype(kind)
    for a, b in zip(TokenBatches(tokens, 20, 6)[2], TokenBatches(row, 20, 6)[2]):
        assert torch.equal(a, b)
    theirs = [*SequentialBatches(tokens, 20, 6)]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(theirs, SequentialBatches(row, 20, 6), strict=True))


def test_the_row_is_neither_copied_nor_changed():
    row = np.arange(500)
    batches = TokenBatches(row, 20, 4)
    batches[0][0][:] = -1
    assert np.shares_memory(batches.tokens, row) and np.array_equal(row, np.arange(500))


def test_the_shortest_text_that_fits():
    inputs, targets = TokenBatches(np.arange(65), 64, 3)[5]
    assert torch.equal(inputs, torch.arange(64).repeat(3, 1)) and torch.equal(targets, inputs + 1)
    with pytest.raises(ValueError, match="has 64 tokens, but one window takes 65 "):
        TokenBatches(np.arange(64), 64, 3)


@pytest.mark.parametrize("tokens, context_length, batch_size, message", [
    (np.zeros((4, 9), int), 3, 2, r"shape \(4, 9\)"), (np.zeros(9), 3, 2, "float64; expected one row of integers"),
    (torch.zeros(9, dtype=torch.bool), 3, 2, "bool"), ([], 3, 2, "has 0 tokens|expected at least 2"),
    (np.arange(9), 0, 2, "context_length is 0"), (np.arange(9), 3, 0, "batch_size 0")])
def test_bad_input_is_refused_in_one_line(tokens, context_length, batch_size, message):
    for kind in (TokenBatches, SequentialBatches):
        with pytest.raises(ValueError, match=message) as caught:
            kind(tokens, context_length, batch_size)
        assert "\n" not in str(caught.value)


def test_a_negative_step_is_refused():
    with pytest.raises(IndexError, match="step is -1"):
        TokenBatches(np.arange(9), 3, 2)[-1]


# Evaluation

@given(**ROWS)
def test_in_order_every_token_but_the_first_is_a_target_once(length, context_length, batch_size):
    row = np.arange(length)
    batches = SequentialBatches(row, context_length, batch_size)
    for _ in range(2):  # again and again
        pairs = list(batches)
        assert len(pairs) == len(batches)
        targets = torch.cat([targets.flatten() for _, targets in pairs])
        inputs = torch.cat([inputs.flatten() for inputs, _ in pairs])
        real = targets != IGNORED
        assert np.array_equal(targets[real], row[1:]) and np.array_equal(inputs[real], row[:-1])
        assert (~real).sum() < context_length and not inputs[~real].any()
        assert all(a.shape == b.shape and a.shape[1] == context_length and a.shape[0] <= batch_size for a, b in pairs)


def test_what_is_ignored_is_what_pytorch_ignores():
    logits, targets, loss = torch.randn(4, 7), torch.tensor([1, IGNORED, 3, IGNORED]), torch.nn.functional.cross_entropy
    assert torch.equal(loss(logits, targets), loss(logits[::2], targets[::2]))


# Files

@given(st.lists(st.lists(st.integers(0, 299), max_size=20), max_size=12), st.sampled_from([300, 65_536, 65_537, 10**9]))
def test_what_is_written_is_read(tmp_path_factory, pieces, vocab_size):
    path = tmp_path_factory.mktemp("tokens") / "row.npy"
    whole = [token for piece in pieces for token in piece]
    assert write_tokens(path, iter(pieces), vocab_size) == len(whole)
    assert np.load(path).tolist() == whole
    if whole:
        assert open_tokens(path).tolist() == whole and isinstance(open_tokens(path), np.memmap)
        assert open_tokens(path).dtype.itemsize == (2 if vocab_size <= 65_536 else 4)


def test_the_largest_ids_survive_two_bytes(tmp_path):
    write_tokens(tmp_path / "row.npy", [[0, 65_535]], 65_536)
    assert open_tokens(tmp_path / "row.npy").tolist() == [0, 65_535]
    write_tokens(tmp_path / "row.npy", [np.array([65_536, 128_000])], 128_256)
    assert open_tokens(tmp_path / "row.npy").tolist() == [65_536, 128_000]
    assert np.array([65_536]).astype(np.uint16)[0] == 0  # negative control: what happens without the check


@pytest.mark.parametrize("piece", [[7, 300], [-1], np.zeros((2, 2), int), torch.tensor([0.5])])
def test_a_bad_piece_leaves_the_old_file_whole(tmp_path, piece):
    write_tokens(tmp_path / "row.npy", [[1, 2, 3]], 300)
    with pytest.raises(ValueError, match="expected"):
        write_tokens(tmp_path / "row.npy", [[4, 5], piece], 300)
    assert open_tokens(tmp_path / "row.npy").tolist() == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["row.npy"]


def test_files_that_hold_no_tokens(tmp_path):
    with pytest.raises(FileNotFoundError, match="write_tokens"):
        open_tokens(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "square.npy", np.zeros((3, 3), int))
    np.save(tmp_path / "cut.npy", np.arange(1000))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    for name in ("text", "empty", "square", "cut"):
        with pytest.raises(ValueError, match="holds no row of tokens") as caught:
            open_tokens(tmp_path / f"{name}.npy")
        assert "\n" not in str(caught.value)


def test_a_memory_map_stays_on_the_disk(tmp_path):
    write_tokens(tmp_path / "row.npy", (np.zeros(1_000_000, int) for _ in range(8)), 256)  # 16 MB
    tracemalloc.start()
    batches = TokenBatches(open_tokens(tmp_path / "row.npy"), 1024, 8)
    for step in range(20):
        batches[step]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_batches_come_far_faster_than_a_model_can_eat_them():
    batches = TokenBatches(np.arange(2_000_000) % 50_000, 128, 16)
    batches[0]
    start = time.process_time()
    for step in range(100):
        batches[step]
    assert 100 * batches.tokens_per_batch / (time.process_time() - start) > 500_000  # a model of 3M parameters: 10,000
