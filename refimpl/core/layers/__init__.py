"""Packed replacements for linear layers: quantised, sparse, low-rank, and sums of them."""

from refimpl.core.layers.base import CompressedLayer, empty_layer
from refimpl.core.layers.lowrank import CompensatedLinear, Factor, LowRankLinear
from refimpl.core.layers.packed import PackedLinear, parse_pattern

__all__ = [
    "CompensatedLinear",
    "CompressedLayer",
    "Factor",
    "LowRankLinear",
    "PackedLinear",
    "empty_layer",
    "parse_pattern",
]
