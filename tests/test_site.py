"""The site: it builds without a warning, every link in it leads somewhere, and it needs nothing from the network."""

import ast
import functools
import html.parser
import http.server
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("myst_nb", reason="the site's tools are not installed: pip install -e '.[dev]'")
bs4 = pytest.importorskip("bs4", reason="the site's tools are not installed: pip install -e '.[dev]'")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import adapt  # noqa: E402
import conf  # noqa: E402
import reference  # noqa: E402

LESSONS = sorted(path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb")
                 if ".ipynb_checkpoints" not in path.parts and path.name != "index.ipynb")


@dataclass
class Site:
    folder: Path
    warnings: str
    output: str = ""
    pages: dict = field(default_factory=dict)

    def page(self, name: str) -> "bs4.BeautifulSoup":
        """A page, parsed once."""
        if name not in self.pages:
            text = (self.folder / f"{name}.html").read_text(encoding="utf-8")
            self.pages[name] = bs4.BeautifulSoup(text, "html.parser")
        return self.pages[name]


def build(out: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the command that a person runs."""
    return subprocess.run([sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(out), *options],
                          capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("the site") / "out"
    done = build(folder, "--draft")  # a draft, so that one bad link fails one test rather than all
    assert done.returncode == 0, done.stdout + done.stderr
    return Site(folder, done.stderr.strip(), done.stdout)


# Links: our own checker, which knows nothing of Sphinx


class Links(html.parser.HTMLParser):
    """Collect from one page its anchors, its links and what a browser loads for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors, self.links, self.loads, self.styles = {"", "top"}, [], [], []
        self.in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values and (name == "id" or tag == "a")}
        self.in_style = tag == "style"
        self.styles.append(values.get("style", ""))
        if tag in ("a", "area"):
            self.links.append(values.get("href", ""))
        elif tag == "link" and values.get("rel") not in ("canonical", "alternate", "author"):
            is_page = values.get("rel") in ("next", "prev", "index", "search")
            (self.links if is_page else self.loads).append(values.get("href", ""))
        self.loads += [values[name] for name in ("src", "data", "poster", "xlink:href") if name in values]
        self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.styles.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False


def is_external(address: str) -> bool:
    return bool(re.match(r"//|(?!data:|mailto:|javascript:|blob:)[a-z][a-z0-9+.-]*:", address.strip(), re.IGNORECASE))


def style_loads(text: str) -> list[str]:
    """What a style sheet loads."""
    text = re.sub(r"url\(\s*(['\"]?)data:.*?\1\s*\)", "", text, flags=re.DOTALL)
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)
    return [address for address in found if not address.startswith(("data:", "#"))]


def problems(folder: Path) -> list[str]:
    """Every link that leads nowhere, and everything that a page would fetch from elsewhere."""
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []

    def follow(origin: Path, address: str, load: bool) -> None:
        label = f"{origin.relative_to(folder.resolve()).as_posix()}: {address}"
        if is_external(address):
            found.extend([f"{label} is fetched from elsewhere"] if load else [])
            return
        if not address or address.startswith(("data:", "mailto:", "javascript:", "blob:")):
            return
        path, anchor = urldefrag(address)
        target = (origin.parent / unquote(path.split("?")[0])).resolve() if path else origin
        if not target.is_file():
            found.append(f"{label} leads to no file")
        elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
            found.append(f"{label} leads to no anchor")

    for path, page in pages.items():
        for address in page.links:
            follow(path, address, load=False)
        for address in page.loads + [load for style in page.styles for load in style_loads(style)]:
            follow(path, address, load=True)
    for path in sorted(folder.rglob("*.css")):
        for address in style_loads(path.read_text(encoding="utf-8")):
            if is_external(address):
                found.append(f"{path.name}: {address} is fetched from elsewhere")
    return found


@pytest.mark.parametrize("text, complaint", [
    ('<a href="missing.html">x</a>', "leads to no file"),
    ('<a href="other.html#nowhere">x</a>', "leads to no anchor"),
    ('<a href="#nowhere">x</a>', "leads to no anchor"),
    ('<img src="missing.png">', "leads to no file"),
    ('<script src="https://cdn.example/mathjax.js"></script>', "fetched from elsewhere"),
    ('<script src="//cdn.example/mathjax.js"></script>', "fetched from elsewhere"),
    ('<link rel="stylesheet" href="https://fonts.example/css">', "fetched from elsewhere"),
    ('<link rel="preload" href="http://fonts.example/x.woff2">', "fetched from elsewhere"),
    ('<img srcset="http://images.example/a.png 2x">', "fetched from elsewhere"),
    ('<style>@import "https://fonts.example/css";</style>', "fetched from elsewhere"),
    ('<p style="background: url(https://images.example/a.png)">x</p>', "fetched from elsewhere"),
    ('<iframe src="https://video.example"></iframe>', "fetched from elsewhere"),
])
def test_the_checker_sees_what_is_broken(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "other.html").write_text('<p id="here">x</p><a href="https://example.org">fine</a>', encoding="utf-8")
    (tmp_path / "good.html").write_text('<a href="other.html?q=1#here">x</a><img src="data:image/png;base64,AA">',
                                        encoding="utf-8")
    assert problems(tmp_path) == []
    (tmp_path / "bad.html").write_text(text, encoding="utf-8")
    (found,) = problems(tmp_path)
    assert complaint in found


def test_builds_without_warnings(site: Site) -> None:
    assert site.warnings == ""


def test_says_what_it_does(site: Site) -> None:
    for lesson in LESSONS:
        assert re.search(rf"^\[ *\d+/\d+\] {re.escape(lesson)}$", site.output, flags=re.MULTILINE), lesson
    assert site.output.strip().splitlines()[-1].endswith("index.html")


def test_every_link_leads_somewhere_and_nothing_is_fetched(site: Site) -> None:
    assert problems(site.folder) == []


def test_a_broken_link_stops_the_build_and_leaves_the_old_site(tmp_path: Path) -> None:
    notebooks, out = tmp_path / "nbs", tmp_path / "out"
    (notebooks / "1_data").mkdir(parents=True)
    lesson = new_notebook(cells=[new_markdown_cell("# A lesson\n\nSee [another](02_missing.ipynb).")])
    nbformat.write(lesson, notebooks / "1_data" / "01_lesson.ipynb")
    out.mkdir()
    (out / "objects.inv").write_text("an older site")
    done = build(out, "--notebooks", str(notebooks))
    assert done.returncode == 1
    assert "01_lesson.ipynb: cell 1, line 3" in done.stderr and "02_missing.ipynb" in done.stderr
    assert [path.name for path in out.iterdir()] == ["objects.inv"]


def test_does_not_replace_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = build(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "--out" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "precious"


# What every page has


def test_the_lessons_stand_in_the_sidebar_by_the_five_steps(site: Site) -> None:
    captions = [item.get_text() for item in site.page("index").select(".sidebar-tree .caption-text")]
    known = ["Start", "Data", "Models", "Training", "Evaluation", "Deployment", "Applications", "Workshop"]
    assert captions == [name for name in known if name in captions] and captions[-1] == "Workshop"
    listed = [link["href"].removesuffix(".html") for link in site.page("index").select(".sidebar-tree a.reference")]
    assert set(LESSONS) <= set(listed)


def test_next_leads_through_all_lessons(site: Site) -> None:
    name, walked = "index", []
    while link := site.page(name).select_one("a.next-page"):
        target = (site.folder / f"{name}.html").parent / link["href"]
        name = target.resolve().relative_to(site.folder.resolve()).with_suffix("").as_posix()
        walked.append(name)
        assert site.page(name).select_one("a.prev-page"), name
    folders = [lesson for lesson in LESSONS if "/" in lesson]
    assert walked[:len(folders)] == folders and set(walked) == {*LESSONS, "reference"}


@pytest.mark.parametrize("name", ["index", *LESSONS, "reference"])
def test_a_page_has_search_a_dark_mode_and_one_title(site: Site, name: str) -> None:
    page = site.page(name)
    assert page.select_one(".theme-toggle") and page.select_one("input[name=q]")
    assert len(page.select("article h1")) == 1
    assert not re.search(r"^#\s*\|", page.select_one("article").get_text(), flags=re.MULTILINE), "a directive is shown"
    assert all(image.get("alt") for image in page.select("article img")), "an image has no words for it"


def test_the_search_knows_every_lesson(site: Site) -> None:
    text = (site.folder / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    for lesson in LESSONS:
        number = index["docnames"].index(lesson)
        here = {term for term, pages in index["terms"].items()
                if number == pages or isinstance(pages, list) and number in pages}
        prose = " ".join(item.get_text() for item in site.page(lesson).select("article p"))
        longest = sorted(set(re.findall(r"\b[a-z]{6,12}\b", prose)), key=len)[-5:]
        assert any(word.startswith(term) for word in longest for term in here if len(term) > 3), lesson


# The reference


def exported() -> dict[str, list[str]]:
    """Module -> its public names, for every module that a lesson exports."""
    found = {}
    for lesson in LESSONS:
        text = (ROOT / "nbs" / f"{lesson}.ipynb").read_text(encoding="utf-8")
        if match := re.search(r"#\| default_exp ([\w.]+)", text):
            path = ROOT / "bigmodel" / Path(*match[1].split(".")).with_suffix(".py")
            names = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
            found[f"bigmodel.{match[1]}"] = lesson, ast.literal_eval(names[1])
    return found


EXPORTED = exported()


def parameters_of(thing: object) -> list[str]:
    """The parameters of a function or class as Python itself sees them."""
    if isinstance(thing, type) and not ("__init__" in vars(thing) or hasattr(thing, "__dataclass_fields__")):
        return []
    names = [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]
    return [name for name in names if not name.startswith("_")]


def described(entry: "bs4.Tag") -> dict[str, str]:
    """Parameter -> its description, from an entry of the reference."""
    rows = entry.find("dd", recursive=False).select(":scope > .table-wrapper table.parameters > tbody > tr")
    cells = [[cell.get_text().strip() for cell in row.find_all("td")] for row in rows]
    return {name.lstrip("*"): text for name, _, text in cells}


@pytest.mark.parametrize("module", EXPORTED)
def test_every_public_name_has_its_entry(site: Site, module: str) -> None:
    lesson, names = EXPORTED[module]
    page = site.page(lesson)
    for name in names:
        thing = getattr(importlib.import_module(module), name)
        things = {name: thing}
        if isinstance(thing, type):
            methods = {key: getattr(value, "__func__", value) for key, value in vars(thing).items() if key[0] != "_"}
            things |= {f"{name}.{key}": method for key, method in methods.items()
                       if getattr(method, "__qualname__", None) == f"{name}.{key}"}
        for short, item in things.items():
            heading = page.find(id=f"{module}.{short}")
            assert heading is not None, f"{module}.{short} has no anchor"
            source = heading.select_one("a .viewcode-link").parent["href"]
            path = module.replace(".", "/")
            assert (f"/{path}.py#L" if conf._address else f"_modules/{path}.html#{short}") in source
            if isinstance(item, type) or inspect.isroutine(item):
                table = described(heading.parent)
                missing = [key for key in parameters_of(item) if not table.get(key)]
                assert not missing, f"{module}.{short} does not describe {missing}"


@pytest.mark.parametrize("module", EXPORTED)
def test_names_in_backticks_lead_to_the_reference(site: Site, module: str) -> None:
    lesson, _ = EXPORTED[module]
    unique = [name for _, names in EXPORTED.values() for name in names]
    unique = {name for name in unique if unique.count(name) == 1}
    for literal in site.page(lesson).select("article p code.literal, article li code.literal"):
        if literal.get_text() in unique and not literal.find_parent("dt"):
            link = literal.find_parent("a")
            assert link is not None and link["href"].endswith(f".{literal.get_text()}"), literal


def test_all_names_are_on_one_page(site: Site) -> None:
    links = site.page("reference").select("table.names td:first-child a.reference")
    links = {link["href"].partition("#")[2] for link in links}
    assert links == {f"{module}.{name}" for module, (_, names) in EXPORTED.items() for name in names}


def test_source_links_lead_to_the_repository_once_it_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conf, "_address", "https://git.example/bigmodel")
    link = conf.linkcode_resolve("py", {"module": "bigmodel.core", "fullname": "pick_device"})
    address, first, last = re.fullmatch(r"(.*)#L(\d+)-L(\d+)", link).groups()
    assert address == "https://git.example/bigmodel/blob/main/bigmodel/core.py"
    lines = (ROOT / "bigmodel" / "core.py").read_text(encoding="utf-8").split("\n")
    assert lines[int(first) - 1].startswith("def pick_device") and "return" in lines[int(last) - 1]


MODULE = '''"""A module."""
__all__ = ["SIZES", "Shape", "Model", "scale"]
SIZES = {"small": 1}  # how large
@dataclass
class Shape:
    """The shape."""
    width: int = 8  # in pixels
    # counted from the top,
    # in pixels
    height: int = 9
    kind: ClassVar[str] = "box"
class Model(Base):
    """A model.

        input ── output
    """
    def __init__(self,
        shape: Shape,  # how large
    ):
        pass
    @classmethod
    def load(cls, folder: Path) -> "Model":  # the model, read
        """Load it."""
    @property
    def size(self) -> int:  # in bytes
        """How large."""
    def _private(self): ...
    def __len__(self) -> int:  # layers
        """Count."""
def scale(
    x: Float[Tensor, "batch time"],  # what to scale; "a # b"
    /,
    *factors: float,  # by these
    round_up: bool = "#" == "#",  # whether to round
    **others,  # passed on
) -> Float[Tensor, "batch time"]:  # scaled
    """Scale.

    Raises `ValueError`."""
def _helper(): ...
'''


def test_reads_a_module_without_importing_it(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODULE, encoding="utf-8")
    sizes, shape, model, scale = reference.read_module(tmp_path / "m.py", "m").entries
    assert (sizes.kind, sizes.doc) == ("data", "how large")
    assert [(item.name, item.default, item.text) for item in shape.parameters] == [
        ("width", "8", "in pixels"), ("height", "9", "counted from the top, in pixels")]
    assert model.signature == "(shape)" and model.parameters[0].text == "how large"
    assert [(item.kind, item.name) for item in model.members] == [
        ("method", "load"), ("property", "size"), ("method", "__len__")]
    assert model.members[0].signature == "(folder)" and model.members[0].returns.text == "the model, read"
    assert model.members[0].returns.type == "Model" and model.doc == "A model.\n\n    input ── output"
    assert scale.signature == '(x, *factors, round_up="#" == "#", **others)'
    assert [item.text for item in scale.parameters] == [
        'what to scale; "a # b"', "by these", "whether to round", "passed on"]
    assert scale.returns.type == 'Float[Tensor, "batch time"]' and scale.returns.text == "scaled"


# Cells


def test_directives_become_tags_and_are_not_shown(tmp_path: Path) -> None:
    cells = [
        new_markdown_cell("# A lesson\n\nRead [the licence](LICENSE) and [the next](02_next.ipynb), "
                          "[why](#Why-%22so%22,-then?)."),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("#| echo: false\nshown()", outputs=[new_output("stream", text="  5%|▌ |\r100%|██|\n")]),
        new_code_cell("#| code-fold: true\nplot()"),
        new_code_cell("#| code-fold: true\n#| code-summary: \"`draw`: the drawing\"\ndef draw(): ..."),
        new_code_cell('#| code-fold: true\n@exercise("a.b")\ndef _(f): ...'),
        new_code_cell("#| code-fold: true\nanswer()", metadata={"tags": ["solution"]}),
        new_code_cell("#| export\nimport a\nimport b\nimport c\nimport d\nimport e"),
        new_code_cell("bar()", outputs=[new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "lesson.ipynb")
    page = adapt.adapt(tmp_path / "lesson.ipynb", "lesson").notebook.cells
    assert all("#|" not in cell.source and "secret" not in cell.source for cell in page)
    assert "Read the licence and [the next](02_next.ipynb), [why](#why-so-then)." in page[0].source
    echo, fold, draw, checker, solution, imports, bar = page[1:]
    assert echo.metadata.tags == ["remove-input"] and echo.outputs[0].text == "100%|██|"
    assert fold.metadata.tags == ["hide-input"] and "hide-cell" in solution.metadata.tags
    assert [cell.metadata.mystnb["code_prompt_show"] for cell in (fold, draw, checker, solution, imports)] == [
        "Show the code", "draw: the drawing", "The checker", "Worked solution", "Imports"]
    assert imports.metadata.tags == ["exported", "hide-input"] and bar.outputs == []


@pytest.mark.parametrize("line, shown", [
    ("plain  ", "plain  "), ("10%\r100%", "100%"), ("abcdef\rxy", "xycdef"), ("bar  \r     \r", ""),
    ("100%\r", "100%"),
])
def test_carriage_returns_are_played_as_in_a_terminal(line: str, shown: str) -> None:
    assert adapt.overwrite(line) == shown


# In a browser


@pytest.fixture(scope="session")
def browser():
    """A Chromium, if there is one. It is not needed to work on the course."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: no browser test")
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def address(site: Site):
    """The site as a server on this machine shows it."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_browser_shows_it_without_errors_or_network(browser, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="light")
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:"))
            else elsewhere.append(request.url))
    for name in ["index", *LESSONS, "reference"]:
        page.goto(f"{address}/{name}.html", wait_until="load")
        if page.locator("span.math, div.math").count():
            page.wait_for_selector("mjx-container", state="attached")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name} is {width} pixels wide on a phone of 390"
    assert errors == [] and elsewhere == []
    page.close()


def test_a_reader_can_search_and_darken(browser, address: str) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(f"{address}/search.html?q=pick_device")
    page.wait_for_selector("ul.search li a")
    assert any("pick_device" in text for text in page.locator("ul.search li").all_inner_texts())
    page.goto(f"{address}/core.html")
    colours = set()
    for _ in range(3):
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator(".content-icon-container .theme-toggle").click()
    assert len(colours) == 2
    page.close()
