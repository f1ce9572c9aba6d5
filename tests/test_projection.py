"""The projection of the gate's time: what counts for a chapter, and the sum."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

from refimpl.papers import paper, papers

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def projection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import projection

    return projection


CASES = {
    ("notebooks/lowrank/eora.ipynb", "Cell 3"): True,
    ("tests/lowrank/test_eora.py", "test_a"): True,
    ("tests/lowrank/test_eora_fits.py", "test_a"): True,
    ("tests/lowrank/test_eoranother.py", "test_a"): False,
    ("tests/studies/test_eora.py", "test_a[8]"): True,
    ("tests/test_exercises.py", "test_exercises[eora]"): True,
    ("tests/test_exercises.py", "test_exercises[tour]"): False,
    ("tests/test_doctests.py", "test_examples[refimpl.lowrank.eora]"): True,
    ("tests/test_doctests.py", "test_examples[refimpl.lowrank]"): False,
    ("tests/core/compress/test_compress.py", "test_stays_on_its_device[EoRA-llama]"): True,
    ("tests/core/compress/test_compress.py", "test_stays_on_its_device[GPTQ-llama]"): False,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "::".join(case))
def test_cases_that_are_there_because_of_a_chapter(projection: ModuleType, case: tuple[str, str]) -> None:
    file, name = case
    assert projection.belongs(ET.Element("testcase", file=file, name=name), paper("eora")) == CASES[case]


@pytest.mark.parametrize(("seconds", "failed"), [(1.0, 0), (4000.0, 1)])
def test_chapters_are_multiplied_and_the_rest_is_not(
    projection: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, seconds: float, failed: int
) -> None:
    monkeypatch.chdir(tmp_path)  # no pages
    chapters = sum(entry.status == "chapter" for entry in papers())
    cases = [("tests/lowrank/test_eora.py", seconds * chapters), ("tests/test_cli.py", 10.0)]
    report = "".join(f'<testcase file="{file}" name="test_a" time="{time}"/>' for file, time in cases)
    (tmp_path / "tests.xml").write_text(f"<testsuite>{report}</testsuite>")
    busy = sum(time for _, time in cases)
    (tmp_path / "steps.tsv").write_text(f"environment\t100\nbook pages\t0\ntests\t{busy / 2}\n")
    assert projection.main(tmp_path / "steps.tsv", tmp_path / "tests.xml") == failed
    minutes = (100 + 10 / 2 + 57 * seconds / 2) / 60
    assert f"= {minutes:.1f} minutes" in capsys.readouterr().out
