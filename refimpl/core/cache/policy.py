"""Base class of cache-compression policies: frozen dataclasses that make the layers of a cache and know their cost."""

from __future__ import annotations

import abc
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from refimpl.core.arguments import Checked, checked, shown
from refimpl.core.cache.content import ByContent, current_modules, from_json, load_described, seal, to_json
from refimpl.core.cache.layer import KVLayer
from refimpl.core.cache.rope import Rotary
from refimpl.core.errors import CheckpointError, OptionError, reading
from refimpl.core.files.io import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refimpl.core.cache.host import CompressedCache

P = TypeVar("P", bound="Policy")
_ABOUT, _FORMAT = "refimpl-policy", 1


@dataclass(frozen=True)
class LayerShape:
    """One attention layer as a policy sees it before any token.

    Attributes:
        index: of the layer in the model.
        module: its attention module (a policy may want its projections).
        heads: key/value heads.
        groups: query heads that share each of them.
        head_dim: width of a head.
        dtype: of keys and values as they are computed.
        rotary: how the layer turns queries and keys by their positions; None if the model has no rotary embedding, or
            none that can be computed again from positions.
        stored: what keys and values count as (`refimpl.core.stored`); None: their dtype.
        owner: class of the model, for messages.
        shown: keys of one vector at positions 0, 1, ..., as the layer turned them, [1, H, n, d] (`refimpl.core.cache.trial`);
            None if that was not asked.
    """

    index: int
    module: torch.nn.Module
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    rotary: Rotary | None
    stored: torch.dtype | None = None
    owner: str = "the model"
    shown: Tensor | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one number of a key or value, as stored."""
        return (self.stored or self.dtype).itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, uncompressed."""
        return 2 * self.heads * self.head_dim * self.itemsize

    def rotation(self, policy: Policy) -> Rotary:
        """How the layer turns queries and keys, for policies that turn them themselves.

        Raises:
            OptionError: in no way that can be computed again from positions.
        """
        found = self.rotary if self.rotary is None or self.shown is None else self.rotary.seen_in(self.shown)
        if found is None:
            raise OptionError(
                f"model: {type(policy).__name__} turns keys by their positions, but layer {self.index} of {self.owner} "
                f"({type(self.module).__name__}) has no rotary embedding that depends on positions alone and turns the "
                "first channels in pairs; use a policy that works on keys as they come, such as KIVI or SnapKV"
            )
        return found


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


def check_decoder(model: object) -> None:
    """Raise `OptionError` unless `model` is a model of transformers.

    Example:
        >>> check_decoder(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: model=Linear(in_features=2, out_features=2, bias=True): pass a decoder of transformers
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise OptionError(f"model={shown(model)}: pass a decoder of transformers")


class UpTo(Sequence["int | None"]):
    """The whole numbers from one to another and then None, for all: `Policy.settings` of a capacity, not written out.

    Example:
        >>> list(UpTo(2, 4)), len(UpTo(1, 10**12))
        ([2, 3, 4, None], 1000000000001)
    """

    def __init__(self, first: int, last: int) -> None:
        self.whole = range(first, last + 1)

    def __len__(self) -> int:
        return len(self.whole) + 1

    def __getitem__(self, place: Any) -> Any:
        return None if place in (-1, len(self.whole)) else self.whole[place]


@dataclass(frozen=True)
class Policy(Checked, ByContent, abc.ABC):
    """Base class of cache-compression policies; a subclass is a frozen dataclass of hyper-parameters.

    Tensors (fitted factors, say) may be among them: see `ByContent` and `save`. The stages of its life have the same
    names for every policy: `fit` learns what it needs from calibration tokens, `cache` makes a cache for a model within
    a budget of bytes, `save` and `load` keep it.

    Attributes:
        prefills: how a prompt may be taken in, the default first. "exact": it is attended to uncompressed and
            compressed when it ends. "streamed": its tokens are compressed as they come, as if each had been decoded, so
            memory is bounded at any length and every query feels the compression.
        knob: the field that a budget sets; None if there is nothing to set.
    """

    prefills: ClassVar[tuple[str, ...]] = ("exact", "streamed")
    knob: ClassVar[str | None] = None

    @abc.abstractmethod
    def layer(self, shape: LayerShape, streamed: bool) -> KVLayer:
        """A fresh layer.

        Raises:
            OptionError: the policy cannot work on a layer of this shape.
        """

    @abc.abstractmethod
    def nbytes(self, shape: LayerShape, length: int) -> int:
        """Bytes one layer keeps, as stored, of one sequence after a prompt of ``length`` tokens that has ended."""

    def settings(self, shapes: Sequence[LayerShape], length: int) -> Sequence[Any]:
        """Values of `knob` from the fewest bytes to the most; with the last one nothing is given up."""
        raise NotImplementedError

    def fit(self: P, model: PreTrainedModel, tokens: Any) -> P:
        """Learn factors, bases or whatever else the policy needs of a model, from calibration tokens.

        Policies without anything to learn return themselves; the others take further options.

        Args:
            model: a decoder of transformers; not changed.
            tokens: token ids int [sequences, length], without padding.

        Returns:
            The policy, ready for caches of this model.
        """
        return self

    def within_budget(self, shapes: Sequence[LayerShape], nbytes: int, length: int) -> Policy:
        """This policy with its `knob` at the largest setting that fits.

        Args:
            shapes: the layers to be compressed.
            nbytes: bytes they may keep together of one sequence of ``length`` tokens.
            length: tokens.

        Raises:
            OptionError: not even the smallest setting fits; the message says how many bytes that needs.
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

    @checked()
    def cache(
        self,
        model: PreTrainedModel,
        *,
        budget: float | None = None,
        bytes_per_token: float | None = None,
        length: int | None = None,
        prefill: str | None = None,
    ) -> CompressedCache:
        """An empty cache for a model, ready for ``model.generate(..., **cache_argument(cache))``.

        The model's attention is set to "refimpl", which equals "sdpa" for every other cache. Layers that attend to a
        sliding window keep the cache the library gives them: it is bounded already. The first cache for a model takes one
        pass over four tokens, in which its layers show how they use a cache.

        Args:
            model: a decoder of transformers.
            budget: bytes allowed, as a share of the full cache of the layers that are compressed; 1.0 gives nothing up, of
                longer texts than ``length`` neither.
            bytes_per_token: the same in bytes per token, all compressed layers together.
            length: tokens at which the budget is to be met (windows and sinks count).
            prefill: "exact" or "streamed"; None: as in the paper.

        Raises:
            OptionError: a budget that cannot be met (says the least that can), a mode the policy does not have, or a
                model with a layer that no cache of ours, or not this policy, can serve (names the layer and the reason).

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from refimpl.baselines.kvcache import SnapKV
            >>> from refimpl.core.cache import cache_argument
            >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16,
            ...     intermediate_size=16, vocab_size=50))
            >>> cache = SnapKV(window=4).cache(model, budget=0.5, length=64)
            >>> _ = model.generate(torch.ones(1, 64, dtype=torch.long), **cache_argument(cache), max_new_tokens=2)
            >>> cache.layers[0].nbytes <= 0.5 * 64 * 2 * 16 * 4 + 1 * 2 * 16 * 4   # and one token decoded since
            True
        """
        from refimpl.core.cache.host import CompressedCache

        check_decoder(model)
        return CompressedCache(model, self, budget, bytes_per_token, length, prefill)

    def config(self) -> dict[str, Any]:
        """The hyper-parameters as JSON; a digest stands for each tensor."""
        return {field.name: to_json(getattr(self, field.name), name=field.name) for field in fields(self)}

    @checked()
    def save(self, path: str | Path) -> None:
        """Write the policy to a safetensors file, tensors included (fitted factors, trained bases).

        Tensors may be fields, or stand in tuples, lists, dictionaries and dataclasses; one that occurs twice is
        written once.

        Args:
            path: the file.

        Raises:
            OptionError: a field holds something other than numbers, texts, tensors and containers of these.

        Example:
            >>> import tempfile, pathlib
            >>> from refimpl.baselines.kvcache import SnapKV
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "policy.safetensors"
            >>> SnapKV(capacity=64).save(path)
            >>> Policy.load(path)
            SnapKV(capacity=64, window=32, kernel=5)
        """
        tensors: dict[str, Tensor] = {}
        about = {"format": _FORMAT} | to_json(self, tensors)
        with atomic_write(path) as temporary:
            # safetensors refuses tensors that share memory: a view is copied
            save_file(
                {name: tensor.clone() for name, tensor in tensors.items()}, temporary, {_ABOUT: seal(about, tensors)}
            )

    @classmethod
    def load(cls: type[P], path: str | Path, device: torch.device | str = "cpu") -> P:
        """Read a policy written by `save`.

        Args:
            path: the file.
            device: where its tensors go.

        Raises:
            CheckpointError: not a policy of ours, damaged, of another kind, or of a class that is not known here.
        """
        about, tensors = load_described(path, _ABOUT, "policy", device)
        with reading(f"path={str(path)!r}", "save the policy again"):
            if about["format"] != _FORMAT:
                raise CheckpointError(f"path={str(path)!r}: format {about['format']} needs another version of refimpl")
            policy = from_json(about, tensors)
        if not isinstance(policy, cls):
            raise CheckpointError(f"path={str(path)!r} holds a {about['kind']}, not a {cls.__name__}")
        return policy


def policy_from(description: dict[str, Any], given: Policy | None) -> Policy:
    """The policy a saved cache was made with.

    Args:
        description: of `to_json`, perhaps of a release in which the class was in another module.
        given: the policy itself, needed if it has tensors; hyper-parameters and tensors must be the same.

    Raises:
        CheckpointError: the policy is unknown, or another one was given.

    Example:
        >>> policy_from({"kind": "Full", "module": "refimpl.baselines.kvcache.full", "config": {}}, None)
        Full()
    """
    kind, module = description["kind"], description["module"]
    if given is not None:
        found, description = to_json(given), current_modules(description)
        if found != description:
            names = [
                name
                for name in found["config"] | description["config"]
                if found["config"].get(name) != description["config"].get(name)
            ]
            raise CheckpointError(
                f"policy={given!r} is not the one this cache was made with: "
                + (f"another {', '.join(names)}" if found["kind"] == kind else f"a {kind} of {module}")
            )
        return given
    try:
        policy = from_json(description, {})
    except CheckpointError as error:
        raise CheckpointError(
            f"this cache was made with {kind} of {module}, which the file alone does not bring back ({error}); pass "
            "policy="
        ) from error
    assert isinstance(policy, Policy)
    return policy
