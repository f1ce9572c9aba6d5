"""EoRA: repair a compressed layer with the low-rank path that is best for its *outputs*.

Source: Liu et al., 2024, arXiv 2410.21271, section 3 and theorem 1.

A layer y = x W^T was compressed to W_hat, with the error dW = W - W_hat. Plain SVD finds the rank-r matrix closest to
dW. EoRA finds the one that leaves the least error of the outputs on calibration inputs X [tokens, d],

    argmin over B, A    ||(dW - B A) X^T||_F^2 = tr((dW - B A) G (dW - B A)^T) = ||(dW - B A) S||_F^2

with G = X^T X = S S^T. It is solved in closed form: scale dW by S, truncate the SVD of dW S, and scale back by inv(S).

Any square root of G gives the same BA; the same estimator is known as the exact solution of QERA and, applied to W
itself, as the whitening of SVD-LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor

from refimpl.baselines.gptq import GPTQ
from refimpl.baselines.svd import balanced, truncated_svd
from refimpl.core.compress.repair import LowRankRepair, to_layer_dtype
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompensatedLinear, PackedLinear

EPSILON = 1e-8  # eigenvalues below this fraction of the largest are noise, or directions without any input
DAMPING = 0.01  # of the mean diagonal of G: what inputs that the calibration did not show may have in every direction


def eigenspace(G: Tensor) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3: S = Q sqrt(Lambda) with G = Q Lambda Q^T = S S^T, and its inverse.

    Args:
        G: second moment of the inputs, sum of x x^T, [d, d]; use fp64, its condition number can pass 1e8.

    Returns:
        S [d, d] and inv(S) [d, d]. Eigenvalues are clamped at `EPSILON` times the largest, so that inputs which are
        always zero cause no division by zero (the authors replace negative eigenvalues only, which an exact zero
        breaks).

    Example:
        >>> S, S_inv = eigenspace(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
        >>> torch.allclose(S @ S_inv, torch.eye(2, dtype=torch.float64))
        True
    """
    values, Q = torch.linalg.eigh(G)  # 2. G = Q Lambda Q^T, eigenvalues in increasing order
    floor = torch.where(values[-1] > 0, EPSILON * values[-1], torch.ones_like(values[-1]))  # no inputs at all: S = I
    root = torch.maximum(values, floor).sqrt()
    return Q * root, (Q / root).T  # 3. S = Q sqrt(Lambda); Q is orthogonal, so inv(S) = inv(sqrt(Lambda)) Q^T


def eora(dW: Tensor, S: Tensor, S_inv: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Steps 4 to 6: the factors of the best rank-r repair.

    Args:
        dW: weight error W - W_hat, [m, d].
        S, S_inv: from `eigenspace`, in the dtype of `dW`.
        rank: r.

    Returns:
        B [m, r] and A [r, d]. Their product minimises ``||(dW - B A) X^T||_F``; the square of that norm is then the sum
        of the squared singular values of ``dW S`` after the r-th.

    Example:
        >>> dW = torch.diag(torch.tensor([1.0, 1.0]))
        >>> B, A = eora(dW, *eigenspace(torch.diag(torch.tensor([1.0, 9.0]))), rank=1)
        >>> (B @ A).round(decimals=3).abs().tolist()   # input 2 is three times as large: repair its column
        [[0.0, 0.0], [0.0, 1.0]]
    """
    projected = dW @ S  # 4. dW' = dW S: its Frobenius norm is the norm of the output error dW X^T
    U, values, Vt = truncated_svd(projected, rank)  # 5. by Eckart-Young the best rank-r approximation of dW'
    B, A = balanced(U, values, Vt)  # 6. B' = U sqrt(s), A' = sqrt(s) V^T: equal norms use the range of 16 bits best
    return B, A @ S_inv  # back from dW' to dW: B A = B' A' inv(S), so theorem 1's minimum is kept


def damped(G: Tensor) -> Tensor:
    """H = G + `DAMPING` mean(diag G) I, the second moment that 4-bit factors are rounded for; I without any input.

    G alone says that errors outside the span of the calibration inputs cost nothing. Rounding leaves errors everywhere,
    and other inputs do see them.

    Args:
        G: second moment of the inputs, [d, d].

    Returns:
        fp64 [d, d], positive definite.

    Example:
        >>> damped(torch.tensor([[4.0, 0.0], [0.0, 0.0]])).tolist()
        [[4.02, 0.0], [0.0, 0.02]]
    """
    G = G.double()
    mean = G.diagonal().mean()
    return G + torch.where(mean > 0, DAMPING * mean, 1.0) * torch.eye(len(G), dtype=G.dtype, device=G.device)


def equal_sizes(B: Tensor, A: Tensor, H: Tensor) -> Tensor:
    """Factors c that give both sides of every direction the same size: B_k <- c_k B_k and A_k <- A_k / c_k.

    A group of a row of B shares one scale, so a column far below the others is rounded to nothing or to noise. In the
    directions that the calibration inputs hardly reach, S is tiny and inv(S) is huge: there `eora` gives B tiny columns,
    and A huge rows that would multiply their rounding errors. Where the calibration inputs do reach, both sides have
    equal sizes already, since ``||A_k||_H`` is about ``||A_k||_G = ||B_k||``.

    Args:
        B: [m, r].
        A: [r, d].
        H: from `damped`.

    Returns:
        fp32 [r], powers of two: scaling by them is exact. 1 where there is nothing to repair.

    Example:
        >>> equal_sizes(torch.tensor([[1e-3]]), torch.tensor([[16.4]]), torch.eye(1).double()).tolist()
        [128.0]
    """
    inputs = ((A.double() @ H) * A.double()).sum(1).sqrt()  # ||A_k||_H = sqrt(A_k H A_k^T), the size of input k of B
    # c ||B_k|| = ||A_k||_H / c
    c = (inputs / B.double().norm(dim=0)).sqrt().log2().round().exp2()
    return torch.where(c.isfinite() & (c > 0), c, 1.0).float()


def refit(dW: Tensor, A_hat: Tensor, H: Tensor) -> Tensor:
    """The best B for an A that was rounded, so that B corrects what the rounding of A has done.

    Args:
        dW: weight error, [m, d].
        A_hat: [r, d].
        H: from `damped`.

    Returns:
        B [m, r], in the dtype of `dW`, which minimises ``tr((dW - B A_hat) H (dW - B A_hat)^T)``.

    Example:
        >>> refit(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.0]]), torch.eye(2).double()).tolist()
        [[4.0]]
    """
    A = A_hat.double()
    # the normal equations B A H A^T = dW H A^T; the pseudo-inverse, since rows of A may be zero
    return (dW.double() @ H @ A.T @ torch.linalg.pinv(A @ H @ A.T, hermitian=True)).to(dW.dtype)


@dataclass(frozen=True)
class EoRA(LowRankRepair):
    """Repair compressed layers for the outputs on a chosen task; the compressed weights do not change.

    Args:
        rank: r of the path added to every site (the paper's main tables use 128 for models with d = 4096).
        adapter_bits: quantise both factors with GPTQ to this many bits (the paper recommends 4); None keeps 16 bits. B is
            fitted again to A as it was rounded (`refit`), and both are scaled to equal sizes (`equal_sizes`), which the
            paper does not say.
        adapter_group: inputs per scale of a quantised factor; where it does not divide the factor's width, their greatest
            common divisor.

    Example:
        >>> EoRA(rank=64, adapter_bits=4)
        EoRA(rank=64, adapter_bits=4, adapter_group=64)
    """

    adapter_bits: int | None = None
    adapter_group: int = 64
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        if self.adapter_bits is not None and not 2 <= self.adapter_bits <= 8:
            raise OptionError(f"adapter_bits={self.adapter_bits}: use 2 to 8, or None for 16-bit factors")
        if self.adapter_group < 1:
            raise OptionError(f"adapter_group={self.adapter_group}: use 1 or more")

    def factor_config(self, in_features: int, out_features: int) -> dict[str, Any]:
        if self.adapter_bits is None:
            return super().factor_config(in_features, out_features)
        return {
            "type": "PackedLinear",
            "in_features": in_features,
            "out_features": out_features,
            "bits": self.adapter_bits,
            "group_size": gcd(self.adapter_group, in_features),
            "symmetric": False,
            "pattern": None,
            "nonzeros": in_features * out_features,
            "bias": False,
        }

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> CompensatedLinear:
        assert stats is not None and original is not None
        # 1. the second moment G was summed over the calibration tokens while the model ran; G / tokens, the paper's mean,
        # would scale S and inv(S) by reciprocal factors and give the same B A
        S, S_inv = (root.float() for root in eigenspace(stats.gram.double()))
        dW = self.error(site, original)
        B, A = eora(dW, S, S_inv, self.rank)
        if self.adapter_bits is None:
            return self.attach(site, *to_layer_dtype(site, A, B))
        # the paper quantises both factors with GPTQ; in y = B (A x) each is a layer with inputs of its own
        H = damped(stats.gram)
        A_packed = self._quantise(site, A, stats.gram)
        B = refit(dW, A_packed.to_dense().float(), H)
        c = equal_sizes(B, A_packed.to_dense(), H)
        A_packed.scale = (A_packed.scale / c[:, None]).to(A_packed.scale)
        # the inputs of B are A x, whose second moment A H A^T needs no second pass over the data
        A_hat = A_packed.to_dense().double()
        return self.attach(site, A_packed, self._quantise(site, B * c, (A_hat @ H @ A_hat.T).float()))

    def _quantise(self, site: Site, factor: Tensor, gram: Tensor) -> PackedLinear:
        assert self.adapter_bits is not None
        group = gcd(self.adapter_group, factor.shape[1])
        # large inputs first: a few large ones carry most of what reaches a down projection
        found = GPTQ(self.adapter_bits, act_order=True, damping=DAMPING).quantise(factor, gram, None, site.log, group)
        return PackedLinear(
            codes=found.codes, scale=found.scale, zero=found.zero, bits=self.adapter_bits, dtype=site.weight.dtype
        )

    def flops(self, site: Site) -> float:
        m, d = site.out_features, site.in_features
        # eigendecomposition of G, then the products with S and inv(S), then the SVD of dW S
        return 9.0 * d**3 + 2.0 * m * d**2 + 6.0 * m * d * min(m, d)
