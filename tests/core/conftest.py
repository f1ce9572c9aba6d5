"""Helpers for tests of the driver."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from refimpl import GPTQ, METHODS, SparseGPT
from refimpl.baselines.pruning import Pruner
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
    small = {"bits": 3, "group_size": 32, "rank": 4, "iterations": 3}
    return {
        name: {field.name: small[field.name] for field in fields(kind) if field.name in small}
        | ({"bits": 8} if name == "QuantizeActivations" else {})  # 3 bits leave nothing of an activation
        for name, kind in METHODS.items()
    }


@pytest.fixture(scope="session")
def pipeline(options: dict[str, dict[str, Any]]) -> Callable[[str], list[Any]]:
    """The steps that end with a method: repairs come after pruning and quantising."""

    def steps(name: str) -> list[Any]:
        method = METHODS[name](**options[name])
        return [SparseGPT("2:4"), GPTQ(3, 32), method] if method.uses_reference else [method]

    return steps


@pytest.fixture(scope="session")
def whole_pipeline(options: dict[str, dict[str, Any]]) -> Callable[[str], list[Any]]:
    """The same for models without blocks, whose kernels have odd widths: one group per row, no pattern."""
    anywhere = {"group_size": None, "pattern": "unstructured"}

    def steps(name: str) -> list[Any]:
        fitting = {key: anywhere.get(key, value) for key, value in options[name].items()}
        if issubclass(METHODS[name], Pruner):
            fitting["pattern"] = "unstructured"
        method = METHODS[name](**fitting)
        if not method.uses_reference:
            return [method]
        return [SparseGPT("unstructured"), GPTQ(3, None), method]

    return steps


@pytest.fixture(scope="session")
def untrained() -> Callable[[Any], Any]:
    """A method without its training: a CPU build cannot fake a backward pass on a GPU."""
    return lambda method: replace(method, iterations=0) if hasattr(method, "train") else method


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Random images [n, 1, 16, 16] in the units small vision models are trained in."""

    def make(n: int = 6, seed: int = 0, channels: int = 1, size: int = 16) -> Tensor:
        return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))

    return make


def _vision(model_class: Any, config_class: Any, **defaults: Any) -> Callable[..., PreTrainedModel]:
    def make(seed: int = 0, **changes: Any) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(num_channels=1, num_labels=10, **{**defaults, **changes}))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):  # as after a training: no batch norm is the identity
                    nn.init.normal_(module.running_mean)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
            return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_resnet() -> Callable[..., PreTrainedModel]:
    """Call it for a fresh random residual network: shortcuts with and without a convolution, strides, ten classes."""
    return _vision(
        ResNetForImageClassification,
        ResNetConfig,
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 2],
        layer_type="basic",
    )


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., PreTrainedModel]:
    """Call it for a fresh random vision transformer."""
    return _vision(
        ViTForImageClassification,
        ViTConfig,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    )


@pytest.fixture(scope="session")
def tiny_convnext() -> Callable[..., PreTrainedModel]:
    """Call it for a fresh random ConvNeXt: depthwise convolutions, linear layers over channels that come last."""
    return _vision(
        ConvNextForImageClassification,
        ConvNextConfig,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        image_size=16,
    )


class InvertedResiduals(nn.Module):
    """A model of no library, as MobileNetV2 is built: expand, filter each channel, project, add."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.expand = nn.Conv2d(width, 4 * width, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(4 * width)
            self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width, bias=False)
            self.norm2 = nn.BatchNorm2d(4 * width)
            self.project = nn.Conv2d(4 * width, width, 1, bias=False)
            self.norm3 = nn.BatchNorm2d(width)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.relu6(self.norm1(self.expand(x)))
            h = nn.functional.relu6(self.norm2(self.depthwise(h)))
            return x + self.norm3(self.project(h))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding="valid", padding_mode="zeros")
        self.features = nn.ModuleList([self.Block(width), self.Block(width)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.features:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="session")
def inverted_residuals() -> Callable[..., nn.Module]:
    """Call it for a fresh random model of a plain module, with depthwise convolutions."""

    def make(seed: int = 0, **changes: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return InvertedResiduals(**changes).eval()

    return make


@pytest.fixture(scope="session")
def state() -> Callable[[nn.Module], dict[str, Tensor]]:
    """A copy of a state dict, to compare with later."""
    return lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two state dicts are equal to the last bit."""
    return lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def _index(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` by dispatched operators."""
    items = index if isinstance(index, tuple) else (index,)
    used = sum(
        item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1
        for item in items
        if item is not None and item is not Ellipsis
    )
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
                        fake = nn.Parameter(fake, requires_grad=False) if tensors is module._parameters else fake
                        tensors[name] = moved.setdefault(id(tensor), fake)
        return model

    @contextmanager
    def context() -> Iterator[Callable[[nn.Module], nn.Module]]:
        shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
        with mode, torch.device("cuda"), _WithoutCuda():
            yield place

    return context
