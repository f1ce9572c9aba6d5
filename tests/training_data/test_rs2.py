"""RS2: what each variant draws, that without replacement it is ordinary training, and what can be said beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from refimpl.core.errors import OptionError
from refimpl.core.train.loop import Recipe, train
from refimpl.core.train.sampling import Shuffled, loader
from refimpl.core.train.schedules import Cosine, Scheduled
from refimpl.lab.study.jobs import in_group
from refimpl.training_data.rs2 import (
    RS2,
    VARIANTS,
    draw_stratified,
    draw_variance,
    draw_with,
    draw_without,
    expected_distinct,
    gradient_bound,
    steps,
    subset_size,
)

# N, k: dividing, not dividing, above one half, all, one
SIZES = [(20, 5), (20, 4), (10, 4), (23, 7), (11, 7), (13, 12), (7, 7), (9, 1), (1, 1), (101, 50)]


def batches_of(sampler, n: int, b: int, epochs: int) -> list[torch.Tensor]:
    data = loader(torch.arange(n), sampler, b)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += [batch[0] for batch in data]
    return found


# -- what is drawn --


@pytest.mark.parametrize("variant", ["with", "without"])
def test_all_of_the_data_is_ordinary_shuffling(variant):
    ours, plain = batches_of(RS2(24, 1.0, variant, seed=3), 24, 5, 4), batches_of(Shuffled(24, 3), 24, 5, 4)
    assert len(ours) == len(plain) == 16
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_rounds_without_replacement_are_exact_and_fair(n, k):
    counts = torch.zeros(n, dtype=torch.int64)
    for j in range(3 * n):
        rows = draw_without(n, k, seed=5, j=j)
        assert len(rows) == k == rows.unique().numel()
        counts += rows.bincount(minlength=n)
        assert counts.max() - counts.min() <= 1, f"after round {j}"
        assert counts.sum() == (j + 1) * k
        if (j + 1) * k % n == 0:
            assert (counts == (j + 1) * k // n).all()


@pytest.mark.parametrize(("n", "k"), [(20, 5), (60, 12), (7, 7)])
def test_a_pass_of_whole_rounds_is_one_permutation(n, k):
    for pass_ in range(3):
        rows = torch.cat([draw_without(n, k, seed=1, j=pass_ * (n // k) + i) for i in range(n // k)])
        assert torch.equal(rows, Shuffled(n, 1).draw(pass_))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_carried_tail_is_that_of_a_direct_simulation(n, k):
    """The rule as it is written: fill up with the first of the new permutation that are not in the tail."""
    queue: list[int] = []
    pass_ = 0
    for j in range(4 * n):
        if len(queue) < k:
            new = Shuffled(n, 9).draw(pass_).tolist()
            pass_ += 1
            head = [row for row in new if row not in queue][: k - len(queue)]
            queue = queue + head + [row for row in new if row not in head]
        assert draw_without(n, k, seed=9, j=j).tolist() == queue[:k], f"round {j}"
        queue = queue[k:]


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_rounds_with_replacement(n, k):
    for j in range(5):
        rows = draw_with(n, k, seed=2, j=j)
        assert len(rows) == k == rows.unique().numel() and 0 <= rows.min() and rows.max() < n


def test_distinct_examples_with_replacement():
    n, k, rounds, runs = 60, 9, 7, 400
    seen = torch.tensor(
        [torch.cat([draw_with(n, k, seed, j) for j in range(rounds)]).unique().numel() for seed in range(runs)],
        dtype=torch.float64,
    )
    error = seen.std() / runs**0.5
    assert abs(seen.mean() - expected_distinct(n, k, rounds)) < 4 * error
    without = torch.cat([draw_without(n, k, 0, j) for j in range(rounds)]).unique().numel()
    assert without == min(n, rounds * k)
    fixed = Shuffled(n, 0).draw(0)[:k]
    again = torch.cat([fixed[Shuffled(k, 0).draw(j)] for j in range(rounds)])
    assert again.unique().numel() == k  # what is chosen once stays k


@pytest.mark.parametrize("r", [0.05, 0.1, 0.33, 0.77, 1.0])
def test_stratified_counts_are_exact(r):
    labels = torch.arange(10).repeat_interleave(torch.arange(20, 120, 10))[torch.randperm(650)]
    counts = labels.bincount().tolist()
    for j in range(3):
        rows = draw_stratified(labels, r, seed=4, j=j)
        assert rows.unique().numel() == len(rows)
        assert labels[rows].bincount(minlength=10).tolist() == [round(r * count) for count in counts]
        assert abs(len(rows) - subset_size(650, r)) <= (10 + 1) / 2
    assert not torch.equal(draw_stratified(labels, r, 4, 0), draw_stratified(labels, r, 4, 1))


def test_stratified_rows_are_mixed_and_may_skip_a_class_number():
    labels = torch.tensor([0, 2] * 50)  # no example of class 1
    drawn = labels[draw_stratified(labels, 0.5, seed=0, j=0)]
    assert drawn.bincount().tolist() == [25, 0, 25]
    assert drawn[:25].unique().numel() == 2, "not class after class"


@pytest.mark.parametrize("variant", VARIANTS)
def test_draws_depend_on_seed_and_round_alone(variant):
    labels = torch.arange(40) % 4 if variant == "stratified" else None
    one, two = RS2(40, 0.3, variant, labels, seed=1), RS2(40, 0.3, variant, labels, seed=1)
    later = two.draw(6)
    assert torch.equal(one.draw(6), later) and not torch.equal(one.draw(7), later)
    assert not torch.equal(RS2(40, 0.3, variant, labels, seed=2).draw(6), later)


# -- the equivalence --


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def classification(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, (x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)).argmax(1)


def nll(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_without_replacement_it_is_full_training_with_a_shorter_schedule_bit_for_bit():
    n, r, rounds, b = 120, 0.1, 20, 4
    data = classification(n)
    T = steps(n, r, rounds, b)
    assert T == steps(n, 1.0, round(r * rounds), b) == 60
    recipe = Scheduled.of(Cosine(T, peak=0.3, low=3e-4), optimizer="sgd", seed=7)
    ours, plain = small_net(), small_net()
    ours_history = train(ours, loader(data, RS2(n, r, seed=7), b), nll, recipe, progress=False)
    plain_history = train(plain, loader(data, Shuffled(n, 7), b), nll, recipe, progress=False)
    assert ours_history.losses == plain_history.losses
    for a, c in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, c)
    start = small_net()
    assert not torch.equal(next(start.parameters()), next(ours.parameters()))


def _worker(rank: int, world: int, folder: str) -> None:
    for variant in VARIANTS:
        model = _trained(variant, batch_size=12 // world)
        if rank == 0:
            save_file(model.state_dict(), Path(folder, variant))


def _trained(variant: str, batch_size: int) -> nn.Module:
    """With rounds of 26 rows, so that a last batch is dropped, and a pass that ends inside a round."""
    data = classification(130)
    labels = data[1] if variant == "stratified" else None
    sampler = RS2(130, 0.2, variant, labels, seed=7)
    model = small_net()
    recipe = Recipe(20, lr=0.3, optimizer="sgd", seed=7)
    train(model, loader(data, sampler, batch_size), nll, recipe, progress=False)
    return model


def test_two_processes_compute_what_one_computes(tmp_path):
    in_group(_worker, 2, str(tmp_path))
    for variant in VARIANTS:
        single = _trained(variant, batch_size=12).state_dict()
        torch.testing.assert_close(load_file(tmp_path / variant), single, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["with", "stratified"])
def test_the_other_variants_are_not(variant):
    n, b = 120, 4
    data = classification(n)
    recipe = Recipe(60, lr=0.3, optimizer="sgd", seed=7)
    labels = data[1] if variant == "stratified" else None
    ours, plain = small_net(), small_net()
    train(ours, loader(data, RS2(n, 0.1, variant, labels, seed=7), b), nll, recipe, progress=False)
    train(plain, loader(data, Shuffled(n, 7), b), nll, recipe, progress=False)
    assert not torch.equal(next(ours.parameters()), next(plain.parameters()))


def test_interrupted_training_goes_on_bit_for_bit(tmp_path):
    data = classification(90)
    recipe = Recipe(40, lr=0.1, optimizer="sgd", seed=1)

    def run(folder, stop_at=None):
        model = small_net()

        def stop(step, model):
            if step == stop_at:
                raise KeyboardInterrupt

        hooks = [] if stop_at is None else [stop]
        train(
            model,
            loader(data, RS2(90, 0.2, seed=1), 5),
            nll,
            recipe,
            folder=folder,
            checkpoint_every=5,
            after_step=hooks,
            progress=False,
        )
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=23)
    again = run(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("n", "r", "rounds", "b"), [(100, 0.1, 7, 3), (100, 0.1, 7, 10), (64, 1.0, 2, 64)])
def test_horizon_is_what_is_trained_and_the_rate_ends_at_its_least(n, r, rounds, b):
    T = steps(n, r, rounds, b)
    sampler = RS2(n, r)
    assert T == rounds * (sampler.k // b) == rounds * len(loader(torch.arange(n), sampler, b))
    recipe = Scheduled.of(Cosine(T, peak=0.1, low=1e-4), optimizer="sgd")
    assert recipe.lr_at(T - 1) == pytest.approx(1e-4) and recipe.steps == T


# -- expectation and variance of a draw --


def test_the_gradient_of_a_draw_is_unbiased_with_the_variance_of_the_formula():
    n, k, draws = 30, 6, 20_000
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, 3), (n,), (3,)))
    gradients = (x @ w - y)[:, None] * x  # of each example's squared error, halved
    full = gradients.mean(0)
    variance = (gradients - full).square().sum(1).mean().item()
    rows = torch.stack([draw_with(n, k, seed=0, j=j) for j in range(draws)])
    found = gradients[rows].mean(1)
    predicted = draw_variance(n, k, variance)
    assert ((found.mean(0) - full).norm() ** 2).item() < 16 * predicted / draws
    squared = (found - full).square().sum(1)
    assert abs(squared.mean().item() - predicted) < 4 * (squared.std() / draws**0.5).item()


def test_variance_at_the_ends():
    assert draw_variance(50, 1, 2.0) == 2.0 and draw_variance(50, 50, 2.0) == 0 == draw_variance(1, 1, 2.0)


# -- the convergence statement, where its constants are known --


def logistic_problem() -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Softmax regression on 400 digits: data, smoothness, and a bound of the gradients' variance at any weights."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).flatten(1)[:400] / 16
    y = torch.from_numpy(bunch.target)[:400].long()
    # Hessian of the loss in the logits: diag(p) - pp' <= 1/2; |p - onehot|^2 <= 2
    smoothness = (0.5 * torch.linalg.eigvalsh(x.T @ x / len(x))[-1]).item()
    return x, y, smoothness, (2 * x.square().sum(1)).mean().item()


@pytest.mark.parametrize("k", [4, 40])
def test_gradients_stay_below_the_bound(k):
    x, y, smoothness, variance = logistic_problem()
    n, gap = len(x), torch.tensor(10.0).log().item()  # from zero weights; the loss is not negative
    means, bounds = [], []
    for T in (25, 100, 400):
        rate, bound = gradient_bound(gap, smoothness, draw_variance(n, k, variance), T)
        model = nn.Linear(64, 10, bias=False).double()
        nn.init.zeros_(model.weight)
        norms = []

        def look(step, model, norms=norms):
            p = model(x).softmax(1)
            norms.append(((p - nn.functional.one_hot(y, 10)).T @ x / n).square().sum().item())

        look(0, model)
        recipe = Recipe(T, lr=rate, optimizer="sgd", momentum=0.0, schedule="constant")
        sampler = RS2(n, k / n, "with", seed=T)
        train(model, loader((x, y), sampler, k), nll, recipe, after_step=[look], progress=False)
        means.append(sum(norms[:T]) / T)
        bounds.append(bound)
        assert means[-1] <= bound
    assert means[0] > means[1] > means[2]
    assert 2 <= bounds[0] / bounds[1] <= 4 and 2 <= bounds[1] / bounds[2] <= 4  # between 1/sqrt(T) and 1/T


def test_the_rate_minimises_the_bound():
    gap, smoothness, variance, T = 2.3, 5.0, 1.7, 300
    rate, bound = gradient_bound(gap, smoothness, variance, T)
    assert rate <= 1 / smoothness
    for other in (0.5 * rate, 0.9 * rate, min(1.1 * rate, 1 / smoothness)):
        assert bound <= 2 * gap / (other * T) + other * smoothness * variance + 1e-12
    limit = 2 * smoothness * gap / T + 2 * (2 * smoothness * gap * variance / T) ** 0.5
    assert bound <= limit


# -- errors --


@pytest.mark.parametrize("r", [0, -0.1, 1.5, float("nan"), "0.1"])
def test_shares_out_of_range(r):
    with pytest.raises(OptionError, match="r="):
        RS2(100, r)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(OptionError, match=r"r=0.001 of n=100"):
        RS2(100, 0.001)
    for draw in (draw_with, draw_without):
        for k in (0, 11):
            with pytest.raises(OptionError, match=f"k={k}: a round sees 1 to n=10"):
                draw(10, k, 0, 0)
    with pytest.raises(OptionError, match="batch_size=11: a round has k=10"):
        steps(100, 0.1, 5, 11)
    with pytest.raises(OptionError, match="rounds=0"):
        steps(100, 0.1, 0, 5)
    with pytest.raises(OptionError, match="did you mean 'without'"):
        RS2(100, 0.1, "witout")


def test_labels_are_checked():
    with pytest.raises(OptionError, match="class 1 has 3 examples"):
        RS2(103, 0.1, "stratified", torch.tensor([0] * 100 + [1] * 3))
    with pytest.raises(OptionError, match=r"labels\[2\] is -1"):
        RS2(4, 0.5, "stratified", torch.tensor([0, 1, -1, 0]))
    with pytest.raises(OptionError, match="whole numbers"):
        RS2(4, 0.5, "stratified", torch.zeros(4))
    with pytest.raises(OptionError, match="not none"):
        RS2(4, 0.5, "stratified")
    with pytest.raises(OptionError, match="not 3"):
        RS2(4, 0.5, "stratified", torch.zeros(3, dtype=torch.int64))
    with pytest.raises(OptionError, match="does not use them"):
        RS2(4, 0.5, "with", torch.zeros(4, dtype=torch.int64))


def test_constants_of_the_bound_are_checked():
    with pytest.raises(OptionError, match="gap=-1"):
        gradient_bound(-1, 1.0, 1.0, 10)
