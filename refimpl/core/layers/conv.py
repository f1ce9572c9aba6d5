"""Two-dimensional convolutions: the geometry apart from the kernel, and a layer that holds any compressed kernel.

A convolution is a linear map applied to patches. Flattened to [out, in / groups * kh * kw] its kernel is an ordinary
matrix, so any compressed form of a matrix (codes, zeros, factors, sums of them) becomes a convolution by adding the
geometry.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refimpl.core.layers.activation import QuantizedInput
from refimpl.core.layers.base import CompressedLayer, empty_layer
from refimpl.core.layers.lowrank import CompensatedLinear, LowRankLinear


@dataclass(frozen=True)
class Geometry:
    """How a flattened kernel is laid over an image; everything of `torch.nn.Conv2d` but weight and bias.

    Args:
        in_channels: channels of the image.
        kernel, stride, dilation: (height, width).
        padding: rows or columns added (left, right, top, bottom), as `torch.nn.functional.pad` takes them.
        groups: independent groups of channels.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Example:
        >>> geometry = Geometry.of(nn.Conv2d(3, 8, 5, padding="same"))
        >>> geometry.kernel, geometry.padding, geometry.in_features
        ((5, 5), (2, 2, 2, 2), 75)
    """

    in_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """The geometry of a torch convolution.

        Example:
            >>> Geometry.of(nn.Conv2d(4, 4, 3, groups=4)).in_features
            9
        """
        padding: list[int] = []
        for axis in (1, 0):  # the last dimension comes first
            if conv.padding == "same":
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                padding += [total // 2, total - total // 2]
            else:
                padding += 2 * [0 if isinstance(conv.padding, str) else conv.padding[axis]]
        return cls(
            conv.in_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            (padding[0], padding[1], padding[2], padding[3]),
            (conv.dilation[0], conv.dilation[1]),
            conv.groups,
            conv.padding_mode,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        """Undo `asdict` after a journey through JSON, which knows no tuples.

        Example:
            >>> geometry = Geometry.of(nn.Conv2d(3, 8, 3))
            >>> Geometry.from_config(asdict(geometry)) == geometry
            True
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(**values)

    @property
    def in_features(self) -> int:
        """Columns of the flattened kernel: in_channels / groups * kernel height * kernel width."""
        return self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    def kernel_of(self, weight: Tensor) -> Tensor:
        """[out, in_features] to [out, in_channels / groups, kernel height, kernel width].

        Example:
            >>> Geometry.of(nn.Conv2d(3, 8, 5)).kernel_of(torch.zeros(8, 75)).shape
            torch.Size([8, 3, 5, 5])
        """
        return weight.unflatten(1, (self.in_channels // self.groups, *self.kernel))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of x [n, in_channels, h, w] with weight [out, in_features]; differentiable in all three.

        Example:
            >>> conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            >>> x = torch.randn(1, 3, 9, 9)
            >>> torch.allclose(Geometry.of(conv).convolve(x, conv.weight.flatten(1), conv.bias), conv(x))
            True
        """
        left, right, top, bottom = self.padding
        symmetric = (left, top) == (right, bottom)
        inside = self.padding_mode == "zeros" and symmetric  # then the convolution itself can add them
        x = x if inside else self._padded(x)
        padding = (top, left) if inside else (0, 0)
        return F.conv2d(x, self.kernel_of(weight), bias, self.stride, padding, self.dilation, self.groups)

    def unfold(self, x: Tensor) -> Tensor:
        """The patches of x [n, in_channels, h, w] as rows [n, positions, in_features] that the flattened kernel
        multiplies; for one group of channels only.

        Example:
            >>> conv = nn.Conv2d(3, 8, 3, bias=False)
            >>> x = torch.randn(2, 3, 9, 9)
            >>> rows = Geometry.of(conv).unfold(x)
            >>> torch.allclose(rows @ conv.weight.flatten(1).T, conv(x).flatten(2).transpose(1, 2), atol=1e-5)
            True
        """
        assert self.groups == 1
        x = self._padded(x)
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)
        down, right = self.dilation
        # [n, channels, positions down and right, kernel height, kernel width], still a view
        patches = x[..., ::down, ::right].permute(0, 2, 3, 1, 4, 5)
        return patches.flatten(3).flatten(1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        if not any(self.padding):
            return x
        return F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def module(self, out_channels: int) -> nn.Conv2d:
        """A torch convolution of this geometry on "meta", without a bias, to be given a weight.

        Example:
            >>> Geometry.of(nn.Conv2d(3, 8, 3, padding=1)).module(16)
            Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
        """
        left, right, top, bottom = self.padding
        assert (left, top) == (right, bottom) or self.stride == (1, 1)  # torch pads unevenly only for "same"
        padding: Any = (top, left) if (left, top) == (right, bottom) else "same"
        mode: Any = self.padding_mode
        return nn.Conv2d(
            self.in_channels,
            out_channels,
            self.kernel,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            bias=False,
            padding_mode=mode,
            device="meta",
        )

    def pointwise(self, channels: int) -> Geometry:
        """A 1 x 1 convolution of that many channels: what follows this one in a product of factors.

        Example:
            >>> Geometry.of(nn.Conv2d(3, 8, 3, stride=2)).pointwise(4).in_features
            4
        """
        return Geometry(channels, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros")


class PackedConv2d(CompressedLayer):
    """A convolution whose flattened kernel is a compressed layer.

    A low-rank kernel is applied as two convolutions (its patches to r channels, then 1 x 1) and never multiplied out,
    unless the convolution is grouped.

    Args:
        base: the flattened kernel [out, in_channels / groups * kernel height * kernel width] with the bias.
        geometry: stride, padding and the rest.

    Attributes:
        in_features, out_features: of the flattened kernel.

    Example:
        >>> from refimpl.core.layers import PackedLinear
        >>> conv = nn.Conv2d(4, 8, 3, padding=1)
        >>> kernel = conv.weight.detach().flatten(1)
        >>> layer = PackedConv2d(PackedLinear(values=kernel, bias=conv.bias), Geometry.of(conv))
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(layer(x), conv(x)), layer.to_dense().shape
        (True, torch.Size([8, 36]))
    """

    is_its_weight = False

    def __init__(self, base: CompressedLayer, geometry: Geometry) -> None:
        super().__init__()
        assert base.in_features == geometry.in_features
        self.base, self.geometry = base, geometry
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, [out] or None."""
        return getattr(self.base, "bias", None)

    @property
    def weight(self) -> Tensor:
        """The kernel [out, in_channels / groups, kernel height, kernel width], unpacked, because some models read it."""
        return self.geometry.kernel_of(self.to_dense())

    def to_dense(self) -> Tensor:
        """The flattened kernel, [out_features, in_features] like that of every compressed layer."""
        return self.base.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return _apply(self.base, x, self.geometry)

    def parts(self) -> dict[str, int]:
        return self.base.parts()

    def config(self) -> dict[str, Any]:
        return {"type": "PackedConv2d", "base": self.base.config(), "geometry": asdict(self.geometry)}

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> PackedConv2d:
        return cls(empty_layer(config["base"], dtype, device), Geometry.from_config(config["geometry"]))

    def extra_repr(self) -> str:
        height, width = self.geometry.kernel
        return f"{self.geometry.in_channels} -> {self.out_features}, {height} x {width}"


def _apply(layer: CompressedLayer, x: Tensor, geometry: Geometry) -> Tensor:
    """Convolve with the kernel that `layer` holds; sums and products of kernels are computed term by term."""
    if isinstance(layer, QuantizedInput):
        return _apply(layer.base, layer.quantizer(x), geometry)
    if isinstance(layer, CompensatedLinear):
        return _apply(layer.base, x, geometry) + _apply(layer.adapter, x, geometry)
    if isinstance(layer, LowRankLinear) and geometry.groups == 1:
        return _apply(layer.B, _apply(layer.A, x, geometry), geometry.pointwise(layer.rank))
    bias = getattr(layer, "bias", None)
    return geometry.convolve(x, layer.to_dense().to(x.dtype), bias)
