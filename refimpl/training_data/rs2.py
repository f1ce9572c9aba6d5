"""RS2: train on a random subset that is drawn anew in every round.

Source: Okanovic et al., ICLR 2024, "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning",
arXiv 2305.18424: its algorithm (the loop over rounds) and its three ways of drawing.

    for round j = 1 ... X:                                 of a data set of N examples
        draw a subset S_j of k = round(r N) examples       `draw_with`, `draw_stratified` or `draw_without`
        for each of its floor(k / b) batches:
            one optimiser step at the rate eta(t),         t = 1 ... T,  T = X floor(k / b)    (`steps`)

The schedule of the learning rate ends after the T steps that are really made. The claim: at r of 10 % or less this beats
every subset that is chosen once, however cleverly, and the choice costs nothing. Without replacement it is simply ordinary
training on all data for r X epochs, with a schedule of that length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from refimpl.core.arguments import checked
from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.sampling import EpochSampler, Shuffled

VARIANTS = ("without", "with", "stratified")


@checked()
def subset_size(n: int, r: float) -> int:
    """k = round(r N), with halves rounded to even.

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


@checked()
def steps(n: int, r: float, rounds: int, batch_size: int) -> int:
    """The horizon of the learning rate, T = X floor(k / b): the number of updates that are really made.

    Pass it to `refimpl.core.train.loop.Recipe`. A schedule made for the full data set would be cut off long before it has
    decayed, while the rate is still high.

    Args:
        n, r: see `subset_size`.
        rounds: X, called epochs elsewhere.
        batch_size: b; the last, partial batch of a round is dropped.

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


@checked()
def draw_with(n: int, k: int, seed: int, j: int) -> Tensor:
    """Variant 1: round j is an independent uniform draw of k different indices.

    "With replacement" refers to rounds: an example may be drawn again in the next round, but never twice in one.

    Args:
        n, k: N and the size of the subset.
        seed, j: together with n and k they determine the result.

    Returns:
        int64 [k], in the order in which they were drawn.

    Raises:
        OptionError: k outside 1 to n.

    Example:
        >>> draw_with(10, 4, seed=0, j=0).unique().numel()
        4
    """
    _check_budget(n, k)
    return _permutation(n, seed, j)[:k]  # S_j: the head of a permutation that only round j uses


@checked()
def draw_stratified(labels: Tensor, r: float, seed: int, j: int) -> Tensor:
    """Variant 2: as variant 1, class by class: round(r N_c) of class c.

    Args:
        labels: int64 [N], from 0.
        r: share of every class.
        seed, j: together with labels and r they determine the result.

    Returns:
        int64 [sum_c round(r N_c)], in random order. Because each class is rounded, the size may differ from round(r N) by
        up to (C + 1) / 2.

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
        # N_c = count; the first round(r N_c) examples of class c in a random order are a uniform draw from that class
        quota = round(r * count)
        if count and not quota:
            raise OptionError(
                f"r={r:g}: class {name} has {count} examples, of which a round would see none; "
                f"use r={0.51 / count:.2g} or more, or draw without classes"
            )
        kept.append((drawn == name).nonzero()[:quota, 0])
    # sorted by their place in the permutation, so that the classes come mixed and not one after another
    return order[torch.cat(kept).sort().values]


@checked()
def draw_without(n: int, k: int, seed: int, j: int) -> Tensor:
    """Variant 3: round j is the next k entries of a permutation of all data, which is drawn anew when it is used up.

    Where k does not divide N a round gets the tail of one pass and the head of the next. The new permutation then
    starts with its first entries that are not in that tail, followed by those it skipped. So every round has k different
    examples, and after any round the numbers of times that two examples were seen differ by at most one. (The authors'
    code has a round of k - 1 here, and repeats the head of the old permutation.)

    Args:
        n, k: N and the size of the subset.
        seed, j: together with n and k they determine the result. Pass p uses the permutation of
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
    first, place = divmod(j * k, n)  # j k examples were seen before: so many whole passes, and this place in the next
    start = _passes(n, k, seed, first)
    order = next(start)
    taken = order[place : place + k]
    return taken if len(taken) == k else torch.cat([taken, next(start)[: k - len(taken)]])


def _passes(n: int, k: int, seed: int, first: int) -> Iterator[Tensor]:
    """The order of pass `first` and of all passes after it."""
    # A pass that begins together with a round depends on no pass before it: go back to the nearest such pass. If k is at
    # most half of N, one pass back is enough, because what that pass itself moved to its front does not reach its tail.
    begin = first
    while begin and (begin * n) % k and not (2 * k <= n and begin < first):
        begin -= 1
    order, pass_ = _permutation(n, seed, begin), begin
    while True:
        if pass_ >= first:
            yield order
        pass_ += 1
        left = (pass_ * n) % k  # entries at the end of the last pass that belong to a round not yet complete
        following = _permutation(n, seed, pass_)
        if left:
            tail = torch.zeros(n, dtype=torch.bool)
            tail[order[n - left :]] = True
            blocked = tail[following]
            # the first k - left entries that are not in the tail complete that round with different examples
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

    Use it with ``refimpl.core.train.sampling.loader(data, RS2(len(data), 0.1), batch_size)`` and a recipe of `steps`
    updates. Rows come in the order in which they were drawn: shuffling them once more would not change their distribution,
    but variant 3 would no longer equal training on all data.

    Args:
        n: examples in the data set.
        r: share of them that a round sees.
        variant: "without" replacement between rounds (the paper's main one), "with", or "stratified".
        labels: int64 [n], for "stratified".
        seed: of the subsets. "without" goes through the permutations of ``Shuffled(n, seed)``.

    Raises:
        OptionError: r or labels out of range, an unknown variant, labels that are missing, of another length, or not used.

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
            self.draw(0)  # raises now if a label or quota is invalid, not in the middle of a training
        elif labels is not None:
            raise OptionError(f"labels: variant={variant!r} does not use them; leave them out, or use 'stratified'")

    def draw(self, epoch: int) -> Tensor:
        """The rows of round `epoch`."""
        if self.variant == "stratified":
            assert self.labels is not None
            return draw_stratified(self.labels, self.r, self.seed, epoch)
        return (draw_without if self.variant == "without" else draw_with)(self.n, self.k, self.seed, epoch)


# -- predictions --


@checked()
def expected_distinct(n: int, k: int, rounds: int) -> float:
    """Expected number of different examples seen in X rounds of variant 1: N (1 - (1 - k/N)^X).

    Variant 3 has seen min(N, X k).

    Example:
        >>> round(expected_distinct(50_000, 5000, rounds=10))
        32566
    """
    # an example is missing from one round with probability 1 - k / N, and rounds are independent
    return n * (1 - (1 - k / n) ** rounds)


@checked()
def draw_variance(n: int, k: int, variance: float) -> float:
    """Variance of the mean over k different examples of N: that of one example times (N - k) / (k (N - 1)).

    Args:
        n, k: N and k.
        variance: over the N examples, with divisor N; for a gradient, summed over its coordinates.

    Example:
        >>> draw_variance(101, 1, 3.0), draw_variance(101, 101, 3.0)
        (3.0, 0.0)
    """
    # without replacement: 1 / k as for independent draws, times the finite population correction (N - k) / (N - 1)
    return variance * (n - k) / (k * (n - 1)) if n > 1 else 0.0


@checked()
def gradient_bound(gap: float, smoothness: float, variance: float, steps: int) -> tuple[float, float]:
    """Upper bound on the gradient after T steps of SGD, from standard theory, and the constant rate that attains it.

    For a loss that is beta-smooth, not necessarily convex, and unbiased gradients of variance at most sigma^2, T steps
    with a rate eta of at most 1 / beta satisfy, on average over the steps,

    ``E |grad f|^2 <= 2 Delta / (eta T) + eta beta sigma^2``,

    which for the best such rate is at most ``2 beta Delta / T + 2 sigma sqrt(2 beta Delta / T)``: a decay like
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
        OptionError: gap or smoothness not positive, variance negative, or no steps.

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
    if variance > 0:  # where the derivative in eta vanishes: -2 Delta / (eta^2 T) + beta sigma^2 = 0
        rate = min(rate, (2 * gap / (smoothness * variance * steps)) ** 0.5)
    return rate, 2 * gap / (rate * steps) + rate * smoothness * variance
