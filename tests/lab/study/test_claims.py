"""Rules that are values: what they decide, and that their words name what they decide by."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.core.errors import OptionError
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study.claims import (
    ABOVE_ZERO,
    BELOW_ONE,
    BELOW_ZERO,
    Both,
    Bound,
    Every,
    Gap,
    Place,
    Provided,
    Verdict,
)
from refimpl.lab.study.records import Record, Results

HOLDS, PARTLY, NOT, BLIND = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD, Verdict.CANNOT_BE_TESTED
SCATTER = (0.001, -0.001, 0.0005, -0.0005, 0.0)


@pytest.fixture
def results() -> Results:
    return Results("demo.json", {"paper": "demo"})


def put(results: Results, arm: str, value: float, metric: str = "accuracy", scatter: float = 1.0) -> Place:
    """Five seeds around a value."""
    for seed, change in enumerate(SCATTER, start=1):
        results.add(Record("demo", arm, "", seed, "", metric, value + scatter * change * (1 + len(arm) % 3)))
    return Place(arm)


@pytest.mark.parametrize(
    ("values", "partly", "verdict"),
    [
        ((0.2, 0.2, 0.2), "most", HOLDS),
        ((0.2, 0.2, -0.2), "most", PARTLY),
        ((0.2, -0.2, -0.2), "most", NOT),
        ((0.2, -0.2, -0.2), "any", PARTLY),
        ((0.0, 0.0, 0.0), "any", NOT),
        ((0.2, -0.05, 0.2), Bound(low=-0.1), PARTLY),
        ((0.2, -0.15, 0.2), Bound(low=-0.1), NOT),
    ],
)
def test_every(results, values, partly, verdict):
    control = put(results, "control", 0.5)
    gaps = tuple(Gap(put(results, f"arm {k}", 0.5 + value), control) for k, value in enumerate(values))
    outcome = Every(gaps, ABOVE_ZERO, partly)(results)
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(min(values), abs=1e-3), "the least favourable is shown"


def test_the_end_of_the_interval_counts_and_not_its_middle(results):
    control = put(results, "control", 0.5)
    assert Every((Gap(put(results, "arm", 0.5005), control),), ABOVE_ZERO)(results).verdict is NOT


def test_a_tie_needs_both_ends_inside(results):
    control = put(results, "control", 0.5)
    tie = Bound(-0.01, 0.01)
    assert Every((Gap(put(results, "near", 0.503), control),), tie)(results).verdict is HOLDS
    assert Every((Gap(put(results, "far", 0.52), control),), tie)(results).verdict is NOT
    assert Every((Gap(put(results, "wide", 0.5, scatter=30), control),), tie)(results).verdict is NOT


def test_ratios_and_perplexities(results):
    a, b = put(results, "a", 1.8, "loss"), put(results, "bb", 2.0, "loss")
    ratio = Gap(a, b, "loss", "ratio").interval(results)
    assert ratio.estimate == pytest.approx(0.9, abs=1e-3) and ratio.high < 1
    counts, units = np.full(8, 100), [f"doc {k}" for k in range(8)]
    for arm, shift in (("dense", 0.0), ("pruned", np.log(1.1))):
        nll = 300.0 + np.arange(8) + shift * counts + 0.01 * np.arange(8) * (arm == "pruned")
        results.add_perplexity(arm, "text", 0, Perplexity(0.0, nll, counts, units))
    gap = Gap(Place("pruned", "text"), Place("dense", "text"), kind="perplexity", seeds=(0,))
    assert gap.interval(results).estimate == pytest.approx(1.1, abs=1e-3)
    assert Every((gap,), BELOW_ONE)(results).verdict is NOT


def test_units_are_paired_and_must_be_the_same(results):
    for arm, shift in (("a", 0.1), ("b", 0.0)):
        results.add(*(Record("demo", arm, "", 0, f"u{k}", "score", k / 50 + shift) for k in range(20)))
    gap = Gap(Place("a"), Place("b"), "score", "units", (0,))
    assert gap.interval(results).estimate == pytest.approx(0.1) and gap.interval(results).low > 0.09
    results.add(Record("demo", "a", "", 0, "one more", "score", 0.0))
    with pytest.raises(OptionError, match="different units"):
        gap.interval(results)


@pytest.mark.parametrize(
    ("new", "old", "verdict"), [(0.2, -0.2, HOLDS), (0.2, 0.2, PARTLY), (-0.2, -0.2, PARTLY), (-0.2, 0.2, NOT)]
)
def test_two_conditions(results, new, old, verdict):
    for metric, value in (("new", new), ("old", old)):
        put(results, "a", 1 + value, metric)
        put(results, "bb", 1, metric)
    gaps = [Gap(Place("a"), Place("bb"), metric) for metric in ("new", "old")]
    rule = Both(((gaps[0], ABOVE_ZERO), (gaps[1], BELOW_ZERO)))
    assert rule(results).verdict is verdict and rule(results).estimate == pytest.approx(new, abs=1e-2)


@pytest.mark.parametrize(("distance", "verdict"), [(1.0, HOLDS), (1.3, BLIND)])
def test_a_rule_under_a_condition(results, distance, verdict):
    ours, control = put(results, "ours", 0.2), put(results, "control", 0.5)
    put(results, "ours", 1.0, "distance")
    put(results, "control", distance, "distance")
    rule = Every((Gap(ours, control),), BELOW_ZERO)
    assert Provided(rule, (Gap(control, ours, "distance", "mean ratio"),), Bound(0.9, 1.1))(results).verdict is verdict


def test_words_follow_from_the_rule():
    a, b, c = (Place(name, "mnist") for name in "abc")
    words = str(Every((Gap(a, b), Gap(a, c)), Bound(-0.01, 0.01), "any", quantity="accuracy, ours minus theirs"))
    for part in (
        "accuracy, ours minus theirs",
        "a minus b",
        "a minus c",
        "5 seeds",
        "all 2",
        "between -0.01 and 0.01",
        "one does",
    ):
        assert part in words, part
    assert "below 1.03" in str(Every((Gap(a, b, kind="ratio"),), Bound(high=1.01), Bound(high=1.03)))
