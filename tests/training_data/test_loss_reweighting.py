"""Loss reweighting: weights have the properties the paper's argument rests on, and the limits it leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refimpl.core.errors import OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.losses import Weighted, sequence_losses
from refimpl.training_data.loss_reweighting import (
    SHAPES,
    Focal,
    LossReweighting,
    OnLoss,
    Permuted,
    Thinned,
    lin_upper,
    most_concentrated,
    normalise,
    tempered,
)

Rule = Callable[[Tensor, int], "Tensor | None"]


def draws(n: int = 200, m: int = 17, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, n).unsqueeze(1)
    return (3 + scale * torch.rand(n, m, generator=generator)).to(dtype)


def weights(strategy: str, losses: Tensor, r: float = 0.4) -> Tensor:
    found = LossReweighting(strategy, r)(losses, 0)
    assert found is not None
    return found


# -- step 1 --


def test_the_ends_are_exact() -> None:
    losses = draws(5000)
    h = normalise(losses)
    assert (h.amin(1) == -1).all() and (h.amax(1) == 1).all()
    assert (h.gather(1, losses.argmin(1, keepdim=True)) == -1).all()
    # the form of the authors' code misses an end now and then
    high, low = losses.amax(1, keepdim=True), losses.amin(1, keepdim=True)
    theirs = (2 * losses - high - low) / (high - low)
    assert ((theirs.amax(1) != 1) | (theirs.amin(1) != -1)).any()


@pytest.mark.parametrize(("a", "b"), [(2.0, 0.0), (0.01, 5.0), (300.0, -7.0)])
def test_scale_and_shift_do_not_matter(a: float, b: float) -> None:
    losses = torch.rand(50, 20, dtype=torch.float64)
    torch.testing.assert_close(normalise(a * losses + b), normalise(losses), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    losses = torch.rand(8, dtype=torch.float64).to(dtype)
    h = normalise(losses)
    assert h.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert h.min() == -1 and h.max() == 1


@pytest.mark.parametrize("strategy", SHAPES)
def test_equal_losses_and_single_samples(strategy: str) -> None:
    for m in (1, 2, 7):
        w = weights(strategy, torch.full((m,), 3.7))
        torch.testing.assert_close(w, torch.full((m,), 1 / m))
    assert weights(strategy, torch.tensor([2.0])).tolist() == [1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_hides_a_loss_that_is_not_finite(bad: float) -> None:
    losses = torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]])
    for strategy in SHAPES:
        w = weights(strategy, losses)
        assert w[0].isnan().any() and w[1].isfinite().all()  # each row is a batch of its own


# -- steps 2 and 3 --


@pytest.mark.parametrize("strategy", SHAPES)
def test_weights_are_a_distribution(strategy: str) -> None:
    losses = draws()
    for r in (0.05, 0.4, 1.0, 10.0):
        w = weights(strategy, losses, r)
        torch.testing.assert_close(w.sum(1), torch.ones(len(w)))
        assert (w > 0).all()
        f = SHAPES[strategy](normalise(losses))
        concentration = 1 / ((f - f.amax(1, keepdim=True)) / r).exp().mean(1)
        torch.testing.assert_close(w.shape[1] * w.amax(1), concentration)
        assert (concentration <= math.exp(1 / r) * (1 + 1e-5)).all()
    order = torch.randperm(17)
    torch.testing.assert_close(weights(strategy, losses[:, order]), weights(strategy, losses)[:, order])


def test_shapes() -> None:
    h = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for name, expected in {
        "linupper": torch.minimum(h + 1, torch.ones_like(h)),
        "quadratic": 1 - h**2,
        "extremes": h.abs(),
        "upper": h / 2 + 0.5,
    }.items():
        found = SHAPES[name](h)
        torch.testing.assert_close(found, expected)
        assert found.min() >= 0 and found.max() <= 1
        if name in ("quadratic", "extremes"):
            torch.testing.assert_close(found, found.flip(0))


def test_linupper_rises_then_stays() -> None:
    losses = draws().sort(1).values
    h, w = normalise(losses), weights("linupper", losses)
    assert (w.diff(dim=1) >= 0).all()
    top = w.amax(1, keepdim=True).expand_as(w)
    assert torch.equal(w[h >= 0], top[h >= 0])
    torch.testing.assert_close(w.amax(1) / w.amin(1), torch.full((len(w),), math.exp(1 / 0.4)))


def test_half_a_batch_above_the_middle_bounds_the_weights() -> None:
    for m in (2, 3, 10, 64):
        losses = draws(500, m)
        losses = torch.cat([losses, losses.square(), losses.sqrt(), -losses.square()])  # skewed both ways
        enough = (normalise(losses) >= 0).double().mean(1) >= 0.5
        for r in (0.05, 0.4, 1.0):
            assert enough.any() and (m * weights("linupper", losses, r).amax(1)[enough] <= 2 + 1e-5).all()


@pytest.mark.parametrize("m", [64, 1024])
@pytest.mark.parametrize("strategy", ["linupper", "upper"])
def test_one_outlier_takes_as_much_as_it_can(strategy: str, m: int) -> None:
    losses = torch.full((m,), 2.0)
    losses[3] = 9.0
    w = weights(strategy, losses)
    assert m * w.max().item() == pytest.approx(most_concentrated(m, 0.4), rel=1e-5)
    assert 2 < m * w.max().item() < math.exp(1 / 0.4)
    losses[:] = torch.linspace(2.0, 2.01, m)  # and without it
    assert m * weights("linupper", losses).max().item() < 2


def test_weights_solve_the_problem_they_are_said_to_solve() -> None:
    f, r = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0.4

    def objective(w: Tensor) -> Tensor:
        return (w * f).sum() - r * (w * (8 * w).log()).sum()

    w = torch.full_like(f, 1 / 8)
    for _ in range(2000):  # mirror ascent
        w = w * (0.05 * (f - r * (8 * w).log())).exp()
        w /= w.sum()
    found = tempered(f, r)
    torch.testing.assert_close(found, w, rtol=0, atol=1e-6)
    assert objective(found).item() == pytest.approx(r * math.log((f / r).exp().mean().item()), abs=1e-12)
    for _ in range(20):
        other = torch.rand_like(f)
        assert objective(other / other.sum()) < objective(found)


def test_limits_of_the_temperature() -> None:
    losses = draws(1, 64)[0]
    for strategy in SHAPES:
        assert (64 * weights(strategy, losses, 1e6) - 1).abs().max() < 1e-5
        assert (64 * weights(strategy, losses, 100.0) - 1).abs().max() < 0.01  # the other form of burn-in is close only
    cold = weights("linupper", losses, 1e-4)
    above = normalise(losses) >= 0
    torch.testing.assert_close(cold, above / above.sum())


# -- in training --


def model(seed: int = 0) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(9, 9)


ROWS = torch.randint(9, (64, 6), generator=torch.Generator().manual_seed(2))


def run(rule: Rule, steps: int) -> Tensor:
    net = model()
    loss = Weighted(net, sequence_losses, rule)
    train(net, batches(ROWS, batch_size=16), loss, Recipe(20, lr=0.05), progress=False, after_step=[stop(steps)])
    return net.weight.detach()


def stop(steps: int) -> Callable[[int, nn.Module], None]:
    kept: dict[str, Tensor] = {}

    def hook(step: int, net: nn.Module) -> None:
        if step == steps:
            kept["weight"] = net.weight.detach().clone()  # type: ignore[operator, union-attr]
        elif step == 20:
            net.weight.data.copy_(kept["weight"])  # type: ignore[operator, union-attr]

    return hook


def test_burn_in_is_the_uniform_run() -> None:
    uniform, burning = LossReweighting("uniform"), LossReweighting("linupper", burn_in=8)
    assert torch.equal(run(uniform, 8), run(burning, 8))
    assert not torch.equal(run(uniform, 9), run(burning, 9))


def test_hot_weights_give_the_plain_gradient() -> None:
    net = model()
    (hot,) = torch.autograd.grad(
        Weighted(net, sequence_losses, LossReweighting("linupper", 1e6))(net, ROWS), net.weight
    )
    (plain,) = torch.autograd.grad(sequence_losses(net, ROWS).mean(), net.weight)
    assert (hot - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("strategy", SHAPES)
def test_two_ranks_share_one_batch(strategy: str) -> None:
    net, rule = model(), LossReweighting(strategy)
    losses = sequence_losses(net, ROWS)
    w = rule(losses.detach(), 0)
    assert w is not None
    (whole,) = torch.autograd.grad((w * losses).sum(), net.weight)
    halves = []
    for q in range(2):  # what Weighted returns on each of two processes
        own = slice(32 * q, 32 * q + 32)
        halves.append(torch.autograd.grad(2 * (w[own] * sequence_losses(net, ROWS[own])).sum(), net.weight)[0])
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=1e-6, atol=1e-7)
    # normalised on each rank by itself it is another algorithm
    alone = []
    for q in range(2):
        part = sequence_losses(net, ROWS[32 * q : 32 * q + 32])
        v = rule(part.detach(), 0)
        assert v is not None
        alone.append(torch.autograd.grad((v * part).sum(), net.weight)[0])
    assert ((alone[0] + alone[1]) / 2 - whole).norm() > 1e-3 * whole.norm()


def test_weights_are_constants() -> None:
    net, rule = model(), LossReweighting("linupper")
    (found,) = torch.autograd.grad(Weighted(net, sequence_losses, rule)(net, ROWS), net.weight)
    losses = sequence_losses(net, ROWS)
    w = rule(losses, 0)
    assert w is not None
    (attached,) = torch.autograd.grad((w * losses).sum(), net.weight, retain_graph=True)
    (frozen,) = torch.autograd.grad((w.detach() * losses).sum(), net.weight)
    torch.testing.assert_close(found, frozen, rtol=1e-5, atol=1e-7)
    assert (attached - frozen).norm() > 0.05 * frozen.norm()


# -- controls --


def test_controls() -> None:
    losses, inner = draws(1, 40)[0], LossReweighting("linupper", burn_in=5)
    w = inner(losses, 5)
    assert w is not None
    for control in (Permuted(inner, 1), Thinned(inner, 1), Focal(2.0, 5), OnLoss(1.0, 5)):
        assert control(losses, 4) is None  # the same burn-in
        found = control(losses, 5)
        assert found is not None
        assert torch.equal(found, control(losses, 5))  # every process finds the same
        assert found.sum().item() == pytest.approx(1, abs=1e-5) and (found >= 0).all()
    shuffled, thinned = Permuted(inner, 1)(losses, 5), Thinned(inner, 1)(losses, 5)
    assert shuffled is not None and thinned is not None
    assert torch.equal(shuffled.sort().values, w.sort().values) and not torch.equal(shuffled, w)
    assert not torch.equal(shuffled, Permuted(inner, 1)(losses, 6))
    assert not torch.equal(shuffled, Permuted(inner, 2)(losses, 5))
    assert (1 / thinned.square().sum()).item() == pytest.approx((1 / w.square().sum()).item(), abs=0.51)
    focal, on_loss = Focal(2.0)(losses, 0), OnLoss(1.0)(losses, 0)
    assert focal is not None and on_loss is not None
    torch.testing.assert_close(focal, losses**2 / (losses**2).sum())
    torch.testing.assert_close(on_loss, losses.exp() / losses.exp().sum())


RULES: list[Rule] = [
    *map(LossReweighting, SHAPES),
    Focal(),
    OnLoss(),
    Permuted(LossReweighting()),
    Thinned(LossReweighting()),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_samples_without_a_loss_take_no_part(rule: Rule) -> None:
    losses = draws(1, 12)[0] + 0.1
    absent = torch.zeros(16, dtype=torch.bool)
    absent[[0, 7, 8, 15]] = True
    mixed = torch.zeros(16).masked_scatter(~absent, losses)
    for step in range(3):
        alone, found = rule(losses, step), rule(mixed, step)
        assert alone is not None and found is not None
        assert not found[absent].any() and found.sum().item() == pytest.approx(1, abs=1e-5)
        # a random order is another one for another number of samples
        same = found[~absent].sort().values if isinstance(rule, (Permuted, Thinned)) else found[~absent]
        torch.testing.assert_close(same, alone.sort().values if isinstance(rule, (Permuted, Thinned)) else alone)
    nothing = rule(torch.zeros(4), 0)
    assert nothing is not None and nothing.isfinite().all()


def test_wrong_options() -> None:
    make: dict[str, Callable[[], Any]] = {
        r"strategy='linuper': use one of 'linupper'.*did you mean 'linupper'": lambda: LossReweighting("linuper"),
        "strategy='mid'": lambda: LossReweighting("mid"),
        "r=0": lambda: LossReweighting(r=0),
        "r=nan": lambda: LossReweighting(r=math.nan),
        "burn_in=-1": lambda: LossReweighting(burn_in=-1),
        "gamma=-2": lambda: Focal(-2),
        "r=-1": lambda: OnLoss(-1),
        "r=-0.4": lambda: tempered(torch.zeros(3), -0.4),
        "r=0.0": lambda: most_concentrated(8, 0.0),
    }
    for message, call in make.items():
        with pytest.raises(OptionError, match=message):
            call()


def test_a_gpu_stays_a_gpu() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        losses = torch.rand(16, device="cuda")
        for rule in (*map(LossReweighting, SHAPES), Focal(), OnLoss(), Thinned(LossReweighting())):
            found = rule(losses, 0)
            assert found is not None and found.device.type == "cuda" and found.shape == (16,)
        assert lin_upper(normalise(losses)).device.type == "cuda"
