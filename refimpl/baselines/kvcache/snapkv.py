"""SnapKV: the entries that the end of the prompt attends to are those the answer will need.

Source: Li et al., 2024, arXiv 2404.14469, section 4 and listing 1.

1. The last ``window`` queries of the prompt attend to all of it; their weights are summed, for each key head over the
   query heads that share it.
2. The sums are averaged over ``kernel`` neighbours, so that the entries kept come in readable runs.
3. The best entries and the window stay, ``capacity`` together, each head its own. All later tokens stay.

Only the first prompt is cut: later turns are kept as they come, as the paper says nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from refimpl.core.cache import Dense, Incoming, LayerShape, Mask, Policy, Segment, TailLayer, UpTo, weights
from refimpl.core.errors import OptionError


class ObservingLayer(TailLayer):
    """Remembers the last ``window`` queries of the first prompt until it ends.

    Parts while it is open: "queries" [B, Hq, w, d], and "real" bool [B, n] if there is padding.
    """

    numbers = (*TailLayer.numbers, "ended")

    def __init__(self, heads: int, window: int) -> None:
        super().__init__(heads, streamed=False)
        self.observed = window

    def reset(self) -> None:
        super().reset()
        self.ended = False

    def observe(self, incoming: Incoming, mass: Tensor | None) -> None:
        if self.ended:
            return
        old = self.parts.get("queries")
        queries = incoming.query if old is None else torch.cat([old, incoming.query], 2)
        self.parts["queries"] = queries[:, :, -self.observed :].clone()
        if incoming.mask.padding is not None:
            self.parts["real"] = incoming.mask.padding[:, : self.seen]
        self.scaling, self.softcap = incoming.scaling, incoming.softcap

    def finish_prompt(self) -> None:
        if self.ended:
            return
        self.ended = True
        queries = self.parts.pop("queries").unflatten(1, (self.heads, -1)).float()
        real = self.parts.pop("real", None)
        if real is not None:  # the queries of padding do not count
            queries = queries * real[:, None, None, -queries.shape[3] :, None]
        self.choose(queries, real)

    def choose(self, queries: Tensor, real: Tensor | None) -> None:
        """Compress the prompt.

        Args:
            queries: its last queries, fp32 [B, H, G, w, d]; zero where they are padding.
            real: False for padding, bool [B, n]; None if there is none.
        """
        raise NotImplementedError

    def crop_to(self, length: int) -> None:
        if "queries" in self.parts:
            raise OptionError(
                "crop: the prompt is still open and its last queries would change; call cache.finish() first, or take "
                "cache.copy() before the tokens you want to take back"
            )
        super().crop_to(length)


class SnapKVLayer(ObservingLayer):
    """One layer of a SnapKV cache.

    Parts beside the tail: "kept_keys", "kept_values" [B, H, n, d] and "kept_slots" int32 [B, H, n].
    """

    def __init__(self, policy: SnapKV, shape: LayerShape) -> None:
        super().__init__(shape.heads, policy.window)
        self.capacity, self.kernel = policy.capacity, policy.kernel

    def segments(self, incoming: Incoming) -> list[Segment]:
        p = self.parts
        if "kept_keys" not in p:
            return [self.tail]
        return [Dense(p["kept_keys"], p["kept_values"], p["kept_slots"]), self.tail]

    def choose(self, queries: Tensor, real: Tensor | None) -> None:
        if self.capacity is None or self.seen <= self.capacity:
            return
        older = self.seen - queries.shape[3]
        slots = range(older, self.seen)
        mask = Mask.causal(slots, queries.shape[0], real, queries.device)
        shares = weights(queries, [self.tail], mask, slots, self.scaling, self.softcap)
        if real is not None:
            shares = shares * real[:, None, None, older:, None]
        votes = shares[..., :older].sum((2, 3))  # step 1: [B, H, n]
        votes = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)  # step 2
        if real is not None:  # padding beside real tokens has votes now
            votes = votes.masked_fill(~real[:, None, :older], -1.0)
        # step 3
        best = votes.topk(self.capacity - len(slots), dim=-1).indices.sort(-1).values
        index = best.unsqueeze(-1).expand(-1, -1, -1, self.parts["keys"].shape[-1])
        keys, values = self.drop(older)
        self.parts |= {
            "kept_keys": keys.gather(2, index),
            "kept_values": values.gather(2, index),
            "kept_slots": best.int(),
        }


@dataclass(frozen=True)
class SnapKV(Policy):
    """Cut the prompt to the entries its end attends to; keep every later token.

    Args:
        capacity: entries of the prompt kept per key head, the window included; None keeps all; a budget sets it.
        window: last tokens of the prompt, which observe and stay (the paper: 16 to 64).
        kernel: entries averaged, odd (the authors' default: 5).

    Example:
        >>> SnapKV(capacity=256)
        SnapKV(capacity=256, window=32, kernel=5)
    """

    capacity: int | None = None
    window: int = 32
    kernel: int = 5
    prefills = ("exact",)
    knob = "capacity"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise OptionError(f"window={self.window}: use 1 or more tokens")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"kernel={self.kernel}: use an odd number")
        if self.capacity is not None and self.capacity <= self.window:
            raise OptionError(f"capacity={self.capacity}: use more than the window={self.window}, or None for all")

    def layer(self, shape: LayerShape, streamed: bool) -> SnapKVLayer:
        return SnapKVLayer(self, shape)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        if self.capacity is None or length <= self.capacity:
            return length * shape.token_bytes
        return self.capacity * shape.token_bytes + 4 * shape.heads * (self.capacity - self.window)

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[int | None]:
        return UpTo(self.window + 1, length - 1)
