"""One-shot pruning: by magnitude, by Wanda's score, and by SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from refimpl.baselines.obs import check_damping, inverse_root, lowest, solve
from refimpl.core.compress.method import Method, check_pattern
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompressedLayer, PackedLinear, parse_pattern


def prune_mask(score: Tensor, pattern: str, sparsity: float, per_row: bool) -> Tensor:
    """The mask of the weights to keep, given a score for each.

    Args:
        score: [m, d], higher is kept.
        pattern: "n:m", or "unstructured".
        sparsity: fraction dropped when unstructured.
        per_row: for unstructured pruning, compare within each row instead of over the whole matrix.

    Returns:
        bool [m, d], True where kept.

    Example:
        >>> prune_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), "2:4", 0.5, True).tolist()
        [[False, True, True, False]]
    """
    structure = parse_pattern(pattern)
    if structure is not None:
        n, m = structure  # of every m neighbouring inputs the m - n lowest scores go
        return ~lowest(score.unflatten(1, (-1, m)), m - n).flatten(1)
    if per_row:
        return ~lowest(score, int(score.shape[1] * sparsity))
    return ~lowest(torch.flatten(score), int(score.numel() * sparsity)).view_as(score)


@dataclass(frozen=True)
class Pruner(Method):
    """Options that all three pruners share.

    Args:
        pattern: "n:m" (n of every m neighbouring inputs stay) or "unstructured".
        sparsity: fraction of zeros for "unstructured". "n:m" sets it by itself, so no other may be given beside it.

    Example:
        >>> Magnitude("2:4")
        Magnitude(pattern='2:4', sparsity=0.5)
    """

    pattern: str = "2:4"
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        structure = parse_pattern(self.pattern)
        if structure is not None and self.sparsity not in (0.5, 1 - structure[0] / structure[1]):
            raise OptionError(
                f"sparsity={self.sparsity} beside pattern={self.pattern!r}, which leaves {structure[0]} of every "
                f"{structure[1]} weights; leave sparsity out, or use pattern='unstructured'"
            )
        if structure is None and not 0 < self.sparsity < 1:
            raise OptionError(f"sparsity={self.sparsity}: use a fraction between 0 and 1 (0.5 removes half)")

    def layer_config(self, site: Site) -> dict[str, Any]:
        check_pattern(site, self.pattern)
        if isinstance(site.module, CompressedLayer):
            raise OptionError(f"{site.name!r} is already {site.module}; prune first, then quantise or repair")
        size = site.in_features * site.out_features
        structure = parse_pattern(self.pattern)
        kept = size * structure[0] // structure[1] if structure else size - self.dropped(site)
        return {
            "type": "PackedLinear",
            "in_features": site.in_features,
            "out_features": site.out_features,
            "bits": None,
            "group_size": None,
            "symmetric": True,
            "pattern": self.pattern,
            "nonzeros": kept,
            "bias": site.bias is not None,
        }

    def dropped(self, site: Site) -> int:
        """Number of weights removed from `site` by unstructured pruning."""
        return int(site.in_features * site.out_features * self.sparsity)

    def _pack(self, site: Site, weight: Tensor, mask: Tensor) -> PackedLinear:
        return PackedLinear(values=weight, mask=mask, pattern=self.pattern, bias=site.bias)

    def flops(self, site: Site) -> float:
        return 4.0 * site.in_features * site.out_features


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Remove the smallest weights: within each group of m for "n:m", otherwise in the whole layer.

    Example:
        >>> Magnitude("unstructured", sparsity=0.6)
        Magnitude(pattern='unstructured', sparsity=0.6)
    """

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> PackedLinear:
        W = site.weight
        return self._pack(site, W, prune_mask(W.abs().float(), self.pattern, self.sparsity, per_row=False))


@dataclass(frozen=True)
class Wanda(Pruner):
    """Remove the weights with the smallest ``|w_ij| * ||x_j||``, compared within each row.

    Source: Sun et al., 2023, arXiv 2306.11695, eq. 1. The score is the root of the output error that removing w_ij alone
    causes; unlike SparseGPT, no other weight changes.

    Example:
        >>> Wanda("2:4").statistics
        frozenset({'abs'})
    """

    statistics: ClassVar[frozenset[str]] = frozenset({"abs"})

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> PackedLinear:
        assert stats is not None
        W = site.weight
        norm = stats.norm + (stats.norm.sum() == 0)  # an expert without tokens: the score is the magnitude
        # S_ij = |w_ij| ||x_j||_2, with ||x_j||^2 = G_jj; each output i is compared only with itself
        return self._pack(site, W, prune_mask(W.abs().float() * norm, self.pattern, self.sparsity, per_row=True))

    def dropped(self, site: Site) -> int:
        return site.out_features * int(site.in_features * self.sparsity)


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Prune column by column, and let later columns compensate (Frantar and Alistarh, 2023, arXiv 2301.00774).

    Weights with the smallest ``w_ij^2 / [inv(H)]_jj`` are removed, H being the damped second moment of the inputs, and the
    columns not yet processed change so that the outputs change least: see `refimpl.baselines.obs`.

    Args:
        damping: fraction of the mean diagonal of G added to its diagonal.

    Example:
        >>> SparseGPT("2:4")
        SparseGPT(pattern='2:4', sparsity=0.5, damping=0.01)
    """

    damping: float = 0.01
    statistics: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)

    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> PackedLinear:
        assert stats is not None
        W = site.weight
        U = inverse_root(stats.gram, self.damping, site.log)
        found = solve(W, U, pattern=self.pattern, sparsity=self.sparsity)
        assert found.mask is not None
        return self._pack(site, found.weight.to(W.dtype), found.mask)

    def flops(self, site: Site) -> float:
        d, m = site.in_features, site.out_features
        return 2.0 * d**3 + 2.0 * m * d**2
