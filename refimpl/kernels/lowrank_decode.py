"""Attention of one new token on a low-rank cache: features of keys and values, a window and sinks as they are.

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

import math
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from refimpl.kernels.launch import Launch, warn_once
from refimpl.kernels.quant_matmul import capability, triton

try:
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for macOS and Windows: the reference works there
    tl = None

TARGETS = ("sm_80", "sm_90")  # on AMD GPUs it would spill registers, so PyTorch computes it there
_DTYPES = (torch.float16, torch.bfloat16)
_TARGET_PROGRAMS = 128  # about one for each multiprocessor of a large GPU
# no code of their own for each value
_GROWING = ["n", "span", "split", "near", "sinks", "start", "hidden", "rows", "parts"]


def jit(function: Any) -> Any:
    """`triton.jit`, or the function itself where triton is not installed or too old."""
    return function if triton is None else triton.jit(function, do_not_specialize=_GROWING)


class Inputs(NamedTuple):
    """One token a row, n stored tokens, and some that are kept whole: ``lowrank_decode(*inputs)``.

    Attributes:
        query: [B, Hq, 1, d], rotated; Hq a multiple of H. float16 or bfloat16 for the kernel.
        keys: features before RoPE in the dtype of the query, [B, 1, n, r_K]; or, with `key_step`, 4-bit codes along
            tokens, uint8 [B, 1, n / group, r_K, group / 2], the low half of a byte first.
        key_step, key_least: ``feature = code * step + least``, [B, 1, n / group, r_K, 1] each; None for features.
        values: [B, 1, n, r_V]; or, with `value_step`, codes along channels, uint8 [B, 1, n, groups, bytes]: each group
            has r_V / groups channels, in half as many bytes.
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


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
@no_type_check
def _cosine(turns):
    """Cosine of an angle in units of 2^-32 turns (int32: whole turns wrap by themselves), within 1e-6.

    ``cos(a) = sin(a quarter of a turn - |a|)``, and between minus and plus a quarter four terms make a sine.
    """
    y = 0.25 - tl.abs(turns.to(tl.float32)) * 2.0**-32
    z = y * y
    return y * (6.28316404 + z * (-41.3371423 + z * (81.3407680 - 70.9934241 * z)))


@jit
@no_type_check
def _sine(turns):
    return _cosine(turns - (1 << 30))  # a quarter of a turn back


@jit
@no_type_check
def dot(a, b, total, INTERPRET: tl.constexpr):
    """``total + a b`` with fp32 sums."""
    if INTERPRET:  # there a product of bfloat16 is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@jit
@no_type_check
def online(scores, most, total):
    """A step of a softmax in pieces (base 2, over axis 0): weights, factor for earlier sums, new maximum, new total."""
    new = tl.maximum(most, tl.max(scores, 0))
    level = tl.where(new == float("-inf"), 0.0, new)  # nothing seen so far
    weights = tl.exp2(scores - level[None, :])
    before = tl.exp2(most - level)
    return weights, before, new, total * before + tl.sum(weights, 0)


@jit
@no_type_check
def _halves(octets):
    """The low and the high codes of bytes, less 8: 2^23 + code is a float as it is, without a conversion."""
    low = ((octets.to(tl.int32) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    high = ((octets.to(tl.int32) >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return low, high


@jit
@no_type_check
def _key_features(
    keys,
    key_step,
    key_least,
    base,
    tile,
    end,
    r,
    dtype: tl.constexpr,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Columns r of the features of tokens `tile` and on, [TILE, RANKS]. GROUP: tokens that share scales; 0: 16 bits."""
    if GROUP == 0:
        entry = tile + tl.arange(0, TILE)
        inside = (entry < end)[:, None] & (r < RANK)[None, :]
        return tl.load(keys + (base + entry)[:, None] * RANK + r[None, :], mask=inside, other=0.0)
    else:
        group = tile // GROUP + tl.arange(0, TILE // GROUP)
        inside = (group * GROUP < end)[:, None, None] & (r < RANK)[None, None, :]
        row = (base // GROUP + group)[:, None, None] * RANK + r[None, None, :]
        octet = row * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :, None]
        octets = tl.load(keys + octet, mask=inside, other=0)
        step = tl.load(key_step + row, mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(key_least + row, mask=inside, other=0.0).to(tl.float32) + 8.0 * step
        low, high = _halves(octets)
        low = (low * step + middle).to(dtype)
        pairs = tl.join(low, (high * step + middle).to(dtype))  # [groups, bytes, RANKS, 2]
        return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [TILE, RANKS])


@jit
@no_type_check
def _value_features(
    values,
    step,
    entry,
    seen,
    start,
    dtype: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Columns from `start` on of the features of a tile, [TILE, WIDTH]; of codes ``(code - 8) step`` only.

    GROUPS: groups of channels that share scales; 0: 16 bits.
    """
    if GROUPS == 0:
        r = start + tl.arange(0, WIDTH)
        inside = seen[:, None] & (r < RANK)[None, :]
        return tl.load(values + entry[:, None] * RANK + r[None, :], mask=inside, other=0.0)
    else:
        octet = start // 2 + tl.arange(0, WIDTH // 2)
        inside = seen[:, None] & (octet < RANK // 2)[None, :]
        octets = tl.load(values + entry[:, None] * (RANK // 2) + octet[None, :], mask=inside, other=0)
        # a scale is read once; a product with ones and zeros hands it to the bytes of its group
        hand = (tl.arange(0, PLACES)[:, None] == (octet // (RANK // (2 * GROUPS)))[None, :]).to(tl.float16)
        wide = dot(step, hand, tl.zeros([seen.shape[0], WIDTH // 2], tl.float32), INTERPRET)
        low, high = _halves(octets)
        return tl.reshape(tl.join((low * wide).to(dtype), (high * wide).to(dtype)), [seen.shape[0], WIDTH])


@jit
@no_type_check
def _stored(
    query,
    keys,
    key_step,
    key_least,
    values,
    value_step,
    value_least,
    key_factor,
    key_bias,
    frequencies,
    first,
    n,
    span,
    start,
    hidden,
    heads,
    half,
    rank,
    scale,
    b,
    part,
    head0,
    slot,
    q_row,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BAND: tl.constexpr,
    TILE: tl.constexpr,
    RANK_K: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK_V: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The stored tokens from ``part * span`` on: maximum, total and ``sum_t p_t c_t`` [ROWS, WIDTH].

    Rows are the query heads of HEADS key heads. The key heads take turns, and each adds the scores of its own queries;
    the values are then read once for all.
    """
    dtype: tl.constexpr = query.dtype.element_ty
    j = tl.arange(0, TILE)
    base = b.to(tl.int64) * n
    begin = hidden - start
    offset = start
    if first is not None:
        padding = tl.load(first + b).to(tl.int32)
        begin += padding
        offset -= padding
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = ()
    for _ in tl.static_range(PIECES):
        mixed = mixed + (tl.zeros([ROWS, WIDTH], tl.float32),)
    middles = tl.zeros([ROWS, PLACES], tl.float32)
    end = tl.minimum(n, (part + 1) * span)
    for tile in range(part * span, end, TILE):
        scores = tl.zeros([TILE, ROWS], tl.float32)
        for f0 in range(0, half, BAND):
            f = f0 + tl.arange(0, BAND)
            turns = tl.load(frequencies + f).to(tl.float64) * 683565275.5764316  # radians in units of 2^-32 turns
            turns = turns.to(tl.int64).to(tl.int32)
            angles = (tile + offset + j)[:, None] * turns[None, :]
            cos = _cosine(angles)
            sin = _sine(angles)
            for head in range(heads):
                column = (head0 + head) * (2 * HALF) + f
                k1 = tl.zeros([TILE, BAND], tl.float32)
                k2 = tl.zeros([TILE, BAND], tl.float32)
                for r0 in range(0, rank, RANKS):
                    r = r0 + tl.arange(0, RANKS)
                    features = _key_features(
                        keys, key_step, key_least, base, tile, end, r, dtype, TILE, RANK_K, RANKS, GROUP
                    )
                    factor = key_factor + r[:, None] * (H * 2 * HALF) + column[None, :]
                    k1 = dot(features, tl.load(factor, mask=(r < RANK_K)[:, None], other=0.0), k1, INTERPRET)
                    k2 = dot(features, tl.load(factor + HALF, mask=(r < RANK_K)[:, None], other=0.0), k2, INTERPRET)
                if key_bias is not None:
                    k1 += tl.load(key_bias + column).to(tl.float32)[None, :]
                    k2 += tl.load(key_bias + column + HALF).to(tl.float32)[None, :]
                mine = (slot // SHARED == head)[:, None]  # the queries of other heads count as zeros
                q = query + q_row[:, None] * (2 * HALF) + f[None, :]
                q1 = (tl.load(q, mask=mine, other=0.0).to(tl.float32) * scale).to(dtype)
                q2 = (tl.load(q + HALF, mask=mine, other=0.0).to(tl.float32) * scale).to(dtype)
                scores = dot((k1 * cos - k2 * sin).to(dtype), tl.trans(q1), scores, INTERPRET)
                scores = dot((k2 * cos + k1 * sin).to(dtype), tl.trans(q2), scores, INTERPRET)
        seen = (tile + j < end) & (tile + j >= begin)
        weights, before, most, total = online(tl.where(seen[:, None], scores, float("-inf")), most, total)
        weights = tl.trans(weights)
        entry = base + tile + j
        step = 0
        # codes: sum_t p_t ((code_t - 8) step_t + middle_t), a sum for each channel and one for each group
        if GROUPS > 0:
            group = tl.arange(0, PLACES)
            scales = entry[:, None] * GROUPS + group[None, :]
            known = seen[:, None] & (group < GROUPS)[None, :]
            step = tl.load(value_step + scales, mask=known, other=0.0)
            middle = tl.load(value_least + scales, mask=known, other=0.0) + 8.0 * step
            middles = dot(weights.to(tl.float16), middle.to(tl.float16), middles * before[:, None], INTERPRET)
        weights = weights.to(dtype)
        summed = ()
        for piece in tl.static_range(PIECES):
            v = _value_features(
                values, step, entry, seen, piece * WIDTH, dtype, RANK_V, WIDTH, GROUPS, PLACES, INTERPRET
            )
            summed = summed + (dot(weights, v, mixed[piece] * before[:, None], INTERPRET),)
        mixed = summed
    return most, total, mixed, middles


@jit
@no_type_check
def _whole(
    query,
    near_keys,
    near_values,
    sink_keys,
    sink_values,
    seen,
    near,
    sinks,
    heads,
    scale,
    b,
    head0,
    slot,
    q_row,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The sinks, then the window: maximum, total and ``sum_t p_t v_t`` [ROWS, d]."""
    dtype: tl.constexpr = query.dtype.element_ty
    x = tl.arange(0, 2 * HALF)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, 2 * HALF], tl.float32)
    for start in range(0, sinks + near, TILE):
        j = start + tl.arange(0, TILE)
        known = j < sinks + near
        if seen is not None:
            known = known & (tl.load(seen + b * (sinks + near) + j, mask=known, other=0) != 0)
        scores = tl.zeros([TILE, ROWS], tl.float32)
        for head in range(heads):
            k = _whole_tile(near_keys, sink_keys, b * H + head0 + head, j, known, x, near, sinks)
            mine = (slot // SHARED == head)[:, None]
            q = tl.load(query + q_row[:, None] * (2 * HALF) + x[None, :], mask=mine, other=0.0).to(tl.float32)
            scores = dot(k, tl.trans((q * scale).to(dtype)), scores, INTERPRET)
        weights, before, most, total = online(tl.where(known[:, None], scores, float("-inf")), most, total)
        mixed *= before[:, None]
        for head in range(heads):
            v = _whole_tile(near_values, sink_values, b * H + head0 + head, j, known, x, near, sinks)
            own = tl.where((slot // SHARED == head)[None, :], weights, 0.0)
            mixed = dot(tl.trans(own.to(dtype)), v, mixed, INTERPRET)
    return most, total, mixed


@jit
@no_type_check
def _whole_tile(window, sink, head, j, known, x, near, sinks):
    """Tokens j of the sinks and the window of a head, [TILE, d]."""
    d: tl.constexpr = x.shape[0]
    place = (head.to(tl.int64) * near + j - sinks)[:, None] * d + x[None, :]
    tile = tl.load(window + place, mask=(known & (j >= sinks))[:, None], other=0.0)
    if sink is not None:
        place = (head.to(tl.int64) * sinks + j)[:, None] * d + x[None, :]
        tile += tl.load(sink + place, mask=(known & (j < sinks))[:, None], other=0.0)
    return tile


@jit
@no_type_check
def _lowrank_decode(
    query,
    keys,
    key_step,
    key_least,
    values,
    value_step,
    value_least,
    key_factor,
    key_bias,
    frequencies,
    near_keys,
    near_values,
    sink_keys,
    sink_values,
    first,
    seen,
    partials,
    sums,
    n,
    span,
    split,
    near,
    sinks,
    start,
    hidden,
    rows,
    heads,
    half,
    rank,
    factor,
    scale,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BAND: tl.constexpr,
    TILE: tl.constexpr,
    RANK_K: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK_V: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
    PITCH: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A share of ``sum_t exp(s_t) v_t`` for the query heads of HEADS key heads; the formula is in the docstring of the module.

    Axis 1 of the grid: `split` programs with `span` stored tokens each, then one for the tokens that are kept uncompressed.
    """
    b = tl.program_id(0) // (H // HEADS)
    head0 = tl.program_id(0) % (H // HEADS) * HEADS
    part = tl.program_id(1)
    slot = tl.arange(0, ROWS)
    q_row = b * (H * SHARED) + head0 * SHARED + slot
    used = slot < HEADS * SHARED
    out = (part * rows + q_row).to(tl.int64)
    # partial results are divided by their total, so that 16 bits are enough
    if part < split:
        most, total, mixed, middles = _stored(
            query,
            keys,
            key_step,
            key_least,
            values,
            value_step,
            value_least,
            key_factor,
            key_bias,
            frequencies,
            first,
            n,
            span,
            start,
            hidden,
            heads,
            half,
            rank,
            scale * factor,
            b,
            part,
            head0,
            slot,
            q_row,
            H,
            HEADS,
            SHARED,
            ROWS,
            HALF,
            BAND,
            TILE,
            RANK_K,
            RANKS,
            GROUP,
            RANK_V,
            PIECES,
            WIDTH,
            GROUPS,
            PLACES,
            INTERPRET,
        )
        share = (1.0 / tl.where(total > 0, total, 1.0))[:, None]  # a program may have seen nothing
        for piece in tl.static_range(PIECES):
            r = piece * WIDTH + tl.arange(0, WIDTH)
            place = partials + out[:, None] * PITCH + r[None, :]
            tl.store(place, (mixed[piece] * share).to(tl.float16), mask=used[:, None] & (r < RANK_V)[None, :])
        if GROUPS > 0:
            group = tl.arange(0, PLACES)
            place_middles = partials + out[:, None] * PITCH + RANK_V + group[None, :]
            tl.store(place_middles, (middles * share).to(tl.float16), mask=used[:, None] & (group < GROUPS)[None, :])
        tl.store(sums + out * 2, most, mask=used)
        tl.store(sums + out * 2 + 1, total, mask=used)
    else:
        most_whole, total_whole, mixed_whole = _whole(
            query,
            near_keys,
            near_values,
            sink_keys,
            sink_values,
            seen,
            near,
            sinks,
            heads,
            scale,
            b,
            head0,
            slot,
            q_row,
            H,
            HEADS,
            SHARED,
            ROWS,
            HALF,
            32,
            INTERPRET,
        )
        place_whole = partials + out[:, None] * PITCH + tl.arange(0, 2 * HALF)[None, :]
        share = (1.0 / tl.where(total_whole > 0, total_whole, 1.0))[:, None]
        tl.store(place_whole, (mixed_whole * share).to(tl.float16), mask=used[:, None])
        tl.store(sums + out * 2, most_whole, mask=used)
        tl.store(sums + out * 2 + 1, total_whole, mask=used)


@jit
@no_type_check
def _lowrank_merge(
    partials,
    sums,
    value_factor,
    value_bias,
    y,
    split,
    parts,
    rows,
    H: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    RANK_V: tl.constexpr,
    GROUPS: tl.constexpr,
    PITCH: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A query head: ``y = (sum_i w_i o_i) B_V + (sum_i w_i) b_V + w o``, ``w_i = l_i 2^(m_i - max m)`` over their sum.

    i counts the programs that had stored tokens; the last one, where there is one more, had the uncompressed tokens.
    """
    row = tl.program_id(0)
    head = row % (H * SHARED) // SHARED
    x = tl.arange(0, D)
    most = tl.full([PARTS], float("-inf"), tl.float32)
    for start in range(0, parts, PARTS):
        i = start + tl.arange(0, PARTS)
        most = tl.maximum(most, tl.load(sums + (i * rows + row) * 2, mask=i < parts, other=float("-inf")))
    level = tl.max(most, 0)
    weights = tl.zeros([PARTS], tl.float32)
    for start in range(0, split, PARTS):
        i = start + tl.arange(0, PARTS)
        place = sums + (i * rows + row) * 2
        weight = tl.exp2(tl.load(place, mask=i < split, other=float("-inf")) - level)
        weights += weight * tl.load(place + 1, mask=i < split, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.zeros([D], tl.float32)
    if value_bias is not None:
        result += total * tl.load(value_bias + head * D + x).to(tl.float32)
    for r0 in range(0, RANK_V, RANKS):
        r = r0 + tl.arange(0, RANKS)
        mixed = tl.zeros([RANKS], tl.float32)
        for start in range(0, split, PARTS):
            i = start + tl.arange(0, PARTS)
            place = sums + (i * rows + row) * 2
            weight = tl.exp2(tl.load(place, mask=i < split, other=float("-inf")) - level)
            weight *= tl.load(place + 1, mask=i < split, other=0.0)
            inside = (i < split)[:, None] & (r < RANK_V)[None, :]
            source = partials + (i * rows + row).to(tl.int64)[:, None] * PITCH
            part = tl.load(source + r[None, :], mask=inside, other=0.0).to(tl.float32)
            if GROUPS > 0:
                group = RANK_V + r // (RANK_V // GROUPS)
                part += tl.load(source + group[None, :], mask=inside, other=0.0).to(tl.float32)
            mixed += tl.sum(part * weight[:, None], 0)
        place_factor = value_factor + r[:, None] * (H * D) + head * D + x[None, :]
        factor = tl.load(place_factor, mask=(r < RANK_V)[:, None], other=0.0).to(tl.float32)
        result += tl.sum(mixed[:, None] * factor, 0)
    if parts > split:
        last = split * rows + row
        weight_whole = tl.exp2(tl.load(sums + last * 2) - level) * tl.load(sums + last * 2 + 1)
        total += weight_whole
        result += weight_whole * tl.load(partials + last.to(tl.int64) * PITCH + x).to(tl.float32)
    tl.store(y + row * D + x, (result / total).to(y.dtype.element_ty))


# --- launch ------------------------------------------------------------------------------------------------------


def plan(inputs: Inputs, y: Tensor) -> tuple[Launch, Launch]:
    """The two launches that compute y, [B, Hq, 1, d]; all tensors are contiguous."""
    i = inputs
    (batch, q_heads, _, d), heads, n = i.query.shape, i.near_keys.shape[1], i.stored
    shared, (rank_k, rank_v) = q_heads // heads, (i.key_factor.shape[0], i.value_factor.shape[0])
    near, sinks = i.near_keys.shape[2], 0 if i.sink_keys is None else i.sink_keys.shape[2]
    tile = 128 if i.key_step is None else 64  # tokens at a time: unpacking takes registers
    tiles = -(-n // tile)
    groups = 0 if i.value_step is None else i.values.shape[3]
    # as many key heads in a program as registers hold and as leave enough programs: they share the reading of values
    room = 32 if rank_v <= 256 and not groups else 16
    together = 1
    for h in range(2, heads + 1):
        if heads % h == 0 and h * shared <= room and batch * heads // h * tiles >= _TARGET_PROGRAMS:
            together = h
    blocks = batch * heads // together
    span = -(-tiles * blocks // _TARGET_PROGRAMS) * tile
    split = -(-n // span) if n else 0
    parts = split + (sinks + near > 0)
    partials = i.query.new_empty(parts, batch * q_heads, max(rank_v + groups, d), dtype=torch.float16)
    sums = i.query.new_empty(parts, batch * q_heads, 2, dtype=torch.float32)
    width = min(128, _power(rank_v, 32))
    arguments: dict[str, Tensor | int | float | None] = {
        "query": i.query,
        "keys": i.keys,
        "key_step": i.key_step,
        "key_least": i.key_least,
        "values": i.values,
        "value_step": i.value_step,
        "value_least": i.value_least,
        "key_factor": i.key_factor,
        "key_bias": i.key_bias,
        "frequencies": i.frequencies,
        "near_keys": i.near_keys,
        "near_values": i.near_values,
        "sink_keys": i.sink_keys if sinks else None,
        "sink_values": i.sink_values if sinks else None,
        "first": i.first,
        "seen": i.seen,
        "partials": partials,
        "sums": sums,
        "n": n,
        "span": span,
        "split": split,
        "near": near,
        "sinks": sinks,
        "start": i.start,
        "hidden": i.hidden,
        "rows": batch * q_heads,
        "heads": together,
        "half": d // 2,
        "rank": rank_k,
        "factor": i.factor,
        "scale": i.scaling * math.log2(math.e),
    }
    constants = {
        "H": heads,
        "HEADS": together,
        "SHARED": shared,
        "ROWS": _power(together * shared),
        "HALF": d // 2,
        "BAND": min(32, d // 2),
        "TILE": tile,
        "RANK_K": rank_k,
        "RANKS": 32 if rank_k > 16 else 16,
        "GROUP": 0 if i.key_step is None else 2 * i.keys.shape[4],
        "RANK_V": rank_v,
        "WIDTH": width,
        "PIECES": -(-rank_v // width),
        "GROUPS": groups,
        "PLACES": _power(groups),
        "PITCH": partials.shape[2],
        "INTERPRET": i.query.device.type == "cpu",
    }
    merging: dict[str, Tensor | int | float | None] = {
        "partials": partials,
        "sums": sums,
        "value_factor": i.value_factor,
        "value_bias": i.value_bias,
        "y": y,
        "split": split,
        "parts": parts,
        "rows": batch * q_heads,
    }
    sizes = {
        "H": heads,
        "SHARED": shared,
        "D": d,
        "RANK_V": rank_v,
        "GROUPS": groups,
        "PITCH": partials.shape[2],
        "PARTS": 32,
        "RANKS": 64,
    }
    return (
        Launch(_lowrank_decode, (blocks, parts), arguments, constants, num_warps=tile // 16, num_stages=3),
        Launch(_lowrank_merge, (batch * q_heads,), merging, sizes, num_warps=4, num_stages=1),
    )


def _power(number: int, least: int = 16) -> int:
    """The smallest power of two that is at least both."""
    return max(least, 1 << (number - 1).bit_length())


def unsupported(inputs: Inputs, capability: tuple[int, int] | None = None) -> str | None:
    """Why the kernel cannot compute this, or None.

    Args:
        inputs: on any device.
        capability: of the NVIDIA GPU; None where it does not matter.

    Example:
        >>> x = torch.zeros(1, 2, 1, 64)
        >>> unsupported(Inputs(x, x, x, x, x, x, x, x, 1.0))
        'the query is float32, not float16 or bfloat16'
    """
    i, d, heads = inputs, inputs.query.shape[-1], inputs.near_keys.shape[1]
    rank_v = i.value_factor.shape[0]
    if i.query.dtype not in _DTYPES:
        return f"the query is {str(i.query.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    others = [i.key_factor, i.value_factor, i.near_keys, i.near_values]
    others += [x for x, scales in ((i.keys, i.key_step), (i.values, i.value_step)) if scales is None]
    if any(x.dtype != i.query.dtype for x in others):
        return "features, factors and window are not all in the dtype of the query"
    if triton is None:
        return "triton 3.3 or later is not installed (pip install 'refimpl[kernels]')"
    if torch.version.hip:
        return "on AMD GPUs it would spill registers"
    if capability is not None and capability < (8, 0):
        return f"triton has no tensor-core products for compute capability {capability[0]}.{capability[1]}"
    if d not in (32, 64, 128, 256):
        return f"heads have {d} channels, not 32, 64, 128 or 256"
    if i.query.shape[1] > 32 * heads:
        return f"{i.query.shape[1] // heads} query heads share a key head, more than 32"
    if rank_v > 512:
        return f"values have rank {rank_v}, above 512"
    if i.key_step is not None and 64 % (2 * i.keys.shape[4]):
        return f"groups of {2 * i.keys.shape[4]} tokens do not divide 64"
    if i.value_step is not None and 2 * i.values.shape[3] * i.values.shape[4] != rank_v:
        return f"codes of {rank_v} value features do not fill the bytes of their groups"
    return None


def cost(
    batch: int,
    tokens: int,
    heads: int,
    shared: int,
    d: int,
    rank_k: int,
    rank_v: int,
    bits: int = 16,
    group: int = 32,
    value_group: int = 20,
    whole: int = 36,
) -> tuple[int, int]:
    """Bytes and operations that any implementation of this cache needs for one token, in 16 bits but for the codes.

    Args:
        batch, tokens: rows and stored tokens of each.
        heads, shared, d: key heads, query heads that share each, width of a head.
        rank_k, rank_v: numbers a token.
        bits: 16, or 4 with one scale for `group` tokens (keys) or `value_group` channels (values).
        whole: tokens of window and sinks.

    Example:
        >>> cost(1, 8192, 8, 4, 128, 200, 200)   # a layer of Llama-8B at a density of 0.2; its full cache: 33.6 MB
        (7536896, 3529637888)
    """
    stored = tokens * (rank_k + rank_v) * bits // 8
    if bits < 16:
        stored += 4 * (tokens // group * rank_k + tokens * rank_v // value_group)
    width, queries = heads * d, heads * shared
    factors = 2 * (rank_k + rank_v) * width
    moved = batch * (stored + 2 * (2 * whole * width + 2 * queries * d)) + factors + 4 * (d // 2)
    each = tokens * (rank_k * width + queries * (d + rank_v)) + 2 * whole * queries * d + queries * rank_v * d
    return moved, 2 * batch * each


# key heads, query heads that share each, width, tokens, rank of keys and values, bits
VARIANTS = (
    ("SmolLM2", 3, 3, 64, 8192, 36, 16),
    ("SmolLM2", 3, 3, 64, 8192, 63, 16),
    ("SmolLM2", 3, 3, 64, 8192, 36, 4),
    ("Llama-8B", 8, 4, 128, 2048, 200, 16),
    ("Llama-8B", 8, 4, 128, 8192, 200, 16),
    ("Llama-8B", 8, 4, 128, 32768, 200, 16),
    ("Llama-8B", 8, 4, 128, 32768, 512, 16),
    ("Llama-8B", 8, 4, 128, 32768, 200, 4),
)


def problems() -> dict[str, Inputs]:
    """Real shapes by name, from tensors without memory.

    Example:
        >>> problems()["bf16 SmolLM2, 8192 tokens, rank 36, 16 bits"].keys.shape
        torch.Size([1, 1, 8192, 36])
    """
    found = {}
    for dtype, chosen in ((torch.bfloat16, VARIANTS), (torch.float16, VARIANTS[5:6])):
        for name, heads, shared, d, tokens, rank, bits in chosen:
            title = f"{'bf16' if dtype == torch.bfloat16 else 'fp16'} {name}, {tokens} tokens, rank {rank}, {bits} bits"
            found[title] = meta_inputs(tokens, heads, shared, d, rank, bits, dtype)
    return found


def variants() -> dict[str, Launch]:
    """The launches that are audited and counted: two for each of `problems`.

    Example:
        >>> variants()["bf16 Llama-8B, 32768 tokens, rank 200, 16 bits, pass 1"].grid
        (1, 129)
    """
    return {
        f"{title}, pass {number}": launch
        for title, inputs in problems().items()
        for number, launch in enumerate(plan(inputs, torch.empty_like(inputs.query)), 1)
    }


def least(inputs: Inputs) -> tuple[int, int]:
    """`cost` of these tensors.

    Example:
        >>> least(problems()["bf16 Llama-8B, 8192 tokens, rank 200, 16 bits"]) == cost(1, 8192, 8, 4, 128, 200, 200)
        True
    """
    i = inputs
    (batch, q_heads, _, d), heads, rank_v = i.query.shape, i.near_keys.shape[1], i.value_factor.shape[0]
    scales: dict[str, int] = {}
    if i.key_step is not None:
        scales = {"bits": 4, "group": 2 * i.keys.shape[4], "value_group": rank_v // i.values.shape[3]}
    sinks = 0 if i.sink_keys is None else i.sink_keys.shape[2]
    return cost(
        batch,
        i.stored,
        heads,
        q_heads // heads,
        d,
        i.key_factor.shape[0],
        rank_v,
        whole=i.near_keys.shape[2] + sinks,
        **scales,
    )


def meta_inputs(tokens: int, heads: int, shared: int, d: int, rank: int, bits: int, dtype: torch.dtype) -> Inputs:
    """Inputs of one row on "meta": 4 sinks, a window of 32, groups of 32 tokens and of up to 32 channels.

    Example:
        >>> meta_inputs(64, 3, 3, 64, 36, 4, torch.bfloat16).values.shape
        torch.Size([1, 1, 64, 2, 9])
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    scales: dict[str, Any] = {}
    keys, values = empty(1, 1, tokens, rank), empty(1, 1, tokens, rank)
    if bits == 4:
        width = max(g for g in range(2, 33, 2) if rank % g == 0)
        keys = empty(1, 1, tokens // 32, rank, 16, dtype=torch.uint8)
        values = empty(1, 1, tokens, rank // width, width // 2, dtype=torch.uint8)
        for name, codes in (("key", keys), ("value", values)):
            for kind in ("step", "least"):
                scales[f"{name}_{kind}"] = empty(*codes.shape[:-1], 1, dtype=torch.float16)
    window, sinks = empty(1, heads, 32, d), empty(1, heads, 4, d)
    return Inputs(
        empty(1, heads * shared, 1, d),
        keys,
        values,
        empty(rank, heads * d),
        empty(rank, heads * d),
        empty(d // 2, dtype=torch.float32),
        window,
        window.clone(),
        d**-0.5,
        sink_keys=sinks,
        sink_values=sinks.clone(),
        hidden=4,
        **scales,
    )


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
    """Attention of one token a row to a low-rank cache: arguments of `Inputs`, in its order; no gradient.

    On CUDA float16 and bfloat16 go to the Triton kernels; what they do not know is computed in fp32 by `reference`,
    with one warning, and so is everything on other devices.

    Returns:
        [B, Hq, 1, d] in the dtype of the query.
    """
    return reference(Inputs(*inputs))


@lowrank_decode.register_kernel("cuda")
def _cuda(*given: Any) -> Tensor:
    tensors: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in given]
    inputs = Inputs(*tensors)
    reason = unsupported(inputs, capability(inputs.query))
    if reason is not None:
        warn_once("lowrank_decode", reason)
        return reference(inputs)
    y = torch.empty_like(inputs.query)
    for launch in plan(inputs, y):
        launch()
    return y


@lowrank_decode.register_fake
def _fake(*inputs: Any) -> Tensor:
    return torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
