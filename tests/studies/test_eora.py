"""The two rules of the EoRA study that are functions, and what one quick run of it must have measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from refimpl import EoRA
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study.claims import Outcome, Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.lab.study.study import Job, run
from refimpl.studies import eora
from refimpl.studies._bases import make

UNITS = [f"article {k}" for k in range(24)]
COUNTS = np.full(len(UNITS), 511)
BASE = 1500.0 + 20.0 * (np.arange(len(UNITS)) % 5)
ALTERNATING = np.where(np.arange(len(UNITS)) % 2, 1.0, -1.0)
BETTER, SAME, WORSE = math.log(0.9), 0.0, math.log(1.1)
HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD


@pytest.fixture
def results() -> Results:
    return Results("eora.json", {"paper": "eora"})


def put(results: Results, arm: str, level: float, spread: float, condition: str, seed: int) -> None:
    """An arm with perplexity exp(level) times a common one; documents differ from it by +-spread in the log."""
    nll = BASE + (level + spread * ALTERNATING) * COUNTS
    results.add_perplexity(arm, condition, seed, Perplexity(0.0, nll, COUNTS, UNITS))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in eora.CLAIMS if claim.id == identity)
    return claim.rule(results)


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
            put(results, eora.on_domain(here), gap, 0.01, here, draw)
            put(results, eora.on_domain(other), 0.0, 0.0, here, draw)
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


@pytest.mark.slow
def test_a_quick_run(smollm2_folder: Path, tmp_path: Path) -> None:
    found = run("refimpl.studies.eora", tmp_path / "eora.json", "quick")
    both, other = eora.MAIN[-1], eora.on_domain("python")
    assert found.has(other, "python", 1) and not found.has(other, "python", 0)  # the draw is the seed
    dense, source = (found.perplexity(arm, "wikipedia") for arm in ("dense", "source"))
    assert dense.nll.tolist() == source.nll.tolist()  # one function, in two formats
    assert [found.cost(arm, "wikipedia", metric="nll") for arm in ("dense", "source")] == [16, 5]
    bits = [found.cost(arm, "wikipedia", metric="nll") for arm in (eora.PRUNED, both)]
    assert bits[0] > bits[1]  # the second is made from the first, and quantised
    for arm, seed in ((eora.PRUNED, 0), (both, 0), (other, 1)):
        costs = found.whole(arm, "cost", seed)
        assert costs["seconds"] > 0 and costs["forward_passes"] > 0 and costs["raised_dampings"] == 0
    errors = {
        name: np.array(list(found.values(f"layers {name}", "calibration", metric="output_error").values()))
        for name in ("EoRA", "Act-S", "SVD", "none")
    }
    assert all(len(values) == 7 and (values > 0).all() for values in errors.values())
    assert (errors["EoRA"] <= errors["SVD"]).all() and (errors["EoRA"] < errors["none"]).all()


@pytest.mark.slow
def test_the_ranks_of_one_fit(smollm2_folder: Path, tmp_path: Path) -> None:
    arm = eora.Arm("nested", "nested", eora.PRUNED, EoRA(max(eora.RANKS)))
    job = Job("refimpl.studies.eora", arm, 0, "quick", dtype="float32", folder=str(tmp_path))
    make(eora.base(job))
    ranks = [eora.nested(rank) for rank in eora.RANKS]
    rows = [row for row in eora.measure(job) if row.metric == "nll"]
    assert list(dict.fromkeys(row.arm for row in rows)) == ranks
    bits = [next(row.cost for row in rows if row.arm == name) for name in ranks]
    # r (n + m) numbers of 16 bits
    assert np.diff(bits) == pytest.approx((bits[1] - bits[0]) * np.array([1, 2, 4]), rel=1e-6)
