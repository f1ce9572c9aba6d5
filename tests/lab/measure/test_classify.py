"""Scores of classifiers agree with transformers' own loss; operations agree with counting by hand and with torch."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.compress.driver import compress
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.files.io import data_path
from refimpl.core.layers import CompensatedLinear, Factor, LowRankLinear, PackedLinear
from refimpl.lab.data.images import from_arrays, images
from refimpl.lab.measure.classify import bit_operations, classify, cross_entropy_loss, flops, kl, score_rows
from refimpl.lab.measure.metrics import footprint
from refimpl.lab.models import small
from refimpl.lab.models.classifiers import resnet, vit

SHIPPED = ("resnet-mnist", "resnet-digits", "vit-mnist", "vit-digits")


@pytest.fixture(scope="module")
def some():
    return images("digits", "validation").take(60)


@pytest.fixture(scope="module")
def model():
    return small.load("resnet-digits")


def test_scores_are_those_of_transformers_whatever_the_batch(model, some):
    scores = classify(model, some, batch_size=60)
    with torch.no_grad():
        theirs = model(pixel_values=some.pixels, labels=some.labels)
    assert float(scores.loss.mean()) == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert scores.accuracy == (theirs.logits.argmax(1) == some.labels).double().mean().item()
    assert scores.units == some.units
    odd = classify(model, some, batch_size=7)
    assert torch.allclose(odd.logits, scores.logits, atol=1e-4) and torch.equal(odd.correct, scores.correct)


def test_any_module_and_dtype_is_scored_and_left_as_found(some):
    plain = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1024, 10)).to(torch.bfloat16)
    plain[2].eval()
    first, second = classify(plain, some), classify(plain, some)
    assert torch.equal(first.logits, second.logits)  # dropout was off
    assert plain.training and plain[1].training and not plain[2].training
    packed = nn.Sequential(nn.Flatten(), PackedLinear(values=plain[2].weight.detach().float()))
    assert classify(packed, some).logits.shape == (60, 10)  # it has no parameters at all


def test_what_does_not_fit_is_refused_by_name(model, some):
    with pytest.raises(CalibrationError, match=r"labels\[1\] is 10, but the model has 10 classes.*num_labels=11"):
        classify(model, from_arrays(some.pixels[:2], [0, 10]))
    with pytest.raises(CalibrationError, match="28x28 pixels, but the model was made for 32x32"):
        classify(model, images("mnist", "validation").take(2))
    with pytest.raises(CalibrationError, match="3 channels, the model takes 1"):
        classify(model, from_arrays(torch.zeros(2, 3, 32, 32), [0, 1]))
    with pytest.raises(OptionError, match="batch_size=0"):
        classify(model, some, batch_size=0)
    broken = resnet(image_size=32)
    broken.classifier[1].bias.data[3] = float("nan")
    with pytest.raises(CalibrationError, match=f"image '{some.units[0]}' are not finite"):
        classify(broken, some)


def test_kl_is_that_of_torch_and_zero_to_itself(model, some):
    scores, other = classify(model, some), classify(resnet(image_size=32), some)
    p, q = (torch.distributions.Categorical(logits=s.logits.double()) for s in (scores, other))
    assert torch.allclose(kl(other, scores), torch.distributions.kl_divergence(p, q))
    assert not torch.allclose(kl(other, scores), kl(scores, other))
    assert (kl(scores, scores) == 0).all() and (kl(other, scores) >= -1e-12).all()
    with pytest.raises(OptionError, match="different images"):
        kl(scores, classify(model, some.take(5)))


def test_loss_trains_and_refuses_labels_that_are_no_class(some):
    untrained = resnet(image_size=32)
    loss = cross_entropy_loss(untrained, (some.pixels, some.labels))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in untrained.parameters())
    with pytest.raises(CalibrationError, match=r"labels\[0\] is -1"):
        cross_entropy_loss(untrained, (some.pixels[:1], torch.tensor([-1])))


@pytest.mark.parametrize("make", [resnet, vit])
def test_flops_agree_with_torch_layer_by_layer(make):
    built, pixels = make().eval(), torch.randn(3, 1, 28, 28)
    found = flops(built, pixels)
    with FlopCounterMode(display=False, depth=20) as counter, torch.no_grad():
        built(pixels[:1])
    theirs = counter.get_flop_counts()
    root = type(built).__name__
    assert set(found) == {site.name for site in find_sites(built)}
    for name, count in found.items():
        assert count == sum(theirs[f"{root}.{name}"].values()), name


def test_flops_count_what_is_stored():
    weight = torch.randn(8, 16)
    x = torch.zeros(2, 1, 1, 16)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, :5] = True
    dense = nn.Linear(16, 8, bias=False)
    dense.weight.data = weight * mask
    sparse = PackedLinear(values=weight * mask, mask=mask, pattern="unstructured")
    assert flops(nn.Sequential(dense), x) == flops(nn.Sequential(sparse), x) == {"0": 2 * 40}
    path = LowRankLinear(Factor(torch.ones(3, 16)), Factor(torch.ones(8, 3)))
    both = nn.Sequential(CompensatedLinear(sparse, path))
    assert flops(both, x) == {"0": 2 * (40 + 3 * (16 + 8))}
    assert bit_operations(both, x) == {"0": (40 + 3 * (16 + 8)) * 32 * 32}
    with pytest.raises(OptionError, match="nothing to count"):
        flops(nn.Flatten(), x)


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    assert flops(Twice(), torch.zeros(1, 1, 1, 4)) == {"layer": 2 * 2 * 16}


def test_quantised_convolutions_are_counted_in_bits_and_bytes(some):
    from refimpl.baselines.rtn import RTN

    quantised = small.load("resnet-digits")
    before, operations = footprint(quantised), bit_operations(quantised, some)
    arithmetic = flops(quantised, some)
    compress(quantised, RTN(bits=4, group_size=None), progress=False)
    codes = bit_operations(quantised, some)
    assert all(codes[name] * 8 == operations[name] for name in operations)  # 4 bits for 32
    compress(quantised, QuantizeActivations(bits=4), some, progress=False)
    both = bit_operations(quantised, some)
    assert all(both[name] * 64 == operations[name] for name in operations)
    assert flops(quantised, some) == arithmetic
    after = footprint(quantised)
    assert after.bytes < before.bytes / 6 and after.weights == before.weights
    stored = sum(tensor.nbytes for tensor in quantised.state_dict().values())
    assert after.bytes == stored


def test_rows_keep_every_image(model, some):
    scores = classify(model, some)
    rows = list(score_rows(scores, nbytes=316_336, flops=1.9e6, bit_operations=1e9))
    correct = {row.unit: row.value for row in rows if row.metric == "correct"}
    assert list(correct) == some.units and list(correct.values()) == scores.correct.int().tolist()
    whole = {row.metric: row.value for row in rows if not row.unit}
    assert whole == {"bytes": 316_336, "flops": 1.9e6, "bit_operations": 1e9}


# -- the models --


def test_widths_and_their_parameters():
    counts = {width: sum(p.numel() for p in resnet(width).parameters()) for width in (1, 0.5, 0.25, 0.125)}
    assert counts == {1: 78_394, 0.5: 20_130, 0.25: 5_302, 0.125: 1_464}
    assert resnet(0.5).config.hidden_sizes == [8, 16, 32]
    for width in (0.3, 0.0625, 0):
        with pytest.raises(OptionError, match="whole number of at least 2"):
            resnet(width)
    with pytest.raises(OptionError, match="multiple of heads=5"):
        vit(heads=5)
    with pytest.raises(OptionError, match="patch_size=5 does not divide"):
        vit(patch_size=5)


def test_a_seed_fixes_the_initial_weights():
    def build(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in vit().parameters()])

    assert torch.equal(build(1), build(1)) and not torch.equal(build(1), build(2))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_load_as_transformers_models_and_score_what_their_card_says(name):
    folder = data_path("models", name)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    kind, dataset = name.split("-")
    scores = classify(loaded.eval(), images(dataset, "test"), progress=False)
    card = (folder / "README.md").read_text()
    row = re.search(r"\| test \| (\d+) \| ([\d.]+) \| ([\d.]+)% \|", card)
    assert row is not None and int(row[1]) == len(scores.units)
    # another processor may round one image to the other side
    assert abs(100 * scores.accuracy - float(row[3])) < 0.25
    assert float(scores.loss.mean()) == pytest.approx(float(row[2]), abs=2e-3)
    assert scores.accuracy > {"resnet-mnist": 0.975, "resnet-digits": 0.98}.get(name, 0.95)
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
    curve = json.loads((folder / "curve.json").read_text())
    assert curve[0]["step"] == 0 and curve[-1]["train_loss"] < 0.2 * curve[1]["train_loss"]
