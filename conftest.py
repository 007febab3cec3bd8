"""How the tests run: the same on every machine, and every lesson a test. `python -m pytest -n 2` runs them all."""

import os
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
BUDGET = 90  # seconds that one lesson may take
_waiting: dict[str, int] = {}  # cells of each notebook that have not reported yet
_seconds: dict[str, float] = defaultdict(float)  # how long each notebook has run
_failed: set[str] = set()  # notebooks with a failed cell


def pytest_configure(config):
    """One thread for each test process, no network, and nothing of the learner's touched."""
    if not hasattr(config, "workerinput"):  # the process that starts the workers, which inherit this
        if config.option.color == "auto" and not sys.stdout.isatty():
            config.option.color = "no"  # which neither nbval nor the workers find out by themselves
            os.environ["PYTEST_ADDOPTS"] = f"{os.environ.get('PYTEST_ADDOPTS', '')} --color=no"
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        os.environ.pop("MPLBACKEND", None)
        config.borrowed_cache = os.environ["BIGMODEL_CACHE"] = tempfile.mkdtemp(prefix="bigmodel-test-")


def pytest_unconfigure(config):
    """Remove the cache that the tests had."""
    shutil.rmtree(getattr(config, "borrowed_cache", ""), ignore_errors=True)


def _is_cell(item) -> bool:
    return item.nodeid.partition("::")[0].endswith(".ipynb")


def _promised_seconds(notebook: Path) -> float:
    """How long a lesson says, in its card, that it takes; a minute when it does not say."""
    found = re.search(r"Time on two cores(.*)", notebook.read_text(encoding="utf-8"))
    words = found[1] if found else "a minute"
    number = re.search(r"\d+", words)
    amount = int(number[0]) if number else 0.5 if "half" in words else 1 if "minute" in words else 5
    return amount * (60 if "min" in words else 1)


def pytest_collection_modifyitems(items):
    """Order the notebooks by the time they take, the longest first, so that both workers finish together."""
    promised = {item.path: _promised_seconds(item.path) for item in items if _is_cell(item)}
    items.sort(key=lambda item: -promised.get(item.path, 0))
    for item in filter(_is_cell, items):
        if re.search(r"^#\| *eval: *false", item.cell.source, flags=re.M):
            item.options["skip"] = True
        item.cell.execution_count = 0  # cleaned notebooks carry none, and nbval would take their cells as never run
    _waiting.update(Counter(item.path.relative_to(ROOT).as_posix() for item in items if _is_cell(item)))


def pytest_xdist_node_collection_finished(ids):
    """Learn from a worker which cells there are."""
    _waiting.update(Counter(name.partition("::")[0] for name in ids if ".ipynb::" in name))


def pytest_runtest_setup(item):
    """Leave out what follows a failed cell: it would only fail for the same reason."""
    if _is_cell(item) and hasattr(item.parent, "failed_cell"):
        pytest.skip(f"{item.parent.failed_cell} failed before this one")


def pytest_exception_interact(node):
    """Remember the first cell of a notebook that fails."""
    if _is_cell(node) and isinstance(node, pytest.Item):
        node.parent.failed_cell = node.name


def pytest_report_teststatus(report):
    """Print no dot for a cell: its notebook has a line of its own."""
    if ".ipynb::" in report.nodeid and (report.passed or report.skipped):
        return ("" if report.when != "call" and report.passed else report.outcome), "", ""


class _Notebooks:
    """Says which notebook the run is at, and at the end which took longest."""

    def __init__(self, terminal):
        self.terminal, self.total = terminal, 0

    def say(self, text: str) -> None:
        self.terminal.ensure_newline()
        self.terminal.write_line(text)

    def pytest_runtest_logstart(self, nodeid):
        name = nodeid.partition("::")[0]
        if name.endswith(".ipynb") and name not in _seconds:
            _seconds[name] = 0.0
            self.say(f"{name} starts ({len(_seconds)} of {len(_waiting)} notebooks)")

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[0]
        if not name.endswith(".ipynb"):
            return
        _seconds[name] += report.duration
        if report.failed:
            _failed.add(name)
        if report.when == "teardown":
            _waiting[name] -= 1
            if not _waiting[name]:
                self.say(f"{name} {'FAILED' if name in _failed else 'passed'} after {_seconds[name]:.0f} s")

    def pytest_terminal_summary(self):
        slowest = sorted(_seconds.items(), key=lambda pair: -pair[1])[:8]
        if slowest:
            self.terminal.section("slowest notebooks")
        for name, seconds in slowest:
            self.say(f"{seconds:5.0f} s  {name}" + (f"  (more than {BUDGET} s)" if seconds > BUDGET else ""))


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    """Report in the process that owns the terminal."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Notebooks(terminal), "bigmodel-notebooks")
