"""Exercises of the notebooks: unattempted as committed, right with the folded solution, wrong with a wrong answer."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").rglob("*.ipynb"))
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
OPEN = re.compile(r"^(\w+) = \.\.\.$", re.MULTILINE)


def execute(source: str, names: dict[str, Any]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(source, "<cell>", "exec"), names)
    return said.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFIMPL_PROFILE", "quick")
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    exercises = 0
    for index, (kind, source) in enumerate(cells):
        if kind != "code" or "%pip" in source:
            continue
        open_answer = OPEN.search(source)
        said = execute(source, names)
        if open_answer is None:
            continue
        exercises += 1
        assert "Not attempted" in said
        # the solution is in the next text cell: it takes the place of the line with the dots
        text = next(text for kind, text in cells[index + 1 :] if kind == "markdown")
        solution = FENCE.search(text)
        assert solution is not None, f"no folded solution after {open_answer[1]} = ..."
        assert "<details>" in text[: solution.start()]
        assert execute(source.replace(open_answer[0], solution[1]), names).startswith("Right."), open_answer[1]
        wrong = execute(source.replace(open_answer[0], f"{open_answer[1]} = 'nonsense'"), names)
        assert wrong.startswith("Not yet"), open_answer[1]
    assert exercises
