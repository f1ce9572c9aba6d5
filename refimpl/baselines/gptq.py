"""GPTQ: quantise column by column, and let later columns compensate the error of earlier ones.

Source: Frantar et al., 2022, arXiv 2210.17323. For each row w of W, with G the second moment of the inputs,

    minimise    (w - q) G (w - q)^T        over q on the grid

greedily: round column j, then change the columns k > j not yet rounded by -(w_j - q_j) / [inv(H)]_jj [inv(H)]_jk, where H
is the damped G of the columns from j on (equation 2). `refimpl.baselines.obs` holds the solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from refimpl.baselines.obs import Solution, check_damping, inverse_root, solve
from refimpl.baselines.rtn import check_bits, mask_of, quantised_config
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
        group_size: inputs that share a scale and zero point; None uses one of each per row.
        symmetric: use a grid without zero points.
        act_order: process columns by decreasing diagonal of G instead of left to right. Grids are then fixed before the
            first column ("static groups"), so no permutation needs to be stored.
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

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_bits(self.bits)

    def layer_config(self, site: Site) -> dict[str, Any]:
        return quantised_config(site, self.bits, self.group_size, self.symmetric)

    def quantise(self, W: Tensor, gram: Tensor, mask: Tensor | None, log: dict[str, Any], group: int) -> Solution:
        """The method on plain tensors: W [m, d], G [d, d], mask [m, d] or None."""
        # columns with large inputs first: they are rounded while many columns are left that can compensate
        order = torch.argsort(gram.diagonal(), descending=True) if self.act_order else None
        # H and its inverse belong to the columns in the order in which they are processed
        ordered = gram if order is None else gram[order][:, order]
        U = inverse_root(ordered, self.damping, log)
        return solve(W, U, mask=mask, bits=self.bits, group_size=group, symmetric=self.symmetric, order=order)

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> PackedLinear:
        assert stats is not None
        W = site.weight
        mask, pattern = mask_of(site)  # a pruned weight keeps its zero: it is no unknown of the problem
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
        # inverse and Cholesky factor of H, then d rank-one updates of W
        return 2.0 * d**3 + 2.0 * m * d**2
