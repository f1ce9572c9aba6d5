"""Compressed SmolLM2s that the studies of EoRA and of tasks read: what EoRA repairs, and what tasks are measured on.

All are calibrated on the same Wikipedia tokens (draw 0); a repair reads another draw, as the paper does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from refimpl import GPTQ, RTN, Magnitude, SparseGPT, Wanda, compress, load, save
from refimpl.core.compress.method import Method
from refimpl.core.files.io import is_compressed, read_json, write_json
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.lab.measure.metrics import PeakMemory
from refimpl.lab.study.study import Run

RANK = 64

#: What each is made from, "" for the dense model, and by which method.
BASES: dict[str, tuple[str, Method]] = {
    "Magnitude 2:4": ("", Magnitude("2:4")),
    "Wanda 2:4": ("", Wanda("2:4")),
    "SparseGPT 2:4": ("", SparseGPT("2:4")),
    **{f"SparseGPT {share}%": ("", SparseGPT("unstructured", sparsity=share / 100)) for share in (40, 50, 60)},
    **{f"RTN {bits}-bit g{group}": ("", RTN(bits, group)) for bits in (4, 3, 2) for group in (64, 32)},
    **{f"GPTQ {bits}-bit g{group}": ("", GPTQ(bits, group)) for bits in (4, 3, 2) for group in (64, 32)},
    "GPTQ 3-bit g64 act-order": ("", GPTQ(3, 64, act_order=True)),
    "SparseGPT+GPTQ 2:4 3-bit": ("SparseGPT 2:4", GPTQ(3, 64)),
}


def repaired(base: str, by: str, detail: str) -> str:
    """Name of an arm: "SparseGPT 2:4" repaired by EoRA at r64 is "SparseGPT+EoRA 2:4 r64".

    Example:
        >>> repaired("SparseGPT 2:4", "EoRA", "r64")
        'SparseGPT+EoRA 2:4 r64'
    """
    method, _, label = base.partition(" ")
    return f"{method}+{by} {label} {detail}"


@dataclass(frozen=True)
class Base:
    """A compressed model that is made once and kept in the folder that the jobs of a run share.

    Attributes:
        name: key of `BASES`.
        layers: blocks of the model; None: all.
        sequences, length: calibration sequences of compression, and tokens of each.
        dtype: of the computation.
        folder: of the run.
    """

    name: str
    layers: int | None
    sequences: int
    length: int
    dtype: str
    folder: str

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return Path(self.folder) / "".join(c if c.isalnum() else "-" for c in self.name)

    @property
    def earlier(self) -> Base | None:
        """The base that it is made from; None if it is made from the dense model."""
        name, _ = BASES[self.name]
        return replace(self, name=name) if name else None

    def model(self) -> nn.Module:
        """The model, read from disk."""
        return load(self.path, getattr(torch, self.dtype))

    def costs(self) -> dict[str, float]:
        """Seconds and memory of its last method; see `applied`."""
        return read_json(self.path / "costs.json")


def applied(
    model: nn.Module, method: Method, tokens: text.TokenSet, reference: str | Path | None = None
) -> dict[str, float]:
    """Compress or repair a model in place.

    Returns:
        What it took: "seconds" and "tokens", "peak_bytes" (without file-backed pages; where the system tells), and
        "raised_dampings", the sites whose second moment needed more damping than was asked for.
    """
    with PeakMemory() as peak:
        report = compress(model, method, tokens, reference=reference, progress=False)
    costs: dict[str, float] = {"seconds": report.seconds, "tokens": tokens.ids.numel()}
    if peak.anonymous_above_start is not None:
        costs["peak_bytes"] = peak.anonymous_above_start
    return costs | {"raised_dampings": sum("damping" in site.log for site in report.sites)}


def make(base: Base) -> None:
    """Compress a base and keep it."""
    model = base.earlier.model() if base.earlier else models.smollm2(getattr(torch, base.dtype), layers=base.layers)
    tokens = text.calibration("wikipedia", sequences=base.sequences, length=base.length, seed=0)
    costs = applied(model, BASES[base.name][1], tokens)
    base.path.mkdir(parents=True, exist_ok=True)
    write_json(base.path / "costs.json", costs)
    save(model, base.path)


def make_before(run: Run, bases: Iterable[Base]) -> None:
    """Make those bases that are not there yet, each after the one that it is made from."""
    wanted = dict.fromkeys(one for base in bases for one in (base.earlier, base) if one is not None)
    run.each(make, [base for base in wanted if not is_compressed(base.path)], "compressed models")
