"""Scores of classifiers: scikit-learn's numbers, missing classes, error bars, confidence, maps, and bad input."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn

from bigmodel.evaluation import classification
from bigmodel.evaluation.classification import (
    ClassificationScore,
    calibration,
    compare,
    confusion_matrix,
    fit_temperature,
    per_class,
    plot_confusion,
    predict,
    top_k_accuracy,
    wilson_interval,
    worst_mistakes,
    write_report,
)
from bigmodel.evaluation.saliency import grad_cam

scipy_stats = pytest.importorskip("scipy.stats")  # comes with scikit-learn


def random_score(seed: int, examples: int = 300, classes: int = 7, skill: float = 1.5) -> ClassificationScore:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (examples,), generator=generator)
    logits = torch.randn(examples, classes, generator=generator)
    logits[range(examples), targets] += skill
    return ClassificationScore(logits, targets)


answers = st.integers(2, 6).flatmap(lambda classes: st.tuples(
    st.just(classes), st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=60)))


# --- the numbers of scikit-learn

@given(answers)
def test_confusion_and_classes_are_scikit_learns(drawn):
    classes, pairs = drawn
    targets, said = (torch.tensor(side) for side in zip(*pairs))
    confusion = confusion_matrix(said, targets, classes)
    labels = list(range(classes))
    assert np.array_equal(confusion, metrics.confusion_matrix(targets, said, labels=labels))
    theirs = metrics.precision_recall_fscore_support(targets, said, labels=labels, zero_division=np.nan)
    rows = per_class(confusion)
    for ours, other in zip((rows.precision, rows.recall, rows.f1, rows.examples), theirs):
        assert np.allclose(ours, other, equal_nan=True)
    assert rows.macro_f1 == pytest.approx(metrics.f1_score(targets, said, labels=labels, average="macro",
                                                           zero_division=np.nan))
    transposed = confusion_matrix(targets, said, classes)  # negative control: true and said exchanged
    assert torch.equal(transposed, confusion.T)
    if not torch.equal(confusion, confusion.T):
        assert not np.array_equal(transposed, metrics.confusion_matrix(targets, said, labels=labels))


@pytest.mark.parametrize("seed", range(5))
def test_score_is_scikit_learns(seed):
    score = random_score(seed)
    assert score.accuracy == pytest.approx(metrics.accuracy_score(score.targets, score.predictions))
    assert float(score.losses.mean()) == pytest.approx(metrics.log_loss(score.targets, score.probabilities), rel=1e-9)
    for k in (1, 2, 5, 7):
        theirs = metrics.top_k_accuracy_score(score.targets, score.logits, k=k) if k < 7 else 1.0
        assert top_k_accuracy(score, k) == pytest.approx(theirs)
    assert torch.equal(score.confusion, confusion_matrix(score.predictions, score.targets, 7))


def test_class_never_said_and_class_never_there():
    rows = per_class(torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]))
    assert rows.precision.isnan().tolist() == [False, False, True, True], "class 2 is never said, class 3 neither"
    assert rows.recall.isnan().tolist() == [False, True, False, True], "class 1 is absent, class 3 too"
    assert rows.f1[:3].tolist() == [2 * 3 / 9, 0, 0] and rows.f1[3].isnan()
    assert rows.macro_f1 == pytest.approx((2 * 3 / 9 + 0 + 0) / 3), "what is neither there nor said does not count"


def test_mistakes_come_worst_first_and_are_mistakes():
    score = random_score(1)
    found = worst_mistakes(score)
    assert len(found) == int((~score.correct).sum()) and not score.correct[found].any()
    assert (score.losses[found].diff() <= 0).all() and worst_mistakes(score, 3) == found[:3]
    assert worst_mistakes(random_score(1, skill=100.0)) == []


def test_ties_go_to_the_first_class_everywhere():
    score = ClassificationScore(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
    assert score.predictions.tolist() == [0, 0, 0]
    assert [top_k_accuracy(score, k) for k in (1, 2, 3)] == [pytest.approx(k / 3) for k in (1, 2, 3)]


# --- error bars

@given(st.integers(1, 3000), st.integers(0, 3000), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys(trials, successes, level):
    successes = min(successes, trials)
    theirs = scipy_stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    low, high = wilson_interval(successes, trials, level)
    assert (low, high) == (pytest.approx(theirs.low, abs=1e-9), pytest.approx(theirs.high, abs=1e-9))
    assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_nonsense(successes, trials):
    with pytest.raises(ValueError, match="expected 1 trial"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize("seed", range(4))
def test_compare_is_the_exact_test(seed):
    first = random_score(seed, skill=2.0)
    noise = torch.randn(first.logits.shape, generator=torch.Generator().manual_seed(seed + 100))
    second = ClassificationScore(first.logits + 2 * noise, first.targets)
    found = compare(first, second)
    exact = scipy_stats.binomtest(found.only_first, found.only_first + found.only_second, 0.5)
    assert found.p_value == pytest.approx(exact.pvalue)
    assert found.difference == pytest.approx(first.accuracy - second.accuracy)
    assert found.interval[0] < found.difference < found.interval[1]
    back = compare(second, first)
    assert (back.only_first, back.p_value) == (found.only_second, pytest.approx(found.p_value))


def test_compare_of_equals_and_of_others():
    score = random_score(0)
    same = compare(score, score)
    assert (same.p_value, same.difference, same.interval) == (1.0, 0.0, (0.0, 0.0))
    with pytest.raises(ValueError, match="different examples"):
        compare(score, random_score(1))
    with pytest.raises(ValueError, match="different examples"):
        compare(score, random_score(0, examples=10))


def test_compare_of_very_many_examples_stays_finite():
    targets = torch.zeros(60_000, dtype=torch.long)
    first = torch.tensor([[1.0, 0.0]]).repeat(60_000, 1)
    second = first.clone()
    second[:30_000] = second[:30_000].flip(1)
    first[30_000:] = first[30_000:].flip(1)
    assert compare(ClassificationScore(first, targets), ClassificationScore(second, targets)).p_value == 1.0


# --- confidence

def test_calibration_counts_every_example_once():
    score = random_score(2)
    table = calibration(score, bins=10)
    assert int(table.examples.sum()) == len(score.targets)
    some = table.examples > 0
    right = float((table.accuracy[some] * table.examples[some]).sum())
    assert right / len(score.targets) == pytest.approx(score.accuracy)
    assert table.accuracy[~some].isnan().all() and not math.isnan(table.error)


def test_calibration_error_by_the_formula():
    score = random_score(3)
    confidence, right = score.probabilities.amax(1).numpy(), score.correct.numpy()
    wanted = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            wanted += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration(score).error == pytest.approx(wanted)


def test_certain_answers_fall_into_the_last_bin():
    score = ClassificationScore(torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 0]))
    table = calibration(score, bins=5)
    assert table.examples.tolist() == [0, 0, 0, 0, 2] and table.error == pytest.approx(0.5)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_temperature_is_found_again(factor):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator) * 2
    targets = logits.double().softmax(-1).multinomial(1, generator=generator)[:, 0]
    found = fit_temperature(ClassificationScore(logits * factor, targets))
    assert found == pytest.approx(factor, rel=0.05)
    losses = [float(ClassificationScore(logits * factor / (found * change), targets).losses.mean())
              for change in (1, 0.9, 1.1)]
    assert losses[0] < min(losses[1:]), "the fitted temperature must have the lowest loss"


def test_temperature_stays_finite_where_there_is_no_best():
    all_right = ClassificationScore(torch.eye(3) * 5, torch.arange(3))
    all_alike = ClassificationScore(torch.zeros(3, 3), torch.arange(3))
    all_wrong = ClassificationScore(torch.eye(3) * 5, torch.tensor([1, 2, 0]))
    for score in (all_right, all_alike, all_wrong):
        assert 1e-3 <= fit_temperature(score) <= 1.001e3
    assert fit_temperature(all_right) < 0.5 and fit_temperature(all_wrong) > 100


# --- bad input

@pytest.mark.parametrize(("logits", "targets", "labels", "says"), [
    (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), None, "at least one"),
    (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.tensor([0, 1]), None, "number 1"),
    (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), None, "not finite"),
    (torch.zeros(2, 2), torch.tensor([0, 2]), None, "expected 0 to 1"),
    (torch.zeros(2, 2), torch.tensor([-100, 1]), None, "from -100"),
    (torch.zeros(2, 2), torch.tensor([0, 1]), ("a", "b", "c"), "3 labels for 2 classes"),
])
def test_scores_of_nonsense(logits, targets, labels, says):
    with pytest.raises(ValueError, match=says) as error:
        ClassificationScore(logits, targets, labels)
    assert "\n" not in str(error.value)


def test_targets_of_another_length():
    with pytest.raises((ValueError, TypeError), match="targets"):  # the second from the checker of shapes
        ClassificationScore(torch.zeros(3, 3), torch.tensor([0, 1]))


def test_top_k_of_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        top_k_accuracy(random_score(0), 0)


class Pairs(nn.Module):
    """Takes two inputs and gives an object with logits, as models of transformers do."""

    def forward(self, tokens, mask):
        return type("Output", (), {"logits": torch.stack([tokens.sum(1) * 1.0, mask.sum(1) * 1.0], 1)})()


def test_predict_takes_tensors_tuples_and_mappings():
    tokens, mask, targets = torch.arange(6).view(2, 3), torch.ones(2, 3), torch.tensor([1, 0])
    wanted = torch.tensor([[3.0, 3.0], [12.0, 3.0]])
    for inputs in ((tokens, mask), [tokens, mask], {"mask": mask, "tokens": tokens}):
        logits, found = predict(Pairs(), [(inputs, targets)])
        assert torch.equal(logits, wanted) and torch.equal(found, targets)
    linear = nn.Linear(3, 4)
    assert predict(linear, [(mask, targets), (mask[:1], targets[:1])])[0].shape == (3, 4)


def test_predict_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model.train()
    model[1].eval()  # frozen, as in transfer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    first, again = (predict(model, batch)[0] for _ in range(2))
    assert torch.equal(first, again), "dropout must be off"
    assert model.training and not model[1].training and model[2].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_predict_refuses_nothing_and_wrong_shapes():
    with pytest.raises(ValueError, match="nothing to predict"):
        predict(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="one row of logits"):
        predict(nn.Unflatten(1, (1, 2)), [(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))])
    with pytest.raises(ValueError, match="one row of logits"):
        predict(nn.Linear(2, 2), [(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))])


def test_logits_in_half_precision_are_scored_in_double():
    logits, _ = predict(nn.Linear(3, 2).bfloat16(), [(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2).long())])
    assert logits.dtype == torch.float32


# --- report and picture

def test_report_names_classes_and_confusions():
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1, 0])] * 4
    score = ClassificationScore(logits, torch.tensor([0, 0, 1, 0, 0]), ("cat", "dog", "a very long name"))
    text = write_report(score)
    assert "accuracy       0.8000  (4 of 5" in text and "cat called dog (1×)" in text and "top 5" not in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["a very long name"].split()[-4:] == ["-", "-", "-", "0"], "what cannot be measured is a dash"
    assert "nothing" in write_report(ClassificationScore(torch.eye(2) * 9, torch.arange(2)))


@pytest.mark.parametrize("classes", [2, 40, 100])
def test_confusion_is_drawn_for_few_and_for_many_classes(classes, tmp_path):
    pytest.importorskip("matplotlib")
    plot_confusion(random_score(0, classes=classes)).savefig(tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 2000


def test_reading_the_module_needs_no_matplotlib():
    assert "matplotlib" not in vars(classification)


# --- Grad-CAM

def network(channels: int = 4, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def test_grad_cam_is_cam_where_both_exist():
    model, pixels, classes = network().eval(), torch.randn(5, 2, 9, 7), torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        wanted = torch.einsum("nk,nkyx->nyx", model[-1].weight[classes], model[:3](pixels)).relu()
    wanted = wanted / wanted.amax((1, 2), keepdim=True).clamp(min=1e-12)
    found = grad_cam(model, model[2], pixels, classes)
    assert (found - wanted).abs().max() < 1e-5
    other = grad_cam(model, model[2], pixels, (classes + 1) % 3)  # negative control
    assert (other - wanted).abs().max() > 0.1


def test_grad_cam_of_a_batch_is_that_of_its_pictures():
    model, pixels = network(), torch.randn(4, 2, 8, 8)
    together = grad_cam(model, model[2], pixels)
    alone = torch.cat([grad_cam(model, model[2], picture[None]) for picture in pixels])
    assert torch.allclose(together, alone, atol=1e-6) and together.shape == (4, 8, 8)
    assert 0 <= together.min() and together.max() <= 1


def test_grad_cam_leaves_no_trace():
    model, pixels = network(), torch.randn(2, 2, 8, 8)
    model.train()
    model.requires_grad_(False)  # frozen weights have maps too
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grad_cam(model, model[2], pixels)
    assert model.training and not model[2]._forward_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not pixels.requires_grad and all(weight.grad is None for weight in model.parameters())


def test_grad_cam_refuses_layers_without_maps():
    model, pixels = network(), torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"Linear gives \(1, 3\)"):
        grad_cam(model, model[-1], pixels)
    with pytest.raises(ValueError, match="takes no part"):
        grad_cam(model, nn.ReLU(), pixels)
    assert not model[-1]._forward_hooks


def test_grad_cam_of_no_evidence_is_empty():
    model = network()
    nn.init.constant_(model[-1].weight, -1.0)  # every map speaks against every class
    assert float(grad_cam(model, model[2], torch.randn(2, 2, 8, 8)).abs().max()) == 0
