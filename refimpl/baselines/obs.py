"""Optimal brain surgeon, column by column: the solver of GPTQ and SparseGPT.

Both go through the columns of W, replace column j by a value q that is cheaper to store, and change the remaining
columns so that the outputs W X change least. With H the damped second moment of the inputs, this update and its cost are

    w_k <- w_k - (w_j - q) / [inv(H)]_jj [inv(H)]_jk   for k > j,        cost (w_j - q)^2 / [inv(H)]_jj

where inv(H) is the inverse for the columns from j on. All these inverses follow from one Cholesky factor: with
inv(H) = U^T U and U upper triangular, [inv(H)]_jk of the columns from j on is U_jj U_jk. The methods differ only in q: GPTQ
takes the nearest point of a grid (Frantar et al., 2210.17323, eq. 2-3 and algorithm 1), SparseGPT zero for the entries of
least cost (Frantar and Alistarh, 2301.00774, eq. 3-5 and algorithm 1). A quantised sparse matrix is both at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refimpl.core.device import read
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.layers import parse_pattern
from refimpl.core.layers.grid import Grid, minmax_grid

BLOCK = 32  # columns updated one by one before a matrix product updates the rest; affects speed only
MASK_BLOCK = 128  # unstructured pruning chooses its zeros among this many columns at a time (SparseGPT's B_s)


def check_damping(damping: float) -> None:
    """Raise `OptionError` if the damping is negative: the second moment would no longer be positive.

    Example:
        >>> check_damping(0.01)
    """
    if damping < 0:
        raise OptionError(f"damping={damping}: use a fraction of 0 or more")


def inverse_root(gram: Tensor, damping: float, log: dict[str, Any]) -> Tensor:
    """Upper Cholesky factor U of the inverse of the damped second moment, ``inv(H) = U.T U``.

    Row j of U is, up to the factor U_jj, row j of the inverse for the columns from j on.

    Args:
        gram: G [d, d]; for an input that is always zero only the damping keeps H invertible.
        damping: added to the diagonal, as a fraction of its mean; raised tenfold as long as the factorisation fails.
        log: gets the entry "damping" if it had to be raised.

    Returns:
        fp32 [d, d]; computed in fp64, since condition numbers of 1e8 are common for inputs that come from an activation function.

    Example:
        >>> inverse_root(torch.eye(2) * 4, 0.0, {}).diagonal().tolist()
        [0.5, 0.5]
    """
    H = gram.double()
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    H = H + (H.diagonal().sum() == 0) * eye  # an expert without tokens: every direction counts the same
    mean = H.diagonal().mean()
    used = damping
    while True:
        # reversing rows and columns turns L L^T = H into H = R R^T with R upper triangular; then inv(H) = U^T U, U = inv(R)
        L, failed = torch.linalg.cholesky_ex((H + used * mean * eye).flip(0, 1))
        if not read(failed):
            return torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True).float()
        used = max(10 * used, 1e-6)
        if used > 1e3:  # no positive semidefinite matrix needs this much
            raise CalibrationError("calibration: the second moment of the inputs cannot be factorised; it holds NaN")
        log["damping"] = used


@dataclass
class Solution:
    """The result of `solve`.

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
        U: from `inverse_root`, for the columns in the order in which they are processed.
        pattern: prune to "n:m" or "unstructured"; None prunes nothing.
        sparsity: fraction pruned, for "unstructured".
        mask: instead of `pattern`, the entries to keep, bool [m, d]; all others are zero already and stay zero.
        bits, group_size, symmetric: of the grid if the result is to be quantised; a group is `group_size` inputs.
        order: permutation of the columns in which they are processed; `U` belongs to the permuted columns. Grids are
            then fixed before the first column, so that a group remains a run of neighbouring inputs and no permutation
            is stored.

    Returns:
        Solution, columns in their original order.

    Example:
        >>> W = torch.tensor([[1.0, 0.1, 0.9, 0.2]])
        >>> solve(W, torch.eye(4), pattern="2:4").weight.tolist()   # uncorrelated inputs: magnitude pruning
        [[1.0, 0.0, 0.8999999761581421, 0.0]]
    """
    m, d = W.shape
    group = d if group_size is None else group_size
    structure = None if pattern is None else parse_pattern(pattern)
    fixed: Grid | None = None
    if order is not None and bits is not None:
        fixed = minmax_grid(W.float().unflatten(1, (-1, group)), bits, symmetric)
    column_of = torch.arange(d, device=W.device) if order is None else order
    # the transpose, so that each column of W is contiguous
    C = W.float().T[column_of].contiguous()
    kept = torch.ones_like(C, dtype=torch.bool) if mask is None else mask.T[column_of].contiguous()
    codes = torch.zeros_like(C, dtype=torch.uint8) if bits is not None else None
    errors = torch.zeros(BLOCK, m, device=W.device)
    grids: list[Grid] = []
    diagonal = U.diagonal()

    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        for j in range(start, end):
            if pattern is not None:
                width = MASK_BLOCK if structure is None else structure[1]
                if j % width == 0:
                    ahead = C[j : j + width]
                    if ahead.shape[0] > end - j:  # columns of later blocks still lack the updates of this block
                        ahead = _with_pending(ahead, errors[: j - start], U[start:j, j : j + width], end - j)
                    saliency = (
                        ahead / diagonal[j : j + width, None]
                    ).square()  # the cost of q = 0, with U_jj^2 = [inv(H)]_jj
                    if structure is None:
                        # counted from the left edge, so that all blocks together drop int(m * d * sparsity)
                        count = int(m * (j + len(saliency)) * sparsity) - int(m * j * sparsity)
                        drop = lowest(saliency.flatten(), count).view_as(saliency)
                    else:
                        drop = lowest(saliency.T, structure[1] - structure[0]).T
                    kept[j : j + width] &= ~drop
            w = C[j].clone()
            q = w
            if bits is not None:
                assert codes is not None
                if fixed is not None:  # each column uses the grid of its group of original, neighbouring inputs
                    of = (column_of[j] // group).view(1)
                    scale, zero = (part.index_select(1, of).flatten() for part in (fixed.scale, fixed.zero))
                    grid = Grid(scale, zero, bits)
                else:
                    if j % group == 0:  # a new group: its grid spans the weights as compensation has left them
                        ahead = C[j : j + group]
                        if ahead.shape[0] > end - j:
                            ahead = _with_pending(ahead, errors[: j - start], U[start:j, j : j + group], end - j)
                        found = minmax_grid((ahead * kept[j : j + group]).T, bits, symmetric)
                        grids.append(Grid(found.scale.flatten(), found.zero.flatten(), bits))
                    grid = grids[-1]
                codes[j] = grid.encode(w)
                q = grid.decode(codes[j])
            q = torch.where(kept[j], q, 0.0)
            error = (w - q) / diagonal[j]
            # w_k -= (w_j - q) / U_jj^2 * (U_jj U_jk) = error * U_jk, for the columns k of this block
            C[j:end].addr_(U[j, j:end], error, alpha=-1)
            C[j] = q
            errors[j - start] = error
        if end < d:  # the same updates of this block's columns, for the columns of later blocks, in one product
            C[end:].addmm_(U[start:end, end:].T, errors[: end - start], alpha=-1)

    def restored(columns: Tensor) -> Tensor:
        return (columns if order is None else columns[torch.argsort(order)]).T.contiguous()

    solution = Solution(restored(C), restored(kept) if pattern is not None or mask is not None else None)
    if codes is not None:
        solution.codes = restored(codes)
        if fixed is not None:
            solution.scale, solution.zero = fixed.scale[..., 0], fixed.zero[..., 0]
        else:
            solution.scale = torch.stack([grid.scale for grid in grids], 1)
            solution.zero = torch.stack([grid.zero for grid in grids], 1)
    return solution


def _with_pending(columns: Tensor, errors: Tensor, U: Tensor, updated: int) -> Tensor:
    """`columns` with the updates applied to all of them that so far only the first `updated` have."""
    columns = columns.clone()
    columns[updated:].addmm_(U[:, updated:].T, errors, alpha=-1)
    return columns
