"""Figures of the chapters: every number is drawn where it belongs, and axes, legends and ticks say what is there."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from refimpl.core.errors import OptionError
from refimpl.lab.show.figures import bars, canvas, dots, heat, lines, listed, note
from refimpl.lab.show.plots import png


def written(axes):
    return {text.get_text() for text in axes.texts}


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_canvas_has_the_panels_that_were_asked_for():
    figure, axes = canvas(5.0, 2.0)
    assert figure.get_size_inches().tolist() == [5.0, 2.0] and figure.axes == [axes]
    figure, panels = canvas(rows=2, columns=3, sharex=True)
    assert panels.shape == (2, 3) and panels[0, 0].get_shared_x_axes().joined(panels[0, 0], panels[1, 2])


def test_curves_go_through_their_points_and_named_ticks_are_the_only_ones():
    figure, axes = canvas()
    curves = {"a": ([10, 20], [1.0, 2.0], "s--", "black"), "b": (range(1, 4), iter([3.0, 2.0, 1.0]), "-", "0.5")}
    lines(axes, curves | {"_aside": ([1], [1], ".", "0.9")}, xlabel="rank", xscale="log", xticks=[1, 10, 20])
    first, second, _ = axes.lines
    assert np.array_equal(first.get_xydata(), [[10, 1], [20, 2]]) and np.array_equal(second.get_ydata(), [3, 2, 1])
    assert first.get_marker() == "s" and first.get_linestyle() == "--" and second.get_color() == "0.5"
    figure.draw_without_rendering()
    assert labels(axes.xaxis) == ["1", "10", "20"] and not len(axes.xaxis.get_minorticklocs())
    assert axes.get_xlabel() == "rank" and axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert png(figure)[:4] == b"\x89PNG"


def test_one_curve_has_no_legend_and_labels_of_ticks_are_kept():
    _, axes = canvas()
    lines(axes, {"a": ([1, 2], [1, 2], "-", "black")}, xticks=[1, 2], xticklabels=["one", "two"], yticks=[])
    lines(axes, {"b": ([1, 2], [2, 1], "-", "0.5")}, legend=False)
    assert axes.get_legend() is None and labels(axes.xaxis) == ["one", "two"] and labels(axes.yaxis) == []


def test_dots_stand_in_their_rows_from_top_to_bottom():
    _, axes = canvas()
    rows = {"SVD": {"test": 34.25, "once": 12.0}, "full": {"test": 18.0}, "same": {"test": 2.0, "once": 2.0}}
    dots(axes, rows, {"test": ("s", "black"), "once": ("o", "0.5")}, xscale="log")
    marks = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_marker() in "so"}
    assert marks == {"test": [[34.25, 0], [18, 1], [2, 2]], "once": [[12, 0], [2, 2]]}
    assert labels(axes.yaxis) == ["SVD", "full", "same"] and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert written(axes) == {"34.2", "12.0", "18.0", "2.0"} and len(axes.texts) == 4
    assert {text.get_text(): text.get_ha() for text in axes.texts}["12.0"] == "right", "clear of its neighbour"


def test_bars_begin_at_their_base_and_share_a_group():
    _, axes = canvas()
    bars(axes, ["web", "code"], {"a": [0.5, 2.0], "b": [1.0, 3.0], "c": [1, 1]}, base=1, ylabel="ratio")
    ends = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    assert ends == [(1, 0.5), (1, 2), (1, 1), (1, 3), (1, 1), (1, 1)]
    middles = np.array([bar.get_x() + bar.get_width() / 2 for bar in axes.patches]).reshape(3, 2)
    assert np.allclose(middles.mean(0), [0, 1]) and (np.diff(middles, axis=0) > axes.patches[0].get_width()).all()
    shades = [to_rgb(axes.patches[k].get_facecolor())[0] for k in (0, 2, 4)]
    assert shades == sorted(shades) and min(np.diff(shades)) > 0.2, "told apart on paper"
    assert labels(axes.xaxis) == ["web", "code"]


def test_numbers_on_a_map_are_legible_and_in_place():
    _, axes = canvas()
    heat(axes, [[0.0, 40.0, 8.0]], ".0f", 0, 40, title="keys", xticklabels=["a", "b", "c"])
    assert [(text.get_text(), text.get_position(), text.get_color()) for text in axes.texts] == [
        ("0", (0, 0), "black"), ("40", (1, 0), "white"), ("8", (2, 0), "black")]  # fmt: skip
    assert labels(axes.xaxis) == ["a", "b", "c"] and axes.get_title() == "keys"


def test_notes_and_lists():
    _, axes = canvas()
    note(axes, 1.0, 2.0, "sinks", (6, -3), "left")
    assert axes.texts[0].xy == (1.0, 2.0) and axes.texts[0].get_ha() == "left"
    assert listed({"a": 0.123, "b": [1, np.float64(2)]}, ".1f") == "a 0.1; b 1.0, 2.0"


def test_what_cannot_be_drawn_is_named():
    _, axes = canvas()
    with pytest.raises(OptionError, match="curves is empty"):
        lines(axes, {})
    with pytest.raises(OptionError, match=r"rows\['SVD'\] has \{'train': 1.0\}; give numbers of the series test"):
        dots(axes, {"SVD": {"train": 1.0}}, {"test": ("s", "black")})
    with pytest.raises(OptionError, match="give numbers"):
        dots(axes, {"SVD": {}}, {"test": ("s", "black")})
    with pytest.raises(OptionError, match=r"heights has \[1\] entries for 2 names"):
        bars(axes, ["a", "b"], {"x": [1.0]})


def test_importing_it_draws_in_no_chart_library():
    code = "import sys, refimpl.lab.show.figures; sys.exit(any(m in sys.modules for m in ('altair', 'matplotlib')))"
    subprocess.run([sys.executable, "-c", code], check=True)
