"""Folders that one process writes at a time, and errors of the disk in words."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # on Windows, where two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

from refimpl.core.errors import CheckpointError, FileError

LOCK = ".refimpl-lock"  # in a folder while a process writes to it
_FULL = "free some space there, or choose another folder"
_FORBIDDEN = "choose a folder that you may write to"
_IN_THE_WAY = "move what is in the way, or choose another path"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _FORBIDDEN),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY), _IN_THE_WAY),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk may be failing; choose another folder",
}
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # file systems without locks


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an error of the disk while `path` is written into a `FileError`.

    Raises:
        FileError: the disk is full, the folder is read-only, or something is in the way; names the remedy.

    Example:
        >>> with writing("/dev/null/model"):
        ...     Path("/dev/null/model").mkdir()
        Traceback (most recent call last):
        ...
        refimpl.core.errors.FileError: /dev/null/model cannot be written (Not a directory); move what is in the way, \
or choose another path
    """
    path = Path(path)
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code(error)
        remedy = _REMEDIES.get(code)
        about = getattr(error, "filename", None)
        if remedy is None or (about is not None and not _related(Path(os.fsdecode(about)), path)):
            raise
        raise FileError(f"{path} cannot be written ({os.strerror(code)}); {remedy}") from error


def _code(error: BaseException) -> int:
    """The number of a system error; safetensors has it in the message only. 0 without one."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0


def _related(file: Path, path: Path) -> bool:
    """Whether `file` is `path`, beside it, inside it, or a folder it is in: else the error is about something else."""
    file, path = Path(os.path.abspath(file)), Path(os.path.abspath(path))
    return file.is_relative_to(path.parent) or path.is_relative_to(file)


def check_file(path: Path) -> None:
    """Raise `FileError` if there is something at `path` that is no file: reading a named pipe would wait for ever.

    Example:
        >>> check_file(Path("/dev"))
        Traceback (most recent call last):
        ...
        refimpl.core.errors.FileError: /dev is a folder where a file is meant; name a file, or move the folder away
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # there is none, which is for whoever opens it to say
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "named pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise FileError(f"{path} is a {kind} where a file is meant; name a file, or move the {kind} away")


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process: a second one that wants it is refused.

    The folder is made if missing, and goes again if nothing was written into it. The lock is one of the system, which
    ends with the process however that ends: what a killed process left behind is taken over.

    Raises:
        CheckpointError: another process holds it; says which.
        FileError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with lock(folder):
        ...     print(open(f"{folder}/.refimpl-lock").read().split()[0])
        process
        >>> os.listdir(folder)
        []
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise FileError(f"folder={str(folder)!r} is no folder; {_IN_THE_WAY}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _hold(folder)
    try:
        with writing(folder):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)
        for path in new:
            try:
                path.rmdir()
            except OSError:  # it holds something by now
                break


def _hold(folder: Path) -> int:
    """The open and locked lock file of `folder`."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is None:
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 300).decode(errors="replace").strip()
            if error.errno not in _NO_LOCKS or _alive(owner):
                os.close(handle)
                raise CheckpointError(
                    f"folder={str(folder)!r} is being written by {owner or 'another process'}; wait until that has "
                    f"ended, or choose another folder (if it runs no more, delete {path})"
                ) from None
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:  # whoever held it has just let go, and taken the file away
            pass
        os.close(handle)


def _alive(owner: str) -> bool:
    """Whether the process that wrote a lock may still run; one of another host may."""
    found = re.fullmatch(r"process (\d+) on (.*)", owner)
    if found is None or found[2] != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def clear_temporary(folder: Path) -> None:
    """Delete the temporary files that a killed process left in `folder`, which must be one that refimpl writes.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / ".config.json.x7.tmp").touch()
        >>> clear_temporary(folder); os.listdir(folder)
        []
    """
    for path in folder.glob(".*.tmp"):
        if path.is_file():
            path.unlink()


def holds_files(folder: Path) -> bool:
    """Whether there is anything in `folder` but our lock and temporary files.

    Example:
        >>> holds_files(Path("/nowhere"))
        False
    """
    if not folder.exists():
        return False
    return any(p.name != LOCK and not (p.name[0] == "." and p.suffix == ".tmp") for p in folder.iterdir())
