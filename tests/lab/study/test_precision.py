"""A study computes in what it declares, or in what its file was recorded in, on any processor."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from refimpl.lab.models import dtypes
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.precision import study_dtype
from refimpl.lab.study.records import Record, Results

SLOW = "only emulates"


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What the processor is fast in."""
    for module in (dtypes, importlib.import_module("refimpl.lab.study.precision")):
        monkeypatch.setattr(module, "fast_dtype", lambda device="cpu": request.param)
    return request.param


def file(path: Path, dtype: str) -> Path:
    results = Results.start(
        path, paper="demo", study="refimpl.lab.study.records", profile="quick", dtype=dtype, provisional=True
    )
    results.add(Record("demo", "dense", "", 0, "doc 1", "nll", 1.0))
    results.save()
    return path


@pytest.mark.parametrize("recorded", ["bfloat16", "float32"])
def test_a_recorded_file_goes_on_in_its_own_dtype(
    recorded: str, fast: torch.dtype, tmp_path: Path, capsys: Any
) -> None:
    out = file(tmp_path / "demo.json", recorded)
    for profile in ("study", "quick"):
        for declared in ("float32", "bfloat16"):
            assert study_dtype(out, profile, declared) == getattr(torch, recorded)
            slow = recorded == "bfloat16" and fast == torch.float32
            assert (SLOW in capsys.readouterr().err) == slow


def test_a_new_file_gets_the_declared_dtype_and_a_trial_the_fast_one(fast: torch.dtype, tmp_path: Path) -> None:
    out = tmp_path / "new.json"
    assert study_dtype(out, "study") == torch.float32
    assert study_dtype(out, "study", "bfloat16") == torch.bfloat16
    assert study_dtype(out, "quick") == torch.float32
    assert study_dtype(out, "quick", "bfloat16") == fast


def computing(_: int) -> str:
    return str(dtypes.compute_dtype())


def test_a_dtype_reaches_processes_and_leaves_nothing_behind() -> None:
    before = dtypes.compute_dtype()
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError), dtypes.computing_in(dtype):
            assert {answer for _, answer in in_processes(computing, [0, 1], workers=2)} == {str(dtype)}
            raise ValueError
        assert dtypes.compute_dtype() == before
