"""StreamingLLM: the first few tokens and a sliding window.

Source: Xiao et al., 2023, arXiv 2309.17453, section 3.2.

Attention puts the weight it has no use for on the first tokens ("sinks"); a plain sliding window drops them and the
model breaks. Kept beside the window they let it run forever. The tokens between are gone.

Positions count places in the cache, not in the text: a query sees its window at the true distances and the sinks right
before it. RoPE depends on distances only, so keys stay as they came, and for its products with the sinks a query is
turned back by the number of tokens dropped between. A forward pass of many tokens does this for each query, so a
prompt fed in one piece, in chunks or token by token gives one result. Padding has no place: it is counted nowhere, though
its slots stay in memory for as long as they lie inside a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.core.cache import Dense, Incoming, LayerShape, Mask, Policy, Rotary, Segment, Sinks, TailLayer, keep_sinks
from refimpl.core.device import read
from refimpl.core.errors import OptionError


class DistantSinks(Sinks):
    """Sinks that are seen by the queries whose window they have left, at the distance they have in the cache.

    Args:
        keys, values, index: see `Sinks`.
        mask: of the forward pass; it counts the real tokens before a query.
        reach: window of the queries.
        rotary: of the layer.
    """

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor, mask: Mask, reach: int, rotary: Rotary) -> None:
        super().__init__(keys, values, index)
        self.mask, self.reach, self.rotary = mask, reach, rotary

    def scores(self, query: Tensor, slots: range) -> Tensor:
        # positions are places in the cache: turn the query back by the tokens dropped between the sinks and its window
        sinks = (self.index[:, 0] >= 0).sum(-1, keepdim=True)  # [B, 1]
        dropped = (self.mask.positions(slots) - self.reach + 1 - sinks).clamp(min=0)  # [B, Q]
        angles = dropped.unsqueeze(-1) * self.rotary.frequencies.to(query.device)
        angles = torch.cat([angles, angles], -1)[:, None, None]
        return super().scores(self.rotary.turn(query, angles.cos(), -angles.sin()), slots)

    def visible(self, mask: Mask, slots: range) -> Tensor | None:
        before = mask.positions(slots)[:, None, :, None] - self.reach  # nearer ones are still in the window
        position = torch.arange(self.index.shape[-1], device=self.keys.device)
        return (self.index.unsqueeze(-2) >= 0) & (position <= before)


class StreamingLayer(TailLayer):
    """One layer of a StreamingLLM cache: the window, and the parts of `keep_sinks`."""

    def __init__(self, sinks: int, window: int, shape: LayerShape, rotary: Rotary) -> None:
        super().__init__(shape.heads, streamed=True)
        self.sinks, self.window, self.rotary = sinks, window, rotary

    def append(self, incoming: Incoming) -> None:
        incoming.check(self.rotary, self.seen)
        super().append(incoming)
        if incoming.mask.padding is not None or incoming.slots.start < self.sinks:
            i = incoming
            self.parts |= keep_sinks(self.parts, self.sinks, i.keys, i.values, i.valid, i.slots.start)

    def segments(self, incoming: Incoming) -> list[Segment]:
        p = self.parts
        tail = Dense(p["keys"], p["values"], range(self.start, self.seen), self.window)
        if not self.sinks or self.seen <= self.window:
            return [tail]
        sinks = p["sink_keys"], p["sink_values"], p["sink_slots"]
        return [DistantSinks(*sinks, incoming.mask, self.window, self.rotary), tail]

    def tokens_until_compress(self) -> int:
        return max(self.window, 64)  # the result is the same for any number; this one bounds time and memory

    def compress_decoded(self, incoming: Incoming, mass: Tensor | None) -> None:
        start = self.seen - self.window
        if start > self.start and not incoming.mask.padded_on_the_left:
            # padding between tokens has no place in a window: back to the slot where the longest one begins
            count, real = incoming.mask.positions(range(self.seen)), incoming.mask.valid(range(self.seen))
            assert real is not None  # else nothing is padded
            inside = real & (count > count[:, -1:] - self.window)
            first = torch.where(inside.any(-1), inside.int().argmax(-1), self.seen)
            start = min(start, int(read(first.min())))
        if start > self.start:
            self.drop(start - self.start)


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keep the first ``sinks`` tokens and the last ``window``; memory never grows beyond them.

    Args:
        sinks: first tokens kept (the paper: 4; padding does not count).
        window: last tokens kept, the current one included (the paper: 1020 and more); None keeps all; a budget sets it.

    Example:
        >>> StreamingLLM(window=252)
        StreamingLLM(sinks=4, window=252)
    """

    sinks: int = 4
    window: int | None = 1020
    prefills = ("streamed",)
    knob = "window"

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise OptionError(f"sinks={self.sinks}: use 0 or more tokens")
        if self.window is not None and self.window < 1:
            raise OptionError(f"window={self.window}: use 1 or more tokens, or None for all")

    def layer(self, shape: LayerShape, streamed: bool) -> TailLayer:
        rotary = shape.rotation(self)
        if self.window is None:
            return TailLayer(shape.heads, streamed=True)
        return StreamingLayer(self.sinks, self.window, shape, rotary)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        if self.window is None:
            return length * shape.token_bytes
        return (self.sinks + min(length, self.window)) * shape.token_bytes + 4 * self.sinks

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[int | None]:
        return [*range(1, length), None]
