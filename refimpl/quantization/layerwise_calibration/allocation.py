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
from math import fsum
from typing import Any

import numpy as np
from torch import nn

from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import OptionError, require
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
    """Solve the integer program exactly (HiGHS, through scipy).

    Args:
        delta: `sensitivity`.
        savings: by site and bits, in any unit; the same sites and bits as `delta`.
        budget: least total saving, in that unit. Zero or less keeps every site at the reference.
        reference: bits of a site that saves nothing.

    Raises:
        OptionError: tables that differ, or a budget out of reach: says the largest feasible one.
        MissingExtra: scipy is not installed.

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
    most = fsum(max(0.0, *values.values()) for values in savings.values())
    if budget > most:
        raise OptionError(
            f"budget={budget:.10g} cannot be met: with every site at its smallest the saving is {most:.10g}, the "
            "largest feasible budget"
        )
    choices = [(name, bits) for name, values in delta.items() for bits in values]
    cost = np.array([delta[name][bits] for name, bits in choices])
    gain = np.array([savings[name][bits] for name, bits in choices])
    one_each = np.array([[float(name == site) for name, _ in choices] for site in delta])
    required, unit = budget, max(1e-300, float(np.abs(gain).max(initial=0.0)))
    # minimise sum I delta  subject to  sum_k I[l, k] <= 1  and  sum I pi >= budget; a site without a choice stays at
    # the reference, which is why the paper's equality over all precisions is an inequality over the others
    while True:
        chosen = _solve(cost, gain / unit, one_each, required / unit, whole=True)
        policy = dict.fromkeys(delta, reference)
        policy |= {choice[0]: choice[1] for choice, taken in zip(choices, chosen, strict=True) if taken > 0.5}
        used = [(name, bits) for name, bits in policy.items() if bits != reference]
        saved = fsum(savings[name][bits] for name, bits in used)
        if saved >= budget:
            break
        required += max(
            budget - saved, 1e-9 * unit
        )  # the solver tolerates a shortfall of a millionth: ask for that much more
    # the relaxation I in [0, 1] is never above the integer optimum
    relaxed = _solve(cost, gain / unit, one_each, budget / unit, whole=False)
    return Allocation(policy, float(sum(delta[name][bits] for name, bits in used)), saved, float(cost @ relaxed))


def _solve(cost: np.ndarray, gain: np.ndarray, one_each: np.ndarray, budget: float, whole: bool) -> np.ndarray:
    """The program in matrix form: one variable per site and precision below the reference, 0 to 1."""
    if not len(cost):
        return cost
    optimize: Any = require("scipy.optimize", "lab")
    smallest = cost[cost > 0].min(initial=1.0)  # the solver stops at an absolute gap of 1e-6: small in these units
    constraints = [
        optimize.LinearConstraint(one_each, -np.inf, 1.0),
        optimize.LinearConstraint(gain[None], budget, np.inf),
    ]
    found = optimize.milp(
        cost / smallest,
        constraints=constraints,
        integrality=np.full(len(cost), int(whole)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise OptionError(f"budget: the solver found no allocation ({found.message})")
    return np.asarray(found.x)
