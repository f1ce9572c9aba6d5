"""The rules of the runs on SmolLM2 say what their words say, its arms get the same, and the run runs and resumes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from refimpl.core.files.io import data_path
from refimpl.lab.data.domains import DOMAINS
from refimpl.lab.measure import bits
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import smollm2 as study
from refimpl.training_data.rs2 import RS2

HOLDS, PARTLY, NOT, CANNOT = (Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD, Verdict.CANNOT_BE_TESTED)
MERGED, CONTROL = "MER 25 %, 10 x rate", "replay 25 %, 3 x rate"


@pytest.fixture
def results() -> Results:
    return Results("smollm2.json", {"paper": study.SLUG})


def put(results: Results, chapter: str, arm: str, kinds: dict[str, float]) -> None:
    """Bits per byte of an arm; documents scatter a little, every arm in a way of its own."""
    scatter = np.random.default_rng(len(arm)).normal(0, 1e-3, 8)
    for kind, value in kinds.items():
        for k in range(8):
            values = {"bits": 100 * (value + scatter[k] + 0.1 * (k % 3)), "bytes": 100.0}
            for metric, number in values.items():
                results.add(Record(study.SLUG, arm, f"{chapter}, {kind}", 0, f"text {k}", metric, number))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("without", "with_replay", "verdict"), [(1.2, 1.1, HOLDS), (1.2, 1.21, NOT), (1.2, 1.3, NOT), (0.9, 0.8, CANNOT)]
)
def test_replay(results, without, with_replay, verdict):
    put(results, study.BEFORE, study.BEFORE, {study.OLD: 1.0})
    put(results, study.CPT, "re-warm 0 %, 10 x rate", {study.OLD: without})
    put(results, study.CPT, "re-warm 25 %, 10 x rate", {study.OLD: with_replay})
    outcome = rule(results, "smollm2-replay")
    assert outcome.verdict is verdict and outcome.estimate == pytest.approx(with_replay - without, abs=2e-3)


@pytest.mark.parametrize(
    ("merged", "way", "verdict"),
    [(0.9, 1.0, HOLDS), (1.01, 1.1, NOT), (1.1, 1.0, NOT), (0.9, 1.3, CANNOT), (0.9, 0.7, CANNOT)],
)
def test_merges(results, merged, way, verdict):
    put(results, study.MER, MERGED, dict.fromkeys(DOMAINS, merged))
    put(results, study.MER, CONTROL, dict.fromkeys(DOMAINS, 1.0))
    for arm, moved in ((MERGED, 1.0), (CONTROL, way)):
        results.add(Record(study.SLUG, arm, study.MER, 0, "", "displacement", moved))
    assert rule(results, "smollm2-merges").verdict is verdict


@pytest.mark.parametrize(
    ("linupper", "quadratic", "verdict"), [(0.9, 0.9, HOLDS), (1.1, 0.9, PARTLY), (1.01, 1.1, NOT)]
)
def test_weights(results, linupper, quadratic, verdict):
    for arm, value in (("uniform", 1.0), ("linupper", linupper), ("quadratic", quadratic)):
        put(results, study.WEIGHTS, arm, dict.fromkeys(DOMAINS, value))
    outcome = rule(results, "smollm2-weights")
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(max(linupper, quadratic) - 1, abs=2e-3)  # the less favourable


@pytest.mark.parametrize(
    ("fixed", "verdict"), [((1.1, 1.1, 1.1), HOLDS), ((1.1, 0.99, 1.1), PARTLY), ((0.9, 0.9, 0.9), NOT)]
)
def test_subsets(results, fixed, verdict):
    names = ("fixed random", "fixed highest loss", "fixed lowest loss")
    for arm, value in zip(("rs2", *names), (1.0, *fixed), strict=True):
        put(results, study.POOL, arm, {study.NEW: value})
    assert rule(results, "smollm2-rs2").verdict is verdict


def test_arms_of_a_chapter_have_names_of_their_own():
    assert len({(arm.chapter, arm.label) for arm in study.ARMS}) == len(study.ARMS)
    assert {arm.chapter for arm in study.QUICK} == {arm.chapter for arm in study.ARMS}


@pytest.mark.parametrize("profile", study.SIZES)
def test_a_pool_is_seen_once_and_the_arms_have_as_many_updates(profile):
    size = study.SIZES[profile]
    rounds = round(1 / study.R)
    sampler = RS2(size.pool, study.R)
    assert sampler.k % study.BATCH == 0
    seen = np.concatenate([sampler.draw(j).numpy() for j in range(rounds)])
    assert sorted(seen) == list(range(size.pool))
    assert study.steps(size.pool, study.R, rounds, study.BATCH) == rounds * sampler.k // study.BATCH
    assert size.stage % study.MERGES == 0, "a stage ends with a merge"


def test_training_rows_are_not_measured():
    for kind in DOMAINS:
        units = [set(study._windows(kind, split, 16)[1]) for split in ("calibration", "validation", "test")]
        assert not (units[0] & units[2] or units[0] & units[1] or units[1] & units[2])


def test_it_runs_and_takes_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bits, "token_bytes", functools.cache(bits.token_bytes))  # a walk over 49,152 tokens a look
    out = tmp_path / "r.json"
    first = study.run(out, "quick")
    for arm in study.QUICK:
        assert first.has(arm.label, arm.chapter) and first.has(arm.label, f"{arm.chapter} curve")
        assert study.measured(first, arm.chapter, arm.label, DOMAINS).counts.min() > 0
        assert first.values(arm.label, arm.chapter, metric="displacement")[""] > 0
    again = study.run(out, "quick")
    assert list(again.records()) == list(first.records())


def test_the_stored_verdicts_follow_from_the_stored_records():
    recorded = Results.load(data_path("results", "smollm2.json"))
    assert recorded.claims, "the study is not finished: `refimpl study smollm2` goes on where it stopped"
    assert recorded.claims == judge(recorded, study.CLAIMS)
