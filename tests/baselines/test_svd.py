"""Plain and activation-scaled SVD, and LoftQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from refimpl import RTN, ActSVD, LoftQ, Magnitude, PlainSVD
from refimpl.baselines.svd import balanced, truncated_svd
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompensatedLinear


def site_of(W: Tensor) -> Site:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    return Site("w", 0, nn.Sequential(linear), "0")


def rounded(W: Tensor) -> Site:
    site = site_of(W)
    site.replace(RTN(3, None).compress_site(site, None, None))
    return site


def stats_of(X: Tensor) -> InputStats:
    stats = InputStats(X.shape[1], "cpu", {"abs"})
    stats.add(X)
    return stats


def test_plain_svd_is_the_closest_matrix_of_its_rank() -> None:
    W = torch.randn(20, 32)
    site = rounded(W)
    dW = W - site.weight
    layer = PlainSVD(rank=5).compress_site(site, None, W)
    left = torch.linalg.svdvals(dW)[5:].square().sum()
    assert torch.allclose((W - layer.to_dense()).square().sum(), left, rtol=1e-4)
    assert torch.linalg.matrix_rank(layer.adapter.to_dense()) == 5


def test_factors_are_balanced() -> None:
    B, A = balanced(*truncated_svd(torch.randn(6, 9), 3))
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_act_svd_on_uniform_inputs_is_plain_svd(alpha: float) -> None:
    W = torch.randn(20, 32)
    site = rounded(W)
    signs = torch.randn(50, 32).sign() * 3
    scaled = ActSVD(rank=5, alpha=alpha).compress_site(site, stats_of(signs), W)
    plain = PlainSVD(rank=5).compress_site(site, None, W)
    assert torch.allclose(scaled.to_dense(), plain.to_dense(), atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_act_svd_minimises_the_error_scaled_by_mean_magnitude(alpha: float) -> None:
    W, X = torch.randn(20, 32), torch.randn(200, 32) * torch.logspace(-1, 1, 32)
    site = rounded(W)
    s = X.abs().mean(0) ** alpha
    layer = ActSVD(rank=5, alpha=alpha).compress_site(site, stats_of(X), W)
    left = torch.linalg.svdvals((W - site.weight) * s)[5:].square().sum()
    assert torch.allclose(((W - layer.to_dense()) * s).square().sum(), left, rtol=1e-3)


@pytest.mark.parametrize("dead", ["one input", "all inputs"])
def test_act_svd_survives_inputs_that_never_fire(dead: str) -> None:
    W, X = torch.randn(20, 32), torch.randn(50, 32)
    X = X * 0 if dead == "all inputs" else X * (torch.arange(32) != 4)
    site = rounded(W)
    layer = ActSVD(rank=5).compress_site(site, stats_of(X), W)
    assert torch.isfinite(layer.to_dense()).all()
    if dead == "all inputs":
        assert torch.allclose(layer.to_dense(), PlainSVD(rank=5).compress_site(site, None, W).to_dense(), atol=1e-5)


def test_loftq_with_one_iteration_is_rounding_then_svd_and_more_are_better() -> None:
    for seed in range(4):
        W = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
        site = rounded(W)
        plain = PlainSVD(rank=8).compress_site(site, None, W)
        errors = []
        for iterations in (1, 5):
            layer = LoftQ(3, None, rank=8, iterations=iterations).compress_site(site_of(W), None, None)
            assert isinstance(layer, CompensatedLinear)
            errors.append((W - layer.to_dense()).norm().item())
        assert errors[0] == pytest.approx((W - plain.to_dense()).norm().item(), rel=1e-5)
        assert errors[1] <= errors[0]


def test_loftq_refuses_what_is_already_compressed() -> None:
    site = site_of(torch.randn(16, 32))
    site.replace(Magnitude("2:4").compress_site(site, None, None))
    with pytest.raises(OptionError, match="LoftQ starts from uncompressed weights"):
        LoftQ(3, None, rank=4).layer_config(site)
    with pytest.raises(OptionError, match="iterations=0"):
        LoftQ(iterations=0)


@pytest.mark.parametrize("method", [PlainSVD(rank=17), ActSVD(rank=17), LoftQ(3, None, rank=17)])
def test_rank_above_the_smaller_dimension(method) -> None:
    site = site_of(torch.randn(16, 32)) if isinstance(method, LoftQ) else rounded(torch.randn(16, 32))
    with pytest.raises(OptionError, match="rank=17: 'w' is 16 x 32"):
        method.layer_config(site)
