"""Text that the book and the README make from files: tables of papers, the ledger, the benches."""

from __future__ import annotations

import dataclasses
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
        header = [
            "Model",
            "Bytes",
            "MFLOP",
            "Bit operations (millions)",
            "Accuracy",
            "95 % interval",
            "Loss (nats)",
        ]
        parts += ["The same numbers as a table:", table(header, rows)]
    return "\n\n".join(parts) or NOTHING


GENERATED: dict[str, Callable[[Chart], str]] = {
    "state": lambda chart: state(),
    "chapters": lambda chart: chapter_table("../"),
    "planned": lambda chart: planned_list(),
    "pruning": lambda chart: part_table("pruning"),
    "quantization": lambda chart: part_table("quantization"),
    "lowrank": lambda chart: part_table("lowrank"),
    "ledger": lambda chart: ledger_table(),
    "language_models": bench,
    "classifiers": classifier_bench,
}
