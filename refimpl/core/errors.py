"""Errors a user can act on: each message names the argument, the value and the remedy.

Everything refimpl raises on purpose derives from `RefimplError`, so a command line can print the message
without a traceback and a program can catch the lot in one clause.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType


class RefimplError(Exception):
    """Base class of the errors meant for the person who called."""


class OptionError(RefimplError, ValueError):
    """An argument has a value that cannot work."""


class CalibrationError(RefimplError, ValueError):
    """The calibration tokens are empty, too short, out of range, or lead to NaN activations."""


class CheckpointError(RefimplError):
    """A checkpoint is truncated, foreign, pickled, or does not belong to the model."""


class FileError(RefimplError, OSError):
    """A file cannot be written or read: a full disk, a read-only folder, or something else than a file in its place."""


class TrainingError(RefimplError):
    """Training cannot continue; says at which step, and from where to resume it."""


class FetchError(RefimplError):
    """A download failed or its hash is wrong."""


class MissingExtra(RefimplError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    Args:
        module: importable name, e.g. ``"gguf"``.
        extra: the extra of refimpl that installs it, e.g. ``"lab"``.

    Raises:
        MissingExtra: with the install command, when the import fails.

    Example:
        >>> require("json", "lab").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs the package {error.name!r}, which is not installed: pip install 'refimpl[{extra}]'"
        ) from error


def nearest(value: str, choices: Iterable[str]) -> str:
    """The end of an error message: the allowed choices, and the nearest one if it is close.

    Example:
        >>> nearest("sequental", ["sequential", "parallel"])
        "one of 'sequential', 'parallel' (did you mean 'sequential'?)"
    """
    names = list(choices)
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(value.lower(), folded, n=1)
    hint = f" (did you mean {folded[close[0]]!r}?)" if close else ""
    return "one of " + ", ".join(repr(name) for name in names) + hint


def reason(error: BaseException) -> str:
    """What another library says about an error, on one line, to be quoted in a message of ours.

    Example:
        >>> reason(ValueError("bad value\\nin line 3"))
        'bad value'
    """
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


@contextmanager
def reading(path: object, remedy: str) -> Iterator[None]:
    """Around the reading of a file or folder: whatever a damaged one makes Python or a library raise names it.

    Args:
        path: what is read.
        remedy: the end of the message.

    Raises:
        CheckpointError: instead of any error that is not one of refimpl.

    Example:
        >>> with reading("a.json", "save it again"):
        ...     {}["layers"]
        Traceback (most recent call last):
        ...
        refimpl.core.errors.CheckpointError: a.json is damaged (KeyError: 'layers'); save it again
    """
    try:
        yield
    except RefimplError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {reason(error)}); {remedy}") from error


def positive_integer(name: str, value: object) -> None:
    """Check that an argument is an integer of 1 or more.

    Args:
        name: of the argument, for the message.
        value: the value it was given; a bool does not count as an integer.

    Raises:
        OptionError: the value is anything else.

    Example:
        >>> positive_integer("length", 0)
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: length=0 must be a positive integer
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r} must be a positive integer")
