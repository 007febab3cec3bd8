"""Transfer: what is frozen stays as it is to the last bit, probes against scikit-learn's, heads for others to load."""

import copy

import numpy as np
import pytest
import torch
from test_vision import CONFIG, Stop, StopAt, curve, picture_trainer, pictures, resnet, same
from torch import nn

from bigmodel.data.augmentation import ordered_batches
from bigmodel.models.resnet import ResNet
from bigmodel.models.vgg import VGG, VGGConfig
from bigmodel.training.trainer import TrainerConfig
from bigmodel.training.transfer import extract_features, fit_probe, freeze, rates_by_part, replace_head, unfreeze
from bigmodel.training.vision import averaged, averaged_model


def changed(before, model):
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


def vgg():
    torch.manual_seed(0)
    return VGG(VGGConfig(stages=((4, 1), (8, 1)), hidden_size=12, pooled_size=2, num_channels=1, batch_norm=True,
                         num_classes=3, dropout=0.5))


# ---------------------------------------------------------------- freezing

@pytest.mark.parametrize("make", [resnet, vgg])
def test_what_is_frozen_stays_as_it_is(make):
    model = freeze(make())
    before = copy.deepcopy(model.state_dict())
    picture_trainer(model=model, optimizer=rates_by_part({"head": 1.0})).fit()
    assert changed(before, model) == ["head.weight", "head.bias"]


def test_switching_off_gradients_alone_lets_the_norms_drift():  # the control of the test above
    model = resnet().requires_grad_(False)
    model.head.requires_grad_()
    before = copy.deepcopy(model.state_dict())
    picture_trainer(model=model).fit()
    assert "stem.norm.running_mean" in changed(before, model)


def test_parts_that_go_on_learning_go_on_with_their_norms():
    model = freeze(resnet(), keep=("stages.1", "head"))
    before = copy.deepcopy(model.state_dict())
    picture_trainer(model=model).fit()
    names = changed(before, model)
    assert "stages.1.0.path.0.norm.running_mean" in names and "head.bias" in names
    assert all(name.startswith(("stages.1.", "head.")) for name in names)


def test_frozen_dropout_is_off_and_the_rest_is_on():
    model, x = freeze(vgg(), keep=("hidden.3", "head")).train(), torch.randn(2, 1, 16, 16)
    model(x)
    assert [module.training for module in model.hidden] == [False, True, True, True, True, True]  # partly frozen
    model = freeze(vgg()).train()
    assert torch.equal(model.encode(x), model.encode(x))


def test_a_copy_of_a_frozen_model_is_frozen_and_can_be_let_go():
    model = copy.deepcopy(freeze(resnet())).train()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 1, 16, 16))
    assert changed(before, model) == [] and [p.requires_grad for p in model.stem.parameters()] == [False] * 3
    assert unfreeze(model) is model and all(p.requires_grad for p in model.parameters())
    model(torch.randn(4, 1, 16, 16))
    assert "stem.norm.running_mean" in changed(before, model) and all(module.training for module in model.modules())


def test_freezing_twice_is_freezing_anew():
    model = freeze(freeze(resnet()), keep=("stages",))
    assert not model.head.weight.requires_grad and model.stages[0][0].path[0].convolution.weight.requires_grad
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    freeze(model, keep=("stages",))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks and max(hooks) == 1


def test_a_frozen_run_resumes(tmp_path):
    def trainer(out):
        return picture_trainer(out, freeze(resnet(), ("stages.1", "head")),
                               optimizer=averaged(0.8, rates_by_part({"": 0.1, "head": 1.0})))
    whole, broken = trainer(None), trainer(tmp_path)
    rows = whole.fit()
    broken.batches = StopAt(13, broken.batches)
    with pytest.raises(Stop):
        broken.fit()
    again = trainer(tmp_path)
    assert curve(again.fit(resume=True)) == curve(rows) and same(again.model, whole.model)
    assert same(*(averaged_model(each.model, each.state.optimizer) for each in (again, whole)))


@pytest.mark.parametrize("part", ["heads", "pool", "stages.7", "head.weight.x"])
def test_a_part_that_is_not_there(part):
    model = resnet()
    for attempt in (lambda: freeze(model, (part,)), lambda: rates_by_part({part: 1.0})(model, TrainerConfig(steps=1))):
        with pytest.raises(ValueError, match=f"no weights belong to '{part}'; the model's parts are stem, ") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------- features and probes

def test_features_are_what_the_head_takes():
    pixels, targets = pictures()
    batches, model = ordered_batches(pixels, targets, 8), resnet()
    model(next(iter(batches))[0])  # so that its norms have seen something
    before = copy.deepcopy(model.state_dict())
    features, labels = extract_features(model.train(), batches)
    assert model.training and changed(before, model) == [] and torch.equal(labels, targets)
    assert not features.requires_grad
    whole = next(iter(ordered_batches(pixels, targets, 100)))[0]
    torch.testing.assert_close(model.eval().head(features), model(whole))
    with pytest.raises(ValueError, match="no pictures; expected batches"):
        extract_features(model, [])


def blobs(count=120, size=6, classes=4):
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(count) % classes
    centres = torch.randn(classes, size, generator=generator)
    return centres[targets] + torch.randn(count, size, generator=generator), targets


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_a_probe_is_scikit_learns_logistic_regression(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = blobs()
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).numpy().astype(np.float64)
    theirs = linear_model.LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit(standard, targets.numpy())
    with torch.no_grad():
        ours = fit_probe(features, targets, 4, penalty)(features).softmax(1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.predict_proba(standard)).float(), atol=1e-4, rtol=0)


def test_a_probe_does_not_mind_units_or_features_that_never_change():
    features, targets = blobs()
    strange = torch.cat([features * torch.tensor([1e-3, 1, 1e3, 1, 1, 50]) + 7, torch.full((120, 1), 3.0)], 1)
    with torch.no_grad():
        torch.testing.assert_close(fit_probe(features, targets, 4)(features), fit_probe(strange, targets, 4)(strange),
                                   atol=1e-2, rtol=0)


def test_a_probe_of_one_picture_per_class_and_of_a_class_without_pictures():
    features, targets = torch.eye(3) * 5, torch.arange(3)
    probe = fit_probe(features, targets, 5)
    assert probe(features).argmax(1).tolist() == [0, 1, 2] and probe.weight.shape == (5, 3)
    assert all(weight.isfinite().all() for weight in probe.parameters())
    with pytest.raises(ValueError, match="the targets go from 0 to 2; expected 0 to 1"):
        fit_probe(features, targets, 2)


def test_fitting_a_probe_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    fit_probe(*blobs(), 4)
    assert torch.rand(1) == expected


# ---------------------------------------------------------------- heads

def test_a_new_head_leaves_the_rest_and_the_old_model():
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    new = replace_head(model, 2, ("cat", "dog"))
    assert changed(before, model) == [] and model.config == CONFIG and new.config.labels == ("cat", "dog")
    assert new.head.weight.shape == (2, 12) and not new.head.weight.any() and new.head.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in new.state_dict().items() if "head" not in name)


def test_a_probe_becomes_a_head_that_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    pixels, targets = pictures()
    model = resnet()
    model(next(iter(ordered_batches(pixels, targets, 50)))[0])
    features, labels = extract_features(model, ordered_batches(pixels, targets, 16))
    ours = replace_head(model, 3, ("top", "middle", "bottom"), fit_probe(features, labels, 3)).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = next(iter(ordered_batches(pixels, targets, 9)))[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x), atol=1e-5, rtol=0)
    assert theirs.config.id2label[2] == "bottom" and same(ResNet.from_pretrained(tmp_path), ours)


@pytest.mark.parametrize("head", [nn.Linear(5, 3), nn.Linear(12, 4)])
def test_a_head_that_does_not_fit(head):
    with pytest.raises(ValueError, match=r"the new head goes from \d+ to \d numbers; expected 12 to 3"):
        replace_head(resnet(), 3, head=head)
    with pytest.raises(ValueError, match="2 different labels for 3 classes"):
        replace_head(resnet(), 3, ("a", "b"))


# ---------------------------------------------------------------- a learning rate for each part

def test_each_part_moves_at_its_own_rate():
    model, config = resnet(), TrainerConfig(steps=1, learning_rate=1e-2, weight_decay=0.0)
    optimizer = rates_by_part({"": 0.01, "stages": 0.1, "stages.1": 0.5, "head": 1.0})(model, config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()  # the first step of Adam is as long as the learning rate
    rates = {"stem": 1e-4, "stages.0": 1e-3, "stages.1": 5e-3, "head": 1e-2}
    for name, weight in model.named_parameters():
        rate = next(rate for part, rate in rates.items() if name.startswith(part))
        torch.testing.assert_close(before[name] - weight.detach(), torch.full_like(weight, rate), rtol=2e-3, atol=1e-7)


def test_norms_and_biases_do_not_decay_in_any_part():
    optimizer = rates_by_part({"": 0.1, "head": 1.0})(resnet(), TrainerConfig(steps=1, weight_decay=0.3))
    decays = {group["params"][0].ndim > 1: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {True: 0.3, False: 0.0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(resnet().parameters()))


def test_every_weight_that_learns_needs_a_rate():
    with pytest.raises(ValueError, match="no learning rate for stem.convolution.weight; expected a part"):
        rates_by_part({"head": 1.0})(resnet(), TrainerConfig(steps=1))
    assert len(rates_by_part({"head": 1.0})(freeze(resnet()), TrainerConfig(steps=1)).param_groups) == 2
