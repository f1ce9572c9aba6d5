"""Decode attention on packed heads of different ranks: kernel (interpreted) and operator against plain attention."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refimpl.core.files.io import data_path
from refimpl.kernels import audit, traffic
from refimpl.kernels import ragged_decode as ragged
from refimpl.kernels.launch import warn_once
from refimpl.kernels.ragged_decode import Inputs

pytest.importorskip("triton")

# relative error (Frobenius); the interpreter cuts bfloat16 off where a GPU rounds
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


def problem(
    batch: int,
    shared: int,
    d: int,
    n: int,
    key_ranks: tuple[int, ...],
    value_ranks: tuple[int, ...],
    dtype: torch.dtype,
    basis: bool = True,
    padded: bool = False,
) -> Inputs:
    generator = torch.Generator().manual_seed(n)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads = len(key_ranks)
    return Inputs(
        random(batch, heads * shared, 1, d).to(dtype),
        random(batch, 1, n, sum(key_ranks)).to(dtype),
        (random(batch, 1, n, sum(value_ranks)) + 0.5).to(dtype),
        key_ranks,
        value_ranks,
        d**-0.5,
        basis=torch.linalg.qr(random(heads, d, d)).Q.contiguous() if basis else None,
        mean=random(heads, d) if basis else None,
        first=torch.tensor([0, 70, 5][:batch]) if padded else None,
    )


def exact(i: Inputs) -> Tensor:
    """Ordinary attention in fp64, one query head at a time, on slices of the rows."""
    k_at, v_at = ([0, *itertools.accumulate(ranks)] for ranks in (i.key_ranks, i.value_ranks))
    rows = []
    for b in range(i.query.shape[0]):
        found = []
        for q in range(i.query.shape[1]):
            h = q // i.shared
            k = i.keys[b, 0, :, k_at[h] : k_at[h + 1]].double()
            v = i.values[b, 0, :, v_at[h] : v_at[h + 1]].double()
            scores = k @ i.query[b, q, 0, : k.shape[1]].double() * i.scaling
            if i.first is not None:
                scores[: int(i.first[b])] = -math.inf
            mixed = scores.softmax(0) @ v
            if i.basis is not None:
                mixed = i.basis[h].double()[:, : v.shape[1]] @ mixed
                mixed = mixed if i.mean is None else mixed + i.mean[h].double()
            found.append(mixed)
        rows.append(torch.stack(found).unsqueeze(1) if i.basis is not None else torch.cat(found))
    return torch.stack(rows)


def error(found: Tensor, inputs: Inputs) -> float:
    expected = exact(inputs)
    assert found.shape == expected.shape and found.dtype == inputs.query.dtype
    return ((found.double() - expected).norm() / expected.norm()).item()


def interpreted(inputs: Inputs) -> Tensor:
    assert ragged.unsupported(inputs) is None
    y = torch.full_like(ragged._fake(*inputs), math.nan)
    for launch in ragged.plan(inputs, y):
        launch()
    return y


# ---- kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("basis", [True, False])
def test_kernel_on_a_shape_of_smollm2(dtype: torch.dtype, basis: bool) -> None:
    """300 tokens are two programs; ranks from one to all columns, hardly a multiple of anything."""
    inputs = problem(1, 3, 64, 300, (13, 64, 1), (7, 16, 41), dtype, basis)
    assert ragged.plan(inputs, ragged._fake(*inputs))[0].grid == (3, 2)
    assert error(interpreted(inputs), inputs) < TOLERANCE[dtype]


@pytest.mark.parametrize("basis", [True, False])
def test_kernel_with_padding_longer_than_a_tile(basis: bool) -> None:
    inputs = problem(3, 2, 32, 90, (16, 32), (32, 16), torch.float16, basis, padded=True)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


def test_kernel_on_a_shape_of_llama() -> None:
    inputs = problem(1, 4, 128, 33, (96, 32) * 4, (64, 128, 16, 48) * 2, torch.float16)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


def test_one_token_and_no_mean() -> None:
    inputs = problem(1, 1, 16, 1, (3,), (5,), torch.float16)._replace(mean=None)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


def test_nothing_outside_its_ranks_is_read() -> None:
    """Columns of the query, of the basis and of the other heads may hold anything."""
    inputs = problem(1, 2, 32, 20, (8, 24), (16, 5), torch.float16)
    clean = interpreted(inputs)
    query, basis = inputs.query.clone(), inputs.basis.clone()  # type: ignore[union-attr]
    query[:, :2, :, 8:], query[:, 2:, :, 24:] = math.nan, math.nan
    basis[0, :, 16:], basis[1, :, 5:] = math.nan, math.nan
    assert torch.equal(interpreted(inputs._replace(query=query, basis=basis)), clean)


# ---- op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("basis", [True, False])
def test_operator_is_plain_attention(dtype: torch.dtype, basis: bool) -> None:
    inputs = problem(3, 3, 64, 80, (13, 64, 1), (7, 16, 41), dtype, basis, padded=True)
    found = ragged.ragged_decode(*inputs)
    assert error(found, inputs) < TOLERANCE[dtype] and torch.equal(found, ragged.reference(inputs))


@pytest.mark.parametrize("basis", [True, False])
def test_operator_obeys_the_rules_of_torch(basis: bool) -> None:
    inputs = problem(2, 2, 32, 9, (8, 24), (16, 5), torch.float16, basis, padded=True)
    given = [list(x) if isinstance(x, tuple) else x for x in inputs]
    torch.library.opcheck(ragged.ragged_decode, tuple(given), test_utils=("test_schema", "test_faketensor"))


def test_cuda_path_takes_the_kernel_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function registered for CUDA, run on a CPU: kernels are interpreted."""
    warn_once.cache_clear()
    monkeypatch.setattr(ragged, "capability", lambda x: (8, 0))
    inputs = problem(1, 2, 32, 20, (8, 24), (16, 5), torch.float16)
    given: list[Any] = [list(x) if isinstance(x, tuple) else x for x in inputs]  # as the dispatcher hands them on
    assert error(ragged._cuda(*given), inputs) < TOLERANCE[torch.float16]
    strided = inputs._replace(values=torch.cat([inputs.values, inputs.values], -1)[..., :21])
    assert not strided.values.is_contiguous() and torch.equal(ragged._cuda(*strided), ragged._cuda(*inputs))
    whole = inputs._replace(query=inputs.query.float(), keys=inputs.keys.float(), values=inputs.values.float())
    with pytest.warns(UserWarning, match="ragged_decode: the query is float32"):
        assert error(ragged._cuda(*whole), whole) < 1e-5


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(1, 2, 32, 20, (8, 24), (16, 5), torch.float16)
    assert "dtype of the query" in str(ragged.unsupported(inputs._replace(values=inputs.values.bfloat16())))
    assert "48 channels" in str(ragged.unsupported(inputs._replace(query=torch.empty(1, 4, 1, 48).half())))
    assert "65 query heads" in str(ragged.unsupported(inputs._replace(query=torch.empty(1, 130, 1, 32).half())))
    assert "nothing is stored" in str(ragged.unsupported(inputs._replace(keys=inputs.keys[:, :, :0])))
    assert "7.5" in str(ragged.unsupported(inputs, (7, 5)))
    monkeypatch.setattr(ragged, "triton", None)
    assert "triton" in str(ragged.unsupported(inputs))


# ---- what it costs


def test_cost_is_every_argument_once() -> None:
    for name, inputs in ragged.problems().items():
        moved, operations = ragged.least(inputs)
        starts = 4 * 2 * (len(inputs.key_ranks) + 1)
        tensors = sum(x.nbytes for x in inputs if isinstance(x, Tensor))
        assert moved == tensors + inputs.query.nbytes + starts, name  # the result is like the query
        assert operations == pytest.approx(4 * inputs.shared * inputs.keys.numel(), rel=0.1), name


def test_cache_is_read_once_and_little_else_moves() -> None:
    rows = [row for row in traffic.load(data_path("kernels", "traffic.json"))["rows"] if row.kernel == "ragged_decode"]
    first = [row for row in rows if row.variant.endswith("pass 1")]
    assert len(first) * 2 == len(rows) == len(ragged.variants())
    for row in first:
        assert row.traffic.ratio <= 1.05, row.variant
        stored = audit.launches("ragged_decode")[row.variant].arguments["keys"]
        assert isinstance(stored, Tensor)
        assert row.traffic.loads["keys"] == row.traffic.loads["values"] == stored.nbytes


def test_cache_is_loaded_128_bits_at_a_time() -> None:
    rows = [row for row in audit.load(data_path("kernels", "audit.json"))["rows"] if row.kernel == "ragged_decode"]
    first = [row for row in rows if row.variant.endswith("pass 1") and row.target != "gfx942"]
    assert first and all(row.loads["keys"].keys() == row.loads["values"].keys() == {128} for row in first)
