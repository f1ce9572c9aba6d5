"""Learning-rate schedules as pure functions of the step, and the three places that take one.

A `Schedule` holds no state: what the rate is at step t follows from t alone, so a run that is taken up again, or that
runs in several processes, needs nothing saved. It plugs into `refimpl.core.train.loop` (`Scheduled`), into any torch
optimiser (`Schedule.scheduler`) and into the Hugging Face Trainer (`trainer_callback`).

Time is counted in updates. ``rate(t)`` is the schedule as it is written on paper, for 0 <= t <= horizon; update number
`step`, counted from 0, runs at ``rate(step + 1)``: the first has a rate above zero, the last has the final one.
That is the definition. A plain `Recipe` has the same warm-up and the same cosine, but reads the cosine at the beginning
of an update, at ``rate(step)``, as torch's CosineAnnealingLR does: it is one update late all the way down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from refimpl.core.arguments import Checked
from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.loop import Recipe, half_cosine

if TYPE_CHECKING:
    from transformers import TrainerCallback

COOLDOWNS = ("cosine", "inverse_sqrt")


@dataclass(frozen=True)
class Schedule(Checked):
    """Base class of schedules; a subclass defines `horizon`, `highest` and `rate`.

    Fields are numbers, strings and other schedules: a checkpoint of `refimpl.core.train.loop` remembers them as JSON.
    """

    @property
    def horizon(self) -> int:
        """Updates the schedule is made for."""
        raise NotImplementedError

    @property
    def highest(self) -> float:
        """The highest rate; what `scale` is a fraction of."""
        raise NotImplementedError

    def rate(self, t: float) -> float:
        """The learning rate at time t, in updates, 0 <= t <= horizon.

        Raises:
            OptionError: t lies outside.
        """
        raise NotImplementedError

    def scale(self, step: int) -> float:
        """Rate of update `step` (from 0) as a fraction of the highest.

        Raises:
            OptionError: the schedule has no such update.

        Example:
            >>> cosine = Cosine(steps=100, peak=3e-4, low=3e-5, warmup=10)
            >>> [round(cosine.scale(step), 3) for step in (0, 9, 54, 99)]
            [0.1, 1.0, 0.55, 0.1]
        """
        if not 0 <= step < self.horizon:
            raise OptionError(
                f"step={step} lies past the schedule, which has updates 0 to {self.horizon - 1}; make it longer, or "
                "let another follow with then()"
            )
        return self.rate(step + 1) / self.highest

    def then(self, second: Schedule) -> Then:
        """This schedule and then another one, in one run: the optimiser keeps its moments.

        Example:
            >>> twice = Cosine(10, 1.0, 0.1).then(Cosine(10, 0.5, 0.1, warmup=2))
            >>> twice.horizon, twice.highest, [round(twice.rate(t), 2) for t in (0, 10, 12, 20)]
            (20, 1.0, [1.0, 0.1, 0.5, 0.1])
        """
        return Then(self, second)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule for a torch optimiser; call ``step()`` after every update, ``horizon`` times at most.

        Args:
            optimizer: its rates are taken as the highest of each group: make it with ``lr=schedule.highest``.

        Raises:
            OptionError: from the scheduler's ``step()``, when it goes past the horizon.

        Example:
            >>> import torch
            >>> cosine = Cosine(steps=4, peak=0.1, low=0.01)
            >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cosine.highest)
            >>> scheduler, rates = cosine.scheduler(optimizer), []
            >>> for _ in range(4):
            ...     rates.append(round(optimizer.param_groups[0]["lr"], 4))
            ...     optimizer.step()
            ...     scheduler.step()
            >>> rates
            [0.0868, 0.055, 0.0232, 0.01]
        """
        return LambdaLR(optimizer, _stepwise(self))


def _stepwise(schedule: Schedule) -> Callable[[int], float]:
    """`Schedule.scale` for schedulers, which ask for a next update when the last one is done."""

    def scale(step: int) -> float:
        return schedule.scale(step - 1 if step == schedule.horizon else step)

    return scale


@dataclass(frozen=True)
class Constant(Schedule):
    """One rate, after a linear warm-up from zero.

    Args:
        steps: updates.
        peak: the rate.
        warmup: updates that the rise takes.

    Raises:
        OptionError: a value outside its range.

    Example:
        >>> [Constant(steps=10, peak=0.1, warmup=2).rate(t) for t in (0, 1, 2, 10)]
        [0.0, 0.05, 0.1, 0.1]
    """

    steps: int
    peak: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps, self.warmup)
        _check_rates(peak=self.peak)

    @property
    def horizon(self) -> int:
        return self.steps

    @property
    def highest(self) -> float:
        return self.peak

    def rate(self, t: float) -> float:
        _check_time(t, self.horizon)
        return self.peak * t / self.warmup if t < self.warmup else self.peak


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up from zero, then half a cosine that reaches `low` exactly at the last update.

    ``low + (peak - low) (1 + cos(pi (t - warmup) / (steps - warmup))) / 2``

    Args:
        steps: updates T, warm-up included.
        peak, low: rates at the end of the warm-up and at the end.
        warmup: updates T_w of the rise; 0 begins at the peak.

    Raises:
        OptionError: a value outside its range, or `low` above `peak`.

    Example:
        >>> cosine = Cosine(steps=100, peak=3e-4, low=3e-5, warmup=10)
        >>> cosine.rate(0), cosine.rate(10), cosine.rate(100)
        (0.0, 0.0003, 3e-05)
    """

    steps: int
    peak: float
    low: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps, self.warmup)
        _check_rates(low=self.low, peak=self.peak)

    @property
    def horizon(self) -> int:
        return self.steps

    @property
    def highest(self) -> float:
        return self.peak

    def rate(self, t: float) -> float:
        _check_time(t, self.horizon)
        if t < self.warmup:
            return self.peak * t / self.warmup
        return _cosine(self.peak, self.low, (t - self.warmup) / (self.steps - self.warmup))


@dataclass(frozen=True)
class Infinite(Schedule):
    """Warm-up, cooldown to a constant rate for as long as data come, and a short annealing when a model is wanted.

    Only the constant phase has no length of its own: a checkpoint taken there can be trained further, or annealed,
    without anything having to be warmed up again. From step `constant_until` on the rate falls exponentially,
    ``constant (low / constant) ** ((t - constant_until) / anneal)``.

    Args:
        warmup: updates of the linear rise from zero.
        cooldown: updates from the peak down to the constant rate.
        hold: updates at the constant rate.
        anneal: updates from there to `low`; 0 leaves the annealing out.
        peak, constant, low: the rates, low <= constant <= peak.
        form: of the cooldown, "cosine" or "inverse_sqrt": with tau from 0 to 1 and
            ``h(x) = 1 / sqrt(1 + steepness x) - 1``, the latter is ``peak + (constant - peak) h(tau) / h(1)``.
        steepness: of the inverse root; towards 0 it becomes a straight line.

    Raises:
        OptionError: a value outside its range, or rates out of order.

    Example:
        >>> rates = Infinite(warmup=10, cooldown=50, hold=100, anneal=20, peak=3e-4, constant=1.65e-4, low=3e-5)
        >>> rates.horizon, rates.constant_until
        (180, 160)
        >>> [f"{rates.rate(t):.3g}" for t in (0, 10, 60, 110, 160, 170, 180)]
        ['0', '0.0003', '0.000165', '0.000165', '0.000165', '7.04e-05', '3e-05']
    """

    warmup: int
    cooldown: int
    hold: int
    anneal: int
    peak: float
    constant: float
    low: float
    form: str = "cosine"
    steepness: float = 10.0

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown", "hold", "anneal"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name}={getattr(self, name)}: it is a number of updates, use 0 or more")
        if self.horizon < 1:
            raise OptionError("warmup, cooldown, hold and anneal are all 0; give one of them updates")
        _check_rates(low=self.low, constant=self.constant, peak=self.peak)
        if self.anneal and not self.low > 0:
            raise OptionError(f"low={self.low}: an exponential never reaches zero; use a positive rate, or anneal=0")
        if not self.cooldown and self.constant != self.peak:
            raise OptionError(
                f"cooldown=0 leaves no updates to come down from peak={self.peak} to constant={self.constant}; "
                "make the two rates equal, or give it updates"
            )
        if self.form not in COOLDOWNS:
            raise OptionError(f"form={self.form!r}: use {nearest(self.form, COOLDOWNS)}")
        if not (self.steepness > 0 and math.isfinite(self.steepness)):
            raise OptionError(f"steepness={self.steepness}: use a positive number")

    @property
    def constant_until(self) -> int:
        """The step at which annealing begins: where the checkpoint to continue from is taken."""
        return self.warmup + self.cooldown + self.hold

    @property
    def horizon(self) -> int:
        return self.constant_until + self.anneal

    @property
    def highest(self) -> float:
        return self.peak

    def rate(self, t: float) -> float:
        _check_time(t, self.horizon)
        if t < self.warmup:
            return self.peak * t / self.warmup
        if t < self.warmup + self.cooldown:
            tau = (t - self.warmup) / self.cooldown
            if self.form == "cosine":
                return _cosine(self.peak, self.constant, tau)
            return self.peak + (self.constant - self.peak) * self._h(tau) / self._h(1.0)
        if t <= self.constant_until:
            return self.constant
        return self.constant * (self.low / self.constant) ** ((t - self.constant_until) / self.anneal)

    def _h(self, x: float) -> float:
        # 1 / sqrt(1 + y) - 1 loses all its digits where y is small
        return math.expm1(-0.5 * math.log1p(self.steepness * x))


@dataclass(frozen=True)
class Then(Schedule):
    """One schedule after another, for phases in one run of one optimiser; also spelled ``first.then(second)``.

    Args:
        first, second: each counts its own updates from 0.

    Example:
        >>> Then(Constant(5, 0.1), Cosine(5, 0.2)).rate(5), Constant(5, 0.1).then(Cosine(5, 0.2)).horizon
        (0.1, 10)
    """

    first: Schedule
    second: Schedule

    @property
    def horizon(self) -> int:
        return self.first.horizon + self.second.horizon

    @property
    def highest(self) -> float:
        return max(self.first.highest, self.second.highest)

    def rate(self, t: float) -> float:
        _check_time(t, self.horizon)
        if t <= self.first.horizon:
            return self.first.rate(t)
        return self.second.rate(t - self.first.horizon)


@dataclass(frozen=True)
class Scheduled(Recipe):
    """A recipe of `refimpl.core.train.loop` whose rates come from a schedule; make it with `Scheduled.of`.

    Args:
        rates: the schedule. The recipe's own `warmup`, `schedule` and `final_lr` are not used.

    Raises:
        OptionError: no schedule, one that is shorter than the run, or a warm-up of the recipe's own.

    Example:
        >>> recipe = Scheduled.of(Cosine(steps=100, peak=3e-4, low=3e-5, warmup=10), weight_decay=0.1)
        >>> recipe.steps, recipe.lr, recipe.lr_at(9)
        (100, 0.0003, 0.0003)
    """

    rates: Schedule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates is None:
            raise OptionError("rates=None: give a schedule, as in Scheduled.of(Cosine(...))")
        if self.steps > self.rates.horizon:
            raise OptionError(
                f"steps={self.steps} go past the schedule, which ends after {self.rates.horizon}; make it longer, or "
                "train for fewer steps"
            )
        if self.warmup:
            raise OptionError(f"warmup={self.warmup}: give it to the schedule")

    @classmethod
    def of(cls, rates: Schedule, *, steps: int | None = None, **options: Any) -> Scheduled:
        """The recipe of a schedule: its highest rate and its length.

        Args:
            rates: the schedule.
            steps: updates, if fewer than the schedule has.
            options: other fields of `Recipe`.
        """
        return cls(rates.horizon if steps is None else steps, lr=rates.highest, rates=rates, **options)

    def scale(self, step: int) -> float:
        """Learning rate of update `step` (from 0) as a fraction of the highest."""
        assert self.rates is not None
        return self.rates.scale(step)


def trainer_callback(schedule: Schedule) -> TrainerCallback:
    """The schedule for the Hugging Face Trainer, in place of the one that its arguments name.

    The Trainer's scheduler stays in charge: it is saved, resumed and logged as usual, and only its function changes.

    Args:
        schedule: in updates; the arguments must have ``learning_rate=schedule.highest``.

    Returns:
        A TrainerCallback, for ``Trainer(..., callbacks=[trainer_callback(schedule)])``.

    Raises:
        OptionError: when training begins, if the run is longer than the schedule, its learning rate is not the
            schedule's highest, or its scheduler does not take functions.

    Example:
        >>> type(trainer_callback(Cosine(steps=100, peak=3e-4, low=3e-5))).__name__
        'ScheduleCallback'
    """
    from transformers import TrainerCallback  # seconds, which a user of the loop saves

    class ScheduleCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **others: Any) -> None:
            if state.max_steps > schedule.horizon:
                raise OptionError(
                    f"max_steps={state.max_steps} go past the schedule, which ends after {schedule.horizon}; make it "
                    "longer, or train for fewer steps"
                )
            if not math.isclose(args.learning_rate, schedule.highest, rel_tol=1e-9):
                raise OptionError(
                    f"learning_rate={args.learning_rate} of the training arguments is not the schedule's highest "
                    f"rate; use learning_rate={schedule.highest}"
                )
            if not isinstance(lr_scheduler, LambdaLR):
                raise OptionError(
                    f"lr_scheduler={type(lr_scheduler).__name__} takes no function of the step; set "
                    "lr_scheduler_type='constant' in the training arguments"
                )
            scale = _stepwise(schedule)
            lr_scheduler.lr_lambdas = [scale] * len(lr_scheduler.base_lrs)
            now = [base * scale(lr_scheduler.last_epoch) for base in lr_scheduler.base_lrs]
            for group, rate in zip(lr_scheduler.optimizer.param_groups, now, strict=True):
                group["lr"] = rate
            lr_scheduler._last_lr = now

    return ScheduleCallback()


def _cosine(high: float, low: float, share: float) -> float:
    """From `high` to `low`, both met exactly, while `share` goes from 0 to 1."""
    weight = half_cosine(share)
    return weight * high + (1 - weight) * low


def _check_time(t: float, horizon: int) -> None:
    if not 0 <= t <= horizon:
        raise OptionError(
            f"t={t} lies past the schedule, which goes from 0 to {horizon}; make it longer, or let another follow with "
            "then()"
        )


def _check_steps(steps: int, warmup: int) -> None:
    if steps < 1:
        raise OptionError(f"steps={steps}: use 1 or more")
    if not 0 <= warmup < steps:
        raise OptionError(f"warmup={warmup}: use 0 to steps - 1 = {steps - 1}")


def _check_rates(**rates: float) -> None:
    """Rates in rising order; the last must be positive."""
    names, values = list(rates), list(rates.values())
    for name, value in rates.items():
        if not (value >= 0 and math.isfinite(value)):
            raise OptionError(f"{name}={value}: a rate must be a finite number, 0 or more")
    for k in range(1, len(values)):
        if values[k - 1] > values[k]:
            raise OptionError(
                f"{names[k - 1]}={values[k - 1]} is above {names[k]}={values[k]}; the order must be "
                + " <= ".join(names)
            )
    if not values[-1] > 0:
        raise OptionError(f"{names[-1]}={values[-1]}: use a positive rate")
