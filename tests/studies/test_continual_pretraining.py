"""The special rules, arms that get the same, texts apart, and a second phase that goes on where the first ended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refimpl.core.train.schedules import Infinite
from refimpl.lab.study.claims import Outcome, Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.lab.study.study import TUNING_SEED, Job, Run
from refimpl.studies import continual_pretraining as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 0.002 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


@pytest.fixture
def results() -> Results:
    return Results("", {"paper": "continual_pretraining"})


def put(results: Results, arm: str, **values: float) -> None:
    """Old and new loss of an arm; seeds scatter a little, every arm in a way of its own."""
    for side, value in values.items():
        for seed, change in zip(study.SEEDS, np.roll(SPREAD, len(arm)), strict=True):
            results.add(Record("continual_pretraining", arm, "strong", seed, "", side, value + float(change)))


def outcome(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("without", "with_replay", "cost", "verdict"),
    [(3.5, 2.9, 0.05, HOLDS), (3.5, 2.9, 0.3, PARTLY), (3.5, 3.2, 0.05, NOT), (2.75, 2.75, 0.0, NOT)],
)
def test_replay_on_a_strong_shift(results, without, with_replay, cost, verdict):
    put(results, "D0", old=2.75, new=6.8)
    put(results, "re-warm 0 %", old=without, new=2.5)
    put(results, "re-warm 25 %", old=with_replay, new=2.5 + cost)
    assert outcome(results, "cpt-replay").verdict is verdict


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, HOLDS), (1.02, PARTLY), (0.98, PARTLY), (1.05, NOT), (0.95, NOT)]
)
def test_warm_up(results, factor, verdict):
    put(results, "re-warm 0 %", old=3.0, new=2.6)
    put(results, "warm-up 0 %", old=3.0, new=2.6)
    put(results, "warm-up 10 %", old=3.0 * factor, new=2.6 * factor)
    assert outcome(results, "cpt-warmup").verdict is verdict


def test_the_bump_is_one_of_the_first_half(results):
    for arm, rises in (("re-warm 0 %", (0.1, -0.3)), ("constant low", (0.2, 0.0))):
        for seed, change in zip(study.SEEDS, SPREAD, strict=True):
            for step in range(0, 401, 50):
                rise = 0.0 if step == 0 else rises[0] + 3 * change if step <= 200 else rises[1]
                where = "none curve", seed, str(step), "old"
                results.add(Record("continual_pretraining", arm, *where, 2.7 + float(rise)))
    found = outcome(results, "cpt-rewarm-bump")
    assert found.estimate == pytest.approx(0.1, abs=1e-5) and found.verdict is PARTLY


def test_every_arm_gets_the_same(results):
    run = Run(study.STUDY, study.__name__, results, "study", "float32", "", 1)
    stages = study.stages(run)
    tuning = next(stages)
    for job in tuning:
        assert (job.seed, job.split) == (TUNING_SEED, "validation") and study.start_of(job) is None
        best = {"union": 1e-2, "infinite 25 %": 2.5e-3}.get(job.arm.name, 5e-3)
        loss = 3 + abs(np.log(job.rate / best))
        where = f"{job.arm.name} at {job.rate:g}", job.arm.validation, job.seed, "", "bits per byte"
        results.add(Record("continual_pretraining", *where, loss))
    assert len(tuning) == 3 * len(study.RATES)
    alone, later = stages
    rates = {job.arm.name: job.rate for job in alone + later}
    assert rates.pop("union") == rates.pop("new only") == 1e-2
    assert {rate for name, rate in rates.items() if "infinite" in name} == {2.5e-3}
    assert {rate for name, rate in rates.items() if "infinite" not in name} == {5e-3}
    assert {study.start_of(job) for job in later} <= set(alone)  # the same seed and rate
    assert {arm.name for arm in study.arms("study") if not arm.first} == set(study.WAYS)
    size = study.SIZES["study"]
    for name, way in study.WAYS.items():
        schedule = study.schedule_of(way, size, 1e-2)
        whole = size.first + size.second
        assert way.start == "nothing" or schedule.horizon == (size.second if way.start == "D0" else whole), name
        if isinstance(schedule, Infinite):  # annealed at the end of the new text, constant where it arrives
            assert schedule.rate(size.first) == schedule.constant and schedule.constant_until < whole
            assert schedule.warmup + schedule.cooldown < size.first


def test_texts_do_not_overlap():
    old, later = (study.training_rows(which) for which in ("old", "none"))
    assert len(old) + len(later) == len(study.domains.windows("wikipedia", "calibration", study.LENGTH)[0])
    seen = {tuple(row.tolist()) for row in old}
    assert not seen & {tuple(row.tolist()) for row in later}
    for split in ("validation", "test"):
        rows, _ = study.domains.windows("wikipedia", split, study.LENGTH, count=128)
        assert not seen & {tuple(row.tolist()) for row in rows}


def test_a_run_in_two_pieces_is_a_run(tmp_path: Path):
    """The second phase that goes on from a shared checkpoint is what one run through both phases gives."""
    job = Job(study.__name__, study.Arm("infinite 25 %"), 1, "quick", 1e-2, folder=str(tmp_path))
    study.keep(study.start_of(job))
    pieces = {(row.metric, row.unit): row.value for row in study.measure(job)}
    model, history = study.both_phases(job, study.WAYS[job.arm.name], tmp_path / "whole")
    assert study.bits_of(model, "strong", "test", 4) == {side: pieces[side, ""] for side in ("old", "new")}
    looks = {str(int(entry["step"])): entry["old"] for entry in history.evaluations}
    assert len(looks) == 7 and all(pieces["old", step] == value for step, value in looks.items())
    kept = Job(study.__name__, study.Arm("constant low"), 1, "quick", 1e-2, folder=str(tmp_path))
    first = {(row.metric, row.unit): row.value for row in study.measure(study.start_of(kept))}
    second = {(row.metric, row.unit): row.value for row in study.measure(kept)}
    assert second["old", "0"] == pytest.approx(first["old", "12"], abs=1e-5)


def test_the_measure_is_of_each_side():
    model = study.domains.llama(context=study.LENGTH)
    rows = study.domains.windows("python", "validation", study.LENGTH, count=4)
    assert study.bits_of(model, "strong", "validation", 4)["new"] == study.domains.measured(model, *rows).value
    assert set(study.bits_of(model, "none", "validation", 4)) == {"old"}
