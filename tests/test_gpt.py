"""bigmodel.models.gpt: the same numbers as transformers' GPT-2 whatever the config; cached, padded, batched or not."""

import random
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import bigmodel.models.attention as attention_module
import bigmodel.models.gpt as gpt_module
from bigmodel.models.checkpoint import read_tensors, write_tensors
from bigmodel.models.gpt import GPT, GPT2_SIZES, GPT3_SIZES, GPTConfig

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = {"vocab_size": 101, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 4}
ODD = {
    "default": {},
    "inner": {"n_inner": 37},
    "relu": {"activation_function": "relu"},
    "gelu": {"activation_function": "gelu", "layer_norm_epsilon": 1e-2},
    "silu": {"activation_function": "silu", "n_inner": 7},
    "gelu_new": {"activation_function": "gelu_new", "n_head": 1},
    "tanh": {"activation_function": "gelu_pytorch_tanh", "n_head": 24},
    "untied": {"tie_word_embeddings": False},
    "by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 5},
    "unscaled": {"scale_attn_weights": False},
    "unscaled by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "long": {"n_positions": 257, "n_layer": 1},
    "odd sizes": {"vocab_size": 1, "n_positions": 1, "n_embd": 3, "n_layer": 1, "n_head": 3},
    "narrow": {"vocab_size": 7, "n_embd": 1, "n_head": 1, "n_inner": 1},
    "everything": {"n_inner": 100, "activation_function": "relu", "tie_word_embeddings": False, "n_embd": 35,
                   "n_head": 5, "scale_attn_by_inverse_layer_idx": True, "vocab_size": 53, "n_positions": 33,
                   "n_layer": 4},
}


def draw_config(seed):
    """A config drawn by lot."""
    dice = random.Random(seed)
    heads = dice.randint(1, 5)
    return {
        "vocab_size": dice.randint(2, 150), "n_positions": dice.randint(2, 70), "n_head": heads,
        "n_embd": heads * dice.randint(1, 9), "n_layer": dice.randint(1, 5), "n_inner": dice.choice([None, 1, 13, 64]),
        "activation_function": dice.choice(["relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh"]),
        "tie_word_embeddings": dice.random() < 0.5, "scale_attn_weights": dice.random() < 0.7,
        "scale_attn_by_inverse_layer_idx": dice.random() < 0.5, "reorder_and_upcast_attn": dice.random() < 0.5,
        "layer_norm_epsilon": 10 ** -dice.uniform(2, 7), "resid_pdrop": dice.choice([0.0, 0.1, 0.5]),
    }


def reference(folder, kind=transformers.GPT2LMHeadModel, seed=0, spread=0.15, **fields):
    """A model of transformers' with weights that are all of a size, biases too, saved to `folder`."""
    fields = {**SMALL, **fields}
    fields.setdefault("eos_token_id", fields["vocab_size"] - 1)
    fields.setdefault("bos_token_id", fields["vocab_size"] - 1)
    model = kind(transformers.GPT2Config(**fields)).eval()
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=dice))
    model.save_pretrained(folder)
    return model


def draw_tokens(config, batch=3, seed=0, time=None):
    shape = (batch, time or config.context_length)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def distance(ours, theirs, tokens):
    """The largest difference of scores."""
    with torch.no_grad():
        return (ours(tokens) - theirs(tokens).logits).abs().max().item()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model and transformers', with the same weights; nobody changes them."""
    folder = tmp_path_factory.mktemp("gpt")
    theirs = reference(folder)
    return GPT.from_pretrained(folder), theirs


# --- parity with transformers

@pytest.mark.parametrize("fields", [*ODD.values(), *map(draw_config, range(24))], ids=[*ODD, *map(str, range(24))])
def test_logits_are_those_of_transformers(tmp_path, fields):
    theirs = reference(tmp_path, **fields)
    ours = GPT.from_pretrained(tmp_path)
    tokens = draw_tokens(ours.config)
    assert distance(ours, theirs, tokens) <= 1e-5
    assert not ours.training
    assert theirs(tokens).logits.abs().max() > 0.01, "scores too small to tell right from wrong"


@pytest.mark.parametrize("name", ["default", "untied", "by layer", "everything", "silu"])
def test_gradients_are_those_of_transformers(tmp_path, name):
    theirs = reference(tmp_path, **ODD[name])
    ours = GPT.from_pretrained(tmp_path)
    tokens = draw_tokens(ours.config)
    for scores in (ours(tokens), theirs(tokens).logits):
        F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for parameter in theirs.parameters():  # a file of gradients, by their names
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = GPT.from_pretrained(tmp_path / "gradients")
    for (label, ours_), theirs_ in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert ours_.grad is not None, label
        torch.testing.assert_close(ours_.grad, theirs_.data, rtol=0, atol=1e-4, msg=label)
        assert torch.allclose(ours_.grad, theirs_.data, rtol=1e-2, atol=1e-6), label


@pytest.mark.parametrize("name", ["default", "everything", "unscaled by layer"])
def test_greedy_text_is_that_of_transformers(tmp_path, name):
    theirs = reference(tmp_path, **{**ODD[name], "eos_token_id": None, "bos_token_id": None})
    ours = GPT.from_pretrained(tmp_path)
    text = prompt = draw_tokens(ours.config, batch=4, time=5)
    for _ in range(24):
        text = torch.cat([text, ours(text)[:, -1:].argmax(-1)], dim=1)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
                               pad_token_id=0)
    assert torch.equal(text, expected)
    assert len(set(text[:, 5:].flatten().tolist())) > 2


def test_left_padding_changes_nothing_and_agrees_with_transformers(pair):
    ours, theirs = pair
    tokens = draw_tokens(ours.config, batch=4, time=12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    for row, padding in enumerate([0, 1, 5, 11]):
        mask[row, :padding] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        scores = ours(tokens, attention_mask=mask)
        expected = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
        assert (scores - expected)[mask].abs().max() <= 1e-5
        for row in range(4):
            alone = ours(tokens[row:row + 1, mask[row]])[0]
            assert (scores[row, mask[row]] - alone).abs().max() <= 1e-5
    assert scores.isfinite().all()


def test_right_padding_changes_nothing_before_it(pair):
    ours, _ = pair
    tokens = draw_tokens(ours.config, batch=1, time=10)
    mask = torch.arange(10)[None] < 7
    with torch.no_grad():
        assert (ours(tokens, attention_mask=mask)[:, :7] - ours(tokens[:, :7])).abs().max() <= 1e-5


def test_a_file_without_head_and_prefix(tmp_path):
    base = reference(tmp_path, kind=transformers.GPT2Model)
    assert "wte.weight" in read_tensors(tmp_path / "model.safetensors")[0]
    ours = GPT.from_pretrained(tmp_path)
    tokens = draw_tokens(ours.config)
    with torch.no_grad():
        expected = base(tokens).last_hidden_state @ base.wte.weight.T
        assert (ours(tokens) - expected).abs().max() <= 1e-5


def test_masks_in_older_files_are_left_out(tmp_path):
    theirs = reference(tmp_path)
    tensors, header = read_tensors(tmp_path / "model.safetensors")
    for layer in range(3):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write_tensors(tmp_path / "model.safetensors", tensors, header)
    ours = GPT.from_pretrained(tmp_path)
    assert distance(ours, theirs, draw_tokens(ours.config)) <= 1e-5
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}  # as OpenAI's on the hub
    write_tensors(tmp_path / "model.safetensors", bare, header)
    ours = GPT.from_pretrained(tmp_path)
    assert distance(ours, theirs, draw_tokens(ours.config)) <= 1e-5


@pytest.mark.parametrize("changes", [
    {}, {"tied_head": False, "inner_size": 50}, {"activation": "relu", "scale_by_layer": True, "dropout": 0.2},
    {"scale_attention": False, "activation": "silu", "end_of_text": 3}, {"activation": "gelu", "num_heads": 1},
], ids=str)
def test_what_we_save_transformers_loads(tmp_path, changes):
    torch.manual_seed(1)
    ours = GPT(GPTConfig(vocab_size=61, context_length=24, hidden_size=20, num_layers=2, num_heads=2,
                         initializer_range=0.2)).eval()
    ours = GPT(replace(ours.config, **changes)).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert distance(ours, theirs.eval(), draw_tokens(ours.config)) <= 1e-5
    assert theirs.config.eos_token_id == ours.config.end_of_text
    again = GPT.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again(draw_tokens(ours.config)), ours(draw_tokens(ours.config)))


# --- negative controls: each of these mistakes must be seen

def test_control_an_untransposed_projection_is_seen(tmp_path):
    theirs = reference(tmp_path)
    names = dict(GPT.tensor_names)
    name = "blocks.*.attention.output.weight"
    names[name] = names[name].name  # square, so that the shape tells nothing
    broken = type("Broken", (GPT,), {"tensor_names": names}).from_pretrained(tmp_path)
    assert distance(broken, theirs, draw_tokens(broken.config)) > 1e-3


def test_control_a_shifted_mask_is_seen(pair, monkeypatch):
    ours, theirs = pair
    def shifted(query, key, value, mask=None, causal=False, dropout=0.0, scale=None):
        sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(1)  # one token of the future
        return F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scale)
    monkeypatch.setattr(attention_module, "attention", shifted)
    assert distance(ours, theirs, draw_tokens(ours.config)) > 1e-3


@pytest.mark.parametrize("field, wrong", [("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True),
                                          ("layer_norm_epsilon", 1e-5), ("activation_function", "gelu")])
def test_control_a_field_that_is_ignored_is_seen(tmp_path, monkeypatch, field, wrong):
    theirs = reference(tmp_path, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False,
                       layer_norm_epsilon=1e-2, activation_function="relu")
    honest = GPTConfig.from_huggingface
    monkeypatch.setattr(GPTConfig, "from_huggingface", lambda settings: honest({**settings, field: wrong}))
    broken = GPT.from_pretrained(tmp_path)
    assert distance(broken, theirs, draw_tokens(broken.config)) > 1e-4


def test_control_positions_that_count_padding_are_seen(pair, monkeypatch):
    ours, theirs = pair
    tokens, mask = draw_tokens(ours.config, time=12), torch.ones(3, 12, dtype=torch.bool)
    mask[:, :4] = False
    monkeypatch.setattr(gpt_module, "_positions", lambda tokens, mask, seen: torch.arange(tokens.shape[1]))
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        assert (ours(tokens, attention_mask=mask) - expected)[mask].abs().max() > 1e-3


# --- invariances

@given(cuts=st.lists(st.integers(1, 39), max_size=6), seed=st.integers(0, 99), batch=st.integers(1, 3))
@settings(max_examples=25)
def test_cached_in_pieces_is_uncached(pair, cuts, seed, batch):
    ours, _ = pair
    tokens = draw_tokens(ours.config, batch, seed)
    edges = sorted({0, 40, *cuts})
    cache = ours.new_cache()
    with torch.no_grad():
        pieces = [ours(tokens[:, start:end], cache=cache) for start, end in zip(edges, edges[1:])]
        assert cache.length == 40
        assert (torch.cat(pieces, dim=1) - ours(tokens)).abs().max() <= 1e-5


@given(padding=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_padded_and_cached_is_each_alone(pair, padding, seed):
    ours, _ = pair
    tokens = draw_tokens(ours.config, len(padding), seed, time=14)
    mask = torch.arange(14)[None] >= torch.tensor(padding)[:, None]
    cache = ours.new_cache()
    with torch.no_grad():
        first = ours(tokens[:, :8], attention_mask=mask[:, :8], cache=cache)
        rest = [ours(tokens[:, now:now + 1], attention_mask=mask[:, :now + 1], cache=cache) for now in range(8, 14)]
        scores = torch.cat([first, *rest], dim=1)
        for row, skipped in enumerate(padding):
            alone = ours(tokens[row:row + 1, skipped:])
            assert (scores[row, skipped:] - alone[0]).abs().max() <= 1e-5


@given(batch=st.integers(1, 6), time=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_a_batch_is_its_rows_alone(pair, batch, time, seed):
    ours, _ = pair
    tokens = draw_tokens(ours.config, batch, seed, time)
    with torch.no_grad():
        alone = torch.cat([ours(row[None]) for row in tokens])
        assert (ours(tokens) - alone).abs().max() <= 1e-5


def test_no_score_depends_on_a_later_token(pair):
    ours, _ = pair
    tokens = draw_tokens(ours.config, batch=1)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % ours.config.vocab_size
    with torch.no_grad():
        before, after = ours(tokens), ours(changed)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


# --- sizes, initial weights, bad input

@pytest.mark.parametrize("config, count", [
    (GPTConfig.gpt2(), 124_439_808), (GPTConfig.gpt2("medium"), 354_823_168), (GPTConfig.gpt2("large"), 774_030_080),
    (GPTConfig.gpt2("xl"), 1_557_611_200), (GPTConfig.gpt3_175b(), 174_604_259_328),
], ids="small medium large xl 175B".split())
def test_published_sizes(config, count):
    with torch.device("meta"):
        assert GPT(config).num_parameters() == count


@pytest.mark.parametrize("size, published", [("125M", 125e6), ("350M", 350e6), ("760M", 760e6), ("1.3B", 1.3e9),
                                             ("2.7B", 2.7e9), ("6.7B", 6.7e9), ("13B", 13e9), ("175B", 175e9)])
def test_gpt3_sizes_are_what_their_names_say(size, published):
    with torch.device("meta"):
        assert GPT(GPTConfig.gpt3(size)).num_parameters() == pytest.approx(published, rel=0.03)
    assert set(GPT3_SIZES) >= {size} and set(GPT2_SIZES) == {"small", "medium", "large", "xl"}


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, context_length=64, hidden_size=128, num_layers=8, num_heads=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            into_stream = name.endswith(("attention.output.weight", "feed_forward.contract.weight"))
            expected = 0.02 / 4 if into_stream else 0.02  # 2 * 8 contributions, and 4 is the root of 16
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name
    tokens = draw_tokens(model.config)
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.1)
    assert model.head.weight is model.token_embedding.weight


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, context_length=8, hidden_size=16, num_layers=1, num_heads=2, dropout=0.5,
                          embedding_dropout=0.5, attention_dropout=0.5))
    tokens = draw_tokens(model.config)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("context_length", -1), ("hidden_size", 0), ("num_layers", 0), ("num_heads", 0),
    ("num_heads", 7),
    ("inner_size", 0), ("activation", "mish"), ("dropout", 1.0), ("dropout", -0.1), ("embedding_dropout", 2.0),
    ("attention_dropout", float("nan")), ("norm_epsilon", 0.0), ("norm_epsilon", float("nan")),
    ("initializer_range", -0.02), ("end_of_text", 50257), ("end_of_text", -1)])
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}.*expected") as error:
        GPTConfig(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("model_type", "bert"), ("activation_function", "mish"), ("add_cross_attention", True), 
    ("is_encoder_decoder", True),
    ("pruned_heads", {"0": [1]}), ("rope_theta", 1e4), ("quantization_config", {"bits": 4}), ("n_layer", 0)])
def test_a_config_that_cannot_be_represented_is_refused(tmp_path, field, value):
    given = {**transformers.GPT2Config(**SMALL).to_dict(), field: value}
    named = "num_layers" if field == "n_layer" else field
    with pytest.raises(ValueError, match=named) as error:
        GPTConfig.from_huggingface(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [GPTConfig(), GPTConfig.gpt3("13B"), GPTConfig(
    tied_head=False, inner_size=9, activation="relu", scale_by_layer=True, scale_attention=False, end_of_text=5,
    dropout=0.3, embedding_dropout=0.2, attention_dropout=0.1, norm_epsilon=1e-3, initializer_range=0.1),
], ids=["default", "13B", "odd"])
def test_a_config_survives_the_translation(config):
    assert GPTConfig.from_huggingface(config.to_huggingface()) == config


def test_defaults_that_a_config_json_leaves_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = GPTConfig.from_huggingface({"model_type": "gpt2"})
    theirs = GPTConfig.from_huggingface(transformers.GPT2Config().to_dict())
    assert replace(ours, end_of_text=None) == replace(theirs, end_of_text=None)


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="'huge'; expected one of small, medium, large, xl"):
        GPTConfig.gpt2("huge")


@pytest.mark.parametrize("bad", [101, -1, 2**40])
def test_an_id_out_of_range_is_named(pair, bad):
    ours, _ = pair
    with pytest.raises(ValueError, match=f"token id {bad} is out of range; expected 0 to 100"):
        ours(torch.tensor([[1, bad, 2]]))


def test_too_many_tokens_are_refused_with_and_without_cache(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match="41 tokens do not fit context_length 40"):
        ours(torch.zeros(1, 41, dtype=torch.long))
    cache = ours.new_cache()
    ours(torch.zeros(1, 39, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="41 tokens do not fit context_length 40"):
        ours(torch.zeros(1, 2, dtype=torch.long), cache=cache)
    assert cache.length == 39
