"""Packed layers: bits in, the same bits out; what is stored is what is counted, described and applied."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refimpl.core.errors import CheckpointError
from refimpl.core.layers import (
    CompensatedLinear,
    CompressedLayer,
    Factor,
    LowRankLinear,
    PackedLinear,
    empty_layer,
    parse_pattern,
)
from refimpl.core.layers.grid import minmax_grid
from refimpl.core.layers.packing import pack_bits, unpack_bits

OUT, IN = 20, 48


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 3), st.integers(0, 2**31))
def test_bits_survive_packing(bits: int, n: int, rows: int, seed: int) -> None:
    shape = (rows, n) if rows else (n,)
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == -(-n // 8) * bits
    assert torch.equal(unpack_bits(packed, bits, n), codes)


def test_highest_codes_do_not_spill_into_neighbours() -> None:
    for bits in range(1, 9):
        codes = torch.full((11,), 2**bits - 1, dtype=torch.uint8)
        codes[::3] = 0
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 11), codes)


def mask_of(pattern: str | None) -> Tensor | None:
    if pattern is None:
        return None
    score = torch.rand(OUT, IN)
    structure = parse_pattern(pattern)
    if structure is None:
        return score > 0.6
    n, m = structure
    groups = score.unflatten(1, (-1, m))
    return (groups >= groups.sort(-1, descending=True).values[..., n - 1 : n]).flatten(1)


def packed(bits: int | None, group: int | None, symmetric: bool, pattern: str | None, bias: bool, dtype: torch.dtype):
    """A layer and the dense weight it must stand for."""
    torch.manual_seed(0)
    W, mask = torch.randn(OUT, IN), mask_of(pattern)
    W = W if mask is None else W * mask
    common = {"mask": mask, "pattern": pattern, "bias": torch.randn(OUT).to(dtype) if bias else None, "dtype": dtype}
    if bits is None:
        return PackedLinear(values=W.to(dtype), **common), W.to(dtype)
    groups = W.unflatten(1, (-1, group or IN))
    grid = minmax_grid(groups, bits, symmetric)
    codes = grid.encode(groups)
    dense = grid.decode(codes).flatten(1)
    dense = dense if mask is None else dense * mask
    zero = None if symmetric else grid.zero[..., 0]
    layer = PackedLinear(codes=codes.flatten(1), scale=grid.scale[..., 0], zero=zero, bits=bits, **common)
    return layer, dense.to(dtype)


PACKED = [
    (bits, group, symmetric, pattern)
    for bits, group, symmetric in [
        (None, None, True),
        (2, 16, False),
        (3, 8, False),
        (4, None, True),
        (5, 24, False),
        (8, 48, True),
    ]
    for pattern in (None, "2:4", "3:8", "unstructured")
]


def check_layer(layer: CompressedLayer, dense: Tensor, dtype: torch.dtype, tolerance: float = 0.0) -> None:
    assert layer.to_dense().dtype == dtype and layer.to_dense().shape == (OUT, IN)
    assert torch.allclose(layer.to_dense().float(), dense.float(), rtol=tolerance, atol=tolerance)
    x = torch.randn(2, 3, IN, dtype=dtype)
    bias = layer.bias if getattr(layer, "bias", None) is not None else torch.zeros(OUT, dtype=dtype)
    expected = x.double() @ layer.to_dense().double().T + bias.double()
    scale = expected.abs().max()
    assert (layer(x).double() - expected).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * scale
    assert layer(x).dtype == dtype
    # every stored byte is named, once
    state = layer.state_dict()
    assert sum(layer.parts().values()) == layer.nbytes == sum(tensor.nbytes for tensor in state.values())
    # described well enough to be built again, and on "meta" for nothing
    config = json.loads(json.dumps(layer.config()))
    again = empty_layer(config, dtype, "cpu")
    again.load_state_dict(state)
    assert {n: (t.shape, t.dtype) for n, t in again.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    assert torch.equal(again.to_dense(), layer.to_dense()) and torch.equal(again(x), layer(x))
    assert again.config() == layer.config()
    assert empty_layer(config, dtype, "meta").nbytes == layer.nbytes
    assert all(not parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("bits", "group", "symmetric", "pattern"), PACKED)
def test_packed_linear(bits, group, symmetric, pattern, bias, dtype) -> None:
    layer, dense = packed(bits, group, symmetric, pattern, bias, dtype)
    check_layer(layer, dense, dtype)
    mask = layer.nonzero_mask()
    assert (mask is None) == (pattern is None)
    if mask is not None:
        assert not layer.to_dense()[~mask].any()
        assert layer.nonzeros == int(mask.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed_factors", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_and_compensated(packed_factors: bool, bias: bool, dtype: torch.dtype) -> None:
    rank = 8

    def factor(rows: int, columns: int) -> Factor | PackedLinear:
        W = torch.randn(rows, columns)
        if not packed_factors:
            return Factor(W.to(dtype))
        groups = W.unflatten(1, (-1, 8))
        grid = minmax_grid(groups, 4)
        return PackedLinear(
            codes=grid.encode(groups).flatten(1), scale=grid.scale[..., 0], zero=grid.zero[..., 0], bits=4, dtype=dtype
        )

    adapter = LowRankLinear(factor(rank, IN), factor(OUT, rank))
    product = adapter.B.to_dense() @ adapter.A.to_dense()
    check_layer(adapter, product, dtype)
    assert adapter.parts() == {"adapter": adapter.nbytes}
    base, dense = packed(3, 8, False, "2:4", bias, dtype)
    layer = CompensatedLinear(base, adapter)
    check_layer(layer, dense + product, dtype)
    assert set(layer.parts()) == {"values", "scales", "zeros", "mask", "adapter"} | ({"bias"} if bias else set())


def test_expected_bits_per_weight() -> None:
    """By hand: 3 bits, a 16-bit scale and a 3-bit zero per 16; 2:4 in fp16 is 8 + 2 bits of position per pair of 4."""
    layer, _ = packed(3, 16, False, None, False, torch.bfloat16)
    assert 8 * layer.nbytes / (OUT * IN) == pytest.approx(3 + 19 / 16, abs=0.05)
    layer, _ = packed(None, None, True, "2:4", True, torch.bfloat16)
    assert 8 * (layer.nbytes - layer.parts()["bias"]) / (OUT * IN) == 9.0
    layer, _ = packed(4, 16, True, "2:4", False, torch.bfloat16)
    assert 8 * layer.nbytes / (OUT * IN) == 2 + 1 + 1


def test_unknown_layer_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="layer type 'Quantum' is unknown"):
        empty_layer({"type": "Quantum"}, torch.float32, "cpu")
