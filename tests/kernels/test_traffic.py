"""Counted bytes: against arithmetic, reduced counts against whole ones, and the committed figures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refimpl.core.files.io import data_path
from refimpl.kernels import audit, cross_entropy, quant_matmul, ragged_decode, sparse_matvec, traffic
from refimpl.kernels.launch import Launch

pytest.importorskip("triton")

COMMITTED = data_path("kernels", "traffic.json")


def sparse_launch(n_in: int, n_out: int, rows: int = 1) -> Launch:
    return sparse_matvec._meta(rows, n_in, n_out, torch.float16)


def quant_launch(rows: int, n_in: int, n_out: int) -> Launch:
    return quant_matmul.plan(*quant_matmul.variant_tensors(rows, n_in, n_out, 3, 32, False, torch.float16))


def decode_launch(tokens: int) -> Launch:
    inputs = ragged_decode.meta_inputs(tokens, 2, 3, 32, (16, 5), torch.float16)
    return ragged_decode.plan(inputs, torch.empty_like(inputs.query))[0]


def loss_launches() -> tuple[Launch, Launch]:
    """Rows of an odd length, of a slice that leaves the last of each sequence out."""
    logits = torch.empty(3, 4, 1003, dtype=torch.float16, device="meta")[:, :-1]
    targets = torch.empty(3, 3, dtype=torch.int64, device="meta")
    return cross_entropy.launches(cross_entropy.Inputs(logits, targets, torch.empty(3, device="meta")))


def test_count_is_the_arithmetic() -> None:
    """Two blocks of outputs, the second of 72, eight parts of nine runs: x twice, weights once, sums once each way."""
    n_in, n_out = 2080, 200
    launch = sparse_launch(n_in, n_out)
    blocks, split = launch.grid
    assert (blocks, split) == (2, 8) and n_in // 32 % 8  # the last run is short
    counted = traffic.count(launch)
    shared = split * n_out * 4
    assert counted.loads == {
        "x": blocks * n_in * 2,
        "values": n_in // 2 * n_out * 2,
        "positions": n_in // 32 * n_out * 4,
        "partials": shared,
        "arrived": blocks * split * 4,
    }
    assert counted.stores == {"partials": shared, "y": n_out * 2, "arrived": blocks * split * 4}
    assert counted.minimum == n_in * (n_out + 2) + n_in // 8 * n_out + n_out * 2
    assert counted.ratio == counted.total / counted.minimum > 1


@pytest.mark.parametrize(
    "launch",
    [
        sparse_launch(1536, 450),
        sparse_launch(96, 300, rows=2),
        quant_launch(1, 640, 450),
        quant_launch(2, 96, 300),
        quant_launch(37, 64, 150),
        decode_launch(700),  # three programs with tokens
        decode_launch(1500),  # six, the last one with fewer
        *loss_launches(),
    ],
)
def test_reduced_count_is_the_whole_one(launch: Launch) -> None:
    whole, reduced = traffic.count(launch, whole=True), traffic.count(launch)
    assert whole.interpreted == whole.programs > reduced.interpreted
    assert (reduced.loads, reduced.stores) == (whole.loads, whole.stores)


def test_a_slice_is_counted_where_it_lies() -> None:
    for launch in loss_launches():
        counted = traffic.count(launch, whole=True)
        assert counted.loads["logits"] - 9 * 1003 * 2 in (0, 9 * 2)  # forward: the target's logits besides
        logits = launch.arguments["logits"]
        assert isinstance(logits, Tensor) and not logits.is_contiguous()
    # the same with memory behind it, targets that are ignored among them: those rows are not read
    logits = torch.zeros(3, 4, 1003, dtype=torch.float16)[:, :-1]
    targets = torch.tensor([[-100, 5, 6], [7, 8, -100], [-100, -100, -100]])
    forward, backward = cross_entropy.launches(cross_entropy.Inputs(logits, targets, torch.ones(3)))
    counted = traffic.count(forward, whole=True), traffic.count(backward, whole=True)
    assert [each.loads["logits"] for each in counted] == [4 * 1004 * 2, 4 * 1003 * 2]
    assert counted[1].stores == {"gradient": 9 * 1003 * 2}


def test_count_leaves_tensors_and_interpreter_alone() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_masked_load
    x = torch.ones(1, 64).half()
    values, positions = torch.ones(32, 16).half(), torch.full((2, 16), 0x44444444, dtype=torch.int32)
    launch = sparse_matvec.plan(x, values, positions, y=torch.full((1, 16), 7.0).half())
    traffic.count(launch)
    y = launch.arguments["y"]
    assert isinstance(y, Tensor) and (y == 7).all()
    assert InterpreterBuilder.create_masked_load is before


def test_counting_needs_the_interpreter() -> None:
    class Compiled:
        device_caches: dict[str, object] = {}

    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before"):
        traffic.count(Launch(Compiled(), (1,), {}))


# ---- committed


def test_committed_counts_belong_to_these_kernels() -> None:
    assert audit.stale(COMMITTED) == [], 'run: python -c "from refimpl.kernels import traffic; ..."'
    found = {(row.kernel, row.variant) for row in traffic.load(COMMITTED)["rows"]}
    assert found == {(kernel, name) for kernel in audit.all_kernels() for name in audit.launches(kernel)}


def test_matrix_vector_kernels_move_little_more_than_they_must() -> None:
    # the two passes of attention have bars of their own, beside their tests
    one_row = [
        row for row in traffic.load(COMMITTED)["rows"] if "rows" not in row.variant and "pass" not in row.variant
    ]
    assert {row.kernel for row in one_row} == set(audit.all_kernels()) - {"lowrank_decode", "ragged_decode"}
    over = {(row.kernel, row.variant): row.traffic.ratio for row in one_row if row.traffic.ratio > 1.05}
    assert not over


@pytest.mark.parametrize("variant", ["bf16 576->192", "fp16 1536->576"])
def test_committed_counts_are_counted_again(variant: str) -> None:
    (row,) = (
        row for row in traffic.load(COMMITTED)["rows"] if row.kernel == "sparse_matvec" and row.variant == variant
    )
    assert traffic.count(audit.launches("sparse_matvec")[variant]) == row.traffic
