"""Packed replacements for linear layers and convolutions: quantised, sparse, low-rank, and sums of them."""

from refimpl.core.layers.activation import ActivationQuantizer, QuantizedInput
from refimpl.core.layers.base import CompressedLayer, empty_layer
from refimpl.core.layers.conv import Geometry, PackedConv2d
from refimpl.core.layers.lowrank import CompensatedLinear, Factor, LowRankLinear
from refimpl.core.layers.packed import PackedLinear, parse_pattern
from refimpl.core.layers.processor import ProcessorLinear
from refimpl.core.layers.served import ServedCompensatedLinear, ServedLinear, ServedSparseLinear

__all__ = [
    "ActivationQuantizer",
    "CompensatedLinear",
    "CompressedLayer",
    "Factor",
    "Geometry",
    "LowRankLinear",
    "PackedConv2d",
    "PackedLinear",
    "ProcessorLinear",
    "QuantizedInput",
    "ServedCompensatedLinear",
    "ServedLinear",
    "ServedSparseLinear",
    "empty_layer",
    "parse_pattern",
]
