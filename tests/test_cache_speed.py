"""The script that times caches: what it makes of its measurements, and one tiny run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import cache_speed

    return cache_speed


def found(*ratios: list[float]) -> dict[str, Any]:
    return {
        str(512 * 2**k): {"a": {"milliseconds": [10.0, 40.0, 20.0], "ratio": rounds}} for k, rounds in enumerate(ratios)
    }


def test_crossover_is_where_every_round_is_faster_and_stays_so(speed: ModuleType) -> None:
    assert speed.crossover(found([0.9, 1.1], [1.1, 1.2], [1.3, 1.01]), "a") == 1024
    assert speed.crossover(found([1.2, 1.1], [0.9, 1.2], [1.3, 1.2]), "a") == 2048  # once fast, then not
    assert speed.crossover(found([1.2, 1.1]), "a") == 512
    assert speed.crossover(found([1.2], [1.0]), "a") is None


def test_table_has_medians(speed: ModuleType) -> None:
    assert speed.table(found([0.5, 2.0, 1.5])).splitlines()[-1] == "| a | 50.0/s, 1.50x |  |"


def test_one_block_of_the_model(speed: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    monkeypatch.setattr(
        sys, "argv", ["cache_speed.py", "--layers", "1", "--contexts", "192", "--rounds", "1", "--out", str(out)]
    )
    speed.main()
    result = json.loads(out.read_text())
    rows = result["contexts"]["192"]
    assert len(rows) == 7 and rows[speed.OURS]["ratio"] == [1.0]
    full = 192 * 2 * 192 * 2  # as stored, whatever this processor computes in
    assert rows[speed.LIBRARY]["bytes"] == rows[speed.OURS]["bytes"] == full  # a copy decodes, not the cache itself
    assert rows["SnapKV, 20 %"]["bytes"] <= 0.2 * full and rows["MatryoshkaKV, 50 %"]["bytes"] == full // 2
    assert all(cost > 0 for cost in result["fits"].values())
