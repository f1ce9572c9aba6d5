"""Low-rank repairs that EoRA is compared with: SVD of the weight error, plain or scaled by activations, and LoftQ.

With dW the difference between the original and the compressed weight, and B [m, r], A [r, d] the factors of the repair:

    plain SVD     argmin ||dW - B A||_F
    scaled SVD    argmin ||(dW - B A) diag(s)||_F          s: size of each input
    LoftQ         argmin ||W - Q - B A||_F                 over the quantised Q as well, alternating
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from refimpl.baselines.rtn import RTN, quantised_config
from refimpl.core.compress.method import Method, check_rank
from refimpl.core.compress.repair import LowRankRepair, to_layer_dtype
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompensatedLinear, CompressedLayer, LowRankLinear, PackedLinear


def truncated_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets: U [m, r], the values [r] in decreasing order, and V^T [r, d].

    Example:
        >>> truncated_svd(torch.diag(torch.tensor([1.0, 3.0])), 1)[1].tolist()
        [3.0]
    """
    U, values, Vt = torch.linalg.svd(M, full_matrices=False)
    # Eckart-Young: U_r diag(s_r) V_r^T is the rank-r matrix nearest to M in the Frobenius norm
    return U[:, :rank], values[:rank], Vt[:rank]


def balanced(U: Tensor, values: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of equal norm, B = U sqrt(s) and A = sqrt(s) V^T.

    Example:
        >>> balanced(*truncated_svd(torch.tensor([[4.0]]), 1))[0].abs().item()
        2.0
    """
    root = values.sqrt()
    return U * root, root[:, None] * Vt


@dataclass(frozen=True)
class PlainSVD(LowRankRepair):
    """Best rank-r approximation of the weight error itself; needs no data.

    Source: ZeroQuant-V2, Yao et al., 2023, arXiv 2303.08302 (there called LoRC).

    Example:
        >>> PlainSVD(rank=32)
        PlainSVD(rank=32)
    """

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> CompensatedLinear:
        assert original is not None
        B, A = balanced(*truncated_svd(self.error(site, original), self.rank))
        return self.attach(site, *to_layer_dtype(site, A, B))


@dataclass(frozen=True)
class ActSVD(LowRankRepair):
    """SVD of the weight error with its columns scaled by the size of the inputs.

    Source: the baseline "Act-S" of the EoRA paper, after ASVD (Yuan et al., 2023, arXiv 2312.05821).

    Args:
        alpha: the scale of input i is ``mean(|x_i|) ** alpha``; the paper's text has 1/2, its code 1.

    Example:
        >>> ActSVD(rank=32)
        ActSVD(rank=32, alpha=0.5)
    """

    alpha: float = 0.5
    statistics: ClassVar[frozenset[str]] = frozenset({"abs"})

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise OptionError(f"alpha={self.alpha}: use an exponent of 0 (plain SVD) or more")

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> CompensatedLinear:
        assert stats is not None and original is not None
        s = stats.mean_abs**self.alpha
        s = s + (s.max() == 0)  # an expert without tokens: plain SVD
        s = s.clamp_min(1e-6 * s.max())  # an input that is always zero must not cause a division by zero
        # dW diag(s) = B' A', so dW is approximated by B' (A' diag(1/s)); a diagonal s ignores correlated inputs, which
        # is the difference to EoRA's full square root S
        B, A = balanced(*truncated_svd(self.error(site, original) * s, self.rank))
        return self.attach(site, *to_layer_dtype(site, A / s, B))


@dataclass(frozen=True)
class LoftQ(Method):
    """Alternate between quantising W - B A and fitting B A to the error of the quantised weight.

    Source: Li et al., 2023, arXiv 2310.08659, algorithm 1.
    Needs no data and starts from the uncompressed weight: it is a quantiser and a repair in one.

    Args:
        bits, group_size, symmetric: as in `RTN`.
        rank: r of the low-rank path.
        iterations: rounds of the alternation (the paper uses 1 or 5).

    Example:
        >>> LoftQ(bits=3, rank=32)
        LoftQ(bits=3, group_size=64, symmetric=False, rank=32, iterations=5)
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    rank: int = 64
    iterations: int = 5

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise OptionError(f"iterations={self.iterations}: use 1 or more")

    def layer_config(self, site: Site) -> dict[str, Any]:
        check_rank(site, self.rank)
        if isinstance(site.module, CompressedLayer):
            raise OptionError(
                f"{site.name!r} is already {site.module}; LoftQ starts from uncompressed weights: use RTN or GPTQ, "
                "then PlainSVD or EoRA"
            )
        shape = {"A": (site.in_features, self.rank), "B": (self.rank, site.out_features)}
        adapter = {name: {"type": "Factor", "in_features": i, "out_features": o} for name, (i, o) in shape.items()}
        base = quantised_config(site, self.bits, self.group_size, self.symmetric)
        return {"type": "CompensatedLinear", "base": base, "adapter": {"type": "LowRankLinear", **adapter}}

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> CompensatedLinear:
        W = site.weight
        rounding = RTN(self.bits, self.group_size, self.symmetric)
        low_rank = torch.zeros_like(W, dtype=torch.float32)
        for _ in range(self.iterations):
            # Q_t = quantise(W - B_(t-1) A_(t-1)); B_0 A_0 = 0
            rest = Site(site.name, site.block, torch.nn.Module(), "rest")
            rest.parent.add_module("rest", site.dense_module(W.float() - low_rank))
            quantised: PackedLinear = rounding.compress_site(rest, None, None)
            quantised.dtype = W.dtype
            # B_t A_t = SVD_r(W - Q_t)
            B, A = balanced(*truncated_svd(W.float() - quantised.to_dense().float(), self.rank))
            low_rank = B @ A
        return CompensatedLinear(quantised, LowRankLinear(*to_layer_dtype(site, A, B)))

    def flops(self, site: Site) -> float:
        m, d = site.out_features, site.in_features
        return self.iterations * 6.0 * m * d * min(m, d)
