"""Convolutions with compressed kernels, and inputs seen through a quantiser."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refimpl.core.compress.sites import Site
from refimpl.core.errors import OptionError
from refimpl.core.layers import (
    ActivationQuantizer,
    CompensatedLinear,
    CompressedLayer,
    Factor,
    Geometry,
    LowRankLinear,
    PackedConv2d,
    PackedLinear,
    QuantizedInput,
    empty_layer,
)
from refimpl.core.layers.grid import minmax_grid
from refimpl.core.layers.quantizer import fake_quantize

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "strided, odd padding": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 5, "padding": "valid"},
    "pointwise": {"kernel_size": 1},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular, uneven": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
}
SIZES = (4, 8, 9, 7)  # channels in and out, height, width


def conv_of(case: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(SIZES[0], SIZES[1], bias=bias, dtype=dtype, **GEOMETRIES[case])


def image(dtype: torch.dtype = torch.float32, n: int = 3) -> Tensor:
    return torch.randn(n, SIZES[0], *SIZES[2:], dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", list(GEOMETRIES))
def test_geometry_says_all_but_the_weight(case: str, bias: bool) -> None:
    conv, x = conv_of(case, bias), image()
    geometry = Geometry.of(conv)
    W = conv.weight.detach().flatten(1)
    with torch.no_grad():
        expected = conv(x)
        assert geometry.in_features == W.shape[1]
        assert torch.allclose(geometry.convolve(x, W, conv.bias), expected, atol=1e-6)
        again = geometry.module(SIZES[1])
        again.weight, again.bias = conv.weight, conv.bias
        assert torch.equal(again(x), expected)
        assert torch.equal(geometry.kernel_of(W), conv.weight)
        if geometry.groups == 1:
            rows = geometry.unfold(x) @ W.T
            rows = rows if conv.bias is None else rows + conv.bias
            assert torch.allclose(rows.transpose(1, 2).reshape(expected.shape), expected, atol=1e-5)


def kernels(conv: nn.Conv2d, dtype: torch.dtype) -> dict[str, CompressedLayer]:
    """Everything that can hold a kernel."""
    W, bias = conv.weight.detach().flatten(1), conv.bias
    grid = minmax_grid(W.float(), 4)
    codes = {"codes": grid.encode(W.float()), "scale": grid.scale, "zero": grid.zero, "bits": 4, "dtype": dtype}
    mask = W.abs() > W.abs().median()
    rank = 2
    A, B = Factor(torch.randn(rank, W.shape[1]).to(dtype)), Factor(torch.randn(len(W), rank).to(dtype))
    quantised = PackedLinear(**codes, bias=bias)
    return {
        "dense": PackedLinear(values=W, bias=bias),
        "quantised": quantised,
        "sparse": PackedLinear(values=W, mask=mask, pattern="unstructured", bias=bias),
        "both": PackedLinear(**codes, mask=mask, pattern="unstructured", bias=bias),
        "low rank": LowRankLinear(A, B),
        "repaired": CompensatedLinear(quantised, LowRankLinear(A, B)),
        "quantised inputs": QuantizedInput(quantised, ActivationQuantizer(4, 5.0, -2.0)),
        "repair beside quantised inputs": CompensatedLinear(
            QuantizedInput(quantised, ActivationQuantizer(3, 5.0, -2.0)), LowRankLinear(A, B)
        ),
        "repair behind quantised inputs": QuantizedInput(
            CompensatedLinear(quantised, LowRankLinear(A, B)), ActivationQuantizer(3, 5.0, -2.0)
        ),
    }


def by_hand(layer: CompressedLayer, x: Tensor, geometry: Geometry) -> Tensor:
    """The same convolution in float64 with the kernel as a dense matrix."""
    if isinstance(layer, QuantizedInput):
        return by_hand(layer.base, layer.quantizer(x), geometry)
    if isinstance(layer, CompensatedLinear):
        return by_hand(layer.base, x, geometry) + by_hand(layer.adapter, x, geometry)
    bias = getattr(layer, "bias", None)
    return geometry.convolve(x.double(), layer.to_dense().double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", ["strided, odd padding", "same, even kernel", "reflect", "grouped", "depthwise"])
def test_any_kernel_becomes_a_convolution(case: str, bias: bool, dtype: torch.dtype) -> None:
    conv, x = conv_of(case, bias, dtype), image(dtype)
    geometry = Geometry.of(conv)
    for what, base in kernels(conv, dtype).items():
        layer = PackedConv2d(base, geometry)
        got, expected = layer(x), by_hand(base, x, geometry)
        assert got.dtype == dtype and got.shape == conv(x).shape
        tolerance = (5e-2 if dtype == torch.bfloat16 else 1e-5) * float(expected.abs().max())
        assert torch.allclose(got.double(), expected, atol=tolerance), what
        assert torch.equal(layer.to_dense(), base.to_dense()) and layer.bias is getattr(base, "bias", None)
        assert torch.equal(layer.weight.flatten(1), base.to_dense()) and layer.weight.dtype == dtype
        # every stored byte is named once, and the description is enough to build it again
        assert sum(layer.parts().values()) == layer.nbytes == sum(t.nbytes for t in layer.state_dict().values())
        config = json.loads(json.dumps(layer.config()))
        again = empty_layer(config, dtype, "cpu")
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), got) and again.config() == layer.config()
        assert empty_layer(config, dtype, "meta").nbytes == layer.nbytes
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_low_rank_kernel_is_not_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = conv_of("plain")
    layer = PackedConv2d(kernels(conv, torch.float32)["low rank"], Geometry.of(conv))
    expected = layer(image())
    monkeypatch.setattr(LowRankLinear, "to_dense", lambda self: pytest.fail("multiplied out"))
    assert torch.equal(layer(image()), expected)


@pytest.mark.parametrize("case", list(GEOMETRIES))
def test_a_convolution_is_a_site(case: str) -> None:
    conv, x = conv_of(case), image()
    model = nn.Sequential(conv)
    site = Site("0", 0, model, "0")
    W = conv.weight.detach().flatten(1)
    assert torch.equal(site.weight, W) and site.weight.data_ptr() == conv.weight.data_ptr()
    assert (site.out_features, site.in_features) == tuple(W.shape)
    with torch.no_grad():
        expected = conv(x)
        assert torch.allclose(site.apply(x, W, conv.bias), expected, atol=1e-6)
        site.replace(site.dense_module(W))
        assert isinstance(site.placed, nn.Conv2d) and torch.equal(model(x), expected)
        site.replace(PackedLinear(values=W, bias=conv.bias))
        assert isinstance(site.placed, PackedConv2d) and site.module is site.placed.base
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert torch.equal(site.weight, W) and site.bias is site.module.bias
        # once more on the compressed one, and back
        site.replace(QuantizedInput(site.module, ActivationQuantizer(8, 8.0, -4.0)))
        assert isinstance(site.placed, PackedConv2d) and isinstance(site.module, QuantizedInput)
        assert site.geometry == Geometry.of(conv)
        site.replace(site.dense_module(site.weight))
        assert torch.equal(model(x), expected)
        site.replace(conv)
        assert site.placed is conv


# ---- quantised inputs


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("span", "zero"), [(3.0, -1.0), (1.7, 0.0), (2.0, -2.0), (1e-9, 0.0), (4.0, 1.0), (2.0, -5.0)])
def test_activation_quantizer(bits: int, span: float, zero: float) -> None:
    quantizer = ActivationQuantizer(bits, span, torch.tensor([zero]))
    x = 4 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    y = quantizer(x)
    assert torch.equal(y, fake_quantize(x, torch.tensor(span), torch.tensor(zero), bits))  # as methods train it
    assert torch.equal(quantizer(y), y) and len(y.unique()) <= 2**bits
    assert not quantizer(torch.zeros(3)).any()
    step = max(span, 1e-6) / (2**bits - 1)
    inside = (x > max(zero, y.min())) & (x < min(zero + span, y.max()))
    assert ((y - x).abs()[inside] <= step / 2 * (1 + 1e-5) + 1e-6).all()
    assert torch.equal(quantizer(x.bfloat16()), quantizer(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("bits", [1, 9])
def test_activation_bits_out_of_range(bits: int) -> None:
    with pytest.raises(OptionError, match=f"bits={bits}: activations are quantised to 2 to 8 bits"):
        ActivationQuantizer(bits, 1.0, 0.0)


def test_quantised_input_of_a_linear_layer() -> None:
    W, bias = torch.randn(6, 5), torch.randn(6)
    quantizer = ActivationQuantizer(3, 4.0, -2.0)
    layer = QuantizedInput(PackedLinear(values=W, bias=bias), quantizer)
    x = torch.randn(2, 7, 5)
    assert torch.equal(layer(x), nn.functional.linear(quantizer(x), W, bias))
    assert layer.parts() == {"values": 120, "bias": 24, "activations": 8}
    assert layer.bias is layer.base.bias
