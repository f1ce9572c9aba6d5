"""The classifier bench: points from records, both charts, the page, and the script that trains its models."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from refimpl_book import pages

from refimpl.core.errors import OptionError
from refimpl.lab.measure.classify import Scores, score_rows
from refimpl.lab.show.plots import (
    ClassifierPoint,
    classifier_chart,
    classifier_figure,
    classifier_points,
    describe_classifiers,
    png,
)
from refimpl.lab.study.records import Record, Results

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
POINTS = [
    ClassifierPoint("dense", 316_336, 1.68e6, 0.985, 0.048, (0.985, 0.985), (0.048, 0.048), 8.6e8),
    ClassifierPoint("cubic", 40_000, 4e5, 0.981, 0.06, (0.975, 0.987), (0.05, 0.07), 2e8, "75%"),
    ClassifierPoint("cubic", 12_000, 1e5, 0.97, 0.1, (0.96, 0.98), None, 5e7, "94%"),
    ClassifierPoint("small", 21_000, 4.5e5, 0.965, 0.11, None, None, 2.3e8, "0.5"),
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def record(results, arm, accuracy, seed=0, units=400, condition="mnist resnet", **costs):
    """An arm whose wrong images are mostly the same ones for every seed and arm: hard images."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(9).permutation(units)
    correct = np.ones(units, dtype=bool)
    correct[hard[: round((1 - accuracy) * units)]] = False
    correct ^= rng.random(units) < 0.002
    loss = np.where(correct, 0.01, 2.0)
    scores = Scores(torch.tensor(loss), torch.tensor(correct), torch.zeros(units, 10), [f"i{k}" for k in range(units)])
    rows = score_rows(scores, **{"nbytes": 1000, "flops": 2000.0, **costs})
    paper = results.header["paper"]
    results.add(*(Record(paper, arm, condition, seed, row.unit, row.metric, row.value) for row in rows))
    return correct.mean(), loss.mean()


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "demo.json"
    return Results.start(path, paper="demo", study="refimpl.lab.show.plots", provisional=True)


def test_points_average_seeds_and_pair_images_with_the_dense_model(results):
    dense, dense_loss = record(results, "dense", 0.9, nbytes=8000)
    found = [record(results, "cubic 94% sparse", 0.87, seed, nbytes=900 + seed, flops=10.0) for seed in (0, 1, 2)]
    first, second = classifier_points(results, "mnist resnet")
    assert (first.method, first.label, first.bytes, first.bit_operations) == ("dense", "", 8000, None)
    assert first.accuracy == pytest.approx(dense) and first.loss == pytest.approx(dense_loss)
    assert first.accuracy_interval == pytest.approx((dense, dense))
    assert (second.method, second.label, second.bytes, second.flops) == ("cubic", "94% sparse", 901, 10.0)
    assert second.accuracy == pytest.approx(np.mean([a for a, _ in found]))
    assert second.loss == pytest.approx(np.mean([b for _, b in found]), rel=1e-4)
    low, high = second.accuracy_interval
    assert low < second.accuracy < high < dense
    wilson = 2 * 1.96 * np.sqrt(second.accuracy * (1 - second.accuracy) / 400)
    assert high - low < 0.75 * wilson  # hard images are hard for both and drop out
    assert 0 < second.loss_interval[0] < second.loss < second.loss_interval[1]


def test_what_is_missing_is_named(results):
    with pytest.raises(OptionError, match="no classifier 'dense' under condition 'mnist resnet'; it has none"):
        classifier_points(results, "mnist resnet")
    record(results, "dense", 0.9)
    results.add(Record("demo", "sweep", "mnist resnet", 0, "", "kl", 0.1))  # no classifier of the bench: left out
    assert len(classifier_points(results, "mnist resnet")) == 1
    record(results, "other 1", 0.8, units=300)
    with pytest.raises(OptionError, match="'other 1' was measured on other images"):
        classifier_points(results, "mnist resnet")
    bare = Results.start(
        results.path.with_name("b.json"), paper="demo", study="refimpl.lab.show.plots", provisional=True
    )
    for unit in ("a", "b"):
        bare.add(
            Record("demo", "dense", "x", 0, unit, "correct", 1), Record("demo", "dense", "x", 0, unit, "loss", 0.1)
        )
    with pytest.raises(OptionError, match="recorded without 'bytes'"):
        classifier_points(bare, "x")


def points_of(spec):
    (layer,) = [layer for layer in spec["layer"] if layer["mark"]["type"] == "point"]
    return layer, layer.get("data", spec.get("data"))["values"]


@pytest.mark.parametrize("x", ["bytes", "flops", "bit_operations"])
@pytest.mark.parametrize("quality", ["accuracy", "loss"])
def test_chart_draws_every_point_on_every_axis(x, quality):
    spec = classifier_chart(POINTS, x, quality, "MNIST").to_dict()
    assert spec["description"] == describe_classifiers(POINTS, x, quality, "MNIST")
    layer, rows = points_of(spec)
    drawn = {(row["x"], row["y"]) for row in rows}
    factor = 100 if quality == "accuracy" else 1
    assert drawn == {(getattr(p, x), factor * getattr(p, quality)) for p in POINTS}
    assert layer["encoding"]["x"]["scale"]["type"] == "log"
    assert (layer["encoding"]["y"]["scale"].get("type") == "log") == (quality == "loss")
    assert layer["encoding"]["shape"]["scale"]["domain"] == ["dense", "cubic", "small"]


def test_chart_compiles_without_a_network():
    vl_convert = pytest.importorskip("vl_convert")
    svg = vl_convert.vegalite_to_svg(classifier_chart(POINTS, "flops").properties(width=500).to_dict())
    assert "cubic" in svg and "FLOPs per image" in svg and "accuracy" in svg


def test_figure_has_a_panel_for_each_cost_and_the_same_points():
    figure = classifier_figure(POINTS, title="MNIST")
    for axes, x in zip(figure.axes, ("bytes", "flops"), strict=True):
        drawn = [
            tuple(map(float, xy)) for container in axes.containers for xy in zip(*container[0].get_data(), strict=True)
        ]
        assert sorted(drawn) == sorted((getattr(p, x), 100 * p.accuracy) for p in POINTS)
        assert axes.get_xscale() == "log" and x.removesuffix("s").lower() in axes.get_xlabel().lower()
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["dense", "cubic", "small"]
    assert len(png(figure)) < 80_000
    assert classifier_figure(POINTS, "loss", x=["bit_operations"]).axes[0].get_yscale() == "log"


def test_axes_that_do_not_exist_are_refused():
    with pytest.raises(OptionError, match="x='byte' must be .*did you mean 'bytes'"):
        classifier_chart(POINTS, "byte")
    with pytest.raises(OptionError, match="quality='acc' must be"):
        classifier_figure(POINTS, "acc")
    with pytest.raises(OptionError, match="recorded without it"):
        classifier_chart([ClassifierPoint("dense", 1, 1, 1, 1)], "bit_operations")
    with pytest.raises(OptionError, match="points is empty"):
        classifier_chart([])
    with pytest.raises(OptionError, match="must be positive"):
        classifier_chart([ClassifierPoint("dense", 1, 0.0, 1, 1)], "flops")
    with pytest.raises(OptionError, match="x is empty"):
        classifier_figure(POINTS, x=())


# -- the page --


def page(monkeypatch, folder):
    monkeypatch.setattr(pages, "data_path", lambda *parts: folder)
    drawn: list[dict] = []
    return pages.GENERATED["classifiers"](lambda spec, text: drawn.append(spec) or f"[{text[:40]}]"), drawn


def test_page_says_so_while_nothing_is_recorded(monkeypatch, tmp_path):
    text, drawn = page(monkeypatch, tmp_path)
    assert text == pages.NOTHING and not drawn


def test_page_brings_studies_together(monkeypatch, tmp_path):
    for slug, arms in {
        "gradual_magnitude": {"cubic 94%": {"flops": 100.0}, "small 0.25": {"flops": 120.0}},
        "layerwise_calibration": {"AdaQuant W4A4": {"bit_operations": 9.0}},
    }.items():
        study = Results.start(tmp_path / f"{slug}.json", paper=slug, study="refimpl.lab.show.plots", provisional=True)
        trained_anew = slug == "gradual_magnitude"
        quantises = {} if trained_anew else {"bit_operations": 80.0}
        record(study, "dense", 0.9 if trained_anew else 0.92, **quantises)
        for arm, costs in arms.items():
            record(study, arm, 0.85, nbytes=300, **costs)
        study.save()
    text, drawn = page(monkeypatch, tmp_path)
    assert text.startswith("## Residual network, MNIST") and "digits" not in text
    # bytes, FLOPs of all; bit operations of those that have them
    assert len(drawn) == 3
    marks = [points_of(spec)[1] for spec in drawn]
    assert [len(rows) for rows in marks] == [5, 5, 2]
    assert text.count("| dense") == 2 and "| AdaQuant W4A4 | 300 |" in text
    (named,) = [line for line in text.splitlines() if line.startswith("| dense (")]
    assert "alibration" in named or "AdaQuant" in named


# -- the training script --


def test_training_script_writes_a_model_and_goes_on_with_it(script, tmp_path, capsys):
    module = script("train_classifiers")
    plan = module.Plan(module.resnet, "digits", epochs=2, lr=3e-3, shift=1)
    folder = module.run("resnet-digits", plan, tmp_path / "models", tmp_path / "runs")
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "README.md", "curve.json"}
    weights = (folder / "model.safetensors").read_bytes()
    curve = json.loads((folder / "curve.json").read_text())
    assert [entry["step"] for entry in curve] == [0, 22, 44] and curve[-1]["validation_accuracy"] > 0.5
    card = (folder / "README.md").read_text()
    assert "CC BY 4.0" in card and "up to 1 pixels" in card and "78,394" in card
    again = module.run("resnet-digits", plan, tmp_path / "models", tmp_path / "runs")  # finished: only written
    assert (again / "model.safetensors").read_bytes() == weights and [again] == list((tmp_path / "models").iterdir())
    with pytest.raises(SystemExit):
        module.main(["resnet-minst"])
    assert "resnet-mnist" in capsys.readouterr().err


def test_shifted_images_are_moved_not_bent(script):
    shifted = script("train_classifiers").shifted
    torch.manual_seed(0)
    image = torch.zeros(200, 1, 8, 8)
    image[:, :, 3:5, 2:6] = torch.rand(200, 1, 2, 4)
    moved = shifted(image, 2)
    assert moved.shape == image.shape and torch.allclose(moved.sum((1, 2, 3)), image.sum((1, 2, 3)))
    places = {tuple((m[0] > 0).nonzero()[0].tolist()) for m in moved}
    assert len(places) == 25  # every shift of -2 ... 2 in both directions
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    row = shifted(ramp, 2)[0, 0, 0]
    assert torch.equal(row, (torch.arange(8) + row[2].item() - 2).clamp(0, 7))  # the border repeats
