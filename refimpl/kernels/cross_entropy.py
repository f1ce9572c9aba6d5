"""Cross-entropy of each sequence, from logits to a loss a sequence and back, with no probabilities in memory.

Training that weighs sequences needs ``l_b = 1/n_b sum_t -log softmax(x_bt)[y_bt]`` for each b apart, n_b the targets
of the sequence that count, and then the gradient of ``sum_b g_b l_b``. Logits are the largest tensor of a language
model (tokens times vocabulary), so what matters is how often they cross the memory bus. Row by row:

    forward:   lse = log sum_v exp(x_v)                          reads x, keeps one number
    backward:  dx_v = (exp(x_v - lse) - [v = y]) * g_b / n_b     reads x, writes dx

The soft-max is computed again rather than kept, and the weight g_b of a sequence is a factor of a row that is being
written anyway: weighing costs no byte. The sum goes online: a running maximum and a sum of exponentials relative to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SLAB = 2**20  # logits handled at a time on a CPU: their copies in fp32 stay in the cache


def reference(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The formula in fp32 (float64 for float64), all log-probabilities at once; as `sequence_cross_entropy`.

    Example:
        >>> reference(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).exp().tolist()   # one of four, equally likely
        [4.0]
    """
    counted = targets != ignore_index
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = logs.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return -picked.where(counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)


# --- op ----------------------------------------------------------------------------------------------------------


def _slabs(logits: Tensor) -> list[tuple[slice, slice]]:
    """Sequences and tokens of each slab: slices, as a view of logits may have no rows of one stride."""
    batch, tokens, size = logits.shape
    along = max(1, min(tokens, _SLAB // size))
    across = max(1, _SLAB // (along * size)) if along == tokens else 1
    return [
        (slice(b, b + across), slice(t, t + along))
        for b in range(0, batch, across)
        for t in range(0, tokens, along)
    ]


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    """Over the targets that count, [B, T] to [B]; 0 where none does."""
    return losses.sum(1) / counted.sum(1).clamp(min=1)


def torch_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Losses [B] and log-sum-exps [B, T] in PyTorch, slab by slab.

    Raises:
        ValueError: a target that is neither in the vocabulary nor `ignore_index` (on a GPU its loss is NaN instead,
            as looking would mean to wait).
    """
    counted = targets != ignore_index
    known = targets.where(counted, 0)
    if not targets.is_cuda and bool(((known < 0) | (known >= logits.shape[2])).any()):
        wrong = known[(known < 0) | (known >= logits.shape[2])][0].item()
        raise ValueError(
            f"targets holds {wrong}, outside the vocabulary of {logits.shape[2]}; tokens without a target are marked "
            f"with ignore_index, here {ignore_index}"
        )
    lse = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = torch.empty_like(lse)
    for at in _slabs(logits):
        x = logits[at].to(lse.dtype)
        lse[at] = x.logsumexp(-1)
        losses[at] = lse[at] - x.gather(-1, known[at].unsqueeze(-1)).squeeze(-1)
    return _mean(losses.where(counted, 0.0), counted), lse


def torch_backward(
    gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    """The gradient in the logits, [B, T, V] in their dtype, in PyTorch, slab by slab; contiguous."""
    counted = targets != ignore_index
    scale = (gradient / counted.sum(1).clamp(min=1))[:, None, None]
    known = targets.where(counted, 0).unsqueeze(-1)
    result = logits.new_empty(logits.shape)
    one = lse.new_ones(())
    for at in _slabs(logits):
        p = (logits[at] - lse[at].unsqueeze(-1)).exp_()
        p.scatter_add_(-1, known[at], -one.expand(known[at].shape))
        result[at] = p.mul_(scale[at[0]]).masked_fill_(~counted[at].unsqueeze(-1), 0.0)
    return result


@torch.library.custom_op(
    "refimpl::sequence_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor)",
)
def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return torch_forward(logits, targets, ignore_index)


@_forward.register_fake
def _forward_fake(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(targets.shape[0], dtype=dtype), logits.new_empty(targets.shape, dtype=dtype)


@torch.library.custom_op(
    "refimpl::sequence_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor logits, Tensor targets, Tensor lse, int ignore_index) -> Tensor",
)
def _backward(gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return torch_backward(gradient, logits, targets, lse, ignore_index)


@_backward.register_fake
def _backward_fake(
    gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    return logits.new_empty(logits.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _backward(gradient, *ctx.saved_tensors, ctx.ignore_index), None, None


_forward.register_autograd(_differentiate, setup_context=_remember)


def sequence_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of each sequence, in nats; differentiable in the logits, once.

    Computed slab by slab: there is no second tensor as large as the logits in the forward pass, and only the gradient
    in the backward pass.

    A causal model predicts one token ahead. Shifting the *targets* (`ignore_index` at the end) is cheaper than slicing
    the logits: a slice is read without a copy, but PyTorch pads its gradient, which writes and reads all of it again.

    Args:
        logits: [B, T, V], floating, of any strides.
        targets: int64 [B, T], in ``0..V-1`` or `ignore_index`.
        ignore_index: the target of tokens that do not count.

    Returns:
        [B], fp32 (float64 for float64 logits): the mean over the targets that count; 0, with no gradient, for a
        sequence without any.

    Raises:
        ValueError: shapes or dtypes are others, or, on a CPU, a target is outside the vocabulary (on a GPU: NaN).

    Example:
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> losses = sequence_cross_entropy(logits, torch.tensor([[0, 1, 2], [3, -100, -100]]))
        >>> losses.exp().tolist()
        [4.0, 4.0]
        >>> (torch.tensor([0.0, 2.0]) @ losses).backward()   # sequences weighed
        >>> logits.grad[1].tolist()
        [[0.5, 0.5, 0.5, -1.5], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    if logits.ndim != 3 or not logits.is_floating_point() or not logits.shape[2]:
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}; it must be floating, [B, T, V]")
    if targets.shape != logits.shape[:2] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} {list(targets.shape)}; logits {list(logits.shape)} need torch.int64 "
            f"{list(logits.shape[:2])}"
        )
    losses: Tensor = _forward(logits, targets, ignore_index)[0]
    return losses
