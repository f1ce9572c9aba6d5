"""GPTQ: quantise column by column, let later columns make up for it (Frantar et al., 2022, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from refimpl.baselines.obs import Solution, inverse_root, solve
from refimpl.baselines.rtn import mask_of, quantised_config
from refimpl.core.compress.method import Method, check_group
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.layers import PackedLinear


@dataclass(frozen=True)
class GPTQ(Method):
    """Quantise weights to `bits` bits with error compensation.

    A sparse site stays sparse: its zeros are kept and only the remaining weights get codes.

    Args:
        bits: 2 to 8.
        group_size: inputs that share a scale and zero point; None is one per row.
        symmetric: no zero points.
        act_order: treat columns by decreasing diagonal of G instead of left to right. Grids are then fixed
            beforehand ("static groups"), so nothing extra is stored.
        damping: fraction of the mean diagonal of G added to its diagonal (``percdamp`` in the authors' code).

    Example:
        >>> GPTQ(bits=3, group_size=64)
        GPTQ(bits=3, group_size=64, symmetric=False, act_order=False, damping=0.01)
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    act_order: bool = False
    damping: float = 0.01
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def layer_config(self, site: Site) -> dict[str, Any]:
        return quantised_config(site, self.bits, self.group_size, self.symmetric)

    def quantise(self, W: Tensor, gram: Tensor, mask: Tensor | None, log: dict[str, Any], group: int) -> Solution:
        """The method on plain tensors: W [m, d], G [d, d], mask [m, d] or None."""
        order = torch.argsort(gram.diagonal(), descending=True) if self.act_order else None
        ordered = gram if order is None else gram[order][:, order]
        U = inverse_root(ordered, self.damping, log)
        return solve(W, U, mask=mask, bits=self.bits, group_size=group, symmetric=self.symmetric, order=order)

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> PackedLinear:
        assert stats is not None
        W = site.weight
        mask, pattern = mask_of(site)
        found = self.quantise(W, stats.gram, mask, site.log, check_group(site, self.group_size))
        zero = None if self.symmetric else found.zero
        return PackedLinear(
            codes=found.codes,
            scale=found.scale,
            zero=zero,
            bits=self.bits,
            mask=mask,
            pattern=pattern,
            bias=site.bias,
            dtype=W.dtype,
        )

    def flops(self, site: Site) -> float:
        d, m = site.in_features, site.out_features
        return 2.0 * d**3 + 2.0 * m * d**2
