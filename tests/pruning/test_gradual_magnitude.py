"""Gradual magnitude pruning: the paper's schedule and masks, their invariants, and the traps of training with them."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from refimpl import load, save
from refimpl.core.errors import OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.masks import bake, find_masks, stored_weight
from refimpl.pruning.gradual_magnitude import (
    GradualMagnitude,
    Storage,
    magnitude_mask,
    model_storage,
    sparsity_at,
    sparsity_for,
    storage,
)

Factory = Callable[..., PreTrainedModel]
few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
fractions = st.floats(0, 0.99)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the schedule


@few
@given(fractions, fractions, st.integers(0, 50), st.integers(1, 20), st.integers(1, 30), st.floats(0.5, 4))
def test_schedule_starts_ends_rises_and_is_clamped(a, b, t_0, n, dt, exponent) -> None:
    s_i, s_f = sorted((a, b))
    curve = [sparsity_at(t, s_f, s_i, t_0, n, dt, exponent) for t in range(t_0 + n * dt + 5)]
    assert curve[: t_0 + 1] == [s_i] * (t_0 + 1)
    assert curve[t_0 + n * dt :] == [s_f] * 5
    assert all(before <= after for before, after in itertools.pairwise(curve))


def test_worked_values_of_the_cubic_and_the_straight_line() -> None:
    progress = (0, 10, 25, 50, 75, 100)
    cubic = [sparsity_at(t, 0.9, n=100) for t in progress]
    assert cubic == pytest.approx([0, 0.2439, 0.5203125, 0.7875, 0.8859375, 0.9])
    assert [sparsity_at(t, 0.9, n=100, exponent=1) for t in progress] == pytest.approx(
        [0, 0.09, 0.225, 0.45, 0.675, 0.9]
    )
    assert sparsity_at(50, 0.8, n=100) == pytest.approx(0.875 * 0.8)  # halfway, seven eighths are done
    first = sparsity_at(1, 0.9, n=1000)
    assert first == pytest.approx(3 * 0.9 / 1000, rel=0.01)


def test_increments() -> None:
    def increments(exponent: float) -> list[float]:
        curve = [sparsity_at(100 + 10 * k, 0.9, 0.1, 100, 8, 10, exponent) for k in range(9)]
        return [after - before for before, after in itertools.pairwise(curve)]

    assert increments(1) == pytest.approx([0.1] * 8)
    cubic = increments(3)
    assert all(before > after for before, after in itertools.pairwise(cubic))
    assert sum(cubic) == pytest.approx(0.8)


# ---- one mask


@few
@given(seeds, st.integers(1, 200), fractions)
def test_exactly_k_stay_with_and_without_ties(seed, size, s) -> None:
    k = max(1, round(size * (1 - s)))
    W = random(size, seed=seed)
    for weights in (W, W.round(), torch.ones(size), torch.zeros(size), W.bfloat16()):
        assert int(magnitude_mask(weights, s).sum()) == k


def test_of_equal_weights_the_first_stay_and_a_half_rounds_to_even() -> None:
    assert magnitude_mask(torch.ones(4), 0.5).tolist() == [True, True, False, False]
    assert int(magnitude_mask(torch.ones(5), 0.5).sum()) == 2  # 2.5
    assert int(magnitude_mask(torch.ones(7), 0.5).sum()) == 4  # 3.5


@few
@given(seeds, st.integers(1, 10), fractions)
def test_no_other_mask_with_k_ones_keeps_more(seed, size, s) -> None:
    W = random(size, seed=seed)
    k = round(size * (1 - s))
    mask = magnitude_mask(W, s)
    kept, lost = W[mask].abs().sum(), W[~mask].norm()
    for chosen in itertools.combinations(range(size), k):
        other = torch.zeros(size, dtype=torch.bool)
        other[list(chosen)] = True
        assert kept >= W[other].abs().sum() - 1e-6 and lost <= W[~other].norm() + 1e-6


@few
@given(seeds, st.integers(1, 40), st.integers(1, 12), fractions)
def test_permuting_the_weights_permutes_the_mask(seed, rows, columns, s) -> None:
    W = random(rows, columns, seed=seed)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    permuted = W.flatten()[order].view_as(W)
    assert torch.equal(magnitude_mask(permuted, s).flatten(), magnitude_mask(W, s).flatten()[order])


@few
@given(seeds, st.integers(1, 12), st.integers(1, 12), fractions)
def test_blocks_of_one_are_no_structure(seed, rows, columns, s) -> None:
    W = random(rows, columns, seed=seed)
    for pooling in ("avg", "max"):
        assert torch.equal(magnitude_mask(W, s, "1x1", pooling), magnitude_mask(W, s))


@few
@given(seeds, st.integers(1, 13), st.integers(1, 13), st.integers(1, 5), st.integers(1, 5), fractions, st.booleans())
def test_blocks_live_and_die_together_by_their_pooled_magnitude(seed, rows, columns, h, w, s, largest) -> None:
    W = random(rows, columns, seed=seed)
    mask = magnitude_mask(W, s, f"{h}x{w}", "max" if largest else "avg")
    # those at the edges are smaller
    blocks = [(slice(i, i + h), slice(j, j + w)) for i in range(0, rows, h) for j in range(0, columns, w)]
    score = [float(W[block].abs().max() if largest else W[block].abs().mean()) for block in blocks]
    lives = [bool(mask[block].any()) for block in blocks]
    assert all(bool(mask[block].all()) == live for block, live in zip(blocks, lives, strict=True))
    assert sum(lives) == max(1, round(len(blocks) * (1 - s)))
    if any(lives) and not all(lives):
        worst = min(value for value, live in zip(score, lives, strict=True) if live)
        best = max(value for value, live in zip(score, lives, strict=True) if not live)
        assert worst >= best - 1e-6


@pytest.mark.parametrize("structure", ["2:4", "1:4", "3:8"])
def test_n_of_every_m_inputs_stay_the_largest(structure: str) -> None:
    n, m = map(int, structure.split(":"))
    W = random(6, 24)
    mask = magnitude_mask(W, 1 - n / m, structure)
    runs, kept = W.abs().unflatten(1, (-1, m)), mask.unflatten(1, (-1, m))
    assert (kept.sum(-1) == n).all()
    assert (runs.masked_fill(~kept, 9).amin(-1) >= runs.masked_fill(kept, 0).amax(-1)).all()
    assert int(magnitude_mask(W, 0.25, structure).sum()) == 6 * 24 * 3 // 4  # on the way: the same share of each run


def test_bad_masks_are_refused() -> None:
    for structure, message in (
        ("4 by 1", "use 'unstructured', blocks as '4x1'"),
        ("0x4", "structure='0x4'"),
        ("2:3", "pattern='2:3': use"),
    ):
        with pytest.raises(OptionError, match=message):
            magnitude_mask(random(4, 4), 0.5, structure)
    with pytest.raises(OptionError, match="pooling='mean': use one of 'avg', 'max'"):
        magnitude_mask(random(4, 4), 0.5, "2x2", "mean")
    with pytest.raises(OptionError, match=r"W has shape \[8\]: structure='2x2' needs a matrix"):
        magnitude_mask(random(8), 0.5, "2x2")
    with pytest.raises(OptionError, match="inputs in groups of 4, but W has 6"):
        magnitude_mask(random(2, 6), 0.5, "2:4")


# ---- the hook, without a training run


def attached(weights: Tensor, **options) -> tuple[nn.Module, object]:
    model = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(weights)
    return model, GradualMagnitude(**{"frequency": 1, **options}).attach(model)


def test_a_masked_weight_returns_with_its_value_when_a_survivor_shrinks() -> None:
    """Ranking the masked product instead would rank it last for ever."""
    model, hook = attached(torch.tensor([[1.0, 0.9]]), final_sparsity=0.5, updates=2, exponent=20)
    hook(1, model)
    assert model.weight.tolist() == [[1.0, 0.0]]
    with torch.no_grad():
        stored_weight(model, "weight")[0, 0] = 0.5
    hook(2, model)
    assert find_masks(model)["weight"].mask.tolist() == [[False, True]]
    assert [(u.live, u.removed, u.revived) for u in hook.updates] == [(2, 0, 0), (1, 1, 0), (1, 1, 1)]
    bake(model)
    assert torch.equal(model.weight, torch.tensor([[0.0, 0.9]]))


def test_updates_fall_on_the_scheduled_steps_only() -> None:
    model, hook = attached(random(10, 10), final_sparsity=0.8, start=3, frequency=4, updates=3)
    (masked,) = find_masks(model).values()
    changes = []
    for step in range(1, 40):
        before = masked.mask.clone()
        with torch.no_grad():
            stored_weight(model, "weight").add_(random(10, 10, seed=step))
        hook(step, model)
        if not torch.equal(before, masked.mask):
            changes.append(step)
    assert changes == [7, 11, 15]  # at 3 the sparsity is still 0; after 15 masks are frozen
    assert [update.step for update in hook.updates] == [3, 7, 11, 15]
    expected = [round(100 * (1 - hook.method.sparsity_at(step))) for step in (3, 7, 11, 15)]
    assert [update.live for update in hook.updates] == expected and expected[-1] == 20


def test_an_initial_sparsity_is_there_from_the_first_step() -> None:
    model, hook = attached(random(10, 10), initial_sparsity=0.3, final_sparsity=0.5, updates=2)
    assert int(find_masks(model)["weight"].mask.sum()) == 70
    assert [update.step for update in hook.updates] == [0]


def test_one_update_is_one_shot() -> None:
    model, hook = attached(random(10, 10), final_sparsity=0.9, start=4, frequency=1, updates=1)
    for step in range(1, 6):
        hook(step, model)
        assert int(find_masks(model)["weight"].mask.sum()) == (100 if step < 5 else 10)


def layers(**shapes: tuple[int, int]) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(d, m, bias=False) for name, (m, d) in shapes.items()})


def finished(model: nn.Module, method: GradualMagnitude) -> dict[str, Tensor]:
    hook = method.attach(model)
    for step in range(1, method.last_step + 1):
        hook(step, model)
    return {name: masked.mask for name, masked in find_masks(model).items()}


def test_layer_scope_is_uniform_and_global_scope_ranks_all_weights_together() -> None:
    model = layers(a=(8, 10), b=(8, 10))
    with torch.no_grad():
        model["b"].weight.mul_(100)
    options = {"frequency": 1, "updates": 3}
    masks = finished(copy.deepcopy(model), GradualMagnitude(0.75, **options))
    assert [int(mask.sum()) for mask in masks.values()] == [20, 20]
    masks = finished(copy.deepcopy(model), GradualMagnitude(0.75, scope="global", **options))
    assert int(masks["a.weight"].sum()) + int(masks["b.weight"].sum()) == 40
    everything = torch.cat([model["a"].weight.flatten(), model["b"].weight.flatten()]).detach()
    everything[model["a"].weight.abs().argmax()] = 1e6  # the best of each layer stays
    expected = magnitude_mask(everything, 0.75)
    assert torch.equal(torch.cat([masks["a.weight"].flatten(), masks["b.weight"].flatten()]), expected)
    masks = finished(copy.deepcopy(model), GradualMagnitude(0.75, scope="global", structure="2x2", **options))
    assert sum(int(mask.sum()) for mask in masks.values()) == 40
    assert int(masks["a.weight"].sum()) == 4  # one block


def test_overrides_by_name() -> None:
    model = layers(first=(4, 10), second=(8, 10), third=(8, 10))
    method = GradualMagnitude(
        0.75, frequency=1, updates=3, initial_sparsity=0.6, overrides={"first": 0.0, "second": 0.5}
    )
    masks = finished(copy.deepcopy(model), method)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "first.weight": 40,
        "second.weight": 40,
        "third.weight": 20,
    }
    together = GradualMagnitude(0.75, frequency=1, updates=3, scope="global", overrides={"first": 0.0})
    masks = finished(copy.deepcopy(model), together)
    assert masks["first.weight"].all()
    assert int(masks["second.weight"].sum()) + int(masks["third.weight"].sum()) == 40
    with pytest.raises(OptionError, match=r"overrides\['fourth'\] decides for no weight; .*'first.weight'"):
        GradualMagnitude(overrides={"fourth": 0.0}).attach(model)
    assert not find_masks(model)


def test_random_masks_shrink_within_themselves_and_follow_the_seed() -> None:
    runs = {}
    for seed in (0, 1):
        model = layers(a=(8, 10), b=(8, 10))
        hook = GradualMagnitude(0.75, frequency=1, updates=4, ranking="random", seed=seed).attach(model)
        for step in range(1, 5):
            before = {name: masked.mask.clone() for name, masked in find_masks(model).items()}
            hook(step, model)
            for name, masked in find_masks(model).items():
                assert not (masked.mask & ~before[name]).any()
        runs[seed] = {name: masked.mask.clone() for name, masked in find_masks(model).items()}
        assert [int(mask.sum()) for mask in runs[seed].values()] == [20, 20]
        assert all(update.revived == 0 for update in hook.updates)
        assert not torch.equal(runs[seed]["a.weight"], runs[seed]["b.weight"])
    assert not torch.equal(runs[0]["a.weight"], runs[1]["a.weight"])


# ---- training


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(128, 12)
    y = torch.stack([x[:, 0] * 2 - x[:, 3], x[:, 1] + x[:, 2]], 1)
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))
    return model, x, y


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def fit(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, **options):
    return train(model, batches(x, y, batch_size=16, seed=1), loss, recipe, progress=False, **options)


ADAM = Recipe(steps=60, lr=0.02, weight_decay=0.1)
SGD = Recipe(steps=60, lr=0.05, optimizer="sgd", momentum=0.9)


@pytest.mark.parametrize("recipe", [ADAM, SGD])
def test_sparsity_zero_trains_exactly_like_no_pruning(recipe: Recipe) -> None:
    plain, x, y = problem()
    pruned = copy.deepcopy(plain)
    hook = GradualMagnitude(0.0, start=5, frequency=5, updates=8).attach(pruned, recipe)
    expected = fit(plain, x, y, recipe)
    found = fit(pruned, x, y, recipe, after_step=[hook])
    assert found.losses == expected.losses
    bake(pruned)
    for name, parameter in plain.named_parameters():
        assert torch.equal(pruned.get_parameter(name), parameter)


@pytest.mark.parametrize("recipe", [ADAM, SGD])
def test_neither_momentum_nor_decay_moves_a_masked_weight(recipe: Recipe) -> None:
    model, x, y = problem()
    hook = GradualMagnitude(0.8, start=10, frequency=10, updates=3).attach(model, recipe)
    seen: dict[str, Tensor] = {}
    moved = False

    def watch(step: int, model: nn.Module) -> None:
        nonlocal moved
        for name, masked in find_masks(model).items():
            W, mask = stored_weight(model, name).detach(), masked.mask
            before = seen.get(name)
            if before is not None and step not in (20, 30, 40):
                assert torch.equal(W[~mask], before[~mask]) and not torch.equal(W[mask], before[mask])
            moved |= before is not None and not torch.equal(W, before)
            seen[name] = W.clone()

    fit(model, x, y, recipe, after_step=[hook, watch])
    assert moved and sum(update.removed for update in hook.updates) > 0
    for name, masked in find_masks(model).items():  # it waits with a value of its own, not at zero
        assert stored_weight(model, name)[~masked.mask].abs().min() > 0


@pytest.mark.parametrize("recipe", [ADAM, SGD])
def test_frozen_masks_and_exported_zeros_stay_through_more_training(recipe: Recipe) -> None:
    model, x, y = problem()
    hook = GradualMagnitude(0.8, start=10, frequency=10, updates=3).attach(model, recipe)
    fit(model, x, y, recipe, after_step=[hook])
    before = {name: masked.mask.clone() for name, masked in find_masks(model).items()}
    stored = {name: stored_weight(model, name).detach().clone() for name in before}
    later = Recipe(steps=100, lr=recipe.lr, optimizer=recipe.optimizer, weight_decay=recipe.weight_decay)
    fit(model, x, y, later, after_step=[lambda step, model: hook(step + recipe.steps, model)])
    for name, masked in find_masks(model).items():
        assert torch.equal(masked.mask, before[name])
        assert torch.equal(stored_weight(model, name)[~masked.mask], stored[name][~masked.mask])
    masks = bake(model)
    for name, mask in masks.items():
        W = model.get_parameter(name)
        assert not W[~mask].any() and int(mask.sum()) == round(mask.numel() * 0.2)


def test_without_decay_a_weight_never_live_stays_without_help() -> None:
    """The gradient is masked before the optimiser, so Adam from zero moments has nothing to move."""
    model, x, y = problem()
    hook = GradualMagnitude(0.5, initial_sparsity=0.5, updates=1, frequency=1).attach(model)
    stored = {name: stored_weight(model, name).detach().clone() for name in find_masks(model)}
    fit(model, x, y, Recipe(steps=30, lr=0.02))  # no hook
    for name, masked in find_masks(model).items():
        W = stored_weight(model, name)
        assert torch.equal(W[~masked.mask], stored[name][~masked.mask])
        assert (W != stored[name])[masked.mask].all()
    assert len(hook.updates) == 1


def test_steps_are_updates_not_micro_batches() -> None:
    model, x, y = problem()
    recipe = Recipe(steps=12, lr=0.02, accumulate=4)
    hook = GradualMagnitude(0.5, start=4, frequency=4, updates=2).attach(model, recipe)
    seen = []
    fit(model, x, y, recipe, after_step=[hook, lambda step, model: seen.append((step, len(hook.updates)))])
    assert seen == [(s, 0) for s in (1, 2, 3)] + [(s, s // 4) for s in range(4, 12)] + [(12, 3)]


def test_the_mask_is_made_from_the_weights_after_the_update() -> None:
    model, x, y = problem()
    recipe = Recipe(steps=8, lr=0.3)
    hook = GradualMagnitude(0.5, start=7, frequency=1, updates=1).attach(model, recipe)
    before = {}

    def peek(step: int, model: nn.Module) -> None:  # what the optimiser has just written
        before.update({name: stored_weight(model, name).detach().clone() for name in find_masks(model)})

    fit(model, x, y, recipe, after_step=[peek, hook])
    for name, masked in find_masks(model).items():
        assert torch.equal(masked.mask, magnitude_mask(before[name], 0.5))


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None) -> tuple[nn.Module, list]:
        model, x, y = problem()
        hook = GradualMagnitude(0.8, start=10, frequency=10, updates=4).attach(model, ADAM)

        def interrupt(step: int, model: nn.Module) -> None:
            if step == stop:
                raise KeyboardInterrupt

        try:
            fit(model, x, y, ADAM, after_step=[hook, interrupt], folder=folder, checkpoint_every=5)
        except KeyboardInterrupt:
            return run(folder, None)
        return model, hook.updates

    straight, updates = run(tmp_path / "straight", None)
    for stop in (8, 27):
        resumed, again = run(tmp_path / f"stopped at {stop}", stop)
        assert again == updates and len(updates) == 5
        state = straight.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.state_dict().items())


def test_pruning_in_bf16_autocast_and_bf16_weights() -> None:
    for dtype, precision in ((torch.float32, "bf16"), (torch.bfloat16, "fp32")):
        model, x, y = problem()
        model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
        recipe = Recipe(steps=40, lr=0.01, precision=precision)
        hook = GradualMagnitude(0.5, start=5, frequency=5, updates=4).attach(model, recipe)
        history = fit(model, x, y, recipe, after_step=[hook])
        assert history.losses[-1] < history.losses[0]
        assert len(hook.export()) == 2 and model[0].to_dense().dtype == dtype
        assert model[0].nonzeros == 16 * 12 // 2


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_sparsity": 1.0}, "final_sparsity=1.0: use a fraction of zeros from 0 to below 1"),
        ({"final_sparsity": 90}, "final_sparsity=90"),
        ({"final_sparsity": 0.5, "initial_sparsity": 0.6}, "initial_sparsity=0.6: use 0 to final_sparsity=0.5"),
        ({"start": -1}, "start=-1: use a whole number of steps, 0 or more"),
        ({"frequency": 0}, "frequency=0"),
        ({"updates": 2.5}, "updates=2.5"),
        ({"exponent": 0}, "exponent=0: use a positive number; 3 is the paper's"),
        ({"scope": "network"}, "scope='network': use one of 'layer', 'global'"),
        ({"ranking": "gradient"}, "ranking='gradient'"),
        ({"pooling": "AVG"}, "did you mean 'avg'"),
        ({"structure": "2:4"}, "final_sparsity=0.9: structure='2:4' means 0.5"),
        ({"structure": "2:4", "final_sparsity": 0.5, "scope": "global"}, "every group keeps 2 of 4"),
        ({"structure": "2:4", "final_sparsity": 0.5, "overrides": {"a": 0.25}}, "only 0.0 .dense. is possible"),
        ({"overrides": {"(": 0.5}}, r"overrides\['\('\]: the key is not a regular expression"),
        ({"overrides": {"a": 1.5}}, r"overrides\['a'\]=1.5"),
    ],
)
def test_bad_options_are_refused(options, message) -> None:
    with pytest.raises(OptionError, match=message):
        GradualMagnitude(**options)


def test_what_cannot_work_is_refused_before_training() -> None:
    model = layers(a=(4, 6), b=(4, 8))
    with pytest.raises(OptionError, match="step 110 = start .* recipe.steps=100; lower updates to 9"):
        GradualMagnitude(0.5, start=10, frequency=10, updates=10).attach(model, Recipe(steps=100))
    with pytest.raises(OptionError, match="start earlier or update more often"):
        GradualMagnitude(0.5, start=99, frequency=10, updates=1).attach(model, Recipe(steps=100))
    with pytest.raises(OptionError, match="groups of 4, but 'a.weight' has 6; keep it dense"):
        GradualMagnitude(0.5, structure="2:4").attach(model)
    assert not find_masks(model), "a refused model is as it was"
    hook = GradualMagnitude(0.5, structure="2:4", overrides={"a.weight": 0.0}).attach(model)
    with pytest.raises(OptionError, match="attached to another model"):
        hook(1, copy.deepcopy(model))
    with pytest.raises(OptionError, match="the last mask update, of step 1000, has not been done yet .last: step 0"):
        hook.export()


# ---- what it costs to store


def gap_coded(mask: Tensor, c: int) -> list[tuple[int, bool]]:
    """(gap, real weight or padding) of every stored entry of one row [1, columns]: the format, written out."""
    entries = []
    for row in mask.tolist():
        zeros = 0
        for live in row:
            if live:
                entries.append((zeros, True))
                zeros = 0
            elif zeros == 2**c - 1:
                entries.append((zeros, False))
                zeros = 0
            else:
                zeros += 1
        while entries and not entries[-1][1]:
            entries.pop()  # padding behind the last weight of a row is not stored
    return entries


def decoded(entries: list[tuple[int, bool]], counts: list[int], columns: int) -> Tensor:
    mask = torch.zeros(len(counts), columns, dtype=torch.bool)
    left = iter(entries)
    for row, count in enumerate(counts):
        column = -1
        for _ in range(count):
            gap, live = next(left)
            column += gap + 1
            mask[row, column] = live
    return mask


@few
@given(seeds, st.integers(1, 5), st.integers(1, 70), st.floats(0.02, 1), st.integers(1, 6))
def test_padding_is_counted_as_an_encoder_would_write_it(seed, rows, columns, live, c) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < live
    per_row = [gap_coded(mask[row : row + 1], c) for row in range(rows)]
    assert torch.equal(decoded(sum(per_row, []), [len(row) for row in per_row], columns), mask)
    assert all(gap < 2**c for row in per_row for gap, _ in row)
    count = sum(map(len, per_row))
    found = storage(mask, bits=16, index_bits=c)
    assert found.csr == -(-count * (16 + c) // 8) + 2 * (rows + 1)
    assert found.nonzeros == int(mask.sum())
    assert storage(mask, bits=16).csr == min(storage(mask, bits=16, index_bits=k).csr for k in range(1, 17))


def test_storage_formulas_by_hand() -> None:
    mask = torch.zeros(8, 64, dtype=torch.bool)
    mask[:, ::4] = True  # s = 0.75
    found = storage(mask, bits=16, index_bits=4)
    # N + N(1-s)b, N(1-s)(b+c)
    assert found == Storage(nonzeros=128, dense=1024, bitmask=64 + 256, csr=128 * 20 // 8 + 2 * 9)
    many = torch.ones(2, 2**15, dtype=torch.bool)  # 65536 entries, one more than 16 bits can count
    assert storage(many, bits=16, index_bits=8).csr == 2**16 * 3 + 4 * 3
    # the bit mask wins below s = 1 - 1/c, the indices above (row pointers apart)
    for s, wins in ((0.5, True), (0.9, False)):
        wide = torch.rand(4, 4000, generator=torch.Generator().manual_seed(0)) > s
        found = storage(wide, bits=32, index_bits=5)
        assert (found.bitmask < found.csr) is wins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s", [0.0, 0.3, 0.75, 0.97])
def test_a_packed_model_has_the_bytes_of_the_formula(s: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 21)).to(
        dtype
    )
    hook = GradualMagnitude(s, updates=1, frequency=1).attach(model)
    hook(1, model)
    expected = model_storage(model)
    masks = {name: masked.to_matrix(masked.mask).clone() for name, masked in find_masks(model).items()}
    packed = hook.export()
    assert packed == ([] if s == 0 else ["0", "3"])
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(tensor.nbytes for tensor in tensors if tensor.dtype != torch.int64) == expected.bitmask
    for name, layer in (("0.weight", model[0]), ("3.weight", model[3])):
        if s:
            formula = storage(masks[name], 8 * dtype.itemsize).bitmask
            assert layer.nbytes == formula + layer.bias.nbytes
            base = getattr(layer, "base", layer)
            assert torch.equal(base.nonzero_mask(), masks[name])


def test_dense_models_and_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    found = model_storage(model)
    assert found.nonzeros == 36 + 4 + 8
    assert found.dense == found.bitmask == found.csr == found.smallest == 4 * (48 + 8)


@few
@given(st.integers(0, 10**6))
def test_sparsity_for_meets_the_number_of_parameters(seed) -> None:
    model = layers(a=(7, 13), b=(5, 7))
    model["norm"] = nn.LayerNorm(5)
    nonzeros = 11 + seed % (7 * 13 + 35)
    s = sparsity_for(model, nonzeros)
    hook = GradualMagnitude(s, updates=1, frequency=1).attach(model)
    hook(1, model)
    assert abs(model_storage(model).nonzeros - nonzeros) <= 1  # one rounding a layer


def test_a_number_of_parameters_out_of_reach_is_refused() -> None:
    model = nn.Linear(8, 8)
    for nonzeros in (8, 73):
        with pytest.raises(OptionError, match="has 72 parameters, 8 of them outside .* use 9 to 72"):
            sparsity_for(model, nonzeros)
    assert sparsity_for(model, 72) == 0.0


# ---- whole models


@pytest.mark.parametrize("layout", ["gpt2", "llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("structure", ["unstructured", "2:4", "4x2"])
def test_language_models_prune_export_save_and_load(layout, structure, tmp_path, request) -> None:
    model = request.getfixturevalue(f"tiny_{layout}")()
    ids = torch.randint(3, 256, (16, 12), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(steps=4, lr=1e-3)
    hook = GradualMagnitude(0.5, frequency=1, updates=3, structure=structure).attach(model, recipe)
    train(
        model,
        batches(ids, batch_size=4),
        lambda model, batch: model(batch[0], labels=batch[0]).loss,
        recipe,
        after_step=[hook],
        progress=False,
    )
    for masked in find_masks(model).values():
        matrix = masked.to_matrix(masked.mask)
        assert int(matrix.sum()) == matrix.numel() // 2
        if structure == "2:4":
            assert (matrix.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
    names = hook.export()
    assert names
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        again = load(save(model, tmp_path / "pruned"))
        assert torch.allclose(again(ids).logits, expected, atol=1e-5)
    pattern = structure if ":" in structure else "unstructured"
    assert all(again.get_submodule(name).pattern == pattern for name in names)


def test_an_lstm_is_pruned_in_all_four_gate_matrices() -> None:
    from refimpl.lab.measure.bits import language_model_loss
    from refimpl.lab.models.lstm import LSTMLanguageModel

    torch.manual_seed(0)
    model = LSTMLanguageModel(embedding=8, hidden=12)
    ids = torch.randint(0, 256, (32, 9))
    recipe = Recipe(steps=6, lr=0.01)
    hook = GradualMagnitude(0.75, frequency=1, updates=4).attach(model, recipe)
    assert list(find_masks(model)) == ["embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"]
    train(model, batches(ids, batch_size=8), language_model_loss, recipe, after_step=[hook], progress=False)
    expected = model(ids)
    assert hook.export() == ["head"]  # the others have no packed form: they keep their zeros
    assert torch.allclose(model(ids), expected, atol=1e-6)
    assert int((model.lstm.weight_hh_l0 != 0).sum()) == 12 * 48 // 4


def test_the_trainer_of_transformers_takes_the_hook_in_a_callback(tiny_llama: Factory, tmp_path: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = tiny_llama()
    ids = torch.randint(3, 256, (32, 8))
    hook = GradualMagnitude(0.5, start=2, frequency=1, updates=3, targets="layers").attach(model)

    class Prune(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **rest):
            hook(state.global_step, model)

    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows, callbacks=[Prune()]).train()
    assert [update.step for update in hook.updates] == [2, 3, 4, 5]
    assert len(hook.export()) == 14


PROCESSES = """
import sys, torch
import torch.distributed as dist
from torch import nn
from refimpl.core.errors import OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.masks import find_masks, mask_weights
from refimpl.pruning import GradualMagnitude
dist.init_process_group("gloo")
torch.manual_seed(0)
x = torch.randn(64, 8)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
recipe = Recipe(steps=12, lr=0.05, weight_decay=0.01)
hook = GradualMagnitude(0.75, start=2, frequency=2, updates=3).attach(model, recipe)
loss = lambda model, batch: (model(batch[0]) - batch[0][:, :1]).square().mean()
train(model, batches(x, batch_size=8), loss, recipe, after_step=[hook], progress=False)
assert hook.updates[-1].live == 36
for name, tensor in model.state_dict().items():
    other = tensor.clone()
    dist.broadcast(other, 0)
    assert torch.equal(other, tensor), name
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sharded = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
try:
    mask_weights(sharded)
except OptionError as error:
    assert "'0.weight' is sharded" in str(error)
else:
    raise AssertionError("a shard must be refused")
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write("done")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_keep_the_same_masks_and_shards_are_refused(tmp_path: Path) -> None:
    script, done = tmp_path / "script.py", tmp_path / "done"
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    result = subprocess.run(
        [*command, str(script), str(done)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0 and done.read_text() == "done", result.stderr[-3000:]


@pytest.mark.parametrize("structure", ["unstructured", "2x2"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_no_layer_is_emptied(scope: str, structure: str) -> None:
    """Magnitudes a thousand times smaller, or 8 weights at a sparsity of 99 %: the best of them stays."""
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 40), nn.Linear(40, 40))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    best = model[0].weight.detach().abs().argmax()
    hook = GradualMagnitude(0.99, updates=1, frequency=1, scope=scope, structure=structure).attach(model)
    hook(1, model)
    masks = [masked.mask for masked in find_masks(model).values()]
    assert all(mask.any() for mask in masks)
    if structure == "unstructured":
        assert masks[0].flatten()[best] and masks[0].sum() == 1
        assert magnitude_mask(torch.ones(3, 3), 0.99).sum() == 1
