"""How fast the kernels are, for people with a GPU: each launch beside PyTorch, and as a fraction of what a GPU can do.

What a GPU can do is measured on it, by a large copy and a large matrix product: the figures of a data sheet hold at
clocks and temperatures of their own. The least time of a launch is then the larger of its bytes over the bandwidth and
its operations over the rate of the products (the roofline), and its fraction of the roofline is least over measured.

Before a kernel is timed its result is compared with PyTorch's: a wrong kernel has no speed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from refimpl import markdown
from refimpl.kernels import cross_entropy
from refimpl.kernels.audit import all_kernels, launches, versions, write_json
from refimpl.kernels.launch import Launch
from refimpl.kernels.quant_matmul import dequantise
from refimpl.kernels.sparse_matvec import unpack
from refimpl.kernels.traffic import minimum

Timer = Callable[[Callable[[], Any]], float]  # runs a function, says how many milliseconds it takes
TOLERANCE = 0.02  # relative error (Frobenius) of 16-bit results; a sum that is wrong somewhere is far beyond


@dataclass(frozen=True)
class Device:
    """A GPU, described by measurements on it.

    Attributes:
        name: as reported by the driver.
        bandwidth: bytes a second, read and written by a copy.
        flops: operations a second of a dense product, by dtype ("bfloat16", "float16").
    """

    name: str
    bandwidth: float
    flops: dict[str, float]

    def least(self, moved: int, operations: int, dtype: str) -> float:
        """Milliseconds below which no kernel that moves and computes so much can stay.

        Example:
            >>> Device("demo", 1e12, {"float16": 1e14}).least(2_000_000, 100_000_000, "float16")
            0.002
        """
        return 1e3 * max(moved / self.bandwidth, operations / self.flops[dtype])


@dataclass(frozen=True)
class Row:
    """One launch, timed; attention in two passes is one, and so are a loss and its gradient.

    Attributes:
        kernel, variant: as in `refimpl.kernels.audit`.
        least: milliseconds by the roofline.
        times: milliseconds of "kernel", "torch" (weights expanded, then multiplied; keys and values rebuilt, then
            attended to; log-probabilities in fp32, then differentiated), "torch.compile" (the same, compiled) and,
            but for losses, "dense" (16-bit weights that were never compressed; attention to a full cache of as many
            tokens).
        error: of the kernel's result against PyTorch's in fp32, relative Frobenius norm.
    """

    kernel: str
    variant: str
    least: float
    times: dict[str, float]
    error: float

    @property
    def fraction(self) -> float:
        """Of the roofline: 1 is as fast as the GPU can."""
        return self.least / self.times["kernel"]


# --- tensors -----------------------------------------------------------------------------------------------------

_PAIRS = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)  # first position, second position << 2


def materialise(launch: Launch, device: torch.device | str, seed: int = 0) -> Launch:
    """The launch with random tensors of the kind each argument holds: legal 2:4 positions, small scales, counters at 0.

    Example:
        >>> materialise(launches("sparse_matvec")["fp16 576->192"], "cpu").arguments["values"].dtype
        torch.float16
    """
    generator = torch.Generator(device).manual_seed(seed)
    bits = launch.constants.get("BITS", 8)

    def fill(name: str, like: Tensor) -> Tensor:
        made = torch.empty(like.shape, dtype=like.dtype, device=device)
        if name == "positions":
            pairs = torch.tensor(_PAIRS, device=device, dtype=torch.int64)
            picked = pairs[torch.randint(6, (8, *like.shape), generator=generator, device=device)]
            shifts = 4 * torch.arange(8, device=device)[:, None, None]
            word = (picked << shifts).sum(0)
            return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
        if name == "zero":
            return made.random_(0, 2**bits, generator=generator)
        if name == "arrived":
            return made.zero_()
        if not like.is_floating_point():
            return made.random_(-(2**31), 2**31 - 1, generator=generator)
        made.normal_(generator=generator)
        return made.mul_(0.01).abs_() if name == "scale" else made

    arguments = {
        name: fill(name, value) if isinstance(value, Tensor) else value for name, value in launch.arguments.items()
    }
    return Launch(launch.kernel, launch.grid, arguments, launch.constants, launch.num_warps, launch.num_stages)


def expand(launch: Launch) -> Tensor:
    """The dense matrix of a launch, [out, in], in the dtype of x.

    Example:
        >>> launch = materialise(launches("sparse_matvec")["fp16 576->192"], "cpu")
        >>> (expand(launch) != 0).float().mean().item()   # two of four
        0.5
    """
    given: Mapping[str, Any] = launch.arguments
    if "positions" in given:
        dense = unpack(given["values"], given["positions"])
    else:
        dense = dequantise(given["planes"], given["scale"], given["zero"], launch.constants["BITS"]).T
    return dense.to(given["x"].dtype)


def _multiply(launch: Launch, dense: Tensor) -> Tensor:
    """The result of the launch, computed from the dense matrix."""
    given: Mapping[str, Any] = launch.arguments
    y = torch.nn.functional.linear(given["x"], dense, given["bias"])
    return y + given["u"] @ given["B"] if "u" in given else y


def operations(launch: Launch) -> int:
    """Floating-point operations that the kernel's format needs.

    Example:
        >>> operations(launches("sparse_matvec")["bf16 4096->4096"])
        16777216
    """
    given: Mapping[str, Any] = launch.arguments
    rows, n_in, n_out = given["x"].shape[0], given["x"].shape[1], given["y"].shape[1]
    dense = rows * n_in * n_out if "positions" in given else 2 * rows * n_in * n_out
    return dense + (2 * rows * given["u"].shape[1] * n_out if "u" in given else 0)


# --- measure -----------------------------------------------------------------------------------------------------


def do_bench(function: Callable[[], Any]) -> float:
    """Median milliseconds of a call on the GPU, the L2 emptied before each."""
    from triton import testing

    return float(testing.do_bench(function, return_mode="median"))


def compile_anew(function: Callable[[], Any]) -> Callable[[], Any]:
    """`torch.compile` with nothing remembered: the same lines compile for every launch, which it would soon refuse."""
    torch.compiler.reset()
    compiled: Callable[[], Any] = torch.compile(function)
    return compiled


def measure_device(device: torch.device | str, time: Timer = do_bench, size: int = 2**30, width: int = 8192) -> Device:
    """Bandwidth by a copy of `size` bytes, operations by a product of two matrices of `width` squared.

    Example:
        >>> measure_device("cpu", lambda function: 2.0, size=1000, width=10).bandwidth   # 2000 bytes in 2 ms
        1000000.0
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * size / (time(lambda: target.copy_(source)) / 1e3)
    flops = {}
    for dtype in (torch.float16, torch.bfloat16):
        # random, not zeros: a GPU that multiplies zeros draws less power and clocks higher
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        flops[str(dtype).removeprefix("torch.")] = 2 * width**3 / (time(partial(torch.matmul, a, b)) / 1e3)
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)
    return Device(name, bandwidth, flops)


def _check(kernel: str, variant: str, error: float, device: Device) -> None:
    """Raise `RuntimeError` if this is more than rounding."""
    if not error < TOLERANCE:
        raise RuntimeError(
            f"{kernel}, {variant}: the kernel is off by {error:.3g} (relative) on {device.name}, where at most "
            f"{TOLERANCE} is rounding; it is wrong there, so it is not timed. Please report it with the versions "
            f"{versions()}"
        )


def measure(
    kernel: str,
    variant: str,
    launch: Launch,
    device: Device,
    time: Timer = do_bench,
    compile: Callable[[Callable[[], Any]], Callable[[], Any]] = compile_anew,
) -> Row:
    """Check one launch, then time it and its rivals.

    Args:
        launch: with tensors where they are computed, as `materialise` makes them.
        device: from `measure_device`.
        time, compile: others than the defaults for tests.

    Raises:
        RuntimeError: the kernel's result is not PyTorch's.
    """
    given: Mapping[str, Any] = launch.arguments

    def run_kernel() -> None:
        if given.get("arrived") is not None:
            given["arrived"].zero_()  # part of each call, as in the op
        launch()

    def expand_and_multiply() -> Tensor:
        return _multiply(launch, expand(launch))

    dense = expand(launch)
    run_kernel()
    expected = given["x"].float() @ dense.float().T
    if "u" in given:
        expected += given["u"].float() @ given["B"].float()
    if given["bias"] is not None:
        expected += given["bias"].float()
    error = ((given["y"].float() - expected).norm() / expected.norm()).item()
    _check(kernel, variant, error, device)
    times = {
        "kernel": time(run_kernel),
        "torch": time(expand_and_multiply),
        "torch.compile": time(compile(expand_and_multiply)),
        "dense": time(lambda: _multiply(launch, dense)),
    }
    dtype = str(given["x"].dtype).removeprefix("torch.")
    least = device.least(minimum(launch), operations(launch), dtype)
    return Row(kernel, variant, least, times, error)


# --- attention in two passes -------------------------------------------------------------------------------------


def materialise_inputs(inputs: Any, device: torch.device | str, seed: int = 0) -> Any:
    """The inputs of a decode kernel or of a loss with random tensors: any codes, small steps, falling frequencies.

    Example:
        >>> from refimpl.kernels import lowrank_decode
        >>> small = lowrank_decode.meta_inputs(64, 3, 3, 64, 36, 4, torch.bfloat16)
        >>> materialise_inputs(small, "cpu").keys.dtype
        torch.uint8
    """
    generator = torch.Generator(device).manual_seed(seed)

    def fill(name: str, like: Tensor) -> Tensor:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        if name == "frequencies":
            return torch.logspace(0, -4, made.numel(), device=device)
        if name == "targets":
            return made.random_(0, inputs.logits.shape[2], generator=generator)
        if not like.is_floating_point():
            return made.random_(0, 256, generator=generator)
        made.normal_(generator=generator)
        if "factor" in name or name == "basis":
            return made.mul_(made.shape[-2] ** -0.5)
        return made.abs_().mul_(0.1) if name.endswith("step") else made

    return inputs._replace(
        **{name: fill(name, value) for name, value in inputs._asdict().items() if isinstance(value, Tensor)}
    )


def measure_attention(
    kernel: str,
    variant: str,
    inputs: Any,
    device: Device,
    time: Timer = do_bench,
    compile: Callable[[Callable[[], Any]], Callable[[], Any]] = compile_anew,
) -> Row:
    """As `measure`, for a kernel file whose operator takes ``Inputs``; its rival is attention to a full cache.

    Args:
        inputs: with tensors where they are computed, as `materialise_inputs` makes them.
    """
    module = importlib.import_module(f"refimpl.kernels.{kernel}")
    y = torch.empty_like(inputs.query)
    launches = module.plan(inputs, y)
    heads, tokens, d = launches[0].constants["H"], launches[0].arguments["n"], inputs.query.shape[-1]

    def run_kernel() -> None:
        for launch in launches:
            launch()

    def rebuild_and_attend() -> Tensor:
        made: Tensor = module.reference(inputs)
        return made

    run_kernel()
    expected = rebuild_and_attend().float()
    error = ((y.float() - expected).norm() / expected.norm()).item()
    _check(kernel, variant, error, device)
    full = [inputs.query.new_empty(inputs.query.shape[0], heads, tokens, d).normal_() for _ in range(2)]
    attend = torch.nn.functional.scaled_dot_product_attention
    times = {
        "kernel": time(run_kernel),
        "torch": time(rebuild_and_attend),
        "torch.compile": time(compile(rebuild_and_attend)),
        "dense": time(lambda: attend(inputs.query, full[0], full[1], enable_gqa=True)),
    }
    dtype = str(inputs.query.dtype).removeprefix("torch.")
    moved, needed = module.least(inputs)
    return Row(kernel, variant, device.least(moved, needed, dtype), times, error)


# --- a loss and its gradient -------------------------------------------------------------------------------------


def measure_loss(
    kernel: str,
    variant: str,
    inputs: cross_entropy.Inputs,
    device: Device,
    time: Timer = do_bench,
    compile: Callable[[Callable[[], Any]], Callable[[], Any]] = compile_anew,
) -> Row:
    """As `measure`, for the losses of sequences and their gradient in the logits, timed together.

    The roofline is that of the bytes alone: there are four operations a logit.

    Args:
        inputs: with tensors where they are computed, as `materialise_inputs` makes them.
    """
    forward, backward = cross_entropy.launches(inputs)
    logits = inputs.logits.detach().requires_grad_()

    def run_kernel() -> None:
        forward()
        backward()

    def materialise_and_differentiate() -> tuple[Tensor, Tensor]:
        losses = cross_entropy.reference(logits, inputs.targets, inputs.ignore_index)
        return losses.detach(), torch.autograd.grad(losses, logits, inputs.gradient)[0]

    run_kernel()
    given: Mapping[str, Any] = {**forward.arguments, **backward.arguments}
    counted = inputs.targets != inputs.ignore_index
    found = given["losses"].sum(1) / counted.sum(1).clamp(min=1), given["gradient"]
    error = 0.0
    for result, expected in zip(found, materialise_and_differentiate(), strict=True):
        off = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
        _check(kernel, variant, off, device)
        error = max(error, off)
    times = {
        "kernel": time(run_kernel),
        "torch": time(materialise_and_differentiate),
        "torch.compile": time(compile(materialise_and_differentiate)),
    }
    return Row(kernel, variant, 1e3 * cross_entropy.least(inputs)[0] / device.bandwidth, times, error)


# --- run ---------------------------------------------------------------------------------------------------------


def run(kernels: list[str] | None = None, out: Path | None = None, progress: bool = True) -> list[Row]:
    """Time every launch that kernel files list, on the current GPU.

    Args:
        kernels: names of kernel files; None is all.
        out: JSON file to write: versions, the device as measured, rows.
        progress: show a bar.

    Raises:
        RuntimeError: no GPU, kernels defined under ``TRITON_INTERPRET=1``, no kernel of that name, or a kernel that
            computes something else than PyTorch.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "timing kernels needs a GPU that PyTorch can use (torch.cuda.is_available() is False here: no NVIDIA or "
            "AMD GPU, no driver, or a PyTorch for CPUs). Without one, `refimpl kernels audit` reads the compiled code"
        )
    names = kernels if kernels is not None else all_kernels()
    jobs = {kernel: launches(kernel) for kernel in names}
    if any(not hasattr(launch.kernel, "device_caches") for found in jobs.values() for launch in found.values()):
        raise RuntimeError("TRITON_INTERPRET=1 is set: it would time the interpreter; unset it")
    device = measure_device("cuda")
    problems = {name: _problems(name) for name in names}
    each = [(kernel, variant) for kernel in names for variant in problems[kernel] or jobs[kernel]]
    rows = []
    for kernel, variant in tqdm(each, desc="kernels", unit="launch", disable=not progress):
        if problems[kernel]:
            inputs = materialise_inputs(problems[kernel][variant], "cuda")
            loss = isinstance(inputs, cross_entropy.Inputs)
            rows.append((measure_loss if loss else measure_attention)(kernel, variant, inputs, device))
        else:
            rows.append(measure(kernel, variant, materialise(jobs[kernel][variant], "cuda"), device))
        if out is not None:  # after each: a run of minutes may be interrupted
            write_json(out, {"versions": versions(), "device": asdict(device), "rows": [asdict(row) for row in rows]})
    return rows


def _problems(kernel: str) -> dict[str, Any]:
    """The problems that a file of attention kernels or of a loss lists in `problems`; none for others."""
    found: Any = getattr(importlib.import_module(f"refimpl.kernels.{kernel}"), "problems", dict)
    made: dict[str, Any] = found()
    return made


def load(path: Path) -> tuple[Device, list[Row]]:
    """A file of `run`."""
    value = json.loads(path.read_text())
    return Device(**value["device"]), [Row(**row) for row in value["rows"]]


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table; times in microseconds.

    Example:
        >>> row = Row("demo", "fp16 64->64", 0.010, {"kernel": 0.0125, "torch": 0.1, "torch.compile": 0.05,
        ...     "dense": 0.04}, 0.0)
        >>> print(table([row]).splitlines()[-1])
        | demo | fp16 64->64 | 12.5 | 80 % | 100.0 | 50.0 | 40.0 |
    """
    arms = ("torch", "torch.compile", "dense")
    cells = [
        [
            row.kernel,
            row.variant,
            f"{1e3 * row.times['kernel']:.1f}",
            f"{100 * row.fraction:.0f} %",
            *(f"{1e3 * row.times[arm]:.1f}" if arm in row.times else "" for arm in arms),
        ]
        for row in rows
    ]
    header = ["kernel", "launch", "kernel, us", "of the roofline", *(f"{arm}, us" for arm in arms)]
    return markdown.table(header, cells, align="llrrrrr")
