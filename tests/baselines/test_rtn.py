"""Round to nearest and the grid all quantisers share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from refimpl import GPTQ, RTN
from refimpl.core.compress.sites import Site
from refimpl.core.errors import OptionError
from refimpl.core.layers.grid import minmax_grid
from refimpl.lab.models import small


def site_of(W: Tensor) -> Site:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    return Site("w", 0, nn.Sequential(linear), "0")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.sampled_from([4, 8, None]), st.floats(-6, 3))
def test_every_weight_goes_to_the_nearest_point(seed, bits, symmetric, group, exponent) -> None:
    W = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    layer = RTN(bits, group, symmetric).compress_site(site_of(W), None, None)
    scale = layer.scale.float().repeat_interleave(layer.group_size, 1)
    zero = layer._grid()[1]
    offset = torch.full_like(scale, zero) if isinstance(zero, int) else zero.repeat_interleave(layer.group_size, 1)
    points = scale[..., None] * (torch.arange(2**bits) - offset[..., None].float())
    nearest = (points - W[..., None]).abs().amin(-1)
    assert torch.allclose((layer.to_dense() - W).abs(), nearest, atol=1e-6 * float(W.abs().max()))
    # half a step, and what the 16-bit rounding of the step may clip at the ends of the range
    assert ((layer.to_dense() - W).abs() <= scale * (0.5 + 2**bits / 256)).all()


def test_grid_holds_zero_exactly_and_survives_constant_rows() -> None:
    for row in ([0.0] * 4, [3.0] * 4, [-3.0] * 4, [1e-30] * 4, [1e-43] * 4):
        w = torch.tensor([row])
        for symmetric in (False, True):
            grid = minmax_grid(w, 4, symmetric)
            assert (grid.scale > 0).all()
            assert grid.decode(grid.encode(torch.zeros(1, 4))).tolist() == [[0.0] * 4]
            assert torch.allclose(grid.decode(grid.encode(w)), w, rtol=0.02)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, 64, 192])
@pytest.mark.parametrize("weights", ["normal", "model"])
def test_the_symmetric_grid_has_the_better_of_two_steps(bits: int, group: int, weights: str) -> None:
    """With a single step above zero, as at 2 bits, keeping the largest weight inside makes all others a third worse."""
    W = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    if weights == "model":
        W = small.load("llama-small").get_submodule("model.layers.0.mlp.down_proj").weight.detach()
    groups, half = W.unflatten(1, (-1, group)), 2 ** (bits - 1)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    through = 2 * torch.maximum(high, -low) / (2**bits - 1)
    inside = torch.maximum(high / (half - 1), -low / half)
    grid = minmax_grid(groups, bits, symmetric=True)

    def loss(step: Tensor) -> float:
        other = grid._replace(scale=step.bfloat16().float())
        return float((other.decode(other.encode(groups)) - groups).norm() / groups.norm())

    if bits <= 3:
        assert torch.equal(grid.scale, through.bfloat16().float()) and loss(through) < loss(inside)
    else:  # about as good as the other, and none of the weights is outside
        assert torch.equal(grid.scale, inside.bfloat16().float()) and loss(inside) < 1.02 * loss(through)
    if bits == 2:
        assert loss(through) < 0.85 * loss(inside)


def test_error_falls_with_bits_and_with_smaller_groups() -> None:
    W = torch.randn(8, 64)

    def loss(bits: int, group: int | None) -> float:
        return (RTN(bits, group).compress_site(site_of(W), None, None).to_dense() - W).norm().item()

    assert loss(2, 16) > loss(3, 16) > loss(4, 16) > loss(8, 16)
    assert loss(3, None) > loss(3, 16) > loss(3, 4)


@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_options_that_cannot_work(method: type) -> None:
    site = site_of(torch.randn(4, 96))
    for bits in (1, 9, 0, -4):
        with pytest.raises(OptionError, match=f"bits={bits}"):
            method(bits).layer_config(site)
    with pytest.raises(OptionError, match="group_size=64 does not divide the 96 inputs of 'w'; use 32, 96 or None"):
        method(4, 64).layer_config(site)
    with pytest.raises(OptionError, match="group_size=0"):
        method(4, 0).layer_config(site)
    site.replace(RTN(4, 32).compress_site(site, None, None))
    with pytest.raises(OptionError, match="already"):
        method(4, 32).layer_config(site)


@pytest.mark.parametrize("method", [RTN, GPTQ])
@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_are_checked_when_the_method_is_made(method: type, bits: int) -> None:
    with pytest.raises(OptionError, match=f"bits={bits}: use 2 to 8"):
        method(bits=bits)
