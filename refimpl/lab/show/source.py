"""Sources of the package on a page: as they run, without what the text around them says already."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from refimpl.core.errors import OptionError


def source(*functions: Callable[..., Any] | type) -> None:
    """Print the source of functions, methods or classes, without docstrings and blank lines around it.

    Args:
        functions: of the package.

    Raises:
        OptionError: something whose source is not in a file, e.g. a builtin.

    Example:
        >>> from refimpl.lab.measure.statistics import difference
        >>> source(difference)
        def difference(gap: np.ndarray) -> np.ndarray:
            return gap
    """
    print("\n\n\n".join(_without_docstrings(function) for function in functions))


def _without_docstrings(function: Callable[..., Any] | type) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (TypeError, OSError) as error:
        raise OptionError(
            f"functions has {function!r}, whose source is in no file; give a function of refimpl"
        ) from error
    lines: list[str | None] = list(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno or 0
            while last < len(lines) and not lines[last]:
                last += 1
            lines[first:last] = [None] * (last - first)
    return "\n".join(line for line in lines if line is not None).rstrip()
