"""Exercises of the notebooks: unattempted as committed, right with the folded solution, wrong with a wrong answer.

Every cell runs when the notebooks themselves are tested. Here run those that an exercise needs.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import symtable
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


def names_of(source: str) -> tuple[set[str], set[str]]:
    """The global names that a piece of code binds, and those that it uses, in its functions and classes too."""
    bound, used = set(), set()
    waiting = [symtable.symtable(source, "<cell>", "exec")]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                bound |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
    return bound, used


def needed(cells: list[str], exercises: list[int]) -> set[int]:
    """The places of the cells to run so that exercises find what they would find in the whole notebook.

    From the last cell to the first: a cell is needed if it binds a name that a needed cell after it uses, and likewise
    if it may change what such a name stands for. Calls of what was imported do not change it.
    """
    imported = {name for cell in cells for name in imports(cell)}
    chosen: set[int] = set()
    wanted: set[str] = set()
    for place in range(max(exercises), -1, -1):
        bound, used = names_of(cells[place])
        if place in exercises or bound & wanted or (changed(cells[place]) - imported) & wanted:
            chosen.add(place)
            wanted |= used
    return chosen


def imports(source: str) -> set[str]:
    """Names that the cell imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {(alias.asname or alias.name).partition(".")[0] for node in nodes for alias in node.names}


def changed(source: str) -> set[str]:
    """Names that a piece of code uses in a way that may change what they stand for.

    These are the arguments of calls, what a method or an attribute that is called belongs to, and what is assigned to.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Call):
            parts = [node.func, *node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            parts = [node.target] if isinstance(node, ast.AugAssign) else list(node.targets)
        elif isinstance(node, ast.withitem):
            parts = [node.context_expr]
        found |= {name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)}
    return found


def test_cells_that_an_exercise_needs_are_found() -> None:
    bound, used = names_of("import a.b\ndef f(x): return x + y\nz = [k for k in f(1)]")
    assert bound == {"a", "f", "z"} and used == {"y", "f"}
    assert changed("a.append(b)\nc['d'] = e\nf + g\nh += 1\nwith i: pass") == {"a", "b", "c", "h", "i"}
    cells = ["import m", "x = [2]", "y = m.f(3)", "x.append(1)", "f(y)", "def g(): return x", "m.f(1)", "a = ...; g()"]
    assert needed(cells, [7]) == {1, 3, 5, 7}
    assert needed([*cells[:7], "a = ...; g() + y"], [7]) == {0, 1, 2, 3, 4, 5, 7}, "f might change y"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFIMPL_PROFILE", "quick")
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    code = [source if kind == "code" and "%pip" not in source else "" for kind, source in cells]
    exercises = [index for index, source in enumerate(code) if OPEN.search(source)]
    assert exercises
    for index in sorted(needed(code, exercises)):
        source = code[index]
        said = execute(source, names)
        if index not in exercises:
            continue
        open_answer = OPEN.search(source)
        assert open_answer is not None and "Not attempted" in said
        # the solution is in the next text cell: it takes the place of the line with the dots
        text = next(text for kind, text in cells[index + 1 :] if kind == "markdown")
        solution = FENCE.search(text)
        assert solution is not None, f"no folded solution after {open_answer[1]} = ..."
        assert "<details>" in text[: solution.start()]
        assert execute(source.replace(open_answer[0], solution[1]), names).startswith("Right."), open_answer[1]
        wrong = execute(source.replace(open_answer[0], f"{open_answer[1]} = 'nonsense'"), names)
        assert wrong.startswith("Not yet"), open_answer[1]
