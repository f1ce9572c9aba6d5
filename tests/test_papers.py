"""Every paper with a chapter has all its parts, and every part belongs to a paper with a chapter."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from refimpl.core.errors import OptionError
from refimpl.papers import PARTS, Paper, paper, papers

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [entry for entry in papers() if entry.status == "chapter"]
BIB_KEYS = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "references.bib").read_text(), flags=re.M))


def toc_files() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]


def test_the_list_is_complete_and_well_formed() -> None:
    assert len(papers()) == 57
    for key in ("slug", "arxiv", "title"):
        values = [getattr(entry, key) for entry in papers()]
        assert len(set(values)) == len(values), key
    for entry in papers():
        assert entry.part in PARTS
        assert entry.host in {"compress", "loop", "cache", "sampling", "evaluation"}
        assert entry.status in {"planned", "chapter"}
        assert re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv)
        # arXiv numbers begin with year and month: a cheap guard against a wrong year
        assert entry.year == 2000 + int(entry.arxiv[:2])
        assert entry.slug.isidentifier()
        assert 5 <= entry.minutes <= 60 and entry.difficulty in (1, 2, 3)
        assert entry.objectives and entry.prerequisites


def test_planned_papers_claim_nothing() -> None:
    for entry in papers():
        if entry.status == "planned":
            assert not entry.files and not entry.kernels, entry.slug
            assert not (ROOT / entry.notebook).exists(), entry.slug
            assert not (ROOT / "data" / "results" / f"{entry.slug}.json").exists(), entry.slug


@pytest.mark.parametrize("entry", CHAPTERS, ids=lambda entry: entry.slug)
def test_a_chapter_has_all_its_parts(entry: Paper) -> None:
    assert (ROOT / entry.notebook).is_file()
    assert entry.files
    for file in entry.files:
        assert (ROOT / "refimpl" / file).exists(), file
    for kernel in entry.kernels:
        assert (ROOT / "refimpl" / "kernels" / f"{kernel}.py").is_file(), kernel
    assert list((ROOT / "tests" / entry.package.removeprefix("refimpl.")).glob(f"test_{entry.slug}*.py"))
    assert (ROOT / "refimpl" / "studies" / f"{entry.slug}.py").is_file()
    assert entry.notebook.removesuffix(".ipynb") in toc_files()
    assert f"book/{entry.part}" in toc_files()
    assert entry.slug in BIB_KEYS


def test_nothing_is_there_without_an_entry() -> None:
    pages = {ROOT / "notebooks" / "tour.ipynb", ROOT / "notebooks" / "kernels.ipynb"}
    known = {ROOT / entry.notebook for entry in CHAPTERS} | pages
    found = {path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert found <= known
    studies = {path.stem for path in (ROOT / "refimpl" / "studies").glob("[!_]*.py")}
    assert studies <= {entry.slug for entry in CHAPTERS} | {"tasks", "caches", "smollm2"}  # these have no paper
    listed = {ROOT / "refimpl" / file for entry in CHAPTERS for file in entry.files}
    for part in PARTS:
        for path in (ROOT / "refimpl" / part).glob("[!_]*.py"):
            assert path in listed, f"{path} belongs to no chapter"


def test_the_contents_hold_existing_files_once() -> None:
    files = toc_files()
    assert len(set(files)) == len(files)
    for file in files:
        assert (ROOT / f"{file}.md").is_file() or (ROOT / f"{file}.ipynb").is_file(), file
    pages = {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    assert pages <= set(files)


def test_readme_table_is_current() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "readme_table.py"], check=True)


def test_unknown_slug_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'eora'"):
        paper("eoar")


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_starts_with_the_same_install_cell() -> None:
    script = load_script("install_cell")
    for path in script.notebooks():
        cell = script.first_code_cell(json.loads(path.read_text()))
        assert "".join(cell["source"]) == script.install_cell(), f"{path}: python scripts/install_cell.py --write"
        assert cell["metadata"].get("tags") == ["remove-cell"], path


def test_notebooks_are_plain_markdown() -> None:
    """MyST roles and directives are raw text in Colab and Jupyter."""
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                assert not re.search(r"^(```|:::)\{|\{[a-z:]+\}`", "".join(cell["source"]), flags=re.M), path
