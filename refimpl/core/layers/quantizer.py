"""A trainable uniform quantiser: rounding to a grid that is given by its range R and its lowest value Z.

With n bits the grid has ``L = 2**n - 1`` steps between its ``2**n`` points:

    Delta = clip(R, 1e-6, 1e5) / L          the step
    z     = clip(round(-Z / Delta), 0, L)   the code of 0.0: an integer, so zero is a point of the grid
    Q(x)  = Delta * round(clip(x / Delta, -z, L - z))

Q is differentiable in x, R and Z: rounding passes the gradient through unchanged (straight-through estimator), clipping
has its true gradient. For one entry, with ``v = x / Delta``:

    inside the range    dQ/dx = 1    dQ/dDelta = round(v) - v    dQ/dZ = 0
    below it            dQ/dx = 0    dQ/dDelta = -z - Z / Delta   dQ/dZ = 1
    above it            dQ/dx = 0    dQ/dDelta = L - z - Z / Delta   dQ/dZ = 1

and ``dQ/dR = dQ/dDelta / L``; where z itself is clipped, the terms in Z vanish. Q(x) is an integer times Delta, which
is how `PackedLinear` decodes its codes, so the trained grid is the stored grid once Delta fits the stored dtype
(`snap`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from refimpl.core.errors import OptionError
from refimpl.core.layers.grid import Grid
from refimpl.core.layers.packed import SCALE_DTYPE

SMALLEST, LARGEST = 1e-6, 1e5  # limits of R: Delta stays positive and finite
_SHRINK = 96  # candidates of `mse_range`, spread evenly over (0.05, 1] of the full range


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient of the output is the gradient of the input.

    Example:
        >>> x = torch.tensor([0.4, 0.6], requires_grad=True)
        >>> round_ste(x).sum().backward()
        >>> x.grad.tolist()
        [1.0, 1.0]
    """
    return x + (x.round() - x).detach()  # exact: both differences are representable


def step_and_zero(R: Tensor, Z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Delta and z of a grid, both differentiable in R and Z.

    Args:
        R, Z: range and lowest value, in units of x; any shapes that broadcast.
        bits: 1 or more.

    Example:
        >>> step, zero = step_and_zero(torch.tensor(3.0), torch.tensor(-1.0), bits=2)
        >>> step.item(), zero.item()
        (1.0, 1.0)
    """
    levels = 2**bits - 1
    step = R.clamp(SMALLEST, LARGEST) / levels
    return step, round_ste(-Z / step).clamp(0, levels)


def fake_quantize(x: Tensor, R: Tensor, Z: Tensor, bits: int) -> Tensor:
    """Q(x): the nearest point of the grid, differentiable in x, R and Z (see the top of this file).

    Args:
        x: any shape, floating point.
        R, Z: broadcast against x: [out, 1] per channel, [out, groups, 1] per group, [] per tensor.
        bits: 1 or more; the grid has ``2**bits`` points.

    Returns:
        Like x. Zero stays zero, and quantising a second time changes no bit.

    Example:
        >>> fake_quantize(torch.tensor([-2.0, 0.0, 0.4, 5.0]), torch.tensor(3.0), torch.tensor(-1.0), bits=2).tolist()
        [-1.0, 0.0, 0.0, 2.0]
    """
    step, zero = step_and_zero(R, Z, bits)
    return step * round_ste((x / step).clamp(-zero, 2**bits - 1 - zero))


def minmax_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """R and Z that span the values along the last dimension and contain zero.

    Args:
        x: [..., n].

    Returns:
        R and Z, [..., 1].

    Example:
        >>> R, Z = minmax_range(torch.tensor([[0.5, 2.0]]))
        >>> R.item(), Z.item()
        (2.0, 0.0)
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    return high - low, low


def mse_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """R and Z with the least squared error along the last dimension, among shrunk copies of the full range.

    Clipping a few outliers buys finer steps for all other values. How much to clip is found by trying `_SHRINK` shares of
    the full range.

    Args:
        x: [..., n].
        bits: 1 or more; of the grid.

    Returns:
        R and Z, [..., 1]; never worse than `minmax_range`, which is among the candidates.

    Example:
        >>> x = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([4.0])])
        >>> R, Z = mse_range(x, bits=3)
        >>> bool(R < minmax_range(x)[0])
        True
    """
    R, Z = minmax_range(x)
    best = torch.full_like(R, float("inf"))
    share = torch.ones_like(R)
    for k in range(_SHRINK):
        a = 1 - 0.95 * k / _SHRINK
        error = (fake_quantize(x, a * R, a * Z, bits) - x).square().sum(-1, keepdim=True)
        share = torch.where(error < best, a, share)
        best = torch.minimum(error, best)
    return share * R, share * Z


RANGES = {"minmax": lambda x, bits: minmax_range(x), "mse": mse_range}


def snap(R: Tensor, Z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest R and Z whose step is representable in the dtype that scales are stored in.

    Args:
        R, Z: as for `fake_quantize`.
        bits: 1 to 16 (with more, a step times the number of levels is not exact in fp32).

    Returns:
        fp32 R and Z. `fake_quantize` with them equals encoding and decoding with `to_grid` exactly, and snapping them
        again changes nothing.

    Example:
        >>> R, Z = snap(torch.tensor([1.0]), torch.tensor([-0.4]), bits=2)
        >>> x = torch.tensor([-0.3, 0.1, 0.7])
        >>> torch.equal(fake_quantize(x, R, Z, 2), to_grid(R, Z, 2).decode(to_grid(R, Z, 2).encode(x)))
        True
    """
    if not 1 <= bits <= 16:
        raise OptionError(f"bits={bits}: a stored grid has 1 to 16")
    levels = 2**bits - 1
    # a little inside the limits, so that rounding cannot push the range past them
    step = (R.float().clamp(1.01 * SMALLEST, 0.99 * LARGEST) / levels).to(SCALE_DTYPE).float()
    zero = torch.round(-Z.float() / step).clamp(0, levels)
    return step * levels, -zero * step


def to_grid(R: Tensor, Z: Tensor, bits: int) -> Grid:
    """The grid to store in a `PackedLinear`: step and code of zero of R and Z, snapped.

    Args:
        R, Z: [..., 1].
        bits: 2 to 8.

    Example:
        >>> grid = to_grid(torch.tensor([3.0]), torch.tensor([-1.0]), bits=2)
        >>> grid.scale.item(), grid.zero.item()
        (1.0, 1.0)
    """
    if not 2 <= bits <= 8:
        raise OptionError(f"bits={bits}: codes of 2 to 8 bits can be stored")
    step, zero = step_and_zero(*snap(R, Z, bits), bits)
    return Grid(step, zero, bits)
