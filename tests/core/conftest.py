"""Helpers for tests of the driver."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from refimpl import GPTQ, METHODS, SparseGPT
from refimpl.core.device import read


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Random token ids [n, length] that all tiny models know."""

    def make(n: int = 6, length: int = 12, seed: int = 0) -> Tensor:
        return torch.randint(3, 256, (n, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def options() -> dict[str, dict[str, Any]]:
    """Options with which each method runs on every tiny model."""
    small = {"RTN": {"bits": 3, "group_size": 32}, "GPTQ": {"bits": 3, "group_size": 32}, "Magnitude": {}, "Wanda": {},
             "SparseGPT": {}, "PlainSVD": {"rank": 4}, "ActSVD": {"rank": 4}, "EoRA": {"rank": 4},
             "LoftQ": {"bits": 3, "group_size": 32, "rank": 4, "iterations": 2}}  # fmt: skip
    assert (
        small.keys() == METHODS.keys()
    )  # a new method must be added here, and is then tested like the others
    return small


@pytest.fixture(scope="session")
def pipeline(options: dict[str, dict[str, Any]]) -> Callable[[str], list[Any]]:
    """The steps that end with a method: repairs come after pruning and quantising."""

    def steps(name: str) -> list[Any]:
        method = METHODS[name](**options[name])
        return [SparseGPT("2:4"), GPTQ(3, 32), method] if method.uses_reference else [method]

    return steps


@pytest.fixture(scope="session")
def state() -> Callable[[nn.Module], dict[str, Tensor]]:
    """A copy of a state dict, to compare with later."""
    return lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two state dicts are equal to the last bit."""
    return lambda a, b: (
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    )


def _index(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` by dispatched operators."""
    items = index if isinstance(index, tuple) else (index,)
    used = sum(item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1
               for item in items if item is not None and item is not Ellipsis)  # fmt: skip
    advanced: dict[int, Tensor] = {}
    dim = 0
    for item in items:
        if item is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif item is Ellipsis:
            dim += x.dim() - dim - (used - dim)
        elif isinstance(item, slice):
            if item != slice(None):
                x = torch.ops.aten.slice.Tensor(x, dim, item.start, item.stop, item.step or 1)
            dim += 1
        elif isinstance(item, Tensor) and item.dtype == torch.bool:
            advanced[dim], dim = item, dim + item.dim()
        elif isinstance(item, (Tensor, list)):
            advanced[dim], dim = torch.as_tensor(item, device=x.device), dim + 1
        else:
            x = torch.ops.aten.select.int(x, dim, item)
    if not advanced:
        return x
    return torch.ops.aten.index.Tensor(x, [advanced.get(k) for k in range(max(advanced) + 1)])


def _write(x: Tensor, value: Any) -> Tensor:
    """``x.copy_(value)`` as far as it can be checked without values: device and shape."""
    if not isinstance(value, Tensor):
        return x.fill_(value)
    if value.dim() and value.device != x.device:
        raise RuntimeError(f"writing a tensor on {value.device} into one on {x.device}")
    return x.masked_fill_(torch.zeros_like(x, dtype=torch.bool) & value.bool(), 0)


class _WithoutCuda(TorchFunctionMode):
    """A CPU build refuses some Python methods of a CUDA tensor even if it is fake: go round them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            return _index(*args)
        if name == "__invert__":
            return torch.bitwise_not(*args)
        if name == "where" and len(args) == 1:
            x = args[0]  # how many there are is a value: let it be all
            return torch.zeros(x.dim(), x.numel(), dtype=torch.int64, device=x.device).unbind(0)
        if name == "contiguous":
            return torch.clone(args[0], memory_format=torch.contiguous_format)
        if name == "copy_":
            return _write(*args[:2])
        if name == "__setitem__":
            x, index, value = args
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                return x.masked_fill_(index, value)
            return _write(_index(x, index), value)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A context in which tensors claim to live on a GPU: devices are checked, values do not exist.

    It yields a function that puts a model there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for name, module in list(sys.modules.items()):
        if name.startswith("refimpl.") and getattr(module, "read", None) is read:
            monkeypatch.setattr(module, "read", lambda value: 0.0)

    def place(model: nn.Module) -> nn.Module:
        moved: dict[int, Tensor] = {}  # by identity: tied weights stay tied
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        fake = torch.empty_like(tensor, device="cuda")
                        fake = (
                            nn.Parameter(fake, requires_grad=False) if tensors is module._parameters else fake
                        )
                        tensors[name] = moved.setdefault(id(tensor), fake)
        return model

    @contextmanager
    def context() -> Iterator[Callable[[nn.Module], nn.Module]]:
        shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
        with mode, torch.device("cuda"), _WithoutCuda():
            yield place

    return context
