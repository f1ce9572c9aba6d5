"""Helpers of all commands: machine-readable output, and messages about slow steps."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import typer

from refimpl.core.errors import nearest


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """Print the message on stderr if the block takes longer than two seconds."""
    timer = threading.Timer(2, lambda: typer.echo(f"{message} ...", err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def stdout_for_json(wanted: bool) -> Iterator[None]:
    """Send everything that libraries print to stderr, so that stdout holds only the JSON."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """One JSON document; NaN, which JSON has not, is refused."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def one_of(option: str, choices: Callable[[], list[str]]) -> Callable[[str | None], str | None]:
    """A typer callback that refuses values out of `choices`, as a wrong call, with the nearest one."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices():
            raise typer.BadParameter(f"{option} {value} is not {nearest(value, choices())}")
        return value

    return check
