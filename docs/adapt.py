"""Turn the course's notebooks into pages: directives become tags, outputs are tidied, the reference is added."""

import ast
import re
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from reference import Module, assigned, read_module, render

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)\)")
FRAGMENT = re.compile(r"(?<=\]\()((?:[^)\s#:]+\.ipynb)?#[^)\s]+)(?=\))")
HIDDEN_OUTPUTS = {"application/javascript", "application/vnd.jupyter.widget-view+json"}


def settings() -> dict[str, str]:
    """Read `settings.ini`, the one place for names and addresses."""
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@dataclass
class Page:
    name: str  # its path without the suffix: `2_models/03_gpt`
    notebook: NotebookNode
    module: Module | None


def read_pages(folder: Path) -> list[Page]:
    """Adapt every notebook in the folder; the front page comes first."""
    paths = [path for path in sorted(folder.rglob("*.ipynb"))
             if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)]
    pages = [adapt(path, path.relative_to(folder).with_suffix("").as_posix()) for path in paths]
    front = [page for page in pages if page.name == "index"]
    lessons = [page for page in pages if page.name != "index"]
    if not front:
        title, description = settings()["title"], settings()["description"]
        cells = [new_markdown_cell(f"# {title}\n\n> {description}.")]
        front = [Page("index", nbformat.v4.new_notebook(cells=cells), None)]
    front[0].notebook.cells.append(new_markdown_cell(contents(lessons)))
    return front + lessons


def adapt(path: Path, name: str) -> Page:
    """Adapt one notebook."""
    notebook = nbformat.read(path, as_version=4)
    cells, module, heading = [], None, ""
    for cell in notebook.cells:
        directives = take_directives(cell) if cell.cell_type == "code" else {}
        if "default_exp" in directives:
            module = find_module(directives["default_exp"])
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda link: repository_link(link, path.parent), cell.source)
            cell.source = re.sub(r"(\.\./)+images/", "../" * name.count("/") + "images/", cell.source)
            cell.source = FRAGMENT.sub(lambda link: slug(link[1]), cell.source)
            heading = ([heading] + re.findall(r"^#+\s+(.+)$", cell.source, flags=re.MULTILINE))[-1]
        if {"hide", "default_exp"} & directives.keys() or directives.get("include") == "false":
            continue
        if not cell.source.strip() and not cell.get("outputs"):
            continue
        if cell.cell_type == "code":
            dress(cell, directives, heading)
        cells.append(cell)
        if module and "exported" in cell.metadata.get("tags", []):
            cells += caption(cell.source, module)
    if cells and name != "index":
        cells[0].source += links(name, module)
    if module:
        cells.append(new_markdown_cell(f"## Reference\n\n{render(module)}"))
    notebook.cells = cells
    notebook.metadata = NotebookNode(language_info={"name": "python", "pygments_lexer": "ipython3"})
    return Page(name, notebook, module)


def repository_link(link: re.Match, folder: Path) -> str:
    """Point a link to a file that is no page, such as a licence, to the repository, once that has an address."""
    for file in ((folder / link[2]).resolve(), (ROOT / link[2]).resolve()):
        if file.exists() and file.is_relative_to(ROOT) and file.suffix not in (".ipynb", ".svg", ".png"):
            kind, address = "tree" if file.is_dir() else "blob", settings()["git_url"].rstrip("/")
            place = f"{address}/{kind}/{settings()['branch']}/{file.relative_to(ROOT).as_posix()}"
            return f"[{link[1]}]({place})" if address else link[1]
    return link[0]


def slug(link: str) -> str:
    """JupyterLab's anchors keep capitals and punctuation, `#Why-so?`; those of the site do not: `#why-so`."""
    path, _, anchor = link.partition("#")
    return path + "#" + re.sub(r"[^\w-]", "", unquote(anchor).lower())


def take_directives(cell: NotebookNode) -> dict[str, str]:
    """Remove the `#|` lines at the head of a cell and return what they say."""
    lines, found = cell.source.split("\n"), {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        found[match[1]] = match[2]
        lines.pop(0)
    cell.source = "\n".join(lines).strip("\n")
    return found


def find_module(name: str) -> Module:
    """Read the module that a notebook exports to."""
    path = ROOT / "bigmodel" / Path(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        raise FileNotFoundError(f"a lesson exports to {path.relative_to(ROOT)}, but it is missing; run nbdev_export")
    return read_module(path, f"bigmodel.{name}")


def dress(cell: NotebookNode, directives: dict[str, str], heading: str) -> None:
    """Give a code cell the tags that MyST-NB understands, and tidy its outputs."""
    tags = set(cell.metadata.get("tags", []))
    folded = directives.get("code-fold") == "true" or cell.metadata.get("jupyter", {}).get("source_hidden")
    if directives.get("echo") == "false":
        tags.add("remove-input")
    elif folded or imports_only(cell.source):
        tags.add("hide-cell" if "solution" in tags else "hide-input")
    if directives.get("output") == "false":
        tags.add("remove-output")
    if {"export", "exports", "exporti"} & directives.keys():
        tags.add("exported")
    summary = directives.get("code-summary", "").strip("\"'").replace("`", "")
    if not summary:
        checker = re.search(r"^@exercise\(", cell.source, flags=re.MULTILINE)
        summary = ("Worked solution" if "solution" in tags else "The checker" if checker
                   else "Imports" if imports_only(cell.source) else "Show the code")
    cell.outputs = [output for output in map(tidy, cell.outputs) if output]
    cell.metadata = NotebookNode(tags=sorted(tags), mystnb={
        "code_prompt_show": summary, "code_prompt_hide": summary,
        "image": {"alt": f"Figure: {re.sub(r'[`*$]', '', heading)}" if heading else "Figure"}})


def imports_only(source: str) -> bool:
    """Whether a cell is a list of imports long enough to stand in a reader's way."""
    return source.count("\n") > 3 and all(re.match(r"import |from |[\s)#]|$", line) for line in source.split("\n"))


def tidy(output: NotebookNode) -> NotebookNode | None:
    """Leave of an output what a page can show: finished progress bars, no scripts, no widgets."""
    if output.output_type == "stream":
        output.text = "\n".join(overwrite(line) for line in output.text.split("\n")).rstrip("\n")
        return output if output.text.strip() else None
    for kind in HIDDEN_OUTPUTS & output.get("data", {}).keys():
        del output.data[kind]
    return output if output.output_type == "error" or output.data else None


def overwrite(line: str) -> str:
    """Play carriage returns as a terminal does: what comes after one replaces what stood before."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part):]
    return shown.rstrip() if "\r" in line else shown


def links(name: str, module: Module | None) -> str:
    """The line under a lesson's card: the notebook itself, and the way to the reference."""
    up = "../" * name.count("/")
    download = f'<a href="{up}notebooks/{name}.ipynb" download>Download the notebook</a>'
    reference = f" · Reference of `{module.name}`" if module else ""
    return f"\n\n:::{{container}} links\n{download}{reference}\n:::\n"


def caption(source: str, module: Module) -> list[NotebookNode]:
    """A line under an exported cell which says what the package gains by it."""
    defined = {getattr(node, "name", None) or assigned(node) for node in ast.parse(source).body}
    names = [f"`{entry.name}`" for entry in module.entries if entry.name in defined]
    if not names:
        return []
    return [new_markdown_cell(f":::{{container}} exported\nGoes into `{module.name}`: {', '.join(names)}\n:::")]


def contents(lessons: list[Page]) -> str:
    """The tree of lessons by the five steps, for the sidebar."""
    steps: dict[str, list[str]] = {}
    for page in lessons:
        folder = page.name.rpartition("/")[0]
        title = folder.split("/")[0].split("_", 1)[-1].replace("_", " ").capitalize() if folder else "Workshop"
        steps.setdefault(title, []).append(page.name)
    order = ["core", "learn", "", "cli"]  # any other page stands between them
    workshop = sorted(steps.pop("Workshop", []), key=lambda name: order.index(name if name in order else ""))
    steps["Workshop"] = [*workshop, "reference"]
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *names, "```"])
                       for title, names in steps.items())


def index_of_names(pages: list[Page]) -> str:
    """A page with every public name, one line each."""
    parts = ["# All names", "> Everything that `bigmodel` exports, module by module."]
    for module in sorted((page.module for page in pages if page.module), key=lambda item: item.name):
        parts += [f"## {module.name}", module.doc.split("\n\n")[0]]
        lines = ["```{list-table}", ":class: names", ":widths: 35 65", ""]
        for entry in module.entries:
            lines += [f"* - {{py:obj}}`{entry.name} <{module.name}.{entry.name}>`", f"  - {entry.summary}".rstrip()]
        parts += ["\n".join([*lines, "```"])]
    return "\n\n".join(parts) + "\n"
