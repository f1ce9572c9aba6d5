"""The study's rules say what their words say, its arms get the same, and the run runs and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.core.files.io import data_path
from refimpl.lab.data.domains import DOMAINS
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import meta_experience_replay as study

HOLDS, PARTLY, NOT, CANNOT = (Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD, Verdict.CANNOT_BE_TESTED)
SPREAD = 0.002 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


@pytest.fixture
def results() -> Results:
    return Results("meta_experience_replay.json", {"paper": study.SLUG})


def put(results: Results, metric: str, **values: float) -> None:
    """One value for each arm (names with _ for a space); seeds scatter a little, every arm in a way of its own."""
    for shift, (name, value) in enumerate(values.items()):
        arm = {"quarter": "replay 25%", "half": "replay 50%", "quarter_slower": "replay 25% slower"}.get(name, name)
        for seed, change in zip(study.SEEDS, np.roll(SPREAD, shift), strict=True):
            results.add(Record(study.SLUG, arm, study.CHAIN, seed, "", metric, value + float(change)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("quarter", "half", "verdict"), [(0.05, 0.03, HOLDS), (0.05, 0.21, PARTLY), (0.2, 0.2, NOT), (0.3, 0.25, NOT)]
)
def test_replay(results: Results, quarter: float, half: float, verdict: Verdict):
    put(results, "forgetting", sequential=0.2, quarter=quarter, half=half)
    outcome = rule(results, "mer-replay")
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(max(quarter, half) - 0.2, abs=0.003)  # the least favourable is shown


@pytest.mark.parametrize(
    ("reptile", "mer", "far", "verdict"),
    [
        (0.1, 0.02, 20.0, HOLDS),
        (0.1, 0.06, 20.0, PARTLY),
        (0.15, 0.05, 20.0, NOT),
        (0.1, 0.02, 23.0, CANNOT),
        (0.1, 0.02, 17.0, CANNOT),
    ],
)
def test_reptile_against_steps_as_short(results: Results, reptile: float, mer: float, far: float, verdict: Verdict):
    put(results, "forgetting", Reptile=reptile, slower=0.15, MER=mer, quarter_slower=0.05)
    put(results, "displacement", Reptile=20.0, slower=20.0, MER=20.0, quarter_slower=far)
    assert rule(results, "mer-reptile").verdict is verdict


@pytest.mark.parametrize(
    ("reptile", "mer", "verdict"), [(0.3, 0.4, HOLDS), (0.3, 0.2, PARTLY), (0.2, 0.4, PARTLY), (0.2, 0.3, NOT)]
)
def test_alignment(results: Results, reptile: float, mer: float, verdict: Verdict):
    put(results, "alignment", Reptile=reptile, slower=0.2, MER=mer, quarter_slower=0.3)
    put(results, "displacement", Reptile=20.0, slower=21.0, MER=20.0, quarter_slower=19.0)
    assert rule(results, "mer-alignment").verdict is verdict


@pytest.mark.parametrize(
    ("retained", "learned", "verdict"),
    [(3.0, 3.0, HOLDS), (3.0, 3.012, HOLDS), (3.0, 3.05, PARTLY), (3.1, 2.9, NOT), (3.2, 3.0, NOT)],
)
def test_more_retained_at_equal_learning(results: Results, retained: float, learned: float, verdict: Verdict):
    put(results, "retained", quarter=3.1, MER=retained)
    put(results, "learned", quarter=3.0, MER=learned)
    assert rule(results, "mer-whole").verdict is verdict


@pytest.mark.parametrize(("replay", "verdict"), [(3.0, HOLDS), (3.1, NOT), (3.2, NOT)])
def test_replay_or_size(results: Results, replay: float, verdict: Verdict):
    put(results, "retained", quarter=replay, larger=3.1)
    assert rule(results, "mer-size").verdict is verdict


@pytest.mark.parametrize(("mer", "verdict"), [(2.9, HOLDS), (3.01, HOLDS), (3.02, PARTLY), (3.1, NOT)])
def test_up_to_joint_training(results: Results, mer: float, verdict: Verdict):
    put(results, "retained", joint=3.0, MER=mer)
    assert rule(results, "mer-joint").verdict is verdict


def test_all_arms_see_as_many_rows_in_as_many_steps():
    size = study.SIZES["quick"]
    sequential = study.loader_for(study.SEQUENTIAL, size, seed=1)
    joint = study.loader_for(study.JOINT, size, seed=1)

    def rows(loader: torch.utils.data.DataLoader) -> torch.Tensor:
        return torch.cat([batch[0] for batch in loader])

    chain, union = rows(sequential), rows(joint)
    order = [sorted(map(tuple, found.tolist())) for found in (chain, union)]
    assert order[0] == order[1] and not torch.equal(chain, union)  # the same rows, shuffled
    for arm in study.ARMS:
        loader = study.loader_for(arm, size, seed=1)
        counts = [loader.counts(step) for step in range(len(loader))]
        assert len(loader) == study.recipe_for(size, 1, 1.0, size.first).steps
        assert {new + old for new, old in counts} == {arm.batch}
        assert sum(old for _, old in counts) == pytest.approx(arm.replay * arm.batch * 3 * size.later, abs=1)
        if not arm.joint and not arm.model:  # so that they can share the first stage
            first = rows(loader)[: size.first * arm.batch]
            assert torch.equal(first, chain[: len(first)])


def test_a_larger_model_takes_its_compute_from_replayed_rows():
    small = study._flops(study.llama(context=study.LENGTH), study.BATCH)
    for arm, replayed in ((study.BIGGER, 0.25), (study.BIGGEST, 0.5)):
        assert arm.batch == study.BATCH * (1 - replayed)
        large = study._flops(study.llama(context=study.LENGTH, **dict(arm.model)), arm.batch)
        assert large / small == pytest.approx(1, abs=0.05)


def test_nothing_that_is_measured_was_trained_on():
    trained = {tuple(row) for stage in study.stages_of(study.SIZES["quick"]) for row in stage.rows.tolist()}
    for domain in DOMAINS:
        for split in ("validation", "test"):
            rows = study._windows(domain, split, 40)[0].tolist()
            assert sum(tuple(row) in trained for row in rows) == 0
    for stage in (1, 2, 3):
        for rows in study.compared_batches(stage, 1):
            assert {tuple(row) for row in rows[0].tolist()} <= trained


def test_a_shared_first_stage_is_the_run_itself(tmp_path: Path):
    size = study.SIZES["quick"]
    found = []
    for starts in ("", str(tmp_path)):
        job = study.Job(study.MER, 1, 3.0, size, starts=starts)
        if starts:
            study.started(job)
        records = {(r.condition, r.metric, r.unit): r.value for r in study.trained(job)}
        found.append({key: value for key, value in records.items() if key[0].startswith(("before", "after"))})
    assert len(found[0]) == 5 * len(DOMAINS) and found[0] == found[1]


def test_it_runs_and_takes_up_where_it_was(tmp_path: Path):
    out = tmp_path / "r.json"
    first = study.run(out, "quick")
    assert first.header["rule"] is None and not first.claims
    for arm in study.ARMS:
        for domain in DOMAINS:
            assert first.values(arm.name, "after cpp", 1, metric="bits per byte")[domain] > 0
    assert first.values("MER", study.CHAIN, 1, metric="displacement")[""] > 0
    assert -1 <= first.values("MER", study.CHAIN, 1, metric="alignment")[""] <= 1
    records = list(first.records())
    assert list(study.run(out, "quick").records()) == records


def test_the_stored_verdicts_follow_from_the_stored_records():
    recorded = Results.load(data_path("results", "meta_experience_replay.json"))
    assert recorded.claims, "the study is not finished: `refimpl study meta_experience_replay` goes on where it stopped"
    assert recorded.claims == judge(recorded, study.CLAIMS)
