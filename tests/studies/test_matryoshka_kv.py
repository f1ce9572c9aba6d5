"""The study's rules say what their words say, its arms get the same, and the run runs and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.core.files.io import data_path
from refimpl.kvcache.matryoshka_kv import MatryoshkaKV
from refimpl.lab import models
from refimpl.lab.models import small
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import matryoshka_kv as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 0.0002 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])
WHOLE = 2.0


@pytest.fixture
def results() -> Results:
    found = Results("matryoshka_kv.json", {"paper": study.SLUG})
    for metric, value in (("bits per byte", WHOLE), ("accuracy", 0.4)):
        found.add(Record(study.SLUG, "original", study.LLAMA, 0, "", metric, value))
    return found


def put(results: Results, arm: str, losses: dict[float, float], metric: str = "bits per byte") -> None:
    """An arm that loses so much at each budget; seeds scatter a little, every arm in a way of its own."""
    for budget, loss in losses.items():
        value = WHOLE + loss if metric == "bits per byte" else loss
        for seed, change in zip(study.SEEDS, np.roll(SPREAD, len(arm)), strict=True):
            results.add(Record(study.SLUG, arm, study._condition(budget), seed, "", metric, value + float(change)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(("loss", "verdict"), [(0.012, HOLDS), (-0.03, PARTLY), (0.2, NOT), (-0.2, NOT)])
def test_equal_at_three_quarters(results, loss, verdict):
    put(results, "PCA", {0.75: 0.01})
    put(results, "MKV", {0.75: loss})
    assert rule(results, "mkv-high-rank").verdict is verdict


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


@pytest.mark.parametrize(("fixed", "free", "verdict"), [(0.1, 0.02, HOLDS), (0.02, 0.1, NOT), (0.05, 0.05, NOT)])
def test_what_matters_most(results, fixed, free, verdict):
    put(results, "MKV", dict.fromkeys(study.BUDGETS, 0.1))
    put(results, "fixed rank", dict.fromkeys(study.BUDGETS, 0.1 + fixed))
    put(results, "unconstrained", dict.fromkeys(study.BUDGETS, 0.1 + free))
    outcome = rule(results, "mkv-sampling")
    assert outcome.verdict is verdict and outcome.estimate == pytest.approx(fixed - free, abs=1e-6)


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


@pytest.mark.parametrize(
    ("shares", "verdict"), [((0.9, 0.9, 0.8), HOLDS), ((0.9, 1.1, 0.9), PARTLY), ((1.0, 1.1, 1.2), NOT)]
)
def test_searched_ranks(results, shares, verdict):
    lost = {0.5: 0.05, 0.375: 0.2, 0.25: 0.5}
    put(results, "MKV", lost)
    put(results, study.SEARCHED, {b: share * lost[b] for b, share in zip(lost, shares, strict=True)})
    assert rule(results, "mkv-search").verdict is verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.95, HOLDS), (0.9, PARTLY), (0.8, NOT)])
def test_nine_tenths(results, share, verdict):
    put(results, "MKV", {0.375: 0.4 * share}, metric="accuracy")
    assert rule(results, "mkv-ninety").verdict is verdict


def test_every_trained_arm_gets_the_same():
    size = study.SIZES["study"]
    rates = dict.fromkeys(study.TRAINED, 1e-2)
    jobs = [job for job in study.jobs_of("study", rates, "float32") if isinstance(job, study.Job)]
    assert {(job.arm, job.seed) for job in jobs} == {
        (arm, seed) for arm in (*study.TRAINED, "PCA", "random") for seed in study.SEEDS
    }
    assert {job.size for job in jobs} == {size}
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
    found = study.measure(model, rows, None, exact)
    assert found["divergence"] == 0
    from refimpl.lab.measure.bits import bits_per_byte

    expected = bits_per_byte(model, rows, ["a"] * len(rows), small.tokenizer()).value
    assert found["bits per byte"] == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        right = model(rows[:, :-1]).logits.argmax(-1) == rows[:, 1:]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))


def test_it_runs_and_takes_up_where_it_was(tmp_path: Path):
    out = tmp_path / "r.json"
    first = study.run(out, "quick")
    assert first.header["rule"] is None and not first.claims
    for arm in ("MKV", "PCA"):
        assert first.values(arm, study._condition(study.FULL), 1, metric="divergence")[""] == pytest.approx(0, abs=1e-6)
    assert first.values("trained", "wikipedia smollm2 100.0%", metric="divergence")[""] < 0.01
    records = list(first.records())
    assert list(study.run(out, "quick").records()) == records


def test_fitted_policies_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("REFIMPL_CACHE", str(models.smollm2_path().parent))
    model = models.smollm2(torch.float32, layers=1)
    monkeypatch.setattr(study, "_path", lambda model, profile, arm: tmp_path / f"{arm}.safetensors")
    for arm in ("PCA", "random"):
        policy = study.fitted(model, "quick", arm)
        assert isinstance(policy, MatryoshkaKV) and policy.ranks is None
        assert study.fitted(model, "quick", arm) == policy
        assert policy.cache(model, budget=0.5, length=64).policy.ranks == 32  # type: ignore[attr-defined]


def test_the_stored_verdicts_follow_from_the_stored_records():
    recorded = Results.load(data_path("results", "matryoshka_kv.json"))
    assert recorded.claims, "the study is not finished: `refimpl study matryoshka_kv` goes on where it stopped"
    assert recorded.claims == judge(recorded, study.CLAIMS)
