"""Charts that survive greyscale and readers who do not see them: marks differ by shape, colours by lightness.

The language-model chart exists twice. `quality_chart` is interactive (Altair; the book bundles the script that draws
it), `quality_figure` is static (matplotlib; for notebooks, with `show`). Both take the same points.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refimpl.core.errors import OptionError, require
from refimpl.lab.records import Results
from refimpl.lab.statistics import compare

if TYPE_CHECKING:
    import altair
    from matplotlib.figure import Figure

# Eight steps of viridis without its palest end: lightness grows from one to the next, so the order survives a
# black-and-white printer. The shapes say the same to those who cannot tell neighbours apart.
_COLOURS = ("#440154", "#472c7a", "#3b518b", "#2c718e", "#21908d", "#27ad81", "#5cc863", "#aadc32")
_VEGA_SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
)
_MARKERS = ("o", "s", "^", "D", "P", "v", ">", "<")
_STAR = (
    "M0,-1L.225,-.309L.951,-.309L.363,.118L.588,.809L0,.382L-.588,.809L-.363,.118L-.951,-.309L-.225,-.309Z"
)
_X = "bits per weight (scales, masks and adapters included)"
_Y = "perplexity (log scale, lower is better)"
_DPI = 110
_MOST_BYTES = 80_000  # a notebook has many pictures and must stay readable in a browser


@dataclass(frozen=True)
class Point:
    """One compressed model on the chart.

    Attributes:
        method: decides shape and colour; at most eight different ones.
        bits: bits per weight.
        perplexity: its quality.
        low, high: 95 % interval of the perplexity, None where there is none.
        label: what tells it from the method's other points, e.g. "rank 64".
        source: the checkpoint everything was made from; gets a star.
    """

    method: str
    bits: float
    perplexity: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    source: bool = False


def points(results: Results, condition: str, seed: int = 0, reference: str = "dense") -> list[Point]:
    """The arms of a study as points, with the recorded cost as bits.

    An arm's name is read as "method label" (split at the first space); the arm "source" is the source checkpoint.
    The interval is that of the ratio to the reference, times the reference's perplexity: documents that are hard for
    every model do not widen it.

    Args:
        results: a study that recorded perplexities with their costs.
        condition, seed: which points.
        reference: arm to pair with.

    Raises:
        OptionError: no such arm, or an arm without a cost.
    """
    base = results.perplexity(reference, condition, seed)
    arms = dict.fromkeys(
        record.arm
        for record in results.records()
        if (record.condition, record.seed, record.metric) == (condition, seed, "nll")
    )
    found = []
    for arm in arms:
        bits = results.cost(arm, condition, seed, metric="nll")
        if bits is None:
            raise OptionError(f"arm {arm!r} was recorded without a cost; pass its bits per weight as `cost`")
        value = results.perplexity(arm, condition, seed).value
        gap = compare(results.perplexity(arm, condition, seed), base)
        method, _, label = arm.partition(" ")
        found.append(
            Point(
                method,
                bits,
                value,
                gap.low * base.value,
                gap.high * base.value,
                label,
                source=arm == "source",
            )
        )
    return found


def _methods(chart_points: Sequence[Point]) -> list[str]:
    """Methods in order of appearance, without the source."""
    if not chart_points:
        raise OptionError("points is empty; give at least one point")
    for point in chart_points:
        if not (point.bits > 0 and point.perplexity > 0):
            raise OptionError(f"{point} cannot be drawn: bits and perplexity must be positive")
    methods = list(dict.fromkeys(point.method for point in chart_points if not point.source))
    if len(methods) > len(_COLOURS):
        raise OptionError(
            f"points has {len(methods)} methods; more than {len(_COLOURS)} cannot be told apart: split the chart"
        )
    return methods


def _spread(sequence: Sequence[str], n: int) -> list[str]:
    """n entries with the widest steps between them, first included."""
    step = (len(sequence) - 1) / max(1, n - 1)
    return [sequence[round(k * step)] for k in range(n)]


def quality_chart(chart_points: Sequence[Point], title: str = "") -> altair.LayerChart:
    """Perplexity against bits per weight, interactive: hover for numbers, drag and scroll to look closer.

    Its ``description`` is the alternative text, which the book's pages give to screen readers.

    Raises:
        OptionError: no points, points that are not positive, more than eight methods.
        MissingExtra: altair is not installed.

    Example:
        >>> chart = quality_chart([Point("rtn", 4.5, 23.8, 23.1, 24.6), Point("source", 5.0, 18.3, source=True)])
        >>> chart.to_dict()["description"][:37]
        'Chart of perplexity against bits per '
    """
    alt: Any = require("altair", "lab")
    methods = _methods(chart_points)
    rows = [
        {
            "method": point.method,
            "bits": point.bits,
            "perplexity": point.perplexity,
            "low": point.low,
            "high": point.high,
            "label": f"{point.method} {point.label}".strip(),
        }
        for point in chart_points
    ]
    dots = alt.Data(values=[row for row, point in zip(rows, chart_points, strict=True) if not point.source])
    stars = alt.Data(values=[row for row, point in zip(rows, chart_points, strict=True) if point.source])
    x = alt.X("bits:Q", title=_X, scale=alt.Scale(zero=False, padding=15))
    y = alt.Y("perplexity:Q", title=_Y, scale=alt.Scale(type="log", nice=False, padding=15))
    colour = alt.Color(
        "method:N",
        title="method",
        sort=methods,
        legend=alt.Legend(symbolOpacity=1),  # or it takes the paleness of the lines
        scale=alt.Scale(domain=methods, range=_spread(_COLOURS, len(methods))),
    )
    shape = alt.Shape(
        "method:N",
        title="method",
        sort=methods,
        legend=alt.Legend(symbolOpacity=1),  # or it takes the paleness of the lines
        scale=alt.Scale(domain=methods, range=list(_VEGA_SHAPES[: len(methods)])),
    )
    tooltip = [
        alt.Tooltip("label:N", title="model"),
        alt.Tooltip("bits:Q", title="bits per weight", format=".3~f"),
        alt.Tooltip("perplexity:Q", format=".2f"),
        alt.Tooltip("low:Q", title="95 % from", format=".2f"),
        alt.Tooltip("high:Q", title="to", format=".2f"),
    ]
    lines = alt.Chart(dots).mark_line(opacity=0.4, strokeWidth=1).encode(x=x, y=y, color=colour)
    bars = (
        alt.Chart(dots)
        .mark_rule(strokeWidth=1.5)
        .encode(x=x, y=alt.Y("low:Q", title=_Y), y2="high:Q", color=colour)
    )
    marks = (
        alt.Chart(dots)
        .mark_point(filled=True, size=90, opacity=1)
        .encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip)
    )
    star = alt.Chart(stars).mark_point(shape=_STAR, filled=True, size=110, color="black", opacity=1)
    names = alt.Chart(stars).mark_text(align="left", dx=12, color="black").encode(x=x, y=y, text="label:N")
    layers = [lines, bars, marks, star.encode(x=x, y=y, tooltip=tooltip), names]
    return (
        alt.layer(*layers)
        .properties(title=title, width="container", height=320, description=describe(chart_points, title))
        .interactive()
    )


def quality_figure(chart_points: Sequence[Point], title: str = "") -> Figure:
    """Perplexity against bits per weight, static; for `show`.

    Raises:
        OptionError: no points, points that are not positive, more than eight methods.
        MissingExtra: matplotlib is not installed.

    Example:
        >>> figure = quality_figure([Point("rtn", 4.5, 23.8), Point("source", 5.0, 18.3, source=True)])
        >>> figure.axes[0].get_yscale()
        'log'
    """
    require("matplotlib", "lab")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    methods = _methods(chart_points)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip(methods, zip(_spread(_COLOURS, len(methods)), _MARKERS, strict=False), strict=True))
    groups = [(method, *styles[method], False) for method in methods] + [("", "black", "*", True)]
    for method, colour, marker, source in groups:
        mine = [p for p in chart_points if p.source == source and (source or p.method == method)]
        mine.sort(key=lambda point: point.bits)
        if not mine:
            continue
        bits, values = [p.bits for p in mine], [p.perplexity for p in mine]
        below = [p.perplexity - p.low if p.low is not None else 0.0 for p in mine]
        above = [p.high - p.perplexity if p.high is not None else 0.0 for p in mine]
        axes.errorbar(
            bits,
            values,
            yerr=[below, above],
            color=colour,
            marker=marker,
            markersize=11 if source else 6.5,
            linestyle="none" if source else "-",
            linewidth=0.7,
            elinewidth=1.2,
            capsize=2,
            label=mine[0].method,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=_X, ylabel=_Y, title=title)
    axes.grid(True, which="major", color="0.9")
    axes.legend(frameon=False)
    return figure


def describe(chart_points: Sequence[Point], title: str = "") -> str:
    """Alternative text of the chart: what its axes are and every point in words.

    Example:
        >>> describe([Point("rtn", 4.5, 23.8, 23.1, 24.6, "4 bits")])
        'Chart of perplexity against bits per weight. rtn 4 bits: 23.8 (23.1 to 24.6) at 4.5 bits.'
    """
    head = "Chart of perplexity against bits per weight" + (f", {title}" if title else "")
    parts = []
    for point in sorted(chart_points, key=lambda point: (point.method, point.bits)):
        interval = (
            f" ({point.low:.3g} to {point.high:.3g})"
            if point.low is not None and point.high is not None
            else ""
        )
        name = f"{point.method} {point.label}".strip()
        parts.append(f"{name}: {point.perplexity:.3g}{interval} at {point.bits:.3g} bits.")
    return f"{head}. " + " ".join(parts)


def show(figure: Figure, alt: str, caption: str = "") -> None:
    """Show a matplotlib figure in a notebook with alternative text and a caption.

    The output is HTML around a PNG, because no front end hands alternative text through with a bare PNG;
    it reads the same in JupyterLab, Colab and the book's pages.

    Args:
        figure: any matplotlib figure.
        alt: what the figure shows, for those who do not see it.
        caption: what to look at.

    Raises:
        OptionError: no alternative text.
        MissingExtra: not run from IPython or a notebook.
    """
    if not alt.strip():
        raise OptionError("alt is empty; say in one sentence what the figure shows")
    display = require("IPython.display", "book").display
    image = base64.b64encode(png(figure)).decode()
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    markup = (
        f'<figure style="margin:0"><img alt="{html.escape(alt, quote=True)}" '
        f'src="data:image/png;base64,{image}" style="max-width:100%"/>{text}</figure>'
    )
    display({"text/html": markup, "text/plain": f"{alt} {caption}".strip()}, raw=True)
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)  # or the notebook would show it a second time


def png(figure: Figure) -> bytes:
    """A figure as a PNG at 110 dpi; above 80 kB its colours are reduced to 64.

    Example:
        >>> png(quality_figure([Point("rtn", 4.5, 23.8)]))[:4]
        b'\\x89PNG'
    """
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    if buffer.tell() > _MOST_BYTES:
        picture = Image.open(buffer).convert("RGB").quantize(64)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
