"""A study computes in what it declares, or in what its file was recorded in, on any processor."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from refimpl.core.files.io import data_path
from refimpl.lab.models import dtypes
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.precision import declares, study_dtype
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


def test_a_declared_run_reaches_its_processes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = dtypes.compute_dtype()

    @declares("float32")
    def run(out: Path, profile: str = "study") -> Any:
        return {answer for _, answer in in_processes(computing, [0, 1], workers=2)}

    assert run(tmp_path / "new.json") == {"torch.float32"}
    assert run(file(tmp_path / "old.json", "bfloat16")) == {"torch.bfloat16"}
    assert dtypes.compute_dtype() == before

    @declares("float32")
    def fails(out: Path, profile: str = "study") -> None:
        raise ValueError

    with pytest.raises(ValueError):
        fails(tmp_path / "new.json")
    assert dtypes.compute_dtype() == before


RECORDED = sorted(data_path("results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_every_study_declares_what_its_record_says(path: Path) -> None:
    study = importlib.import_module(f"refimpl.studies.{path.stem}")
    if hasattr(study, "STUDY"):
        declared = study.STUDY.dtype
    else:
        found = re.search(r'@declares\("(\w+)"\)\ndef run', Path(study.__file__ or "").read_text())
        declared = found[1] if found else "float32"
    assert declared == json.loads(path.read_text())["header"]["runs"][-1]["dtype"]
