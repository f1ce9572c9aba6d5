"""The pages that are made from files, with and without results, and the one key for the public address."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from refimpl_book import extension, generate, listing, live, pages

ROOT = Path(__file__).resolve().parent.parent


def test_every_marker_has_a_maker_and_the_reverse() -> None:
    used = set()
    for page in (ROOT / "book").rglob("*.md"):
        used |= set(re.findall(r"<!-- generated: (\w+) -->", page.read_text()))
    assert used == set(pages.GENERATED)


def test_pages_say_so_while_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    monkeypatch.setattr(pages, "ledger_rows", lambda: ())
    assert pages.ledger_page() == pages.NOTHING and pages.ledger_totals() == pages.NOTHING
    assert pages.welcome_chart(lambda spec, text: "") == pages.NOTHING
    assert pages.choosing_language() == pages.NOTHING and pages.choosing_classifiers() == pages.NOTHING
    assert pages.bench(lambda spec, text: "") == pages.NOTHING


def test_bench_splits_what_one_chart_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    Point = pages.plots.Point
    points = [Point(f"m{i}", 3.0 + i, 20.0 + i, 19.0, 29.0 + i) for i in range(9)]
    points += [Point("dense", 16.0, 18.0), Point("source", 5.0, 18.3, source=True)]
    monkeypatch.setattr(pages, "bench_points", lambda: points)
    drawn: list[dict] = []
    text = pages.bench(lambda spec, alt: drawn.append(spec) or "chart")
    assert len(drawn) == 2 and text.count("| m") == 9


def test_address_is_used_everywhere_or_named_as_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "repository", lambda: "")
    assert "not decided" in extension.run_line("notebooks/tour.ipynb")
    assert "http" not in extension.run_line("notebooks/tour.ipynb")
    monkeypatch.setattr(extension, "repository", lambda: "https://github.com/someone/book")
    line = extension.run_line("notebooks/tour.ipynb")
    assert "colab.research.google.com/github/someone/book/blob/main/notebooks/tour.ipynb" in line
    monkeypatch.setattr(generate.yaml, "safe_load", lambda text: {"repository": {"url": ""}})
    assert "not decided" in generate.install_cell() and "git+" not in generate.install_cell()
    monkeypatch.setattr(generate.yaml, "safe_load", lambda text: {"repository": {"url": "https://example.org/b"}})
    assert "git+https://example.org/b" in generate.install_cell()


def test_only_one_file_holds_the_address() -> None:
    holders = [p for p in ROOT.glob("*") if p.is_file() and "repository:" in p.read_text(errors="ignore")]
    assert [p.name for p in holders if p.suffix in {".yml", ".toml", ".cff"}] == ["_config.yml"]


def test_charts_carry_their_description_and_cannot_end_the_script() -> None:
    html = extension.chart({"data": "</script>"}, 'a "quoted" text')
    assert html.count("</script>") == 1
    assert 'aria-label="a &quot;quoted&quot; text"' in html


def test_a_notebook_is_executed_again_when_its_code_changes(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"

    def key(source: str, outputs: str) -> str:
        path.write_text(f'{{"cells": [{{"source": "{source}", "outputs": ["{outputs}"]}}]}}')
        return live.key(path)

    assert key("1 + 1", "2") == key("1 + 1", "")
    assert key("1 + 1", "2") != key("1 + 2", "2")


def test_maps_hold_every_paper_of_their_part_and_only_methods_that_exist() -> None:
    for part, drawn in pages.maps().items():
        names = {method["name"] for method in drawn["methods"]}
        slugs = {paper.slug for paper in pages.papers() if paper.part == part}
        assert slugs <= names, part
        assert all(hasattr(pages.refimpl, name) for name in names - slugs), part
        for method in drawn["methods"]:
            assert method["column"] < len(drawn["columns"]) and method["row"] < len(drawn["rows"]), method
        assert pages.part_map(part).count('class="method ') == len(drawn["methods"]) + 3  # and the key
    chapters = {paper.part for paper in listing.chapters()}
    assert chapters <= set(pages.maps()), "a part with a chapter has a map"


def test_ledger_page_escapes_filters_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "id": "a",
        "paper": "eora",
        "text": "2 < 3",
        "paper_number": "1",
        "verdict": "holds",
        "quantity": "q",
        "estimate": 1.0,
        "low": 0.5,
        "high": 2.0,
        "control": "c",
        "scale": "s",
        "mde": 0.1,
        "rule": "r",
        "started": "2026-01-02T03:04:05Z",
        "stands_as_of": None,
        "stale": ["refimpl.core.files.io"],
        "problems": [],
    }
    other = {**row, "id": "b", "verdict": "partly", "stale": [], "stands_as_of": "2026-02-03T04:05:06Z"}
    monkeypatch.setattr(pages, "ledger_rows", lambda: (row, other))
    text = pages.ledger_page()
    assert "<dd>2026-01-02</dd>" in text and "<dd>2026-01-02; stands as of 2026-02-03</dd>" in text
    assert "2 &lt; 3" in text and text.count("stale:") == 1
    assert text.count('<section class="claim"') == 2 and 'data-part="lowrank" data-verdict="partly"' in text
    assert '<form class="ledger-filter" hidden>' in text, "without scripts there is no filter that does nothing"
    assert "<b>2 claims</b></a> of 1 papers" in pages.ledger_totals()


def test_doors_lead_to_pages_of_the_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(any(pages.in_contents(page) for page in door.pages) for door in pages.DOORS)
    monkeypatch.setattr(pages, "in_contents", lambda page: page != "book/choosing_a_method")
    assert 'href="language_models.html"' in pages.doors() and "choosing" not in pages.doors()


def test_every_public_module_is_in_the_reference() -> None:
    shown = {module.__name__ for page in pages.API for module in pages.documented(page)}
    for package in ("core", "baselines", "kernels", "lab", *pages.PARTS):
        for path in (ROOT / "refimpl" / package).rglob("[!_]*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(name)
            assert name in shown or not pages.public(module), name


def test_what_readers_call_has_a_docstring_with_an_example() -> None:
    """Everything public has a docstring; exports of `refimpl`, and functions of hosts and methods, have an example."""
    undocumented, without_example = [], []
    for page in pages.API:
        for module in pages.documented(page):
            for name in pages.public(module):
                value = getattr(module, name)
                text = inspect.getdoc(value) or ""
                if not text:
                    undocumented.append(f"{module.__name__}.{name}")
                asked = page in ("core", "methods") and inspect.isroutine(value)
                if asked and ">>>" not in text:
                    without_example.append(f"{module.__name__}.{name}")
    for name in pages.refimpl.__all__:
        value = getattr(pages.refimpl, name)
        results_only = {"Plan", "Report"}  # returned by `plan` and `compress`, whose examples show them
        if callable(value) and name not in results_only and ">>>" not in (inspect.getdoc(value) or ""):
            without_example.append(name)
    assert not undocumented, undocumented
    assert not without_example, without_example


def test_pages_link_to_their_source_once_the_address_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "repository", lambda: "")
    assert extension.page_links("book/ledger") == ""
    monkeypatch.setattr(extension, "repository", lambda: "https://github.com/someone/book")
    links = extension.page_links("notebooks/lowrank/eora")
    assert 'href="https://github.com/someone/book/edit/main/notebooks/lowrank/eora.ipynb"' in links
    assert "https://github.com/someone/book/issues/new?title=" in links
    assert extension.page_links("search") == "", "pages without a source have nothing to edit"


def test_docstrings_cannot_turn_into_markup() -> None:
    lines = ["Scores |x| * y, `name`s and ``a * b``.", "", ">>> 2 * 3", "6"]
    extension.docstring_lines(None, "function", "f", None, None, lines)
    assert lines == ["Scores \\|x\\| \\* y, `name`\\ s and ``a * b``.", "", ">>> 2 * 3", "6"]


def test_indented_steps_of_a_module_stand_as_they_are() -> None:
    lines = [
        "The steps:",
        "",
        "    a = b * c",
        "      and |d|",
        "",
        "    e",
        "",
        "Then *x*.",
        "",
        "1. One",
        "",
        "   more",
        "",
    ]
    extension.docstring_lines(None, "module", "m", None, None, lines)
    steps, listed = ["::", "", "    a = b * c", "      and |d|", "", "    e", ""], ["1. One", "", "   more", ""]
    assert lines == ["The steps:", "", *steps, "Then \\*x\\*.", "", *listed]


def test_versions_are_published_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from publish import publish

    book, site = tmp_path / "html", tmp_path / "pages"
    book.mkdir()
    (book / "index.html").write_text("first")
    site.mkdir()
    assert publish(book, site, "v1.2") == ["v1.2"]
    assert publish(book, site, "v1.10") == ["v1.10", "v1.2"]
    (book / "index.html").write_text("second")
    assert publish(book, site, "latest") == ["latest", "v1.10", "v1.2"]
    assert json.loads((site / "versions.json").read_text()) == ["latest", "v1.10", "v1.2"]
    assert (site / "v1.2" / "index.html").read_text() == "first"
    assert (site / "latest" / "index.html").read_text() == "second"
    assert "url=latest/index.html" in (site / "index.html").read_text()
    with pytest.raises(SystemExit, match="must be"):
        publish(book, site, "../elsewhere")


def test_workflow_renders_reads_and_publishes() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())
    assert workflow[True]["push"]["tags"] == ["v*"]  # YAML 1.1 reads the key "on" as true
    steps = workflow["jobs"]["publish"]["steps"]
    commands = [step.get("run", "") for step in steps]
    places = [
        next(k for k, run in enumerate(commands) if part in run)
        for part in ("make site", "tests/browser", "publish.py")
    ]
    assert places == sorted(places), "what the browser objects to is not published"
    assert steps[0]["with"]["fetch-depth"] == 0, "the ledger checks commits"


def test_official_codes_belong_to_papers() -> None:
    codes = pages.tomllib.loads((ROOT / "book" / "codes.toml").read_text())
    assert set(codes) <= {paper.slug for paper in pages.papers()}
    assert {paper.slug for paper in listing.chapters()} <= set(codes), "a chapter names the licence of its paper's code"
    assert pages.code_table().count("\n") == len(codes) + 1


def test_outputs_go_into_a_notebook_without_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("execute", ROOT / "scripts" / "execute.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    result, bar = (
        {"output_type": "stream", "name": "stdout", "text": ["2\n"]},
        {"output_type": "stream", "name": "stderr"},
    )
    cells = [{"cell_type": "markdown", "source": "é"}, {"cell_type": "code", "source": "1 + 1", "metadata": {"id": 1}}]
    (tmp_path / "done.ipynb").write_text(
        json.dumps({"cells": [cells[0], cells[1] | {"outputs": [bar, result], "execution_count": 7, "metadata": {}}]})
    )
    (tmp_path / "n.ipynb").write_text(
        json.dumps({"cells": [cells[0], cells[1] | {"outputs": [], "execution_count": 1}]})
    )
    monkeypatch.setattr(script, "executed_path", lambda notebook: tmp_path / "done.ipynb")
    script.put_outputs(tmp_path / "n.ipynb")
    now = json.loads((tmp_path / "n.ipynb").read_text(encoding="utf8"))
    assert now["cells"] == [cells[0], cells[1] | {"outputs": [result], "execution_count": 7}]
