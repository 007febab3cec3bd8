"""Sphinx settings for the site. `docs/build.py` calls Sphinx with them."""

import importlib.util
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.fileutil import copy_asset
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
from adapt import ROOT, settings  # noqa: E402
from reference import read_module  # noqa: E402

_settings = settings()
_address = _settings["git_url"].rstrip("/")

project = _settings["title"]
author = _settings["author"]
version = release = _settings["version"]
language = "en"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax",
              "sphinx.ext.linkcode" if _address else "sphinx.ext.viewcode"]
root_doc = "index"

nb_execution_mode = "off"  # the outputs that are committed are the outputs that are shown
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["alert", "amsmath", "colon_fence", "deflist", "dollarmath", "html_image", "tasklist"]
myst_heading_anchors = 3
smartquotes_action = "qe"
copybutton_selector = "div:not(.output) > div.highlight > pre"  # code, not what it prints
add_module_names = False
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"
viewcode_follow_imported_members = False

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["bigmodel.css"]
html_logo = html_favicon = "_static/mark.svg"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
mathjax_path = "mathjax/tex-chtml-full.js"
pygments_style = "palette.Light"
pygments_dark_style = "palette.Dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00588a", "color-brand-content": "#0067a3"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ee", "color-brand-content": "#7cc4ee"},
}


class LinkNames(SphinxPostTransform):
    """Link a name in backticks, such as `Tokenizer.train`, to its reference."""

    default_priority = 20

    def run(self, **_: object) -> None:
        objects = self.env.domains.python_domain.objects
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, nodes.title | nodes.reference | addnodes.pending_xref):
                continue
            name = re.sub(r"\(.*\)$", "", literal.astext(), flags=re.DOTALL)
            found = [full for full in objects if full == name or full.endswith(f".{name}")]
            found = [full for full in found if _is_named(full, name, objects[full].objtype)]
            here = [full for full in found if objects[full].docname == self.env.docname]
            if len(here or found) != 1:
                continue
            target = objects[(here or found)[0]]
            literal.replace_self(make_refnode(self.app.builder, self.env.docname, target.docname, target.node_id,
                                              literal.deepcopy(), f"{(here or found)[0]}"))


def _is_named(full: str, name: str, kind: str) -> bool:
    """Whether prose may call `full` by `name`: modules and methods need the part before the dot."""
    return "." in name or kind in ("class", "function", "data")


def find_source(_: Sphinx, name: str) -> tuple[str, dict]:
    """Give the source pages a module's text and the place of each name, without importing it."""
    path = _path(name)
    analyzer = ModuleAnalyzer.for_file(str(path), name)
    tags = dict(analyzer.find_tags())
    tags |= {entry.name: ("data", *entry.lines) for entry in read_module(path, name).entries if entry.kind == "data"}
    return analyzer.code, tags


def linkcode_resolve(_: str, info: dict[str, str]) -> str | None:
    """The address of a name's source, once the repository has one."""
    path = _path(info["module"])
    tags = find_source(None, info["module"])[1]
    if info["fullname"] not in tags:
        return None
    _, first, last = tags[info["fullname"]]
    return f"{_address}/blob/{_settings['branch']}/{path.relative_to(ROOT).as_posix()}#L{first}-L{last}"


def _path(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


def add_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put the part of MathJax that pages use beside them: no page fetches anything from elsewhere."""
    source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    if error is None:
        copy_asset(source / "tex-chtml-full.js", target)
        copy_asset(source / "output" / "chtml" / "fonts", target / "output" / "chtml" / "fonts")


def setup(app: Sphinx) -> None:
    """Register what is ours."""
    app.add_post_transform(LinkNames)
    app.connect("build-finished", add_mathjax)
    if not _address:
        app.connect("viewcode-find-source", find_source)
