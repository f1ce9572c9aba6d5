"""The study's rules say what their words say, its arms get the same, and the run runs and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.core.files.io import data_path
from refimpl.core.train.schedules import Infinite
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import continual_pretraining as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 0.002 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


@pytest.fixture
def results() -> Results:
    return Results("continual_pretraining.json", {"paper": study.SLUG})


def put(results: Results, arm: str, shift: str, **values: float) -> None:
    """Old and new loss of an arm; seeds scatter a little, every arm in a way of its own."""
    for side, value in values.items():
        for seed, change in zip(study.SEEDS, np.roll(SPREAD, len(arm)), strict=True):
            results.add(Record(study.SLUG, arm, shift, seed, "", side, value + float(change)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("without", "with_replay", "cost", "verdict"),
    [(3.5, 2.9, 0.05, HOLDS), (3.5, 2.9, 0.3, PARTLY), (3.5, 3.2, 0.05, NOT), (2.75, 2.75, 0.0, NOT)],
)
def test_replay_on_a_strong_shift(results, without, with_replay, cost, verdict):
    put(results, "D0", "strong", old=2.75, new=6.8)
    put(results, "re-warm 0 %", "strong", old=without, new=2.5)
    put(results, "re-warm 25 %", "strong", old=with_replay, new=2.5 + cost)
    assert rule(results, "cpt-replay").verdict is verdict


@pytest.mark.parametrize(("average", "verdict"), [(2.8, HOLDS), (2.9, NOT), (3.0, NOT)])
def test_replay_on_a_weak_shift(results, average, verdict):
    put(results, "re-warm 0 %", "weak", old=3.0, new=2.8)
    put(results, "re-warm 5 %", "weak", old=average + 0.2, new=average - 0.2)
    assert rule(results, "cpt-replay-weak").verdict is verdict


@pytest.mark.parametrize(
    ("early", "late", "control", "verdict"),
    [(0.1, -0.1, 0.0, HOLDS), (0.1, 0.1, 0.2, PARTLY), (-0.05, 0.3, -0.1, PARTLY), (-0.1, 0.3, 0.0, NOT)],
)
def test_the_bump_is_one_of_the_first_half(results, early, late, control, verdict):
    for arm, rises in (("re-warm 0 %", (early, late)), ("constant low", (control, control))):
        for seed, change in zip(study.SEEDS, SPREAD, strict=True):
            for step in range(0, 401, 50):
                rise = 0.0 if step == 0 else rises[0] + 3 * change if step <= 200 else rises[1]
                results.add(Record(study.SLUG, arm, "none curve", seed, str(step), "old", 2.7 + float(rise)))
    outcome = rule(results, "cpt-rewarm-bump")
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(early, abs=1e-5)


@pytest.mark.parametrize(
    ("identity", "arm", "control"),
    [("cpt-union", "re-warm 25 %", "union"), ("cpt-infinite", "infinite 25 %", "moments kept 25 %")],
)
@pytest.mark.parametrize(("factor", "verdict"), [(0.95, HOLDS), (1.0, HOLDS), (1.02, PARTLY), (1.05, NOT)])
def test_as_good_as(results, identity, arm, control, factor, verdict):
    put(results, control, "strong", old=3.0, new=2.6)
    put(results, arm, "strong", old=3.0 * factor, new=2.6 * factor)
    assert rule(results, identity).verdict is verdict


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, HOLDS), (1.02, PARTLY), (0.98, PARTLY), (1.05, NOT), (0.95, NOT)]
)
def test_warm_up(results, factor, verdict):
    put(results, "re-warm 0 %", "strong", old=3.0, new=2.6)
    put(results, "warm-up 0 %", "strong", old=3.0, new=2.6)
    put(results, "warm-up 10 %", "strong", old=3.0 * factor, new=2.6 * factor)
    assert rule(results, "cpt-warmup").verdict is verdict


@pytest.mark.parametrize(("old", "new", "verdict"), [(2.9, 2.7, HOLDS), (3.1, 2.7, PARTLY), (3.1, 2.5, NOT)])
def test_a_constant_small_rate(results, old, new, verdict):
    put(results, "re-warm 0 %", "strong", old=3.0, new=2.6)
    put(results, "constant low", "strong", old=old, new=new)
    assert rule(results, "cpt-constant").verdict is verdict


def test_every_arm_gets_the_same():
    size = study.SIZES["study"]
    scratch = dict.fromkeys(study.TUNED, 1e-2)
    before, after = study.jobs_of("study", scratch, "folder")
    places = [(job.arm, job.shift, job.seed) for job in before + after]
    assert len(set(places)) == len(places)
    for shift, arms in study.JUDGED.items():  # whatever a rule names has five seeds
        for arm in arms:
            assert {seed for a, s, seed in places if (a, s) == (arm, shift)} == set(study.SEEDS)
    assert {name for arms in (study.JUDGED, study.SHOWN) for each in arms.values() for name in each} == set(study.ARMS)
    for name, arm in study.ARMS.items():
        schedule = study.schedule_of(arm, size, 1e-2)
        whole = size.first + size.second
        if arm.start == "D0":
            assert schedule.horizon == size.second, name
        elif arm.start == "moments":
            assert schedule.horizon == whole, name
        if isinstance(schedule, Infinite):  # annealed at the end of the new text, constant where it arrives
            assert schedule.rate(size.first) == schedule.constant and schedule.constant_until < whole
            assert schedule.warmup + schedule.cooldown < size.first


def test_texts_do_not_overlap():
    old, later = study._rows("old"), study._rows("none")
    total = study.domains.windows("wikipedia", "calibration", study.LENGTH)[0]
    assert len(old) + len(later) == len(total)
    seen = {tuple(row.tolist()) for row in old}
    assert not seen & {tuple(row.tolist()) for row in later}
    for split in ("validation", "test"):
        assert not seen & {tuple(row.tolist()) for row in study._measured_text("wikipedia", split, 128)[0]}


def test_it_runs_and_takes_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "r.json"
    results = study.run(out, "quick")
    assert results.header["rule"] is None and not results.claims
    start = results.values("D0", "strong", 1, metric="old")[""]
    assert results.values("constant low", "strong curve", 1, metric="old")["0"] == pytest.approx(start, abs=1e-5)
    kept = results.values("moments kept 25 %", "strong curve", 1, metric="old")
    first = results.values("D0", "strong curve", 1, metric="old")
    assert {step: kept[step] for step in first} == first  # one run: the checkpoint of D0 went on
    records = list(results.records())
    assert list(study.run(out, "quick").records()) == records


def test_a_run_in_two_pieces_is_a_run(tmp_path: Path):
    """The second phase that goes on from a shared checkpoint is what one run through both phases gives."""
    size = study.SIZES["quick"]
    job = study.Job("infinite 25 %", "strong", 1, size, 1e-2, str(tmp_path))
    study.first(study.Job("D0 infinite", "strong", 1, size, 1e-2, str(tmp_path)))
    pieces = study.second(job)
    whole = study.second(study.Job("infinite 25 %", "strong", 1, size, 1e-2))
    drop = ("cpu seconds",)
    assert [r for r in pieces if r.metric not in drop] == [r for r in whole if r.metric not in drop]


def test_the_measure_is_of_each_side():
    model = study.domains.llama(context=study.LENGTH)
    found = study.measure(model, "strong", "validation", 4)
    rows = study._measured_text("python", "validation", 4)
    assert found["new"] == study.domains.measured(model, *rows).value
    assert set(study.measure(model, "none", "validation", 4)) == {"old"} and torch.is_tensor(rows[0])


def test_the_stored_verdicts_follow_from_the_stored_records():
    recorded = Results.load(data_path("results", "continual_pretraining.json"))
    assert recorded.claims, "the study is not finished: `refimpl study continual_pretraining` goes on where it stopped"
    assert recorded.claims == judge(recorded, study.CLAIMS)
