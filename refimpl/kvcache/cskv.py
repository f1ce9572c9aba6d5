"""CSKV: keep a few numbers per token, from which keys and values are rebuilt; keep the newest tokens exact.

Source: Wang et al., 2024, arXiv 2409.10593, sections 2.2 and 2.3, and the authors' code.

Keys and values of a layer are X W, [n, h] times [h, h_kv]. Replace W by A B with a narrow middle: the cache stores the
features C = X A of each token (r numbers instead of h_kv) and rebuilds X W as C B when a query comes. The window of
newest tokens is kept as it came, and so are the first few tokens (our addition: see StreamingLLM). A prompt is attended
to exactly and compressed when it ends.

1. `moments`: one forward pass; of every layer the mean |x| and the second moment of its input.
2. `factorise`: A and B from the weights alone (SVD), with inputs scaled by how large they are (ASVD), at random, or in
   closed form (our addition): the A B with the least error on the outputs that any training of step 3 could reach.
3. `reconstruct`: fit A and B layer by layer to the exact keys and values, no language-model loss.
4. `straight_through`: with 4 bits the features pass through the cache's quantiser during step 3.
5. `CSKVLayer`: the cache, in a prompt and while decoding. Features are stored before RoPE, because a rotated key has no
   low rank; a rebuilt key is rotated at its token's position. Values are never rebuilt for a single query: (p C_V) B_V
   is the same sum.

All heads of a layer share one A. With grouped queries there is one projection for the layer's key/value heads.

Differences from the authors' code: groups of codes have a float least value (theirs clamps a zero point, which breaks a
group that does not contain 0); the straight-through estimator lets every gradient pass; the scale of ASVD is a mean,
not a sum; codes of values share a scale along the features of a token, not along a head's share of them, since features
belong to no head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refimpl.baselines.kvcache.kivi import quantise
from refimpl.baselines.svd import balanced, truncated_svd
from refimpl.core.cache import (
    Dense,
    KVLayer,
    LayerShape,
    Mask,
    New,
    Policy,
    Segment,
    TailLayer,
    WindowLayer,
    check_rank,
    rotate,
)
from refimpl.core.cache.host import CompressedCache, _attention_modules
from refimpl.core.compress.driver import BATCH, _vocabulary, block_inputs, calibration_batches
from refimpl.core.compress.sites import Site, find_blocks
from refimpl.core.compress.stats import Collector
from refimpl.core.device import read
from refimpl.core.errors import OptionError, nearest
from refimpl.core.layers.packing import pack_bits, unpack_bits
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.kernels.lowrank_decode import Inputs, lowrank_decode, unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INITS = ("closed_form", "asvd", "svd", "random")
PIECE = 256  # queries of a streamed text that are attended to at once
VALUE_GROUP = 32  # codes of values that share a scale, at most


# -- steps 1 and 2: factors --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """What one layer's factors are made from.

    Attributes:
        gram: sum over tokens of x x^T at the input of the projections, fp32 [h, h].
        mean_abs: mean over tokens of abs(x), fp32 [h].
        tokens: how many there were.
        W_K, W_V: the projections, [h, h_kv], in the model's dtype.
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: int
    W_K: Tensor
    W_V: Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """Factors of one layer's projections; the first r columns of A and rows of B are those of rank r.

    Attributes:
        A_K, A_V: [h, R].
        B_K, B_V: [R, h_kv].
    """

    A_K: Tensor
    B_K: Tensor
    A_V: Tensor
    B_V: Tensor

    def __repr__(self) -> str:
        return f"Factors({self.A_K.shape[1]} for keys, {self.A_V.shape[1]} for values)"


def svd(W: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Step 2: A and B of full rank, nested, from the singular value decomposition of diag(scale) W.

    Args:
        W: [h, h_kv].
        scale: how much each input counts, positive [h]; None for plain SVD. A constant factor changes nothing.

    Returns:
        A [h, R] and B [R, h_kv] with R = min(h, h_kv); singular values are split evenly.

    Example:
        >>> A, B = svd(torch.diag(torch.tensor([1.0, 4.0])))
        >>> (A[:, :1] @ B[:1]).abs().tolist()
        [[0.0, 0.0], [0.0, 4.0]]
    """
    A, B = balanced(*truncated_svd(W if scale is None else scale[:, None] * W, min(W.shape)))
    return A if scale is None else A / scale[:, None], B


def asvd_scale(mean_abs: Tensor, alpha: float = 0.5, offset: float = 1e-6) -> Tensor:
    """Step 2: how much ASVD lets each input count, ``(mean |x| + offset) ** alpha``.

    Example:
        >>> asvd_scale(torch.tensor([4.0, 0.25]), offset=0.0).tolist()
        [2.0, 0.5]
    """
    return (mean_abs + offset) ** alpha


def closed_form(W: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The optimum of step 3: A = W V, B = V^T with V the eigenvectors of W^T X^T X W, largest first.

    Truncated at r it leaves ``sum(sigma_i(X W) ** 2 for i > r)`` of ||X W||^2, the least any rank r can.

    Args:
        W: [h, h_kv].
        gram: X^T X, [h, h]; use fp64.

    Returns:
        A [h, h_kv] and B [h_kv, h_kv].

    Example:
        >>> A, B = closed_form(torch.eye(2), torch.diag(torch.tensor([1.0, 9.0])))
        >>> (A[:, :1] @ B[:1]).abs().tolist()   # input 2 is three times as large
        [[0.0, 0.0], [0.0, 1.0]]
    """
    V = torch.linalg.eigh(W.T @ gram @ W).eigenvectors.flip(-1)
    return W @ V, V.T


def random(W: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors that know nothing, of the size `torch.nn.Linear` starts with: the control of the paper's ablation.

    Example:
        >>> A, B = random(torch.ones(6, 4))
        >>> A.shape, B.shape
        (torch.Size([6, 4]), torch.Size([4, 4]))
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(W.shape)
    pair = []
    for shape in ((W.shape[0], rank), (rank, W.shape[1])):
        uniform = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1
        pair.append(uniform.to(W) * shape[0] ** -0.5)
    return pair[0], pair[1]


def reconstruction_loss(W: Tensor, A: Tensor, B: Tensor, gram: Tensor, tokens: int) -> Tensor:
    """Mean over tokens and channels of ``(X W - X A B) ** 2``, from the second moment of X.

    Args:
        W, A, B: [h, h_kv], [h, r], [r, h_kv].
        gram: X^T X, [h, h].
        tokens: rows of X.

    Example:
        >>> reconstruction_loss(torch.eye(2), torch.zeros(2, 1), torch.zeros(1, 2), 3 * torch.eye(2), 3).item()
        1.0
    """
    lost = W - A @ B
    return ((gram @ lost) * lost).sum() / (tokens * W.shape[1])


def _projections(model: nn.Module) -> list[nn.Module]:
    """The attention modules, each with a projection of its own for keys and for values."""
    modules = _attention_modules(model)
    if not modules:
        raise OptionError(f"model: {type(model).__name__} has no attention layer known to transformers' caches")
    for module in modules:
        _check_projections(module)
    return modules


def _check_projections(module: nn.Module) -> None:
    if not (hasattr(module, "k_proj") and hasattr(module, "v_proj")):
        raise OptionError(
            f"model: CSKV replaces the projections k_proj and v_proj, but {type(module).__name__} has none; use a "
            "Llama-, Qwen- or Gemma-like model, or a policy that takes keys as they come, such as KIVI or SnapKV"
        )
    weight = getattr(getattr(module, "k_norm", None), "weight", None)
    if isinstance(weight, Tensor) and weight.shape[-1] != getattr(module, "head_dim", weight.shape[-1]):
        raise OptionError(
            f"model: k_norm of {type(module).__name__} acts on all heads at once, which CSKV does not know; use a "
            "policy that takes keys as they come, such as KIVI or SnapKV"
        )


@torch.no_grad()
def moments(model: PreTrainedModel, calibration: Any, batch_size: int = BATCH) -> tuple[Moments, ...]:
    """Step 1: run the model once over some text and sum up what each attention layer sees.

    Keys and values share their input, so one second moment serves both. Under torchrun sums go over all processes.

    Args:
        model: a decoder of transformers.
        calibration: token ids int [sequences, length], or an object with such a tensor as ``.ids``.
        batch_size: sequences at a time.

    Raises:
        OptionError: a model whose attention has no projections of its own for keys and values.
        CalibrationError: tokens that cannot be used, or inputs that are not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> found = moments(model, torch.ones(3, 8, dtype=torch.long))
        >>> len(found), found[0].tokens, found[0].gram.shape
        (2, 24, torch.Size([16, 16]))
    """
    modules = _projections(model)
    pieces = calibration_batches(calibration, batch_size, _vocabulary(model))
    keys, values = (
        [Site(f"layer {i}: {name}", i, module, name) for i, module in enumerate(modules)]
        for name in ("k_proj", "v_proj")
    )
    with Collector(keys, {"gram", "abs"}) as collector:
        for ids in pieces:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return tuple(
        Moments(stats.gram, stats.mean_abs, stats.tokens, key.weight.T, value.weight.T)
        for key, value in zip(keys, values, strict=True)
        for stats in [collector.stats[key.name]]
    )


@torch.no_grad()
def factorise(
    found: Sequence[Moments], init: str = "closed_form", alpha: float = 0.5, seed: int = 0
) -> tuple[Factors, ...]:
    """Step 2 for all layers, at full rank: `CSKV` cuts them to the rank it wants.

    Args:
        found: from `moments`.
        init: "closed_form", "asvd" (the paper's), "svd" or "random".
        alpha: exponent of ASVD's scale.
        seed: of the random ones.

    Returns:
        Factors in fp32 on the device of the moments.

    Example:
        >>> one = Moments(torch.eye(4), torch.ones(4), 1, torch.ones(4, 2), torch.ones(4, 2))
        >>> factorise([one], "svd")
        (Factors(2 for keys, 2 for values),)
    """
    if init not in INITS:
        raise OptionError(f"init={init!r}: use {nearest(init, INITS)}")

    def one(layer: Moments, W: Tensor, place: int) -> tuple[Tensor, Tensor]:
        if init == "closed_form":  # in fp64: the eigenvalues are squares of singular values
            A, B = closed_form(W.double(), layer.gram.double())
            return A.float(), B.float().contiguous()
        if init == "random":
            return random(W.float(), seed * 2 * len(found) + place)
        return svd(W.float(), asvd_scale(layer.mean_abs, alpha) if init == "asvd" else None)

    return tuple(
        Factors(*one(layer, layer.W_K, 2 * i), *one(layer, layer.W_V, 2 * i + 1)) for i, layer in enumerate(found)
    )


# -- step 4: codes -----------------------------------------------------------------------------------------------------


def value_group(rank: int) -> int:
    """Codes of values that share a scale: the largest even divisor of the rank up to 32.

    Example:
        >>> [value_group(rank) for rank in (12, 36, 96)]
        [12, 18, 32]
    """
    return max(g for g in range(2, VALUE_GROUP + 1, 2) if rank % g == 0)


def key_codes(features: Tensor, group: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes of key features: one scale per feature and group of tokens.

    Args:
        features: [B, 1, n, r], n a multiple of the group.
        group: tokens that share a scale.
        valid: False for padding, which sets no scale, bool [B, n]; None if there is none.

    Returns:
        Codes uint8 [B, 1, n / group, r, group], step and least value fp16 [B, 1, n / group, r, 1].

    Example:
        >>> codes, step, least = key_codes(torch.arange(16.0).view(1, 1, 16, 1), 16)
        >>> codes.flatten().tolist() == list(range(16)), step.item(), least.item()
        (True, 1.0, 0.0)
    """
    mask = None if valid is None else valid.unflatten(1, (-1, group))[:, None, :, None]
    return quantise(features.unflatten(2, (-1, group)).transpose(-1, -2), 4, mask)


def value_codes(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes of value features: one scale per token and `value_group` of features.

    Args:
        features: [B, 1, n, r].

    Returns:
        Codes uint8 [B, 1, n, r / g, g], step and least value fp16 [B, 1, n, r / g, 1].

    Example:
        >>> value_codes(torch.ones(1, 1, 3, 4))[0].shape
        torch.Size([1, 1, 3, 1, 4])
    """
    return quantise(features.unflatten(-1, (-1, value_group(features.shape[-1]))), 4)


def decode(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """What the codes stand for, fp32.

    Example:
        >>> decode(torch.tensor([3], dtype=torch.uint8), torch.tensor([0.5]), torch.tensor([5.0])).tolist()
        [6.5]
    """
    return codes * step.float() + least.float()


def key_features(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """Undo `key_codes`, fp32 [B, 1, n, r].

    Example:
        >>> x = torch.arange(16.0).view(1, 1, 16, 1)
        >>> torch.equal(key_features(*key_codes(x, 16)), x)
        True
    """
    return decode(codes, step, least).transpose(-1, -2).flatten(2, 3)


def value_features(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """Undo `value_codes`, fp32 [B, 1, n, r].

    Example:
        >>> x = torch.ones(1, 1, 3, 4)
        >>> torch.equal(value_features(*value_codes(x)), x)
        True
    """
    return decode(codes, step, least).flatten(-2)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` forwards, the gradient of ``x`` backwards, everywhere (also at the ends of the range).

    Example:
        >>> x = torch.tensor([0.4, 9.0], requires_grad=True)
        >>> straight_through(x, x.detach().round()).sum().backward()
        >>> x.grad.tolist()
        [1.0, 1.0]
    """
    return x + (rounded - x).detach()


# -- step 3: the fit ---------------------------------------------------------------------------------------------------


class Fit(nn.Module):
    """The factors of one layer while they are trained.

    Args:
        start: where training begins, cut to the ranks.
        ranks: r_K and r_V.
        group: tokens that share a key scale; None for features in 16 bits.
    """

    A_K: nn.Parameter
    B_K: nn.Parameter
    A_V: nn.Parameter
    B_V: nn.Parameter

    def __init__(self, start: Factors, ranks: tuple[int, int], group: int | None) -> None:
        super().__init__()
        self.group = group
        for name, rank in (("K", ranks[0]), ("V", ranks[1])):
            for letter, cut in (("A", (slice(None), slice(rank))), ("B", (slice(rank), slice(None)))):
                tensor = getattr(start, f"{letter}_{name}")[cut]
                setattr(self, f"{letter}_{name}", nn.Parameter(tensor.detach().float().clone()))

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuilt keys and values of some inputs, fp32 [B, n, h] to [B, n, h_kv] each; before RoPE, without biases."""
        C_K, C_V = X @ self.A_K, X @ self.A_V
        if self.group is not None:
            with torch.no_grad():
                rounded_K = key_features(*key_codes(C_K.unsqueeze(1), self.group))[:, 0]
                rounded_V = value_features(*value_codes(C_V.unsqueeze(1)))[:, 0]
            C_K, C_V = straight_through(C_K, rounded_K), straight_through(C_V, rounded_V)
        return C_K @ self.B_K, C_V @ self.B_V

    def factors(self) -> Factors:
        """What was found."""
        return Factors(*(parameter.detach().clone() for parameter in (self.A_K, self.B_K, self.A_V, self.B_V)))


def fit_loss(fit: nn.Module, X: Tensor, W_K: Tensor, W_V: Tensor) -> Tensor:
    """Step 3: MSE of keys plus MSE of values. Rotating both sides would change nothing: it keeps lengths.

    Args:
        fit: a `Fit`.
        X: inputs, fp32 [B, n, h].
        W_K, W_V: the projections, fp32 [h, h_kv].

    Example:
        >>> W = torch.eye(2)
        >>> fit_loss(Fit(Factors(W, W, W, W), (1, 1), None), torch.ones(1, 3, 2), W, W).item()   # half of it each
        1.0
    """
    K, V = fit(X)
    return (X @ W_K - K).square().mean() + (X @ W_V - V).square().mean()


def reconstruct(
    model: PreTrainedModel,
    policy: CSKV,
    calibration: Any,
    recipe: Recipe | None = None,
    batch_size: int = BATCH,
    progress: bool = True,
) -> CSKV:
    """Steps 3 and 4: fit the factors of every layer to its exact keys and values.

    The model is run once, block by block; the inputs of one layer are held at a time, and its factors trained on them,
    one sequence a step. With ``policy.bits == 4`` features pass through the quantiser of the cache.

    Args:
        model: a decoder of transformers; not changed.
        policy: where to begin, and the density, bits and group to train for.
        calibration: token ids int [sequences, length], or an object with such a tensor as ``.ids``.
        recipe: of each layer; 200 steps at 1e-3 by default (the authors: 5e-5 over many more).
        batch_size: sequences at a time in the forward pass.
        progress: show bars.

    Returns:
        The policy with trained factors, of exactly the ranks it was trained for.

    Raises:
        OptionError: factors that do not fit the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> tokens = torch.randint(0, 50, (4, 32))
        >>> start = CSKV(factorise(moments(model, tokens), "asvd"), density=0.5)
        >>> reconstruct(model, start, tokens, Recipe(steps=5), progress=False).factors
        (Factors(8 for keys, 8 for values),)
    """
    recipe = recipe or Recipe(steps=200, lr=1e-3)
    modules = _projections(model)
    ranks = [policy.ranks(CompressedCache._shape(model, index)) for index in range(len(modules))]
    pieces = calibration_batches(calibration, batch_size, _vocabulary(model))
    length = pieces[0].shape[1]
    if policy.bits == 4:
        length -= length % policy.together  # groups of keys are whole
        if not length:
            raise OptionError(
                f"calibration: sequences of {pieces[0].shape[1]} tokens are shorter than a group of {policy.together}; "
                "use longer ones"
            )
    done: dict[int, Factors] = {}
    with torch.no_grad():
        walk = block_inputs(model, pieces)
    for index, block in enumerate(find_blocks(model)[1]):
        inside = [i for i, module in enumerate(modules) if any(module is part for part in block.modules())]
        inputs: dict[int, list[Tensor]] = {i: [] for i in inside}
        handles = [
            modules[i].k_proj.register_forward_pre_hook(  # type: ignore[union-attr, operator]
                lambda _, args, kept=inputs[i]: kept.append(args[0][:, :length])
            )
            for i in inside
        ]
        with torch.no_grad():
            walk.run(block, index, keep=True)
        for handle in handles:
            handle.remove()
        for i in inside:
            W_K, W_V = (Site("", i, modules[i], name).weight.T.float() for name in ("k_proj", "v_proj"))
            fit = Fit(policy.factors[i], ranks[i], policy.together if policy.bits == 4 else None)
            fit.to(W_K.device)
            loss = lambda fit, batch, W_K=W_K, W_V=W_V: fit_loss(fit, batch[0].float(), W_K, W_V)  # noqa: E731
            train(fit, batches(torch.cat(inputs[i]), batch_size=1, seed=recipe.seed), loss, recipe, progress=progress)
            done[i] = fit.factors()
    return replace(policy, factors=tuple(done[i] for i in range(len(modules))))


# -- steps 5 and 6: the cache ------------------------------------------------------------------------------------------


Limits = Callable[[range], Tensor]


class Rebuilt(Segment):
    """Entries that are stored as features; the first real tokens of each row are kept as sinks and not seen here.

    Args:
        layer: whose B, biases and norm they are rebuilt with.
        features: of keys [B, 1, n, r_K] and of values [B, 1, n, r_V].
        positions: of the n entries, int [B or 1, n].
        limits: see `Exact`; None if all have left the window of every query.
    """

    def __init__(
        self, layer: CSKVLayer, features: tuple[Tensor, Tensor], positions: Tensor, limits: Limits | None
    ) -> None:
        self.layer, self.features, self.positions, self.limits = layer, features, positions, limits
        self.index = range(positions.shape[-1])
        self.slots = torch.arange(positions.shape[-1], device=positions.device)

    @cached_property
    def keys(self) -> Tensor:
        return self.layer.rebuilt_keys(self.features[0], self.positions)

    @cached_property
    def values(self) -> Tensor:
        return self.layer.rebuilt_values(self.features[1])

    def mix(self, weights: Tensor) -> Tensor:
        _, heads, groups, queries, count = weights.shape
        rank, width = self.layer.B_V.shape
        absorbed = heads * groups * queries * (count * rank + rank * width // heads)
        if absorbed > count * rank * width + groups * queries * count * width:  # many queries: rebuilding is cheaper
            return super().mix(weights)
        mixed = weights.flatten(1, 3) @ self.features[1][:, 0].float()  # all heads share the features
        B_V = self.layer.B_V.float().unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, r_V, d]
        mixed = (mixed.unflatten(1, (heads, -1)) @ B_V).unflatten(2, (groups, queries))
        if self.layer.bias_V is not None:  # what other segments hold has its own share of the weights
            mixed = mixed + weights.sum(-1, keepdim=True) * self.layer.bias_V.float().view(heads, 1, 1, -1)
        return mixed

    def visible(self, mask: Mask, slots: range) -> Tensor | None:
        seen = mask.block(slots, self.index)
        if self.layer.sinks:
            others = (self.positions >= self.layer.sinks)[:, None, None]
            seen = others if seen is None else seen & others
        if self.limits is not None:
            left = self.slots < self.limits(slots).unsqueeze(1)
            seen = left if seen is None else seen & left
        return seen


class Exact(Dense):
    """The window, while many queries are attended to at once: each sees what would have been in it, and the sinks.

    Args:
        keys, values, index: see `Dense`.
        sinks: which entries are sinks, bool [B or 1, n].
        limits: slots of queries to the slot where the window of each begins, int [Q].
    """

    def __init__(self, keys: Tensor, values: Tensor, index: range, sinks: Tensor, limits: Limits) -> None:
        super().__init__(keys, values, index)
        self.sinks, self.limits = sinks, limits

    def visible(self, mask: Mask, slots: range) -> Tensor | None:
        assert isinstance(self.index, range)
        index = torch.arange(self.index.start, self.index.stop, device=self.keys.device)
        inside = (index >= self.limits(slots).unsqueeze(1)) | self.sinks[:, None, None]
        seen = super().visible(mask, slots)
        return inside if seen is None else seen & inside


class Sinks(Dense):
    """The first real tokens of each row, exact; index int [B, 1, s], -1 where a row has no such token yet."""

    def visible(self, mask: Mask, slots: range) -> Tensor | None:
        assert isinstance(self.index, Tensor)
        return self.index.unsqueeze(-2) >= 0  # they have left a window, so they lie before every query


@lru_cache(maxsize=1)  # all layers of a forward pass ask about one mask
def _padding_on_the_left(mask: Mask) -> Tensor | None:
    """Slot of the first real token of each row, int [B]; None without padding; no dimension if it is elsewhere too."""
    if mask.padding is None:
        return None
    first = mask.padding.int().argmax(-1)
    gaps = mask.padding.sum(-1) + first < mask.padding.shape[-1]
    return first.new_zeros(()) if read(gaps.any()) else first


class CSKVLayer(WindowLayer):
    """One layer of the cache.

    Parts beside the window's "keys" and "values" [B, H, w, d] (rotated) and their features "key_pending" [B, 1, w, r_K]
    and "value_pending" [B, 1, w, r_V]; n tokens have left the window:

    - 16 bits: "key_features" [B, 1, n, r_K], "value_features" [B, 1, n, r_V];
    - 4 bits: "key_codes" uint8 [B, 1, n / group, r_K, group / 2], "key_step" and "key_least" fp16 [B, 1, n / group,
      r_K, 1]; "value_codes" uint8 [B, 1, n, r_V / g, g / 2], "value_step", "value_least" fp16 [B, 1, n, r_V / g, 1];
      g = `value_group` (r_V), two codes a byte, the first in the low bits;
    - "sink_keys", "sink_values" [B, H, s, d] (rotated), "sink_slots" int32 [B, 1, s], -1 where a row has none yet. The
      features of a sink are stored too, but not seen.

    Args:
        policy: hyper-parameters.
        shape: of the layer.
        streamed: see `KVLayer`.
    """

    def __init__(self, policy: CSKV, shape: LayerShape, streamed: bool) -> None:
        super().__init__(shape.heads, streamed, policy.window, policy.together)
        self.bits, self.sinks, self.rotary = policy.bits, policy.sinks, shape.rotation(policy)
        self.module = weakref.ref(shape.module)  # a copy of a cache shares it
        r_K, r_V = policy.ranks(shape)
        factors = policy.factors[shape.index]
        k_proj, v_proj = shape.module.k_proj, shape.module.v_proj
        tensors = chain(shape.module.parameters(), shape.module.buffers())  # packed weights are buffers
        device = next(tensors).device

        def ours(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().to(device, shape.dtype)

        self.A_K, self.B_K = ours(factors.A_K[:, :r_K]), ours(factors.B_K[:r_K])
        self.A_V, self.B_V = ours(factors.A_V[:, :r_V]), ours(factors.B_V[:r_V])
        self.bias_K, self.bias_V = ours(k_proj.bias), ours(v_proj.bias)  # type: ignore[union-attr, arg-type]

    # -- taking tokens in --

    def append(self, new: New) -> None:
        if self.seen == 0:
            self._check(new)
        self.extend(
            key_pending=(new.hidden @ self.A_K).unsqueeze(1), value_pending=(new.hidden @ self.A_V).unsqueeze(1)
        )
        super().append(new)

    def _check(self, new: New) -> None:
        """Refuse a model that makes its keys or values in another way than k_proj, norm and RoPE."""
        new.check(self.rotary)
        module: Any = new.module
        hidden, rotation = new.hidden[:, -1:], new.rotation
        assert rotation is not None
        cos, sin = (x[:, -1:].unsqueeze(1) for x in rotation)
        keys = rotate(self._normed(module.k_proj(hidden)), cos, sin)
        values = module.v_proj(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for name, ours, theirs in (("keys", keys, new.keys), ("values", values, new.values)):
            last = theirs[:, :, -1:].float()
            if ours.shape != last.shape or read((ours.float() - last).abs().max() - 0.05 * last.abs().max()) > 0:
                raise OptionError(
                    f"model: the {name} of {type(module).__name__} are not what its projection gives (another norm, "
                    "clipping, or a mixture with other values); use a policy that works on keys and values as they "
                    "come, such as KIVI or SnapKV"
                )

    def _norm(self) -> Any:
        return getattr(self.module(), "k_norm", None)

    def _normed(self, projected: Tensor) -> Tensor:
        """[B, n, h_kv] to heads [B, H, n, d], with the norm that Qwen3 and Gemma3 put on each."""
        heads = projected.unflatten(-1, (self.heads, -1))
        norm = self._norm()
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    def store(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        count = keys.shape[2]
        if self.sinks and (valid is not None or self.start - count < self.sinks):
            self._keep_sinks(keys, values, valid)
        C_K, C_V = self.parts["key_pending"][:, :, :count], self.parts["value_pending"][:, :, :count]
        if self.bits == 16:
            self.extend(key_features=C_K.clone(), value_features=C_V.clone())  # a view would keep the whole in memory
        else:
            codes, step, least = key_codes(C_K, self.group, valid)
            self.extend(key_codes=pack_bits(codes, 4), key_step=step, key_least=least)
            codes, step, least = value_codes(C_V)
            packed = pack_bits(codes, 4)[..., : codes.shape[-1] // 2]  # without the padding to whole words
            self.extend(value_codes=packed, value_step=step, value_least=least)
        for name in ("key_pending", "value_pending"):
            self.parts[name] = self.parts[name][:, :, count:].clone()

    def _keep_sinks(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Take in those of the first real tokens of each row that are leaving the window."""
        rows, heads, count, dim = keys.shape
        if "sink_slots" not in self.parts:
            empty = keys.new_zeros(rows, heads, self.sinks, dim)
            slots = torch.full((rows, 1, self.sinks), -1, dtype=torch.int32, device=keys.device)
            self.parts |= {"sink_keys": empty, "sink_values": empty.clone(), "sink_slots": slots}
        had = (self.parts["sink_slots"] >= 0).sum(-1)  # [B, 1]
        real = torch.ones(rows, count, dtype=torch.bool, device=keys.device) if valid is None else valid
        rank = had + real.long().cumsum(-1) - 1
        wanted = torch.arange(self.sinks, device=keys.device).view(1, -1, 1)
        match = (rank.unsqueeze(1) == wanted) & real.unsqueeze(1)  # [B, s, count]
        found, place = match.any(-1), match.long().argmax(-1)
        for name, states in (("sink_keys", keys), ("sink_values", values)):
            taken = states.gather(2, place[:, None, :, None].expand(-1, heads, -1, dim))
            self.parts[name] = torch.where(found[:, None, :, None], taken, self.parts[name])
        slots = (place + self.start - count).int().unsqueeze(1)
        self.parts["sink_slots"] = torch.where(found.unsqueeze(1), slots, self.parts["sink_slots"])

    def room(self) -> int:
        # features in 16 bits are the same before and after they leave the window, so many queries can be attended to
        # at once, each with its own window (`Exact`); codes exist only once a group is whole
        return max(self.window, PIECE) if self.bits == 16 else super().room()

    # -- attention --

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Features of what has left the window."""
        p = self.parts
        if self.bits == 16:
            return p["key_features"], p["value_features"]
        codes_K = unpack_bits(p["key_codes"], 4, self.group)
        codes_V = unpack_bits(p["value_codes"], 4, 2 * p["value_codes"].shape[-1])
        return (
            key_features(codes_K, p["key_step"], p["key_least"]),
            value_features(codes_V, p["value_step"], p["value_least"]),
        )

    def rebuilt_keys(self, features: Tensor, positions: Tensor) -> Tensor:
        """Keys from features [B, 1, n, r_K], rotated at positions int [B or 1, n]: fp32 [B, H, n, d]."""
        projected = features[:, 0].float() @ self.B_K.float()
        if self.bias_K is not None:
            projected = projected + self.bias_K.float()
        cos, sin = (x.unsqueeze(1) for x in self.rotary(positions))
        return rotate(self._normed(projected).float(), cos, sin)

    def rebuilt_values(self, features: Tensor) -> Tensor:
        """Values from features [B, 1, n, r_V]: fp32 [B, H, n, d]."""
        projected = features[:, 0].float() @ self.B_V.float()
        if self.bias_V is not None:
            projected = projected + self.bias_V.float()
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _begin(self, seen: Any) -> Any:
        """Slot at which the window begins once so many tokens have been taken in and settled."""
        return (seen - self.window) // self.group * self.group

    def segments(self, new: New) -> list[Segment]:
        # while a prompt is open nothing leaves the window; else the last query of a piece has the latest window
        stop = self.start if self.prompt_open else max(self.start, self._begin(self.seen - 1))
        if not stop:
            return [self.tail]
        p, limits, window = self.parts, None, self.tail
        features = list(self._stored()) if self.start else []
        if stop > self.start:
            start, device = self.start, new.keys.device

            def limits(slots: range) -> Tensor:
                return self._begin(torch.arange(slots.start, slots.stop, device=device)).clamp(min=start)

            leaving = [p[name][:, :, : stop - start] for name in ("key_pending", "value_pending")]
            features = [torch.cat(pair, 2) for pair in zip(features, leaving, strict=True)] if start else leaving
            tail = range(start, self.seen)
            window = Exact(p["keys"], p["values"], tail, new.mask.positions(tail) < self.sinks, limits)
        positions = new.mask.positions(range(stop))
        found: list[Segment] = [Rebuilt(self, (features[0], features[1]), positions, limits), window]
        if "sink_slots" in p:
            found.insert(0, Sinks(p["sink_keys"], p["sink_values"], p["sink_slots"]))
        return found

    def _attend(self, new: New) -> tuple[Tensor, Tensor | None]:
        inputs = self.kernel_inputs(new) if new.keys.is_cuda else None
        if inputs is not None and unsupported(inputs) is None:
            return lowrank_decode(*inputs), None
        return super()._attend(new)

    def kernel_inputs(self, new: New) -> Inputs | None:
        """What `refimpl.kernels.lowrank_decode` needs for one decoded token; None for anything else."""
        if len(new.slots) > 1 or not self.start or new.softcap is not None or self._norm() is not None:
            return None
        new.mask.block(new.slots, range(0))  # refuses masks that are more than causal
        first = _padding_on_the_left(new.mask)
        if first is not None and first.dim() == 0:
            return None  # positions are not slots less what is padded in front
        p = self.parts
        seen = None
        if first is not None or self.start < self.sinks:
            window = torch.ones_like(p["keys"][:, 0, :, 0], dtype=torch.bool)
            valid = new.mask.valid(range(self.start, self.seen))
            seen = window if valid is None else valid
            if "sink_slots" in p:
                seen = torch.cat([p["sink_slots"][:, 0] >= 0, seen], 1)
        bits4 = self.bits == 4
        return Inputs(
            query=new.query,
            keys=p["key_codes" if bits4 else "key_features"],
            values=p["value_codes" if bits4 else "value_features"],
            key_factor=self.B_K,
            value_factor=self.B_V,
            frequencies=self.rotary.frequencies.to(new.query.device),
            near_keys=p["keys"],
            near_values=p["values"],
            scaling=new.scaling,
            key_step=p.get("key_step"),
            key_least=p.get("key_least"),
            value_step=p.get("value_step"),
            value_least=p.get("value_least"),
            key_bias=self.bias_K,
            value_bias=self.bias_V,
            sink_keys=p.get("sink_keys"),
            sink_values=p.get("sink_values"),
            first=first,
            seen=seen,
            hidden=self.sinks,
            factor=self.rotary.factor,
        )

    # -- taking tokens back --

    def crop_to(self, length: int) -> None:
        super().crop_to(length)
        for name in ("key_pending", "value_pending"):
            self.parts[name] = self.parts[name][:, :, : length - self.start].clone()

    def reach_back(self, length: int) -> None:
        # what is stored stays stored; of codes, a broken group goes back to the window as the store knows it
        stored, start = self._stored(), length if self.bits == 16 else length // self.group * self.group
        back = [features[:, :, start:length] for features in stored]
        if length > start and "valid" in self.parts:  # where padded rows were is not known here
            raise OptionError(
                f"crop: {self.seen - length} tokens reach into a group of {self.group} stored tokens of a padded "
                f"batch; keep {start} or {start + self.group}, or take cache.copy() before the tokens to take back"
            )
        if "sink_slots" in self.parts:
            slots = self.parts["sink_slots"]
            self.parts["sink_slots"] = slots.masked_fill(slots >= start, -1)
        positions = torch.arange(start, length, device=back[0].device).unsqueeze(0)
        self.parts["keys"] = self.rebuilt_keys(back[0], positions).to(self.dtype)
        self.parts["values"] = self.rebuilt_values(back[1]).to(self.dtype)
        self.parts["key_pending"], self.parts["value_pending"] = (x.to(self.dtype) for x in back)
        if "valid" in self.parts:
            self.parts["valid"] = self.parts["valid"][:, :, :0].clone()
        for name in [name for name in self.parts if name.startswith(("key_", "value_")) and "pending" not in name]:
            count = start // self.group if self.bits == 4 and name.startswith("key_") else start
            self.parts[name] = self.parts[name][:, :, :count].clone()
        self.start = start


@dataclass(frozen=True)
class CSKV(Policy):
    """Keep r features per token of keys and of values, and the newest tokens exactly.

    Args:
        factors: one for each attention layer of the model, from `factorise` or `reconstruct`.
        density: r / h_kv, above 0 and up to 1; what a budget sets. A head's share of the rank, ``density * head_dim``,
            is rounded down to a whole number (an even one with 4 bits, so that codes fill bytes). With 1.0 in 16 bits
            features would be as large as keys and values, and these are kept.
        window: newest tokens kept exactly between two steps (the paper: 32, which counts the query's own token too).
        sinks: first tokens kept exactly; 0 is the paper.
        bits: of a feature, 16 or 4.
        group: tokens that leave the window together. 1 is the paper's sliding window; with window 0 a group of 32 is
            the blocks of its code. None: 1, and 32 with 4 bits, where these tokens share the scales of keys.
        key_share: part of the features that keys get; at another value than 0.5 both together stay as many.

    Raises:
        OptionError: a value out of its range.

    Example:
        >>> one = Moments(torch.eye(4), torch.ones(4), 1, torch.ones(4, 2), torch.ones(4, 2))
        >>> CSKV(factorise([one]), density=0.5)
        CSKV(density=0.5, window=32, sinks=4, bits=16, group=None, key_share=0.5)
    """

    factors: tuple[Factors, ...] = field(repr=False)
    density: float = 0.2
    window: int = 32
    sinks: int = 4
    bits: int = 16
    group: int | None = None
    key_share: float = 0.5
    knob = "density"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise OptionError(
                f"density={self.density}: the rank would be above the width of keys and values, or 0; use more than 0 "
                "and at most 1"
            )
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name}={getattr(self, name)}: use 0 or more tokens")
        if self.bits not in (4, 16):
            raise OptionError(f"bits={self.bits}: use 4, or 16 to quantise nothing")
        if self.together < 1 or (self.bits == 4 and self.together % 8):
            raise OptionError(
                f"group={self.group}: use 1 or more tokens, and with 4 bits a multiple of 8, so that codes fill bytes"
            )
        if not 0 < self.key_share < 1:
            raise OptionError(f"key_share={self.key_share}: use a part between 0 and 1")

    @property
    def together(self) -> int:
        """Tokens that leave the window together."""
        return self.group if self.group is not None else 32 if self.bits == 4 else 1

    def head_ranks(self, head_dim: int) -> tuple[int, int]:
        """Each head's share of r_K and of r_V.

        Example:
            >>> CSKV((), 0.2).head_ranks(64), CSKV((), 0.2, key_share=0.25).head_ranks(64)
            ((12, 12), (6, 18))
        """
        unit = 2 if self.bits == 4 else 1
        most = head_dim // unit
        equal = math.floor(self.density * most + 1e-9)
        keys = round(2 * equal * self.key_share)
        least = max(2 * equal - most, min(equal, 1))  # nobody goes away empty, or gets more than there is
        keys = min(max(keys, least), 2 * equal - least)
        return keys * unit, (2 * equal - keys) * unit

    def ranks(self, shape: LayerShape) -> tuple[int, int]:
        """r_K and r_V of a layer.

        Raises:
            OptionError: no rank is left, or the factors are of another model or of fewer columns.
        """
        if shape.index >= len(self.factors):
            raise OptionError(
                f"factors: there are {len(self.factors)}, but the model has a layer {shape.index}; make them from "
                "moments(model, ...) of this model"
            )
        factors, width = self.factors[shape.index], shape.heads * shape.head_dim
        hidden = shape.module.k_proj.in_features  # type: ignore[union-attr]
        if (factors.A_K.shape[0], factors.B_K.shape[1], factors.B_V.shape[1]) != (hidden, width, width):
            raise OptionError(
                f"factors: those of layer {shape.index} map {factors.A_K.shape[0]} channels to {factors.B_K.shape[1]}, "
                f"its projections {hidden} to {width}; make them from moments(model, ...) of this model"
            )
        shares = self.head_ranks(shape.head_dim)
        for share, have in zip(shares, (factors.A_K.shape[1], factors.A_V.shape[1]), strict=True):
            check_rank(f"density={self.density} of a head, rank", share, shape)
            if share * shape.heads > have:
                raise OptionError(
                    f"density={self.density} needs rank {share * shape.heads}, but the factors of layer {shape.index} "
                    f"have {have} (they were trained for that); train again for this density"
                )
        return shares[0] * shape.heads, shares[1] * shape.heads

    def _keeps_all(self, shape: LayerShape) -> bool:
        return self.bits == 16 and self.head_ranks(shape.head_dim) == (shape.head_dim, shape.head_dim)

    def layer(self, shape: LayerShape, streamed: bool) -> KVLayer:
        if self._keeps_all(shape):
            return TailLayer(shape.heads, streamed)
        _check_projections(shape.module)
        return CSKVLayer(self, shape, streamed)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        if self._keeps_all(shape):
            return length * shape.token_bytes
        r_K, r_V = (share * shape.heads for share in self.head_ranks(shape.head_dim))
        stored = max(0, (length - self.window) // self.together * self.together)
        window = (length - stored) * (shape.token_bytes + (r_K + r_V) * shape.itemsize)
        sinks = self.sinks * (shape.token_bytes + 4) if stored else 0
        if self.bits == 16:
            return window + sinks + stored * (r_K + r_V) * shape.itemsize
        keys = stored * r_K // 2 + 4 * r_K * (stored // self.together)
        return window + sinks + keys + stored * (r_V // 2 + 4 * (r_V // value_group(r_V) if r_V else 0))

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[float]:
        """Densities at which a rank changes, as far as the factors go."""
        unit = 2 if self.bits == 4 else 1
        every = sorted({i * unit / s.head_dim for s in shapes for i in range(1, s.head_dim // unit + 1)})
        for count, density in enumerate(every):
            try:
                for shape in shapes:
                    replace(self, density=density).ranks(shape)
            except OptionError:
                if not count:
                    raise
                return every[:count]
        return every

    def fit(self, shapes: Sequence[LayerShape], nbytes: int, length: int) -> Policy:
        """The highest density that fits; all of the cache is in 16 bits."""
        if nbytes >= length * sum(shape.token_bytes for shape in shapes):
            return replace(self, density=1.0, bits=16)
        return super().fit(shapes, nbytes, length)
