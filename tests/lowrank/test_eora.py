"""EoRA: the theorem and its consequences in fp64, the traps, and the order of the model-level loop."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from refimpl import GPTQ, RTN, EoRA, PlainSVD, SparseGPT, compress
from refimpl.baselines.svd import balanced, truncated_svd
from refimpl.core.compress.sites import Site, find_blocks, find_sites
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompensatedLinear, LowRankLinear, PackedLinear
from refimpl.lowrank.eora import DAMPING, EPSILON, damped, eigenspace, eora, equal_sizes, refit

Factory = Callable[..., PreTrainedModel]
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(2, 9), st.integers(2, 9))  # m outputs, d inputs


def problem(seed: int, m: int, d: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """dW [m, d] and inputs X [T, d] with correlated channels of unlike size, in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = random(tokens or 4 * d + 3, d) @ (torch.eye(d, dtype=torch.float64) + 0.3 * random(d, d))
    return random(m, d), X * torch.logspace(0, 1.5, d, dtype=torch.float64)


def repair(dW: Tensor, G: Tensor, rank: int) -> Tensor:
    """BA of rank r; no path at all for r = 0."""
    B, A = eora(dW, *eigenspace(G), rank)
    return B @ A


def error(dW: Tensor, BA: Tensor | float, X: Tensor) -> float:
    return float(((dW - BA) @ X.T).square().sum())


def svd_repair(dW: Tensor, scale: Tensor, rank: int) -> Tensor:
    B, A = balanced(*truncated_svd(dW * scale, rank))
    return B @ A / scale


@few
@given(seeds, sizes, st.data())
def test_error_is_the_sum_of_the_squared_singular_values_left_out(seed, size, data) -> None:
    dW, X = problem(seed, *size)
    rank = data.draw(st.integers(1, min(size)))
    S, _ = eigenspace(X.T @ X)
    left = torch.linalg.svdvals(dW @ S)[rank:].square().sum()
    total = error(dW, 0.0, X)
    assert error(dW, repair(dW, X.T @ X, rank), X) == pytest.approx(float(left), rel=1e-9, abs=1e-9 * total)


@few
@given(seeds, sizes, st.data())
def test_no_other_repair_of_this_rank_is_better(seed, size, data) -> None:
    dW, X = problem(seed, *size)
    rank = data.draw(st.integers(1, min(size)))
    ours = error(dW, repair(dW, X.T @ X, rank), X)
    slack = 1e-9 * error(dW, 0.0, X)
    scale = X.abs().mean(0)
    rivals = [
        svd_repair(dW, torch.ones_like(scale), rank),
        svd_repair(dW, scale, rank),
        svd_repair(dW, scale**0.5, rank),
    ]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        A = torch.randn(rank, size[1], generator=generator, dtype=torch.float64)
        rivals.append(torch.linalg.lstsq(A @ X.T @ X @ A.T, A @ X.T @ X @ dW.T).solution.T @ A)  # best B for a random A
    for rival in rivals:
        assert ours <= error(dW, rival, X) + slack


def test_gradient_descent_on_the_output_error_does_not_get_below() -> None:
    """The ApiQ-like baseline: Adam on A and B, from zero B and random A."""
    dW, X = problem(3, 6, 8)
    dW, X = dW / 10, X / X.norm() * 10
    torch.manual_seed(0)
    B = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    A = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([A, B], lr=2e-2)
    for _ in range(800):
        optimiser.zero_grad()
        loss = ((dW - B @ A) @ X.T).square().sum()
        loss.backward()
        optimiser.step()
    best = error(dW, repair(dW, X.T @ X, 2), X)
    assert best <= loss.item() * (1 + 1e-9)
    assert loss.item() < 1.05 * best  # and it nearly arrives, so the comparison means something


@few
@given(seeds, sizes)
def test_full_rank_restores_the_weight(seed, size) -> None:
    dW, X = problem(seed, *size)
    BA = repair(dW, X.T @ X, min(size))
    assert torch.allclose(BA, dW, rtol=0, atol=1e-8 * float(dW.abs().max()))
    assert not repair(dW, X.T @ X, 0).any()


@few
@given(seeds, sizes, st.data())
def test_white_and_diagonal_inputs_give_the_known_svds(seed, size, data) -> None:
    dW, X = problem(seed, *size)
    rank = data.draw(st.integers(1, min(size)))
    d = size[1]
    white = 7.0 * torch.eye(d, dtype=torch.float64)
    assert torch.allclose(repair(dW, white, rank), svd_repair(dW, torch.ones(d).double(), rank), atol=1e-9)
    root = X.square().sum(0).sqrt()
    assert torch.allclose(repair(dW, torch.diag(root**2), rank), svd_repair(dW, root, rank), atol=1e-7)


@few
@given(seeds, sizes, st.data())
def test_any_square_root_gives_the_same_product(seed, size, data) -> None:
    dW, X = problem(seed, *size)
    rank = data.draw(st.integers(1, min(size)))
    G = X.T @ X
    values, Q = torch.linalg.eigh(G)
    symmetric = Q * values.sqrt() @ Q.T
    expected = repair(dW, G, rank)
    for S in (torch.linalg.cholesky(G), symmetric):
        singular = torch.linalg.svdvals(dW @ S)
        if rank < min(size) and singular[rank - 1] < 1.001 * singular[rank]:
            continue  # no gap: the product is not unique
        B, A = eora(dW, S, torch.linalg.inv(S), rank)
        assert torch.allclose(B @ A, expected, rtol=0, atol=1e-7 * float(dW.abs().max()))


@few
@given(seeds, sizes)
def test_each_rank_removes_one_squared_singular_value(seed, size) -> None:
    dW, X = problem(seed, *size)
    S, _ = eigenspace(X.T @ X)
    removed = torch.linalg.svdvals(dW @ S).square()
    errors = [error(dW, repair(dW, X.T @ X, rank), X) for rank in range(min(size) + 1)]
    for rank, value in enumerate(removed.tolist()):
        assert errors[rank] - errors[rank + 1] == pytest.approx(value, rel=1e-7, abs=1e-9 * errors[0])


@few
@given(seeds, sizes, st.floats(0.01, 100))
def test_scale_and_rotation_of_the_inputs(seed, size, c) -> None:
    dW, X = problem(seed, *size)
    rank = max(1, min(size) // 2)
    expected = repair(dW, X.T @ X, rank)
    scaled = c * X
    assert torch.allclose(repair(dW, scaled.T @ scaled, rank), expected, atol=1e-7)
    R = torch.linalg.qr(problem(seed + 1, size[1], size[1])[0]).Q
    turned = X @ R
    assert torch.allclose(repair(dW @ R, turned.T @ turned, rank), expected @ R, atol=1e-7)


@few
@given(seeds, sizes, st.data())
@example(2710, (3, 8), None)
def test_stationary_in_both_factors(seed, size, data) -> None:
    dW, X = problem(seed, *size)
    rank = 2 if data is None else data.draw(st.integers(1, min(size)))
    S, S_inv = eigenspace(X.T @ X)
    B, A = eora(dW, S, S_inv, rank)
    rest = dW - B @ A
    G = S @ S.T  # not X^T X: in the example above its smallest eigenvalue is below the clamp
    unit = (dW @ G).norm()
    assert (rest @ G @ A.T).norm() <= 1e-12 * unit * A.norm()
    assert (B.T @ rest @ G).norm() <= 1e-12 * unit * B.norm()


def test_squared_output_loss_has_no_gradient_at_the_solution() -> None:
    dW, X = problem(11, 7, 9)
    B, A = (factor.requires_grad_() for factor in eora(dW, *eigenspace(X.T @ X), 3))

    def gradients(B: Tensor, A: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(((dW - B @ A) @ X.T).square().sum(), (B, A))

    at_zero, _ = gradients(torch.zeros_like(B).requires_grad_(), A)
    for gradient in gradients(B, A):
        assert gradient.norm() <= 1e-8 * at_zero.norm()


@few
@given(seeds, st.integers(2, 9), st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_streamed_gram_equals_one_shot_in_any_order(seed, d, chunks) -> None:
    _, X = problem(seed, 2, d, sum(chunks))
    pieces = list(X.float().split(chunks))
    expected = X.T @ X
    for order in (pieces, pieces[::-1]):
        stats = InputStats(d, "cpu", {"gram"})
        for piece in order:
            stats.add(piece)
        assert stats.tokens == sum(chunks)
        assert torch.allclose(stats.gram.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


# ---- traps


def make_site(W: Tensor, base: PackedLinear | None = None) -> Site:
    block = nn.Module()
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    block.add_module("w", base if base is not None else linear)
    return Site("w", 0, block, "w")


def compressed_site(W: Tensor, bits: int = 3) -> Site:
    site = make_site(W)
    site.replace(RTN(bits, None).compress_site(site, None, None))
    return site


def stats_of(X: Tensor) -> InputStats:
    stats = InputStats(X.shape[1], "cpu", {"gram", "abs"})
    stats.add(X)
    return stats


def relative_error(W: Tensor, site: Site, X: Tensor) -> float:
    X = X.double()
    return float(((W - site.weight).double() @ X.T).norm() / (W.double() @ X.T).norm())


def test_gram_is_a_sum_over_tokens_not_of_the_mean_token() -> None:
    """Inputs of mean zero: the mean activation knows nothing, the sum of outer products all."""
    X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    X = torch.cat([X, -X])
    stats = stats_of(X[:70])
    stats.add(X[70:])
    assert torch.allclose(stats.gram, X.T @ X, rtol=1e-5, atol=1e-4)
    one = stats_of(X[:1])
    assert torch.allclose(one.gram, X[0].outer(X[0]))


@pytest.mark.parametrize("case", ["zero eigenvalue", "dead input", "few tokens", "no tokens", "one token"])
def test_singular_inputs_stay_finite_and_optimal(case: str) -> None:
    dW, X = problem(5, 6, 8, 40)
    if case == "zero eigenvalue":
        X[:, 3] = 2 * X[:, 1]
    elif case == "dead input":
        X[:, 2] = 0
    else:
        X = X[: {"few tokens": 5, "no tokens": 0, "one token": 1}[case]]
    G = X.T @ X
    S, S_inv = eigenspace(G)
    assert torch.isfinite(S).all() and torch.isfinite(S_inv).all()
    BA = repair(dW, G, 2)
    assert torch.isfinite(BA).all()
    # the clamp trades at most EPSILON of the largest direction for a finite inverse
    best = torch.linalg.svdvals(dW @ X.T)[2:].square().sum()
    slack = EPSILON * float(G.diagonal().sum()) * float(dW.square().sum())
    assert error(dW, BA, X) <= float(best) + 10 * slack + 1e-12
    # and the whole adapter, as the driver makes it, in fp32
    site = compressed_site(dW.float())
    site.replace(EoRA(rank=2).compress_site(site, stats_of(X.float()), dW.float()))
    assert torch.isfinite(site.weight).all()


def test_eigenvalues_are_clamped_relative_to_the_largest() -> None:
    S, S_inv = eigenspace(torch.diag(torch.tensor([0.0, 4.0], dtype=torch.float64)))
    assert S.square().sum(0).sort().values.tolist() == pytest.approx([4 * EPSILON, 4.0])
    assert torch.allclose(S_inv @ S, torch.eye(2, dtype=torch.float64))


def test_adapter_beats_svd_through_the_method_too() -> None:
    W, X = (t.float() for t in problem(8, 32, 48, 400))
    results = {}
    for method in (EoRA(rank=6), PlainSVD(rank=6)):
        site = compressed_site(W)
        site.replace(method.compress_site(site, stats_of(X), W))
        results[type(method)] = relative_error(W, site, X)
    assert results[EoRA] < 0.9 * results[PlainSVD] < 0.9 * relative_error(W, compressed_site(W), X)


def test_quantised_adapter_is_gptq_of_both_factors_and_nearly_as_good() -> None:
    W, X = (t.float() for t in problem(9, 64, 96, 900))
    stats = stats_of(X)
    plain, packed = compressed_site(W), compressed_site(W)
    before, dW = relative_error(W, plain, X), W - plain.weight
    layers = {}
    for site, bits in ((plain, None), (packed, 4)):
        site.replace(EoRA(rank=16, adapter_bits=bits, adapter_group=16).compress_site(site, stats, W))
        layers[bits] = site.module
        assert isinstance(site.module, CompensatedLinear)
    A = layers[None].adapter.get_submodule("A").to_dense()
    A_hat, B_hat = (layers[4].adapter.get_submodule(name) for name in "AB")
    assert isinstance(A_hat, PackedLinear) and isinstance(B_hat, PackedLinear)
    assert (A_hat.bits, A_hat.group_size, B_hat.bits, B_hat.group_size) == (4, 16, 4, 16)
    H, gptq = damped(stats.gram), GPTQ(4, act_order=True, damping=DAMPING)
    found_A = gptq.quantise(A, stats.gram, None, {}, 16).weight
    B = refit(dW, found_A, H)
    c = equal_sizes(B, found_A, H)
    assert torch.equal(A_hat.to_dense(), found_A / c[:, None])
    A64 = A_hat.to_dense().double()
    inner = (A64 @ H @ A64.T).float()  # B sees A x, with A as it was quantised
    assert torch.equal(B_hat.to_dense(), gptq.quantise(B * c, inner, None, {}, 16).weight)
    unquantised, quantised = relative_error(W, plain, X), relative_error(W, packed, X)
    assert unquantised < quantised < unquantised + 0.05 * (before - unquantised)


def correlated(d: int, out: int) -> tuple[Tensor, Tensor]:
    """W [out, d] and inputs [4096, d] whose variance falls by three orders of magnitude over directions."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    X = torch.randn(4096, d, generator=generator) @ torch.diag(torch.logspace(0, -1.5, d)) @ turn
    return torch.randn(out, d, generator=generator) / d**0.5, X


@pytest.mark.parametrize("tokens", [0, 1, 32, 64, 200, 2048])
@pytest.mark.parametrize("group", [64, 24])
def test_a_4_bit_repair_helps_on_inputs_that_it_was_not_fitted_to(tokens: int, group: int) -> None:
    """With fewer tokens than the rank, S is tiny outside their span: rounding B there once made layers 6 times worse."""
    W, X = correlated(256, 128)
    errors = {None: relative_error(W, compressed_site(W), X)}
    for bits in (4, 16):
        site = compressed_site(W)
        method = EoRA(rank=64, adapter_bits=None if bits == 16 else bits, adapter_group=group)
        site.replace(method.compress_site(site, stats_of(X[:tokens]), W))
        errors[bits] = relative_error(W, site, X)
    assert errors[16] < errors[4] < errors[16] + 0.15 * (errors[None] - errors[16])


@pytest.mark.parametrize("case", ["nothing to repair", "one direction to repair", "dead inputs", "one large input"])
def test_a_4_bit_repair_is_never_worse_than_none(case: str) -> None:
    W, X = correlated(96, 64)
    if case == "dead inputs":
        X[:, ::2] = 0
    elif case == "one large input":
        X[:, 5] *= 1000
    site = compressed_site(W)
    target = W
    if case == "nothing to repair":
        target = site.weight.clone()
    elif case == "one direction to repair":
        target = site.weight + torch.ones(64, 1) @ torch.linspace(-1, 1, 96)[None]
    before = relative_error(target, site, X)
    site.replace(EoRA(rank=32, adapter_bits=4).compress_site(site, stats_of(X[:1000]), target))
    assert relative_error(target, site, X) <= 0.7 * before + 1e-6


def test_balancing_and_refitting() -> None:
    dW, X = problem(3, 20, 30, 12)  # fewer tokens than inputs
    H = damped(X.T @ X)
    B, A = eora(dW, *eigenspace(X.T @ X), 16)
    c = equal_sizes(B, A, H)
    assert torch.equal(c.log2(), c.log2().round())
    ratio = (((A @ H) * A).sum(1).sqrt() / c) / (B.norm(dim=0) * c)
    assert 0.5 <= float(ratio.min()) and float(ratio.max()) <= 2 and B.norm(dim=0).max() > 100 * B.norm(dim=0).min()
    assert equal_sizes(torch.zeros(3, 2), torch.ones(2, 30), H).tolist() == [1.0, 1.0]

    def loss(B: Tensor, A: Tensor) -> float:
        D = dW - B @ A
        return float(((D @ H) * D).sum())

    noisy = A * (1 + 0.1 * torch.randn(A.shape, generator=torch.Generator().manual_seed(0)))
    fitted = refit(dW, noisy, H)
    assert loss(fitted, noisy) < 0.99 * loss(B, noisy)
    assert all(loss(fitted, noisy) <= loss(fitted + 1e-3 * torch.randn_like(B), noisy) for _ in range(5))


def test_group_of_a_quantised_factor_follows_its_width() -> None:
    site = compressed_site(torch.randn(48, 96))
    config = EoRA(rank=24, adapter_bits=4, adapter_group=64).layer_config(site)
    assert config["adapter"]["A"]["group_size"] == 32 and config["adapter"]["B"]["group_size"] == 8


def test_base_is_never_touched_and_a_second_repair_replaces_the_first() -> None:
    W, X = (t.float() for t in problem(10, 32, 48, 300))
    site = compressed_site(W)
    base = site.module
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    site.replace(EoRA(rank=4).compress_site(site, stats_of(X), W))
    other = stats_of(X.flip(1))
    site.replace(EoRA(rank=5).compress_site(site, other, W))
    assert site.module.base is base
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    fresh = compressed_site(W)
    fresh.replace(EoRA(rank=5).compress_site(fresh, other, W))
    assert torch.equal(site.weight, fresh.weight)


def test_rank_above_the_smaller_dimension_is_refused_by_site_name(tiny_llama: Factory) -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    compress(model, RTN(3, 32), progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(0, 256, (2, 8))
    with pytest.raises(
        OptionError, match=r"rank=33: 'model\.layers\.0\.self_attn\.k_proj' is 32 x 64.*between 1 and 32"
    ):
        compress(model, EoRA(rank=33), tokens, reference=dense, progress=False)
    for options in ({"rank": 0}, {"rank": -1}):
        with pytest.raises(OptionError, match="rank"):
            compress(model, EoRA(**options), tokens, reference=dense, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("options", [{"adapter_bits": 1}, {"adapter_bits": 9}, {"adapter_group": 0}])
def test_adapter_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        EoRA(rank=4, **options)


def test_uncompressed_site_has_nothing_to_repair(tiny_llama: Factory) -> None:
    dense = tiny_llama()
    with pytest.raises(OptionError, match=r"layers\.0\.self_attn\.q_proj.*not compressed"):
        compress(
            copy.deepcopy(dense), EoRA(rank=4), torch.zeros(1, 8, dtype=torch.long), reference=dense, progress=False
        )


# ---- the model-level loop


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_statistics_come_from_original_blocks_behind_the_compensated_prefix(tiny_llama: Factory, order: str) -> None:
    """The five steps of the method, written out for two blocks with nothing of the driver but its mask-free forward."""
    dense = tiny_llama(seed=1, initializer_range=0.2)
    model = copy.deepcopy(dense)
    tokens = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(2))
    compress(model, SparseGPT("2:4"), tokens.flip(0), progress=False)
    bases = {site.name: site.weight.clone() for site in find_sites(model)}
    compress(model, EoRA(rank=8), tokens, reference=dense, order=order, batch_size=4, progress=False)

    mirror = copy.deepcopy(dense).eval()  # becomes the compensated model, block by block
    _, blocks = find_blocks(mirror)
    for index in range(len(blocks)):
        grams: dict[str, Tensor] = {}
        source = mirror if order == "sequential" else dense

        def keep(name: str, x: Tensor, grams: dict[str, Tensor] = grams) -> None:
            x = x.reshape(-1, x.shape[-1]).double()
            grams[name] = grams.get(name, torch.zeros(())) + x.T @ x

        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
            for name, linear in find_blocks(source)[1][index].named_modules()
            if isinstance(linear, nn.Linear)
        ]
        with torch.no_grad():
            source(tokens)
        for handle in handles:
            handle.remove()
        for name, gram in grams.items():
            full = f"model.layers.{index}.{name}"
            W, W_hat = dense.get_submodule(full).weight.detach(), bases[full]
            values, Q = torch.linalg.eigh(gram)
            S = Q * values.clamp_min(1e-8 * values[-1]).sqrt()
            U, s, Vt = torch.linalg.svd((W - W_hat).double() @ S)
            BA = U[:, :8] * s[:8] @ Vt[:8] @ torch.linalg.pinv(S, rtol=1e-12)
            adapter = model.get_submodule(full).adapter
            assert isinstance(adapter, LowRankLinear)
            found = adapter.to_dense().double()
            # compare what matters and is unique: the repaired outputs
            root = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram)).double())
            assert ((found - BA) @ root).norm() < 2e-3 * ((W - W_hat).double() @ root).norm(), full
            mirror.get_submodule(full).weight.data = (W_hat + BA).float()


def test_report_compares_with_the_reference(tiny_llama: Factory) -> None:
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    tokens = torch.randint(0, 256, (4, 12))
    compress(model, RTN(2, None), progress=False)
    report = compress(model, EoRA(rank=8), tokens, reference=dense, progress=False)
    assert all(site.error < site.error_before for site in report.sites)
    again = compress(model, EoRA(rank=16), tokens, reference=dense, progress=False)
    assert again.mean_error < report.mean_error
