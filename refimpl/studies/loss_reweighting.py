"""The experiment behind the chapter on loss reweighting: does a weight that comes from the loss beat the plain mean?

First a toy whose theory is exact: least squares with 500 samples in 50 dimensions, of which nine tenths are near-copies
of what the start knows already, a tenth tell something new, and some may be outliers with random labels. Full batches,
one step size, twenty draws at once. Beside the shapes stand the plain mean, the plain mean with a step twice as large,
and the plain mean with its gradient stretched to the length of LinUpper's.

Then a small Llama on Wikipedia, Python source and documentation prose, with 20 % near-copies of eight passages and 3 %
random tokens among the training data only. Every row is seen once. All arms have the same steps, batches and grid of
learning rates, chosen on validation text with a seed that is not used again; weights begin after a fifth of the steps.
Measured is the plain loss of test documents, without copies or noise, in bits per byte: over all three corpora together
and for each of them.

Beside that stand LinUpper and Quadratic with three other temperatures, with weights from the first step on and with
weights in the second half only, all at the rate that was tuned for the recipe; the plain mean with two more rates to
choose from, so that it is tuned better than what it is compared with; and a run of 176 steps, tuned anew: 2.2 times as
long, which is as far as the prose goes if no row is to be seen twice. The rules of these two comparisons were written
when the results of the others were known, and before their own runs. In the longer run every arm took the highest rate
of the grid. So a last rule, written when that was known, gives all three a wider grid.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from refimpl.core.errors import CalibrationError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.losses import Weighted, sequence_losses
from refimpl.lab.data.domains import domain_hash, llama, measured, windows
from refimpl.lab.study.claims import BELOW_ONE, Bound, Claim, Every, Gap, Outcome, Place
from refimpl.lab.study.claims import Arm as AnyArm
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import TUNING_SEED, Job, Row, Run, Stages, Study, curves
from refimpl.training_data.loss_reweighting import Focal, LossReweighting, OnLoss, Permuted, Thinned

SEEDS = (1, 2, 3, 4, 5)
RATES = (2e-3, 4e-3, 8e-3)  # one uniform training on validation text did better at 4e-3 than at 1e-2
LENGTH = 64  # predicted tokens of a row
BATCH = 64
R = 0.4
BURN_IN = 0.2  # share of the steps
DOMAINS = ("wikipedia", "python", "prose")
SHARES = {"wikipedia": 0.26, "python": 0.26, "prose": 0.25, "boilerplate": 0.20, "noise": 0.03}
"""Of the training rows."""
PASSAGES, CHANGED = 8, 3  # of the boilerplate: originals, and tokens of each copy that are drawn anew
TEXT, TRAINING, VALIDATION = "held-out text", "training", "validation text"
LM_SCALE = "a Llama of 0.17M weights, 0.3M tokens, batches of 64; the paper: 124M to 7B, batches from 32"

ARMS: dict[str, Callable[[int, int], Any]] = {
    "uniform": lambda burn_in, seed: LossReweighting("uniform"),
    "linupper": lambda burn_in, seed: LossReweighting("linupper", R, burn_in),
    "quadratic": lambda burn_in, seed: LossReweighting("quadratic", R, burn_in),
    "extremes": lambda burn_in, seed: LossReweighting("extremes", R, burn_in),
    "upper": lambda burn_in, seed: LossReweighting("upper", R, burn_in),
    "focal": lambda burn_in, seed: Focal(2.0, burn_in),
    "soft-max of losses": lambda burn_in, seed: OnLoss(1.0, burn_in),
    "linupper shuffled": lambda burn_in, seed: Permuted(LossReweighting("linupper", R, burn_in), seed),
    "smaller batch": lambda burn_in, seed: Thinned(LossReweighting("linupper", R, burn_in), seed),
}
"""Rules by name, each made from the steps of burn-in and a seed."""
TWICE = "uniform, twice the rate"
LONG = ("uniform", "linupper", "quadratic")
"""Arms that are trained for longer, too."""
EXTRA = {False: (2.8e-3, 5.7e-3), True: (5.7e-3, 1.1e-2, 1.6e-2)}
"""More rates for these arms, in the short and in the longer run: between those of the grid, and beyond its end."""
FIXED = {f"{arm}, rate {lr:g}": lr for extra in EXTRA.values() for arm in LONG for lr in extra}
"""Arms of the records that train at one of these."""
FINER = {f"uniform, rate {lr:g}": lr for lr in EXTRA[False]}
"""The plain mean at each of them in the short run."""


@dataclass(frozen=True)
class Variant:
    """A shape with a temperature and a burn-in (share of the steps) of its own."""

    shape: str
    r: float = R
    burn_in: float = BURN_IN


VARIANTS = {
    **{f"{shape}, r = {r:g}": Variant(shape, r=r) for shape in LONG[1:] for r in (0.2, 1.0, 10.0)},
    **{f"{shape}, burn-in {b:.0%}": Variant(shape, burn_in=b) for shape in LONG[1:] for b in (0.0, 0.5)},
}
"""Around the recipe of LinUpper and Quadratic, one thing changed at a time."""


@dataclass(frozen=True)
class Size:
    """Size of the experiment at a profile.

    Attributes:
        steps, longer: updates of the short and of the longer run.
        windows: measured of each corpus.
        draws, toy_steps: of the toy.
    """

    steps: int = 80
    longer: int = 176
    windows: int = 128
    draws: int = 20
    toy_steps: int = 150


SIZES = {"study": Size(), "quick": Size(5, 7, 4, 3, 10)}


# -- arms --


def at(condition: str, longer: bool) -> str:
    """A condition of the records, told apart for the longer run.

    Example:
        >>> at(TEXT, False), at(TEXT, True)
        ('held-out text', 'held-out text, longer')
    """
    return f"{condition}, longer" if longer else condition


@dataclass(frozen=True)
class Arm:
    """The language model trained with one rule.

    Attributes:
        name: a key of `ARMS`, `VARIANTS` or `FIXED`, or `TWICE`.
        longer: whether it is the longer run.
    """

    name: str
    longer: bool = False

    @property
    def condition(self) -> str:
        return at(TEXT, self.longer)

    @property
    def validation(self) -> str:
        return at(VALIDATION, self.longer)


@dataclass(frozen=True)
class Toy:
    """Least squares with one rule; no temperature for the plain means."""

    name: str
    outliers: float
    r: float | None = None

    @property
    def condition(self) -> str:
        return f"toy, {self.outliers:.0%} outliers" + ("" if self.r is None else f", r = {self.r:g}")


OUTLIERS = (0.0, 0.02, 0.1)
TEMPERATURES = (R, 1.0, 10.0)
TOY_SHAPES = ("linupper", "quadratic", "extremes", "upper")
TOY_UNIFORM = ("uniform", "uniform, twice the step", "uniform, matched norm")


def arms(profile: str) -> list[Arm | Toy]:
    toys = [Toy(name, o) for o in OUTLIERS for name in TOY_UNIFORM]
    temperatures = TEMPERATURES[:1] if profile == "quick" else TEMPERATURES
    toys += [Toy(name, o, r) for o in OUTLIERS for r in temperatures for name in TOY_SHAPES]
    if profile == "quick":
        short = ("uniform", "linupper", "smaller batch", *list(FINER)[:1], "linupper, r = 10", "linupper, burn-in 0%")
        return [*toys, *map(Arm, short), Arm("linupper", longer=True)]
    return [*toys, *map(Arm, (*ARMS, TWICE, *FINER, *VARIANTS)), *(Arm(name, longer=True) for name in LONG)]


def seeds(arm: Arm | Toy, profile: str) -> Sequence[int]:
    if isinstance(arm, Toy):
        return (0,)  # draws side by side
    return SEEDS if profile == "study" else SEEDS[:1]


def tuned_as(arm: Arm | Toy) -> Arm | Toy:
    """Variants have the rate of their shape."""
    if isinstance(arm, Toy) or arm.name in ARMS:
        return arm
    base = VARIANTS[arm.name].shape if arm.name in VARIANTS else arm.name.split(",")[0]
    return replace(arm, name=base)


# -- the rules, written before the run --


def validated(results: Results, arm: str, lr: float, longer: bool = False) -> float:
    """Bits per byte of validation text that an arm reached at a rate, with the seed for tuning."""
    place = at(VALIDATION, longer)
    return results.values(f"{arm} at {lr:g}", place, TUNING_SEED, metric="bits per byte")[""]


def finest(results: Results, arm: str = "uniform", longer: bool = False) -> str:
    """The name under which an arm of `LONG` is recorded at the best of all its rates on validation text.

    The best of the grid goes by the name of the arm alone, so only the extra rates are left to compare with it.
    """
    scores = {arm: min(validated(results, arm, lr, longer) for lr in RATES)}
    scores |= {f"{arm}, rate {lr:g}": validated(results, arm, lr, longer) for lr in EXTRA[longer]}
    return min(scores, key=scores.__getitem__)


def _gaps(a: Sequence[str], b: Sequence[str], longer: bool = False) -> tuple[Gap, ...]:
    return tuple(Gap(Arm(x, longer), Arm(y, longer), "bits per byte", "ratio", SEEDS) for x in a for y in b)


@dataclass(frozen=True)
class Draws(Gap):
    """Two rules in the toy, paired by draw."""

    def numbers(self, results: Results, arm: AnyArm) -> np.ndarray:
        """Of an arm, one for each draw."""
        return np.array(list(results.values(arm.name, arm.condition, metric=self.metric).values()))

    @property
    def method(self) -> str:
        """How the interval is made, in words."""
        return f"t interval of the logarithm over {SIZES['study'].draws} draws"


def _toy(*pairs: tuple[str, str, float]) -> tuple[Gap, ...]:
    def toy(name: str, outliers: float) -> Toy:
        return Toy(name, outliers, None if name in TOY_UNIFORM else R)

    return tuple(Draws(toy(a, o), toy(b, o), "distance", "ratio") for a, b, o in pairs)


_LONG_SCALE = LM_SCALE.replace("0.3M tokens", "0.7M tokens")
_TOY_SCALE = "least squares, 500 samples, 50 dimensions, 150 steps, 20 draws; the paper: a toy of this kind"
_below = functools.partial(Every, bound=BELOW_ONE, partly="any", scale=LM_SCALE)
_toy_below = functools.partial(_below, scale=_TOY_SCALE)


def _at_the_best(longer: bool, shapes_too: bool, **told: str) -> Callable[[Results], Outcome]:
    """LinUpper and Quadratic over the plain mean at the best of all its rates, and they at theirs where `shapes_too`."""

    def outcome(results: Results) -> Outcome:
        plain, *shapes = (finest(results, a, longer) if shapes_too or a == "uniform" else a for a in LONG)
        return _below(_gaps(shapes, [plain], longer), **told)(results)  # type: ignore[arg-type]

    return outcome


_OVER = "t interval over 5 seeds of the logarithm"
CLAIMS = [
    Claim(
        "rw-linupper",
        "LinUpper gives a better language model than the plain mean at equal steps.",
        "lower held-out perplexity from 124M to 7B; no table was available to us",
        _below(
            _gaps(["linupper"], ["uniform", TWICE]),
            control="the plain mean, its own rate and twice it",
            quantity="bits per byte, LinUpper / uniform",
            arms="test text, uniform at its own best rate and at twice that rate",
        ),
    ),
    Claim(
        "rw-quadratic",
        "Quadratic gives a better language model than the plain mean at equal steps.",
        "lower held-out perplexity for GPT-2; no table was available to us",
        _below(
            _gaps(["quadratic"], ["uniform", TWICE]),
            control="the plain mean, its own rate and twice it",
            quantity="bits per byte, Quadratic / uniform",
            arms="test text, uniform at its own best rate and at twice that rate",
        ),
    ),
    Claim(
        "rw-signal",
        "What helps is which sequences get the weight, not that weights are unequal.",
        "not reported",
        _below(
            _gaps(["linupper"], ["linupper shuffled", "smaller batch"]),
            control="the same weights shuffled; a smaller batch",
            quantity="bits per byte, LinUpper / control",
            arms="test text, controls: LinUpper's weights on sequences drawn at random, and a batch as small as its "
            "weights are worth",
        ),
    ),
    Claim(
        "rw-capped",
        "Weight that grows up to the highest losses does worse than weight that is capped at the middle.",
        "pure up-weighting is weaker; no table was available to us",
        _below(
            _gaps(["linupper"], ["upper", "focal", "soft-max of losses"]),
            control="rules that rise to the highest loss",
            quantity="bits per byte, LinUpper / rising rule",
            arms="test text, rising rules: upper, focal (square of the loss), soft-max of losses",
        ),
    ),
    Claim(
        "rw-low-losses",
        "The common factor of what helps is that low losses count less.",
        "Extremes, which favours both ends, is weaker; no table was available to us",
        _below(
            _gaps(["linupper", "quadratic"], ["extremes"]),
            control="Extremes",
            quantity="bits per byte, shape / Extremes",
            arms="test text, shapes: LinUpper and Quadratic",
        ),
    ),
    Claim(
        "rw-bound",
        "The condition of the paper's analysis, no weight above 2/M, is met in training.",
        "assumed: LinUpper meets it if half of the batch lies in the upper half of the range",
        Every(
            (Gap(Place("linupper", TRAINING), metric="share within 2", seeds=SEEDS),),
            Bound(low=0.95),
            Bound(low=0.5),
            control="none: a condition, not a comparison",
            quantity="share of batches in which no weight is above 2/M",
            scale=LM_SCALE,
            arms="LinUpper's language model after burn-in",
        ),
    ),
    Claim(
        "rw-toy",
        "On least squares with redundant samples LinUpper converges faster than the plain mean.",
        "a figure: LinUpper fastest",
        _toy_below(
            _toy(*(("linupper", other, 0.0) for other in TOY_UNIFORM)),
            control="the plain mean with three step sizes",
            quantity="squared distance, LinUpper / uniform",
            arms="no outliers, r = 0.4, after 150 steps, uniform with the same step, with twice the step, and with "
            "gradients as long as LinUpper's",
        ),
    ),
    Claim(
        "rw-toy-order",
        "There, Quadratic is second and also beats the plain mean.",
        "a figure: LinUpper fastest, Quadratic next",
        _toy_below(
            _toy(("linupper", "quadratic", 0.0), ("quadratic", "uniform", 0.0)),
            control="the next in the order",
            quantity="squared distance, better / worse in the paper's order",
            arms="no outliers, r = 0.4, after 150 steps, LinUpper / Quadratic and Quadratic / uniform",
        ),
    ),
    Claim(
        "rw-outliers",
        "As the highest losses are capped, outliers do no harm to LinUpper's lead.",
        "the motive of the cap; not measured with outliers",
        _toy_below(
            _toy(*(("linupper", "uniform", share) for share in OUTLIERS[1:])),
            control="the plain mean, same step",
            quantity="squared distance with outliers, LinUpper / uniform",
            arms="2 and 10 % outliers, r = 0.4, after 150 steps",
        ),
    ),
    Claim(
        "rw-finer",
        "LinUpper and Quadratic lead although the plain mean has more learning rates to choose from.",
        "not reported",
        _at_the_best(
            longer=False,
            shapes_too=False,
            control="the plain mean with five rates to choose from, against three",
            quantity="bits per byte, shape / uniform, finer rates",
        ),
        "Bits per byte of test text, all corpora together, LinUpper and Quadratic, each at the best of three rates, "
        f"/ uniform at the best of five, all chosen on validation text, {_OVER}: holds if both lie below 1, partly if one "
        "does.",
    ),
    Claim(
        "rw-longer",
        "The lead over the plain mean is still there after 2.2 times the steps.",
        "lower held-out perplexity after 20 000 steps of GPT-2; no table was available to us",
        _below(
            _gaps(LONG[1:], LONG[:1], longer=True),
            scale=_LONG_SCALE,
            control="the plain mean, as long, at its own rate",
            quantity="bits per byte after 176 steps, shape / uniform",
            arms="test text, LinUpper / uniform and Quadratic / uniform, rates chosen again at that length",
        ),
    ),
    Claim(
        "rw-wider",
        "That lead is still there if every arm may choose from a wider grid of learning rates.",
        "not reported",
        _at_the_best(
            longer=True,
            shapes_too=True,
            scale=_LONG_SCALE,
            control="the plain mean, as long, with as many rates to choose from",
            quantity="bits per byte after 176 steps, shape / uniform, six rates",
        ),
        "Bits per byte of test text after 176 steps, all corpora together, LinUpper / uniform and Quadratic / uniform, "
        "each at the best of six rates on validation text, up to twice the highest of the grid, "
        f"{_OVER}: holds if both lie below 1, partly if one does.",
    ),
]


# -- the toy --

TOY_RATE = 0.02


@dataclass(frozen=True)
class ToyData:
    """Draws of a regression: x [draws, n, d], y [draws, n], the start and the solution [draws, d]."""

    x: Tensor
    y: Tensor
    start: Tensor
    solution: Tensor


@functools.cache
def toy_data(outliers: float, draws: int, samples: int = 500, dimension: int = 50) -> ToyData:
    """Near-copies in a subspace of five dimensions, a tenth of informative samples, and outliers with random labels.

    Nine tenths of the samples that are no outliers lie within 0.01 of the subspace, where the start agrees with the
    solution. Labels of outliers are normal with deviation 10; all others are exact.

    Args:
        outliers: share of the samples.
        draws: regressions.

    Example:
        >>> data = toy_data(0.0, draws=2)
        >>> residual = (data.x @ data.start.unsqueeze(-1)).squeeze(-1) - data.y
        >>> bool(residual[:, :450].abs().max() < 1), bool(residual[:, 450:].square().mean() > 20)
        (True, True)
    """
    generator = torch.Generator().manual_seed(2025)
    wrong = round(outliers * samples)
    copies = round(0.9 * (samples - wrong))
    x = torch.randn(draws, samples, dimension, generator=generator)
    basis = torch.linalg.qr(torch.randn(draws, dimension, 5, generator=generator)).Q
    solution = torch.randn(draws, dimension, generator=generator)
    x[:, :copies] = torch.randn(draws, copies, 5, generator=generator) @ basis.mT + 0.01 * x[:, :copies]
    y = (x @ solution.unsqueeze(-1)).squeeze(-1)
    if wrong:
        y[:, -wrong:] = 10 * torch.randn(draws, wrong, generator=generator)
    start = (basis @ (basis.mT @ solution.unsqueeze(-1))).squeeze(-1)
    return ToyData(x, y, start, solution)


class Regressions(nn.Module):
    """Parameters of several regressions at once, [draws, d]."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Predictions [draws, n]."""
        return (x @ self.theta.unsqueeze(-1)).squeeze(-1)


def toy(arm: str, outliers: float, r: float, draws: int, steps: int) -> Tensor:
    """Gradient descent on whole batches, all draws side by side.

    Args:
        arm: "linupper", "quadratic", "extremes", "upper", "uniform", "uniform, twice the step" or
            "uniform, matched norm" (gradients as long as LinUpper's at the same place).
        outliers: share of the samples.
        r: temperature.
        draws, steps: how much.

    Returns:
        Squared distance to the solution, [steps + 1, draws].

    Example:
        >>> plain, weighted = (toy(arm, 0.0, 0.4, draws=2, steps=50)[-1] for arm in ("uniform", "linupper"))
        >>> bool((weighted < plain).all())
        True
    """
    data = toy_data(outliers, draws)
    model = Regressions(data.start)
    shape = "linupper" if arm.startswith("uniform") else arm
    rule = LossReweighting(shape, r)

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        x, y = batch
        residual = model(x) - y
        losses = residual.square()
        weights = rule(losses.detach(), 0)
        assert weights is not None
        plain = torch.full_like(weights, 1 / weights.shape[-1])
        if arm == "uniform, matched norm":
            long, short = ((w * residual.detach()).unsqueeze(-2) @ x for w in (weights, plain))  # half of each gradient
            plain *= (long.norm(dim=-1) / short.norm(dim=-1).clamp(min=1e-12)).detach()
        return ((plain if arm.startswith("uniform") else weights) * losses).sum()

    path = [(data.start - data.solution).square().sum(1)]

    def follow(step: int, model: nn.Module) -> None:
        assert isinstance(model, Regressions)
        path.append((model.theta.detach() - data.solution).square().sum(1))

    whole: Any = [(data.x, data.y)]
    rate = TOY_RATE * (2 if arm.endswith("twice the step") else 1)
    recipe = Recipe(steps, lr=rate, optimizer="sgd", momentum=0.0, schedule="constant")
    train(model, DataLoader(whole, batch_size=None), loss, recipe, after_step=[follow], progress=False)
    return torch.stack(path)


def _descended(arm: Toy, size: Size) -> Iterator[Row]:
    """Distances draw by draw at the end, and the mean over draws on the way."""
    path = toy(arm.name, arm.outliers, R if arm.r is None else arm.r, size.draws, size.toy_steps)
    for draw, value in enumerate(path[-1].tolist()):
        yield Row("distance", value, str(draw))
    for step in range(0, len(path), max(1, size.toy_steps // 30)):
        yield Row("mean distance", float(path[step].mean()), str(step), ", on the way")


# -- the language model --


def training_rows(seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Training rows of a seed, in order; no row of a corpus twice.

    Args:
        seed: draws windows, copies, noise and the order.
        steps: batches of `BATCH` rows.

    Returns:
        int64 [steps * BATCH, LENGTH + 1], and the index of each row's source in `SHARES`, int64 [steps * BATCH].

    Raises:
        CalibrationError: a corpus has too few rows.

    Example:
        >>> ids, sources = training_rows(1, 5)
        >>> ids.shape, sources.bincount().tolist()
        (torch.Size([320, 65]), [83, 83, 80, 64, 10])
    """
    generator = torch.Generator().manual_seed(seed)
    n = steps * BATCH
    counts = [round(share * n) for share in SHARES.values()]
    counts[0] += n - sum(counts)
    parts, originals = [], []
    for domain, count in zip(DOMAINS, counts, strict=False):
        ids, _ = _corpus(domain)
        if len(ids) < count + PASSAGES:
            raise CalibrationError(
                f"steps={steps}: {count + PASSAGES} rows of {domain!r} wanted, there are {len(ids)}; use fewer steps"
            )
        chosen = torch.randperm(len(ids), generator=generator)[: count + PASSAGES]
        parts.append(ids[chosen[:count]])
        originals.append(ids[chosen[count:]])
    passages = torch.cat(originals)
    passages = passages[torch.randperm(len(passages), generator=generator)[:PASSAGES]]
    copies = passages[torch.randint(PASSAGES, (counts[3],), generator=generator)]
    where = torch.rand(copies.shape, generator=generator).argsort(1)[:, :CHANGED]
    copies = copies.scatter(1, where, torch.randint(1024, where.shape, generator=generator))
    noise = torch.randint(1024, (counts[4], LENGTH + 1), generator=generator)
    rows = torch.cat([*parts, copies, noise])
    sources = torch.arange(len(SHARES)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(n, generator=generator)
    return rows[order], sources[order]


@functools.cache
def _corpus(domain: str) -> tuple[Tensor, list[str]]:
    return windows(domain, "calibration", LENGTH)


def recipe_for(size: Size, lr: float, seed: int) -> Recipe:
    """The same for all arms but for the learning rate.

    Example:
        >>> recipe_for(SIZES["study"], 1e-2, 1).warmup
        8
    """
    return Recipe(
        size.steps, lr=lr, weight_decay=0.01, warmup=max(1, size.steps // 10), final_lr=0.2, clip=1.0, seed=seed
    )


def rule_for(arm: str, steps: int, seed: int) -> tuple[Any, int]:
    """The rule of an arm for so many steps, and the step at which its weights begin.

    Example:
        >>> rule_for("linupper, r = 10", 80, 1)
        (LossReweighting(strategy='linupper', r=10.0, burn_in=16), 16)
    """
    if arm in VARIANTS:
        variant = VARIANTS[arm]
        burn_in = round(variant.burn_in * steps)
        return LossReweighting(variant.shape, variant.r, burn_in), burn_in
    burn_in = round(BURN_IN * steps)
    base = tuned_as(Arm(arm)).name
    return ARMS[base](burn_in, seed), burn_in


def measure(job: Job) -> Iterator[Row]:
    """Train one arm: losses of held-out text, concentration and place of the weights, seconds, and curves of some."""
    yield from _descended(job.arm, SIZES[job.profile]) if isinstance(job.arm, Toy) else _trained(job)


def _trained(job: Job) -> Iterator[Row]:
    assert job.rate is not None
    arm, size = job.arm, SIZES[job.profile]
    size = replace(size, steps=size.longer) if arm.longer else size
    ids, sources = training_rows(job.seed, size.steps)
    model = llama(context=LENGTH, seed=job.seed)
    rule, burn_in = rule_for(arm.name, size.steps, job.seed)
    weighted = Weighted(model, sequence_losses, rule)
    shares: list[Tensor] = []  # of the weight, by source, in each batch

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        value = weighted(model, batch)
        weights = weighted.last if weighted.last is not None else torch.full((BATCH,), 1 / BATCH)
        shares.append(torch.zeros(len(SHARES)).index_add_(0, batch[1], weights))
        return value

    followed = job.seed == SEEDS[0] and arm.name in (*ARMS, TWICE)
    some = {domain: windows(domain, "validation", LENGTH, count=min(32, size.windows)) for domain in DOMAINS}
    began = time.process_time()  # of this process: a training has it to itself
    history = train(
        model,
        batches(ids, sources, batch_size=BATCH, shuffle=False),
        loss,
        recipe_for(size, job.rate, job.seed),
        progress=False,
        evaluate=(lambda m: together(m, some)) if followed else None,
        evaluate_every=max(1, size.steps // 8),
    )
    seconds = time.process_time() - began
    weighted.close()
    held_out = {domain: windows(domain, job.split, LENGTH, count=size.windows) for domain in DOMAINS}
    found = together(model, held_out)
    if job.split != "test":
        yield Row("bits per byte", found["bits per byte"])
        return
    yield from (Row(name, value) for name, value in found.items())
    late = weighted.history()[burn_in:]
    concentration = np.array([entry["concentration"] for entry in late])
    training = {
        "share within 2": float((concentration <= 2 + 1e-6).mean()),
        "largest concentration": float(concentration.max()),
        "mean concentration": float(concentration.mean()),
        "effective": float(np.mean([entry["effective"] for entry in late])),
        "cpu seconds": seconds,
    }
    if job.seed == SEEDS[0]:
        training["rate"] = job.rate
    where = at(TRAINING, arm.longer)
    yield from (Row(name, value, condition=where) for name, value in training.items())
    for name, share in zip(SHARES, torch.stack(shares[burn_in:]).mean(0).tolist(), strict=True):
        yield Row("share of the weight", share, name, condition=where)
    if followed:
        yield from curves(history, "", max(1, size.steps // 60), at("on the way", arm.longer))


def together(model: nn.Module, text: dict[str, tuple[Tensor, list[str]]]) -> dict[str, float]:
    """Bits per byte of each corpus and, byte for byte, of all."""
    found = {domain: measured(model, *rows) for domain, rows in text.items()}
    values = {f"bits per byte, {domain}": one.value for domain, one in found.items()}
    bits, counts = (sum(float(getattr(one, name).sum()) for one in found.values()) for name in ("bits", "counts"))
    return {"bits per byte": bits / counts, **values}


def stages(run: Run) -> Stages:
    """Rates of the grid, the extra rates, then the toy and every arm; what does better at an extra rate runs at both."""
    every = arms(run.profile)
    language = [arm for arm in every if isinstance(arm, Arm)]
    rates: dict[Any, float | None] = yield from run.tuning(language)
    if run.profile == "study":
        long = [Arm(name, longer) for longer in EXTRA for name in LONG]
        yield [run.job(arm, TUNING_SEED, lr, "validation") for arm in long for lr in EXTRA[arm.longer]]
        best = [Arm(finest(run.results, arm.name, arm.longer), arm.longer) for arm in long]
        every += [arm for arm in best if arm not in every]
    rates |= {arm: FIXED[arm.name] for arm in every if arm.name in FIXED}
    rates[Arm(TWICE)] = 2 * rates[Arm("uniform")]  # type: ignore[operator]
    yield [run.job(arm, seed, rates.get(arm)) for arm in every for seed in seeds(arm, run.profile)]


STUDY = Study(
    slug="loss_reweighting",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=seeds,
    data=lambda: {domain: domain_hash(domain) for domain in DOMAINS},
    rates=RATES,
    tuned_as=tuned_as,
    score=lambda values: -values["bits per byte"],
    stages=stages,
    kind=lambda arm: f"toy, {arm.name}" if isinstance(arm, Toy) else tuned_as(arm).name,
)
