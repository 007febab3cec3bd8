"""How fast byte-pair encoding is in pure Python: training beside `tokenizers`, encoding beside `tiktoken`.

Run `python benchmarks/tokenizer.py`; it takes about a minute and writes results/tokenizer.json. It reads the source of
Python's library, and through BIGMODEL_DATA Shakespeare and, for encoding, GPT-2's vocabulary."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from record import record  # noqa: E402

from bigmodel.core import find_data  # noqa: E402
from bigmodel.data.bpe import from_printable  # noqa: E402
from bigmodel.data.corpus import load_corpus  # noqa: E402
from bigmodel.data.tokenizer import Tokenizer  # noqa: E402

REPEATS = 7


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds, the median of several runs taken in turn, so that a busy moment hits all."""
    seconds = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def reference(text: str, vocab_size: int):  # noqa: ANN201
    """A byte-level tokenizer, trained by `tokenizers`."""
    from tokenizers import Tokenizer as Reference
    from tokenizers import models, pre_tokenizers, trainers

    theirs = Reference(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return theirs


def training(text: str, vocab_size: int) -> dict:
    """The whole call, the split of the text included, without special tokens."""
    merges = json.loads(reference(text, vocab_size).to_str())["model"]["merges"]
    same = Tokenizer.train(text, vocab_size, ()).merges == [tuple(map(from_printable, pair)) for pair in merges]
    seconds = medians({"bigmodel": lambda: Tokenizer.train(text, vocab_size, ()),
                       "tokenizers": lambda: reference(text, vocab_size)})
    return {"bytes": len(text.encode()), "vocab_size": vocab_size, "seconds": seconds, "same_merges": same}


def encoding(text: str) -> dict:
    """GPT-2's vocabulary; "first" has to merge every piece, "again" remembers them."""
    import tiktoken

    ours = Tokenizer.from_tiktoken(find_data("gpt2.tiktoken"))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ours.ids, special_tokens=ours.special_tokens)

    def first() -> None:
        ours._pieces.clear()
        ours.encode(text)

    seconds = medians({"bigmodel, first": first, "bigmodel, again": lambda: ours.encode(text),
                       "tiktoken": lambda: theirs.encode_ordinary(text)})
    size = len(text.encode()) / 1e6
    rates = {name: size / taken for name, taken in seconds.items()}
    return {"bytes": len(text.encode()), "megabytes_per_second": rates,
            "same_ids": ours.encode(text) == theirs.encode_ordinary(text)}


def long_word() -> dict:
    """A "word" of 100,000 letters, ten times as long as one of 10,000."""
    tokenizer = Tokenizer.from_tiktoken(find_data("gpt2.tiktoken"))
    letters = "".join(chr(97 + (number * number) % 23) for number in range(100_000))
    return medians({"10,000 letters": lambda: tokenizer.encode(letters[:10_000]),
                    "100,000 letters": lambda: tokenizer.encode(letters)})


def main() -> None:
    """Measure, print a table, and record."""
    shakespeare = find_data("tinyshakespeare.txt").read_text(encoding="utf-8")
    source = "\n".join(load_corpus("python-source"))[:3_000_000]
    results = {"repeats": REPEATS, "training": [], "encoding": {}, "long_word_seconds": long_word()}
    print(f"{'training':34}{'bigmodel':>12}{'tokenizers':>12}")
    for name, text, size in (("Shakespeare", shakespeare[:130_000], 500), ("Shakespeare", shakespeare[:130_000], 4000),
                             ("Shakespeare", shakespeare, 8000), ("Python source", source, 8000)):
        row = {"text": name, **training(text, size)}
        results["training"].append(row)
        print(f"{name:14} {row['bytes'] / 1e3:6.0f} KB to {size:5}  {row['seconds']['bigmodel']:10.3f} s"
              f"{row['seconds']['tokenizers']:10.3f} s  {'same merges' if row['same_merges'] else 'MERGES DIFFER'}")
    print(f"\n{'encoding, MB/s':22}{'first':>10}{'again':>10}{'tiktoken':>10}")
    for name, text in (("Shakespeare", shakespeare), ("Python source", source)):
        row = results["encoding"][name] = encoding(text)
        rates = "".join(f"{rate:10.1f}" for rate in row["megabytes_per_second"].values())
        print(f"{name:22}{rates}  {'same ids' if row['same_ids'] else 'IDS DIFFER'}")
    print("\none word:", {name: f"{taken:.3f} s" for name, taken in results["long_word_seconds"].items()})
    record("tokenizer", results)


if __name__ == "__main__":
    main()
