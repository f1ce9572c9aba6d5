"""The rules of the study of caches say what their words say, and every arm keeps within its budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refimpl.core.errors import OptionError
from refimpl.lab import fetch, models
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study import study as engine
from refimpl.lab.study.claims import Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import caches

ARTICLES = [f"article {k}" for k in range(8)]
WORKLOADS = (*caches.RETRIEVAL, "second_turns")
ASKED = 5
NAMES = ["full", *(arm.name for arm in caches.arms("study") if arm.budget == caches.MAIN)]


def put(results: Results, arm: str, right: dict[str, int], ratio: float) -> None:
    """An arm that gets `right` of five answers in each article, and whose perplexity is `ratio` times that of 20."""
    for workload in WORKLOADS:
        count = right.get(workload, right["else"])
        for article in ARTICLES:
            for k in range(ASKED):
                unit = f"{article}#{k}"
                results.add(Record("caches", arm, f"task {workload}", 0, unit, "free", float(k < count)))
    counts = np.full(len(ARTICLES), 383)
    spread = 0.002 * (np.arange(len(ARTICLES)) % 3 - 1)
    nll = (np.log(20 * ratio) + spread) * counts
    results.add_perplexity(arm, "wikipedia", 0, Perplexity(0.0, nll, counts, ARTICLES))


def made(**changes: tuple[dict[str, int], float]) -> Results:
    """The papers are right in everything, but for what is changed (``SnapKV=({"else": 5}, 1.0)``)."""
    results = Results("caches.json", {"paper": "caches"})
    levels: dict[str, tuple[dict[str, int], float]] = {name: ({"else": 4}, 1.3) for name in NAMES}
    levels["full"] = {"else": 5}, 1.0
    for method in (*caches.EVICTING, "CSKV-ASVD"):
        levels[caches._main(method)] = {"else": 1}, 1.02
    levels[caches._main("SnapKV+question")] = {"else": 4, "second_turns": 1}, 1.02
    levels |= {caches._main(name.replace("_", "-")): level for name, level in changes.items()}
    for name, (right, ratio) in levels.items():
        put(results, name, right, ratio)
    return results


def verdict(results: Results, claim: str) -> Verdict:
    (row,) = judge(results, [c for c in caches.CLAIMS if c.id == claim])
    assert row["low"] <= row["estimate"] <= row["high"]
    return Verdict(row["verdict"])


def test_all_claims_hold_where_the_papers_are_right() -> None:
    results = made()
    assert {row["verdict"] for row in judge(results, caches.CLAIMS)} == {Verdict.HOLDS.value}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"CSKV_trained": ({"else": 2}, 1.3)}, Verdict.PARTLY),  # better than all three, but less than half is left
        ({"CSKV_ASVD": ({"else": 4}, 1.3)}, Verdict.PARTLY),
        ({"CSKV_trained": ({"else": 1}, 1.3)}, Verdict.DOES_NOT_HOLD),
    ],
)
def test_cskv_must_beat_all_three_and_keep_half(changes, expected) -> None:
    assert verdict(made(**changes), "cskv-retrieval") is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"H2O": ({"else": 1}, 1.2)}, Verdict.PARTLY),  # its perplexity shows it
        ({"H2O": ({"else": 4}, 1.0), "SnapKV": ({"else": 4}, 1.0)}, Verdict.PARTLY),
        ({name: ({"else": 1}, 1.2) for name in caches.EVICTING}, Verdict.DOES_NOT_HOLD),
        ({name: ({"else": 3}, 1.0) for name in caches.EVICTING}, Verdict.DOES_NOT_HOLD),
    ],
)
def test_eviction_hides_what_it_loses_only_if_perplexity_stays(changes, expected) -> None:
    assert verdict(made(**changes), "eviction-hides") is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"CSKV_trained": ({"else": 4}, 1.0)}, Verdict.PARTLY),
        ({"CSKV_trained": ({"else": 1}, 1.3)}, Verdict.PARTLY),
        ({"CSKV_trained": ({"else": 1}, 1.0)}, Verdict.DOES_NOT_HOLD),
    ],
)
def test_crossing_needs_both_sides(changes, expected) -> None:
    assert verdict(made(**changes), "channels-cross-eviction") is expected


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ({"else": 4, "second_turns": 4}, Verdict.PARTLY),
        ({"else": 1, "second_turns": 0}, Verdict.PARTLY),
        ({"else": 1}, Verdict.DOES_NOT_HOLD),
    ],
)
def test_one_question_needs_both_gaps(right, expected) -> None:
    results = made(**{"SnapKV+question": (right, 1.0)})
    assert verdict(results, "snapkv-one-question") is expected


def test_every_method_of_the_bench_is_there_at_every_budget() -> None:
    names = {arm.name for arm in caches.arms("study")}
    assert len(names) == len(caches.arms("study"))
    for method in ("KIVI", "StreamingLLM", "H2O", "SnapKV", "ThinK", "CSKV-trained", "MKV-trained"):
        assert {f"{method} {budget}" for budget in ("50%", "20%", "5%")} <= names
    for base in ("SVD", "ASVD", "closed-form", "trained"):
        assert {f"CSKV-{base} 50%", f"CSKV-{base} 20%", f"CSKV-{base}-4bit 5%"} <= names
    assert {"full", "KIVI-8bit", "ThinK-half"} | {f"{method} 20%" for method in caches.AT_MAIN} <= names
    assert set(caches.CONVERSATION) | set(caches.STREAMED) < set(caches.METHODS)


def test_arms_keep_within_their_budget_or_say_what_the_least_is(tmp_path: Path) -> None:
    fetch.fetch("smollm2")
    model = models.smollm2(layers=1)
    full = model.config.num_key_value_heads * 64 * 2 * 2  # keys and values, 16 bits each
    length = caches.SIZES["quick"].length
    shape = caches.CompressedCache.layer_shape(model, 0)
    for arm in caches.arms("quick"):
        if arm.budget is None:
            continue
        try:
            kept = caches.policy(arm, model, "quick", tmp_path)
        except OptionError:
            least = caches.least(arm, model, "quick", tmp_path)
            assert arm.budget * full < least < full
        else:
            assert kept.nbytes(shape, length) <= arm.budget * full * length
    assert caches.policy(caches.Arm("KIVI", 0.2), model, "study", tmp_path).bits == 2  # type: ignore[attr-defined]
    assert caches.policy(caches.Arm("KIVI", 0.5), model, "study", tmp_path).bits == 4  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="least"):
        caches.policy(caches.Arm("ThinK", 0.2), model, "quick", tmp_path)


def test_every_workload_is_measured_within_the_budget(tmp_path: Path) -> None:
    fetch.fetch("smollm2")
    results = engine.run("refimpl.studies.caches", tmp_path / "caches.json", "quick")
    full = results.cost("full", "wikipedia", metric="nll")
    assert full == 768  # one layer: two times three heads of 64 numbers of 16 bits
    for arm in caches.arms("quick"):
        if results.has(arm.name, "cannot"):
            (value,) = results.values(arm.name, "cannot", metric="least bytes per token").values()
            assert value > (arm.budget or 0) * full
            continue
        for workload in caches.RETRIEVAL:
            assert set(results.values(arm.name, f"task {workload}", metric="free").values()) <= {0.0, 1.0}
        if arm.budget is not None:
            assert (results.cost(arm.name, "task passkeys", metric="free") or 0) <= arm.budget * full
        if not arm.method.endswith("+question"):
            assert results.perplexity(arm.name, "wikipedia").counts.tolist() == [63, 63]
    assert results.has("ThinK 20%", "cannot") and results.has("SnapKV+question 20%", "task second_turns")
    assert results.has("CSKV-trained 20%", "positions 1-31") and results.has("SnapKV 20%", "task variables")
