"""The study's rules say what their words say, the stored verdicts follow from the stored records, and the run runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from refimpl.core.files.io import data_path
from refimpl.lab import wheels
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import eora

UNITS = [f"article {k}" for k in range(24)]
COUNTS = np.full(len(UNITS), 511)
BASE = 1500.0 + 20.0 * (np.arange(len(UNITS)) % 5)
ALTERNATING = np.where(np.arange(len(UNITS)) % 2, 1.0, -1.0)
BETTER, SAME, WORSE = math.log(0.9), 0.0, math.log(1.1)
HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
OF_THREE = [
    ((BETTER, BETTER, BETTER), HOLDS),
    ((BETTER, SAME, BETTER), PARTLY),
    ((WORSE, SAME, BETTER), PARTLY),
    ((SAME, SAME, SAME), NOT),
    ((WORSE, WORSE, WORSE), NOT),
]


@pytest.fixture
def results() -> Results:
    return Results("eora.json", {"paper": "eora"})


def put(results: Results, arm: str, level: float, spread: float, condition: str = "wikipedia", seed: int = 0) -> None:
    """An arm with perplexity exp(level) times a common one; documents differ from it by +-spread in the log."""
    nll = BASE + (level + spread * ALTERNATING) * COUNTS
    results.add_perplexity(arm, condition, seed, Perplexity(0.0, nll, COUNTS, UNITS))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in eora.CLAIMS if claim.id == identity)
    return claim.rule(results)


def put_repairs(results: Results, gaps: tuple[float, ...], spread: float = 0.01) -> None:
    for base, gap in zip(eora.MAIN, gaps, strict=True):
        put(results, base, 0.0, 0.0)
        put(results, eora.repaired(base, "SVD", "r64"), 0.0, 0.0)
        put(results, eora.repaired(base, "EoRA", "r64"), gap, spread)


@pytest.mark.parametrize("identity", ["eora-repairs", "eora-beats-svd"])
@pytest.mark.parametrize(("gaps", "verdict"), OF_THREE)
def test_repairs_and_beats_svd(results, identity, gaps, verdict):
    put_repairs(results, gaps)
    outcome = rule(results, identity)
    assert outcome.verdict is verdict
    # what is shown is the least favourable of the three
    assert outcome.estimate == pytest.approx(math.exp(max(gaps)), rel=1e-4)
    assert "135M" in outcome.scale and "8B" in outcome.scale


def test_controls_are_told_apart(results):
    for base in eora.MAIN:
        put(results, base, 0.0, 0.0)
        put(results, eora.repaired(base, "SVD", "r64"), 2 * BETTER, 0.0)
        put(results, eora.repaired(base, "EoRA", "r64"), BETTER, 0.01)
    assert rule(results, "eora-repairs").verdict is HOLDS
    assert rule(results, "eora-beats-svd").verdict is NOT


@pytest.mark.parametrize(("gaps", "verdict"), OF_THREE)
def test_more_rank(results, gaps, verdict):
    level = 0.0
    for step, (rank, gap) in enumerate(zip(eora.RANKS, (0.0, *gaps), strict=True)):
        level += gap
        put(results, eora.repaired("SparseGPT 2:4", "EoRA", f"nested r{rank}"), level, 0.01 * (step % 2))
    assert rule(results, "eora-rank").verdict is verdict


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((1.0, 1.005, 1.01), HOLDS),
        ((1.0, 1.005, 1.05), PARTLY),
        ((1.05, 1.05, 1.0), PARTLY),
        ((1.019, 1.019, 1.019), NOT),  # the estimate is below the limit, the interval's end is not
        ((1.05, 1.05, 1.05), NOT),
    ],
)
def test_small_adapters(results, ratios, verdict):
    for base, ratio in zip(eora.MAIN, ratios, strict=True):
        put(results, eora.repaired(base, "EoRA", "r64"), 0.0, 0.0)
        put(results, eora.repaired(base, "EoRA", "r64 4-bit adapter"), math.log(ratio), 0.01)
    assert rule(results, "eora-adapter-bits").verdict is verdict


@pytest.mark.parametrize(
    ("on_wikipedia", "on_python", "verdict"),
    [
        ((BETTER, BETTER, BETTER), (BETTER, BETTER, BETTER), HOLDS),
        ((BETTER, BETTER, BETTER), (2 * BETTER, 2 * BETTER, 0.1 * WORSE), PARTLY),  # one draw disagrees
        ((BETTER, BETTER, BETTER), (SAME, SAME, SAME), PARTLY),
        ((WORSE, WORSE, WORSE), (BETTER, BETTER, BETTER), PARTLY),
        ((SAME, SAME, SAME), (WORSE, WORSE, WORSE), NOT),
    ],
)
def test_task(results, on_wikipedia, on_python, verdict):
    for here, other, gaps in (("wikipedia", "python", on_wikipedia), ("python", "wikipedia", on_python)):
        for draw, gap in enumerate(gaps, start=1):
            put(results, eora._task_arm(here), gap, 0.01, here, draw)
            put(results, eora._task_arm(other), 0.0, 0.0, here, draw)
    assert rule(results, "eora-task").verdict is verdict


@pytest.mark.parametrize(
    ("losing", "ratio", "verdict"),
    [(0, 0.8, HOLDS), (10, 0.8, HOLDS), (11, 0.8, PARTLY), (105, 0.8, NOT), (210, 0.8, NOT)],
)
def test_layer_errors(results, losing, ratio, verdict):
    for site in range(210):
        for name, error in (("SVD", 0.1), ("EoRA", 0.1 * (1 / ratio if site < losing else ratio))):
            results.add(Record("eora", f"layers {name}", "held-out", 0, f"site {site}", "output_error", error))
    assert rule(results, "eora-layer-error").verdict is verdict


def test_a_study_that_could_not_have_seen_the_effect_says_so(results):
    put_repairs(results, (SAME, SAME, SAME), spread=0.3)
    claims = [claim for claim in eora.CLAIMS if claim.id in ("eora-repairs", "eora-beats-svd")]
    assert {row["verdict"] for row in judge(results, claims)} == {Verdict.CANNOT_BE_TESTED.value}


RECORDED = data_path("results") / "eora.json"


@pytest.mark.skipif(not RECORDED.exists(), reason="the study has not been run")
def test_the_recorded_verdicts_follow_from_the_records():
    results = Results.load(RECORDED)
    assert results.claims, "the study is not finished: `refimpl study eora` goes on where it stopped"
    assert judge(results, eora.CLAIMS) == results.claims


@pytest.mark.slow
def test_a_quick_run_records_its_arms_once(smollm2_folder: Path, tmp_path: Path, monkeypatch) -> None:
    # The cache with its models and texts, without what an earlier run compressed.
    cache = tmp_path / "cache"
    cache.mkdir()
    for item in wheels.cache_folder().iterdir():
        if item.is_dir() and item.name not in ("studies", "downloads"):
            (cache / item.name).symlink_to(item.resolve())
    monkeypatch.setenv("REFIMPL_CACHE", str(cache))

    out = tmp_path / "eora.json"
    eora.run(out, "quick")
    first = Results.load(out)
    base = eora.MAIN[-1]
    repairs = [
        eora.repaired(base, by, detail)
        for by, detail in (("EoRA", "r64"), ("EoRA", "r64 4-bit adapter"), ("Act-S", "r64"), ("SVD", "r64"))
    ]
    other_task = eora.repaired("SparseGPT 2:4", "EoRA", "r64 calibrated on python")
    assert {r.arm for r in first.records() if r.metric == "nll"} == {"dense", "source", base, *repairs, other_task}
    assert {r.condition for r in first.records() if r.arm == repairs[0] and r.metric == "nll"} == {
        "wikipedia",
        "python",
    }
    assert first.has(other_task, "python", seed=1)
    assert first.cost("dense", "wikipedia", metric="nll") == 16
    assert first.cost("source", "wikipedia", metric="nll") == 5
    errors = {
        name: np.array(list(first.values(f"layers {name}", "calibration", metric="output_error").values()))
        for name in ("EoRA", "Act-S", "SVD", "none")
    }
    assert all(len(values) == 7 and (values > 0).all() for values in errors.values())
    assert (errors["EoRA"] <= errors["SVD"]).all() and (errors["EoRA"] < errors["none"]).all()
    assert first.claims == [] and first.header["rule"] is None and first.header["profile"] == "quick"

    for name in ("compress", "perplexity", "save"):
        monkeypatch.setattr(eora, name, lambda *args, **options: pytest.fail("a second call works again"))
    eora.run(out, "quick")
    again = Results.load(out)
    assert list(again.records()) == list(first.records()) and len(again.header["runs"]) == 2
