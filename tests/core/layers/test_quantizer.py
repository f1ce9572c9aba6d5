"""The trainable quantiser: its grid, its gradients against finite differences, and equality with what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refimpl.core.errors import OptionError
from refimpl.core.layers import PackedLinear
from refimpl.core.layers.quantizer import (
    LARGEST,
    SMALLEST,
    fake_quantize,
    minmax_range,
    mse_range,
    snap,
    step_and_zero,
    to_grid,
)

few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
widths = st.sampled_from([2, 3, 4, 8])


def problem(seed: int, dtype: torch.dtype = torch.float32, rows: int = 5, n: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, n] of which some lies outside the range, R and Z [rows, 1] with zero inside."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator, dtype=dtype)
    share = torch.rand(2, rows, 1, generator=generator, dtype=dtype) * 0.6 + 0.4
    R, Z = minmax_range(x)
    low, high = Z * share[0], (R + Z) * share[1]
    return x, high - low, low


@few
@given(seeds, widths)
def test_values_lie_on_a_grid_with_zero(seed: int, bits: int) -> None:
    x, R, Z = problem(seed)
    x[:, 0] = 0.0
    q = fake_quantize(x, R, Z, bits)
    assert (q[:, 0] == 0).all()
    assert all(len(row.unique()) <= 2**bits for row in q)


@few
@given(seeds, widths)
def test_twice_is_once(seed: int, bits: int) -> None:
    x, R, Z = problem(seed)
    q = fake_quantize(x, R, Z, bits)
    assert torch.equal(fake_quantize(q, R, Z, bits), q)


@few
@given(seeds, widths)
def test_error_is_half_a_step_inside_the_range(seed: int, bits: int) -> None:
    x, R, Z = problem(seed)
    step, zero = step_and_zero(R, Z, bits)
    # the range in force: the zero point was rounded, which moves both ends by up to half a step
    inside = (x >= -zero * step) & (x <= (2**bits - 1 - zero) * step)
    error = (fake_quantize(x, R, Z, bits) - x).abs()
    assert (error <= step / 2 * (1 + 1e-5) + 1e-7)[inside].all()
    assert inside.any() and not inside.all()
    below, above = x < -zero * step, x > (2**bits - 1 - zero) * step
    q = fake_quantize(x, R, Z, bits)
    assert torch.equal(q[below], (-zero * step).expand_as(x)[below])
    assert torch.allclose(q[above], ((2**bits - 1 - zero) * step).expand_as(x)[above])


def surrogate(x: Tensor, R: Tensor, Z: Tensor, bits: int, offsets: tuple[Tensor, Tensor]) -> Tensor:
    """Q with each round(v) replaced by v + c: what straight-through rounding differentiates.

    Written through the real value Z' of the lowest level.
    """
    levels = 2**bits - 1
    step = R.clamp(SMALLEST, LARGEST) / levels
    zero = (-Z / step + offsets[0]).clamp(0, levels)
    lowest = -zero * step
    return step * (((x - lowest) / step).clamp(0, levels) + offsets[1]) + lowest


def rounding_offsets(x: Tensor, R: Tensor, Z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    levels = 2**bits - 1
    step = R.clamp(SMALLEST, LARGEST) / levels
    first = torch.round(-Z / step) + Z / step
    zero = torch.round(-Z / step).clamp(0, levels)
    v = ((x + zero * step) / step).clamp(0, levels)
    return first, torch.round(v) - v


@few
@given(seeds, widths, st.sampled_from(["inside", "zero clipped low", "zero clipped high"]))
def test_gradients_are_those_of_the_surrogate(seed: int, bits: int, case: str) -> None:
    """Central differences in fp64 of the network with frozen rounding offsets, for x, R and Z."""
    x, R, Z = problem(seed, torch.float64)
    if case == "zero clipped low":
        Z = Z.abs() + 0.7 * R  # lowest level above zero: the code of zero is clipped to 0
    elif case == "zero clipped high":
        Z = -1.7 * R
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=x.dtype)
    offsets = rounding_offsets(x, R, Z, bits)
    assert torch.allclose(surrogate(x, R, Z, bits, offsets), fake_quantize(x, R, Z, bits), atol=1e-12)
    parts = [part.clone().requires_grad_() for part in (x, R, Z)]
    gradients = torch.autograd.grad((fake_quantize(*parts, bits) * weights).sum(), parts)
    h = 1e-6

    def slope(k: int, direction: Tensor) -> Tensor:
        up, down = [x, R, Z], [x, R, Z]
        up[k], down[k] = up[k] + h * direction, down[k] - h * direction
        difference = surrogate(*up, bits, offsets) - surrogate(*down, bits, offsets)
        return difference * weights / (2 * h)

    for k in (0, 1, 2):
        found = slope(k, torch.ones_like(parts[k]))
        expected = found if k == 0 else found.sum(1, keepdim=True)
        # entries within h of a kink have no derivative to compare with: there are none at these seeds
        scale = expected.abs().max() + 1
        assert torch.allclose(gradients[k], expected, rtol=0, atol=1e-8 * float(scale)), (k, case)


def test_the_path_without_rounding_is_not_the_gradient_of_the_range() -> None:
    x, R, Z = problem(3, torch.float64)
    R.requires_grad_()
    (ours,) = torch.autograd.grad(fake_quantize(x, R, Z, 2).sum(), R)
    levels = 3
    step = R / levels
    smooth = step * (x / step).clamp(Z / step, Z / step + levels)
    (naive,) = torch.autograd.grad(smooth.sum(), R)
    assert (ours - naive).abs().max() > 0.1


def test_gradients_by_region() -> None:
    """One value inside, one below, one above: the formulas at the top of the module."""
    R, Z = torch.tensor(3.0, requires_grad=True), torch.tensor(-1.2, requires_grad=True)
    bits, levels = 2, 3
    for value, region in ((0.3, "inside"), (-5.0, "below"), (7.0, "above")):
        x = torch.tensor(value, requires_grad=True)
        gx, gR, gZ = torch.autograd.grad(fake_quantize(x, R, Z, bits), (x, R, Z))
        zero = 1.0  # round(1.2)
        slope = {"inside": 0.0 - 0.3, "below": -zero + 1.2, "above": levels - zero + 1.2}[region]
        assert gx == (region == "inside") and gZ == (region != "inside")
        assert float(gR) == pytest.approx(slope / levels, abs=1e-6)


@few
@given(seeds, st.integers(2, 8), st.sampled_from([None, 4]))
def test_what_is_trained_is_what_is_stored(seed: int, bits: int, groups: int | None) -> None:
    W = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    grouped = W.unflatten(1, (groups or 1, -1))
    R, Z = snap(*minmax_range(grouped), bits)
    grid = to_grid(R, Z, bits)
    codes = grid.encode(grouped).flatten(1)
    layer = PackedLinear(codes=codes, scale=grid.scale[..., 0], zero=grid.zero[..., 0], bits=bits)
    assert torch.equal(layer.to_dense(), fake_quantize(grouped, R, Z, bits).flatten(1))
    assert all(torch.equal(a, b) for a, b in zip(snap(R, Z, bits), (R, Z), strict=True))


def test_a_row_of_zeros_stays_one_and_is_stored() -> None:
    W = torch.zeros(2, 8)
    R, Z = snap(*minmax_range(W), 4)
    assert not fake_quantize(W, R, Z, 4).any()
    grid = to_grid(R, Z, 4)
    assert not grid.decode(grid.encode(W)).any() and (grid.scale > 0).all()


@few
@given(seeds, widths)
def test_mse_clip_is_no_worse_than_the_full_range(seed: int, bits: int) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) ** 3

    def error(R: Tensor, Z: Tensor) -> Tensor:
        return (fake_quantize(x, R, Z, bits) - x).square().sum(1)

    clipped, full = error(*mse_range(x, bits)), error(*minmax_range(x))
    assert (clipped <= full * (1 + 1e-6)).all()
    if bits <= 3:
        assert (clipped < 0.95 * full).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7, 1), (7, 3, 1)])
def test_shapes_and_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(*(shape[:-1] or (5,)), 6).to(dtype).requires_grad_()
    R, Z = torch.full(shape, 2.0, dtype=dtype), torch.full(shape, -1.0, dtype=dtype)
    q = fake_quantize(x, R, Z, 4)
    assert q.shape == x.shape and q.dtype == dtype
    q.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("call", "bits"), [(snap, 0), (snap, 17), (to_grid, 1), (to_grid, 9)])
def test_widths_that_cannot_be_stored(call, bits: int) -> None:
    with pytest.raises(OptionError, match=f"bits={bits}"):
        call(torch.ones(1), -torch.ones(1) / 2, bits)
