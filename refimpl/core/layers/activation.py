"""Quantised inputs: a uniform quantiser for one tensor, and a layer whose inputs pass through one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.errors import OptionError
from refimpl.core.layers.base import CompressedLayer, empty_layer
from refimpl.core.layers.quantizer import fake_quantize


class ActivationQuantizer(nn.Module):
    """The quantiser Q of `refimpl.core.layers.quantizer` with one fixed grid for the whole tensor.

    Zero is a point of the grid. Gradients pass through to whatever produced x; range and zero are buffers and get none.

    Args:
        bits: 2 to 8.
        range: R, width of the grid in units of x; a number or a one-element tensor.
        zero: Z, the value of the lowest point; at most 0.

    Raises:
        OptionError: bits outside 2..8.

    Example:
        >>> quantizer = ActivationQuantizer(2, range=3.0, zero=-1.0)
        >>> quantizer(torch.tensor([-2.0, 0.0, 0.4, 5.0])).tolist()
        [-1.0, 0.0, 0.0, 2.0]
    """

    range: Tensor
    zero: Tensor

    def __init__(self, bits: int, range: Tensor | float, zero: Tensor | float) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise OptionError(f"bits={bits}: activations are quantised to 2 to 8 bits")
        self.bits = bits
        for name, value in (("range", range), ("zero", zero)):
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
            self.register_buffer(name, tensor.to(torch.float32).reshape(()).clone())

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x.float(), self.range.float(), self.zero.float(), self.bits).to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of range and zero."""
        return self.range.nbytes + self.zero.nbytes

    def extra_repr(self) -> str:
        return f"{self.bits} bits"


class QuantizedInput(CompressedLayer):
    """``y = base(Q(x))``.

    Args:
        base: the map, compressed or dense (a `PackedLinear` of plain values).
        quantizer: Q.

    Example:
        >>> from refimpl.core.layers import PackedLinear
        >>> layer = QuantizedInput(PackedLinear(values=torch.eye(2)), ActivationQuantizer(2, 3.0, -1.0))
        >>> layer(torch.tensor([0.4, 5.0])).tolist(), layer.parts()
        ([0.0, 2.0], {'values': 16, 'activations': 8})
    """

    is_its_weight = False

    def __init__(self, base: CompressedLayer, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.base, self.quantizer = base, quantizer
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, [out] or None."""
        return getattr(self.base, "bias", None)

    def to_dense(self) -> Tensor:
        """The weight that multiplies the quantised inputs, [out, in]."""
        return self.base.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.quantizer(x))

    def parts(self) -> dict[str, int]:
        return self.base.parts() | {"activations": self.quantizer.nbytes}

    def config(self) -> dict[str, Any]:
        return {"type": "QuantizedInput", "base": self.base.config(), "bits": self.quantizer.bits}

    @classmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> QuantizedInput:
        unknown = torch.empty((), device=device)
        quantizer = ActivationQuantizer(config["bits"], unknown, unknown)
        return cls(empty_layer(config["base"], dtype, device), quantizer)
