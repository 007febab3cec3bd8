"""What must hold of the whole repository. Each check returns the problems that it found, as lines to read.

`python tests/house.py` prints them all; `--quick` keeps to what a commit of notebooks can break."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from readme import readme  # noqa: E402

MAX_LINES, MAX_WIDTH, MAX_FIGURE = 300, 120, 150 * 1024
MAY_IMPORT = {  # part of the package -> the parts that it may import, besides itself
    "core": set(), "learn": {"core"}, "data": {"core"}, "models": {"core"},
    "training": {"core", "data", "models"}, "evaluation": {"core", "data", "models"},
    "deployment": {"core", "data", "models", "training", "evaluation"},
    "applications": {"core", "data", "models", "training", "evaluation", "deployment", "pipeline"},
    "pipeline": {"core", "data", "models", "training", "evaluation", "deployment"},
    "cli": {"core", "learn", "data", "models", "training", "evaluation", "deployment", "applications", "pipeline"},
}
DISTRIBUTION = {  # import name -> the requirement that brings it, where the names differ
    "sklearn": "scikit-learn", "skimage": "scikit-image", "cv2": "opencv-python", "PIL": "pillow", "yaml": "pyyaml",
    "IPython": "jupyterlab", "matplotlib_inline": "jupyterlab", "nbformat": "jupyterlab",
    "nbclient": "jupyterlab", "huggingface_hub": "transformers", "execnb": "nbdev", "fastcore": "nbdev",
    "docutils": "sphinx", "pygments": "sphinx",
}
CARD = ("Built before", "You will build", "Opens the way to", "Time on two cores", "Data")


# --- reading

def modules(root: Path) -> list[Path]:
    """The package's modules, without nbdev's index."""
    return [path for path in sorted((root / "bigmodel").rglob("*.py")) if path.name != "_modidx.py"]


def notebooks(root: Path) -> list[Path]:
    """The notebooks, as nbdev finds them."""
    return [path for path in sorted((root / "nbs").rglob("*.ipynb"))
            if not any(part[0] in "._" for part in path.relative_to(root).parts)]


def lessons(root: Path) -> list[Path]:
    """The notebooks that are lessons: they lie in the folder of one of the steps."""
    return [path for path in notebooks(root) if re.match(r"\d_", path.parent.name)]


def cells(notebook: Path) -> list[dict]:
    """The cells of a notebook: `source` and `printed` as text, `tags` as a set, `outputs` as a list."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in found:
        cell["source"] = "".join(cell["source"])
        cell["tags"] = set(cell["metadata"].get("tags", ()))
        cell.setdefault("outputs", [])
        cell["printed"] = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
    return found


def prose(path: Path) -> str:
    """The Markdown of a notebook or of a Markdown file."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown")


def parse_cell(cell: dict) -> ast.Module:
    """The syntax tree of a code cell; empty for Markdown and for code that is no Python."""
    try:
        return ast.parse(re.sub(r"^\s*[%!].*$", "", cell["source"], flags=re.M) if cell["cell_type"] == "code" else "")
    except SyntaxError:
        return ast.Module([], [])


def parse_module(path: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"))


def public(tree: ast.Module) -> list[ast.stmt]:
    """The classes and functions of a module that have no underscore."""
    return [node for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")]


def settings_of(root: Path) -> dict[str, str]:
    """What settings.ini says."""
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def tracked(root: Path) -> list[Path]:
    """The files that git keeps, or all of them where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    paths = [root / name for name in listed.stdout.split("\0") if name] or root.rglob("*")
    return [path for path in paths if path.is_file()]


def called(path: Path, root: Path) -> str:
    """How a message calls a file."""
    return path.relative_to(root).as_posix()


# --- notebooks

def out_of_step(root: Path) -> list[str]:
    """The package is what the notebooks export, no more and no less."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for path in [root / "settings.ini", *notebooks(root)]:
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        run = subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                             cwd=copy, capture_output=True, text=True)
        if run.returncode:
            return [f"the notebooks cannot be exported: {run.stderr.strip().splitlines()[-1]}"]
        kept, exported = ({called(path, base): path.read_text(encoding="utf-8")
                           for path in (base / "bigmodel").rglob("*.py")} for base in (root, copy))
    return ([f"{name}: no notebook exports this" for name in sorted(kept.keys() - exported.keys())]
            + [f"{name}: not exported yet; run make export" for name in sorted(exported.keys() - kept.keys())]
            + [f"{name}: differs from its notebook; edit the notebook, then run make export"
               for name in sorted(kept.keys() & exported.keys()) if kept[name] != exported[name]])


def unclean(root: Path) -> list[str]:
    """Notebooks are saved executed and clean: nbdev_clean would change nothing, no errors, small figures."""
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb
    found, settings = [], settings_of(root)
    allowed = {key: settings.get(key, "").split() for key in ("allowed_metadata_keys", "allowed_cell_metadata_keys")}
    for path in notebooks(root):
        notebook = read_nb(path)
        clean_nb(notebook, **allowed)
        if json.loads(nb2str(notebook)) != json.loads(path.read_text(encoding="utf-8")):
            found.append(f"{called(path, root)}: not clean; run nbdev_clean")
        where = defaultdict(list)
        for number, cell in enumerate(cells(path)):
            for what in _bad_outputs(cell):
                where[what].append(str(number))
        found += [f"{called(path, root)}, cell {', '.join(numbers)}: {what}" for what, numbers in where.items()]
    return found


def _bad_outputs(cell: dict) -> Iterator[str]:
    prints = any(isinstance(step, ast.Expr) and isinstance(step.value, ast.Call)
                 and getattr(step.value.func, "id", "") == "print" for step in parse_cell(cell).body)
    skipped = re.search(r"^#\| *eval: *false", cell["source"], flags=re.M)
    if (prints or "nbval-check-output" in cell["tags"]) and not cell["outputs"] and not skipped:
        yield "saved without its output; run the lesson with make lesson"
    for output in cell["outputs"]:
        if output["output_type"] == "error" and "raises-exception" not in cell["tags"]:
            yield f"saved with an error, {output['ename']}"
        for kind, data in output.get("data", {}).items():
            raw = "".join(data).encode() if kind.startswith("image/") else b""
            size = len(raw if kind == "image/svg+xml" else base64.b64decode(raw))
            if size > MAX_FIGURE:
                yield f"a figure of {size // 1024} KB; at most {MAX_FIGURE // 1024}"


def broken_exercises(root: Path) -> list[str]:
    """An exercise is three cells: its checker, a blank attempt that does not pass, a solution that does."""
    return [f"{called(path, root)}: {what}" for path in lessons(root) for what in _exercises(path)]


def _exercises(path: Path) -> Iterator[str]:
    every, names = [*cells(path), *[{"source": "", "tags": set(), "printed": ""}] * 2], []
    for number, cell in enumerate(every):
        if found := re.search(r'^@exercise\(\s*"([^"]+)"', cell["source"], flags=re.M):
            names.append(found[1])
            yield from (f"{found[1]}: {what}" for what in _exercise(found[1], *every[number:number + 3]))
    titles = re.findall(r"^### Exercise \d+: .+", prose(path), flags=re.M)
    if not 3 <= len(names) <= 6 or len(names) != len(titles):
        yield f"{len(names)} exercises under {len(titles)} titles '### Exercise N: ...'; expected three to six of both"


def _exercise(name: str, checker: dict, attempt: dict, solution: dict) -> Iterator[str]:
    call, folded = re.escape(f'check("{name}"'), "#| code-fold: true"
    if not checker["source"].startswith(folded) or not solution["source"].startswith(folded):
        yield f"checker and solution are folded by a first line '{folded}'"
    if "hints=" not in checker["source"]:
        yield "the checker has no hints"
    if not re.search(call + r"(?!.*solution=True)", attempt["source"]) or "..." not in attempt["source"]:
        yield "no blank attempt after the checker"
    elif "nbval-check-output" not in attempt["tags"] or attempt["printed"] != f"{name}: not attempted yet\n":
        yield "the attempt must be tagged nbval-check-output and be saved saying 'not attempted yet'"
    if not re.search(call + r".*solution=True", solution["source"]):
        yield "no worked solution after the attempt"
    elif (not {"nbval-check-output", "solution"} <= solution["tags"]
          or solution["printed"] != f"{name}: passed (worked solution)\n"):
        yield "the solution must be tagged nbval-check-output, solution and be saved saying 'passed (worked solution)'"


def broken_anatomy(root: Path) -> list[str]:
    """A lesson opens with title, promise and card, and closes with Summary, Exercises, Further reading."""
    found = []
    for path in lessons(root):
        first, text = cells(path)[0]["source"], prose(path)
        missing = [] if re.match(r"# .+\n\n> .+", first) else ["an opening of '# Title' and '> promise'"]
        missing += [f"'{part}' in its card" for part in CARD if part not in first]
        missing += [f"a section '{part}'" for part in ("Summary", "Exercises", "Further reading")
                    if not re.search(rf"^## {part}", text, flags=re.M)]
        found += [f"{called(path, root)}: lacks {', '.join(missing)}"] if missing else []
    return found


# --- the package

def wrong_imports(root: Path) -> list[str]:
    """Imports run one way, between the parts of the package and between modules; no stars, no `utils`."""
    found, graph = [], defaultdict(set)
    for path in modules(root):
        name = called(path, root)
        dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if path.stem in ("utils", "util", "helpers", "misc"):
            found.append(f"{name}: a module is named for what it is about")
        for target, star in _own_imports(path, root):
            graph[dotted].add(target)
            part, other = (f"{module}.".split(".")[1] for module in (dotted, target))
            if part and other and other != part and other not in MAY_IMPORT.get(part, ()):
                found.append(f"{name}: {part} may not import {target}")
            found += [f"{name}: imports * from {target}"] if star else []
    return found + [f"a circle of imports: {' -> '.join(circle)}" for circle in _circles(graph)]


def _own_imports(path: Path, root: Path) -> Iterator[tuple[str, bool]]:
    folder = path.relative_to(root).parent.parts
    for node in ast.walk(parse_module(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names if alias.name.split(".")[0] == "bigmodel")
        elif isinstance(node, ast.ImportFrom):
            above = folder[:len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names if base.split(".")[0] == "bigmodel" else ():
                inner, dunder = root.joinpath(*base.split("."), alias.name), alias.name.startswith("__")
                is_module = inner.is_dir() or inner.with_name(f"{alias.name}.py").is_file()
                is_module |= base == "bigmodel" and not dunder  # `from .. import models`
                yield f"{base}.{alias.name}" if is_module else base, alias.name == "*"


def _circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    done = set()

    def visit(name: str, trail: list[str]) -> Iterator[list[str]]:
        if name in trail:
            yield [*trail[trail.index(name):], name]
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                yield from visit(other, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        yield from visit(name, [])


def too_large(root: Path) -> list[str]:
    """A long module is a sign that a lesson wants splitting; a long line, of a thought that does."""
    found = []
    for path in modules(root):
        lines = path.read_text(encoding="utf-8").splitlines()
        written = [line for line in lines if not line.startswith("# %% ")]  # nbdev's marks of cells are not read
        if len(written) > MAX_LINES:
            found.append(f"{called(path, root)}: {len(written)} lines; at most {MAX_LINES}")
        first = next((number for number, line in enumerate(lines) if line.startswith("# %% ../")), 0)  # after nbdev's
        found += [f"{called(path, root)}:{number + 1}: {len(line)} characters; at most {MAX_WIDTH}"
                  for number, line in enumerate(lines) if number >= first and len(line) > MAX_WIDTH]
    return found


def undocumented(root: Path) -> list[str]:
    """Every public class, function and method has a docstring, and a comment for each parameter or field."""
    found = []
    for path in modules(root):
        text = path.read_text(encoding="utf-8")
        comments = {token.start[0]: token.line.lstrip().startswith("#")
                    for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT}
        found += [f"{called(path, root)}: {what}" for node in public(ast.parse(text)) for what in _bare(node, comments)]
    return found


def _bare(node: ast.ClassDef | ast.FunctionDef, comments: dict[int, bool], owner: str = "") -> Iterator[str]:
    """`comments` maps the lines that hold one to whether they hold nothing else: what fastcore's docments reads."""
    name, parameters = f"{owner}{node.name}", {}
    if node.name != "__init__" and not ast.get_docstring(node):
        yield f"{name} has no docstring"
    if isinstance(node, ast.ClassDef):
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            parameters = {field.target.id: field.lineno for field in node.body if isinstance(field, ast.AnnAssign)}
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or method.name[0] != "_"):
                yield from _bare(method, comments, f"{name}.")
    else:
        every = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
        parameters = {argument.arg: argument.lineno for argument in every if argument}
    for parameter, line in parameters.items():
        if parameter not in ("self", "cls") and parameter[0] != "_":
            own = list(parameters.values()).count(line) == 1 or set(parameters) <= {"self", "cls", parameter}
            if not own or not (line in comments or comments.get(line - 1)):
                yield f"{name}: {parameter} has no comment of its own"


def duplicates(root: Path) -> list[str]:
    """One public name, one definition, in one module."""
    homes = defaultdict(list)
    for path in modules(root):
        for node in public(parse_module(path)):
            homes[node.name].append(called(path, root))
    return [f"{name} is defined in {' and '.join(paths)}" for name, paths in sorted(homes.items()) if len(paths) > 1]


def slow_import(root: Path, limit: float = 0.1) -> list[str]:
    """Importing the package is instant, and brings neither torch nor transformers."""
    code = ("import sys, time; start = time.perf_counter(); import bigmodel; "
            "print(time.perf_counter() - start, *{'torch', 'transformers', 'numpy'} & sys.modules.keys())")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
            .stdout.split() for _ in range(5)]
    seconds = sorted(float(run[0]) for run in runs)[2]
    return [f"import bigmodel imports {heavy}" for heavy in sorted(runs[0][1:])] + (
        [f"import bigmodel takes {seconds:.2f} s; at most {limit}"] if seconds > limit else [])


# --- requirements, links, text

def unmet_imports(root: Path) -> list[str]:
    """What a module imports at its top is required; whatever else is imported anywhere is in an extra."""
    groups = {key: {re.match(r"[\w.-]+", word)[0].lower() for word in value.split()}
              for key, value in settings_of(root).items() if key.endswith("requirements")}
    required, every = groups["requirements"], set().union(*groups.values())
    found = []
    for path in modules(root):
        found += [f"{called(path, root)}: imports {name} at its top, which is not among the requirements"
                  for name in _missing(parse_module(path).body, required)]
    scripts = [path for folder in ("benchmarks", "docs", "tests", "tools") for path in (root / folder).rglob("*.py")]
    for path in [*modules(root), *notebooks(root), *scripts]:
        trees = [parse_module(path)] if path.suffix == ".py" else [parse_cell(cell) for cell in cells(path)]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        own = {script.stem for script in scripts}
        own |= set(re.findall(r"\b(\w+)\.py\b", path.read_text(encoding="utf-8")))  # files that a lesson writes
        found += [f"{called(path, root)}: imports {name}, which is in no extra"
                  for name in _missing(nodes, every | own)]
    return found


def _missing(nodes: Iterable[ast.AST], distributions: set[str]) -> list[str]:
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    names = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"bigmodel"}
    return sorted(name for name in names
                  if not {name.lower(), name.lower().replace("_", "-"), DISTRIBUTION.get(name)} & distributions)


def broken_links(root: Path) -> list[str]:
    """Links and pictures in notebooks and Markdown lead to files that exist, and to headings where they name one."""
    found = []
    for path in [*notebooks(root), *(path for path in tracked(root) if path.suffix == ".md")]:
        for target in _links(prose(path)):
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            if file.startswith("/") or not place.exists() or not place.is_relative_to(root.resolve()):
                found.append(f"{called(path, root)}: {target} leads nowhere")
            elif anchor and place.suffix in (".md", ".ipynb") and anchor.lower() not in _anchors(prose(place)):
                found.append(f"{called(path, root)}: {target}: there is no such heading")
    return found


def _links(text: str) -> list[str]:
    text = re.sub(r"^(```|~~~).*?^\1|\$\$.*?\$\$", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`|\$[^$\n]+\$", "", text)
    targets = re.findall(r"\]\(<?([^()\s>]+)>?(?:\s+[\"'][^)]*)?\)", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*<?(\S+?)>?\s*$", text, flags=re.M)
    targets += re.findall(r"""<(?:img|a|source)\b[^>]*?(?:src|srcset|href)=["']([^"']+)""", text)
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ +(.+?)\s*$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-").lower() for title in titles}


def stale_readme(root: Path) -> list[str]:
    """README.md is what the course map says."""
    same = (root / "README.md").read_text(encoding="utf-8") == readme(root / "nbs" / "index.ipynb")
    return [] if same else ["README.md: differs from nbs/index.ipynb; run make readme"]


def machine_paths(root: Path) -> list[str]:
    """No tracked file knows the machine on which it was written."""
    private = re.compile(r"(?<![\w.~}/-])/(?:work|root|home/\w+|Users/\w+|tmp)/[\w.-]+")
    found = []
    for path in tracked(root):
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{called(path, root)}: holds the path {place}" for place in sorted(set(private.findall(text)))]
    return found


def lint(root: Path) -> list[str]:
    """Ruff has nothing to say."""
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format=concise", "--quiet", "--no-cache"],
                         cwd=root, capture_output=True, text=True)
    return (run.stdout + run.stderr).splitlines() if run.returncode else []


QUICK = (out_of_step, unclean, broken_exercises, stale_readme)
CHECKS = (*QUICK, broken_anatomy, wrong_imports, too_large, undocumented, duplicates, slow_import, unmet_imports,
          broken_links, machine_paths, lint)

if __name__ == "__main__":
    problems = [problem for check in (QUICK if "--quick" in sys.argv else CHECKS) for problem in check(ROOT)]
    print("\n".join(problems) or "no problems")
    sys.exit(bool(problems))
