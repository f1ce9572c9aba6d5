"""2:4-sparse products: the layout, the interpreted kernel and the torch path against the formula."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refimpl.core.layers import PackedLinear
from refimpl.kernels import sparse_matvec as sparse
from refimpl.kernels.launch import warn_once
from refimpl.kernels.traffic import minimum

pytest.importorskip("triton")

# the last bit of the result; the interpreter cuts bfloat16 off where a GPU rounds
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


def matrix(n_in: int, n_out: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [out, in] and a 2:4 mask; some kept weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(n_out, n_in // 4, 4, generator=generator).topk(2).indices
    mask = torch.zeros(n_out, n_in // 4, 4, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)
    dense = torch.randn(n_out, n_in, generator=generator)
    return torch.where(dense.abs() < 0.05, 0.0, dense).to(dtype), mask


def problem(
    rows: int, n_in: int, n_out: int, dtype: torch.dtype, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, n_in, generator=generator).to(dtype)
    values, positions = sparse.repack(*matrix(n_in, n_out, dtype))
    return x, values, positions, torch.randn(n_out, generator=generator).to(dtype) if bias else None


def interpreted(arguments: tuple[Tensor, Tensor, Tensor, Tensor | None], split: int | None = None) -> Tensor:
    x, values = arguments[:2]
    y = torch.full((x.shape[0], values.shape[1]), float("nan"), dtype=x.dtype)
    launch = sparse.plan(*arguments, y)
    assert split is None or launch.constants["SPLIT"] == split
    launch()
    return y


def check(y: Tensor, arguments: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    """Within rounding of the formula in fp64."""
    x, values, positions, bias = arguments
    dense = sparse.unpack(values, positions).double()
    exact = x.double() @ dense.T + (0.0 if bias is None else bias.double())
    noise = 2.0**-20 * (x.double().square() @ dense.T.square()).sqrt()
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= EPSILON[y.dtype] * exact.abs() + noise + 1e-6).all()


# ---- layout


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_weights_survive_repacking(chunks: int, n_out: int, seed: int) -> None:
    dense, mask = matrix(32 * chunks, n_out, torch.float32, seed)
    values, positions = sparse.repack(dense, mask)
    assert values.shape == (16 * chunks, n_out) and positions.shape == (chunks, n_out)
    assert values.is_contiguous() and positions.is_contiguous() and positions.dtype == torch.int32
    assert torch.equal(sparse.unpack(values, positions), torch.where(mask, dense, 0.0))


def test_layout_holds_what_the_packed_layer_holds() -> None:
    dense, mask = matrix(64, 10, torch.float32)
    layer = PackedLinear(values=dense * mask, mask=mask, pattern="2:4")
    values, positions = sparse.repack(layer.to_dense(), mask)
    assert torch.equal(sparse.unpack(values, positions), layer.to_dense())
    assert values.nbytes + positions.nbytes == sum(layer.parts().values())  # not a byte more


def test_positions_are_two_bits_in_order() -> None:
    mask = torch.tensor([[True, True, False, False] + [False, False, True, True] * 7])
    assert sparse.repack(torch.ones(1, 32), mask)[1].item() == int("eeeeeee4", 16) - 2**32


def test_repack_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="48 inputs: the layout needs a multiple of 32"):
        sparse.repack(torch.ones(1, 48), torch.ones(1, 48, dtype=torch.bool))
    with pytest.raises(ValueError, match="do not keep exactly two"):
        sparse.repack(torch.ones(1, 32), torch.ones(1, 32, dtype=torch.bool))


# ---- kernel


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [*((rows, torch.float16) for rows in range(1, sparse.MAX_ROWS + 1)), (1, torch.bfloat16), (5, torch.bfloat16)],
)
def test_kernel_equals_the_formula(rows: int, dtype: torch.dtype) -> None:
    """288 inputs are nine chunks (a run and one more), 130 outputs a block and two more."""
    arguments = problem(rows, 288, 130, dtype, bias=rows % 2 == 0)
    check(interpreted(arguments), arguments)


@pytest.mark.parametrize(
    ("n_in", "n_out", "split"),
    [
        (32, 1, 1),
        (64, 77, 1),
        (576, 192, 2),  # SmolLM2, keys
        (1536, 130, 4),
        (4096, 256, 16),  # two blocks of a Llama-8B projection
    ],
)
def test_kernel_with_shared_sums(n_in: int, n_out: int, split: int) -> None:
    arguments = problem(1, n_in, n_out, torch.bfloat16 if n_in == 576 else torch.float16, bias=True)
    check(interpreted(arguments, split), arguments)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_pair_of_positions_picks_its_inputs(rows: int) -> None:
    """Outputs 0 to 5 keep the six pairs; inputs are powers of two, so that a sum names its summands."""
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    mask = torch.zeros(6, 4, dtype=torch.bool)
    for output, pair in enumerate(pairs):
        mask[output, list(pair)] = True
    weight = torch.tensor([1.0, 4.0, 16.0, 64.0]).repeat(6, 8)
    x = torch.zeros(rows, 32)
    for row in range(rows):
        group = 3 * row + 1
        x[row, 4 * group : 4 * group + 4] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    values, positions = sparse.repack(weight, mask.repeat(1, 8))
    y = interpreted((x.half(), values.half(), positions, None))
    each = [1.0, 8.0, 64.0, 512.0]
    assert y.tolist() == [[each[a] + each[b] for a, b in pairs]] * rows


def test_result_does_not_depend_on_who_arrives_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    arguments = problem(2, 1536, 130, torch.float16)
    forward = interpreted(arguments, 4)
    original = InterpreterBuilder.set_grid_idx
    order = [2, 0, 3, 1]
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: original(self, x, order[y], z))
    assert torch.equal(interpreted(arguments, 4), forward)


# ---- op


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_op_on_a_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, values, positions, bias = problem(1, 64, 20, dtype, bias=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = sparse.sparse_matvec(x, values, positions, bias)
    assert y.shape == (*shape[:-1], 20)
    check(y.reshape(-1, 20), (x.reshape(-1, 64), values, positions, bias))


def test_reference_is_the_formula() -> None:
    arguments = problem(3, 64, 20, torch.float32, bias=True)
    check(sparse.reference(*arguments), arguments)


def test_gradient_is_that_of_the_dense_layer() -> None:
    x, values, positions, bias = problem(3, 64, 20, torch.float32, bias=True)
    x.requires_grad_()
    upstream = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(sparse.sparse_matvec(x, values, positions, bias), x, upstream)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.linear(x, sparse.unpack(values, positions), bias), x, upstream
    )
    torch.testing.assert_close(found, expected)


def test_op_obeys_the_rules_of_torch() -> None:
    x, values, positions, bias = problem(2, 64, 20, torch.float32, bias=True)
    torch.library.opcheck(
        sparse.sparse_matvec,
        (x.requires_grad_(), values, positions, bias),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_fake_cuda_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 1, 576, dtype=torch.bfloat16, device="cuda")
        values = torch.empty(288, 1536, dtype=torch.bfloat16, device="cuda")
        positions = torch.empty(18, 1536, dtype=torch.int32, device="cuda")
        y = sparse.sparse_matvec(x, values, positions)
    assert y.shape == (2, 1, 1536) and y.device.type == "cuda" and y.dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "launched"), [(1, True), (8, True), (9, False), (0, False)])
def test_cuda_path_takes_the_kernel_for_few_rows(rows: int, launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    plan = sparse.plan
    monkeypatch.setattr(sparse, "plan", lambda *arguments: calls.append(1) or plan(*arguments))
    _, values, positions, bias = problem(1, 64, 20, torch.float16, bias=True)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2)).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # many rows are no reason to complain
        y = sparse._cuda(x, values, positions, bias)
    assert bool(calls) == launched
    check(y, (x, values, positions, bias))


def test_strided_rows_are_read_as_they_are() -> None:
    _, values, positions, _ = problem(1, 64, 20, torch.float16)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(2)).half().T
    check(sparse._cuda(x, values, positions), (x, values, positions, None))


def test_other_dtypes_are_computed_with_one_warning() -> None:
    warn_once.cache_clear()
    arguments = problem(1, 64, 20, torch.float32)
    with pytest.warns(UserWarning, match="sparse_matvec: activations are torch.float32") as caught:
        check(sparse._cuda(*arguments), arguments)
        sparse._cuda(*arguments)
    assert len(caught) == 1
    x, values, positions, _ = problem(1, 64, 20, torch.float16)
    assert "float16 and activations torch.bfloat16" in str(sparse.unsupported(x.bfloat16(), values, positions))
    assert sparse.unsupported(x, values, positions) is None
    large = torch.empty(2**16, 2**15, dtype=torch.float16, device="meta")
    assert "counts to 2**31" in str(sparse.unsupported(x, large, positions))


# ---- plan


def test_cost_is_every_argument_once() -> None:
    for name, launch in sparse.variants().items():
        x, y = launch.arguments["x"], launch.arguments["y"]
        assert isinstance(x, Tensor) and isinstance(y, Tensor)
        assert minimum(launch) == sparse.cost(*x.shape, y.shape[1])[0], name


@pytest.mark.parametrize(("n_in", "n_out"), sparse.SHAPES)
def test_parts_leave_no_program_without_work(n_in: int, n_out: int) -> None:
    launch = sparse._meta(1, n_in, n_out, torch.bfloat16)
    assert launch.grid[1] * launch.constants["CHUNKS"] * 32 < n_in + launch.constants["CHUNKS"] * 32
    partials = launch.arguments["partials"]
    assert partials is None or launch.constants["SPLIT"] > 1
