"""Group-quantised weights and a low-rank path in one kernel: ``y = x W^T + u B^T`` with ``u = x A^T``.

A compressed layer with a low-rank repair is such a sum. Computed apart, y is written, read and written again, and at
one token a step the launches of two small products cost more than their bytes. Here ``u``, a vector of r numbers a
token, comes from an ordinary product, and ``u B^T`` is added before y leaves the registers: the rank is nothing but
more inputs, with weights in 16 bits. B is stored [rank, out], outputs contiguous like everything else.

Where several programs share a sum over inputs they share the sum over the rank too.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from refimpl.kernels import quant_matmul as base
from refimpl.kernels.launch import Launch, warn_once
from refimpl.kernels.quant_matmul import dot_tile, jit, matvec_rows, store_rows, store_tile

try:
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for macOS and Windows: the torch path works there
    tl = None


def reference(
    x: Tensor, u: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, B: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """The formula in fp32; shapes as `quant_lowrank_matmul`.

    Example:
        >>> planes = base.repack(torch.full((2, 32), 9, dtype=torch.uint8), 4)
        >>> scale = torch.full((1, 2), 0.5)
        >>> reference(torch.ones(1, 32), torch.ones(1, 3), planes, scale, None, torch.ones(3, 2), None, 4).tolist()
        [[19.0, 19.0]]
    """
    y = x.float() @ base.dequantise(planes, scale, zero, bits) + u.float() @ B.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
@no_type_check
def _quant_lowrank_matvec(
    x,
    u,
    planes,
    scale,
    zero,
    B,
    bias,
    y,
    partials,
    arrived,
    n_in,
    n_out,
    rank,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS_PER_SCALE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``y[m, n] = sum_k x[m, k] * W[k, n] + sum_r u[m, r] * B[r, n] (+ bias[n])`` for a few rows m.

    ``W[k, n] = (code[k, n] - zero[g(k), n]) * scale[g(k), n]``.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    results = matvec_rows(
        x, planes, scale, zero, n, part, n_in, n_out, ROWS, BITS, SEGMENT, SEGMENTS_PER_SCALE, TILE, BLOCK, SPLIT
    )
    repairs = ()
    for _row in tl.static_range(ROWS):
        repairs = repairs + (tl.zeros([RANKS, BLOCK], tl.float32),)
    for start in range(part * RANKS, rank, SPLIT * RANKS):
        r = start + tl.arange(0, RANKS)[:, None]
        factor = tl.load(B + r * n_out + n[None, :], mask=(r < rank) & (n < n_out)[None, :], other=0.0)
        sums = ()
        for m in tl.static_range(ROWS):
            value = tl.load(u + m * rank + r, mask=r < rank, other=0.0).to(tl.float32)
            sums = sums + (tl.fma(value, factor.to(tl.float32), repairs[m]),)
        repairs = sums
    sums = ()
    for m in tl.static_range(ROWS):
        sums = sums + (results[m] + tl.sum(repairs[m], 0),)
    store_rows(sums, bias, y, partials, arrived, n, block, part, n_out, ROWS, BLOCK, SPLIT)


@jit
@no_type_check
def _quant_lowrank_dot(
    x,
    u,
    planes,
    scale,
    zero,
    B,
    bias,
    y,
    partials,
    arrived,
    n_rows,
    n_in,
    n_out,
    rank,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRET: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``y[m, n] = sum_k x[m, k] * W[k, n] + sum_r u[m, r] * B[r, n] (+ bias[n])`` for many rows m.

    ``W[k, n] = (code[k, n] - zero[g(k), n]) * scale[g(k), n]``. Ranks that are no multiple of RANKS are padded with
    zeros in registers.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    total = dot_tile(
        x, planes, scale, zero, rows, n, part, n_rows, n_in, n_out, BITS, GROUP, ROWS, K, BLOCK, SPLIT, INTERPRET
    )
    for start in range(part * RANKS, rank, SPLIT * RANKS):
        r = start + tl.arange(0, RANKS)
        known = (rows < n_rows)[:, None] & (r < rank)[None, :]
        value = tl.load(u + rows.to(tl.int64)[:, None] * rank + r[None, :], mask=known, other=0.0)
        inside = (r < rank)[:, None] & (n < n_out)[None, :]
        factor = tl.load(B + r[:, None] * n_out + n[None, :], mask=inside, other=0.0)
        if INTERPRET:  # there a product of bfloat16 is wrong
            total = tl.dot(value.to(tl.float32), factor.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(value, factor, total)
    store_tile(total, bias, y, partials, arrived, rows, n, part, n_rows, n_out, ROWS, BLOCK, SPLIT)


# --- launch ------------------------------------------------------------------------------------------------------


def cost(
    rows: int,
    n_in: int,
    n_out: int,
    rank: int,
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    bias: bool = False,
    itemsize: int = 2,
) -> tuple[int, int]:
    """Bytes and floating-point operations needed once u is computed; arguments as `quant_matmul.cost`.

    Example:
        >>> cost(1, 4096, 4096, 128, 4, 64)
        (9978112, 34603008)
    """
    moved, operations = base.cost(rows, n_in, n_out, bits, group, symmetric, bias, itemsize)
    return moved + rank * (rows + n_out) * itemsize, operations + 2 * rows * rank * n_out


def unsupported(
    bits: int,
    n_in: int,
    n_out: int,
    group: int,
    dtype: torch.dtype,
    factor: torch.dtype,
    rows: int = 1,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the kernels cannot multiply this, or None; arguments as `quant_matmul.unsupported`.

    Args:
        factor: dtype of B.

    Example:
        >>> unsupported(4, 64, 64, 32, torch.float16, torch.float32)
        'B is float32 and x float16; they must be alike'
    """
    reason = base.unsupported(bits, n_in, n_out, group, dtype, rows, capability)
    if reason is None and factor != dtype:
        names = (str(kind).removeprefix("torch.") for kind in (factor, dtype))
        return "B is {} and x {}; they must be alike".format(*names)
    return reason


def plan(
    x: Tensor,
    u: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    B: Tensor,
    bias: Tensor | None,
    y: Tensor,
    bits: int,
) -> Launch:
    """The launch that computes y.

    Args:
        x: [rows, in], contiguous.
        u: [rows, rank], contiguous.
        planes, scale, zero, B, bias, bits: as `quant_lowrank_matmul`.
        y: [rows, out], is written.

    Example:
        >>> variants()["bf16 4096->4096, 4 bits, g64, symmetric, rank 128"].grid
        (32, 5)
    """
    few = x.shape[0] <= base.MATVEC_ROWS
    if few:
        more = B.nbytes + u.shape[1] * u.itemsize
        grid, tensors, constants, warps = base.matvec_arguments(x, planes, scale, zero, bias, y, bits, more)
        constants["RANKS"] = min(32, max(4, 1 << (B.shape[0] - 1).bit_length()))
    else:
        grid, tensors, constants, warps = base.dot_arguments(x, planes, scale, zero, bias, y, bits)
        constants["RANKS"] = 16 if B.shape[0] <= 16 else 32
    tensors |= {"u": u, "B": B, "rank": B.shape[0]}
    kernel = _quant_lowrank_matvec if few else _quant_lowrank_dot
    return Launch(kernel, grid, tensors, constants, warps, 1 if few else 3)


# rows, inputs, outputs, bits, group, symmetric; rank
VARIANTS = (
    *(((1, *shape, 4, 64, True), 64) for shape in ((576, 1536), (1536, 576), (576, 192))),
    *(((1, *shape, 4, 64, True), 128) for shape in ((4096, 4096), (4096, 14336), (14336, 4096))),
    *(((1, 4096, 4096, bits, 64, False), 128) for bits in base.BITS),
    *(((rows, 4096, 14336, bits, 64, False), 128) for rows in (base.MATVEC_ROWS, 16, 512) for bits in (3, 4)),
    ((512, 576, 1536, 4, 96, True), 40),
)


def variants() -> dict[str, Launch]:
    """Launches of real shapes, from tensors on "meta": these are compiled ahead of time and their bytes counted.

    Example:
        >>> "bf16 576->1536, 4 bits, g64, symmetric, rank 64" in variants()
        True
    """
    found = {}
    chosen = [(variant, rank, torch.bfloat16) for variant, rank in VARIANTS]
    chosen += [((rows, 4096, 4096, 4, 64, True), 128, torch.float16) for rows in (1, 512)]
    for variant, rank, dtype in chosen:
        x, planes, scale, zero, bias, y, bits = base.variant_tensors(*variant, dtype)
        u, B = x.new_empty(x.shape[0], rank), x.new_empty(rank, y.shape[1])
        name = f"{base.variant_name(*variant, dtype)}, rank {rank}"
        found[name] = plan(x, u, planes, scale, zero, B, bias, y, bits)
    return found


# --- op ----------------------------------------------------------------------------------------------------------


def torch_matmul(
    x: Tensor, u: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, B: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """`quant_lowrank_matmul` in PyTorch, for x [rows, in] and u [rows, rank]."""
    return base.torch_matmul(x, planes, scale, zero, bias, bits) + u.to(x.dtype) @ B.to(x.dtype)


@torch.library.custom_op(
    "refimpl::quant_lowrank_matmul",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor u, Tensor planes, Tensor scale, Tensor? zero, Tensor B, Tensor? bias, int bits) "
    "-> Tensor",
)
def quant_lowrank_matmul(
    x: Tensor, u: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, B: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """``y = x W^T + u B^T + bias`` with ``W = (code - zero) * scale``; differentiable in x and u.

    Args:
        x: [..., in], floating; on a GPU float16 or bfloat16 for the kernel.
        u: [..., rank], ``x A^T``, in the dtype of x.
        planes, scale, zero, bits: as `refimpl.kernels.quant_matmul.quant_matmul`.
        B: [rank, out] in the dtype of x.
        bias: [out] or None.

    Returns:
        [..., out] in the dtype of x.

    Example:
        >>> planes = base.repack(torch.full((2, 32), 9, dtype=torch.uint8), 4)
        >>> x, u, B = torch.ones(1, 32), torch.ones(1, 3), torch.ones(3, 2)
        >>> quant_lowrank_matmul(x, u, planes, torch.full((1, 2), 0.5), None, B, None, 4).tolist()
        [[19.0, 19.0]]
    """
    flat, inner = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
    y = torch_matmul(flat, inner, planes, scale, zero, B, bias, bits)
    return y.view(*x.shape[:-1], B.shape[1])


@quant_lowrank_matmul.register_kernel("cuda")
def _cuda(
    x: Tensor, u: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, B: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    inner = u.reshape(-1, u.shape[-1]).contiguous()
    (rows, n_in), n_out = flat.shape, planes.shape[1]
    y = flat.new_empty(rows, n_out)
    group = n_in // scale.shape[0]
    reason = unsupported(bits, n_in, n_out, group, x.dtype, B.dtype, rows, base.capability(x))
    if reason is not None:
        warn_once("quant_lowrank_matmul", reason)
        y = torch_matmul(flat, inner, planes, scale, zero, B, bias, bits)
    elif rows:
        plan(flat, inner, planes, scale, zero, B, bias, y, bits)()
    return y.view(*x.shape[:-1], n_out)


@quant_lowrank_matmul.register_fake
def _fake(
    x: Tensor, u: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, B: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], planes.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, planes, scale, zero, B, _, ctx.bits = inputs
    ctx.save_for_backward(planes, scale, zero, B)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    planes, scale, zero, B = ctx.saved_tensors
    weight = base.dequantise(planes, scale, zero, ctx.bits).to(gradient.dtype)
    return gradient @ weight.T, gradient @ B.T.to(gradient.dtype), None, None, None, None, None, None


quant_lowrank_matmul.register_autograd(_backward, setup_context=_remember)
