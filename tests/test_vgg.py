"""bigmodel.models.vgg: the numbers of torchvision's layout, its names and sizes; what does not fit is refused."""

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel.models.checkpoint import Transposed, read_tensors, write_tensors
from bigmodel.models.vgg import VGG, VGG_STAGES, VGGConfig

SMALL = VGGConfig(stages=((6, 1), (9, 2)), hidden_size=9, pooled_size=3, num_classes=5)


def reference(config):
    """The layers as torchvision numbers them, in plain PyTorch, with weights that are all of a size."""
    torch.manual_seed(0)
    layers, channels = [], config.num_channels
    for width, convolutions in config.stages:
        for _ in range(convolutions):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if config.batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            channels = width
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("avgpool", nn.AdaptiveAvgPool2d((config.pooled_size, config.pooled_size)))
    model.add_module("flatten", nn.Flatten(1))
    model.add_module("classifier", nn.Sequential(
        nn.Linear(channels * config.pooled_size * config.pooled_size, config.hidden_size), nn.ReLU(), nn.Dropout(),
        nn.Linear(config.hidden_size, config.hidden_size), nn.ReLU(), nn.Dropout(),
        nn.Linear(config.hidden_size, config.num_classes)))
    return model


def trained(config):
    """A reference with statistics in its norms and weights that carry the signal through."""
    model = reference(config)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
            nn.init.normal_(layer.bias, std=0.3)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    for step in range(4):
        model.train()(draw_pixels(config, batch=8, seed=step) + 0.5)
    return model.eval()


def draw_pixels(config, batch=3, seed=0, height=None, width=None):
    side = 4 * 2 ** len(config.stages)
    return torch.randn(batch, config.num_channels, height or side, width or side,
                       generator=torch.Generator().manual_seed(seed))


def draw_config(seed):
    """A config drawn by lot."""
    dice = random.Random(seed)
    stages = tuple((dice.randint(1, 24), dice.randint(1, 3)) for _ in range(dice.randint(1, 4)))
    return VGGConfig(stages=stages, batch_norm=dice.random() < 0.5, hidden_size=dice.randint(1, 50),
                     pooled_size=dice.randint(1, 7), num_classes=dice.randint(1, 12),
                     num_channels=dice.choice([1, 3, 4]), dropout=dice.choice([0.0, 0.5]))


def pair(config, folder, model_class=VGG):
    """The reference, and our model with the weights that it has saved."""
    theirs = trained(config)
    write_tensors(folder / "theirs.safetensors", theirs.state_dict())
    return model_class.from_file(folder / "theirs.safetensors", config), theirs


@torch.no_grad()
def distance(ours, theirs, pixels):
    return (ours(pixels) - theirs(pixels)).abs().max().item()


# --- parity

@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_torchvisions_layout(tmp_path, seed):
    config = draw_config(seed)
    ours, theirs = pair(config, tmp_path)
    side = 2 ** len(config.stages)
    for height, width in ((side, side), (3 * side, 2 * side + 1), (64, 48), (7 * side, 7 * side)):
        pixels = draw_pixels(config, height=height, width=width)
        assert ours(pixels).shape == (3, config.num_classes)
        assert distance(ours, theirs, pixels) <= 1e-5, (config, height, width)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_are_those_of_torchvisions_layout(tmp_path, batch_norm):
    ours, theirs = pair(replace(SMALL, batch_norm=batch_norm, dropout=0.0), tmp_path)
    for layer in theirs.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    pixels, targets = draw_pixels(SMALL, batch=6), torch.arange(6) % 5
    for model in (ours.train(), theirs.train()):
        F.cross_entropy(model(pixels), targets).backward()
    for (name, our), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, our), their in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(our, their, msg=name)


@pytest.mark.parametrize("name, batch_norm, count", [
    ("vgg11", False, 132_863_336), ("vgg11", True, 132_868_840), ("vgg13", False, 133_047_848),
    ("vgg13", True, 133_053_736), ("vgg16", False, 138_357_544), ("vgg16", True, 138_365_992),
    ("vgg19", False, 143_667_240), ("vgg19", True, 143_678_248)])
def test_published_sizes_names_and_shapes(name, batch_norm, count):
    config = getattr(VGGConfig, name)(batch_norm=batch_norm)
    with torch.device("meta"):
        ours, theirs = VGG(config), reference(config)
    assert ours.num_parameters() == count
    names = {ours.tensor_names.get(key) or key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    assert names == {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    layers = [layer for layer in ours.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name[3:])
    assert ours(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_the_names_of_vgg16():
    """As torchvision's file has them."""
    with torch.device("meta"):
        theirs = reference(VGGConfig.vgg16()).state_dict()
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    expected = [f"features.{n}" for n in numbers] + [f"classifier.{n}" for n in (0, 3, 6)]
    assert list(theirs) == [f"{name}.{part}" for name in expected for part in ("weight", "bias")]
    assert theirs["classifier.0.weight"].shape == (4096, 25088)


# --- negative controls: each of these mistakes must be seen

def broken_pair(folder, batch_norm=True, **members):
    return pair(replace(SMALL, batch_norm=batch_norm), folder, type("Broken", (VGG,), members))


def test_control_bgr_for_rgb_is_seen(tmp_path):
    ours, theirs = pair(SMALL, tmp_path)
    assert distance(lambda pixels: ours(pixels.flip(1)), theirs, draw_pixels(SMALL)) > 1e-2


def test_control_an_untransposed_matrix_is_seen(tmp_path):
    names = VGG.tensor_names | {"hidden.3.weight": Transposed("classifier.3.weight")}  # square: the shape tells nothing
    ours, theirs = broken_pair(tmp_path, tensor_names=names)
    assert distance(ours, theirs, draw_pixels(SMALL)) > 1e-2


def test_control_another_order_of_flattening_is_seen(tmp_path):
    def encode(self, pixels):
        return self.hidden(self.pool(self.features(pixels)).movedim(1, 3).flatten(1))
    ours, theirs = broken_pair(tmp_path, encode=encode)
    assert distance(ours, theirs, draw_pixels(SMALL)) > 1e-2


def test_control_statistics_that_are_not_loaded_are_seen(tmp_path):
    ours, theirs = pair(replace(SMALL, batch_norm=True), tmp_path)
    for norm in (layer for layer in ours.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.reset_running_stats()
    assert distance(ours, theirs, draw_pixels(SMALL)) > 1e-2


@pytest.mark.parametrize("layer", [nn.AvgPool2d(2), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(3, 2, padding=1)],
                         ids=["average", "padded", "overlapping"])
def test_control_another_pooling_is_seen(tmp_path, layer):
    ours, theirs = pair(SMALL, tmp_path)
    ours.features[2] = layer
    assert distance(ours, theirs, draw_pixels(SMALL, height=20, width=20)) > 1e-2


def test_control_a_stride_in_place_of_the_pooling_is_seen(tmp_path):
    ours, theirs = pair(SMALL, tmp_path)
    ours.features[0].stride, ours.features[2] = (2, 2), nn.Identity()
    assert distance(ours, theirs, draw_pixels(SMALL)) > 1e-2


def test_control_padding_of_another_kind_is_seen(tmp_path):
    ours, theirs = pair(SMALL, tmp_path)
    ours.features[0] = copy.deepcopy(ours.features[0])
    ours.features[0].padding_mode = "reflect"
    ours.features[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert distance(ours, theirs, draw_pixels(SMALL)) > 1e-2


# --- saving and loading

LABELS = ("cat", "dog", "owl", "newt", "pig")


@pytest.mark.parametrize("config", [
    SMALL, replace(SMALL, batch_norm=True, labels=LABELS), replace(SMALL, num_channels=1, num_classes=1),
    replace(SMALL, dropout=0.0, pooled_size=1, hidden_size=1)], ids=["plain", "norm", "grey", "narrow"])
def test_save_and_load(tmp_path, config):
    torch.manual_seed(0)
    ours, pixels = VGG(config), draw_pixels(config)
    ours(pixels)  # gives the norms statistics
    ours.eval().save_pretrained(tmp_path)
    again = VGG.from_pretrained(tmp_path)
    assert again.config == config and not again.training
    assert torch.equal(again(pixels), ours(pixels))
    assert set(read_tensors(tmp_path / "model.safetensors")[0]) == set(reference(config).state_dict())


def test_the_config_json(tmp_path):
    VGG(replace(SMALL, labels=LABELS)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] == "vgg" and settings["stages"] == [[6, 1], [9, 2]]
    assert settings["id2label"] == {str(number): name for number, name in enumerate(LABELS)}
    assert settings["label2id"]["newt"] == 3


def test_torchvisions_names_in_a_folder(tmp_path):
    """Our config.json beside weights that torchvision's layout has saved."""
    config = replace(SMALL, batch_norm=True)
    ours, theirs = pair(config, tmp_path)
    (tmp_path / "theirs.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_huggingface()))
    assert distance(VGG.from_pretrained(tmp_path), theirs, draw_pixels(config)) <= 1e-5


@pytest.mark.parametrize("config", [VGGConfig(), VGGConfig.vgg11(num_classes=5, labels=LABELS), SMALL,
                                    VGGConfig.vgg19(batch_norm=True, dropout=0.1, pooled_size=2, num_channels=4)])
def test_a_config_survives_the_translation(config):
    assert VGGConfig.from_huggingface(json.loads(json.dumps(config.to_huggingface()))) == config


@pytest.mark.parametrize("field, value", [("model_type", "resnet"), ("hidden_act", "gelu"), ("stages", [[64]]),
                                          ("stages", [64, "M"]), ("stages", 11), ("stages", "vgg11"),
                                          ("hidden_size", 0), ("id2label", {"0": "cat", "2": "dog"})])
def test_a_config_that_cannot_be_represented_is_refused(field, value):
    named = {"id2label": "names the classes"}.get(field, field)
    with pytest.raises(ValueError, match=named) as error:
        VGGConfig.from_huggingface({**SMALL.to_huggingface(), field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config, message", [
    (replace(SMALL, batch_norm=False), "features.3.weight is missing"),
    (replace(SMALL, batch_norm=True, num_classes=7), r"classifier.6.weight has shape \(5, 9\), expected \(7, 9\)"),
    (replace(SMALL, batch_norm=True, num_channels=1), r"features.0.weight has shape \(6, 3, 3, 3\), expected \(6, 1"),
    (replace(SMALL, batch_norm=True, stages=((6, 1),)), "features.[0-9.a-z_]+ is not part of this model"),
    (replace(SMALL, batch_norm=True, pooled_size=7), "classifier.0.weight has shape"),
], ids=["norms", "classes", "channels", "stages", "pooled"])
def test_weights_of_another_vgg_are_refused(tmp_path, config, message):
    pair(replace(SMALL, batch_norm=True), tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        VGG.from_file(tmp_path / "theirs.safetensors", config)
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match="features.0.weight is missing.*and [0-9]+ more") as error:
        VGG.from_file(tmp_path / "other.safetensors", SMALL)
    assert "\n" not in str(error.value)


# --- invariances

@pytest.fixture(scope="module", params=[False, True], ids=["plain", "norm"])
def model(request, tmp_path_factory):
    return pair(replace(SMALL, batch_norm=request.param), tmp_path_factory.mktemp("vgg"))[0]


@given(batch=st.integers(0, 5), height=st.integers(4, 40), width=st.integers(4, 40), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_batch_is_its_pictures_alone(model, batch, height, width, seed):
    pixels = draw_pixels(SMALL, batch, seed, height, width)
    with torch.no_grad():
        together = model(pixels)
        assert together.shape == (batch, 5)
        for row, picture in zip(together, pixels):
            assert (row - model(picture[None])[0]).abs().max() <= 1e-5


def test_the_head_takes_what_encode_gives(model):
    pixels = draw_pixels(SMALL)
    with torch.no_grad():
        features = model.encode(pixels)
        assert features.shape == (3, 9) and isinstance(model.head, nn.Linear)
        assert torch.equal(model.head(features), model(pixels))


def test_dropout_acts_in_training_only():
    model, pixels = VGG(replace(SMALL, hidden_size=64)), draw_pixels(SMALL)
    assert not torch.equal(model(pixels), model(pixels))
    model.eval()
    assert torch.equal(model(pixels), model(pixels))


def test_micro_batches_add_up():
    torch.manual_seed(0)
    model, pixels, targets = VGG(replace(SMALL, dropout=0.0)), draw_pixels(SMALL, batch=8), torch.arange(8) % 5
    gradients = []
    for size in (8, 2):
        model.zero_grad()
        for part, wanted in zip(pixels.split(size), targets.split(size)):
            F.cross_entropy(model(part), wanted, reduction="sum").backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, parts in zip(*gradients):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


# --- initial weights, and learning

def test_initial_weights():
    torch.manual_seed(0)
    model = VGG(VGGConfig(stages=((64, 2), (128, 1)), hidden_size=256, num_classes=10))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            expected = 0.01 if name == "head" else (2 / layer.weight[0].numel()) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.06), name
            assert not layer.bias.any(), name
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).item()
    assert loss == pytest.approx(torch.tensor(10.0).log().item(), abs=0.2)


@torch.no_grad()
def spread(model, pixels):
    """How much the last feature maps differ from picture to picture."""
    return model.features(pixels).std(dim=0).square().mean().sqrt().item()


def test_the_signal_survives_sixteen_layers_and_with_other_weights_it_does_not():
    torch.manual_seed(0)
    deep = VGGConfig(stages=((16, 8), (16, 8)), hidden_size=8, pooled_size=1, num_classes=10)
    model, pixels = VGG(deep), torch.randn(16, 3, 16, 16)
    assert spread(model, pixels) > 1e-2
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()  # PyTorch's own
    assert spread(model, pixels) < 1e-4


@pytest.mark.parametrize("batch_norm", [False, True])
def test_it_learns(batch_norm):
    torch.manual_seed(0)
    model = VGG(replace(SMALL, hidden_size=32, batch_norm=batch_norm, dropout=0.0))
    pixels, targets = draw_pixels(SMALL, batch=20), torch.arange(20) % 5
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), targets).backward()
        optimizer.step()
    assert (model(pixels).argmax(-1) == targets).all()


# --- bad input

@pytest.mark.parametrize("shape, message", [
    ((2, 1, 16, 16), "the pictures have 1 channels; expected num_channels 3"),
    ((2, 4, 16, 16), "the pictures have 4 channels; expected num_channels 3"),
    ((2, 3, 16, 3), r"16×3 are too small to be halved 2 times; expected 4×4 or more"),
    ((1, 3, 1, 1), r"1×1 are too small"),
])
@pytest.mark.parametrize("method", ["forward", "encode"])
def test_pictures_that_do_not_fit_are_refused(model, shape, message, method):
    with pytest.raises(ValueError, match=message) as error:
        getattr(model, method)(torch.zeros(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("stages", ()), ("stages", ((64, 0),)), ("stages", ((0, 1),)), ("stages", ((64, 1), (-1, 2))), ("hidden_size", 0),
    ("pooled_size", -1), ("num_classes", 0), ("num_channels", 0), ("dropout", 1.0), ("dropout", -0.1),
    ("dropout", float("nan"))])
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}.*expected") as error:
        VGGConfig(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [("cat",), ("cat", "cat"), ("cat", "dog", "owl")])
def test_labels_that_do_not_fit_the_classes_are_refused(labels):
    with pytest.raises(ValueError, match="different labels for 2 classes"):
        VGGConfig(num_classes=2, labels=labels)


def test_presets():
    assert VGGConfig() == VGGConfig.vgg16() and VGGConfig.vgg13().stages == VGG_STAGES[13]
    assert VGGConfig.vgg11(batch_norm=True).batch_norm and VGGConfig.vgg19(num_classes=3).num_classes == 3
