"""ThinK: drop the key channels that the prompt's last queries use least.

Source: Xu et al., 2024, arXiv 2407.21018, section 3 (equations 5 and 6).

Channel i of a head adds the outer product of the queries' and the keys' column i to the scores, whose Frobenius norm is
``|Q_i| |K_i|``. With the last ``window`` queries of the first prompt, each head keeps the channels where it is largest.
Keys of tokens that leave the window of exact tokens are cut to these channels; values stay whole, so a budget has to be
above half of the full cache (the paper stacks it on SnapKV or KIVI to get below).

With grouped queries, ``Q_i`` runs over all query heads that share the key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.baselines.kvcache.snapkv import ObservingLayer
from refimpl.core.cache import CountedTail, Dense, Incoming, LayerShape, Policy, Segment
from refimpl.core.errors import OptionError


class Narrow(Dense):
    """Keys with fewer channels, [B, H, n, r]; ``channels`` [B, H, r] are the ones that were kept."""

    def __init__(self, keys: Tensor, values: Tensor, index: range, channels: Tensor) -> None:
        super().__init__(keys, values, index)
        self.channels = channels

    def scores(self, query: Tensor, slots: range) -> Tensor:
        index = self.channels.long()[:, :, None, None].expand(*query.shape[:-1], -1)
        return super().scores(query.gather(-1, index), slots)


class ThinKLayer(CountedTail, ObservingLayer):
    """One layer of a ThinK cache.

    Parts beside the tail: "narrow_keys" [B, H, n, r], "wide_values" [B, H, n, d], "channels" uint8 [B, H, r].
    """

    numbers = (*ObservingLayer.numbers, "gapped")

    def __init__(self, policy: ThinK, shape: LayerShape) -> None:
        ObservingLayer.__init__(self, shape.heads, policy.window)
        self.channels, self.group = policy.kept(shape.head_dim), policy.group
        self.narrow = self.channels < shape.head_dim

    def segments(self, incoming: Incoming) -> list[Segment]:
        p = self.parts
        if "narrow_keys" not in p:
            return [self.tail]
        stored = Narrow(p["narrow_keys"], p["wide_values"], range(self.start), p["channels"])
        return [stored, self.tail]

    def choose(self, queries: Tensor, real: Tensor | None) -> None:
        keys = self.parts["keys"].float()
        if real is not None:
            keys = keys * real[:, None, :, None]
        # equations 5 and 6: the score of channel i is ||Q_i K_i^T||_F = |Q_i| |K_i|, here squared
        norm = queries.square().sum((2, 3)) * keys.square().sum(2)  # [B, H, d]
        self.parts["channels"] = norm.topk(self.channels, dim=-1).indices.sort(-1).values.to(torch.uint8)

    def finish_prompt(self) -> None:
        if self.narrow:
            super().finish_prompt()
            self._leave()
        else:
            self.parts.pop("queries", None)
            self.parts.pop("real", None)
            self.ended = True

    def tokens_until_compress(self) -> int:
        return 1 if self.gapped else self.observed + self.group - (self.seen - self.start)

    def compress_decoded(self, incoming: Incoming, mass: Tensor | None) -> None:
        if self.ended and self.narrow:
            self._leave()

    def _leave(self) -> None:
        count = self.surplus(self.observed, self.group)
        if count:
            names = ("keys", "values", "valid") if "valid" in self.parts else ("keys", "values")
            keys, values = self.drop(count, names)[:2]
            index = self.parts["channels"].long().unsqueeze(2).expand(-1, -1, count, -1)
            self.extend(narrow_keys=keys.gather(-1, index), wide_values=values.clone())


@dataclass(frozen=True)
class ThinK(Policy):
    """Keep a share of the key channels, chosen by the prompt's last queries.

    Args:
        channels: share of the channels kept, above 0 (the paper: 0.6 and 0.5); a budget sets it.
        window: last queries of the prompt that choose, and tokens whose keys stay whole (the paper: 32).
        group: tokens that leave the window together.

    Example:
        >>> ThinK(channels=0.6).kept(64)
        38
    """

    channels: float = 0.6
    window: int = 32
    group: int = 32
    prefills = ("exact",)
    knob = "channels"

    def __post_init__(self) -> None:
        if not 0 < self.channels <= 1:
            raise OptionError(f"channels={self.channels}: use a share above 0, at most 1")
        for name in ("window", "group"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: use 1 or more tokens")

    def kept(self, head_dim: int) -> int:
        """Channels kept of ``head_dim``."""
        return max(1, int(self.channels * head_dim + 1e-9))

    def layer(self, shape: LayerShape, streamed: bool) -> ThinKLayer:
        if shape.head_dim > 256:
            raise OptionError(
                f"model: layer {shape.index} has {shape.head_dim} channels a head; ThinK numbers up to 256"
            )
        return ThinKLayer(self, shape)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        kept = self.kept(shape.head_dim)
        if kept == shape.head_dim:
            return length * shape.token_bytes
        stored = max(0, (length - self.window) // self.group * self.group)
        saved = stored * shape.heads * (shape.head_dim - kept) * shape.itemsize
        return length * shape.token_bytes - saved + shape.heads * kept  # one byte names a channel

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[float]:
        width = max(shape.head_dim for shape in shapes)
        return [kept / width for kept in range(1, width + 1)]
