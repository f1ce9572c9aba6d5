"""Exercises of the notebooks: unattempted as committed, right with the folded solution, wrong with a wrong answer.

An answer takes the place of the line with the dots, so it may bind any name, and those of the chapter come first to mind.
What it is compared with must not follow it.

Every cell runs when the notebooks themselves are tested. Here run those that an exercise needs.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import json
import re
import symtable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from refimpl.lab.show.check import Kept

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").rglob("*.ipynb"))
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
OPEN = re.compile(r"^(\w+) = \.\.\.$", re.MULTILINE)

#: Wrong answers that take over names which the expected value is made from, by the name of the answer.
UNDER_THE_CHAPTERS_NAMES = {
    "act_s": "def truncated_svd(A, rank):\n    return A[:, :rank], torch.ones(rank), A[:rank]\n\n"
    "def act_s(dW, s, rank):\n    U, values, Vt = truncated_svd(dW * s, rank)\n    return U @ torch.diag(values) @ Vt / s",
    "answer": "class plan:\n    def __init__(self, *arguments):\n        self.bits_per_weight = 3.0\n\n"
    "compress, GPTQ = (lambda *arguments, **options: None,) * 2\nanswer = plan().bits_per_weight",
    "block_mask": "def magnitude_mask(W, s, block):\n    return W > 0\n\n"
    "def block_mask(W, s, h, w):\n    return magnitude_mask(W, s, '')",
    "cholesky_BA": "B, A = 0 * B, 0 * A\ncholesky_BA = B @ A",
    "class_counts": "def draw_stratified(labels, r, seed, j):\n    return torch.arange(2)\n\n"
    "def class_counts(labels, r):\n    return labels[draw_stratified(labels, r, 0, 0)]",
    "concentration": "def most_concentrated(m, r):\n    return m\n\nconcentration = most_concentrated(256, 0.5)",
    "five_losses": "def my_weights(losses, shape, r=0.4):\n    return torch.ones(5)\n\nfive_losses = [1.0, 1.1, 4.0, 4.5, 5.0]",
    "least_loss": "def allocate_bits(delta, saved, budget, reference):\n    return type('Best', (), {'delta': 0.0})\n\n"
    "def least_loss(delta, saved, budget):\n    return allocate_bits(delta, saved, budget, 4).delta",
    "my_loss": "def my_weights(losses, shape, r=0.4):\n    return torch.ones_like(losses)\n\n"
    "def my_loss(own, every, q, world):\n    return world * (my_weights(own, 'linupper') * own).sum()",
    "old_rows": "def shares(r, sizes):\n    return [1 - r, *[r / len(sizes)] * len(sizes)]\n\n"
    "def old_rows(t, sizes, r, B):\n    return [round(B * share) for share in shares(r, sizes)[1:]]",
    "output_error": "def quadratic(D, G):\n    return D.sum()\n\noutput_error = quadratic",
    "ratio": "def draw_variance(n, k, variance):\n    return variance / k\n\nratio = draw_variance(3200, 320, 1.0) * 320",
    "same_product": "A, B = 0 * A, 0 * B\nsame_product = A @ B",
    "two_tables": "def regret(tables):\n    return 1.0\n\ntwo_tables = [[0, 1, 2], [0, 1, 2]]",
    "unpack2": "def unpack(words, bits):\n    return torch.zeros(5, 48, dtype=torch.int32)\n\n"
    "quant = type('quant', (), {'unpack': staticmethod(unpack)})\n\n"
    "def unpack2(words2):\n    return quant.unpack(words2, 2).T",
}


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


def compared_with(source: str, answer: str) -> set[str]:
    """Names of other cells, or from before the answer, that the rest of an exercise's cell uses."""
    body = ast.parse(source).body
    place = next(k for k, node in enumerate(body) if ast.unparse(node) == f"{answer} = ...")
    bound, used = names_of(ast.unparse(ast.Module(body[place + 1 :], [])))
    return used - bound - set(dir(builtins)) - {answer, "check"}


def test_what_an_answer_is_compared_with_is_found() -> None:
    source = (
        "import m\nx = ...\n\ndef e(a):\n    from n import f\n    return f(a) + g(a)\n\ncheck(x, e, on=[m.t, len(B)])"
    )
    assert compared_with(source, "x") == {"m", "g", "B"}


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
        loose = {
            name for name in compared_with(source, open_answer[1]) if not isinstance(names[name], (ModuleType, Kept))
        }
        assert not loose, f"{open_answer[1]} is compared with {loose}: import or define it below the dots, or `keep` it"
        if open_answer[1] in UNDER_THE_CHAPTERS_NAMES:
            before = dict(names)
            taken = execute(source.replace(open_answer[0], UNDER_THE_CHAPTERS_NAMES[open_answer[1]]), names)
            assert taken.startswith("Not yet"), f"{open_answer[1]} accepts what takes over the names of the chapter"
            names.clear()
            names.update(before)


def test_every_answer_under_the_chapters_names_belongs_to_an_exercise() -> None:
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"]]
    answers = {found[1] for cell in cells if (found := OPEN.search("".join(cell["source"])))}
    assert set(UNDER_THE_CHAPTERS_NAMES) <= answers
