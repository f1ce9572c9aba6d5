"""The task bench: scores as points, and their charts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from refimpl.core.errors import OptionError
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.show.plots import TaskPoint, task_chart, task_figure, task_points
from refimpl.lab.study.records import Record, Results


def scores(results: Results, arm: str, task: str, right: list[int]) -> None:
    results.add(
        *(Record("demo", arm, f"task {task}", 0, f"{task} {k}", "restricted", float(r)) for k, r in enumerate(right))
    )


@pytest.fixture
def results() -> Results:
    results = Results("demo.json", {"paper": "demo"})
    for arm, level, cost in (("dense", 3.0, 16.0), ("GPTQ 3-bit", 3.5, 3.3)):
        nll = np.full(4, level * 100)
        results.add_perplexity(arm, "wikipedia", 0, Perplexity(0.0, nll, np.full(4, 100), list("abcd")), cost=cost)
    scores(results, "dense", "facts", [1] * 30 + [0] * 10)
    scores(results, "dense", "copying", [1] * 10)
    scores(results, "GPTQ 3-bit", "facts", [1] * 20 + [0] * 20)
    scores(results, "GPTQ 3-bit", "copying", [1] * 10)
    return results


def test_points_carry_score_bits_and_perplexity(results: Results) -> None:
    dense, gptq = task_points(results, ["facts"])
    assert (dense.method, dense.score, dense.low, dense.high) == ("dense", 0.75, 0.75, 0.75)
    assert (gptq.method, gptq.label, gptq.score, gptq.bits) == ("GPTQ", "3-bit", 0.5, 3.3)
    assert gptq.perplexity == pytest.approx(np.exp(3.5))
    # ten of forty items were lost: a standard error of 6.9 points
    assert gptq.low is not None and gptq.high is not None
    assert 0.33 < gptq.low < 0.39 and 0.61 < gptq.high < 0.67


def test_tasks_weigh_the_same_whatever_their_size(results: Results) -> None:
    _, gptq = task_points(results, ["facts", "copying"])
    assert gptq.score == pytest.approx(0.75)  # (0.5 + 1) / 2, not 30 of 50


def test_items_about_one_text_are_resampled_together(results: Results) -> None:
    for arm, right in (("dense", 1.0), ("GPTQ 3-bit", 0.0)):
        for text in range(4):  # ten questions on each of four texts; the model loses one text as a whole
            value = right if text == 0 else 1.0
            results.add(*(Record("demo", arm, "task texts", 0, f"{text}#{k}", "restricted", value) for k in range(10)))
    _, gptq = task_points(results, ["texts"])
    assert gptq.score == 0.75
    assert gptq.low is not None and gptq.low < 0.45  # four witnesses, not forty


def test_other_items_are_refused(results: Results) -> None:
    scores(results, "RTN 3-bit", "facts", [1] * 5)
    with pytest.raises(OptionError, match="RTN 3-bit.*other items"):
        task_points(results, ["facts"])


def test_charts(results: Results) -> None:
    points = task_points(results, ["facts"])
    spec = task_chart(points, "facts", x="perplexity").to_dict()
    assert "GPTQ 3-bit: 50" in spec["description"]
    layer = next(entry for entry in spec["layer"] if entry["mark"]["type"] == "point")
    assert layer["encoding"]["x"]["scale"]["type"] == "log"
    assert "type" not in layer["encoding"]["y"]["scale"]
    assert "log" not in json.dumps(task_chart(points, "facts").to_dict()["layer"][0]["encoding"]["x"])
    figure, alt = task_figure({"facts": points, "copying": task_points(results, ["copying"])})
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "facts (% right, higher is better)",
        "copying (% right, higher is better)",
    ]
    assert "facts" in alt and "copying" in alt
    with pytest.raises(OptionError, match="perplexity"):
        task_chart(points, "facts", x="perplexty")
    with pytest.raises(OptionError, match="panels is empty"):
        task_figure({})
    assert isinstance(points[0], TaskPoint)
