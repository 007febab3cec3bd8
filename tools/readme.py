"""Write README.md from the course map: `python tools/readme.py`. Links are turned to the repository's root."""

import json
import re
from pathlib import Path
from posixpath import normpath

ROOT = Path(__file__).resolve().parent.parent


def readme(index: Path) -> str:
    """The index as Markdown: prose with its links turned, code cells as blocks."""
    parts = []
    for cell in json.loads(index.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "code" and not source.startswith("#| hide"):
            source = f"```python\n{source}\n```"
            printed = "".join("".join(output.get("text", "")) for output in cell["outputs"]).rstrip()
            source += f"\n\n```text\n{printed}\n```" if printed else ""
        elif cell["cell_type"] == "markdown":
            source = re.sub(r"(\]\(|src=\"|srcset=\")(?![a-z]+:|#)([^)\"\s]+)",
                            lambda found: found[1] + normpath(f"nbs/{found[2]}"), source)
        else:
            continue
        parts.append(source)
    return "<!-- Written from nbs/index.ipynb by tools/readme.py: edit there. -->\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
    print("README.md written from nbs/index.ipynb")
