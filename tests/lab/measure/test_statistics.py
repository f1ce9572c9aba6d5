"""Intervals on simulated studies whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.core.errors import OptionError
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.measure.statistics import compare, difference, paired_bootstrap, t_interval


def study(rng, units, effect, spread=0.05):
    """Two arms on documents that differ a lot; between the arms they differ by `effect` +- `spread`."""
    counts = rng.integers(50, 500, units)
    base = rng.normal(3.0, 0.8, units)
    return counts * (base + rng.normal(effect, spread, units)), counts * base, counts


@pytest.mark.parametrize("units", [8, 40])
def test_interval_covers_the_truth_about_95_times_in_100(units):
    rng = np.random.default_rng(3)
    studies = 400
    hits = 0
    for _ in range(studies):
        a, b, counts = study(rng, units, 0.1)
        interval = paired_bootstrap(a, b, counts, n=500)
        hits += interval.low <= np.exp(0.1) <= interval.high
    assert 0.92 <= hits / studies <= 0.985


def test_smallest_visible_effect_is_seen_four_times_in_five():
    rng = np.random.default_rng(4)
    effect = np.log1p(paired_bootstrap(*study(rng, 4000, 0.0), n=300).mde) * np.sqrt(4000 / 40)
    seen = [paired_bootstrap(*study(rng, 40, effect), n=300).low > 1 for _ in range(300)]
    assert 0.70 <= np.mean(seen) <= 0.88


def test_pairing_removes_the_spread_between_documents():
    rng = np.random.default_rng(5)
    a, b, counts = study(rng, 60, 0.05)
    paired = paired_bootstrap(a, b, counts, n=1000)
    shuffled = paired_bootstrap(a, rng.permutation(b), counts, n=1000)
    assert (paired.high - paired.low) * 5 < shuffled.high - shuffled.low


def test_estimate_is_the_ratio_of_the_perplexities_and_swapping_inverts_it():
    a, b, counts = study(np.random.default_rng(6), 30, 0.2)
    there, back = paired_bootstrap(a, b, counts), paired_bootstrap(b, a, counts)
    expected = np.exp(a.sum() / counts.sum()) / np.exp(b.sum() / counts.sum())
    assert there.estimate == pytest.approx(expected)
    assert there.low == pytest.approx(1 / back.high) and there.estimate == pytest.approx(1 / back.estimate)
    assert there.low < there.estimate < there.high and there.n == 30


def test_same_seed_same_interval_and_blocks_do_not_matter(monkeypatch):
    arms = study(np.random.default_rng(7), 30, 0.2)
    reference = paired_bootstrap(*arms, n=999)
    assert paired_bootstrap(*arms, n=999) == reference
    monkeypatch.setattr("refimpl.lab.measure.statistics._BLOCK", 30 * 7)
    assert paired_bootstrap(*arms, n=999) == reference
    assert paired_bootstrap(*arms, n=999, seed=1) != reference


def test_difference_of_scores_without_weights():
    interval = paired_bootstrap([1, 0, 1, 1], [0, 0, 1, 0], statistic=difference)
    assert interval.estimate == 0.5 and interval.low <= 0.5 <= interval.high


def test_identical_arms_have_no_width():
    interval = paired_bootstrap([1.0, 2.0], [1.0, 2.0])
    assert (interval.estimate, interval.low, interval.high, interval.mde) == (1, 1, 1, 0)


def test_t_interval_covers_with_five_seeds():
    rng = np.random.default_rng(8)
    intervals = [t_interval(rng.normal(2.0, 1.0, 5)) for _ in range(1000)]
    assert 0.93 <= np.mean([i.low <= 2.0 <= i.high for i in intervals]) <= 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0]), "there are 1 units"),
        (([1.0, 2.0], [1.0]), "one value per unit"),
        (([1.0, np.nan], [1.0, 2.0]), r"a\[1\] is nan"),
        (([1.0, 2.0], [1.0, np.inf]), r"b\[1\] is inf"),
        (([1.0, 2.0], [1.0, 2.0], [1, 0]), "weights must be positive"),
    ],
)
def test_unusable_values_are_refused(arguments, message):
    with pytest.raises(OptionError, match=message):
        paired_bootstrap(*arguments)


def test_t_interval_of_one_value_is_refused():
    with pytest.raises(OptionError, match="at least 2"):
        t_interval([1.0])


def test_compare_adds_up_documents_and_refuses_different_tokens():
    units = ["x", "x", "y", "z"]
    a = Perplexity(0.0, np.array([5.0, 6.0, 21.0, 30.0]), np.array([5, 5, 20, 30]), units)
    b = Perplexity(0.0, np.array([5.5, 6.5, 22.0, 31.0]), np.array([5, 5, 20, 30]), units)
    assert compare(a, b) == paired_bootstrap([11, 21, 30], [12, 22, 31], [10, 20, 30])
    other = Perplexity(0.0, b.nll, b.counts, ["x", "x", "y", "w"])
    with pytest.raises(OptionError, match="different tokens"):
        compare(a, other)
