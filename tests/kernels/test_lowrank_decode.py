"""Decode attention on a low-rank cache: the interpreted kernel and the operator against plain attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refimpl.core.files.io import data_path
from refimpl.kernels import audit, traffic
from refimpl.kernels import lowrank_decode as lowrank
from refimpl.kernels.launch import warn_once
from refimpl.kernels.lowrank_decode import Inputs

pytest.importorskip("triton")

# relative error (Frobenius); the interpreter cuts bfloat16 off where a GPU rounds
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}
FREQUENCIES = {d: 10000.0 ** (-torch.arange(d // 2) / (d // 2)) for d in (32, 64, 128)}


def codes_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit codes along the last dimension, two a byte, with step and least value."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    step, least = ((high - low) / 15).half(), low.half()
    codes = ((x - least.float()) / step.float()).round().clamp(0, 15).to(torch.uint8)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous(), step.contiguous(), least.contiguous()


def problem(
    batch: int,
    heads: int,
    shared: int,
    d: int,
    n: int,
    rank_k: int,
    rank_v: int,
    dtype: torch.dtype,
    bits: int = 16,
    near: int = 9,
    sinks: int = 4,
    padded: bool = False,
    bias: bool = False,
    group: int = 32,
    value_group: int = 18,
) -> Inputs:
    generator = torch.Generator().manual_seed(n + rank_k)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    more: dict[str, Any] = {}
    keys, values = random(batch, 1, n, rank_k), random(batch, 1, n, rank_v) + 0.3
    if bits == 4:
        grouped = keys.unflatten(2, (-1, group)).transpose(-1, -2)
        keys, more["key_step"], more["key_least"] = codes_of(grouped)
        values, more["value_step"], more["value_least"] = codes_of(values.unflatten(-1, (-1, value_group)))
    else:
        keys, values = keys.to(dtype), values.to(dtype)
    factors = [random(rank, heads * d, scale=rank**-0.5).to(dtype) for rank in (rank_k, rank_v)]
    if bias:
        more |= {name: random(heads * d).to(dtype) for name in ("key_bias", "value_bias")}
    if sinks:
        more |= {name: random(batch, heads, sinks, d).to(dtype) for name in ("sink_keys", "sink_values")}
    if padded:  # another number of columns in each row, and sinks and places of the window that do not count
        more["first"] = torch.tensor([0, 21, 2][:batch])
        more["seen"] = torch.rand(batch, sinks + near, generator=generator) < 0.7
    window = [random(batch, heads, near, d).to(dtype) for _ in range(2)]
    return Inputs(
        random(batch, heads * shared, 1, d).to(dtype),
        keys,
        values,
        *factors,
        FREQUENCIES[d],
        *window,
        d**-0.5,
        hidden=sinks,
        **more,
    )


def exact(i: Inputs) -> Tensor:
    """Ordinary attention in fp64, one query head at a time; rotations as complex numbers."""
    rows, q_heads, _, d = i.query.shape
    heads, n = i.near_keys.shape[1], i.stored
    c_k, c_v = (x[:, 0].double() for x in (i.keys, i.values))
    if i.key_step is not None and i.key_least is not None:
        codes = torch.stack([i.keys & 15, i.keys >> 4], -1).flatten(-2)
        c_k = (codes * i.key_step.double() + i.key_least.double()).transpose(-1, -2).reshape(rows, n, -1)
    if i.value_step is not None and i.value_least is not None:
        codes = torch.stack([i.values & 15, i.values >> 4], -1).flatten(-2)
        c_v = (codes * i.value_step.double() + i.value_least.double()).reshape(rows, n, -1)
    k, v = c_k @ i.key_factor.double(), c_v @ i.value_factor.double()
    k = k if i.key_bias is None else k + i.key_bias.double()
    v = v if i.value_bias is None else v + i.value_bias.double()
    out = torch.empty(rows, q_heads, 1, d, dtype=torch.float64)
    for b in range(rows):
        begin = 0 if i.first is None else int(i.first[b])
        for q in range(q_heads):
            h = q * heads // q_heads
            key, value = (x[b, :, h * d : (h + 1) * d] for x in (k, v))
            angle = (torch.arange(i.start, i.start + n) - begin).double()[:, None] * i.frequencies.double()
            turned = torch.complex(key[:, : d // 2], key[:, d // 2 :]) * torch.polar(
                torch.full_like(angle, i.factor), angle
            )
            parts = [(torch.cat([turned.real, turned.imag], 1), value)]
            visible = [torch.arange(i.start, i.start + n) >= begin + i.hidden]
            whole = [(i.near_keys, i.near_values)]
            if i.sink_keys is not None and i.sink_values is not None:
                whole.insert(0, (i.sink_keys, i.sink_values))
            parts += [(a[b, h].double(), c[b, h].double()) for a, c in whole]
            count = sum(a.shape[2] for a, _ in whole)
            visible.append(torch.ones(count, dtype=torch.bool) if i.seen is None else i.seen[b])
            scores = torch.cat([a for a, _ in parts]) @ i.query[b, q, 0].double() * i.scaling
            weights = scores.masked_fill(~torch.cat(visible), -math.inf).softmax(0)
            out[b, q, 0] = weights @ torch.cat([c for _, c in parts])
    return out


def error(found: Tensor, inputs: Inputs) -> float:
    expected = exact(inputs)
    assert found.shape == expected.shape and found.dtype == inputs.query.dtype
    return ((found.double() - expected).norm() / expected.norm()).item()


def interpreted(inputs: Inputs) -> Tensor:
    assert lowrank.unsupported(inputs) is None
    y = torch.full_like(inputs.query, math.nan)
    for launch in lowrank.plan(inputs, y):
        launch()
    return y


# ---- kernel

SMOLLM2 = {"heads": 3, "shared": 3, "d": 64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 4])
def test_kernel_on_a_shape_of_smollm2(dtype: torch.dtype, bits: int) -> None:
    """160 tokens are two tiles, the second with a part (16 bits) or half (4 bits) of its rows."""
    inputs = problem(1, n=160, rank_k=36, rank_v=36, dtype=dtype, bits=bits, **SMOLLM2)
    assert error(interpreted(inputs), inputs) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [16, 4])
def test_kernel_with_padding_biases_and_an_odd_rank(bits: int) -> None:
    inputs = problem(2, 2, 3, 32, 131 if bits == 16 else 96, 63, 54, torch.float16, bits, padded=True, bias=True)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


def test_kernel_on_a_shape_of_llama() -> None:
    """Eight key heads of 128 channels (four bands of frequencies), four queries each; values in two pieces."""
    inputs = problem(1, 8, 4, 128, 33, 40, 140, torch.float16)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


def test_heads_share_a_program_where_there_are_enough_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_TARGET_PROGRAMS", 2)
    inputs = problem(1, n=300, rank_k=16, rank_v=20, dtype=torch.float16, heads=2, shared=3, d=32)
    launch = lowrank.plan(inputs, torch.empty_like(inputs.query))[0]
    assert launch.grid == (1, 3) and launch.constants["HEADS"] == 2 and launch.arguments["span"] == 256
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(("n", "near", "sinks"), [(0, 5, 0), (0, 40, 4), (1, 0, 4), (40, 0, 0), (3, 1, 4)])
def test_nothing_stored_or_nothing_whole(n: int, near: int, sinks: int) -> None:
    """With three stored tokens and four sinks every stored token is hidden: its program sees nothing at all."""
    inputs = problem(1, n=n, rank_k=20, rank_v=16, dtype=torch.float16, near=near, sinks=sinks, heads=1, shared=2, d=32)
    inputs = inputs if n > 1 else inputs._replace(hidden=0)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


def test_store_that_begins_later_and_a_factor_on_the_rotation() -> None:
    inputs = problem(1, n=40, rank_k=20, rank_v=16, dtype=torch.float16, heads=1, shared=2, d=32)
    inputs = inputs._replace(start=1000, factor=1.2)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]
    assert error(lowrank.reference(inputs), inputs) < TOLERANCE[torch.float16]


def test_far_positions_turn_as_exactly_as_near_ones() -> None:
    """At 100 000 tokens an angle in fp32 is off by 0.004; whole turns are counted in integers instead."""
    inputs = problem(1, n=20, rank_k=20, rank_v=16, dtype=torch.float16, heads=1, shared=2, d=32, near=1, sinks=0)
    inputs = inputs._replace(start=100_003)
    assert error(interpreted(inputs), inputs) < TOLERANCE[torch.float16]


def test_result_does_not_depend_on_who_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    inputs = problem(1, n=400, rank_k=16, rank_v=16, dtype=torch.float16, heads=1, shared=2, d=32)
    y = torch.full_like(inputs.query, math.nan)
    first, second = lowrank.plan(inputs, y)
    assert first.grid == (1, 5)
    forward, original, order = interpreted(inputs), InterpreterBuilder.set_grid_idx, [3, 0, 4, 1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: original(self, x, order[y], z))
        first()
    second()
    assert torch.equal(y, forward)


# ---- op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 4])
def test_reference_and_operator_are_plain_attention(dtype: torch.dtype, bits: int) -> None:
    inputs = problem(3, n=64, rank_k=36, rank_v=36, dtype=dtype, bits=bits, padded=True, bias=True, **SMOLLM2)
    found = lowrank.lowrank_decode(*inputs)
    assert error(found, inputs) < TOLERANCE[dtype] and torch.equal(found, lowrank.reference(inputs))


def test_operator_obeys_the_rules_of_torch() -> None:
    inputs = problem(2, n=32, rank_k=8, rank_v=18, dtype=torch.float16, bits=4, padded=True, heads=1, shared=2, d=32)
    torch.library.opcheck(lowrank.lowrank_decode, tuple(inputs), test_utils=("test_schema", "test_faketensor"))


def test_fake_cuda_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    inputs = problem(2, n=32, rank_k=8, rank_v=8, dtype=torch.float16, heads=1, shared=2, d=32)
    with FakeTensorMode():
        given = [torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x for x in inputs]
        y = lowrank.lowrank_decode(*given)
    assert y.shape == (2, 2, 1, 32) and y.device.type == "cuda" and y.dtype == torch.float16


def test_cuda_path_takes_the_kernel_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function registered for CUDA, run on a CPU: kernels are interpreted."""
    warn_once.cache_clear()
    monkeypatch.setattr(lowrank, "capability", lambda x: (8, 0))
    inputs = problem(1, n=20, rank_k=8, rank_v=8, dtype=torch.float16, heads=1, shared=2, d=32)
    strided = inputs._replace(keys=torch.cat([inputs.keys, inputs.keys], -1)[..., :8])
    assert not strided.keys.is_contiguous()
    assert error(lowrank._cuda(*strided), inputs) < TOLERANCE[torch.float16]
    whole = inputs._replace(**{name: x.float() for name, x in inputs._asdict().items() if isinstance(x, Tensor)})
    with pytest.warns(UserWarning, match="lowrank_decode: the query is float32") as caught:
        assert error(lowrank._cuda(*whole), whole) < 1e-5
        lowrank._cuda(*whole)
    assert len(caught) == 1
    monkeypatch.setattr(lowrank, "capability", lambda x: (7, 5))
    with pytest.warns(UserWarning, match="compute capability 7.5"):
        lowrank._cuda(*inputs)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(1, n=64, rank_k=36, rank_v=36, dtype=torch.float16, bits=4, **SMOLLM2)

    def reason(**changes: Any) -> str:
        return str(lowrank.unsupported(inputs._replace(**changes)))

    assert lowrank.unsupported(inputs) is None
    assert "dtype of the query" in reason(key_factor=inputs.key_factor.float())
    assert "48 channels" in reason(query=torch.empty(1, 9, 1, 48).half())
    assert "33 query heads share" in reason(query=torch.empty(1, 99, 1, 64).half())
    assert "rank 576, above 512" in reason(value_factor=torch.empty(576, 192).half())
    assert "groups of 48 tokens" in reason(keys=torch.empty(1, 1, 2, 36, 24, dtype=torch.uint8))
    assert "do not fill the bytes" in reason(values=torch.empty(1, 1, 64, 2, 12, dtype=torch.uint8))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in reason()
    monkeypatch.setattr(lowrank, "triton", None)
    assert "triton" in reason()


# ---- what it costs


def test_cost_is_every_argument_once() -> None:
    for name, inputs in lowrank.problems().items():
        moved, operations = lowrank.least(inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        assert moved == sum(x.nbytes for x in tensors) + inputs.query.nbytes, name  # the result is like the query
        rebuilt = 2 * inputs.stored * inputs.key_factor.numel()
        assert rebuilt < operations < 1.7 * rebuilt, name  # rebuilding is most of it


def test_values_and_what_is_kept_whole_are_read_once() -> None:
    """Counted; once for all key heads of a program. Keys are tiles of a product: again for each head and band."""
    for name, row in committed(1).items():
        launch = audit.launches("lowrank_decode")[name]
        streamed = [
            x
            for x in ("values", "value_step", "value_least", "near_keys", "near_values", "sink_keys", "sink_values")
            if launch.arguments[x] is not None
        ]
        sizes = sum(launch.arguments[x].nbytes for x in streamed)  # type: ignore[union-attr]
        programs = launch.constants["H"] // launch.constants["HEADS"]
        read = sum(row.traffic.loads[x] for x in streamed)
        assert 0.95 * sizes < read <= 1.05 * programs * sizes, name


def test_results_of_programs_are_few_beside_a_long_cache() -> None:
    """Written by the first pass and read by the second; a tenth of what is stored at 32 768 tokens and 16 bits."""
    first, second = committed(1), committed(2)
    for name, row in first.items():
        if "32768 tokens" not in name or "4 bits" in name:
            continue
        merged = second[name.replace("pass 1", "pass 2")].traffic
        moved = row.traffic.stores["partials"] + merged.loads["partials"]
        launch = audit.launches("lowrank_decode")[name]
        stored = sum(launch.arguments[x].nbytes for x in ("keys", "values"))  # type: ignore[union-attr]
        assert moved < 0.15 * stored, name


def committed(number: int) -> dict[str, traffic.Row]:
    """Counted traffic of the first or the second pass, by launch."""
    found = traffic.load(data_path("kernels", "traffic.json"))["rows"]
    return {
        row.variant: row for row in found if row.kernel == "lowrank_decode" and row.variant.endswith(f"pass {number}")
    }
