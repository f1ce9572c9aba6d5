"""Saving and loading compressed models (safetensors only), and the few file habits everything shares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the block succeeds.

    A reader therefore never sees half a file, and an interruption leaves the old one untouched.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("done")
        >>> target.read_text()
        'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes files private; a shared cache must stay readable
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def data_path(*parts: str) -> Path:
    """A file of data/: beside the package in a checkout, inside it in an installed wheel.

    Example:
        >>> data_path("results").name
        'results'
    """
    package = Path(__file__).resolve().parent.parent
    inside = package / "_data"
    return (inside if inside.is_dir() else package.parent / "data").joinpath(*parts)
