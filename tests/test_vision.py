"""Training of picture classifiers: the loss against PyTorch's, averages against a plain loop, runs that go on."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bigmodel.data.augmentation import Affine, PictureBatches, ordered_batches
from bigmodel.models.resnet import ResNet, ResNetConfig
from bigmodel.training.trainer import Trainer, TrainerConfig, accumulate, make_adamw
from bigmodel.training.vision import averaged, averaged_model, classification_loss, count_correct, recompute_norms
from bigmodel.training.watching import in_mode, mean_loss

CONFIG = ResNetConfig(stage_channels=(8, 12), depths=(1, 1), block="basic", stem_channels=8, num_classes=3,
                      num_channels=1)
STEPS = 20


def pictures(count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (count,), generator=generator)
    pixels = torch.randint(80, (count, 1, 16, 16), generator=generator)
    for row, target in enumerate(targets):
        pixels[row, :, 5 * target:5 * target + 5] += 120
    return pixels.to(torch.uint8), targets


def resnet(seed=0):
    torch.manual_seed(seed)
    return ResNet(CONFIG)


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 3))


def picture_trainer(out=None, model=None, batches=None, optimizer=None, mixup=0.0, steps=STEPS, **fields):
    pixels, targets = pictures()
    batches = batches or PictureBatches(pixels, targets, 8, seed=1, augment=Affine(10, 0.1, 0.1, 5), mixup=mixup,
                                        num_classes=3)
    config = TrainerConfig(**{"steps": steps, "learning_rate": 3e-3, "save_every": 5, "log_every": 1,
                              "evaluate_every": 8, **fields})
    return Trainer(model or resnet(), classification_loss(0.1), batches, config, ordered_batches(pixels, targets, 32),
                   out, optimizer=optimizer or averaged(0.8), show=False)


# ---------------------------------------------------------------- the loss and the measure

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_cross_entropy(smoothing, kind):
    torch.manual_seed(0)
    pixels, model = torch.randn(7, 1, 16, 16), plain()
    targets = torch.randint(3, (7,)) if kind == "hard" else torch.randn(7, 3).softmax(1)
    logits, shares = model(pixels), F.one_hot(targets, 3).float() if kind == "hard" else targets
    for training, share in ((True, smoothing), (False, 0.0)):
        total, count = classification_loss(smoothing)(model.train(training), (pixels, targets))
        by_hand = -(((1 - share) * shares + share / 3) * logits.log_softmax(1)).sum()
        torch.testing.assert_close(total, by_hand)
        assert count == 7


def test_unlabelled_pictures_do_not_count():
    pixels, targets, model = torch.randn(6, 1, 16, 16), torch.tensor([0, -100, 2, 1, -100, 1]), plain()
    known = targets != -100
    for measure in (classification_loss(0.1), classification_loss(), count_correct):
        for mode in (True, False):
            got, expected = (measure(model.train(mode), batch)
                             for batch in ((pixels, targets), (pixels[known], targets[known])))
            torch.testing.assert_close(got, expected)
            assert got[1] == 4


def test_parts_add_up_to_the_whole():
    pixels, targets, model = torch.randn(10, 1, 16, 16), torch.randint(3, (10,)), plain()
    whole = classification_loss(0.1)(model, (pixels, targets))
    parts = accumulate(model, classification_loss(0.1), [(pixels[:3], targets[:3]), (pixels[3:], targets[3:])])
    torch.testing.assert_close(parts, (whole[0].detach(), torch.tensor(10.0)))


def test_accuracy_and_outputs_with_logits():
    class Wrapped(nn.Module):
        def forward(self, pixels):
            return type("Output", (), {"logits": pixels.flatten(1)})()
    pixels = torch.eye(4)[[0, 1, 2, 3, 3]].reshape(5, 1, 2, 2)
    targets = torch.tensor([0, 1, 2, 3, 0])
    batches = [(pixels[:2], targets[:2]), (pixels[2:], targets[2:])]
    assert mean_loss(Wrapped(), count_correct, batches) == pytest.approx(0.8)
    assert count_correct(Wrapped(), (pixels, F.one_hot(targets, 4).float()))[0] == 4
    torch.testing.assert_close(classification_loss()(Wrapped(), (pixels, targets))[0],
                               F.cross_entropy(pixels.flatten(1), targets, reduction="sum"))


@pytest.mark.parametrize("make", [classification_loss, averaged])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range(make, value):
    with pytest.raises(ValueError, match=f"is {value}; expected .* from 0 to below 1$"):
        make(value)


# ---------------------------------------------------------------- averages

def sgd(model, config):
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate)


@pytest.mark.parametrize("make", [make_adamw, sgd])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_that_of_a_plain_loop(make, decay):
    trainer, seen = picture_trainer(optimizer=averaged(decay, make)), []
    trainer.state.optimizer.register_step_post_hook(
        lambda *_: seen.append([weight.detach().clone() for weight in trainer.model.parameters()]))
    trainer.fit()
    expected = [torch.zeros_like(weight) for weight in seen[0]]
    for t, weights in enumerate(seen, 1):
        share = max(1 / t, 1 - decay)
        expected = [(1 - share) * mean + share * weight for mean, weight in zip(expected, weights)]
    average = averaged_model(trainer.model, trainer.state.optimizer)
    torch.testing.assert_close(list(average.parameters()), expected)
    assert not average.training and all(weight.grad is None for weight in average.parameters())


def test_far_from_the_start_it_is_pytorchs_own():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5))
    model = nn.ParameterList([weight])
    optimizer, theirs = averaged(0.9, sgd)(model, TrainerConfig(steps=1)), None
    for t in range(1, 41):
        weight.grad = torch.randn(5)
        optimizer.step()
        if t == 10:  # from here on the share is 1 - decay
            theirs = AveragedModel(averaged_model(model, optimizer), multi_avg_fn=get_ema_multi_avg_fn(0.9))
            theirs.update_parameters(averaged_model(model, optimizer))
        elif t > 10:
            theirs.update_parameters(model)
    torch.testing.assert_close(averaged_model(model, optimizer)[0].data, theirs.module[0].data)


@given(decay=st.integers(0, 99).map(lambda n: n / 100), steps=st.integers(1, 60))
@settings(max_examples=40)
def test_weights_that_stand_still_are_their_own_average(decay, steps):
    weight = nn.Parameter(torch.tensor([3.0, -7.0]))
    model = nn.ParameterList([weight])
    optimizer = averaged(decay, sgd)(model, TrainerConfig(steps=1))
    for _ in range(steps):
        weight.grad = torch.zeros(2)
        optimizer.step()
    torch.testing.assert_close(averaged_model(model, optimizer)[0].data, weight.data)


def test_the_training_itself_does_not_change():
    with_average, without = picture_trainer(), picture_trainer(optimizer=make_adamw)
    assert curve(with_average.fit()) == curve(without.fit()) and same(with_average.model, without.model)


def test_the_model_stays_as_it_is_and_frozen_weights_are_copied():
    model = resnet()
    model.stem.requires_grad_(False)
    trainer = picture_trainer(model=model)
    trainer.fit()
    before = copy.deepcopy(model.state_dict())
    average = averaged_model(model, trainer.state.optimizer)
    with torch.no_grad():
        for weight in average.parameters():
            weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    average = averaged_model(model, trainer.state.optimizer)
    assert torch.equal(average.stem.convolution.weight, model.stem.convolution.weight)
    assert not torch.equal(average.head.weight, model.head.weight)
    assert torch.equal(average.stem.norm.running_mean, model.stem.norm.running_mean)


def test_an_average_gets_norms_of_its_own():
    trainer = picture_trainer()
    trainer.fit()
    batches = [trainer.batches[step] for step in range(4)]
    average = averaged_model(trainer.model, trainer.state.optimizer, batches)
    by_hand = averaged_model(trainer.model, trainer.state.optimizer)
    assert torch.equal(by_hand.stem.norm.running_mean, trainer.model.stem.norm.running_mean)
    recompute_norms(by_hand, batches)
    assert same(average, by_hand) and not average.training
    assert not torch.equal(by_hand.stem.norm.running_mean, trainer.model.stem.norm.running_mean)


def test_tied_weights_stay_tied():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    optimizer = averaged(0.5)(model, TrainerConfig(steps=1))
    model[1](model[0](torch.randn(2, 3))).sum().backward()
    optimizer.step()
    average = averaged_model(model, optimizer)
    assert average[0].weight is average[1].weight and average[0].weight is not model[0].weight


@pytest.mark.parametrize("optimizer", [make_adamw, averaged()])
def test_no_averages(optimizer):
    trainer = picture_trainer(optimizer=optimizer)
    if optimizer is make_adamw:
        trainer.fit()
    with pytest.raises(ValueError, match="keeps no averages of this model; expected one made by averaged,") as error:
        averaged_model(trainer.model, trainer.state.optimizer)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- runs that go on

class Stop(Exception):
    pass


class StopAt:
    def __init__(self, n, batches):
        self.n, self.batches = n, batches

    def __getitem__(self, n):
        if n == self.n:
            raise Stop
        return self.batches[n]


def curve(rows):
    names = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm")
    return [tuple(row[name] for name in names) for row in rows]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def interrupted(out, **kind):
    """A run that dies at step 13, three after its last checkpoint, and is taken up by another process's objects."""
    broken = picture_trainer(out, **kind)
    broken.batches = StopAt(13, broken.batches)
    with pytest.raises(Stop):
        broken.fit()
    again = picture_trainer(out, model=resnet(seed=9), **kind)
    return again, again.fit(resume=True)


@pytest.mark.parametrize("mixup", [0.0, 0.2])
@pytest.mark.parametrize("make", [make_adamw, sgd])
def test_a_resumed_run_has_the_same_averages(tmp_path, mixup, make):
    whole = picture_trainer(mixup=mixup, optimizer=averaged(0.8, make))
    rows = whole.fit()
    again, resumed = interrupted(tmp_path, mixup=mixup, optimizer=averaged(0.8, make))
    assert curve(resumed) == curve(rows) and same(again.model, whole.model)
    assert same(*(averaged_model(each.model, each.state.optimizer) for each in (again, whole)))


def test_averages_kept_elsewhere_do_not_survive(tmp_path):  # why they are part of the optimizer's state
    class Beside:
        """The usual way: a second model beside the optimizer."""

        def __call__(self, model, config):
            self.average, optimizer = copy.deepcopy(model), make_adamw(model, config)
            optimizer.register_step_post_hook(lambda *_: self.update(model))
            return optimizer

        @torch.no_grad()
        def update(self, model):
            for mean, weight in zip(self.average.parameters(), model.parameters()):
                mean.lerp_(weight, 0.2)
    whole, broken = Beside(), Beside()
    picture_trainer(optimizer=whole).fit()
    interrupted(tmp_path, optimizer=broken)
    assert not same(whole.average, broken.average)


def test_a_second_fit_forgets_the_averages(tmp_path):
    trainer = picture_trainer(tmp_path)
    trainer.fit()
    fresh = picture_trainer(tmp_path, model=copy.deepcopy(trainer.model), steps=1)
    fresh.fit(overwrite=True)
    torch.testing.assert_close(list(averaged_model(fresh.model, fresh.state.optimizer).parameters()),
                               list(fresh.model.parameters()))


def test_the_folder_of_a_run_can_hold_the_average(tmp_path):
    trainer = picture_trainer(tmp_path)

    def save_average(folder):
        if trainer.state.step:
            averaged_model(trainer.model, trainer.state.optimizer).save_pretrained(folder)
    trainer.folder.save_extra = save_average
    trainer.fit()
    average = averaged_model(trainer.model, trainer.state.optimizer)
    assert same(ResNet.from_pretrained(tmp_path), average) and not same(average, trainer.model)


# ---------------------------------------------------------------- batch norms measured anew

def test_norms_are_the_mean_over_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm2d(2, momentum=None))
    batches = [(torch.randn(n, 2, 3, 3) * 4 + 1, None) for n in (5, 9, 2)]
    model.train()
    model(batches[0][0])
    recompute_norms(model, batches)
    torch.testing.assert_close(model[0].running_mean, sum(x.mean((0, 2, 3)) for x, _ in batches) / 3)
    torch.testing.assert_close(model[0].running_var, sum(x.var((0, 2, 3)) for x, _ in batches) / 3)
    assert [model[0].momentum, model[2].momentum] == [0.3, None] and all(module.training for module in model.modules())
    torch.testing.assert_close(model[2].running_mean, torch.zeros(2), atol=1e-5, rtol=0)  # no dropout went before it


def test_norms_without_batches_and_models_without_norms():
    with pytest.raises(ValueError, match="have seen no batch; expected batches of training pictures"):
        recompute_norms(resnet(), [])
    model = plain()
    before = copy.deepcopy(model)
    recompute_norms(model, [])
    assert same(model, before)


def test_recomputed_norms_do_without_batches_that_have_been():
    pixels, targets = pictures()
    batches, first = ordered_batches(pixels, targets, 10), resnet()
    second = copy.deepcopy(first)
    with in_mode(second, True), torch.no_grad():
        second(next(iter(batches))[0] * 100)
    recompute_norms(first, batches)
    recompute_norms(second, batches)
    assert same(first, second)


# ---------------------------------------------------------------- what the record says

RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "digits.json"


@pytest.mark.skipif(not RECORD.exists(), reason="benchmarks/digits.py has not been run")
def test_the_record_keeps_the_promise():
    results = json.loads(RECORD.read_text(encoding="utf-8"))["results"]
    ours, svc = results["models"]["ResNet"], results["models"]["SVC"]
    assert len(ours["accuracy"]) >= 3 and sorted(ours["accuracy"])[len(ours["accuracy"]) // 2] >= 0.985
    assert max(ours["seconds"]) <= 60 and svc["accuracy"] == [pytest.approx(0.9689, abs=5e-5)]
