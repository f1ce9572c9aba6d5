"""The solver behind GPTQ and SparseGPT: optimal brain surgeon, column by column.

Both remove information from one input column after another, and move the damage onto the columns that follow, where
the inverse of the input second moment says it hurts least. They differ only in what happens to a column: GPTQ puts it
on a grid (Frantar et al., 2210.17323, eq. 2-3 and algorithm 1), SparseGPT zeroes entries (Frantar and Alistarh,
2301.00774, eq. 3-5 and algorithm 1); a quantised sparse matrix is both at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refimpl.core.device import read
from refimpl.core.grid import Grid, minmax_grid
from refimpl.core.layers import parse_pattern

BLOCK = 128  # columns updated together; a matter of speed, not of the result


def inverse_root(gram: Tensor, damping: float, log: dict[str, Any]) -> Tensor:
    """Upper Cholesky factor U of the inverse of the damped second moment, ``inv(H) = U.T U``.

    Row j of U holds what column j may do to the later columns, given that the earlier ones are fixed.

    Args:
        gram: G [d, d]; a zero diagonal entry (an input that never fires) is held up by the damping alone.
        damping: added to the diagonal, as a fraction of its mean; raised tenfold while the factorisation fails.
        log: receives "damping" when it had to be raised.

    Returns:
        fp32 [d, d]; computed in fp64, since condition numbers of 1e8 are common behind the activation function.

    Example:
        >>> inverse_root(torch.eye(2) * 4, 0.0, {}).diagonal().tolist()
        [0.5, 0.5]
    """
    H = gram.double()
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    H = H + (H.diagonal().sum() == 0) * eye  # an expert no token chose: every direction counts the same
    mean = H.diagonal().mean()
    used = damping
    while True:
        L, failed = torch.linalg.cholesky_ex(H + used * mean * eye)
        if not read(failed):
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not read(failed):
                break
        used = max(10 * used, 1e-6)
        log["damping"] = used
    return U.float()


@dataclass
class Solution:
    """What `solve` returns.

    Attributes:
        weight: the compressed weight, fp32 [m, d].
        mask: True where kept, bool [m, d], or None.
        codes: uint8 [m, d], or None when not quantised.
        scale, zero: [m, groups] of the grid, or None.
    """

    weight: Tensor
    mask: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None


def lowest(score: Tensor, count: int) -> Tensor:
    """True at the `count` lowest entries along the last dimension.

    Example:
        >>> lowest(torch.tensor([3.0, 1.0, 2.0]), 2).tolist()
        [False, True, True]
    """
    index = score.topk(count, dim=-1, largest=False, sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, index, True)


def solve(
    W: Tensor,
    U: Tensor,
    *,
    pattern: str | None = None,
    sparsity: float = 0.5,
    mask: Tensor | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    order: Tensor | None = None,
) -> Solution:
    """Prune and/or quantise ``W`` so that ``W X`` changes little.

    Args:
        W: weight [m, d].
        U: from `inverse_root`, for the columns in the order they are treated.
        pattern: prune to "n:m" or "unstructured"; None prunes nothing.
        sparsity: fraction pruned, for "unstructured".
        mask: instead of `pattern`: entries that are zero already and stay so, bool [m, d], True where kept.
        bits, group_size, symmetric: grid, if the result is to be quantised; a group is `group_size` inputs.
        order: permutation of the columns in which they are treated (`U` belongs to the permuted columns). Grids are
            then fixed beforehand, so that a group remains a run of neighbouring inputs and no permutation is stored.

    Returns:
        Solution, columns in their original order.

    Example:
        >>> W = torch.tensor([[1.0, 0.1, 0.9, 0.2]])
        >>> solve(W, torch.eye(4), pattern="2:4").weight.tolist()   # uncorrelated inputs: magnitude pruning
        [[1.0, 0.0, 0.8999999761581421, 0.0]]
    """
    m, d = W.shape
    W = W.float().clone()
    group = d if group_size is None else group_size
    structure = None if pattern is None else parse_pattern(pattern)
    fixed: Grid | None = None
    if order is not None:
        if bits is not None:
            fixed = minmax_grid(W.unflatten(1, (-1, group)), bits, symmetric)
        W = W[:, order]
        mask = None if mask is None else mask[:, order]
    column_of = torch.arange(d, device=W.device) if order is None else order
    kept = torch.ones(m, d, dtype=torch.bool, device=W.device) if mask is None else mask
    prunes = pattern is not None
    if prunes:
        kept = kept.clone()
    codes = torch.zeros(m, d, dtype=torch.uint8, device=W.device) if bits else None
    grids: list[Grid] = []
    diagonal = U.diagonal()

    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        block, errors = W[:, start:end], torch.zeros(m, end - start, device=W.device)
        if prunes and structure is None:
            # the least salient of this block, over all rows: saliency w^2 / [inv(H)]_jj of the remaining problem
            saliency = (block / diagonal[start:end]).square()
            drop = lowest(saliency.flatten(), int(m * (end - start) * sparsity)).view_as(block)
            kept[:, start:end] &= ~drop
        for j in range(start, end):
            local = j - start
            if prunes and structure is not None and j % structure[1] == 0:
                ahead = slice(j, j + structure[1])
                saliency = (W[:, ahead] / diagonal[ahead]).square()
                kept[:, ahead] &= ~lowest(saliency, structure[1] - structure[0])
            w = W[:, j].clone()
            q = w
            if bits is not None:
                assert codes is not None
                if fixed is not None:
                    of = column_of[j] // group
                    scale, zero = (
                        part.index_select(1, of.view(1))[:, 0] for part in (fixed.scale, fixed.zero)
                    )
                    grid = Grid(scale, zero, bits)
                else:
                    if j % group == 0:
                        ahead = slice(j, j + group)
                        # columns of a later block lack this block's updates so far: add them first
                        pending = errors[:, :local] @ U[start:j, ahead] if end < j + group else None
                        fresh = W[:, ahead].clone()
                        if pending is not None and local:
                            late = end - j
                            fresh[:, late:] -= pending[:, late:]
                        grids.append(minmax_grid(fresh * kept[:, ahead], bits, symmetric))
                    grid = grids[-1]
                code = grid.encode(w[:, None])
                codes[:, j : j + 1] = code
                q = grid.decode(code)[:, 0]
            q = torch.where(kept[:, j], q, 0.0)
            error = (w - q) / diagonal[j]
            W[:, j:end] -= error[:, None] * U[j, j:end]
            W[:, j] = q
            errors[:, local] = error
        W[:, end:] -= errors @ U[start:end, end:]

    if order is not None:
        back = torch.argsort(order)
        W, kept = W[:, back], kept[:, back]
        codes = None if codes is None else codes[:, back]
    solution = Solution(W, kept if prunes or mask is not None else None, codes)
    if bits is not None:
        if fixed is not None:
            solution.scale, solution.zero = fixed.scale[..., 0], fixed.zero[..., 0]
        else:
            solution.scale = torch.cat([grid.scale for grid in grids], 1)
            solution.zero = torch.cat([grid.zero for grid in grids], 1)
    return solution
