"""Quantised products with a low-rank path: interpreted kernels and the torch path against the formula."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from refimpl.kernels import quant_lowrank_matmul as lowrank
from refimpl.kernels import quant_matmul as quant
from refimpl.kernels.launch import warn_once

pytest.importorskip("triton")

DTYPES = [torch.float16, torch.bfloat16]
# the last bit of the result; the interpreter cuts bfloat16 off where a GPU rounds, so twice as much there
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


def problem(
    n_in: int, n_out: int, rank: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, rows: int = 1
) -> dict[str, Any]:
    """Random arguments of `quant_lowrank_matmul`; the path is as large as the quantised part."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n_out, n_in), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, (n_in // group, n_out), dtype=torch.uint8, generator=generator)
    return {
        "x": (torch.randn(rows, n_in, generator=generator) + 0.5).to(dtype),
        "u": torch.randn(rows, rank, generator=generator).to(dtype),
        "planes": quant.repack(codes, bits),
        "scale": (torch.rand(n_in // group, n_out, generator=generator) * 0.02 + 0.001).to(torch.bfloat16),
        "zero": None if symmetric else zero,
        "B": torch.randn(rank, n_out, generator=generator).to(dtype),
        "bias": torch.randn(n_out, generator=generator).to(dtype),
        "bits": bits,
    }


def interpreted(arguments: dict[str, Any]) -> Tensor:
    x, B = arguments["x"], arguments["B"]
    y = x.new_full((x.shape[0], B.shape[1]), float("nan"))
    lowrank.plan(**arguments, y=y)()
    return y


def check(y: Tensor, arguments: dict[str, Any], weights: str = "exact") -> None:
    """Within rounding of the formula, whose weights were "rounded" or "cut" to the dtype of x first, or were not."""
    x, bias = arguments["x"], arguments["bias"]
    weight = quant.dequantise(*(arguments[name] for name in ("planes", "scale", "zero", "bits")))
    if weights == "cut" and x.dtype == torch.bfloat16:
        weight = (weight.view(torch.int32) & -65536).view(torch.float32)
    elif weights != "exact":
        weight = weight.to(x.dtype).float()
    path = arguments["u"].float() @ arguments["B"].float()
    exact = x.float() @ weight + path + (0.0 if bias is None else bias.float())
    noise = 2.0**-18 * (x.float().square() @ weight.square()).sqrt()
    assert y.shape == exact.shape and y.dtype == x.dtype
    over = (y.float() - exact).abs() / (EPSILON[y.dtype] * exact.abs() + noise + 1e-5)
    assert over.max() <= 1, over.max()


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("rank", [1, 7, 16, 33, 64])
def test_every_rank(rank: int, rows: int) -> None:
    for dtype in DTYPES:
        arguments = problem(64, 41, rank, 4, 32, False, dtype, rows)
        check(interpreted(arguments), arguments, "cut" if rows > quant.MATVEC_ROWS else "exact")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96, 192])  # 192: one scale for each output
@pytest.mark.parametrize("bits", quant.BITS)
def test_every_format(bits: int, group: int, symmetric: bool) -> None:
    for rows in (1, 17):
        arguments = problem(192, 20, 8, bits, group, symmetric, torch.float16, rows)
        check(interpreted(arguments), arguments, "cut" if rows > 1 else "exact")


def test_without_a_bias() -> None:
    arguments = {**problem(64, 41, 8, 4, 32, True, torch.float16), "bias": None}
    check(interpreted(arguments), arguments)


@pytest.mark.parametrize("rows", [1, 5])
def test_programs_that_share_a_sum_add_the_path_once(rows: int) -> None:
    """The rank is split among them as the inputs are; some programs get none of it."""
    for rank in (8, 96):
        arguments = problem(4096, 128, rank, 4, 64, False, torch.float16, rows)
        assert lowrank.plan(**arguments, y=torch.empty(rows, 128)).constants["SPLIT"] > 1
        check(interpreted(arguments), arguments, "cut" if rows > 1 else "exact")


def test_shape_of_smollm2() -> None:
    arguments = problem(576, 1536, 64, 3, 64, False, torch.bfloat16)
    check(interpreted(arguments), arguments)


def test_a_path_of_zeros_changes_nothing() -> None:
    arguments = problem(128, 24, 8, 4, 32, False, torch.float16)
    arguments["B"].zero_()
    y = torch.empty(1, 24, dtype=torch.float16)
    quant.plan(**{k: v for k, v in arguments.items() if k not in ("u", "B")}, y=y)()
    assert torch.equal(interpreted(arguments), y)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_torch_path(rows: int, dtype: torch.dtype) -> None:
    arguments = problem(64, 24, 8, 4, 32, False, dtype, rows)
    x, u, *rest = arguments.values()
    y = lowrank.quant_lowrank_matmul(x.view(rows, 1, 64), u.view(rows, 1, 8), *rest)
    assert y.shape == (rows, 1, 24) and y.dtype == dtype
    exact = lowrank.reference(**{**arguments, "x": x.float(), "u": u.float()})
    # two roundings: of the product and of the sum
    assert torch.allclose(y.view(rows, 24).float(), exact, rtol=0, atol=max(1e-4, 60 * torch.finfo(dtype).eps))


def test_operator_keeps_its_promises_and_gradients() -> None:
    arguments = problem(64, 24, 5, 4, 32, False, torch.float32, rows=3)
    x, u = arguments["x"].requires_grad_(), arguments["u"].requires_grad_()
    torch.library.opcheck(lowrank.quant_lowrank_matmul, tuple(arguments.values()))
    lowrank.quant_lowrank_matmul(*arguments.values()).square().sum().backward()
    ours = x.grad.clone(), u.grad.clone()
    x.grad = u.grad = None
    lowrank.reference(**arguments).square().sum().backward()
    for mine, theirs in zip(ours, (x.grad, u.grad), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_cuda_implementation_launches_or_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs for CUDA tensors, with CPU tensors in the interpreter."""
    monkeypatch.setattr(quant, "capability", lambda x: (7, 5))
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (1, 6, 6):
            arguments = problem(64, 24, 5, 4, 32, False, torch.float16, rows)
            x, u, *rest = arguments.values()
            y = lowrank._cuda(x.view(rows, 1, 64), u.view(rows, 1, 5), *rest)
            assert torch.allclose(y.view(rows, 24), lowrank.reference(**arguments), rtol=2e-2, atol=2e-2)
    assert [str(w.message).partition(";")[0] for w in caught] == [
        "quant_lowrank_matmul: triton has no tensor-core products for compute capability 7.5"
    ]
    assert "B is float32" in str(lowrank.unsupported(4, 64, 24, 32, torch.float16, torch.float32))
    assert "float32" in str(lowrank.unsupported(4, 64, 24, 32, torch.float32, torch.float32))
