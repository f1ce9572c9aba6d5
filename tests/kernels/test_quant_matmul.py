"""Group-quantised products: interpreted kernels and the torch path against the formula."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refimpl.core.layers.packing import pack_bits, unpack_bits
from refimpl.kernels import quant_matmul as quant
from refimpl.kernels.launch import warn_once

pytest.importorskip("triton")

DTYPES = [torch.float16, torch.bfloat16]
# the last bit of the result; the interpreter cuts bfloat16 off where a GPU rounds, so twice as much there
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


def problem(
    n_in: int, n_out: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, rows: int = 1
) -> dict[str, Any]:
    """Random arguments of `quant_matmul`. Inputs have a mean, as activations do."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n_out, n_in), dtype=torch.uint8, generator=generator)
    codes[:, :2] = torch.tensor([0, 2**bits - 1])  # all bits clear, all set
    scale = (torch.rand(n_in // group, n_out, generator=generator) * 0.02 + 0.001).to(torch.bfloat16)
    zero = torch.randint(0, 2**bits, (n_in // group, n_out), dtype=torch.uint8, generator=generator)
    return {
        "x": (torch.randn(rows, n_in, generator=generator) + 0.5).to(dtype),
        "planes": quant.repack(codes, bits),
        "scale": scale,
        "zero": None if symmetric else zero,
        "bias": torch.randn(n_out, generator=generator).to(dtype),
        "bits": bits,
    }


def interpreted(arguments: dict[str, Any]) -> Tensor:
    x, planes = arguments["x"], arguments["planes"]
    y = x.new_full((x.shape[0], planes.shape[1]), float("nan"))
    quant.plan(**arguments, y=y)()
    return y


def check(y: Tensor, arguments: dict[str, Any], weights: str = "exact") -> None:
    """Within rounding of the formula, whose weights were "rounded" or "cut" to the dtype of x first, or were not."""
    x, bias = arguments["x"], arguments["bias"]
    weight = quant.dequantise(*(arguments[name] for name in ("planes", "scale", "zero", "bits")))
    if weights == "cut" and x.dtype == torch.bfloat16:
        weight = (weight.view(torch.int32) & -65536).view(torch.float32)
    elif weights != "exact":
        weight = weight.to(x.dtype).float()
    exact = x.float() @ weight + (0.0 if bias is None else bias.float())
    # of the sum in fp32: relative to its terms, not to what is left of them
    noise = 2.0**-18 * (x.float().square() @ weight.square()).sqrt()
    assert y.shape == exact.shape and y.dtype == x.dtype
    over = (y.float() - exact).abs() / (EPSILON[y.dtype] * exact.abs() + noise + 1e-6)
    assert over.max() <= 1, over.max()


# ---- layout


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(quant.BITS), st.integers(1, 5), st.integers(1, 20), st.integers(0, 99))
def test_codes_survive_repacking(bits: int, chunks: int, n_out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n_out, 32 * chunks), dtype=torch.uint8, generator=generator)
    planes = quant.repack(codes, bits)
    assert planes.dtype == torch.int32 and planes.shape == (chunks * bits, n_out)
    assert planes.nbytes == pack_bits(codes, bits).nbytes  # no byte more than the stored format
    assert torch.equal(quant.unpack(planes, bits), codes)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 32 * chunks), quant.unpack(planes, bits))


def test_a_word_holds_consecutive_inputs_and_three_bits_are_two_planes() -> None:
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 33] = 5  # 0b101: 1 in the plane of two bits, 1 in the plane of one
    assert quant.repack(codes, 3)[:, 0].tolist() == [0, 0, 1 << 2, 0, 0, 1 << 1]


def test_what_has_no_layout_is_refused() -> None:
    codes = torch.zeros(2, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="48 inputs: the layout needs a multiple of 32"):
        quant.repack(codes, 4)
    with pytest.raises(ValueError, match="bits=5: the layout has 2, 3, 4, 8 bits"):
        quant.repack(codes, 5)


# ---- kernels


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 192, 288])
@pytest.mark.parametrize("bits", quant.BITS)
def test_one_row(bits: int, group: int, symmetric: bool) -> None:
    for dtype in DTYPES if group == 64 else [torch.float16]:
        arguments = problem(2 * group, 17, bits, group, symmetric, dtype)
        check(interpreted(arguments), arguments)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("bits", quant.BITS)
def test_one_scale_for_each_output(bits: int, rows: int, symmetric: bool) -> None:
    arguments = problem(96, 17, bits, 96, symmetric, torch.bfloat16, rows)
    check(interpreted(arguments), arguments, "cut" if rows > 1 else "exact")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 96, 192])
@pytest.mark.parametrize("bits", quant.BITS)
def test_many_rows(bits: int, group: int, symmetric: bool) -> None:
    for dtype in DTYPES:
        arguments = problem(192, 70, bits, group, symmetric, dtype, rows=19)
        check(interpreted(arguments), arguments, "cut")


@pytest.mark.parametrize("rows", [2, 3, quant.MATVEC_ROWS, quant.MATVEC_ROWS + 1, 65, 130])
def test_every_number_of_rows(rows: int) -> None:
    arguments = problem(64, 40, 4, 32, False, torch.float16, rows)
    check(interpreted(arguments), arguments, "cut" if rows > quant.MATVEC_ROWS else "exact")
    arguments["bias"] = None
    check(interpreted(arguments), arguments, "cut" if rows > quant.MATVEC_ROWS else "exact")


@pytest.mark.parametrize("n_in, n_out", [(32, 1), (64, 129), (96, 520), (576, 192)])
def test_odd_sizes(n_in: int, n_out: int) -> None:
    arguments = problem(n_in, n_out, 3, 32, False, torch.float16)
    check(interpreted(arguments), arguments)


@pytest.mark.parametrize("rows", [1, 16])
def test_shape_of_smollm2(rows: int) -> None:
    arguments = problem(1536, 576, 4, 64, True, torch.bfloat16, rows)
    check(interpreted(arguments), arguments, "cut" if rows > 1 else "exact")


@pytest.mark.parametrize("rows", [1, 5])
def test_one_block_of_a_large_matrix_is_summed_by_several_programs(rows: int) -> None:
    arguments = problem(4096, 128, 4, 64, False, torch.float16, rows)
    assert quant.plan(**arguments, y=torch.empty(rows, 128)).constants["SPLIT"] > 1
    y = interpreted(arguments)
    check(y, arguments, "cut" if rows > 1 else "exact")
    assert torch.equal(y, interpreted(arguments))


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_small_and_large_inputs(magnitude: float) -> None:
    """The matrix-vector kernel scales x by powers of two between 2^58 and 2^82."""
    arguments = {**problem(64, 32, 3, 32, False, torch.bfloat16), "bias": None}
    arguments["x"] = arguments["x"] * magnitude
    y = interpreted(arguments)
    exact = quant.reference(**{**arguments, "x": arguments["x"].float()})
    assert torch.isfinite(y).all() and torch.allclose(y.float(), exact, rtol=2.0**-7, atol=1e-3 * magnitude)


def test_programs_stay_within_the_traffic_allowed() -> None:
    for n_in, n_out in ((4096, 4096), (4096, 14336), (14336, 4096), (576, 1536), (1536, 576)):
        for bits in quant.BITS:
            least = quant.cost(1, n_in, n_out, bits, 64)[0]
            block, split, _ = quant.matvec_shape(1, n_in, n_out, bits, 64, least)
            extra = (-(-n_out // block) - 1) * n_in * 2 + (split > 1) * 8 * split * n_out
            assert extra <= 0.05 * least, (n_in, n_out, bits, block, split)


def test_variants_cover_both_kernels_every_width_and_both_dtypes() -> None:
    launches = list(quant.variants().values())
    kernels = {id(launch.kernel) for launch in launches}
    assert len(kernels) == 2
    for kernel in kernels:
        mine = [launch for launch in launches if id(launch.kernel) == kernel]
        assert {launch.constants["BITS"] for launch in mine} == set(quant.BITS)
        assert {launch.arguments["x"].dtype for launch in mine} == set(DTYPES)


# ---- torch path and operator


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bits", quant.BITS)
def test_torch_path(bits: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "_SLAB", 2 * 32 * 24)  # several slabs, the last one smaller
    arguments = problem(160, 24, bits, 32, False, dtype, rows)
    y = quant.quant_matmul(arguments["x"].view(1, rows, 160), *list(arguments.values())[1:])
    check(y[0], arguments, "rounded" if rows > 16 else "exact")


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    arguments = problem(64, 24, 4, 32, True, torch.float32)
    x = torch.randn(shape)
    y = quant.quant_matmul(x, *list(arguments.values())[1:])
    assert y.shape == (*shape[:-1], 24)
    exact = quant.reference(**{**arguments, "x": x.reshape(-1, 64)})
    assert torch.allclose(y.reshape(-1, 24), exact, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_operator_keeps_its_promises(symmetric: bool) -> None:
    """Schema, shapes on "meta", and the gradient registration, by torch's own checks."""
    arguments = problem(64, 24, 4, 32, symmetric, torch.float32, rows=3)
    arguments["x"].requires_grad_()
    torch.library.opcheck(quant.quant_matmul, tuple(arguments.values()))


def test_gradient_in_x() -> None:
    arguments = problem(64, 24, 3, 32, False, torch.float32, rows=3)
    x = arguments["x"].requires_grad_()
    quant.quant_matmul(*arguments.values()).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    quant.reference(**{**arguments, "x": again}).square().sum().backward()
    assert torch.allclose(x.grad, again.grad, rtol=1e-4, atol=1e-5)


def test_reasons_not_to_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = torch.bfloat16
    assert quant.unsupported(4, 64, 17, 32, bf16) is None
    assert "float32" in str(quant.unsupported(4, 64, 17, 32, torch.float32))
    assert "5 bits" in str(quant.unsupported(5, 64, 17, 32, bf16))
    assert "groups of 16" in str(quant.unsupported(4, 64, 17, 16, bf16))
    assert "32-bit" in str(quant.unsupported(8, 2**17, 2**17, 32, bf16))
    assert "7.5" in str(quant.unsupported(4, 64, 17, 32, bf16, rows=9, capability=(7, 5)))
    assert quant.unsupported(4, 64, 17, 32, bf16, rows=1, capability=(7, 5)) is None
    monkeypatch.setattr(quant, "triton", None)
    assert "pip install" in str(quant.unsupported(4, 64, 17, 32, bf16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cuda_implementation_launches_or_warns_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs for CUDA tensors, with CPU tensors in the interpreter."""
    monkeypatch.setattr(quant, "capability", lambda x: (9, 0))
    launched = []
    monkeypatch.setattr(quant, "plan", lambda *a, plan=quant.plan: launched.append(a) or plan(*a))
    warn_once.cache_clear()
    arguments = problem(64, 24, 4, 32, False, dtype, rows=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = quant._cuda(arguments["x"].view(2, 1, 64), *list(arguments.values())[1:])
    check(y.view(2, 24), arguments)
    expected = [] if dtype == torch.float16 else ["quant_matmul: x is float32, not float16 or bfloat16"]
    assert [str(warning.message).partition(";")[0] for warning in caught] == expected
    assert len(launched) == (2 if dtype == torch.float16 else 0)
    assert quant._cuda(arguments["x"][:0], *list(arguments.values())[1:]).shape == (0, 24)


def test_subnormal_numbers_are_not_flushed() -> None:
    """The matrix-vector kernel multiplies subnormal numbers; a compiler that flushes them makes every weight zero."""
    code = (
        "from refimpl.kernels import audit\n"
        "launch = audit.launches('quant_matmul')['bf16 576->192, 4 bits, g64, symmetric']\n"
        "ptx, amd = audit._compile(launch, 'sm_90').asm['ptx'], audit._compile(launch, 'gfx942').asm['amdgcn']\n"
        "assert 'fma.rn.f32' in ptx and 'ftz' not in ptx\n"
        "assert '.amdhsa_float_denorm_mode_32 3' in amd\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
