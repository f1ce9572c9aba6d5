"""Compressed caches for ``generate``: the cache itself, long prompts in chunks, and files."""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from refimpl.core.arguments import checked, shown
from refimpl.core.cache.attention import NAME, Mask, cache_argument
from refimpl.core.cache.content import load_described, seal, to_json
from refimpl.core.cache.layer import KVLayer
from refimpl.core.cache.policy import LayerShape, Policy, check_decoder, policy_from
from refimpl.core.cache.rope import find_rotary
from refimpl.core.cache.tap import attention_input, attention_modules, attention_rotation
from refimpl.core.cache.trial import Met, meet, modules_by_layer
from refimpl.core.errors import CheckpointError, OptionError, reading, reason
from refimpl.core.files.io import atomic_write
from refimpl.core.stored import stored_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOOKED = "_refimpl_cache_hook"
_ABOUT, _FORMAT = "refimpl-cache", 2


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for given in kwargs.values():  # some models call it `layer_past`
        if isinstance(given, CompressedCache):
            rotation, mask = attention_rotation(kwargs), kwargs.get("attention_mask")
            given._expect(module, attention_input(args, kwargs), rotation, mask)


class CompressedCache(Cache):
    """A cache whose full-attention layers keep less; made by ``policy.cache(model)``, whose arguments it takes.

    It goes where any cache of transformers goes, into a model or ``generate`` (see `cache_argument`), with sampling,
    beams, prompt lookup, left padding and several turns. It belongs to the model it was made for.

    Attributes:
        policy: the policy, set to the budget.
        streamed: whether prompts are compressed as they come.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        budget: float | None = None,
        bytes_per_token: float | None = None,
        length: int | None = None,
        prefill: str | None = None,
    ) -> None:
        stock = DynamicCache(config=model.config).layers
        modules = modules_by_layer(model, stock)
        self._modules = [weakref.ref(module) for module in modules]
        self._model = weakref.ref(model)
        mode = policy.prefills[0] if prefill is None else prefill
        if mode not in policy.prefills:
            raise OptionError(
                f"prefill={prefill!r}: {type(policy).__name__} can do {' or '.join(map(repr, policy.prefills))}"
            )
        self.streamed = mode == "streamed"
        shapes = {
            index: _as_met(self.layer_shape(model, index), met) for index, met in meet(model, modules, stock).items()
        }
        self.policy = _within_budget(policy, list(shapes.values()), budget, bytes_per_token, length)
        layers = [
            self.policy.layer(shapes[index], self.streamed) if index in shapes else layer
            for index, layer in enumerate(stock)
        ]
        self._stored = stored_dtype(model)
        for layer in layers:
            if isinstance(layer, KVLayer):
                layer.stored = self._stored
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        for module in modules:
            if not hasattr(module, _HOOKED):
                setattr(module, _HOOKED, module.register_forward_pre_hook(_before_attention, with_kwargs=True))
        super().__init__(layers=layers)

    @staticmethod
    def layer_shape(model: PreTrainedModel, index: int) -> LayerShape:
        """The attention layer ``index`` of a model as policies see it."""
        config = model.config.get_text_config(decoder=True)
        module: Any = attention_modules(model)[index]
        types = getattr(config, "layer_types", None)
        query_heads = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or query_heads
        head_dim = getattr(module, "head_dim", None) or config.hidden_size // query_heads
        return LayerShape(
            index,
            module,
            heads,
            query_heads // heads,
            head_dim,
            model.dtype,
            find_rotary(model, types[index] if types else None),
            stored_dtype(model),
            owner=type(model).__name__,
        )

    # -- the life of a cache ---------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        if self._layers is None:
            raise OptionError("cache: this one was closed; make a new one with policy.cache(model)")
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers: list[Any] | None = layers

    @property
    def compressed_layers(self) -> list[KVLayer]:
        """The layers a policy made; the others keep a sliding window and are the library's."""
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def _expect(self, module: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Any) -> None:
        index: int = module.layer_idx  # type: ignore[assignment]
        if index >= len(self._modules) or self._modules[index]() is not module:
            raise OptionError(
                "cache: this one was made for another model; make one with policy.cache(model), or save "
                "this one and load it for a model with the same weights"
            )
        used = module.config._attn_implementation  # type: ignore[union-attr]
        if used != NAME:
            raise OptionError(
                f"attn_implementation={used!r} cannot attend to a compressed cache, only {NAME!r} can; call "
                f"model.set_attn_implementation({NAME!r})"
            )
        layer = self.layers[index]
        if not hidden.shape[1]:  # generate cuts off as many ids as the cache holds
            raise OptionError(
                f"input_ids: none is left after the {self.get_seq_length()} tokens that the cache holds; generate takes "
                "the ids of the whole sequence, so pass torch.cat([document, question], 1)"
            )
        if isinstance(mask, Mask):
            mask.check_width()
        if isinstance(layer, KVLayer):
            layer.expect(module, hidden, rotation)

    @contextmanager
    def prompt(self) -> Iterator[CompressedCache]:
        """Take everything fed inside the block as one prompt, whatever the size of its pieces; it ends with the block.

        Outside, a single token counts as decoded and ends the prompt before it.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from refimpl.baselines.kvcache import KIVI
            >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
            ...     intermediate_size=16, vocab_size=50))
            >>> cache = KIVI(bits=4, window=0, group=8, value_group=8).cache(model)
            >>> with cache.prompt():
            ...     for token in range(16):
            ...         _ = model(torch.tensor([[token]]), **cache_argument(cache))
            >>> sorted(cache.layers[0].parts)[:2], cache.get_seq_length()
            (['key_codes', 'key_least'], 16)
        """
        for layer in self.compressed_layers:
            layer.finish()
            layer.hold_open = True
        try:
            yield self
        finally:
            for layer in self.compressed_layers:
                layer.hold_open = False
        self.finish()

    def finish(self) -> None:
        """End an open prompt now: compress it."""
        for layer in self.compressed_layers:
            layer.finish()

    def copy(self) -> CompressedCache:
        """Another cache with the same content; memory is shared until one of the two reads on.

        One document, many questions: prepare once, then give each question a copy.
        """
        self.finish()
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.compressed_layers:
            layer.parts = dict(layer.parts)
            layer._undo = None
        return other

    def close(self) -> None:
        """Give the memory back. Any later use raises `OptionError`."""
        self._layers = None

    # -- bytes -----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor kept, sliding-window layers included; while a prompt is open, it is not compressed.

        As stored: numbers in the dtype of the model count as `refimpl.core.stored.stored_dtype` says, so a model of
        16 bits that is computed in float32 has the cache of a model of 16 bits.
        """
        sliding = [layer for layer in self.layers if not isinstance(layer, KVLayer)]
        numbers = sum(tensor.numel() for layer in sliding for tensor in _layer_state(layer)[0].values())
        return self.compressed_nbytes + numbers * self._stored.itemsize

    @property
    def compressed_nbytes(self) -> int:
        """Bytes kept by the compressed layers; a budget bounds these."""
        return sum(layer.nbytes for layer in self.compressed_layers)

    @property
    def bytes_per_token(self) -> float:
        """`compressed_nbytes` per token and sequence."""
        first = self.compressed_layers[0]
        return self.compressed_nbytes / max(1, first.seen * (first.batch or 1))

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file; an open prompt is ended first.

        Args:
            path: the file.
        """
        self.finish()
        model = self._model()
        if model is None:
            raise OptionError("save: the model of this cache is gone; save while it lives")
        tensors: dict[str, Tensor] = {}
        numbers: list[dict[str, int]] = []
        for index, layer in enumerate(self.layers):
            parts, counts = _layer_state(layer)
            numbers.append(counts)
            # safetensors refuses tensors that share memory: views are copied
            tensors |= {
                f"{index}.{name}": tensor.detach().clone(memory_format=torch.contiguous_format)
                for name, tensor in parts.items()
            }
        about = {
            "format": _FORMAT,
            "model": fingerprint(model),
            "streamed": self.streamed,
            "policy": to_json(self.policy),
            "numbers": numbers,
        }
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {_ABOUT: seal(about, tensors)})

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, policy: Policy | None = None) -> CompressedCache:
        """Read a cache written by `save`, for a model with the same weights.

        Args:
            path: the file.
            model: the model that will use it; tensors go to its device.
            policy: the policy it was made with; needed only if that one has tensors.

        Raises:
            CheckpointError: not a cache of ours, damaged, of another model, or of another policy.
        """
        about, tensors = load_described(path, _ABOUT, "cache", model.device)
        with reading(f"path={str(path)!r}", "save the cache again"):
            if about["format"] != _FORMAT:
                raise CheckpointError(f"path={str(path)!r}: format {about['format']} needs another version of refimpl")
            if about["model"] != fingerprint(model):
                raise CheckpointError(
                    f"path={str(path)!r} is the cache of another model (or of this one with other weights or another "
                    "dtype); prepare it again with this model"
                )
            cache = cls(
                model, policy_from(about["policy"], policy), prefill="streamed" if about["streamed"] else "exact"
            )
            for index, (layer, numbers) in enumerate(zip(cache.layers, about["numbers"], strict=True)):
                start = f"{index}."
                parts = {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
                _set_layer_state(layer, parts, numbers, model)
        return cache


def _as_met(shape: LayerShape, met: Met) -> LayerShape:
    """A shape with what the layer itself showed, which configurations do not always say."""
    heads, _, head_dim = met.keys.shape[1:]
    return replace(shape, heads=heads, groups=met.query_heads // heads, head_dim=head_dim, shown=met.keys)


def _within_budget(
    policy: Policy, shapes: list[LayerShape], budget: float | None, bytes_per_token: float | None, length: int | None
) -> Policy:
    if budget is None and bytes_per_token is None:
        return policy
    if budget is not None and bytes_per_token is not None:
        raise OptionError("budget and bytes_per_token say the same thing in two ways; give one of them")
    if length is None or length < 1:
        raise OptionError(
            f"length={length}: say for how many tokens the budget is, as windows and sinks do not grow with them"
        )
    if budget is not None and not 0 < budget <= 1:
        raise OptionError(f"budget={budget}: use a share of the full cache, above 0 and at most 1")
    if bytes_per_token is not None and bytes_per_token <= 0:
        raise OptionError(f"bytes_per_token={bytes_per_token}: use a positive number")
    full = sum(shape.token_bytes for shape in shapes)
    allowed = int(length * (budget * full if budget is not None else bytes_per_token or 0.0))
    return policy.within_budget(shapes, allowed, length)


def _layer_state(layer: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    if isinstance(layer, KVLayer):
        return layer.state()
    parts = {} if layer.keys is None else {"keys": layer.keys, "values": layer.values}
    return parts, {"cumulative_length": layer.cumulative_length}


def _set_layer_state(layer: Any, parts: dict[str, Tensor], numbers: dict[str, int], model: PreTrainedModel) -> None:
    if isinstance(layer, KVLayer):
        layer.set_state((parts, numbers))
        layer.dtype, layer.device, layer.is_initialized = model.dtype, model.device, bool(parts)
    elif parts:
        layer.lazy_initialization(parts["keys"], parts["values"])
        layer.keys, layer.values = parts["keys"], parts["values"]
        layer.cumulative_length = numbers["cumulative_length"]


def fingerprint(model: nn.Module) -> str:
    """A digest of everything a model's caches depend on: weights (a sample of each), dtypes, positions.

    Example:
        >>> a, b = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
        (True, False)
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    for name in ("model_type", "layer_types", "sliding_window", "rope_parameters"):
        digest.update(f"{name}={getattr(config, name, None)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@checked()
@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: CompressedCache,
    input_ids: Tensor,
    chunk: int = 512,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Feed a prompt in chunks, so that activations never grow with its length, and compress it at its end.

    The result is that of one piece. In "exact" mode the uncompressed keys and values of the prompt stand in memory
    until its end; in "streamed" mode never.

    ``generate`` takes the ids of the whole sequence afterwards, the document's again in front of the question's, and skips
    as many as the cache holds. A short question alone leaves none to feed and is refused; it cannot be noticed that a long
    one begins with other ids than the document's.

    Args:
        model: the model of the cache.
        cache: takes the prompt in, after the tokens it holds.
        input_ids: int [B, T].
        chunk: tokens at a time.
        attention_mask: 1 for real tokens, [B, tokens the cache holds + T]; None if there is no padding.

    Returns:
        Logits of the last token, [B, vocabulary].

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl.baselines.kvcache import StreamingLLM
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
        ...     intermediate_size=16, vocab_size=50))
        >>> cache = StreamingLLM(sinks=4, window=28).cache(model)
        >>> prefill(model, cache, torch.ones(1, 300, dtype=torch.long), chunk=100).shape, cache.nbytes
        (torch.Size([1, 50]), 4112)
    """
    check_decoder(model)
    if chunk < 1:
        raise OptionError(f"chunk={chunk}: use 1 or more tokens")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        raise OptionError(f"input_ids={shown(input_ids)}: use whole numbers [sequences, tokens]")
    if input_ids.shape[1] == 0:
        raise OptionError("input_ids has no token; feed at least one")
    before = cache.get_seq_length()
    if attention_mask is not None and attention_mask.dim() != 2:
        raise OptionError(f"attention_mask={shown(attention_mask)}: use 1 and 0, [sequences, tokens]")
    if attention_mask is not None and attention_mask.shape[1] != before + input_ids.shape[1]:
        raise OptionError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but the cache and the prompt have "
            f"{before + input_ids.shape[1]}; pass the mask of the whole sequence"
        )
    with cache.prompt():
        for first in range(0, input_ids.shape[1], chunk):
            last = min(first + chunk, input_ids.shape[1])
            inputs: dict[str, Any] = {}
            if attention_mask is not None:
                known = attention_mask[:, : before + last]
                inputs["attention_mask"] = known
                inputs["position_ids"] = (known.long().cumsum(-1) - 1).clamp(min=0)[:, before + first :]
            try:
                out = model(input_ids[:, first:last], logits_to_keep=1, **cache_argument(cache), **inputs)
            except IndexError as error:
                raise OptionError(f"input_ids: {reason(error)}; use the model's own tokenizer") from error
    return out.logits[:, -1]
