"""The study's rules say what their words say, and the run runs and takes up where it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refimpl.core.files.io import data_path
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import layerwise_calibration as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 1 + 0.01 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


@pytest.fixture
def results() -> Results:
    return Results("layerwise_calibration.json", {"paper": study.SLUG})


def put(results: Results, arm: str, bits: int, images: int, value: float, metric: str = "kl") -> None:
    spread = np.roll(SPREAD, len(arm))
    for seed, factor in zip(study.SEEDS, spread, strict=True):
        name = f"{arm} W{bits}A{bits}, {images} images"
        results.add(Record(study.SLUG, name, study.MAIN, seed, "", metric, value * float(factor)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("identity", "ours", "theirs", "cases"),
    [
        ("adaquant-ranges", "AdaQuant", "min-max", [(3, 50), (2, 50)]),
        ("adaquant-adaround", "AdaQuant-sequential", "AdaRound-sequential", [(3, 50), (2, 50)]),
        ("adaquant-few-images", "AdaQuant", "QAT", [(2, 10), (2, 50)]),
        ("adaquant-sequence", "AdaQuant-sequential", "AdaQuant", [(3, 50), (2, 50)]),
        ("adaquant-norms", "min-max+norms", "min-max", [(3, 50), (2, 50)]),
    ],
)
@pytest.mark.parametrize(
    ("ratios", "verdict"), [((0.8, 0.5), HOLDS), ((0.8, 1.2), PARTLY), ((1.0, 1.0), NOT), ((1.5, 1.2), NOT)]
)
def test_two_arms_over_the_draws(results, identity, ours, theirs, cases, ratios, verdict):
    for case, ratio in zip(cases, ratios, strict=True):
        put(results, theirs, *case, 0.1)
        put(results, ours, *case, 0.1 * ratio)
    outcome = rule(results, identity)
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(max(ratios), rel=0.02)  # the least favourable is shown


def test_overfitting_compares_gaps_not_levels(results):
    for images in (10, 50):
        for arm, calibration, test in (("AdaQuant", 0.2, 0.3), ("QAT", 0.01, 0.2)):
            put(results, arm, 2, images, calibration, "calibration kl")
            put(results, arm, 2, images, test)
    assert rule(results, "adaquant-overfits-less").verdict is HOLDS
    outcome = rule(results, "adaquant-few-images")
    assert outcome.verdict is NOT and outcome.estimate == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(("lost", "verdict"), [((0, 0, 0), HOLDS), ((0, 30, 0), PARTLY), ((40, 30, 60), NOT)])
def test_four_bits(results, lost, verdict):
    for condition, wrong in zip(study.CONDITIONS, lost, strict=True):
        for image in range(1000):
            for arm, correct in (("dense", 1), ("AdaQuant-tuned W4A4, 50 images", int(image >= wrong))):
                results.add(Record(study.SLUG, arm, condition, 0, str(image), "correct", correct))
    assert rule(results, "adaquant-four-bits").verdict is verdict


@pytest.mark.parametrize(("ratios", "verdict"), [((0.5, 0.5, 0.5), HOLDS), ((0.5, 0.5, 1.3), PARTLY)])
def test_the_program(results, ratios, verdict):
    for budget, ratio in zip(study.BUDGETS, ratios, strict=True):
        for seed, factor in zip(study.SEEDS, SPREAD, strict=True):
            for arm, value in (("random-bits", 0.2), ("IP", 0.2 * ratio * factor)):
                name = f"{arm} {budget:.0%} of the saving"
                results.add(Record(study.SLUG, name, study.MAIN, seed, "", "kl", value))
    assert rule(results, "adaquant-program").verdict is verdict


@pytest.mark.parametrize(("gap", "verdict"), [(-0.1, HOLDS), (0.1, NOT)])
def test_the_language_model(results, gap, verdict):
    counts = np.full(24, 511)
    for arm, level in (("RTN 3-bit g64", 0.0), ("AdaQuant 3-bit g64", gap)):
        nll = (3.0 + level + 0.01 * (np.arange(24) % 3)) * counts
        results.add_perplexity(arm, "wikipedia", 0, Perplexity(0.0, nll, counts, [f"a{k}" for k in range(24)]))
    assert rule(results, "adaquant-language").verdict is verdict


def test_random_and_opposite_allocations_meet_the_budget():
    savings = {f"layer {k}": {2: float(k + 1)} for k in range(6)}
    for policy in study._random_policies(savings, 10.0, seed=1):
        saved = [savings[name][2] for name, bits in policy.items() if bits == 2]
        assert sum(saved) >= 10 and sum(saved) - max(saved) < 10 + max(saved)


def test_it_runs_and_takes_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "r.json"
    first = study.run(out, "quick")
    assert first.header["rule"] is None and not first.claims
    (job,) = study._jobs("quick")
    for arm in study.ALL:
        assert first.has(job.name(arm), job.condition, job.seed)
    records = list(first.records())
    monkeypatch.setattr(study, "classifier", None)  # nothing is trained again
    monkeypatch.setattr(study, "allocation", None)
    assert list(study.run(out, "quick").records()) == records


def test_the_stored_verdicts_follow_from_the_stored_records():
    recorded = Results.load(data_path("results", "layerwise_calibration.json"))
    assert recorded.claims, "the study is not finished: `refimpl study layerwise_calibration` goes on where it stopped"
    assert recorded.claims == judge(recorded, study.CLAIMS)
