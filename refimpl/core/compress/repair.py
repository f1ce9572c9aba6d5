"""The base of low-rank repairs: to which layer the path is added, and how it is described and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from refimpl.core.compress.method import Method, check_rank
from refimpl.core.compress.sites import Site
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompensatedLinear, CompressedLayer, Factor, LowRankLinear, PackedLinear


def base_of(site: Site) -> CompressedLayer:
    """The compressed layer a repair is added to; an earlier repair is set aside (one adapter per task).

    Raises:
        OptionError: the site is not compressed, so there is nothing to repair.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> w = torch.eye(16)
        >>> block = nn.Sequential(PackedLinear(values=w, mask=w != 0, pattern="unstructured"))
        >>> base_of(Site("0", 0, block, "0"))
        PackedLinear(16 -> 16, unstructured sparse)
    """
    module = site.module
    if not isinstance(module, CompressedLayer):
        raise OptionError(
            f"{site.name!r} is not compressed, so there is no error to repair; prune or quantise it first, "
            "or leave it out with targets="
        )
    return module.base if isinstance(module, CompensatedLinear) else module


@dataclass(frozen=True)
class LowRankRepair(Method):
    """Add ``B A`` of rank r to a compressed layer, so that it is closer to the original.

    Args:
        rank: r, at most the smaller dimension of every site it is used on.

    Example:
        >>> from refimpl import PlainSVD
        >>> isinstance(PlainSVD(rank=32), LowRankRepair)
        True
    """

    rank: int = 64
    uses_reference: ClassVar[bool] = True

    def layer_config(self, site: Site) -> dict[str, Any]:
        check_rank(site, self.rank)
        factors = {
            "A": self.factor_config(site.in_features, self.rank),
            "B": self.factor_config(self.rank, site.out_features),
        }
        adapter = {"type": "LowRankLinear", **factors}
        return {"type": "CompensatedLinear", "base": base_of(site).config(), "adapter": adapter}

    def factor_config(self, in_features: int, out_features: int) -> dict[str, Any]:
        """Configuration of one factor."""
        return {"type": "Factor", "in_features": in_features, "out_features": out_features}

    def attach(self, site: Site, A: Factor | PackedLinear, B: Factor | PackedLinear) -> CompensatedLinear:
        """The repaired layer: the site's base, untouched, beside ``B A``."""
        return CompensatedLinear(base_of(site), LowRankLinear(A, B))

    def error(self, site: Site, original: Tensor) -> Tensor:
        """dW = W - W_hat, fp32 [m, d], against the base without any earlier repair."""
        return original.float() - base_of(site).to_dense().float()

    def flops(self, site: Site) -> float:
        m, d = site.out_features, site.in_features
        return 6.0 * m * d * min(m, d)


def to_layer_dtype(site: Site, *factors: Tensor) -> list[Factor]:
    """Unquantised factors in the dtype of the site's weight.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> to_layer_dtype(Site("0", 0, nn.Sequential(nn.Linear(2, 2)), "0"), torch.ones(1, 2).double())[0].weight.dtype
        torch.float32
    """
    dtype = site.weight.dtype
    return [Factor(factor.to(dtype)) for factor in factors]
