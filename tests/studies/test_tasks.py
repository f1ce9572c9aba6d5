"""The rule of the task study, which is a function, and what is special about its models and items."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refimpl import RTN, compress
from refimpl.core.layers import PackedLinear
from refimpl.lab.measure import tasks as lab_tasks
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study.claims import Verdict, judge
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, records
from refimpl.studies import tasks

ARTICLES = [f"article {k}" for k in range(24)]
ITEMS = 100
IDS = [f"subject/{k}" for k in range(ITEMS)]


def put(results: Results, arm: str, level: float, right: int) -> None:
    """An arm with log-perplexity `level`, and the first `right` items of every task right."""
    counts = np.full(len(ARTICLES), 511)
    spread = 0.001 * (np.arange(len(ARTICLES)) % 3 - 1)
    results.add_perplexity(arm, "wikipedia", 0, Perplexity(0.0, (level + spread) * counts, counts, ARTICLES))
    scores = (np.arange(ITEMS) < right).astype(float)
    chance = np.full(ITEMS, 0.25)
    card = {task: lab_tasks.Scores(IDS, scores, scores, -scores, chance) for task in lab_tasks.TASKS}
    rows = lab_tasks.score_rows(lab_tasks.ScoreCard(card))
    results.add(*records(Job("", tasks.Arm(arm), 0, "study"), rows, "tasks"))


@pytest.fixture
def agreeing() -> Results:
    """Every arm is a little worse than the one before, by perplexity and by every task."""
    results = Results("tasks.json", {"paper": "tasks"})
    for k, arm in enumerate(tasks.COMPRESSED):
        put(results, arm, 3.0 + 0.1 * k, 90 - k)
    return results


def change(results: Results, arm: str, task: str, metric: str, right: int, ids=IDS) -> None:
    results._series[arm, f"task {task}", 0, metric] = (None, {item: float(k < right) for k, item in enumerate(ids)})


def test_one_order_holds(agreeing: Results) -> None:
    assert tasks.disagreements(agreeing) == []
    (row,) = judge(agreeing, tasks.CLAIMS)
    assert row["verdict"] == Verdict.HOLDS.value


def test_one_task_that_contradicts_is_found(agreeing: Results) -> None:
    worst, task = tasks.COMPRESSED[-1], lab_tasks.TASKS[1]
    change(agreeing, worst, task, "free", 100)
    found = tasks.disagreements(agreeing)
    assert found and all((entry.worse, entry.task, entry.metric) == (worst, task, "free") for entry in found)
    first = found[0]  # more items apart, more certain; the arm before last had 79 right
    assert first.better == tasks.COMPRESSED[-2] and first.gap == pytest.approx(0.21)
    assert first.ratio == pytest.approx(np.exp(0.1), rel=1e-3)
    (row,) = judge(agreeing, tasks.CLAIMS)
    assert row["verdict"] == Verdict.DOES_NOT_HOLD.value
    assert row["low"] > 0 and tasks.COMPRESSED[-2] in row["control"]


def test_a_small_contradiction_does_not_survive_the_number_of_comparisons(agreeing: Results) -> None:
    worst, task = tasks.COMPRESSED[-1], lab_tasks.TASKS[0]
    change(agreeing, worst, task, "restricted", 79 + 8)  # p = 1 / 256, once
    assert min(entry.p for entry in tasks.comparisons(agreeing)) == pytest.approx(2**-8)
    assert tasks.disagreements(agreeing) == []


def test_items_about_one_text_count_once(agreeing: Results) -> None:
    worst, task = tasks.COMPRESSED[-1], lab_tasks.TASKS[1]
    ids = [f"article{k // 20}#{k}" for k in range(ITEMS)]  # a hundred items, five articles
    for k, arm in enumerate(tasks.COMPRESSED):
        for metric in ("free", "restricted"):
            change(agreeing, arm, task, metric, 90 - k, ids)
    change(agreeing, worst, task, "free", 100, ids)
    assert min(entry.p for entry in tasks.comparisons(agreeing)) >= 0.5**2  # two articles differ at most
    assert tasks.disagreements(agreeing) == []


def test_pairs_that_perplexity_cannot_tell_apart_do_not_count(agreeing: Results) -> None:
    worst, task = tasks.COMPRESSED[-1], lab_tasks.TASKS[1]
    change(agreeing, worst, task, "free", 100)
    counts = np.full(len(ARTICLES), 511)
    for arm in tasks.COMPRESSED:  # all alike, with a spread that hides what is left
        for metric in ("nll", "tokens"):
            del agreeing._series[arm, "wikipedia", 0, metric]
        noise = np.random.default_rng(tasks.COMPRESSED.index(arm)).normal(0, 0.5, len(ARTICLES))
        noise -= noise.mean()
        agreeing.add_perplexity(arm, "wikipedia", 0, Perplexity(0.0, (3 + noise) * counts, counts, ARTICLES))
    assert list(tasks.comparisons(agreeing)) == []


def test_items_are_taken_from_all_over_the_list() -> None:
    items = [lab_tasks.Item(str(k), "", "", ("",)) for k in range(10)]
    assert [item.id for item in tasks.spread(items, 4)] == ["0", "2", "5", "7"]
    assert tasks.spread(items, 20) == items


def test_unpacked_models_compute_the_same(tiny_llama) -> None:
    model = tiny_llama()
    compress(model, RTN(3, 32), progress=False)
    ids = torch.arange(12)[None]
    before = model(ids).logits
    tasks.unpack(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
    assert torch.equal(model(ids).logits, before)
