"""The first code cell of every notebook: it installs refimpl on Colab and does nothing elsewhere.

python scripts/install_cell.py            print the cell
python scripts/install_cell.py --write    put it into every notebook (after the address in _config.yml changed)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
#: The rendered page leaves the cell out: a reader of the page has nothing to install.
METADATA = {"tags": ["remove-cell"]}


def install_cell() -> str:
    """Source of the cell, with the address from _config.yml."""
    address = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))["repository"]["url"]
    action = (
        f'    %pip install -q "refimpl[lab] @ git+{address}"'
        if address
        else (
            '    print("The public address of this book is not decided yet. In a checkout, run")\n'
            '    print("    pip wheel --no-deps -w dist .")\n'
            "    print(\"then upload the file from dist/ here and run  %pip install '<the file>[lab]'\")"
        )
    )
    return (
        "# On Colab this cell installs refimpl; elsewhere it does nothing.\n"
        "import importlib.util\n"
        "import sys\n"
        "\n"
        'if "google.colab" in sys.modules and importlib.util.find_spec("refimpl") is None:\n'
        f"{action}"
    )


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").rglob("*.ipynb"))


def first_code_cell(notebook: dict) -> dict:
    return next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def write(path: Path) -> None:
    """Replace the notebook's install cell, or put one before its first code cell."""
    notebook = json.loads(path.read_text(encoding="utf8"))
    cell = first_code_cell(notebook)
    if not "".join(cell["source"]).startswith("# On Colab this cell"):
        position = notebook["cells"].index(cell)
        cell = {"cell_type": "code", "execution_count": None, "id": "install", "outputs": []}
        notebook["cells"].insert(position, cell)
    cell["source"] = install_cell().splitlines(keepends=True)
    cell["metadata"] = METADATA
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf8")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for path in notebooks():
            write(path)
    else:
        print(install_cell())
