"""The chart: log scale, one mark per method that survives greyscale, the source on it, and words for all of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from refimpl.core.errors import OptionError
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.show.plots import (
    _COLOURS,
    _MARKERS,
    _VEGA_SHAPES,
    CurvePoint,
    Point,
    _spread,
    curve_chart,
    describe,
    png,
    points,
    quality_chart,
    quality_figure,
    show,
)
from refimpl.lab.study.records import Results

POINTS = [
    Point("rtn", 4.5, 23.8, 23.1, 24.6, "4 bits"),
    Point("rtn", 3.5, 96.1, 90.0, 103.0, "3 bits"),
    Point("gptq", 3.5, 36.9),
    Point("source", 5.0, 18.3, source=True),
]


def luminance(colour):
    red, green, blue = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_colours_differ_in_lightness_and_shapes_differ():
    for n in range(2, 9):
        shades = [luminance(colour) for colour in _spread(_COLOURS, n)]
        assert all(b - a > (0.1 if n <= 3 else 0.0) for a, b in zip(shades, shades[1:], strict=False))
    assert max(map(luminance, _COLOURS)) < 0.65  # visible on white
    assert len(set(_VEGA_SHAPES)) == len(set(_MARKERS)) == len(_COLOURS) == 8


def test_chart_draws_every_point_and_marks_the_source():
    spec = quality_chart(POINTS, "Wikipedia").to_dict()
    text = json.dumps(spec)
    assert spec["description"] == describe(POINTS, "Wikipedia")
    marks = {json.dumps(layer["mark"]): layer for layer in spec["layer"]}
    point_layers = [layer for mark, layer in marks.items() if '"point"' in mark]
    assert {len(layer["data"]["values"]) for layer in point_layers} == {3, 1}
    assert all(layer["encoding"]["y"]["scale"]["type"] == "log" for layer in point_layers)
    assert "bits per weight" in text and "lower is better" in text
    dots = next(layer for layer in point_layers if len(layer["data"]["values"]) == 3)
    assert dots["encoding"]["shape"]["scale"]["domain"] == ["rtn", "gptq"]
    assert any('"rule"' in mark for mark in marks)


def test_curves_keep_their_axes_and_points() -> None:
    points = [CurvePoint(m, x, y, y - 1, y + 1) for m in ("full", "KIVI") for x, y in ((1, 10), (2, 30))]
    spec = curve_chart(points, "tokens", "seconds", log="xy").to_dict()
    text = str(spec)
    assert "tokens (log scale)" in text and "seconds (log scale)" in text
    assert spec["description"].count("KIVI") == 2 and "30 (29 to 31) at 2" in spec["description"]
    with pytest.raises(OptionError, match="log='z'"):
        curve_chart(points, "tokens", "seconds", log="z")
    with pytest.raises(OptionError, match="must be positive"):
        curve_chart([CurvePoint("full", 1, -1)], "tokens", "seconds", log="y")


def test_chart_compiles_without_a_network():
    vl_convert = pytest.importorskip("vl_convert")
    svg = vl_convert.vegalite_to_svg(quality_chart(POINTS).properties(width=500).to_dict())
    assert "source" in svg and "bits per weight" in svg and "rtn" in svg


def test_figure_has_the_same_points_units_and_legend():
    (axes,) = quality_figure(POINTS, "Wikipedia").axes
    assert axes.get_yscale() == "log" and "bits per weight" in axes.get_xlabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rtn", "gptq", "source"]
    drawn = [
        tuple(map(float, xy)) for container in axes.containers for xy in zip(*container[0].get_data(), strict=True)
    ]
    assert sorted(drawn) == sorted((p.bits, p.perplexity) for p in POINTS)


def test_png_is_small():
    assert len(png(quality_figure(POINTS))) < 80_000
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(6, 4))
    figure.subplots().imshow(
        np.random.default_rng(0).normal(size=(40, 60)).cumsum(0).cumsum(1), interpolation="bicubic"
    )
    data = png(figure)
    assert len(data) < 80_000 and Image.open(io.BytesIO(data)).size == (660, 440)


def test_show_hands_over_alt_text_and_caption(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    show(quality_figure(POINTS), alt='Points "fall" & rise', caption="Look < here")
    (bundle,) = shown
    assert 'alt="Points &quot;fall&quot; &amp; rise"' in bundle["text/html"]
    assert "<figcaption>Look &lt; here</figcaption>" in bundle["text/html"]
    assert "data:image/png;base64," in bundle["text/html"] and "http" not in bundle["text/html"]
    assert bundle["text/plain"] == 'Points "fall" & rise Look < here'
    with pytest.raises(OptionError, match="alt is empty"):
        show(quality_figure(POINTS), alt=" ")


def test_show_does_not_leave_the_figure_for_a_second_display(monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    monkeypatch.setattr("IPython.display.display", lambda data, raw: None)
    figure, _ = pyplot.subplots()
    show(figure, alt="empty axes")
    assert figure.number not in pyplot.get_fignums()


@pytest.mark.parametrize("draw", [quality_chart, quality_figure])
def test_what_cannot_be_drawn_is_refused(draw):
    with pytest.raises(OptionError, match="points is empty"):
        draw([])
    with pytest.raises(OptionError, match="must be positive"):
        draw([Point("rtn", 4.0, 0.0)])
    with pytest.raises(OptionError, match="9 methods"):
        draw([Point(str(k), 4.0, 10.0) for k in range(9)])


def test_points_come_from_records_with_paired_intervals(tmp_path):
    results = Results.start(tmp_path / "r.json", paper="demo", study="refimpl.lab.show.plots", provisional=True)
    rng = np.random.default_rng(0)
    counts, units = np.full(40, 100), [str(k) for k in range(40)]
    base = rng.normal(300, 60, 40)  # documents differ a lot
    for arm, shift, cost in (("dense", 0.0, 16.0), ("source", 0.0, 5.0), ("eora rank 64", 20.0, 3.5)):
        nll = base + shift + (rng.normal(0, 1, 40) if shift else 0)
        results.add_perplexity(arm, "prose", 0, Perplexity(0.0, nll, counts, units), cost)
    dense, source, eora = points(results, "prose")
    assert (eora.method, eora.label, eora.bits, eora.source) == ("eora", "rank 64", 3.5, False)
    assert source.source and source.low == source.high == pytest.approx(dense.perplexity)
    assert eora.low < eora.perplexity < eora.high < eora.low * 1.02
    results.add_perplexity("free", "prose", 0, Perplexity(0.0, base, counts, units))
    with pytest.raises(OptionError, match="without a cost"):
        points(results, "prose")


def test_importing_it_draws_in_no_chart_library():
    code = "import sys, refimpl.lab.show.plots; sys.exit(any(m in sys.modules for m in ('altair', 'matplotlib', 'pandas')))"
    subprocess.run([sys.executable, "-c", code], check=True)
