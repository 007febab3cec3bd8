"""Read a module without importing it: its public names, signatures, and the comment beside each parameter."""

import ast
import io
import tokenize
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SHOWN_DUNDERS = {"__call__", "__getitem__", "__iter__", "__len__", "__contains__", "__next__"}


@dataclass
class Parameter:
    name: str  # with its stars: `*args`
    type: str = ""
    default: str = ""
    text: str = ""  # the comment beside it


@dataclass
class Entry:
    kind: str  # a directive of Sphinx's Python domain: class, function, method, property, data
    name: str
    lines: tuple[int, int]  # first and last line in the module
    options: list[str] = field(default_factory=list)
    doc: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    returns: Parameter | None = None
    members: list["Entry"] = field(default_factory=list)
    signature: str = ""

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join(self.doc.split("\n\n")[0].split())


@dataclass
class Module:
    name: str
    path: Path
    doc: str
    entries: list[Entry]


@cache
def read_module(path: Path, name: str) -> Module:
    """Read what `__all__` lists, in the order of the file."""
    source = path.read_text(encoding="utf-8")
    tree, comments = ast.parse(source), _comments(source)
    public, entries = set(), []
    for node in tree.body:
        target = assigned(node)
        if target == "__all__":
            public = set(ast.literal_eval(node.value))
        elif target in public:
            entries.append(_constant(node, target, comments))
        elif getattr(node, "name", None) in public:
            entries.append(_class(node, comments) if isinstance(node, ast.ClassDef)
                           else _function(node, comments, "function"))
    return Module(name, path, ast.get_docstring(tree) or "", entries)


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line number -> the comment there, and whether it has the line to itself."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# ").rstrip(), not token.line[:token.start[1]].strip()
    return found


def _comment(comments: dict[int, tuple[str, bool]], node: ast.AST) -> str:
    """The comment at the end of a node's last line, else the comment lines right above it."""
    text, alone = comments.get(node.end_lineno, ("", True))
    if text and not alone:
        return text
    above, line = [], node.lineno - 1
    while comments.get(line, ("", False))[1]:
        above.insert(0, comments[line][0])
        line -= 1
    return " ".join(above)


def _docstring(node: ast.AST) -> str:
    """A docstring without the indentation of its body; what is indented further, such as a drawing, stays so."""
    indent = " " * node.body[0].col_offset
    lines = (ast.get_docstring(node, clean=False) or "").strip().split("\n")
    return "\n".join(line.removeprefix(indent).rstrip() for line in lines)


def _text(node: ast.AST) -> str:
    """Source text of a type or a default, as it stands in the lesson: with double quotes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return f'"{node.value}"' if node.value.isprintable() and '"' not in node.value else repr(node.value)
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def _type(node: ast.AST | None) -> str:
    """Source text of an annotation; a forward reference loses its quotes."""
    quoted = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if quoted else _text(node) if node else ""


def assigned(node: ast.AST) -> str | None:
    """The name that an assignment gives a value to."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def _constant(node: ast.Assign | ast.AnnAssign, name: str, comments: dict) -> Entry:
    value = _text(node.value) if node.value else ""
    options = [f":type: {_type(node.annotation)}"] if isinstance(node, ast.AnnAssign) else []
    options += [f":value: {value}"] if 0 < len(value) <= 90 else []
    return Entry("data", name, (node.lineno, node.end_lineno), options, _comment(comments, node))


def _class(node: ast.ClassDef, comments: dict) -> Entry:
    entry = Entry("class", node.name, _lines(node), doc=_docstring(node))
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
              and not item.target.id.startswith("_") and "ClassVar" not in _text(item.annotation)]
    entry.parameters = [Parameter(item.target.id, _type(item.annotation),
                                  _text(item.value) if item.value else "", _comment(comments, item))
                        for item in fields]
    for item in node.body:
        if not isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if item.name == "__init__":
            entry.parameters = _function(item, comments, "method").parameters
        elif not item.name.startswith("_") or item.name in SHOWN_DUNDERS and ast.get_docstring(item):
            entry.members.append(_function(item, comments, "method"))
            entry.members[-1].options.append(":no-contents-entry:")
    entry.signature = _signature(entry.parameters)
    return entry


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, comments: dict, kind: str) -> Entry:
    entry = Entry(kind, node.name, _lines(node), doc=_docstring(node))
    decorators = {_text(item).split(".")[-1] for item in node.decorator_list}
    entry.options += [f":{name}:" for name in ("classmethod", "staticmethod") if name in decorators]
    entry.parameters = _parameters(node.args, comments)
    if kind == "method" and "staticmethod" not in decorators:
        entry.parameters = entry.parameters[1:]
    if node.returns and _text(node.returns) != "None":
        entry.returns = Parameter("returns", _type(node.returns), text=_comment(comments, node.returns))
    if {"property", "cached_property"} & decorators:
        entry.kind = "property"
    else:
        entry.signature = _signature(entry.parameters)
    return entry


def _lines(node: ast.AST) -> tuple[int, int]:
    return min([node.lineno, *(item.lineno for item in node.decorator_list)]), node.end_lineno


def _parameters(arguments: ast.arguments, comments: dict) -> list[Parameter]:
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    rows = [("", item, default) for item, default in zip(positional, defaults, strict=True)]
    rows += [("*", arguments.vararg, None)] if arguments.vararg else []
    rows += [("", item, default) for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    rows += [("**", arguments.kwarg, None)] if arguments.kwarg else []
    found = []
    for stars, item, default in rows:
        last = default or item  # the comment stands after the default
        found.append(Parameter(stars + item.arg, _type(item.annotation),
                               _text(default) if default else "",
                               _comment(comments, last) or _comment(comments, item)))
    if arguments.kwonlyargs and not arguments.vararg:
        found.insert(len(positional), Parameter("*"))
    return found


def _signature(parameters: list[Parameter]) -> str:
    """Names and defaults only: the types stand in the table below."""
    return "(" + ", ".join(item.name + (f"={item.default}" if item.default else "") for item in parameters) + ")"


def render(module: Module) -> str:
    """The module's reference as MyST markdown, with an anchor for every name."""
    parts = [f":::{{py:module}} {module.name}\n:::", *(_render(entry, depth=6) for entry in module.entries)]
    return "\n\n".join(parts)


def _render(entry: Entry, depth: int) -> str:
    fence = ":" * depth
    rows = [item for item in entry.parameters if item.name != "*"] + ([entry.returns] if entry.returns else [])
    if entry.kind == "property" and entry.returns:
        entry.options, rows = [*entry.options, f":type: {entry.returns.type}"], []
        entry.doc = entry.doc or entry.returns.text
    parts = [f"{fence}{{py:{entry.kind}}} {entry.name}{entry.signature}", *entry.options, "", entry.doc, ""]
    parts += [_table(rows, ":" * (depth - 1)), ""] if rows else []
    parts += [_render(member, depth - 2) + "\n" for member in entry.members]
    return "\n".join([*parts, fence])


def _table(rows: list[Parameter], fence: str) -> str:
    lines = [f"{fence}{{list-table}}", ":class: parameters", ":header-rows: 1", ":widths: auto", "",
             "* - Parameter", "  - Type", "  - Meaning"]
    for row in rows:
        name = "*returns*" if row.name == "returns" else f"`{row.name}`"
        type_and_default = (f"`{row.type}`" if row.type else "") + (f" = `{row.default}`" if row.default else "")
        lines += [f"* - {name}", f"  - {type_and_default}".rstrip(), f"  - {row.text}".rstrip()]
    return "\n".join([*lines, fence])
