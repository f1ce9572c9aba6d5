"""Selectors: each against its definition done slowly, exact sizes, and the proxy's price wherever one is read."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from refimpl.baselines.selection import (
    SELECTORS,
    Forgetting,
    Proxy,
    by_class,
    class_quotas,
    el2n,
    facility_location,
    grand,
    herding,
    k_centre,
    margin,
    random_subset,
    select,
    top,
    train_proxy,
)
from refimpl.core.errors import OptionError
from refimpl.core.train.loop import Recipe


def points(n: int, d: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=dtype)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = points(90, 6, torch.float32)
    return x, (x[:, :3]).argmax(1)


@pytest.fixture(scope="module")
def proxy(data) -> Proxy:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def recipe(steps: int, seed: int) -> Recipe:
        return Recipe(steps, lr=0.1, optimizer="sgd", seed=seed)

    return train_proxy(build, *data, epochs=3, recipe=recipe, batch_size=9, seeds=(0, 1), gradients=True)


# -- sizes --


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("k", [3, 10, 31, 90])
def test_every_selector_gives_k_different_examples(name, k, data, proxy):
    found = select(name, data[1], k, proxy=proxy, seed=1)
    assert found.indices.dtype == torch.int64 and len(found.indices) == k == found.indices.unique().numel()
    assert 0 <= found.indices.min() and found.indices.max() < 90
    if name != "random":
        assert torch.equal(data[1][found.indices].bincount(minlength=3), class_quotas(data[1], k))
    assert torch.equal(select(name, data[1], k, proxy=proxy, seed=1).indices, found.indices)


@pytest.mark.parametrize("counts", [(30, 30, 30), (50, 3, 20), (1, 0, 9)])
def test_quotas_are_equal_as_far_as_there_are_examples(counts):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    for k in range(sum(count > 0 for count in counts), sum(counts) + 1):
        quotas = class_quotas(labels, k)
        assert quotas.sum() == k and (quotas <= torch.tensor(counts)[: len(quotas)]).all()
        unfilled = [int(q) for q, count in zip(quotas, counts, strict=False) if q < count]
        if unfilled:  # nobody who could have more has less than somebody else, but for what does not divide
            assert max(quotas).item() - min(unfilled) <= 1


def test_random_subsets_are_uniform():
    counts = sum(random_subset(6, 2, seed).bincount(minlength=6) for seed in range(3000))
    assert (counts - 1000).abs().max() < 4 * (3000 * (1 / 3) * (2 / 3)) ** 0.5


# -- geometry, against the definition --


def test_k_centre_takes_the_farthest_and_is_within_twice_the_best_radius():
    x = points(12)
    chosen = k_centre(x, 3)
    for number in range(1, 3):
        distance = torch.cdist(x, x[chosen[:number]]).amin(1)
        assert distance[chosen[number]] == distance.max()
    radius = torch.cdist(x, x[chosen]).amin(1).max()
    best = min(torch.cdist(x, x[list(centres)]).amin(1).max() for centres in itertools.combinations(range(12), 3))
    assert best <= radius <= 2 * best


def test_k_centre_with_copies():
    assert k_centre(torch.zeros(5, 2), 5).unique().numel() == 5


def test_herding_follows_the_mean():
    x = points(25)
    chosen = herding(x, 10)
    picked: list[int] = []
    for row in chosen.tolist():
        gaps = {j: (x[[*picked, j]].mean(0) - x.mean(0)).norm().item() for j in range(25) if j not in picked}
        assert gaps[row] == pytest.approx(min(gaps.values()))
        picked.append(row)
    random = [(x[random_subset(25, 10, s)].mean(0) - x.mean(0)).norm().item() for s in range(50)]
    assert (x[chosen].mean(0) - x.mean(0)).norm().item() < sorted(random)[5], "nearer than nine in ten"


def test_facility_location_is_greedy_and_near_the_best():
    x = points(10)
    distance = torch.cdist(x, x)
    similarity = distance.max() - distance

    def value(rows) -> float:
        return similarity[:, list(rows)].amax(1).sum().item()

    chosen = facility_location(similarity, 3).tolist()
    for number in range(3):
        before = chosen[:number]
        others = [value([*before, j]) for j in range(10) if j not in before]
        assert value(chosen[: number + 1]) == pytest.approx(max(others))
    best = max(value(rows) for rows in itertools.combinations(range(10), 3))
    assert value(chosen) >= (1 - 1 / torch.e) * best


# -- difficulty --


def test_el2n_and_margin():
    p = points(20, 4).softmax(1)
    y = torch.arange(20) % 4
    for row in range(20):
        error = p[row].clone()
        error[y[row]] -= 1
        assert el2n(p, y)[row] == pytest.approx(error.norm().item())
        first, second = sorted(p[row].tolist(), reverse=True)[:2]
        assert margin(p)[row].item() == pytest.approx(first - second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grand_is_the_norm_of_each_examples_gradient(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)).to(dtype)
    x, y = torch.randn(7, 1, 4, 4, dtype=dtype), torch.arange(7) % 4
    model.train()
    found = grand(model, x, y)
    assert model.training, "left as found"
    model.eval()
    for row in range(7):
        loss = nn.functional.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert found[row].item() == pytest.approx(sum(g.square().sum() for g in gradients).sqrt().item(), rel=1e-4)


def test_forgetting_counts_only_right_then_wrong():
    loss = Forgetting(3)
    right, wrong = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    story = {0: [right, wrong, wrong, right, wrong], 1: [wrong, wrong], 2: [wrong, right, right]}
    for row, answers in story.items():
        for logits in answers:
            value = loss(lambda x, logits=logits: logits, (torch.zeros(1), torch.tensor([0]), torch.tensor([row])))
            assert value.item() == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor([0])).item())
    assert loss.events.tolist() == [2, 0, 0]
    assert loss.scores().tolist() == [2.0, float("inf"), 0.0], "never learned is hardest"
    assert top(loss.scores(), 3).tolist() == [1, 0, 2]


def test_hard_and_easy_are_opposite_ends(data, proxy):
    x, labels = data
    for name, scores in (("el2n", proxy.el2n), ("grand", proxy.grand), ("forgetting", proxy.forgetting)):
        hardest = select(name, labels, 30, proxy=proxy).indices
        rest = torch.tensor([row for row in range(90) if row not in set(hardest.tolist())])
        for name_ in range(3):
            inside, outside = (scores[rows[labels[rows] == name_]] for rows in (hardest, rest))
            assert inside.min() >= outside.max()
    easy, hard = (select(name, labels, 30, proxy=proxy).indices.tolist() for name in ("el2n-easy", "el2n"))
    assert proxy.el2n[easy].mean() < proxy.el2n.mean() < proxy.el2n[hard].mean()


# -- the proxy and its price --


def test_the_proxy_learned_and_its_price_is_in_the_selection(data, proxy):
    x, labels = data
    assert (proxy.probabilities.argmax(1) == labels).double().mean() > 0.6
    assert proxy.features.shape == (90, 8) and proxy.probabilities.shape == (90, 3)
    assert torch.allclose(proxy.probabilities.sum(1), torch.ones(90))
    assert proxy.cost["train"].examples == 2 * 3 * 90 and proxy.cost["grand"].examples == 2 * 90
    for name in SELECTORS:
        cost = select(name, labels, 10, proxy=proxy).cost
        wanted = 0 if name in ("random", "balanced") else 540 + (180 if name == "grand" else 0)
        assert cost.examples == wanted, name
        paid = proxy.cost["train"] + proxy.cost["forward"]
        if wanted:
            assert cost.cpu >= paid.cpu and cost.wall >= paid.wall
        else:
            assert cost.wall < paid.wall


def test_features_are_what_the_last_linear_layer_reads(data):
    x, labels = data
    torch.manual_seed(0)
    first = nn.Linear(6, 5)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(5, 3))
    how = lambda steps, seed: Recipe(steps, lr=1e-9, optimizer="sgd", schedule="constant")  # noqa: E731
    found = train_proxy(lambda seed: model, x, labels, epochs=1, recipe=how, batch_size=30)
    assert torch.allclose(found.features, first(x).relu(), atol=1e-5)


# -- errors --


@pytest.mark.parametrize("k", [0, 91])
def test_budgets_out_of_range(k, data, proxy):
    for name in SELECTORS:
        with pytest.raises(OptionError, match=f"k={k}: the data has n=90"):
            select(name, data[1], k, proxy=proxy)
    for pick in (k_centre, herding):
        with pytest.raises(OptionError, match=f"k={k}"):
            pick(points(90), k)


def test_too_small_for_one_of_each_class(data, proxy):
    with pytest.raises(OptionError, match="k=2 is too small for one example of each of 3 classes"):
        select("el2n", data[1], 2, proxy=proxy)


def test_labels_are_checked(data):
    labels = data[1].clone()
    labels[7] = -1
    with pytest.raises(OptionError, match=r"labels\[7\] is -1"):
        select("balanced", labels, 10)
    with pytest.raises(OptionError, match=r"labels\[7\] is -1"):
        train_proxy(lambda seed: nn.Linear(6, 3), data[0], labels, epochs=1, recipe=Recipe, batch_size=9)
    with pytest.raises(OptionError, match=r"labels\[1\] is 4: classes are numbered 0 to 3"):
        el2n(torch.ones(2, 4) / 4, torch.tensor([0, 4]))
    with pytest.raises(OptionError, match="whole numbers"):
        by_class(torch.zeros(4), 2, lambda rows, quota: rows)


def test_what_a_selector_cannot_read_is_named(data, proxy):
    with pytest.raises(OptionError, match="did you mean 'herding'"):
        select("herdin", data[1], 10)
    with pytest.raises(OptionError, match="pass proxy=train_proxy"):
        select("margin", data[1], 10)
    with pytest.raises(OptionError, match="proxy is of 90 examples, labels of 50"):
        select("margin", data[1][:50], 10, proxy=proxy)
    bare = Proxy(proxy.probabilities, proxy.features, proxy.el2n, None, proxy.forgetting, proxy.cost)
    with pytest.raises(OptionError, match="gradients=True"):
        select("grand", data[1], 10, proxy=bare)
    with pytest.raises(OptionError, match="finite float matrix"):
        herding(torch.full((3, 2), float("nan")), 1)
    with pytest.raises(OptionError, match="NaN"):
        top(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(OptionError, match="without negative entries"):
        facility_location(torch.full((3, 3), -1.0), 1)
    with pytest.raises(OptionError, match="no linear layer"):
        train_proxy(
            lambda seed: nn.Sequential(nn.Conv1d(1, 3, 6), nn.Flatten()),
            data[0][:, None],
            data[1],
            epochs=1,
            recipe=lambda steps, seed: Recipe(steps),
            batch_size=9,
        )
