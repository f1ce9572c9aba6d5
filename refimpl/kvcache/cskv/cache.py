"""CSKV's cache: which tokens are exact and which are rebuilt, and attention to both. Step 5 of `refimpl.kvcache.cskv`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refimpl.core.arguments import checked
from refimpl.core.cache import (
    Dense,
    Incoming,
    KVLayer,
    LayerShape,
    Mask,
    Policy,
    Segment,
    Sinks,
    TailLayer,
    WindowLayer,
    check_rank,
    keep_sinks,
)
from refimpl.core.compress.driver import BATCH
from refimpl.core.device import read
from refimpl.core.errors import OptionError
from refimpl.core.layers.packing import pack_bits, unpack_bits
from refimpl.core.train.loop import Recipe
from refimpl.kernels.lowrank_decode import Inputs, lowrank_decode, unsupported
from refimpl.kvcache.cskv.factors import (
    Factors,
    check_projections,
    factorise,
    key_codes,
    key_features,
    moments,
    reconstruct,
    value_codes,
    value_features,
    value_group,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 256  # queries of a streamed text that are attended to at once

Limits = Callable[[range], Tensor]
"""Slots of Q queries to the slot where the window of each begins, int [Q]."""


class Rebuilt(Segment):
    """Tokens that have left the window, as features; those that are kept as sinks are not visible here.

    Args:
        layer: its B, biases and norm rebuild them.
        features: of keys [B, 1, n, r_K] and of values [B, 1, n, r_V].
        positions: of the n entries, int [B or 1, n].
        limits: None if all entries have left the window of every query.
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
        if absorbed > count * rank * width + groups * queries * count * width:  # many queries: rebuild V = C_V B_V once
            return super().mix(weights)
        # few queries: p V = (p C_V) B_V, the product with B_V comes last; all heads share the features
        mixed = weights.flatten(1, 3) @ self.features[1][:, 0].float()
        B_V = self.layer.B_V.float().unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, r_V, d]
        mixed = (mixed.unflatten(1, (heads, -1)) @ B_V).unflatten(2, (groups, queries))
        if self.layer.bias_V is not None:  # p (C_V B_V + b) = (p C_V) B_V + sum(p) b, with p of this segment only
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
    """The window, while many queries are attended to at once: each sees the tokens of its own window, and the sinks.

    Args:
        keys, values, index: see `Dense`.
        sinks: which entries are sinks, bool [B or 1, n].
        limits: where the window of each query begins.
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

    def append(self, incoming: Incoming) -> None:
        incoming.check(self.rotary, self.seen)
        if self.seen == 0:
            self._check(incoming)
        # C_K = X A_K and C_V = X A_V, of the inputs: before RoPE
        self.extend(
            key_pending=(incoming.hidden @ self.A_K).unsqueeze(1),
            value_pending=(incoming.hidden @ self.A_V).unsqueeze(1),
        )
        super().append(incoming)

    def _check(self, incoming: Incoming) -> None:
        """Refuse a model whose keys are not RoPE(norm(k_proj(x))) or whose values are not v_proj(x)."""
        module: Any = incoming.module
        hidden, slots = incoming.hidden[:, -1:], incoming.slots
        cos, sin = (x[:, -1:].unsqueeze(1) for x in self.rotary(incoming.mask.positions(slots)))
        keys = self.rotary.turn(self._normed(module.k_proj(hidden)), cos, sin)
        values = module.v_proj(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for name, ours, theirs in (("keys", keys, incoming.keys), ("values", values, incoming.values)):
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
            self.parts |= keep_sinks(self.parts, self.sinks, keys, values, valid, self.start - count)
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

    def tokens_until_compress(self) -> int:
        # Features in 16 bits are the same before and after they leave the window, so many queries can be attended to
        # at once, each with its own window (`Exact`). Codes exist only once a group is complete.
        return max(self.window, PIECE) if self.bits == 16 and not self.gapped else super().tokens_until_compress()

    # -- attention --

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Features C_K and C_V of the tokens that have left the window."""
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
        # K = RoPE(norm(C_K B_K + b_K))
        projected = features[:, 0].float() @ self.B_K.float()
        if self.bias_K is not None:
            projected = projected + self.bias_K.float()
        cos, sin = (x.unsqueeze(1) for x in self.rotary(positions))
        return self.rotary.turn(self._normed(projected).float(), cos, sin)

    def rebuilt_values(self, features: Tensor) -> Tensor:
        """Values from features [B, 1, n, r_V]: fp32 [B, H, n, d]."""
        # V = C_V B_V + b_V
        projected = features[:, 0].float() @ self.B_V.float()
        if self.bias_V is not None:
            projected = projected + self.bias_V.float()
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _begin(self, seen: Any) -> Any:
        """Slot at which the window begins once ``seen`` tokens have been taken in and compressed."""
        return (seen - self.window) // self.group * self.group

    def segments(self, incoming: Incoming) -> list[Segment]:
        # The paper's two branches, and sinks: one softmax over [sinks, rebuilt, window], each token visible in one of them.
        # While a prompt is open nothing leaves the window; else the last query of a piece has the latest window.
        # With padding between tokens queries come one by one, and what has left is in the store.
        stop = self.start if self.prompt_open or self.gapped else max(self.start, self._begin(self.seen - 1))
        if not stop:
            return [self.tail]
        p, limits, window = self.parts, None, self.tail
        features = list(self._stored()) if self.start else []
        if stop > self.start:
            start, device = self.start, incoming.keys.device

            def limits(slots: range) -> Tensor:
                return self._begin(torch.arange(slots.start, slots.stop, device=device)).clamp(min=start)

            leaving = [p[name][:, :, : stop - start] for name in ("key_pending", "value_pending")]
            features = [torch.cat(pair, 2) for pair in zip(features, leaving, strict=True)] if start else leaving
            tail = range(start, self.seen)
            window = Exact(p["keys"], p["values"], tail, incoming.mask.positions(tail) < self.sinks, limits)
        positions = incoming.mask.positions(range(stop))
        found: list[Segment] = [Rebuilt(self, (features[0], features[1]), positions, limits), window]
        if "sink_slots" in p:
            found.insert(0, Sinks(p["sink_keys"], p["sink_values"], p["sink_slots"]))
        return found

    def attention(self, incoming: Incoming) -> tuple[Tensor, Tensor | None]:
        inputs = self.kernel_inputs(incoming) if incoming.keys.is_cuda else None
        if inputs is not None and unsupported(inputs) is None:
            return lowrank_decode(*inputs), None
        return super().attention(incoming)

    def kernel_inputs(self, incoming: Incoming) -> Inputs | None:
        """Arguments of `refimpl.kernels.lowrank_decode` for one decoded token; None for anything it does not do."""
        if len(incoming.slots) > 1 or not self.start or incoming.softcap is not None or self._norm() is not None:
            return None
        if not self.rotary.turns_halves_of(incoming.keys.shape[-1]):
            return None
        incoming.mask.block(incoming.slots, range(0))  # refuses masks that are more than causal
        if not incoming.mask.padded_on_the_left:
            return None  # the kernel takes a token's position to be its slot less the padding before it
        first = incoming.mask.first_real
        p = self.parts
        seen = None
        if first is not None or self.start < self.sinks:
            window = torch.ones_like(p["keys"][:, 0, :, 0], dtype=torch.bool)
            valid = incoming.mask.valid(range(self.start, self.seen))
            seen = window if valid is None else valid
            if "sink_slots" in p:
                seen = torch.cat([p["sink_slots"][:, 0] >= 0, seen], 1)
        bits4 = self.bits == 4
        return Inputs(
            query=incoming.query,
            keys=p["key_codes" if bits4 else "key_features"],
            values=p["value_codes" if bits4 else "value_features"],
            key_factor=self.B_K,
            value_factor=self.B_V,
            frequencies=self.rotary.frequencies.to(incoming.query.device),
            near_keys=p["keys"],
            near_values=p["values"],
            scaling=incoming.scaling,
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
        # Features stay stored. Of codes, a group that is cut goes back to the window, as rebuilt from its codes.
        stored, start = self._stored(), length if self.bits == 16 else length // self.group * self.group
        back = [features[:, :, start:length] for features in stored]
        if length > start and "valid" in self.parts:  # which of the stored tokens were padding is not known here
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
        factors: one for each attention layer of the model, from `fit` (or `factorise`, `reconstruct`).
        density: r / h_kv, above 0 and up to 1; a budget sets it. A head's share of the rank, ``density * head_dim``,
            is rounded down to a whole number (an even one with 4 bits, so that codes fill bytes). With 1.0 in 16 bits
            features would be as large as keys and values, and these are kept.
        window: newest tokens kept exactly between two steps (the paper: 32, which counts the query's own token too).
        sinks: first tokens kept exactly; 0 is the paper.
        bits: of a feature, 16 or 4.
        group: tokens that leave the window together. 1 is the paper's sliding window; with window 0 a group of 32 is
            the blocks of its code. None: 1, and 32 with 4 bits, where these tokens share the scales of keys.
        key_share: share of the features that keys get; the number of keys' and values' features together stays.

    Raises:
        OptionError: a value out of its range.

    Example:
        >>> CSKV(density=0.5)   # call `fit` before use
        CSKV(density=0.5, window=32, sinks=4, bits=16, group=None, key_share=0.5)
    """

    factors: tuple[Factors, ...] = field(default=(), repr=False)
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
        """Features of the key and of the value for each key-value head: r_K / H and r_V / H.

        Example:
            >>> CSKV((), 0.2).head_ranks(64), CSKV((), 0.2, key_share=0.25).head_ranks(64)
            ((12, 12), (6, 18))
        """
        unit = 2 if self.bits == 4 else 1
        most = head_dim // unit
        equal = math.floor(self.density * most + 1e-9)
        keys = round(2 * equal * self.key_share)
        least = max(2 * equal - most, min(equal, 1))  # neither gets nothing, or more than there is
        keys = min(max(keys, least), 2 * equal - least)
        return keys * unit, (2 * equal - keys) * unit

    def ranks(self, shape: LayerShape) -> tuple[int, int]:
        """r_K and r_V of a layer.

        Raises:
            OptionError: no rank is left, or the factors are of another model or of fewer columns.
        """
        if shape.index >= len(self.factors):
            raise OptionError(
                f"factors: there are {len(self.factors)}, but the model has a layer {shape.index}; call "
                "fit(model, tokens) with this model"
            )
        factors, width = self.factors[shape.index], shape.heads * shape.head_dim
        hidden = shape.module.k_proj.in_features  # type: ignore[union-attr]
        if (factors.A_K.shape[0], factors.B_K.shape[1], factors.B_V.shape[1]) != (hidden, width, width):
            raise OptionError(
                f"factors: those of layer {shape.index} map {factors.A_K.shape[0]} channels to {factors.B_K.shape[1]}, "
                f"its projections {hidden} to {width}; call fit(model, tokens) with this model"
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
        check_projections(shape.module)
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

    @checked()
    def fit(
        self,
        model: PreTrainedModel,
        tokens: Any,
        *,
        init: str = "closed_form",
        recipe: Recipe | None = None,
        batch_size: int = BATCH,
        progress: bool = True,
    ) -> CSKV:
        """Steps 1 to 4: factors for a model, from its weights and calibration tokens.

        Args:
            model: a Llama-, Qwen- or Gemma-like model; not changed.
            tokens: token ids int [sequences, length], or an object with such a tensor as ``.ids``.
            init: see `factorise`; the paper: "asvd".
            recipe: train the factors layer by layer with it, as the paper does (see `reconstruct`), for the density and
                bits of this policy. None does not train; "closed_form" is the optimum of that training already.
            batch_size: sequences at a time in the forward passes.
            progress: show bars while training.

        Returns:
            This policy with factors.

        Raises:
            OptionError, CalibrationError: see `moments`.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
            ...     intermediate_size=16, vocab_size=50))
            >>> CSKV(density=0.5).fit(model, torch.randint(0, 50, (4, 32))).factors
            (Factors(16 for keys, 16 for values),)
        """
        fitted = replace(self, factors=factorise(moments(model, tokens, batch_size), init))
        return fitted if recipe is None else reconstruct(model, fitted, tokens, recipe, batch_size, progress)

    def within_budget(self, shapes: Sequence[LayerShape], nbytes: int, length: int) -> Policy:
        """The highest density that fits; all of the cache is in 16 bits."""
        if nbytes >= length * sum(shape.token_bytes for shape in shapes):
            return replace(self, density=1.0, bits=16)
        return super().within_budget(shapes, nbytes, length)
