"""CSKV's factors: moments of the inputs, A and B from them (SVD, ASVD, closed form), codes, and the training of A and B.

Steps 1 to 4 of `refimpl.kvcache.cskv`. Notation as in the paper, rows are tokens: X [n, h] are inputs of a layer's
projections, W [h, h_kv] is W_K or W_V, and ``X W ~ (X A) B`` with A [h, r] and B [r, h_kv].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from refimpl.baselines.kvcache.kivi import quantise
from refimpl.baselines.svd import balanced, truncated_svd
from refimpl.core.cache import CompressedCache, attention_modules, hidden_states
from refimpl.core.cache.content import storable
from refimpl.core.compress.driver import BATCH, block_inputs, calibration_batches
from refimpl.core.compress.sites import Site, find_blocks
from refimpl.core.compress.stats import Collector
from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.loop import Recipe, batches, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refimpl.kvcache.cskv.cache import CSKV

INITS = ("closed_form", "asvd", "svd", "random")
VALUE_GROUP = 32  # codes of values that share a scale, at most


# -- steps 1 and 2: factors --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of one layer's inputs, and its projections: all that its factors are made from.

    Attributes:
        gram: sum over tokens of x x^T at the input of the projections, fp32 [h, h].
        mean_abs: mean over tokens of abs(x), fp32 [h].
        tokens: number of tokens.
        W_K, W_V: the projections, [h, h_kv], in the model's dtype.
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: int
    W_K: Tensor
    W_V: Tensor


@storable
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
        scale: weight of each input channel, positive [h]; None for plain SVD. A constant factor changes nothing.

    Returns:
        A [h, R] and B [R, h_kv] with R = min(h, h_kv); singular values are split evenly.

    Example:
        >>> A, B = svd(torch.diag(torch.tensor([1.0, 4.0])))
        >>> (A[:, :1] @ B[:1]).abs().tolist()
        [[0.0, 0.0], [0.0, 4.0]]
    """
    # S W = U Sigma V^T with S = diag(scale); A = S^-1 U Sigma^(1/2), B = Sigma^(1/2) V^T
    A, B = balanced(*truncated_svd(W if scale is None else scale[:, None] * W, min(W.shape)))
    return A if scale is None else A / scale[:, None], B


def asvd_scale(mean_abs: Tensor, alpha: float = 0.5, offset: float = 1e-6) -> Tensor:
    """Step 2: the weight ASVD gives to each input channel, ``(mean |x| + offset) ** alpha``.

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
    """Random factors of the size `torch.nn.Linear` starts with: the control of the paper's ablation.

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
    return ((gram @ lost) * lost).sum() / (tokens * W.shape[1])  # ||X lost||^2 = tr(lost^T X^T X lost)


def _projections(model: nn.Module) -> list[nn.Module]:
    """The attention modules, each with a projection of its own for keys and for values."""
    modules = attention_modules(model)
    if not modules:
        raise OptionError(f"model: {type(model).__name__} has no attention layer known to transformers' caches")
    for module in modules:
        check_projections(module)
    return modules


def check_projections(module: nn.Module) -> None:
    """Raise `OptionError` unless an attention module makes keys and values in a way that CSKV can repeat.

    Example:
        >>> check_projections(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: model: CSKV replaces the projections k_proj and v_proj, but Linear has none; ...
    """
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


def _token_batches(model: PreTrainedModel, calibration: Any, batch_size: int) -> list[Tensor]:
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    return calibration_batches(calibration, batch_size, vocabulary)


@torch.no_grad()
def moments(model: PreTrainedModel, calibration: Any, batch_size: int = BATCH) -> tuple[Moments, ...]:
    """Step 1: run the model once over some text and sum up the inputs of each attention layer.

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
    pieces = _token_batches(model, calibration, batch_size)
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
    """Step 2 for all layers, at full rank; `CSKV` cuts them to its rank.

    Args:
        found: from `moments`.
        init: "closed_form", "asvd" (the paper's), "svd" or "random".
        alpha: exponent of ASVD's scale.
        seed: of random factors.

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
    """Number of value features that share a scale: the largest even divisor of the rank up to 32.

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
    """The numbers that codes stand for, ``code * step + least``, fp32.

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
    """``rounded`` in the forward pass, the gradient of ``x`` in the backward pass, also at the ends of the range.

    Example:
        >>> x = torch.tensor([0.4, 9.0], requires_grad=True)
        >>> straight_through(x, x.detach().round()).sum().backward()
        >>> x.grad.tolist()
        [1.0, 1.0]
    """
    return x + (rounded - x).detach()


# -- step 3: training ---------------------------------------------------------------------------------------------------


class Fit(nn.Module):
    """The factors of one layer while they are trained.

    Args:
        start: the factors to start from; they are cut to the ranks.
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
        """The factors as they are now."""
        return Factors(*(parameter.detach().clone() for parameter in (self.A_K, self.B_K, self.A_V, self.B_V)))


def fit_loss(fit: nn.Module, X: Tensor, W_K: Tensor, W_V: Tensor) -> Tensor:
    """Step 3: the MSE of keys plus the MSE of values, mean((X W_K - X A_K B_K)^2) + mean((X W_V - X A_V B_V)^2).

    Both sides are taken before RoPE. A rotation of both sides would not change it, since rotations keep lengths.

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
    """Steps 3 and 4: train the factors of every layer on its exact keys and values.

    The model is run once, block by block; the inputs of one layer are held at a time, and its factors trained on them,
    one sequence a step. With ``policy.bits == 4`` features pass through the quantiser of the cache.

    Args:
        model: a decoder of transformers; not changed.
        policy: the factors to start from, and the density, bits and group to train for.
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
        >>> from refimpl.kvcache.cskv import CSKV
        >>> start = CSKV(factorise(moments(model, tokens), "asvd"), density=0.5)
        >>> reconstruct(model, start, tokens, Recipe(steps=5), progress=False).factors
        (Factors(8 for keys, 8 for values),)
    """
    recipe = recipe or Recipe(steps=200, lr=1e-3)
    modules = _projections(model)
    ranks = [policy.ranks(CompressedCache.layer_shape(model, index)) for index in range(len(modules))]
    pieces = _token_batches(model, calibration, batch_size)
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
        with torch.no_grad(), hidden_states([modules[i] for i in inside]) as inputs:
            walk.run(block, index, keep=True)
        for i, seen in zip(inside, inputs, strict=True):
            X = torch.cat([x[:, :length] for x in seen])
            W_K, W_V = (Site("", i, modules[i], name).weight.T.float() for name in ("k_proj", "v_proj"))
            fit = Fit(policy.factors[i], ranks[i], policy.together if policy.bits == 4 else None)
            fit.to(W_K.device)
            loss = lambda fit, batch, W_K=W_K, W_V=W_V: fit_loss(fit, batch[0].float(), W_K, W_V)  # noqa: E731
            train(fit, batches(X, batch_size=1, seed=recipe.seed), loss, recipe, progress=progress)
            done[i] = fit.factors()
    return replace(policy, factors=tuple(done[i] for i in range(len(modules))))
