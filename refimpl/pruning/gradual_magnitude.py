"""Gradual magnitude pruning: remove the smallest weights during training, many at first, fewer and fewer later.

Source: Zhu and Gupta, 2017, "To prune, or not to prune", arXiv 1710.01878, section 3 and its equation 1.

One sparsity s_t for all layers follows a cubic curve from s_i at step t_0 to s_f at step t_0 + n dt:

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3        for t in {t_0, t_0 + dt, ..., t_0 + n dt}    (equation 1)

Every dt steps the mask M of a layer is set to its weights of largest magnitude; between updates, training goes on with
M * W (`refimpl.core.train.masks`). No threshold and nothing else is tuned per layer. The claim: at an equal number of
non-zero weights a large network pruned this way beats a small dense one.

The steps: 1. attach masks to the layers (`GradualMagnitude.attach`); 2. `sparsity_at`; 3. `magnitude_mask`; 4. train with
M * W and repeat 2 and 3 every dt steps (`MaskUpdates`); 5. store M * W (`MaskUpdates.export`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.core.arguments import Checked, checked
from refimpl.core.device import read, read_all
from refimpl.core.errors import OptionError, nearest
from refimpl.core.layers import parse_pattern
from refimpl.core.stored import stored_dtypes
from refimpl.core.train.loop import Recipe
from refimpl.core.train.masks import MaskedWeight, bake, find_masks, mask_weights, pack, stored_weight, weight_matrices

POOLINGS = ("avg", "max")
SCOPES = ("layer", "global")
RANKINGS = ("magnitude", "random")


def sparsity_at(
    t: int, s_f: float, s_i: float = 0.0, t_0: int = 0, n: int = 1, dt: int = 1, exponent: float = 3.0
) -> float:
    """Step 2, equation 1: the fraction of zeros at step t.

    Args:
        t: updates of the weights done so far.
        s_f, s_i: final and initial sparsity.
        t_0: step at which the curve leaves s_i; s_i before.
        n, dt: number of mask updates after t_0, and steps between them; s_f from ``t_0 + n * dt`` on.
        exponent: 3 in the paper; 1 removes the same number each time.

    Example:
        >>> [round(sparsity_at(t, s_f=0.9, n=10, dt=100), 4) for t in (0, 100, 500, 1000, 2000)]
        [0.0, 0.2439, 0.7875, 0.9, 0.9]
    """
    progress = (t - t_0) / (n * dt)
    if progress <= 0:
        return s_i
    # d s_t / dt falls to 0 at the end: most weights go while many redundant ones are left, few when each one counts
    return s_f + (s_i - s_f) * max(0.0, 1 - progress) ** exponent


def keep_largest(scores: Tensor, k: int) -> Tensor:
    """Step 3: the mask of exactly the k largest scores; among equal scores the first ones are kept.

    Args:
        scores: any shape.
        k: how many to keep.

    Returns:
        bool, the shape of `scores`.

    Example:
        >>> keep_largest(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2).tolist()
        [False, True, True, False]
    """
    flat = scores.flatten()
    # a sort, not a threshold: with equal scores "at least the k-th largest" would keep more than k
    order = flat.sort(descending=True, stable=True).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, order[:k], True)
    return mask.view_as(scores)


def number_kept(n: int, s: float) -> int:
    """How many of n weights stay at sparsity s: ``round(n (1 - s))``, and at least one: an empty layer passes nothing on.

    Example:
        >>> number_kept(10, 0.75), number_kept(10, 0.99)
        (2, 1)
    """
    return max(1, round(n * (1 - s)))


def magnitude_mask(W: Tensor, s: float, structure: str = "unstructured", pooling: str = "avg") -> Tensor:
    """Step 3: the weights of one layer that stay at sparsity s.

    With N weights, ``round(N (1 - s))`` stay (a half goes to the even side); with blocks, that share of the blocks;
    with n:m, ``round(m (1 - s))`` of every m inputs, so that s = 1 - n/m keeps n. At least one stays of each.

    Args:
        W: stored weights, [out, in] unless unstructured. Not the product M * W, in which a masked weight is 0 and
            could never come back.
        s: fraction of zeros.
        structure: "unstructured"; "n:m" (m is 4 or 8); or blocks "hxw" of h outputs and w inputs, those at the edges
            being smaller where the size does not divide.
        pooling: the score of a block, "avg" or "max" of its magnitudes.

    Returns:
        bool, the shape of W.

    Raises:
        OptionError: unknown structure or pooling, a W that is no matrix, or a width that m does not divide.

    Example:
        >>> W = torch.tensor([[0.1, -4.0, 3.0, 0.2], [0.3, 0.1, 0.1, -9.0]])
        >>> magnitude_mask(W, 0.5).tolist()
        [[False, True, True, False], [True, False, False, True]]
        >>> magnitude_mask(W, 0.5, "2x2").tolist()   # means 1.125 and 3.075
        [[False, False, True, True], [False, False, True, True]]
    """
    return _structured(W.abs().float(), s, structure, pooling)


def _structured(scores: Tensor, s: float, structure: str, pooling: str) -> Tensor:
    kind, a, b = parse_structure(structure)
    if kind == "unstructured":
        return keep_largest(scores, number_kept(scores.numel(), s))
    if scores.dim() != 2:
        raise OptionError(f"W has shape {list(scores.shape)}: structure={structure!r} needs a matrix [out, in]")
    if kind == "block":
        # the share s of zeros is counted in blocks, so a layer with partial blocks at its edges has slightly more or less
        pooled = _pool(scores, (a, b), pooling)
        return _spread(keep_largest(pooled, number_kept(pooled.numel(), s)), (a, b), scores.shape)
    if scores.shape[1] % b:
        raise OptionError(f"structure={structure!r} needs inputs in groups of {b}, but W has {scores.shape[1]}")
    runs = scores.unflatten(1, (-1, b))  # [out, in / m, m]: each run of m neighbouring inputs is ranked by itself
    order = runs.sort(dim=-1, descending=True, stable=True).indices[..., : number_kept(b, s)]
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order, True).flatten(1)


def parse_structure(structure: str) -> tuple[str, int, int]:
    """``"4x1"`` to ``("block", 4, 1)``, ``"2:4"`` to ``("n:m", 2, 4)``.

    Raises:
        OptionError: neither, nor "unstructured".

    Example:
        >>> parse_structure("unstructured")
        ('unstructured', 1, 1)
    """
    block = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", structure)
    if block:
        return "block", int(block[1]), int(block[2])
    if structure == "unstructured":
        return structure, 1, 1
    if ":" in structure:
        return "n:m", *cast("tuple[int, int]", parse_pattern(structure))
    raise OptionError(f"structure={structure!r}: use 'unstructured', blocks as '4x1', or n of every m inputs as '2:4'")


def _pool(scores: Tensor, block: tuple[int, int], pooling: str) -> Tensor:
    """One score per block, [ceil(out / h), ceil(in / w)]; blocks at the edges pool only the weights they hold."""
    if pooling not in POOLINGS:
        raise OptionError(f"pooling={pooling!r}: use {nearest(pooling, POOLINGS)}")
    image = scores[None, None]
    if pooling == "max":
        return F.max_pool2d(image, block, ceil_mode=True)[0, 0]
    return F.avg_pool2d(image, block, ceil_mode=True, count_include_pad=False)[0, 0]


def _spread(mask: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The mask of weights [out, in] from the mask of their blocks."""
    rows, columns = shape
    whole = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[:rows, :columns]


@dataclass(frozen=True)
class Update:
    """One update of the masks.

    Attributes:
        step: number of weight updates done before it.
        sparsity: s_t as scheduled for layers without an override.
        live: weights kept, over all masked layers.
        removed, revived: weights that this update masked, and unmasked.
    """

    step: int
    sparsity: float
    live: int
    removed: int
    revived: int


@dataclass(frozen=True)
class GradualMagnitude(Checked):
    """Prune while training, on the paper's schedule.

    Args:
        final_sparsity: s_f, fraction of zeros in every masked layer at the end.
        initial_sparsity: s_i, at step `start`; 0 in the paper's runs.
        start: t_0, the updates of the weights before the schedule begins.
        frequency: dt, steps between two updates of the masks; the paper finds anything from 100 to 1000 equally good.
        updates: n, the number of mask updates after the first; the last is at ``start + updates * frequency`` and should
            leave a quarter of the run or more to recover. One update is one-shot pruning.
        exponent: 3 is the paper's curve, 1 a straight line.
        structure: "unstructured", "n:m", or blocks "hxw" (see `magnitude_mask`). "n:m" needs a final sparsity of
            1 - n/m.
        pooling: of a block, "avg" or "max".
        scope: "layer", the paper's: every layer has sparsity s_t; "global" ranks the weights of all layers together.
        ranking: "magnitude"; "random" is the control: it ranks weights at random, by the same ranking at every update.
        targets: a regular expression searched for in weight names; None masks all matrices and kernels, embeddings
            included.
        overrides: final sparsity by regular expression on the weight's name, the first that matches; 0.0 keeps a layer
            dense. With scope "global" these layers take no part in the common ranking.
        seed: of the random ranking.

    A masked weight gets no gradient, but momentum and weight decay would still move it. Here it keeps exactly the
    value it had when it was masked, and has that value if a later update unmasks it. Biases and live weights are updated
    as usual. During training each mask costs one byte per weight and a copy of the weight.

    Masks, kept values and counts are buffers of the model: checkpoints of `refimpl.core.train.loop.train` hold them. Do not
    use ``keep_best`` with it: the best loss may be that of a model not yet pruned.

    Raises:
        OptionError: a value outside its range, or values that contradict one another.

    Example:
        >>> from refimpl.core.train.loop import Recipe, batches, train
        >>> _ = torch.manual_seed(0)
        >>> x, model = torch.randn(64, 8), nn.Sequential(nn.Linear(8, 1))
        >>> recipe = Recipe(steps=100, lr=0.05)
        >>> hook = GradualMagnitude(0.75, start=10, frequency=10, updates=5).attach(model, recipe)
        >>> mse = lambda model, batch: (model(batch[0]) - batch[0][:, :2].sum(1, keepdim=True)).square().mean()
        >>> history = train(model, batches(x, batch_size=16), mse, recipe, after_step=[hook], progress=False)
        >>> [update.live for update in hook.updates], history.losses[-1] < 1e-3   # it keeps the two that matter
        ([8, 5, 3, 2, 2, 2], True)
        >>> hook.export(), model[0]
        (['0'], PackedLinear(8 -> 1, unstructured sparse))

    In a loop of your own, call the hook after the optimiser, with the number of updates done; with the Trainer of
    transformers, from a callback::

        optimizer.step()
        hook(step, model)                   # step counts optimiser steps from 1, not micro-batches

        class Prune(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **rest):
                hook(state.global_step, model)
    """

    final_sparsity: float = 0.9
    initial_sparsity: float = 0.0
    start: int = 0
    frequency: int = 100
    updates: int = 10
    exponent: float = 3.0
    structure: str = "unstructured"
    pooling: str = "avg"
    scope: str = "layer"
    ranking: str = "magnitude"
    targets: str | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("pooling", POOLINGS), ("scope", SCOPES), ("ranking", RANKINGS)):
            value = getattr(self, name)
            if value not in known:
                raise OptionError(f"{name}={value!r}: use {nearest(str(value), known)}")
        if not 0 <= self.final_sparsity < 1:
            raise OptionError(f"final_sparsity={self.final_sparsity}: use a fraction of zeros from 0 to below 1")
        if not 0 <= self.initial_sparsity <= self.final_sparsity:
            raise OptionError(
                f"initial_sparsity={self.initial_sparsity}: use 0 to final_sparsity={self.final_sparsity}"
            )
        for name, least in (("start", 0), ("frequency", 1), ("updates", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name}={value!r}: use a whole number of steps, {least} or more")
        if not self.exponent > 0:
            raise OptionError(f"exponent={self.exponent}: use a positive number; 3 is the paper's, 1 is linear")
        kind, n, m = parse_structure(self.structure)
        for pattern, sparsity in self.overrides.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(f"overrides[{pattern!r}]: the key is not a regular expression: {error}") from error
            if not 0 <= sparsity < 1:
                raise OptionError(f"overrides[{pattern!r}]={sparsity}: use a fraction from 0 to below 1")
            if kind == "n:m" and sparsity not in (0.0, self.final_sparsity):
                raise OptionError(
                    f"overrides[{pattern!r}]={sparsity}: with structure={self.structure!r} only 0.0 (dense) is possible"
                )
        if kind == "n:m":
            if abs(self.final_sparsity - (1 - n / m)) > 1e-9:
                raise OptionError(
                    f"final_sparsity={self.final_sparsity}: structure={self.structure!r} means {1 - n / m:g}"
                )
            if self.scope == "global":
                raise OptionError(f"scope='global': with structure={self.structure!r} every group keeps {n} of {m}")

    @property
    def last_step(self) -> int:
        """Step of the last update of the masks, t_0 + n dt."""
        return self.start + self.updates * self.frequency

    def sparsity_at(self, t: int, final_sparsity: float | None = None) -> float:
        """s_t; `final_sparsity` is the s_f of a layer with an override."""
        s_f = self.final_sparsity if final_sparsity is None else final_sparsity
        s_i = min(self.initial_sparsity, s_f)  # an override below s_i: such a layer starts at its own s_f
        return sparsity_at(t, s_f, s_i, self.start, self.updates, self.frequency, self.exponent)

    @checked()
    def attach(self, model: nn.Module, recipe: Recipe | None = None) -> MaskUpdates:
        """Put masks on `model`, in place, and return the hook for ``train(..., after_step=[hook])``.

        Args:
            model: not masked yet. It may be moved and wrapped afterwards.
            recipe: of the training to come; without it there is no check that the schedule ends before the training does.

        Raises:
            OptionError: the schedule ends after the training, an override or `targets` matches nothing, or a layer does
                not fit the structure; the model is not changed then.

        Example:
            >>> GradualMagnitude(start=50, updates=10).attach(nn.Linear(4, 4), Recipe(steps=1000))
            Traceback (most recent call last):
            ...
            refimpl.core.errors.OptionError: the last mask update comes at step 1050 = start + updates * frequency, \
but recipe.steps=1000; lower updates to 9, or train longer
        """
        if recipe is not None and self.last_step > recipe.steps:
            room = (recipe.steps - self.start) // self.frequency
            remedy = f"lower updates to {room}" if room > 0 else "start earlier or update more often"
            raise OptionError(
                f"the last mask update comes at step {self.last_step} = start + updates * frequency, but "
                f"recipe.steps={recipe.steps}; {remedy}, or train longer"
            )
        masks = mask_weights(model, self.targets)
        try:
            finals = self._final_sparsities(masks)
        except OptionError:
            bake(model)
            raise
        return MaskUpdates(self, model, finals)

    def _final_sparsities(self, masks: Mapping[str, MaskedWeight]) -> dict[str, float | None]:
        """The overridden final sparsity of each layer, or None."""
        used = set()
        finals: dict[str, float | None] = {}
        kind, _, m = parse_structure(self.structure)
        for name, masked in masks.items():
            finals[name] = None
            for pattern, sparsity in self.overrides.items():
                if re.search(pattern, name):
                    finals[name] = sparsity
                    used.add(pattern)
                    break
            width = masked.to_matrix(masked.mask).shape[1]
            if kind == "n:m" and finals[name] != 0.0 and width % m:
                raise OptionError(
                    f"structure={self.structure!r} needs inputs in groups of {m}, but {name!r} has {width}; keep it "
                    f"dense with overrides={{{name!r}: 0.0}}, or leave it out with targets="
                )
        for pattern in self.overrides:
            if pattern not in used:
                raise OptionError(
                    f"overrides[{pattern!r}] decides for no weight; names look like {next(iter(masks))!r}, and the "
                    "first pattern that matches counts"
                )
        return finals


class MaskUpdates:
    """The hook that `GradualMagnitude.attach` returns: call it as ``hook(step, model)`` after every optimiser step.

    Attributes:
        method: the options.
        model: the model it was attached to.

    Example:
        >>> hook = GradualMagnitude(0.5, updates=1, frequency=1).attach(nn.Linear(4, 2))
        >>> hook(1, hook.model)
        >>> hook.updates[-1].live
        4
    """

    def __init__(self, method: GradualMagnitude, model: nn.Module, finals: Mapping[str, float | None]) -> None:
        self.method, self.model, self._finals = method, model, dict(finals)
        for name, masked in self._masks():
            kept = stored_weight(model, name).detach().clone()
            masked.register_buffer("kept", kept)
            # counts of live, removed and revived weights at each update; -1 before the update
            log = torch.full((method.updates + 1, 3), -1, dtype=torch.int64, device=kept.device)
            masked.register_buffer("log", log)
        if method.start == 0:  # t_0 = 0: the first mask, of sparsity s_i, is due before the first weight update
            self._update(0)

    def __call__(self, step: int, model: nn.Module) -> None:
        method = self.method
        if not any(module is self.model for module in model.modules()):
            raise OptionError("model: the hook was attached to another model; attach it to the model that is trained")
        if step < method.start:
            return
        self._hold()
        # step 4: the masks change at t_0, t_0 + dt, ..., t_0 + n dt and are held in between and afterwards
        index, rest = divmod(step - method.start, method.frequency)
        if rest == 0 and index <= method.updates:
            self._update(index)

    def _masks(self) -> list[tuple[str, MaskedWeight]]:
        return list(find_masks(self.model).items())

    @torch.no_grad()
    def _hold(self) -> None:
        """Undo what momentum and weight decay did to masked weights: they get back the values they were masked with."""
        for name, masked in self._masks():
            W = stored_weight(self.model, name)
            W.copy_(torch.where(masked.mask, W, cast(Tensor, masked.kept)))

    @torch.no_grad()
    def _update(self, index: int) -> None:
        """Step 3 for all layers."""
        masks = dict(self._masks())
        for name, mask in self._chosen(masks, self.method.start + index * self.method.frequency).items():
            masked = masks[name]
            counts = (mask, masked.mask & ~mask, mask & ~masked.mask)  # live, removed, revived
            cast(Tensor, masked.log)[index].copy_(torch.stack([count.sum() for count in counts]))
            masked.mask.copy_(mask)
            cast(Tensor, masked.kept).copy_(stored_weight(self.model, name))

    def _chosen(self, masks: Mapping[str, MaskedWeight], step: int) -> dict[str, Tensor]:
        method = self.method
        chosen: dict[str, Tensor] = {}
        together: dict[str, tuple[MaskedWeight, Tensor]] = {}
        for place, (name, masked) in enumerate(masks.items()):
            scores = self._scores(masked, stored_weight(self.model, name), place)
            final = self._finals[name]
            if method.scope == "global" and final is None:
                together[name] = (masked, scores)
            elif final == 0.0:
                chosen[name] = torch.ones_like(masked.mask)
            else:
                # the paper's scope: the same s_t in every layer, each with a threshold of its own
                s = method.sparsity_at(step, final)
                chosen[name] = masked.from_matrix(_structured(scores, s, method.structure, method.pooling))
        return chosen | self._ranked_together(together, method.sparsity_at(step))

    def _scores(self, masked: MaskedWeight, W: Tensor, place: int) -> Tensor:
        """Scores [out, in]; the highest are kept. W is the stored weight, so a masked one can be revived."""
        matrix = masked.to_matrix(W.detach())
        if self.method.ranking == "magnitude":
            return matrix.abs().float()
        # seeded per layer and not per update: the masks are nested, so a random mask never revives a weight
        generator = torch.Generator("cpu").manual_seed(1_000_003 * self.method.seed + place)
        return torch.rand(matrix.shape, generator=generator, device="cpu").to(matrix.device)

    def _ranked_together(self, layers: Mapping[str, tuple[MaskedWeight, Tensor]], s: float) -> dict[str, Tensor]:
        """Masks with one threshold for all `layers`, so that their sparsities differ and only the total is s."""
        if not layers:
            return {}
        _, h, w = parse_structure(self.method.structure)
        pooled = {name: _pool(scores, (h, w), self.method.pooling) for name, (_, scores) in layers.items()}
        for scores in pooled.values():  # the best of each layer stays, so that no layer cuts the network in two
            scores.view(-1)[scores.argmax()] = math.inf
        ranked = torch.cat([scores.flatten() for scores in pooled.values()])
        keep = keep_largest(ranked, max(len(pooled), number_kept(ranked.numel(), s)))
        parts = keep.split([scores.numel() for scores in pooled.values()])
        masks = {}
        for (name, (masked, scores)), part in zip(layers.items(), parts, strict=True):
            blocks = part.view_as(pooled[name])
            masks[name] = masked.from_matrix(_spread(blocks, (h, w), scores.shape))
        return masks

    @property
    def updates(self) -> list[Update]:
        """The updates done so far, including those before an interruption."""
        logs = torch.stack([cast(Tensor, masked.log) for _, masked in self._masks()]).sum(0)
        counts = [int(count) for count in read_all(logs.flatten())]
        found = []
        for index in range(self.method.updates + 1):
            live, removed, revived = counts[3 * index : 3 * index + 3]
            if live >= 0:
                step = self.method.start + index * self.method.frequency
                found.append(Update(step, self.method.sparsity_at(step), live, removed, revived))
        return found

    def export(self) -> list[str]:
        """Step 5: replace the masked layers by packed ones that store M * W; see `refimpl.core.train.masks.pack`.

        Returns:
            Names of the packed layers. Save the model with `refimpl.save`.

        Raises:
            OptionError: the last update of the masks has not been done yet.
        """
        done = self.updates
        if not done or done[-1].step < self.method.last_step:
            reached = f"step {done[-1].step}" if done else "none"
            raise OptionError(
                f"the last mask update, of step {self.method.last_step}, has not been done yet (last: {reached}); train on, "
                "or export earlier masks with refimpl.core.train.masks.pack"
            )
        kind = parse_structure(self.method.structure)[0]
        return pack(self.model, self.method.structure if kind == "n:m" else "unstructured")


# -- storage --


@dataclass(frozen=True)
class Storage:
    """Non-zero weights, and bytes in three formats.

    Attributes:
        nonzeros: weights that are live; of a whole model, with all its other parameters.
        dense: zeros stored as well.
        bitmask: one bit for each weight, rows padded to whole bytes, and the live values; what `pack` writes.
        csr: the live values, each with the gap to the one before it in its row, and the start of each row.
    """

    nonzeros: int
    dense: int
    bitmask: int
    csr: int

    def __add__(self, other: Storage) -> Storage:
        return Storage(
            self.nonzeros + other.nonzeros, self.dense + other.dense, self.bitmask + other.bitmask, self.csr + other.csr
        )

    @property
    def smallest(self) -> int:
        """Bytes in the best of the three formats."""
        return min(self.dense, self.bitmask, self.csr)


def storage(mask: Tensor, bits: int = 32, index_bits: int | None = None) -> Storage:
    """The cost model of section 2: bytes of one sparse matrix.

    A gap of c bits counts up to 2^c - 1 zeros; a longer run needs stored zeros in between ("padding"), each of which
    covers 2^c places and costs as much as a weight. They are counted from the mask, not estimated. The start of a row
    takes 16 bits if that is enough to count the entries, otherwise 32.

    Args:
        mask: bool [out, in], True where live.
        bits: of one value.
        index_bits: c; None chooses the best of 1 to 16.

    Example:
        >>> mask = torch.zeros(1, 64, dtype=torch.bool)
        >>> mask[0, 40] = True                 # 40 zeros before it: with 4 bits, 2 padding zeros
        >>> storage(mask, bits=16, index_bits=4)   # csr: 3 entries of 20 bits, 2 row pointers of 16
        Storage(nonzeros=1, dense=128, bitmask=10, csr=12)
    """
    rows, columns = mask.shape
    row, column = mask.nonzero().unbind(1)
    live = len(column)
    before = torch.full_like(column, -1)  # column of the live weight before it in its row
    if live:
        same = row[1:] == row[:-1]
        before[1:] = torch.where(same, column[:-1], before[1:])
    zeros = column - before - 1  # the gap: zeros between a live weight and the one before it in its row
    widths = range(1, 17) if index_bits is None else (index_bits,)
    # a run of z zeros needs floor(z / 2^c) padding zeros
    entries = {c: live + int(read((zeros >> c).sum())) for c in widths}
    # bytes, rounded up, of b + c bits an entry: short gaps favour a small c, long gaps a large one
    sizes = {c: -(-count * (bits + c) // 8) for c, count in entries.items()}
    best = min(sizes, key=sizes.__getitem__)
    pointer = 2 if entries[best] < 2**16 else 4
    return Storage(
        nonzeros=live,
        dense=-(-mask.numel() * bits // 8),
        bitmask=rows * -(-columns // 8) + -(-live * bits // 8),
        csr=sizes[best] + pointer * (rows + 1),
    )


def model_storage(model: nn.Module) -> Storage:
    """Storage of a whole model, masked or not, in the dtypes it has now.

    Layers without a mask, biases, norms and their running statistics are stored dense in every format, and so is a
    layer whose mask is all ones. Running statistics count as bytes but not as parameters.

    Example:
        >>> model = nn.Linear(64, 64)
        >>> model_storage(model).nonzeros, model_storage(model).bitmask
        (4160, 16640)
        >>> hook = GradualMagnitude(0.9, updates=1, frequency=1).attach(model)
        >>> hook(1, model)
        >>> model_storage(model).nonzeros, model_storage(model).bitmask
        (474, 2408)
    """
    total = Storage(0, 0, 0, 0)
    masked = find_masks(model)
    weights = {id(stored_weight(model, name)): masks for name, masks in masked.items()}
    kinds = stored_dtypes(model)
    for name, parameter in model.named_parameters():
        itemsize = kinds[name].itemsize
        found = weights.get(id(parameter))
        matrix = None if found is None else found.to_matrix(found.mask)
        if matrix is None or read(matrix.all()):
            total += Storage(parameter.numel(), *3 * (parameter.numel() * itemsize,))
        else:
            total += storage(matrix, 8 * itemsize)
    ours = {id(buffer) for masks in masked.values() for buffer in masks.buffers()}
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and id(buffer) not in ours:
            total += Storage(0, *3 * (buffer.numel() * kinds.get(name, buffer.dtype).itemsize,))
    return total


def sparsity_for(model: nn.Module, nonzeros: int, targets: str | None = None) -> float:
    """The sparsity of the masked layers at which a whole model keeps `nonzeros` parameters.

    Args:
        model: not masked.
        nonzeros: parameters to keep, including biases, norms and all others that are not masked.
        targets: as in `GradualMagnitude`.

    Raises:
        OptionError: more than the model has, or fewer than it has outside the masked layers.

    Example:
        >>> sparsity_for(nn.Linear(64, 64), 64 + 1024)
        0.75
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(weight.numel() for weight in weight_matrices(model, targets).values())
    if not total - prunable < nonzeros <= total:
        raise OptionError(
            f"nonzeros={nonzeros}: the model has {total} parameters, {total - prunable} of them outside the masked "
            f"layers; use {total - prunable + 1} to {total}"
        )
    return (total - nonzeros) / prunable
