"""Charts that are legible in greyscale and described in text: marks differ by shape, colours by lightness.

Each bench has its chart twice: `quality_chart` (language models) and `classifier_chart` are interactive (Altair; the
book bundles the script that draws them), `quality_figure` and `classifier_figure` are static (matplotlib; for
notebooks, with `show`). Both forms take the same points.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.core.arguments import Checked, checked
from refimpl.core.errors import OptionError, nearest, require
from refimpl.lab.measure.statistics import compare, difference, paired_bootstrap
from refimpl.lab.study.records import Results

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
_STAR = "M0,-1L.225,-.309L.951,-.309L.363,.118L.588,.809L0,.382L-.588,.809L-.363,.118L-.951,-.309L-.225,-.309Z"
_DPI = 110
_MOST_BYTES = 80_000  # a notebook has many pictures and must stay readable in a browser


@dataclass(frozen=True)
class Point(Checked):
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


@checked()
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

    Example:
        >>> from refimpl.core.files.io import data_path
        >>> points(Results.load(data_path("results") / "eora.json"), "wikipedia")[0].bits
        16
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
            Point(method, bits, value, gap.low * base.value, gap.high * base.value, label, source=arm == "source")
        )
    return found


@dataclass(frozen=True)
class ClassifierPoint(Checked):
    """One classifier on the chart.

    Attributes:
        method: decides shape and colour; at most eight different ones.
        bytes: of the whole model.
        flops: per image, see `refimpl.lab.measure.classify.flops`.
        accuracy: share of test images that are right, 0 to 1.
        loss: mean cross-entropy in nats.
        accuracy_interval, loss_interval: 95 % intervals (low, high), None where there are none.
        bit_operations: per image, None where they were not recorded.
        label: what tells it from the method's other points, e.g. "94%".
    """

    method: str
    bytes: float
    flops: float
    accuracy: float
    loss: float
    accuracy_interval: tuple[float, float] | None = None
    loss_interval: tuple[float, float] | None = None
    bit_operations: float | None = None
    label: str = ""


@checked()
def classifier_points(results: Results, condition: str, reference: str = "dense") -> list[ClassifierPoint]:
    """The classifiers of a study as points.

    What a study must have recorded (`refimpl.lab.measure.classify.score_rows` yields it): for the arm "dense" and every other arm
    "<method> <label>", under the condition "<dataset> <model>" (as "mnist resnet"),

    - metrics "correct" (0 or 1) and "loss" (nats) for each image of the test split, unit the image's name;
    - metrics "bytes" and "flops", and where codes of few bits are the point "bit_operations", unit "".

    An arm with several seeds is one point: each image's mean over the seeds. Intervals are from a paired bootstrap over
    images, of the difference to the reference (accuracy) or of the ratio (loss), put on the reference's value: images
    that are hard for every model do not widen them. The spread between seeds is not in them.

    Args:
        results: of a study.
        condition: which points.
        reference: arm to pair with.

    Raises:
        OptionError: no such arm, an arm without bytes or flops, or arms measured on different images.

    Example:
        >>> from refimpl.core.files.io import data_path
        >>> results = Results.load(data_path("results") / "layerwise_calibration.json")
        >>> classifier_points(results, "digits resnet")[0].method
        'dense'
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for record in results.records():
        if record.condition == condition:
            units = found.setdefault(record.arm, {}).setdefault(record.metric, {})
            units.setdefault(record.unit, []).append(record.value)
    arms = {arm: metrics for arm, metrics in found.items() if "correct" in metrics and "loss" in metrics}
    if reference not in arms:
        raise OptionError(
            f"{results.path.name} has no classifier {reference!r} under condition {condition!r}; it has "
            f"{', '.join(map(repr, arms)) or 'none'}"
        )
    base = arms[reference]
    images = list(base["correct"])

    def per_image(arm: str, metric: str) -> np.ndarray:
        values = arms[arm][metric]
        if values.keys() != base["correct"].keys():
            raise OptionError(f"arm {arm!r} was measured on other images than {reference!r}: {condition!r}")
        return np.array([np.mean(values[image]) for image in images])

    def cost(arm: str, metric: str) -> float:
        if metric not in arms[arm]:
            raise OptionError(f"arm {arm!r} was recorded without {metric!r}; record classifiers with score_rows")
        return float(np.mean(arms[arm][metric][""]))

    correct, loss = per_image(reference, "correct"), per_image(reference, "loss")
    weights = np.maximum(loss, 1e-12)  # of an image that the model is sure of the loss can round to zero
    chart_points = []
    for arm in arms:
        gap = paired_bootstrap(per_image(arm, "correct"), correct, statistic=difference)
        ratio = paired_bootstrap(per_image(arm, "loss"), loss, weights, statistic=lambda excess: 1 + excess)
        method, _, label = arm.partition(" ")
        low, high = (float(np.clip(correct.mean() + end, 0, 1)) for end in (gap.low, gap.high))
        chart_points.append(
            ClassifierPoint(
                method,
                cost(arm, "bytes"),
                cost(arm, "flops"),
                float(per_image(arm, "correct").mean()),
                float(per_image(arm, "loss").mean()),
                (low, high),
                (ratio.low * float(loss.mean()), ratio.high * float(loss.mean())),
                cost(arm, "bit_operations") if "bit_operations" in arms[arm] else None,
                label,
            )
        )
    return chart_points


@dataclass(frozen=True)
class TaskPoint(Checked):
    """One compressed language model and what it still can do.

    Attributes:
        method: decides shape and colour; at most eight different ones.
        bits: bits per weight.
        perplexity: on the text of the bench.
        score: share of items that are right, 0 to 1.
        low, high: 95 % interval of the score, None where there is none.
        label: what tells it from the method's other points, e.g. "rank 64".
    """

    method: str
    bits: float
    perplexity: float
    score: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@checked()
def task_points(
    results: Results,
    tasks: Sequence[str],
    metric: str = "restricted",
    condition: str = "wikipedia",
    reference: str = "dense",
) -> list[TaskPoint]:
    """The models of a study that recorded tasks, as points.

    The score of several tasks is the mean of their scores. Intervals are from a paired bootstrap over items (those
    about one text together) of the difference to the reference, put on the reference's score: items that are hard for
    every model do not widen them.

    Args:
        results: of a study that recorded each item of task T under the condition "task T"
            (`refimpl.lab.measure.tasks.score_rows`), and perplexities with their bits per weight.
        tasks: which of them.
        metric: "restricted" (best among the candidates) or "free" (the answer is what the model would write).
        condition: of the perplexity.
        reference: arm to pair with.

    Raises:
        OptionError: no such arm or task, or an arm without a cost.
    """
    from refimpl.lab.measure.tasks.items import group  # brings corpora along, which no other chart needs

    arms = dict.fromkeys(
        record.arm for record in results.records() if record.condition == f"task {tasks[0]}" and record.metric == metric
    )

    def items(arm: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        names: list[str] = []
        values: list[float] = []
        weights: list[float] = []
        for task in tasks:
            scores = results.values(arm, f"task {task}", metric=metric)
            names += [f"{task} {name}" for name in scores]
            values += scores.values()
            # every task weighs the same, however many items it has: their mean is the mean over tasks
            weights += len(scores) * [1 / (len(tasks) * len(scores))]
        return names, np.array(values) * weights, np.array(weights)

    names, base, weights = items(reference)
    # items about one text are no independent witnesses
    where = np.unique([group(item) for item in names], return_inverse=True)[1]
    sizes = np.bincount(where, weights)
    found = []
    for arm in arms:
        theirs, values, _ = items(arm)
        if theirs != names:
            raise OptionError(f"arm {arm!r} answered other items than {reference!r} under {tasks}")
        bits = results.cost(arm, condition, metric="nll")
        if bits is None:
            raise OptionError(f"arm {arm!r} was recorded without a cost; pass its bits per weight as `cost`")
        a, b = np.bincount(where, values), np.bincount(where, base)
        gap = paired_bootstrap(a, b, sizes, statistic=difference)
        method, _, label = arm.partition(" ")
        low, high = (float(np.clip(base.sum() + end, 0, 1)) for end in (gap.low, gap.high))
        perplexity = results.perplexity(arm, condition).value
        found.append(TaskPoint(method, bits, perplexity, float(values.sum()), low, high, label))
    return found


@dataclass(frozen=True)
class CurvePoint(Checked):
    """One point of a curve.

    Attributes:
        method: whose curve; decides shape and colour; at most eight different ones.
        x, y: above 0 where the axis is logarithmic, x in any case.
        low, high: 95 % interval of y, None where there is none.
        label: what tells it from the method's other points.
    """

    method: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


# -- what the benches draw --


@dataclass(frozen=True)
class _Axis:
    """A title, the short name that tooltips and descriptions use, a d3 format, and the scale."""

    title: str
    name: str
    format: str
    log: bool


@dataclass(frozen=True)
class _Mark:
    method: str
    label: str
    x: float
    y: float
    low: float | None
    high: float | None
    source: bool = False

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}".strip()


_BITS = _Axis("bits per weight (scales, masks and adapters included)", "bits per weight", ".3~f", log=False)
_PERPLEXITY = _Axis("perplexity (log scale, lower is better)", "perplexity", ".2f", log=True)
_COSTS = {
    "bytes": _Axis("bytes of the model, masks and scales included (log scale)", "bytes", ",.0f", log=True),
    "flops": _Axis("FLOPs per image, zeros skipped (log scale)", "FLOPs per image", ".3~s", log=True),
    "bit_operations": _Axis(
        "bit operations per image: multiply-adds x weight bits x input bits (log scale)",
        "bit operations per image",
        ".3~s",
        log=True,
    ),
}
_QUALITIES = {
    "accuracy": _Axis("test accuracy (%, higher is better)", "accuracy in %", ".2f", log=False),
    "loss": _Axis("test loss (nats, log scale, lower is better)", "loss in nats", ".4f", log=True),
}


_TASK_COSTS = {
    "bits": _BITS,
    "perplexity": _Axis("perplexity (log scale, better to the left)", "perplexity", ".2f", log=True),
}


def _task_marks(chart_points: Sequence[TaskPoint], x: str) -> list[_Mark]:
    if x not in _TASK_COSTS:
        raise OptionError(f"x={x!r} must be {nearest(str(x), _TASK_COSTS)}")
    return [
        _Mark(
            p.method,
            p.label,
            getattr(p, x),
            100 * p.score,
            None if p.low is None else 100 * p.low,
            None if p.high is None else 100 * p.high,
        )
        for p in chart_points
    ]


def _task_axis(what: str) -> _Axis:
    return _Axis(f"{what} (% right, higher is better)", f"{what} in %", ".1f", log=False)


def _language_marks(chart_points: Sequence[Point]) -> list[_Mark]:
    return [_Mark(p.method, p.label, p.bits, p.perplexity, p.low, p.high, p.source) for p in chart_points]


def _classifier_marks(chart_points: Sequence[ClassifierPoint], x: str, quality: str) -> list[_Mark]:
    for name, value, known in (("x", x, _COSTS), ("quality", quality, _QUALITIES)):
        if value not in known:
            raise OptionError(f"{name}={value!r} must be {nearest(str(value), known)}")
    marks = []
    for point in chart_points:
        cost = getattr(point, x)
        if cost is None:
            raise OptionError(f"x={x!r}: {point} was recorded without it; take another axis or leave it out")
        scale = 100 if quality == "accuracy" else 1
        low, high = getattr(point, f"{quality}_interval") or (None, None)
        low, high = (None if end is None else scale * end for end in (low, high))
        marks.append(_Mark(point.method, point.label, cost, scale * getattr(point, quality), low, high))
    return marks


def _methods(marks: Sequence[_Mark], x: _Axis, y: _Axis) -> list[str]:
    """Methods in order of appearance, without the source."""
    if not marks:
        raise OptionError("points is empty; give at least one point")
    for mark in marks:
        if not (mark.x > 0 and (mark.y > 0 or not y.log)):
            raise OptionError(
                f"{mark.name!r} has {mark.x:g} {x.name} and {mark.y:g} {y.name}: they must be positive to be drawn"
            )
    methods = list(dict.fromkeys(mark.method for mark in marks if not mark.source))
    if len(methods) > len(_COLOURS):
        raise OptionError(
            f"points has {len(methods)} methods; more than {len(_COLOURS)} cannot be told apart: split the chart"
        )
    return methods


def _spread(sequence: Sequence[str], n: int) -> list[str]:
    """n entries with the widest steps between them, first included."""
    step = (len(sequence) - 1) / max(1, n - 1)
    return [sequence[round(k * step)] for k in range(n)]


@checked()
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
    marks = _language_marks(chart_points)
    return _chart(marks, _BITS, _PERPLEXITY, title, describe(chart_points, title))


@checked()
def classifier_chart(
    chart_points: Sequence[ClassifierPoint], x: str = "bytes", quality: str = "accuracy", title: str = ""
) -> altair.LayerChart:
    """How good classifiers are against what they cost, interactive like `quality_chart`.

    Args:
        chart_points: from `classifier_points`.
        x: "bytes", "flops", or "bit_operations", which tells codes of few bits from floats where FLOPs do not.
        quality: "accuracy" (in percent) or "loss" (on a log scale, for models that are nearly always right).
        title: above the chart.

    Raises:
        OptionError: as `quality_chart`; an unknown axis; a point without bit operations.
        MissingExtra: altair is not installed.

    Example:
        >>> chart = classifier_chart([ClassifierPoint("dense", 316_336, 1.7e6, 0.985, 0.048)], x="flops")
        >>> chart.to_dict()["description"]
        'Chart of accuracy in % against FLOPs per image. dense: 98.5 at 1.7e+06.'
    """
    marks = _classifier_marks(chart_points, x, quality)
    text = describe_classifiers(chart_points, x, quality, title)
    return _chart(marks, _COSTS[x], _QUALITIES[quality], title, text)


@checked()
def task_chart(chart_points: Sequence[TaskPoint], what: str, x: str = "bits", title: str = "") -> altair.LayerChart:
    """A chart of task scores of compressed models against their size or perplexity, interactive like `quality_chart`.

    Args:
        chart_points: from `task_points`.
        what: name of the score, for the axis, e.g. "facts".
        x: "bits" or "perplexity".
        title: above the chart.

    Raises:
        OptionError: as `quality_chart`; an unknown axis.
        MissingExtra: altair is not installed.

    Example:
        >>> chart = task_chart([TaskPoint("GPTQ", 4.3, 21.9, 0.5, label="4 bits")], "facts", x="perplexity")
        >>> chart.to_dict()["description"]
        'Chart of facts in % against perplexity. GPTQ 4 bits: 50 at 21.9.'
    """
    marks, y = _task_marks(chart_points, x), _task_axis(what)
    return _chart(marks, _TASK_COSTS[x], y, title, _describe(marks, _TASK_COSTS[x], y, title))


@checked()
def curve_chart(
    chart_points: Sequence[CurvePoint], x: str, y: str, log: str = "", title: str = ""
) -> altair.LayerChart:
    """Any quantity against another one, a curve for each method, interactive like `quality_chart`.

    Args:
        chart_points: of all curves.
        x, y: names of the quantities, with their units.
        log: the axes that are logarithmic: "x", "y", "xy" or none.
        title: above the chart.

    Raises:
        OptionError: as `quality_chart`; other axes than x and y.
        MissingExtra: altair is not installed.

    Example:
        >>> drawn = [CurvePoint("full", 1.0, 90.0), CurvePoint("full", 2.0, 80.0, 70.0, 85.0)]
        >>> curve_chart(drawn, "context (thousand tokens)", "right (%)").to_dict()["description"]
        'Chart of right (%) against context (thousand tokens). full: 90 at 1. full: 80 (70 to 85) at 2.'
    """
    if not set(log) <= {"x", "y"}:
        raise OptionError(f"log={log!r}: use 'x', 'y', 'xy' or ''")
    x_axis, y_axis = (
        _Axis(f"{name} (log scale)" if axis in log else name, name, ".4~g", axis in log)
        for axis, name in (("x", x), ("y", y))
    )
    marks = [_Mark(p.method, p.label, p.x, p.y, p.low, p.high) for p in chart_points]
    return _chart(marks, x_axis, y_axis, title, _describe(marks, x_axis, y_axis, title))


def _chart(marks: Sequence[_Mark], x_axis: _Axis, y_axis: _Axis, title: str, text: str) -> altair.LayerChart:
    methods = _methods(marks, x_axis, y_axis)
    alt: Any = require("altair", "lab")

    def data(source: bool) -> Any:
        chosen = [mark for mark in marks if mark.source == source]
        return alt.Data(
            values=[
                {"method": m.method, "x": m.x, "y": m.y, "low": m.low, "high": m.high, "label": m.name} for m in chosen
            ]
        )

    dots, stars = data(False), data(True)
    padded = {"padding": 15}
    x_scale = alt.Scale(type="log", nice=False, **padded) if x_axis.log else alt.Scale(zero=False, **padded)
    y_scale = alt.Scale(type="log", nice=False, **padded) if y_axis.log else alt.Scale(zero=False, **padded)
    ticks = alt.Axis(format="~s") if x_axis.log else alt.Undefined
    x = alt.X("x:Q", title=x_axis.title, scale=x_scale, axis=ticks)
    y = alt.Y("y:Q", title=y_axis.title, scale=y_scale)
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
        alt.Tooltip("x:Q", title=x_axis.name, format=x_axis.format),
        alt.Tooltip("y:Q", title=y_axis.name, format=y_axis.format),
        alt.Tooltip("low:Q", title="95 % from", format=y_axis.format),
        alt.Tooltip("high:Q", title="to", format=y_axis.format),
    ]
    lines = alt.Chart(dots).mark_line(opacity=0.4, strokeWidth=1).encode(x=x, y=y, color=colour)
    bars = (
        alt.Chart(dots)
        .mark_rule(strokeWidth=1.5)
        .encode(x=x, y=alt.Y("low:Q", title=y_axis.title), y2="high:Q", color=colour)
    )
    points_layer = (
        alt.Chart(dots)
        .mark_point(filled=True, size=90, opacity=1)
        .encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip)
    )
    star = alt.Chart(stars).mark_point(shape=_STAR, filled=True, size=110, color="black", opacity=1)
    names = alt.Chart(stars).mark_text(align="left", dx=12, color="black").encode(x=x, y=y, text="label:N")
    layers = [lines, points_layer]
    if any(mark.low is not None and not mark.source for mark in marks):  # of none Vega would take the extent
        layers.insert(1, bars)
    if any(mark.source for mark in marks):
        layers += [star.encode(x=x, y=y, tooltip=tooltip), names]
    return alt.layer(*layers).properties(title=title, width="container", height=320, description=text).interactive()


@checked()
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
    return _figure([(_language_marks(chart_points), _BITS, _PERPLEXITY)], title)


@checked()
def classifier_figure(
    chart_points: Sequence[ClassifierPoint],
    quality: str = "accuracy",
    title: str = "",
    x: Sequence[str] = ("bytes", "flops"),
) -> Figure:
    """How good classifiers are against what they cost, one panel a cost, static; for `show`.

    Args:
        chart_points, quality, title: see `classifier_chart`.
        x: the costs, of those that `classifier_chart` knows.

    Raises:
        OptionError: see `classifier_chart`.
        MissingExtra: matplotlib is not installed.

    Example:
        >>> figure = classifier_figure([ClassifierPoint("dense", 316_336, 1.7e6, 0.985, 0.048)])
        >>> len(figure.axes)
        2
    """
    panels = [(_classifier_marks(chart_points, name, quality), _COSTS[name], _QUALITIES[quality]) for name in x]
    if not panels:
        raise OptionError(f"x is empty; give some of {', '.join(map(repr, _COSTS))}")
    return _figure(panels, title)


@checked()
def task_figure(
    panels: Mapping[str, Sequence[TaskPoint]], x: str = "perplexity", title: str = ""
) -> tuple[Figure, str]:
    """A figure of task scores of compressed models, one panel for each task, static; for `show`.

    Args:
        panels: points by the name of their score; the same models in each.
        x, title: see `task_chart`.

    Returns:
        The figure, and its alternative text.

    Raises:
        OptionError: see `task_chart`.
        MissingExtra: matplotlib is not installed.

    Example:
        >>> figure, alt = task_figure({"facts": [TaskPoint("GPTQ", 4.3, 21.9, 0.5)]})
        >>> alt
        'Chart of facts in % against perplexity. GPTQ: 50 at 21.9.'
    """
    drawn = [(_task_marks(points, x), _TASK_COSTS[x], _task_axis(what)) for what, points in panels.items()]
    if not drawn:
        raise OptionError("panels is empty; give the points of at least one task")
    text = " ".join(_describe(marks, x_axis, y_axis, title) for marks, x_axis, y_axis in drawn)
    return _figure(drawn, title), text


def _figure(panels: Sequence[tuple[Sequence[_Mark], _Axis, _Axis]], title: str) -> Figure:
    """Marks with their x and y axes, panel by panel; panels of one quantity share the y axis."""
    methods = _methods(*panels[0])
    require("matplotlib", "lab")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

    width = 6.4 if len(panels) == 1 else 4.4 * len(panels)
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    styles = dict(zip(methods, zip(_spread(_COLOURS, len(methods)), _MARKERS, strict=False), strict=True))
    groups = [(method, *styles[method], False) for method in methods] + [("", "black", "*", True)]
    shared = len({y.title for _, _, y in panels}) == 1
    all_axes = figure.subplots(1, len(panels), sharey=shared, squeeze=False)[0]
    for axes, (marks, x, y) in zip(all_axes, panels, strict=True):
        _methods(marks, x, y)
        for method, colour, marker, source in groups:
            mine = [m for m in marks if m.source == source and (source or m.method == method)]
            mine.sort(key=lambda mark: mark.x)
            if not mine:
                continue
            # an interval that is paired to another model's may end before the value itself, by rounding
            below = [max(0.0, m.y - m.low) if m.low is not None else 0.0 for m in mine]
            above = [max(0.0, m.high - m.y) if m.high is not None else 0.0 for m in mine]
            axes.errorbar(
                [m.x for m in mine],
                [m.y for m in mine],
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
        axes.set_xlabel(x.title, wrap=True)
        axes.grid(True, which="major", color="0.9")
        if x.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(NullFormatter())
        if y.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        if axes is all_axes[0] or not shared:
            axes.set_ylabel(y.title)
    first = all_axes[0]
    if len(panels) == 1:
        first.set_title(title)
    else:
        figure.suptitle(title)
    first.legend(frameon=False)
    return figure


@checked()
def describe(chart_points: Sequence[Point], title: str = "") -> str:
    """Alternative text of the chart: what its axes are and every point in words.

    Example:
        >>> describe([Point("rtn", 4.5, 23.8, 23.1, 24.6, "4 bits")])
        'Chart of perplexity against bits per weight. rtn 4 bits: 23.8 (23.1 to 24.6) at 4.5 bits.'
    """
    return _describe(_language_marks(chart_points), _BITS, _PERPLEXITY, title, " bits")


@checked()
def describe_classifiers(
    chart_points: Sequence[ClassifierPoint], x: str = "bytes", quality: str = "accuracy", title: str = ""
) -> str:
    """Alternative text of `classifier_chart`.

    Example:
        >>> describe_classifiers([ClassifierPoint("cubic", 24e3, 1e5, 0.979, 0.07, (0.97, 0.985), label="94%")])
        'Chart of accuracy in % against bytes. cubic 94%: 97.9 (97 to 98.5) at 2.4e+04.'
    """
    return _describe(_classifier_marks(chart_points, x, quality), _COSTS[x], _QUALITIES[quality], title)


def _describe(marks: Sequence[_Mark], x: _Axis, y: _Axis, title: str, unit: str = "") -> str:
    head = f"Chart of {y.name} against {x.name}" + (f", {title}" if title else "")
    parts = []
    for mark in sorted(marks, key=lambda mark: (mark.method, mark.x)):
        known = mark.low is not None and mark.high is not None
        interval = f" ({mark.low:.3g} to {mark.high:.3g})" if known else ""
        parts.append(f"{mark.name}: {mark.y:.3g}{interval} at {mark.x:.3g}{unit}.")
    return f"{head}. " + " ".join(parts)


def show(figure: Figure, alt: str, caption: str = "") -> None:
    """Show a matplotlib figure in a notebook with alternative text and a caption.

    The output is HTML around a PNG, because no front end hands alternative text through with a bare PNG;
    it reads the same in JupyterLab, Colab and the book's pages.

    Args:
        figure: any matplotlib figure.
        alt: what the figure shows, for those who do not see it.
        caption: what the reader should notice.

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
