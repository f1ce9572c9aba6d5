"""The rules of the MatryoshkaKV study that are functions, and that its arms get the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.kvcache.matryoshka_kv import MatryoshkaKV
from refimpl.lab import models
from refimpl.lab.measure.bits import bits_per_byte
from refimpl.lab.models import small
from refimpl.lab.study import study as engine
from refimpl.lab.study.claims import Outcome, Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.studies import matryoshka_kv as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 0.0002 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])
WHOLE = 2.0


@pytest.fixture
def results() -> Results:
    found = Results("matryoshka_kv.json", {"paper": "matryoshka_kv"})
    for metric, value in (("bits per byte", WHOLE), ("accuracy", 0.4)):
        found.add(Record("matryoshka_kv", "original", study.LLAMA, 0, "", metric, value))
    return found


def put(results: Results, arm: str, losses: dict[float, float], metric: str = "bits per byte") -> None:
    """An arm that loses so much at each budget; seeds scatter a little, every arm in a way of its own."""
    for budget, loss in losses.items():
        value = WHOLE + loss if metric == "bits per byte" else loss
        for seed, change in zip(study.SEEDS, np.roll(SPREAD, len(arm)), strict=True):
            results.add(Record("matryoshka_kv", arm, study._condition(budget), seed, "", metric, value + float(change)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [((0.6, 0.6, 0.7), HOLDS), ((0.6, 0.6, 0.95), PARTLY), ((0.6, 1.2, 1.2), PARTLY), ((1.0, 1.1, 1.1), NOT)],
)
def test_better_below_half(results, shares, verdict):
    lost = {0.5: 0.05, 0.375: 0.2, 0.25: 0.5}
    put(results, "PCA", lost)
    put(results, "MKV", {b: share * lost[b] for b, share in zip(lost, shares, strict=True)})
    outcome = rule(results, "mkv-low-rank")
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(max(shares), rel=0.05)  # the least favourable is shown


@pytest.mark.parametrize(
    ("gaps", "verdict"),  # at 75, 50, 37.5, 25 %: what one rank loses more than drawn ranks
    [
        ((0.01, -0.01, 0.02, 0.1), HOLDS),
        ((0.01, 0.01, 0.02, 0.1), PARTLY),
        ((-0.01, -0.01, 0.02, 0.1), PARTLY),
        ((-0.01, -0.01, -0.01, 0.0), NOT),
    ],
)
def test_one_rank_wins_at_its_own(results, gaps, verdict):
    put(results, "MKV", dict.fromkeys(study.BUDGETS, 0.1))
    put(results, "fixed rank", {b: 0.1 + gap for b, gap in zip(study.BUDGETS, gaps, strict=True)})
    assert rule(results, "mkv-own-rank").verdict is verdict


def test_what_a_part_brings_is_a_mean_over_budgets(results):
    put(results, "MKV", dict.fromkeys(study.BUDGETS, 0.1))
    put(results, "fixed rank", {b: 0.1 + loss for b, loss in zip(study.BUDGETS, (0.0, 0.1, 0.2, 0.1), strict=True)})
    put(results, "unconstrained", dict.fromkeys(study.BUDGETS, 0.12))
    assert rule(results, "mkv-sampling").estimate == pytest.approx(0.1 - 0.02, abs=1e-6)


@pytest.mark.parametrize(
    ("gaps", "verdict"),  # at 100, 75 and 25 %: what is lost without orthogonality
    [((0.02, 0.02, 0.01), HOLDS), ((0.02, 0.02, 0.03), PARTLY), ((0.0, 0.02, 0.01), PARTLY), ((0.0, -0.01, 0.0), NOT)],
)
def test_where_orthogonality_matters(results, gaps, verdict):
    budgets = (study.FULL, 0.75, 0.25)
    put(results, "MKV", {study.FULL: 0.0} | dict.fromkeys(study.BUDGETS, 0.1))
    put(
        results,
        "unconstrained",
        {b: 0.1 * (b < 1) + gap for b, gap in zip(budgets, gaps, strict=True)} | {0.5: 0.1, 0.375: 0.1},
    )
    assert rule(results, "mkv-orthogonal").verdict is verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.95, HOLDS), (0.9, PARTLY), (0.8, NOT)])
def test_nine_tenths(results, share, verdict):
    put(results, "MKV", {0.375: 0.4 * share}, metric="accuracy")
    assert rule(results, "mkv-ninety").verdict is verdict


def test_every_trained_arm_gets_the_same():
    size = study.SIZES["study"]
    assert {arm.name for arm in study.arms("study") if study.STUDY.rates(arm)} == set(study.TRAINED)
    assert {study.STUDY.rates(arm) for arm in map(study.Arm, study.TRAINED)} == {study.RATES}
    assert {study.seeds(study.Arm(arm), "study") for arm in (*study.TRAINED, "PCA", "random")} == {study.SEEDS}
    ids, other = study.training_text(1, size)
    assert len(ids) == size.steps * study.BATCH  # one pass; PCA sees the same
    rows = {tuple(row.tolist()) for row in torch.cat([ids, other])}
    assert len(rows) == len(ids) + len(other)  # nothing is searched on that was trained on
    for split in ("test", "validation"):
        assert not rows & {tuple(row[:-1].tolist()) for row in study.measured_text(split, size)}
    assert not torch.equal(ids, study.training_text(2, size)[0])
    assert [study.rank_of(b) / 32 for b in study.BUDGETS] == list(study.BUDGETS)


def test_measures_are_those_of_the_model():
    model, rows = small.load("llama-medium"), study.measured_text("validation", study.SIZES["quick"])
    exact = study.exact_scores(model, rows)
    found = study.scores(model, rows, None, exact)
    assert found["divergence"] == 0
    expected = bits_per_byte(model, rows, ["a"] * len(rows), small.tokenizer()).value
    assert found["bits per byte"] == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        right = model(rows[:, :-1]).logits.argmax(-1) == rows[:, 1:]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))


def test_all_channels_lose_nothing(tmp_path: Path):
    found = engine.run("refimpl.studies.matryoshka_kv", tmp_path / "r.json", "quick")
    for arm in ("MKV", "PCA"):
        assert found.values(arm, study._condition(study.FULL), 1, metric="divergence")[""] == pytest.approx(0, abs=1e-6)
    assert found.values("trained", "wikipedia smollm2 100.0%", metric="divergence")[""] < 0.01


def test_a_rate_is_chosen_by_the_budgets_an_arm_is_made_for():
    run = engine.Run(study.STUDY, "refimpl.studies.matryoshka_kv", Results("", {}), "quick", "float32", "", 1)
    measured = []
    for arm in map(study.Arm, ("fixed rank", "MKV")):
        (row,) = study.measure(run.job(arm, engine.TUNING_SEED, 1e-2, "validation"))
        assert row.metric == "log divergence" and engine.place(run.job(arm, 0, 1e-2, "validation"))[1] == arm.validation
        measured.append(row.value)
    assert measured[0] != measured[1]


def test_fitted_policies_are_kept(smollm2_folder: Path, tmp_path: Path):
    model = models.smollm2(torch.float32, layers=1)
    for arm in ("PCA", "random"):
        policy = study.fitted(model, "quick", tmp_path, arm)
        assert isinstance(policy, MatryoshkaKV) and policy.ranks is None
        assert study.fitted(model, "quick", tmp_path, arm) == policy
        assert policy.cache(model, budget=0.5, length=64).policy.ranks == 32  # type: ignore[attr-defined]
