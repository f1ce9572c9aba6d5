"""The page on caches shows what was measured at each budget, and says of the rest why it is not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from refimpl_book import caches as pages

from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study.records import Record, Results

ARTICLES = [f"article {k}" for k in range(4)]


def put(results: Results, arm: str, cost: float, right: int, perplexity: float | None) -> None:
    for workload in ("passkeys", "key_values"):
        for article in ARTICLES:
            for k in range(6):
                for metric, value in (("free", float(k < right)), ("restricted", 1.0), ("depth", (k + 0.5) / 6)):
                    results.add(Record("caches", arm, f"task {workload}", 0, f"{article}#{k}", metric, value, cost))
    if perplexity is not None:
        counts = np.full(4, 100)
        nll = np.log(perplexity) * counts + np.array([-1.0, 0.0, 0.0, 1.0])
        results.add_perplexity(arm, "wikipedia", 0, Perplexity(0.0, nll, counts, ARTICLES), cost)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Results:
    found = Results("caches.json", {"paper": "caches"})
    put(found, "full", 1000.0, 6, 20.0)
    put(found, "KIVI 20%", 190.0, 5, 22.0)
    put(found, "SnapKV+question 20%", 200.0, 4, None)
    put(found, "CSKV-trained 5%", 50.0, 0, 900.0)
    put(found, "CSKV-trained-4bit 5%", 49.0, 1, 90.0)
    put(found, "ThinK-half", 750.0, 3, 21.0)
    found.add(Record("caches", "ThinK 20%", "cannot", 0, "", "least bytes per token", 520.0))
    monkeypatch.setattr(pages, "results", lambda: found)
    return found


def cells(text: str, row: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def draw(spec: dict, alt: str) -> str:
    return alt


def test_tables_have_a_row_for_each_method_and_a_column_for_each_budget(results) -> None:
    text = pages.perplexity_table(draw)
    assert cells(text, "Kept") == ["As it comes", "50 %", "20 %", "5 %"]
    assert cells(text, "full") == ["20.00", "", "", ""]
    assert cells(text, "KIVI") == ["", "", "22.00", ""]
    assert "SnapKV+question" not in text and "| MKV" not in text
    assert cells(text, "ThinK") == ["", "", "at least 52 %", ""]
    assert cells(text, "ThinK-half, 75 % of the bytes") == ["21.00", "", "", ""]
    assert cells(pages.retrieval_table(draw), "KIVI")[2] == "83 / 83"
    assert cells(pages.bytes_table(draw), "CSKV-trained-4bit") == ["", "", "", "49"]
    assert cells(pages.workload_table(draw), "KIVI 20%")[:2] == ["83 / 100", "83 / 100"]


def test_charts_show_the_four_bit_form_beside_the_plain_one(results) -> None:
    perplexity, retrieval = pages.budget_charts(draw).split("\n\n")
    assert "CSKV-trained-4bit: 90" in perplexity and "CSKV-trained: 900" in perplexity
    assert "SnapKV+question" in retrieval and "SnapKV+question" not in perplexity
    assert "KIVI: 83.3 (83.3 to 83.3) at 19" in retrieval
    depth = pages.depth_chart(draw)
    assert "KIVI: 100 at 8.33" in depth and "KIVI: 0 at 91.7" in depth


def test_nothing_is_said_before_anything_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    for name, make in pages.GENERATED.items():
        if name != "cache_verdicts":
            assert make(draw) == pages.NOTHING
    full = {"milliseconds": [20.0, 30.0, 25.0], "ratio": [1.0, 1.0, 1.0], "bytes": 9}
    slower = {"milliseconds": [25.0, 40.0, 50.0], "ratio": [0.8, 0.75, 0.5], "bytes": 3}
    faster = {"milliseconds": [10.0, 15.0, 12.5], "ratio": [2.0, 2.0, 2.0], "bytes": 3}
    measured = {
        "contexts": {"512": {"full": full, "KIVI": slower}, "2048": {"full": full, "KIVI": faster}},
        "fits": {"tokens": 8192, "PCA": 1.25},
        "threads": 2,
        "processor": "AVX512",
        "dtype": "bfloat16",
    }
    (tmp_path / "cache_speed.json").write_text(json.dumps(measured))
    text = pages.speed(draw)
    assert "KIVI: 25 at 512" in text and cells(text, "KIVI") == ["25.0 (0.75x)", "80.0 (2.00x)", "2048"]
    assert cells(text, "full")[-1] == "" and cells(text, "PCA") == ["1.25"]


def test_what_is_advised_is_beaten_by_nothing(results: Results) -> None:
    put(results, "H2O 20%", 200.0, 4, 23.0)  # worse than KIVI in both
    put(results, "SnapKV 20%", 200.0, 1, 21.0)  # finds less, and reads better
    rows = [line.split("|")[1].strip() for line in pages.choosing_table(lambda *_: "").splitlines()[2:]]
    assert rows == ["full", "SnapKV 20%", "KIVI 20%"]
