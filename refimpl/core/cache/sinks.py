"""Sinks: the first real tokens of each row, kept exactly beside whatever else a policy stores.

A softmax has to put its weight somewhere. Queries that need nothing from the text put it on the first tokens, and a
model that loses these breaks (Xiao et al., 2023, arXiv 2309.17453, section 3.1). With left padding the first tokens of
a row do not sit in the first slots, and a row may not have had any real token yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from refimpl.core.cache.attention import Dense, Mask


class Sinks(Dense):
    """The sinks as a segment. They precede every query that can see the segment, so only empty places are hidden.

    Args:
        keys, values: [B, H, s, d].
        index: slots, int [B, 1, s]; -1 where a row has no such token yet.
    """

    index: Tensor

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor) -> None:
        super().__init__(keys, values, index)

    def visible(self, mask: Mask, slots: range) -> Tensor | None:
        return self.index.unsqueeze(-2) >= 0


def keep_sinks(
    parts: Mapping[str, Tensor], count: int, keys: Tensor, values: Tensor, valid: Tensor | None, first: int
) -> dict[str, Tensor]:
    """Take those of each row's first real tokens that are among some consecutive ones.

    Args:
        parts: of the layer; "sink_keys", "sink_values" [B, H, s, d] and "sink_slots" int32 [B, 1, s] once it has any.
        count: s, how many tokens of a row are sinks.
        keys, values: of the n tokens, [B, H, n, d].
        valid: True for real tokens, bool [B, n]; None if all are.
        first: slot of the first of the n tokens.

    Returns:
        The three parts, with these tokens taken in.

    Example:
        >>> x = torch.arange(5.0).view(1, 1, 5, 1)
        >>> found = keep_sinks({}, 2, x, x, torch.tensor([[False, False, True, True, True]]), first=0)
        >>> found["sink_keys"].flatten().tolist(), found["sink_slots"].flatten().tolist()
        ([2.0, 3.0], [2, 3])
    """
    rows, heads, n, dim = keys.shape
    device = keys.device
    if "sink_slots" in parts:
        sinks = {name: parts[name] for name in ("sink_keys", "sink_values", "sink_slots")}
    else:
        empty = keys.new_zeros(rows, heads, count, dim)
        slots = torch.full((rows, 1, count), -1, dtype=torch.int32, device=device)
        sinks = {"sink_keys": empty, "sink_values": empty.clone(), "sink_slots": slots}
    real = torch.ones(rows, n, dtype=torch.bool, device=device) if valid is None else valid
    # a real token's rank in its row: the sinks the row already has, and the real tokens before it among these
    had = (sinks["sink_slots"] >= 0).sum(-1)  # [B, 1]
    rank = had + real.long().cumsum(-1) - 1
    wanted = torch.arange(count, device=device).view(1, -1, 1)
    match = (rank.unsqueeze(1) == wanted) & real.unsqueeze(1)  # [B, s, n]: token j becomes sink i
    found, place = match.any(-1), match.long().argmax(-1)  # [B, s]
    for name, states in (("sink_keys", keys), ("sink_values", values)):
        taken = states.gather(2, place[:, None, :, None].expand(-1, heads, -1, dim))
        sinks[name] = torch.where(found[:, None, :, None], taken, sinks[name])
    slots = (place + first).int().unsqueeze(1)
    sinks["sink_slots"] = torch.where(found.unsqueeze(1), slots, sinks["sink_slots"])
    return sinks
