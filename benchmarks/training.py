"""Training speed on a CPU: this GPT, transformers' GPT-2, and the bare matrix products, side by side in one run.

    python benchmarks/training.py [--threads 2] [--rounds 15]

The three take turns, step by step, on the same batches, with the same fused AdamW, in float32; the median step counts.
"The matmuls alone" is the time that the model's matrix products take by themselves, forward and backward, in their
true shapes: no implementation in PyTorch that needs these products can be faster."""
import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import record
from transformers import GPT2Config, GPT2LMHeadModel

from bigmodel.core import compact, progress_bar
from bigmodel.models.checkpoint import to_stored
from bigmodel.models.gpt import GPT, GPTConfig
from bigmodel.training.trainer import Trainer, TrainerConfig, next_token_loss

SHAPES = {  # layers, hidden size, heads, vocabulary, context, batch
    "0.8M": (4, 128, 4, 65, 64, 12),
    "3.1M": (6, 192, 6, 2048, 128, 16),
}


def build(shape: tuple[int, ...]) -> tuple[GPT, GPT2LMHeadModel]:
    """Make the same model twice, with the same weights."""
    layers, hidden, heads, vocab, context, _ = shape
    ours = GPT(GPTConfig(vocab, context, hidden, layers, heads))
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab, n_positions=context, n_embd=hidden, n_layer=layers, n_head=heads, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=None, eos_token_id=None))
    weights = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(to_stored(weights, GPT.tensor_names))
    return ours, theirs.train()


def matmuls(shape: tuple[int, ...]) -> Callable[[], None]:
    """All matrix products of one training step, forward and backward, attention's included, and nothing else."""
    layers, hidden, heads, vocab, context, batch = shape
    rows = batch * context
    block = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    linear = block * layers + [(hidden, vocab)]
    x = {width: torch.randn(rows, width) for pair in linear for width in pair}
    weights = [torch.randn(wide, narrow) for narrow, wide in linear]
    one = torch.randn(batch * heads, context, hidden // heads)
    square = torch.randn(batch * heads, context, context)

    def step() -> None:
        for (narrow, wide), weight in zip(linear, weights):
            x[narrow] @ weight.T  # forward
            x[wide] @ weight  # gradient of the input
            x[wide].T @ x[narrow]  # gradient of the weight
        for _ in range(layers):
            for _ in range(2):
                one @ one.transpose(1, 2)  # scores; gradient of the weights
                square @ one  # values; gradients of query and key
            square.transpose(1, 2) @ one

    return step


def compare(shape: tuple[int, ...], rounds: int) -> dict:
    """Time one training step of each, in turn."""
    *_, vocab, context, batch = shape
    ours, theirs = build(shape)
    tokens = torch.randint(vocab, (batch, context + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4, fused=True) for model in (ours, theirs)]
    trainer = Trainer(GPT(ours.config), next_token_loss, [(inputs, targets)] * (rounds + 3),
                      TrainerConfig(steps=rounds + 3, learning_rate=1e-4, log_every=1000), show=False)

    def our_step() -> None:
        total, count = next_token_loss(ours, (inputs, targets))
        (total / count).backward()
        optimizers[0].step(), optimizers[0].zero_grad()

    def their_step() -> None:
        logits = theirs(inputs).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizers[1].step(), optimizers[1].zero_grad()

    def their_own_loss() -> None:
        theirs(inputs, labels=inputs).loss.backward()
        optimizers[1].step(), optimizers[1].zero_grad()

    def trainer_step() -> None:
        trainer.stepper.update([(inputs, targets)])

    contestants = {"bigmodel": our_step, "bigmodel Trainer": trainer_step, "transformers": their_step,
                   "transformers, own loss": their_own_loss, "the matmuls alone": matmuls(shape)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in progress_bar(range(rounds + 2), label=compact(ours.num_parameters())):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    rate = {name: batch * context / statistics.median(times) for name, times in seconds.items()}
    spread = {name: [round(batch * context / max(times)), round(batch * context / min(times))]
              for name, times in seconds.items()}
    return {"parameters": ours.num_parameters(),
            "tokens_per_second": {name: round(value) for name, value in rate.items()}, "slowest_and_fastest": spread,
            "ratio_to_transformers": round(rate["bigmodel"] / rate["transformers"], 3),
            "ratio_to_transformers_own_loss": round(rate["bigmodel"] / rate["transformers, own loss"], 3),
            "share_of_the_matmul_limit": round(rate["bigmodel"] / rate["the matmuls alone"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = {name: compare(shape, options.rounds) for name, shape in SHAPES.items()}
    for name, result in results.items():
        print(f"\n{name}")
        for who, rate in result["tokens_per_second"].items():
            low, high = result["slowest_and_fastest"][who]
            print(f"  {who:24} {rate:8,} tokens/s   ({low:,} to {high:,})")
        print(f"  {result['ratio_to_transformers']:.2f} x transformers, "
              f"{result['share_of_the_matmul_limit']:.0%} of the limit")
    record("training", {"threads": options.threads, "rounds": options.rounds, **results})


if __name__ == "__main__":
    main()
