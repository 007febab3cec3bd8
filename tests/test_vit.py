"""bigmodel.models.vit: the same numbers as transformers' whatever config and size; controls that turn red."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigmodel.models.attention import TransformerBlock
from bigmodel.models.checkpoint import read_tensors, read_weights, write_tensors
from bigmodel.models.vit import ViT, ViTConfig, attention_maps, attention_rollout, resize_positions
from bigmodel.training.trainer import Trainer, TrainerConfig
from bigmodel.training.vision import classification_loss

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOY = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, num_classes=3)
SMALL = {"image_size": 20, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 37, "num_labels": 5}
ODD = {
    "default": {},
    "four times": {"intermediate_size": 96},
    "no bias": {"qkv_bias": False},
    "grey": {"num_channels": 1},
    "five channels": {"num_channels": 5, "patch_size": 5},
    "relu": {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    "gelu_new": {"hidden_act": "gelu_new"},
    "silu": {"hidden_act": "silu", "qkv_bias": False},
    "pairs": {"image_size": [20, 20], "patch_size": (4, 4)},
    "margin": {"image_size": 23, "patch_size": 4},
    "one patch": {"image_size": 7, "patch_size": 7, "num_hidden_layers": 1},
    "every pixel": {"image_size": 6, "patch_size": 1},
    "one class": {"num_labels": 1},
    "other tasks": {"encoder_stride": 7, "pooler_act": "relu", "pooler_output_size": 11},
    "dropout": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
}


def draw_config(seed):
    """A config drawn by lot."""
    dice = random.Random(seed)
    heads, patch = dice.randint(1, 5), dice.randint(1, 6)
    return {
        "image_size": dice.randint(patch, 6 * patch), "patch_size": patch, "num_attention_heads": heads,
        "hidden_size": heads * dice.randint(1, 9), "num_hidden_layers": dice.randint(1, 5),
        "intermediate_size": dice.choice([1, 13, 64]), "num_channels": dice.randint(1, 5),
        "num_labels": dice.randint(1, 12), "qkv_bias": dice.random() < 0.5,
        "hidden_act": dice.choice(["relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh"]),
        "layer_norm_eps": 10 ** -dice.uniform(2, 12),
    }


def reference(folder, kind=transformers.ViTForImageClassification, seed=0, spread=0.15, **fields):
    """A model of transformers' with weights that are all of a size, biases too, saved to `folder`."""
    model = kind(transformers.ViTConfig(**{**SMALL, **fields})).eval()
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "layernorm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=dice))
    model.save_pretrained(folder)
    return model


def draw_pixels(config, batch=3, height=None, width=None, seed=0):
    shape = (batch, config.num_channels, height or config.image_size, width or config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(ours, theirs, pixels, stretch=False):
    """The largest difference of scores."""
    with torch.no_grad():
        expected = theirs(pixels, interpolate_pos_encoding=stretch).logits
        return (ours(pixels, interpolate_positions=stretch) - expected).abs().max().item()


def say(error):
    """The message of an error, which must be one line."""
    text = str(error.value)
    assert text and "\n" not in text, text
    return text


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model and transformers', with the same weights; nobody changes them."""
    folder = tmp_path_factory.mktemp("vit")
    theirs = reference(folder)
    return ViT.from_pretrained(folder), theirs


# --- parity with transformers

@pytest.mark.parametrize("fields", [*ODD.values(), *map(draw_config, range(20))], ids=[*ODD, *map(str, range(20))])
def test_logits_are_those_of_transformers(tmp_path, fields):
    theirs = reference(tmp_path, **fields)
    ours = ViT.from_pretrained(tmp_path)
    pixels = draw_pixels(ours.config)
    assert distance(ours, theirs, pixels) <= 1e-5
    assert not ours.training
    assert theirs(pixels).logits.abs().max() > 0.01, "scores too small to tell right from wrong"
    assert distance(ours, theirs, pixels, stretch=True) <= 1e-5  # which at its own size changes nothing


@pytest.mark.parametrize("name", ["default", "no bias", "five channels", "margin", "silu", "every pixel"])
def test_gradients_are_those_of_transformers(tmp_path, name):
    theirs = reference(tmp_path, **ODD[name])
    ours = ViT.from_pretrained(tmp_path)
    pixels, targets = draw_pixels(ours.config).requires_grad_(), torch.tensor([0, 1, 4])
    F.cross_entropy(ours(pixels), targets).backward()
    on_pixels, pixels.grad = pixels.grad, None
    F.cross_entropy(theirs(pixels).logits, targets).backward()
    torch.testing.assert_close(on_pixels, pixels.grad, rtol=0, atol=1e-5)
    for parameter in theirs.parameters():  # a file of gradients, by their names
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = ViT.from_pretrained(tmp_path / "gradients")
    for (label, ours_), theirs_ in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert ours_.grad is not None, label
        torch.testing.assert_close(ours_.grad, theirs_.data, rtol=0, atol=1e-4, msg=label)
        assert torch.allclose(ours_.grad, theirs_.data, rtol=1e-2, atol=1e-6), label


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (20, 21), (24, 24), (40, 12), (13, 51), (20, 40), (67, 67)])
def test_other_sizes_are_those_of_transformers(pair, size):
    ours, theirs = pair
    assert distance(ours, theirs, draw_pixels(ours.config, height=size[0], width=size[1]), stretch=True) <= 1e-5


def test_gradients_reach_stretched_positions(pair):
    ours, theirs = pair
    pixels = draw_pixels(ours.config, height=32, width=28)
    found = torch.autograd.grad(ours(pixels, interpolate_positions=True).square().sum(), ours.position_embedding)
    scores = theirs(pixels, interpolate_pos_encoding=True).logits
    expected = torch.autograd.grad(scores.square().sum(), theirs.vit.embeddings.position_embeddings)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": False}, {"num_channels": 1}, {"intermediate_size": 96}])
def test_what_we_save_transformers_loads(tmp_path, fields):
    theirs = reference(tmp_path / "theirs", **fields)
    ViT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert type(back) is transformers.ViTForImageClassification
    for (name, parameter), expected in zip(back.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    kept, written = (read_weights(tmp_path / place) for place in ("theirs", "ours"))
    assert kept.keys() == written.keys() and all(torch.equal(kept[name], written[name]) for name in kept)


def test_a_fresh_model_goes_to_transformers_and_back(tmp_path):
    config = ViTConfig(image_size=12, patch_size=3, hidden_size=16, num_layers=2, num_heads=2, num_classes=3,
                       labels=("cat", "dog", "Kätzchen"), activation="gelu_tanh", dropout=0.1)
    ours = ViT(config).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "Kätzchen"}
    assert distance(ours, theirs, draw_pixels(config)) <= 1e-5
    theirs.save_pretrained(tmp_path / "again")
    again = ViT.from_pretrained(tmp_path / "again")
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_attention_is_that_of_transformers(tmp_path):
    theirs = reference(tmp_path, spread=0.5)
    theirs.set_attn_implementation("eager")
    ours = ViT.from_pretrained(tmp_path)
    for size, stretch in ((20, False), (28, True)):
        pixels = draw_pixels(ours.config, height=size, width=size)
        with torch.no_grad():
            expected = theirs(pixels, interpolate_pos_encoding=stretch, output_attentions=True).attentions
        found = attention_maps(ours, pixels, interpolate_positions=stretch)
        assert found.shape == (3, 3, 4, 1 + (size // 4) ** 2, 1 + (size // 4) ** 2)
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


# --- negative controls: what the tests above must be able to see

def test_control_positions_that_are_not_stretched(pair):
    ours, theirs = pair
    pixels = draw_pixels(ours.config, height=24, width=24)
    table = ours.position_embedding.detach()
    padded = ViT(replace(ours.config, image_size=24)).eval()
    padded.load_state_dict({**ours.state_dict(), "position_embedding": F.pad(table, (0, 0, 0, 36 - 25))})
    assert distance(padded, theirs, pixels, stretch=True) > 1e-2


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_control_positions_stretched_otherwise(pair, mode):
    ours, theirs = pair
    grid = ours.position_embedding.detach()[:, 1:].transpose(1, 2).unflatten(2, (5, 5))
    grid = F.interpolate(grid, size=(8, 8), mode=mode).flatten(2).transpose(1, 2)
    other = ViT(replace(ours.config, image_size=32)).eval()
    other.load_state_dict({**ours.state_dict(),
                           "position_embedding": torch.cat([ours.position_embedding.detach()[:, :1], grid], dim=1)})
    assert distance(other, theirs, draw_pixels(other.config), stretch=True) > 1e-3


def test_control_blue_first(pair):
    ours, theirs = pair
    pixels = draw_pixels(ours.config)
    with torch.no_grad():
        assert (ours(pixels.flip(1)) - theirs(pixels).logits).abs().max() > 1e-2


def test_control_patches_column_by_column(pair):
    class Columns(ViT):
        def embed(self, pixels, interpolate_positions=False):
            grid = self.patch_embedding(pixels).mT
            tokens = torch.cat([self.class_token.expand(len(pixels), -1, -1), grid.flatten(2).transpose(1, 2)], dim=1)
            return tokens + self.position_embedding

    ours, theirs = pair
    wrong = Columns(ours.config).eval()
    wrong.load_state_dict(ours.state_dict())
    assert distance(wrong, theirs, draw_pixels(ours.config)) > 1e-2


@pytest.mark.parametrize("change", ["order of the parts", "post-norm", "epsilon", "mean of the patches"])
def test_control_small_changes(tmp_path, change):
    theirs = reference(tmp_path, layer_norm_eps=1e-2)
    if change == "order of the parts":
        tensors = {name: tensor.clone() for name, tensor in read_weights(tmp_path).items()}
        first, second = (f"vit.encoder.layer.0.attention.attention.{name}.weight" for name in ("query", "value"))
        tensors[first], tensors[second] = tensors[second], tensors[first]
        write_tensors(tmp_path / "model.safetensors", tensors)
    ours = ViT.from_pretrained(tmp_path)
    if change == "post-norm":
        for block in ours.blocks:
            block.attention_norm = nn.Identity()
    if change == "epsilon":
        ours.norm.eps = 1e-5
    if change == "mean of the patches":
        blocks = nn.Sequential(*ours.blocks)
        ours.encode = lambda pixels, stretch=False: ours.norm(blocks(ours.embed(pixels))[:, 1:]).mean(1)
    assert distance(ours, theirs, draw_pixels(ours.config)) > 1e-4


# --- files

def test_files_without_their_prefix(tmp_path):
    theirs = reference(tmp_path)
    tensors = {name.removeprefix("vit."): tensor.clone() for name, tensor in read_weights(tmp_path).items()}
    write_tensors(tmp_path / "model.safetensors", tensors)
    ours = ViT.from_pretrained(tmp_path)
    assert distance(ours, theirs, draw_pixels(ours.config)) <= 1e-5


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_a_pooler_is_left_alone(tmp_path, prefix):
    theirs = reference(tmp_path)
    tensors = {prefix + name.removeprefix("vit.") if name.startswith("vit.") else name: tensor.clone()
               for name, tensor in read_weights(tmp_path).items()}
    tensors |= {f"{prefix}pooler.dense.weight": torch.ones(24, 24), f"{prefix}pooler.dense.bias": torch.ones(24)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    ours = ViT.from_pretrained(tmp_path)
    assert distance(ours, theirs, draw_pixels(ours.config)) <= 1e-5


def test_a_model_without_a_head_lacks_just_that(tmp_path):
    base = reference(tmp_path, kind=transformers.ViTModel)
    with pytest.raises(ValueError, match="classifier.weight is missing") as error:
        ViT.from_pretrained(tmp_path)
    assert say(error).count("is missing") == 2 and "pooler" not in say(error) and "not part" not in say(error)
    tensors = {name: tensor.clone() for name, tensor in read_weights(tmp_path).items()}
    tensors |= {"classifier.weight": torch.eye(5, 24), "classifier.bias": torch.zeros(5)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    ours = ViT.from_pretrained(tmp_path)
    pixels = draw_pixels(ours.config)
    with torch.no_grad():
        expected = base(pixels).last_hidden_state[:, 0]
    assert (ours.encode(pixels) - expected).abs().max() <= 1e-5
    assert (ours(pixels) - expected[:, :5]).abs().max() <= 1e-5


@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop("vit.encoder.layer.1.attention.attention.key.bias"), r"layer\.1\.attention.*key\.bias is missing"),
    (lambda t: t.update({"vit.encoder.layer.0.attention.attention.value.weight": torch.ones(24, 25)}),
     r"value\.weight has shape \(24, 25\), expected \(24, 24\)"),
    (lambda t: t.update({"vit.embeddings.position_embeddings": torch.ones(1, 50, 24)}),
     r"\(1, 50, 24\), expected \(1, 26"),
    (lambda t: t.update({"vit.embeddings.mask_token": torch.ones(1, 1, 24)}), "mask_token is not part"),
    (lambda t: t.pop("classifier.weight"), "classifier.weight is missing"),
    (lambda t: t["vit.layernorm.bias"].fill_(float("nan")), "layernorm.bias holds NaN"),
], ids=["part", "shape", "positions", "extra", "head", "nan"])
def test_what_does_not_fit_is_named(tmp_path, change, said):
    reference(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in read_weights(tmp_path).items()}
    change(tensors)
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=said) as error:
        ViT.from_pretrained(tmp_path)
    say(error)


def test_biases_where_the_config_has_none_are_named(tmp_path):
    theirs = reference(tmp_path)
    theirs.config.qkv_bias = False
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"query\.bias is not part of this model"):
        ViT.from_pretrained(tmp_path)


def test_a_file_alone(tmp_path):
    torch.manual_seed(0)
    ours = ViT(TOY).eval()
    ours.save_pretrained(tmp_path)
    again = ViT.from_file(tmp_path / "model.safetensors", TOY)
    assert torch.equal(again(draw_pixels(TOY)), ours(draw_pixels(TOY)))
    assert read_tensors(tmp_path / "model.safetensors")[1] == {"format": "pt"}


# --- config

@pytest.mark.parametrize("fields", [*ODD.values(), *map(draw_config, range(10))])
def test_configs_come_back(fields):
    theirs = transformers.ViTConfig(**{**SMALL, **fields})
    ours = ViTConfig.from_huggingface(theirs.to_dict())
    assert ViTConfig.from_huggingface(ours.to_huggingface()) == ours
    back = transformers.ViTConfig(**{name: value for name, value in ours.to_huggingface().items() if name != "dtype"})
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "qkv_bias",
                  "num_labels", "num_channels", "layer_norm_eps", "hidden_dropout_prob",
                  "attention_probs_dropout_prob"):
        assert getattr(back, field) == getattr(theirs, field), field


def test_a_config_of_the_hub():
    """The fields of google/vit-base-patch16-224, as they were uploaded in 2021."""
    found = ViTConfig.from_huggingface({
        "_name_or_path": "google/vit-base-patch16-224", "architectures": ["ViTForImageClassification"],
        "attention_probs_dropout_prob": 0.0, "encoder_stride": 16, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "hidden_size": 768, "id2label": {str(n): f"label {n}" for n in range(1000)}, "image_size": 224,
        "initializer_range": 0.02, "intermediate_size": 3072, "label2id": {f"label {n}": n for n in range(1000)},
        "layer_norm_eps": 1e-12, "model_type": "vit", "num_attention_heads": 12, "num_channels": 3,
        "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True, "transformers_version": "4.13.0.dev0"})
    assert replace(found, labels=None) == ViTConfig.vit_base() and found.labels[999] == "label 999"
    assert ViTConfig.from_huggingface({"model_type": "vit"}) == ViTConfig(num_classes=2)  # transformers' defaults


@pytest.mark.parametrize("change, said", [
    ({"image_size": [224, 192]}, r"image_size = \[224, 192\]"), ({"patch_size": (16, 14)}, r"patch_size = \(16, 14\)"),
    ({"patch_size": [16]}, "patch_size"), ({"hidden_act": "quick_gelu"}, "quick_gelu"),
    ({"model_type": "deit"}, "deit"),
    ({"num_register_tokens": 4}, "num_register_tokens"), ({"hidden_size": 100}, "hidden_size 100"),
    ({"image_size": 0}, "image_size"), ({"hidden_dropout_prob": 1.5}, "dropout")])
def test_what_a_config_cannot_say_is_refused(change, said):
    with pytest.raises(ValueError, match=said) as error:
        ViTConfig.from_huggingface({**transformers.ViTConfig().to_dict(), **change})
    say(error)


@pytest.mark.parametrize("change", [
    {"image_size": 0}, {"patch_size": -1}, {"patch_size": 225}, {"hidden_size": 770}, {"num_heads": 0},
    {"num_layers": 0},
    {"inner_size": 0}, {"num_channels": 0}, {"num_classes": 0}, {"activation": "mish"}, {"dropout": 1.0},
    {"attention_dropout": -0.1}, {"norm_epsilon": 0.0}, {"initializer_range": float("inf")},
    {"num_classes": 2, "labels": ("a",)}, {"num_classes": 2, "labels": ("a", "a")}])
def test_a_nonsense_config_is_refused(change):
    with pytest.raises(ValueError) as error:
        ViTConfig(**change)
    say(error)


def test_published_sizes():
    sizes = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632}
    for name, expected in sizes.items():
        with torch.device("meta"):
            assert ViT(getattr(ViTConfig, f"vit_{name}")()).num_parameters() == expected
    assert ViTConfig.vit_tiny(image_size=384).grid_size == 24


# --- behaviour

@pytest.mark.parametrize("shape, said", [
    ((2, 3, 24, 24), "24×24 do not fit positions for 20×20"), ((2, 3, 20, 24), "20×24"),
    ((2, 1, 20, 20), "num_channels is 3"),
    ((2, 4, 20, 20), "num_channels is 3"), ((2, 3, 0, 0), "0×0")])
def test_pictures_that_do_not_fit_are_refused(pair, shape, said):
    with pytest.raises(ValueError, match=said) as error:
        pair[0](torch.zeros(shape))
    say(error)


def test_less_than_a_patch_is_refused_even_when_stretching(pair):
    with pytest.raises(ValueError, match="smaller than one patch of 4×4"):
        pair[0](torch.zeros(1, 3, 20, 3), interpolate_positions=True)


def test_a_batch_is_its_pictures(pair):
    ours, _ = pair
    pixels = draw_pixels(ours.config, batch=5)
    with torch.no_grad():
        together, alone = ours(pixels), torch.cat([ours(picture[None]) for picture in pixels])
    assert (together - alone).abs().max() <= 1e-5
    assert ours(pixels[:0]).shape == (0, 5)


def test_features_and_head_make_the_scores(pair):
    ours, _ = pair
    pixels = draw_pixels(ours.config)
    assert ours.encode(pixels).shape == (3, 24) and isinstance(ours.head, nn.Linear)
    assert torch.equal(ours.head(ours.encode(pixels)), ours(pixels))
    assert all(isinstance(block, TransformerBlock) for block in ours.blocks)


def test_without_positions_order_does_not_matter(pair):
    ours, _ = pair
    bag = ViT(ours.config).eval()
    bag.load_state_dict({**ours.state_dict(), "position_embedding": torch.zeros_like(ours.position_embedding)})
    pixels = draw_pixels(ours.config)
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, torch.randperm(25)]
    shuffled = patches.unflatten(2, (5, 5)).permute(0, 1, 2, 4, 3, 5).reshape(pixels.shape)
    with torch.no_grad():
        assert (bag(pixels) - bag(shuffled)).abs().max() <= 1e-5
        assert (ours(pixels) - ours(shuffled)).abs().max() > 1e-2


def test_a_fresh_model_holds_all_classes_for_equally_likely():
    torch.manual_seed(0)
    model = ViT(ViTConfig.vit_tiny(image_size=32, num_layers=4, num_classes=10))
    scores = model(draw_pixels(model.config, batch=16))
    assert scores.softmax(-1).max() < 0.4 and scores.std() > 1e-3


def test_resized_positions():
    table = torch.randn(1, 1 + 49, 6)
    assert resize_positions(table, 7, 7) is table
    even = resize_positions(torch.ones(1, 10, 2), 5, 8)
    assert even.shape == (1, 41, 2) and torch.allclose(even, torch.ones(()), atol=1e-6)
    wide = resize_positions(table, 7, 14)
    assert torch.equal(wide[:, 0], table[:, 0])
    turned = resize_positions(torch.cat([table[:, :1], table[:, 1:].view(1, 7, 7, 6).mT.transpose(2, 3)
                                         .transpose(1, 2).flatten(1, 2)], dim=1), 14, 7)
    assert torch.allclose(turned[:, 1:].view(14, 7, 6).transpose(0, 1).flatten(0, 1), wide[0, 1:], atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_looking_leaves_the_model_as_it_is(training):
    torch.manual_seed(0)
    model = ViT(replace(TOY, dropout=0.5))
    model.train(training)
    model.blocks[1].train(not training)
    modes = [module.training for module in model.modules()]
    pixels = draw_pixels(model.config)
    first, second = attention_maps(model, pixels), attention_maps(model, pixels)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.allclose(first.sum(-1), torch.ones(()), atol=1e-5) and (first >= 0).all()
    with pytest.raises(ValueError, match="do not fit positions"):
        attention_maps(model, torch.zeros(1, 3, 12, 12))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rollout():
    torch.manual_seed(0)
    maps = torch.rand(3, 2, 4, 5, 5)
    maps /= maps.sum(-1, keepdim=True)
    found = attention_rollout(maps)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)
    expected = torch.eye(5)
    for layer in range(3):
        expected = (maps[layer, 1].mean(0) / 2 + torch.eye(5) / 2) @ expected
    assert torch.allclose(found[1], expected, atol=1e-6)
    assert torch.equal(attention_rollout(torch.eye(5).expand(3, 2, 4, 5, 5)), torch.eye(5).expand(2, 5, 5))


def test_trained_and_resumed_like_any_other(tmp_path):
    torch.manual_seed(0)
    model = ViT(replace(TOY, num_channels=1))
    pixels = torch.randn(8, 1, 8, 8)
    targets = (pixels[:, 0, 0, 0] > 0).long()
    Trainer(model, classification_loss(), [(pixels, targets)] * 40, TrainerConfig(steps=40, learning_rate=1e-2),
            out=tmp_path, show=False).fit()
    assert (model(pixels).argmax(-1) == targets).all()
    again = ViT.from_pretrained(tmp_path)
    model.eval()
    assert torch.equal(again(pixels), model(pixels))
