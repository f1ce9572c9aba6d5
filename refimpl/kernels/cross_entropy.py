"""Cross-entropy of each sequence, from logits to a loss a sequence and back, with no probabilities in memory.

Training that weighs sequences needs ``l_b = 1/n_b sum_t -log softmax(x_bt)[y_bt]`` for each b apart, n_b the targets
of the sequence that count, and then the gradient of ``sum_b g_b l_b``. Logits are the largest tensor of a language
model (tokens times vocabulary), so what matters is how often they cross the memory bus. Row by row:

    forward:   lse = log sum_v exp(x_v)                          reads x, keeps one number
    backward:  dx_v = (exp(x_v - lse) - [v = y]) * g_b / n_b     reads x, writes dx

The soft-max is computed again rather than kept, and the weight g_b of a sequence is a factor of a row that is being
written anyway: weighing costs no byte. Of 16-bit logits 6 bytes each move, there and back. PyTorch's own loss keeps
log-probabilities and makes a gradient in them: 12, and 36 on a copy in fp32, if every operator reads and writes its
tensors once. The sum goes online: a running maximum and a sum of exponentials relative to it.

A program has one row. Each thread walks down groups of 128 bits with a maximum and a sum of its own, so that nothing
passes between threads before the end of the row, and one exponential a group is all that going online costs. Rows of a
vocabulary such as GPT-2's 50257 begin anywhere: the columns before the first and after the last whole group that
is aligned in memory are read separately.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from refimpl.kernels.launch import Launch, warn_once
from refimpl.kernels.quant_matmul import capability, triton

try:
    import triton.language as tl
except ModuleNotFoundError:  # no wheels for macOS and Windows: the torch path works there
    tl = None

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_VARYING = ["tokens", "ignore_index"]  # no code of their own for each value
_GROUPS = 1024  # of 128 bits, at a time: four a thread keep enough of them on their way
_SLAB = 2**20  # logits handled at a time on a CPU: their copies in fp32 stay in the cache


def jit(function: Any) -> Any:
    """`triton.jit`, or the function itself where triton is not installed or too old."""
    return function if triton is None else triton.jit(function, do_not_specialize=_VARYING)


class Inputs(NamedTuple):
    """The inputs of a loss and its gradient.

    Attributes:
        logits: [B, T, V].
        targets: int64 [B, T].
        gradient: of the losses, from the backward pass, fp32 [B].
        ignore_index: the target of tokens that do not count.
    """

    logits: Tensor
    targets: Tensor
    gradient: Tensor
    ignore_index: int = -100


def reference(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The formula in fp32 (float64 for float64), all log-probabilities at once; as `sequence_cross_entropy`.

    Example:
        >>> reference(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).exp().tolist()   # one of four, equally likely
        [4.0]
    """
    counted = targets != ignore_index
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = logs.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return -picked.where(counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
@no_type_check
def _whole_groups(logits, place, vocabulary, WIDTH: tl.constexpr, LEAD: tl.constexpr, EDGES: tl.constexpr):
    """Of the row that begins at `place`: elements before the first whole group of 128 bits (WIDTH elements), how many
    whole groups there are, and where the first is."""
    head = 0
    if EDGES:
        head = tl.minimum((-(place + LEAD)) & (WIDTH - 1), vocabulary).to(tl.int32)
    first = place + head
    if LEAD == 0:  # compilers for AMD believe it of offsets only
        first = tl.multiple_of(first, WIDTH)
    return head, (vocabulary - head) // WIDTH, tl.multiple_of(logits + first, 16)


@jit
@no_type_check
def _edges(head, groups, vocabulary, WIDTH: tl.constexpr):
    """Columns before and after the whole groups, [2 * WIDTH], and which of them exist."""
    e = tl.arange(0, 2 * WIDTH)
    column = tl.where(e < WIDTH, e, head + groups * WIDTH + e - WIDTH)
    return column, column < tl.where(e < WIDTH, head, vocabulary)


@jit
@no_type_check
def _level(most):
    """The value subtracted from exponents: the maximum, or 0 for a maximum over nothing."""
    return tl.where(most == float("-inf"), 0.0, most)


@jit
@no_type_check
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@jit
@no_type_check
def _cross_entropy(
    logits,
    targets,
    lse,
    losses,
    tokens,
    vocabulary,
    batch_stride,
    token_stride,
    ignore_index,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAD: tl.constexpr,
    EDGES: tl.constexpr,
):
    """A row: its log-sum-exp and its loss. LEAD: elements between a multiple of 128 bits and `logits`."""
    row = tl.program_id(0)
    target = tl.load(targets + row)
    loss = 0.0
    total_log = 0.0
    if target != ignore_index:
        place = (row // tokens).to(tl.int64) * batch_stride + (row % tokens).to(tl.int64) * token_stride
        inside = (target >= 0) & (target < vocabulary)
        picked = tl.load(logits + place + target, mask=inside, other=float("nan")).to(tl.float32)
        head, groups, body = _whole_groups(logits, place, vocabulary, WIDTH, LEAD, EDGES)
        lane = tl.arange(0, GROUPS)
        most = tl.full([GROUPS], float("-inf"), tl.float32)
        total = tl.zeros([GROUPS], tl.float32)
        for start in range(0, groups, GROUPS):
            group = start + lane
            column = (group * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
            x = tl.load(body + column, mask=(group < groups)[:, None], other=float("-inf")).to(tl.float32)
            new = tl.maximum(most, tl.max(x, 1))
            level = _level(new)
            total = total * _exp(most - level) + tl.sum(_exp(x - level[:, None]), 1)
            most = new
        largest = tl.max(most, 0)
        if EDGES:
            at, there = _edges(head, groups, vocabulary, WIDTH)
            edge = tl.load(logits + place + at, mask=there, other=float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, tl.max(edge, 0))
        origin = _level(largest)
        every = tl.sum(total * _exp(most - origin), 0)
        if EDGES:
            every += tl.sum(_exp(edge - origin), 0)
        # a target outside the vocabulary makes both NaN, and with them the gradient of the row
        total_log = tl.where(inside, origin + tl.log(every), float("nan"))
        loss = total_log - picked
    tl.store(lse + row, total_log)
    tl.store(losses + row, loss)


@jit
@no_type_check
def _cross_entropy_backward(
    logits,
    targets,
    lse,
    scale,
    gradient,
    tokens,
    vocabulary,
    batch_stride,
    token_stride,
    gradient_stride,
    ignore_index,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAD: tl.constexpr,
    EDGES: tl.constexpr,
    IN_STEP: tl.constexpr,
):
    """A row of the gradient; all zeros, and nothing read, where the target does not count.

    IN_STEP: the row of the gradient lies as far from a multiple of 128 bits as that of the logits.
    """
    row = tl.program_id(0)
    target = tl.load(targets + row)
    counts = target != ignore_index
    total_log = tl.load(lse + row)
    weight = tl.load(scale + row // tokens, mask=counts, other=0.0)
    place = (row // tokens).to(tl.int64) * batch_stride + (row % tokens).to(tl.int64) * token_stride
    head, groups, body = _whole_groups(logits, place, vocabulary, WIDTH, LEAD, EDGES)
    result = gradient + row.to(tl.int64) * gradient_stride
    result_body = result + head
    if IN_STEP:
        result_body = tl.multiple_of(result_body, 16)
    goal = (target - head).to(tl.int32)
    read = tl.where(counts, groups, 0)
    lane = tl.arange(0, GROUPS)
    for start in range(0, groups, GROUPS):
        group = start + lane
        column = (group * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
        x = tl.load(body + column, mask=(group < read)[:, None], other=float("-inf")).to(tl.float32)
        p = _exp(x - total_log)
        value = tl.where(column == goal, p - 1.0, p) * weight
        tl.store(result_body + column, value.to(gradient.dtype.element_ty), mask=(group < groups)[:, None])
    if EDGES:
        at, there = _edges(head, groups, vocabulary, WIDTH)
        edge = tl.load(
            logits + place + at, mask=there & (at < tl.where(counts, vocabulary, 0)), other=float("-inf")
        ).to(tl.float32)
        q = _exp(edge - total_log)
        value_edge = tl.where(at == target, q - 1.0, q) * weight
        tl.store(result + at, value_edge.to(gradient.dtype.element_ty), mask=there)


# --- launch ------------------------------------------------------------------------------------------------------


def cost(batch: int, tokens: int, vocabulary: int, itemsize: int = 2, backward: bool = False) -> tuple[int, int]:
    """Bytes and operations that any implementation needs which is given logits in memory.

    Args:
        batch, tokens, vocabulary: sizes of the logits.
        itemsize: bytes of one.
        backward: of the gradient in the logits, given log-sum-exps; otherwise of the losses.

    Returns:
        Bytes: logits once, and once more as a gradient; targets (8 bytes a token), log-sum-exps and losses (4), weights
        of sequences (4). Operations: four a logit (difference, exponential, and either maximum and sum or difference
        and product).

    Example:
        >>> cost(1, 1024, 128256), cost(1, 1024, 128256, backward=True)
        ((262684672, 525336576), (525348868, 525336576))
    """
    rows = batch * tokens
    small = rows * (8 + 4) + (4 * batch if backward else 4 * rows)
    return rows * vocabulary * itemsize * (2 if backward else 1) + small, 4 * rows * vocabulary


def unsupported(logits: Tensor, capability: tuple[int, int] | None = None) -> str | None:
    """Why the kernels cannot compute this, or None.

    Args:
        logits: on any device.
        capability: of the NVIDIA GPU; None where it does not matter.

    Example:
        >>> unsupported(torch.zeros(1, 1, 4, dtype=torch.float64))
        'logits are float64, not float16, bfloat16 or float32'
    """
    if logits.dtype not in _DTYPES:
        return f"logits are {str(logits.dtype).removeprefix('torch.')}, not float16, bfloat16 or float32"
    if triton is None:
        return "triton 3.3 or later is not installed (pip install 'refimpl[kernels]')"
    if logits.dtype == torch.bfloat16 and capability is not None and capability < (8, 0):
        return f"there is no bfloat16 on compute capability {capability[0]}.{capability[1]}"
    if max(logits.shape[0] * logits.shape[1], logits.shape[2]) >= 2**31:
        return f"logits of {list(logits.shape)} have 2**31 rows or columns"
    return None


def _shared(logits: Tensor) -> tuple[dict[str, int], dict[str, int | bool], int]:
    """Arguments, constants and warps that both launches have."""
    (batch, tokens, vocabulary), width = logits.shape, 16 // logits.element_size()
    batch_stride, token_stride, _ = logits.stride()
    arguments = {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "batch_stride": batch_stride * (batch > 1),
        "token_stride": token_stride * (tokens > 1),
    }
    lead = logits.data_ptr() // logits.element_size() % width
    groups = min(_GROUPS, max(32, 1 << (-(-vocabulary // width) - 1).bit_length()))
    edges = lead > 0 or any(arguments[k] % width for k in ("vocabulary", "batch_stride", "token_stride"))
    return arguments, {"WIDTH": width, "GROUPS": groups, "LEAD": lead, "EDGES": edges}, max(1, groups // 128)


def plan(logits: Tensor, targets: Tensor, lse: Tensor, losses: Tensor, ignore_index: int = -100) -> Launch:
    """The launch that computes log-sum-exps and losses of tokens.

    Args:
        logits: [B, T, V]; only its last dimension must be contiguous.
        targets: int64 [B, T], contiguous.
        lse, losses: fp32 [B, T], are written; 0 where the target does not count.
        ignore_index: the target of tokens that do not count.

    Example:
        >>> logits = torch.empty(2, 1024, 49152, dtype=torch.bfloat16, device="meta")
        >>> numbers = torch.empty(2, 1024, device="meta")
        >>> plan(logits, numbers.long(), numbers, numbers).grid
        (2048,)
    """
    arguments, constants, warps = _shared(logits)
    tensors = {"logits": logits, "targets": targets, "lse": lse, "losses": losses}
    return Launch(
        _cross_entropy,
        (targets.numel(),),
        {**tensors, **arguments, "ignore_index": ignore_index},
        constants,
        warps,
        num_stages=1,
    )


def plan_backward(
    logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, gradient: Tensor, ignore_index: int = -100
) -> Launch:
    """The launch that computes the gradient in the logits.

    Args:
        logits, targets, lse, ignore_index: as in `plan`.
        scale: fp32 [B], what rows of a sequence are multiplied with.
        gradient: [B, T, V] in the dtype of the logits, rows one stride apart; is written.
    """
    arguments, constants, warps = _shared(logits)
    (batch, tokens, _), stride = logits.shape, gradient.stride(1)
    apart = (
        gradient.data_ptr() // gradient.element_size() - constants["LEAD"],
        (stride - arguments["token_stride"]) * (tokens > 1),
        (stride * tokens - arguments["batch_stride"]) * (batch > 1),
    )
    in_step = all(elements % constants["WIDTH"] == 0 for elements in apart)
    tensors = {"logits": logits, "targets": targets, "lse": lse, "scale": scale, "gradient": gradient}
    numbers = {**arguments, "gradient_stride": stride, "ignore_index": ignore_index}
    return Launch(
        _cross_entropy_backward,
        (targets.numel(),),
        {**tensors, **numbers},
        {**constants, "IN_STEP": in_step},
        warps,
        num_stages=1,
    )


# model, vocabulary, dtype, sequences, tokens, whether the last token's logits are sliced off
VARIANTS = (
    ("SmolLM2", 49152, torch.bfloat16, 2, 1024, False),
    ("SmolLM2", 49152, torch.float16, 2, 1024, False),
    ("Llama-8B", 128256, torch.bfloat16, 1, 1024, False),
    ("Llama-8B", 128256, torch.float32, 1, 512, False),
    ("GPT-2", 50257, torch.bfloat16, 2, 1024, False),
    ("GPT-2", 50257, torch.float16, 2, 1024, True),
    ("a small model", 1024, torch.float32, 32, 128, False),
)


def problems() -> dict[str, Inputs]:
    """Real shapes by name, from tensors without memory.

    Example:
        >>> problems()["fp16 GPT-2, 2 x 1024 tokens, sliced"].logits.stride()
        (51463168, 50257, 1)
    """
    found = {}
    for model, vocabulary, dtype, batch, tokens, sliced in VARIANTS:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        logits = torch.empty(batch, tokens, vocabulary, dtype=dtype, device="meta")[:, : tokens - sliced]
        targets = torch.empty(logits.shape[:2], dtype=torch.int64, device="meta")
        title = f"{short} {model}, {batch} x {tokens} tokens{', sliced' * sliced}"
        found[title] = Inputs(logits, targets, torch.empty(batch, device="meta"))
    return found


def launches(inputs: Inputs) -> tuple[Launch, Launch]:
    """Forward and backward launch with results of their own: ``arguments["losses"]`` and ``arguments["gradient"]``.

    Example:
        >>> forward, backward = launches(problems()["bf16 SmolLM2, 2 x 1024 tokens"])
        >>> backward.arguments["gradient"].shape
        torch.Size([2, 1024, 49152])
    """
    logits, targets, gradient, ignore_index = inputs
    lse, scale = torch.empty(targets.shape, device=logits.device), _scale(gradient, targets != ignore_index)
    forward = plan(logits, targets, lse, torch.empty_like(lse), ignore_index)
    return forward, plan_backward(logits, targets, lse, scale, logits.new_empty(logits.shape), ignore_index)


def least(inputs: Inputs) -> tuple[int, int]:
    """`cost` of both ways for these tensors.

    Example:
        >>> moved, _ = least(problems()["bf16 Llama-8B, 1 x 1024 tokens"])
        >>> moved == cost(1, 1024, 128256)[0] + cost(1, 1024, 128256, backward=True)[0]
        True
    """
    batch, tokens, vocabulary = inputs.logits.shape
    ways = [cost(batch, tokens, vocabulary, inputs.logits.element_size(), way) for way in (False, True)]
    return ways[0][0] + ways[1][0], ways[0][1] + ways[1][1]


def variants() -> dict[str, Launch]:
    """The launches that are audited and counted: two for each of `problems`.

    Example:
        >>> variants()["bf16 Llama-8B, 1 x 1024 tokens, forward"].num_warps
        8
    """
    return {
        f"{title}, {way}": launch
        for title, inputs in problems().items()
        for way, launch in zip(("forward", "backward"), launches(inputs), strict=True)
    }


# --- op ----------------------------------------------------------------------------------------------------------


def _slabs(logits: Tensor) -> list[tuple[slice, slice]]:
    """Sequences and tokens of each slab: slices, as a view of logits may have no rows of one stride."""
    batch, tokens, size = logits.shape
    along = max(1, min(tokens, _SLAB // size))
    across = max(1, _SLAB // (along * size)) if along == tokens else 1
    return [
        (slice(b, b + across), slice(t, t + along)) for b in range(0, batch, across) for t in range(0, tokens, along)
    ]


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    """Over the targets that count, [B, T] to [B]; 0 where none does."""
    return losses.sum(1) / counted.sum(1).clamp(min=1)


def _scale(gradient: Tensor, counted: Tensor) -> Tensor:
    """The factor of all rows of a sequence, [B]."""
    return gradient / counted.sum(1).clamp(min=1)


def _sorted(targets: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets count, targets that can be looked up, and which of those that count are in no vocabulary."""
    counted, inside = targets != ignore_index, (targets >= 0) & (targets < vocabulary)
    return counted, targets.where(inside, 0), counted & ~inside


def torch_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Losses [B] and log-sum-exps [B, T] in PyTorch, slab by slab.

    Raises:
        ValueError: a target that is neither in the vocabulary nor `ignore_index` (on a GPU its loss is NaN instead,
            as looking would mean to wait).
    """
    counted, known, strange = _sorted(targets, logits.shape[2], ignore_index)
    if not targets.is_cuda and bool(strange.any()):
        raise ValueError(
            f"targets holds {targets[strange][0].item()}, outside the vocabulary of {logits.shape[2]}; tokens without "
            f"a target are marked with ignore_index, here {ignore_index}"
        )
    lse = logits.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = torch.empty_like(lse)
    for at in _slabs(logits):
        x = logits[at].to(lse.dtype)
        lse[at] = x.logsumexp(-1)
        losses[at] = lse[at] - x.gather(-1, known[at].unsqueeze(-1)).squeeze(-1)
    lse, losses = (numbers.masked_fill_(strange, torch.nan) for numbers in (lse, losses))
    return _mean(losses.masked_fill_(~counted, 0.0), counted), lse


def torch_backward(gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """The gradient in the logits, [B, T, V] in their dtype, in PyTorch, slab by slab; contiguous."""
    counted, known, _ = _sorted(targets, logits.shape[2], ignore_index)
    scale, known = _scale(gradient, counted)[:, None, None], known.unsqueeze(-1)
    result = logits.new_empty(logits.shape)
    one = lse.new_ones(())
    for at in _slabs(logits):
        p = (logits[at] - lse[at].unsqueeze(-1)).exp_()
        p.scatter_add_(-1, known[at], -one.expand(known[at].shape))
        result[at] = p.mul_(scale[at[0]]).masked_fill_(~counted[at].unsqueeze(-1), 0.0)
    return result


@torch.library.custom_op(
    "refimpl::sequence_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor)",
)
def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return torch_forward(logits, targets, ignore_index)


@_forward.register_kernel("cuda")
def _forward_cuda(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    reason = unsupported(logits, capability(logits))
    if reason is not None:
        warn_once("cross_entropy", reason)
        return torch_forward(logits, targets, ignore_index)
    lse, losses = (torch.empty(targets.shape, device=logits.device) for _ in range(2))
    if targets.numel():
        plan(_rows(logits), targets.contiguous(), lse, losses, ignore_index)()
    return _mean(losses, targets != ignore_index), lse


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(2) == 1 else logits.contiguous()


@_forward.register_fake
def _forward_fake(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(targets.shape[0], dtype=dtype), logits.new_empty(targets.shape, dtype=dtype)


@torch.library.custom_op(
    "refimpl::sequence_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor logits, Tensor targets, Tensor lse, int ignore_index) -> Tensor",
)
def _backward(gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return torch_backward(gradient, logits, targets, lse, ignore_index)


@_backward.register_kernel("cuda")
def _backward_cuda(gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    if unsupported(logits, capability(logits)) is not None:  # said in the forward pass
        return torch_backward(gradient, logits, targets, lse, ignore_index)
    result = logits.new_empty(logits.shape)
    if targets.numel():
        scale = _scale(gradient, targets != ignore_index)
        plan_backward(_rows(logits), targets.contiguous(), lse, scale, result, ignore_index)()
    return result


@_backward.register_fake
def _backward_fake(gradient: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return _backward(gradient, *ctx.saved_tensors, ctx.ignore_index), None, None


_forward.register_autograd(_differentiate, setup_context=_remember)


def sequence_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of each sequence, in nats; differentiable in the logits, once.

    On CUDA float16, bfloat16 and float32 go to the Triton kernels; everything else is PyTorch, slab by slab. Either way
    there is no second tensor as large as the logits in the forward pass, and only the gradient in the backward pass.

    A causal model predicts one token ahead. Shifting the *targets* (`ignore_index` at the end) is cheaper than slicing
    the logits: a slice is read without a copy, but PyTorch pads its gradient, which writes and reads all of it again.

    Args:
        logits: [B, T, V], floating, of any strides.
        targets: int64 [B, T], in ``0..V-1`` or `ignore_index`.
        ignore_index: the target of tokens that do not count.

    Returns:
        [B], fp32 (float64 for float64 logits): the mean over the targets that count; 0, with no gradient, for a
        sequence without any.

    Raises:
        ValueError: shapes or dtypes are others, or, on a CPU, a target is outside the vocabulary (on a GPU: NaN).

    Example:
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> losses = sequence_cross_entropy(logits, torch.tensor([[0, 1, 2], [3, -100, -100]]))
        >>> losses.exp().tolist()
        [4.0, 4.0]
        >>> (torch.tensor([0.0, 2.0]) @ losses).backward()   # sequences weighed
        >>> logits.grad[1].tolist()
        [[0.5, 0.5, 0.5, -1.5], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    if logits.ndim != 3 or not logits.is_floating_point() or not logits.shape[2]:
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}; it must be floating, [B, T, V]")
    if targets.shape != logits.shape[:2] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} {list(targets.shape)}; logits {list(logits.shape)} need torch.int64 "
            f"{list(logits.shape[:2])}"
        )
    losses: Tensor = _forward(logits, targets, ignore_index)[0]
    return losses
