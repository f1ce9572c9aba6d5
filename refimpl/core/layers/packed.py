"""One packed linear layer for quantised weights, sparse weights, and weights that are both.

The stored weight is a list of values (floats, or b-bit codes on a grid per group of inputs) and, if the
matrix is sparse, a mask with their places. Because one class holds both, a 2:4-sparse matrix can be quantised
afterwards without a third format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.errors import OptionError
from refimpl.core.layers.base import CompressedLayer
from refimpl.core.layers.packing import pack_bits, unpack_bits

SCALE_DTYPE = torch.bfloat16  # the range of fp32 in 16 bits: fp16 would lose small scales to subnormals


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """``"2:4"`` to ``(2, 4)``; ``"unstructured"`` to None.

    Raises:
        OptionError: anything else, or a pattern that keeps all or none.

    Example:
        >>> parse_pattern("2:4")
        (2, 4)
    """
    if pattern == "unstructured":
        return None
    kept, _, of = pattern.partition(":")
    if not (kept.isdigit() and of.isdigit() and of in ("4", "8") and 0 < int(kept) < int(of)):
        raise OptionError(f"pattern={pattern!r}: use 'n:4' or 'n:8' with 0 < n < m (as '2:4'), or 'unstructured'")
    return int(kept), int(of)


class PackedLinear(CompressedLayer):
    """``y = x W.T + b`` with W quantised, sparse, or both.

    Args:
        values: weights of shape [out, in] when nothing is quantised (zeros where masked), else None.
        codes: uint8 grid indices of shape [out, in] when quantised, else None.
        scale: step of the grid, shape [out, groups]; one group spans ``in / groups`` consecutive inputs.
        zero: uint8 grid index of 0.0, shape [out, groups]; None for a symmetric grid (index ``2**(bits-1)``).
        bits: bits per code, 2 to 8; None when not quantised.
        mask: bool [out, in], True where a weight is kept; None for a dense matrix.
        pattern: "n:m" or "unstructured"; how `mask` is stored.
        bias: [out] or None.

    Example:
        >>> w = torch.tensor([[0.0, 2.0, 0.0, 4.0]]).repeat(1, 4)
        >>> layer = PackedLinear(values=w, mask=w != 0, pattern="2:4")
        >>> layer(torch.ones(1, 16)).item(), layer.parts()   # 8 floats, 8 positions of 2 bits
        (24.0, {'values': 32, 'mask': 2})
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    mask: Tensor

    def __init__(
        self,
        *,
        values: Tensor | None = None,
        codes: Tensor | None = None,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        bits: int | None = None,
        mask: Tensor | None = None,
        pattern: str | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dense = values if codes is None else codes
        assert dense is not None
        self.out_features, self.in_features = dense.shape
        self.bits, self.pattern, self.symmetric = bits, pattern, zero is None
        self.group_size = self.in_features if scale is None else self.in_features // scale.shape[1]
        self.dtype = dtype or (dense.dtype if codes is None else torch.get_default_dtype())
        kept = dense
        if pattern is not None and mask is not None:
            structure = parse_pattern(pattern)
            if structure is None:
                self.register_buffer("mask", pack_bits(mask, 1))
                kept = dense[mask]
            else:
                n, m = structure
                # stable sort of "not kept" lists the kept positions of each group first, in order
                position = (~mask).unflatten(1, (-1, m)).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n]
                self.register_buffer("mask", pack_bits(position.flatten(1), 2 if m == 4 else 3))
                kept = dense.unflatten(1, (-1, m)).gather(-1, position).flatten(1)
        self.nonzeros = kept.numel()
        if codes is None:
            self.register_buffer("values", kept.to(self.dtype).contiguous())
        else:
            assert bits is not None and scale is not None
            self.register_buffer("values", pack_bits(kept, bits))
            self.register_buffer("scale", scale.to(SCALE_DTYPE))
            if zero is not None:
                self.register_buffer("zero", pack_bits(zero.flatten(), bits))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _grid(self) -> tuple[Tensor, Tensor | int]:
        """Scale [out, groups] in fp32 and the zero point, [out, groups] or one integer."""
        assert self.bits is not None
        scale = self.scale.float()
        if self.symmetric:
            return scale, 2 ** (self.bits - 1)
        return scale, unpack_bits(self.zero, self.bits, scale.numel()).view_as(scale)

    def _positions(self) -> Tensor:
        """Index of each kept weight in its row, int64 [out, kept per row] ("n:m" patterns)."""
        assert self.pattern is not None
        structure = parse_pattern(self.pattern)
        assert structure is not None
        n, m = structure
        groups = self.in_features // m
        inside = unpack_bits(self.mask, 2 if m == 4 else 3, groups * n).to(torch.int64).unflatten(1, (groups, n))
        return (inside + m * torch.arange(groups, device=inside.device)[:, None]).flatten(1)

    def nonzero_mask(self) -> Tensor | None:
        """Where weights are kept, bool [out, in]; None for a dense matrix.

        Example:
            >>> w = torch.tensor([[0.0, 2.0, 0.0, 4.0]])
            >>> PackedLinear(values=w, mask=w != 0, pattern="2:4").nonzero_mask().tolist()
            [[False, True, False, True]]
        """
        if self.pattern is None:
            return None
        if self.pattern == "unstructured":
            return unpack_bits(self.mask, 1, self.in_features).bool()
        shape = (self.out_features, self.in_features)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.mask.device)
        return mask.scatter_(1, self._positions(), True)

    def to_dense(self) -> Tensor:
        shape = (self.out_features, self.in_features)
        if self.bits is None:
            values = self.values
        else:
            width = self.nonzeros if self.pattern == "unstructured" else self.nonzeros // self.out_features
            values = unpack_bits(self.values, self.bits, width)
        if self.pattern is None:
            scattered = values
        elif self.pattern == "unstructured":
            mask = self.nonzero_mask()
            assert mask is not None
            scattered = torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)
        else:
            scattered = torch.zeros(shape, dtype=values.dtype, device=values.device)
            scattered.scatter_(1, self._positions(), values)
        if self.bits is None:
            return scattered
        scale, zero = self._grid()
        codes = scattered.unflatten(1, (scale.shape[1], -1)).to(torch.float32)
        offset = zero if isinstance(zero, int) else zero.unsqueeze(-1)
        dense = ((codes - offset) * scale.unsqueeze(-1)).flatten(1)
        mask = self.nonzero_mask()
        if mask is not None:
            dense = dense.masked_fill_(~mask, 0.0)
        return dense.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.to_dense().to(x.dtype), self.bias)

    def parts(self) -> dict[str, int]:
        names = {"values": "values", "scale": "scales", "zero": "zeros", "mask": "mask"}
        stored = dict(self.named_buffers())
        parts = {part: stored[name].nbytes for name, part in names.items() if name in stored}
        if self.bias is not None:
            parts["bias"] = self.bias.nbytes
        return parts

    def config(self) -> dict[str, Any]:
        return {
            "type": "PackedLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": None if self.bits is None else self.group_size,
            "symmetric": self.symmetric,
            "pattern": self.pattern,
            "nonzeros": self.nonzeros,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> PackedLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        rows, columns, bits = config["out_features"], config["in_features"], config["bits"]
        layer.out_features, layer.in_features, layer.bits, layer.dtype = rows, columns, bits, dtype
        layer.pattern, layer.symmetric = config["pattern"], config["symmetric"]
        layer.group_size = columns if bits is None else config["group_size"]
        structure = None if layer.pattern is None else parse_pattern(layer.pattern)

        def buffer(name: str, *shape: int, dtype: torch.dtype = torch.uint8) -> None:
            layer.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

        def packed(count: int, width: int) -> int:
            return -(-count // 8) * width

        if layer.pattern is None:
            layer.nonzeros = rows * columns
            kept: tuple[int, ...] = (rows, columns)
        elif structure is None:
            layer.nonzeros = config["nonzeros"]
            kept = (layer.nonzeros,)
            buffer("mask", rows, packed(columns, 1))
        else:
            n, m = structure
            kept = (rows, columns // m * n)
            layer.nonzeros = rows * kept[1]
            buffer("mask", rows, packed(kept[1], 2 if m == 4 else 3))
        if bits is None:
            buffer("values", *kept, dtype=dtype)
        else:
            groups = columns // layer.group_size
            buffer("values", *kept[:-1], packed(kept[-1], bits))
            buffer("scale", rows, groups, dtype=SCALE_DTYPE)
            if not layer.symmetric:
                buffer("zero", packed(rows * groups, bits))
        bias = torch.empty(rows, dtype=dtype, device=device)
        layer.bias = nn.Parameter(bias, requires_grad=False) if config["bias"] else None
        return layer

    def extra_repr(self) -> str:
        text = f"{self.in_features} -> {self.out_features}"
        if self.bits is not None:
            text += f", {self.bits} bits, groups of {self.group_size}"
        return text if self.pattern is None else f"{text}, {self.pattern} sparse"
