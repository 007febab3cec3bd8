"""Pictures a second on a CPU, in one run: ResNet and ViT against transformers' on the same weights; reading pictures.

    python benchmarks/vision.py [--threads 2] [--rounds 15] [--only inference training pictures]

All contestants take turns, batch by batch; the median counts, and before anything is timed they must agree. All are in
float32 but those that say bfloat16, which is fast on processors that multiply it.

- "folded": the batch norms are multiplied into the convolutions;
- "channels last": the channels of a pixel lie together in memory;
- "packed": the weights lie in memory as oneDNN likes it (`torch.utils.mkldnn`);
- "the convolutions alone": all convolutions of the model in their true shapes, forward and backward, and nothing else.
  No implementation that leaves them to PyTorch, in float32, can be faster."""
import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from record import record
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.mkldnn import to_mkldnn

from bigmodel.core import compact, progress_bar
from bigmodel.data.images import Preprocessor, read_picture
from bigmodel.models.convolution import fold_norms
from bigmodel.models.resnet import ResNet, ResNetConfig
from bigmodel.models.vit import ViT, ViTConfig
from bigmodel.training.trainer import Stepper, TrainerConfig, make_adamw
from bigmodel.training.vision import classification_loss

LAST = torch.channels_last
SIZES = {  # model, config, height and width of the pictures, batch in inference, batch in training
    "ResNet of 14 layers, 32×32": (ResNet, ResNetConfig(block="basic", stem_channels=32, stage_channels=(32, 64, 128),
                                                        depths=(2, 2, 2), num_classes=10), 32, 64, 64),
    "ResNet-18, 64×64": (ResNet, ResNetConfig.resnet18(), 64, 16, 16),
    "ResNet-18, 224×224": (ResNet, ResNetConfig.resnet18(), 224, 8, 4),
    "ResNet-18, 224×224, one by one": (ResNet, ResNetConfig.resnet18(), 224, 1, None),
    "ResNet-50, 224×224": (ResNet, ResNetConfig.resnet50(), 224, 4, None),
    "ViT of 6 layers, 32×32": (ViT, ViTConfig(image_size=32, patch_size=4, hidden_size=96, num_layers=6, num_heads=3,
                                              num_classes=10), 32, 64, 64),
    "ViT-Ti/16, 224×224": (ViT, ViTConfig.vit_tiny(), 224, 4, 4),
}


# --- models

def build(model_class: type, config: ResNetConfig | ViTConfig) -> tuple[nn.Module, nn.Module]:
    """Make the same model twice, with the same weights; gains and statistics of norms are not those of a new one."""
    ours = model_class(config)
    with torch.no_grad():
        for layer in ours.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.0)
                layer.running_mean.normal_(std=0.1)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    return ours.eval(), theirs.eval()


def take_turns(contestants: dict[str, Callable], pictures: int, rounds: int, label: str) -> dict:
    """Time everyone once in each round. Returns pictures a second: the median, and slowest and fastest."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in progress_bar(range(rounds + 2), label=label):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            if number >= 2:  # the first two are for warming up
                seconds[name].append(time.perf_counter() - start)
    rates = {name: sorted(pictures / each for each in times) for name, times in seconds.items()}
    return {"pictures_per_second": {name: round(statistics.median(rate), 1) for name, rate in rates.items()},
            "slowest_and_fastest": {name: [round(rate[0], 1), round(rate[-1], 1)] for name, rate in rates.items()}}


def inference(name: str, rounds: int) -> dict:
    """Score the same pictures with every variant."""
    model_class, config, size, batch, _ = SIZES[name]
    ours, theirs = build(model_class, config)
    pixels = torch.randn(batch, config.num_channels, size, size)
    last = pixels.contiguous(memory_format=LAST)
    contestants = {"transformers": lambda: theirs(pixels).logits, "bigmodel": lambda: ours(pixels)}
    if model_class is ResNet:
        folded = fold_norms(ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is written with torch.jit, which is deprecated
            packed = to_mkldnn(fold_norms(ours))
        ours_last, theirs_last = (deepcopy(model).to(memory_format=LAST) for model in (folded, theirs))
        contestants |= {"transformers, channels last": lambda: theirs_last(last).logits,
                        "bigmodel, folded, channels last": lambda: ours_last(last),
                        "bigmodel, folded, packed": lambda: packed(pixels.to_mkldnn()).to_dense(),
                        "transformers, channels last, bfloat16": halved(lambda: theirs_last(last).logits),
                        "bigmodel, folded, channels last, bfloat16": halved(lambda: ours_last(last))}
    with torch.no_grad():
        agree({who: run() for who, run in contestants.items() if "bfloat16" not in who})
        result = take_turns(contestants, batch, rounds, name)
    return {"parameters": ours.num_parameters(), "batch": batch, **result, **ratios(result["pictures_per_second"])}


def halved(run: Callable) -> Callable:
    """The same with matrix products and convolutions in bfloat16."""
    def run_halved() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return run_halved


def training(name: str, rounds: int) -> dict:
    """Update the weights with every variant: the same loss and the same fused AdamW."""
    model_class, config, size, _, batch = SIZES[name]
    ours, theirs = build(model_class, config)
    pixels, targets = torch.randn(batch, config.num_channels, size, size), torch.randint(config.num_classes, (batch,))
    last, settings = pixels.contiguous(memory_format=LAST), TrainerConfig(steps=rounds + 3, learning_rate=1e-5)
    agree({who: deepcopy(model).train()(pixels) for who, model in {"transformers": theirs, "bigmodel": ours}.items()})
    trainer = Stepper(deepcopy(ours).train(), classification_loss(), settings, device="cpu")
    contestants = {"transformers": stepper(theirs, pixels, targets), "bigmodel": stepper(ours, pixels, targets),
                   "bigmodel's trainer": lambda: trainer.update([(pixels, targets)])}
    if model_class is ResNet:
        for name_of_format, dtype in (("channels last", torch.float32), ("channels last, bfloat16", torch.bfloat16)):
            contestants |= {f"{who}, {name_of_format}": stepper(model, last, targets, dtype)
                            for who, model in {"transformers": theirs, "bigmodel": ours}.items()}
        contestants |= {"the convolutions alone": convolutions(ours, pixels),
                        "the convolutions alone, channels last": convolutions(ours, last)}
    result = take_turns(contestants, batch, rounds, name)
    return {"parameters": ours.num_parameters(), "batch": batch, **result, **ratios(result["pictures_per_second"])}


def stepper(model: nn.Module, pixels: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Callable:
    """One update of the weights of a copy, which lie in memory as the pixels do."""
    is_last = not pixels.is_contiguous()
    model = deepcopy(model).to(memory_format=LAST if is_last else torch.contiguous_format).train()
    optimizer = make_adamw(model, TrainerConfig(steps=1, learning_rate=1e-5, warmup_steps=0))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(pixels)
            loss = F.cross_entropy(getattr(output, "logits", output), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def convolutions(model: nn.Module, pixels: Tensor) -> Callable[[], None]:
    """All convolutions of a model, each by itself, forward and backward; no gradient is needed for the pixels."""
    inputs: list[tuple[nn.Module, Tensor]] = []
    model = deepcopy(model).to(memory_format=torch.contiguous_format if pixels.is_contiguous() else LAST)
    hooks = [layer.register_forward_hook(lambda layer, args, _: inputs.append((layer, args[0].clone())))
             for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    for _, x in inputs[1:]:
        x.requires_grad_()
    gradients = [torch.randn_like(layer(x)) for layer, x in inputs]

    def step() -> None:
        for (layer, x), gradient in zip(inputs, gradients):
            layer(x).backward(gradient)
            layer.weight.grad = x.grad = None

    return step


def agree(outputs: dict[str, object]) -> None:
    """Complain when two contestants do not compute the same."""
    outputs = {who: getattr(output, "logits", output) for who, output in outputs.items()}
    first, *others = outputs
    for who in others:
        difference = (outputs[who] - outputs[first]).abs().max() / outputs[first].abs().max()
        if difference > 1e-4:
            raise SystemExit(f"{who} and {first} differ by {difference:.1e} of the largest number; nothing to compare")


def ratios(rates: dict[str, float]) -> dict[str, float]:
    """How many times faster than transformers each variant is, our best against theirs, and our share of the limit."""
    def best(start: str) -> float:
        return max((rates[who] for who in rates if who.startswith(start) and "bfloat16" not in who), default=0.0)

    found = {"times_transformers": {who: round(rate / rates["transformers"], 2) for who, rate in rates.items()},
             "best_times_best_of_transformers": round(best("bigmodel") / best("transformers"), 2)}
    if limit := best("the convolutions alone"):
        found["share_of_the_convolution_limit"] = round(best("bigmodel") / limit, 2)
    return found


# --- pictures

def write_pictures(folder: Path, count: int) -> list[Path]:
    """Photographs that come with scikit-image, as JPEG files of 640×480."""
    photographs = [Image.fromarray(picture()) for picture in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        photographs[number % len(photographs)].resize((640, 480)).save(path, quality=90)
    return paths


def with_pillow(pictures: list[Image.Image]) -> Tensor:
    """A pipeline as it is written where there is no library: each picture resized, scaled, normalised; then stacked."""
    arrays = [np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float32) / 255
              for picture in pictures]
    normalized = [(array - 0.5) / 0.5 for array in arrays]
    return torch.from_numpy(np.stack(normalized).transpose(0, 3, 1, 2).copy())


def with_pillow_read(paths: list[Path]) -> Tensor:
    """The same from files."""
    return with_pillow([Image.open(path).convert("RGB") for path in paths])


def pictures(rounds: int, count: int = 16) -> dict:
    """From JPEG files to a batch, and from decoded pictures to a batch."""
    ours, theirs = Preprocessor(224), transformers.AutoImageProcessor.from_pretrained(saved(Preprocessor(224)))
    def processed(images: list) -> Tensor:
        return theirs(images, return_tensors="pt")["pixel_values"]

    with tempfile.TemporaryDirectory() as name:
        paths = write_pictures(Path(name), count)
        arrays, images = [read_picture(path) for path in paths], [Image.open(path).convert("RGB") for path in paths]
        tasks = {
            "from files": {
                f"transformers' {type(theirs).__name__}": lambda: processed([Image.open(path).convert("RGB")
                                                                            for path in paths]),
                "Pillow only": lambda: with_pillow_read(paths),
                "bigmodel": lambda: ours([read_picture(path) for path in paths])},
            "from decoded pictures": {
                f"transformers' {type(theirs).__name__}": lambda: processed(images),
                "Pillow only": lambda: with_pillow(images), "bigmodel": lambda: ours(arrays)}}
        found = {}
        for task, contestants in tasks.items():
            agree({who: run() for who, run in contestants.items()})
            result = take_turns(contestants, count, rounds, task)
            mine = result["pictures_per_second"]["bigmodel"]
            found[task] = {**result, "times": {who: round(mine / rate, 2) for who, rate in
                                               result["pictures_per_second"].items() if who != "bigmodel"}}
    return found


def saved(preprocessor: Preprocessor) -> str:
    """A folder with the preprocessor's file, as transformers reads it."""
    folder = tempfile.mkdtemp()
    preprocessor.save(folder)
    return folder


def show(title: str, result: dict) -> None:
    """Print one comparison."""
    size = f"   {compact(result['parameters'])} parameters, batch {result['batch']}" if "parameters" in result else ""
    print(f"\n{title}{size}")
    times = result.get("times_transformers", {})
    for who, rate in result["pictures_per_second"].items():
        low, high = result["slowest_and_fastest"][who]
        print(f"  {who:42} {rate:9,.1f} pictures/s   ({low:,.1f} to {high:,.1f})"
              + (f"   {times[who]:.2f} x transformers" if who in times else ""))
    for name in ("times", "best_times_best_of_transformers", "share_of_the_convolution_limit"):
        if name in result:
            print(f"  {name.replace('_', ' ')}: {result[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=("inference", "training", "pictures"),
                        default=["inference", "training", "pictures"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    results: dict[str, dict] = {}
    for kind, measure, place in (("inference", inference, 3), ("training", training, 4)):
        if kind in options.only:
            results[kind] = {name: measure(name, options.rounds) for name, size in SIZES.items() if size[place]}
    if "pictures" in options.only:
        results["pictures"] = pictures(options.rounds)
    for kind, found in results.items():
        for name, result in found.items():
            show(f"{kind}: {name}", result)
    if set(results) == {"inference", "training", "pictures"}:
        record("vision", {"threads": options.threads, "rounds": options.rounds, **results})
    else:
        print("\nnot recorded: a part was left out")


if __name__ == "__main__":
    main()
