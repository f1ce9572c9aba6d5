"""The benchmark, as far as it goes without a GPU: tensors, arithmetic, the check before the timing, the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refimpl.kernels import (
    audit,
    bench,
    cross_entropy,
    lowrank_decode,
    quant_lowrank_matmul,
    ragged_decode,
    sparse_matvec,
)
from refimpl.kernels.launch import Launch

pytest.importorskip("triton")

DEVICE = bench.Device("a calculator", 1e9, {"float16": 1e12, "bfloat16": 1e9})


class Clock:
    """A timer that runs each function once and says 1, 2, 3 ... milliseconds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Callable[[], Any]) -> float:
        function()
        self.calls += 1
        return float(self.calls)


def launch(kernel: str = "sparse_matvec", name: str = "fp16 576->192") -> Launch:
    return bench.materialise(audit.launches(kernel)[name], "cpu")


def test_no_gpu_is_said_with_the_alternative() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="needs a GPU that PyTorch can use.*refimpl kernels audit"):
        bench.run(["sparse_matvec"])


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        bench.run(["sparse_matvec"])


def test_random_positions_are_two_of_four_in_order() -> None:
    given = launch().arguments
    positions = given["positions"]
    assert isinstance(positions, Tensor) and isinstance(given["values"], Tensor)
    shifts = torch.arange(0, 32, 2, dtype=torch.int32)[:, None, None]
    first, second = ((positions >> shifts) & 3).unflatten(0, (8, 2)).unbind(1)
    assert (first < second).all() and len(set((4 * first + second).flatten().tolist())) == 6
    again = launch().arguments["values"]
    assert isinstance(again, Tensor) and torch.equal(given["values"], again)


def test_codes_and_counters_are_legal() -> None:
    name = "bf16 576->1536, 3 bits, g96, asymmetric"
    made = launch("quant_matmul", name)
    zero, arrived = made.arguments["zero"], made.arguments["arrived"]
    assert isinstance(zero, Tensor) and set(zero.unique().tolist()) == set(range(8))
    assert arrived is None or (isinstance(arrived, Tensor) and not arrived.any())
    assert made.grid == audit.launches("quant_matmul")[name].grid


def test_operations_are_those_of_the_cost() -> None:
    assert bench.operations(launch()) == sparse_matvec.cost(1, 576, 192)[1]
    name = "bf16 576->192, 4 bits, g64, symmetric, rank 64"
    expected = quant_lowrank_matmul.cost(1, 576, 192, 64, 4, 64)[1]
    assert bench.operations(launch("quant_lowrank_matmul", name)) == expected


@pytest.mark.parametrize(
    ("moved", "operations", "least"), [(2_000_000, 1, 2.0), (1, 3_000_000, 3.0), (5_000_000, 4_000_000, 5.0)]
)
def test_roofline_is_the_slower_of_the_two(moved: int, operations: int, least: float) -> None:
    assert DEVICE.least(moved, operations, "bfloat16") == pytest.approx(least)


def test_device_is_measured() -> None:
    device = bench.measure_device("cpu", lambda function: 4.0, size=1000, width=20)
    assert device.bandwidth == pytest.approx(2 * 1000 / 4e-3)  # read and written
    assert device.flops == pytest.approx({"float16": 2 * 20**3 / 4e-3, "bfloat16": 2 * 20**3 / 4e-3})


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("sparse_matvec", "fp16 576->192"),
        ("quant_matmul", "bf16 576->192, 4 bits, g64, symmetric"),
        ("quant_lowrank_matmul", "bf16 576->192, 4 bits, g64, symmetric, rank 64"),
    ],
)
def test_launch_is_checked_then_timed(kernel: str, name: str) -> None:
    compiled: list[Any] = []
    made = launch(kernel, name)
    row = bench.measure(kernel, name, made, DEVICE, Clock(), lambda f: compiled.append(f) or f)
    assert row.times == {"kernel": 1.0, "torch": 2.0, "torch.compile": 3.0, "dense": 4.0}
    assert len(compiled) == 1 and row.error < 0.01
    limits = (bench.minimum(made) / 1e6, bench.operations(made) / (1e9 if name.startswith("fp16") else 1e6))
    assert row.least == pytest.approx(max(limits))
    assert row.fraction == row.least / 1.0


def test_kernel_runs_whole_each_time() -> None:
    """The counters of programs that share a sum start at zero again, or the second run would write nothing."""
    made = launch()
    y = made.arguments["y"]
    assert isinstance(y, Tensor) and made.constants["SPLIT"] > 1

    def clock(function: Callable[[], Any]) -> float:
        y.fill_(float("nan"))
        function()
        finite.append(bool(torch.isfinite(y).all()))
        return 1.0

    finite: list[bool] = []
    bench.measure("sparse_matvec", "fp16 576->192", made, DEVICE, clock, lambda f: f)
    assert finite[0]


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_wrong_kernel_is_not_timed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expand, clock = bench.expand, Clock()
    monkeypatch.setattr(bench, "expand", lambda launch: expand(launch) * factor)
    with pytest.raises(RuntimeError, match="sparse_matvec, fp16 576->192: the kernel is off by .* on a calculator"):
        bench.measure("sparse_matvec", "fp16 576->192", launch(), DEVICE, clock, lambda f: f)
    assert not clock.calls


@pytest.mark.parametrize("bits", [16, 4])
def test_attention_is_checked_then_timed(bits: int) -> None:
    compiled: list[Any] = []
    inputs = bench.materialise_inputs(lowrank_decode.meta_inputs(64, 2, 2, 32, 20, bits, torch.float16), "cpu")
    row = bench.measure_attention("lowrank_decode", "v", inputs, DEVICE, Clock(), lambda f: compiled.append(f) or f)
    assert row.times == {"kernel": 1.0, "torch": 2.0, "torch.compile": 3.0, "dense": 4.0}
    assert len(compiled) == 1 and row.error < 0.01
    moved, operations = lowrank_decode.least(inputs)
    assert row.least == pytest.approx(max(moved / 1e6, operations / 1e9))


def test_packed_heads_are_checked_then_timed() -> None:
    inputs = bench.materialise_inputs(ragged_decode.meta_inputs(64, 2, 2, 32, (16, 5), torch.float16), "cpu")
    row = bench.measure_attention("ragged_decode", "v", inputs, DEVICE, Clock(), lambda f: f)
    assert row.error < 0.01 and row.least == pytest.approx(ragged_decode.least(inputs)[0] / 1e6)


def loss_inputs() -> cross_entropy.Inputs:
    logits = torch.empty(2, 3, 203, dtype=torch.float16, device="meta")[:, :-1]
    targets = torch.empty(2, 2, dtype=torch.int64, device="meta")
    inputs = cross_entropy.Inputs(logits, targets, torch.empty(2, device="meta"))
    made: cross_entropy.Inputs = bench.materialise_inputs(inputs, "cpu")
    assert made.logits.stride() == (609, 203, 1) and 0 <= made.targets.min() <= made.targets.max() < 203
    return made


def test_loss_is_checked_then_timed() -> None:
    inputs = loss_inputs()
    row = bench.measure_loss("cross_entropy", "v", inputs, DEVICE, Clock(), lambda f: f)
    assert row.times == {"kernel": 1.0, "torch": 2.0, "torch.compile": 3.0} and row.error < 0.01
    assert row.least == pytest.approx(cross_entropy.least(inputs)[0] / 1e6)
    assert bench.table([row]).splitlines()[-1].endswith("| 2000.0 | 3000.0 |  |")


def test_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, clock = cross_entropy.reference, Clock()
    monkeypatch.setattr(cross_entropy, "reference", lambda *given: 1.05 * reference(*given))
    with pytest.raises(RuntimeError, match="cross_entropy, v: the kernel is off by"):
        bench.measure_loss("cross_entropy", "v", loss_inputs(), DEVICE, clock, lambda f: f)
    assert not clock.calls


def test_wrong_attention_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.materialise_inputs(ragged_decode.meta_inputs(64, 2, 2, 32, (16, 5), torch.float16), "cpu")
    reference, clock = ragged_decode.reference, Clock()
    monkeypatch.setattr(ragged_decode, "reference", lambda inputs: 1.05 * reference(inputs))
    with pytest.raises(RuntimeError, match="ragged_decode, v: the kernel is off by"):
        bench.measure_attention("ragged_decode", "v", inputs, DEVICE, clock, lambda f: f)
    assert not clock.calls


def test_run_writes_after_each_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        device_caches: dict[str, Any] = {}

    fake = {name: Launch(Kernel(), (1,), {}) for name in ("a", "b", "c")}
    out, seen = tmp_path / "deep" / "bench.json", []

    def measure(kernel: str, variant: str, launch: Launch, device: bench.Device) -> bench.Row:
        seen.append(len(bench.load(out)[1]) if out.exists() else 0)
        if variant == "c":
            raise KeyboardInterrupt
        return bench.Row(kernel, variant, 0.5, dict.fromkeys(("kernel", "torch", "torch.compile", "dense"), 2.0), 0.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "launches", lambda kernel: fake)
    monkeypatch.setattr(bench, "materialise", lambda launch, device: launch)
    monkeypatch.setattr(bench, "measure_device", lambda device: DEVICE)
    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench.run(["sparse_matvec"], out, progress=False)
    device, rows = bench.load(out)
    assert seen == [0, 1, 2] and device == DEVICE and [row.variant for row in rows] == ["a", "b"]
    assert rows[0].fraction == 0.25 and set(json.loads(out.read_text())["versions"]) == {"triton", "torch"}
    assert "| sparse_matvec | a | 2000.0 | 25 % |" in bench.table(rows)
