"""Rules that need something to be forgotten, or ways as long; arms that get the same; texts apart."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.lab.data.domains import DOMAINS
from refimpl.lab.study.claims import Outcome, Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.studies import smollm2 as study
from refimpl.training_data.rs2 import RS2

HOLDS, NOT, CANNOT = Verdict.HOLDS, Verdict.DOES_NOT_HOLD, Verdict.CANNOT_BE_TESTED


@pytest.fixture
def results() -> Results:
    return Results("", {"paper": "smollm2"})


def put(results: Results, arm: study.Arm, value: float, chapter: str = "") -> None:
    """Bits per byte of an arm; documents scatter a little, every arm in a way of its own."""
    scatter = np.random.default_rng(len(arm.name)).normal(0, 1e-3, 8)
    for kind in DOMAINS:
        for k in range(8):
            place = (arm.name, f"{chapter or arm.condition}, {kind}", 0, f"text {k}")
            results.add(Record("smollm2", *place, "bits", 100 * (value + scatter[k] + 0.1 * (k % 3))))
            results.add(Record("smollm2", *place, "bytes", 100.0))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("without", "with_replay", "verdict"), [(1.2, 1.1, HOLDS), (1.2, 1.21, NOT), (1.2, 1.3, NOT), (0.9, 0.8, CANNOT)]
)
def test_replay(results, without, with_replay, verdict):
    put(results, study.UNTOUCHED, 1.0, study.BEFORE)
    put(results, study.RE_WARMED, without)
    put(results, study.REPLAYED, with_replay)
    outcome = rule(results, "smollm2-replay")
    assert outcome.verdict is verdict and outcome.estimate == pytest.approx(with_replay - without, abs=2e-3)


@pytest.mark.parametrize(
    ("merged", "way", "verdict"),
    [(0.9, 1.0, HOLDS), (1.01, 1.1, NOT), (1.1, 1.0, NOT), (0.9, 1.3, CANNOT), (0.9, 0.7, CANNOT)],
)
def test_merges(results, merged, way, verdict):
    for arm, value, moved in ((study.MERGED, merged, 1.0), (study.REPLAY, 1.0, way)):
        put(results, arm, value)
        results.add(Record("smollm2", arm.name, arm.condition, 0, "", "displacement", moved))
    assert rule(results, "smollm2-merges").verdict is verdict


def test_the_quick_size_has_every_chapter():
    assert {arm.condition for arm in study.QUICK} == {arm.condition for arm in study.ARMS}


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
        units = [
            set(study._windows(kind, split, study.SIZES["study"])[1]) for split in ("calibration", "validation", "test")
        ]
        assert not (units[0] & units[2] or units[0] & units[1] or units[1] & units[2])
