"""Claims as data: a statement of a paper, and a rule that is a value, applies itself to records and prints its own words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal, Protocol

import numpy as np

from refimpl.core.errors import OptionError
from refimpl.lab.measure.statistics import Interval, compare, difference, paired_bootstrap, seeds_ratio, t_interval
from refimpl.lab.study.records import Results


class Verdict(str, Enum):
    """Whether a claim was confirmed."""

    HOLDS = "holds"
    PARTLY = "partly"
    DOES_NOT_HOLD = "does not hold here"
    CANNOT_BE_TESTED = "cannot be tested at this scale"


@dataclass(frozen=True)
class Outcome:
    """Verdict and numbers that a rule derives from the records.

    Attributes:
        verdict: by the claim's rule.
        estimate, low, high: our number and its 95 % interval.
        mde: smallest effect the study could have seen, as a distance from "no effect".
        scale: what was measured where, against what the paper did: "135M, 4 k tokens; the paper: 8B".
        control: the arm the claim is measured against.
        quantity: what the number is: "perplexity with EoRA / with plain SVD".
    """

    verdict: Verdict
    estimate: float
    low: float
    high: float
    mde: float
    scale: str
    control: str
    quantity: str

    @classmethod
    def of(cls, interval: Interval, verdict: Verdict, *, scale: str, control: str, quantity: str) -> Outcome:
        """An outcome whose numbers are those of an interval.

        Example:
            >>> interval = Interval(0.97, 0.95, 0.99, mde=0.03, n=60)
            >>> Outcome.of(interval, Verdict.HOLDS, scale="135M", control="SVD", quantity="ratio").low
            0.95
        """
        return cls(verdict, interval.estimate, interval.low, interval.high, interval.mde, scale, control, quantity)


@dataclass(frozen=True)
class Claim:
    """A statement of a paper and the rule by which it is judged; written and committed before the study runs.

    Attributes:
        id: unique in the book, e.g. "eora-beats-svd".
        text: the claim in one sentence.
        paper_number: the paper's number, with its scale.
        rule: applied to the records, returns the outcome. `Every` prints its own words.
        words: the rule in words, complete enough to be applied by hand; needed where the rule is a plain function.
        paper_effect: the paper's effect as a distance from "no effect", in the unit of `Outcome.mde` (0.1 for a ratio
            of 0.9). If the rule finds nothing and the study could not have seen an effect of that size, the verdict is
            "cannot be tested" instead of "does not hold". None where the paper gives no size.

    Raises:
        OptionError: a plain function as the rule, without words.
    """

    id: str
    text: str
    paper_number: str
    rule: Callable[[Results], Outcome]
    words: str = ""
    paper_effect: float | None = None

    def __post_init__(self) -> None:
        if not self.words and type(self.rule).__str__ is object.__str__:
            raise OptionError(f"claim {self.id!r}: its rule is a function, so words= must say what it does")


def judge(results: Results, claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """Apply the rules to the records; store the answer with ``results.claims = judge(results, CLAIMS)``.

    Raises:
        OptionError: two claims share an id, a needed arm was not recorded, or an estimate lies outside its interval.

    Example:
        >>> results = Results("demo.json", header={})
        >>> outcome = Outcome(Verdict.DOES_NOT_HOLD, 0.99, 0.96, 1.02, 0.03, "135M; the paper: 8B", "SVD", "ratio")
        >>> claim = Claim("demo", "It helps.", "0.9 at 8B", lambda results: outcome, "holds if high < 1", 0.02)
        >>> judge(results, [claim])[0]["verdict"]
        'cannot be tested at this scale'
    """
    rows: list[dict[str, Any]] = []
    for claim in claims:
        if claim.id in {row["id"] for row in rows}:
            raise OptionError(f"claim id {claim.id!r} is used twice; ids must be unique")
        outcome = claim.rule(results)
        if not outcome.low <= outcome.estimate <= outcome.high:
            raise OptionError(
                f"claim {claim.id!r}: estimate {outcome.estimate} is outside [{outcome.low}, {outcome.high}]"
            )
        verdict = Verdict(outcome.verdict)
        blind = claim.paper_effect is not None and outcome.mde > abs(claim.paper_effect)
        if blind and verdict is Verdict.DOES_NOT_HOLD:  # an effect that was found could be seen
            verdict = Verdict.CANNOT_BE_TESTED
        numbers = {name: float(f"{getattr(outcome, name):.4g}") for name in ("estimate", "low", "high", "mde")}
        rows.append(
            {
                "id": claim.id,
                "text": claim.text,
                "paper_number": claim.paper_number,
                "paper_effect": claim.paper_effect,
                "rule": claim.words or str(claim.rule),
                "verdict": verdict.value,
                **numbers,
                "quantity": outcome.quantity,
                "scale": outcome.scale,
                "control": outcome.control,
            }
        )
    return rows


# -- rules as values --


class Arm(Protocol):
    """Something that is measured; a frozen dataclass.

    Attributes:
        name: of the arm in the records.
        condition: under which its records are kept.
    """

    @property
    def name(self) -> str: ...
    @property
    def condition(self) -> str: ...


@dataclass(frozen=True)
class Place:
    """An arm known by its name and condition alone."""

    name: str
    condition: str = ""


def over_seeds(results: Results, arm: Arm, metric: str, seeds: Sequence[int]) -> np.ndarray:
    """A metric of an arm, one entry for each seed.

    Example:
        >>> from refimpl.lab.study.records import Record
        >>> results = Results("demo.json", {"paper": "demo"})
        >>> results.add(*(Record("demo", "dense", "", seed, "", "accuracy", 0.9 + seed / 100) for seed in (1, 2)))
        >>> over_seeds(results, Place("dense"), "accuracy", (1, 2)).round(2).tolist()
        [0.91, 0.92]
    """
    return np.array([results.values(arm.name, arm.condition, seed, metric=metric)[""] for seed in seeds])


@dataclass(frozen=True)
class Gap:
    """Arm a against arm b on one metric. A study whose numbers are not single records overrides `numbers`.

    Attributes:
        a, b: the arms, paired by seed, document, item or image. Without b, the mean of a over seeds ("difference").
        metric: in the records ("nll" and "tokens" for perplexities).
        kind: "difference" (t interval over seeds), "ratio" (the same of logarithms), "perplexity" (ratio, bootstrap over
            documents), "units" (difference of means, bootstrap over the units of one seed) or "mean ratio" (mean over seeds,
            without an interval; for a condition of `Provided`).
        seeds: which of them; for "perplexity" and "units" the first counts.

    Raises:
        OptionError: a kind that compares, without b.

    Example:
        >>> print(Gap(Place("pruned", "mnist"), Place("small", "mnist")), "/", Gap(Place("pruned")))
        pruned minus small (mnist) / pruned
        >>> Gap(Place("pruned"), kind="ratio")
        Traceback (most recent call last):
        refimpl.core.errors.OptionError: kind='ratio' compares two arms; give b, or use kind='difference'
    """

    a: Arm
    b: Arm | None = None
    metric: str = "accuracy"
    kind: Literal["difference", "ratio", "perplexity", "units", "mean ratio"] = "difference"
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self) -> None:
        if self.b is None and self.kind != "difference":
            raise OptionError(f"kind={self.kind!r} compares two arms; give b, or use kind='difference'")

    def numbers(self, results: Results, arm: Arm) -> np.ndarray:
        """Of an arm, one for each seed."""
        return over_seeds(results, arm, self.metric, self.seeds)

    @property
    def method(self) -> str:
        """How the interval is made, in words."""
        return _INTERVALS[self.kind].format(n=len(self.seeds))

    def interval(self, results: Results) -> Interval:
        """The estimate with its 95 % interval."""
        if self.b is None:
            return t_interval(self.numbers(results, self.a))
        if self.kind == "perplexity":
            a, b = (results.perplexity(arm.name, arm.condition, self.seeds[0]) for arm in (self.a, self.b))
            return compare(a, b)
        if self.kind == "units":
            one, two = (
                results.values(arm.name, arm.condition, self.seeds[0], metric=self.metric) for arm in (self.a, self.b)
            )
            if one.keys() != two.keys():
                raise OptionError(
                    f"{self.a.name} and {self.b.name} were measured on different units; measure both on one set"
                )
            return paired_bootstrap([one[unit] for unit in two], list(two.values()), statistic=difference)
        x, y = (self.numbers(results, arm) for arm in (self.a, self.b))
        if self.kind == "mean ratio":
            mean = float((x / y).mean())
            return Interval(mean, mean, mean, mde=0.0, n=len(x))
        return seeds_ratio(x, y) if self.kind == "ratio" else t_interval(x - y)

    def __str__(self) -> str:
        arms = [arm for arm in (self.a, self.b) if arm is not None]
        places = dict.fromkeys(arm.condition for arm in arms if arm.condition)
        sign = "minus" if self.kind in ("difference", "units") else "/"
        return f" {sign} ".join(arm.name for arm in arms) + (f" ({', '.join(places)})" if places else "")


_INTERVALS = {
    "difference": "t interval over {n} seeds",
    "ratio": "t interval of the logarithm over {n} seeds",
    "perplexity": "paired bootstrap over documents",
    "units": "paired bootstrap over units",
    "mean ratio": "mean over seeds",
}


@dataclass(frozen=True)
class Bound:
    """Limits between which the whole interval must lie.

    Example:
        >>> print(Bound(high=1.0), "/", Bound(-0.01, 0.01))
        below 1 / between -0.01 and 0.01
    """

    low: float = -np.inf
    high: float = np.inf

    def met(self, gap: Interval) -> bool:
        """Whether an interval lies inside."""
        return self.low < gap.low and gap.high < self.high

    def badness(self, gap: Interval) -> float:
        """How near an interval comes to breaking the bound, or how far beyond it lies; the largest is the worst."""
        if np.isfinite(self.low) and np.isfinite(self.high):
            return max(self.low - gap.low, gap.high - self.high)
        return gap.high if np.isfinite(self.high) else -gap.low

    def __str__(self) -> str:
        if np.isfinite(self.low) and np.isfinite(self.high):
            return f"between {self.low:g} and {self.high:g}"
        return f"above {self.low:g}" if np.isfinite(self.low) else f"below {self.high:g}"


ABOVE_ZERO, BELOW_ZERO, BELOW_ONE = Bound(low=0.0), Bound(high=0.0), Bound(high=1.0)


@dataclass(frozen=True)
class Every:
    """The claim holds if every gap meets the bound.

    Attributes:
        gaps: the comparisons; the least favourable is shown.
        bound: for all of them.
        partly: "most" (more than half meet it), "any" (one does), or a weaker bound that all meet.
        quantity, control, scale: of the outcome.
        arms: the comparisons in words, where a list of names would be long; default: the list.
    """

    gaps: tuple[Gap, ...]
    bound: Bound
    partly: Literal["most", "any"] | Bound = "most"
    quantity: str = ""
    control: str = ""
    scale: str = ""
    arms: str = ""

    def __call__(self, results: Results) -> Outcome:
        found = [gap.interval(results) for gap in self.gaps]
        good = [self.bound.met(gap) for gap in found]
        if isinstance(self.partly, Bound):
            partly = all(self.partly.met(gap) for gap in found)
        else:  # of many comparisons some come out by chance: "most" takes more than half of them
            partly = 2 * sum(good) > len(good) if self.partly == "most" else any(good)
        worst = max(found, key=self.bound.badness)
        quantity = (f"least favourable of {len(found)}: " if len(found) > 1 else "") + self.quantity
        return Outcome.of(worst, grade(all(good), partly), scale=self.scale, control=self.control, quantity=quantity)

    def __str__(self) -> str:
        count = len(self.gaps)
        kinds = dict.fromkeys(gap.method for gap in self.gaps)
        arms = self.arms or "; ".join(map(str, self.gaps))
        every = f"all {count} intervals lie" if count > 1 else "the interval lies"
        if isinstance(self.partly, Bound):
            partly = f", partly if {'all lie' if count > 1 else 'it lies'} {self.partly}"
        else:
            partly = f", partly if {'one does' if self.partly == 'any' else 'most do'}" if count > 1 else ""
        return f"{self.quantity}: {arms}; {', '.join(kinds)}: holds if {every} {self.bound}{partly}."


@dataclass(frozen=True)
class Both:
    """The claim holds if two gaps meet each its own bound, partly if one does; the first is shown.

    Attributes:
        conditions: gaps with their bounds.
        quantity, control, scale: of the outcome.

    Example:
        >>> new, old = (Gap(Place("a"), Place("b"), side) for side in ("new", "old"))
        >>> str(Both(((new, ABOVE_ZERO), (old, BELOW_ZERO)))).partition("seeds: ")[2]
        'holds if new, a minus b, lies above 0 and old, a minus b, lies below 0, partly if one of the two does.'
    """

    conditions: tuple[tuple[Gap, Bound], tuple[Gap, Bound]]
    quantity: str = ""
    control: str = ""
    scale: str = ""

    def __call__(self, results: Results) -> Outcome:
        found = [(gap.interval(results), bound) for gap, bound in self.conditions]
        good = [bound.met(gap) for gap, bound in found]
        verdict = grade(all(good), any(good))
        return Outcome.of(found[0][0], verdict, scale=self.scale, control=self.control, quantity=self.quantity)

    def __str__(self) -> str:
        kinds = dict.fromkeys(gap.method for gap, _ in self.conditions)
        parts = " and ".join(f"{gap.metric}, {gap}, lies {bound}" for gap, bound in self.conditions)
        return f"{self.quantity}; {', '.join(kinds)}: holds if {parts}, partly if one of the two does."


@dataclass(frozen=True)
class Provided:
    """A rule that says something only under a condition; where that is not met, the claim cannot be tested.

    Attributes:
        rule: applied in any case; its numbers are shown.
        needs: gaps that must all meet the bound.
        bound: for them.

    Example:
        >>> ours, control = Place("Reptile"), Place("slower")
        >>> rule = Every((Gap(ours, control, "forgetting"),), BELOW_ZERO)
        >>> as_far = Gap(control, ours, "distance", "mean ratio")
        >>> str(Provided(rule, (as_far,), Bound(0.9, 1.1))).partition("; cannot")[2]
        ' be tested unless distance, slower / Reptile (mean over seeds), lies between 0.9 and 1.1.'
    """

    rule: Every
    needs: tuple[Gap, ...]
    bound: Bound

    def __call__(self, results: Results) -> Outcome:
        outcome = self.rule(results)
        if all(self.bound.met(gap.interval(results)) for gap in self.needs):
            return outcome
        return replace(outcome, verdict=Verdict.CANNOT_BE_TESTED)

    def __str__(self) -> str:
        needs = " and ".join(f"{gap.metric}, {gap} ({gap.method})," for gap in self.needs)
        lie = "lie" if len(self.needs) > 1 else "lies"
        return f"{str(self.rule).removesuffix('.')}; cannot be tested unless {needs} {lie} {self.bound}."


def grade(holds: bool, partly: bool) -> Verdict:
    """A verdict from two conditions.

    Example:
        >>> grade(False, True).value
        'partly'
    """
    return Verdict.HOLDS if holds else Verdict.PARTLY if partly else Verdict.DOES_NOT_HOLD
