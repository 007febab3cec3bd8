"""Build the site from the notebooks: `python docs/build.py [--out _docs]`. Needs no network; warnings are errors."""

import argparse
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent))
from adapt import ROOT, index_of_names, read_pages  # noqa: E402


def write_sources(notebooks: Path, folder: Path) -> int:
    """Write the adapted pages and all that they show into a folder for Sphinx. Returns how many pages there are."""
    pages = read_pages(notebooks)
    for page in pages:
        path = folder / "nbs" / f"{page.name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page.notebook, path)
    (folder / "nbs" / "reference.md").write_text(index_of_names(pages), encoding="utf-8")
    if (ROOT / "images").is_dir():
        shutil.copytree(ROOT / "images", folder / "nbs" / "images")
    return len(pages) + 1


def run_sphinx(folder: Path, total: int) -> tuple[Path, str]:
    """Build the pages into `folder/site`. Returns that folder and the warnings."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    warnings, source, site = io.StringIO(), folder / "nbs", folder / "site"
    with patch_docutils(), docutils_namespace():
        app = Sphinx(source, Path(__file__).parent, site, folder / "doctrees", "html", status=None, warning=warnings,
                     freshenv=True)
        count = iter(range(1, total + 1))
        app.connect("doctree-read", lambda app, _: print(f"[{next(count):>2}/{total}] {app.env.docname}", flush=True))
        app.build(force_all=True)
    text = re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).replace(f"{source}{os.sep}", "nbs/").strip()
    return site, re.sub(r"(?<=\.ipynb:)(\d+)(\d{4}):", lambda at: f" cell {int(at[1])}, line {int(at[2]) - 1}:", text)


def place(site: Path, out: Path) -> None:
    """Put the finished site where it was asked for, in place of an older one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        shutil.rmtree(out)
    shutil.move(site, out)


def build(out: Path, notebooks: Path = ROOT / "nbs", draft: bool = False) -> str:
    """Build the site into `out` and return the warnings. With any, `out` stays as it was unless this is a draft."""
    if out.exists() and any(out.iterdir()) and not (out / "objects.inv").is_file():
        raise FileExistsError(f"{out} holds files that are no site of ours; name another folder with --out")
    with tempfile.TemporaryDirectory(prefix="bigmodel-site-") as name:
        folder = Path(name).resolve()
        site, warnings = run_sphinx(folder, write_sources(notebooks, folder))
        if draft or not warnings:
            if (ROOT / "images").is_dir():  # for pictures in raw HTML, which Sphinx does not see
                shutil.copytree(ROOT / "images", site / "images")
            shutil.copytree(notebooks, site / "notebooks", ignore=lambda at, names: [
                item for item in names if item[0] in "._" or not (Path(at, item).is_dir() or item.endswith(".ipynb"))])
            place(site, out)
    return warnings


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder for the site (default: _docs)")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "nbs", help="folder of the lessons (default: nbs)")
    parser.add_argument("--draft", action="store_true", help="write the site in spite of warnings")
    options = parser.parse_args()
    try:
        warnings = build(options.out.resolve(), options.notebooks.resolve(), options.draft)
    except (OSError, ValueError) as error:
        sys.exit(f"the site was not built: {error}")
    if warnings and options.draft:
        print(warnings, file=sys.stderr)
    elif warnings:
        sys.exit(f"{warnings}\nthe site was not built: each warning above is an error; {options.out} is unchanged")
    print(f"the site stands in {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
