"""bigmodel.models.convolution: PyTorch's numbers as one matrix product, fields that gradients confirm, counts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bigmodel.models.attention import TransformerBlock
from bigmodel.models.convolution import convolve, count_operations, fold_norm, fold_norms, receptive_field
from bigmodel.models.vgg import VGG, VGGConfig


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- convolve

OPTIONS = st.fixed_dictionaries({"stride": st.integers(1, 4), "padding": st.integers(0, 4),
                                 "dilation": st.integers(1, 3), "groups": st.integers(1, 4)})


@given(options=OPTIONS, kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), size=st.tuples(
    st.integers(13, 20), st.integers(13, 20)), inputs=st.integers(1, 3), filters=st.integers(1, 3),
       batch=st.integers(0, 3), with_bias=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=150)
def test_convolve_is_conv2d(options, kernel, size, inputs, filters, batch, with_bias, seed):
    groups = options["groups"]
    pixels = draw(batch, inputs * groups, *size, seed=seed)
    weight = draw(filters * groups, inputs, *kernel, seed=seed + 1)
    bias = draw(filters * groups, seed=seed + 2) if with_bias else None
    expected = F.conv2d(pixels, weight, bias, **options)
    found = convolve(pixels, weight, bias, **options)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_convolve_in_float32():
    pixels, weight = draw(2, 32, 20, 20, dtype=torch.float32), draw(48, 32, 3, 3, seed=1, dtype=torch.float32)
    torch.testing.assert_close(convolve(pixels, weight, padding=1), F.conv2d(pixels, weight, padding=1), rtol=1e-5,
                               atol=1e-4)


def test_convolve_has_the_gradients_of_conv2d():
    tensors = [draw(2, 4, 9, 8, seed=1), draw(6, 2, 3, 2, seed=2), draw(6, seed=3)]
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    gradients = []
    for function in (convolve, F.conv2d):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        function(*leaves, **options).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("broken", [
    lambda pixels, weight: convolve(pixels, weight.flip(2, 3)),  # a convolution as mathematics has it
    lambda pixels, weight: convolve(pixels, weight.mT.contiguous()),  # rows for columns
    lambda pixels, weight: convolve(pixels.flip(1), weight),  # BGR for RGB
    lambda pixels, weight: convolve(pixels.roll(1, -1), weight),  # one pixel to the right
], ids="flipped transposed channels shifted".split())
def test_control_a_mistake_is_seen(broken):
    pixels, weight = draw(2, 3, 9, 9), draw(4, 3, 3, 3, seed=1)
    assert (broken(pixels, weight) - F.conv2d(pixels, weight)).abs().max() > 0.1


@pytest.mark.parametrize("pixels, weight, options, message", [
    ((1, 4, 9, 9), (6, 3, 3, 3), {}, "4 channels do not fit 6 filters of 3 each in 1 groups; expected 3 channels"),
    ((1, 6, 9, 9), (5, 3, 3, 3), {"groups": 2}, "a multiple of 2 filters"),
    ((1, 3, 2, 9), (6, 3, 3, 3), {}, "a filter of 3 .* does not fit into 2 .* larger picture or more padding"),
    ((1, 3, 9, 4), (6, 3, 3, 3), {"dilation": 2}, "dilation 2"),
    ((1, 3, 9, 9), (6, 3, 3, 3), {"stride": 0}, "stride 0.*expected the first two to be at least 1"),
    ((1, 3, 9, 9), (6, 3, 3, 3), {"stride": -1}, "stride -1"),
    ((1, 3, 9, 9), (6, 3, 3, 3), {"dilation": 0}, "dilation 0"),
    ((1, 3, 9, 9), (6, 3, 3, 3), {"padding": -1}, "padding -1"),
    ((1, 3, 9, 9), (6, 3, 3, 3), {"groups": 0}, "in 0 groups"),
    ((1, 3, 9, 9), (6, 3, 3, 3), {"bias": torch.zeros(1)}, r"bias has shape \(1,\); expected 6 numbers"),
])
def test_what_does_not_fit_is_refused(pixels, weight, options, message):
    with pytest.raises(ValueError, match=message) as error:
        convolve(torch.zeros(pixels), torch.zeros(weight), **options)
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError):
        F.conv2d(torch.zeros(pixels), torch.zeros(weight), **options)


@given(rows=st.integers(-9, 9), columns=st.integers(-9, 9), stride=st.integers(1, 3))
@settings(max_examples=40)
def test_a_shifted_picture_gives_a_shifted_result(rows, columns, stride):
    picture, weight = draw(1, 2, 18, 18), draw(3, 2, 3, 3, seed=1)

    def filtered(picture):
        return convolve(F.pad(picture, (1, 1, 1, 1), mode="circular"), weight, stride=stride)

    moved = filtered(picture.roll((rows * stride, columns * stride), (2, 3)))
    torch.testing.assert_close(moved, filtered(picture).roll((rows, columns), (2, 3)), rtol=0, atol=1e-12)


def test_control_a_shift_that_is_no_multiple_of_the_stride_is_seen():
    picture, weight = draw(1, 1, 16, 16), draw(1, 1, 3, 3, seed=1)
    one, plain = (convolve(x, weight, stride=2)[..., 1:-1, 1:-1] for x in (picture.roll((1, 1), (2, 3)), picture))
    assert (one - plain).abs().max() > 0.1


# --- receptive fields

LAYER = st.one_of(
    st.builds(lambda k, s, d: ("conv", k, s, d), st.integers(1, 4), st.integers(1, 2), st.integers(1, 2)),
    st.builds(lambda k, s: ("pool", k, s, 1), st.integers(2, 3), st.integers(1, 2)), st.just(("relu", 1, 1, 1)))


def make_layer(kind, kernel, stride, dilation):
    if kind == "relu":
        return nn.ReLU()
    if kind == "pool":
        return nn.AvgPool2d(kernel, stride)
    layer = nn.Conv2d(1, 1, kernel, stride, dilation=dilation).double()
    nn.init.constant_(layer.weight, 1.0)
    nn.init.zeros_(layer.bias)  # so that no ReLU is off
    return layer


@given(layers=st.lists(LAYER, max_size=5))
@settings(max_examples=60)
def test_the_field_is_where_the_gradient_is(layers):
    model = nn.Sequential(*(make_layer(*layer) for layer in layers))
    field = receptive_field(model)
    size = field.size + field.stride
    pixels = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    output = model(pixels)
    edges = []
    for unit in (0, 1):  # two neighbours: the first and the second unit of the first row
        seen = torch.autograd.grad(output[0, 0, 0, unit], pixels, retain_graph=True)[0][0, 0].sum(0).nonzero()
        edges.append((seen.min().item(), seen.max().item()))
    assert edges[0][0] == 0 and edges[1][0] == field.stride
    assert edges[0][1] == field.size - 1 and edges[1][1] == field.size - 1 + field.stride


@pytest.mark.parametrize("config, size", [(VGGConfig.vgg11(), 150), (VGGConfig.vgg13(), 156), (VGGConfig.vgg16(), 212),
                                          (VGGConfig.vgg19(), 268)], ids="11 13 16 19".split())
def test_fields_of_vgg(config, size):
    with torch.device("meta"):
        assert receptive_field(VGG(config).features) == (size, 32)


def test_padding_and_nesting_change_nothing():
    inner = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    nested = nn.Sequential(inner, nn.MaxPool2d(2), nn.ModuleList([nn.Conv2d(8, 8, 3, dilation=2), nn.Dropout(0.1)]))
    assert receptive_field(nested) == receptive_field(iter([nn.Conv2d(1, 1, 3), nn.MaxPool2d(2), nn.Conv2d(1, 1, 5)]))
    assert receptive_field(nn.Conv2d(1, 1, 5, stride=3)) == (5, 3)
    assert receptive_field([]) == (1, 1)


@pytest.mark.parametrize("layer, message", [
    (nn.Linear(3, 3), "Linear has no window"), (nn.AdaptiveAvgPool2d(1), "no window"),
    (nn.Conv2d(1, 1, (3, 5)), "unequal sides"), (nn.MaxPool2d(2, (1, 2)), "unequal sides")])
def test_layers_without_a_square_window_are_refused(layer, message):
    with pytest.raises(ValueError, match=message) as error:
        receptive_field([nn.Conv2d(1, 1, 3), layer])
    assert "\n" not in str(error.value)


# --- counting

def flops(model, pixels):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    return counter.get_total_flops()


@given(groups=st.integers(1, 3), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2),
       batch=st.integers(1, 4))
@settings(max_examples=30)
def test_operations_are_those_of_pytorchs_counter(groups, kernel, stride, padding, batch):
    model = nn.Sequential(nn.Conv2d(6, 12, kernel, stride, padding, groups=groups), nn.ReLU(), nn.Conv2d(12, 5, 1),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7))
    pixels = torch.randn(batch, 6, 14, 11)
    counts = count_operations(model, pixels)
    assert list(counts) == ["0", "2", "5"]
    assert 2 * sum(counts.values()) == flops(model, pixels)


@pytest.mark.parametrize("name, published", [("vgg11", 7.61), ("vgg13", 11.31), ("vgg16", 15.47), ("vgg19", 19.63)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_published_operations_of_vgg(name, published, batch_norm):
    config = getattr(VGGConfig, name)(batch_norm=batch_norm)
    with torch.device("meta"):
        model, pixels = VGG(config), torch.empty(1, 3, 224, 224)
        total = sum(count_operations(model, pixels).values())
        assert 2 * total == flops(model.eval(), pixels)
    assert total / 1e9 == pytest.approx(published, abs=0.005)
    side, expected, channels = 224, 0, 3  # the same by formula
    for width, convolutions in config.stages:
        for _ in range(convolutions):
            expected, channels = expected + side**2 * 9 * channels * width, width
        side //= 2
    assert total == expected + 512 * 49 * 4096 + 4096**2 + 4096 * 1000


@pytest.mark.parametrize("module, name, preset, published", [
    ("resnet", "ResNet", "resnet18", 1.81), ("resnet", "ResNet", "resnet50", 4.09),
    ("resnet", "ResNet", "resnet152", 11.51), ("vit", "ViT", "vit_base", 17.56)])
def test_published_operations_of_others(module, name, preset, published):
    module = pytest.importorskip(f"bigmodel.models.{module}")
    config = getattr(getattr(module, f"{name}Config"), preset)()
    with torch.device("meta"):
        counts = count_operations(getattr(module, name)(config), torch.empty(1, 3, 224, 224))
    assert sum(counts.values()) / 1e9 == pytest.approx(published, abs=0.01)


def test_attention_counts_its_scores_and_sums():
    block, x = TransformerBlock(24, 4, 50).eval(), torch.randn(3, 10, 24)
    counts = count_operations(block, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the counter does not know the CPU's own
        assert 2 * sum(counts.values()) == flops(block, x)
    assert counts["attention"] == 2 * 3 * 10 * 10 * 24


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert count_operations(Twice(), torch.zeros(5, 4)) == {"layer": 2 * 5 * 16}


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2))
    model.train()[1].eval()  # a frozen norm in a model that trains
    before = copy.deepcopy(model.state_dict())
    count_operations(model, torch.randn(3, 1, 4, 4))
    with pytest.raises(RuntimeError):
        count_operations(model, torch.randn(3, 1, 9, 9))  # too large for the linear layer
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert model(torch.randn(3, 1, 4, 4)).requires_grad


# --- folding

def used_norm(channels, seed=0, **options):
    """A batch norm as training leaves it."""
    norm = nn.BatchNorm2d(channels, **options).eval()
    generator = torch.Generator().manual_seed(seed)
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.1, 3, generator=generator)
    if norm.affine:
        nn.init.normal_(norm.weight, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    return norm


@given(bias=st.booleans(), affine=st.booleans(), groups=st.integers(1, 3), stride=st.integers(1, 2),
       mode=st.sampled_from(["zeros", "reflect", "circular"]), eps=st.sampled_from([1e-5, 1e-1]),
       seed=st.integers(0, 99))
@settings(max_examples=60)
def test_folded_is_the_same(bias, affine, groups, stride, mode, eps, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(6, 12, 3, stride, 1, groups=groups, bias=bias, padding_mode=mode).double()
    norm = used_norm(12, seed, affine=affine, eps=eps).double()
    before = copy.deepcopy(conv.state_dict())
    pixels = draw(2, 6, 8, 9)
    with torch.no_grad():
        torch.testing.assert_close(fold_norm(conv, norm)(pixels), norm(conv(pixels)), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in conv.state_dict().items())
    assert list(before) == list(conv.state_dict())


@pytest.mark.parametrize("field", ["weight", "bias", "running_mean", "running_var", "eps"])
def test_control_a_part_of_the_norm_that_is_forgotten_is_seen(field):
    conv, norm, pixels = nn.Conv2d(3, 5, 3), used_norm(5, eps=0.5), torch.randn(2, 3, 8, 8)
    forgetful = copy.deepcopy(norm)
    fresh = nn.BatchNorm2d(5)
    setattr(forgetful, field, getattr(fresh, field))
    with torch.no_grad():
        assert (fold_norm(conv, forgetful)(pixels) - norm(conv(pixels))).abs().max() > 1e-2


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(5, track_running_stats=False)],
                         ids=["features", "statistics"])
def test_norms_that_cannot_be_folded_are_refused(norm):
    with pytest.raises(ValueError, match="cannot be folded.*expected as many features as filters") as error:
        fold_norm(nn.Conv2d(3, 5, 3), norm)
    assert "\n" not in str(error.value)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def used_vgg():
    torch.manual_seed(0)
    model = VGG(VGGConfig(stages=((8, 2), (16, 1)), batch_norm=True, hidden_size=20, pooled_size=2, num_classes=5))
    for _ in range(3):
        model(torch.randn(6, 3, 16, 16) * 2 + 1)
    return model


def test_a_whole_model_is_folded_and_stays_as_it_was():
    model, pixels = used_vgg(), torch.randn(3, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    folded = fold_norms(model, pixels)
    assert not norms_of(folded) and len(norms_of(model)) == 3 and model.training and not folded.training
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(pixels)
        assert (folded(pixels) - expected).abs().max() <= 1e-5
        assert (folded.to(memory_format=torch.channels_last)(pixels) - expected).abs().max() <= 1e-5
        assert (folded.encode(pixels) - model.encode(pixels)).abs().max() <= 1e-5


def test_a_folded_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="folded, for inference only; save the model as it was before"):
        fold_norms(used_vgg()).save_pretrained(tmp_path)
    used_vgg().save_pretrained(tmp_path)


def test_norms_elsewhere_are_left_alone():
    model = nn.Sequential(used_norm(3), nn.Conv2d(3, 4, 3), nn.ReLU(), used_norm(4), nn.Sequential(
        nn.Conv2d(4, 4, 3), used_norm(4, 1)))
    pixels = torch.randn(2, 3, 9, 9)
    folded = fold_norms(model, pixels)
    assert len(norms_of(folded)) == 2 and isinstance(folded[4][1], nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(folded(pixels), model.eval()(pixels), rtol=0, atol=1e-5)


def test_another_order_than_the_registered_one_is_noticed():
    class Astray(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), used_norm(4)

        def forward(self, x):
            return self.norm(self.conv(x).relu())

    model = Astray().train()
    fold_norms(model)  # nobody asked
    with pytest.raises(ValueError, match="output differs by .* run directly behind the convolution") as error:
        fold_norms(model, torch.randn(2, 4, 5, 5))
    assert "\n" not in str(error.value) and model.training


def test_a_copy_that_is_no_number_is_noticed():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), used_norm(4))
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(ValueError, match="output differs by nan"):
        fold_norms(model, torch.randn(2, 3, 5, 5))


def test_a_resnet_and_its_folded_copy_agree():
    resnet = pytest.importorskip("bigmodel.models.resnet")
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.ResNetConfig.resnet18(num_classes=5))
    pixels = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        model(pixels + torch.randn(2, 3, 64, 64))
    folded = fold_norms(model, pixels)
    assert not norms_of(folded)
    with torch.no_grad():
        expected = model.eval()(pixels)
        assert (folded(pixels) - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())
