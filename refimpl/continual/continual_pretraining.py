r"""Continual pre-training: re-warm and re-decay the learning rate, and replay some old data at no extra compute.

Source: Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language Models", 2024,
arXiv 2403.08763 (TMLR).

New data $D_1$ for a model that was trained on $D_0$ with a warm-up and a cosine to $\eta_{min}$:

1. start from the model as it is after $D_0$;
2. re-warm: $\eta_t=\eta_{max}t/T_w$ for $t\le T_w$, one per cent of the phase's $T$ updates;
3. re-decay: $\eta_t=\eta_{min}+\frac{\eta_{max}-\eta_{min}}2(1+\cos\pi\frac{t-T_w}{T-T_w})$;
4. replay: $rB$ of the $B$ sequences of every batch are old, and no update is added: $D_1$ gives up the share $r$;
5. the loss is plain next-token cross-entropy over the mixed batch;
6. for further data sets repeat 1 to 5, replaying all old ones (how they share $r$ is left open; here by size).

Claim: with r of 5 % (weak shift) or 25 % (strong shift) this reaches the average loss of training on the union from
scratch, at about half the compute.

The infinite schedules of the same paper need no re-warming: `refimpl.core.train.schedules.Infinite` keeps the rate constant
as long as new data arrive, and a checkpoint of that phase is annealed whenever a final model is needed (`infinite`,
`extended`).

Our choice where the paper is silent: the optimiser's moments start from zero in each phase (released checkpoints have
none) and are kept within an infinite schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from refimpl.core.arguments import Checked, checked
from refimpl.core.errors import OptionError
from refimpl.core.train.loop import History, Loss, train
from refimpl.core.train.losses import sequence_losses
from refimpl.core.train.sampling import interleave, mixture_loader
from refimpl.core.train.schedules import Cosine, Infinite, Scheduled

# -- steps 2 and 3: the learning rate --


@checked()
def rewarm_redecay(T: int, eta_max: float, eta_min: float, warmup: float = 0.01) -> Cosine:
    """Steps 2 and 3: linear from 0 to `eta_max`, then a cosine that reaches `eta_min` when the phase ends.

    Args:
        T: updates of the phase.
        eta_max, eta_min: rates; the paper uses those of pre-training, with ``eta_min = 0.1 eta_max``.
        warmup: T_w as a share of T; rounded up to an update.

    Raises:
        OptionError: a share outside [0, 1), rates out of order, no updates.

    Example:
        >>> schedule = rewarm_redecay(400, eta_max=3e-4, eta_min=3e-5)
        >>> schedule.warmup, schedule.rate(4), schedule.rate(400)
        (4, 0.0003, 3e-05)
    """
    # eta_t = eta_max t / T_w  for t <= T_w, then  eta_min + (eta_max - eta_min) (1 + cos(pi (t - T_w) / (T - T_w))) / 2.
    # Starting at eta_max without a warm-up would be as unstable as at the start of pre-training; staying at eta_min
    # would learn the new data too slowly.
    return Cosine(T, eta_max, eta_min, _updates("warmup", warmup, T))


@checked()
def infinite(
    T: int,
    eta_max: float,
    *,
    constant: float = 0.55,
    low: float = 0.1,
    warmup: float = 0.01,
    cooldown: float = 0.6,
    anneal: float = 0.1,
    form: str = "cosine",
) -> Infinite:
    """An infinite schedule for a first phase of T updates, with the proportions of the paper's 405M models.

    Args:
        T: updates until a first model is needed: warm-up, cooldown, constant phase and annealing.
        eta_max: the highest rate.
        constant, low: eta_const and eta_min as fractions of it. The defaults are remembered values (1.65e-4 and 3e-5
            of 3e-4), not ones we could check.
        warmup, cooldown, anneal: lengths as shares of T; the cooldown ends at ``(warmup + cooldown) T``.
        form: "cosine" or "inverse_sqrt".

    Raises:
        OptionError: shares outside [0, 1) or longer than the phase, rates out of order.

    Example:
        >>> schedule = infinite(1000, eta_max=3e-4)
        >>> schedule.warmup, schedule.cooldown, schedule.hold, schedule.anneal, schedule.horizon
        (10, 600, 290, 100, 1000)
    """
    for name, share in (("constant", constant), ("low", low)):
        if not 0 <= share <= 1:
            raise OptionError(f"{name}={share}: it is a fraction of eta_max, use 0 to 1")
    lengths = [_updates(n, s, T) for n, s in (("warmup", warmup), ("cooldown", cooldown), ("anneal", anneal))]
    if sum(lengths) > T:
        raise OptionError(
            f"warmup={warmup}, cooldown={cooldown} and anneal={anneal} take {sum(lengths)} of T={T} updates; make them "
            "shorter"
        )
    # warm-up to eta_max, cooldown to eta_const, constant for whatever is left of T, then annealing to eta_min
    rise, fall, end = lengths
    return Infinite(rise, fall, T - sum(lengths), end, eta_max, constant * eta_max, low * eta_max, form)


@checked()
def extended(schedule: Infinite, T: int) -> Infinite:
    """The same schedule with T more updates of new data: the constant phase grows, and annealing comes after it.

    Up to ``schedule.constant_until`` both are equal, so a run continues from the checkpoint taken there, with its
    moments, and not from the annealed model.

    Args:
        schedule: of the run so far.
        T: updates on the new data before annealing.

    Raises:
        OptionError: T is negative.

    Example:
        >>> first = infinite(1000, eta_max=3e-4)
        >>> longer = extended(first, 500)
        >>> longer.horizon, [longer.rate(t) == first.rate(t) for t in (5, 300, first.constant_until)]
        (1500, [True, True, True])
    """
    if T < 0:
        raise OptionError(f"T={T}: it is a number of updates, use 0 or more")
    return replace(schedule, hold=schedule.hold + T)


# -- steps 4 and 6: the data --


@checked()
def shares(r: float, sizes: Sequence[int]) -> list[float]:
    """Steps 4 and 6: the share of each data set in a batch, the new one first.

    Args:
        r: share of all old data together.
        sizes: of the old data sets, in rows or tokens.

    Raises:
        OptionError: r outside [0, 1], no old data for an r above 0.

    Example:
        >>> shares(0.25, [300, 100])
        [0.75, 0.1875, 0.0625]
    """
    if not 0 <= r <= 1:
        raise OptionError(f"r={r}: the replayed share of a batch, use 0 to 1")
    if r and not sum(sizes) > 0:
        raise OptionError(f"r={r}, but the old data sets have {list(sizes)} rows; pass old data, or r=0")
    # the new data give up r, which the old sets divide by size: as if they were one set, sampled uniformly
    return [1 - r, *(r * size / sum(sizes) if r else 0.0 for size in sizes)]


@checked()
def replay_loader(
    new: Any, old: Sequence[Any], r: float, batch_size: int, steps: int, seed: int = 0, start: int = 0
) -> DataLoader:
    """Step 4: `steps` batches of new data with a share r of old data, exact to one row after every batch.

    A share that is not a multiple of ``1 / batch_size`` is carried over: at r = 1 % and 8 rows about every twelfth batch
    has one old row. Rounding batch by batch would replay nothing.

    Args:
        new: rows as in `refimpl.core.train.sampling.loader`: tensors, or a dataset that knows its length.
        old: the old data sets.
        r: replayed share. With 0 the batches equal those of a loader over `new` alone with this seed.
        batch_size: rows per batch and process.
        steps: the phase's updates (micro-batches, if they are accumulated); replay adds none.
        seed, start: batch t depends only on the seed and on t, so a loader that starts at t continues an earlier one.

    Raises:
        OptionError: r outside [0, 1], no old data for an r above 0, data without a length.

    Example:
        >>> import torch
        >>> batches = replay_loader(torch.zeros(50), [torch.ones(50)], r=0.05, batch_size=8, steps=100)
        >>> sum(int(batch[0].sum()) for batch in batches), 0.05 * 8 * 100
        (40, 40.0)
    """
    sizes = [len(data[0]) if isinstance(data, (tuple, list)) else _length(data, i) for i, data in enumerate(old)]
    return mixture_loader([new, *old], shares(r, sizes), batch_size, steps, seed, start)


@checked()
def replay_stream(new: Any, old: Sequence[Any], r: float, sizes: Sequence[int] | None = None, seed: int = 0) -> Any:
    """Step 4 for Hugging Face datasets, streaming or not: rows are drawn one by one, so r holds on average only.

    The stream ends when every part has been read once; the Trainer's ``max_steps`` keeps the budget.

    Args:
        new, old: ``datasets.Dataset`` or ``datasets.IterableDataset`` objects, all of one kind.
        r: replayed share.
        sizes: of the old data sets; needed for two or more without a length.
        seed: of the draws.

    Raises:
        OptionError: r outside [0, 1], unknown lengths, or objects that are not such datasets.

    Example:
        >>> from datasets import Dataset
        >>> new, old = Dataset.from_dict({"x": [0] * 300}), Dataset.from_dict({"x": [1] * 100})
        >>> mixed = replay_stream(new, [old], r=0.25)
        >>> 0.15 < sum(mixed["x"]) / len(mixed) < 0.35
        True
    """
    if sizes is None:
        sizes = [1] if len(old) == 1 else [_length(data, i) for i, data in enumerate(old)]
    return interleave([new, *old], shares(r, sizes), seed)


@checked()
def phases(*parts: tuple[int, Sequence[float]]) -> Callable[[int], Sequence[float]]:
    """Shares that change with the step, for one run through several data sets.

    Args:
        parts: for each phase its number of batches and the shares of *all* sources; the shares of the last phase also
            hold after it.

    Returns:
        A function for ``shares`` in `refimpl.core.train.sampling.mixture_loader`.

    Raises:
        OptionError: no phases, or a length that is not positive.

    Example:
        >>> at = phases((100, [1, 0]), (50, [0.25, 0.75]))
        >>> at(99), at(100), at(500)
        ([1, 0], [0.25, 0.75], [0.25, 0.75])
    """
    if not parts:
        raise OptionError("parts is empty; pass (batches, shares) for each phase")
    for length, _ in parts:
        if length < 1:
            raise OptionError(f"a phase of {length} batches: use 1 or more")

    def at(step: int) -> Sequence[float]:
        for length, found in parts:
            if step < length:
                return found
            step -= length
        return parts[-1][1]

    return at


# -- the whole method --


@dataclass(frozen=True)
class ContinualPretraining(Checked):
    """The recipe for one more data set.

    Args:
        eta_max: highest rate; that of pre-training is a good start. A lower one forgets less and learns less.
        eta_min: rate at the end; None: a tenth of `eta_max`.
        warmup: T_w as a share of the phase.
        replay: r; the paper recommends 0.05 for a weak shift, 0.25 for a strong one.
        betas, weight_decay, clip: of AdamW, as in the paper.

    Raises:
        OptionError: a share outside its range, rates out of order.

    Example:
        >>> import torch
        >>> new, old = torch.randint(16, (40, 9)), torch.randint(16, (40, 9))
        >>> model = torch.nn.Embedding(16, 16)     # the next token depends on the current one only
        >>> method = ContinualPretraining(eta_max=0.01, replay=0.25)
        >>> history = method.train(model, new, [old], steps=10, batch_size=4, progress=False)
        >>> len(history.losses), history.steps[-1]["lr"]
        (10, 0.001)
    """

    eta_max: float
    eta_min: float | None = None
    warmup: float = 0.01
    replay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        shares(self.replay, [1])
        self.schedule(10**6)  # raises now if a rate is invalid

    @checked()
    def schedule(self, steps: int) -> Cosine:
        """The learning rate of a phase of `steps` updates (steps 2 and 3)."""
        low = 0.1 * self.eta_max if self.eta_min is None else self.eta_min
        return rewarm_redecay(steps, self.eta_max, low, self.warmup)

    @checked()
    def recipe(self, steps: int, **options: Any) -> Scheduled:
        """Optimiser and rates for `refimpl.core.train.loop.train`.

        Args:
            steps: updates of the phase.
            options: other fields of `refimpl.core.train.loop.Recipe`, such as precision, accumulate or seed.
        """
        own = {"betas": self.betas, "weight_decay": self.weight_decay, "clip": self.clip}
        return Scheduled.of(self.schedule(steps), **{**own, **options})

    @checked()
    def train(
        self,
        model: nn.Module,
        new: Any,
        old: Sequence[Any],
        *,
        steps: int,
        batch_size: int,
        loss: Loss | None = None,
        seed: int = 0,
        recipe: dict[str, Any] | None = None,
        **options: Any,
    ) -> History:
        """Continue on new data, in place; under torchrun every process calls this with the same data.

        Args:
            model: the result of pre-training (step 1).
            new, old, batch_size: as in `replay_loader`.
            steps: updates of the phase.
            loss: ``loss(model, batch)``; None: mean cross-entropy of the next token, for causal models.
            seed: of the order of the rows and of any randomness in the model.
            recipe: other fields of `refimpl.core.train.loop.Recipe`.
            options: of `refimpl.core.train.loop.train`, such as folder, evaluate and evaluate_every.

        Raises:
            OptionError: see `replay_loader` and `refimpl.core.train.loop.train`.
        """
        # 2, 3: new moments and a new schedule for this phase
        settings = self.recipe(steps, seed=seed, **(recipe or {}))
        # 4: micro-batches of an accumulated update count as batches, so that each update has its share of old rows
        data = replay_loader(new, old, self.replay, batch_size, steps * settings.accumulate, seed)
        return train(model, data, next_token_loss if loss is None else loss, settings, **options)


@checked()
def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Step 5: mean cross-entropy in nats over the sequences of a batch, all of one length.

    Args:
        model, batch: as in `refimpl.core.train.losses.sequence_losses`.

    Example:
        >>> import torch
        >>> next_token_loss(torch.nn.Embedding(8, 8), torch.randint(8, (4, 6))).shape
        torch.Size([])
    """
    return sequence_losses(model, batch).mean()


def _updates(name: str, share: float, T: int) -> int:
    """A share of a phase in updates, rounded up; 1e-9 absorbs the rounding error of the product."""
    if not 0 <= share < 1:
        raise OptionError(f"{name}={share}: it is a share of the phase, use 0 or more and less than 1")
    return math.ceil(share * T - 1e-9)


def _length(data: Any, place: int) -> int:
    try:
        return len(data)
    except TypeError:
        raise OptionError(
            f"old[{place}] is a {type(data).__name__}, which has no length; pass tensors or a map-style dataset, or "
            "give `replay_stream` the sizes"
        ) from None
