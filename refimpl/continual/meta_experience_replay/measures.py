"""Measures of a chain of stages: forgetting, transfer, and the alignment of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.errors import OptionError


@dataclass(frozen=True)
class ChainScores:
    """Scores of one chain, in the unit of its losses.

    Attributes:
        forgetting: final loss of a domain minus its lowest loss since the domain's own stage and before the last one,
            mean over all domains but the last. Negative if it ended below that. 0 for one domain.
        backward_transfer: loss right after a domain minus loss at the end, mean over all domains but the last.
            Positive if later stages helped.
        forward_transfer: loss before the chain minus loss just before a domain's own stage, mean over all domains but
            the first. Positive if earlier stages helped.
        retained: mean loss over all domains at the end.
        learned: mean over domains of the loss right after their own stage.
    """

    forgetting: float
    backward_transfer: float
    forward_transfer: float
    retained: float
    learned: float


def chain_scores(losses: Tensor, before: Tensor) -> ChainScores:
    """Scores of a domain-by-stage matrix.

    Args:
        losses: [n, n]; entry s, j is the loss after stage s on domain j, the one that stage j trains on.
        before: [n], losses before the first stage.

    Raises:
        OptionError: other shapes, or losses that are not finite.

    Example:
        >>> losses = torch.tensor([[2.0, 4.0], [2.5, 3.0]])
        >>> chain_scores(losses, before=torch.tensor([8.0, 8.0]))     # doctest: +NORMALIZE_WHITESPACE
        ChainScores(forgetting=0.5, backward_transfer=-0.5, forward_transfer=4.0, retained=2.75, learned=2.5)
    """
    if losses.dim() != 2 or losses.shape[0] != losses.shape[1] or before.shape != losses.shape[1:]:
        raise OptionError(
            f"losses is {list(losses.shape)}, before {list(before.shape)}: pass one row a stage, one column a domain, "
            "and the losses of every domain before the chain"
        )
    if not (losses.isfinite().all() and before.isfinite().all()):
        raise OptionError("losses: some are not finite; a chain that diverged has no scores")
    losses, before = losses.double(), before.double()
    n = len(losses)
    end, after = losses[-1], losses.diagonal()
    # with R[s, j] the loss on domain j after stage s, and stages counted from 1:
    # forgetting         R[n, j] - min over s = j ... n-1 of R[s, j]
    # backward transfer  R[j, j] - R[n, j]
    # forward transfer   R[0, j] - R[j-1, j]
    lost = [end[j] - losses[j:-1, j].min() for j in range(n - 1)]
    back = [after[j] - end[j] for j in range(n - 1)]
    ahead = [before[j] - losses[j - 1, j] for j in range(1, n)]

    def mean(values: list[Tensor]) -> float:
        return float(sum(values)) / len(values) if values else 0.0

    return ChainScores(mean(lost), mean(back), mean(ahead), float(end.mean()), float(after.mean()))


def gradient_alignment(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], old: Sequence[Any], new: Sequence[Any]
) -> Tensor:
    """Cosine between the gradients of each old and each new batch.

    A gradient is that of all trained parameters, as one vector. It is computed in evaluation mode, so that dropout adds
    no noise; the ``.grad`` of the parameters does not change. The gradients of all old batches are in memory at once.

    Args:
        model: on one device, not sharded.
        loss: as for `refimpl.core.train.loop.train`.
        old, new: batches.

    Returns:
        fp32 [len(old), len(new)].

    Raises:
        OptionError: no batches on one side, no trained parameters, or a gradient of zero.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> output = lambda model, batch: model(batch).mean()       # its gradient is the mean of the inputs
        >>> gradient_alignment(model, output, [torch.tensor([[1.0, 0.0]])], [torch.tensor([[1.0, 1.0]])])
        tensor([[0.7071]])
    """
    if not old or not new:
        raise OptionError(f"old has {len(old)} batches, new {len(new)}; pass at least one of each")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError("model: none of its parameters require a gradient")

    def direction(batch: Any) -> Tensor:
        found = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).float().flatten()
                for p, g in zip(parameters, found, strict=True)
            ]
        )
        norm = flat.norm()
        if not norm > 0:
            raise OptionError("loss: its gradient is zero or not finite, so it has no direction")
        return flat / norm

    with _evaluating(model), torch.enable_grad():
        kept = torch.stack([direction(batch) for batch in old])
        # entry i, j: cos(grad L(old_i), grad L(new_j)), the product that a merge is meant to increase
        return torch.stack([kept @ direction(batch) for batch in new], 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
