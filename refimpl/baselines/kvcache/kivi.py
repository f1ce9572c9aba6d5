"""KIVI: keys in few bits per channel, values in few bits per token, the newest tokens exact.

Source: Liu et al., 2024, arXiv 2402.02750, section 3 and algorithm 1.

A few channels of the keys are large in every token, so a scale per channel (over a group of tokens) keeps the others
fine; values have no such channels, and a scale per token keeps an error within its token. A group of keys can only be
quantised when all of its tokens are there: hence the window of exact tokens, which also serves quality.

One difference: the authors empty the keys' window whenever it is full, so that between 0 and ``window`` of them are
exact. Here keys and values leave together and ``window`` tokens are exact at any time, ``group`` - 1 more at most.
Scale and least value are fp16.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

import torch
from torch import Tensor

from refimpl.core.cache import Incoming, LayerShape, Policy, Segment, WindowLayer
from refimpl.core.errors import OptionError
from refimpl.core.layers.packing import pack_bits, unpack_bits


def quantise(x: Tensor, bits: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min-max codes along the last dimension (equation 1).

    Args:
        x: [..., n].
        bits: 1 to 8.
        valid: bool, broadcasts against ``x``: the numbers that set the range; None for all.

    Returns:
        Codes uint8 [..., n], step and least value fp16 [..., 1]. ``code * step + least`` is within half a step.

    Example:
        >>> codes, step, least = quantise(torch.tensor([5.0, 5.5, 6.0]), 2)
        >>> (codes * step + least).tolist()   # a range without 0 is nothing special
        [5.0, 5.66796875, 6.0]
    """
    wide = x.float()
    if valid is None:
        low, high = wide.aminmax(dim=-1, keepdim=True)
    else:
        low = wide.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
        high = wide.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
        none = low > high  # padding only
        low, high = low.masked_fill(none, 0.0), high.masked_fill(none, 0.0)
    least = low.half()
    # an fp16 step may round down: measure it from the rounded least value, and let the last code be clipped
    step = ((high - least.float()) / (2**bits - 1)).half()
    tiny = torch.finfo(torch.float16).tiny
    codes = (wide - least.float()) / step.float().clamp(min=tiny)
    return codes.round().clamp(0, 2**bits - 1).to(torch.uint8), step, least


class Quantised(Segment):
    """Groups of tokens as packed codes.

    Args:
        parts: tensors of `KIVILayer`.
        index: slots.
        bits, group, value_group: as in `KIVI`.
    """

    def __init__(self, parts: dict[str, Tensor], index: range, bits: int, group: int, value_group: int) -> None:
        self.parts, self.index = parts, index
        self.bits, self.group, self.value_group = bits, group, value_group

    # With K = codes * step + least, q K^T = (q * step) codes^T + q least^T: for few queries the scales go into the
    # query and into the weights, which are small, and the codes are used as they are.

    def scores(self, query: Tensor, slots: range) -> Tensor:
        if self._many(query):
            return super().scores(query, slots)
        p = self.parts
        rows = query.flatten(2, 3).unsqueeze(2)  # [B, H, 1, G Q, d]
        codes = unpack_bits(p["key_codes"], self.bits, self.group).float()  # [B, H, groups, d, group]
        scores = (rows * p["key_step"].float().transpose(-1, -2)) @ codes + rows @ p["key_least"].float()
        return scores.transpose(2, 3).flatten(3).unflatten(2, query.shape[2:4])

    def mix(self, weights: Tensor) -> Tensor:
        if self._many(weights):
            return super().mix(weights)
        p = self.parts
        codes = unpack_bits(p["value_codes"], self.bits, self.value_group).float()
        step, least = p["value_step"].float(), p["value_least"].float()  # [B, H, n, d / value_group, 1]
        rows = weights.flatten(2, 3)  # [B, H, G Q, n]
        mixed = [
            (rows * step[:, :, None, :, j, 0]) @ codes[:, :, :, j] + rows @ least[:, :, :, j]
            for j in range(codes.shape[3])
        ]
        return torch.cat(mixed, -1).unflatten(2, weights.shape[2:4])

    def _many(self, rows: Tensor) -> bool:
        return rows.shape[2] * rows.shape[3] > self.group

    @cached_property
    def keys(self) -> Tensor:
        p = self.parts
        codes = unpack_bits(p["key_codes"], self.bits, self.group)  # [B, H, groups, d, group]
        keys = codes * p["key_step"].float() + p["key_least"].float()
        return keys.transpose(-1, -2).flatten(2, 3)

    @cached_property
    def values(self) -> Tensor:
        p = self.parts
        codes = unpack_bits(p["value_codes"], self.bits, self.value_group)  # [B, H, n, d / value_group, value_group]
        return (codes * p["value_step"].float() + p["value_least"].float()).flatten(-2)


class KIVILayer(WindowLayer):
    """One layer of a KIVI cache.

    Parts beside the window: "key_codes" [B, H, n / group, d, bytes of a group] and "value_codes" [B, H, n,
    d / value_group, bytes], each with its step and least value, fp16.
    """

    def __init__(self, policy: KIVI, shape: LayerShape, streamed: bool) -> None:
        super().__init__(shape.heads, streamed, policy.window, policy.group)
        self.bits, self.value_group = policy.bits, gcd(policy.value_group, shape.head_dim)

    def store(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        # keys: one scale for each channel and group of tokens
        channels = keys.unflatten(2, (-1, self.group)).transpose(-1, -2)  # [B, H, groups, d, group]
        mask = None if valid is None else valid.unflatten(1, (-1, self.group))[:, None, :, None]
        codes, step, least = quantise(channels, self.bits, mask)
        self.extend(key_codes=pack_bits(codes, self.bits), key_step=step, key_least=least)
        # values: one scale for each token and group of channels
        codes, step, least = quantise(values.unflatten(-1, (-1, self.value_group)), self.bits)
        self.extend(value_codes=pack_bits(codes, self.bits), value_step=step, value_least=least)

    @property
    def _stored(self) -> Quantised:
        return Quantised(self.parts, range(self.start), self.bits, self.group, self.value_group)

    def segments(self, incoming: Incoming) -> list[Segment]:
        return [self._stored, self.tail] if self.start else [self.tail]

    def finish_prompt(self) -> None:
        if self.bits < 16:
            super().finish_prompt()

    def reach_back(self, length: int) -> None:
        # groups stay whole: the tokens of one that is cut go back to the window, as rebuilt from their codes
        whole = length // self.group
        stored = self._stored
        for name, kept in (("keys", stored.keys), ("values", stored.values)):
            back = kept[:, :, whole * self.group :].to(self.dtype)
            self.parts[name] = torch.cat([back, self.parts[name]], 2)
        if "valid" in self.parts:  # it only decides which tokens set the range of a group to come
            self.parts["valid"] = torch.nn.functional.pad(
                self.parts["valid"], (self.start - whole * self.group, 0), value=True
            )
        self.start = whole * self.group
        for name in [name for name in self.parts if name.startswith(("key_", "value_"))]:
            count = whole if name.startswith("key_") else self.start
            self.parts[name] = self.parts[name][:, :, :count].clone()


@dataclass(frozen=True)
class KIVI(Policy):
    """Quantise the tokens that have left a window of exact ones; keys per channel, values per token.

    Args:
        bits: 8, 4 or 2 per number (the paper: 2 and 4), 16 to quantise nothing; a budget sets it.
        window: tokens that stay exact (the paper: 128; its experiments on retrieval: 32 to 128).
        group: tokens that share a scale of a key channel (the paper: 32).
        value_group: channels that share a scale of a value (the paper: 32; or the largest divisor of the head dimension
            it shares with it).

    Example:
        >>> KIVI(bits=2)
        KIVI(bits=2, window=128, group=32, value_group=32)
    """

    bits: int = 4
    window: int = 128
    group: int = 32
    value_group: int = 32
    knob = "bits"

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8, 16):
            raise OptionError(f"bits={self.bits}: use 2, 4, 8, or 16 to quantise nothing")
        if self.window < 0:
            raise OptionError(f"window={self.window}: use 0 or more tokens")
        for name in ("group", "value_group"):
            if getattr(self, name) < 8 or getattr(self, name) % 8:
                raise OptionError(f"{name}={getattr(self, name)}: use a multiple of 8, so that codes fill bytes")

    def layer(self, shape: LayerShape, streamed: bool) -> KIVILayer:
        if gcd(self.value_group, shape.head_dim) % 8:
            raise OptionError(
                f"model: the heads of layer {shape.index} have {shape.head_dim} channels; KIVI packs values in "
                "groups of a multiple of 8"
            )
        return KIVILayer(self, shape, streamed)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        stored = max(0, (length - self.window) // self.group * self.group) if self.bits < 16 else 0
        d, value_group = shape.head_dim, gcd(self.value_group, shape.head_dim)
        codes = 2 * stored * d * self.bits // 8
        scales = 4 * (stored // self.group * d + stored * (d // value_group))
        return shape.heads * (codes + scales) + (length - stored) * shape.token_bytes

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[int]:
        return (2, 4, 8, 16)

    def within_budget(self, shapes: Sequence[LayerShape], nbytes: int, length: int) -> KIVI:
        """The most bits that fit; the rest of the budget widens the window."""
        best = super().within_budget(shapes, nbytes, length)
        assert isinstance(best, KIVI)
        if best.bits == 16:
            return best
        windows = range(best.window, length + 1, best.group)

        def cost(window: int) -> int:
            return sum(replace(best, window=window).nbytes(shape, length) for shape in shapes)

        return replace(best, window=windows[bisect_right(windows, nbytes, key=cost) - 1])
