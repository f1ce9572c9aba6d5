"""The study's rules say what their words say, its arms spend what they claim, and the run runs and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refimpl.core.files.io import data_path
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import gradual_magnitude as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 0.001 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


@pytest.fixture
def results() -> Results:
    return Results("gradual_magnitude.json", {"paper": study.SLUG})


def put(results: Results, arm: str, value: float, network: str = study.RESNET, metric: str = "accuracy") -> None:
    """An arm whose five seeds scatter a little around a value; every arm in a way of its own."""
    spread = np.roll(SPREAD, len(arm))
    for seed, change in zip(study.SEEDS, spread, strict=True):
        results.add(Record(study.SLUG, arm, network, seed, "", metric, value + float(change)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((0.05, 0.05, 0.05), HOLDS), ((0.05, 0.05, -0.2), PARTLY), ((0.0, 0.0, 0.0), NOT), ((-0.1, -0.1, -0.1), NOT)],
)
def test_large_sparse_against_small_dense(results, gains, verdict):
    for width, gain in zip(study.WIDTHS, gains, strict=True):
        put(results, f"small-dense width {width:g}", 0.8)
        put(results, f"cubic non-zeros of {width:g}", 0.8 + gain)
    outcome = rule(results, "gradual-large-sparse")
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(min(gains), abs=1e-3)  # the least favourable is shown


@pytest.mark.parametrize(
    ("ratios", "verdict"), [((0.9, 0.95, 0.97), HOLDS), ((0.9, 0.95, 1.1), PARTLY), ((1.0, 1.0, 1.2), NOT)]
)
def test_the_lstm(results, ratios, verdict):
    for (_, hidden), ratio in zip(study.SMALL_LSTMS, ratios, strict=True):
        put(results, f"small-dense hidden {hidden}", 2.5, study.LSTM, "bits per byte")
        put(results, f"cubic non-zeros of {hidden}", 2.5 * ratio, study.LSTM, "bits per byte")
    assert rule(results, "gradual-large-sparse-lstm").verdict is verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(1.01, HOLDS), (1.06, PARTLY), (1.2, NOT)])
def test_nine_of_ten(results, ratio, verdict):
    put(results, "dense", 2.5, study.LSTM, "bits per byte")
    put(results, "cubic 90%", 2.5 * ratio, study.LSTM, "bits per byte")
    assert rule(results, "gradual-tenfold").verdict is verdict


@pytest.mark.parametrize(
    ("identity", "ours", "theirs"),
    [("gradual-cubic", "cubic 95%", "linear 95%"), ("gradual-one-shot", "cubic 95%", "one-shot 95%")],
)
@pytest.mark.parametrize(("gain", "verdict"), [(0.02, HOLDS), (0.0, NOT), (-0.02, NOT)])
def test_schedules(results, identity, ours, theirs, gain, verdict):
    put(results, ours, 0.9 + gain)
    put(results, theirs, 0.9)
    assert rule(results, identity).verdict is verdict


@pytest.mark.parametrize(("loss", "verdict"), [(0.003, HOLDS), (0.02, NOT)])
def test_uniform_may_lose_half_a_point(results, loss, verdict):
    for width in study.WIDTHS:
        put(results, f"global non-zeros of {width:g}", 0.9)
        put(results, f"cubic non-zeros of {width:g}", 0.9 - loss)
    assert rule(results, "gradual-uniform").verdict is verdict


def arm(name: str, network: str = study.RESNET) -> study.Arm:
    (found,) = (arm for arm in study.arms_of("study") if (arm.name, arm.network) == (name, network))
    return found


@pytest.mark.parametrize("index", range(3))
def test_equal_non_zeros_are_equal(index):
    width = study.WIDTHS[index]
    for way in ("cubic", "global"):
        sparse = arm(f"{way} non-zeros of {width:g}")
        model = study.build(sparse, 0)
        wanted = sum(p.numel() for p in study.build(arm(f"small-dense width {width:g}"), 0).parameters())
        pruning = study.pruning_for(sparse, model, 1000)
        hook = pruning.attach(model)
        hook(pruning.last_step, model)
        # each layer rounds its own count
        assert study.model_storage(model).nonzeros == pytest.approx(wanted, abs=len(hook.updates) or 3)


@pytest.mark.parametrize("index", range(2))
def test_equal_bytes_are_equal(index):
    width = study.WIDTHS[index]
    sparse = arm(f"cubic bytes of {width:g}")
    model = study.build(sparse, 0)
    pruning = study.pruning_for(sparse, model, 1000)
    hook = pruning.attach(model)
    hook(pruning.last_step, model)
    wanted = study.model_storage(study.build(arm(f"small-dense width {width:g}"), 0)).dense
    assert study.model_storage(model).bitmask == pytest.approx(wanted, rel=2e-3)


def test_every_arm_of_a_network_gets_the_same(results):
    arms = study.arms_of("study")
    for network in (study.RESNET, study.LSTM, study.LLAMA):
        same = {study.recipe_for(a, study.SIZES["study"], 1e-2, 1) for a in arms if a.network == network}
        assert len(same) == 1
    for a in arms:
        pruning = study.pruning_for(a, study.build(a, 0), study.recipe_for(a, study.SIZES["study"], 1e-2, 1).steps)
        if pruning is not None and not a.name.startswith("last-moment"):
            assert pruning.last_step <= 0.7 * study.recipe_for(a, study.SIZES["study"], 1e-2, 1).steps


def test_it_runs_and_takes_up_where_it_was(tmp_path: Path):
    out = tmp_path / "r.json"
    first = study.run(out, "quick")
    assert first.header["rule"] is None and not first.claims
    for a in study.arms_of("quick"):
        assert first.has(a.name, a.network, 1)
    records = list(first.records())
    assert list(study.run(out, "quick").records()) == records


def test_the_stored_verdicts_follow_from_the_stored_records():
    recorded = Results.load(data_path("results", "gradual_magnitude.json"))
    assert recorded.claims, "the study is not finished: `refimpl study gradual_magnitude` goes on where it stopped"
    assert recorded.claims == judge(recorded, study.CLAIMS)
