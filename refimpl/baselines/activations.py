"""Quantised activations: the inputs of every site pass through a uniform quantiser, whatever its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refimpl.core.compress.inputs import InputSamples
from refimpl.core.compress.method import Method
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError, nearest
from refimpl.core.layers import ActivationQuantizer, CompressedLayer, PackedLinear, QuantizedInput
from refimpl.core.layers.quantizer import mse_range

CLIPS = ("minmax", "mse")
_VALUES = 2**16  # input values in the search for the best clip, which depends on their distribution only
_STRIDE = 1_000_003  # between these values; a prime, so that they come from all channels and places


@dataclass(frozen=True)
class QuantizeActivations(Method):
    """Add a per-tensor quantiser to the inputs of every site, dense or compressed.

    It comes last, after the methods that change weights.

    Args:
        bits: 2 to 8.
        clip: choice of the range. "minmax" averages the smallest and the largest value of each calibration sample over
            the samples; "mse" shrinks the range of all inputs to where the squared error is least.

    Example:
        >>> QuantizeActivations(bits=4, clip="mse")
        QuantizeActivations(bits=4, clip='mse')
    """

    bits: int = 8
    clip: str = "minmax"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise OptionError(f"bits={self.bits}: use 2 to 8")
        if self.clip not in CLIPS:
            raise OptionError(f"clip={self.clip!r}: use {nearest(self.clip, CLIPS)}")

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset({"inputs" if self.clip == "mse" else "range"})

    def layer_config(self, site: Site) -> dict[str, Any]:
        if any(isinstance(module, QuantizedInput) for module in site.module.modules()):
            raise OptionError(f"{site.name!r} has quantised inputs already; leave it out with targets=")
        return {"type": "QuantizedInput", "base": _base(site, "meta").config(), "bits": self.bits}

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> QuantizedInput:
        assert isinstance(stats, InputSamples)
        R, Z = stats.high - stats.low, stats.low
        if self.clip == "mse" and stats.x.numel():
            x = stats.x.flatten()
            if len(x) > _VALUES:
                x = x[torch.arange(_VALUES, device=x.device) * _STRIDE % len(x)]
            R, Z = mse_range(x.float(), self.bits)
        return QuantizedInput(_base(site), ActivationQuantizer(self.bits, R, Z))

    def flops(self, site: Site) -> float:
        return 0.0 if self.clip == "minmax" else 96.0 * 6 * _VALUES


def _base(site: Site, device: str | None = None) -> CompressedLayer:
    """The layer whose inputs are to be quantised: the current one, or the dense weight as a `PackedLinear`."""
    if isinstance(site.module, CompressedLayer):
        return site.module
    weight, bias = site.weight, site.bias
    if device is not None:
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
    return PackedLinear(values=weight, bias=bias)
