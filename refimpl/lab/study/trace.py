"""Which functions of the package ran: what a record rests on, noted while it is made."""

from __future__ import annotations

import cProfile
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

from refimpl.lab.study.sources import Sources

_ROOT = Path(__file__).resolve().parents[2]
_ENGINE = ("lab", "study")


@contextmanager
def traced() -> Iterator[set[tuple[str, str]]]:
    """Inside the block, note the functions of the package, but for those of its study engine, that run in this thread.

    The profiler of the standard library takes the notes, in C: a training of the smallest network of the book takes 5 %
    longer. It cannot be nested, and no other profiler may run.

    Yields:
        A set that holds (module, "function" or "Class.method") once the block has ended.

    Example:
        >>> from refimpl.papers import paper
        >>> with traced() as ran:
        ...     _ = paper("eora")
        >>> ("refimpl.papers", "paper") in ran
        True
    """
    ran: set[tuple[str, str]] = set()
    profiler = cProfile.Profile(subcalls=False, builtins=False)
    profiler.enable()
    try:
        yield ran
    finally:
        profiler.disable()
        codes = [entry.code for entry in profiler.getstats()]
        ran.update(filter(None, (_function(code) for code in codes if isinstance(code, CodeType))))


@functools.cache
def _sources() -> Sources:
    return Sources.of_tree(_ROOT.parent)


@functools.cache
def _function(code: CodeType) -> tuple[str, str] | None:
    try:
        path = Path(code.co_filename).resolve().relative_to(_ROOT)
    except ValueError:
        return None
    if path.parts[:2] == _ENGINE:  # passes numbers on and computes none
        return None
    parts = [_ROOT.name, *path.with_suffix("").parts]
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    name = _sources().function_at(module, code.co_firstlineno)
    return None if name is None else (module, name)
