"""The notebooks without their solutions, for a class: a copy of notebooks/ in another folder.

Folded solutions are taken out. What would give an answer away in the cell of an exercise, the expected value or
function that `check` compares with, is encoded: the cell runs as before and says "Right" or "Not yet", but nobody reads
the answer by accident. Outputs of the book's own run are kept, so a student can compare; those of exercises say "Not
attempted yet". Links to pages that are not notebooks become plain text.

    python scripts/student.py _build/student
"""

from __future__ import annotations

import ast
import base64
import copy
import json
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOLUTION = re.compile(r"<details>\s*<summary>Solution.*?</details>\s*", flags=re.DOTALL)
OPEN = re.compile(r"^(\w+) = \.\.\.$", flags=re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)\s]+)\)")
NOTE = "# What follows checks your answer. It is encoded, so that it does not give the answer away."


def without_solutions(text: str) -> str:
    """A text cell without its folded solutions."""
    return SOLUTION.sub("", text)


def without_answer(source: str) -> str:
    """A code cell with an open answer, in which what `check` compares with cannot be read off.

    Encoded is the call of `check` with the functions it names that this cell defines or imports, unless all it names is
    something of an earlier cell.
    """
    tree = ast.parse(source)
    checks = [node for node in tree.body if _is_check(node)]
    made_here: dict[str, ast.stmt] = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)} | {
        alias.asname or alias.name: node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and len(node.names) == 1
        for alias in node.names
    }
    hidden: list[ast.stmt] = []
    for node in checks:
        expected = node.value.args[1]  # type: ignore[attr-defined]
        if isinstance(expected, ast.Name) and expected.id in made_here:
            hidden += [made_here[expected.id], node]
        elif not isinstance(expected, (ast.Name, ast.Attribute)):
            hidden.append(node)
    if not hidden:
        return source
    lines = source.splitlines()
    secret = "\n".join(
        "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in sorted(hidden, key=lambda node: node.lineno)
    )
    for node in hidden:
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)  # type: ignore
    kept = re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if line is not None)).strip()
    code = base64.b64encode(secret.encode()).decode()
    wrapped = "\n".join(f'    "{part}"' for part in textwrap.wrap(code, 90))
    return f"{kept}\n\n{NOTE}\nimport base64\n\nexec(base64.b64decode(\n{wrapped}\n))"


def _is_check(node: ast.stmt) -> bool:
    call = getattr(node, "value", None)
    return (
        isinstance(node, ast.Expr)
        and isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == "check"
        and len(call.args) > 1
    )


def student(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook without solutions; cells that held nothing else are gone."""
    notebook = copy.deepcopy(notebook)
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text = LINK.sub(_link, without_solutions(source)).strip()
            if not text:
                continue
            cell["source"] = text.splitlines(keepends=True)
        elif OPEN.search(source):
            cell["source"] = without_answer(source).splitlines(keepends=True)
            if "tags" in cell["metadata"]:  # the cell was folded for what is encoded now
                cell["metadata"]["tags"] = [tag for tag in cell["metadata"]["tags"] if tag != "hide-input"]
        cells.append(cell)
    notebook["cells"] = cells
    return notebook


def _link(match: re.Match[str]) -> str:
    """Links among notebooks stay; other pages of the book are not in the copy."""
    text, target = match.groups()
    return match[0] if target.partition("#")[0].endswith(".ipynb") else f"{text} (a page of the book)"


def build(target: Path, source: Path = ROOT / "notebooks") -> list[Path]:
    """Write the copies; what was in `target` before is replaced, if it was ours.

    Raises:
        SystemExit: `target` holds something else.
    """
    mark = target / "README.md"
    if target.exists() and any(target.iterdir()) and not (mark.is_file() and mark.read_text() == README):
        sys.exit(f"{target} is not empty and not a student copy; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as staging:
        new = Path(staging) / "student"
        for path in sorted(source.rglob("*.ipynb")):
            if ".ipynb_checkpoints" in path.parts:
                continue
            written = new / path.relative_to(source)
            written.parent.mkdir(parents=True, exist_ok=True)
            notebook = student(json.loads(path.read_text(encoding="utf8")))
            written.write_text(
                json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf8"
            )
        (new / "README.md").write_text(README, encoding="utf8")
        if target.exists():
            shutil.rmtree(target)
        new.replace(target)
    return sorted(target.rglob("*.ipynb"))


README = """# Notebooks for a class

The chapters without their solutions. Install refimpl (`pip install '.[lab,kernels]'` in a checkout of
the book) and start with tour.ipynb. An exercise says "Not attempted yet" until you replace its dots.
"""


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_build" / "student"
    for path in build(folder):
        print(path)
