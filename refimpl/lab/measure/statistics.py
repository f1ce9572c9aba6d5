"""Intervals, and the smallest effect a study could have seen.

Two arms read the same documents, so the difference is taken document by document before anything is
resampled: most of the spread between documents is shared by both arms and drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from refimpl.core.arguments import checked, shown
from refimpl.core.errors import OptionError, reason
from refimpl.lab.measure.metrics import Perplexity

_LEVEL = 0.05
_POWER = 0.80
_BLOCK = 2**22  # resampled entries held at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Attributes:
        estimate, low, high: in the unit of the statistic.
        mde: smallest effect that the study could have detected (80 % power, two-sided 5 %), as a distance from "no
            effect": 0.02 for a ratio means that 1.02 or 0.98 would have been noticed.
        n: number of independent units.
    """

    estimate: float
    low: float
    high: float
    mde: float
    n: int

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def ratio(gap: np.ndarray) -> np.ndarray:
    """Ratio of two perplexities from the gap of their mean negative log-likelihoods; 1 is no effect.

    Example:
        >>> float(ratio(np.array(0.0)))
        1.0
    """
    return np.exp(gap)


def difference(gap: np.ndarray) -> np.ndarray:
    """The mean difference itself; 0 is no effect.

    Example:
        >>> float(difference(np.array(0.5)))
        0.5
    """
    return gap


@checked("a", "b", "weights")
def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    n: int = 10_000,
    seed: int = 0,
    statistic: Callable[[np.ndarray], np.ndarray] = ratio,
) -> Interval:
    """How arm a differs from arm b on the same units, with a percentile interval from resampled units.

    The estimate is ``statistic(sum(a - b) / sum(weights))``. With sums of nll and counts of tokens per
    document and the default statistic that is perplexity a / perplexity b. The percentiles are widened for few
    units (the "expanded percentile interval" of Hesterberg, "What Teachers Should Know About the Bootstrap",
    2015): the plain ones cover too little below about thirty.

    Args:
        a, b: [units] totals of each unit, in the same order.
        weights: [units] size of each unit (tokens); one each by default, for scores that are means already.
        n: resamples.
        seed: of the resampling.
        statistic: monotone function of the mean difference: `ratio` or `difference`.

    Raises:
        OptionError: shapes differ, fewer than two units, values that are not finite, weights that are not
            positive.

    Example:
        >>> print(paired_bootstrap([10.0, 21.0, 30.5], [11.0, 22.0, 31.5], weights=[10, 20, 30]))
        0.9512 [0.9048, 0.9672]
    """
    for name, value, least in (("n", n, 1), ("seed", seed, 0)):
        if value < least:
            raise OptionError(f"{name}={value}: use {least} or more")
    a, b = _numbers("a", a), _numbers("b", b)
    weights = np.ones_like(a) if weights is None else _numbers("weights", weights)
    if a.ndim != 1 or a.shape != b.shape or a.shape != weights.shape:
        raise OptionError(
            f"a, b and weights have shapes {a.shape}, {b.shape} and {weights.shape}; give one value per unit in each"
        )
    units = len(a)
    if units < 2:
        raise OptionError(f"there are {units} units; an interval needs at least 2")
    for name, values in (("a", a), ("b", b)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise OptionError(f"{name}[{bad[0]}] is {values[bad[0]]:g}; leave out the arm, not the unit")
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise OptionError("weights must be positive: a unit without tokens says nothing, leave it out")

    gap = a - b
    rng = np.random.default_rng(seed)
    try:
        means = np.empty(n)
    except MemoryError as full:
        raise OptionError(f"n={n}: so many resamples do not fit into memory; 10,000 are enough") from full
    step = max(1, _BLOCK // units)
    for start in range(0, n, step):
        rows = rng.integers(units, size=(min(step, n - start), units))
        means[start : start + len(rows)] = gap[rows].sum(1) / weights[rows].sum(1)

    widened = np.sqrt(units / (units - 1)) * stats.t.ppf(1 - _LEVEL / 2, units - 1)
    tail = stats.norm.cdf(-widened)
    ends = np.asarray(statistic(np.quantile(means, [tail, 1 - tail])))
    if ends.shape != (2,) or ends.dtype.kind != "f":
        raise OptionError(f"statistic returned {shown(ends)} for two numbers; return a number for each")
    low, high = np.sort(ends)
    error = means.std() * np.sqrt(units / (units - 1))
    return _interval(gap.sum() / weights.sum(), low, high, error, units, statistic)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name}={shown(values)}: use a number for each unit ({reason(error)})") from error


@checked()
def t_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Student's t interval of a mean, for a handful of seeds (three resampled seeds would cover 74 %, not 95).

    Raises:
        OptionError: fewer than two values, or values that are not finite.

    Example:
        >>> print(t_interval([1.0, 1.2, 0.9, 1.1, 1.0]))
        1.04 [0.8984, 1.182]
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise OptionError(f"values is {values.tolist()}; a t interval needs at least 2 finite numbers")
    error = values.std(ddof=1) / np.sqrt(len(values))
    half = stats.t.ppf(1 - _LEVEL / 2, len(values) - 1) * error
    mean = values.mean()
    return _interval(mean, mean - half, mean + half, error, len(values), difference)


@checked()
def seeds_ratio(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Interval:
    """Ratio of two arms over the same seeds: the geometric mean of a / b with Student's t interval of its logarithm.

    Args:
        a, b: [seeds] positive numbers, paired by seed.

    Raises:
        OptionError: different lengths, fewer than two seeds, or values that are not positive.

    Example:
        >>> print(seeds_ratio([1.0, 1.1, 0.9], [2.0, 2.1, 2.0]))
        0.4903 [0.4041, 0.5948]
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or not ((a > 0) & (b > 0)).all():
        raise OptionError(f"a={a.tolist()} and b={b.tolist()}: give positive numbers, one of each per seed")
    logs = t_interval(np.log(a) - np.log(b))
    error = (logs.high - logs.estimate) / stats.t.ppf(1 - _LEVEL / 2, len(a) - 1)
    return _interval(logs.estimate, np.exp(logs.low), np.exp(logs.high), error, len(a), ratio)


def _interval(
    mean: float, low: float, high: float, error: float, units: int, statistic: Callable[[np.ndarray], np.ndarray]
) -> Interval:
    seen = (stats.t.ppf(1 - _LEVEL / 2, units - 1) + stats.t.ppf(_POWER, units - 1)) * error
    # On the statistic's own scale, on the side where it moves more: exp(x) - 1 > 1 - exp(-x).
    estimate, plus, minus, zero = (float(statistic(np.asarray(x))) for x in (mean, seen, -seen, 0.0))
    return Interval(estimate, float(low), float(high), max(abs(plus - zero), abs(minus - zero)), units)


def compare(a: Perplexity, b: Perplexity) -> Interval:
    """Perplexity a / perplexity b on the same documents, resampling documents.

    Raises:
        OptionError: the two were measured on different documents or different numbers of tokens.

    Example:
        >>> import numpy as np
        >>> counts, units = np.array([10, 20, 30]), ["x", "y", "z"]
        >>> a = Perplexity(2.8, np.array([10.0, 21.0, 30.5]), counts, units)
        >>> b = Perplexity(2.9, np.array([11.0, 22.0, 31.5]), counts, units)
        >>> round(compare(a, b).estimate, 4)
        0.9512
    """
    a, b = a.by_unit(), b.by_unit()
    if a.units != b.units or not np.array_equal(a.counts, b.counts):
        raise OptionError("a and b were measured on different tokens; measure both arms on one token set")
    return paired_bootstrap(a.nll, b.nll, a.counts)
