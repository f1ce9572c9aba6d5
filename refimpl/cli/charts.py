"""The chart of a bench, with models of your own in it."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.cli.console import one_of, waiting
from refimpl.core.arguments import misfit
from refimpl.core.errors import OptionError, nearest, reason, require
from refimpl.papers import papers

if TYPE_CHECKING:
    from refimpl.lab.measure.metrics import Perplexity
    from refimpl.lab.show.plots import ClassifierPoint, Point

BENCHES = ("wikipedia", "mnist resnet", "digits resnet", "mnist vit")
FORMATS = (".html", ".png", ".svg")
COSTS = ("bytes", "flops", "bit_operations")
MOST = 8  # methods that can be distinguished in one chart


def chart(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What `refimpl evaluate --json` wrote, the dense model first; the recorded results if left out."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="What to write: .html (interactive), .png or .svg.")] = Path("chart.html"),
    bench: Annotated[
        str,
        typer.Option(
            help="The corpus of language models, or the data set and model of classifiers: "
            f"{', '.join(BENCHES)}; of your own files any corpus in them.",
            autocompletion=lambda: list(BENCHES),
        ),
    ] = "wikipedia",
    recorded: Annotated[
        bool | None,
        typer.Option(help="Draw the results recorded in the book. [default: only where no files are given]"),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            help="Only results of this paper.", callback=one_of("--paper", lambda: [paper.slug for paper in papers()])
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only results of this method, such as GPTQ or GPTQ+EoRA; may be repeated.")
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            help=f"Horizontal axis of classifiers: {', '.join(COSTS)}.", callback=one_of("--cost", lambda: list(COSTS))
        ),
    ] = "bytes",
    title: Annotated[str, typer.Option(help="Above the chart.")] = "",
) -> None:
    """Draw how good models are against their size: recorded results, your own, or both."""
    if out.suffix not in FORMATS:
        raise OptionError(f"--out {out}: the name must end in {', '.join(FORMATS)}")
    with waiting("Loading the plotting libraries"):
        from refimpl.core.files.io import atomic_write
        from refimpl.lab.show import plots
    wants_recorded = recorded if recorded is not None else not files
    found: list[Any] = list(_recorded(bench, paper)) if wants_recorded else []
    if method:
        known = list(dict.fromkeys(point.method for point in found))
        for name in method:
            if name not in known:
                raise OptionError(f"--method {name}: {bench} has {nearest(name, known)}")
        found = [point for point in found if point.method in method or _is_base(point)]
    found += _own(files, bench) if files else []
    if not found:
        raise OptionError(f"--bench {bench}: no recorded result has it; there are {nearest(bench, BENCHES)}")
    language = isinstance(found[0], plots.Point)
    if cost != "bytes" and not language:
        found = [point for point in found if getattr(point, cost) is not None]
    groups = _groups(found)
    if len(groups) > 1 and out.suffix != ".html":
        names = ", ".join(dict.fromkeys(point.method for point in found))
        raise OptionError(
            f"--out {out}: a picture shows at most {MOST} methods; choose with --method from {names}, or write .html"
        )
    with waiting("Drawing"), atomic_write(out) as temporary:
        if out.suffix == ".html":
            drawn = [
                (plots.quality_chart(group, title), plots.describe(group, title))
                if language
                else (
                    plots.classifier_chart(group, cost, title=title),
                    plots.describe_classifiers(group, cost, title=title),
                )
                for group in groups
            ]
            temporary.write_text(_page(drawn, title or f"Bench: {bench}"), encoding="utf-8")
        else:
            figure = (
                plots.quality_figure(groups[0], title)
                if language
                else plots.classifier_figure(groups[0], title=title, x=(cost,))
            )
            if out.suffix == ".png":
                temporary.write_bytes(plots.png(figure))
            else:
                figure.savefig(temporary, format="svg")
    typer.echo(f"Chart of {len(found)} models: {out}")


def _is_base(point: Any) -> bool:
    return point.method == "dense" or getattr(point, "source", False)


def _groups(points: list[Any]) -> list[list[Any]]:
    """Points in charts of at most eight methods; the dense model and the source checkpoint are in each."""
    base = [point for point in points if _is_base(point)]
    names = list(dict.fromkeys(point.method for point in points if not _is_base(point)))
    names.sort(key=lambda name: "+" in name or "-" in name)  # single methods meet in the first chart
    room = MOST - len({point.method for point in base if not getattr(point, "source", False)})
    return [
        [*base, *(point for point in points if point.method in names[start : start + room])]
        for start in range(0, max(1, len(names)), room)
    ]


def _recorded(bench: str, paper: str | None) -> list[Point] | list[ClassifierPoint]:
    """Every arm that studies recorded under a condition; one that two of them measured is shown once."""
    from refimpl.core.files.io import data_path
    from refimpl.lab.show import plots
    from refimpl.lab.study.records import Results

    found: dict[tuple[str, str], Any] = {}
    for path in sorted(data_path("results").glob("*.json")):
        if paper not in (None, path.stem):
            continue
        results = Results.load(path)
        here = [record for record in results.records() if record.condition == bench]
        dense = {record.metric for record in here if record.arm == "dense"}
        points: list[Any] = []
        if "nll" in dense and all(record.cost is not None for record in here if record.metric == "nll"):
            points = plots.points(results, bench, seed=min(r.seed for r in here if r.metric == "nll"))
        elif {"correct", "bytes"} <= dense:
            points = plots.classifier_points(results, bench)
        for point in points:
            found.setdefault((point.method, point.label), point)
    return list(found.values())


def _own(files: list[Path], bench: str) -> list[Point]:
    """Points of evaluated models; intervals are paired with the first file where both read the same documents."""
    from refimpl.lab.measure.statistics import compare
    from refimpl.lab.show import plots

    read = [_read(file, bench) for file in files]
    base = read[0][2]
    points = []
    for name, bits, result in read:
        low = high = None
        if result is not base:
            try:
                gap = compare(result, base)
                low, high = gap.low * base.value, gap.high * base.value
            except OptionError:
                typer.echo(f"{name}: measured on other text than {read[0][0]}, so without an interval", err=True)
        points.append(plots.Point(name, bits, result.value, low, high))
    return points


def _read(file: Path, bench: str) -> tuple[str, float, Perplexity]:
    """Name, bits per weight and perplexity of what `refimpl evaluate --json` wrote."""
    import numpy as np

    from refimpl.core.files.folders import check_file
    from refimpl.lab.measure.metrics import Perplexity

    remedy = f"run `refimpl evaluate --json > {file}` again"
    check_file(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{file} is not what `refimpl evaluate --json` writes ({reason(error)}); {remedy}") from error
    wrong = misfit(content, {"bits_per_weight": float, "perplexity": dict[str, dict]})
    if wrong is None and bench not in content["perplexity"]:
        raise OptionError(f"--bench {bench}: {file} was measured on {nearest(bench, content['perplexity'])}")
    if wrong is None:
        measured = content["perplexity"][bench]
        wrong = misfit(measured, {"value": float, "documents": list[dict]})
    if wrong is None:
        rows = measured["documents"]
        fields = {"document": str, "nll": float, "tokens": int}
        wrong = next(filter(None, (misfit(row, fields) for row in rows)), None if rows else "it has no documents")
    if wrong is None and any(row["tokens"] < 1 for row in rows):
        wrong = "a document has no tokens"
    if wrong is not None:
        raise OptionError(f"{file} is not what `refimpl evaluate --json` writes ({wrong}); {remedy}")
    bits = float(content["bits_per_weight"])
    result = Perplexity(
        measured["value"],
        np.array([row["nll"] for row in rows], dtype=float),
        np.array([row["tokens"] for row in rows]),
        [row["document"] for row in rows],
        bench,
    )
    return file.stem, bits, result


def _page(drawn: list[tuple[Any, str]], title: str) -> str:
    """One HTML page that needs no network: the drawing library is in it."""
    library = require("vl_convert", "book").javascript_bundle()
    figures = "".join(
        f'<figure role="img" aria-label="{html.escape(text, quote=True)}">'
        f'<div id="chart{k}"></div><noscript>{html.escape(text)}</noscript></figure>'
        for k, (_, text) in enumerate(drawn)
    )
    calls = "".join(
        f'window.vegaEmbed("#chart{k}", {json.dumps(figure.to_dict())}, {{actions: false, ast: true}});'.replace(
            "</", "<\\/"
        )
        for k, (figure, _) in enumerate(drawn)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>body{font-family:sans-serif;max-width:60rem;margin:auto;padding:1rem}figure{margin:1rem 0}"
        "figure>div{width:100%}</style>"
        f"<h1>{html.escape(title)}</h1>{figures}"
        f'<script type="module">{library}\n{calls}</script></html>'
    )
