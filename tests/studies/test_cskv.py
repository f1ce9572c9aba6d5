"""The rules of the CSKV study that are functions, what it measures with, and the trap of its measurement."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refimpl.baselines.kvcache import Full
from refimpl.lab.data import text
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.models.language import smollm2
from refimpl.lab.study import study as engine
from refimpl.lab.study.claims import Every, Outcome, Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.studies import cskv
from refimpl.studies.cskv import Arm

UNITS = [f"article {k}" for k in range(8)]
COUNTS = np.full(len(UNITS), 896)
BASE = 2700.0 + 40.0 * (np.arange(len(UNITS)) % 3)
ALTERNATING = np.where(np.arange(len(UNITS)) % 2, 1.0, -1.0)
HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD


@pytest.fixture
def results() -> Results:
    return Results("cskv.json", {"paper": "cskv"})


def put(results: Results, arm: Arm | str, level: float, spread: float = 0.0) -> None:
    """An arm whose mean loss is ``level`` above a common one; documents differ from that by +-spread."""
    nll = BASE + (level + spread * ALTERNATING) * COUNTS
    results.add_perplexity(getattr(arm, "name", arm), "wikipedia", 0, Perplexity(0.0, nll, COUNTS, UNITS))


def put_errors(results: Results, arm: str, level: float, draw: int = 0, spread: float = 0.0) -> None:
    for k in range(60):
        value = 0.1 * math.exp(level + spread * (1 if k % 2 else -1))
        results.add(Record("cskv", arm, "held-out", draw, f"layer {k}", "relative_error", value))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in cskv.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ((0.0, 0.1, 0.2, 0.3), HOLDS),
        ((0.1, 0.0, 0.2, 0.3), PARTLY),  # training beats the closed form
        ((0.0, 0.1, 0.1, 0.3), PARTLY),
        ((0.3, 0.2, 0.1, 0.0), NOT),
    ],
)
def test_order(results: Results, levels: tuple[float, ...], verdict: Verdict) -> None:
    for draw in range(3):
        for arm, level in zip(("closed form", "fit", "ASVD", "SVD"), levels, strict=True):
            put_errors(results, arm, level, draw, 0.01)
    outcome = rule(results, "cskv-order")
    assert outcome.verdict is verdict
    worst = max(a - b for a, b in zip(levels, levels[1:], strict=False))
    assert outcome.estimate == pytest.approx(math.exp(worst), rel=1e-3)


def test_order_wants_every_draw_to_agree(results: Results) -> None:
    for draw, gap in enumerate((0.3, 0.3, -0.1)):
        for arm, level in (("closed form", 0.0), ("fit", gap), ("ASVD", 1.0), ("SVD", 2.0)):
            put_errors(results, arm, level, draw)
    outcome = rule(results, "cskv-order")
    assert outcome.high < 1 and outcome.verdict is PARTLY


@pytest.mark.parametrize(
    ("random", "asvd", "verdict"), [(0.5, 0.2, HOLDS), (0.1, 0.2, PARTLY), (0.0, 0.2, NOT), (0.2, 0.2, PARTLY)]
)
def test_start(results: Results, random: float, asvd: float, verdict: Verdict) -> None:
    for arm, level in (("random fit", random), ("ASVD", asvd), ("fit", 0.0)):
        put_errors(results, arm, level)
    for draw in (1, 2):  # more draws of the others do not matter
        put_errors(results, "ASVD", 9.0, draw)
        put_errors(results, "fit", 9.0, draw)
    assert rule(results, "cskv-start").verdict is verdict


@pytest.mark.parametrize(
    ("fit", "asvd", "verdict"),
    [(0.1, 1.0, HOLDS), (0.49, 1.0, HOLDS), (0.51, 1.0, PARTLY), (1.0, 1.0, NOT), (1.1, 1.0, NOT)],
)
def test_against_asvd(results: Results, fit: float, asvd: float, verdict: Verdict) -> None:
    put(results, "full", 0.0)
    put(results, Arm("fit"), fit, 0.002)
    put(results, Arm("ASVD"), asvd)
    assert rule(results, "cskv-asvd").verdict is verdict


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ((1.0, 0.3, 0.1), HOLDS),
        ((1.0, 0.7, 0.1), PARTLY),  # the larger step gains more
        ((1.0, 1.0, 0.1), NOT),
        ((0.5, 1.0, 1.0), NOT),
    ],
)
def test_window(results: Results, levels: tuple[float, ...], verdict: Verdict) -> None:
    for window, level in zip((0, 32, 128), levels, strict=True):
        put(results, Arm(window=window), level, 0.01 * (window == 32))
    assert rule(results, "cskv-window").verdict is verdict


def test_bits_are_compared_in_equal_groups() -> None:
    """Codes fill groups of 32 tokens; the arm in single tokens keeps fewer exact ones and is no control."""
    (claim,) = (claim for claim in cskv.CLAIMS if claim.id == "cskv-bits")
    assert isinstance(claim.rule, Every)
    assert all(gap.a.group == gap.b.group == 32 and gap.a.bits != gap.b.bits for gap in claim.rule.gaps)  # type: ignore


@pytest.mark.slow
def test_a_pass_over_a_prompt_shows_no_loss(smollm2_folder: Path, tmp_path: Path) -> None:
    first = engine.run("refimpl.studies.cskv", tmp_path / "cskv.json", "quick")
    assert first.cost("full", "wikipedia", metric="nll") == 16
    kept = {arm: first.cost(arm, "wikipedia", metric="nll") for arm in ("closed form", "ASVD")}
    # 96 tokens, 32 of them exact with their features beside them: (32 * (2 * 192 + 72) + 64 * 72) / (96 * 2 * 192)
    assert kept["closed form"] == kept["ASVD"] == pytest.approx(16 * (32 * 456 + 64 * 72) / (96 * 384), rel=1e-5)
    # the trap: a prompt is read exactly, so a pass over it shows no loss, whatever is kept of it afterwards
    full, streamed = (first.perplexity(arm, "wikipedia").value for arm in ("full", "ASVD"))
    assert first.perplexity("ASVD", "one pass").value == pytest.approx(full, 1e-2)
    assert streamed != pytest.approx(full, 2e-2)
    errors = {arm: _errors(first, arm) for arm in ("closed form", "fit", "ASVD", "SVD", "random fit")}
    assert all(len(values) == 4 and (values > 0).all() for values in errors.values())
    assert errors["closed form"].mean() < errors["ASVD"].mean() < errors["SVD"].mean() < errors["random fit"].mean()
    assert errors["fit"].mean() < errors["ASVD"].mean()


def _errors(results: Results, arm: str) -> np.ndarray:
    return np.array(list(results.values(arm, "held-out", metric="relative_error").values()))


def test_factors_are_kept(smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = smollm2(torch.float32, layers=1)
    policy = cskv.fitted(model, "quick", tmp_path, "SVD")
    assert policy.factors[0].A_K.shape == (576, 192) and policy.sinks == 4
    for name in ("moments", "factorise"):
        monkeypatch.setattr(cskv, name, lambda *args, **options: pytest.fail("a second call works again"))
    again = cskv.fitted(model, "quick", tmp_path, "SVD", bits=4)
    assert torch.equal(again.factors[0].A_K, policy.factors[0].A_K) and again.bits == 4


def test_the_streamed_perplexity_of_a_full_cache_is_the_ordinary_one(smollm2_folder: Path) -> None:
    model = smollm2(torch.float32, layers=1)
    ids = torch.randint(0, 49000, (2, 600), generator=torch.Generator().manual_seed(0))
    tokens = text.TokenSet(ids, ["a", "b"], "given", "given")
    with torch.inference_mode():
        losses = F.cross_entropy(model(ids).logits[:, 299:-1].transpose(1, 2), ids[:, 300:], reduction="none").sum(1)
    for policy in (None, Full()):
        found, bits = cskv.streamed_perplexity(model, policy, tokens, 300)
        assert np.allclose(found.nll, losses.numpy(), rtol=1e-5) and bits == 16  # as stored
        assert found.counts.tolist() == [300, 300] and found.units == ["a", "b"]
