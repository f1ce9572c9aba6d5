"""The replay buffer M of MER: rows of a fixed size, in memory or in a memory-mapped file, so that its bytes are known.

The number of a row (`item`) is its place in the stream of all rows ever added. The slot of a row in a full buffer and the
rows of a draw depend only on the seed and on these numbers. So there is no generator state to save, and rows added one by
one or a thousand at a time result in the same buffer.
"""

from __future__ import annotations

import errno
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refimpl.core.arguments import Checked, checked, misfit
from refimpl.core.errors import CheckpointError, OptionError, nearest
from refimpl.core.files.folders import check_file, writing
from refimpl.core.files.io import read_json, write_json

DTYPES = ("uint8", "uint16", "int32", "int64", "float32")

_ABOUT, _ROWS, _SLOTS = "buffer.json", "rows.bin", "slots.bin"
_SLOT = np.dtype([("item", "<i8"), ("check", "<u4")])  # packed: 12 bytes
_FIXED = ("format", "capacity", "row", "dtype", "seed")
_FIELDS = {
    **{"format": int, "capacity": int, "row": list[int], "dtype": str, "seed": int, "seen": int},
    "marks": dict[str, dict],
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Storage:
    """Bytes of a buffer.

    Attributes:
        row: one row and its entry in the index (number and checksum, 12 bytes).
        used: all stored rows and their entries.
        memory: allocated in memory; 0 for a buffer on disk, of which the system caches as much as it has room for.
        disk: all files of the folder; they get their full size when the buffer is created.
    """

    row: int
    used: int
    memory: int
    disk: int


class ReplayBuffer(Checked):
    """Rows seen before, from which any number can be drawn uniformly.

    Every row is kept until the buffer is full. From then on it is a reservoir (Vitter's algorithm R): row number i
    replaces a random one with probability capacity / (i + 1), so that at any time all rows seen so far are in the buffer
    with the same probability.

    Args:
        capacity: rows. The length of the stream gives an unbounded buffer, as in the paper.
        row: shape of a row, e.g. ``(2049,)`` tokens.
        dtype: of the stored rows, one of `DTYPES`; "uint16" is enough for a vocabulary of 1024 tokens.
        folder: for the files; None keeps the rows in memory. An existing buffer with the same options is opened. Only
            one process may use a folder.
        seed: of the reservoir and of draws.
        limit: most bytes that the buffer may take, in memory or on disk; None sets no limit.

    Attributes:
        seen: rows added so far.

    Raises:
        OptionError: a value outside its range; a buffer over the limit; a disk too full for it.
        CheckpointError: the folder holds another buffer, a damaged one, or something else.

    Example:
        >>> buffer = ReplayBuffer(capacity=100, row=(3,), dtype="uint16")
        >>> buffer.add(torch.arange(12).reshape(4, 3))
        >>> rows, items = buffer.sample(2, draw=0)
        >>> len(buffer), torch.equal(rows, torch.arange(12).reshape(4, 3)[items])
        (4, True)
        >>> buffer.storage
        Storage(row=18, used=72, memory=1800, disk=0)
    """

    def __init__(
        self,
        capacity: int,
        row: Sequence[int],
        dtype: str = "int32",
        folder: str | Path | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise OptionError(f"dtype={dtype!r}: use {nearest(str(dtype), DTYPES)}")
        if capacity < 1:
            raise OptionError(f"capacity={capacity}: use 1 row or more")
        row = tuple(row)
        if not row or min(row) < 1:
            raise OptionError(f"row={row}: use the shape of one row, e.g. (129,)")
        self.capacity, self.row, self.seed = capacity, row, seed
        self.folder = None if folder is None else Path(folder)
        self.seen = 0
        self._marks: dict[str, dict[str, Any]] = {}
        self._dtype = np.dtype(dtype)
        self._row_bytes = math.prod(row) * self._dtype.itemsize
        needed = capacity * (self._row_bytes + _SLOT.itemsize)
        if limit is not None and needed > limit:
            most = limit // (self._row_bytes + _SLOT.itemsize)
            raise OptionError(
                f"capacity={capacity}: takes {needed} bytes, limit={limit} allows {most} rows; lower the capacity, "
                "a smaller dtype, or raise the limit"
            )
        if self.folder is None:
            try:
                self._rows = np.zeros((capacity, *row), self._dtype)
                self._slots = np.zeros(capacity, _SLOT)
            except (MemoryError, ValueError) as error:  # ValueError: more than any address space
                raise OptionError(
                    f"capacity={capacity}: takes {needed} bytes, more than there is memory; lower it, or give a folder"
                ) from error
            return
        if (self.folder / _ABOUT).exists():
            self._reopen()
        else:
            self._make(needed)
        self._rows = np.memmap(self.folder / _ROWS, self._dtype, "r+", shape=(capacity, *row))
        self._slots = np.memmap(self.folder / _SLOTS, _SLOT, "r+", shape=(capacity,))

    @classmethod
    def open(cls, folder: str | Path) -> ReplayBuffer:
        """Open the buffer in a folder, with the options it was created with.

        Raises:
            CheckpointError: there is none, or it is damaged.

        Example:
            >>> import tempfile
            >>> folder = tempfile.mkdtemp()
            >>> ReplayBuffer(10, (2,), folder=folder).add(torch.tensor([[1, 2]]))
            >>> ReplayBuffer.open(folder).sample(1, draw=0)[0]
            tensor([[1, 2]])
        """
        about = _read(Path(folder))
        return cls(about["capacity"], about["row"], about["dtype"], folder, about["seed"])

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    @property
    def items(self) -> Tensor:
        """Numbers of the stored rows, by slot: int64 [len]."""
        return torch.from_numpy(self._slots["item"][: len(self)].astype(np.int64))

    @property
    def storage(self) -> Storage:
        """Bytes of the buffer."""
        row = self._row_bytes + _SLOT.itemsize
        disk = 0
        if self.folder is not None:
            disk = sum((self.folder / name).stat().st_size for name in (_ABOUT, _ROWS, _SLOTS))
        return Storage(row, len(self) * row, self.capacity * row if self.folder is None else 0, disk)

    @checked()
    def add(self, rows: Tensor) -> None:
        """Store rows [n, ...]; once the buffer is full, each either replaces another row or is not stored.

        Raises:
            OptionError: another shape, or values that the dtype cannot hold.

        Example:
            >>> buffer = ReplayBuffer(capacity=2, row=(1,))
            >>> buffer.add(torch.arange(5).reshape(5, 1))
            >>> buffer.seen, len(buffer)
            (5, 2)
        """
        if rows.dim() != 1 + len(self.row) or tuple(rows.shape[1:]) != self.row:
            raise OptionError(
                f"rows is {list(rows.shape)}, the buffer holds rows of {list(self.row)}: pass [n, "
                f"{', '.join(map(str, self.row))}]"
            )
        values = rows.detach().cpu().numpy()
        stored = np.ascontiguousarray(values.astype(self._dtype))
        if not np.array_equal(stored, values, equal_nan=stored.dtype.kind == "f"):
            raise OptionError(
                f"rows holds values from {values.min()} to {values.max()} ({rows.dtype}), which dtype="
                f"{self._dtype.name!r} cannot hold exactly; make the buffer with another dtype"
            )
        items = np.arange(self.seen, self.seen + len(stored))
        slots = items.copy()  # the buffer is not full yet: row i goes to slot i
        # full: slot = uniform over 0 ... i. It is below the capacity, and so replaces a row, with probability
        # capacity / (i + 1); by induction each earlier row is still there with that probability too.
        late = items >= self.capacity
        slots[late] = random_numbers(self.seed, 0, items[late]) % (items[late] + 1).astype(np.uint64)
        kept = slots < self.capacity
        # of two rows for one slot the later one stays: numpy assigns in this order, like adding rows one at a time
        self._rows[slots[kept]] = stored[kept]
        self._slots["item"][slots[kept]] = items[kept]
        self._slots["check"][slots[kept]] = [zlib.crc32(row.tobytes()) for row in stored[kept]]
        self.seen += len(stored)
        self._note()

    @checked()
    def sample(self, count: int, draw: int, seen: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw rows uniformly, with replacement, from all stored ones.

        Args:
            count: number of rows.
            draw: number of this draw, e.g. the step. The same buffer and number give the same rows.
            seen: draw from the buffer as it was when this many rows had been added; None draws from it as it is.

        Returns:
            Rows [count, ...], int64 or float32, and their numbers, int64 [count].

        Raises:
            OptionError: the buffer is empty.
            CheckpointError: a stored row is damaged, or has been replaced since `seen`.

        Example:
            >>> buffer = ReplayBuffer(capacity=2, row=(1,))
            >>> buffer.sample(1, draw=0)
            Traceback (most recent call last):
            ...
            refimpl.core.errors.OptionError: count=1: the buffer is empty; add rows before drawing any
        """
        size = len(self)
        if seen is not None:
            self._still_there(seen)
            size = min(seen, self.capacity)
        if count > 0 and not size:
            raise OptionError(f"count={count}: the buffer is empty; add rows before drawing any")
        places = (random_numbers(self.seed, 1 + draw, np.arange(count)) % np.uint64(max(1, size))).astype(np.int64)
        rows, slots = self._rows[places], self._slots[places]
        for place, row, check in zip(places, rows, slots["check"], strict=True):
            if zlib.crc32(row.tobytes()) != check:
                raise CheckpointError(
                    f"folder={str(self.folder)!r}: row {place} of {_ROWS} is not what was stored; the disk or a "
                    "crash damaged it, delete the folder and fill it again"
                )
        dtype = np.int64 if self._dtype.kind in "ui" else self._dtype
        return torch.from_numpy(np.array(rows, dtype)), torch.from_numpy(slots["item"].astype(np.int64))

    @checked()
    def begin(self, run: str, about: dict[str, Any]) -> int:
        """Record where a run begins; for a known run, return where it began the first time.

        An interrupted run takes the buffer back to that point (`rewind`), adds its rows again from its first step on,
        and so has the same buffer at every step. `ReplayLoader` does this.

        Args:
            run: name of the run within this buffer.
            about: options that identify the run; anything that JSON can hold.

        Returns:
            Rows that had been seen when the run first began.

        Raises:
            CheckpointError: the name belongs to a run with other options.

        Example:
            >>> buffer = ReplayBuffer(capacity=9, row=(1,))
            >>> buffer.begin("first", {"seed": 0})
            0
            >>> buffer.add(torch.arange(5).reshape(5, 1))
            >>> buffer.begin("second", {"seed": 0}), buffer.begin("first", {"seed": 0})
            (5, 0)
        """
        if run not in self._marks:
            self._marks[run] = {"seen": self.seen, "about": about}
            self._note()
        elif self._marks[run]["about"] != about:
            raise CheckpointError(
                f"run={run!r}: {self._where} knows a run of that name with other options "
                f"({self._marks[run]['about']}, now {about}); repeat that call to go on with it, or choose another name"
            )
        return self._marks[run]["seen"]

    @checked()
    def rewind(self, seen: int) -> None:
        """Take the buffer back to its state after this many rows had been added.

        Raises:
            OptionError: fewer rows have been added.
            CheckpointError: some of the rows that it held then have been replaced.

        Example:
            >>> buffer = ReplayBuffer(capacity=9, row=(1,))
            >>> buffer.add(torch.arange(5).reshape(5, 1))
            >>> buffer.rewind(2)
            >>> buffer.items
            tensor([0, 1])
        """
        self._still_there(seen)
        if seen == self.seen:
            return
        self.seen = seen
        self._marks = {name: mark for name, mark in self._marks.items() if mark["seen"] <= seen}
        self._note()

    def _still_there(self, seen: int) -> None:
        if not 0 <= seen <= self.seen:
            raise OptionError(f"seen={seen}: {self._where} has seen {self.seen} rows; use 0 to that")
        if 0 < seen < self.seen and self.seen > self.capacity:
            raise CheckpointError(
                f"seen={seen}: some of the rows that were in {self._where} then have been replaced since; start again "
                "from a copy made at that time, or with a larger capacity"
            )

    @property
    def _where(self) -> str:
        return "the buffer" if self.folder is None else f"folder={str(self.folder)!r}"

    # -- files --

    def _about(self) -> dict[str, Any]:
        return {
            "format": 1,
            "capacity": self.capacity,
            "row": list(self.row),
            "dtype": self._dtype.name,
            "seed": self.seed,
            "seen": self.seen,
            "marks": self._marks,
        }

    def _note(self) -> None:
        """Write the metadata; called after the rows that it describes have been written."""
        if self.folder is not None:
            write_json(self.folder / _ABOUT, self._about())

    def _make(self, needed: int) -> None:
        assert self.folder is not None
        there = [name for name in (_ROWS, _SLOTS) if (self.folder / name).exists()]
        if there:
            raise CheckpointError(
                f"folder={str(self.folder)!r} holds {there[0]} but no {_ABOUT}: a damaged buffer, or something else; "
                "delete it, or choose another folder"
            )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._fill(needed)

    def _fill(self, needed: int) -> None:
        assert self.folder is not None
        try:
            for name, size in ((_ROWS, self._row_bytes), (_SLOTS, _SLOT.itemsize)):
                _allocate(self.folder / name, self.capacity * size)
            self._note()
        except OSError as error:
            for name in (_ROWS, _SLOTS, _ABOUT):
                (self.folder / name).unlink(missing_ok=True)
            if error.errno not in _NO_SPACE:
                raise
            raise OptionError(
                f"capacity={self.capacity}: takes {needed} bytes, and folder={str(self.folder)!r} has no room for "
                f"them ({error.strerror}); lower the capacity, or choose a folder on another disk"
            ) from error

    def _reopen(self) -> None:
        assert self.folder is not None
        stored, ours = _read(self.folder), self._about()
        for name in _FIXED:
            if stored[name] != ours[name]:
                raise CheckpointError(
                    f"folder={str(self.folder)!r} holds a buffer with {name}={stored[name]!r}, not {ours[name]!r}; "
                    "use ReplayBuffer.open, or choose another folder"
                )
        for name, size in ((_ROWS, self._row_bytes), (_SLOTS, _SLOT.itemsize)):
            path = self.folder / name
            check_file(path)
            found = path.stat().st_size if path.exists() else 0
            if found != self.capacity * size:
                raise CheckpointError(
                    f"folder={str(self.folder)!r}: {name} has {found} bytes, not {self.capacity * size}; the buffer is "
                    "damaged, delete the folder and fill it again"
                )
        self.seen, self._marks = stored["seen"], stored["marks"]


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / _ABOUT).exists():
        raise CheckpointError(f"folder={str(folder)!r} holds no replay buffer (no {_ABOUT})")
    about: Any = read_json(folder / _ABOUT)
    wrong = misfit(about, _FIELDS)
    if wrong is None and not (about["format"] == 1 and about["seen"] >= 0 and about["dtype"] in DTYPES):
        wrong = "another version wrote it, or it was changed"
    if wrong is None:
        marks = about["marks"].values()
        wrong = next(filter(None, (misfit(mark, {"seen": int, "about": dict}) for mark in marks)), None)
    if wrong is not None:
        raise CheckpointError(
            f"folder={str(folder)!r}: {_ABOUT} does not describe a replay buffer ({wrong}); delete the folder and fill it "
            "again"
        )
    return about


def _allocate(path: Path, size: int) -> None:
    """Create a file with all its bytes on disk: without room, writing to a sparse mapped file would kill the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        block = bytes(1 << 20)
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


def random_numbers(seed: int, stream: int, numbers: np.ndarray) -> np.ndarray:
    """Uniform 64-bit numbers as a function of seed, stream and number (SplitMix: Steele et al., OOPSLA 2014).

    In a full buffer the slot of row i is ``random_numbers(seed, 0, [i]) % (i + 1)``, if it is below the capacity. Row j of
    draw t comes from slot ``random_numbers(seed, 1 + t, [j]) % len(buffer)``.

    Args:
        seed, stream: select one of the independent sequences.
        numbers: integers [n], places in that sequence.

    Returns:
        uint64 [n].

    Example:
        >>> random_numbers(0, 0, np.arange(5)) % 10
        array([1, 2, 4, 1, 9], dtype=uint64)
    """

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.array([seed], np.int64).astype(np.uint64) * golden + np.uint64(1))
        key = mix(key + np.uint64(stream) * golden)
        return mix(key + (numbers.astype(np.uint64) + np.uint64(1)) * golden)
