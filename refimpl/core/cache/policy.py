"""What a way of keeping less is: a frozen dataclass that makes the layers of a cache and knows what they cost."""

from __future__ import annotations

import abc
import hashlib
import importlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from refimpl.core.cache.layer import KVLayer
from refimpl.core.cache.rope import Rotary
from refimpl.core.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refimpl.core.cache.host import CompressedCache


@dataclass(frozen=True)
class LayerShape:
    """One attention layer as a policy sees it before any token.

    Attributes:
        index: of the layer in the model.
        module: its attention module (a policy may want its projections).
        heads: key/value heads.
        groups: query heads that share each of them.
        head_dim: width of a head.
        dtype: of keys and values.
        rotary: the model's rotary embedding for this layer; None if keys are not rotated, or not in the usual way.
    """

    index: int
    module: torch.nn.Module
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    rotary: Rotary | None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, uncompressed."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize

    def rotation(self, policy: Policy) -> Rotary:
        """The rotary embedding, for policies that turn keys themselves.

        Raises:
            OptionError: this model has none that can be recomputed from positions.
        """
        if self.rotary is None:
            raise OptionError(
                f"model: {type(policy).__name__} turns keys by their positions, but layer {self.index} "
                f"({type(self.module).__name__}) has no rotary embedding that depends on positions alone; use a "
                "policy that works on keys as they come, such as KIVI or SnapKV"
            )
        return self.rotary


def check_rank(name: str, rank: int, shape: LayerShape) -> None:
    """Raise `OptionError` unless ``1 <= rank <= head_dim``.

    Example:
        >>> check_rank("channels", 80, LayerShape(0, torch.nn.Identity(), 2, 2, 64, torch.bfloat16, None))
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: channels=80: the heads of layer 0 have 64 channels; use 1 to 64
    """
    if not 1 <= rank <= shape.head_dim:
        raise OptionError(
            f"{name}={rank}: the heads of layer {shape.index} have {shape.head_dim} channels; use 1 to {shape.head_dim}"
        )


@dataclass(frozen=True)
class Policy(abc.ABC):
    """Base of all ways of keeping a compressed cache; a subclass is a frozen dataclass of hyper-parameters.

    Attributes:
        prefills: how a prompt may be taken in, the default first. "exact": it is attended to as it came and compressed
            when it ends. "streamed": its tokens are compressed as they come, as if each had been decoded, so memory
            is bounded at any length and every query feels the compression.
        knob: the field that a budget sets; None if there is nothing to set.
        kinds: all policies by class name, for caches read from files.
    """

    prefills: ClassVar[tuple[str, ...]] = ("exact", "streamed")
    knob: ClassVar[str | None] = None
    kinds: ClassVar[dict[str, type[Policy]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Policy.kinds[cls.__name__] = cls

    @abc.abstractmethod
    def layer(self, shape: LayerShape, streamed: bool) -> KVLayer:
        """A fresh layer.

        Raises:
            OptionError: the policy cannot work on a layer of this shape.
        """

    @abc.abstractmethod
    def nbytes(self, shape: LayerShape, length: int) -> int:
        """Bytes one layer keeps of one sequence after a prompt of ``length`` tokens that has ended."""

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[Any]:
        """Values of `knob` from the fewest bytes to the most; with the last one nothing is given up."""
        raise NotImplementedError

    def fit(self, shapes: Sequence[LayerShape], nbytes: int, length: int) -> Policy:
        """This policy with its `knob` at the most that fits.

        Args:
            shapes: the layers to be compressed.
            nbytes: what they may keep together of one sequence of ``length`` tokens.
            length: tokens.

        Raises:
            OptionError: not even the least fits; the message says what the least is.
        """
        full = length * sum(shape.token_bytes for shape in shapes)
        if self.knob is None:
            values: Sequence[Any] = [None]
            tuned = lambda value: self  # noqa: E731
        else:
            values = self.settings(shapes, length)
            tuned = lambda value: replace(self, **{str(self.knob): value})  # noqa: E731

        def cost(value: Any) -> int:
            return sum(tuned(value).nbytes(shape, length) for shape in shapes)

        if nbytes >= full:
            return tuned(values[-1])
        best = bisect_right(values, nbytes, key=cost) - 1
        if best < 0:
            least = cost(values[0])
            how = f" ({self.knob}={values[0]!r})" if self.knob else ""
            raise OptionError(
                f"budget: {nbytes} bytes for {length} tokens ({nbytes / full:.1%} of the full cache) are too few for "
                f"{self!r}; the least it can do is {least} bytes ({least / full:.1%}){how}"
            )
        return tuned(values[best])

    def cache(
        self,
        model: PreTrainedModel,
        *,
        budget: float | None = None,
        bytes_per_token: float | None = None,
        length: int | None = None,
        prefill: str | None = None,
    ) -> CompressedCache:
        """An empty cache for a model, ready for ``model.generate(..., past_key_values=cache)``.

        The model's attention is set to "refimpl", which equals "sdpa" for every other cache. Layers that attend to a
        sliding window keep the cache the library gives them: it is bounded already.

        Args:
            model: a decoder of transformers.
            budget: bytes allowed, as a share of the full cache of the layers that are compressed; 1.0 gives nothing up.
            bytes_per_token: the same in bytes per token, all compressed layers together.
            length: tokens at which the budget is to be met (windows and sinks count).
            prefill: "exact" or "streamed"; default: what the paper does.

        Raises:
            OptionError: a budget that cannot be met (says what the least is), a model or mode that cannot work.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from refimpl.baselines.kvcache import SnapKV
            >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
            ...     intermediate_size=16, vocab_size=50))
            >>> cache = SnapKV(window=4).cache(model, budget=0.5, length=64)
            >>> _ = model.generate(torch.ones(1, 64, dtype=torch.long), past_key_values=cache, max_new_tokens=2)
            >>> cache.layers[0].nbytes <= 0.5 * 64 * 2 * 16 * 4 + 1 * 2 * 16 * 4   # and one token decoded since
            True
        """
        from refimpl.core.cache.host import CompressedCache

        return CompressedCache(model, self, budget, bytes_per_token, length, prefill)

    def config(self) -> dict[str, Any]:
        """The hyper-parameters as JSON; tensors stand in by their digest."""

        def plain(value: Any) -> Any:
            if isinstance(value, Tensor):
                data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                return f"sha256:{hashlib.sha256(data).hexdigest()}"
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            if isinstance(value, dict):
                return {str(key): plain(item) for key, item in value.items()}
            return value

        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}


def policy_from(description: dict[str, Any], given: Policy | None) -> Policy:
    """The policy a saved cache was made with.

    Args:
        description: "kind", "module" and "config" as saved.
        given: the policy itself, needed if it has tensors; its hyper-parameters must be the saved ones.

    Raises:
        CheckpointError: the policy is unknown, or another one was given.

    Example:
        >>> policy_from({"kind": "Full", "module": "refimpl.baselines.kvcache.full", "config": {}}, None)
        Full()
    """
    kind, module = description["kind"], description["module"]
    if given is not None:
        if type(given).__name__ != kind or given.config() != description["config"]:
            raise CheckpointError(
                f"policy={given!r} is not the one this cache was made with: {kind} {description['config']}"
            )
        return given
    if kind not in Policy.kinds and module.startswith("refimpl."):
        importlib.import_module(module)
    if kind not in Policy.kinds or "sha256:" in str(description["config"]):
        raise CheckpointError(
            f"this cache was made with {kind} of {module}, which cannot be rebuilt from a file; pass policy="
        )
    return Policy.kinds[kind](**description["config"])
