"""MatryoshkaKV: Cayley, nested projections, the packed cache against masks, the training and the search for ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from refimpl.core.cache import cache_argument, prefill
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.kernels.ragged_decode import reference
from refimpl.kvcache.matryoshka_kv import (
    MatryoshkaKV,
    Moments,
    Projections,
    Table,
    calibrate,
    cayley,
    distillation,
    divergence,
    fit_bases,
    fix_signs,
    fold,
    greedy,
    inverse_cayley,
    pca,
    projected,
    random_orthogonal,
    rank_table,
    sample_ranks,
    search,
    truncate,
)
from refimpl.kvcache.ragged import Bases, FoldedOutput, MatryoshkaLayer, Packed, output_matrix
from refimpl.lab.data.windows import windows
from refimpl.lab.models import small
from tests.core.cache.policy_contract import steps

Make = Callable[[str], PreTrainedModel]
NAMES = ("llama", "qwen3", "gemma3", "gpt2")


def ids_of(rows: int = 4, length: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Tensor:
    with torch.no_grad():
        return model(ids, **({} if cache is None else cache_argument(cache))).logits


def ragged(bases: tuple[Bases | None, ...], seed: int = 0) -> Table:
    """Ranks that differ in every head, from 1 to all columns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(given: Bases) -> Any:
        heads, d = given.Q_K.shape[:2]
        return tuple(tuple(torch.randint(1, d + 1, (heads,), generator=generator).tolist()) for _ in "KV")

    return tuple(None if given is None else draw(given) for given in bases)


def rotations(count: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=torch.float64)).Q


# -- Cayley (invariants 1 and 2) --


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1000.0])
def test_cayley_is_orthogonal_for_any_matrix(scale: float) -> None:
    X = scale * torch.randn(6, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x, tolerance in ((X, 1e-12), (X.float(), 1e-5), (X.bfloat16(), 1e-5)):
        Q = cayley(x)
        assert Q.dtype == (torch.float64 if x is X else torch.float32)  # 16 bits would lose orthogonality
        assert (Q.mT @ Q - torch.eye(64)).abs().max() < tolerance
        assert torch.allclose(torch.linalg.det(Q.double()), torch.ones(6, dtype=torch.float64), atol=1e-4)


def test_the_gradient_passes_the_solve() -> None:
    X = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cayley, (X,))


def special(d: int) -> Tensor:
    """Where Cayley's inverse does not exist: eigenvalues of -1, determinants of -1."""
    eye = torch.eye(d, dtype=torch.float64)
    mirror = eye - 2 / d
    near = torch.linalg.matrix_exp((torch.pi - 1e-9) * (eye.roll(1, 1).triu() - eye.roll(1, 1).triu().T))
    return torch.stack([-eye, mirror, -mirror, eye.flip(1), eye.roll(1, 1), eye[torch.randperm(d)], near])


def test_the_sign_rule_makes_the_round_trip() -> None:
    Q0 = torch.cat([rotations(60, 64), special(64)])
    Q = fix_signs(Q0)
    assert torch.equal(Q.abs(), Q0.abs())  # signs only: columns are never permuted
    for rank in (1, 16, 63):
        assert torch.allclose(Q[..., :rank] @ Q[..., :rank].mT, Q0[..., :rank] @ Q0[..., :rank].mT)
    eye = torch.eye(64, dtype=torch.float64)
    assert torch.allclose(torch.linalg.det(Q), torch.ones(len(Q), dtype=torch.float64))
    assert torch.linalg.cond(eye + Q).max() < 100
    single = Q.float()
    back = cayley(inverse_cayley(single))
    assert back.dtype == torch.float32 and (back - single).abs().max() < 1e-5
    assert (cayley(inverse_cayley(Q)) - Q).abs().max() < 1e-12
    assert torch.equal(inverse_cayley(Q).triu(), torch.zeros_like(Q))
    # what the authors do, flipping the first column where the determinant is negative, is not enough
    flipped = Q0.clone()
    flipped[..., 0] *= torch.linalg.det(Q0).sign().unsqueeze(-1)
    worst = (cayley(inverse_cayley(flipped[:60].float())) - flipped[:60].float()).abs().amax((-1, -2))
    assert (worst > 1e-5).float().mean() > 0.05 and worst.max() > 1e-4


# -- projections (invariants 3 to 8) --


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_changes_nothing(name: str, make: Make) -> None:
    model, ids = make(name), ids_of()
    exact = logits(model, ids)
    moments = calibrate(model, ids)
    far = random_orthogonal(moments, seed=3)
    far = tuple(b and Bases(b.Q_K, b.Q_V, b.mu_K + 0.3, b.mu_V - 0.2) for b in far)  # any means
    for bases in (pca(moments), far):
        whole = MatryoshkaKV(bases, rank_table(bases, None))  # None itself keeps them as they come
        for cache in (projected(model, bases, None), whole.cache(model), MatryoshkaKV(bases).cache(model)):
            assert torch.allclose(logits(model, ids, cache), exact, atol=1e-4)


def wide(bases: tuple[Bases | None, ...], **changes: Any) -> tuple[Bases | None, ...]:
    """The same in fp64, with some tensors replaced by ``change(tensor)``."""
    names = ("Q_K", "Q_V", "mu_K", "mu_V")
    return tuple(b and Bases(**{n: changes.get(n, lambda x: x)(getattr(b, n).double()) for n in names}) for b in bases)


def test_the_mean_of_the_keys_has_no_effect_but_that_of_the_values_has(make: Make) -> None:
    model, ids = make("llama").double(), ids_of()
    bases = pca(calibrate(model, ids))
    before = logits(model, ids, projected(model, wide(bases), 5))
    moved = logits(model, ids, projected(model, wide(bases, mu_K=lambda x: x + torch.randn_like(x)), 5))
    assert (moved - before).abs().max() < 1e-12
    other = logits(model, ids, projected(model, wide(bases, mu_V=lambda x: x + torch.randn_like(x)), 5))
    assert (other - before).abs().max() > 1e-3
    grown = wide(bases, mu_K=lambda x: x.requires_grad_(), mu_V=lambda x: x.requires_grad_())
    model(ids, **cache_argument(projected(model, grown, 5))).logits.square().sum().backward()
    for b in grown:
        assert b is not None and b.mu_K.grad is not None and b.mu_V.grad is not None
        assert b.mu_K.grad.abs().max() < 1e-12 and b.mu_V.grad.abs().max() > 1e-6


def test_pca_rebuilds_best() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 500, 12, generator=generator, dtype=torch.float64) @ mixing + 3
    mean = x.mean(1)
    cov = (x - mean.unsqueeze(1)).mT @ (x - mean.unsqueeze(1)) / 500
    moments = [Moments(mean, cov, mean, cov)]
    (best,) = pca(moments)
    assert best is not None

    def error(Q: Tensor, rank: int) -> Tensor:
        rebuilt = truncate(x.unsqueeze(0), Q.double(), mean, torch.tensor([rank, rank]))
        return (rebuilt[0] - x).square().sum(-1).mean(-1)

    for rank in (1, 5, 11, 12):
        dropped = torch.linalg.eigvalsh(cov)[:, : 12 - rank].sum(-1)
        assert torch.allclose(error(best.Q_K, rank), dropped, rtol=1e-5, atol=1e-9)
        for seed in range(5):
            (other,) = random_orthogonal(moments, seed)
            assert other is not None and (error(other.Q_V, rank) >= dropped - 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
def test_masked_columns_are_a_truncated_cache(name: str, make: Make) -> None:
    model, ids = make(name), ids_of()
    bases = pca(calibrate(model, ids))
    exact = logits(model, ids)
    for ranks in (1, 3, ragged(bases)):
        masked = logits(model, ids, projected(model, bases, ranks))
        policy = MatryoshkaKV(bases, ranks)
        cache = policy.cache(model)
        assert torch.allclose(logits(model, ids, cache), masked, atol=1e-4)
        assert not torch.allclose(masked, exact, atol=1e-3)
        for layer, row in zip(cache.layers, rank_table(bases, ranks), strict=True):
            if row is not None:
                assert [layer.parts[n].shape for n in ("keys", "values")] == [(4, 1, 30, sum(side)) for side in row]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("even", [False, True])
def test_folded_values_give_the_same(name: str, even: bool, make: Make) -> None:
    model, plain, ids = make(name), make(name), ids_of()
    bases = pca(calibrate(model, ids))
    policy = MatryoshkaKV(bases, rank_table(bases, 5) if even else ragged(bases, seed=1))
    fold(model, policy)
    folded = [m for m in model.modules() if isinstance(m, FoldedOutput)]
    assert len(folded) == sum(b is not None for b in bases)
    for pieces in ([30], [7, 1, 1, 21]):
        caches = policy.cache(model), policy.cache(plain)
        for part in ids.split(pieces, 1):
            assert torch.allclose(logits(model, part, caches[0]), logits(plain, part, caches[1]), atol=1e-4)
        assert caches[0].nbytes == caches[1].nbytes
    narrow = policy.ranks[-1]  # type: ignore[index]
    groups = 2 if name != "gpt2" else 1
    assert folded[-1].in_features == groups * sum(narrow[1])
    # neither another cache nor other ranks can use it
    for cache in (None, DynamicCache(config=model.config)):
        with pytest.raises(OptionError, match="were folded for values of ranks"):
            logits(model, ids, cache)
    with pytest.raises(OptionError, match="pass the policy it was folded for"):
        MatryoshkaKV(bases, 2).cache(model)
    with pytest.raises(OptionError, match="folded already"):
        fold(model, policy)


def test_full_rank_values_are_left_unfolded(make: Make) -> None:
    model, ids = make("llama"), ids_of()
    exact = logits(model, ids)
    bases = pca(calibrate(model, ids))
    fold(model, MatryoshkaKV(bases))
    assert not any(isinstance(m, FoldedOutput) for m in model.modules())
    assert torch.equal(logits(model, ids), exact)
    unknown = make("llama")
    for layer in unknown.model.layers:  # type: ignore[union-attr]
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj)  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="LlamaAttention has no output matrix .*found Sequential"):
        fold(unknown, MatryoshkaKV(bases, 3))
    assert output_matrix(torch.nn.ReLU()) is None


def test_one_projection_per_key_value_head_serves_its_query_heads() -> None:
    torch.manual_seed(0)
    H, G, d, n = 2, 3, 8, 5
    Q_K, Q_V = rotations(H, d).float(), rotations(H, d, 1).float()
    bases = Bases(Q_K, Q_V, torch.randn(H, d), torch.randn(H, d))
    ranks = ((3, 6), (8, 2))
    keys, values, query = torch.randn(1, H, n, d), torch.randn(1, H, n, d), torch.randn(1, H, G, 2, d)
    packed = [
        torch.cat([(x[:, h] - mu[h]) @ Q[h, :, :r] for h, r in enumerate(side)], -1).unsqueeze(1)
        for x, Q, mu, side in ((keys, Q_K, bases.mu_K, ranks[0]), (values, Q_V, bases.mu_V, ranks[1]))
    ]
    segment = Packed(packed[0], packed[1], bases, ranks, folded=False)
    scores = segment.scores(query, range(2))
    weights = scores.softmax(-1)
    mixed = segment.mix(weights)
    for h, g in product(range(H), range(G)):  # with everything repeated for each query head
        P = Q_K[h, :, : ranks[0][h]] @ Q_K[h, :, : ranks[0][h]].T
        expected = query[0, h, g] @ P @ (keys[0, h] - bases.mu_K[h]).T
        assert torch.allclose(scores[0, h, g], expected, atol=1e-5)
        P = Q_V[h, :, : ranks[1][h]] @ Q_V[h, :, : ranks[1][h]].T
        rebuilt = (values[0, h] - bases.mu_V[h]) @ P + bases.mu_V[h]
        assert torch.allclose(mixed[0, h, g], weights[0, h, g] @ rebuilt, atol=1e-5)


# -- the sampler and the search (invariants 9 and 10) --


def test_every_rank_is_drawn_as_often_and_alone() -> None:
    torch.manual_seed(0)
    draws = torch.stack([sample_ranks(3, 32) for _ in range(6000)])  # [n, 2, 3]
    n = draws[:, 0, 0].numel()
    for rank in range(4, 33, 4):
        share = (draws == rank).float().mean(0)
        assert ((share - 1 / 8).abs() < 3.5 * (1 / 8 * 7 / 8 / n) ** 0.5).all()
    assert set(draws.flatten().tolist()) == set(range(4, 33, 4))
    correlation = torch.corrcoef(draws.flatten(1).double().T)
    assert (correlation - torch.eye(6)).abs().max() < 0.06  # keys, values and heads: independent
    with pytest.raises(OptionError, match="levels=9"):
        sample_ranks(1, 8, levels=9)
    assert set(sample_ranks(2000, 12, levels=8).flatten().tolist()) == {1, 3, 4, 6, 7, 9, 10, 12}


def convex(seed: int, heads: int, d: int, step: int) -> list[list[float]]:
    """Error of each head at each rank: additive, and convex in the rank."""
    generator = torch.Generator().manual_seed(seed)
    falls = torch.rand(heads, d // step, generator=generator).sort(-1).values  # the last step down costs most
    return [[0.0, *falls[h].cumsum(0).tolist()] for h in range(heads)]  # by steps taken


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_best_where_errors_are_additive_and_convex(seed: int) -> None:
    d, step = 16, 2
    table = convex(seed, 2, d, step)

    def error(ranks: Any) -> float:
        return sum(table[h][(d - rank) // step] for h, rank in enumerate(ranks))

    def errors(ranks: tuple[int, ...], candidates: list[int]) -> list[float]:
        return [error([rank - step * (i == k) for k, rank in enumerate(ranks)]) for i in candidates]

    path = greedy(errors, [d, d], step, budget=0.4)
    for before, after in zip(path, path[1:], strict=False):
        assert sum(before) - sum(after) == step and all(a <= b for a, b in zip(after, before, strict=True))
    for ranks in path:
        every = product(range(step, d + 1, step), repeat=2)
        best = min(error(other) for other in every if sum(other) == sum(ranks))
        assert error(ranks) == pytest.approx(best)
    assert min(path[-1]) >= step and sum(path[-1]) / (2 * d) < 0.4 <= sum(path[-2]) / (2 * d)


def test_greedy_stops_at_the_floor_and_lowers_shares() -> None:
    def even(ranks: tuple[int, ...], candidates: list[int]) -> list[float]:
        return [float(i) for i in candidates]

    assert greedy(even, [8, 8], 4, budget=0.1)[-1] == (4, 4)  # nothing is left to lower
    halves = greedy(even, [8, 8, 8, 8], 2, budget=0.75, share=0.5)
    assert halves == [(8, 8, 8, 8), (6, 6, 8, 8), (4, 4, 8, 8), (2, 4, 8, 8)]
    assert [sum(r) for r in greedy(even, [8] * 4, 2, budget=0.9, share=1.0)] == [32, 28]  # not further than asked
    for options, message in (({"budget": 0.0}, "budget=0"), ({"step": 8}, "step=8"), ({"share": 2.0}, r"share=2\.0")):
        with pytest.raises(OptionError, match=message):
            greedy(even, [8, 8], **{"step": 2, "budget": 0.5} | options)


@pytest.mark.parametrize("error", ["kl", "hidden"])
def test_the_search_lowers_what_costs_least(error: str, make: Make) -> None:
    model, ids = make("gemma3"), ids_of(3, 16)
    bases = pca(calibrate(model, ids))
    path = search(model, bases, ids, budget=0.9, step=4, error=error, batch_size=2, progress=False)
    assert path[-1] == rank_table(bases, None) and path[0][0] is None  # the layer with a window is left alone
    exact = logits(model, ids)
    hidden: Any = lambda cache: model.base_model(ids, **cache_argument(cache)).last_hidden_state  # noqa: E731
    costs = {}
    with torch.no_grad():
        whole = hidden(projected(model, bases, None))
        for layer, side, head in product((1, 2), (0, 1), (0, 1)):  # the first round, one by one
            ranks = [[list(s) for s in row] if row else None for row in path[-1]]
            ranks[layer][side][head] -= 4  # type: ignore[index]
            table: Any = tuple(row and tuple(map(tuple, row)) for row in ranks)
            if error == "kl":
                costs[table] = float(divergence(exact, logits(model, ids, projected(model, bases, table))))
            else:
                costs[table] = float((hidden(projected(model, bases, table)) - whole).norm() / whole.norm())
    assert path[-2] == min(costs, key=costs.__getitem__)
    batched = search(model, bases, ids, budget=0.5, step=8, share=0.75, error=error, progress=False)
    assert len(batched) == 2 or len(batched) == 3
    for wide_, narrow in zip(batched[1:], batched, strict=False):
        assert sum(map(sum, wide_[1])) >= sum(map(sum, narrow[1]))  # type: ignore[arg-type]


def test_wrong_searches(make: Make) -> None:
    model, ids = make("llama"), ids_of(2, 8)
    bases = pca(calibrate(model, ids))
    with pytest.raises(OptionError, match="error='l2'"):
        search(model, bases, ids, budget=0.5, step=4, error="l2")
    with pytest.raises(CalibrationError, match="ids has shape"):
        search(model, bases, ids[:0], budget=0.5, step=4)


# -- training --


@pytest.fixture(scope="module")
def trained_model() -> PreTrainedModel:
    return small.load("llama-small")


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor]:
    train_ids, _ = windows("wikipedia", "calibration", 64, small.tokenizer())
    other, _ = windows("wikipedia", "validation", 64, small.tokenizer())
    return train_ids[::40, :-1], other[::150, :-1]


def gap(model: PreTrainedModel, bases: Any, ids: Tensor, ranks: Any) -> float:
    return float(divergence(logits(model, ids), logits(model, ids, projected(model, bases, ranks))))


def test_training_beats_pca_at_low_ranks_and_leaves_the_model_alone(
    trained_model: PreTrainedModel, texts: tuple[Tensor, Tensor]
) -> None:
    model, (ids, other) = trained_model, texts
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = pca(calibrate(model, ids))
    recipe = Recipe(steps=30, lr=1e-2, warmup=3, clip=1.0)
    found, history = fit_bases(model, start, ids, recipe, batch_size=8, progress=False)
    d = start[0].Q_K.shape[-1]  # type: ignore[union-attr]
    assert gap(model, found, other, d // 4) < 0.95 * gap(model, start, other, d // 4)
    assert gap(model, found, other, None) < 1e-4  # still orthogonal: nothing is lost at full rank
    for b, old in zip(found, start, strict=True):
        assert b is not None and old is not None
        for Q in (b.Q_K, b.Q_V):
            assert not Q.requires_grad and (Q.mT @ Q - torch.eye(d)).abs().max() < 1e-5
        assert torch.equal(b.mu_K, old.mu_K)
        assert not torch.equal(b.mu_V, old.mu_V) and not torch.equal(b.Q_V, old.Q_V)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    again, _ = fit_bases(model, start, ids, recipe, batch_size=8, progress=False)
    assert torch.equal(again[0].Q_K, found[0].Q_K)  # type: ignore[union-attr]
    # without orthogonality the columns become worth more at low ranks, and full rank no longer changes nothing
    free, _ = fit_bases(model, start, ids, recipe, batch_size=8, orthogonal=False, progress=False)
    assert (free[0].Q_K.mT @ free[0].Q_K - torch.eye(d)).abs().max() > 1e-2  # type: ignore[union-attr]
    assert gap(model, free, other, None) > 1e-4


def test_one_rank_is_trained_alone(trained_model: PreTrainedModel, texts: tuple[Tensor, Tensor]) -> None:
    model, (ids, other) = trained_model, texts
    start = pca(calibrate(model, ids))
    recipe = Recipe(steps=30, lr=1e-2, warmup=3, clip=1.0)
    d = start[0].Q_K.shape[-1]  # type: ignore[union-attr]
    fixed, history = fit_bases(model, start, ids, recipe, batch_size=8, rank=d // 2, progress=False)
    assert gap(model, fixed, other, d // 2) < gap(model, start, other, d // 2)
    # the first loss is that of PCA at this rank
    student = Projections(model, start, rank=d // 2)
    batch = next(iter(batches(ids, batch_size=8)))
    assert float(distillation()(student, batch).detach()) == pytest.approx(history.losses[0], rel=1e-4)
    with pytest.raises(OptionError, match=f"ranks={d + 1}"):
        Projections(model, start, rank=d + 1)


def test_ranks_are_drawn_anew_for_every_step_head_and_side(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from refimpl.kvcache import matryoshka_kv

    model, ids = make("llama"), ids_of(4, 10)
    seen: list[Tensor] = []

    def watched(heads: int, d: int, **options: Any) -> Tensor:
        seen.append(sample_ranks(heads, d, **options))
        return seen[-1]

    monkeypatch.setattr(matryoshka_kv, "sample_ranks", watched)
    fit_bases(model, pca(calibrate(model, ids)), ids, Recipe(steps=20, lr=1e-3), progress=False)
    drawn = torch.stack(seen).view(20, 2, 2, 2)  # steps, layers, K and V, heads
    for dim in range(4):
        assert not (drawn == drawn.select(dim, 0).unsqueeze(dim)).all()
    assert set(drawn.flatten().tolist()) == set(range(2, 17, 2))


def test_the_teacher_is_the_model_itself(make: Make) -> None:
    model, ids = make("qwen3"), ids_of()
    student = Projections(model, pca(calibrate(model, ids)))
    assert all(not name.startswith("_model") for name in student.state_dict())
    assert sum(p.numel() for p in student.parameters()) == 3 * 2 * (2 * 32 * 32 + 32)
    teacher, found = student(ids)
    assert torch.allclose(teacher, logits(model, ids)) and not teacher.requires_grad
    found.sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    torch.manual_seed(1)
    teacher, found = student(ids)
    cross = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.manual_seed(1)
    share = float(distillation(0.25)(student, [ids]).detach())
    assert share == pytest.approx(float((0.25 * divergence(teacher, found) + 0.75 * cross).detach()), rel=1e-5)
    with pytest.raises(OptionError, match=r"share=1\.5"):
        distillation(1.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sixteen_bit_models_are_trained_with_fp32_bases(precision: str, make: Make) -> None:
    model, ids = make("llama").bfloat16(), ids_of(4, 12)
    bases = pca(calibrate(model, ids))
    recipe = Recipe(steps=4, lr=1e-2, precision=precision)
    found, history = fit_bases(model, bases, ids, recipe, progress=False)
    assert all(map(torch.isfinite, map(torch.tensor, history.losses)))
    for b in found:
        assert b is not None and b.Q_K.dtype == torch.float32
        assert (b.Q_K.mT @ b.Q_K - torch.eye(16)).abs().max() < 1e-5


def test_training_goes_on_after_an_interruption(make: Make, tmp_path: Path) -> None:
    model, ids = make("llama"), ids_of(8, 12)
    start = pca(calibrate(model, ids))
    recipe = Recipe(steps=6, lr=1e-2, seed=5)
    whole, _ = fit_bases(model, start, ids, recipe, progress=False)

    def stop(step: int, module: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    student = Projections(model, start)
    with pytest.raises(KeyboardInterrupt):
        train(
            student,
            batches(ids, batch_size=2, seed=5),
            distillation(),
            recipe,
            after_step=[stop],
            folder=tmp_path,
            checkpoint_every=1,
            progress=False,
        )
    found, history = fit_bases(model, start, ids, recipe, folder=tmp_path, progress=False)
    assert len(history.losses) == 6
    assert torch.equal(found[1].Q_V, whole[1].Q_V)  # type: ignore[union-attr]


# -- the cache (the contract of policies has the rest) --


def test_a_budget_sets_the_rank(make: Make) -> None:
    model, policy = make("llama"), MatryoshkaKV(pca(calibrate(make("llama"), ids_of(1, 64))))
    for budget in (0.75, 0.5, 0.2, 0.07):
        assert policy.cache(model, budget=budget, length=64).policy.ranks == int(budget * 16)  # type: ignore[attr-defined]
    assert policy.cache(model, budget=1.0, length=64).policy.ranks is None  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match=r"the least it can do is \d+ bytes \(6\.2%\) \(ranks=1\)"):
        policy.cache(model, budget=0.05, length=64)


def test_fit_is_its_stages_one_after_the_other(make: Make) -> None:
    model, ids = make("gemma3"), ids_of(4, 20)
    plain = MatryoshkaKV()
    start = pca(calibrate(model, ids))
    assert plain.fit(model, ids) == MatryoshkaKV(start)
    recipe = Recipe(steps=3, lr=1e-3)
    trained, _ = fit_bases(model, start, ids, recipe, progress=False)
    assert plain.fit(model, ids, recipe=recipe, progress=False) == MatryoshkaKV(trained) != MatryoshkaKV(start)
    path = search(model, start, ids[:1], budget=0.8, step=2, progress=False)  # an eighth of 16 channels
    assert plain.fit(model, ids, search_on=ids[:1], budget=0.8, progress=False) == MatryoshkaKV(start, path=path)


def test_a_budget_chooses_along_the_path_of_a_search(make: Make) -> None:
    model, ids = make("llama"), ids_of(2, 16)
    bases = pca(calibrate(model, ids))
    path = search(model, bases, ids, budget=0.5, step=4, progress=False)
    policy = MatryoshkaKV(bases, path=path)
    sizes = [sum(sum(map(sum, row)) for row in table) / 128 for table in path]  # type: ignore[arg-type]
    assert sizes == sorted(sizes) and sizes[0] < 0.5 and sizes[-1] == 1
    for budget in (0.97, 0.8, 0.55):
        chosen = policy.cache(model, budget=budget, length=64).policy.ranks  # type: ignore[attr-defined]
        assert chosen == max((s, t) for s, t in zip(sizes, path, strict=True) if s <= budget)[1]
    with pytest.raises(OptionError, match="the least it can do"):
        policy.cache(model, budget=0.3, length=64)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_devices(name: str, make: Make, fake_cuda: Callable[[], Any]) -> None:
    built: Any = make(name)
    ready = pca(calibrate(built, ids_of()))
    policy = MatryoshkaKV(ready, ragged(ready))  # bases on the CPU
    with fake_cuda() as place:
        model = place(built)
        ids = torch.ones(2, 40, dtype=torch.long, device="cuda")
        fitted = pca(calibrate(model, ids))
        student = Projections(model, fitted)
        assert all(p.device.type == "cuda" for p in student.parameters())
        with torch.no_grad():  # a build for CPUs has no autograd for this device
            assert distillation(0.5)(student, [ids]).device.type == "cuda"
        assert model(ids, **cache_argument(projected(model, ready, 3))).logits.device.type == "cuda"
        fold(model, policy)
        assert model(ids, **cache_argument(policy.cache(model))).logits.device.type == "cuda"


# -- the kernel --


@pytest.mark.parametrize("pads", [(0, 0), (6, 0)])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_the_kernel_gets_what_the_layer_attends_to(
    pads: tuple[int, int], even: bool, folded: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("qwen3")
    bases = pca(calibrate(model, ids_of()))
    policy = MatryoshkaKV(bases, rank_table(bases, 7) if even else ragged(bases))
    if folded:
        fold(model, policy)
    compared = []
    plain = MatryoshkaLayer.attention

    def both(layer: MatryoshkaLayer, incoming: Any) -> Any:
        out, mass = plain(layer, incoming)
        inputs = layer.kernel_inputs(incoming)
        if len(incoming.slots) == 1:
            assert inputs is not None
            expected = reference(inputs)
            compared.append((out, expected[:, None, None] if folded else expected))
        else:
            assert inputs is None
        return out, mass

    monkeypatch.setattr(MatryoshkaLayer, "attention", both)
    steps(model, policy.cache(model), [20, 1, 1, 3, 1], pads)
    assert len(compared) == 9
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in compared)


def test_padding_in_the_middle_is_not_for_the_kernel(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make("llama"), []
    bases = pca(calibrate(model, ids_of()))
    plain = MatryoshkaLayer.attention

    def spy(layer: MatryoshkaLayer, incoming: Any) -> Any:
        asked.append(layer.kernel_inputs(incoming))
        return plain(layer, incoming)

    monkeypatch.setattr(MatryoshkaLayer, "attention", spy)
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[0, 10:13] = 0
    cache = MatryoshkaKV(bases, 5).cache(model)
    for known, size in ((mask[:, :24], 24), (mask, 1)):
        position = (known.cumsum(-1) - 1).clamp(min=0)[:, -size:]
        model(ids_of(2, size), attention_mask=known, position_ids=position, **cache_argument(cache))
    assert len(asked) == 4 and all(answer is None for answer in asked)


@pytest.mark.parametrize("folded", [False, True])
def test_a_gpu_runs_the_kernel(folded: bool, make: Make, fake_cuda: Callable[[], Any]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    built: Any = make("llama").bfloat16()
    bases = pca(calibrate(built, ids_of()))
    policy = MatryoshkaKV(bases, ragged(bases))
    if folded:
        fold(built, policy)
    with fake_cuda() as place:
        model = place(built)
        cache = policy.cache(model)
        prefill(model, cache, torch.ones(2, 40, dtype=torch.long, device="cuda"))
        with Watch():
            model(torch.ones(2, 1, dtype=torch.long, device="cuda"), **cache_argument(cache))
    assert sum("ragged_decode" in name for name in called) == 2  # one a layer


# -- errors --


def test_wrong_options(make: Make) -> None:
    model, ids = make("llama"), ids_of()
    bases = pca(calibrate(model, ids))
    for ranks, message in (
        (17, "ranks=17: the heads of layer 0 have 16 channels"),
        (0, "ranks=0"),
        ((((3,), (3, 3)), ((3, 3), (3, 3))), r"ranks\[0\]=\(\(3,\), \(3, 3\)\): give 2 ranks for keys"),
        ((((3, 3), (3, 3)),), "ranks has 1 layers, but there are bases for 2"),
    ):
        with pytest.raises(OptionError, match=message):
            MatryoshkaKV(bases, ranks)
    with pytest.raises(OptionError, match=r"bases: there are none for layer 1 \(of 1\)"):
        MatryoshkaKV(bases[:1], 3).cache(model)
    with pytest.raises(OptionError, match=r"for 2 key-value heads of 16 channels, but the model has 2 of 32"):
        MatryoshkaKV((*bases, bases[0]), 3).cache(make("qwen3"))
    with pytest.raises(OptionError, match="MatryoshkaKV can do 'streamed'"):
        MatryoshkaKV(bases, 3).cache(model, prefill="exact")
    with pytest.raises(CalibrationError, match="ids has shape"):
        calibrate(model, ids[:, :0])
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match="layer 1 are not finite"):
        calibrate(model, ids)
