"""Magnitude and Wanda against brute force, patterns and counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from refimpl import Magnitude, SparseGPT, Wanda
from refimpl.baselines.pruning import prune_mask
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers import empty_layer

few = settings(max_examples=20, deadline=None)


def site_of(W: Tensor) -> Site:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    return Site("w", 0, nn.Sequential(linear), "0")


def stats_of(X: Tensor) -> InputStats:
    stats = InputStats(X.shape[1], "cpu", {"gram", "abs"})
    stats.add(X)
    return stats


def brute(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the n best of every m neighbours, one group after another."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for i in range(score.shape[0]):
        for start in range(0, score.shape[1], m):
            group = score[i, start : start + m].tolist()
            for k in sorted(range(m), key=lambda k: group[k], reverse=True)[:n]:
                mask[i, start + k] = True
    return mask


@few
@given(st.integers(0, 2**31), st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (5, 8)]))
def test_patterns_against_brute_force(seed: int, structure: tuple[int, int]) -> None:
    n, m = structure
    generator = torch.Generator().manual_seed(seed)
    W, X = torch.randn(5, 16, generator=generator), torch.randn(9, 16, generator=generator)
    for method, score in ((Magnitude(f"{n}:{m}"), W.abs()), (Wanda(f"{n}:{m}"), W.abs() * X.norm(dim=0))):
        layer = method.compress_site(site_of(W), stats_of(X), None)
        mask = brute(score, n, m)
        assert torch.equal(layer.to_dense(), W * mask)
        assert torch.equal(layer.nonzero_mask(), mask)


@few
@given(st.integers(0, 2**31), st.floats(0.1, 0.9))
def test_unstructured_against_brute_force(seed: int, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W, X = torch.randn(5, 16, generator=generator), torch.randn(9, 16, generator=generator)
    threshold = W.abs().flatten().sort().values[int(80 * sparsity)]
    layer = Magnitude("unstructured", sparsity).compress_site(site_of(W), None, None)
    assert torch.equal(layer.to_dense(), W * (W.abs() >= threshold))
    score = W.abs() * X.norm(dim=0)
    threshold = score.sort(1).values[:, int(16 * sparsity)]
    layer = Wanda("unstructured", sparsity).compress_site(site_of(W), stats_of(X), None)
    assert torch.equal(layer.to_dense(), W * (score >= threshold[:, None]))


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_number_of_zeros_is_as_announced(method: type, sparsity: float) -> None:
    """Odd sizes, several blocks of columns: the counts must add up to what the configuration says."""
    W, X = torch.randn(7, 333), torch.randn(400, 333)
    site = site_of(W)
    chosen = method("unstructured", sparsity)
    layer = chosen.compress_site(site, stats_of(X), None)
    announced = chosen.layer_config(site)
    assert layer.config() == announced
    assert layer.nbytes == empty_layer(announced, torch.float32, "meta").nbytes
    assert announced["nonzeros"] == pytest.approx(W.numel() * (1 - sparsity), abs=len(W) + 1)


def test_wanda_scores_with_the_norm_of_all_tokens() -> None:
    W = torch.tensor([[1.0, 1.1, 0.1, 0.2]])
    X = torch.tensor([[10.0, 1.0, 1.0, 1.0]])
    assert Wanda("1:4").compress_site(site_of(W), stats_of(X), None).to_dense().tolist() == [[1, 0, 0, 0]]
    assert Magnitude("1:4").compress_site(site_of(W), None, None).to_dense()[0, 1] > 1


def test_wanda_without_inputs_is_magnitude_pruning() -> None:
    W = torch.randn(6, 16)
    stats = InputStats(16, "cpu", {"abs"})
    for pattern in ("2:4", "unstructured"):
        layer = Wanda(pattern).compress_site(site_of(W), stats, None)
        assert torch.equal(layer.nonzero_mask(), prune_mask(W.abs(), pattern, 0.5, per_row=True))


def test_ties_still_keep_exactly_two_of_four() -> None:
    layer = Magnitude("2:4").compress_site(site_of(torch.zeros(3, 8)), None, None)
    assert (layer.nonzero_mask().unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4", "2:5", "half", "2:4:8", "-1:4", ""])
def test_bad_pattern(pattern: str) -> None:
    with pytest.raises(OptionError, match="pattern="):
        Magnitude(pattern)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 2.0])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(OptionError, match="sparsity="):
        SparseGPT("unstructured", sparsity)


@pytest.mark.parametrize("kind", [Magnitude, Wanda, SparseGPT])
def test_a_sparsity_that_the_pattern_does_not_have_is_refused(kind: type) -> None:
    with pytest.raises(OptionError, match=r"sparsity=0.9 beside pattern='2:4', which leaves 2 of every 4"):
        kind(sparsity=0.9)
    assert kind("1:4", sparsity=0.75).sparsity == 0.75
    assert kind("unstructured", sparsity=0.9).sparsity == 0.9


def test_width_that_the_pattern_does_not_divide() -> None:
    with pytest.raises(OptionError, match="'w' has 18.*unstructured"):
        Magnitude("2:4").layer_config(site_of(torch.randn(4, 18)))


def test_pruning_twice_is_refused() -> None:
    site = site_of(torch.randn(4, 16))
    site.replace(Magnitude("2:4").compress_site(site, None, None))
    with pytest.raises(OptionError, match="prune first"):
        Wanda("2:4").layer_config(site)
