"""Every paper with a chapter has all its parts, and every part belongs to a paper with a chapter."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from refimpl_book import generate

import refimpl
from refimpl.core.cache import Policy
from refimpl.core.compress.method import Method
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


def test_what_is_made_from_files_is_up_to_date() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in generate.outdated()]
    assert not names, f"{names}: run `make generated` (python -m refimpl_book.generate --write)"


def test_what_is_made_follows_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another chapter, of a part that has none yet: all that must not be typed by hand."""
    new = dataclasses.replace(paper("transferable_prompt"), status="chapter", exports=("Prompt", "tune"))
    entries = tuple(new if entry.slug == new.slug else entry for entry in papers())
    monkeypatch.setattr(generate, "papers", lambda: entries)
    monkeypatch.setattr(generate.listing, "papers", lambda: entries)
    made = {path.relative_to(ROOT).as_posix(): text for path, text in generate.outdated().items()}
    assert set(made) == {"refimpl/__init__.py", "refimpl/prompting/__init__.py", "_toc.yml", "README.md"}
    assert "    from refimpl.prompting import Prompt, tune\n" in made["refimpl/__init__.py"]
    assert '    "prompting": ("Prompt", "tune"),\n' in made["refimpl/__init__.py"]
    names = ast.literal_eval(made["refimpl/__init__.py"].split("__all__ = ")[1].split("]")[0] + "]")
    assert set(names) == {*refimpl.__all__, "Prompt", "tune"}
    source = 'from refimpl.prompting.transferable_prompt import Prompt, tune\n\n__all__ = ["Prompt", "tune"]\n'
    assert made["refimpl/prompting/__init__.py"].endswith(source)
    listed = [part for part in yaml.safe_load(made["_toc.yml"])["parts"] if part["caption"] == PARTS["prompting"]]
    files = ["book/prompting", "notebooks/prompting/transferable_prompt"]
    assert [chapter["file"] for part in listed for chapter in part["chapters"]] == files
    assert f"](notebooks/prompting/{new.slug}.ipynb)" in made["README.md"]


def test_each_name_is_exported_once_and_methods_are_methods() -> None:
    names = [name for entry in papers() for name in entry.exports]
    assert len(set(names)) == len(names)
    for entry in papers():
        assert not entry.exports or entry.status == "chapter", entry.slug
        kind = {"compress": Method, "cache": Policy}.get(entry.host)
        for name in entry.exports:
            value = getattr(refimpl, name)
            assert value.__module__.startswith(entry.module), f"{name} is not of {entry.slug}"
            assert kind is None or issubclass(value, kind), f"{name} is no {kind.__name__}"


def test_unknown_slug_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'eora'"):
        paper("eoar")


def test_an_install_cell_is_put_first_and_kept() -> None:
    text = (ROOT / "notebooks" / "tour.ipynb").read_text()
    notebook = json.loads(text)
    at = next(k for k, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code")
    first = notebook["cells"].pop(at)
    assert "".join(first["source"]) == generate.install_cell() and first["metadata"] == {"tags": ["remove-cell"]}
    again = json.loads(generate.with_install_cell(json.dumps(notebook)))
    assert again["cells"][at]["source"] == first["source"] and len(again["cells"]) == len(notebook["cells"]) + 1
    assert generate.with_install_cell(text) == text
    first["source"] = ["# On Colab this cell installed something else."]
    notebook["cells"].insert(at, first)
    assert json.loads(generate.with_install_cell(json.dumps(notebook)))["cells"] == json.loads(text)["cells"]


def test_notebooks_are_plain_markdown() -> None:
    """MyST roles and directives are raw text in Colab and Jupyter."""
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                assert not re.search(r"^(```|:::)\{|\{[a-z:]+\}`", "".join(cell["source"]), flags=re.M), path
