"""Attention over keys and values that are not tensors: stored in pieces, in few bits, or in another basis.

transformers calls one registered function for every attention layer, and one more that builds the mask. Both are
registered here under the name "refimpl". With an ordinary cache they do what "sdpa" does, bit for bit. With a
compressed cache the keys and values that arrive are `DeferredKV`s, and the layer of the cache answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from refimpl.core.device import read
from refimpl.core.errors import OptionError

if TYPE_CHECKING:
    from refimpl.core.cache.layer import KVLayer

NAME = "refimpl"
# transformers 5.24 renamed the argument, and warns at every use of the old name
ARGUMENT = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)
SCORES = 1 << 22  # most attention scores held at once: 16 MB in fp32 (with 64 MB attention takes twice as long)


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as a keyword argument of a model or of ``generate``, by the name that this transformers has for it.

    Example:
        >>> list(cache_argument(None)) in (["cache"], ["past_key_values"])   # from 5.24 on, and before
        True
    """
    return {ARGUMENT: cache}


class Mask:
    """The rule that says which slots a query may see; a tensor of all pairs is built only for a dense cache.

    A slot is a place in the sequence as it was fed, padding included: 0 for its first column.
    """

    def __init__(self, **rule: Any) -> None:
        self._rule = rule
        self._positions: dict[range, Tensor] = {}
        self.queries = range(rule["q_offset"], rule["q_offset"] + rule["q_length"])  # their slots
        self.keys = rule["kv_offset"] + rule["kv_length"]  # slots so far, the queries' included

    @classmethod
    def causal(cls, queries: range, rows: int, padding: Tensor | None, device: torch.device) -> Mask:
        """The causal rule for queries at the end of a sequence, for use outside a forward pass.

        Args:
            queries: their slots; the last one is the end of the sequence.
            rows: of the batch.
            padding: False for padding, bool [rows, slots]; None if there is none.
            device: of the tensors.
        """
        return cls(
            batch_size=rows,
            q_length=len(queries),
            kv_length=queries.stop,
            q_offset=queries.start,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=padding,
            device=device,
        )

    @cached_property
    def tensor(self) -> Tensor | None:
        """The mask in the form "sdpa" takes: bool [B, 1, Q, K], or None for plain causal attention."""
        return sdpa_mask(**self._rule)

    @cached_property
    def padding(self) -> Tensor | None:
        """True for real tokens, bool [B, slots so far]; None if nothing is padded."""
        self.check_width()
        given = self._rule["attention_mask"]
        return None if given is None or read(given.all()) else given

    def check_width(self) -> None:
        """Raise `OptionError` if the mask of padding ends before the sequence does: it is that of the new tokens only."""
        given = self._rule["attention_mask"]
        if given is not None and given.shape[-1] < self.keys:
            raise OptionError(
                f"attention_mask covers {given.shape[-1]} tokens, but the cache and the input have {self.keys}; "
                "pass the mask of the whole sequence, and to generate its ids: torch.cat([document, question], 1)"
            )

    @cached_property
    def first_real(self) -> Tensor | None:
        """Slot of the first real token of each row, int64 [B]; None if nothing is padded."""
        return None if self.padding is None else self.padding.int().argmax(-1)

    @cached_property
    def padded_on_the_left(self) -> bool:
        """Whether all padding, if there is any, precedes the first real token of its row."""
        if self.padding is None or self.first_real is None:
            return True
        gaps = self.padding.sum(-1) + self.first_real < self.padding.shape[-1]
        return not read(gaps.any())

    def valid(self, slots: range) -> Tensor | None:
        """The columns of `padding` for these slots."""
        return None if self.padding is None else self.padding[:, slots.start : slots.stop]

    def positions(self, slots: range) -> Tensor:
        """Positions of the tokens at these slots as ``generate`` counts them (real tokens before), int [B or 1, n].

        The same slots give the same tensor: the layers of a model ask one after the other (see `Rotary`).
        """
        if slots not in self._positions:
            if self.padding is None:
                found = torch.arange(slots.start, slots.stop, device=self._rule["device"]).unsqueeze(0)
            else:
                found = (self.padding.long().cumsum(-1) - 1).clamp(min=0)[:, slots.start : slots.stop]
            self._positions[slots] = found
        return self._positions[slots]

    def block(self, queries: range, index: range | Tensor, window: int | None = None) -> Tensor | None:
        """Visibility of the given entries to the given queries.

        Args:
            queries: slots of the queries.
            index: slots of the entries; a tensor [B, H, n] if rows or heads keep different ones (H may be 1).
            window: a query sees only so many of the latest tokens, its own included, padding not counted; None for all.

        Returns:
            bool, broadcasts against [B, H, Q, n]; None if every entry is visible.
        """
        rule = self._rule
        if rule.get("use_vmap"):
            raise OptionError(
                "attention_mask: this model overlays its causal mask with another one, which a compressed cache "
                "cannot follow; use the Full policy"
            )
        past = isinstance(index, range) and index.stop <= queries.start + 1
        if past and window is None and self.padding is None and rule.get("local_size") is None:
            return None
        device = rule["device"]
        slots = (
            torch.arange(index.start, index.stop, device=device).view(1, 1, 1, -1)
            if isinstance(index, range)
            else index.long().unsqueeze(-2)
        )
        rows = torch.arange(queries.start, queries.stop, device=device).view(1, 1, -1, 1)
        batch = torch.arange(rule["batch_size"], device=device).view(-1, 1, 1, 1)
        seen = rule["mask_function"](batch, 0, rows, slots)
        if self.padding is not None:
            seen = seen & self.padding[batch, slots]
        if window is not None:
            if not self.padded_on_the_left:  # tokens, not slots: padding between them does not count
                counts = self.positions(range(self.keys))
                slots, rows = counts[batch, slots], counts[batch, rows]
            seen = seen & (slots > rows - window)
        return seen


class DeferredKV:
    """Placeholder for the keys (or values) of a compressed layer between `update` and the attention function."""

    def __init__(self, layer: KVLayer) -> None:
        self.layer = layer

    @staticmethod
    def _refuse() -> NoReturn:
        raise OptionError(
            f"attn_implementation: a compressed cache holds no key and value tensors, so only {NAME!r} can attend to "
            f"it; call model.set_attn_implementation({NAME!r})"
        )

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse()


def by_head(rows: Tensor, matrix: Tensor) -> Tensor:
    """Products of the rows of all query heads of a group with the one matrix of their key head.

    The rows of a group are stacked into one matrix; a broadcast would copy the other one for every query head.

    Args:
        rows: [B, H, G, Q, m].
        matrix: [B, H, m, n].

    Returns:
        [B, H, G, Q, n].

    Example:
        >>> by_head(torch.ones(1, 2, 3, 1, 4), torch.ones(1, 2, 4, 5)).shape
        torch.Size([1, 2, 3, 1, 5])
    """
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])


class Segment:
    """Cache entries that are stored in one way.

    A subclass gives `keys` and `values`, or overrides `scores` and `mix` to work on the stored form (a product with
    a low-rank factor, a projected query), which is what makes a compressed cache fast.

    Attributes:
        index: slots of the entries, as `Mask.block` takes them.
        window: a query sees only so many of the latest tokens, its own included; None for all.
    """

    index: range | Tensor
    window: int | None = None

    @cached_property
    def keys(self) -> Tensor:
        """[B, H, n, d], rotated."""
        raise NotImplementedError

    @cached_property
    def values(self) -> Tensor:
        """[B, H, n, d]."""
        raise NotImplementedError

    def scores(self, query: Tensor, slots: range) -> Tensor:
        """Products with the keys, fp32 [B, H, G, Q, n].

        Args:
            query: rotated queries, fp32 [B, H, G, Q, d]: G query heads share each of the H key heads.
            slots: the Q slots they sit at.
        """
        return by_head(query, self.keys.float().transpose(-1, -2))

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sum of the values: fp32 [B, H, G, Q, n] to [B, H, G, Q, d]."""
        return by_head(weights, self.values.float())

    def visible(self, mask: Mask, slots: range) -> Tensor | None:
        """Visibility of the entries of this segment to the queries at these slots, as `Mask.block` gives it."""
        return mask.block(slots, self.index, self.window)


class Dense(Segment):
    """Entries kept uncompressed.

    Args:
        keys, values: [B, H, n, d].
        index, window: see `Segment`.
    """

    def __init__(self, keys: Tensor, values: Tensor, index: range | Tensor, window: int | None = None) -> None:
        self.keys, self.values, self.index, self.window = keys, values, index, window


def weights(
    query: Tensor, segments: Sequence[Segment], mask: Mask, slots: range, scaling: float, softcap: float | None
) -> Tensor:
    """Attention weights of the queries over all entries, softmax(scaling q k^T) where visible: fp32 [B, H, G, Q, n].

    Args:
        query: fp32 [B, H, G, Q, d].
        segments: in the order in which the n entries are wanted.
        mask: the rule of the forward pass.
        slots: of the queries.
        scaling: factor of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.

    Example:
        >>> x = torch.ones(1, 1, 2, 4)
        >>> mask = mask_rule(batch_size=1, q_length=2, kv_length=2, mask_function=causal_mask_function)
        >>> weights(x[:, :, None], [Dense(x, x, range(2))], mask, range(2), 0.5, None).tolist()
        [[[[[1.0, 0.0], [0.5, 0.5]]]]]
    """
    pieces = []
    for segment in segments:
        scores = segment.scores(query, slots) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = segment.visible(mask, slots)
        if visible is not None:  # [B, H or 1, Q, n]: the same for the query heads of a group
            scores = scores.masked_fill(~visible.unsqueeze(2), torch.finfo(scores.dtype).min)
        pieces.append(scores)
    return torch.cat(pieces, -1).softmax(-1)


def attend(
    query: Tensor,
    segments: Sequence[Segment],
    mask: Mask,
    slots: range,
    scaling: float,
    softcap: float | None = None,
    heads: int = 1,
    mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over segments, a bounded number of scores at a time.

    Args:
        query: [B, Hq, Q, d], rotated.
        segments, mask, slots, scaling, softcap: see `weights`.
        heads: H, key heads; divides Hq.
        mass: also return how much attention each entry got.

    Returns:
        Output [B, Hq, Q, d] in the dtype of `query`, and the weights summed over real queries and over the query
        heads of each group, fp32 [B, H, n] (None if not asked for).

    Example:
        >>> q, kv = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
        >>> mask = mask_rule(batch_size=1, q_length=3, kv_length=3, mask_function=lambda b, h, q, k: k <= q)
        >>> out, mass = attend(q, [Dense(kv, kv, range(3))], mask, range(3), 0.5, mass=True)
        >>> out.shape, (mass * 3).tolist()   # the first of three equal keys is seen by every query
        (torch.Size([1, 2, 3, 4]), [[[11.0, 5.0, 2.0]]])
    """
    grouped = query.unflatten(1, (heads, -1)).float()
    batch, _, groups, length, _ = grouped.shape
    sizes = [len(s.index) if isinstance(s.index, range) else s.index.shape[-1] for s in segments]
    rows = max(1, SCORES // max(1, batch * heads * groups * sum(sizes)))
    outputs: list[Tensor] = []
    total: Tensor | None = None
    for first in range(0, length, rows):
        part = slots[first : first + rows]
        shares = weights(grouped[:, :, :, first : first + rows], segments, mask, part, scaling, softcap)
        outputs.append(sum(s.mix(w) for s, w in zip(segments, shares.split(sizes, -1), strict=True)))  # type: ignore[arg-type]
        if mass:
            valid = mask.valid(part)
            if valid is not None:  # the attention that padding pays does not count
                shares = shares * valid[:, None, None, :, None]
            summed = shares.sum((2, 3))
            total = summed if total is None else total + summed
    out = torch.cat(outputs, 3) if len(outputs) > 1 else outputs[0]
    return out.flatten(1, 2).to(query.dtype), total


def mask_rule(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **rule: Any,
) -> Mask:
    """The mask of a forward pass; transformers calls this under `NAME` as it calls `masking_utils.sdpa_mask`.

    Example:
        >>> rule = mask_rule(batch_size=1, q_length=2, kv_length=2, mask_function=causal_mask_function)
        >>> rule.block(range(2), range(2)).flatten().tolist()
        [True, False, True, True]
    """
    return Mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        device=device,
        **rule,
    )


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | DeferredKV,
    value: Tensor | DeferredKV,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls under `NAME`: [B, Hq, Q, d] to [B, Q, Hq, d], and no weights.

    Example:
        >>> x = torch.ones(1, 2, 3, 4)
        >>> attention(torch.nn.Identity(), x, x, x, None)[0].shape
        torch.Size([1, 3, 2, 4])
    """
    if options.get("s_aux") is not None:
        raise OptionError(
            f"{type(module).__name__} has learned attention sinks, which {NAME!r} attention does not know; "
            "use attn_implementation='eager' and an ordinary cache"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, DeferredKV):
        if not isinstance(attention_mask, Mask):
            raise OptionError(
                "attention_mask: a compressed cache takes the two-dimensional mask of padding, not a prepared one"
            )
        return key.layer.attend(module, query, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None
    assert isinstance(value, Tensor)
    if softcap is not None and isinstance(attention_mask, Mask):  # "sdpa" cannot
        stop = attention_mask.keys
        dense = Dense(key, value, range(stop - key.shape[2], stop))
        out, _ = attend(query, [dense], attention_mask, attention_mask.queries, scale, softcap, key.shape[1])
        return out.transpose(1, 2).contiguous(), None
    return plain(module, query, key, value, attention_mask, scale, **options)


def plain(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as "sdpa" computes it, bit for bit.

    Example:
        >>> x = torch.ones(1, 2, 3, 4)
        >>> plain(torch.nn.Identity(), x, x, x, None, scaling=0.5)[0].unique().tolist()
        [1.0]
    """
    dense = mask.tensor if isinstance(mask, Mask) else mask
    return sdpa_attention_forward(module, query, key, value, dense, scaling=scaling, **options)


def single(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> Tensor:
    """Attention as "sdpa" computes it for one query a row, the query heads of a group taken together.

    The heads of a group see the same entries, so they are rows of one product with the keys, which are read once
    instead of once a head: seven times faster on a CPU in bf16 with three heads a group.

    Args:
        query: [B, Hq, 1, d].
        key, value: [B, H, n, d].
        mask: the rule of the forward pass.
        scaling: factor of the scores.

    Returns:
        [B, Hq, 1, d].

    Example:
        >>> x, mask = torch.ones(1, 4, 1, 8), mask_rule(batch_size=1, q_length=1, kv_length=3, q_offset=2,
        ...     mask_function=causal_mask_function)
        >>> single(x, x[:, :2].expand(-1, -1, 3, -1), x[:, :2].expand(-1, -1, 3, -1), mask, 0.5).shape
        torch.Size([1, 4, 1, 8])
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, mask.tensor, scale=scaling)
    return out.flatten(1, 2).unsqueeze(2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_rule)
