"""MatryoshkaKV: each head keeps the first columns of its keys and values in an orthogonal basis trained to be nested.

Source: Lin et al., 2024, arXiv 2410.14731 (ICLR 2025); algorithm 1 and the authors' code.

Per layer, head and K or V there is a mean mu and an orthogonal basis Q [d, d]. The cache holds ``(k - mu) Q[:, :r]``
instead of the rotated key k; a query is projected too, ``q Q[:, :r]``, so keys are never rebuilt. Values come back as
``(sum of p v~) Q[:, :r]^T + mu``, which the output matrix can take over (`fold`). With PCA bases this is good while the
rank is high; training the bases end to end, with ranks drawn anew for every head in every step, orders their columns by
their worth to the model's answer.

Differences from the authors' code. One basis per key-value head (the authors keep one per query head, which gives up what grouped
queries save). Column signs are chosen so that Cayley's inverse is well conditioned (`fix_signs`); mending a negative
determinant is not enough. The mean of the keys adds the same number to all scores of a query: it cannot change the
softmax and is not trained, but centred keys round less in 16 bits. Teacher and student are one model: bases of full
rank change nothing, so the teacher is a pass without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from refimpl.core.arguments import checked
from refimpl.core.cache import (
    ByContent,
    KVLayer,
    LayerShape,
    Policy,
    TailLayer,
    cache_argument,
    check_rank,
    full_attention_layers,
    tapped,
)
from refimpl.core.device import read, read_all
from refimpl.core.errors import CalibrationError, OptionError, nearest
from refimpl.core.train.loop import History, Recipe, batches, train
from refimpl.kvcache.ragged import OUTPUTS, Bases, FoldedOutput, MatryoshkaLayer, Ranks, output_matrix, output_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Table = tuple[Ranks | None, ...]
"""Ranks of every layer of a model; None for a layer that is not compressed (a sliding window)."""


# -- Cayley --


def fix_signs(Q: Tensor) -> Tensor:
    """Flip columns so that I + Q is well conditioned; the projections ``Q[:, :r] Q[:, :r]^T`` stay what they are.

    Elimination on Q: a negative diagonal entry flips its column, then the outer product of column and row over
    ``1 + entry`` leaves the rest. All pivots of I + Q are then at least 1, and det Q = 1.

    Args:
        Q: orthogonal, [..., d, d].

    Example:
        >>> fix_signs(torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).tolist(), fix_signs(-torch.eye(1)).item()
        ([[0.0, 1.0], [-1.0, 0.0]], 1.0)
    """
    rest, Q = Q.double().clone(), Q.clone()
    for k in range(Q.shape[-1]):
        sign = torch.where(rest[..., k, k] < 0, -1.0, 1.0).unsqueeze(-1)
        rest[..., :, k] *= sign
        Q[..., :, k] *= sign.to(Q.dtype)
        column, row = rest[..., k + 1 :, k], rest[..., k, k + 1 :]
        rest[..., k + 1 :, k + 1 :] -= column.unsqueeze(-1) * row.unsqueeze(-2) / (1 + rest[..., k, k])[..., None, None]
    return Q


def cayley(X: Tensor) -> Tensor:
    """Q = (I - A/2)^-1 (I + A/2) with A = X - X^T: orthogonal for any X, with det Q = 1.

    Args:
        X: free, fp32 or fp64, [..., d, d]; 16 bits would lose the orthogonality and are computed in fp32.

    Returns:
        [..., d, d] in the dtype of ``X`` (fp32 for 16 bits).

    Example:
        >>> Q = cayley(torch.randn(3, 8, 8, dtype=torch.float64))
        >>> bool((Q.mT @ Q - torch.eye(8)).abs().max() < 1e-12)
        True
    """
    if X.dtype not in (torch.float32, torch.float64):
        X = X.float()
    half = (X - X.mT) / 2  # A / 2
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    with torch.autocast(X.device.type, enabled=False):
        Q = torch.linalg.solve(eye - half, eye + half)
        return Q @ (3 * eye - Q.mT @ Q) / 2  # one Newton step back to orthogonality: large A cost the solve some digits


def inverse_cayley(Q: Tensor) -> Tensor:
    """A free matrix X with ``cayley(X) == Q``, for a Q whose signs are right (`fix_signs`); solved in fp64.

    Args:
        Q: orthogonal, [..., d, d].

    Returns:
        The strictly lower triangle of ``2 (Q - I) (Q + I)^-1``, in the dtype of ``Q``.

    Example:
        >>> Q = fix_signs(torch.linalg.qr(torch.randn(8, 8)).Q)
        >>> bool((cayley(inverse_cayley(Q)) - Q).abs().max() < 1e-5)
        True
    """
    wide = Q.double()
    eye = torch.eye(Q.shape[-1], dtype=torch.float64, device=Q.device)
    return (2 * torch.linalg.solve(wide + eye, wide - eye, left=False)).tril(-1).to(Q.dtype)


# -- projected keys and values --


def truncate(x: Tensor, Q: Tensor, mu: Tensor, ranks: Tensor) -> Tensor:
    """Project on the first columns and come back, columns masked: ``((x - mu) Q * mask) Q^T + mu``.

    Attention with these keys and values is attention on the compressed cache, as all of it is linear in them.

    Args:
        x: keys or values, [B, H, n, d].
        Q, mu: [H, d, d], [H, d].
        ranks: int [H], or [B, H, 1, 1] for ranks of each row.

    Returns:
        In the dtype of ``x``; computed in that of ``Q``, whatever autocast says.

    Example:
        >>> x = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
        >>> truncate(x, torch.eye(2).unsqueeze(0), torch.zeros(1, 2), torch.tensor([1])).flatten().tolist()
        [3.0, 0.0]
    """
    mask = torch.arange(Q.shape[-1], device=Q.device) < ranks.view(-1, 1, 1)  # [H, 1, d]
    with torch.autocast(x.device.type, enabled=False):
        centre = mu.unsqueeze(1)
        return (((x.to(Q.dtype) - centre) @ Q * mask) @ Q.mT + centre).to(x.dtype)


def projected(model: PreTrainedModel, bases: Sequence[Bases | None], ranks: int | None | Table) -> Any:
    """A cache for one forward pass whose attention sees keys and values as a compressed cache gives them; nothing is stored.

    Quicker than a real cache where many tokens come at once: perplexity, and the search for ranks.

    Args:
        model: the model that will be called with it.
        bases: one per layer.
        ranks: as in `MatryoshkaKV`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> ids = torch.randint(50, (4, 12))
        >>> bases = pca(calibrate(model, ids))
        >>> exact, found = model(ids).logits, model(ids, **cache_argument(projected(model, bases, None))).logits
        >>> torch.allclose(exact, found, atol=1e-5)   # full rank
        True
    """
    table, held = rank_table(bases, ranks), {}

    def change(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        given, rank = _of_layer(bases, layer), table[layer]
        assert rank is not None
        if layer not in held:
            held[layer] = [torch.tensor(r, device=keys.device) for r in rank]
        device, (r_K, r_V) = keys.device, held[layer]
        return (
            truncate(keys, given.Q_K.to(device), given.mu_K.to(device), r_K),
            truncate(values, given.Q_V.to(device), given.mu_V.to(device), r_V),
        )

    return tapped(model, change)


def _of_layer(bases: Sequence[Bases | None], layer: int) -> Bases:
    found = bases[layer] if layer < len(bases) else None
    if found is None:
        raise OptionError(
            f"bases: there are none for layer {layer} (of {len(bases)}); call fit(model, tokens) with this model"
        )
    return found


def rank_table(bases: Sequence[Bases | None], ranks: int | None | Table) -> Table:
    """Ranks of every layer, head, K and V: an int stands for the same everywhere, None for full ranks.

    Raises:
        OptionError: a rank outside 1 to head dimension, or a table of another shape.

    Example:
        >>> eye = torch.eye(4).expand(2, 4, 4)
        >>> rank_table([Bases(eye, eye, eye[0], eye[0]), None], 3)
        (((3, 3), (3, 3)), None)
    """
    table: list[Ranks | None] = []
    if isinstance(ranks, tuple) and len(ranks) != len(bases):
        raise OptionError(f"ranks has {len(ranks)} layers, but there are bases for {len(bases)}")
    for layer, given in enumerate(bases):
        if given is None:
            table.append(None)
            continue
        heads, d = given.Q_K.shape[:2]
        row: Any = ranks[layer] if isinstance(ranks, tuple) else ((d if ranks is None else ranks,) * heads,) * 2
        if row is None or len(row) != 2 or any(len(side) != heads for side in row):
            raise OptionError(f"ranks[{layer}]={row!r}: give {heads} ranks for keys and {heads} for values")
        for side in row:
            for rank in side:
                if not 1 <= rank <= d:
                    raise OptionError(f"ranks={rank}: the heads of layer {layer} have {d} channels; use 1 to {d}")
        table.append((tuple(row[0]), tuple(row[1])))
    return tuple(table)


# -- bases without training --


@dataclass(frozen=True)
class Moments(ByContent):
    """Statistics of one layer that PCA needs: means fp64 [H, d] and covariances fp64 [H, d, d] of rotated keys and of values."""

    mean_K: Tensor
    cov_K: Tensor
    mean_V: Tensor
    cov_V: Tensor


@torch.no_grad()
def calibrate(model: PreTrainedModel, ids: Tensor, batch_size: int = 4) -> tuple[Moments | None, ...]:
    """Moments of every layer's keys and values, in one forward pass over the tokens.

    Args:
        model: a decoder of transformers.
        ids: int [n, T], rows without padding.
        batch_size: rows at a time.

    Returns:
        One entry per layer; None for layers with a sliding window, whose cache is bounded already.

    Raises:
        CalibrationError: no tokens, or activations that are not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> calibrate(model, torch.randint(50, (4, 12)))[0].cov_K.shape
        torch.Size([2, 8, 8])
    """
    if ids.dim() != 2 or ids.numel() == 0:
        raise CalibrationError(f"ids has shape {list(ids.shape)}; give at least one row of tokens, [n, T]")
    sums: dict[int, list[Tensor]] = {}

    def look(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for x in (keys, values):
            rows = x.double().transpose(0, 1).flatten(1, 2)  # [H, B n, d]
            found += [rows.sum(1), rows.mT @ rows]
        sums[layer] = [a + b for a, b in zip(sums[layer], found, strict=True)] if layer in sums else found
        return keys, values

    for batch in ids.split(batch_size):
        model.base_model(batch.to(model.device), **cache_argument(tapped(model, look)))
    layers: list[Moments | None] = [None] * len(DynamicCache(config=model.config).layers)
    for layer, (sum_K, square_K, sum_V, square_V) in sums.items():
        pairs = []
        for total, square in ((sum_K, square_K), (sum_V, square_V)):
            if read((~square.isfinite()).sum()):
                raise CalibrationError(f"keys or values of layer {layer} are not finite; look for NaN in the weights")
            mean = total / ids.numel()
            pairs += [mean, square / ids.numel() - mean.unsqueeze(-1) * mean.unsqueeze(-2)]
        layers[layer] = Moments(*pairs)
    return tuple(layers)


def pca(moments: Sequence[Moments | None]) -> tuple[Bases | None, ...]:
    """Principal components, signs fixed: the best bases for rebuilding keys and values of the calibration tokens.

    Args:
        moments: of `calibrate`.

    Example:
        >>> spread = torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64)).unsqueeze(0)
        >>> zero = torch.zeros(1, 2, dtype=torch.float64)
        >>> pca([Moments(zero, spread, zero, spread)])[0].Q_K.abs().tolist()   # the second channel comes first
        [[[0.0, 1.0], [1.0, 0.0]]]
    """

    def basis(cov: Tensor) -> Tensor:
        return fix_signs(torch.linalg.eigh(cov).eigenvectors.flip(-1)).float()

    return tuple(
        None if m is None else Bases(basis(m.cov_K), basis(m.cov_V), m.mean_K.float(), m.mean_V.float())
        for m in moments
    )


def random_orthogonal(moments: Sequence[Moments | None], seed: int = 0) -> tuple[Bases | None, ...]:
    """Random rotations, with the means of the calibration tokens: the control that any basis should beat.

    Args:
        moments: of `calibrate`.
        seed: of the rotations.

    Example:
        >>> zero, one = torch.zeros(1, 2), torch.eye(2).unsqueeze(0)
        >>> random_orthogonal([Moments(zero, one, zero, one)])[0].Q_K.shape
        torch.Size([1, 2, 2])
    """
    generator = torch.Generator().manual_seed(seed)

    def basis(cov: Tensor) -> Tensor:
        drawn = torch.linalg.qr(torch.randn(cov.shape, generator=generator, dtype=torch.float64)).Q
        return fix_signs(drawn).float().to(cov.device)

    return tuple(
        None if m is None else Bases(basis(m.cov_K), basis(m.cov_V), m.mean_K.float(), m.mean_V.float())
        for m in moments
    )


# -- training --


def sample_ranks(heads: int, d: int, levels: int = 8, device: torch.device | str = "cpu") -> Tensor:
    """Step 2: a rank for each head's keys and values, uniform among d / 8, 2 d / 8, ..., d and independent.

    Args:
        heads, d: of the layer.
        levels: number of ranks to draw from; at most d.
        device: of the result.

    Returns:
        int64 [2, heads]; from torch's default generator.

    Example:
        >>> sorted(set(sample_ranks(1000, 32).flatten().tolist()))
        [4, 8, 12, 16, 20, 24, 28, 32]
    """
    if not 1 <= levels <= d:
        raise OptionError(f"levels={levels}: the heads have {d} channels; use 1 to {d}")
    return torch.randint(1, levels + 1, (2, heads), device=device) * d // levels


class Projections(nn.Module):
    """Bases to train, around a model that stays as it is; its parameters are all that a checkpoint holds.

    Called with tokens [B, T], it gives the logits of the model as it is and those of the model with projected keys
    and values, [B, T, vocabulary] each.

    Args:
        model: a decoder of transformers, frozen.
        bases: the bases to start from, of `pca`.
        rank: train this one rank instead of drawing ranks in every step (an ablation of the paper).
        orthogonal: through Cayley; False trains the matrices themselves (an ablation of the paper).

    Attributes:
        X: per compressed layer, keys' and values' free matrices [2, H, d, d].
        mu_V: per compressed layer, [H, d].
    """

    def __init__(
        self, model: PreTrainedModel, bases: Sequence[Bases | None], rank: int | None = None, orthogonal: bool = True
    ) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a part of this module
        self.rank, self.orthogonal = rank, orthogonal
        self._start = tuple(bases)
        self._compressed = full_attention_layers(model)
        rank_table(bases, rank)
        X, mu = [], []
        for layer in self._compressed:
            given = _of_layer(bases, layer)
            Q = torch.stack([given.Q_K, given.Q_V]).to(model.device, torch.float32)
            X.append(nn.Parameter(inverse_cayley(fix_signs(Q)) if orthogonal else Q.clone()))
            mu.append(nn.Parameter(given.mu_V.to(model.device, torch.float32).clone()))
        self.X, self.mu_V = nn.ParameterList(X), nn.ParameterList(mu)

    def bases(self) -> tuple[Bases | None, ...]:
        """The bases as they are now, one per layer of the model."""
        found: list[Bases | None] = [None] * len(self._start)
        for layer, X, mu_V in zip(self._compressed, self.X, self.mu_V, strict=True):
            Q_K, Q_V = cayley(X) if self.orthogonal else X
            mu = mu_V if torch.is_grad_enabled() else mu_V.detach()
            found[layer] = Bases(Q_K, Q_V, _of_layer(self._start, layer).mu_K.to(X), mu)
        return tuple(found)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        (model,) = self._model
        # the teacher is the same model: with all columns, the projection is the identity
        with torch.no_grad():
            teacher = model(ids, use_cache=False).logits
        bases = self.bases()

        def change(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            b = _of_layer(bases, layer)
            heads, d = b.mu_K.shape
            if self.rank is None:
                ranks = sample_ranks(heads, d, device=keys.device)
            else:
                ranks = torch.full((2, heads), self.rank, device=keys.device)
            return truncate(keys, b.Q_K, b.mu_K, ranks[0]), truncate(values, b.Q_V, b.mu_V, ranks[1])

        return teacher, model(ids, **cache_argument(tapped(model, change))).logits


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) in nats, mean over positions.

    Args:
        teacher, student: logits [..., vocabulary].

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item()
        0.0
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="sum") / p[..., 0].numel()


def distillation(share: float = 1.0) -> Callable[[Any, Any], Tensor]:
    """Step 3: the loss for `refimpl.core.train.loop.train`, of a `Projections` and a batch of tokens.

    Args:
        share: of the divergence from the model as it is; the rest is the cross-entropy of the text. 1 is the paper's
            loss. The authors' code has 0.25; cross-entropy also adapts the model to the training text, which bases
            that were only calibrated cannot.

    Example:
        >>> distillation(0.25)(lambda ids: (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)), [torch.ones(1, 3).long()])
        tensor(0.5199)
    """
    if not 0 <= share <= 1:
        raise OptionError(f"share={share}: use 0 (cross-entropy only) to 1 (divergence only)")

    def loss(model: Any, batch: Any) -> Tensor:
        (ids,) = batch
        teacher, student = model(ids)
        value = share * divergence(teacher, student)
        if share < 1:
            value = value + (1 - share) * F.cross_entropy(student[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        return value

    return loss


def fit_bases(
    model: PreTrainedModel,
    bases: Sequence[Bases | None],
    ids: Tensor,
    recipe: Recipe,
    *,
    batch_size: int = 2,
    rank: int | None = None,
    orthogonal: bool = True,
    share: float = 1.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> tuple[tuple[Bases | None, ...], History]:
    """Train bases end to end; the model stays as it is.

    Args:
        model: a decoder of transformers, in any dtype.
        bases: the bases to start from, of `pca`.
        ids: text to train on, int [n, T], rows without padding.
        recipe: the authors: AdamW, learning rate 1e-3, cosine, warm-up of 100 steps, ``clip=1.0``.
        batch_size: rows a step (times ``recipe.accumulate``).
        rank, orthogonal: see `Projections`.
        share: see `distillation`.
        folder, progress: see `refimpl.core.train.loop.train`.

    Returns:
        The bases, fp32 on the model's device, and the history of the loss.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> ids = torch.randint(50, (8, 12))
        >>> bases, history = fit_bases(model, pca(calibrate(model, ids)), ids, Recipe(steps=3, lr=1e-3))
        >>> len(history.losses), bool((bases[0].Q_K.mT @ bases[0].Q_K - torch.eye(8)).abs().max() < 1e-5)
        (3, True)
    """
    student = Projections(model, bases, rank, orthogonal)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval().requires_grad_(False)
        data = batches(ids, batch_size=batch_size, seed=recipe.seed)
        history = train(student, data, distillation(share), recipe, folder=folder, progress=progress)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
    with torch.no_grad():
        found = student.bases()
    return found, history


# -- the search for ranks --


def greedy(
    errors: Callable[[tuple[int, ...], list[int]], Sequence[float]],
    widths: Sequence[int],
    step: int,
    budget: float,
    share: float = 0.0,
) -> list[tuple[int, ...]]:
    """Algorithm 1: lower the rank that costs least, again and again, while the ranks make up ``budget`` or more.

    Args:
        errors: ``errors(ranks, candidates)`` is the error after lowering each of the candidates alone by ``step``.
        widths: full ranks, where it begins.
        step: by how much a rank is lowered; also the least rank.
        budget: share of the full ranks.
        share: of the entries that are lowered in one round, the cheapest first; 0 for one at a time (the paper). The
            authors' code lowers three quarters, which costs far fewer rounds.

    Returns:
        The ranks before the first round and after each, nested.

    Example:
        >>> cost = [1.0, 10.0]   # the first entry is cheap until little of it is left
        >>> errors = lambda ranks, candidates: [cost[i] / (ranks[i] - 1) ** 2 for i in candidates]
        >>> greedy(errors, [4, 4], step=1, budget=0.6)
        [(4, 4), (3, 4), (2, 4), (1, 4), (1, 3)]
    """
    if not 0 < budget <= 1:
        raise OptionError(f"budget={budget}: use a share of the full ranks, above 0 and at most 1")
    if not 1 <= step < max(widths):
        raise OptionError(f"step={step}: use 1 to {max(widths) - 1}, less than the heads have channels")
    if not 0 <= share <= 1:
        raise OptionError(f"share={share}: use 0 (one entry a round) to 1 (all of them)")
    ranks = list(widths)
    path = [tuple(ranks)]
    while (spare := sum(ranks) - budget * sum(widths)) >= 0:
        candidates = [i for i, rank in enumerate(ranks) if rank >= 2 * step]
        if not candidates:
            break
        found = errors(tuple(ranks), candidates)
        order = sorted(range(len(candidates)), key=lambda k: found[k])
        needed = int(spare // step) + 1  # a round does not go below the budget by more than one step
        for k in order[: min(needed, max(1, int(share * len(ranks))))]:
            ranks[candidates[k]] -= step
        path.append(tuple(ranks))
    return path


@torch.no_grad()
def search(
    model: PreTrainedModel,
    bases: Sequence[Bases | None],
    ids: Tensor,
    *,
    budget: float,
    step: int,
    share: float = 0.0,
    error: str = "kl",
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[Table, ...]:
    """Ranks for each layer, head, K and V, by their cost on some text; a round costs a forward pass per entry.

    Args:
        model: a decoder of transformers.
        bases: one per layer.
        ids: text to search on, int [n, T]; not the text that is measured afterwards.
        budget: where to stop, as a share of the full cache.
        step: by how much a rank is lowered (the code: 32 of 128 channels), also the least rank.
        share: see `greedy`.
        error: "kl" is the divergence from the model as it is (the paper), "hidden" the relative change of the last
            hidden state against the ranks so far (the code; needs no head).
        batch_size: rows at a time.
        progress: show a bar (after a second).

    Returns:
        For `MatryoshkaKV.path`: from the fewest bytes to full ranks.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> ids = torch.randint(50, (4, 12))
        >>> bases = pca(calibrate(model, ids))
        >>> path = search(model, bases, ids, budget=0.5, step=4)
        >>> path[-1], sum(map(sum, path[0][0])) <= 16   # half of 2 heads of 8 channels, keys and values
        ((((8, 8), (8, 8)),), True)
    """
    if error not in ("kl", "hidden"):
        raise OptionError(f"error={error!r}: use {nearest(error, ('kl', 'hidden'))}")
    if ids.dim() != 2 or ids.numel() == 0:
        raise CalibrationError(f"ids has shape {list(ids.shape)}; give at least one row of tokens, [n, T]")
    full = rank_table(bases, None)
    places = [
        (layer, side, head)
        for layer, row in enumerate(full)
        if row is not None
        for side in (0, 1)
        for head in range(len(row[side]))
    ]
    widths = [_of_layer(bases, layer).Q_K.shape[-1] for layer, _, _ in places]
    rows = ids.to(model.device).split(batch_size)

    def table(ranks: Sequence[int]) -> Table:
        lists: list[Any] = [None if row is None else [[], []] for row in full]
        for (layer, side, _), rank in zip(places, ranks, strict=True):
            lists[layer][side].append(rank)
        return tuple(None if row is None else (tuple(row[0]), tuple(row[1])) for row in lists)

    def outputs(ranks: Sequence[int] | None) -> list[Tensor]:
        run: Any = model if error == "kl" else model.base_model
        tables = None if ranks is None else table(ranks)
        caches = [{} if tables is None else cache_argument(projected(model, bases, tables)) for _ in rows]
        found = [run(batch, **cache) for batch, cache in zip(rows, caches, strict=True)]
        return [out.logits if error == "kl" else out.last_hidden_state.float() for out in found]

    exact = outputs(None)
    bar = tqdm(desc="search", unit="pass", delay=1, disable=not progress)

    def errors(ranks: tuple[int, ...], candidates: list[int]) -> list[float]:
        target = exact if error == "kl" else outputs(ranks)
        found = []
        for i in candidates:
            lowered = [rank - step * (k == i) for k, rank in enumerate(ranks)]
            pairs = list(zip(target, outputs(lowered), strict=True))
            if error == "kl":
                found.append(torch.stack([divergence(a, b) * len(a) for a, b in pairs]).sum() / len(ids))
            else:
                change, size = (
                    torch.stack([t.square().sum() for t in ts]).sum()
                    for ts in ([a - b for a, b in pairs], [a for a, _ in pairs])
                )
                found.append((change / size).sqrt())
            bar.update()
        return read_all(torch.stack(found))

    with bar:
        path = greedy(errors, widths, step, budget, share)
    return tuple(table(ranks) for ranks in reversed(path))


# -- the cache --


@dataclass(frozen=True)
class MatryoshkaKV(Policy):
    """Keep the first columns of each head's keys and values in a basis of their own.

    Tokens are projected as they come, a prompt's too: every query feels the compression. Bases belong to the model,
    like weights, and are not counted as cache.

    Args:
        bases: one per layer of the model, None for layers with a sliding window: from `fit` (or `pca`, `fit_bases`).
        ranks: columns kept: the same number everywhere or a `Table`; None keeps keys and values as they come; a budget
            sets it.
        path: tables from the fewest bytes to the most (of `search`); the budget then chooses among them, else among
            uniform ranks.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> policy = MatryoshkaKV().fit(model, torch.randint(50, (4, 12)))
        >>> cache = policy.cache(model, budget=0.5, length=64)
        >>> _ = model(torch.ones(1, 9, dtype=torch.long), **cache_argument(cache))
        >>> cache.policy.ranks, cache.layers[0].parts["keys"].shape
        (4, torch.Size([1, 1, 9, 8]))
    """

    bases: tuple[Bases | None, ...] = field(default=(), repr=False)
    ranks: int | None | Table = None
    path: tuple[Table, ...] = field(default=(), repr=False)
    prefills = ("streamed",)
    knob = "ranks"

    def __post_init__(self) -> None:
        if not self.bases:
            return  # `fit` comes first, and then this again
        rank_table(self.bases, self.ranks)
        for table in self.path:
            rank_table(self.bases, table)

    @checked()
    def fit(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        *,
        recipe: Recipe | None = None,
        batch_size: int = 2,
        folder: str | Path | None = None,
        search_on: Tensor | None = None,
        budget: float = 0.25,
        step: int | None = None,
        progress: bool = True,
    ) -> MatryoshkaKV:
        """Bases for a model from calibration tokens; trained bases and searched ranks if asked for.

        Args:
            model: a decoder of transformers; not changed.
            tokens: int [n, T], rows without padding.
            recipe: train the bases end to end with it, as the paper does (see `fit_bases`); None stays with PCA.
            batch_size: rows in a step of the training.
            folder: keeps the training's checkpoints, so that it resumes; None keeps none.
            search_on: other tokens, int [m, T], on which ranks are searched (algorithm 1, see `search`); None: ranks
                are the same everywhere.
            budget: share of the full cache where that search stops.
            step: by how much it lowers a rank, also the least rank; None is an eighth of the head's channels, as in
                training.
            progress: show bars.

        Returns:
            This policy with bases, and with a path of ranks if they were searched.

        Raises:
            CalibrationError: no tokens, or activations that are not finite.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
            ...     intermediate_size=16, vocab_size=50))
            >>> text, other = torch.randint(50, (8, 12)), torch.randint(50, (1, 12))
            >>> policy = MatryoshkaKV().fit(model, text, recipe=Recipe(steps=3, lr=1e-3), search_on=other, step=4)
            >>> policy.bases[0], len(policy.path)
            (Bases(Q_K=float32[2, 8, 8], Q_V=float32[2, 8, 8], mu_K=float32[2, 8], mu_V=float32[2, 8]), 5)
        """
        bases = pca(calibrate(model, tokens))
        if recipe is not None:
            options: Any = {"batch_size": batch_size, "folder": folder, "progress": progress}
            bases, _ = fit_bases(model, bases, tokens, recipe, **options)
        path = self.path
        if search_on is not None:
            if step is None:
                step = max(1, next(b for b in bases if b is not None).Q_K.shape[-1] // 8)
            path = search(model, bases, search_on, budget=budget, step=step, progress=progress)
        return replace(self, bases=bases, path=path)

    def _ranks(self, shape: LayerShape) -> Ranks:
        given = _of_layer(self.bases, shape.index)
        if given.Q_K.shape[:2] != (shape.heads, shape.head_dim):
            heads, d = given.Q_K.shape[:2]
            raise OptionError(
                f"bases: those of layer {shape.index} are for {heads} key-value heads of {d} channels, but the model "
                f"has {shape.heads} of {shape.head_dim}; call fit(model, tokens) with this model"
            )
        if isinstance(self.ranks, int):
            check_rank("ranks", self.ranks, shape)
            return ((self.ranks,) * shape.heads,) * 2
        if self.ranks is None:
            return ((shape.head_dim,) * shape.heads,) * 2
        found = self.ranks[shape.index]
        assert found is not None
        return found

    def layer(self, shape: LayerShape, streamed: bool) -> KVLayer:
        ranks = self._ranks(shape)
        output = output_matrix(shape.module)
        if isinstance(output, FoldedOutput) and output.ranks != ranks[1]:
            raise OptionError(
                f"model: the output matrix of layer {shape.index} was folded for values of ranks {output.ranks}, but "
                f"this policy has {ranks[1]}; pass the policy it was folded for, or load the model again"
            )
        if self.ranks is None:  # a rotation gives nothing up, but rounds
            return TailLayer(shape.heads, streamed=True)
        return MatryoshkaLayer(_of_layer(self.bases, shape.index), ranks, shape.heads)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        return length * sum(map(sum, self._ranks(shape))) * shape.itemsize

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[int | None | Table]:
        if self.path:
            return [*self.path, None]
        return [*range(1, min(shape.head_dim for shape in shapes)), None]


# -- values folded into the output matrix --


@torch.no_grad()
def fold(model: PreTrainedModel, policy: MatryoshkaKV) -> None:
    """Let the output matrices take over the way back from projected values: W_O' = Q_V^T W_O, bias mu_V W_O.

    Saves a product with Q_V for every token; the result is the same. The model then works with caches of this policy
    only. Layers whose values keep all columns stay as they are. Fold once bases are final: a folded matrix does not
    follow them.

    Args:
        model: changed in place.
        policy: its ranks must be those that will be used: take ``policy.cache(model, budget=...).policy``.

    Raises:
        OptionError: folded already, or an output matrix of an unknown kind; nothing has been changed then.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> ids = torch.randint(50, (4, 12))
        >>> policy = MatryoshkaKV(pca(calibrate(model, ids)), ranks=3)
        >>> before = model(ids, **cache_argument(policy.cache(model))).logits
        >>> fold(model, policy)
        >>> torch.allclose(model(ids, **cache_argument(policy.cache(model))).logits, before, atol=1e-5)
        True
    """
    made: list[tuple[nn.Module, str, FoldedOutput]] = []
    modules: dict[Any, nn.Module] = {
        m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and output_name(m)
    }
    for index, layer in enumerate(policy.cache(model).layers):
        if not isinstance(layer, MatryoshkaLayer):
            continue
        module, bases, ranks = modules.get(index, model), layer.bases, layer.ranks[1]
        name = output_name(module)
        old = None if name is None else getattr(module, name)
        if isinstance(old, FoldedOutput):
            raise OptionError("model: its output matrices are folded already; load it again")
        if name is None or not isinstance(old, (nn.Linear, Conv1D)):
            raise OptionError(
                f"model: {type(module).__name__} has no output matrix that could be folded into (found "
                f"{type(old).__name__}, looked for {', '.join(OUTPUTS)}); use the policy without fold"
            )
        heads, d = bases.Q_V.shape[:2]
        if sum(ranks) == heads * d:
            continue
        weight = (old.weight.T if isinstance(old, Conv1D) else old.weight).float()
        Q, mu = bases.Q_V.to(weight.device), bases.mu_V.to(weight.device)
        blocks = weight.unflatten(1, (heads, -1, d))  # [out, H, G, d]
        narrow = torch.cat([(blocks[:, h] @ Q[h, :, :rank]).flatten(1) for h, rank in enumerate(ranks)], 1)
        bias = torch.einsum("ohgd,hd->o", blocks, mu)
        if old.bias is not None:
            bias += old.bias.float()
        made.append((module, name, FoldedOutput(narrow.to(old.weight.dtype), bias.to(old.weight.dtype), ranks)))
    for module, name, output in made:
        setattr(module, name, output)
