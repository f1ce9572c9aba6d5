"""Tables of the page "Choosing a method": of everything measured, what nothing else beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from refimpl.markdown import table

Entry = Any  # a point of a bench


def frontier(points: Sequence[Entry], cost: Callable[[Entry], float], loss: Callable[[Entry], float]) -> list[Entry]:
    """The points that no other undercuts in cost without being worse, cheapest first.

    Example:
        >>> frontier([(1, 9), (2, 5), (3, 6), (4, 4)], lambda p: p[0], lambda p: p[1])
        [(1, 9), (2, 5), (4, 4)]
    """
    kept: list[Entry] = []
    for point in sorted(points, key=lambda point: (cost(point), loss(point))):
        if not kept or loss(point) < loss(kept[-1]):
            kept.append(point)
    return kept


def name(point: Entry) -> str:
    return f"{point.method} {point.label}".strip()


def language_table(points: Sequence[Entry], scores: dict[str, float]) -> str:
    """Compressed language models on the frontier of bits and perplexity, with the tasks' mean score where known."""
    best = frontier(
        [p for p in points if p.method not in ("dense", "source")], lambda p: p.bits, lambda p: p.perplexity
    )
    dense = next(p for p in points if p.method == "dense")
    rows = [
        [
            name(p),
            f"{p.bits:.2f}",
            f"{p.perplexity:.1f}",
            f"{p.perplexity / dense.perplexity:.2f}",
            f"{scores[name(p)]:.0%}" if name(p) in scores else "",
        ]
        for p in [*best, dense]
    ]
    return table(["Model", "Bits per weight", "Perplexity", "Times the dense model's", "Tasks, mean"], rows)


def classifier_table(points: Sequence[Entry]) -> str:
    """Compressed classifiers on the frontier of bytes and test loss."""
    dense = [p for p in points if p.method == "dense"]
    best = frontier([p for p in points if p.method != "dense"], lambda p: p.bytes, lambda p: p.loss)
    rows = [
        [name(p), f"{p.bytes:,.0f}", f"{p.flops / 1e6:.3f}", f"{p.accuracy:.1%}", f"{p.loss:.4f}"]
        for p in [*best, *dense]
    ]
    return table(["Model", "Bytes", "MFLOP per image", "Accuracy", "Loss (nats)"], rows)
