"""AdaRound: its rectified sigmoid, the choice of neighbours against exhaustive search, annealing, what is stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refimpl import compress
from refimpl.baselines.adaround import BETA, WARM_UP, AdaRound, RoundedSite
from refimpl.core.compress.reconstruct import QuantizedSite
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.layers import QuantizedInput
from refimpl.core.layers.quantizer import mse_range, snap, step_and_zero

Factory = Callable[..., Any]


def make_site(m: int = 12, d: int = 32, seed: int = 0) -> Site:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Site("0", 0, nn.Sequential(nn.Linear(d, m)).requires_grad_(False), "0")


def gram_of(d: int, seed: int = 1) -> InputStats:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(d) + 0.4 * torch.randn(d, d, generator=generator)
    stats = InputStats(d, "cpu", {"gram"})
    stats.add(torch.randn(200, d, generator=generator) @ mix)
    return stats


def relative(target: Tensor, weight: Tensor, gram: Tensor) -> float:
    D = target - weight
    return float(((D @ gram) * D).sum() / ((target @ gram) * target).sum())


def neighbours(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid points below and above each weight of one group, on the grid AdaRound fixes."""
    R, Z = snap(*mse_range(W, bits), bits)
    step, zero = step_and_zero(R, Z, bits)
    low, high = -zero, 2**bits - 1 - zero
    return step * (W / step).floor().clamp(low, high), step * ((W / step).floor() + 1).clamp(low, high)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_weight_goes_to_one_of_its_two_neighbours_and_well(bits: int) -> None:
    """Against all 2^d choices for one output: never below the best, never above rounding, mostly close to the best."""
    d, closed = 8, []
    for seed in range(12):
        site, stats = make_site(1, d, seed), gram_of(d, seed)
        found = AdaRound(bits, iterations=150, lr=0.1).compress_site(site, stats, None).to_dense()
        below, above = neighbours(site.weight, bits)
        assert (((found - below).abs() < 1e-6) | ((found - above).abs() < 1e-6)).all()
        errors = [
            relative(site.weight, torch.where(torch.tensor(choice), above, below), stats.gram)
            for choice in itertools.product((False, True), repeat=d)
        ]
        nearest = torch.where(site.weight - below > above - site.weight, above, below)
        ours, rounded = (relative(site.weight, weight, stats.gram) for weight in (found, nearest))
        assert min(errors) * (1 - 1e-4) <= ours <= rounded * (1 + 1e-4)
        if rounded > 1.01 * min(errors):
            closed.append((rounded - ours) / (rounded - min(errors)))
    assert len(closed) > 5 and sum(closed) / len(closed) > 0.6


def test_it_beats_rounding_to_nearest_on_the_same_grid() -> None:
    site, stats = make_site(), gram_of(32)
    AdaRound(3, iterations=100, lr=0.1).compress_site(site, stats, None)
    assert site.log["after"] < 0.9 * site.log["before"]


def test_before_training_the_weights_are_what_they_were() -> None:
    site = make_site()
    layer = RoundedSite(site, 4, 32)
    step, zero = step_and_zero(layer.R, layer.Z, 4)
    inside = (layer.W / step > -zero) & (layer.W / step < 15 - zero)
    assert inside.float().mean() > 0.9
    assert torch.allclose(layer.quantized()[inside], layer.W[inside], atol=1e-6)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"V"}
    assert torch.equal(layer.eval().packed().to_dense(), layer.weight)


def test_h_reaches_zero_and_one() -> None:
    layer = RoundedSite(make_site(), 4, 32)
    layer.V.data.fill_(20.0)
    assert (layer.up() == 1).all()
    layer.V.data.fill_(-20.0)
    assert (layer.up() == 0).all()


def test_regulariser_is_off_then_falls_from_round_to_sharp() -> None:
    method, layer = AdaRound(iterations=100), RoundedSite(make_site(), 4, 32)
    assert float(layer.undecided().detach()) == 0
    betas = []
    for step in range(1, 101):
        method._anneal(step, layer)
        betas.append(float(layer.beta))
    warm = round(100 * WARM_UP)
    assert not any(betas[: warm - 1]) and betas[warm - 1] == BETA[0] and betas[-1] == pytest.approx(BETA[1])
    assert all(a > b for a, b in itertools.pairwise(betas[warm - 1 :]))
    h = layer.up()
    assert float(layer.undecided().detach()) == pytest.approx(
        float((1 - (2 * h.detach() - 1).abs() ** 2).mean()), abs=1e-5
    )


def test_regulariser_decides() -> None:
    """With a heavy one, few are left between up and down; without, many."""
    undecided = {}
    for weight in (0.0, 10.0):
        layer = RoundedSite(make_site(), 4, 32, "mse")
        AdaRound(4, iterations=150, lr=0.1, regulariser=weight).train(layer, gram_of(32), make_site().weight)
        undecided[weight] = float(((layer.up() > 0.05) & (layer.up() < 0.95)).float().mean())
    assert undecided[0.0] > 2 * undecided[10.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "mixtral"])
def test_decoders(layout: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"tiny_{layout}")().to(dtype)
    tokens = torch.randint(3, 256, (6, 12), generator=torch.Generator().manual_seed(0))
    report = compress(model, AdaRound(3, group_size=32, iterations=10, lr=0.1), tokens, progress=False)
    assert all(site.log["after"] <= site.log["before"] for site in report.sites)
    assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_convolutions_with_quantised_inputs(order: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))
    x = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    report = compress(model.eval(), AdaRound(3, 3, iterations=40, lr=0.1), x, order=order, progress=False)
    assert isinstance(model[0].base, QuantizedInput)
    assert all(site.log["after"] < site.log["before"] for site in report.sites)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"regulariser": -1.0}, {"activation_bits": 1}, {"clip": "none"}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        AdaRound(**options)


def test_fewer_samples_than_a_batch() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 10)).eval()
    with pytest.raises(CalibrationError, match="10 samples are fewer than the 50"):
        compress(model, AdaRound(4, 4), torch.randn(10, 8), progress=False)


def test_it_starts_from_the_grid_of_least_squares() -> None:
    assert AdaRound().clip == "mse" and AdaRound.site_type is RoundedSite and QuantizedSite is not RoundedSite
