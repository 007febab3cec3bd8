"""Export the notebooks, then run one and save it, clean: `python tools/lesson.py nbs/2_models/02_gpt.ipynb`."""

import os
import sys
import time
from pathlib import Path

import nbformat
from execnb.nbio import read_nb, write_nb
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export
from readme import ROOT, readme


def run(path: Path) -> None:
    """Run a notebook in its own folder and put the result in its place, if no cell fails."""
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True,
                            resources={"metadata": {"path": str(path.parent)}},
                            on_cell_executed=lambda cell, **_: print(f"\r{code.index(cell) + 1} of {len(code)} cells",
                                                                     end="", flush=True))
    start = time.time()
    client.execute()
    print(f" in {time.time() - start:.0f} s")
    for cell in code:  # a progress bar that has gone leaves a blank line behind
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr" or output.text.strip()]
    aside = path.with_name(f".{path.name}")
    nbformat.write(notebook, aside)
    clean = read_nb(aside)
    clean_nb(clean, allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys.split())
    write_nb(clean, aside)
    os.replace(aside, path)


def main() -> None:
    """Run the command line."""
    path = Path(sys.argv[1]).resolve() if len(sys.argv) == 2 and sys.argv[1] else None
    if not path or path.suffix != ".ipynb" or not path.is_file():
        sys.exit("name the notebook to run: make lesson NB=nbs/2_models/02_gpt.ipynb")
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # as the tests run it
    nbdev_export()
    run(path)
    if path.name == "index.ipynb":
        (ROOT / "README.md").write_text(readme(path), encoding="utf-8")


if __name__ == "__main__":
    main()
