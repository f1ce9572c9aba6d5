"""The pages that are made from files, with and without results, and the one key for the public address."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a module of scripts/ or book/_ext/."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))

    def load(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def test_every_marker_has_a_maker_and_the_reverse(script) -> None:
    used = set()
    for page in (ROOT / "book").glob("*.md"):
        used |= set(re.findall(r"<!-- generated: (\w+) -->", page.read_text()))
    assert used == set(script("pages").GENERATED)


def test_pages_say_so_while_nothing_is_recorded(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = script("pages")
    monkeypatch.setattr(pages, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(pages.ledger, "table", lambda: [])
    assert pages.ledger_table() == pages.NOTHING
    assert pages.bench(lambda spec, text: "") == pages.NOTHING


def test_bench_splits_what_one_chart_cannot_show(script, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = script("pages")
    Point = pages.plots.Point
    points = [Point(f"m{i}", 3.0 + i, 20.0 + i, 19.0, 29.0 + i) for i in range(9)]
    points += [Point("dense", 16.0, 18.0), Point("source", 5.0, 18.3, source=True)]
    monkeypatch.setattr(pages, "bench_points", lambda: points)
    drawn: list[dict] = []
    text = pages.bench(lambda spec, alt: drawn.append(spec) or "chart")
    assert len(drawn) == 2 and text.count("| m") == 9


def test_address_is_used_everywhere_or_named_as_undecided(script, monkeypatch: pytest.MonkeyPatch) -> None:
    extension, install = script("refimpl_book"), script("install_cell")
    monkeypatch.setattr(extension, "repository", lambda: "")
    assert "not decided" in extension.run_line("notebooks/tour.ipynb")
    assert "http" not in extension.run_line("notebooks/tour.ipynb")
    monkeypatch.setattr(extension, "repository", lambda: "https://github.com/someone/book")
    line = extension.run_line("notebooks/tour.ipynb")
    assert "colab.research.google.com/github/someone/book/blob/main/notebooks/tour.ipynb" in line
    monkeypatch.setattr(install.yaml, "safe_load", lambda text: {"repository": {"url": ""}})
    assert "not decided" in install.install_cell() and "git+" not in install.install_cell()
    monkeypatch.setattr(
        install.yaml, "safe_load", lambda text: {"repository": {"url": "https://example.org/b"}}
    )
    assert "git+https://example.org/b" in install.install_cell()


def test_only_one_file_holds_the_address() -> None:
    holders = [p for p in ROOT.glob("*") if p.is_file() and "repository:" in p.read_text(errors="ignore")]
    assert [p.name for p in holders if p.suffix in {".yml", ".toml", ".cff"}] == ["_config.yml"]


def test_charts_carry_their_description_and_cannot_end_the_script(script) -> None:
    html = script("refimpl_book").chart({"data": "</script>"}, 'a "quoted" text')
    assert html.count("</script>") == 1
    assert 'aria-label="a &quot;quoted&quot; text"' in html


def test_a_notebook_is_executed_again_when_its_code_changes(script, tmp_path: Path) -> None:
    execute = script("execute")
    path = tmp_path / "n.ipynb"

    def key(source: str, outputs: str) -> str:
        path.write_text(f'{{"cells": [{{"source": "{source}", "outputs": ["{outputs}"]}}]}}')
        return execute.key(path)

    assert key("1 + 1", "2") == key("1 + 1", "")
    assert key("1 + 1", "2") != key("1 + 2", "2")
