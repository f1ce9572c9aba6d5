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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from refimpl.core.errors import CalibrationError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.losses import Weighted, sequence_losses
from refimpl.lab.data.domains import domain_hash, llama, measured, windows
from refimpl.lab.measure.statistics import Interval, seeds_ratio, t_interval
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.records import Record, Results
from refimpl.training_data.loss_reweighting import Focal, LossReweighting, OnLoss, Permuted, Thinned

DEPENDS = [
    "refimpl.training_data.loss_reweighting",
    "refimpl.core.train.losses",
    "refimpl.core.train.loop",
    "refimpl.lab.data.domains",
    "refimpl.lab.models.lstm",
    "refimpl.lab.data.text",
]

SLUG = "loss_reweighting"
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 0
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
"""What is trained for longer, too."""
EXTRA = {False: (2.8e-3, 5.7e-3), True: (5.7e-3, 1.1e-2, 1.6e-2)}
"""More rates for these arms, in the short and in the longer run: between those of the grid, and beyond its end."""
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
    """What a profile spends: updates, short and long, windows measured for each corpus, draws and steps of the toy,
    seeds.
    """

    steps: int
    longer: int
    windows: int
    draws: int
    toy_steps: int
    seeds: tuple[int, ...]


SIZES = {
    "study": Size(80, 176, 128, 20, 150, SEEDS),
    "live": Size(60, 120, 32, 5, 150, SEEDS[:1]),
    "quick": Size(5, 7, 4, 3, 10, SEEDS[:1]),
}


# -- the rules, written before the run --


def _verdict(good: Sequence[bool]) -> Verdict:
    return Verdict.HOLDS if all(good) else Verdict.PARTLY if any(good) else Verdict.DOES_NOT_HOLD


def _worst(gaps: Sequence[Interval]) -> Interval:
    return max(gaps, key=lambda gap: gap.high)


def _bits(results: Results, arm: str, text: str = TEXT) -> np.ndarray:
    return np.array([results.values(arm, text, seed, metric="bits per byte")[""] for seed in SEEDS])


def _below(arm: str, controls: Sequence[str], control: str, quantity: str) -> Callable[[Results], Outcome]:
    """Bits per byte of an arm over that of each control: good where all of the interval lies below 1."""

    def outcome(results: Results) -> Outcome:
        gaps = [seeds_ratio(_bits(results, arm), _bits(results, other)) for other in controls]
        label = f"worst of {len(gaps)}: {quantity}" if len(gaps) > 1 else quantity
        return Outcome.of(
            _worst(gaps), _verdict([gap.high < 1 for gap in gaps]), scale=LM_SCALE, control=control, quantity=label
        )

    return outcome


def at(condition: str, longer: bool) -> str:
    """A condition of the records, told apart for the longer run.

    Example:
        >>> at(TEXT, False), at(TEXT, True)
        ('held-out text', 'held-out text, longer')
    """
    return f"{condition}, longer" if longer else condition


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


_LONG_SCALE = LM_SCALE.replace("0.3M tokens", "0.7M tokens")


def _both(
    longer: bool, plain_finest: bool, shapes_finest: bool, scale: str, control: str, quantity: str
) -> Callable[[Results], Outcome]:
    """Bits per byte of LinUpper and of Quadratic over the plain mean's, each at its best rate of the grid or of all."""

    def outcome(results: Results) -> Outcome:
        def bits(arm: str, all_rates: bool) -> np.ndarray:
            name = finest(results, arm, longer) if all_rates else arm
            return _bits(results, name, at(TEXT, longer))

        plain = bits("uniform", plain_finest)
        gaps = [seeds_ratio(bits(arm, shapes_finest), plain) for arm in LONG[1:]]
        return Outcome.of(
            _worst(gaps),
            _verdict([gap.high < 1 for gap in gaps]),
            scale=scale,
            control=control,
            quantity=f"worst of 2: {quantity}",
        )

    return outcome


def _place(outliers: float, r: float | None) -> str:
    return f"toy, {outliers:.0%} outliers" + ("" if r is None else f", r = {r:g}")


def _distances(results: Results, arm: str, outliers: float) -> np.ndarray:
    place = _place(outliers, None if arm.startswith("uniform") else R)
    return np.array(list(results.values(arm, place, metric="distance").values()))


_TOY_SCALE = "least squares, 500 samples, 50 dimensions, 150 steps, 20 draws; the paper: a toy of this kind"


def _toy(pairs: Sequence[tuple[str, str, float]], control: str, quantity: str) -> Callable[[Results], Outcome]:
    """Squared distance to the solution, first over second of each pair at a share of outliers."""

    def outcome(results: Results) -> Outcome:
        gaps = [seeds_ratio(_distances(results, a, o), _distances(results, b, o)) for a, b, o in pairs]
        return Outcome.of(
            _worst(gaps),
            _verdict([gap.high < 1 for gap in gaps]),
            scale=_TOY_SCALE,
            control=control,
            quantity=f"worst of {len(gaps)}: {quantity}",
        )

    return outcome


def _low_losses(results: Results) -> Outcome:
    gaps = [seeds_ratio(_bits(results, arm), _bits(results, "extremes")) for arm in ("linupper", "quadratic")]
    return Outcome.of(
        _worst(gaps),
        _verdict([gap.high < 1 for gap in gaps]),
        scale=LM_SCALE,
        control="Extremes",
        quantity="worst of 2: bits per byte, shape / Extremes",
    )


def _bound(results: Results) -> Outcome:
    share = t_interval([results.values("linupper", TRAINING, seed, metric="share within 2")[""] for seed in SEEDS])
    verdict = Verdict.HOLDS if share.low > 0.95 else Verdict.PARTLY if share.low > 0.5 else Verdict.DOES_NOT_HOLD
    return Outcome.of(
        share,
        verdict,
        scale=LM_SCALE,
        control="none: a condition, not a comparison",
        quantity="share of batches in which no weight is above 2/M",
    )


_OVER = "t interval over five seeds of the logarithm"
_DRAWS = "t interval over twenty draws of the logarithm"
_BITS = "Bits per byte of test text, all corpora together"
CLAIMS = [
    Claim(
        "rw-linupper",
        "LinUpper gives a better language model than the plain mean at equal steps.",
        "lower held-out perplexity from 124M to 7B; no table was available to us",
        _below(
            "linupper",
            ("uniform", TWICE),
            "the plain mean, its own rate and twice it",
            "bits per byte, LinUpper / uniform",
        ),
        f"{_BITS}, LinUpper / uniform at its own best rate and / uniform at twice that rate, {_OVER}: holds if both "
        "lie below 1, partly if one does.",
    ),
    Claim(
        "rw-quadratic",
        "Quadratic gives a better language model than the plain mean at equal steps.",
        "lower held-out perplexity for GPT-2; no table was available to us",
        _below(
            "quadratic",
            ("uniform", TWICE),
            "the plain mean, its own rate and twice it",
            "bits per byte, Quadratic / uniform",
        ),
        f"{_BITS}, Quadratic / uniform at its own best rate and / uniform at twice that rate, {_OVER}: holds if both "
        "lie below 1, partly if one does.",
    ),
    Claim(
        "rw-signal",
        "What helps is which sequences get the weight, not that weights are unequal.",
        "not reported",
        _below(
            "linupper",
            ("linupper shuffled", "smaller batch"),
            "the same weights shuffled; a smaller batch",
            "bits per byte, LinUpper / control",
        ),
        f"{_BITS}, LinUpper / LinUpper's weights on sequences drawn at random, and / a batch as small as its weights "
        f"are worth, {_OVER}: holds if both lie below 1, partly if one does.",
    ),
    Claim(
        "rw-capped",
        "Weight that grows up to the highest losses does worse than weight that is capped at the middle.",
        "pure up-weighting is weaker; no table was available to us",
        _below(
            "linupper",
            ("upper", "focal", "soft-max of losses"),
            "rules that rise to the highest loss",
            "bits per byte, LinUpper / rising rule",
        ),
        f"{_BITS}, LinUpper / upper, / focal (square of the loss), / soft-max of losses, {_OVER}: holds if all three "
        "lie below 1, partly if one or two do.",
    ),
    Claim(
        "rw-low-losses",
        "The common factor of what helps is that low losses count less.",
        "Extremes, which favours both ends, is weaker; no table was available to us",
        _low_losses,
        f"{_BITS}, LinUpper / Extremes and Quadratic / Extremes, {_OVER}: holds if both lie below 1, partly if one "
        "does.",
    ),
    Claim(
        "rw-bound",
        "The condition of the paper's analysis, no weight above 2/M, is met in training.",
        "assumed: LinUpper meets it if half of the batch lies in the upper half of the range",
        _bound,
        "Batches after burn-in of LinUpper's language model, share in which the largest weight is at most 2/M, "
        "t interval over five seeds: holds if it lies above 0.95, partly if above 0.5.",
    ),
    Claim(
        "rw-toy",
        "On least squares with redundant samples LinUpper converges faster than the plain mean.",
        "a figure: LinUpper fastest",
        _toy(
            [("linupper", other, 0.0) for other in ("uniform", "uniform, twice the step", "uniform, matched norm")],
            "the plain mean with three step sizes",
            "squared distance, LinUpper / uniform",
        ),
        f"No outliers, r = 0.4, squared distance after 150 steps, LinUpper / uniform, / uniform with twice the step, / "
        f"uniform with gradients as long as LinUpper's, {_DRAWS}: holds if all three lie below 1, partly if one or two "
        "do.",
    ),
    Claim(
        "rw-toy-order",
        "There, Quadratic is second and also beats the plain mean.",
        "a figure: LinUpper fastest, Quadratic next",
        _toy(
            [("linupper", "quadratic", 0.0), ("quadratic", "uniform", 0.0)],
            "the next in the order",
            "squared distance, better / worse in the paper's order",
        ),
        f"No outliers, r = 0.4, squared distance after 150 steps, LinUpper / Quadratic and Quadratic / uniform, "
        f"{_DRAWS}: holds if both lie below 1, partly if one does.",
    ),
    Claim(
        "rw-outliers",
        "As the highest losses are capped, outliers do no harm to LinUpper's lead.",
        "the motive of the cap; not measured with outliers",
        _toy(
            [("linupper", "uniform", share) for share in (0.02, 0.1)],
            "the plain mean, same step",
            "squared distance with outliers, LinUpper / uniform",
        ),
        f"2 and 10 % outliers, r = 0.4, squared distance after 150 steps, LinUpper / uniform, {_DRAWS}: holds if both "
        "lie below 1, partly if one does.",
    ),
    Claim(
        "rw-finer",
        "LinUpper and Quadratic lead although the plain mean has more learning rates to choose from.",
        "not reported",
        _both(
            False,
            True,
            False,
            LM_SCALE,
            "the plain mean with five rates to choose from, against three",
            "bits per byte, shape / uniform, finer rates",
        ),
        f"{_BITS}, LinUpper and Quadratic, each at the best of three rates, / uniform at the best of five, all chosen "
        f"on validation text, {_OVER}: holds if both lie below 1, partly if one does.",
    ),
    Claim(
        "rw-longer",
        "The lead over the plain mean is still there after 2.2 times the steps.",
        "lower held-out perplexity after 20 000 steps of GPT-2; no table was available to us",
        _both(
            True,
            False,
            False,
            _LONG_SCALE,
            "the plain mean, as long, at its own rate",
            "bits per byte after 176 steps, shape / uniform",
        ),
        "Bits per byte of test text after 176 steps, all corpora together, LinUpper / uniform and Quadratic / uniform, "
        f"rates chosen again at that length, {_OVER}: holds if both lie below 1, partly if one does.",
    ),
    Claim(
        "rw-wider",
        "That lead is still there if every arm may choose from a wider grid of learning rates.",
        "not reported",
        _both(
            True,
            True,
            True,
            _LONG_SCALE,
            "the plain mean, as long, with as many rates to choose from",
            "bits per byte after 176 steps, shape / uniform, six rates",
        ),
        "Bits per byte of test text after 176 steps, all corpora together, LinUpper / uniform and Quadratic / uniform, "
        "each at the best of six rates on validation text, up to twice the highest of the grid, "
        f"{_OVER}: holds if both lie below 1, partly if one does.",
    ),
]


# -- the toy --

OUTLIERS = (0.0, 0.02, 0.1)
TEMPERATURES = (0.4, 1.0, 10.0)
TOY_RATE = 0.02
TOY_SHAPES = ("linupper", "quadratic", "extremes", "upper")
_UNIFORM = ("uniform", "uniform, twice the step", "uniform, matched norm")


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


@dataclass(frozen=True)
class ToyJob:
    """One arm of the toy; no temperature for the plain means."""

    arm: str
    outliers: float
    r: float | None
    size: Size

    @property
    def place(self) -> str:
        """Its condition in the records."""
        return _place(self.outliers, self.r)


def toys(size: Size, temperatures: Sequence[float] = TEMPERATURES) -> list[ToyJob]:
    """All arms of the toy.

    Example:
        >>> len(toys(SIZES["study"]))
        45
    """
    plain = [ToyJob(arm, o, None, size) for o in OUTLIERS for arm in _UNIFORM]
    return plain + [ToyJob(arm, o, r, size) for o in OUTLIERS for r in temperatures for arm in TOY_SHAPES]


def descended(job: ToyJob) -> list[Record]:
    """Run an arm: distances draw by draw at the end, and the mean over draws on the way."""
    path = toy(job.arm, job.outliers, R if job.r is None else job.r, job.size.draws, job.size.toy_steps)
    records = [
        Record(SLUG, job.arm, job.place, 0, str(draw), "distance", value)
        for draw, value in enumerate(path[-1].tolist())
    ]
    for step in range(0, len(path), max(1, job.size.toy_steps // 30)):
        mean = float(path[step].mean())
        records.append(Record(SLUG, job.arm, f"{job.place}, on the way", 0, str(step), "mean distance", mean))
    return records


# -- the language model --


def training_rows(seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """What a seed trains on, in order; no row of a corpus twice.

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


@dataclass(frozen=True)
class Job:
    """One training of the language model; `split` is "validation" to choose a rate."""

    arm: str
    seed: int
    lr: float
    size: Size
    split: str = "test"
    longer: bool = False

    def at(self, condition: str) -> str:
        """Its condition in the records."""
        return at(condition, self.longer)


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
    base = "uniform" if arm == TWICE else arm.split(", rate ")[0]
    return ARMS[base](burn_in, seed), burn_in


def trained(job: Job) -> list[Record]:
    """Train one arm and measure it."""
    size = replace(job.size, steps=job.size.longer) if job.longer else job.size
    ids, sources = training_rows(job.seed, size.steps)
    model = llama(context=LENGTH, seed=job.seed)
    rule, burn_in = rule_for(job.arm, size.steps, job.seed)
    weighted = Weighted(model, sequence_losses, rule)
    shares: list[Tensor] = []  # of the weight, by source, in each batch

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        value = weighted(model, batch)
        weights = weighted.last if weighted.last is not None else torch.full((BATCH,), 1 / BATCH)
        shares.append(torch.zeros(len(SHARES)).index_add_(0, batch[1], weights))
        return value

    followed = job.seed == SEEDS[0] and job.arm in (*ARMS, TWICE)
    some = {domain: windows(domain, "validation", LENGTH, count=min(32, size.windows)) for domain in DOMAINS}
    began = time.process_time()  # of this process: a training has it to itself
    history = train(
        model,
        batches(ids, sources, batch_size=BATCH, shuffle=False),
        loss,
        recipe_for(size, job.lr, job.seed),
        progress=False,
        evaluate=(lambda m: _together(m, some)) if followed else None,
        evaluate_every=max(1, size.steps // 8),
    )
    seconds = time.process_time() - began
    weighted.close()
    held_out = {domain: windows(domain, job.split, LENGTH, count=size.windows) for domain in DOMAINS}
    found = _together(model, held_out)
    results = Results("", {"paper": SLUG})

    def record(condition: str, metric: str, value: float, unit: str = "") -> None:
        results.add(Record(SLUG, job.arm, job.at(condition), job.seed, unit, metric, value))

    for name, value in found.items():
        record(TEXT, name, value)
    late = weighted.history()[burn_in:]
    concentration = np.array([entry["concentration"] for entry in late])
    record(TRAINING, "share within 2", float((concentration <= 2 + 1e-6).mean()))
    record(TRAINING, "largest concentration", float(concentration.max()))
    record(TRAINING, "mean concentration", float(concentration.mean()))
    record(TRAINING, "effective", float(np.mean([entry["effective"] for entry in late])))
    record(TRAINING, "cpu seconds", seconds)
    for name, share in zip(SHARES, torch.stack(shares[burn_in:]).mean(0).tolist(), strict=True):
        record(TRAINING, "share of the weight", share, name)
    if followed:
        results.add_history(job.arm, job.at("on the way"), job.seed, history, every=max(1, size.steps // 60))
    return list(results.records())


def _together(model: nn.Module, text: dict[str, tuple[Tensor, list[str]]]) -> dict[str, float]:
    """Bits per byte of each corpus and, byte for byte, of all."""
    found = {domain: measured(model, *rows) for domain, rows in text.items()}
    values = {f"bits per byte, {domain}": one.value for domain, one in found.items()}
    bits, counts = (sum(float(getattr(one, name).sum()) for one in found.values()) for name in ("bits", "counts"))
    return {"bits per byte": bits / counts, **values}


def _tune(results: Results, size: Size) -> dict[tuple[str, bool], float]:
    """The rate of every arm, by its name and whether it is the longer run: fewest bits per byte on validation text.

    Arms that do better at an extra rate are in it twice, the second time by the name that `finest` gives.
    """
    tuned = [(arm, longer) for longer in (False, True) for arm in (LONG if longer else ARMS)]
    jobs = [Job(arm, TUNING_SEED, lr, size, "validation", longer) for arm, longer in tuned for lr in RATES]
    jobs += [
        Job(arm, TUNING_SEED, lr, size, "validation", longer)
        for longer, extra in EXTRA.items()
        for arm in LONG
        for lr in extra
    ]
    todo = [job for job in jobs if not results.has(f"{job.arm} at {job.lr:g}", job.at(VALIDATION), TUNING_SEED)]
    with tqdm(total=len(todo), desc=f"{SLUG}: learning rates", unit="training") as bar:
        for job, records in in_processes(trained, todo):
            (value,) = (r.value for r in records if r.condition == job.at(TEXT) and r.metric == "bits per byte")
            arm, place = f"{job.arm} at {job.lr:g}", job.at(VALIDATION)
            results.add(Record(SLUG, arm, place, TUNING_SEED, "", "bits per byte", value))
            results.save()
            bar.update()
    rates = {}
    for arm, longer in tuned:
        scores = {lr: validated(results, arm, lr, longer) for lr in RATES}
        rates[arm, longer] = min(scores, key=scores.__getitem__)
    named = {(f"{arm}, rate {lr:g}", longer): lr for longer, extra in EXTRA.items() for arm in LONG for lr in extra}
    best = [(finest(results, arm, longer), longer) for longer in EXTRA for arm in LONG]
    return rates | {key: named[key] for key in best if key in named}


def run(out: Path, profile: str = "study") -> Results:
    """Run every arm that the results file lacks, and judge the claims.

    Args:
        out: results file; an interrupted run goes on where it stopped, training by training.
        profile: "study" (recorded; the rules must be committed), "live" or "quick".
    """
    size = SIZES[profile]
    data = {domain: domain_hash(domain) for domain in DOMAINS}
    results = Results.start(
        out, paper=SLUG, study=__name__, depends=DEPENDS, data=data, profile=profile, provisional=profile != "study"
    )
    workers = 1 if profile == "quick" else None
    todo_toys = [
        job
        for job in toys(size, TEMPERATURES[:1] if profile == "quick" else TEMPERATURES)
        if not results.has(job.arm, job.place)
    ]
    with tqdm(total=len(todo_toys), desc=f"{SLUG}: toy", unit="arm") as bar:
        for _, records in in_processes(descended, todo_toys, workers):
            results.add(*records)
            bar.update()
    results.save()
    rates = {(arm, False): RATES[1] for arm in ARMS} | {(arm, True): RATES[1] for arm in LONG}
    if profile == "study":
        rates = _tune(results, size)
    rates[TWICE, False] = 2 * rates["uniform", False]
    rates |= {(arm, False): lr for arm, lr in FINER.items()}
    rates |= {(arm, False): rates[variant.shape, False] for arm, variant in VARIANTS.items()}
    if profile == "quick":
        few = ("uniform", "linupper", "smaller batch", *list(FINER)[:1], "linupper, r = 10", "linupper, burn-in 0%")
        rates = {key: rates[key] for key in [(arm, False) for arm in few] + [("linupper", True)]}
    jobs = [Job(arm, seed, lr, size, longer=longer) for seed in size.seeds for (arm, longer), lr in rates.items()]
    todo = [job for job in jobs if not results.has(job.arm, job.at(TEXT), job.seed)]
    with tqdm(total=len(todo), desc=f"{SLUG} ({profile})", unit="training") as bar:
        for job, records in in_processes(trained, todo, workers):
            results.add(*records)
            if job.seed == SEEDS[0]:
                results.add(Record(SLUG, job.arm, job.at(TRAINING), job.seed, "", "rate", job.lr))
            results.save()
            bar.update()
    if profile == "study":
        results.claims = judge(results, CLAIMS)
    results.save()
    return results
