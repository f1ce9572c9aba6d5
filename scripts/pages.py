"""Text that the book and the README make from files: tables of papers, the ledger, the benches."""

from __future__ import annotations

from collections.abc import Callable

from refimpl.core.io import data_path
from refimpl.lab import ledger, plots
from refimpl.lab.records import Results
from refimpl.papers import PARTS, Paper, papers

#: Draws a chart: (Vega-Lite specification, text for those who do not see it) -> HTML.
Chart = Callable[[dict, str], str]


def chapters() -> list[Paper]:
    return [paper for paper in papers() if paper.status == "chapter"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def chapter_table(prefix: str) -> str:
    """The chapters, with links to the notebooks relative to `prefix`."""
    rows = [
        [
            PARTS[paper.part],
            f"[{paper.name}]({prefix}{paper.notebook})",
            f"[{paper.title}]({paper.url}), {paper.year}",
            f"{paper.minutes} min",
            f"{paper.difficulty} of 3",
        ]
        for paper in chapters()
    ]
    return table(["Part", "Chapter", "Paper", "Time", "Difficulty"], rows)


def planned_list() -> str:
    """What is planned, by part; named as planned."""
    lines = []
    for part, title in PARTS.items():
        names = [paper.name for paper in papers() if paper.part == part and paper.status == "planned"]
        if names:
            lines.append(f"- {title}: {', '.join(names)}.")
    return "\n".join(lines)


def state() -> str:
    done = len(chapters())
    return f"{done} of {len(papers())} papers {'has' if done == 1 else 'have'} a chapter so far."


def part_table(part: str) -> str:
    """The methods of a part and what each optimises, with their state."""
    rows = [
        [
            f"[{paper.name}](../{paper.notebook})" if paper.status == "chapter" else paper.name,
            f"[{paper.title}]({paper.url}), {paper.year}",
            "chapter" if paper.status == "chapter" else "planned",
        ]
        for paper in papers()
        if paper.part == part
    ]
    return table(["Method", "Paper", "State"], rows)


NOTHING = "*No results are recorded yet.*"
#: A study joins the bench by recording a dense arm and costs in bits per weight under this condition.
BENCH_CONDITION = "wikipedia"


def ledger_table() -> str:
    """Every judged claim."""
    rows = ledger.table()
    return ledger.markdown(rows) if rows else NOTHING


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


def bench(chart: Chart) -> str:
    """The language-model chart and its numbers as a table. Eight methods can be told apart in one chart."""
    points = bench_points()
    if not points:
        return NOTHING
    common = [point for point in points if point.source or point.method == "dense"]
    methods = [m for m in dict.fromkeys(p.method for p in points) if m not in {p.method for p in common}]
    parts = []
    for start in range(0, len(methods), 7):
        chosen = [*common, *(p for p in points if p.method in methods[start : start + 7])]
        drawing = plots.quality_chart(chosen)
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


GENERATED: dict[str, Callable[[Chart], str]] = {
    "state": lambda chart: state(),
    "chapters": lambda chart: chapter_table("../"),
    "planned": lambda chart: planned_list(),
    **{part: (lambda chart, part=part: part_table(part)) for part in PARTS},
    "ledger": lambda chart: ledger_table(),
    "language_models": bench,
}
