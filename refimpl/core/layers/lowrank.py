"""A low-rank map, and the sum of a compressed layer with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.errors import OptionError
from refimpl.core.layers.base import CompressedLayer, empty_layer
from refimpl.core.layers.packed import PackedLinear


class Factor(CompressedLayer):
    """One unquantised factor of a low-rank product, stored as it is.

    Args:
        weight: [out, in].

    Example:
        >>> Factor(torch.ones(2, 3)).to_dense().shape
        torch.Size([2, 3])
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def to_dense(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def parts(self) -> dict[str, int]:
        return {"values": self.weight.nbytes}

    def config(self) -> dict[str, Any]:
        return {"type": "Factor", "in_features": self.in_features, "out_features": self.out_features}

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Factor:
        return cls(torch.empty(config["out_features"], config["in_features"], dtype=dtype, device=device))


class LowRankLinear(CompressedLayer):
    """``y = (x A.T) B.T``: rank r, never multiplied out.

    Args:
        A: factor [r, in], plain or packed.
        B: factor [out, r], plain or packed.

    Example:
        >>> layer = LowRankLinear(Factor(torch.ones(1, 3)), Factor(torch.ones(2, 1)))
        >>> layer(torch.ones(3)).tolist()
        [3.0, 3.0]
    """

    def __init__(self, A: Factor | PackedLinear, B: Factor | PackedLinear) -> None:
        super().__init__()
        self.A, self.B = A, B
        self.in_features, self.out_features, self.rank = A.in_features, B.out_features, A.out_features

    def to_dense(self) -> Tensor:
        return self.B.to_dense() @ self.A.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def parts(self) -> dict[str, int]:
        return {"adapter": self.nbytes}

    def config(self) -> dict[str, Any]:
        return {"type": "LowRankLinear", "A": self.A.config(), "B": self.B.config()}

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> LowRankLinear:
        factors = (empty_layer(config[name], dtype, device) for name in "AB")
        return cls(*factors)  # type: ignore[arg-type]

    def truncated(self, rank: int) -> LowRankLinear:
        """The first `rank` directions of this path.

        Methods that order their directions by how much they repair (the SVD family does) give, for these inputs, the
        same path as a fit at the lower rank: fit once, serve at any rank.

        Raises:
            OptionError: `rank` is above this path's rank or below 1, or the factors are packed.

        Example:
            >>> layer = LowRankLinear(Factor(torch.ones(4, 3)), Factor(torch.ones(2, 4)))
            >>> layer.truncated(1).rank
            1
        """
        if not 1 <= rank <= self.rank:
            raise OptionError(f"rank={rank}: this path has rank {self.rank}, so use 1 to {self.rank}")
        if not (isinstance(self.A, Factor) and isinstance(self.B, Factor)):
            raise OptionError("the factors are packed; truncate before they are quantised")
        return LowRankLinear(Factor(self.A.weight[:rank]), Factor(self.B.weight[:, :rank]))

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.rank} -> {self.out_features}"


class CompensatedLinear(CompressedLayer):
    """``y = base(x) + adapter(x)``: a compressed layer that is never touched, beside a low-rank path.

    Args:
        base: the compressed layer; carries the bias.
        adapter: the low-rank path; one base can be shared by many.

    Example:
        >>> w = torch.tensor([[0.0, 2.0, 0.0, 4.0]])
        >>> base = PackedLinear(values=w, mask=w != 0, pattern="2:4")
        >>> adapter = LowRankLinear(Factor(torch.ones(1, 4)), Factor(torch.ones(1, 1)))
        >>> CompensatedLinear(base, adapter).to_dense().tolist()
        [[1.0, 3.0, 1.0, 5.0]]
    """

    def __init__(self, base: CompressedLayer, adapter: LowRankLinear) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, [out] or None."""
        return self.base.bias  # type: ignore[return-value]

    def to_dense(self) -> Tensor:
        return self.base.to_dense() + self.adapter.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)

    def parts(self) -> dict[str, int]:
        return self.base.parts() | self.adapter.parts()

    def config(self) -> dict[str, Any]:
        return {"type": "CompensatedLinear", "base": self.base.config(), "adapter": self.adapter.config()}

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> CompensatedLinear:
        parts = (empty_layer(config[name], dtype, device) for name in ("base", "adapter"))
        return cls(*parts)  # type: ignore[arg-type]
