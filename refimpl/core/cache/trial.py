"""What a cache meets in a model's layers: asked of the model itself, in one pass over four tokens, before a cache is made.

Configurations do not say how an attention module pairs the channels that it turns, whether it turns them at all, or whether
it works on the keys and values that a cache returns. So every module with full attention is shown one vector at four
positions. What it gives to its cache and to transformers' attention function is all that a compressed cache will see.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from refimpl.core.cache.attention import NAME, DeferredKV, cache_argument
from refimpl.core.cache.layer import Incoming, TailLayer
from refimpl.core.cache.tap import attention_input, attention_modules, attention_rotation
from refimpl.core.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 4
_MET = "_refimpl_cache_met"
_ELSEWHERE = "it does not attend through transformers' AttentionInterface, where a compressed cache answers"


@dataclass(frozen=True)
class Met:
    """What one layer with full attention gave to its cache.

    Attributes:
        keys: of one vector at positions 0 to `TOKENS` - 1, [1, H, `TOKENS`, d].
        query_heads: Hq.
    """

    keys: Tensor
    query_heads: int


class _UntouchedKV(DeferredKV):
    @staticmethod
    def _refuse() -> Any:
        raise OptionError(
            "it works on the keys and values that a cache returns, which a compressed cache does not have"
        )


class _TrialLayer(TailLayer):
    shown: Incoming | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if key_states.shape != value_states.shape:
            raise OptionError(
                f"it does not cache keys and values of one width, but tensors of {key_states.shape[-1]} and "
                f"{value_states.shape[-1]} channels, from which it makes them"
            )
        self.heads = key_states.shape[1]
        super().update(key_states, value_states, *args, **kwargs)
        return _UntouchedKV(self), _UntouchedKV(self)

    def append(self, incoming: Incoming) -> None:
        super().append(incoming)
        self.shown = incoming


def modules_by_layer(model: PreTrainedModel, stock: list[Any]) -> list[nn.Module]:
    """The attention module of each layer of a model that a compressed cache can serve.

    Args:
        model: a decoder of transformers.
        stock: layers of the cache the library would make for it.

    Raises:
        OptionError: a layer keeps something other than keys and values, or attends in a way of its own.

    Example:
        >>> from refimpl.lab.models import small
        >>> model = small.load("llama-small")
        >>> [type(module).__name__ for module in modules_by_layer(model, DynamicCache(config=model.config).layers)]
        ['LlamaAttention', 'LlamaAttention']
    """
    name = type(model).__name__
    found: dict[Any, nn.Module] = {module.layer_idx: module for module in attention_modules(model)}
    for index, layer in enumerate(stock):
        kind = type(layer).__name__
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise OptionError(
                f"model: layer {index} of {name} is served by a {kind} of transformers (a recurrent state, a shared cache, "
                "or an index), not by keys and values of its own; a compressed cache takes models in which every layer "
                "attends, so use the library's own cache"
            )
        if index not in found:
            others = (f" ({type(m).__name__})" for m in model.modules() if getattr(m, "layer_idx", None) == index)
            raise OptionError(
                f"model: layer {index} of {name}{next(others, '')} cannot use a compressed cache: {_ELSEWHERE}; use the "
                "library's own cache"
            )
    if not any(type(layer) is DynamicLayer for layer in stock):
        raise OptionError(f"model: {name} has no layer with full attention whose cache could be compressed")
    return [found[index] for index in range(len(stock))]


def meet(model: PreTrainedModel, modules: list[nn.Module], stock: list[Any]) -> dict[int, Met]:
    """What each layer with full attention gives to its cache; from one pass of the model, the first time it is asked.

    Args:
        model: a decoder of transformers; it, and the state of random numbers, stay as they are.
        modules: of `modules_by_layer`.
        stock: layers of the cache the library would make for it.

    Raises:
        OptionError: a layer that a compressed cache cannot serve; the message names it and the reason.

    Example:
        >>> from refimpl.lab.models import small
        >>> model = small.load("llama-small")
        >>> stock = DynamicCache(config=model.config).layers
        >>> meet(model, modules_by_layer(model, stock), stock)[0].keys.shape[2] == TOKENS
        True
    """
    full = [index for index, layer in enumerate(stock) if type(layer) is DynamicLayer]
    if not all(hasattr(modules[index], _MET) for index in full):
        for index, found in _tried(model, modules, full).items():
            setattr(modules[index], _MET, found)
    return {index: getattr(modules[index], _MET) for index in full}


@torch.no_grad()
def _tried(model: PreTrainedModel, modules: list[nn.Module], full: list[int]) -> dict[int, Met]:
    cache = DynamicCache(config=model.config)
    layers = {index: _TrialLayer(1, streamed=True) for index in full}
    for index, layer in layers.items():
        cache.layers[index] = layer
    current = full[0]

    def show(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        nonlocal current
        current = index
        hidden = attention_input(args, kwargs)
        # one vector, the same at all positions: its keys differ by what their positions do to them
        same = torch.arange(hidden.shape[-1], device=hidden.device).mul(1.7).sin().to(hidden.dtype).expand_as(hidden)
        if not any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise OptionError("it is not given the cache")
        layers[index].expect(module, same, attention_rotation(kwargs))
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": same}
        return (same, *args[1:]), kwargs

    handles = [
        modules[index].register_forward_pre_hook(functools.partial(show, index), with_kwargs=True) for index in full
    ]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=model.device)
    before = model.config._attn_implementation
    if before != NAME:
        model.set_attn_implementation(NAME)
    devices = [model.device] if model.device.type == "cuda" else []
    training = any(module.training for module in model.modules())
    try:
        for current in full:
            if modules[current].config._attn_implementation != NAME:  # type: ignore[union-attr]
                raise OptionError(_ELSEWHERE)  # it cannot be set
        current = full[0]
        with torch.random.fork_rng(devices, enabled=training):  # dropout draws numbers
            model.base_model(input_ids=ids, use_cache=True, **cache_argument(cache))
        for current in full:
            if layers[current].shown is None:
                raise OptionError(_ELSEWHERE)
    except Exception as error:
        reason = (
            str(error).partition("; use ")[0] if isinstance(error, OptionError) else f"{type(error).__name__}: {error}"
        )
        raise OptionError(
            f"model: layer {current} of {type(model).__name__} ({type(modules[current]).__name__}) cannot use a compressed "
            f"cache: {' '.join(reason.split())}; use the library's own cache"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        if before != NAME:
            model.set_attn_implementation(before)
    return {i: Met(layer.shown.keys, layer.shown.query.shape[1]) for i, layer in layers.items() if layer.shown}
