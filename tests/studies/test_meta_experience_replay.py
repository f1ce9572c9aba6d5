"""The special rules, arms that get the same, texts apart, and a shared first stage that is the run itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.lab.data.domains import DOMAINS
from refimpl.lab.study.claims import Outcome, Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.lab.study.study import TUNING_SEED, Job, Run
from refimpl.studies import meta_experience_replay as study

HOLDS, PARTLY, NOT, CANNOT = (Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD, Verdict.CANNOT_BE_TESTED)
SPREAD = 0.002 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


def rule(identity: str, **values: tuple[float, float]) -> Outcome:
    """Of a claim, on two values of each metric, of arms with merges and of those without; seeds scatter a little."""
    results = Results("", {"paper": "meta_experience_replay"})
    without = (study.QUARTER, study.JOINT, study.SLOWER, study.QUARTER_SLOWER)
    for metric, (merged, other) in values.items():
        arms = dict.fromkeys((study.MER, study.REPTILE), merged) | dict.fromkeys(without, other)
        for shift, (arm, value) in enumerate(arms.items()):
            for seed, change in zip(study.SEEDS, np.roll(SPREAD, shift), strict=True):
                place = (arm.name, study.CHAIN, seed, "", metric)
                results.add(Record("meta_experience_replay", *place, value + float(change)))
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("retained", "learned", "verdict"),
    [(3.0, 3.0, HOLDS), (3.0, 3.012, HOLDS), (3.0, 3.05, PARTLY), (3.1, 2.9, NOT), (3.2, 3.0, NOT)],
)
def test_more_retained_at_equal_learning(retained: float, learned: float, verdict: Verdict):
    assert rule("mer-whole", retained=(retained, 3.1), learned=(learned, 3.0)).verdict is verdict


@pytest.mark.parametrize(("mer", "verdict"), [(2.9, HOLDS), (3.01, HOLDS), (3.02, PARTLY), (3.1, NOT)])
def test_up_to_joint_training(mer: float, verdict: Verdict):
    assert rule("mer-joint", retained=(mer, 3.0)).verdict is verdict


@pytest.mark.parametrize(("far", "verdict"), [(20.0, HOLDS), (23.0, CANNOT), (17.0, CANNOT)])
def test_reptile_says_something_only_against_a_control_that_moved_as_far(far: float, verdict: Verdict):
    assert rule("mer-reptile", forgetting=(0.02, 0.05), displacement=(20.0, far)).verdict is verdict


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_control_is_matched_on_a_power_law_of_the_distance(power: float):
    results = Results("", {"paper": "meta_experience_replay"})
    run = Run(study.STUDY, study.__name__, results, "study", "float32", "", 1)

    def put(name: str, distance: float) -> None:
        results.add(Record("meta_experience_replay", name, study.CHAIN, TUNING_SEED, "", "displacement", distance))

    put("Reptile at 3", 0.6**power)
    steps = study.matched(run, study.SLOWER, 3.0)
    try:
        while True:
            (job,) = next(steps)
            put(job.arm.name, job.arm.epsilon**power)
    except StopIteration as done:
        assert done.value == replace(study.SLOWER, epsilon=pytest.approx(0.6, rel=1e-4))


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
        if arm.shares_start:
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
    found = []
    for folder in ("", str(tmp_path)):
        job = Job(study.__name__, study.MER, 1, "quick", 3.0, folder=folder)
        if folder:
            study.started(job)
        rows = [row for row in study.measure(job) if row.condition and row.condition.startswith(("before", "after"))]
        found.append(rows)
    assert len(found[0]) == 5 * len(DOMAINS) and found[0] == found[1]


def test_a_first_stage_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "_train", lambda *arguments, **options: None)
    with pytest.raises(AssertionError):
        study.started(Job(study.__name__, study.MER, 1, "quick", 3.0, folder=str(tmp_path)))
    assert not list(tmp_path.iterdir())
