"""Group-quantised weights times activations, ``y = x W^T``, for one token and for many.

One token at a time, every weight is read once and used once: the time is the bytes read over the bandwidth, and 4 bits
a weight instead of 16 make it a quarter, if unpacking keeps up. For many tokens (a prompt, a batch) the weights are
unpacked a tile at a time, and the time is that of the tensor cores. Hence two kernels.

Layout ("K-major"): the outputs are the contiguous dimension, so neighbouring threads read neighbouring words, each 128
bits at a time, and the sum over inputs stays inside a thread. 32 consecutive inputs make a chunk. Codes of b bits are
stored as planes whose width divides a byte (3 bits = a plane of 2 and a plane of 1): word w of a p-bit plane holds the
32/p inputs from 32/p * w on, lowest bits first, and the planes are stacked along dimension 0.

Unpacking without conversions: integer-to-float instructions run at a quarter or less of the rate of the others. But a
field that lies inside the mantissa of a 32-bit word whose other bits are cleared *is* a float already, a subnormal one:
``field * 2^(place - 149)``, exactly. GPUs multiply these at full rate, so a weight costs one "and" and one fused
multiply-add; the power of two that depends on the place is moved to x, which is shared by all outputs.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
from torch import Tensor

from refimpl.kernels.launch import Launch, warn_once

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for macOS and Windows: the formats and the torch path work there
    triton = None
if triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    triton = None  # has no tuples of tensors, which hold the sums of several rows

BITS = (2, 3, 4, 8)
MATVEC_ROWS = 4  # above, unpacking once for tensor cores beats multiplying on the ordinary ones for every row
_DTYPES = (torch.float16, torch.bfloat16)
_TARGET_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_OVERHEAD = 0.045  # of the least traffic: what re-reading x and the sums between programs may add
_LONGEST_SEGMENT = 8  # chunks a thread sums before it applies the scale


def jit(function: Any) -> Any:
    """`triton.jit`, or the function itself where triton is not installed or too old."""
    return function if triton is None else triton.jit(function)


# --- layout ------------------------------------------------------------------------------------------------------


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes that `bits` are split into, lowest bits first.

    Example:
        >>> plane_widths(4), plane_widths(3)
        ((4,), (2, 1))
    """
    return (2, 1) if bits == 3 else (bits,)


def repack(codes: Tensor, bits: int) -> Tensor:
    """Codes in the layout that the kernels read.

    Args:
        codes: uint8 [out, in], each below ``2**bits``; `in` a multiple of 32.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [in * bits / 32, out].

    Raises:
        ValueError: other bits, or `in` is no multiple of 32.

    Example:
        >>> codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
        >>> planes = repack(codes, 4)
        >>> planes.shape, hex(planes[0, 0])
        (torch.Size([4, 3]), '0x76543210')
        >>> torch.equal(unpack(planes, 4), codes)
        True
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: the layout has {', '.join(map(str, BITS))} bits")
    if codes.shape[1] % 32:
        raise ValueError(f"codes have {codes.shape[1]} inputs: the layout needs a multiple of 32")
    planes, low = [], 0
    for width in plane_widths(bits):
        fields = ((codes.T >> low) & (2**width - 1)).unflatten(0, (-1, 32 // width))  # [words, fields, out]
        words = torch.zeros(fields.shape[0], fields.shape[2], dtype=torch.int32, device=codes.device)
        for index in range(32 // width):
            words |= fields[:, index].to(torch.int32) << (width * index)
        planes.append(words)
        low += width
    return torch.cat(planes)


def unpack(planes: Tensor, bits: int) -> Tensor:
    """Undo `repack`: uint8 [out, in].

    Example:
        >>> unpack(torch.tensor([[0x76543210], [0], [0], [0]], dtype=torch.int32), 4)[0, :9].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 0]
    """
    return _codes(planes, bits).T.contiguous()


def _codes(planes: Tensor, bits: int) -> Tensor:
    """uint8 [in, out], as the planes lie."""
    inputs, n_out = planes.shape[0] * 32 // bits, planes.shape[1]
    # bytes rather than words: an operation on bytes handles four times as many elements
    octets = planes.contiguous().view(torch.uint8).unflatten(1, (-1, 4)).transpose(1, 2).contiguous()
    codes: Tensor | None = None
    row = low = 0
    for width in plane_widths(bits):
        words = inputs * width // 32
        part = octets[row : row + words]  # [words, 4, out]
        if width < 8:
            mask = (2**width - 1) << low
            fields = torch.empty(words, 4, 8 // width, n_out, dtype=torch.uint8, device=planes.device)
            for index in range(8 // width):
                up = low - width * index
                moved = part << up if up > 0 else part >> -up
                torch.bitwise_and(moved, mask, out=fields[:, :, index])
            part = fields
        part = part.reshape(inputs, n_out)
        codes = part if codes is None else codes.bitwise_or_(part)
        row, low = row + words, low + width
    assert codes is not None
    return codes


def dequantise(planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The weights ``(code - zero) * scale``, fp32 [in, out].

    Args:
        planes: int32 [in * bits / 32, out].
        scale: [in / group, out], floating.
        zero: uint8 [in / group, out], or None for ``2**(bits - 1)`` everywhere.
        bits: 2, 3, 4 or 8.

    Example:
        >>> dequantise(repack(torch.full((1, 32), 9, dtype=torch.uint8), 4), torch.tensor([[0.5]]), None, 4)[0].item()
        0.5
    """
    codes = _codes(planes, bits).unflatten(0, (scale.shape[0], -1)).to(torch.float32)
    codes -= 2 ** (bits - 1) if zero is None else zero.to(torch.float32).unsqueeze(1)
    codes *= scale.to(torch.float32).unsqueeze(1)
    return codes.flatten(0, 1)


def reference(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    """The formula in fp32: ``y = x W^T + bias`` with ``W = (code - zero) * scale``; shapes as `quant_matmul`.

    Example:
        >>> planes = repack(torch.full((2, 32), 9, dtype=torch.uint8), 4)
        >>> reference(torch.ones(1, 32), planes, torch.full((1, 2), 0.5), None, None, 4).tolist()
        [[16.0, 16.0]]
    """
    y = x.float() @ dequantise(planes, scale, zero, bits)
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
@no_type_check
def _field(words, INDEX: tl.constexpr, WIDTH: tl.constexpr):
    """``field * 2^(place - 149)`` in fp32, where `place` is `_place`; INDEX counts the inputs of the chunk."""
    WHOLE: tl.constexpr = 23 // WIDTH * WIDTH  # bits of the fields that lie in the mantissa as they are
    BIT: tl.constexpr = INDEX * WIDTH % 32
    if BIT < WHOLE:
        return (words & (((1 << WIDTH) - 1) << BIT)).to(tl.float32, bitcast=True)
    else:  # an arithmetic shift, but the copies of the sign fall outside the mask
        return ((words >> WHOLE) & (((1 << WIDTH) - 1) << (BIT - WHOLE))).to(tl.float32, bitcast=True)


@jit
@no_type_check
def matvec_rows(
    x,
    planes,
    scale,
    zero,
    n,
    part,
    n_in,
    n_out,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS_PER_SCALE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """This program's share of ``sum_k x[m, k] * (code[k, n] - zero[g(k), n]) * scale[g(k), n]``, one [BLOCK] a row m.

    A segment is SEGMENT chunks that share a scale. The program takes TILE segments at a time, side by side, and every
    SPLIT-th run of them; a thread walks down a segment by itself, and applies the scale once at its end. With
    SEGMENTS_PER_SCALE = 0 there is one scale for all inputs, applied at the very end.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WHOLE: tl.constexpr = 23 // WIDTH * WIDTH
    # x is scaled by 2^(80 - place), so sums are in units of 2^-69: far from both ends of the range of fp32
    UNIT: tl.constexpr = 2.0**-69
    segments = n_in // (32 * SEGMENT)
    inside = n < n_out
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros([TILE, BLOCK], tl.float32),)
    if zero is None:
        origin = 2 ** (BITS - 1) * UNIT
    elif SEGMENTS_PER_SCALE == 0:
        origin = tl.load(zero + n, mask=inside, other=0).to(tl.float32)[None, :] * UNIT
    for start in range(part * TILE, segments, SPLIT * TILE):
        segment = start + tl.arange(0, TILE)[:, None]
        known = segment < segments
        kept = known & inside[None, :]
        if SEGMENTS_PER_SCALE > 0:
            group = segment // SEGMENTS_PER_SCALE * n_out + n[None, :]
            step = tl.load(scale + group, mask=kept, other=0.0).to(tl.float32)
            if zero is not None:
                origin = tl.load(zero + group, mask=kept, other=0).to(tl.float32) * UNIT
            sums = ()
            for _ in tl.static_range(ROWS):
                sums = sums + (tl.zeros([TILE, BLOCK], tl.float32),)
        else:
            sums = totals
        for c in range(SEGMENT):
            chunk = segment * SEGMENT + c
            place = planes + chunk * WIDTH * n_out + n[None, :]
            words = ()  # all at once: what is on its way from memory must cover the wait for it
            for w in tl.static_range(WIDTH):
                words = words + (tl.load(place + w * n_out, mask=kept, other=0),)
            if BITS == 3:
                top = tl.load(planes + (n_in // 16 + chunk) * n_out + n[None, :], mask=kept, other=0)
            inputs = ()
            for _ in tl.static_range(ROWS):
                inputs = inputs + (tl.zeros([TILE, 1], tl.float32),)
            for i in tl.static_range(32):
                weight = _field(words[i * WIDTH // 32], i, WIDTH)
                if BITS == 3:
                    weight_top = _field(top, i, 1)
                new_sums = ()
                new_inputs = ()
                for m in tl.static_range(ROWS):
                    value = tl.load(x + m * n_in + chunk * 32 + i, mask=known, other=0.0).to(tl.float32)
                    total = tl.fma(value * 2.0 ** (80 - i * WIDTH % 32 % WHOLE), weight, sums[m])
                    if BITS == 3:
                        total = tl.fma(value * 2.0 ** (80 + 2 - i % 23), weight_top, total)
                    new_sums = new_sums + (total,)
                    new_inputs = new_inputs + (inputs[m] + value,)
                sums = new_sums
                inputs = new_inputs
            new_sums = ()
            for m in tl.static_range(ROWS):
                new_sums = new_sums + (sums[m] - origin * inputs[m],)
            sums = new_sums
        if SEGMENTS_PER_SCALE > 0:
            new_totals = ()
            for m in tl.static_range(ROWS):
                new_totals = new_totals + (tl.fma(step, sums[m], totals[m]),)
            totals = new_totals
        else:
            totals = sums
    results = ()
    for m in tl.static_range(ROWS):
        result = tl.sum(totals[m], 0) * (1.0 / UNIT)
        if SEGMENTS_PER_SCALE == 0:
            result *= tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
        results = results + (result,)
    return results


@jit
@no_type_check
def store_rows(
    results,
    bias,
    y,
    partials,
    arrived,
    n,
    block,
    part,
    n_out,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write ROWS rows of y; where SPLIT programs share the sum, the last to arrive adds them up in a fixed order."""
    inside = n < n_out
    last = True
    if SPLIT > 1:
        for m in tl.static_range(ROWS):
            tl.store(partials + (part * ROWS + m) * n_out + n, results[m], mask=inside)
        tl.debug_barrier()  # the stores of all threads come before the one that counts
        last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == SPLIT - 1
    if last:
        for m in tl.static_range(ROWS):
            if SPLIT > 1:
                result = tl.zeros([BLOCK], tl.float32)
                for other in range(SPLIT):
                    result += tl.load(partials + (other * ROWS + m) * n_out + n, mask=inside, other=0.0)
            else:
                result = results[m]
            if bias is not None:
                result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + m * n_out + n, result.to(y.dtype.element_ty), mask=inside)


@jit
@no_type_check
def _quant_matvec(
    x,
    planes,
    scale,
    zero,
    bias,
    y,
    partials,
    arrived,
    n_in,
    n_out,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS_PER_SCALE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """``y[m, n] = sum_k x[m, k] * (code[k, n] - zero[g(k), n]) * scale[g(k), n] (+ bias[n])`` for a few rows m."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    results = matvec_rows(
        x, planes, scale, zero, n, part, n_in, n_out, ROWS, BITS, SEGMENT, SEGMENTS_PER_SCALE, TILE, BLOCK, SPLIT
    )
    store_rows(results, bias, y, partials, arrived, n, block, part, n_out, ROWS, BLOCK, SPLIT)


@jit
@no_type_check
def _plane_tile(plane, first, n, n_out, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """The fields of K inputs from word row `first` on, int32 [K, BLOCK]."""
    words = first + tl.arange(0, K * WIDTH // 32)
    packed = tl.load(plane + words[:, None] * n_out + n[None, :], mask=(n < n_out)[None, :], other=0)
    shifts = WIDTH * tl.arange(0, 32 // WIDTH)
    fields = (packed[:, None, :] >> shifts[None, :, None]) & ((1 << WIDTH) - 1)
    return tl.reshape(fields, [K, BLOCK])


@jit
@no_type_check
def dot_tile(
    x,
    planes,
    scale,
    zero,
    rows,
    n,
    part,
    n_rows,
    n_in,
    n_out,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """This program's share of x W^T, fp32 [ROWS, BLOCK]: weights are unpacked to the dtype of x, K inputs at a time.

    K divides GROUP (0: one scale for all inputs), so that a step needs one row of scales.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    inside = (n < n_out)[None, :]
    known = (rows < n_rows)[:, None]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(part * K, n_in, SPLIT * K):
        columns = k + tl.arange(0, K)
        value = tl.load(x + rows.to(tl.int64)[:, None] * n_in + columns[None, :], mask=known, other=0.0)
        codes = _plane_tile(planes, k * WIDTH // 32, n, n_out, WIDTH, K, BLOCK)
        if BITS == 3:
            codes = codes | (_plane_tile(planes, n_in // 16 + k // 32, n, n_out, 1, K, BLOCK) << 2)
        g = n if GROUP == 0 else k // GROUP * n_out + n
        step = tl.load(scale + g[None, :], mask=inside, other=0.0).to(tl.float32)
        # 2^23 + code as a float, without a conversion; the difference is exact
        weight = (codes | 0x4B000000).to(tl.float32, bitcast=True)
        if zero is None:
            weight -= 8388608.0 + 2 ** (BITS - 1)
        else:
            weight -= 8388608.0 + tl.load(zero + g[None, :], mask=inside, other=0).to(tl.float32)
        weight = (weight * step).to(x.dtype.element_ty)
        if INTERPRET:  # there a product of bfloat16 is wrong
            total = tl.dot(value.to(tl.float32), weight.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(value, weight, total)
    return total


@jit
@no_type_check
def store_tile(
    total,
    bias,
    y,
    partials,
    arrived,
    rows,
    n,
    part,
    n_rows,
    n_out,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write a [ROWS, BLOCK] tile of y; where SPLIT programs share the sum, the last to arrive adds them up in order."""
    inside = (rows < n_rows)[:, None] & (n < n_out)[None, :]
    place = rows.to(tl.int64)[:, None] * n_out + n[None, :]
    last = True
    if SPLIT > 1:
        size = n_rows.to(tl.int64) * n_out
        tl.store(partials + part * size + place, total, mask=inside)
        tl.debug_barrier()
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            total = tl.zeros([ROWS, BLOCK], tl.float32)
            for other in range(SPLIT):
                total += tl.load(partials + other * size + place, mask=inside, other=0.0)
        if bias is not None:
            total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@jit
@no_type_check
def _quant_dot(
    x,
    planes,
    scale,
    zero,
    bias,
    y,
    partials,
    arrived,
    n_rows,
    n_in,
    n_out,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``y[m, n] = sum_k x[m, k] * (code[k, n] - zero[g(k), n]) * scale[g(k), n] (+ bias[n])`` for many rows m."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # axis 0 runs first: programs that share weights run together
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    total = dot_tile(
        x, planes, scale, zero, rows, n, part, n_rows, n_in, n_out, BITS, GROUP, ROWS, K, BLOCK, SPLIT, INTERPRET
    )
    store_tile(total, bias, y, partials, arrived, rows, n, part, n_rows, n_out, ROWS, BLOCK, SPLIT)


# --- launch ------------------------------------------------------------------------------------------------------


def cost(
    rows: int,
    n_in: int,
    n_out: int,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    bias: bool = False,
    itemsize: int = 2,
) -> tuple[int, int]:
    """Bytes and floating-point operations that any implementation of this layout needs.

    Args:
        rows: rows of x.
        n_in, n_out: sizes of the map.
        bits, group, symmetric: the format; group None is one scale for each output.
        bias: whether there is one.
        itemsize: bytes of an element of x and y.

    Example:
        >>> cost(1, 4096, 4096, 4, 64)
        (8929280, 33554432)
    """
    scales = n_in // (group or n_in) * n_out
    stored = n_in * n_out * bits // 8 + scales * (2 if symmetric else 3) + n_out * itemsize * bias
    return stored + rows * (n_in + n_out) * itemsize, 2 * rows * n_in * n_out


def unsupported_format(bits: int, n_in: int, n_out: int, group: int) -> str | None:
    """Why a matrix cannot be stored for the kernels, or None; `group` is inputs per scale.

    Example:
        >>> unsupported_format(4, 100, 64, 50)
        'the layer has 100 inputs, no multiple of 32'
    """
    if bits not in BITS:
        return f"{bits} bits are not among {', '.join(map(str, BITS))}"
    if n_in % 32:
        return f"the layer has {n_in} inputs, no multiple of 32"
    if group % 32:
        return f"groups of {group} are no multiple of 32"
    if n_in * bits // 32 * n_out >= 2**31:
        return f"{n_in} x {n_out} is more than 32-bit addresses reach"
    return None


def unsupported(
    bits: int,
    n_in: int,
    n_out: int,
    group: int,
    dtype: torch.dtype,
    rows: int = 1,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the kernels cannot multiply this, or None.

    Args:
        bits, n_in, n_out, group: the format; group is inputs per scale.
        dtype, rows: of x.
        capability: of the NVIDIA GPU; None where it does not matter.

    Example:
        >>> unsupported(4, 64, 64, 32, torch.float32)
        'x is float32, not float16 or bfloat16'
    """
    reason = unsupported_format(bits, n_in, n_out, group)
    if reason is not None:
        return reason
    if dtype not in _DTYPES:
        return f"x is {str(dtype).removeprefix('torch.')}, not float16 or bfloat16"
    if triton is None:
        return "triton 3.3 or later is not installed (pip install 'refimpl[kernels]')"
    if rows > MATVEC_ROWS and capability is not None and capability < (8, 0):
        return f"triton has no tensor-core products for compute capability {capability[0]}.{capability[1]}"
    return None


def _segment(n_in: int, group: int) -> tuple[int, int]:
    """Chunks of a segment, and segments that share a scale (0: there is one scale for all inputs)."""
    if group == n_in:
        return 1, 0
    chunks = group // 32
    longest = max(length for length in range(1, _LONGEST_SEGMENT + 1) if chunks % length == 0)
    return longest, chunks // longest


def matvec_shape(rows: int, n_in: int, n_out: int, bits: int, group: int, least: int) -> tuple[int, int, int]:
    """Outputs of a program, programs that share a sum, segments side by side in a program.

    Every block of outputs reads x again, and every split writes and reads sums: as many programs as keep that below
    `_OVERHEAD` of the least traffic, up to `_TARGET_PROGRAMS`.

    Args:
        rows: of x.
        n_in, n_out, bits, group: the format.
        least: bytes that are needed for one row (`cost`).
    """
    segments = n_in // 32 // _segment(n_in, group)[0]
    found = (0, 0, 0)
    for block in (128, 256, 512):
        blocks = -(-n_out // block)
        room = _OVERHEAD * least - (blocks - 1) * n_in * 2
        split = max(1, min(int(room / (8 * n_out)), -(-_TARGET_PROGRAMS // blocks), segments))
        if room >= (8 * n_out * split if split > 1 else 0) or (block == 512 and not found[0]):
            found = max(found, (min(blocks * split, _TARGET_PROGRAMS), -block, split))
    programs, block, split = found
    # eight warps of eight outputs a thread, or of four where the sums of several rows need the registers
    side_by_side = (2048 if rows <= 2 else 1024) // -block
    tile = min(side_by_side, 1 << (-(-segments // split) - 1).bit_length())
    return -block, split, tile


def _shared(x: Tensor, n_out: int, split: int, tiles: int) -> dict[str, Tensor | int | None]:
    """Room for the sums of programs that share outputs, and the counter of those that are done."""
    if split == 1:
        return {"partials": None, "arrived": None}
    return {
        "partials": torch.empty(split, x.shape[0], n_out, dtype=torch.float32, device=x.device),
        "arrived": torch.zeros(tiles, dtype=torch.int32, device=x.device),
    }


def matvec_arguments(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    bits: int,
    more: int = 0,
) -> tuple[tuple[int, ...], dict[str, Tensor | int | None], dict[str, Any], int]:
    """Grid, arguments, constants and warps of the matrix-vector kernel; `more`: bytes that it reads besides."""
    (rows, n_in), n_out = x.shape, planes.shape[1]
    group = n_in // scale.shape[0]
    segment, per_scale = _segment(n_in, group)
    least = cost(1, n_in, n_out, bits, group, zero is None, bias is not None)[0] + more
    block, split, tile = matvec_shape(rows, n_in, n_out, bits, group, least)
    blocks = -(-n_out // block)
    arguments = {
        "x": x,
        "planes": planes,
        "scale": scale,
        "zero": zero,
        "bias": bias,
        "y": y,
        **_shared(x, n_out, split, blocks),
        "n_in": n_in,
        "n_out": n_out,
    }
    constants = {
        "ROWS": rows,
        "BITS": bits,
        "SEGMENT": segment,
        "SEGMENTS_PER_SCALE": per_scale,
        "TILE": tile,
        "BLOCK": block,
        "SPLIT": split,
    }
    outputs = 256 if rows <= 2 else 128  # of a warp: eight outputs a thread share each load of x
    return (blocks, split), arguments, constants, max(1, min(8, tile * block // outputs))


def dot_arguments(
    x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, y: Tensor, bits: int
) -> tuple[tuple[int, ...], dict[str, Tensor | int | None], dict[str, Any], int]:
    """Grid, arguments, constants and warps of the matrix-matrix kernel."""
    (rows, n_in), n_out = x.shape, planes.shape[1]
    group = n_in // scale.shape[0]
    tile = min(128, max(16, 1 << (rows - 1).bit_length()))
    block = 128 if rows > 64 else 64
    k = math.gcd(64, group)
    grid = (-(-rows // tile), -(-n_out // block))
    split = 1 if rows > 64 else max(1, min(_TARGET_PROGRAMS // (grid[0] * grid[1]), n_in // (4 * k)))
    arguments = {
        "x": x,
        "planes": planes,
        "scale": scale,
        "zero": zero,
        "bias": bias,
        "y": y,
        **_shared(x, n_out, split, grid[0] * grid[1]),
        "n_rows": rows,
        "n_in": n_in,
        "n_out": n_out,
    }
    constants = {
        "BITS": bits,
        "GROUP": 0 if group == n_in else group,
        "ROWS": tile,
        "K": k,
        "BLOCK": block,
        "SPLIT": split,
        "INTERPRET": x.device.type == "cpu",
    }
    return (*grid, split), arguments, constants, 8 if tile == 128 else 4


def plan(
    x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, y: Tensor, bits: int
) -> Launch:
    """The launch that computes y.

    Args:
        x: [rows, in], contiguous.
        planes, scale, zero, bias, bits: as `quant_matmul`.
        y: [rows, out], is written.

    Example:
        >>> x, y = (torch.empty(1, 4096, dtype=torch.bfloat16, device="meta") for _ in range(2))
        >>> planes = torch.empty(512, 4096, dtype=torch.int32, device="meta")
        >>> scale = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
        >>> plan(x, planes, scale, None, None, y, 4).grid
        (32, 4)
    """
    few = x.shape[0] <= MATVEC_ROWS
    arguments = matvec_arguments if few else dot_arguments
    grid, tensors, constants, warps = arguments(x, planes, scale, zero, bias, y, bits)
    return Launch(_quant_matvec if few else _quant_dot, grid, tensors, constants, warps, 1 if few else 3)


def variant_tensors(
    rows: int, n_in: int, n_out: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int]:
    """Arguments of `plan` for a shape, on "meta"."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    groups = n_in // group
    return (
        empty(rows, n_in, dtype=dtype),
        empty(n_in * bits // 32, n_out, dtype=torch.int32),
        empty(groups, n_out, dtype=torch.bfloat16),
        None if symmetric else empty(groups, n_out, dtype=torch.uint8),
        None,
        empty(rows, n_out, dtype=dtype),
        bits,
    )


# rows, inputs, outputs, bits, group, symmetric
VARIANTS = (
    *((1, *shape, 4, 64, True) for shape in ((576, 1536), (1536, 576), (576, 192))),
    (1, 576, 1536, 3, 96, False),
    *((1, *shape, 4, 64, True) for shape in ((4096, 4096), (4096, 14336), (14336, 4096))),
    *((1, 4096, 4096, bits, 64, False) for bits in BITS),
    (1, 4096, 4096, 4, 32, False),
    *((1, 4096, 4096, bits, 4096, True) for bits in (2, 4)),
    *((MATVEC_ROWS, 4096, 14336, bits, 64, False) for bits in BITS),
    *((16, 4096, 14336, bits, 64, False) for bits in BITS),
    *((512, 4096, 14336, bits, 64, False) for bits in BITS),
    (512, 576, 1536, 4, 96, True),
    (512, 4096, 4096, 4, 4096, True),
)


def variant_name(rows: int, n_in: int, n_out: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> str:
    """A variant in words.

    Example:
        >>> variant_name(1, 4096, 4096, 4, 4096, True, torch.bfloat16)
        'bf16 4096->4096, 4 bits, per channel, symmetric'
    """
    groups = "per channel" if group == n_in else f"g{group}"
    name = f"{'fp' if dtype == torch.float16 else 'bf'}16 {n_in}->{n_out}, {bits} bits, {groups}, "
    return name + ("symmetric" if symmetric else "asymmetric") + (f", {rows} rows" if rows > 1 else "")


def variants() -> dict[str, Launch]:
    """Launches of real shapes, from tensors on "meta": these are compiled ahead of time and their bytes counted.

    Example:
        >>> variants()["bf16 4096->4096, 4 bits, per channel, symmetric"].num_warps
        8
    """
    chosen = [(variant, torch.bfloat16) for variant in VARIANTS]
    chosen += [((rows, 4096, 4096, 4, 64, True), torch.float16) for rows in (1, 512)]
    return {variant_name(*v, dtype): plan(*variant_tensors(*v, dtype)) for v, dtype in chosen}


# --- op ----------------------------------------------------------------------------------------------------------

_SLAB = 2**20  # weights unpacked at a time on a CPU: fewer calls than caches would like, but not one large array


def torch_matmul(
    x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`quant_matmul` in PyTorch, for x [rows, in].

    Few rows: slab by slab, so that unpacked weights never leave the cache, and scaled after the sum over a group. Many
    rows: one dense matrix in the dtype of x.
    """
    (rows, n_in), (groups, n_out) = x.shape, scale.shape
    if rows > 16:
        weight = dequantise(planes, scale, zero, bits).to(x.dtype)
        return x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
    group = n_in // groups
    values = x.to(torch.float32).unflatten(1, (groups, group)).transpose(0, 1)  # [groups, rows, group]
    steps = scale.to(torch.float32).unsqueeze(1)
    total = torch.zeros(rows, n_out, dtype=torch.float32, device=x.device)
    if bias is not None:
        total += bias
    each = max(1, _SLAB // (group * n_out))
    for first in range(0, groups, each):
        last = min(groups, first + each)
        row, parts = 0, []
        for width in plane_widths(bits):
            parts.append(planes[row + first * group * width // 32 : row + last * group * width // 32])
            row += n_in * width // 32
        part = parts[0] if len(parts) == 1 else torch.cat(parts)
        codes = _codes(part, bits).unflatten(0, (last - first, group)).to(torch.float32)
        sums = values[first:last] @ codes
        origin = 2 ** (bits - 1) if zero is None else zero[first:last].to(torch.float32).unsqueeze(1)
        sums -= values[first:last].sum(-1, keepdim=True) * origin
        total += (sums * steps[first:last]).sum(0)
    return total.to(x.dtype)


@torch.library.custom_op(
    "refimpl::quant_matmul",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor planes, Tensor scale, Tensor? zero, Tensor? bias, int bits) -> Tensor",
)
def quant_matmul(
    x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """``y = x W^T + bias`` with ``W = (code - zero) * scale``, accumulated in fp32; differentiable in x.

    Args:
        x: [..., in], floating; on a GPU float16 or bfloat16 for the kernel.
        planes: int32 [in * bits / 32, out], from `repack`.
        scale: [in / group, out], floating.
        zero: uint8 [in / group, out], or None for ``2**(bits - 1)`` everywhere.
        bias: [out] or None.
        bits: 2, 3, 4 or 8.

    Returns:
        [..., out] in the dtype of x.

    Example:
        >>> planes = repack(torch.full((2, 32), 9, dtype=torch.uint8), 4)
        >>> quant_matmul(torch.ones(1, 32), planes, torch.full((1, 2), 0.5), None, None, 4).tolist()
        [[16.0, 16.0]]
    """
    flat = x.reshape(-1, x.shape[-1])
    return torch_matmul(flat, planes, scale, zero, bias, bits).view(*x.shape[:-1], planes.shape[1])


def capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPU x is on; None for others."""
    return None if torch.version.hip else torch.cuda.get_device_capability(x.device)


@quant_matmul.register_kernel("cuda")
def _cuda(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    (rows, n_in), n_out = flat.shape, planes.shape[1]
    y = flat.new_empty(rows, n_out)
    reason = unsupported(bits, n_in, n_out, n_in // scale.shape[0], x.dtype, rows, capability(x))
    if reason is not None:
        warn_once("quant_matmul", reason)
        y = torch_matmul(flat, planes, scale, zero, bias, bits)
    elif rows:
        plan(flat, planes, scale, zero, bias, y, bits)()
    return y.view(*x.shape[:-1], n_out)


@quant_matmul.register_fake
def _fake(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, planes, scale, zero, _, ctx.bits = inputs
    ctx.save_for_backward(planes, scale, zero)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    planes, scale, zero = ctx.saved_tensors
    weight = dequantise(planes, scale, zero, ctx.bits).to(gradient.dtype)
    return gradient @ weight.T, None, None, None, None, None


quant_matmul.register_autograd(_backward, setup_context=_remember)
