"""Round to nearest: the quantiser that uses only the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from refimpl.core.compress.method import Method, check_group
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompressedLayer, PackedLinear
from refimpl.core.layers.grid import minmax_grid


def check_bits(bits: int) -> None:
    """Raise `OptionError` unless weights can be stored in so many bits.

    Example:
        >>> check_bits(4)
    """
    if not 2 <= bits <= 8:
        raise OptionError(f"bits={bits}: use 2 to 8")


def quantised_config(site: Site, bits: int, group_size: int | None, symmetric: bool) -> dict[str, Any]:
    """Configuration of the packed layer with which a quantiser replaces `site`; keeps the mask of a sparse layer.

    Raises:
        OptionError: bits outside 2..8, or a group size that does not divide.

    Example:
        >>> from torch import nn
        >>> quantised_config(Site("q", 0, nn.Sequential(nn.Linear(64, 16)), "0"), 4, 32, False)["bits"]
        4
    """
    check_bits(bits)
    current = site.module
    sparse = isinstance(current, PackedLinear) and current.pattern is not None
    if isinstance(current, CompressedLayer) and not (isinstance(current, PackedLinear) and current.bits is None):
        raise OptionError(f"{site.name!r} is already {current}; quantise before adding a low-rank path, and only once")
    return {
        "type": "PackedLinear",
        "in_features": site.in_features,
        "out_features": site.out_features,
        "bits": bits,
        "group_size": check_group(site, group_size),
        "symmetric": symmetric,
        "pattern": current.pattern if sparse else None,
        "nonzeros": current.nonzeros if sparse else site.in_features * site.out_features,
        "bias": site.bias is not None,
    }


def mask_of(site: Site) -> tuple[Tensor | None, str | None]:
    """Mask and pattern of a sparse site, (None, None) for a dense one.

    Example:
        >>> from torch import nn
        >>> mask_of(Site("q", 0, nn.Sequential(nn.Linear(64, 16)), "0"))
        (None, None)
    """
    module = site.module
    return (module.nonzero_mask(), module.pattern) if isinstance(module, PackedLinear) else (None, None)


@dataclass(frozen=True)
class RTN(Method):
    """Round every weight to the nearest point of a min-max grid per group of inputs.

    Args:
        bits: 2 to 8.
        group_size: inputs that share a scale; None uses one scale per row.
        symmetric: use a grid with zero in the middle and no zero points.

    Example:
        >>> RTN(bits=4, group_size=32)
        RTN(bits=4, group_size=32, symmetric=False)
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def layer_config(self, site: Site) -> dict[str, Any]:
        return quantised_config(site, self.bits, self.group_size, self.symmetric)

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> PackedLinear:
        W = site.weight
        mask, pattern = mask_of(site)
        groups = W.float().unflatten(1, (-1, check_group(site, self.group_size)))
        # w = scale (code - zero), scale = (max - min) / (2^bits - 1) of each group
        grid = minmax_grid(groups, self.bits, self.symmetric)
        zero = None if self.symmetric else grid.zero[..., 0]
        return PackedLinear(
            codes=grid.encode(groups).flatten(1),
            scale=grid.scale[..., 0],
            zero=zero,
            bits=self.bits,
            mask=mask,
            pattern=pattern,
            bias=site.bias,
            dtype=W.dtype,
        )

    def flops(self, site: Site) -> float:
        return 6.0 * site.in_features * site.out_features
