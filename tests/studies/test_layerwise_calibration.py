"""What this study does that others do not: gaps of gaps, random allocations, a rate shared by several precisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refimpl.lab.study.claims import Outcome, Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.lab.study.study import Job
from refimpl.studies import layerwise_calibration as study

SPREAD = 1 + 0.01 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


def put(results: Results, arm: study.Classifier, value: float, metric: str) -> None:
    """A method whose five draws scatter a little around a value; every method in a way of its own."""
    for seed, factor in zip(study.SEEDS, np.roll(SPREAD, len(arm.method)), strict=True):
        results.add(Record("layerwise_calibration", arm.name, study.MAIN, seed, "", metric, value * float(factor)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


def test_overfitting_compares_gaps_not_levels():
    results = Results("layerwise_calibration.json", {"paper": "layerwise_calibration"})
    for images in (10, 50):
        for method, calibration, test in (("AdaQuant", 0.2, 0.3), ("QAT", 0.01, 0.2)):
            put(results, study.Classifier(method, 2, images), calibration, "calibration kl")
            put(results, study.Classifier(method, 2, images), test, "kl")
    outcome = rule(results, "adaquant-overfits-less")
    assert outcome.verdict is Verdict.HOLDS and outcome.estimate == pytest.approx(1.5 / 20, rel=0.05)
    outcome = rule(results, "adaquant-few-images")
    assert outcome.verdict is Verdict.DOES_NOT_HOLD and outcome.estimate == pytest.approx(1.5, rel=0.05)


def test_random_and_opposite_allocations_meet_the_budget():
    savings = {f"layer {k}": {2: float(k + 1)} for k in range(6)}
    policies = list(study.random_policies(savings, 10.0, seed=1))
    assert len({tuple(policy.items()) for policy in policies}) > 1
    for policy in [*policies, study.in_order(list(savings), savings, 10.0)]:
        saved = [savings[name][2] for name, bits in policy.items() if bits == 2]
        assert sum(saved) >= 10 and sum(saved) - max(saved) < 10


def test_a_rate_serves_all_precisions_and_orders():
    shared = {study.tuned_as(arm) for arm in study.classifiers("study") if study.tuned_as(arm).rates}
    assert shared == {study.Classifier(method, 2) for method in study.RATES}
    assert shared <= set(study.arms("study"))


def test_a_tuning_run_tells_the_divergence_of_what_is_used():
    """Batch norms are measured again after AdaQuant, so its rate is chosen for the network that has them so."""
    arm = study.Classifier("AdaQuant", 2, 10)
    job = Job("refimpl.studies.layerwise_calibration", arm, 0, "quick", 1.0)
    (row,) = study.measure(replace(job, split="validation"))
    test = {row.arm: row.value for row in study.measure(job) if row.metric == "kl"}
    assert row.metric == "kl" and list(test) == [arm.name, replace(arm, method="AdaQuant+norms").name]
    bench = study.Bench(replace(job, split="validation"))
    before, after = (bench.quality(model)[0] for _, model in study.finished(bench))
    assert row.value == after != before
