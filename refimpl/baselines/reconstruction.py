"""The base of methods that train one layer at a time towards its outputs: options, statistics, and the packed result."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from refimpl.baselines.rtn import mask_of, quantised_config
from refimpl.core.compress.inputs import InputSamples
from refimpl.core.compress.method import Method, check_group
from refimpl.core.compress.reconstruct import QuantizedSite
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError, nearest
from refimpl.core.layers import CompressedLayer
from refimpl.core.layers.quantizer import RANGES


@dataclass(frozen=True)
class Reconstruction(Method, abc.ABC):
    """Base of methods that quantise a layer by training it towards its own float outputs.

    Args:
        bits: of the weights, 2 to 8.
        activation_bits: of the inputs of every site, 2 to 8. None leaves them in floating point: the objective is then
            computed exactly from the second moment of the inputs. With a number, batches of cached inputs and outputs
            are used, and biases lie on a grid of `bits` + `activation_bits`.
        group_size: inputs per scale; None is one scale per output channel.
        iterations: updates per layer; 0 only measures ranges.
        samples: cached samples per update.
        clip: initial weight ranges, "minmax" or "mse".
        seed: of the order of the samples.
    """

    bits: int = 4
    activation_bits: int | None = None
    group_size: int | None = None
    iterations: int = 250
    samples: int = 50
    clip: str = "minmax"
    seed: int = 0
    site_type: ClassVar[type[QuantizedSite]] = QuantizedSite

    def __post_init__(self) -> None:
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise OptionError(f"activation_bits={self.activation_bits}: use 2 to 8, or None to leave inputs alone")
        for name, least in (("iterations", 0), ("samples", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"{name}={getattr(self, name)}: use {least} or more")
        if self.clip not in RANGES:
            raise OptionError(f"clip={self.clip!r}: use {nearest(self.clip, RANGES)}")

    @property
    def statistics(self) -> frozenset[str]:
        if self.activation_bits is None:
            return frozenset({"gram"}) if self.iterations else frozenset()
        return frozenset({"inputs"}) if self.iterations else frozenset({"range"})

    @property
    def least_samples(self) -> int:
        return self.samples if "inputs" in self.statistics else 1

    def layer_config(self, site: Site) -> dict[str, Any]:
        base = quantised_config(site, self.bits, self.group_size, symmetric=False)
        if self.activation_bits is None:
            return base
        return {"type": "QuantizedInput", "base": base, "bits": self.activation_bits}

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> CompressedLayer:
        inputs = None
        if self.activation_bits is not None:
            assert isinstance(stats, InputSamples)
            inputs = (self.activation_bits, stats.low, stats.high)
        group = check_group(site, self.group_size)
        layer = self.site_type(site, self.bits, group, self.clip, *mask_of(site), inputs=inputs)
        if self.iterations:
            assert stats is not None
            site.log |= self.train(layer, stats, site.weight)
        return layer.eval().packed()

    @abc.abstractmethod
    def train(self, layer: QuantizedSite, stats: InputStats, target: Tensor) -> dict[str, float]:
        """Train the layer in place.

        Args:
            layer: an instance of `site_type`.
            stats: the statistics that `statistics` names.
            target: the original weight, [out, in].

        Returns:
            Entries for the site's report.
        """

    def flops(self, site: Site) -> float:
        m, d = site.out_features, site.in_features
        if self.activation_bits is None:
            return self.iterations * (2.0 * m * d**2 + 30.0 * m * d)
        return self.iterations * 6.0 * m * d * self.samples  # times the positions of a convolution, not known here
