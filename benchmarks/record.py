"""Keep the results of a benchmark with what is needed to judge them: machine, versions, date."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bigmodel.core import write_aside

PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "tiktoken")


def machine() -> dict:
    """Describe the processor, the GPU if torch has been told of one, the cores in use and the system."""
    import torch

    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": names[0] if names else platform.processor() or platform.machine(), "cores": cores,
            "threads": torch.get_num_threads(), "system": platform.platform(terse=True),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def versions() -> dict:
    """The versions of Python and of the packages that are compared."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def record(name: str, results: dict) -> Path:
    """Write `benchmarks/results/<name>.json`, whole or not at all, and say where."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    content = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions(),
               "results": results}
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"recorded in {path}")
    return path
