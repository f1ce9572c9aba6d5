"""Layers in the layout that the GPU kernels read, for running a compressed model rather than storing it.

A `PackedLinear` stores any number of bits and any pattern in one dense stream, which suits a file; a kernel
needs the words of neighbouring outputs next to each other. `refimpl.core.files.serve.serve` changes one into the
other. On a GPU these layers call a Triton kernel; elsewhere the same operator runs in PyTorch, slowly: for a processor,
`serve` takes the forms of `refimpl.core.layers.processor`.

The kernels are imported when a layer is created or called, so `refimpl` works without Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.layers.activation import QuantizedInput
from refimpl.core.layers.base import CompressedLayer
from refimpl.core.layers.lowrank import CompensatedLinear, Factor, LowRankLinear
from refimpl.core.layers.packed import SCALE_DTYPE, PackedLinear, parse_pattern
from refimpl.core.layers.packing import unpack_bits
from refimpl.core.layers.processor import ProcessorLinear


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)


class ServedLinear(CompressedLayer):
    """``y = x W.T + b`` with group-quantised W, by `refimpl.kernels.quant_matmul`.

    Args:
        planes: int32 [in * bits / 32, out].
        scale: [in / group, out].
        zero: uint8 [in / group, out], or None for a symmetric grid.
        bits: 2, 3, 4 or 8.
        bias: [out] or None.
        dtype: of `to_dense`.

    Example:
        >>> codes = torch.full((2, 32), 9, dtype=torch.uint8)
        >>> packed = PackedLinear(codes=codes, scale=torch.full((2, 1), 0.5), bits=4)
        >>> layer = ServedLinear.of(packed)
        >>> layer(torch.ones(1, 32)).tolist(), layer.parts() == packed.parts()
        ([[16.0, 16.0]], True)
    """

    planes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.bits, self.dtype = bits, dtype
        self.in_features, self.out_features = planes.shape[0] * 32 // bits, planes.shape[1]
        self.group_size = self.in_features // scale.shape[0]
        self.register_buffer("planes", planes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = _frozen(bias)

    @classmethod
    def of(cls, layer: PackedLinear) -> ServedLinear:
        """The same weights; `layer` must be quantised and not sparse, with a shape that has a kernel."""
        from refimpl.kernels.quant_matmul import repack

        assert layer.bits is not None and layer.pattern is None
        codes = unpack_bits(layer.values, layer.bits, layer.in_features)
        zero = None
        if not layer.symmetric:
            zero = unpack_bits(layer.zero, layer.bits, layer.scale.numel()).view_as(layer.scale).T.contiguous()
        scale = layer.scale.T.contiguous()
        return cls(repack(codes, layer.bits), scale, zero, layer.bits, layer.bias, layer.dtype)

    def packed(self) -> PackedLinear:
        """The same weights in the layout of files and exports.

        Example:
            >>> packed = PackedLinear(codes=torch.ones(2, 32, dtype=torch.uint8), scale=torch.ones(2, 1), bits=4)
            >>> torch.equal(ServedLinear.of(packed).packed().values, packed.values)
            True
        """
        from refimpl.kernels.quant_matmul import unpack

        zero = None if self.zero is None else self.zero.T
        return PackedLinear(
            codes=unpack(self.planes, self.bits),
            scale=self.scale.T,
            zero=zero,
            bits=self.bits,
            bias=self.bias,
            dtype=self.dtype,
        )

    def to_dense(self) -> Tensor:
        from refimpl.kernels.quant_matmul import dequantise

        return dequantise(self.planes, self.scale, self.zero, self.bits).T.to(self.dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        from refimpl.kernels.quant_matmul import quant_matmul

        return quant_matmul(x, self.planes, self.scale, self.zero, self.bias, self.bits)

    def parts(self) -> dict[str, int]:
        parts = {"values": self.planes.nbytes, "scales": self.scale.nbytes}
        if self.zero is not None:
            parts["zeros"] = self.zero.nbytes
        if self.bias is not None:
            parts["bias"] = self.bias.nbytes
        return parts

    def config(self) -> dict[str, Any]:
        return {
            "type": "ServedLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.zero is None,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> ServedLinear:
        n_in, n_out, bits = config["in_features"], config["out_features"], config["bits"]
        groups = n_in // config["group_size"]
        planes = torch.empty(n_in * bits // 32, n_out, dtype=torch.int32, device=device)
        scale = torch.empty(groups, n_out, dtype=SCALE_DTYPE, device=device)
        zero = None if config["symmetric"] else torch.empty(groups, n_out, dtype=torch.uint8, device=device)
        bias = torch.empty(n_out, dtype=dtype, device=device) if config["bias"] else None
        return cls(planes, scale, zero, bits, bias, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, groups of {self.group_size}"


class ServedCompensatedLinear(CompressedLayer):
    """``y = base(x) + (x A.T) B.T`` in one kernel, `refimpl.kernels.quant_lowrank_matmul`.

    Args:
        base: the quantised layer; carries the bias.
        A: [rank, in].
        B: [rank, out].

    Example:
        >>> codes = torch.full((2, 32), 9, dtype=torch.uint8)
        >>> base = ServedLinear.of(PackedLinear(codes=codes, scale=torch.full((2, 1), 0.5), bits=4))
        >>> layer = ServedCompensatedLinear(base, torch.ones(1, 32), torch.ones(1, 2))
        >>> layer(torch.ones(1, 32)).tolist()
        [[48.0, 48.0]]
    """

    def __init__(self, base: ServedLinear, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = (nn.Parameter(factor.detach(), requires_grad=False) for factor in (A, B))
        self.in_features, self.out_features, self.rank = A.shape[1], B.shape[1], A.shape[0]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, [out] or None."""
        return self.base.bias

    def packed(self) -> CompensatedLinear:
        """The same weights in the layout of files and exports.

        Example:
            >>> packed = PackedLinear(codes=torch.ones(2, 32, dtype=torch.uint8), scale=torch.ones(2, 1), bits=4)
            >>> layer = ServedCompensatedLinear(ServedLinear.of(packed), torch.ones(1, 32), torch.ones(1, 2))
            >>> layer.packed().adapter
            LowRankLinear(
              32 -> 1 -> 2
              (A): Factor()
              (B): Factor()
            )
        """
        return CompensatedLinear(self.base.packed(), LowRankLinear(Factor(self.A), Factor(self.B.T)))

    def to_dense(self) -> Tensor:
        return self.base.to_dense() + self.B.T @ self.A

    def forward(self, x: Tensor) -> Tensor:
        from refimpl.kernels.quant_lowrank_matmul import quant_lowrank_matmul

        u = nn.functional.linear(x, self.A.to(x.dtype))
        base = self.base
        return quant_lowrank_matmul(x, u, base.planes, base.scale, base.zero, self.B.to(x.dtype), base.bias, base.bits)

    def parts(self) -> dict[str, int]:
        return self.base.parts() | {"adapter": self.A.nbytes + self.B.nbytes}

    def config(self) -> dict[str, Any]:
        return {"type": "ServedCompensatedLinear", "base": self.base.config(), "rank": self.rank}

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> ServedCompensatedLinear:
        base = ServedLinear.empty(config["base"], dtype, device)
        factors = (
            torch.empty(config["rank"], width, dtype=dtype, device=device)
            for width in (base.in_features, base.out_features)
        )
        return cls(base, *factors)

    def extra_repr(self) -> str:
        return f"rank {self.rank}"


class ServedSparseLinear(CompressedLayer):
    """``y = x W.T + b`` with 2:4-sparse W, by `refimpl.kernels.sparse_matvec`.

    Args:
        values: [in / 2, out], the kept weights.
        positions: int32 [in / 32, out], where they belong.
        bias: [out] or None.

    Example:
        >>> w = torch.tensor([[0.0, 2.0, 0.0, 4.0]]).repeat(1, 8)
        >>> layer = ServedSparseLinear.of(PackedLinear(values=w, mask=w != 0, pattern="2:4"))
        >>> layer(torch.ones(1, 32)).item(), layer.parts()   # 16 floats, 16 positions of 2 bits
        (48.0, {'values': 64, 'mask': 4})
    """

    values: Tensor
    positions: Tensor

    def __init__(self, values: Tensor, positions: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = 2 * values.shape[0], values.shape[1]
        self.register_buffer("values", values)
        self.register_buffer("positions", positions)
        self.bias = _frozen(bias)

    @classmethod
    def of(cls, layer: PackedLinear) -> ServedSparseLinear:
        """The same weights; `layer` must be 2:4 sparse, not quantised, and have a multiple of 32 inputs."""
        from refimpl.kernels.sparse_matvec import repack

        mask = layer.nonzero_mask()
        assert layer.bits is None and mask is not None
        return cls(*repack(layer.to_dense(), mask), layer.bias)

    def packed(self) -> PackedLinear:
        """The same weights in the layout of files and exports.

        Example:
            >>> w = torch.tensor([[0.0, 2.0, 0.0, 4.0]]).repeat(1, 8)
            >>> packed = PackedLinear(values=w, mask=w != 0, pattern="2:4")
            >>> torch.equal(ServedSparseLinear.of(packed).packed().values, packed.values)
            True
        """
        from refimpl.kernels.sparse_matvec import unpack

        mask = unpack(torch.ones_like(self.values), self.positions).bool()
        return PackedLinear(values=self.to_dense(), mask=mask, pattern="2:4", bias=self.bias)

    def to_dense(self) -> Tensor:
        from refimpl.kernels.sparse_matvec import unpack

        return unpack(self.values, self.positions)

    def forward(self, x: Tensor) -> Tensor:
        from refimpl.kernels.sparse_matvec import sparse_matvec

        return sparse_matvec(x, self.values, self.positions, self.bias)

    def parts(self) -> dict[str, int]:
        parts = {"values": self.values.nbytes, "mask": self.positions.nbytes}
        if self.bias is not None:
            parts["bias"] = self.bias.nbytes
        return parts

    def config(self) -> dict[str, Any]:
        return {
            "type": "ServedSparseLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> ServedSparseLinear:
        n_in, n_out = config["in_features"], config["out_features"]
        values = torch.empty(n_in // 2, n_out, dtype=dtype, device=device)
        positions = torch.empty(n_in // 32, n_out, dtype=torch.int32, device=device)
        return cls(values, positions, torch.empty(n_out, dtype=dtype, device=device) if config["bias"] else None)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, 2:4 sparse"


Change = Callable[[PackedLinear], tuple[CompressedLayer, str | None]]


def for_kernels(layer: PackedLinear) -> tuple[CompressedLayer, str | None]:
    """A packed layer in the layout of the kernels, or as it is with the reason.

    Example:
        >>> for_kernels(PackedLinear(values=torch.ones(2, 4)))
        (PackedLinear(4 -> 2), 'its values are neither quantised nor sparse')
    """
    reason = _why_not(layer)
    if reason is not None:
        return (layer.packed() if isinstance(layer, ProcessorLinear) else layer), reason
    return (ServedSparseLinear if layer.bits is None else ServedLinear).of(layer), None


def served(layer: CompressedLayer, change: Change = for_kernels) -> tuple[CompressedLayer, str | None]:
    """The layer in another layout, as far as its parts have one.

    Args:
        layer: any compressed layer; it is not changed.
        change: gives a packed layer in the new layout, and why it stays as it is, if it does.

    Returns:
        The new layer (or `layer` itself, if none of its parts changes), and why it, or a part of it, stays as it
        is; None if all of it is served.

    Example:
        >>> codes = torch.ones(2, 48, dtype=torch.uint8)
        >>> served(PackedLinear(codes=codes, scale=torch.ones(2, 1), bits=4))[1]
        'the layer has 48 inputs, no multiple of 32'
    """
    if isinstance(layer, PackedLinear):
        return change(layer)
    if isinstance(layer, CompensatedLinear):
        base, reason = served(layer.base, change)
        down, up = layer.adapter.A, layer.adapter.B
        adapter: CompressedLayer = layer.adapter
        if isinstance(down, Factor) and isinstance(up, Factor):
            if isinstance(base, ServedLinear):
                return ServedCompensatedLinear(base, down.weight, up.weight.T.contiguous()), reason
        else:
            adapter, also = served(adapter, change)
            reason = reason or also
        unchanged = base is layer.base and adapter is layer.adapter
        return (layer if unchanged else CompensatedLinear(base, adapter)), reason  # type: ignore[arg-type]
    if isinstance(layer, LowRankLinear):
        (A, why_A), (B, why_B) = served(layer.A, change), served(layer.B, change)
        reason = why_A and f"factor A: {why_A}" or why_B and f"factor B: {why_B}"
        unchanged = A is layer.A and B is layer.B
        return (layer if unchanged else LowRankLinear(A, B)), reason  # type: ignore[arg-type]
    if isinstance(layer, Factor):
        return layer, "an ordinary matrix, which an ordinary product serves"
    if isinstance(layer, QuantizedInput):
        base, reason = served(layer.base, change)
        return (layer if base is layer.base else QuantizedInput(base, layer.quantizer)), reason
    if isinstance(layer, (ServedLinear, ServedCompensatedLinear, ServedSparseLinear)):
        return (layer, None) if change is for_kernels else served(layer.packed(), change)
    return layer, f"{type(layer).__name__}: there is no other layout for it"


def _why_not(layer: PackedLinear) -> str | None:
    from refimpl.kernels.quant_matmul import unsupported_format

    if layer.bits is not None:
        if layer.pattern is not None:
            return f"quantised and {layer.pattern} sparse: no kernel reads both"
        return unsupported_format(layer.bits, layer.in_features, layer.out_features, layer.group_size)
    if layer.pattern is None:
        return "its values are neither quantised nor sparse"
    if parse_pattern(layer.pattern) != (2, 4):
        return f"{layer.pattern} sparse: the only sparse kernel is for 2:4"
    if layer.in_features % 32:
        return f"the layer has {layer.in_features} inputs, no multiple of 32"
    return None
