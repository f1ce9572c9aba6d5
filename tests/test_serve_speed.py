"""The script that times served models: what it makes of its measurements, and one tiny run."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import serve_speed

    return serve_speed


def test_ratios_are_taken_within_rounds(script: ModuleType) -> None:
    speeds = {"dense": [10.0, 20.0, 40.0], "packed": [5.0, 4.0, 5.0], "served": [20.0, 30.0, 40.0]}
    forms = Counter({"int4": 1, "half": 6})
    assert script.row("4 bits", speeds, forms) == [
        *("4 bits", "20.0", "5.0", "30.0"),
        *("1.50", "7.50", "6 half, 1 int4"),
    ]


def test_one_block_of_the_model(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_speed.py", "--layers", "1", "--rounds", "1", "--dtype", "float32"])
    monkeypatch.setattr(script, "METHODS", dict(list(script.METHODS.items())[:1]))
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert "torch.float32" in lines[0] and lines[-1].startswith("| 4 bits, groups of 32 |")
    assert float(lines[-1].split("|")[2]) > 0
