"""H2O: the tokens that got most attention so far, and the newest ones.

Source: Zhang et al., 2023, arXiv 2306.14048, section 4 and algorithm 1.

Every entry carries the attention it has received, summed over all queries so far. When there are more entries than
the capacity, the one with the least attention leaves, the newest excepted; each head keeps its own. An entry that has
left is gone. Early entries had more queries to collect from: the rule favours old tokens, as in the paper.

With grouped queries an entry belongs to a key head and collects from all query heads that share it. A prompt is first
attended to as a whole, then cut to the capacity at once, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.core.cache import Dense, Incoming, KVLayer, LayerShape, Policy, Segment, UpTo
from refimpl.core.errors import OptionError


class H2OLayer(KVLayer):
    """One layer of an H2O cache.

    Parts: "keys", "values" [B, H, n, d], "slots" int32 and "mass" fp32 [B, H, n], in the order of the text.
    """

    needs_mass = True
    wide = ("mass",)
    numbers = (*KVLayer.numbers, "gapped")

    def __init__(self, policy: H2O, shape: LayerShape, streamed: bool) -> None:
        super().__init__(shape.heads, streamed)
        self.capacity, self.recent = policy.capacity, policy.newest

    def reset(self) -> None:
        super().reset()
        self.gapped = False  # padding lies between real tokens

    def append(self, incoming: Incoming) -> None:
        self.gapped = not incoming.mask.padded_on_the_left
        rows, heads, count, _ = incoming.keys.shape
        slots = torch.arange(incoming.slots.start, incoming.slots.stop, dtype=torch.int32, device=incoming.keys.device)
        # padding starts at minus infinity and leaves first
        mass = torch.zeros(rows, heads, count, device=incoming.keys.device)
        if incoming.valid is not None:
            mass = mass.masked_fill(~incoming.valid.unsqueeze(1), -torch.inf)
        self.extend(keys=incoming.keys, values=incoming.values, slots=slots.expand(rows, heads, -1), mass=mass)

    def segments(self, incoming: Incoming) -> list[Segment]:
        p = self.parts
        return [Dense(p["keys"], p["values"], p["slots"])]

    def observe(self, incoming: Incoming, mass: Tensor | None) -> None:
        assert mass is not None
        self.parts["mass"] = self.parts["mass"] + mass

    def tokens_until_compress(self) -> int:
        return 1 if self.capacity is None or not self.parts else max(1, self.capacity - self.parts["keys"].shape[2])

    def compress_decoded(self, incoming: Incoming, mass: Tensor | None) -> None:
        self.observe(incoming, mass)
        self.finish_prompt()

    def finish_prompt(self) -> None:
        count = self.parts["keys"].shape[2]
        if self.capacity is None or count <= self.capacity:
            return
        # algorithm 1: the newest stay; of the older entries, those with the most attention so far; kept: [B, H, capacity]
        older = count - self.recent
        mass = self.parts["mass"]
        if self.gapped:  # the newest real tokens, wherever they are; padding leaves first
            real = mass > -torch.inf
            newest = real & (real.flip(-1).cumsum(-1).flip(-1) <= self.recent)
            kept = mass.masked_fill(newest, torch.inf).topk(self.capacity, dim=-1).indices.sort(-1).values
        else:
            best = mass[..., :older].topk(self.capacity - self.recent, dim=-1).indices.sort(-1).values
            kept = torch.cat([best, torch.arange(older, count, device=best.device).expand(*best.shape[:2], -1)], -1)
        # whole rows of a flattened tensor: several times faster than `gather` along one dimension
        rows = torch.arange(kept.shape[0] * kept.shape[1], device=kept.device).view(*kept.shape[:2], 1)
        index = (rows * count + kept).flatten()
        for name, tensor in self.parts.items():
            taken = tensor.flatten(0, 2).index_select(0, index)
            self.parts[name] = taken.view(*kept.shape, *tensor.shape[3:])

    def crop_to(self, length: int) -> None:
        raise OptionError(
            f"crop: the {self.seen - length} tokens have changed what other entries collected, and entries may have "
            "left since; take cache.copy() before the tokens you want to take back"
        )


@dataclass(frozen=True)
class H2O(Policy):
    """Keep the heavy hitters and the newest entries of each key head.

    Args:
        capacity: entries kept per key head; None keeps all; a budget sets it. (The paper: a fifth of the prompt.)
        recent: share of the capacity that goes to the newest entries (the paper: a half).

    Example:
        >>> H2O(capacity=64).newest
        32
    """

    capacity: int | None = None
    recent: float = 0.5
    knob = "capacity"

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity < 2:
            raise OptionError(f"capacity={self.capacity}: use 2 or more entries, or None for all")
        if not 0 <= self.recent < 1:
            raise OptionError(f"recent={self.recent}: use a share from 0 to less than 1")

    @property
    def newest(self) -> int:
        """Newest entries that never leave: at least the current one."""
        return 1 if self.capacity is None else max(1, int(self.capacity * self.recent))

    def layer(self, shape: LayerShape, streamed: bool) -> H2OLayer:
        return H2OLayer(self, shape, streamed)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        kept = length if self.capacity is None else min(length, self.capacity)
        return kept * (shape.token_bytes + 8 * shape.heads)  # with a slot and a mass for each entry

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[int | None]:
        return UpTo(2, length)
