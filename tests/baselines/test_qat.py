"""End-to-end fine-tuning: what it trains, what it leaves behind, and that everything is put back when it fails."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from refimpl import RTN, compress
from refimpl.baselines.qat import all_logits, divergence, fine_tune, logits_of, towards
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.layers import PackedConv2d, QuantizedInput
from refimpl.core.train.loop import Recipe


def cnn(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    return model.eval()


def pictures(n: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_the_mean_over_samples_of_kl_from_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 7, 5, generator=generator)
    p, q = target.softmax(1), logits.softmax(1)
    assert float(divergence(logits, target)) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert float(divergence(logits, target)) != pytest.approx(float(divergence(target, logits)), rel=1e-3)
    assert float(divergence(target, target)) == 0
    assert math.isclose(
        float(F.kl_div(q.log(), p, reduction="batchmean")), float(divergence(logits, target)), rel_tol=1e-5
    )


def test_it_fits_the_calibration_images_and_exports_what_it_trained() -> None:
    model, x = cnn(), pictures()
    target = all_logits(model, x)
    history = fine_tune(model, x, 2, 2, Recipe(60, lr=0.01), progress=False)
    assert isinstance(model[0], PackedConv2d) and isinstance(model[3], QuantizedInput)
    assert {model[3].base.bits, model[3].quantizer.bits, model[0].base.base.bits} == {2}
    found = float(divergence(all_logits(model, x), target))
    values = [entry["divergence"] for entry in history.evaluations]
    assert found == pytest.approx(min(values), rel=1e-4)
    assert found < 0.7 * values[0]


def test_it_trains_weights_biases_and_ranges() -> None:
    before, x = cnn(), pictures()
    ranges = cnn()
    fine_tune(ranges, x, 4, 4, Recipe(1, lr=1e-12), progress=False)
    trained = cnn()
    fine_tune(trained, x, 4, 4, Recipe(40, lr=0.02), keep_best=False, progress=False)
    for index in (0, 3):
        a, b = (model[index].base if index == 0 else model[index] for model in (ranges, trained))
        assert not torch.equal(a.base.scale, b.base.scale) and not torch.equal(a.quantizer.range, b.quantizer.range)
        assert not torch.equal(a.base.bias, b.base.bias) and not torch.equal(a.base.values, b.base.values)
    assert before[0].weight.shape == (16, 1, 3, 3)


def test_transformers() -> None:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    model, x = ViTForImageClassification(config).eval(), pictures(20)
    fine_tune(model, x, 4, 4, Recipe(4, lr=0.01), batch_size=10, progress=False)
    assert all(isinstance(site.module, QuantizedInput) for site in find_sites(model))
    assert torch.isfinite(logits_of(model, x)).all()


def test_norms_and_dropout_keep_still() -> None:
    """Only quantisers are in training mode: batch norms that are left keep their statistics, dropout drops nothing."""
    model = nn.Sequential(nn.BatchNorm2d(1), *cnn(), nn.Dropout(0.9)).eval()
    kept = model[0].running_mean.clone()
    x = pictures()
    target = all_logits(model, x)
    fine_tune(model, x, 8, 8, Recipe(3, lr=1e-4), keep_best=False, progress=False)
    assert torch.equal(model[0].running_mean, kept) and int(model[0].num_batches_tracked) == 0
    assert float(divergence(all_logits(model, x), target)) < 0.01
    assert not model.training


def test_same_seed_same_model() -> None:
    x = pictures()
    found = []
    for seed in (0, 0, 1):
        model = cnn()
        fine_tune(model, x, 3, 3, Recipe(10, lr=0.01, seed=seed), batch_size=20, keep_best=False, progress=False)
        found.append(all_logits(model, x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_model_that_fails_to_train_is_put_back() -> None:
    model, x = cnn(), pictures()
    with torch.no_grad():
        model[3].bias[0] = torch.inf  # its logits give no target
    modules = list(model)
    with pytest.raises(CalibrationError, match="not finite"):
        fine_tune(model, x, 4, 4, Recipe(30), progress=False)
    assert all(a is b for a, b in zip(model, modules, strict=True))


@pytest.mark.parametrize("options", [{"bits": 1, "activation_bits": 4}, {"bits": 4, "activation_bits": 9}])
def test_bits_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="bits=(1|9)"):
        fine_tune(cnn(), pictures(), recipe=Recipe(1), **options)


def test_refusals() -> None:
    with pytest.raises(CalibrationError, match="20 samples are fewer than one batch, batch_size=50"):
        fine_tune(cnn(), pictures(20), 4, 4, Recipe(1), progress=False)
    model = cnn()
    compress(model, RTN(4, None), progress=False)
    with pytest.raises(OptionError, match="already; start from the float model"):
        fine_tune(model, pictures(), 4, 4, Recipe(1), progress=False)
    with pytest.raises(CalibrationError, match="not finite"):
        towards(
            cnn(), pictures(), torch.full((60, 10), torch.nan), Recipe(1), batch_size=10, keep_best=True, progress=False
        )
