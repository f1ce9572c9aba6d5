"""Uniform quantisation grids, as layers store them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.core.layers.packed import SCALE_DTYPE


class Grid(NamedTuple):
    """Step and offset of ``w = scale * (code - zero)`` for each row, or each group of a row.

    Attributes:
        scale: fp32, positive, exactly representable in the 16-bit dtype it is stored in; shape [..., 1].
        zero: fp32 holding an integer in [0, 2**bits), same shape.
        bits: bits per code.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def encode(self, w: Tensor) -> Tensor:
        """Nearest codes, uint8; `w` broadcasts against the grid's [..., 1]."""
        return (torch.round(w / self.scale) + self.zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights of codes, fp32."""
        return self.scale * (codes.float() - self.zero)


def minmax_grid(w: Tensor, bits: int, symmetric: bool = False) -> Grid:
    """The grid that spans the values along the last dimension and contains zero.

    Args:
        w: fp32, shape [..., group].
        bits: 2 to 8.
        symmetric: zero is in the middle of the codes (at ``2**(bits-1)``) instead of anywhere. At 2 and 3 bits a
            step is then ``2 max|w| / (2**bits - 1)``; from 4 bits on, the least step with no value outside the grid.

    Returns:
        Grid with tensors of shape [..., 1].

    Example:
        >>> grid = minmax_grid(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2)
        >>> grid.decode(grid.encode(torch.tensor([[-1.0, 0.1, 2.0]]))).tolist()
        [[-1.0, 0.0, 2.0]]
    """
    low = w.amin(-1, keepdim=True).clamp(max=0)
    high = w.amax(-1, keepdim=True).clamp(min=0)
    levels = 2**bits - 1
    if symmetric and bits <= 3:
        # max|w| is half a step above the highest point, and the steps are finer for all other values: with 1 or 3 steps
        # above zero that leaves less error
        scale = 2 * torch.maximum(high, -low) / levels
    elif symmetric:
        # the grid has one more step below zero than above, and none of the values is outside
        scale = torch.maximum(high / (2 ** (bits - 1) - 1), -low / 2 ** (bits - 1))
    else:
        scale = (high - low) / levels
    scale = scale.to(SCALE_DTYPE).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale).clamp(0, levels)
    return Grid(scale, zero, bits)
