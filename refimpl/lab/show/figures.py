"""What the chapters' figures have in common: curves, dots in rows, bars and maps of numbers, legible in greyscale.

Each function draws on axes that `canvas` made; `refimpl.lab.show.plots.show` puts the figure on the page. A look is a
matplotlib format of marker and line ("s--") and a shade of grey; series differ in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.core.errors import OptionError, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def canvas(
    width: float = 6.4, height: float = 3.0, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes: one, or an array of them.

    Args:
        width, height: in inches.
        rows, columns: of panels.
        options: for matplotlib's ``Figure.subplots``, e.g. ``sharey=True``.

    Raises:
        MissingExtra: matplotlib is not installed.

    Example:
        >>> figure, (left, right) = canvas(columns=2, sharey=True)
        >>> len(figure.axes)
        2
    """
    figure = require("matplotlib.figure", "lab").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def lines(
    axes: Axes,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], str, str]],
    *,
    legend: bool = True,
    **settings: Any,
) -> None:
    """Curves with a legend.

    Args:
        axes: to draw on.
        curves: for each label the places [n], the heights [n], the format ("s-") and the shade ("0.5") of a curve. Labels
            that begin with "_" are not in the legend.
        legend: where there is more than one label; without it, another panel has the legend.
        settings: of the axes, e.g. ``xlabel="step", yscale="log"``. Ticks that are named here (``xticks=[10, 20]``) are
            written out, and a logarithmic axis gets no others.

    Raises:
        OptionError: there is nothing to draw.

    Example:
        >>> figure, axes = canvas()
        >>> lines(axes, {"PCA": ([1, 2], [0.5, 0.1], "o--", "0.5")}, xlabel="rank", yscale="log", yticks=[0.1, 0.5])
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['0.1', '0.5']
    """
    if not curves:
        raise OptionError("curves is empty; give at least one")
    for label, (x, y, style, shade) in curves.items():
        axes.plot(x, list(y), style, color=shade, label=label, markersize=4)
    _finish(axes, settings, legend)


def dots(
    axes: Axes,
    rows: Mapping[str, Mapping[str, float]],
    looks: Mapping[str, tuple[str, str]],
    form: str = ".1f",
    **settings: Any,
) -> None:
    """Numbers as marks in labelled rows, from top to bottom; those of a row are joined, the outermost written out.

    Args:
        axes: to draw on.
        rows: for each row the numbers of its series.
        looks: marker and shade of each series.
        form: format of the numbers that are written.
        settings: as for `lines`.

    Raises:
        OptionError: a series without a look, or a row without a number.

    Example:
        >>> figure, axes = canvas()
        >>> dots(axes, {"SVD": {"test": 34.2, "training": 30.0}}, {"test": ("s", "black"), "training": ("o", "0.5")})
        >>> [text.get_text() for text in axes.texts]
        ['30.0', '34.2']
    """
    for place, (row, numbers) in enumerate(rows.items()):
        unknown = [series for series in numbers if series not in looks]
        if unknown or not numbers:
            raise OptionError(f"rows[{row!r}] has {dict(numbers)}; give numbers of the series {', '.join(looks)}")
        low, *_, high = sorted([*numbers.values()] * 2)
        axes.plot([low, high], [place, place], color="0.8", zorder=0)
        if low == high:
            note(axes, low, place, f"{low:{form}}")
        else:  # apart, where the two are close
            note(axes, low, place, f"{low:{form}}", (-1, 7), side="right")
            note(axes, high, place, f"{high:{form}}", (1, 7), side="left")
    for series, (marker, shade) in looks.items():
        there = [(numbers[series], place) for place, numbers in enumerate(rows.values()) if series in numbers]
        axes.plot(*zip(*there, strict=True), marker, color=shade, label=series)
    axes.margins(x=0.1)  # room for the outermost numbers
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.4, -0.7))
    _finish(axes, settings)


def bars(
    axes: Axes, names: Sequence[str], heights: Mapping[str, Sequence[float]], base: float = 0.0, **settings: Any
) -> None:
    """Bars side by side in groups, from dark to light.

    Args:
        axes: to draw on.
        names: [groups] below each group.
        heights: for each label the heights [groups].
        base: the height that bars begin at; 1 for ratios.
        settings: as for `lines`.

    Raises:
        OptionError: there is nothing to draw, or heights of another number than names.

    Example:
        >>> figure, axes = canvas()
        >>> bars(axes, ["first", "last"], {"layer-wise": [0.1, 0.1], "global": [0.3, 0.5]}, ylabel="share kept")
        >>> len(axes.patches)
        4
    """
    if not heights or any(len(values) != len(names) for values in heights.values()):
        raise OptionError(f"heights has {[len(v) for v in heights.values()]} entries for {len(names)} names")
    width = 0.8 / len(heights)
    for k, (label, values) in enumerate(heights.items()):
        places = np.arange(len(names)) + width * (k - (len(heights) - 1) / 2)
        shade = str(0.85 * k / max(1, len(heights) - 1))
        axes.bar(
            places, np.asarray(values) - base, 0.95 * width, bottom=base, color=shade, edgecolor="black", label=label
        )
    axes.set(xticks=range(len(names)), xticklabels=list(names))
    _finish(axes, settings)


def heat(axes: Axes, values: Any, form: str, low: float, high: float, **settings: Any) -> None:
    """A matrix as squares, the darker the larger, with each number written on its square.

    Args:
        axes: to draw on.
        values: [rows, columns].
        form: format of the numbers.
        low, high: what is white and what is black.
        settings: of the axes. ``xticklabels`` and ``yticklabels`` name columns and rows; else they are numbered.

    Example:
        >>> figure, axes = canvas()
        >>> heat(axes, [[0.5, 2.0]], ".1f", low=0, high=3, xlabel="head")
        >>> [text.get_text() for text in axes.texts]
        ['0.5', '2.0']
    """
    values = np.asarray(values)
    axes.imshow(values, cmap="Greys", vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(values):
        shade = "white" if value > (low + high) / 2 else "black"
        axes.text(column, row, f"{value:{form}}", ha="center", va="center", fontsize=8, color=shade)
    axes.set(**{"xticks": range(values.shape[1]), "yticks": range(values.shape[0]), **settings})
    axes.tick_params(labelsize=7)  # names of neighbours must not touch


def note(axes: Axes, x: float, y: float, text: str, shift: tuple[float, float] = (0, 6), side: str = "center") -> None:
    """A small text beside a place in the axes.

    Args:
        axes: to write on.
        x, y: the place, in data.
        text: what is written there.
        shift: of the text from the place, in points.
        side: which part of the text is there: "left", "center" or "right".

    Example:
        >>> figure, axes = canvas()
        >>> note(axes, 1.0, 2.0, "four sinks", (6, -3), "left")
    """
    axes.annotate(text, (x, y), xytext=shift, textcoords="offset points", ha=side, fontsize=8)


def listed(values: Mapping[str, float | Sequence[float]], form: str = ".2f") -> str:
    """Numbers by name as a sentence, for the alternative text of a figure.

    Example:
        >>> listed({"PCA": 0.512, "trained": 0.4}), listed({"PCA": (1, 2)}, ".1f")
        ('PCA 0.51; trained 0.40', 'PCA 1.0, 2.0')
    """
    return "; ".join(f"{name} " + ", ".join(f"{v:{form}}" for v in np.atleast_1d(x)) for name, x in values.items())


def _finish(axes: Axes, settings: Mapping[str, Any], legend: bool = True) -> None:
    axes.set(**settings)
    for side, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        ticks = settings.get(f"{side}ticks")
        if ticks is not None:
            if f"{side}ticklabels" not in settings:
                axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            if axis.get_scale() == "log":
                axis.set_ticks([], minor=True)
    if legend and len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)
