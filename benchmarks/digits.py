"""Handwritten digits, scikit-learn's own unshuffled half/half split: what models reach, and what each trick is worth.

    python benchmarks/digits.py [--threads 2] [--seeds 3]                   # VGG, ResNet, ViT, SVC, a linear model
    python benchmarks/digits.py --ablation [--seeds 20] [--processes 2]     # the recipe with each ingredient left out

The recipe was chosen on the training half alone: on contiguous thirds of it, each held out once, because the digits are
sorted by writer. The test half was then measured with what `Recipe` holds by default."""
import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from record import record
from torch import nn

from bigmodel.core import compact, progress_bar
from bigmodel.data.augmentation import Affine, PictureBatches, ordered_batches
from bigmodel.data.images import PictureSet, load_pictures
from bigmodel.models.resnet import ResNet, ResNetConfig
from bigmodel.models.vgg import VGG, VGGConfig
from bigmodel.models.vit import ViT, ViTConfig
from bigmodel.training.trainer import Trainer, TrainerConfig
from bigmodel.training.vision import averaged, averaged_model, classification_loss, count_correct
from bigmodel.training.watching import mean_loss

DIGITS = {"num_classes": 10, "num_channels": 1}


def resnet(width: int = 16) -> ResNet:
    return ResNet(ResNetConfig(stage_channels=(width, 2 * width, 4 * width), depths=(1, 1, 1), block="basic",
                               stem_channels=width, **DIGITS))


def vgg() -> VGG:
    return VGG(VGGConfig(stages=((16, 1), (32, 1), (64, 2)), batch_norm=True, hidden_size=128, pooled_size=2,
                         dropout=0.2, **DIGITS))


def vit() -> ViT:
    return ViT(ViTConfig(image_size=32, patch_size=4, hidden_size=64, num_layers=2, num_heads=4, inner_size=128,
                         **DIGITS))


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are the recipe of this benchmark."""

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-2
    final_learning_rate: float = 0.0  # as a fraction of the peak, after half a cosine; 1 is a constant rate
    augment: Affine | None = Affine(degrees=12, translate=0.1, scale=0.15, shear=10)
    label_smoothing: float = 0.1
    mixup: float = 0.0
    decay: float = 0.98  # of the averaged weights
    weight_decay: float = 0.05


def train(make: Callable[[], nn.Module], recipe: Recipe, seed: int, digits: PictureSet) -> tuple[Trainer, dict]:
    """Train a model, and say how many seconds it took, all batches included: by the clock, and of processors' time."""
    torch.manual_seed(seed)
    batches = PictureBatches(digits.pixels, digits.targets, recipe.batch_size, seed, recipe.augment, mixup=recipe.mixup,
                             num_classes=10)
    config = TrainerConfig(
        steps=recipe.epochs * len(digits.targets) // recipe.batch_size, learning_rate=recipe.learning_rate,
        final_learning_rate=recipe.final_learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.99), seed=seed,
        log_every=1000)
    trainer = Trainer(make(), classification_loss(recipe.label_smoothing), batches, config,
                      optimizer=averaged(recipe.decay), unit="digits")
    start, start_cpu = time.perf_counter(), time.process_time()
    trainer.fit()
    return trainer, {"seconds": round(time.perf_counter() - start, 1),
                     "cpu_seconds": round(time.process_time() - start_cpu, 1)}


def epoch_of(trainer: Trainer) -> list:
    return [trainer.batches[step] for step in range(trainer.batches.batches_per_epoch)]


def accuracy(model: nn.Module, digits: PictureSet) -> float:
    return mean_loss(model, count_correct, ordered_batches(digits.pixels, digits.targets, 256))


# --- models side by side

CONTESTANTS = {
    "ResNet": (resnet, Recipe()),
    "ResNet, twice as wide": (partial(resnet, 32), Recipe(epochs=40, decay=0.99)),
    "VGG": (vgg, Recipe(learning_rate=3e-3)),
    "ViT": (vit, Recipe(learning_rate=1e-3, epochs=60, decay=0.99)),
}


def baselines(train_set: PictureSet, test_set: PictureSet) -> dict[str, dict]:
    """scikit-learn's classifiers on the digits as scikit-learn has them: 64 numbers from 0 to 16."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    pixels, targets = load_digits(return_X_y=True)
    half, results = len(train_set.targets), {}
    for name, classifier in {"SVC": SVC(gamma=0.001), "linear": LogisticRegression(max_iter=5000)}.items():
        start = time.perf_counter()
        classifier.fit(pixels[:half], targets[:half])
        seconds = time.perf_counter() - start
        results[name] = {"accuracy": [round(classifier.score(pixels[half:], targets[half:]), 6)],
                         "seconds": [round(seconds, 3)]}
    return results


def compare_models(seeds: int) -> dict[str, dict]:
    """Train each model with each seed, and the baselines, all in this run."""
    train_set, test_set = load_pictures("digits", size=32)
    results = {}
    for name, (make, recipe) in CONTESTANTS.items():
        found = {"parameters": make().num_parameters(), "recipe": dataclasses.asdict(recipe),
                 "accuracy": [], "last": [], "seconds": [], "cpu_seconds": []}
        for seed in range(seeds):
            trainer, times = train(make, recipe, seed, train_set)
            average = averaged_model(trainer.model, trainer.state.optimizer, epoch_of(trainer))
            found["accuracy"].append(round(accuracy(average, test_set), 6))
            found["last"].append(round(accuracy(trainer.model, test_set), 6))
            for kind, seconds in times.items():
                found[kind].append(seconds)
        results[name] = found
        print_row(name, found)
    for name, found in baselines(train_set, test_set).items():
        results[name] = found
        print_row(name, found)
    return results


def print_row(name: str, found: dict) -> None:
    scores, size = found["accuracy"], found.get("parameters")
    print(f"{name:8} {compact(size) if size else '':>7} parameters   median {statistics.median(scores):.4f} "
          f"({min(scores):.4f} to {max(scores):.4f})   {max(found['seconds']):5.1f} s", flush=True)


# --- what each ingredient is worth

ABLATION = {
    "the recipe": {},
    "no augmentation": {"augment": None},
    "no label smoothing": {"label_smoothing": 0.0},
    "with mixup 0.2": {"mixup": 0.2},
    "constant rate": {"final_learning_rate": 1.0},
    "no weight decay": {"weight_decay": 0.0},
    "a quarter of the epochs": {"epochs": 5},
    "twice the epochs": {"epochs": 40},
    "nothing of all this": {"augment": None, "label_smoothing": 0.0, "final_learning_rate": 1.0, "weight_decay": 0.0},
}


def _one(job: tuple[str, int]) -> tuple[str, int, dict[str, float]]:
    """One training of the ablation, in a process with one thread."""
    torch.set_num_threads(1)
    name, seed = job
    train_set, test_set = load_pictures("digits", size=32)
    trainer, times = train(resnet, Recipe(**ABLATION[name]), seed, train_set)
    average, stale = (averaged_model(trainer.model, trainer.state.optimizer, batches)
                      for batches in (epoch_of(trainer), None))
    scores = {"last": accuracy(trainer.model, test_set), "averaged": accuracy(average, test_set),
              "averaged, norms of the last": accuracy(stale, test_set)}
    return name, seed, {what: round(score, 6) for what, score in scores.items()} | times


def ablate(seeds: int, processes: int) -> dict[str, dict[str, list[float]]]:
    """Train with each list of changes and each seed."""
    jobs = [(name, seed) for seed in range(seeds) for name in ABLATION]
    found: dict[tuple[str, int], dict] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for name, seed, scores in progress_bar(pool.map(_one, jobs), total=len(jobs), label="ablation", unit="runs"):
            found[name, seed] = scores
    return {name: {what: [found[name, seed][what] for seed in range(seeds)] for what in found[name, 0]}
            for name in ABLATION}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.ablation:
        results = ablate(options.seeds or 20, options.processes)
        for name, scores in results.items():
            print(f"{name:24}", *(f"{what} {statistics.mean(scores[what]):.4f}" for what in scores), sep="   ")
        changes = {name: {field: repr(value) for field, value in fields.items()} for name, fields in ABLATION.items()}
        record("digits_ablation", {"seeds": options.seeds or 20, "recipe": dataclasses.asdict(Recipe()),
                                   "changes": changes, "accuracy": results})
    else:
        torch.set_num_threads(options.threads)
        record("digits", {"threads": options.threads, "models": compare_models(options.seeds or 3)})


if __name__ == "__main__":
    main()
