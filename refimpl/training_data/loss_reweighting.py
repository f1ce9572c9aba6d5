"""Loss reweighting: each sequence of a batch is weighted by a function of its own loss (LinUpper, Quadratic, Extremes).

Source: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model
Pretraining", ICLR 2025, arXiv 2502.06733, and the authors' code. The claim: pre-training improves at no extra cost
if samples with a low loss weigh less, and samples with a high loss weigh no more than those in the middle.

From the losses l of the M sequences in the batch of all processes, without gradients:

1. `normalise`: h from -1 at the lowest loss to 1 at the highest.
2. A shape f says which part of that range is preferred: `lin_upper` f = min(h + 1, 1), `quadratic` f = 1 - h^2,
   `extremes` f = |h|, `upper` f = (h + 1) / 2.
3. `tempered`: w = softmax(f / r), which maximises ``sum_i w_i f_i - r KL(w || uniform)``.

The training loss is ``sum_i w_i l_i`` (`refimpl.core.train.losses.Weighted`). The first steps use the plain mean (burn-in),
because the losses of an untrained model say nothing about the data.

Differences from the authors' code: h is taken from two differences, ``(l - min) - (max - l)``, which is exactly -1 and
1 at the ends; their ``2 l - max - min`` loses digits and sometimes misses an end. Equal losses give h = 0 and thus
uniform weights. A row without targets, whose loss is 0, takes no part (`refimpl.core.train.losses.counted`). Each
sequence counts as one whatever its length, as in the authors' code for many GPUs; their code for
GPT-2 multiplies by the share of tokens.

Controls (ours) that any such rule has to beat: `Focal` and `OnLoss` (weights grow with the loss itself), `Permuted` (the
same weights on other samples) and `Thinned` (a smaller batch with as much noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refimpl.core.arguments import Checked
from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.losses import counted

Shape = Callable[[Tensor], Tensor]


def normalise(losses: Tensor) -> Tensor:
    """Step 1: the losses of a batch on a scale from -1 (the lowest) to 1 (the highest).

    Args:
        losses: [..., M]; each row is a batch of its own.

    Returns:
        The same shape, fp32 or wider; 0 where all losses of a row are equal, and for samples that do not count (`counted`).
        A NaN makes its whole row NaN, so it is never hidden.

    Example:
        >>> normalise(torch.tensor([2.0, 3.0, 6.0])).tolist()
        [-1.0, -0.5, 1.0]
    """
    losses = losses if losses.dtype == torch.float64 else losses.float()
    present = counted(losses)
    low = losses.masked_fill(present.logical_not(), math.inf).amin(-1, keepdim=True)
    high = losses.masked_fill(present.logical_not(), -math.inf).amax(-1, keepdim=True)
    span = high - low
    # h = 2 (l - min) / (max - min) - 1; a batch with an outlier at the top puts all others near -1
    h = ((losses - low) - (high - losses)) / torch.where(span == 0, torch.ones_like(span), span)
    return torch.where(present | span.isnan(), h, 0.0)


def lin_upper(h: Tensor) -> Tensor:
    """Step 2, LinUpper: rises from 0 at the lowest loss to 1 at the middle of the range, and stays there.

    Example:
        >>> lin_upper(torch.tensor([-1.0, -0.5, 0.0, 1.0])).tolist()
        [0.0, 0.5, 1.0, 1.0]
    """
    return (h + 1).clamp(max=1)  # the upper half of the range is capped: outliers, often noise, gain no extra weight


def quadratic(h: Tensor) -> Tensor:
    """Step 2, Quadratic: largest in the middle of the range, 0 at both ends.

    Example:
        >>> quadratic(torch.tensor([-1.0, 0.0, 0.5])).tolist()
        [0.0, 1.0, 0.75]
    """
    return 1 - h.square()  # neither what is learned already (h = -1) nor what cannot be learned (h = 1)


def extremes(h: Tensor) -> Tensor:
    """Step 2, Extremes: largest at both ends of the range, 0 in the middle.

    Example:
        >>> extremes(torch.tensor([-1.0, 0.0, 0.5])).tolist()
        [1.0, 0.0, 0.5]
    """
    return h.abs()


def upper(h: Tensor) -> Tensor:
    """Step 2, pure up-weighting: rises over the whole range, so the highest loss weighs most.

    Example:
        >>> upper(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return (h + 1) / 2


SHAPES: dict[str, Shape] = {"linupper": lin_upper, "quadratic": quadratic, "extremes": extremes, "upper": upper}


def tempered(f: Tensor, r: float, present: Tensor | None = None) -> Tensor:
    """Step 3: the weights on the simplex that maximise ``sum_i w_i f_i - r KL(w || uniform)``.

    Args:
        f: [..., M].
        r: temperature. As r goes to 0 all weight goes to the largest f, shared among equal ones; as r grows the weights
            become uniform.
        present: bool [..., M], the samples that take part; the others get no weight. None: all.

    Returns:
        The same shape; rows sum to one.

    Raises:
        OptionError: r not positive.

    Example:
        >>> tempered(torch.tensor([0.0, 1.0, 1.0]), r=0.4).mul(3).tolist()   # the paper's usual temperature
        [0.1182..., 1.4408..., 1.4408...]
    """
    _positive("r", r)
    # with a multiplier c for sum w = 1: f_i - r (ln(M w_i) + 1) - c = 0, so w_i is proportional to exp(f_i / r)
    return (f / r if present is None else (f / r).masked_fill(present.logical_not(), -math.inf)).softmax(-1)


@dataclass(frozen=True)
class LossReweighting(Checked):
    """The paper's rule: weights of a batch from its losses, for `refimpl.core.train.losses.Weighted`.

    Args:
        strategy: "linupper", "quadratic", "extremes", "upper", or "uniform" (the plain mean).
        r: temperature (``kl_reg`` in the authors' code). The largest weight is at most e^(1/r) times the smallest.
        burn_in: updates with the plain mean before the first weighted one.

    Raises:
        OptionError: an unknown strategy, r not positive, or a negative burn-in.

    Example:
        >>> rule = LossReweighting("linupper", r=0.4, burn_in=100)
        >>> losses = torch.tensor([1.0, 2.0, 3.0])
        >>> rule(losses, step=99) is None, [round(w, 3) for w in rule(losses, step=100).tolist()]
        (True, [0.039, 0.48, 0.48])
    """

    strategy: str = "linupper"
    r: float = 0.4
    burn_in: int = 0

    def __post_init__(self) -> None:
        names = [*SHAPES, "uniform"]
        if self.strategy not in names:
            raise OptionError(f"strategy={self.strategy!r}: use {nearest(str(self.strategy), names)}")
        _positive("r", self.r)
        _burn_in(self.burn_in)

    def __call__(self, losses: Tensor, step: int) -> Tensor | None:
        """Weights [..., M] of losses [..., M] at an update (from 0); None for the plain mean."""
        if self.strategy == "uniform" or step < self.burn_in:
            return None
        return tempered(SHAPES[self.strategy](normalise(losses)), self.r, counted(losses))


def most_concentrated(m: int, r: float) -> float:
    """M times the weight of one outlier at h = 1 with all other losses at h = -1, under LinUpper or upper.

    Tends to e^(1/r) for large M; the paper's convergence analysis assumes at most 2.

    Example:
        >>> round(most_concentrated(64, 0.4), 2), round(most_concentrated(1024, 0.4), 2)
        (10.37, 12.05)
    """
    _positive("r", r)
    # f is 1 for the outlier and 0 for the others: w = e^(1/r) / (e^(1/r) + M - 1)
    return m / (1 + (m - 1) * math.exp(-1 / r))


# -- controls --


@dataclass(frozen=True)
class Focal(Checked):
    """Control: weights proportional to a power of the loss, in the manner of the focal loss.

    Args:
        gamma: the power.
        burn_in: as in `LossReweighting`.

    Example:
        >>> Focal(gamma=1.0)(torch.tensor([1.0, 3.0]), step=0).tolist()
        [0.25, 0.75]
    """

    gamma: float = 2.0
    burn_in: int = 0

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)
        _burn_in(self.burn_in)

    def __call__(self, losses: Tensor, step: int) -> Tensor | None:
        """Weights [..., M] of losses [..., M]; None for the plain mean."""
        if step < self.burn_in:
            return None
        powers = losses.float().pow(self.gamma)
        total = powers.sum(-1, keepdim=True)
        return torch.where(
            total == 0, 1 / losses.shape[-1], powers / total
        )  # no sample has a loss: any weights will do


@dataclass(frozen=True)
class OnLoss(Checked):
    """Control: softmax of the losses themselves, the worst case in a KL ball (distributionally robust training).

    Args:
        r: temperature in nats.
        burn_in: as in `LossReweighting`.

    Example:
        >>> OnLoss(r=1.0)(torch.tensor([0.0, 0.0, 0.0]), step=0).mul(3).tolist()
        [1.0, 1.0, 1.0]
    """

    r: float = 1.0
    burn_in: int = 0

    def __post_init__(self) -> None:
        _positive("r", self.r)
        _burn_in(self.burn_in)

    def __call__(self, losses: Tensor, step: int) -> Tensor | None:
        """Weights [..., M] of losses [..., M]; None for the plain mean."""
        return None if step < self.burn_in else tempered(losses.float(), self.r, counted(losses))


@dataclass(frozen=True)
class Permuted:
    """Control: the weights of another rule, assigned to samples at random: as unequal, but without information.

    Args:
        rule: the rule whose weights are permuted.
        seed: of the order, together with the step. All processes hold equal losses and use the same order.

    Example:
        >>> losses = torch.tensor([1.0, 2.0, 3.0])
        >>> rule = LossReweighting("upper")
        >>> mixed = Permuted(rule)(losses, step=3)
        >>> torch.equal(mixed.sort().values, rule(losses, 3).sort().values)
        True
    """

    rule: Any
    seed: int = 0

    def __call__(self, losses: Tensor, step: int) -> Tensor | None:
        """Weights [M] of losses [M]; None for the plain mean."""
        weights = self.rule(losses, step)
        if weights is None:
            return None
        order, absent = _order(losses, self.seed, step), counted(losses).logical_not()
        # those that count, in any order, go to those that count; the others stay behind them
        here, there = absent.long().argsort(stable=True), order[absent[order].long().argsort(stable=True)]
        return torch.empty_like(weights).scatter_(0, here, weights[there])


@dataclass(frozen=True)
class Thinned:
    """Control: a smaller batch, of as many random samples as another rule's weights are worth (1 / sum w^2).

    Args:
        rule: the rule whose effective batch size is used.
        seed: of the draw, together with the step.

    Example:
        >>> weights = Thinned(LossReweighting("linupper", r=0.1))(torch.arange(1.0, 11.0), step=0)
        >>> sorted(set(weights.mul(6).tolist()))
        [0.0, 1.0]
    """

    rule: Any
    seed: int = 0

    def __call__(self, losses: Tensor, step: int) -> Tensor | None:
        """Weights [M] of losses [M]; None for the plain mean."""
        weights = self.rule(losses, step)
        if weights is None:
            return None
        # Kish's effective sample size: a mean with weights w has the variance of a plain mean of 1 / sum w^2 samples
        kept = (1 / weights.square().sum()).round()
        order = (
            _order(losses, self.seed, step) + len(losses) * counted(losses).logical_not()
        )  # those that do not count come last
        return (order.argsort().argsort() < kept).to(weights.dtype) / kept


def _order(losses: Tensor, seed: int, step: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1_000_003 * seed + step)  # the same on all processes
    return torch.randperm(len(losses), generator=generator, device="cpu").to(losses.device)


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise OptionError(f"{name}={value}: use a positive number")


def _burn_in(value: int) -> None:
    if value < 0:
        raise OptionError(f"burn_in={value}: use 0 or more updates")
