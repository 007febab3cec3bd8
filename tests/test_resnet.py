"""bigmodel.models.resnet: the same numbers as transformers' ResNet and torchvision's, in evaluation and training."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.mkldnn import to_mkldnn

import bigmodel.models.resnet as resnet_module
from bigmodel.models.checkpoint import read_json, read_tensors, to_stored, write_json, write_tensors
from bigmodel.models.convolution import fold_norms
from bigmodel.models.resnet import ResidualBlock, ResNet, ResNetConfig, basic_path, bottleneck_path, torchvision_names

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 2], "layer_type": "basic",
         "num_labels": 5}
BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [16, 24, 20], "depths": [2, 1, 2]}
ODD = {
    "basic": {},
    "bottleneck": BOTTLENECK,
    "stride in the 1x1": {**BOTTLENECK, "downsample_in_bottleneck": True},
    "first stage": {"downsample_in_first_stage": True},
    "first stage, 1x1": {**BOTTLENECK, "downsample_in_first_stage": True, "downsample_in_bottleneck": True},
    "grey": {"num_channels": 1},
    "five channels": {"num_channels": 5, "embedding_size": 3},
    "one stage": {"hidden_sizes": [7], "depths": [1], "num_labels": 1},
    "no projection": {"embedding_size": 8, "hidden_sizes": [8], "depths": [3]},
    "same width": {"hidden_sizes": [8, 8, 8], "depths": [1, 1, 1]},  # a stride alone needs a projection
    "five stages": {"hidden_sizes": [4, 5, 6, 7, 8], "depths": [1, 2, 1, 2, 1]},
    "gelu": {"hidden_act": "gelu"},
    "silu": {**BOTTLENECK, "hidden_act": "silu"},
    "tanh": {"hidden_act": "tanh"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "odd quarters": {**BOTTLENECK, "hidden_sizes": [5, 11, 7]},
}
SIZES = [(32, 32), (37, 50), (64, 33), (7, 9), (1, 1)]


def draw_config(seed):
    """A config drawn by lot."""
    dice = random.Random(seed)
    stages = dice.randint(1, 4)
    return {
        "num_channels": dice.choice([1, 2, 3, 4]), "embedding_size": dice.randint(1, 20),
        "hidden_sizes": [dice.randint(4, 30) for _ in range(stages)],
        "depths": [dice.randint(1, 3) for _ in range(stages)],
        "layer_type": dice.choice(["basic", "bottleneck"]), "hidden_act": dice.choice(["relu", "relu", "gelu", "silu"]),
        "downsample_in_first_stage": dice.random() < 0.5, "downsample_in_bottleneck": dice.random() < 0.5,
        "num_labels": dice.randint(1, 12),
    }


def draw_pixels(channels, size=(37, 50), batch=3, seed=0):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def disturb(model, seed=0):
    """Give a model weights that carry the signal through, and norms that have seen something."""
    dice = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = (2 / layer.weight[0].numel()) ** 0.5
            layer.weight.copy_(std * torch.randn(layer.weight.shape, generator=dice))
        if isinstance(layer, nn.BatchNorm2d):
            count = layer.num_features
            layer.weight.copy_(0.5 + torch.rand(count, generator=dice))
            layer.bias.copy_(0.3 * torch.randn(count, generator=dice))
            layer.running_mean.copy_(0.3 * torch.randn(count, generator=dice))
            layer.running_var.copy_(0.5 + torch.rand(count, generator=dice))
            layer.num_batches_tracked.fill_(seed + 7)
    return model.eval()


def reference(folder, seed=0, **fields):
    """A model of transformers', saved to `folder`."""
    model = disturb(transformers.ResNetForImageClassification(transformers.ResNetConfig(**{**SMALL, **fields})), seed)
    model.save_pretrained(folder)
    return model


def distance(ours, theirs, pixels):
    """The largest difference of scores."""
    with torch.no_grad():
        expected = theirs(pixels)
        return (ours(pixels) - getattr(expected, "logits", expected)).abs().max().item()


def buffers(ours, theirs):
    """Pairs of the same statistic in both models."""
    stored = to_stored(ours.state_dict(), ResNet.tensor_names)
    return [(name, stored[name], tensor) for name, tensor in theirs.named_buffers()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model and transformers', with the same weights; nobody changes them."""
    folder = tmp_path_factory.mktemp("resnet")
    theirs = reference(folder, **ODD["bottleneck"])
    return ResNet.from_pretrained(folder), theirs


# --- parity with transformers

@pytest.mark.parametrize("fields", [*ODD.values(), *map(draw_config, range(24))], ids=[*ODD, *map(str, range(24))])
def test_logits_are_those_of_transformers(tmp_path, fields):
    theirs = reference(tmp_path, **fields)
    ours = ResNet.from_pretrained(tmp_path)
    assert not ours.training
    for size in SIZES:
        pixels = draw_pixels(ours.config.num_channels, size)
        assert distance(ours, theirs, pixels) <= 1e-5
    assert theirs(pixels).logits.abs().max() > 0.01, "scores too small to tell right from wrong"


@pytest.mark.parametrize("fields", [*ODD.values(), *map(draw_config, range(8))], ids=[*ODD, *map(str, range(8))])
def test_training_is_that_of_transformers(tmp_path, fields):
    theirs = reference(tmp_path, **fields).train()
    ours = ResNet.from_pretrained(tmp_path).train()
    for seed in range(3):
        assert distance(ours, theirs, draw_pixels(ours.config.num_channels, batch=6, seed=seed)) <= 1e-5
    for name, found, expected in buffers(ours, theirs):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=name)
        assert name.split(".")[-1] != "num_batches_tracked" or found == 10
    pixels = draw_pixels(ours.config.num_channels, batch=2)
    assert distance(ours.eval(), theirs.eval(), pixels) <= 1e-5  # with the statistics collected meanwhile


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "stride in the 1x1", "first stage, 1x1", "grey", "gelu"])
def test_gradients_are_those_of_transformers(tmp_path, name, training):
    theirs = reference(tmp_path, **ODD[name]).train(training)
    ours = ResNet.from_pretrained(tmp_path).train(training)
    pixels = draw_pixels(ours.config.num_channels, batch=4)
    inputs = [pixels.clone().requires_grad_() for _ in range(2)]
    for scores in (ours(inputs[0]), theirs(inputs[1]).logits):
        (scores.sin().mean() * 10).backward()
    found = to_stored({label: weight.grad for label, weight in ours.named_parameters()}, ResNet.tensor_names)
    for label, weight in theirs.named_parameters():
        torch.testing.assert_close(found[label], weight.grad, rtol=0, atol=1e-4, msg=label)
        assert weight.grad.abs().max() > 1e-6, label
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fields", [*ODD.values(), *map(draw_config, range(8))], ids=[*ODD, *map(str, range(8))])
def test_what_we_save_transformers_loads(tmp_path, fields):
    reference(tmp_path / "theirs", **fields)
    ours = ResNet.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours",
                                                                                  output_loading_info=True)
    assert not any(report.values()), report
    assert distance(ours, theirs.eval(), draw_pixels(ours.config.num_channels)) <= 1e-5
    again = ResNet.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))


def test_names_of_classes_go_along(tmp_path):
    labels = ("cat", "dog", "两", "a b", "LABEL_0")
    ours = ResNet(ResNetConfig(stage_channels=(8,), depths=(1,), stem_channels=4, num_classes=5, labels=labels))
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert tuple(theirs.config.id2label.values()) == labels and theirs.config.label2id["两"] == 2
    theirs.save_pretrained(tmp_path / "again")
    assert ResNet.from_pretrained(tmp_path / "again").config == ours.config


def test_a_config_as_on_the_hub(tmp_path):
    theirs = reference(tmp_path, **ODD["bottleneck"])
    hub = {**read_json(tmp_path / "config.json"), "out_features": None, "torch_dtype": "float32",
           "transformers_version": "4.18.0.dev0", "stage_names": ["stem", "stage1", "stage2", "stage3"]}
    write_json(tmp_path / "config.json", hub)
    ours = ResNet.from_pretrained(tmp_path)
    assert distance(ours, theirs, draw_pixels(3)) <= 1e-5
    backbone = {**hub, "out_features": ["stage1", "stage3"], "out_indices": [1, 3]}
    assert ResNetConfig.from_huggingface(backbone) == ours.config


# --- torchvision's layout, written down here from its names: blocks with conv1, bn1, …, downsample

class VisionBlock(nn.Module):
    expansion = 1

    def __init__(self, channels, width, stride, kernels=(3, 3)):
        super().__init__()
        out, self.count = width * self.expansion, len(kernels)
        widths = [channels, *[width] * (len(kernels) - 1), out]
        for number, kernel in enumerate(kernels, start=1):
            step = stride if number == self.strided else 1
            conv = nn.Conv2d(widths[number - 1], widths[number], kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{number}", conv)
            setattr(self, f"bn{number}", nn.BatchNorm2d(widths[number]))
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    strided = 1

    def forward(self, x):
        out = x
        for number in range(1, self.count + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            out = out.relu() if number < self.count else out
        return (out + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class VisionBottleneck(VisionBlock):
    expansion, strided = 4, 2  # torchvision's stride is in the 3×3

    def __init__(self, channels, width, stride):
        super().__init__(channels, width, stride, (1, 3, 1))


class Vision(nn.Module):
    """torchvision's network for one of our configs."""

    def __init__(self, config):
        super().__init__()
        kind = VisionBlock if config.block == "basic" else VisionBottleneck
        self.conv1 = nn.Conv2d(config.num_channels, config.stem_channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem_channels)
        channels, self.stages = config.stem_channels, len(config.depths)
        for stage, (width, depth) in enumerate(zip(config.stage_channels, config.depths), start=1):
            blocks = []
            for block in range(depth):
                blocks.append(kind(channels, width // kind.expansion, 2 if stage > 1 and block == 0 else 1))
                channels = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, config.num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean(dim=(2, 3)))


VISION = {
    "basic": ResNetConfig.resnet18(stage_channels=(8, 12, 16, 20), stem_channels=8, num_classes=6),
    "34": ResNetConfig.resnet34(stage_channels=(4, 4, 8, 8), stem_channels=4, num_classes=3, num_channels=1),
    "bottleneck": ResNetConfig.resnet50(stage_channels=(16, 24, 32, 40), stem_channels=8, depths=(1, 2, 3, 1),
                                        num_classes=6),
}


@pytest.mark.parametrize("name", VISION)
def test_torchvision_files_load(tmp_path, name):
    config = VISION[name]
    theirs = disturb(Vision(config))
    write_tensors(tmp_path / "vision.safetensors", theirs.state_dict())
    ours = ResNet.from_file(tmp_path / "vision.safetensors", config, torchvision_names(config))
    assert distance(ours, theirs, draw_pixels(config.num_channels, (64, 47))) <= 1e-5
    ours.save_pretrained(tmp_path)  # and on to transformers
    hub = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = draw_pixels(config.num_channels, (64, 47))
    assert (hub(pixels).logits - theirs(pixels)).abs().max() <= 1e-5


@pytest.mark.parametrize("layers, tensors", [(18, 122), (34, 218), (50, 320), (101, 626), (152, 932)])
def test_torchvision_names_are_all_there(layers, tensors):
    config = getattr(ResNetConfig, f"resnet{layers}")()
    with torch.device("meta"):
        ours, theirs = ResNet(config), Vision(config)
    stored = to_stored(ours.state_dict(), torchvision_names(config))
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert len(stored) == tensors
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.1.bn2.num_batches_tracked",
            "layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias", "fc.weight", "fc.bias"} <= stored.keys()


# --- negative controls: each of these mistakes must be seen

@pytest.mark.parametrize("right", [False, True])
def test_control_a_stride_in_the_wrong_place_is_seen(tmp_path, monkeypatch, right):
    theirs = reference(tmp_path, **ODD["bottleneck"], downsample_in_bottleneck=right)
    honest = ResNetConfig.from_huggingface
    monkeypatch.setattr(ResNetConfig, "from_huggingface",
                        lambda settings: honest({**settings, "downsample_in_bottleneck": not right}))
    broken = ResNet.from_pretrained(tmp_path)  # everything fits
    assert distance(broken, theirs, draw_pixels(3)) > 1e-3


def test_control_a_stride_in_the_second_convolution_is_seen(tmp_path, monkeypatch):
    theirs = reference(tmp_path)
    def late(in_channels, out_channels, stride=1):
        return nn.Sequential(resnet_module._layer(in_channels, out_channels, 3),
                             resnet_module._layer(out_channels, out_channels, 3, stride, relu=False))
    monkeypatch.setattr(resnet_module, "basic_path", late)
    assert distance(ResNet.from_pretrained(tmp_path), theirs, draw_pixels(3)) > 1e-3


def test_control_blue_for_red_is_seen(pair):
    ours, theirs = pair
    pixels = draw_pixels(3)
    with torch.no_grad():
        assert (ours(pixels.flip(1)) - theirs(pixels).logits).abs().max() > 1e-3


def test_control_a_shortcut_without_its_norm_is_seen(pair):
    ours, theirs = pair
    broken = ResNet(ours.config).eval()
    broken.load_state_dict(ours.state_dict())
    for block in (block for stage in broken.stages for block in stage):
        if isinstance(block.shortcut, nn.Sequential):
            block.shortcut.norm = nn.Identity()
    assert distance(broken, theirs, draw_pixels(3)) > 1e-3


def test_control_a_shortcut_left_out_is_seen(pair, monkeypatch):
    ours, theirs = pair
    monkeypatch.setattr(ResidualBlock, "forward", lambda self, x: self.activation(self.path(x)))
    assert distance(ours, theirs, draw_pixels(3)) > 1e-3


def test_control_a_relu_before_the_addition_is_seen(pair, monkeypatch):
    ours, theirs = pair
    monkeypatch.setattr(ResidualBlock, "forward",
                        lambda self, x: self.activation(self.path(x).relu() + self.shortcut(x)))
    assert distance(ours, theirs, draw_pixels(3)) > 1e-3


@pytest.mark.parametrize("field, wrong", [("hidden_act", "relu"), ("downsample_in_first_stage", False)])
def test_control_a_field_that_is_ignored_is_seen(tmp_path, monkeypatch, field, wrong):
    theirs = reference(tmp_path, embedding_size=6, hidden_act="gelu", downsample_in_first_stage=True)
    honest = ResNetConfig.from_huggingface
    monkeypatch.setattr(ResNetConfig, "from_huggingface", lambda settings: honest({**settings, field: wrong}))
    assert distance(ResNet.from_pretrained(tmp_path), theirs, draw_pixels(3)) > 1e-4


def test_control_the_other_mode_of_the_norms_is_seen(pair):
    ours, theirs = pair
    copy = ResNet(ours.config).train()
    copy.load_state_dict(ours.state_dict())
    assert distance(copy, theirs, draw_pixels(3)) > 1e-3


def test_control_swapped_torchvision_names_are_seen(tmp_path):
    config = VISION["basic"]
    theirs = disturb(Vision(config))
    write_tensors(tmp_path / "vision.safetensors", theirs.state_dict())
    names = torchvision_names(config)
    first, second = "stages.0.0.path.0.norm.weight", "stages.0.0.path.1.norm.weight"
    names[first], names[second] = names[second], names[first]
    broken = ResNet.from_file(tmp_path / "vision.safetensors", config, names)
    assert distance(broken, theirs, draw_pixels(3)) > 1e-3


# --- invariances

@given(batch=st.integers(1, 6), seed=st.integers(0, 99), height=st.integers(1, 60), width=st.integers(1, 60))
@settings(max_examples=15)
def test_a_batch_is_its_pictures_alone(pair, batch, seed, height, width):
    ours, _ = pair
    pixels = draw_pixels(3, (height, width), batch, seed)
    with torch.no_grad():
        alone = torch.cat([ours(picture[None]) for picture in pixels])
        assert (ours(pixels) - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["basic", "bottleneck", "first stage, 1x1", "gelu"])
def test_folded_or_channels_last_is_the_same(tmp_path, name):
    reference(tmp_path, **ODD[name])
    ours, pixels = ResNet.from_pretrained(tmp_path), draw_pixels(3)
    with torch.no_grad():
        expected = ours(pixels)
        folded = fold_norms(ours)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
        assert (folded(pixels) - expected).abs().max() <= 1e-5
        last = folded.to(memory_format=torch.channels_last)
        assert (last(pixels.contiguous(memory_format=torch.channels_last)) - expected).abs().max() <= 1e-5


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is for some processors only")
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_packed_for_onednn_is_the_same(tmp_path, name):
    reference(tmp_path, **ODD[name])
    ours, pixels = ResNet.from_pretrained(tmp_path), draw_pixels(3)
    packed = to_mkldnn(fold_norms(ours))
    with torch.no_grad():
        assert (packed(pixels.to_mkldnn()).to_dense() - ours(pixels)).abs().max() <= 1e-5


def test_channels_last_is_saved_as_it_was(tmp_path, pair):
    ours, _ = pair
    copy = ResNet(ours.config)
    copy.load_state_dict(ours.state_dict())
    copy.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ResNet.from_pretrained(tmp_path).state_dict().values(),
                                                 ours.state_dict().values()))


def test_evaluation_leaves_the_statistics_alone(pair):
    ours, _ = pair
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours(draw_pixels(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_scores_are_the_head_of_the_code(pair):
    ours, theirs = pair
    pixels = draw_pixels(3)
    with torch.no_grad():
        code = ours.encode(pixels)
        assert code.shape == (3, ours.head.in_features)
        assert torch.equal(ours.head(code), ours(pixels))
        assert (code - theirs.resnet(pixels).pooler_output.flatten(1)).abs().max() <= 1e-5


# --- sizes, initial weights

@pytest.mark.parametrize("layers, count", [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160),
                                           (152, 60_192_808)])
def test_published_sizes(layers, count):
    config = getattr(ResNetConfig, f"resnet{layers}")()
    settings = {name: value for name, value in config.to_huggingface().items()
                if name not in ("model_type", "architectures", "dtype")}
    with torch.device("meta"):
        assert ResNet(config).num_parameters() == count
        theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings))
    assert sum(weight.numel() for weight in theirs.parameters()) == count


def test_presets_can_be_changed():
    config = ResNetConfig.resnet18(num_classes=10, num_channels=1, depths=(1, 1, 1, 1))
    assert (config.block, config.num_classes, config.num_channels, config.depths) == ("basic", 10, 1, (1, 1, 1, 1))
    assert ResNetConfig.resnet50() == ResNetConfig()


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_initial_weights(block):
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(block=block, stage_channels=(64, 128), depths=(2, 3), stem_channels=32, num_classes=10))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
            assert layer.bias is None
        elif isinstance(layer, nn.BatchNorm2d):
            last = name.endswith(f"path.{1 if block == 'basic' else 2}.norm")
            assert torch.equal(layer.weight, torch.full_like(layer.weight, 0.0 if last else 1.0)), name
            assert not layer.bias.any()
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.1) and not model.head.bias.any()
    x = torch.randn(2, 128, 5, 5)
    assert torch.equal(model.stages[1][1](x), x.relu())  # a fresh block adds nothing
    loss = F.cross_entropy(model(draw_pixels(3, batch=16)), torch.arange(16) % 10)
    assert loss.item() == pytest.approx(torch.tensor(10.0).log().item(), abs=0.3)


def test_every_weight_learns():
    """Gains that start at 0 hold the gradients back at the first update only."""
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(block="basic", stage_channels=(8, 12), depths=(2, 2), stem_channels=8, num_classes=4))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(draw_pixels(3, batch=8, seed=step)), torch.arange(8) % 4).backward()
        optimizer.step()
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]), name


@given(channels=st.integers(1, 9), width=st.integers(4, 40), stride=st.sampled_from([1, 2]), size=st.integers(1, 12))
@settings(max_examples=25)
def test_paths_have_the_shape_that_a_shortcut_has(channels, width, stride, size):
    x = torch.randn(2, channels, size, size + 1)
    expected = (2, width, -(-size // stride), -(-(size + 1) // stride))
    for path in (basic_path(channels, width, stride), bottleneck_path(channels, width, stride),
                 bottleneck_path(channels, width, stride, stride_first=True)):
        block = ResidualBlock(path, resnet_module._shortcut(channels, width, stride)).eval()
        assert block(x).shape == expected


# --- bad input

@pytest.mark.parametrize("field, value", [
    ("stem_channels", 0), ("num_classes", 0), ("num_classes", True), ("num_channels", -1), ("stage_channels", ()),
    ("stage_channels", (8, 0, 8, 8)), ("stage_channels", (2, 8, 8, 8)), ("depths", (1, 1, 0, 1)), ("depths", (1,)),
    ("block", "dense"), ("activation", "mish"), ("labels", ("a", "b")), ("labels", ("a", "a", "b"))])
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}.*expected") as error:
        ResNetConfig(**{"stage_channels": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_classes": 3, field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, value, named", [
    ("model_type", "regnet", "model_type"), ("layer_type", "x", "block"), ("hidden_act", "mish", "activation"),
    ("depths", [0, 1], "depths"), ("depths", [2], "depths"), ("hidden_sizes", [], "stage_channels"),
    ("cardinality", 32, "cardinality"), ("quantization_config", {"bits": 4}, "quantization_config"),
    ("id2label", {"0": "a", "2": "b"}, "names the classes")])
def test_a_config_that_cannot_be_represented_is_refused(field, value, named):
    with pytest.raises(ValueError, match=named) as error:
        ResNetConfig.from_huggingface({**transformers.ResNetConfig(**SMALL).to_dict(), field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [ResNetConfig(), *VISION.values(), ResNetConfig(
    stage_channels=(4,), depths=(7,), stem_channels=3, activation="gelu_tanh", downsample_in_first_stage=True,
    downsample_in_bottleneck=True, num_classes=2, num_channels=7, labels=("no", "yes"))], ids=str)
def test_a_config_survives_the_translation(config):
    assert ResNetConfig.from_huggingface(config.to_huggingface()) == config


def test_defaults_that_a_config_json_leaves_out():
    ours = ResNetConfig.from_huggingface({"model_type": "resnet"})
    assert ours == ResNetConfig.from_huggingface(transformers.ResNetConfig().to_dict())
    assert ours == ResNetConfig(num_classes=2)  # the number that transformers takes where none is given


@pytest.mark.parametrize("pixels", [
    torch.zeros(1, 1, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(2, 8, 8, 3), torch.zeros(3, 8, 8),
    torch.zeros(3, 0, 4), torch.zeros(1, 3, 0, 8), torch.zeros(0, 3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=lambda pixels: f"{tuple(pixels.shape)} {pixels.dtype}")
def test_pictures_of_another_shape_or_type_are_refused(pair, pixels):
    ours, _ = pair
    with pytest.raises(ValueError, match=r"floating-point numbers of shape \(batch, 3, height, width\)") as error:
        ours._check(pixels)
    assert "\n" not in str(error.value)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'mish'; expected one of"):
        ResidualBlock(basic_path(3, 3), nn.Identity(), "mish")


@pytest.mark.parametrize("changes, problem", [
    ({"depths": (2, 1, 3)}, "is missing"), ({"depths": (1, 1, 2)}, "is not part of this model"),
    ({"num_classes": 6}, "classifier.1.weight has shape"), ({"num_channels": 1}, "has shape"),
    ({"block": "basic"}, "has shape"), ({"stem_channels": 16}, "has shape")], ids=str)
def test_weights_of_another_architecture_are_refused(tmp_path, changes, problem):
    reference(tmp_path, **ODD["bottleneck"])
    config = replace(ResNet.from_pretrained(tmp_path).config, **changes)
    with pytest.raises(ValueError, match=f"the weights do not fit the model.*{problem}") as error:
        ResNet.from_file(tmp_path / "model.safetensors", config)
    assert "\n" not in str(error.value)


def test_a_file_in_other_words_is_refused(tmp_path):
    config = VISION["basic"]
    write_tensors(tmp_path / "vision.safetensors", Vision(config).state_dict())
    with pytest.raises(ValueError, match="the weights do not fit the model"):
        ResNet.from_file(tmp_path / "vision.safetensors", config)
    reference(tmp_path)
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    tensors.pop("classifier.1.bias")
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="classifier.1.bias is missing"):
        ResNet.from_pretrained(tmp_path)


def test_files_that_do_not_count_batches_load_with_a_count_of_zero(tmp_path):
    torch.manual_seed(0)
    ours = ResNet(ResNetConfig(stem_channels=8, stage_channels=(8, 12), depths=(1, 1), num_classes=3)).eval()
    ours.save_pretrained(tmp_path)
    stored, _ = read_tensors(tmp_path / "model.safetensors")
    old = {name: tensor for name, tensor in stored.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(stored)
    write_tensors(tmp_path / "model.safetensors", old)
    again = ResNet.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(pixels), ours(pixels))
    assert all(buffer == 0 for name, buffer in again.named_buffers() if name.endswith("num_batches_tracked"))
    del old[next(name for name in old if name.endswith("running_mean"))]
    write_tensors(tmp_path / "model.safetensors", old)
    with pytest.raises(ValueError, match="running_mean is missing"):
        ResNet.from_pretrained(tmp_path)
