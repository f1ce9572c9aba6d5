"""Subsets of the training data that are chosen once: the baselines of RS2 and of every paper on data pruning.

At random; by the geometry of features (k-centre greedy: Sener and Savarese, 2018, arXiv 1708.00489; herding: Welling,
2009, "Herding dynamical weights to learn"; facility location: Wei, Iyer and Bilmes, 2015, "Submodularity in data subset
selection and active learning"); by how hard an example is (EL2N and GraNd: Paul et al., 2021, arXiv 2107.07075;
forgetting: Toneva et al., 2019, arXiv 1812.05159; margin of the prediction).

All but the random ones need a model that has been trained on *all* data first, the proxy. Its training is part of the
cost, and `Selection` counts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.loop import Recipe, train
from refimpl.core.train.sampling import Shuffled

Pick = Callable[[Tensor, int], Tensor]
_ROWS = 256  # examples measured at once


# -- at random --


def random_subset(n: int, k: int, seed: int = 0) -> Tensor:
    """k different indices below n, uniformly.

    Args:
        n, k: sizes of the data and of the subset.
        seed: of the draw.

    Returns:
        int64 [k].

    Raises:
        OptionError: k outside 1 to n.

    Example:
        >>> random_subset(10, 4).unique().numel()
        4
    """
    _check_budget(n, k)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]


def class_quotas(labels: Tensor, k: int) -> Tensor:
    """How many of each class a balanced subset of size k holds: equal numbers, as far as there are examples.

    Args:
        labels: int64 [n], from 0.
        k: size of the subset.

    Returns:
        int64 [C] that sums to k; the remainder goes to the first classes with examples left.

    Raises:
        OptionError: k outside 1 to n, labels out of range, or k too small for one example of each class.

    Example:
        >>> class_quotas(torch.tensor([0] * 50 + [1] * 50 + [2] * 3), 20).tolist()
        [9, 8, 3]
    """
    _check_labels(labels)
    _check_budget(len(labels), k)
    there = labels.bincount()
    classes = int((there > 0).sum())
    if k < classes:
        raise OptionError(f"k={k} is too small for one example of each of {classes} classes; use {classes} or more")
    quotas = torch.zeros_like(there)
    while (missing := k - int(quotas.sum())) > 0:
        open_classes = (quotas < there).nonzero()[:, 0]
        if missing < len(open_classes):
            quotas[open_classes[:missing]] += 1
        else:
            more = (there - quotas)[open_classes].clamp(max=missing // len(open_classes))
            quotas[open_classes] += more
    return quotas


def by_class(labels: Tensor, k: int, pick: Pick) -> Tensor:
    """Apply a selector to each class, with the quotas of `class_quotas`.

    Args:
        labels: int64 [n].
        k: size of the whole subset.
        pick: ``pick(rows, quota)`` gets the rows of one class, int64, and returns positions in `rows`.

    Returns:
        int64 [k], class after class.

    Raises:
        OptionError: see `class_quotas`.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> by_class(labels, 2, lambda rows, quota: torch.arange(quota)).tolist()
        [0, 1]
    """
    chosen = []
    for name, quota in enumerate(class_quotas(labels, k).tolist()):
        if quota:
            rows = (labels == name).nonzero()[:, 0]
            chosen.append(rows[pick(rows, quota)])
    return torch.cat(chosen)


# -- by geometry --


def k_centre(features: Tensor, k: int) -> Tensor:
    """Greedy 2-approximation of the smallest radius with which k balls around chosen points cover all points.

    Starts next to the mean, then always takes the point that is farthest from those chosen.

    Args:
        features: float [n, d].
        k: points to choose.

    Returns:
        int64 [k], in the order of choice.

    Raises:
        OptionError: k outside 1 to n, features that are no finite matrix.

    Example:
        >>> k_centre(torch.tensor([[0.0], [1.0], [2.0], [10.0]]), 2).tolist()   # the mean is 3.25
        [2, 3]
    """
    _check_features(features, k)
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    nearest_chosen = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    while len(chosen) < k:
        newest = (features - features[chosen[-1]]).square().sum(1)
        nearest_chosen = torch.minimum(nearest_chosen, newest)
        nearest_chosen[
            chosen[-1]
        ] = -1  # below 0, so that even a duplicate of a chosen point comes before the point itself
        chosen.append(int(nearest_chosen.argmax()))
    return torch.tensor(chosen, device=features.device)


def herding(features: Tensor, k: int) -> Tensor:
    """k points whose mean approximates the mean of all points, chosen greedily.

    Each point is the one that makes the mean of all chosen so far come closest to the overall mean.

    Args:
        features: float [n, d].
        k: points to choose.

    Returns:
        int64 [k], in the order of choice.

    Raises:
        OptionError: k outside 1 to n, features that are no finite matrix.

    Example:
        >>> herding(torch.tensor([[0.0], [1.0], [3.0], [8.0]]), 3).tolist()   # the mean is 3
        [2, 1, 3]
    """
    _check_features(features, k)
    mean = features.mean(0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen: list[int] = []
    while len(chosen) < k:
        # |mean - (total + x) / m|^2 for every x
        gap = ((total + features) / (len(chosen) + 1) - mean).square().sum(1)
        best = int(gap.masked_fill(~free, torch.inf).argmin())
        free[best] = False
        total = total + features[best]
        chosen.append(best)
    return torch.tensor(chosen, device=features.device)


def facility_location(similarity: Tensor, k: int) -> Tensor:
    """Greedy maximum of sum_i max_{j chosen} similarity[i, j]: each point i is represented by the chosen point most like it.

    At least 1 - 1/e of the best possible sum. Every step computes all gains at once, O(n^2).

    Args:
        similarity: float [n, n], not negative; entry i, j: how well j represents i.
        k: points to choose.

    Returns:
        int64 [k], in the order of choice.

    Raises:
        OptionError: k outside 1 to n; a matrix that is not square, not finite or has negative entries.

    Example:
        >>> x = torch.tensor([0.0, 0.1, 0.2, 5.0])
        >>> facility_location(6 - (x[:, None] - x).abs(), 2).tolist()
        [2, 3]
    """
    _check_features(similarity, k)
    if similarity.shape[0] != similarity.shape[1] or (similarity < 0).any():
        raise OptionError(
            f"similarity has shape {list(similarity.shape)} and a least entry of {float(similarity.min()):.3g}; give a "
            "square matrix without negative entries (subtract the least one)"
        )
    served = torch.zeros_like(similarity[:, :1])
    chosen: list[int] = []
    while len(chosen) < k:
        gain = (similarity - served).clamp(min=0).sum(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        served = torch.maximum(served, similarity[:, chosen[-1:]])
    return torch.tensor(chosen, device=similarity.device)


# -- by difficulty --


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """EL2N: the norm of the error of the prediction, |p - onehot(y)|; large is hard.

    Args:
        probabilities: float [n, C], of a network early in its training; average the scores of several.
        labels: int64 [n].

    Returns:
        float [n], 0 to sqrt(2).

    Raises:
        OptionError: labels that are no class.

    Example:
        >>> el2n(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1])).tolist()
        [0.7071067690849304, 0.0]
    """
    _check_labels(labels, probabilities.shape[1])
    return (probabilities - F.one_hot(labels, probabilities.shape[1])).norm(dim=1)


def grand(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """GraNd: the norm of the gradient of each example's loss in all trained parameters; large is hard.

    Args:
        model: maps [b, ...] to logits [b, C]; run in evaluation mode, left as found.
        x: float [n, ...].
        labels: int64 [n].

    Returns:
        float [n].

    Raises:
        OptionError: labels out of range.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> grand(model, torch.zeros(3, 2), torch.tensor([0, 1, 0])).shape
        torch.Size([3])
    """
    _check_labels(labels)
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def loss(at: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, at, (row[None],)), label[None])

    def norm(row: Tensor, label: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(loss)(parameters, row, label).values()]).sum().sqrt()

    training = model.training
    model.eval()
    try:
        return vmap(norm, chunk_size=_ROWS)(x, labels)
    finally:
        model.train(training)


def margin(probabilities: Tensor) -> Tensor:
    """Probability of the likeliest class minus that of the second; *small* is hard.

    Args:
        probabilities: float [n, C].

    Returns:
        float [n], 0 to 1.

    Example:
        >>> margin(torch.tensor([[0.75, 0.25, 0.0]])).tolist()
        [0.5]
    """
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return first - second


class Forgetting:
    """A loss for `refimpl.core.train.loop.train` that counts how often each example is forgotten.

    An example is forgotten when it is misclassified now and was classified correctly the last time it was in a batch.

    Args:
        n: examples.

    Attributes:
        events: int64 [n], forgetting events so far.
        learned: bool [n], whether the example was ever classified correctly.

    Example:
        >>> loss = Forgetting(2)
        >>> for logits in ([[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]):
        ...     _ = loss(lambda x: torch.tensor(logits), (torch.zeros(1), torch.tensor([0]), torch.tensor([1])))
        >>> loss.events.tolist(), loss.scores().tolist()
        ([0, 2], [inf, 2.0])
    """

    def __init__(self, n: int) -> None:
        self.events = torch.zeros(n, dtype=torch.int64)
        self.learned = torch.zeros(n, dtype=torch.bool)
        self._right = torch.zeros(n, dtype=torch.bool)

    def __call__(self, model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of inputs [b, ...], labels [b]; the third part of a batch are the indices [b]."""
        x, labels, rows = batch
        logits = model(x)
        right, rows = (logits.argmax(1) == labels).cpu(), rows.cpu()
        self.events[rows] += (self._right[rows] & ~right).long()
        self.learned[rows] |= right
        self._right[rows] = right
        return F.cross_entropy(logits, labels)

    def scores(self) -> Tensor:
        """float [n]: forgetting events; infinite for examples that were never learned. Large is hard."""
        return self.events.float().masked_fill(~self.learned, torch.inf)


def top(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest scores; among equal scores the first ones.

    Args:
        scores: float [n]; not NaN.
        k: how many.

    Returns:
        int64 [k].

    Raises:
        OptionError: k outside 1 to n, or scores that are NaN.

    Example:
        >>> top(torch.tensor([0.1, 0.9, 0.9]), 2).tolist()
        [1, 2]
    """
    _check_budget(len(scores), k)
    if scores.isnan().any():
        raise OptionError(f"scores[{int(scores.isnan().nonzero()[0])}] is NaN: the proxy's training has diverged")
    return scores.sort(descending=True, stable=True).indices[:k]


# -- with the proxy, and its cost --


@dataclass(frozen=True)
class Cost:
    """The cost of a selection.

    Attributes:
        wall, cpu: seconds on the clock and of the processor, the proxy's training included.
        examples: gradients of single examples computed for it.
    """

    wall: float = 0.0
    cpu: float = 0.0
    examples: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu, self.examples + other.examples)


@dataclass(frozen=True)
class Selection:
    """A subset.

    Attributes:
        indices: int64 [k], all different.
        cost: of choosing it.
    """

    indices: Tensor
    cost: Cost


@dataclass(frozen=True)
class Proxy:
    """Signals about each example from one or several networks that were trained on all data.

    Attributes:
        probabilities: float [n, C], mean over the networks.
        features: float [n, d], what goes into the last linear layer of the last network.
        el2n, grand, forgetting: float [n] scores, mean over the networks; None where not requested.
        cost: of training ("train") and of measuring each signal, by name.
    """

    probabilities: Tensor
    features: Tensor
    el2n: Tensor
    grand: Tensor | None
    forgetting: Tensor
    cost: dict[str, Cost] = field(repr=False)


def train_proxy(
    build: Callable[[int], nn.Module],
    x: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    recipe: Callable[[int, int], Recipe],
    batch_size: int,
    seeds: tuple[int, ...] = (0,),
    gradients: bool = False,
) -> Proxy:
    """Train proxies on all data and measure the signals that selectors need.

    Args:
        build: ``build(seed)``, an untrained classifier that maps [b, ...] to logits [b, C] and has a linear layer.
        x, labels: the data, float [n, ...] and int64 [n].
        epochs: over all data. Scores of difficulty are meant for a few, features for more.
        recipe: ``recipe(steps, seed)`` gives the recipe of each.
        batch_size: examples per step.
        seeds: one network for each.
        gradients: compute GraNd as well, which costs as much as another epoch or more.

    Returns:
        The signals and what they cost.

    Raises:
        OptionError: labels out of range, or a model without a linear layer.

    Example:
        >>> x, labels = torch.randn(40, 3), torch.arange(40) % 2
        >>> recipe = lambda steps, seed: Recipe(steps, lr=0.1, optimizer="sgd", seed=seed)
        >>> found = train_proxy(lambda seed: nn.Linear(3, 2), x, labels, epochs=2, recipe=recipe, batch_size=10)
        >>> found.features.shape, found.cost["train"].examples
        (torch.Size([40, 3]), 80)
    """
    _check_labels(labels)
    n = len(labels)
    data = TensorDataset(x, labels, torch.arange(n))
    cost: dict[str, Cost] = {}
    probabilities, scores, gradient_norms, events = [], [], [], []
    for seed in seeds:
        model = build(seed)
        counted = Forgetting(n)
        clock = _Clock()
        steps = epochs * (n // batch_size)
        order = BatchSampler(Shuffled(n, seed), batch_size, drop_last=True)
        batches = DataLoader(data, sampler=order, batch_size=None)  # whole batches at once: a third of the time
        train(model, batches, counted, recipe(steps, seed), progress=False)
        _add(cost, "train", clock.lap(steps * batch_size))
        found, features = _measure(model, x)
        _add(cost, "forward", clock.lap())
        probabilities.append(found)
        scores.append(el2n(found, labels))
        events.append(counted.scores())
        if gradients:
            gradient_norms.append(grand(model, x, labels))
            _add(cost, "grand", clock.lap(n))
    mean = torch.stack(probabilities).mean(0)
    grads = torch.stack(gradient_norms).mean(0) if gradients else None
    return Proxy(mean, features, torch.stack(scores).mean(0), grads, torch.stack(events).mean(0), cost)


SELECTORS = (
    "random",
    "balanced",
    "k-centre",
    "herding",
    "facility-location",
    "el2n",
    "el2n-easy",
    "grand",
    "forgetting",
    "margin",
)
"""Two random ones, three by geometry, five by difficulty: the hardest examples, or with "el2n-easy" the easiest."""


def select(name: str, labels: Tensor, k: int, *, proxy: Proxy | None = None, seed: int = 0) -> Selection:
    """Choose k examples once. All selectors but "random" take the same number from every class.

    Args:
        name: one of `SELECTORS`.
        labels: int64 [n].
        k: size of the subset.
        proxy: from `train_proxy`, on the same data in the same order; the random ones need none.
        seed: of the random ones.

    Returns:
        The subset and its cost, including the proxy's training and the measurements that this selector uses.

    Raises:
        OptionError: an unknown name, a budget above the data's size or below one per class, labels out of range, or no
            proxy where one is needed.

    Example:
        >>> chosen = select("balanced", torch.arange(100) % 10, 20)
        >>> (chosen.indices % 10).bincount().tolist(), chosen.cost.examples
        ([2, 2, 2, 2, 2, 2, 2, 2, 2, 2], 0)
    """
    if name not in SELECTORS:
        raise OptionError(f"name={name!r}: use {nearest(name, SELECTORS)}")
    clock = _Clock()
    if name == "random":
        return Selection(random_subset(len(labels), k, seed), clock.lap())
    if name == "balanced":
        generator = torch.Generator().manual_seed(seed)
        chosen = by_class(labels, k, lambda rows, quota: torch.randperm(len(rows), generator=generator)[:quota])
        return Selection(chosen, clock.lap())
    if proxy is None:
        raise OptionError(f"name={name!r} reads a proxy: pass proxy=train_proxy(...)")
    if len(proxy.features) != len(labels):
        raise OptionError(f"proxy is of {len(proxy.features)} examples, labels of {len(labels)}: train it on these")
    chosen = by_class(labels, k, _picks(name, proxy))
    paid = proxy.cost["train"] + proxy.cost["forward"]
    return Selection(chosen, clock.lap() + paid + (proxy.cost["grand"] if name == "grand" else Cost()))


def _picks(name: str, proxy: Proxy) -> Pick:
    if name == "k-centre":
        return lambda rows, quota: k_centre(proxy.features[rows], quota)
    if name == "herding":
        return lambda rows, quota: herding(proxy.features[rows], quota)
    if name == "facility-location":

        def represent(rows: Tensor, quota: int) -> Tensor:
            distance = torch.cdist(proxy.features[rows], proxy.features[rows])
            return facility_location(distance.max() - distance, quota)

        return represent
    if name == "grand" and proxy.grand is None:
        raise OptionError("name='grand': the proxy has no gradients, train it with gradients=True")
    hardness = {
        "el2n": proxy.el2n,
        "el2n-easy": -proxy.el2n,
        "grand": proxy.grand,
        "forgetting": proxy.forgetting,
        "margin": -margin(proxy.probabilities),
    }[name]
    assert hardness is not None
    return lambda rows, quota: top(hardness[rows], quota)


def _measure(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [n, C], and the inputs [n, d] of the last linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise OptionError("build: the model has no linear layer, whose inputs would be the features")
    inputs: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(1)))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = torch.cat([model(rows) for rows in x.split(_ROWS)])
    finally:
        handle.remove()
        model.train(training)
    return logits.softmax(1).clone(), torch.cat(inputs).clone()


class _Clock:
    """Seconds since it was created, or since the last call of `lap`."""

    def __init__(self) -> None:
        self.now = time.perf_counter(), time.process_time()

    def lap(self, examples: int = 0) -> Cost:
        before, self.now = self.now, (time.perf_counter(), time.process_time())
        return Cost(self.now[0] - before[0], self.now[1] - before[1], examples)


def _add(cost: dict[str, Cost], name: str, more: Cost) -> None:
    cost[name] = cost.get(name, Cost()) + more


def _check_budget(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise OptionError(f"k={k}: the data has n={n} examples, choose 1 to {n}")


def _check_labels(labels: Tensor, classes: int | None = None) -> None:
    if labels.dim() != 1 or labels.is_floating_point():
        raise OptionError(f"labels are {labels.dtype} {list(labels.shape)}: give whole numbers, one for each example")
    outside = (labels < 0) if classes is None else (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        known = "from 0" if classes is None else f"0 to {classes - 1}"
        raise OptionError(f"labels[{row}] is {int(labels[row])}: classes are numbered {known}")


def _check_features(features: Tensor, k: int) -> None:
    if features.dim() != 2 or not features.is_floating_point() or not features.isfinite().all():
        raise OptionError(f"features are {features.dtype} {list(features.shape)}: give a finite float matrix [n, d]")
    _check_budget(len(features), k)
