"""How fast text comes out: cached against uncached, and against transformers with the same weights and tokens.

Run `python benchmarks/generate.py`; it takes some three minutes on two cores and writes results/generate.json.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import record  # noqa: E402

from bigmodel.deployment.generate import generate  # noqa: E402
from bigmodel.models.gpt import GPT, GPTConfig  # noqa: E402

NEW_TOKENS = 200
PROMPT = [464, 2068, 7586, 21831, 18045, 625, 262, 16931]  # "The quick brown fox jumps over the lazy"


def rates(
    runs: dict[str, Callable[[], list[int]]],  # what is timed: each gives the tokens that it wrote
    repeats: int,  # how often
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:  # tokens per second, and the tokens
    """Time the runs in turn, so that a busy minute hits all of them."""
    speed, tokens = {name: [] for name in runs}, {}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens[name] = run()
            speed[name].append(NEW_TOKENS / (time.perf_counter() - start))
    return speed, tokens


def main() -> None:
    """Measure, check that the tokens are the same, print and record."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    wide = 0.05  # weights large enough that the text does not repeat one token
    model = GPT(GPTConfig.gpt2("small", end_of_text=None, initializer_range=wide)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    prompt = torch.tensor([PROMPT])

    def transformers_greedy() -> list[int]:
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
                              do_sample=False, pad_token_id=0)
        return out[0, len(PROMPT):].tolist()

    generate(model, [PROMPT], 3, temperature=0)
    theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, pad_token_id=0)
    fast, tokens = rates({
        "bigmodel, cached": lambda: generate(model, [PROMPT], NEW_TOKENS, temperature=0)[0],
        "transformers, cached": transformers_greedy,
        "bigmodel, cached, top_p": lambda: generate(model, [PROMPT], NEW_TOKENS, top_p=0.95, seed=0)[0],
    }, repeats=3)
    slow, more = rates({
        "bigmodel, uncached": lambda: generate(model, [PROMPT], NEW_TOKENS, temperature=0, use_cache=False)[0],
    }, repeats=1)
    assert tokens["bigmodel, cached"] == tokens["transformers, cached"] == more["bigmodel, uncached"]
    speed = {name: statistics.median(times) for name, times in (fast | slow).items()}
    for name, rate in speed.items():
        print(f"{name:26} {rate:7.1f} tokens/s")
    ours = speed["bigmodel, cached"]
    record("generate", {
        "model": "GPT-2 small, random weights, float32, batch of 1", "new_tokens": NEW_TOKENS,
        "prompt_tokens": len(PROMPT), "threads": torch.get_num_threads(), "same_tokens": True,
        "tokens_per_second": {name: round(rate, 2) for name, rate in speed.items()},
        "repeats": {name: [round(rate, 2) for rate in times] for name, times in (fast | slow).items()},
        "cached_over_uncached": round(ours / speed["bigmodel, uncached"], 2),
        "cached_over_transformers": round(ours / speed["transformers, cached"], 2),
    })


if __name__ == "__main__":
    main()
