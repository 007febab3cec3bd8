"""The house checks hold here, and each of them has been seen to fail on a house that was broken on purpose."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import house
import pytest

LESSON = [
    ("markdown", "# A lesson\n\n> One promise.\n\n| | |\n|---|---|\n"
                 "| Built before | [the map](../index.ipynb#The-map) |\n| You will build | `double` |\n"
                 "| Opens the way to | all |\n| Time on two cores | 1 s |\n| Data | none |"),
    ("code", "#| default_exp data.tiny"),
    ("code", "#| export\nimport math"),
    ("code", '#| export\ndef double(\n    x: int,  # any number\n) -> int:\n    """Double x."""\n'
             "    return math.floor(2 * x)"),
    ("code", "print(double(2))", "4\n"),
    ("markdown", "![steps](../../images/steps.svg)\n\n## Summary\n\n## Exercises\n\n"
                 + "\n\n".join(f"### Exercise {n}: more" for n in (1, 2, 3))),
    *[cell for n in "123" for cell in (
        ("code", f'#| code-fold: true\n@exercise("tiny.{n}", hints=["a", "b"])\ndef _(f): ...'),
        ("code", f'def f(x):\n    ...\n\ncheck("tiny.{n}", f)', f"tiny.{n}: not attempted yet\n", "nbval-check-output"),
        ("code", f'#| code-fold: true\ncheck("tiny.{n}", double, solution=True)', 
         f"tiny.{n}: passed (worked solution)\n", "nbval-check-output", "solution"))],
    ("markdown", "## Further reading"),
]
INDEX = [("markdown", "# A course\n\n## The map\n\n[A lesson](1_data/01_tiny.ipynb)"),
         ("code", "from bigmodel.data.tiny import double")]


def write_notebook(path: Path, cells: list[tuple]) -> None:
    """Write a clean notebook of (type, source, printed output, tags ...)."""
    made = []
    for number, (kind, source, *rest) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell{number}", "metadata": {}, "source": source.splitlines(keepends=True)}
        if kind == "code":
            text = rest[0].splitlines(keepends=True) if rest else []
            output = {"name": "stdout", "output_type": "stream", "text": text}
            cell |= {"execution_count": None, "outputs": [output] if rest else [],
                     "metadata": {"tags": rest[1:]} if rest[1:] else {}}
        made.append(cell)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture(scope="module")
def sound_house(tmp_path_factory):
    """A small repository in which every check holds."""
    root = tmp_path_factory.mktemp("a house with spaces")
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(house.ROOT / name, root)
    write_notebook(root / "nbs/1_data/01_tiny.ipynb", LESSON)
    write_notebook(root / "nbs/index.ipynb", INDEX)
    (root / "images").mkdir()
    (root / "images/steps.svg").write_text("<svg/>")
    (root / "README.md").write_text(house.readme(root / "nbs/index.ipynb"))
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    return root


@pytest.fixture
def root(sound_house, tmp_path):
    """A copy of the sound house, to be broken."""
    return shutil.copytree(sound_house, tmp_path / "house")


def edit(path: Path, old: str, new: str) -> None:
    """Replace text in a file, which must be there."""
    text = path.read_text()
    assert old in text, f"{path.name} holds no {old!r}"
    path.write_text(text.replace(old, new, 1))


LESSON_FILE, MODULE, INIT = "nbs/1_data/01_tiny.ipynb", "bigmodel/data/tiny.py", "bigmodel/__init__.py"
PICTURE = json.dumps({"output_type": "display_data", "metadata": {}, "data": {"image/png": "A" * 220_000}})
ERROR = json.dumps({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []})
BREAKS = [  # what is broken, where, what is replaced by what, and what the check must then say
    (house.out_of_step, LESSON_FILE, "2 * x", "x + x", "tiny.py: differs from its notebook"),
    (house.out_of_step, MODULE, "2 * x", "3 * x", "tiny.py: differs from its notebook"),
    (house.out_of_step, "bigmodel/_modidx.py", "double", "triple", "_modidx.py: differs from its notebook"),
    (house.out_of_step, "bigmodel/orphan.py", None, "", "orphan.py: no notebook exports this"),
    (house.out_of_step, "nbs/new.ipynb", None, [("code", "#| default_exp new"), ("code", "#| export\nx = 1")],
     "new.py: not exported yet"),
    (house.unclean, LESSON_FILE, '"execution_count": null', '"execution_count": 7', "01_tiny.ipynb: not clean"),
    (house.unclean, LESSON_FILE, '"metadata": {}', '"metadata": {"scrolled": true}', "01_tiny.ipynb: not clean"),
    (house.unclean, "nbs/new.ipynb", None, [("code", "print(1)")], "cell 0: saved without its output"),
    (house.unclean, LESSON_FILE, '"outputs": []', f'"outputs": [{ERROR}]', "saved with an error, ValueError"),
    (house.unclean, LESSON_FILE, '"outputs": []', f'"outputs": [{PICTURE}]', "a figure of 161 KB"),
    (house.broken_exercises, LESSON_FILE, "not attempted yet", "passed", "tiny.1: the attempt must be"),
    (house.broken_exercises, LESSON_FILE, "passed (worked solution)", "not yet", "tiny.1: the solution must be"),
    (house.broken_exercises, LESSON_FILE, ', "solution"', "", "tiny.1: the solution must be"),
    (house.broken_exercises, LESSON_FILE, 'check(\\"tiny.2\\", f', 'check(\\"tiny.1\\", f', "tiny.2: no blank attempt"),
    (house.broken_exercises, LESSON_FILE, ", solution=True", "", "tiny.1: no worked solution"),
    (house.broken_exercises, LESSON_FILE, "### Exercise 3: more", "More", "3 exercises under 2 titles"),
    (house.broken_exercises, LESSON_FILE, ", hints", ", clues", "tiny.1: the checker has no hints"),
    (house.broken_exercises, LESSON_FILE, "#| code-fold: true\\n\", \"@", "#\\n\", \"@",
     "tiny.1: checker and solution are"),
    (house.broken_anatomy, LESSON_FILE, "Time on two cores", "Cost", "lacks 'Time on two cores' in its card"),
    (house.broken_anatomy, LESSON_FILE, "## Further reading", "## More", "lacks a section 'Further reading'"),
    (house.broken_anatomy, LESSON_FILE, "> One promise.", "No promise.", "lacks an opening"),
    (house.wrong_imports, MODULE, "import math", "from ..training import x", "data may not import bigmodel.training"),
    (house.wrong_imports, MODULE, "import math", "from .. import models", "data may not import bigmodel.models"),
    (house.wrong_imports, MODULE, "import math", "import bigmodel.cli", "data may not import bigmodel.cli"),
    (house.wrong_imports, MODULE, "import math", "from ..learn import x", "data may not import bigmodel.learn"),
    (house.wrong_imports, MODULE, "import math", "from ..core import *", "imports * from bigmodel.core"),
    (house.wrong_imports, MODULE, "import math", "from .tiny import y", "bigmodel.data.tiny -> bigmodel.data.tiny"),
    (house.wrong_imports, "bigmodel/data/utils.py", None, "", "named for what it is about"),
    (house.too_large, MODULE, "import math", "\n" * 300, "at most 300"),
    (house.too_large, MODULE, "2 * x)", "2 * x)  #" + " long" * 30, "at most 120"),
    (house.undocumented, MODULE, '"""Double x."""', "", "double has no docstring"),
    (house.undocumented, MODULE, "  # any number", "", "double: x has no comment"),
    (house.undocumented, MODULE, "x: int,  #", "x: int, y: int = '#',  #", "double: y has no comment of its own"),
    (house.undocumented, MODULE, "import math", 'class A:\n    """An A."""\n    def go(self): ...\n',
     "A.go has no docstring"),
    (house.undocumented, MODULE, "import math", '@dataclass\nclass A:\n    """An A."""\n    size: int\n',
     "A: size has no"),
    (house.duplicates, "bigmodel/data/other.py", None, "def double(): ...",
     "double is defined in bigmodel/data/other.py and"),
    (house.slow_import, INIT, "__version__", "import numpy; __version__", "import bigmodel imports numpy"),
    (house.slow_import, INIT, "__version__", "import time; time.sleep(0.15); __version__", "import bigmodel takes 0."),
    (house.unmet_imports, MODULE, "import math", "import pandas", "imports pandas at its top"),
    (house.unmet_imports, MODULE, "import math", "import transformers", "imports transformers at its top"),
    (house.unmet_imports, MODULE, "return", "import pandas; return", "imports pandas, which is in no extra"),
    (house.unmet_imports, LESSON_FILE, "print(double(2))", "import pandas", "imports pandas, which is in no extra"),
    (house.unmet_imports, "tests/test_new.py", None, "import pandas", "imports pandas, which is in no extra"),
    (house.broken_links, LESSON_FILE, "../index.ipynb#", "../map.ipynb#", "../map.ipynb#The-map leads nowhere"),
    (house.broken_links, LESSON_FILE, "#The-map", "#The-mop", "#The-mop: there is no such heading"),
    (house.broken_links, LESSON_FILE, "steps.svg", "stops.svg", "stops.svg leads nowhere"),
    (house.broken_links, "MORE.md", None, '<img src="gone.png">', "gone.png leads nowhere"),
    (house.broken_links, "MORE.md", None, "[a map](/etc/hostname)", "/etc/hostname leads nowhere"),
    (house.stale_readme, "README.md", "A course", "A horse", "README.md: differs"),
    (house.stale_readme, "nbs/index.ipynb", "A course", "A horse", "README.md: differs"),
    (house.machine_paths, "README.md", "A course", "A course from /" + "home/ann/course",
     "holds the path /" + "home/ann"),
    (house.lint, MODULE, "import math", "from math import pi, pi", "F811"),
]


@pytest.mark.parametrize("check", house.CHECKS, ids=lambda check: check.__name__)
def test_this_house_is_sound(check):
    problems = check(house.ROOT)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("check", house.CHECKS, ids=lambda check: check.__name__)
def test_a_sound_house_has_no_problems(check, root):
    assert check(root) == []


def test_every_check_is_seen_to_fail():
    assert {check for check, *_ in BREAKS} == set(house.CHECKS)


@pytest.mark.parametrize("check, name, old, new, said", BREAKS, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_house_is_reported(check, name, old, new, said, root):
    if isinstance(new, list):
        write_notebook(root / name, new)
    elif old is None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(new)
    else:
        edit(root / name, old, new)
    problems = check(root)
    assert any(said in problem for problem in problems), problems or "nothing was reported"
