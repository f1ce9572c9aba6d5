"""Read or change hidden states, queries, keys and values on their way through a model's attention layers.

- `attention_modules`: the layers themselves.
- `hidden_states`: their inputs, before the projections.
- `tapped`: keys (rotated) and values on their way into attention, which may be changed; gradients pass.
- `Recording`: everything at once, queries included, as a layer of a compressed cache sees it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from refimpl.core.arguments import shown
from refimpl.core.cache.layer import Incoming, TailLayer
from refimpl.core.cache.policy import LayerShape, Policy
from refimpl.core.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a decoder of transformers, in the order of its layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> [type(module).__name__ for module in attention_modules(model)], attention_modules(nn.Linear(2, 2))
        (['LlamaAttention', 'LlamaAttention'], [])
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model={shown(model)}: pass a decoder of transformers")
    found: dict[Any, nn.Module] = {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal") and hasattr(module, "config")
    }
    return [found[index] for index in sorted(found)]


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the layers that attend to all tokens; the cache of a sliding window is bounded already.

    Raises:
        OptionError: there is none.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> full_attention_layers(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2,
        ...     hidden_size=16, intermediate_size=16, vocab_size=50)))
        [0, 1]
    """
    stock = DynamicCache(config=model.config).layers
    found = [index for index, layer in enumerate(stock) if type(layer) is DynamicLayer]
    if not found:
        raise OptionError(
            f"model: {type(model).__name__} has no layer with full attention whose cache could be compressed"
        )
    return found


def attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [B, n, h] among the arguments of an attention module.

    Example:
        >>> attention_input((), {"hidden_states": 1}), attention_input((2,), {})
        (1, 2)
    """
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def attention_rotation(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Cos and sin among the arguments of an attention module, or None.

    Example:
        >>> import torch
        >>> attention_rotation({}), attention_rotation({"position_embeddings": torch.tensor(3 + 4j)})
        (None, (tensor(3.), tensor(4.)))
    """
    given = kwargs.get("position_embeddings")
    if isinstance(given, Tensor) and given.is_complex():  # Llama 4, DeepSeek
        return given.real, given.imag
    return given if isinstance(given, tuple) else None


@contextmanager
def hidden_states(modules: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Collect the inputs of attention modules while the block runs.

    Args:
        modules: some of `attention_modules`.

    Yields:
        A list for each module, to which each of its calls appends its hidden states [B, n, h].

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> with hidden_states(attention_modules(model)) as seen:
        ...     _ = model(torch.ones(2, 5, dtype=torch.long))
        >>> seen[0][0].shape
        torch.Size([2, 5, 16])
    """
    seen: list[list[Tensor]] = [[] for _ in modules]

    def look(calls: list[Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(attention_input(args, kwargs))

    handles = [
        module.register_forward_pre_hook(functools.partial(look, calls), with_kwargs=True)
        for module, calls in zip(modules, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


Change = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Index of a layer, its rotated keys and its values, [B, H, n, d] each, to the ones that attention is to see."""


class TappedLayer(CacheLayerMixin):
    """A layer of a cache that stores nothing and hands keys and values through a function."""

    is_sliding = False

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.change = change

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.change(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def tapped(model: PreTrainedModel, change: Change) -> DynamicCache:
    """A cache for one forward pass that passes the keys and values of full-attention layers through a function.

    A cache is where keys arrive after their norm and RoPE. Nothing is stored, so it serves one pass only.

    Args:
        model: a decoder of transformers.
        change: see `Change`; to look only, let it return its arguments.

    Example:
        >>> import torch
        >>> from refimpl.core.cache import cache_argument
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> def look(layer, keys, values):
        ...     print(layer, tuple(keys.shape))
        ...     return keys, values
        >>> _ = model(torch.ones(1, 5, dtype=torch.long), **cache_argument(tapped(model, look)))
        0 (1, 2, 5, 8)
        1 (1, 2, 5, 8)
    """
    cache = DynamicCache(config=model.config)
    for index in full_attention_layers(model):
        cache.layers[index] = TappedLayer(functools.partial(change, index))
    return cache


class RecordingLayer(TailLayer):
    """An uncompressed layer that remembers all tokens it was shown.

    Attributes:
        shown: one entry for each forward pass since the list was last emptied.
    """

    def __init__(self, heads: int, streamed: bool) -> None:
        super().__init__(heads, streamed)
        self.shown: list[Incoming] = []

    def append(self, incoming: Incoming) -> None:
        super().append(incoming)
        self.shown = [*self.shown, incoming]

    def take(self) -> list[Incoming]:
        """Everything shown since the last call; the list is emptied."""
        shown, self.shown = self.shown, []
        return shown


@dataclass(frozen=True)
class Recording(Policy):
    """Keep everything, and record what each layer is shown: queries, keys, values and hidden states.

    Example:
        >>> import torch
        >>> from refimpl.core.cache import cache_argument
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> cache = Recording().cache(model)
        >>> _ = model(torch.ones(1, 5, dtype=torch.long), **cache_argument(cache))
        >>> [(shown.query.shape, shown.hidden.shape) for shown in cache.layers[0].take()]
        [(torch.Size([1, 2, 5, 8]), torch.Size([1, 5, 16]))]
    """

    def layer(self, shape: LayerShape, streamed: bool) -> RecordingLayer:
        return RecordingLayer(shape.heads, streamed)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        return length * shape.token_bytes
