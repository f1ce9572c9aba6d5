"""Attention of one new token on a low-rank cache (CSKV): features of keys and values, a window and sinks as they are.

The cache holds for each token r numbers for the keys of *all* heads of a layer and r for the values. Values never have
to come back: ``sum_t p_t (c_t B_V) = (sum_t p_t c_t) B_V``, so one sum over features and one small product at the end.
Keys do: RoPE turns every key by its own position, between the factor and the product with the query, so nothing can be
absorbed. Keys are rebuilt a tile at a time, in registers, and never written:

    for each tile of tokens:   K = C_K B_K (+ b_K)      turned by the positions of its tokens
                               s = q K^T * scaling      p = exp(s - max)      o += p C_V

With split halves K = [K1, K2] and q = [q1, q2], turning costs four products: ``s = q1.(K1 cos - K2 sin) +
q2.(K2 cos + K1 sin)``. Rebuilding takes 2 r h_kv operations a token on 2 r bytes of features (16 bits): about h_kv
operations a byte, more than a GPU can do while it reads; ordinary attention to a full cache is limited by its bytes. So
this trades the bytes of the cache for arithmetic (`cost`, `roofline`).

Tokens are split among programs; each keeps its maximum, its sum and its ``o``, and a second pass adds them in a fixed
order and multiplies by B_V.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    """One token a row, n stored tokens, and some that are kept whole: ``lowrank_decode(*inputs)``.

    Attributes:
        query: [B, Hq, 1, d], rotated; Hq a multiple of H. float16 or bfloat16 for the kernel.
        keys: features before RoPE in the dtype of the query, [B, 1, n, r_K]; or, with `key_step`, 4-bit codes along
            tokens, uint8 [B, 1, n / group, r_K, group / 2], the low half of a byte first.
        key_step, key_least: ``feature = code * step + least``, [B, 1, n / group, r_K, 1] each; None for features.
        values: [B, 1, n, r_V]; or, with `value_step`, codes along channels, uint8 [B, 1, n, groups, bytes]: each group
            has r_V / groups channels, in at least half as many bytes.
        value_step, value_least: [B, 1, n, groups, 1] each; None for features.
        key_factor, value_factor: B_K [r_K, H * d] and B_V [r_V, H * d], in the dtype of the query.
        key_bias, value_bias: [H * d], added to what is rebuilt (before RoPE); None for none.
        frequencies: radians a token, fp32 [d / 2].
        near_keys, near_values: the window, [B, H, m, d], keys rotated; m may be 0 where there are sinks.
        sink_keys, sink_values: the same for the first tokens, [B, H, s, d]; None for none.
        first: slot of the first real token of each row (what is left of it is padding), integers [B]; None for 0.
        seen: which of the sinks, then of the window, the query sees, bool [B, s + m]; None for all.
        start: slot of the first stored token. A stored token at a slot has position ``slot - first``.
        hidden: so many of the first real tokens are not seen in the store (they are kept as sinks).
        factor: what cos and sin are multiplied with (1 but for YaRN).
        scaling: of the scores.

    Example:
        >>> near = torch.zeros(1, 1, 1, 2)
        >>> inputs = Inputs(query=torch.ones(1, 2, 1, 2), keys=torch.ones(1, 1, 3, 1), values=torch.ones(1, 1, 3, 1),
        ...     key_factor=torch.zeros(1, 2), value_factor=torch.tensor([[0.0, 3.0]]), frequencies=torch.ones(1),
        ...     near_keys=near, near_values=near, scaling=1.0)
        >>> lowrank_decode(*inputs).flatten(1).tolist()   # four equal weights, two query heads that share a key head
        [[0.0, 2.25, 0.0, 2.25]]
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    key_factor: Tensor
    value_factor: Tensor
    frequencies: Tensor
    near_keys: Tensor
    near_values: Tensor
    scaling: float
    key_step: Tensor | None = None
    key_least: Tensor | None = None
    value_step: Tensor | None = None
    value_least: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None
    first: Tensor | None = None
    seen: Tensor | None = None
    start: int = 0
    hidden: int = 0
    factor: float = 1.0

    @property
    def stored(self) -> int:
        """n."""
        return self.keys.shape[2] * (1 if self.key_step is None else 2 * self.keys.shape[4])


def dequantise_keys(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """Features of 4-bit keys, fp32 [B, n, r]; arguments as `Inputs`.

    Example:
        >>> codes = torch.tensor([0x10, 0x32], dtype=torch.uint8).view(1, 1, 1, 1, 2)   # four tokens, one channel
        >>> dequantise_keys(codes, torch.full((1, 1, 1, 1, 1), 0.5), torch.ones(1, 1, 1, 1, 1)).flatten().tolist()
        [1.0, 1.5, 2.0, 2.5]
    """
    features = _nibbles(codes).float() * step.float() + least.float()  # [B, 1, groups, r, group]
    return features.squeeze(1).transpose(-1, -2).flatten(1, 2)


def dequantise_values(codes: Tensor, step: Tensor, least: Tensor, rank: int) -> Tensor:
    """Features of 4-bit values, fp32 [B, n, rank]; arguments as `Inputs`.

    Example:
        >>> codes = torch.tensor([[0x10, 0x02], [0x43, 0x05]], dtype=torch.uint8).view(1, 1, 1, 2, 2)
        >>> scale = torch.ones(1, 1, 1, 2, 1)
        >>> dequantise_values(codes, scale, 0 * scale, 6).flatten().tolist()   # two groups of three channels
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    group = rank // codes.shape[-2]
    return (_nibbles(codes)[..., :group].float() * step.float() + least.float()).squeeze(1).flatten(-2)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., bytes] to [..., 2 * bytes], the low half of a byte first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def turn(keys: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """RoPE with split halves.

    Args:
        keys: [B, H, n, d].
        positions: [B, n].
        frequencies: radians a token, [d / 2].
        factor: what cos and sin are multiplied with.

    Example:
        >>> key = torch.tensor([[[[1.0, 0.0]]]])
        >>> turn(key, torch.tensor([[1]]), torch.tensor([torch.pi / 2]), 1.0).round().tolist()
        [[[[-0.0, 1.0]]]]
    """
    angles = (positions.float().unsqueeze(-1) * frequencies.float()).unsqueeze(1)  # [B, 1, n, d / 2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    first, second = keys.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def reference(inputs: Inputs) -> Tensor:
    """The formula in fp32, all keys rebuilt at once: [B, Hq, 1, d] in the dtype of the query; see `Inputs`."""
    i = inputs
    rows, heads, dim = i.query.shape[0], i.near_keys.shape[1], i.query.shape[-1]
    keys, values = i.keys.squeeze(1).float(), i.values.squeeze(1).float()
    if i.key_step is not None and i.key_least is not None:
        keys = dequantise_keys(i.keys, i.key_step, i.key_least)
    if i.value_step is not None and i.value_least is not None:
        values = dequantise_values(i.values, i.value_step, i.value_least, i.value_factor.shape[0])
    keys, values = keys @ i.key_factor.float(), values @ i.value_factor.float()  # [B, n, H * d]
    keys = keys if i.key_bias is None else keys + i.key_bias.float()
    values = values if i.value_bias is None else values + i.value_bias.float()
    keys, values = (x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in (keys, values))
    slots = torch.arange(i.start, i.start + i.stored, device=i.query.device).unsqueeze(0)
    begin = slots.new_zeros(rows, 1) if i.first is None else i.first.unsqueeze(1)
    keys = turn(keys, (slots - begin).clamp(min=0), i.frequencies, i.factor)

    near = (i.near_keys.float(), i.near_values.float())
    if i.sink_keys is not None and i.sink_values is not None:
        near = (torch.cat([i.sink_keys.float(), near[0]], 2), torch.cat([i.sink_values.float(), near[1]], 2))
    seen = slots.new_ones(rows, near[0].shape[2], dtype=torch.bool) if i.seen is None else i.seen
    query = i.query.float().unflatten(1, (heads, -1)).squeeze(3)  # [B, H, G, d]
    scores = query @ torch.cat([near[0], keys], 2).transpose(-1, -2) * i.scaling
    visible = torch.cat([seen, slots >= begin + i.hidden], 1)[:, None, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ torch.cat([near[1], values], 2)).flatten(1, 2).unsqueeze(2).to(i.query.dtype)


def unsupported(inputs: Inputs) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if inputs.query.dtype not in _DTYPES:
        return f"the query is {str(inputs.query.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    return None


# --- op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "refimpl::lowrank_decode",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor query, Tensor keys, Tensor values, Tensor key_factor, Tensor value_factor, Tensor frequencies, "
    "Tensor near_keys, Tensor near_values, float scaling, Tensor? key_step=None, Tensor? key_least=None, "
    "Tensor? value_step=None, Tensor? value_least=None, Tensor? key_bias=None, Tensor? value_bias=None, "
    "Tensor? sink_keys=None, Tensor? sink_values=None, Tensor? first=None, Tensor? seen=None, int start=0, "
    "int hidden=0, float factor=1.0) -> Tensor",
)
def lowrank_decode(*inputs: Any) -> Tensor:
    """Attention of one token a row to a low-rank cache: arguments of `Inputs`, in its order.

    Returns:
        [B, Hq, 1, d] in the dtype of the query.
    """
    return reference(Inputs(*inputs))


@lowrank_decode.register_fake
def _fake(*inputs: Any) -> Tensor:
    return torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
