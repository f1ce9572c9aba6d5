"""GPTQ and SparseGPT against the textbook: invert what remains after every column, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from refimpl import GPTQ, RTN, SparseGPT
from refimpl.baselines import obs
from refimpl.baselines.obs import Solution, inverse_root, solve
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.layers import PackedLinear


def problem(m: int = 12, d: int = 32, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """W [m, d] and inputs [T, d] with correlated channels, fp32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(d) + 0.5 * torch.randn(d, d, generator=generator) / d**0.5
    X = torch.randn(tokens or 4 * d, d, generator=generator) @ mix
    # a shared component makes neighbours correlate, so that compensation has something to do
    X = X + 2 * torch.randn(len(X), 1, generator=generator)
    return torch.randn(m, d, generator=generator), X


def site_of(W: Tensor, bias: Tensor | None = None) -> Site:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return Site("w", 0, nn.Sequential(linear), "0")


def stats_of(X: Tensor) -> InputStats:
    stats = InputStats(X.shape[1], "cpu", {"gram"})
    stats.add(X)
    return stats


def grid(columns: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Min-max scale and zero of [m, group], in fp64 with the scale rounded as stored."""
    low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    if symmetric and bits <= 3:
        scale = 2 * torch.maximum(high, -low) / (2**bits - 1)
    elif symmetric:
        scale = torch.maximum(high / (2 ** (bits - 1) - 1), -low / 2 ** (bits - 1))
    else:
        scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0).to(torch.bfloat16).double()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero


def naive(
    W: Tensor,
    G: Tensor,
    *,
    damping: float = 0.01,
    bits: int | None = None,
    group: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    mask: Tensor | None = None,
    pattern: tuple[int, int] | None = None,
    sparsity: float | None = None,
    mask_block: int = 128,
) -> Tensor:
    """Optimal brain surgeon, one column at a time, the inverse recomputed for the columns that remain."""
    W, G = W.double().clone(), G.double()
    m, d = W.shape
    H = G + damping * G.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    order = torch.argsort(G.diagonal(), descending=True).tolist() if act_order else list(range(d))
    kept = torch.ones(m, d, dtype=torch.bool) if mask is None else mask.clone()
    group = group or d
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    if act_order and bits:
        grids = {g: grid(W[:, g * group : (g + 1) * group], bits, symmetric) for g in range(d // group)}

    def inverse(position: int) -> Tensor:
        rest = order[position:]
        return torch.linalg.inv(H[rest][:, rest])

    for position, j in enumerate(order):
        width = pattern[1] if pattern else mask_block
        if (pattern or sparsity) and position % width == 0:
            ahead = order[position : position + width]
            remaining = torch.stack([inverse(position + k)[0, 0] for k in range(len(ahead))])
            saliency = W[:, ahead].square() / remaining
            if pattern:
                drop = saliency.argsort(1)[:, : pattern[1] - pattern[0]]
                for row in range(m):
                    kept[row, [ahead[k] for k in drop[row].tolist()]] = False
            else:
                worst = saliency.flatten().argsort()[: int(saliency.numel() * sparsity)]
                for flat in worst.tolist():
                    kept[flat // len(ahead), ahead[flat % len(ahead)]] = False
        w = W[:, j].clone()
        q = w
        if bits:
            if not act_order and j % group == 0:
                columns = slice(j, j + group)
                grids[j // group] = grid(W[:, columns] * kept[:, columns], bits, symmetric)
            scale, zero = grids[j // group]
            q = scale * (((w / scale).round() + zero).clamp(0, 2**bits - 1) - zero)
        q = torch.where(kept[:, j], q, 0.0)
        inv = inverse(position)
        W[:, order[position:]] -= ((w - q) / inv[0, 0])[:, None] * inv[0]
        W[:, j] = q
    return W


def gptq(W: Tensor, G: Tensor, mask: Tensor | None = None, group: int | None = None, **options: object) -> Solution:
    return GPTQ(**options).quantise(W, G, mask, {}, group or W.shape[1])  # type: ignore[arg-type]


# ---- against the textbook


@pytest.mark.parametrize("group", [None, 8, 16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gptq_is_column_by_column_obs(group: int | None, act_order: bool, symmetric: bool, masked: bool) -> None:
    W, X = problem()
    G = X.T @ X
    mask = None
    if masked:
        mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) > 0.4
        W = W * mask
    options = {"bits": 3, "symmetric": symmetric, "act_order": act_order}
    found = gptq(W, G, mask, group, **options)
    expected = naive(W, G, group=group, mask=mask, **options)
    assert torch.allclose(found.weight.double(), expected, atol=1e-5)
    if mask is not None:
        assert not found.weight[~mask].any()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_sparsegpt_is_column_by_column_obs_for_patterns(pattern: str) -> None:
    W, X = problem()
    G = X.T @ X
    n, m = map(int, pattern.split(":"))
    found = solve(W, inverse_root(G, 0.01, {}), pattern=pattern)
    expected = naive(W, G, pattern=(n, m))
    assert torch.equal(found.mask, expected != 0)
    assert torch.allclose(found.weight.double(), expected, atol=1e-5)
    assert (found.mask.unflatten(1, (-1, m)).sum(-1) == n).all()


@pytest.mark.parametrize("mask_block", [8, 12, 128])
def test_sparsegpt_is_column_by_column_obs_unstructured(monkeypatch: pytest.MonkeyPatch, mask_block: int) -> None:
    monkeypatch.setattr(obs, "MASK_BLOCK", mask_block)
    W, X = problem()
    G = X.T @ X
    found = solve(W, inverse_root(G, 0.01, {}), pattern="unstructured", sparsity=0.5)
    expected = naive(W, G, sparsity=0.5, mask_block=mask_block)
    assert torch.equal(found.mask, expected != 0)
    assert torch.allclose(found.weight.double(), expected, atol=1e-5)


def test_prune_and_quantise_at_once_is_obs_too() -> None:
    W, X = problem()
    G = X.T @ X
    found = solve(W, inverse_root(G, 0.01, {}), pattern="2:4", bits=4, group_size=W.shape[1])
    expected = naive(W, G, pattern=(2, 4), bits=4)
    # the grid is that of the columns kept when the row begins, so the two differ only by what it clips
    assert (found.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert torch.allclose(found.weight.double(), expected, atol=1e-5)


@pytest.mark.parametrize("group", [200, 100, 50, 40, 8])
@pytest.mark.parametrize("block", [1, 7, 16, 64, 512])
def test_result_does_not_depend_on_the_block_boundary(monkeypatch: pytest.MonkeyPatch, group: int, block: int) -> None:
    W, X = problem(m=6, d=200, seed=1)
    U = inverse_root(X.T @ X, 0.01, {})

    def run() -> list[Solution]:
        return [
            solve(W, U, bits=3, group_size=group),
            solve(W, U, pattern="2:4"),
            solve(W, U, pattern="unstructured", sparsity=0.3),
        ]

    expected = run()
    monkeypatch.setattr(obs, "BLOCK", block)
    for found, wanted in zip(run(), expected, strict=True):
        assert torch.allclose(found.weight, wanted.weight, atol=2e-4)
        if wanted.codes is not None:
            assert torch.equal(found.codes, wanted.codes)
            assert torch.equal(found.scale, wanted.scale)
        else:
            assert torch.equal(found.mask, wanted.mask)


def test_wide_layer_equals_the_textbook_across_several_blocks() -> None:
    """d > 128: the last columns must carry every earlier block's updates."""
    W, X = problem(m=4, d=160, seed=2)
    G = X.T @ X
    for group in (None, 80):
        found = gptq(W, G, group=group, bits=4)
        assert torch.allclose(found.weight.double(), naive(W, G, bits=4, group=group), atol=1e-4)


# ---- properties


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_uncorrelated_or_absent_inputs_make_gptq_rounding(group: int | None, symmetric: bool, scale: float) -> None:
    """scale 0 is an expert that no token chose: nothing is known, and nothing is lost beyond rounding."""
    W, _ = problem()
    stats = InputStats(W.shape[1], "cpu", {"gram"})
    stats.gram.copy_(scale * torch.eye(W.shape[1]))
    site = site_of(W)
    by_gptq = GPTQ(4, group, symmetric).compress_site(site, stats, None)
    by_rtn = RTN(4, group, symmetric).compress_site(site, None, None)
    assert torch.equal(by_gptq.to_dense(), by_rtn.to_dense())
    assert by_gptq.to_dense().abs().max() > 0 and site.log == {}


def test_sparsegpt_without_inputs_is_magnitude_pruning() -> None:
    W, _ = problem()
    stats = InputStats(W.shape[1], "cpu", {"gram"})
    layer = SparseGPT("2:4").compress_site(site_of(W), stats, None)
    kept = W.abs().unflatten(1, (-1, 4)) >= W.abs().unflatten(1, (-1, 4)).topk(2).values[..., -1:]
    assert torch.allclose(layer.to_dense(), W * kept.flatten(1))


@pytest.mark.parametrize(
    "options", [{"bits": 2}, {"bits": 3}, {"bits": 4}, {"bits": 3, "symmetric": True}, {"bits": 3, "act_order": True}]
)
def test_gptq_beats_rounding_on_the_outputs(options: dict) -> None:
    for seed in range(3):
        W, X = problem(24, 64, seed)
        site = site_of(W)
        errors = [
            ((W - layer.to_dense()) @ X.T).square().sum()
            for layer in (
                GPTQ(group_size=32, **options).compress_site(site, stats_of(X), None),
                RTN(options["bits"], 32, options.get("symmetric", False)).compress_site(site, None, None),
            )
        ]
        assert errors[0] < 0.8 * errors[1]


def test_sparsegpt_beats_its_own_mask_without_compensation() -> None:
    W, X = problem(24, 64)
    layer = SparseGPT("2:4").compress_site(site_of(W), stats_of(X), None)
    masked = W * layer.nonzero_mask()
    assert ((W - layer.to_dense()) @ X.T).norm() < 0.8 * ((W - masked) @ X.T).norm()


def test_symmetric_grids_store_no_zero_points() -> None:
    W, X = problem()
    layer = GPTQ(4, 8, symmetric=True).compress_site(site_of(W), stats_of(X), None)
    assert "zeros" not in layer.parts() and "zero" not in layer.state_dict()
    assert "zeros" in GPTQ(4, 8).compress_site(site_of(W), stats_of(X), None).parts()


def test_quantising_a_sparse_layer_keeps_its_zeros() -> None:
    W, X = problem()
    bias = torch.arange(12.0)
    for pruner in (SparseGPT("2:4"), SparseGPT("unstructured", 0.6)):
        site = site_of(W, bias)
        site.replace(pruner.compress_site(site, stats_of(X), None))
        zeros = site.weight == 0
        for method in (GPTQ(3, 8), GPTQ(3, None, act_order=True), RTN(3, 8), RTN(3, 8, symmetric=True)):
            layer = method.compress_site(site, stats_of(X), None)
            assert isinstance(layer, PackedLinear) and layer.pattern == pruner.pattern
            assert not layer.to_dense()[zeros].any()
            assert torch.equal(layer.nonzero_mask(), ~zeros)
            assert torch.equal(layer.bias, bias)


# ---- the factorisation


def test_inverse_root_is_the_cholesky_factor_of_the_inverse() -> None:
    _, X = problem()
    G = X.T @ X
    U = inverse_root(G, 0.05, {}).double()
    H = G.double() + 0.05 * G.double().diagonal().mean() * torch.eye(32)
    assert torch.allclose(U.T @ U, torch.linalg.inv(H), atol=1e-8)
    assert not U.tril(-1).any() and (U.diagonal() > 0).all()


def test_failed_cholesky_raises_the_damping_and_says_so() -> None:
    G = torch.ones(4, 4)  # rank one
    log: dict[str, float] = {}
    U = inverse_root(G, 0.0, log)
    assert torch.isfinite(U).all()
    assert log["damping"] >= 1e-6
    W = torch.randn(3, 4)
    site = site_of(W)
    stats = InputStats(4, "cpu", {"gram"})
    stats.gram.copy_(torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0])))  # a dead input
    layer = GPTQ(4, None, damping=0.0).compress_site(site, stats, None)
    assert site.log["damping"] > 0 and torch.isfinite(layer.to_dense()).all()


def test_healthy_factorisation_leaves_no_remark() -> None:
    _, X = problem()
    log: dict[str, float] = {}
    inverse_root(X.T @ X, 0.01, log)
    assert log == {}
