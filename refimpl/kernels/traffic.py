"""How many bytes a launch loads and stores, counted in the interpreter; no GPU is needed.

A matrix-vector product is as fast as its bytes arrive. The weights come once; what can go wrong is the rest: x is read
again by every program, sums that programs share are written and read, a mask lets unneeded elements through. All elements
that loads and stores touch are counted (masked ones are not), even if a cache would save them. For matrix-vector
kernels the ratio to the minimum is therefore close to what memory sees; tiled products read their tiles again and again
out of the L2, and the ratio says how often.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refimpl import markdown
from refimpl.kernels.audit import all_kernels, elsewhere, fingerprint, keep, launches
from refimpl.kernels.launch import Launch

SCRATCH = ("partials", "sums", "arrived")  # arguments that an implementation makes for itself: no part of the minimum


@dataclass(frozen=True)
class Traffic:
    """Bytes that a launch moves.

    Attributes:
        loads, stores: bytes by argument.
        minimum: every argument once, scratch space not at all.
        programs: of the launch; counted are `interpreted` of them, the others do the same work elsewhere.
    """

    loads: dict[str, int]
    stores: dict[str, int]
    minimum: int
    programs: int
    interpreted: int

    @property
    def total(self) -> int:
        return sum(self.loads.values()) + sum(self.stores.values())

    @property
    def ratio(self) -> float:
        """Bytes moved over the least that are needed: 1 is perfect."""
        return self.total / self.minimum


def minimum(launch: Launch) -> int:
    """Bytes of all arguments but scratch space.

    Example:
        >>> minimum(launches("sparse_matvec")["bf16 4096->4096"])
        18890752
    """
    return sum(
        value.nbytes for name, value in launch.arguments.items() if isinstance(value, Tensor) and name not in SCRATCH
    )


def count(launch: Launch, whole: bool = False) -> Traffic:
    """Interpret a launch and count.

    Programs that differ only in which block of rows or outputs they have move the same bytes, except those at the far
    end, where blocks are cut off. So along such an axis the first program represents all but the last. Programs that
    share a sum (the last axis of a launch with a constant "SPLIT") differ in more than that, and all run.

    Args:
        launch: with CPU tensors, or "meta" ones, which are filled with zeros. What it writes is lost.
        whole: interpret every program.

    Raises:
        RuntimeError: kernels were defined without ``TRITON_INTERPRET=1``.

    Example:
        >>> import os
        >>> if os.environ.get("TRITON_INTERPRET") == "1":
        ...     traffic = count(launches("sparse_matvec")["fp16 576->192"])
        ...     assert traffic.loads["values"] == 576 // 2 * 192 * 2   # every value once
    """
    if hasattr(launch.kernel, "device_caches"):
        raise RuntimeError("bytes are counted in the interpreter: set TRITON_INTERPRET=1 before kernels are imported")
    # a copy: the counters of programs that share a sum must start at zero, and no result of the caller may be overwritten
    arguments = {
        name: _filled(value) if isinstance(value, Tensor) else value for name, value in launch.arguments.items()
    }
    axes = [_every(size) if whole else _ends(size) for size in launch.grid]
    if "SPLIT" in launch.constants:
        axes[-1] = _every(launch.grid[-1])
    elif "span" in launch.arguments and launch.grid[-1] > 4 and not whole:
        last = launch.grid[-1] - 1
        axes[-1] = [(0, 1), (1, last - 2), (last - 1, 1), (last, 1)]
    if "ranks" in launch.arguments:  # heads read different numbers of columns
        axes[0] = _every(launch.grid[0])
    chosen = [*axes, *([[(0, 1)]] * (3 - len(axes)))]
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()
    with _counting(arguments, launch.grid, chosen, loads, stores):
        replace(launch, grid=tuple(map(len, axes)), arguments=arguments)()
    interpreted = int(np.prod([len(axis) for axis in axes]))
    return Traffic(dict(loads), dict(stores), minimum(launch), int(np.prod(launch.grid)), interpreted)


def _filled(tensor: Tensor) -> Tensor:
    # with the strides of the launch
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return made.zero_() if tensor.is_meta else made.copy_(tensor)


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last; more than `nbytes` for a slice."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _every(size: int) -> list[tuple[int, int]]:
    return [(index, 1) for index in range(size)]


def _ends(size: int) -> list[tuple[int, int]]:
    """Index and weight of the programs that represent an axis."""
    return [(0, 1)] if size == 1 else [(0, size - 1), (size - 1, 1)]


@contextmanager
def _counting(
    arguments: dict[str, Any],
    grid: tuple[int, ...],
    chosen: list[list[tuple[int, int]]],
    loads: Counter[str],
    stores: Counter[str],
) -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    ranges = {
        name: (value.data_ptr(), value.data_ptr() + _span(value))
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_idx", "set_grid_dim")
    originals = {name: getattr(Builder, name) for name in names}
    weight = 1

    def add(counter: Counter[str], pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if not addresses.size:
            return
        first = int(addresses.flat[0])
        name = next(name for name, (start, end) in ranges.items() if start <= first < end)
        counter[name] += weight * addresses.size * pointers.get_element_ty().primitive_bitwidth // 8

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        add(loads, pointers, mask)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(stores, pointers, mask)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(loads, pointers, mask)
        add(stores, pointers, mask)
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def set_index(self: Any, *index: int) -> None:
        nonlocal weight
        picked = [axis[at] for axis, at in zip(chosen, index, strict=True)]
        weight = int(np.prod([times for _, times in picked]))
        originals["set_grid_idx"](self, *(at for at, _ in picked))

    def set_size(self: Any, *_: int) -> None:  # programs see the whole grid
        originals["set_grid_dim"](self, *(*grid, 1, 1)[:3])

    try:
        for name, function in zip(names, (load, store, atomic, set_index, set_size), strict=True):
            setattr(Builder, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(Builder, name, function)


# --- run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The traffic of one named launch."""

    kernel: str
    variant: str
    traffic: Traffic


def run(kernels: list[str] | None = None, out: Path | None = None, progress: bool = True) -> list[Row]:
    """Count the traffic of every launch that kernel files list, in a process with ``TRITON_INTERPRET=1``.

    Args:
        kernels: names of kernel files; None is all.
        out: JSON file to write. Rows of other kernels that are in it stay.
        progress: show a bar.

    Raises:
        RuntimeError: Triton is not installed, no kernel of that name, or a launch fails.
    """
    names = kernels if kernels is not None else all_kernels()
    jobs = [(kernel, variant) for kernel in names for variant in launches(kernel)]
    prints = {name: fingerprint(name) for name in names}
    rows = [_row(value) for value in elsewhere("traffic", jobs, progress, interpret=True)]
    if out is not None:
        keep(out, prints, rows, load(out)["rows"] if out.exists() else [])
    return rows


def _child() -> None:
    jobs, progress = json.load(sys.stdin)
    bar = tqdm(jobs, desc="traffic", unit="launch", disable=not progress)
    rows = [Row(kernel, variant, count(launches(kernel)[variant])) for kernel, variant in bar]
    json.dump([asdict(row) for row in rows], sys.stdout)


def _row(value: dict[str, Any]) -> Row:
    return Row(value["kernel"], value["variant"], Traffic(**value["traffic"]))


def load(path: Path) -> dict[str, Any]:
    """A file of `run`: its "versions", "fingerprints" and "rows" (of `Row`)."""
    value: dict[str, Any] = json.loads(path.read_text())
    return {**value, "rows": [_row(row) for row in value["rows"]]}


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table; bytes in megabytes of 10**6.

    Example:
        >>> row = Row("demo", "fp16 64->64", Traffic({"x": 2_000_000}, {"y": 1_000_000}, 2_500_000, 1, 1))
        >>> print(table([row]).splitlines()[-1])
        | demo | fp16 64->64 | 2.500 | 3.000 | 1.200 |
    """
    cells = [
        [
            row.kernel,
            row.variant,
            f"{row.traffic.minimum / 1e6:.3f}",
            f"{row.traffic.total / 1e6:.3f}",
            f"{row.traffic.ratio:.3f}",
        ]
        for row in rows
    ]
    return markdown.table(["kernel", "launch", "minimum, MB", "moved, MB", "ratio"], cells, align="llrrr")
