"""Attention of one new token on a cache whose heads keep different numbers of columns, side by side.

A token has one row of keys and one of values, in which each head takes as many numbers as its rank, without padding.
Keys lie in a basis of their own for each head; a query that was taken to the same basis (``q Q_K``) meets them as they
are, so nothing is rebuilt: every number is read once and used by the few query heads of its group. The time is that of
the bytes, and falls with the ranks.

A program has one key head and a share of the tokens; a second pass adds the shares in a fixed order and, unless the
output matrix has taken that over, comes back from the basis of the values, ``o Q_V[:, :r]^T + mu_V``.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from refimpl.kernels.launch import Launch, warn_once
from refimpl.kernels.lowrank_decode import dot, jit, online
from refimpl.kernels.quant_matmul import capability, triton

try:
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for macOS and Windows: the reference works there
    tl = None

_DTYPES = (torch.float16, torch.bfloat16)
_TARGET_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_TILE = 64  # tokens at a time
_SHORTEST = 256  # tokens of a program: fewer, and the results it hands on would count among the bytes


class Inputs(NamedTuple):
    """One token a row and n stored ones: ``ragged_decode(*inputs)``.

    Attributes:
        query: in the bases of the keys, [B, Hq, 1, d]; Hq a multiple of H. Of a head the first columns are used, as
            many as its rank.
        keys, values: [B, 1, n, sum of the ranks], heads side by side; in the dtype of the query, float16 or bfloat16
            for the kernel.
        key_ranks, value_ranks: H numbers each, 1 to d.
        scaling: of the scores.
        basis: of the values, its columns the most important first, [H, d, d]; None to stay in it.
        mean: [H, d], added at the end; None for none.
        first: first slot of each row that is seen (what is left of it is padding), integers [B]; None for 0.

    Example:
        >>> inputs = Inputs(torch.ones(1, 2, 1, 2), torch.zeros(1, 1, 3, 1), torch.ones(1, 1, 3, 2), (1,), (2,), 1.0)
        >>> ragged_decode(*inputs).tolist()   # the columns of two query heads
        [[1.0, 1.0, 1.0, 1.0]]
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    key_ranks: tuple[int, ...]
    value_ranks: tuple[int, ...]
    scaling: float
    basis: Tensor | None = None
    mean: Tensor | None = None
    first: Tensor | None = None

    @property
    def shared(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // len(self.key_ranks)


def reference(inputs: Inputs) -> Tensor:
    """The formula in fp32, head by head; see `Inputs` and `ragged_decode`."""
    i = inputs
    query = i.query.float().squeeze(2).unflatten(1, (-1, i.shared))  # [B, H, G, d]
    slots = torch.arange(i.keys.shape[2], device=i.keys.device)
    heads = []
    keys, values = (x[:, 0].float() for x in (i.keys, i.values))
    for h, (k, v) in enumerate(zip(keys.split(i.key_ranks, -1), values.split(i.value_ranks, -1), strict=True)):
        scores = query[:, h, :, : k.shape[-1]] @ k.transpose(-1, -2) * i.scaling  # [B, G, n]
        if i.first is not None:
            scores = scores.masked_fill(slots < i.first.view(-1, 1, 1), -torch.inf)
        mixed = scores.softmax(-1) @ v
        if i.basis is not None:
            mixed = mixed @ i.basis[h, :, : v.shape[-1]].float().T
            mixed = mixed if i.mean is None else mixed + i.mean[h].float()
        heads.append(mixed)
    if i.basis is None:
        return torch.cat([mixed.flatten(1) for mixed in heads], -1).to(i.query.dtype)
    return torch.stack(heads, 1).flatten(1, 2).unsqueeze(2).to(i.query.dtype)


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
@no_type_check
def _ragged_decode(
    query,
    keys,
    values,
    ranks,
    first,
    partials,
    sums,
    n,
    span,
    rows,
    key_pitch,
    value_pitch,
    scale,
    H: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A share of ``softmax(q k^T) v`` for the query heads of one key head: tokens ``part * span`` on.

    KEYS and VALUES are the widest ranks of the layer, as powers of two; a head uses its own. All ranks are multiples of
    ALIGNED, which is how wide loads may be.
    """
    dtype: tl.constexpr = query.dtype.element_ty
    b = tl.program_id(0) // H
    head = tl.program_id(0) % H
    part = tl.program_id(1)
    slot = tl.arange(0, ROWS)
    c = tl.arange(0, KEYS)
    r = tl.arange(0, VALUES)
    j = tl.arange(0, TILE)
    key_start = tl.multiple_of(tl.load(ranks + head), ALIGNED)
    key_rank = tl.multiple_of(tl.load(ranks + head + 1), ALIGNED) - key_start
    value_start = tl.multiple_of(tl.load(ranks + H + 1 + head), ALIGNED)
    value_rank = tl.multiple_of(tl.load(ranks + H + 2 + head), ALIGNED) - value_start
    key_pitch = tl.multiple_of(key_pitch, ALIGNED)
    value_pitch = tl.multiple_of(value_pitch, ALIGNED)
    q_row = (b * H + head) * SHARED + slot
    used = slot < SHARED
    q = tl.load(query + q_row[:, None] * D + c[None, :], mask=used[:, None] & (c < key_rank)[None, :], other=0.0)
    q = tl.trans((q.to(tl.float32) * scale).to(dtype))
    begin = 0
    if first is not None:
        begin = tl.load(first + b).to(tl.int32)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUES], tl.float32)
    end = tl.minimum(n, (part + 1) * span)
    for tile in range(part * span, end, TILE):
        seen = (tile + j < end) & (tile + j >= begin)
        entry = b.to(tl.int64) * n + tile + j
        place = keys + entry[:, None] * key_pitch + key_start + c[None, :]
        k = tl.load(place, mask=seen[:, None] & (c < key_rank)[None, :], other=0.0)
        scores = dot(k, q, tl.zeros([TILE, ROWS], tl.float32), INTERPRET)
        weights, before, most, total = online(tl.where(seen[:, None], scores, float("-inf")), most, total)
        place = values + entry[:, None] * value_pitch + value_start + r[None, :]
        v = tl.load(place, mask=seen[:, None] & (r < value_rank)[None, :], other=0.0)
        mixed = dot(tl.trans(weights.to(dtype)), v, mixed * before[:, None], INTERPRET)
    out = (part * rows + q_row).to(tl.int64)
    # divided by the total, so that 16 bits do; a program may have seen nothing
    mixed *= (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    kept = used[:, None] & (r < value_rank)[None, :]
    tl.store(partials + out[:, None] * VALUES + r[None, :], mixed.to(tl.float16), mask=kept)
    tl.store(sums + out * 2, most, mask=used)
    tl.store(sums + out * 2 + 1, total, mask=used)


@jit
@no_type_check
def _ragged_merge(
    partials,
    sums,
    ranks,
    basis,
    mean,
    y,
    parts,
    rows,
    value_pitch,
    H: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    VALUES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A query head: ``o = sum_i w_i o_i``, ``w_i = l_i 2^(m_i - max m)`` over their sum; ``y = o Q[:, :r]^T + mu``."""
    row = tl.program_id(0)
    head = row % (H * SHARED) // SHARED
    r = tl.arange(0, VALUES)
    start = tl.load(ranks + H + 1 + head)
    rank = tl.load(ranks + H + 2 + head) - start
    most = tl.full([PARTS], float("-inf"), tl.float32)
    for first in range(0, parts, PARTS):
        i = first + tl.arange(0, PARTS)
        most = tl.maximum(most, tl.load(sums + (i * rows + row) * 2, mask=i < parts, other=float("-inf")))
    level = tl.max(most, 0)
    weights = tl.zeros([PARTS], tl.float32)
    mixed = tl.zeros([VALUES], tl.float32)
    for first in range(0, parts, PARTS):
        i = first + tl.arange(0, PARTS)
        place = sums + (i * rows + row) * 2
        weight = tl.exp2(tl.load(place, mask=i < parts, other=float("-inf")) - level)
        weight *= tl.load(place + 1, mask=i < parts, other=0.0)
        weights += weight
        source = partials + (i * rows + row).to(tl.int64)[:, None] * VALUES + r[None, :]
        inside = (i < parts)[:, None] & (r < rank)[None, :]
        mixed += tl.sum(tl.load(source, mask=inside, other=0.0).to(tl.float32) * weight[:, None], 0)
    mixed /= tl.sum(weights, 0)
    if basis is None:
        place_y = row // (H * SHARED) * (SHARED * value_pitch) + SHARED * start + row % SHARED * rank + r
        tl.store(y + place_y, mixed.to(y.dtype.element_ty), mask=r < rank)
    else:
        x = tl.arange(0, D)
        q = tl.load(basis + (head * D + x)[:, None] * D + r[None, :], mask=(r < rank)[None, :], other=0.0)
        result = tl.sum(q.to(tl.float32) * mixed[None, :], 1)
        if mean is not None:
            result += tl.load(mean + head * D + x).to(tl.float32)
        tl.store(y + row * D + x, result.to(y.dtype.element_ty))


# --- launch ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _starts(key_ranks: tuple[int, ...], value_ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the heads begin in a row of keys and of values, int32 [2, H + 1]; made once, not for every token."""
    starts = [list(itertools.accumulate(ranks, initial=0)) for ranks in (key_ranks, value_ranks)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def plan(inputs: Inputs, y: Tensor) -> tuple[Launch, Launch]:
    """The two launches that compute y, the result of `ragged_decode`; all tensors are contiguous."""
    i = inputs
    batch, q_heads, _, d = i.query.shape
    heads, n, rows = len(i.key_ranks), i.keys.shape[2], batch * q_heads
    # real numbers even where tensors have no memory: what is read depends on them
    device = torch.device("cpu") if i.query.is_meta else i.query.device
    starts = _starts(i.key_ranks, i.value_ranks, device)
    tiles = -(-n // _TILE)
    span = max(-(-tiles * batch * heads // _TARGET_PROGRAMS) * _TILE, _SHORTEST)
    parts = -(-n // span)
    widest = [max(16, 1 << (max(ranks) - 1).bit_length()) for ranks in (i.key_ranks, i.value_ranks)]
    partials = i.query.new_empty(parts, rows, widest[1], dtype=torch.float16)
    sums = i.query.new_empty(parts, rows, 2, dtype=torch.float32)
    pitches: dict[str, Tensor | int | float | None] = {"rows": rows, "value_pitch": i.values.shape[3]}
    sizes = {"H": heads, "SHARED": i.shared, "D": d, "VALUES": widest[1]}
    reading = {
        "query": i.query,
        "keys": i.keys,
        "values": i.values,
        "ranks": starts,
        "first": i.first,
        "partials": partials,
        "sums": sums,
        "n": n,
        "span": span,
        "key_pitch": i.keys.shape[3],
        "scale": i.scaling * math.log2(math.e),
    }
    constants = {
        "ROWS": max(16, 1 << (i.shared - 1).bit_length()),
        "TILE": _TILE,
        "KEYS": widest[0],
        "ALIGNED": math.gcd(16, *i.key_ranks, *i.value_ranks),
        "INTERPRET": i.query.device.type == "cpu",
    }
    merging = {
        "partials": partials,
        "sums": sums,
        "ranks": starts,
        "basis": i.basis,
        "mean": i.mean,
        "y": y,
        "parts": parts,
    }
    return (
        Launch(_ragged_decode, (batch * heads, parts), {**reading, **pitches}, {**constants, **sizes}, 4, 3),
        Launch(_ragged_merge, (rows,), {**merging, **pitches}, {**sizes, "PARTS": 16}, 4, 1),
    )


def unsupported(inputs: Inputs, capability: tuple[int, int] | None = None) -> str | None:
    """Why the kernel cannot compute this, or None.

    Args:
        inputs: on any device.
        capability: of the NVIDIA GPU; None where it does not matter.

    Example:
        >>> x = torch.zeros(1, 2, 1, 64)
        >>> unsupported(Inputs(x, x, x, (32,), (32,), 1.0))
        'the query is float32, not float16 or bfloat16'
    """
    i, d = inputs, inputs.query.shape[-1]
    if i.query.dtype not in _DTYPES:
        return f"the query is {str(i.query.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    if i.keys.dtype != i.query.dtype or i.values.dtype != i.query.dtype:
        return "keys and values are not in the dtype of the query"
    if triton is None:
        return "triton 3.3 or later is not installed (pip install 'refimpl[kernels]')"
    if capability is not None and capability < (8, 0):
        return f"triton has no tensor-core products for compute capability {capability[0]}.{capability[1]}"
    if d not in (16, 32, 64, 128, 256):
        return f"heads have {d} channels, not 16, 32, 64, 128 or 256"
    if i.shared > 64:
        return f"{i.shared} query heads share a key head, more than 64"
    if i.keys.shape[2] == 0:
        return "nothing is stored"
    return None


def cost(
    batch: int,
    tokens: int,
    key_ranks: tuple[int, ...],
    value_ranks: tuple[int, ...],
    shared: int,
    d: int,
    basis: bool = True,
) -> tuple[int, int]:
    """Bytes and operations that any implementation of this cache needs for one token, in 16 bits.

    Args:
        batch, tokens: rows, and stored tokens of each.
        key_ranks, value_ranks: of the key heads.
        shared, d: query heads that share a key head, width of a head.
        basis: come back from the basis of the values (fp32, as is the mean).

    Example:
        >>> cost(1, 8192, (64,) * 8, (64,) * 8, 4, 128)   # half the columns of a layer of Llama-8B
        (17322056, 67633152)
    """
    heads, queries = len(key_ranks), len(key_ranks) * shared
    stored = tokens * (sum(key_ranks) + sum(value_ranks)) * 2
    out = 2 * queries * d if basis else 2 * shared * sum(value_ranks)
    moved = batch * (stored + 2 * queries * d + out) + 4 * 2 * (heads + 1) + basis * 4 * heads * d * (d + 1)
    back = basis * shared * sum(value_ranks) * d
    return moved, 2 * batch * (tokens * shared * (sum(key_ranks) + sum(value_ranks)) + back)


# key heads, query heads that share each, width, tokens, ranks (they alternate)
VARIANTS = (
    ("SmolLM2", 3, 3, 64, 8192, (48, 16, 32)),
    ("Llama-8B", 8, 4, 128, 8192, (64,)),
    ("Llama-8B", 8, 4, 128, 32768, (96, 32)),
)


def problems() -> dict[str, Inputs]:
    """Real shapes by name, from tensors without memory.

    Example:
        >>> problems()["bf16 Llama-8B, 8192 tokens, ranks 64"].keys.shape
        torch.Size([1, 1, 8192, 512])
    """
    found = {}
    for dtype, chosen in ((torch.bfloat16, VARIANTS), (torch.float16, VARIANTS[1:2])):
        for name, heads, shared, d, tokens, ranks in chosen:
            title = f"{'bf16' if dtype == torch.bfloat16 else 'fp16'} {name}, {tokens} tokens, ranks "
            found[title + "/".join(map(str, ranks))] = meta_inputs(tokens, heads, shared, d, ranks, dtype)
    return found


def variants() -> dict[str, Launch]:
    """The launches that are audited and counted: two for each of `problems`.

    Example:
        >>> variants()["bf16 Llama-8B, 8192 tokens, ranks 64, pass 1"].grid
        (8, 32)
    """
    return {
        f"{title}, pass {number}": launch
        for title, inputs in problems().items()
        for number, launch in enumerate(plan(inputs, torch.empty_like(inputs.query)), 1)
    }


def least(inputs: Inputs) -> tuple[int, int]:
    """`cost` of these tensors.

    Example:
        >>> least(problems()["bf16 Llama-8B, 8192 tokens, ranks 64"]) == cost(1, 8192, (64,) * 8, (64,) * 8, 4, 128)
        True
    """
    i = inputs
    batch, _, _, d = i.query.shape
    return cost(batch, i.keys.shape[2], i.key_ranks, i.value_ranks, i.shared, d, i.basis is not None)


def meta_inputs(tokens: int, heads: int, shared: int, d: int, ranks: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Inputs of one row on "meta"; head h has the ranks ``ranks[h % len(ranks)]``.

    Example:
        >>> meta_inputs(64, 3, 3, 64, (48, 16), torch.bfloat16).keys.shape
        torch.Size([1, 1, 64, 112])
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    each = tuple(ranks[h % len(ranks)] for h in range(heads))
    stored = empty(1, 1, tokens, sum(each))
    basis, mean = empty(heads, d, d, dtype=torch.float32), empty(heads, d, dtype=torch.float32)
    return Inputs(empty(1, heads * shared, 1, d), stored, stored.clone(), each, each, d**-0.5, basis, mean)


# --- op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "refimpl::ragged_decode",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor query, Tensor keys, Tensor values, int[] key_ranks, int[] value_ranks, float scaling, "
    "Tensor? basis=None, Tensor? mean=None, Tensor? first=None) -> Tensor",
)
def ragged_decode(*inputs: Any) -> Tensor:
    """Attention of one token a row to packed heads: arguments of `Inputs`, in its order; no gradient.

    On CUDA float16 and bfloat16 go to the Triton kernels; what they do not know is computed in fp32 by `reference`,
    with one warning, and so is everything on other devices.

    Returns:
        [B, Hq, 1, d] in the dtype of the query; without a basis, query heads side by side, each with as many numbers as
        the rank of its values, [B, sum of G times the ranks].
    """
    return reference(_inputs(inputs))


def _inputs(given: tuple[Any, ...]) -> Inputs:
    """Contiguous, and with ranks that can be hashed."""
    made: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in given]
    made[3:5] = map(tuple, made[3:5])
    return Inputs(*made)


@ragged_decode.register_kernel("cuda")
def _cuda(*given: Any) -> Tensor:
    inputs = _inputs(given)
    reason = unsupported(inputs, capability(inputs.query))
    if reason is not None:
        warn_once("ragged_decode", reason)
        return reference(inputs)
    y = _fake(*inputs)
    for launch in plan(inputs, y):
        launch()
    return y


@ragged_decode.register_fake
def _fake(*given: Any) -> Tensor:
    inputs = Inputs(*given)
    rows, heads, _, d = inputs.query.shape
    if inputs.basis is None:
        return inputs.query.new_empty(rows, sum(inputs.value_ranks) * (heads // len(inputs.key_ranks)))
    return inputs.query.new_empty(rows, heads, 1, d)
