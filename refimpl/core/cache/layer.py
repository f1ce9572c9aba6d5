"""One layer of a compressed cache: everything that policies share, so that a policy is only its rule.

Every tensor a layer keeps is in `parts`, rows of the batch first. Reordering, repeating, selecting, copying,
moving, saving and counting bytes are then the same few lines for all policies. Tensors are replaced, never written
into, so a copy of a cache shares its memory until one of the two goes on.

A layer meets tokens in one of two ways. A *prompt* is attended to exactly as it came, in one piece or in chunks, and
compressed when it ends: with the first single token after it, or on `CompressedCache.finish`. *Decoded* tokens are
compressed as they come, at points that depend on how many tokens went before and never on how they were fed.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from refimpl.core.cache.attention import DeferredKV, Dense, Mask, Segment, attend, plain, single
from refimpl.core.cache.rope import Rotary
from refimpl.core.device import read
from refimpl.core.errors import OptionError

ENDLESS = 1 << 62


@dataclass(frozen=True)
class Incoming:
    """The tokens that one forward pass, or a piece of it, brings to one layer (B rows, N tokens).

    Attributes:
        module: the attention module.
        query: [B, Hq, N, d], rotated.
        keys, values: [B, H, N, d]; keys are rotated.
        hidden: [B, N, width], input of the attention module and so of its projections.
        rotation: cos and sin as the module was given them, [B or 1, N, r] each, whether or not it uses them (see
            `Rotary`); None in models without RoPE.
        slots: places of the tokens in the sequence as it was fed, padding included.
        mask: the rule of which slots a query sees; `valid` comes from it.
        scaling, softcap: of the attention scores.
    """

    module: torch.nn.Module
    query: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor
    rotation: tuple[Tensor, Tensor] | None
    slots: range
    mask: Mask
    scaling: float
    softcap: float | None

    def piece(self, first: int, last: int) -> Incoming:
        """Tokens ``first`` to ``last`` - 1 of these."""
        if (first, last) == (0, len(self.slots)):
            return self
        rotation = self.rotation and (self.rotation[0][..., first:last, :], self.rotation[1][..., first:last, :])
        return replace(
            self,
            query=self.query[:, :, first:last],
            keys=self.keys[:, :, first:last],
            values=self.values[:, :, first:last],
            hidden=self.hidden[:, first:last],
            rotation=rotation,
            slots=self.slots[first:last],
        )

    @property
    def valid(self) -> Tensor | None:
        """True for real tokens, bool [B, N]; None if the batch has no padding."""
        return self.mask.valid(self.slots)

    def check(self, rotary: Rotary, seen: int) -> None:
        """Raise `OptionError` unless the model gives these tokens the angles that ``rotary`` does.

        Single tokens after the first are taken on trust: they would cost a wait for the device each.

        Args:
            rotary: of the layer.
            seen: slots of the layer before these tokens.
        """
        if self.rotation is not None and (not seen or len(self.slots) > 1):
            rotary.check(self.mask.positions(self.slots), self.rotation, self.valid)


class KVLayer(CacheLayerMixin, abc.ABC):
    """Base class of the layers of a `CompressedCache`.

    A subclass defines `append`, `segments` and `crop_to`, and if it has something to compress `finish_prompt`,
    `compress_decoded` and `tokens_until_compress`.

    Attributes:
        parts: every tensor kept, [B, ...].
        seen: slots so far.
        prompt_open: a prompt is being read, and its tokens are uncompressed.
        numbers: names of the integer attributes that belong to the state, beside `parts`.
        needs_mass: `compress_decoded` and `observe` are to be told how much attention each entry received.
        wide: names of the parts that are fp32 in every model.
        stored: what the other floating parts count as (`refimpl.core.stored`); None: their own dtype.
    """

    is_sliding = False
    is_croppable = True  # the tokens of the last forward pass can always be taken back, see `crop`
    numbers: ClassVar[tuple[str, ...]] = ("seen", "prompt_open")
    needs_mass: ClassVar[bool] = False
    wide: ClassVar[tuple[str, ...]] = ()
    stored: torch.dtype | None = None  # set by the cache
    _call: Any = None  # arguments of `expect`
    _states: Any = None  # keys and values of `update`
    _undo: Any = (
        None  # while recording: the state before the last forward pass, its tokens, and whether they are decoded
    )

    def __init__(self, heads: int, streamed: bool) -> None:
        super().__init__()
        self.heads, self.streamed = heads, streamed
        self.record_past = False
        self.reset()

    # -- defined by a policy ----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def append(self, incoming: Incoming) -> None:
        """Take tokens in, before they are attended to; `seen` is advanced afterwards."""

    @abc.abstractmethod
    def segments(self, incoming: Incoming) -> list[Segment]:
        """All entries, those of ``incoming`` included, in the order in which attention mass is reported."""

    @abc.abstractmethod
    def crop_to(self, length: int) -> None:
        """Forget all slots from ``length`` on, further back than the last forward pass; or refuse."""

    def observe(self, incoming: Incoming, mass: Tensor | None) -> None:
        """Take note of a chunk of a prompt that has been attended to; nothing may be compressed yet."""

    def finish_prompt(self) -> None:
        """Compress the prompt that has ended."""

    def compress_decoded(self, incoming: Incoming, mass: Tensor | None) -> None:
        """Compress after decoded tokens have been attended to."""

    def tokens_until_compress(self) -> int:
        """Decoded tokens that may be attended to before `compress_decoded` must be called, at least 1."""
        return ENDLESS

    # -- what transformers calls -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def expect(self, module: torch.nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> None:
        """Take note of the arguments of the attention module; called just before `update`."""
        self._call = module, hidden, rotation

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            raise OptionError("cache: this one was made for another model; make one with policy.cache(model)")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.dtype != self.dtype:
            raise OptionError(
                f"cache holds {self.dtype}, but the model now computes {key_states.dtype}; make a new cache"
            )
        rows = self.batch
        if rows not in (None, key_states.shape[0]):
            raise OptionError(
                f"cache holds {rows} sequences, but {key_states.shape[0]} came; call its "
                f"batch_repeat_interleave (beams and several answers need one row each)"
            )
        self._states = key_states, value_states
        return DeferredKV(self), DeferredKV(self)

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Mask, scaling: float, softcap: float | None
    ) -> Tensor:
        """Take in the tokens that `update` brought and attend to all entries: [B, Hq, N, d]."""
        (_, hidden, rotation), (keys, values) = self._call, self._states
        self._call = self._states = None
        incoming = Incoming(
            module,
            query,
            keys,
            values,
            hidden,
            rotation,
            range(self.seen, self.seen + keys.shape[2]),
            mask,
            scaling,
            softcap,
        )
        decoded = self.streamed or (not self.hold_open and (keys.shape[2] == 1 or (self.record_past and self.seen > 0)))
        if self.record_past:
            self._undo = self.state(), incoming, decoded
        return self._run(incoming, decoded)

    def _run(self, incoming: Incoming, decoded: bool, replayed: bool = False) -> Tensor:
        quiet = replayed and not self.needs_mass  # nobody reads the output of a replay
        if not decoded:
            self.append(incoming)
            self.seen = incoming.slots.stop
            self.prompt_open = True
            out, mass = (incoming.query, None) if quiet else self.attention(incoming)
            self.observe(incoming, mass)
            return out
        self.finish()
        outputs, first, length = [], 0, len(incoming.slots)
        while first < length:
            last = min(length, first + max(1, self.tokens_until_compress()))
            piece = incoming.piece(first, last)
            self.append(piece)
            self.seen = piece.slots.stop
            out, mass = (piece.query, None) if quiet else self.attention(piece)
            outputs.append(out)
            self.compress_decoded(piece, mass)
            first = last
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    def attention(self, incoming: Incoming) -> tuple[Tensor, Tensor | None]:
        """Attention of the incoming tokens to all entries; a policy overrides it where it has a kernel.

        Returns:
            Output [B, Hq, N, d], and the attention each entry received, fp32 [B, H, n] (None unless `needs_mass`).
        """
        segments = self.segments(incoming)
        whole = segments[0]
        if (
            len(segments) == 1
            and type(whole) is Dense
            and whole.window is None
            and not self.needs_mass
            and isinstance(whole.index, range)
            and whole.index == range(incoming.mask.keys)
            and incoming.slots == incoming.mask.queries
            and incoming.softcap is None
        ):
            if len(incoming.slots) == 1:
                return single(incoming.query, whole.keys, whole.values, incoming.mask, incoming.scaling), None
            out, _ = plain(incoming.module, incoming.query, whole.keys, whole.values, incoming.mask, incoming.scaling)
            return out.transpose(1, 2), None
        return attend(
            incoming.query,
            segments,
            incoming.mask,
            incoming.slots,
            incoming.scaling,
            incoming.softcap,
            self.heads,
            self.needs_mass,
        )

    def replay(self, incoming: Incoming) -> None:
        """Take in a piece of a prompt that another layer was shown; its attention output is not computed.

        One pass of a model over a prompt then serves the caches of many policies.
        """
        if not self.is_initialized:
            self.lazy_initialization(incoming.keys, incoming.values)
        self._run(incoming, decoded=False, replayed=True)

    def finish(self) -> None:
        """End an open prompt."""
        if self.prompt_open:
            self.finish_prompt()
            self.prompt_open = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Remember the tokens of each forward pass, so that `crop` can take back any part of the last one."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` slots.

        While recording, the tokens of the last forward pass are taken back exactly, with everything they caused: the
        state before it returns, and the tokens that stay are taken in again. Further back it is up to the policy.

        Raises:
            OptionError: a positive count, more than there are, or entries that are gone would have to come back.
        """
        undo, self._undo = self._undo, None
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise OptionError(
                f"tokens_to_remove={tokens_to_remove}: use 0 to {-self.seen}; the cache has {self.seen} tokens"
            )
        if tokens_to_remove == 0:
            return
        if undo is not None and -tokens_to_remove <= len(undo[1].slots):
            state, incoming, decoded = undo
            self.set_state(state)
            kept = len(incoming.slots) + tokens_to_remove
            if kept:
                self._run(incoming.piece(0, kept), decoded, replayed=True)
            return
        self.crop_to(self.seen + tokens_to_remove)
        self.seen += tokens_to_remove

    def reset(self) -> None:
        self.parts: dict[str, Tensor] = {}
        self.seen, self.prompt_open, self.hold_open = 0, False, False
        self._call = self._states = self._undo = None
        self.is_initialized = False

    # -- the same for every tensor ---------------------------------------------------------------------------------

    @property
    def batch(self) -> int | None:
        """Rows, or None while the layer is empty."""
        return next((tensor.shape[0] for tensor in self.parts.values()), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept, as stored."""
        stored = self.stored

        def itemsize(name: str, tensor: Tensor) -> int:
            computed = tensor.dtype == self.dtype and name not in self.wide
            return stored.itemsize if stored and computed else tensor.itemsize

        return sum(tensor.numel() * itemsize(name, tensor) for name, tensor in self.parts.items())

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything a layer knows; tensors are shared, not copied."""
        return dict(self.parts), {name: getattr(self, name) for name in self.numbers}

    def set_state(self, state: tuple[dict[str, Tensor], dict[str, int]]) -> None:
        """Go back to a `state`."""
        self.parts = dict(state[0])
        for name, value in state[1].items():
            setattr(self, name, value)

    def extend(self, dim: int = 2, **tensors: Tensor) -> None:
        """Append to parts along a dimension; a part that is missing begins here."""
        for name, tensor in tensors.items():
            old = self.parts.get(name)
            self.parts[name] = tensor if old is None else torch.cat([old, tensor], dim)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self._undo = None  # it has the old rows
        self.parts = {name: change(tensor) for name, tensor in self.parts.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda tensor: tensor.to(self.device, non_blocking=True))


class TailLayer(KVLayer):
    """Keeps its newest tokens, slots `start` to `seen`, uncompressed: parts "keys" and "values" [B, H, n, d]."""

    numbers = (*KVLayer.numbers, "start")

    def reset(self) -> None:
        super().reset()
        self.start = 0

    def append(self, incoming: Incoming) -> None:
        self.extend(keys=incoming.keys, values=incoming.values)

    @property
    def tail(self) -> Dense:
        """The newest tokens as a segment."""
        return Dense(self.parts["keys"], self.parts["values"], range(self.start, self.seen))

    def segments(self, incoming: Incoming) -> list[Segment]:
        return [self.tail]

    def drop(self, count: int, names: tuple[str, ...] = ("keys", "values")) -> list[Tensor]:
        """Take the oldest ``count`` tokens out of the tail; returns them, one tensor a name, tokens in dimension 2."""
        taken = []
        for name in names:
            tensor = self.parts[name]
            taken.append(tensor[:, :, :count])
            self.parts[name] = tensor[:, :, count:].clone()  # a view would keep the whole in memory
        self.start += count
        return taken

    def crop_to(self, length: int) -> None:
        if length < self.start:
            self.reach_back(length)
        for name in ("keys", "values"):
            self.parts[name] = self.parts[name][:, :, : length - self.start].clone()

    def reach_back(self, length: int) -> None:
        """Bring slots from ``length`` on back into the tail, or refuse (the default: their content is gone)."""
        raise OptionError(
            f"crop: {self.seen - length} tokens reach back before slot {self.start}, whose tokens this cache has "
            "given up; take cache.copy() before the tokens you want to take back"
        )


class CountedTail(TailLayer):
    """A tail that knows which of its slots are padding: part "valid" bool [B, 1, n], once a batch is padded."""

    numbers = (*TailLayer.numbers, "gapped")

    def reset(self) -> None:
        super().reset()
        self.gapped = False  # padding lies between real tokens of the tail

    def append(self, incoming: Incoming) -> None:
        valid = incoming.valid
        if valid is not None or "valid" in self.parts:  # once padded, always: the tail is short
            rows, _, count, _ = incoming.keys.shape
            ones = torch.ones(rows, 1, self.seen - self.start + count, dtype=torch.bool, device=incoming.keys.device)
            if "valid" not in self.parts:
                self.parts["valid"] = ones[:, :, count:]
            self.extend(valid=ones[:, :, :count] if valid is None else valid.unsqueeze(1))
        super().append(incoming)

    def _run(self, incoming: Incoming, decoded: bool, replayed: bool = False) -> Tensor:
        if not incoming.mask.padded_on_the_left:
            real = incoming.mask.valid(range(self.start, incoming.slots.stop))
            self.gapped = real is not None and read((~real & (real.cumsum(-1) > 0)).any()) > 0
        return super()._run(incoming, decoded, replayed)

    def surplus(self, window: int, group: int) -> int:
        """Slots of the tail, a multiple of ``group``, without which each row has its newest ``window`` real tokens."""
        count = (self.seen - self.start - window) // group * group
        if count > 0 and self.gapped and "valid" in self.parts:
            left = self.parts["valid"][:, 0].flip(-1).cumsum(-1).flip(-1)  # real tokens from each slot on
            enough = (left >= left[:, :1].clamp(max=window)).all(0)
            count = min(count, (int(read(enough.sum())) - 1) // group * group)
        return max(count, 0)

    def crop_to(self, length: int) -> None:
        super().crop_to(length)
        if "valid" in self.parts:
            self.parts["valid"] = self.parts["valid"][:, :, : length - self.start].clone()


class WindowLayer(CountedTail):
    """Entries leave the tail for a store in groups, oldest first, and are not changed afterwards.

    A group leaves as soon as ``window`` tokens remain without it: after t tokens,
    ``floor((t - window) / group) * group`` are in the store, however they were fed. Padding between tokens lies in groups
    with them, but is not counted: with it, groups leave when each row has ``window`` real tokens without them.

    Args:
        heads, streamed: see `KVLayer`.
        window: tokens that are always exact.
        group: tokens that leave together.
    """

    def __init__(self, heads: int, streamed: bool, window: int, group: int) -> None:
        super().__init__(heads, streamed)
        self.window, self.group = window, group

    @abc.abstractmethod
    def store(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append entries to the store.

        Args:
            keys, values: [B, H, n, d], n a multiple of the group.
            valid: True for real tokens, bool [B, n]; None if there is no padding.
        """

    def tokens_until_compress(self) -> int:
        return 1 if self.gapped else self.window + self.group - (self.seen - self.start)

    def compress_decoded(self, incoming: Incoming, mass: Tensor | None) -> None:
        self.finish_prompt()

    def finish_prompt(self) -> None:
        count = self.surplus(self.window, self.group)
        if not count:
            return
        if "valid" in self.parts:
            keys, values, valid = self.drop(count, ("keys", "values", "valid"))
            self.store(keys, values, valid[:, 0])
        else:
            keys, values = self.drop(count)
            self.store(keys, values, None)
