"""Packed layers with a copy of their weights in the form that a processor multiplies fastest, for one token at a time.

Unpacking a `PackedLinear` for every token costs several times the product itself. Which copy is fastest depends on the
processor (AVX2 or AVX-512), on its memory and on the dtype of the model, so it is measured: `measure` times every form
that a layer can take beside the layer as it is. A form is a class with a name, a size and a product.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from refimpl.core.layers.packed import PackedLinear
from refimpl.core.layers.packing import unpack_bits

Layer = TypeVar("Layer", bound=PackedLinear)
_FEW = 128  # rows; with more, unpacking once for a dense product is faster than operators made for a few
_GROUPS = (256, 128, 64, 32)  # inputs that may share a scale in PyTorch's int4 operator
_LARGER_THAN_CACHES = 2**24  # numbers in float32


class Form(Protocol):
    """Weights laid out for one operator of PyTorch; a call computes ``y = x W.T + b`` for x [..., in].

    Attributes:
        name: what it is, in words.
        nbytes: of the copy.
        rows: most rows that it is meant for; None: any number.
    """

    name: str
    nbytes: int
    rows: int | None

    def __call__(self, x: Tensor) -> Tensor: ...


class Int4:
    """At most 4 bits in groups of a multiple of 32 inputs, by PyTorch's int4 operator: sums and outputs in bfloat16."""

    name: str = "int4 operator (bfloat16)"
    rows: int | None = _FEW

    def __init__(self, layer: PackedLinear) -> None:
        codes, zero = _codes(layer)
        group = next(size for size in _GROUPS if layer.group_size % size == 0)
        scale, origin = layer.scale.float(), torch.full_like(layer.scale, 8.0, dtype=torch.float32)
        if int((codes - zero).abs().max()) < 8:  # the operator's own zero is 8: nothing is left to round
            codes = codes - zero + 8
        else:
            origin = zero[..., 0].float()
        # the operator computes (code - 8) * scale + offset, with one pair for each group of its own size
        pairs = torch.stack([scale, (8 - origin) * scale], -1).repeat_interleave(layer.group_size // group, 1)
        self.pairs = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()  # [groups, out, 2]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1)
        self.packed, self.group, self.bias = packed, group, layer.bias
        self.nbytes = self.packed.nbytes + self.pairs.nbytes

    @staticmethod
    def fits(layer: PackedLinear) -> bool:
        """Whether the operator exists here and knows this shape."""
        return (
            hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
            and layer.pattern is None
            and layer.bits is not None
            and layer.bits <= 4
            and layer.group_size % 32 == 0
            and layer.out_features % 16 == 0
        )

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.pairs)
        return _finish(y, x, self.bias)


class Int8:
    """At most 8 bits with one scale for each row, by PyTorch's int8 operator: sums and outputs in bfloat16."""

    name: str = "int8 operator (bfloat16)"
    rows: int | None = _FEW

    def __init__(self, layer: PackedLinear) -> None:
        codes, zero = _codes(layer)
        self.steps = (codes - zero).flatten(1).to(torch.int8)
        self.scale = layer.scale[:, 0].to(torch.bfloat16)
        self.bias = layer.bias
        self.nbytes = self.steps.nbytes + self.scale.nbytes

    @staticmethod
    def fits(layer: PackedLinear) -> bool:
        """Whether the operator exists here and knows this shape, and steps from zero have 8 bits with their sign."""
        return (
            hasattr(torch.ops.aten, "_weight_int8pack_mm")
            and layer.pattern is None
            and layer.bits is not None
            and (layer.bits < 8 or layer.symmetric)
            and layer.group_size == layer.in_features
            and layer.in_features % 32 == 0
            and layer.out_features % 16 == 0
        )

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        return _finish(torch.ops.aten._weight_int8pack_mm(rows, self.steps, self.scale), x, self.bias)


class Half:
    """Unpacked once to float16, multiplied and summed in float32: FBGEMM, which reads weights of half the size."""

    name: str = "float16 weights, float32 sums"
    rows: int | None = None

    def __init__(self, layer: PackedLinear) -> None:
        weight = layer.to_dense().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(
            weight, None if layer.bias is None else layer.bias.float()
        )
        self.nbytes = 2 * weight.numel()

    @staticmethod
    def fits(layer: PackedLinear) -> bool:
        """Whether the operator exists here, and float16 has the range of these weights."""
        if not _fbgemm():
            return False
        weight = layer.to_dense().float()
        return bool((weight.half().float() - weight).norm() <= 2**-10 * weight.norm())  # not so if any is infinite

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.ops.quantized.linear_dynamic_fp16(x.reshape(-1, x.shape[-1]).float(), self.packed)
        return _finish(y, x, None)

    def __deepcopy__(self, memo: Any) -> Half:
        return self  # nothing changes it, and not all versions of PyTorch can copy what FBGEMM packs


class Dense:
    """Unpacked once, in the dtype of the layer: an ordinary product."""

    name: str = "unpacked"
    rows: int | None = None

    def __init__(self, layer: PackedLinear) -> None:
        self.weight, self.bias = layer.to_dense(), layer.bias
        self.nbytes = self.weight.nbytes

    @staticmethod
    def fits(layer: PackedLinear) -> bool:
        """Always."""
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


FORMS: dict[str, type[Int4] | type[Int8] | type[Half] | type[Dense]] = {
    kind.name: kind for kind in (Int4, Int8, Half, Dense)
}
PACKED = "packed"


def _codes(layer: PackedLinear) -> tuple[Tensor, Tensor]:
    """Codes [out, groups, group] and zero points [out or 1, groups or 1, 1], int16."""
    assert layer.bits is not None
    codes = unpack_bits(layer.values, layer.bits, layer.in_features).unflatten(1, (-1, layer.group_size))
    zero = torch.as_tensor(layer._grid()[1], dtype=torch.int16)
    return codes.to(torch.int16), zero.expand(layer.scale.shape).unsqueeze(-1)


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


@functools.cache
def _fbgemm() -> bool:
    """Whether PyTorch multiplies float16 weights by float32 inputs here; it does on x86-64."""
    try:
        torch.ops.quantized.linear_prepack_fp16(torch.zeros(16, 32), None)
    except (AttributeError, RuntimeError):
        return False
    return True


def _again(layer: PackedLinear, kind: type[Layer]) -> Layer:
    """Another layer of that kind with the same tensors."""
    new = kind.__new__(kind)
    new.__dict__ = {key: value for key, value in layer.__dict__.items() if key not in ("form", "milliseconds")}
    new._buffers, new._parameters = dict(layer._buffers), dict(layer._parameters)
    return new


class ProcessorLinear(PackedLinear):
    """A `PackedLinear` that multiplies by a copy of its weights, laid out for this processor.

    The packed weights stay what is saved, exported, counted, and multiplied by where the copy is of no use: on another
    device, for gradients, and for many rows at once where the operator is made for a few. The copy is made anew after
    loading (`refimpl.serve`), because its layout belongs to the processor.

    Attributes:
        form: the copy; None: as a `PackedLinear`.
        milliseconds: what `measure` found when the form was chosen.

    Example:
        >>> codes = torch.full((16, 32), 9, dtype=torch.uint8)
        >>> packed = PackedLinear(codes=codes, scale=torch.full((16, 1), 0.5), bits=4)
        >>> layer = ProcessorLinear.of(packed, "unpacked")
        >>> layer(torch.ones(1, 32))[0, 0].item(), layer.config() == packed.config()
        (16.0, True)
        >>> layer
        ProcessorLinear(32 -> 16, 4 bits, groups of 32, unpacked)
    """

    form: Form | None = None
    milliseconds: dict[str, float]

    @classmethod
    def of(cls, layer: PackedLinear, name: str, milliseconds: dict[str, float] | None = None) -> ProcessorLinear:
        """The same tensors, with a copy in the form `name`, a key of `FORMS`."""
        new = _again(layer, cls)
        new.form, new.milliseconds = FORMS[name](layer), milliseconds or {}
        return new

    def packed(self) -> PackedLinear:
        """The layer without the copy."""
        return _again(self, PackedLinear)

    def forward(self, x: Tensor) -> Tensor:
        form = self.form
        if (
            form is None
            or x.device.type != "cpu"
            or (form.rows is not None and x.numel() > form.rows * self.in_features)
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return super().forward(x)
        return form(x)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.form = None  # a copy of the old weights
        super()._load_from_state_dict(*arguments, **options)

    def extra_repr(self) -> str:
        name = PACKED if self.form is None else self.form.name
        return f"{super().extra_repr()}, {name}"


def seconds(call: Callable[[], Any]) -> float:
    """The least time of a call, of up to thirty or of as many as fit into thirty milliseconds.

    Example:
        >>> seconds(lambda: time.sleep(0.001)) >= 0.001
        True
    """
    call()
    times: list[float] = []
    while len(times) < 3 or len(times) < 30 and sum(times) < 0.03:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def _bandwidth(threads: int) -> float:
    """Bytes a second that a product with one row reads from memory, with this number of threads."""
    weight, x = torch.zeros(_LARGER_THAN_CACHES // 4096, 4096), torch.zeros(1, 4096)
    return weight.nbytes / seconds(lambda: nn.functional.linear(x, weight))


@torch.no_grad()
def measure(layer: PackedLinear, clock: Callable[[Callable[[], Any]], float] = seconds) -> dict[str, float]:
    """Milliseconds that a layer takes for one row inside a model, by form; those that it cannot take are left out.

    That is the time of a call with weights in the caches, or that of reading the weights from memory if it is longer:
    between two tokens, all other layers pass through the caches.

    Args:
        layer: on a CPU.
        clock: says how many seconds a call takes.

    Returns:
        By names of `FORMS`, and "packed": as it is.

    Example:
        >>> codes = torch.full((16, 32), 9, dtype=torch.uint8)
        >>> found = measure(PackedLinear(codes=codes, scale=torch.full((16, 1), 0.5), bits=4), lambda call: 0.002)
        >>> found["packed"], found["unpacked"]
        (2.0, 2.0)
    """
    x = torch.ones(1, layer.in_features, dtype=layer.dtype)
    found = {PACKED: 1e3 * clock(functools.partial(layer, x))}
    for name, form in FORMS.items():
        if form.fits(layer):
            new = ProcessorLinear.of(layer, name)
            assert new.form is not None
            reading = new.form.nbytes / _bandwidth(torch.get_num_threads())
            found[name] = 1e3 * max(clock(functools.partial(new, x)), reading)
    return found
