"""bigmodel.models.checkpoint: what is written comes back; what is damaged, foreign or false is named in one line."""

import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import bigmodel.models.checkpoint as module
from bigmodel.core import find_checkpoint, read_json, write_json
from bigmodel.models.checkpoint import (
    Joined,
    Pretrained,
    Transposed,
    from_stored,
    read_labels,
    read_settings,
    read_tensors,
    read_weights,
    to_stored,
    write_labels,
    write_tensors,
)
from bigmodel.models.gpt import GPT, GPTConfig

TINY = GPTConfig(vocab_size=23, context_length=8, hidden_size=6, num_layers=2, num_heads=2, initializer_range=0.3)


def say(error):
    """The message of an error, which must be one line."""
    text = str(error.value)
    assert text and "\n" not in text, text
    return text


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a small GPT, in a folder whose name is no ASCII."""
    torch.manual_seed(0)
    place = tmp_path / "mein Modell – 模型"
    GPT(TINY).save_pretrained(place)
    return place


def edit(folder, change):
    """Rewrite the weights of a checkpoint after `change` has acted on the dictionary of tensors."""
    tensors = {name: tensor.clone() for name, tensor in read_weights(folder).items()}
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)


# --- files

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
          torch.bool]


@given(data=st.data())
@settings(max_examples=40)
def test_tensors_come_back_bit_for_bit(tmp_path_factory, data):
    words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    names = words.filter(lambda name: name != "__metadata__")
    shapes = st.lists(st.integers(0, 4), max_size=4)
    wanted = data.draw(st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), max_size=5))
    header = data.draw(st.dictionaries(words, words, max_size=3))
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (shape, dtype) in wanted.items()}
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    write_tensors(path, tensors, header)
    found, text = read_tensors(path)
    assert text == header and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert load_file(path).keys() == tensors.keys()


def test_views_transposes_and_gradients_are_stored_as_plain_numbers(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    weight = nn.Parameter(torch.ones(3))
    write_tensors(tmp_path / "x.safetensors", {"t": base.T, "part": base[1:3, ::2], "weight": weight})
    found = read_tensors(tmp_path / "x.safetensors")[0]
    assert torch.equal(found["t"], base.T) and torch.equal(found["part"], base[1:3, ::2])
    assert not found["weight"].requires_grad


def test_bytes_are_what_the_format_says(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.tensor([1.0, -2.0])}, {"format": "pt"})
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    entry = json.loads(raw[8:8 + length])["a"]
    assert entry == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert struct.unpack("<2f", raw[8 + length:]) == (1.0, -2.0)


def test_every_truncation_is_one_clear_error(tmp_path):
    path, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    write_tensors(path, {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, {"k": "v"})
    raw = path.read_bytes()
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="is not a whole safetensors file") as error:
            read_tensors(cut)
        assert str(cut) in say(error) and f"({length} bytes)" in say(error)
    cut.write_bytes(raw)
    assert read_tensors(cut)[0].keys() == {"a", "b"}


@pytest.mark.parametrize("content", [
    b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000), b"\xff" * 64, pickle.dumps({"a": 1}),
    struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}" + b"more"],
    ids=["empty", "text", "png", "zeros", "ones", "pickle", "list", "endless header", "more than it says"])
def test_a_foreign_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole safetensors file") as error:
        read_tensors(tmp_path / "x.safetensors")
    say(error)


def test_entries_that_overlap_or_lie_outside_are_refused(tmp_path):
    for offsets in ([0, 8], [4, 12], [8, 16]):
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                             "b": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_tensors(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nothing.safetensors") as error:
        read_tensors(tmp_path / "nothing.safetensors")
    say(error)


def test_shared_memory_is_refused_by_name_and_leaves_nothing(tmp_path):
    weight = torch.ones(3)
    with pytest.raises(ValueError, match=r"share memory \(a, b\); store one") as error:
        write_tensors(tmp_path / "x.safetensors", {"b": weight, "a": weight, "c": torch.ones(3)})
    say(error)
    assert not list(tmp_path.iterdir())
    rows = torch.ones(2, 3)  # parts of one memory that do not overlap are another thing
    write_tensors(tmp_path / "x.safetensors", {"a": rows[0], "b": rows[1]})


def test_the_meta_device_holds_nothing_to_store(tmp_path):
    with torch.device("meta"):
        model = GPT(TINY)
    with pytest.raises(ValueError, match="token_embedding|wte") as error:
        model.save_pretrained(tmp_path / "x")
    assert "meta device" in say(error) and not list((tmp_path).rglob("*.safetensors"))


@pytest.mark.parametrize("write, name", [
    (lambda path: write_tensors(path, {"a": torch.ones(10)}), "x.safetensors"),
    (lambda path: write_json(path, {"a": 1}), "x.json")])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, write, name):
    path = tmp_path / name
    write(path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        next(tmp_path.glob(".*.tmp")).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")
def test_a_killed_process_leaves_the_old_file_whole(folder):
    before = (folder / "model.safetensors").read_bytes()
    child = os.fork()
    if child == 0:
        module.save_file = lambda *args, **kwargs: os.kill(os.getpid(), 9)
        GPT(TINY).save_pretrained(folder)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    assert (folder / "model.safetensors").read_bytes() == before
    GPT.from_pretrained(folder)


def test_a_file_may_be_replaced_while_its_tensors_are_in_use(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.full((100_000,), 1.0)})
    old = read_tensors(path)[0]["a"]
    write_tensors(path, {"a": torch.full((100_000,), 2.0)})
    old[0] = 7.0  # nor does a change in memory reach the file
    assert old[1:].eq(1).all() and read_tensors(path)[0]["a"].eq(2).all()


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_files_have_the_permissions_of_any_new_file(folder):
    (folder / "other").write_text("")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == \
           {stat.S_IMODE((folder / "other").stat().st_mode)}


@pytest.mark.parametrize("content, said", [
    ("{", "not JSON"), ("[1]", "holds a list"), ("\ufeff\x00", "not JSON"), ("", "not JSON"),
    ("null", "holds a NoneType")])
def test_a_bad_json_file_is_named(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        read_json(tmp_path / "config.json")
    assert "config.json" in say(error)


def test_json_that_is_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="not JSON") as error:
        read_json(tmp_path / "config.json")
    say(error)


# --- folders

def shard(folder, parts=3):
    """Spread the weights of a checkpoint over several files, as transformers does for large models."""
    tensors = {name: tensor.clone() for name, tensor in read_weights(folder).items()}
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{number % parts + 1:05}-of-{parts:05}.safetensors" for number, name in enumerate(tensors)}
    for place in set(places.values()):
        write_tensors(folder / place, {name: tensors[name] for name in tensors if places[name] == place})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": places})
    return tensors, places


def test_spread_over_files(folder):
    tensors, _ = shard(folder)
    found = read_weights(folder)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    GPT.from_pretrained(folder)


def test_a_missing_part_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors") as error:
        GPT.from_pretrained(folder)
    say(error)


@pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/passwd", "deeper/x.safetensors", "..", ""])
def test_an_index_does_not_lead_out_of_its_folder(folder, outside):
    tensors, places = shard(folder)
    write_tensors(folder.parent / "x.safetensors", tensors)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {name: outside for name in places}})
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_weights(folder)
    assert say(error)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_without_a_map_is_refused(folder, content):
    shard(folder)
    write_json(folder / "model.safetensors.index.json", content)
    with pytest.raises(ValueError, match="expected a weight_map") as error:
        read_weights(folder)
    say(error)


def test_an_index_that_contradicts_its_files_is_refused(folder):
    _, places = shard(folder)
    first, *others = places
    for changed in ({**places, "ghost": places[first]}, {name: places[name] for name in others}):
        write_json(folder / "model.safetensors.index.json", {"weight_map": changed})
        with pytest.raises(ValueError, match=f"disagree about where ({first}|ghost) is"):
            read_weights(folder)


def test_a_new_model_goes_before_stale_parts(folder):
    shard(folder)
    torch.manual_seed(5)
    new = GPT(TINY)
    new.save_pretrained(folder)
    assert torch.equal(GPT.from_pretrained(folder).token_embedding.weight, new.token_embedding.weight)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_folder_with_pickles_only_is_refused(folder, name, tmp_path):
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "trap"
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    with pytest.raises(FileNotFoundError, match="pickled weights only, which can run any code") as error:
        GPT.from_pretrained(folder)
    assert say(error) and not trap.exists()


def test_a_pickle_beside_safetensors_is_not_opened(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "trap").encode() + b"'\ntR.")
    GPT.from_pretrained(folder)
    assert not (tmp_path / "trap").exists()


def test_a_folder_without_weights_or_config_says_so(folder):
    shutil.copytree(folder, folder.parent / "second")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="there is no file .*model.safetensors") as error:
        GPT.from_pretrained(folder)
    say(error)
    (folder.parent / "second" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no config.json") as error:
        GPT.from_pretrained(folder.parent / "second")
    say(error)


@pytest.mark.parametrize("source", ["nobody/has-such-a-model", "no-such-model", "/no/such folder/here", "a/b/c/d", ""])
def test_what_cannot_be_found_is_one_line(monkeypatch, tmp_path, source):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    if source:
        with pytest.raises(FileNotFoundError, match="folder") as error:
            find_checkpoint(source)
        assert source in say(error)
    with pytest.raises(FileNotFoundError) as error:
        GPT.from_pretrained(source)
    say(error)


def test_a_file_instead_of_its_folder(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder .*; expected one with config.json") as error:
        GPT.from_pretrained(folder / "model.safetensors")
    say(error)
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError, match="there is no folder model.safetensors"):
        GPT.from_pretrained("model.safetensors")  # which could be the name of something on the hub


def test_the_hub_is_asked_for_no_pickles(monkeypatch, folder):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **how: asked.update(how, name=name) or str(folder))
    assert find_checkpoint("some-one/some.model") == folder and asked["name"] == "some-one/some.model"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


# --- names

NAMES = {"a.weight": "x.a", "layers.*.inner.*.weight": Transposed("h.*.part.*.w"), "layers.*.bias": "h.*.b"}


def test_names_numbers_and_transposes():
    ours = {"a.weight": torch.randn(2, 3), "layers.7.inner.12.weight": torch.randn(4, 5),
            "layers.0.bias": torch.randn(2)}
    stored = to_stored(ours, NAMES)
    assert stored.keys() == {"x.a", "h.7.part.12.w", "h.0.b"} and stored["h.7.part.12.w"].shape == (5, 4)
    back = from_stored(stored, {name: tensor.shape for name, tensor in ours.items()}, NAMES)
    assert all(torch.equal(back[name], ours[name]) and back[name].is_contiguous() for name in ours)


IN_PARTS = {"layers.*.qkv.weight": Joined(("h.*.q.w", "h.*.k.w", "h.*.v.w")), "pair": Joined(("left", "right")),
            "one": Joined(("alone",))}


def joined_tensors():
    torch.manual_seed(0)
    return {"layers.0.qkv.weight": torch.randn(6, 2), "layers.11.qkv.weight": torch.randn(6, 2), "pair": torch.randn(4),
            "one": torch.randn(3)}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_parts_are_cut_and_joined_along_the_first_axis():
    ours = joined_tensors()
    stored = to_stored(ours, IN_PARTS)
    assert stored.keys() == {f"h.{layer}.{part}.w" for layer in (0, 11) for part in "qkv"} | {"left", "right", "alone"}
    assert torch.equal(stored["h.11.k.w"], ours["layers.11.qkv.weight"][2:4])
    assert torch.equal(stored["left"], ours["pair"][:2]) and torch.equal(stored["alone"], ours["one"])
    back = from_stored(stored, shapes_of(ours), IN_PARTS)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_parts_survive_a_file(tmp_path):
    ours = joined_tensors()
    write_tensors(tmp_path / "x.safetensors", to_stored(ours, IN_PARTS))  # parts of one memory do not overlap
    back = from_stored(read_tensors(tmp_path / "x.safetensors")[0], shapes_of(ours), IN_PARTS)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@pytest.mark.parametrize("change, said", [
    (lambda stored: stored.pop("h.11.v.w"), "h.11.v.w is missing"),
    (lambda stored: (stored.pop("h.0.q.w"), stored.pop("h.0.k.w")), "h.0.q.w is missing; h.0.k.w is missing"),
    (lambda stored: stored.update({"h.0.k.w": torch.ones(3, 2)}), r"h.0.k.w has shape \(3, 2\), expected \(2, 2\)"),
    (lambda stored: stored.update({"h.0.k.w": torch.ones(2, 1)}), r"h.0.k.w has shape \(2, 1\), expected \(2, 2\)"),
    (lambda stored: stored.update(left=torch.ones(1), right=torch.ones(3)), r"left has shape \(1,\), .*; right has"),
    (lambda stored: stored.update(left=torch.ones(())), r"left has shape \(\), expected \(2,\)"),
    (lambda stored: stored.update(right=torch.tensor([1, float("nan")])), "right holds NaN"),
    (lambda stored: stored.update({"h.12.q.w": torch.ones(2, 2)}), "h.12.q.w is not part of this model"),
    (lambda stored: stored.update({"h.0.qkv.w": torch.ones(6, 2)}), "h.0.qkv.w is not part of this model"),
], ids="missing two rows columns uneven scalar nan layer whole".split())
def test_a_part_that_does_not_fit_is_named(change, said):
    ours = joined_tensors()
    stored = to_stored(ours, IN_PARTS)
    change(stored)
    with pytest.raises(ValueError, match=said) as error:
        from_stored(stored, shapes_of(ours), IN_PARTS)
    say(error)


def test_control_parts_in_another_order_are_another_tensor():
    ours = joined_tensors()
    swapped = {**IN_PARTS, "layers.*.qkv.weight": Joined(("h.*.k.w", "h.*.q.w", "h.*.v.w"))}
    back = from_stored(to_stored(ours, swapped), shapes_of(ours), IN_PARTS)
    assert not torch.equal(back["layers.0.qkv.weight"], ours["layers.0.qkv.weight"])


def test_a_part_may_have_one_owner_only():
    with pytest.raises(ValueError, match="gives the name left to other"):
        to_stored({"pair": torch.ones(4), "other": torch.ones(2)}, {**IN_PARTS, "other": "left"})


def test_a_table_with_a_gap_or_a_double_is_refused():
    with pytest.raises(ValueError, match=r"no entry for layers\.\*\.new") as error:
        to_stored({"layers.3.new": torch.ones(1)}, NAMES)
    say(error)
    with pytest.raises(ValueError, match="gives the name x.a to b.weight"):
        to_stored({"a.weight": torch.ones(1), "b.weight": torch.ones(1)}, {**NAMES, "b.weight": "x.a"})


WPE, LAST, FIRST = "transformer.wpe.weight", "transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize("change, said", [
    (lambda tensors: tensors.pop(LAST), f"{LAST} is missing"),
    (lambda tensors: tensors.update(extra=torch.ones(1)), "extra is not part of this model"),
    (lambda tensors: tensors.update({"transformer.h.2.ln_1.bias": torch.ones(6)}), "h.2.ln_1.bias is not part"),
    (lambda tensors: tensors.update({WPE: torch.ones(9, 6)}), r"wpe.weight has shape \(9, 6\), expected \(8, 6\)"),
    (lambda tensors: tensors.update({FIRST: torch.ones(24, 6)}), r"shape \(24, 6\), expected \(6, 24\)"),
    (lambda tensors: tensors[LAST].fill_(float("nan")), f"{LAST} holds NaN"),
    (lambda tensors: tensors.update({LAST: torch.ones(6, dtype=torch.int8)}), f"{LAST} is stored as torch.int8"),
    (lambda tensors: tensors.update({"lm_head.weight": torch.ones(23, 6)}), "lm_head.weight and .*wte.weight differ"),
    (lambda tensors: tensors.clear(), r"is missing; .*and \d+ more"),
    (lambda tensors: (tensors.clear(), tensors.update({"bert.x": torch.ones(1)})), "wte.weight is missing"),
], ids="missing extra layer shape transposed nan integer untied empty foreign".split())
def test_what_does_not_fit_is_named(folder, change, said):
    edit(folder, change)
    with pytest.raises(ValueError, match=said) as error:
        GPT.from_pretrained(folder)
    assert len(say(error)) < 500


def test_infinities_of_both_signs_are_no_nan(folder):
    edit(folder, lambda tensors: tensors["transformer.ln_f.bias"].fill_(float("inf"))[0].neg_())
    assert GPT.from_pretrained(folder).norm.bias.isinf().all()


@pytest.mark.parametrize("kept", [["transformer.wte.weight"], ["lm_head.weight"],
                                  ["transformer.wte.weight", "lm_head.weight"]])
def test_a_tied_tensor_may_be_stored_under_either_name_or_both(folder, kept):
    expected = GPT.from_pretrained(folder).token_embedding.weight.detach().clone()

    def rename(tensors):
        weight = tensors.pop("transformer.wte.weight")
        tensors.update({name: weight.clone() for name in kept})

    edit(folder, rename)
    model = GPT.from_pretrained(folder)
    assert torch.equal(model.token_embedding.weight, expected)
    assert model.head.weight is model.token_embedding.weight and model.num_parameters() == GPT(TINY).num_parameters()


def test_half_a_prefix(folder):
    """Some files have the head's name beside names without the prefix."""
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "tie_word_embeddings": False})
    head = torch.randn(23, 6)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = head

    edit(folder, strip)
    assert torch.equal(GPT.from_pretrained(folder).head.weight, head)


# --- settings

def test_settings_are_translated_or_refused():
    names, required = {"size": "n_embd", "heads": "n_head"}, {"model_type": "toy", "flag": False}
    given = {"model_type": "toy", "n_embd": 5, "architectures": ["Toy"], "_name": "x", "new": None, "empty": {},
             "off": False}
    assert read_settings(given, names, required) == {"size": 5}
    for field, value in (("model_type", "other"), ("flag", True), ("unheard_of", 1), ("rope_scaling", {"factor": 2})):
        with pytest.raises(ValueError, match=field) as error:
            read_settings({**given, field: value}, names, required)
        say(error)
    assert read_settings({"unheard_of": 1}, names, required, ignored=["unheard_of"]) == {}


@given(st.lists(st.text(max_size=9), min_size=1, max_size=30, unique=True))
def test_labels_come_back(labels):
    settings = json.loads(json.dumps(write_labels(len(labels), tuple(labels))))  # as config.json keeps them
    assert settings["label2id"] == {label: number for number, label in enumerate(labels)}
    unnamed = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
    assert read_labels(settings) == {"num_classes": len(labels), "labels": None if unnamed else tuple(labels)}


@pytest.mark.parametrize("found, expected", [
    ({}, (2, None)), ({"num_labels": 7}, (7, None)), ({"id2label": None, "num_labels": 3}, (3, None)),
    ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, (3, None)),
    ({"id2label": {"0": "x"}}, (1, ("x",))),
    ({"id2label": {0: "a", 1: "b"}}, (2, ("a", "b"))),
    ({"id2label": {"0": "LABEL_0", "1": "b"}}, (2, ("LABEL_0", "b"))),
    ({"id2label": {str(n): f"c{n}" for n in reversed(range(12))}}, (12, tuple(f"c{n}" for n in range(12)))),
], ids="default number null unnamed one integers half order".split())
def test_labels_are_read_as_transformers_means_them(found, expected):
    assert tuple(read_labels(found).values()) == expected
    if "id2label" in found:
        config = pytest.importorskip("transformers").PreTrainedConfig(**found)
        assert config.num_labels == expected[0]


def test_no_labels_are_numbered():
    assert write_labels(2, None) == {"id2label": {"0": "LABEL_0", "1": "LABEL_1"},
                                     "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    assert read_labels(write_labels(2, None)) == {"num_classes": 2, "labels": None}


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2), (-1, 0), (0, 1, 5)])
def test_classes_with_gaps_are_refused(numbers):
    with pytest.raises(ValueError, match=f"expected 0 to {len(numbers) - 1}") as error:
        read_labels({"id2label": {str(number): f"c{number}" for number in numbers}})
    say(error)


@pytest.mark.parametrize("labels", [("a", "a", "b"), ("a", "b"), ("a", "b", "c", "d"), ()])
def test_twins_and_wrong_numbers_of_labels_are_refused(labels):
    with pytest.raises(ValueError, match="different labels for 3 classes; expected one each") as error:
        write_labels(3, labels)
    say(error)


# --- the mixin, with a model that is not a GPT

@dataclass(frozen=True)
class ToyConfig:
    inputs: int = 3
    tied: bool = False

    @classmethod
    def from_huggingface(cls, found):
        return cls(**read_settings(found, {"inputs": "inputs", "tied": "tied"}, {}))

    def to_huggingface(self):
        return asdict(self)


class Toy(Pretrained, nn.Module):
    config_class, tensor_names = ToyConfig, {
        "first.weight": Transposed("w1"), "first.bias": "b1", "second.weight": "w2", "second.bias": "b2",
        "steps": "steps", "norm.weight": "n.g", "norm.bias": "n.b", "norm.running_mean": "n.m",
        "norm.running_var": "n.v", "norm.num_batches_tracked": "n.count"}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first, self.second = nn.Linear(config.inputs, config.inputs), nn.Linear(config.inputs, config.inputs)
        self.norm = nn.BatchNorm1d(config.inputs)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.tie_weights()

    def tie_weights(self):
        if self.config.tied:
            self.second.weight = self.first.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_module_can_be_pretrained(tmp_path, dtype):
    model = Toy(ToyConfig())
    model.steps += 2**40 + 1
    model.norm(torch.randn(8, 3))
    model.save_pretrained(tmp_path)
    again = Toy.from_pretrained(tmp_path, dtype=dtype)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        expected = ours.to(dtype) if ours.is_floating_point() else ours
        assert torch.equal(theirs, expected) and theirs.dtype == expected.dtype, name
    assert not again.training and all(parameter.requires_grad for parameter in again.parameters())


def test_a_file_without_a_config_under_any_names(tmp_path):
    model = Toy(ToyConfig())
    model.norm(torch.randn(8, 3))
    model.save_pretrained(tmp_path)
    again = Toy.from_file(tmp_path / "model.safetensors", ToyConfig())
    names = {name: f"net.{name}" for name in model.state_dict()}
    write_tensors(tmp_path / "other.safetensors", to_stored(model.state_dict(), names))
    other = Toy.from_file(tmp_path / "other.safetensors", ToyConfig(), names, dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(other.state_dict()[name].to(tensor.dtype), tensor), name
    assert not again.training and other.first.weight.dtype == torch.float64
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    model = Toy(ToyConfig())
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"w1 has shape \(3, 3\), expected \(4, 4\)") as error:
        Toy.from_file(path, ToyConfig(inputs=4))
    say(error)
    with pytest.raises(ValueError, match="net.first.weight is missing.*") as error:
        Toy.from_file(path, ToyConfig(), {name: f"net.{name}" for name in model.state_dict()})
    say(error)
    with pytest.raises(ValueError, match="no entry for second.bias"):
        Toy.from_file(path, ToyConfig(), {name: "x" for name in Toy.tensor_names if name != "second.bias"})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Toy.from_file(path, ToyConfig())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Toy.from_file(tmp_path / "nothing.safetensors", ToyConfig())


class JoinedToy(Toy):
    tensor_names = Toy.tensor_names | {"first.weight": Joined(("wa", "wb", "wc")),
                                       "first.bias": Joined(("ba", "bb", "bc"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_parts_goes_to_a_folder_and_back(tmp_path, dtype):
    model = JoinedToy(ToyConfig()).to(dtype)
    model.save_pretrained(tmp_path)
    stored = read_weights(tmp_path)
    assert stored["wb"].shape == (1, 3) and stored["bc"].shape == (1,) and "w1" not in stored
    again = JoinedToy.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(again.first.weight, model.first.weight) and torch.equal(again.first.bias, model.first.bias)
    with pytest.raises(ValueError, match="w1 is missing"):
        Toy.from_pretrained(tmp_path)


def test_tied_in_two_orientations_is_stored_once(tmp_path):
    model = Toy(ToyConfig(tied=True))
    assert len(model.unique_tensors()) == len(model.state_dict()) - 1
    model.save_pretrained(tmp_path)
    assert "w2" not in read_weights(tmp_path)
    again = Toy.from_pretrained(tmp_path)
    assert again.second.weight is again.first.weight and torch.equal(again.first.weight, model.first.weight)


def test_what_is_neither_stored_nor_computed_is_named(tmp_path):
    class Forgetful(Toy):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    class Mindful(Forgetful):
        def tie_weights(self):
            if hasattr(self, "table"):
                self.table = torch.arange(3.0)

    Forgetful(ToyConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="table is in no file; expected tie_weights"):
        Forgetful.from_pretrained(tmp_path)
    assert torch.equal(Mindful.from_pretrained(tmp_path).table, torch.arange(3.0))


def test_loading_does_not_disturb_the_random_numbers(folder):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    GPT.from_pretrained(folder)
    assert torch.equal(torch.rand(4), expected)


def test_loading_does_not_import_half_of_pytorch(folder):
    """Random numbers on the meta device would bring in 800 modules, which takes a second."""
    program = ("import sys; from bigmodel.models.gpt import GPT; before = len(sys.modules)\n"
               f"GPT.from_pretrained({str(folder)!r}); print(len(sys.modules) - before)")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_file_is_told_to_transformers(folder, dtype):
    transformers = pytest.importorskip("transformers")
    GPT.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    assert read_json(folder / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
    assert read_weights(folder)["transformer.wte.weight"].dtype == dtype
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert theirs.transformer.wte.weight.dtype == dtype
    assert GPT.from_pretrained(folder).token_embedding.weight.dtype == torch.float32


def test_saved_by_transformers_in_parts(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    tokens = torch.arange(16).view(2, 8)
    again = GPT.from_pretrained(tmp_path / "parts")
    assert (again(tokens) - theirs(tokens).logits).abs().max() <= 1e-5


def test_control_a_swapped_name_is_seen_by_numbers_only(folder):
    first, second = "transformer.h.0.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"
    right, tokens = GPT.from_pretrained(folder), torch.arange(8)[None]

    def swap(tensors):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    expected = right(tokens)
    edit(folder, swap)
    assert (GPT.from_pretrained(folder)(tokens) - expected).abs().max() > 1e-3
