"""Printed sources: what runs, without docstrings; and what the notebooks show is the package as it is."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refimpl.core.errors import OptionError
from refimpl.lab.show.source import source

NOTEBOOKS = sorted((Path(__file__).parents[3] / "notebooks").rglob("*.ipynb"))


class Example:
    """What it is.

    More of it.
    """

    @torch.no_grad()
    def method(self, x: str = "a") -> str:
        """Says 'def'."""

        def inside() -> str:
            """Another docstring, in other quotes."""
            return """no docstring"""

        return x + inside()  # a comment stays


def test_docstrings_are_left_out_and_nothing_else_is(capsys):
    source(Example.method)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "@torch.no_grad()",
        'def method(self, x: str = "a") -> str:',
        "    def inside() -> str:",
        '        return """no docstring"""',
        "",
        "    return x + inside()  # a comment stays",
    ]
    source(Example, source)
    said = capsys.readouterr().out
    assert said.startswith("class Example:\n    @torch.no_grad()\n    def method") and "\n\n\ndef source(" in said
    assert "What it is" not in said and "Args:" not in said


def test_what_has_no_source_is_named():
    with pytest.raises(OptionError, match="built-in function len"):
        source(len)


def printed(path: Path) -> list[tuple[list[Any], str]]:
    """What a notebook hands to `source`, and what its stored outputs show."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    trees = [ast.parse("".join(cell["source"])) for cell in cells]
    homes = {
        alias.asname or alias.name: (node.module, alias.name)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for cell, tree in zip(cells, trees, strict=True):
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "source"]
        if calls and homes.get("source") == ("refimpl.lab.show.source", "source"):
            functions = []
            for argument in (argument for call in calls for argument in call.args):
                name, *attributes = ast.unparse(argument).split(".")
                value = getattr(importlib.import_module(homes[name][0]), homes[name][1])
                for attribute in attributes:
                    value = getattr(value, attribute)
                functions.append(value)
            found.append((functions, "".join("".join(output.get("text", "")) for output in cell["outputs"])))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_sources_that_a_notebook_shows_are_those_of_the_package(path, capsys):
    for functions, shown in printed(path):
        source(*functions)
        now = capsys.readouterr().out
        assert now in shown, f"{path.name} shows another {[f.__qualname__ for f in functions]}: execute it again"


def test_every_chapter_but_one_shows_a_source_and_none_in_another_way():
    shown = [path for path in NOTEBOOKS if printed(path)]
    assert len(shown) >= 8
    assert not [path.name for path in NOTEBOOKS if "getsource" in path.read_text() and path.stem != "kernels"]


def test_parts_of_kernels_are_shown_as_they_are(capsys):
    """The page on kernels cuts lines out of long ones: its cells that do so run by themselves."""
    (path,) = (path for path in NOTEBOOKS if path.stem == "kernels")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for line in "".join("".join(cell["source"]) + "\n" for cell in cells).splitlines():
        if line == "import inspect" or line.startswith("from refimpl.kernels import "):
            exec(line, names)
    found = [cell for cell in cells if "getsource(" in "".join(cell["source"])]
    assert len(found) == 4
    for cell in found:
        capsys.readouterr()
        exec("".join(cell["source"]), names)
        shown = "".join(text for output in cell["outputs"] for text in output.get("text", ""))
        assert capsys.readouterr().out == shown, f"{cell['id']} shows another source: execute the notebook again"
