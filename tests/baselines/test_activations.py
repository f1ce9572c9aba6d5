"""Quantised inputs as a method: alone, behind other methods, on networks and language models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from refimpl import GPTQ, RTN, EoRA, SparseGPT, compress, plan
from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import OptionError
from refimpl.core.layers import ActivationQuantizer, QuantizedInput

Factory = Callable[..., Any]
TOKENS = torch.randint(3, 256, (6, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def error(model: Any, dense: Any) -> float:
    return float((logits(model) - logits(dense)).norm() / logits(dense).norm())


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "mixtral"])
def test_dense_language_models(layout: str, clip: str, request) -> None:
    dense = request.getfixturevalue(f"tiny_{layout}")()
    errors = []
    for bits in (2, 4, 8):
        model = copy.deepcopy(dense)
        planned = plan(model, QuantizeActivations(bits, clip))
        compress(model, QuantizeActivations(bits, clip), TOKENS, progress=False)
        for site, original, row in zip(find_sites(model), find_sites(dense), planned.sites, strict=True):
            assert isinstance(site.module, QuantizedInput) and site.module.config() == row["layer"]
            assert torch.equal(site.weight, original.weight)  # weights are not touched
        errors.append(error(model, dense))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


def test_behind_other_methods(tiny_llama: Factory) -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    compress(model, SparseGPT("2:4"), TOKENS, progress=False)
    compress(model, GPTQ(4, 32), TOKENS, progress=False)
    compress(model, EoRA(8), TOKENS, reference=dense, progress=False)
    before = {site.name: site.weight.clone() for site in find_sites(model)}
    unquantised = copy.deepcopy(model)
    compress(model, QuantizeActivations(8), TOKENS, progress=False)
    assert all(torch.equal(site.weight, before[site.name]) for site in find_sites(model))
    assert 0 < error(model, unquantised) < 0.05


def test_a_repair_beside_quantised_inputs(tiny_llama: Factory) -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    compress(model, RTN(2, 32), progress=False)
    compress(model, QuantizeActivations(8), TOKENS, progress=False)
    before = error(model, dense)
    compress(model, EoRA(16), TOKENS, reference=dense, progress=False)
    assert error(model, dense) < before


def test_minmax_is_the_mean_over_samples(tiny_llama: Factory) -> None:
    dense = tiny_llama()
    seen = []
    dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(dense)
    model = tiny_llama()
    compress(model, QuantizeActivations(8), TOKENS, batch_size=4, progress=False)
    quantizer = model.model.layers[0].self_attn.q_proj.quantizer
    x = seen[0].flatten(1)
    assert float(quantizer.zero) == pytest.approx(float(x.amin(1).mean()), rel=1e-4)
    assert float(quantizer.range) == pytest.approx(float(x.amax(1).mean() - x.amin(1).mean()), rel=1e-4)


def test_mse_clips_outliers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 50.0
    compress(model, QuantizeActivations(4, "mse"), x, progress=False)
    spanning = ActivationQuantizer(4, x.max() - x.min(), x.min())
    quantizer = model[0].quantizer
    assert float(quantizer.range) < 0.4 * float(spanning.range)
    assert (quantizer(x) - x).square().sum() < 0.6 * (spanning(x) - x).square().sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1: use 2 to 8"),
        ({"bits": 16}, "bits=16"),
        ({"clip": "mes"}, "clip='mes': use one of.*did you mean 'mse'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizeActivations(**options)


def test_only_once_and_last(tiny_llama: Factory) -> None:
    model = tiny_llama()
    compress(model, QuantizeActivations(8), TOKENS, targets="q_proj", progress=False)
    with pytest.raises(OptionError, match="q_proj' has quantised inputs already"):
        compress(model, QuantizeActivations(8), TOKENS, progress=False)
    with pytest.raises(OptionError, match="q_proj' is already QuantizedInput"):
        compress(model, RTN(4, 32), progress=False)
