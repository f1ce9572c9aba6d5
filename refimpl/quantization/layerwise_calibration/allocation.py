"""Step 3: how many bits each layer gets, chosen by an integer program.

One copy of the model is compressed at each precision. The sensitivity delta of a layer is the increase of the network's
loss when this layer alone comes from a coarser copy. The program assumes that such increases add up:

    minimise  sum I[l, k] delta[l, k]   over binary I,   with  sum_k I[l, k] = 1  and  sum I[l, k] pi[l, k] >= budget

where ``pi[l, k]`` is the storage or compute that layer l saves at k bits compared with the reference precision, for
which delta = pi = 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil, fsum, isfinite, isnan, lcm

import numpy as np
from torch import nn

from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompressedLayer

SMALLEST_DELTA = 1e-6  # not 0, so that without any loss to gain the program prefers the reference precision

Table = Mapping[str, Mapping[int, float]]  # site name -> bits -> value


@dataclass(frozen=True)
class Allocation:
    """The result of `allocate_bits`.

    Attributes:
        policy: bits of every site.
        delta: sum of the sensitivities: the predicted loss above the reference.
        saved: sum of the savings, at least the budget.
        bound: the optimum if layers could be split between precisions (0 <= I <= 1); no policy has a smaller delta.
    """

    policy: dict[str, int]
    delta: float
    saved: float
    bound: float


def assemble(models: Mapping[int, nn.Module], policy: Mapping[str, int]) -> nn.Module:
    """A mixed-precision model from copies of one model, each compressed at another precision.

    Args:
        models: copies by bits, all compressed at the same sites.
        policy: bits of every site. Weight codes, bias and all ranges of a site come from the same copy: they were
            trained together.

    Returns:
        A new model; the copies do not change.

    Raises:
        OptionError: the policy names a precision without a copy or an unknown site, or lacks a site.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50)).eval()
        >>> copies = {bits: compress(copy.deepcopy(model), RTN(bits, 32), progress=False).model for bits in (8, 4)}
        >>> names = [site.name for site in find_sites(model)]
        >>> mixed = assemble(copies, {name: 4 if "mlp" in name else 8 for name in names})
        >>> mixed.model.layers[0].mlp.up_proj.bits, mixed.model.layers[0].self_attn.q_proj.bits
        (4, 8)
    """
    for name, bits in policy.items():
        if bits not in models:
            raise OptionError(f"policy[{name!r}]={bits}: models has copies at {sorted(models)} bits only")
    copied = next(iter(models.values()))
    there = list(_layers(copied))
    if set(policy) != set(there):
        odd = sorted(set(policy) ^ set(there))[0]
        raise OptionError(
            f"policy {'lacks' if odd in there else 'names'} {odd!r}; give the bits of every compressed site: "
            f"{len(there)} of them"
        )
    mixed = copy.deepcopy(copied)
    for name, bits in policy.items():
        parent, _, attribute = name.rpartition(".")
        setattr(mixed.get_submodule(parent), attribute, copy.deepcopy(models[bits].get_submodule(name)))
    return mixed


def _layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed sites of a model by name."""
    return {site.name: site.placed for site in find_sites(model) if isinstance(site.placed, CompressedLayer)}


def sensitivity(
    models: Mapping[int, nn.Module], loss: Callable[[nn.Module], float], reference: int
) -> dict[str, dict[int, float]]:
    """delta[l, k]: increase of the loss when site l alone drops from the reference precision to k bits.

    Args:
        models: copies by bits, all compressed at the same sites.
        loss: of a model on calibration data, such as the divergence from the float model or the cross-entropy.
        reference: bits of the copy in which one site at a time is replaced.

    Returns:
        By site and bits (the reference left out), at least `SMALLEST_DELTA`.

    Raises:
        OptionError: no copy at the reference precision, or no other one.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50)).eval()
        >>> copies = {bits: compress(copy.deepcopy(model), RTN(bits, 32), progress=False).model for bits in (8, 2)}
        >>> import torch
        >>> tokens = torch.arange(40)[None]
        >>> delta = sensitivity(copies, lambda m: float(m(tokens, labels=tokens).loss.detach()), reference=8)
        >>> len(delta), min(values[2] for values in delta.values()) >= SMALLEST_DELTA
        (7, True)
    """
    if reference not in models or len(models) < 2:
        raise OptionError(
            f"reference={reference}: models has copies at {sorted(models)} bits; it needs one at the reference "
            "precision and at least one other"
        )
    base = models[reference]
    before = loss(base)
    delta: dict[str, dict[int, float]] = {}
    for name, layer in _layers(base).items():
        parent, _, attribute = name.rpartition(".")
        owner = base.get_submodule(parent)
        delta[name] = {}
        for bits, other in models.items():
            if bits == reference:
                continue
            # additivity is assumed from here on: each site is measured with all others at the reference precision
            try:
                setattr(owner, attribute, other.get_submodule(name))
                delta[name][bits] = max(loss(base) - before, SMALLEST_DELTA)
            finally:
                setattr(owner, attribute, layer)
    return delta


def bytes_saved(models: Mapping[int, nn.Module], reference: int) -> dict[str, dict[int, float]]:
    """pi[l, k] in bytes, counting all that is stored: codes, scales, zero points, bias.

    Example:
        >>> from refimpl import RTN, compress
        >>> model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 10))
        >>> copies = {bits: compress(copy.deepcopy(model), RTN(bits, None), progress=False).model for bits in (8, 4)}
        >>> bytes_saved(copies, reference=8)   # half a byte per weight and per zero point
        {'0': {4: 520.0}, '1': {4: 88.0}}
    """
    sizes = {bits: {name: layer.nbytes for name, layer in _layers(model).items()} for bits, model in models.items()}
    return {
        name: {bits: float(size - sizes[bits][name]) for bits in models if bits != reference}
        for name, size in sizes[reference].items()
    }


def bit_operations_saved(macs: Mapping[str, float], bits: list[int], reference: int) -> dict[str, dict[int, float]]:
    """pi[l, k] in bit operations: multiply-adds of site l times (reference^2 - k^2), with weights and inputs at k bits.

    Example:
        >>> bit_operations_saved({"conv": 100.0}, [4], reference=8)
        {'conv': {4: 4800.0}}
    """
    return {name: {k: count * (reference**2 - k**2) for k in bits if k != reference} for name, count in macs.items()}


def allocate_bits(delta: Table, savings: Table, budget: float, reference: int = 8) -> Allocation:
    """Solve the integer program exactly, by dynamic programming over the sites.

    Savings are added up as integers, so nothing depends on rounding, however unlike in size the sites are.

    Args:
        delta: `sensitivity`.
        savings: by site and bits, in any unit; the same sites and bits as `delta`.
        budget: least total saving, in that unit. Zero or less keeps every site at the reference.
        reference: bits of a site that saves nothing.

    Raises:
        OptionError: tables that differ, or a value in them that is no finite number; a budget out of reach: says the
            largest feasible one.

    Example:
        >>> delta = {"a": {4: 0.1, 2: 0.5}, "b": {4: 0.2, 2: 0.3}}
        >>> savings = {"a": {4: 10.0, 2: 15.0}, "b": {4: 10.0, 2: 15.0}}
        >>> allocate_bits(delta, savings, budget=25.0).policy
        {'a': 4, 'b': 2}
        >>> allocate_bits(delta, savings, budget=31.0)
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: budget=31 cannot be met: with every site at its smallest the saving is 30, \
the largest feasible budget
    """
    for name in [*delta, *savings]:
        if name not in delta or name not in savings or set(delta[name]) != set(savings[name]):
            raise OptionError(f"delta and savings differ at {name!r}; give both for the same sites and bits")
    for label, table in (("delta", delta), ("savings", savings)):
        for name, values in table.items():
            for bits, value in values.items():
                if not isfinite(value):
                    raise OptionError(
                        f"{label}[{name!r}][{bits}]={value}: use finite numbers; compress that copy again, or leave its "
                        "bits out of both tables"
                    )
    if isnan(budget):
        raise OptionError(f"budget={budget}: use a number")
    most = fsum(max(0.0, *values.values()) for values in savings.values())
    if budget > most * (1 + 1e-12):  # a sum in another order may differ in its last digits
        raise OptionError(
            f"budget={budget:.10g} cannot be met: with every site at its smallest the saving is {most:.10g}, the "
            "largest feasible budget"
        )
    if not delta:
        return Allocation({}, 0.0, 0.0, 0.0)
    # a site without a choice stays at the reference, for which delta = pi = 0
    offered = {name: [reference, *values] for name, values in delta.items()}
    cost = [np.array([0.0, *values.values()]) for values in delta.values()]
    gain = [np.array([0.0, *(savings[name][k] for k in values)]) for name, values in delta.items()]
    bound, chosen = _least_cost(cost, gain, budget)
    policy = {name: offered[name][choice] for name, choice in zip(delta, chosen, strict=True)}
    used = [(name, k) for name, k in policy.items() if k != reference]
    saved = fsum(savings[name][k] for name, k in used)
    return Allocation(policy, float(sum(delta[name][k] for name, k in used)), saved, bound)


def _least_cost(cost: list[np.ndarray], gain: list[np.ndarray], budget: float) -> tuple[float, list[int]]:
    """The multiple-choice knapsack: one option for each site, least total cost, total gain of `budget` or more.

    Args:
        cost, gain: of the options of each site.
        budget: within reach, up to rounding.

    Returns:
        The optimum where options can be mixed, and the option of each site in the optimum where they cannot.
    """
    exact = [[Fraction(float(value)) for value in values] for values in gain]
    scale = lcm(*(value.denominator for values in exact for value in values))
    whole = [[int(value * scale) for value in values] for values in exact]
    # what sites from the i-th on can gain at most, and lose at most
    top = [0, *accumulate(max(values) for values in reversed(whole))][::-1]
    loss = [0, *accumulate(min(0, *values) for values in reversed(whole))][::-1]
    least = sum(min(values) for values in whole)
    required = min(ceil(Fraction(max(budget, least / scale)) * scale), top[0])
    small = max(top[0], -loss[0], abs(required)) < 2**61
    kind = np.int64 if small else np.dtype(object)
    relaxed = _Relaxation(cost, gain)
    need = required / scale
    bound, feasible = relaxed.bound(0, np.array([need]))[0], relaxed.rounded(need)
    limit = feasible + 1e-9 * abs(feasible)

    # states after the sites so far: total gain and total cost, none of which another beats in both
    gained, spent = np.zeros(1, dtype=kind), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for i, options in enumerate(cost):
        reached = (gained[:, None] + np.array(whole[i], dtype=kind)).ravel()
        reached = np.minimum(reached, required - loss[i + 1])  # a gain beyond the budget is worth nothing
        total = (spent[:, None] + options).ravel()
        left = ((required - reached) / scale).astype(float)
        # what cannot reach the budget any more, or not below the cost of a solution that is known, is dropped
        promising = (reached + top[i + 1] >= required) & (total + relaxed.bound(i + 1, left) <= limit)
        index = np.flatnonzero(promising)
        index = index[np.argsort(total[index], kind="stable")]
        index = index[np.argsort(-reached[index], kind="stable")]  # by gain, the largest first, then by cost
        cheaper = np.minimum.accumulate(total[index])
        index = index[np.concatenate([[True], cheaper[1:] < cheaper[:-1]])]
        steps.append(np.divmod(index, len(options)))
        gained, spent = reached[index], total[index]
    chosen, state = [], int(np.argmin(spent))
    for before, option in reversed(steps):
        chosen.append(int(option[state]))
        state = int(before[state])
    return float(bound), chosen[::-1]


class _Relaxation:
    """The program with 0 <= I <= 1: a lower bound on the cost of the sites from any one on.

    The options of a site that a mixture can use lie on the lower convex hull of (gain, cost). The optimum takes the
    cheapest option of every site, then walks along all hulls, the least cost per gain first, until the budget is met.
    """

    def __init__(self, cost: list[np.ndarray], gain: list[np.ndarray]) -> None:
        start, steps = [], []
        for site, (costs, gains) in enumerate(zip(cost, gain, strict=True)):
            at = int(np.lexsort((-gains, costs))[0])  # the cheapest; of equal ones that with most gain
            start.append((gains[at], costs[at]))
            while (further := np.flatnonzero(gains > gains[at])).size:
                slopes = (costs[further] - costs[at]) / (gains[further] - gains[at])
                best = int(np.lexsort((-gains[further], slopes))[0])
                to = int(further[best])
                steps.append((slopes[best], site, gains[to] - gains[at], costs[to] - costs[at]))
                at = to
        steps.sort()
        self.site = np.array([step[1] for step in steps], dtype=int)
        self.steps = np.array([step[2:] for step in steps]).reshape(-1, 2)  # gain and cost
        self.start = np.array(start)
        self.blur = 1e-12 * sum(float(np.abs(gains).max()) for gains in gain)

    def _curve(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Total gain and total cost along the walk over the sites from `first` on."""
        walk = np.concatenate([self.start[first:].sum(0)[None], self.steps[self.site >= first]])
        gains, costs = walk.cumsum(0).T
        return gains, costs

    def bound(self, first: int, need: np.ndarray) -> np.ndarray:
        """Least cost at which the sites from `first` on gain `need`, or less where totals in floats cannot tell."""
        return np.interp(need - self.blur, *self._curve(first))

    def rounded(self, need: float) -> float:
        """The cost of a solution: the walk up to the end of the step in which it gains `need`."""
        gains, costs = self._curve(0)
        return float(costs[min(int(np.searchsorted(gains, need + self.blur)), len(costs) - 1)])
