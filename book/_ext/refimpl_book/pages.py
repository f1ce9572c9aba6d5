"""Text that the book and the README make from files: tables of papers, the ledger, the benches."""

from __future__ import annotations

import dataclasses
import html
import importlib
import inspect
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote_plus

import refimpl
from refimpl.core.files.io import data_path
from refimpl.lab.show import plots
from refimpl.lab.study import ledger
from refimpl.lab.study.claims import Verdict
from refimpl.lab.study.records import Results
from refimpl.markdown import table
from refimpl.papers import PARTS, Paper, package, papers
from refimpl_book import caches, choosing, courses, tasks
from refimpl_book.listing import chapter_table, part_table, planned_list, state
from refimpl_book.live import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has a reader since 3.11
    import tomli as tomllib


#: Draws a chart: (Vega-Lite specification, text for those who do not see it) -> HTML.
Chart = Callable[[dict, str], str]


@dataclasses.dataclass(frozen=True)
class Door:
    """Where one kind of reader goes on from the first page: pages in order of preference, and what they find there."""

    reader: str
    pages: tuple[str, ...]
    text: str


DOORS = (
    Door("Read", ("notebooks/tour",), "A model pruned, quantized and repaired in five minutes"),
    Door("Study", ("book/lowrank",), "A chapter with exercises that check your answer"),
    Door("Teach", ("book/course_planner", "book/how_we_measure"), "Objectives, minutes and a syllabus"),
    Door("Use", ("book/choosing_a_method", "book/language_models"), "Which method for which budget"),
)


def in_contents(page: str) -> bool:
    return f"file: {page}\n" in (ROOT / "_toc.yml").read_text(encoding="utf8")


def doors() -> str:
    """A link for each kind of reader, to the first of its pages that is in the contents."""
    entries = []
    for door in DOORS:
        page = next(page for page in door.pages if in_contents(page))
        target = page.removeprefix("book/") if page.startswith("book/") else f"../{page}"
        entries.append(f'<li><a href="{target}.html"><b>{door.reader}</b><span>{door.text}</span></a></li>')
    return f'<ul class="doors">{"".join(entries)}</ul>'


# -- maps of the parts --


def maps() -> dict[str, dict[str, Any]]:
    """The maps of book/maps.toml by part."""
    return tomllib.loads((ROOT / "book" / "maps.toml").read_text(encoding="utf8"))


def _map_entry(name: str) -> str:
    """A method on a map: a chapter with a link, a paper that is planned, or a baseline with a link to its reference."""
    found = {paper.slug: paper for paper in papers()}.get(name)
    if found is None:
        target = f"api/methods.html#{getattr(refimpl, name).__module__}.{name}"
        return f'<a class="method baseline" href="{target}">{html.escape(name)}</a>'
    label = html.escape(found.name)
    if found.status == "chapter":
        return f'<a class="method chapter" href="../{found.notebook.removesuffix(".ipynb")}.html">{label}</a>'
    return f'<span class="method planned">{label}</span>'


def part_map(part: str) -> str:
    """Where the methods of a part stand between two questions, as a grid that becomes a list on a narrow screen."""
    drawn = maps()[part]
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in drawn["columns"])
    body = []
    for r, row in enumerate(drawn["rows"]):
        cells = []
        for c, column in enumerate(drawn["columns"]):
            here = [_map_entry(m["name"]) for m in drawn["methods"] if (m["row"], m["column"]) == (r, c)]
            cells.append(f'<td data-column="{html.escape(column)}">{" ".join(here)}</td>')
        body.append(f'<tr><th scope="row">{html.escape(row)}</th>{"".join(cells)}</tr>')
    title = f"{drawn['down']} (rows), against {drawn['across'][0].lower()}{drawn['across'][1:]} (columns)."
    key = (
        '<span class="method chapter">a chapter</span> <span class="method baseline">a baseline</span> '
        '<span class="method planned">planned</span>'
    )
    return (
        f'<table class="method-map"><caption>{html.escape(title)} <span class="map-key">{key}</span></caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


NOTHING = "*No results are recorded yet.*"
#: A study joins the bench by recording a dense arm and costs in bits per weight under this condition.
BENCH_CONDITION = "wikipedia"


# -- the ledger --

#: Verdict -> (class in the style sheet, sign that does not rely on colour)
VERDICTS = {
    "holds": ("holds", "\u2713"),
    "partly": ("partly", "\u25d0"),
    "does not hold here": ("fails", "\u2717"),
    "cannot be tested at this scale": ("untested", "?"),
}


@cache
def ledger_rows() -> tuple[dict[str, Any], ...]:
    """The ledger's rows on papers; several pages show them, and comparing hashes takes seconds."""
    slugs = {paper.slug for paper in papers()}
    return tuple(row for row in ledger.table() if row["paper"] in slugs)


def verdict_badge(verdict: str) -> str:
    style, sign = VERDICTS[verdict]
    return f'<span class="verdict {style}"><span aria-hidden="true">{sign}</span> {html.escape(verdict)}</span>'


def why_blind(row: dict[str, Any]) -> str:
    """Why a claim counts as untested although there are numbers."""
    if row["paper_effect"] is None:
        return "the chapter says why"
    return (
        f"the rule was not met, and the study as a whole could have missed an effect of the paper's size "
        f"({row['paper_effect']:.2g}); the number shown is the least favourable of its settings"
    )


def claim_card(row: dict[str, Any], paper: Paper) -> str:
    """One claim: the verdict, what the paper reports and what we measured, and against what."""
    doubts = [ledger.said(row["stale"])] if row["stale"] else []
    doubts += row["problems"]
    warning = f'<p class="doubt">{html.escape("; ".join(doubts))}</p>' if doubts else ""
    ours = f"{row['quantity']}: {row['estimate']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"
    facts = {
        "Paper": row["paper_number"],
        "Ours, 95 % interval": ours,
        "Compared with": row["control"],
        "Scale": row["scale"],
        "Smallest visible effect": f"{row['mde']:.2g}",
        **({"Why not tested": why_blind(row)} if row["verdict"] == Verdict.CANNOT_BE_TESTED.value else {}),
        "Rule": row["rule"],
        "Recorded": row["started"][:10] + (f"; stands as of {row['stands_as_of'][:10]}" if row["stands_as_of"] else ""),
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{html.escape(text)}</dd></div>" for name, text in facts.items())
    chapter = f"../{paper.notebook.removesuffix('.ipynb')}.html"
    return (
        f'<section class="claim" id="claim-{row["id"]}" data-part="{paper.part}" data-verdict="{row["verdict"]}">'
        f'<p class="claim-head">{verdict_badge(row["verdict"])} <a href="{chapter}">{html.escape(paper.name)}</a> '
        f'<span class="claim-part">{html.escape(PARTS[paper.part])}</span></p>'
        f'<p class="claim-text">{html.escape(row["text"])} <a class="claim-link" href="#claim-{row["id"]}" '
        f'aria-label="Link to this claim">#</a></p>{warning}<dl>{shown}</dl></section>'
    )


def ledger_page() -> str:
    """Totals by part and verdict, a filter (shown by ledger.js), and every judged claim."""
    rows = ledger_rows()
    if not rows:
        return NOTHING
    of = {paper.slug: paper for paper in papers()}
    parts = [part for part in PARTS if any(of[row["paper"]].part == part for row in rows)]
    count = Counter((of[row["paper"]].part, row["verdict"]) for row in rows)

    def numbers(name: str, shown: list[str]) -> str:
        cells = "".join(f"<td>{sum(count[part, verdict] for part in shown)}</td>" for verdict in VERDICTS)
        return f'<tr><th scope="row">{name}</th>{cells}</tr>'

    header = "".join(f'<th scope="col">{verdict_badge(verdict)}</th>' for verdict in VERDICTS)
    totals = (
        f'<table class="ledger-totals"><thead><tr><td></td>{header}</tr></thead><tbody>'
        f"{''.join(numbers(html.escape(PARTS[part]), [part]) for part in parts)}{numbers('All', parts)}</tbody></table>"
    )

    def choice(name: str, label: str, everything: str, options: dict[str, str]) -> str:
        entries = "".join(f'<option value="{value}">{html.escape(text)}</option>' for value, text in options.items())
        return f'<label>{label} <select name="{name}"><option value="">{everything}</option>{entries}</select></label>'

    form = (
        '<form class="ledger-filter" hidden>'
        + choice("part", "Part", "all parts", {part: PARTS[part] for part in parts})
        + choice("verdict", "Verdict", "all verdicts", {verdict: verdict for verdict in VERDICTS})
        + '<button type="reset">Show all</button><output aria-live="polite"></output></form>'
    )
    order = {paper.slug: place for place, paper in enumerate(papers())}
    cards = [claim_card(row, of[row["paper"]]) for row in sorted(rows, key=lambda row: order[row["paper"]])]
    return "\n\n".join([totals, form, *cards])


def ledger_totals() -> str:
    """One bar with the share of each verdict; every entry links to those claims."""
    rows = ledger_rows()
    if not rows:
        return NOTHING
    count = Counter(row["verdict"] for row in rows)
    bars, entries = [], []
    for verdict, (style, sign) in VERDICTS.items():
        if count[verdict]:
            bars.append(f'<span class="{style}" style="flex-grow: {count[verdict]}"></span>')
        entries.append(
            f'<li><a href="ledger.html?verdict={quote_plus(verdict)}"><span class="verdict {style}">'
            f'<span aria-hidden="true">{sign}</span> {count[verdict]}</span> {html.escape(verdict)}</a></li>'
        )
    papers_judged = len({row["paper"] for row in rows})
    return (
        f'<p class="totals-title"><a href="ledger.html"><b>{len(rows)} claims</b></a> of {papers_judged} papers '
        f"checked:</p>"
        f'<div class="totals-bar" aria-hidden="true">{"".join(bars)}</div><ul class="totals">{"".join(entries)}</ul>'
    )


# -- the benches --


def bench_points() -> list[plots.Point]:
    """All compressed language models of all studies; an arm that two studies measured is shown once."""
    found: dict[tuple[str, str], plots.Point] = {}
    for path in sorted(data_path("results").glob("*.json")):
        results = Results.load(path)
        here = [r for r in results.records() if r.condition == BENCH_CONDITION and r.metric == "nll"]
        if any(r.arm == "dense" for r in here) and all(r.cost is not None for r in here):
            for point in plots.points(results, BENCH_CONDITION, seed=min(r.seed for r in here)):
                found.setdefault((point.method, point.label), point)
    return list(found.values())


def welcome_chart(chart: Chart) -> str:
    """The chart of the first page: single methods that keep the perplexity within five times the dense model's."""
    points = bench_points()
    dense = next((point for point in points if point.method == "dense"), None)
    if dense is None:
        return NOTHING
    chosen = [p for p in points if p.perplexity <= 5 * dense.perplexity and not {"+", "-"} & set(p.method)]
    spec = plots.quality_chart(chosen).to_dict()
    return chart({**spec, "height": 250}, plots.describe(chosen))


def by_sevens(methods: list[str]) -> list[list[str]]:
    """Eight methods can be told apart in one chart, and the dense model is one of them."""
    return [methods[start : start + 7] for start in range(0, len(methods), 7)]


def bench(chart: Chart) -> str:
    """The language-model chart and its numbers as a table."""
    points = bench_points()
    if not points:
        return NOTHING
    common = [point for point in points if point.source or point.method == "dense"]
    methods = [m for m in dict.fromkeys(p.method for p in points) if m not in {p.method for p in common}]
    methods.sort(key=lambda method: "+" in method or "-" in method)  # single methods meet in the first chart
    parts = []
    for group in by_sevens(methods):
        chosen = [*common, *(p for p in points if p.method in group)]
        drawing = plots.quality_chart(chosen)
        parts.append(f"**{', '.join(group)}**:")
        parts.append(chart(drawing.to_dict(), plots.describe(chosen)))
    rows = [
        [
            f"{point.method} {point.label}".strip(),
            f"{point.bits:.2f}",
            f"{point.perplexity:.2f}",
            f"{point.low:.2f} to {point.high:.2f}" if point.low is not None else "",
        ]
        for point in sorted(points, key=lambda point: (point.method, point.bits))
    ]
    numbers = table(["Model", "Bits per weight", "Perplexity", "95 % interval"], rows)
    return "\n\n".join([*parts, "The same numbers as a table:", numbers])


#: What a study records its classifiers under, and what the page calls it.
CLASSIFIERS = {
    "mnist resnet": "Residual network, MNIST",
    "digits resnet": "Residual network, digits",
    "mnist vit": "Vision transformer, MNIST",
    "digits vit": "Vision transformer, digits",
}


def classifier_bench_points(condition: str) -> list[plots.ClassifierPoint]:
    """All classifiers that studies recorded under a condition.

    Studies that train their own dense model have another one than those that start from the shipped one; each is then
    named after its paper.
    """
    found: dict[tuple[str, str], plots.ClassifierPoint] = {}
    names = {paper.slug: paper.name for paper in papers()}
    for path in sorted(data_path("results").glob("*.json")):
        results = Results.load(path)
        recorded = {r.metric for r in results.records() if (r.arm, r.condition) == ("dense", condition)}
        if not {"correct", "bytes"} <= recorded:
            continue
        for point in plots.classifier_points(results, condition):
            other = found.get((point.method, point.label))
            if other is not None and (other.accuracy, other.loss) != (point.accuracy, point.loss):
                paper = results.header["paper"]
                label = f"{point.label} ({names.get(paper, paper)})".strip()
                point = dataclasses.replace(point, label=label)
            found.setdefault((point.method, point.label), point)
    return list(found.values())


def classifier_bench(chart: Chart) -> str:
    """For each data set and model: accuracy against bytes and against operations, and the numbers as a table."""
    parts = []
    for condition, title in CLASSIFIERS.items():
        points = classifier_bench_points(condition)
        if not points:
            continue
        parts.append(f"## {title}")
        dense = [point for point in points if point.method == "dense"]
        methods = [m for m in dict.fromkeys(p.method for p in points) if m != "dense"]
        for group in by_sevens(methods):
            chosen = [*dense, *(point for point in points if point.method in group)]
            for x in ("bytes", "flops", "bit_operations"):
                # quantisation leaves FLOPs as they are, and not every study counts bit operations
                drawn = [point for point in chosen if getattr(point, x) is not None]
                if len({getattr(point, x) for point in drawn}) > 1:
                    drawing = plots.classifier_chart(drawn, x)
                    parts.append(chart(drawing.to_dict(), plots.describe_classifiers(drawn, x)))
        rows = [
            [
                f"{point.method} {point.label}".strip(),
                f"{point.bytes:,.0f}",
                f"{point.flops / 1e6:.3f}",
                "" if point.bit_operations is None else f"{point.bit_operations / 1e6:,.1f}",
                f"{point.accuracy:.1%}",
                "{:.1%} to {:.1%}".format(*point.accuracy_interval) if point.accuracy_interval else "",
                f"{point.loss:.4f}",
            ]
            for point in sorted(points, key=lambda point: (point.method, point.bytes))
        ]
        header = ["Model", "Bytes", "MFLOP", "Bit operations (millions)", "Accuracy", "95 % interval", "Loss (nats)"]
        parts += ["The same numbers as a table:", table(header, rows)]
    return "\n\n".join(parts) or NOTHING


def code_table() -> str:
    """The official code of each paper that has one, and its licence; papers with a chapter first."""
    codes = tomllib.loads((ROOT / "book" / "codes.toml").read_text(encoding="utf8"))
    rows = [
        [
            paper.name,
            "chapter" if paper.status == "chapter" else "planned",
            f"`{codes[paper.slug]['repository']}`",
            codes[paper.slug]["licence"] or "no licence file found",
        ]
        for paper in sorted(papers(), key=lambda paper: paper.status != "chapter")
        if paper.slug in codes
    ]
    return table(["Paper", "State", "Repository on GitHub", "Licence"], rows)


# -- choosing a method --


def task_scores() -> dict[str, float]:
    """Mean score of each compressed language model over the tasks, by its name; empty while none is recorded."""
    path = data_path("results") / "tasks.json"
    if not path.exists():
        return {}
    results = Results.load(path)
    conditions = {r.condition for r in results.records() if r.arm == "dense" and r.metric == "restricted"}
    tasks = sorted(name.removeprefix("task ") for name in conditions if name.startswith("task "))
    return {f"{p.method} {p.label}".strip(): p.score for p in plots.task_points(results, tasks)} if tasks else {}


def choosing_language() -> str:
    points = bench_points()
    return choosing.language_table(points, task_scores()) if points else NOTHING


def choosing_classifiers() -> str:
    parts = []
    for condition, title in CLASSIFIERS.items():
        if points := classifier_bench_points(condition):
            parts += [f"**{title}**", choosing.classifier_table(points)]
    return "\n\n".join(parts) or NOTHING


# -- the reference --

#: Page of book/api -> packages whose modules it documents.
API = {
    "core": ["refimpl.core"],
    "methods": ["refimpl.methods", "refimpl.baselines", *map(package, PARTS)],
    "kernels": ["refimpl.kernels"],
    "lab": ["refimpl.lab", "refimpl.papers"],
}


def modules(package: str) -> Iterator[ModuleType]:
    """A module or package and all public modules below it."""
    module = importlib.import_module(package)
    yield module
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{package}."):
        if not any(name.startswith("_") for name in info.name.split(".")):
            yield importlib.import_module(info.name)


def documented(page: str) -> Iterator[ModuleType]:
    """The modules of a page that have something public."""
    for name in API[page]:
        if (ROOT / Path(*name.split("."))).is_dir() or (ROOT / f"{name.replace('.', '/')}.py").exists():
            for module in modules(name):
                if public(module):
                    yield module


def public(module: ModuleType) -> list[str]:
    """Functions and classes that a module itself defines and does not hide, in the order of the file."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isroutine(value))
    ]


def reference(page: str) -> str:
    """Directives that document every module of a page from its docstrings."""
    parts = []
    for module in documented(page):
        parts.append(f"## {module.__name__.removeprefix('refimpl.')}")
        parts.append(
            f"```{{eval-rst}}\n.. automodule:: {module.__name__}\n   :members: {', '.join(public(module))}\n```"
        )
    return "\n\n".join(parts)


def reference_overview() -> str:
    """What `from refimpl import ...` offers, one line each, with links to the reference."""
    rows = []
    pages_of = {module.__name__: page for page in API for module in documented(page)}
    for name in sorted(refimpl.__all__, key=str.lower):
        value = getattr(refimpl, name)
        home = getattr(value, "__module__", None)
        if home not in pages_of:
            continue
        line = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append([f'<a href="api/{pages_of[home]}.html#{home}.{name}"><code>{name}</code></a>', line])
    return table(["Name", "What it is"], rows)


def _of_part(make: Callable[[str], str], part: str) -> Callable[[Chart], str]:
    return lambda chart: make(part)


GENERATED: dict[str, Callable[[Chart], str]] = {
    "state": lambda chart: state(),
    "chapters": lambda chart: chapter_table("../"),
    "planned": lambda chart: planned_list(),
    **{part: _of_part(part_table, part) for part in maps()},
    **{f"map_{part}": _of_part(part_map, part) for part in maps()},
    "ledger": lambda chart: ledger_page(),
    "doors": lambda chart: doors(),
    "totals": lambda chart: ledger_totals(),
    "welcome_chart": welcome_chart,
    "language_models": bench,
    "classifiers": classifier_bench,
    "codes": lambda chart: code_table(),
    "planner": lambda chart: courses.planner(),
    "syllabus": lambda chart: courses.syllabus(),
    "exercises": lambda chart: courses.exercises(),
    "choosing_language": lambda chart: choosing_language(),
    "choosing_classifiers": lambda chart: choosing_classifiers(),
    **tasks.GENERATED,
    **caches.GENERATED,
    "api": lambda chart: reference_overview(),
    "api_core": lambda chart: reference("core"),
    "api_methods": lambda chart: reference("methods"),
    "api_kernels": lambda chart: reference("kernels"),
    "api_lab": lambda chart: reference("lab"),
}
