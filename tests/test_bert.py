"""BERT: parity with transformers in both directions, invariances, refusals, and controls that must turn red."""

import random

import pytest
import torch
from torch.nn import functional as F

import bigmodel.models.attention as attention
import bigmodel.models.bert as bert
from bigmodel.core import read_json, write_json
from bigmodel.models.bert import (
    Bert,
    BertConfig,
    BertEncoder,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bigmodel.models.checkpoint import read_tensors, write_tensors

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

KINDS = [Bert, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering]
TINY = BertConfig(vocab_size=40, context_length=10, hidden_size=12, num_layers=2, num_heads=3, inner_size=20,
                  num_segments=2, num_classes=3, initializer_range=0.3)
PAIR = BertConfig(**vars(TINY) | {"num_classes": 2})


def settings(seed):
    """A config of transformers that is unlike the default in everything."""
    choose = random.Random(seed)
    heads = choose.choice([1, 2, 3, 4])
    return dict(
        vocab_size=choose.randint(30, 90), hidden_size=heads * choose.choice([4, 6, 8]), num_attention_heads=heads,
        num_hidden_layers=choose.randint(1, 3), intermediate_size=choose.randint(7, 50),
        max_position_embeddings=choose.randint(9, 20),
        type_vocab_size=choose.randint(1, 4), hidden_act=choose.choice(["gelu", "gelu_new", "relu", "silu"]),
        layer_norm_eps=choose.choice([1e-12, 1e-5, 1e-3]), initializer_range=0.3, pad_token_id=choose.choice([0, 1]))


def reference(kind, seed, megatron=False, **changes):
    """A model of transformers with random weights, biases and norms included."""
    name = "BertModel" if kind is Bert else kind.__name__
    prefix = "Megatron" if megatron else ""
    config = getattr(transformers, prefix + "BertConfig")(**settings(seed) | changes)
    if kind in (BertForSequenceClassification, BertForTokenClassification):
        config.num_labels = 2 + seed % 3
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + name)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "LayerNorm.weight" in name else 0.0, std=0.2)
    return model


def inputs(config):
    """Tokens, segments and a mask: one text of full length and one that is padded."""
    time = config.max_position_embeddings
    tokens = torch.randint(config.vocab_size, (2, time))
    segments = torch.randint(config.type_vocab_size, (2, time))
    return tokens, segments, torch.arange(time) < torch.tensor([[time], [time - 4]])


def scores(output, kind):
    """What transformers calls logits, in our form."""
    return torch.stack(output[:2], dim=-1) if kind is BertForQuestionAnswering else output[0]


def real(values, mask):
    """The values at real tokens."""
    return values if values.dim() == 2 else values[mask]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_same_scores_and_gradients_as_transformers(kind, seed, tmp_path):
    theirs = reference(kind, seed, tie_word_embeddings=seed != 4)
    theirs.save_pretrained(tmp_path)
    ours = kind.from_pretrained(tmp_path)
    tokens, segments, mask = inputs(theirs.config)
    found = real(ours(tokens, segments, mask), mask)
    output = theirs(input_ids=tokens, token_type_ids=segments, attention_mask=mask)
    wanted = real(scores(output, kind), mask)
    assert (found - wanted).abs().max() <= 1e-5
    weights = torch.randn_like(wanted)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    pairs = [(ours.encoder.token_embedding.weight, theirs.get_input_embeddings().weight),
             (ours.encoder.blocks[0].feed_forward.expand.weight,
              theirs.base_model.encoder.layer[0].intermediate.dense.weight)]
    for mine, yours in pairs:
        assert (mine.grad - yours.grad).abs().max() <= 1e-4 * max(1.0, yours.grad.abs().max().item())


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification, BertForQuestionAnswering])
def test_norms_first_as_in_megatron(kind, tmp_path):
    theirs = reference(kind, 1, megatron=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = kind.from_pretrained(tmp_path / "theirs")
    assert ours.config.norm_first
    tokens, segments, mask = inputs(theirs.config)
    wanted = scores(theirs(input_ids=tokens, token_type_ids=segments, attention_mask=mask), kind)
    assert (real(ours(tokens, segments, mask), mask) - real(wanted, mask)).abs().max() <= 1e-5
    ours.save_pretrained(tmp_path / "ours")
    _, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())


AUTO = {Bert: "AutoModel", BertForMaskedLM: "AutoModelForMaskedLM",
        BertForSequenceClassification: "AutoModelForSequenceClassification",
        BertForTokenClassification: "AutoModelForTokenClassification",
        BertForQuestionAnswering: "AutoModelForQuestionAnswering"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_save(kind, tied, tmp_path):
    torch.manual_seed(0)
    classes = 2 if kind is BertForQuestionAnswering else 3
    labels = None if classes == 2 else ("bad", "so so", "good")
    config = BertConfig(**{**vars(TINY), "num_classes": classes, "labels": labels, "tied_decoder": tied})
    ours = kind(config).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(transformers, AUTO[kind]).from_pretrained(tmp_path, output_loading_info=True)
    left = {problem: [name for name in names if name != "cls.predictions.bias"] for problem, names in report.items()}
    assert not any(left.values())  # an untied decoder never uses that bias
    tokens = torch.randint(40, (2, 10))
    assert (scores(theirs.eval()(tokens), kind) - ours(tokens)).abs().max() <= 1e-5
    assert kind.from_pretrained(tmp_path).config == config
    if labels:
        assert theirs.config.id2label == dict(enumerate(labels))


def test_a_pretraining_checkpoint_of_former_times_serves_every_head_that_it_has(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**settings(3))).eval()
    theirs.save_pretrained(tmp_path)
    stored, _ = read_tensors(tmp_path / "model.safetensors")
    aged = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in stored.items()}
    assert aged.keys() != stored.keys()
    write_tensors(tmp_path / "model.safetensors", aged)
    tokens, segments, mask = inputs(theirs.config)
    with torch.no_grad():
        words = theirs(input_ids=tokens, token_type_ids=segments, attention_mask=mask).prediction_logits
        hidden = theirs.bert(input_ids=tokens, token_type_ids=segments, attention_mask=mask)
    filler, encoder = BertForMaskedLM.from_pretrained(tmp_path), Bert.from_pretrained(tmp_path)
    assert (filler(tokens, segments, mask) - words)[mask].abs().max() <= 1e-5
    found = encoder(tokens, segments, mask)
    assert (found - hidden.last_hidden_state)[mask].abs().max() <= 1e-5
    assert (encoder.pool(found) - hidden.pooler_output).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="classifier.weight is missing"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_the_base_model_gives_its_weights_without_a_prefix(tmp_path):
    theirs = reference(Bert, 2)
    theirs.save_pretrained(tmp_path)
    assert not any(name.startswith("bert.") for name in read_tensors(tmp_path / "model.safetensors")[0])
    tokens, segments, mask = inputs(theirs.config)
    ours = Bert.from_pretrained(tmp_path)
    assert (ours(tokens) - theirs(tokens).last_hidden_state).abs().max() <= 1e-5


# --- invariances

def test_padding_changes_nothing_and_batches_do_not_mix():
    torch.manual_seed(0)
    model = BertForTokenClassification(TINY).eval()
    texts = [torch.randint(1, 40, (length,)) for length in (10, 3, 1, 7)]
    batch = torch.stack([F.pad(text, (0, 10 - len(text))) for text in texts])
    mask = torch.arange(10) < torch.tensor([[len(text)] for text in texts])
    together = model(batch, attention_mask=mask)
    for row, text in enumerate(texts):
        assert (together[row, :len(text)] - model(text[None])[0]).abs().max() <= 1e-5


def test_without_the_mask_padding_shows():
    torch.manual_seed(0)
    model = BertForTokenClassification(TINY).eval()
    text = torch.randint(1, 40, (1, 4))
    assert (model(F.pad(text, (0, 6)))[:, :4] - model(text)).abs().max() > 1e-2


def test_scores_at_some_positions_are_those_of_all():
    model = BertForMaskedLM(TINY).eval()
    tokens = torch.randint(40, (3, 10))
    chosen = torch.rand(3, 10) < 0.3
    assert torch.allclose(model.score(model.encoder(tokens)[chosen]), model(tokens)[chosen], atol=1e-6)


def test_a_new_head_takes_over_what_the_encoder_has_learned():
    torch.manual_seed(0)
    filler = BertForMaskedLM(TINY)
    before = {name: tensor.clone() for name, tensor in filler.encoder.state_dict().items()}
    classifier = BertForSequenceClassification(TINY, encoder=filler.encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.encoder.state_dict().items())


def test_evaluation_is_deterministic_and_training_drops_out():
    model = BertForSequenceClassification(TINY)
    tokens = torch.randint(40, (2, 10))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(("config", "size"), [(BertConfig(), 109_482_240), (BertConfig.large(), 335_141_888)])
def test_published_sizes(config, size):
    with torch.device("meta"):
        assert Bert(config).num_parameters() == size == transformers.BertModel(
            transformers.BertConfig(**{key: value for key, value in config.to_huggingface().items()
                                       if key in transformers.BertConfig().to_dict()})).num_parameters()


# --- refusals

@pytest.mark.parametrize(("field", "value", "message"), [
    ("is_decoder", True, "is_decoder"), ("position_embedding_type", "relative_key", "position_embedding_type"),
    ("hidden_act", "mish", "mish"), ("model_type", "roberta", "roberta"), ("rope_theta", 1e4, "rope_theta")])
def test_a_config_that_cannot_be_honoured_is_refused(field, value, message, tmp_path):
    BertForMaskedLM(TINY).save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {field: value})
    with pytest.raises(ValueError, match=message) as error:
        BertForMaskedLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("tokens", "segments", "message"), [
    (torch.zeros(1, 11, dtype=torch.long), None, "11 tokens do not fit"),
    (torch.zeros(1, 0, dtype=torch.long), None, "0 tokens do not fit"),
    (torch.full((1, 3), 40), None, "token id 40"), (torch.full((1, 3), -1), None, "token id -1"),
    (torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), 2), "segment 2")])
def test_inputs_out_of_range_are_named(tokens, segments, message):
    with pytest.raises(ValueError, match=message):
        BertEncoder(TINY)(tokens, segments)


@pytest.mark.parametrize(("mask", "message"), [
    (torch.ones(1, 3), "torch.float32"), (torch.ones(1, 3, dtype=torch.long), "torch.int64"),
    (torch.ones(1, 2, dtype=torch.bool), r"\(1, 2\)"), (torch.tensor([[False, True, True]]), "padding on the right")])
def test_masks_of_another_kind_are_refused(mask, message):
    encoder = BertEncoder(TINY)
    forward = getattr(BertEncoder.forward, "__wrapped__", BertEncoder.forward)  # without the checks of the tests
    with pytest.raises(ValueError, match=message):
        forward(encoder, torch.zeros(1, 3, dtype=torch.long), None, mask)


def test_questions_have_two_scores():
    with pytest.raises(ValueError, match="num_classes is 3; expected 2"):
        BertForQuestionAnswering(TINY)


@pytest.mark.parametrize("changes", [{"vocab_size": 41}, {"hidden_size": 15}, {"num_layers": 1}, {"norm_first": True}])
def test_an_encoder_of_another_shape_is_refused(changes):
    with pytest.raises(ValueError, match="another config"):
        BertForMaskedLM(BertConfig(**vars(TINY) | changes), encoder=BertEncoder(TINY))


def test_a_lone_encoder_has_the_weights_that_the_config_asks_for():
    torch.manual_seed(0)
    encoder = BertEncoder(BertConfig(**vars(TINY) | {"initializer_range": 0.02}))
    assert 0.015 < encoder.token_embedding.weight.std() < 0.025


@pytest.mark.parametrize("changes", [
    {"num_layers": 0}, {"padding": 99}, {"num_classes": 0}, {"num_segments": 0},
    {"num_classes": 2, "labels": ("one",)}, {"num_classes": 2, "labels": ("twin", "twin")}])
def test_nonsense_settings_are_refused(changes):
    with pytest.raises(ValueError):
        BertConfig(**vars(TINY) | changes)


def test_weights_of_another_head_are_named(tmp_path):
    BertForQuestionAnswering(BertConfig(**vars(TINY) | {"num_classes": 2})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier.weight is missing"):
        BertForTokenClassification.from_pretrained(tmp_path)


# --- controls: each breakage must be seen by the comparison above

def broken(monkeypatch, how):
    """Break the model in one of the ways that parity must notice."""
    embed, block = BertEncoder._embed, bert.TransformerBlock
    if how == "no segments":
        monkeypatch.setattr(BertEncoder, "_embed", lambda self, tokens, segments=None: embed(self, tokens))
    elif how == "norm first":
        monkeypatch.setattr(bert, "TransformerBlock", lambda *sizes, **options: block(*sizes, **options | {
            "norm_first": True}))
    elif how == "causal":
        monkeypatch.setattr(bert, "TransformerBlock", lambda *sizes, **options: block(*sizes, **options, causal=True))
    elif how == "query and key swapped":
        names = {name: bert.Joined((entry.names[1], entry.names[0], entry.names[2]))
                 if isinstance(entry, bert.Joined) else entry for name, entry in bert._NAMES.items()}
        monkeypatch.setattr(bert, "_NAMES", names)
    elif how == "exact gelu":
        monkeypatch.setitem(attention._OTHER_NAMES, "gelu_new", "gelu")


@pytest.mark.parametrize("how", ["no segments", "norm first", "causal", "query and key swapped", "exact gelu"])
def test_parity_notices(how, monkeypatch, tmp_path):
    theirs = reference(BertForTokenClassification, 5, hidden_act="gelu_new", type_vocab_size=2)
    theirs.save_pretrained(tmp_path)
    tokens, segments, mask = inputs(theirs.config)
    wanted = theirs(input_ids=tokens, token_type_ids=segments, attention_mask=mask).logits[mask]
    ours = BertForTokenClassification.from_pretrained(tmp_path)
    assert (ours(tokens, segments, mask)[mask] - wanted).abs().max() <= 1e-5
    broken(monkeypatch, how)
    ours = BertForTokenClassification.from_pretrained(tmp_path)
    assert (ours(tokens, segments, mask)[mask] - wanted).abs().max() > 1e-5
