"""Cross-entropy of sequences: kernels (interpreted) and operator against the formula in float64, and what they move."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from refimpl.core.files.io import data_path
from refimpl.kernels import audit, traffic
from refimpl.kernels import cross_entropy as ce
from refimpl.kernels.cross_entropy import sequence_cross_entropy
from refimpl.kernels.launch import warn_once

pytest.importorskip("triton")

IGNORED = -100
# of a gradient, whose elements are up to 2: the last bit; the interpreter cuts bfloat16 off where a GPU rounds
EPSILON = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def problem(
    batch: int, tokens: int, vocabulary: int, dtype: torch.dtype, ignored: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (some ignored; of the last sequence all), what arrives from behind."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(batch, tokens, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    targets[0, 0], targets[0, -1] = vocabulary - 1, 0  # both edges of a row
    if ignored:
        targets[0, 1] = targets[-1] = IGNORED
    return logits, targets, torch.randn(batch, generator=generator)


def kernels(logits: Tensor, targets: Tensor, gradient: Tensor, ignore_index: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Losses and the gradient by the functions that are registered for CUDA, interpreted on a CPU."""
    losses, lse = ce._forward_cuda(logits, targets, ignore_index)
    return losses, ce._backward_cuda(gradient, logits, targets, lse, ignore_index)


def exact(logits: Tensor, targets: Tensor, gradient: Tensor, ignore_index: int = IGNORED) -> tuple[Tensor, Tensor]:
    """The same in float64, by PyTorch's own loss, sequence by sequence."""
    x = logits.double().requires_grad_()
    losses = torch.stack(
        [
            F.cross_entropy(row, target, ignore_index=ignore_index)
            if (target != ignore_index).any()
            else row.sum() * 0.0
            for row, target in zip(x, targets, strict=True)
        ]
    )
    return losses.detach(), torch.autograd.grad(losses, x, gradient.double())[0]


def check(found: tuple[Tensor, Tensor], *given: Any) -> None:
    logits = given[0]
    (losses, gradient), (true_losses, true_gradient) = found, exact(*given)
    assert losses.dtype == torch.float32 and losses.shape == true_losses.shape
    torch.testing.assert_close(losses.double(), true_losses, atol=3e-6, rtol=1e-6)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    # fp16 has steps of 2^-24 near zero
    over = (gradient.double() - true_gradient).abs() / (EPSILON[logits.dtype] * true_gradient.abs() + 1e-7)
    assert over.max() <= 1, over.max()


@pytest.fixture(autouse=True)
def _ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ce, "capability", lambda x: (8, 0))


# ---- kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, 8, 27, 1000])
def test_kernels_are_the_formula(vocabulary: int, dtype: torch.dtype) -> None:
    given = problem(3, 3, vocabulary, dtype)
    check(kernels(*given), *given)


@pytest.mark.parametrize("vocabulary, dtype", [(50257, torch.float16), (50257, torch.bfloat16), (8211, torch.float32)])
def test_odd_vocabularies_of_several_runs(vocabulary: int, dtype: torch.dtype) -> None:
    given = problem(2, 3, vocabulary, dtype)
    assert vocabulary // (16 // dtype.itemsize) > 2 * ce._GROUPS
    check(kernels(*given), *given)


@pytest.mark.parametrize(
    "vocabulary, dtype", [(49152, torch.bfloat16), (128256, torch.bfloat16), (128256, torch.float32)]
)
def test_vocabularies_of_smollm2_and_llama(vocabulary: int, dtype: torch.dtype) -> None:
    given = problem(1, 2, vocabulary, dtype, ignored=False)
    launch = ce.plan(given[0], given[1], torch.empty(1, 2), torch.empty(1, 2))
    assert not launch.constants["EDGES"] and launch.num_warps == 8
    check(kernels(*given), *given)


@pytest.mark.parametrize("vocabulary", [16, 27])
@pytest.mark.parametrize("at", [(slice(None), slice(None, -1)), (slice(None), slice(1, None)), (slice(1), slice(1, 3))])
def test_slices_are_read_where_they_lie(
    at: tuple[slice, slice], vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets, gradient = problem(3, 5, vocabulary, torch.float16)
    given = logits[at], targets[at], gradient[at[0]]
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied") if self.ndim == 3 else self.clone())
    found = kernels(*given)
    monkeypatch.undo()
    check(found, *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_begin_anywhere(dtype: torch.dtype) -> None:
    """Logits in the middle of another tensor, three elements behind a multiple of 128 bits."""
    logits, targets, gradient = problem(2, 2, 40, dtype)
    moved = torch.empty(logits.numel() + 3, dtype=dtype)[3:].view_as(logits).copy_(logits)
    check(kernels(moved, targets, gradient), logits, targets, gradient)
    constants = ce.plan(moved, targets, torch.empty(2, 2), torch.empty(2, 2)).constants
    assert constants["LEAD"] == 3 and constants["EDGES"]
    down = logits.transpose(1, 2).contiguous().transpose(1, 2)  # columns are not neighbours
    assert down.stride(2) != 1
    check(kernels(down, targets, gradient), logits, targets, gradient)


def test_compilers_are_told_no_more_than_is_so() -> None:
    """What is said of alignment decides how wide a GPU loads and stores; the interpreter would not notice."""

    def told(start: int, size: int, strides: tuple[int, int], result_strides: tuple[int, int]) -> tuple[int, ...]:
        x, y = (
            torch.empty(4096, dtype=torch.float16)[at:].as_strided((2, 3, size), (*s, 1), at)
            for at, s in ((start, strides), (0, result_strides))
        )
        numbers = torch.empty(2, 3)
        constants = ce.plan_backward(x, numbers.long(), numbers, numbers[:, 0], y).constants
        return constants["LEAD"], constants["EDGES"], constants["IN_STEP"]

    assert told(0, 40, (120, 40), (120, 40)) == (0, False, True)
    assert told(8, 40, (160, 40), (120, 40)) == (0, False, True)  # a slice, of rows that begin where they should
    assert told(3, 40, (120, 40), (120, 40)) == (3, True, False)
    assert told(0, 41, (123, 41), (123, 41)) == (0, True, True)  # any length, both alike
    assert told(0, 41, (164, 41), (123, 41)) == (0, True, False)  # a slice: the second sequences are not alike
    assert told(0, 40, (164, 41), (120, 40)) == (0, True, False)


def test_offsets_beyond_31_bits() -> None:
    """Sequences that lie 2^30 and some elements apart: the third begins behind 2^31."""
    vocabulary, apart = 37, 2**30 + 11
    logits, targets, gradient = problem(3, 1, vocabulary, torch.float16, ignored=False)
    far = torch.empty(2 * apart + vocabulary, dtype=torch.float16)  # memory that nobody touches costs nothing
    strided = far.as_strided(logits.shape, (apart, apart, 1)).copy_(logits)
    lse, losses = torch.empty(3, 1), torch.empty(3, 1)
    ce.plan(strided, targets, lse, losses)()
    result = torch.empty_like(far).as_strided(logits.shape, (apart, apart, 1))
    ce.plan_backward(strided, targets, lse, gradient, result)()
    check((losses.squeeze(1), result), logits, targets, gradient)


def test_a_target_that_is_ignored_may_be_in_the_vocabulary() -> None:
    logits, targets, gradient = problem(2, 4, 11, torch.float32, ignored=False)
    targets[1, 1:3] = 7
    given = logits, targets, gradient, 7
    check(kernels(*given), *given)


def test_ignored_rows_are_not_read_and_have_no_gradient() -> None:
    logits, targets, gradient = problem(2, 4, 27, torch.bfloat16)
    clean = kernels(logits, targets, gradient)
    spoiled = logits.masked_fill((targets == IGNORED).unsqueeze(-1), math.nan)
    for path in (kernels, lambda *given: _by_torch(*given)):
        losses, result = path(spoiled, targets, gradient)
        torch.testing.assert_close(losses, clean[0])
        assert not result[targets == IGNORED].any()
    assert losses[1] == 0


def _by_torch(logits: Tensor, targets: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.detach().requires_grad_()
    losses = sequence_cross_entropy(x, targets)
    return losses.detach(), torch.autograd.grad(losses, x, gradient)[0]


@pytest.mark.parametrize("path", [kernels, _by_torch])
def test_extreme_logits(path: Any) -> None:
    """Tokens that are ruled out (-inf) have no gradient; large logits do not overflow; NaN is not swallowed."""
    logits, targets, gradient = problem(2, 3, 27, torch.float32, ignored=False)
    targets[:] = torch.tensor([26, 3, 0])
    logits[0, :, 4:20] = -math.inf
    logits[1, 0] += 1e4
    logits[1, 1] -= 1e4
    logits[0, 2, 26] = 500.0  # alone, at the edge of a row
    losses, result = path(logits, targets, gradient)
    true_losses, true_result = exact(logits, targets, gradient)
    torch.testing.assert_close(losses.double(), true_losses, atol=2e-3, rtol=0.0)  # of 1e4 in fp32
    torch.testing.assert_close(result.double(), true_result, atol=1e-3, rtol=0.0)
    assert not result[0, :, 4:20].any()
    logits[1, 2, 13] = math.nan
    losses, result = path(logits, targets, gradient)
    assert losses.isnan().tolist() == [False, True] and result[1, 2].isnan().all() and not result[:, :2].isnan().any()


def test_a_target_outside_the_vocabulary() -> None:
    logits, targets, gradient = problem(2, 3, 11, torch.float32, ignored=False)
    for wrong in (11, -1):
        targets[1, 1] = wrong
        losses, result = kernels(logits, targets, gradient)
        assert losses.isnan().tolist() == [False, True]
        assert result.isnan().any(-1).tolist() == [[False] * 3, [False, True, False]]
        with pytest.raises(ValueError, match=f"targets holds {wrong}, outside the vocabulary of 11; .* here -100"):
            sequence_cross_entropy(logits, targets)


# ---- op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slab", [2**20, 100, 1])
def test_operator_is_the_formula(dtype: torch.dtype, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ce, "_SLAB", slab)
    given = problem(4, 5, 27, dtype)
    check(_by_torch(*given), *given)
    sliced = given[0][:, :-1], given[1][:, 1:], given[2]
    check(_by_torch(*sliced), *sliced)
    torch.testing.assert_close(ce.reference(*given[:2]).double(), exact(*given)[0], atol=3e-6, rtol=1e-6)


def test_gradient_in_float64() -> None:
    logits, targets, _ = problem(3, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda x: sequence_cross_entropy(x, targets), logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: sequence_cross_entropy(x[:, :-1], targets[:, 1:]), logits)
    first = torch.autograd.grad(sequence_cross_entropy(logits, targets).sum(), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError):  # said, not wrong: there is no second derivative
        first.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_obeys_the_rules_of_torch(dtype: torch.dtype) -> None:
    logits, targets, gradient = problem(2, 3, 11, dtype)
    torch.library.opcheck(ce._forward, (logits.requires_grad_(), targets, IGNORED))
    lse = ce._forward(logits.detach(), targets, IGNORED)[1]
    torch.library.opcheck(ce._backward, (gradient, logits.detach(), targets, lse, IGNORED))


def test_nothing_to_do() -> None:
    for shape in ((0, 3, 5), (2, 0, 5)):
        logits, targets = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64)
        for path in (kernels, _by_torch):
            losses, result = path(logits, targets, torch.ones(shape[0]))
            assert losses.tolist() == [0.0] * shape[0] and result.shape == shape


def test_other_shapes_and_dtypes_are_refused() -> None:
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits is torch.float32 \[2, 3\]; it must be floating, \[B, T, V\]"):
        sequence_cross_entropy(logits[..., 0], targets)
    for empty in (logits[..., :0], logits.long()):
        with pytest.raises(ValueError, match="logits is"):
            sequence_cross_entropy(empty, targets)
    with pytest.raises(ValueError, match=r"targets is torch.int64 \[2, 2\]; logits .* need torch.int64 \[2, 3\]"):
        sequence_cross_entropy(logits, targets[:, 1:])
    with pytest.raises(ValueError, match="targets is torch.int32"):
        sequence_cross_entropy(logits, targets.int())


def test_cuda_path_says_why_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    warn_once.cache_clear()
    given = problem(2, 3, 11, torch.float64)
    with pytest.warns(UserWarning, match="cross_entropy: logits are float64"):
        losses, result = kernels(*given)
    assert losses.dtype == result.dtype == torch.float64
    for found, true in zip((losses, result), exact(*given), strict=True):
        torch.testing.assert_close(found, true, atol=1e-7, rtol=1e-7)
    logits = given[0].bfloat16()
    assert ce.unsupported(logits, (8, 0)) is None and "7.5" in str(ce.unsupported(logits, (7, 5)))
    assert ce.unsupported(logits.half(), (7, 5)) is None
    huge = torch.empty(2**16, 2**16, 2, dtype=torch.half, device="meta")
    assert "2**31 rows" in str(ce.unsupported(huge))
    monkeypatch.setattr(ce, "triton", None)
    assert "triton" in str(ce.unsupported(logits))


# ---- what it costs


def test_cost_is_every_argument_once() -> None:
    for name, inputs in ce.problems().items():
        batch, tokens, vocabulary = inputs.logits.shape
        for backward, launch in enumerate(ce.launches(inputs)):
            moved, operations = ce.cost(batch, tokens, vocabulary, inputs.logits.itemsize, bool(backward))
            assert moved == traffic.minimum(launch), name
            assert operations == 4 * inputs.logits.numel()


def test_logits_are_read_once_and_the_gradient_is_written_once() -> None:
    rows = [row for row in traffic.load(data_path("kernels", "traffic.json"))["rows"] if row.kernel == "cross_entropy"]
    assert {row.variant for row in rows} == set(ce.variants())
    for row in rows:
        assert row.traffic.ratio <= 1.05, row.variant
        arguments = audit.launches("cross_entropy")[row.variant].arguments
        logits, targets, result = (arguments.get(name) for name in ("logits", "targets", "gradient"))
        assert isinstance(logits, Tensor) and isinstance(targets, Tensor)
        if isinstance(result, Tensor):
            assert row.traffic.loads["logits"] == logits.nbytes == row.traffic.stores["gradient"]
            assert "gradient" not in row.traffic.loads
        else:  # and the target's once more
            assert row.traffic.loads["logits"] == logits.nbytes + targets.numel() * logits.itemsize


def test_logits_are_loaded_128_bits_at_a_time() -> None:
    """All but one for the target, and one for the edges of rows that begin anywhere."""
    rows = [row for row in audit.load(data_path("kernels", "audit.json"))["rows"] if row.kernel == "cross_entropy"]
    assert rows
    for row in rows:
        launch = audit.launches("cross_entropy")[row.variant]
        logits = launch.arguments["logits"]
        assert isinstance(logits, Tensor) and row.main == "logits"
        narrow = launch.constants["EDGES"] + row.variant.endswith("forward")
        loads = row.loads["all" if row.target == "gfx942" else "logits"]
        if row.target != "gfx942":
            assert loads.get(8 * logits.itemsize, 0) == narrow, (row.variant, row.target)
            assert loads.keys() <= {128, 8 * logits.itemsize}
        assert loads[128] >= 2 and not row.tensor_core


def test_results_are_stored_128_bits_at_a_time_and_far_away() -> None:
    """Compiled for sequences more than 2^31 elements apart; in a process where nothing is interpreted."""
    code = (
        "import torch\n"
        "from refimpl.kernels import audit, cross_entropy as ce\n"
        "logits = torch.empty(2, 65536, 50257, dtype=torch.float16, device='meta')\n"
        "inputs = ce.Inputs(logits, torch.empty(2, 65536, dtype=torch.int64, device='meta'), "
        "torch.empty(2, device='meta'))\n"
        "print(audit._compile(ce.launches(inputs)[1], 'sm_90').asm['ptx'])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ptx = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert len(stores) == 5 and sum("st.global.v4.b32" in line for line in stores) == 4  # the edges besides


class Moved(TorchDispatchMode):
    """Bytes of large tensors that each operator reads and writes, by name; not those in which it only looks up."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes = least, dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        results = out if isinstance(out, tuple) else (out,)
        looked_up = "nll_loss" in name  # its log-probabilities: one of a row, or none
        given = [] if looked_up else [x for x in args if isinstance(x, Tensor)]
        moved = [x.nbytes for x in (*given, *results) if isinstance(x, Tensor) and x.numel() >= self.least]
        if moved and not func.is_view:
            self.bytes[name] = self.bytes.get(name, 0) + sum(moved)
        return out


def moved(logits: Tensor, loss: Any) -> int:
    """Bytes a logit, there and back."""
    x = logits.detach().requires_grad_()
    with Moved(logits.numel() // 2) as mode:
        loss(x).sum().backward()
    return round(sum(mode.bytes.values()) / logits.numel())


def test_bytes_beside_those_of_log_probabilities_in_memory() -> None:
    """The ratios in the text above the module."""
    logits, targets, _ = problem(4, 64, 128, torch.bfloat16, ignored=False)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none").view(4, 64).mean(1)

    ours = moved(logits, lambda x: sequence_cross_entropy(x, targets))
    assert (ours, moved(logits, plain), moved(logits, lambda x: plain(x.float()))) == (6, 12, 36)
    shifted = torch.cat([targets[:, 1:], torch.full((4, 1), IGNORED)], 1)
    assert moved(logits, lambda x: sequence_cross_entropy(x, shifted)) == 6
    assert moved(logits, lambda x: sequence_cross_entropy(x[:, :-1], targets[:, 1:])) > 9
