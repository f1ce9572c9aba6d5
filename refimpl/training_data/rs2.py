"""RS2: train on a random subset that is drawn again in every round.

Source: Okanovic et al., ICLR 2024, "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning",
arXiv 2305.18424: its algorithm (the loop over rounds) and its three ways to draw.

A data set has N examples, a round sees k = round(r N) of them, the schedule of the learning rate ends after the X
rounds that are really trained. The claim: at r of 10 % or less this beats every subset that is chosen once, however
cleverly, and it costs nothing to choose. Without replacement it is more than a sampler: it is ordinary training on all
data for r X epochs, with a schedule of that length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.sampling import EpochSampler, Shuffled

VARIANTS = ("without", "with", "stratified")


def subset_size(n: int, r: float) -> int:
    """k = round(r N), a half going to the even side.

    Args:
        n: examples in the data set, N.
        r: share of them that a round sees, above 0 and at most 1.

    Raises:
        OptionError: r outside its range, or so small that a round would be empty.

    Example:
        >>> subset_size(50_000, 0.05)
        2500
    """
    if not (isinstance(r, (int, float)) and 0 < r <= 1):
        raise OptionError(f"r={r!r}: it is the share of the data that a round sees, use more than 0 and at most 1")
    k = round(r * n)
    if k < 1:
        raise OptionError(f"r={r:g} of n={n} examples is none; use r={1 / max(1, n):.2g} or more")
    return k


def steps(n: int, r: float, rounds: int, batch_size: int) -> int:
    """The learning rate's horizon, T = X floor(k / b): the updates that are really made.

    Give this to `refimpl.core.train.loop.Recipe`. A schedule made for the full data set is cut off long before it has
    decayed, while the rate is still high.

    Args:
        n, r: see `subset_size`.
        rounds: X, what others call epochs.
        batch_size: b; the last partial batch of a round is dropped.

    Raises:
        OptionError: a round has no full batch, or fewer than one round.

    Example:
        >>> steps(50_000, 0.1, rounds=200, batch_size=128), steps(50_000, 1.0, rounds=200, batch_size=128)
        (7800, 78000)
    """
    k = subset_size(n, r)
    if rounds < 1:
        raise OptionError(f"rounds={rounds}: use 1 or more")
    if not 1 <= batch_size <= k:
        raise OptionError(f"batch_size={batch_size}: a round has k={k} examples, use 1 to {k}")
    return rounds * (k // batch_size)


def draw_with(n: int, k: int, seed: int, j: int) -> Tensor:
    """Variant 1: round j is an independent uniform draw of k different indices.

    "With replacement" is between rounds: an example may come again in the next one, never twice in the same.

    Args:
        n, k: N and the size of the subset.
        seed, j: the result depends on these alone.

    Returns:
        int64 [k], in the order they were drawn.

    Raises:
        OptionError: k outside 1 to n.

    Example:
        >>> draw_with(10, 4, seed=0, j=0).unique().numel()
        4
    """
    _check_budget(n, k)
    return _permutation(n, seed, j)[:k]


def draw_stratified(labels: Tensor, r: float, seed: int, j: int) -> Tensor:
    """Variant 2: as variant 1, class by class: round(r N_c) of class c.

    Args:
        labels: int64 [N], from 0.
        r: share of every class.
        seed, j: the result depends on these alone.

    Returns:
        int64 [sum_c round(r N_c)], in random order. Both roundings count: up to (C + 1) / 2 away from round(r N).

    Raises:
        OptionError: labels out of range, or a class that would get no example.

    Example:
        >>> labels = torch.tensor([0] * 60 + [1] * 40)
        >>> labels[draw_stratified(labels, 0.1, seed=0, j=3)].bincount().tolist()
        [6, 4]
    """
    subset_size(len(labels), r)
    if labels.dim() != 1 or labels.is_floating_point():
        raise OptionError(f"labels are {labels.dtype} {list(labels.shape)}: give whole numbers, one for each example")
    outside = labels < 0
    if outside.any():
        row = int(outside.nonzero()[0])
        raise OptionError(f"labels[{row}] is {int(labels[row])}: classes are numbered from 0")
    kept = []
    order = _permutation(len(labels), seed, j)
    drawn = labels[order]  # one permutation serves all classes and mixes them
    for name, count in enumerate(labels.bincount().tolist()):
        quota = round(r * count)
        if count and not quota:
            raise OptionError(
                f"r={r:g}: class {name} has {count} examples, of which a round would see none; "
                f"use r={0.51 / count:.2g} or more, or draw without classes"
            )
        kept.append((drawn == name).nonzero()[:quota, 0])
    return order[torch.cat(kept).sort().values]


def draw_without(n: int, k: int, seed: int, j: int) -> Tensor:
    """Variant 3: round j is the next k entries of a permutation of all data, which is renewed when it is used up.

    Where k does not divide N a round gets the tail of one pass and the head of the next. The new permutation then
    starts with its first entries that are not in that tail, and those it skips come right after: k different examples
    in every round, and after any round no example was seen more than once oftener than another. (The authors' code has
    a round of k - 1 here, and repeats the head of the old permutation.)

    Args:
        n, k: N and the size of the subset.
        seed, j: the result depends on these alone. Pass p uses the permutation of
            ``refimpl.core.train.sampling.Shuffled(n, seed)`` in epoch p.

    Returns:
        int64 [k], to be used in this order.

    Raises:
        OptionError: k outside 1 to n.

    Example:
        >>> rounds = torch.cat([draw_without(10, 4, seed=0, j=j) for j in range(5)])   # two passes
        >>> rounds.bincount().tolist()
        [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    _check_budget(n, k)
    first, place = divmod(j * k, n)
    start = _passes(n, k, seed, first)
    order = next(start)
    taken = order[place : place + k]
    return taken if len(taken) == k else torch.cat([taken, next(start)[: k - len(taken)]])


def _passes(n: int, k: int, seed: int, first: int) -> Iterator[Tensor]:
    """The order of pass `first` and of those behind it."""
    # Where a pass begins with a round it depends on none before it. If k is at most half of N, what the pass before it
    # moves to its front does not reach its tail either: then one pass back is far enough.
    begin = first
    while begin and (begin * n) % k and not (2 * k <= n and begin < first):
        begin -= 1
    order, pass_ = _permutation(n, seed, begin), begin
    while True:
        if pass_ >= first:
            yield order
        pass_ += 1
        left = (pass_ * n) % k  # of the round that is cut by the end of the pass, what lies before the cut
        following = _permutation(n, seed, pass_)
        if left:
            tail = torch.zeros(n, dtype=torch.bool)
            tail[order[n - left :]] = True
            blocked = tail[following]
            head = ~blocked & ((~blocked).cumsum(0) <= k - left)
            following = torch.cat([following[head], following[~head]])
        order = following


def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return Shuffled(n, seed).draw(epoch)


def _check_budget(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise OptionError(f"k={k}: a round sees 1 to n={n} different examples")


class RS2(EpochSampler):
    """The sampler: round j of RS2 is epoch j.

    Give the loader ``refimpl.core.train.sampling.loader(data, RS2(len(data), 0.1), batch_size)``, and the recipe as many
    steps as `steps` says. The rows come in the order they were drawn: a second shuffle would change nothing about
    their distribution, but break the equality with training on all data.

    Args:
        n: examples in the data set.
        r: share of them that a round sees.
        variant: "without" replacement between rounds (the paper's main one), "with", or "stratified".
        labels: int64 [n], for "stratified".
        seed: another seed, other subsets. "without" walks through the permutations of ``Shuffled(n, seed)``.

    Raises:
        OptionError: r or labels out of range, an unknown variant, labels missing, of another length, or of no use.

    Example:
        >>> sampler = RS2(10, 0.4)
        >>> sampler.set_epoch(1)
        >>> torch.equal(torch.tensor(list(sampler)), draw_without(10, 4, seed=0, j=1))
        True
    """

    def __init__(self, n: int, r: float, variant: str = "without", labels: Tensor | None = None, seed: int = 0) -> None:
        super().__init__(seed)
        if variant not in VARIANTS:
            raise OptionError(f"variant={variant!r}: use {nearest(variant, VARIANTS)}")
        self.n, self.r, self.k, self.variant, self.labels = n, r, subset_size(n, r), variant, labels
        if variant == "stratified":
            if labels is None or len(labels) != n:
                given = "none" if labels is None else len(labels)
                raise OptionError(f"variant='stratified': give labels, one for each of n={n} examples, not {given}")
            self.draw(0)  # whatever is wrong with them, now
        elif labels is not None:
            raise OptionError(f"labels: variant={variant!r} does not look at them; leave them out, or use 'stratified'")

    def draw(self, epoch: int) -> Tensor:
        """The rows of round `epoch`."""
        if self.variant == "stratified":
            assert self.labels is not None
            return draw_stratified(self.labels, self.r, self.seed, epoch)
        return (draw_without if self.variant == "without" else draw_with)(self.n, self.k, self.seed, epoch)


# -- what can be said beforehand --


def expected_distinct(n: int, k: int, rounds: int) -> float:
    """Different examples seen after X rounds of variant 1, in expectation: N (1 - (1 - k/N)^X).

    Variant 3 has seen min(N, X k).

    Example:
        >>> round(expected_distinct(50_000, 5000, rounds=10))
        32566
    """
    return n * (1 - (1 - k / n) ** rounds)


def draw_variance(n: int, k: int, variance: float) -> float:
    """Variance of the mean over k different examples of N: (N - k) / (k (N - 1)) of that of one.

    Args:
        n, k: N and k.
        variance: over the N examples, divisor N; of a gradient the sum over its coordinates.

    Example:
        >>> draw_variance(101, 1, 3.0), draw_variance(101, 101, 3.0)
        (3.0, 0.0)
    """
    return variance * (n - k) / (k * (n - 1)) if n > 1 else 0.0


def gradient_bound(gap: float, smoothness: float, variance: float, steps: int) -> tuple[float, float]:
    """How small SGD's gradient must become, from standard theory, with the constant rate that makes it so.

    For a loss that is beta-smooth, not necessarily convex, and unbiased gradients of variance at most sigma^2, T steps
    with a rate eta of at most 1 / beta have on average over the steps

    ``E |grad f|^2 <= 2 Delta / (eta T) + eta beta sigma^2``,

    which the best such rate makes at most ``2 beta Delta / T + 2 sigma sqrt(2 beta Delta / T)``: a decay like
    ``1 / sqrt(T)``. (Ghadimi and Lan, 2013, arXiv 1309.5549, theorem 2.1 in its simplest form.)

    It covers a round of one step (k = b), whose subset of k different examples is an unbiased draw with the variance of
    `draw_variance`. Within a round of several steps the later batches are not independent of the earlier ones.

    Args:
        gap: Delta, the loss at the start minus its least value (or a lower bound of it, such as 0).
        smoothness: beta, a Lipschitz constant of the gradient.
        variance: sigma^2, of the gradient of one step, summed over coordinates; its largest value.
        steps: T.

    Returns:
        The rate and the bound on the mean squared gradient norm.

    Raises:
        OptionError: a constant that is negative, or no steps.

    Example:
        >>> rate, bound = gradient_bound(gap=1.0, smoothness=1.0, variance=0.0, steps=100)
        >>> rate, bound
        (1.0, 0.02)
    """
    if gap <= 0 or smoothness <= 0 or variance < 0 or steps < 1:
        raise OptionError(
            f"gap={gap}, smoothness={smoothness}, variance={variance}, steps={steps}: the first two and the "
            "steps must be positive, variance not negative"
        )
    rate = 1 / smoothness
    if variance > 0:
        rate = min(rate, (2 * gap / (smoothness * variance * steps)) ** 0.5)
    return rate, 2 * gap / (rate * steps) + rate * smoothness * variance
