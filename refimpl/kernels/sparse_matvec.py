"""2:4-sparse weights times a few rows of activations: what decoding with a pruned model spends its time on.

At one token a step every weight is read once and used once, so the time is the bytes read over the bandwidth. A 2:4
matrix in 16 bits stores half its values and 2 bits to say where each belongs: 9 bits a dense weight instead of 16, so
the step can take 9/16 of the time. Sparse tensor cores do not help here (they save arithmetic, not bytes of weights
that are read once); what helps is to expand the format in registers, next to the multiplication.

Layout ("K-major"): the outputs are the contiguous dimension, so that neighbouring threads read neighbouring words and
each thread reads 128 bits at a time. 32 consecutive inputs make a chunk: 16 rows of `values`, one row of `positions`.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from refimpl.kernels.launch import Launch, warn_once
from refimpl.kernels.quant_matmul import jit, store_rows, triton

try:
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for macOS and Windows: the format and the torch path work there
    tl = None

MAX_ROWS = 8  # above, a dense product is faster: the weights are read once for many rows
_DTYPES = (torch.float16, torch.bfloat16)
_TARGET_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
# SmolLM2 (up, down, keys), a block of Llama 8B
SHAPES = ((576, 1536), (1536, 576), (576, 192), (4096, 4096), (4096, 14336), (14336, 4096))


# --- layout ------------------------------------------------------------------------------------------------------


def repack(dense: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A 2:4-sparse matrix in the layout that the kernel reads.

    Args:
        dense: weights [out, in], any floating dtype; only those under `mask` are kept.
        mask: bool [out, in], two True in every four consecutive inputs.

    Returns:
        values [in/2, out] in the dtype of `dense`, and positions int32 [in/32, out]: 16 two-bit positions for the 16
        values of a chunk of 32 inputs, the lowest bits first.

    Raises:
        ValueError: `in` is no multiple of 32, or the mask is not 2:4.

    Example:
        >>> dense = torch.tensor([[0.0, 2.0, 0.0, 4.0]]).repeat(3, 8)
        >>> values, positions = repack(dense, dense != 0)
        >>> values.shape, positions.shape
        (torch.Size([16, 3]), torch.Size([1, 3]))
        >>> torch.equal(unpack(values, positions), dense)
        True
    """
    rows, columns = dense.shape
    if columns % 32:
        raise ValueError(f"dense has {columns} inputs: the layout needs a multiple of 32")
    if not bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()):
        raise ValueError("mask: some four consecutive inputs do not keep exactly two; prune with pattern '2:4'")
    # a stable sort of "not kept" lists the kept ones first, in order
    position = (~mask).unflatten(1, (-1, 4)).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2]
    values = dense.unflatten(1, (-1, 4)).gather(-1, position).flatten(1)
    shifts = 2 * torch.arange(16, device=dense.device)
    words = (position.flatten(1).unflatten(1, (-1, 16)) << shifts).sum(-1)  # int64 [out, in/32], below 2**32
    words = torch.where(words >= 2**31, words - 2**32, words)
    return values.T.contiguous(), words.T.to(torch.int32).contiguous()


def unpack(values: Tensor, positions: Tensor) -> Tensor:
    """The dense matrix [out, in] of a repacked one.

    Example:
        >>> dense = torch.tensor([[0.0, 2.0, 0.0, 4.0]]).repeat(3, 8)
        >>> unpack(*repack(dense, dense != 0))[0, :8].tolist()
        [0.0, 2.0, 0.0, 4.0, 0.0, 2.0, 0.0, 4.0]
    """
    shifts = 2 * torch.arange(16, device=positions.device, dtype=torch.int32)[None, :, None]
    inside = (positions[:, None, :] >> shifts) & 3  # an arithmetic shift: the two bits are right, the sign is cut
    groups = values.shape[0] // 2
    place = inside.reshape(groups, 2, -1).to(torch.int64)
    dense = torch.zeros(groups, 4, values.shape[1], dtype=values.dtype, device=values.device)
    return dense.scatter_(1, place, values.reshape(groups, 2, -1)).flatten(0, 1).T.contiguous()


def reference(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula, in fp32: ``y = x W^T + bias``.

    Example:
        >>> dense = torch.tensor([[0.0, 2.0, 0.0, 4.0]]).repeat(3, 8)
        >>> reference(torch.ones(1, 32), *repack(dense, dense != 0)).tolist()
        [[48.0, 48.0, 48.0]]
    """
    y = x.float() @ unpack(values, positions).float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- kernel ------------------------------------------------------------------------------------------------------


@jit
@no_type_check
def _sparse_matvec(
    x,
    values,
    positions,
    bias,
    y,
    partials,
    arrived,
    n_in,
    n_out,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``y[m, n] = sum_s values[s, n] * x[m, 4 * (s // 2) + position(s, n)] (+ bias[n])``.

    A program has BLOCK outputs and every SPLIT-th run of CHUNKS chunks. Each of the 16 values of a chunk is a load of
    its own, of a [CHUNKS, BLOCK] tile like that of the positions: a thread then owns whole columns of a chunk and
    expands the format without a word passing between threads. GROUPS of four inputs are unrolled: as many loads are
    under way at once, and wait for their registers.

    One or two rows: two bits pick the input of each value out of four (three selects a row). More rows: the two bits
    spread the two values over four dense weights (six selects for all rows), then two products a value and row.

    Sums over the chunks of a program go through shared memory, sums over programs through `partials` (`store_rows`).
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    chunks = n_in // 32
    totals = ()
    for _row in tl.static_range(ROWS):
        totals = totals + (tl.zeros([CHUNKS, BLOCK], tl.float32),)
    for start in range(part * CHUNKS, chunks, SPLIT * CHUNKS):
        chunk = (start + tl.arange(0, CHUNKS))[:, None]
        known = chunk < chunks
        kept = known & (n < n_out)[None, :]
        word = tl.load(positions + chunk * n_out + n[None, :], mask=kept, other=0)
        weights = values + chunk * 16 * n_out + n[None, :]
        inputs = x + chunk * 32
        for _step in range(8 // GROUPS):
            for group in tl.static_range(GROUPS):
                w0 = tl.load(weights + (2 * group) * n_out, mask=kept, other=0.0).to(tl.float32)
                w1 = tl.load(weights + (2 * group + 1) * n_out, mask=kept, other=0.0).to(tl.float32)
                bits = word >> (4 * group)
                odd0 = (bits & 1) != 0
                high0 = (bits & 2) != 0
                odd1 = (bits & 4) != 0
                high1 = (bits & 8) != 0
                if ROWS > 2:  # the first value is at 0, 1 or 2, the second after it at 1, 2 or 3
                    d0 = tl.where(odd0 | high0, 0.0, w0)
                    d1 = tl.where(odd0, w0, tl.where(high1, 0.0, w1))
                    d2 = tl.where(high0, w0, tl.where(odd1, 0.0, w1))
                    d3 = tl.where(odd1 & high1, w1, 0.0)
                sums = ()
                for m in tl.static_range(ROWS):
                    place = inputs + m * n_in + 4 * group
                    x0 = tl.load(place, mask=known, other=0.0).to(tl.float32)
                    x1 = tl.load(place + 1, mask=known, other=0.0).to(tl.float32)
                    x2 = tl.load(place + 2, mask=known, other=0.0).to(tl.float32)
                    x3 = tl.load(place + 3, mask=known, other=0.0).to(tl.float32)
                    total = totals[m]
                    if ROWS > 2:
                        total = tl.fma(d0, x0, tl.fma(d1, x1, tl.fma(d2, x2, tl.fma(d3, x3, total))))
                    else:
                        picked0 = tl.where(high0, tl.where(odd0, x3, x2), tl.where(odd0, x1, x0))
                        picked1 = tl.where(high1, tl.where(odd1, x3, x2), tl.where(odd1, x1, x0))
                        total = tl.fma(w0, picked0, tl.fma(w1, picked1, total))
                    sums = sums + (total,)
                totals = sums
            word = word >> (4 * GROUPS)
            weights += 2 * GROUPS * n_out
            inputs += 4 * GROUPS
    results = ()
    for m in tl.static_range(ROWS):
        results = results + (tl.sum(totals[m], 0),)
    store_rows(results, bias, y, partials, arrived, n, block, part, n_out, ROWS, BLOCK, SPLIT)


def unsupported(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the kernel cannot compute this; None if it can.

    Many rows are no reason: for them a dense product is the better algorithm, and `sparse_matvec` takes it silently.

    Example:
        >>> x, values = torch.zeros(1, 64), torch.zeros(32, 16)
        >>> unsupported(x, values, torch.zeros(2, 16, dtype=torch.int32))
        'activations are torch.float32, the kernel takes float16 and bfloat16'
    """
    if x.dtype not in _DTYPES:
        return f"activations are {x.dtype}, the kernel takes float16 and bfloat16"
    if values.dtype != x.dtype:
        return f"values are {values.dtype} and activations {x.dtype}, the kernel takes one dtype"
    if triton is None:
        return "triton 3.3 or later is not installed (pip install 'refimpl[kernels]')"
    if values.numel() >= 2**31:
        return f"the matrix has {values.numel()} values, the kernel counts to 2**31"
    return None


def plan(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None, y: Tensor | None = None) -> Launch:
    """The launch for these tensors; `arguments["y"]` holds the result, [rows, out], once it has run.

    Args:
        x: [rows, in], contiguous, 1 to `MAX_ROWS` rows.
        values, positions: as `repack` makes them.
        bias: [out] or None.
        y: where to write, [rows, out] in the dtype of `x`; made if None.

    Example:
        >>> x, values = torch.empty(1, 4096, device="meta"), torch.empty(2048, 4096, device="meta")
        >>> plan(x.half(), values.half(), torch.empty(128, 4096, dtype=torch.int32, device="meta")).grid
        (32, 8)
    """
    rows, n_in = x.shape
    n_out = values.shape[1]
    chunks = n_in // 32
    block, run = 128, 8
    blocks = -(-n_out // block)
    split = _split(blocks, -(-chunks // run), n_in, n_out)
    partials = arrived = None
    if split > 1:
        partials = x.new_empty(split, rows, n_out, dtype=torch.float32)
        arrived = x.new_zeros(blocks, dtype=torch.int32)
    arguments: dict[str, Tensor | int | None] = {
        "x": x,
        "values": values,
        "positions": positions,
        "bias": bias,
        "y": x.new_empty(rows, n_out) if y is None else y,
        "partials": partials,
        "arrived": arrived,
        "n_in": n_in,
        "n_out": n_out,
    }
    constants = {
        "ROWS": rows,
        "CHUNKS": run,
        "BLOCK": block,
        "SPLIT": split,
        "GROUPS": 4 if rows == 1 else 2 if rows <= 4 else 1,
    }
    return Launch(_sparse_matvec, (blocks, split), arguments, constants, num_warps=4, num_stages=1)


def _split(blocks: int, runs: int, n_in: int, n_out: int) -> int:
    """Programs that share the inputs of one block: a power of two, from the shape alone.

    A GPU wants more programs than a narrow matrix has blocks; each further part writes and reads its sums in fp32.
    What a matrix-vector product moves beyond the minimum, x in every block included, stays at 4 % of the weights.
    """
    allowed = 0.04 * n_in * n_out * 9 / 8 - (blocks - 1) * n_in * 2
    split = 1
    while 2 * split <= min(runs, allowed / (8 * n_out)) and split * blocks < _TARGET_PROGRAMS:
        split *= 2
    return split


# --- op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "refimpl::sparse_matvec",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor positions, Tensor? bias=None) -> Tensor",
)
def sparse_matvec(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + bias`` with a 2:4-sparse W in the layout of `repack`.

    On CUDA up to `MAX_ROWS` rows of float16 or bfloat16 go to the Triton kernel. More rows, and every other device,
    take PyTorch by design: the matrix is expanded and multiplied densely, which costs once what many rows share. A
    dtype or size that the kernel does not know does the same, with one warning.

    Args:
        x: [..., in].
        values: [in/2, out].
        positions: int32 [in/32, out].
        bias: [out] or None.

    Returns:
        [..., out] in the dtype of `x`, accumulated in fp32. Differentiable in `x` only.

    Example:
        >>> dense = torch.tensor([[0.0, 2.0, 0.0, 4.0]]).repeat(3, 8)
        >>> sparse_matvec(torch.ones(1, 32), *repack(dense, dense != 0)).tolist()
        [[48.0, 48.0, 48.0]]
    """
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, unpack(values, positions).to(x.dtype), bias)


@sparse_matvec.register_kernel("cuda")
def _cuda(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.numel() // x.shape[-1]
    reason = unsupported(x, values, positions, bias)
    if reason is not None:
        warn_once("sparse_matvec", reason)
    if reason is not None or not 0 < rows <= MAX_ROWS:
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, unpack(values, positions).to(x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], values.shape[1])
    plan(x.reshape(rows, -1).contiguous(), values, positions, bias, y.view(rows, -1))()
    return y


@sparse_matvec.register_fake
def _fake(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    _, values, positions, _ = inputs
    ctx.save_for_backward(values, positions)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    values, positions = ctx.saved_tensors
    return gradient @ unpack(values, positions).to(gradient.dtype), None, None, None


sparse_matvec.register_autograd(_backward, setup_context=_setup)


def cost(rows: int, n_in: int, n_out: int, bias: bool = False) -> tuple[int, int]:
    """Bytes and operations that no implementation of this format can do without, in 16 bits.

    Returns:
        Bytes: 9 bits a dense weight, x once, y once (and the bias). Operations: two for each kept weight and row.

    Example:
        >>> cost(1, 4096, 4096)
        (18890752, 16777216)
    """
    weights = n_in * n_out // 2 * 2 + n_in // 32 * n_out * 4
    return weights + 2 * rows * (n_in + n_out) + 2 * n_out * bias, rows * n_in * n_out


def variants() -> dict[str, Launch]:
    """The launches that are audited, counted and timed: real shapes, from tensors without memory.

    Example:
        >>> variants()["bf16 4096->14336"].grid
        (112, 4)
    """
    found = {}
    for name, dtype, many in (("bf16", torch.bfloat16, range(2, MAX_ROWS + 1)), ("fp16", torch.float16, (2, 4, 8))):
        for n_in, n_out in SHAPES:
            found[f"{name} {n_in}->{n_out}"] = _meta(1, n_in, n_out, dtype)
        for rows in many:
            found[f"{name} 4096->4096, {rows} rows"] = _meta(rows, 4096, 4096, dtype)
    return found


def _meta(rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> Launch:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return plan(empty(rows, n_in), empty(n_in // 2, n_out), empty(n_in // 32, n_out, dtype=torch.int32))
