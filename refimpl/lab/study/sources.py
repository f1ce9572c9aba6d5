"""Hashes of source code that ignore what does not run: comments, layout, docstrings.

A result is stale when the code it came from has changed; a better docstring must not make it so. Standard
library only, and the same hash on every supported Python (`ast.dump` and `ast.unparse` differ between them).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

_IGNORED = {"ctx", "kind", "type_comment", "type_ignores"}  # follow from the rest, or mean nothing at run time


def source_hash(source: str) -> str:
    """SHA-256 (hex) of the parts of a module's source that run.

    Example:
        >>> source_hash("x = 1  # one") == source_hash('"The number."\\nx = (1)')
        True
    """
    return hashlib.sha256(_canonical(ast.parse(source)).encode()).hexdigest()


def _canonical(node: object) -> str:
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node if not _says_nothing(item)) + "]"
    if not isinstance(node, ast.AST):
        return ascii(node)  # not repr: which characters print depends on the Unicode tables of the Python
    # Fields without a value are left out: newer Pythons have more of them (type_params since 3.12).
    fields = [
        f"{name}={_canonical(value)}"
        for name, value in sorted(ast.iter_fields(node))
        if name not in _IGNORED and value is not None and value != []
    ]
    if isinstance(node, ast.JoinedStr):  # Python 3.12.0-3.12.3 ends some f-strings with an empty constant
        fields = [f"values={_canonical([part for part in node.values if getattr(part, 'value', None) != ''])}"]
    return f"{type(node).__name__}({','.join(fields)})"


def _says_nothing(node: object) -> bool:
    """A docstring of a module, class, function or attribute: a statement that is only a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def module_hash(name: str) -> str:
    """`source_hash` of an importable module, or of all modules below a package.

    Raises:
        ModuleNotFoundError: no such module, or it has no Python source.

    Example:
        >>> len(module_hash("refimpl.lab.study.sources"))
        64
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ModuleNotFoundError(f"no Python source found for module {name!r}", name=name)
    if not spec.submodule_search_locations:
        return source_hash(Path(spec.origin).read_text(encoding="utf-8"))
    root = Path(spec.origin).parent
    files = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    lines = [f"{path.relative_to(root).as_posix()} {source_hash(path.read_text(encoding='utf-8'))}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def module_hashes(names: Iterable[str]) -> dict[str, str]:
    """`module_hash` of several modules, by name.

    Example:
        >>> list(module_hashes(["refimpl.lab.study.sources"]))
        ['refimpl.lab.study.sources']
    """
    return {name: module_hash(name) for name in names}
