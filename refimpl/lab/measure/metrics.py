"""Cost and quality of a language model: perplexity, footprint, peak memory.

Perplexity keeps its summands: one negative log-likelihood per row of tokens, with the document the row came
from, because an interval over documents cannot be computed from a mean.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from refimpl.core.arguments import checked, shown
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.layers import CompressedLayer
from refimpl.core.stored import stored_dtypes, stored_parts

_CHUNK_BYTES = 64 * 2**20  # fp32 logits per step: the loss must not double the memory of the logits


class Tokens(Protocol):
    """The part of a token set that `perplexity` reads: ids [n, T] and the document of each row."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def units(self) -> list[str]: ...


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it is made of.

    Attributes:
        value: exp(sum of nll / sum of counts); "lower is better", 1 is perfect.
        nll: float64 [n], negative log-likelihood of each row in nats, summed over its tokens.
        counts: int64 [n], predicted tokens of each row (its length minus one).
        units: the document each row came from; rows of one document share a name.
        corpus: name of the corpus, "" if the tokens did not say.
    """

    value: float
    nll: np.ndarray
    counts: np.ndarray
    units: list[str]
    corpus: str = ""

    def by_unit(self) -> Perplexity:
        """The same perplexity with the rows of one document added up, in order of first appearance.

        Windows of one document are not independent, so intervals resample documents, not rows.
        """
        names = list(dict.fromkeys(self.units))
        index = {name: k for k, name in enumerate(names)}
        where = np.array([index[unit] for unit in self.units])
        nll = np.bincount(where, weights=self.nll, minlength=len(names))
        counts = np.bincount(where, weights=self.counts, minlength=len(names)).astype(np.int64)
        return Perplexity(self.value, nll, counts, names, self.corpus)


@checked()
def perplexity(model: nn.Module, tokens: Tokens | Tensor, batch_size: int = 2, progress: bool = True) -> Perplexity:
    """Perplexity of a causal language model on rows of tokens, each read from an empty context.

    Every row predicts its tokens 1 ... T-1 from the ones before. The model computes its own logits (so
    soft-capping and logit scaling are its own affair) in its own dtype; the log-softmax is exact in fp32 and
    taken in slices. Memory beyond the model: the logits of `batch_size` rows.

    Args:
        model: any Hugging Face causal LM, on any device. Training flags are left as found.
        tokens: a token set with ``.ids`` and ``.units``, or a LongTensor [n, T] without padding.
        batch_size: rows per forward pass.
        progress: show a bar if this takes longer than two seconds.

    Raises:
        CalibrationError: no rows, rows shorter than two tokens, ids outside the vocabulary, or a loss that is
            not finite (the message names the row).

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> result = perplexity(model, torch.randint(0, 64, (3, 16)))
        >>> result.nll.shape, result.counts.tolist()
        ((3,), [15, 15, 15])
    """
    ids: Any = getattr(tokens, "ids", tokens)
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be at least 1")
    _check_ids(model, ids)
    units = [str(k) for k in range(len(ids))] if isinstance(tokens, Tensor) else list(tokens.units)
    if len(units) != len(ids):
        raise CalibrationError(f"tokens has {len(ids)} rows but {len(units)} units; give one unit per row")
    device = next(model.parameters()).device
    nll = torch.zeros(len(ids), dtype=torch.float64)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            torch.inference_mode(),
            tqdm(total=len(ids), desc="perplexity", unit="row", delay=2, leave=False, disable=not progress) as bar,
        ):
            for start in range(0, len(ids), batch_size):
                batch = ids[start : start + batch_size].to(device)
                logits = model(input_ids=batch, use_cache=False).logits
                for k, row in enumerate(batch):
                    nll[start + k] = _row_nll(logits[k], row)
                    if not math.isfinite(nll[start + k]):
                        raise CalibrationError(
                            f"the loss of tokens row {start + k} ({units[start + k]!r}) is "
                            f"{nll[start + k]:g}: the logits are not finite there; look for NaN in the "
                            "weights or use a wider dtype"
                        )
                bar.update(len(batch))
    finally:
        for module in training:  # one by one: a caller may keep some modules in eval mode
            module.training = True
    counts = np.full(len(ids), ids.shape[1] - 1, dtype=np.int64)
    value = math.exp(float(nll.sum()) / int(counts.sum()))
    return Perplexity(value, nll.numpy(), counts, units, getattr(tokens, "corpus", ""))


def _check_ids(model: nn.Module, ids: object) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise CalibrationError(f"tokens is {found}; it must be a LongTensor [rows, length]")
    if len(ids) == 0 or ids.shape[1] < 2:
        raise CalibrationError(
            f"tokens has shape {list(ids.shape)}; perplexity needs at least one row and two tokens a row"
        )
    if not hasattr(model, "get_input_embeddings"):
        raise OptionError(f"model={shown(model)}: pass a causal language model of transformers")
    vocabulary = cast(Any, model).get_input_embeddings().num_embeddings
    outside = (ids < 0) | (ids >= vocabulary)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise CalibrationError(
            f"tokens[{row}, {column}] is {int(ids[row, column])}, outside the model's vocabulary of "
            f"{vocabulary}; use the tokenizer that belongs to the model"
        )


def _row_nll(logits: Tensor, row: Tensor) -> Tensor:
    """Sum over t of -log p(row[t] | row[:t]) in nats; logits [T, vocabulary], row [T]."""
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for start in range(0, len(row) - 1, step):
        stop = min(start + step, len(row) - 1)
        target = row[start + 1 : stop + 1].long()
        losses = F.cross_entropy(logits[start:stop].float(), target, reduction="none")
        total += losses.cpu().double().sum()
    return total


@dataclass(frozen=True)
class Footprint:
    """The size of a model, with everything a format needs counted.

    Attributes:
        bits_per_weight: bits stored for each weight of the compressed sites: values, scales, zero points,
            masks, permutations, adapters. Biases are left out, and so are embeddings. For a model without
            compressed layers: of all linear weights inside its blocks.
        bits_per_parameter: bits stored for each parameter of the whole model.
        bytes: bytes of the whole model as stored; tied tensors are counted once.
        disk_bytes: bytes of all files of the saved folder, None if none was given.
        weights: number of weights that `bits_per_weight` refers to.
        parameters: number of parameters that `bits_per_parameter` refers to (of the dense model).
        parts: bytes of the compressed sites by part ("values", "scales", ...), "bias" included.
    """

    bits_per_weight: float
    bits_per_parameter: float
    bytes: int
    disk_bytes: int | None
    weights: int
    parameters: int
    parts: dict[str, int] = field(default_factory=dict)


@checked()
def footprint(model: nn.Module, folder: str | Path | None = None) -> Footprint:
    """Count the bits a model needs, adapters and metadata included.

    Floating numbers count as they are stored (`refimpl.core.stored`), whatever dtype this processor computes them in.

    Args:
        model: a Hugging Face model, compressed or not; meta tensors are fine. Fused experts are unfused in
            place (`refimpl.core.compress.sites`): the same tensors under other names.
        folder: where it was saved, to report bytes on disk.

    Raises:
        OptionError: `folder` holds no files, the model has nothing to count, or a compressed layer
            reports parts that do not add up to its tensors.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> footprint(transformers.LlamaForCausalLM(config).to(torch.bfloat16)).bits_per_weight
        16.0
    """
    layers = list(_compressed(model))
    parts: dict[str, int] = {}
    weights = 0
    for name, layer in layers:
        layer_parts = layer.parts()
        held = _nbytes(_tensors(layer).values())
        if sum(layer_parts.values()) != held:
            raise OptionError(
                f"layer {name!r} reports {sum(layer_parts.values())} bytes by part but holds {held}; "
                "its parts() must name every tensor it stores"
            )
        for part, size in stored_parts(layer, model).items():
            parts[part] = parts.get(part, 0) + size
        weights += layer.in_features * layer.out_features
    sites = [] if layers else find_sites(model)
    kinds = stored_dtypes(model)
    for site in sites:
        count = cast(Tensor, site.module.weight).numel()
        parts["values"] = parts.get("values", 0) + count * kinds[f"{site.name}.weight"].itemsize
        weights += count
    if weights == 0:
        raise OptionError("model has no compressed layers and no linear layers inside its blocks: nothing to count")

    inside = {id(p) for _, layer in layers for p in layer.parameters()}
    rest = {_span(p): p.numel() for p in model.parameters() if id(p) not in inside}
    biases = sum(layer.bias.numel() for _, layer in layers if getattr(layer, "bias", None) is not None)
    parameters = sum(rest.values()) + biases + sum(a.in_features * a.out_features for _, a in layers)
    groups: dict[tuple[int, int], list[Tensor]] = {}  # tensors that shrink alike: memory may be shared within a group
    for name, tensor in _tensors(model).items():
        stored_as, held_as = kinds[name].itemsize, tensor.itemsize
        groups.setdefault((1, 1) if stored_as == held_as else (stored_as, held_as), []).append(tensor)
    total = sum(_nbytes(tensors) * stored_as // held_as for (stored_as, held_as), tensors in groups.items())
    stored = sum(size for part, size in parts.items() if part != "bias")
    return Footprint(
        bits_per_weight=8 * stored / weights,
        bits_per_parameter=8 * total / parameters,
        bytes=total,
        disk_bytes=None if folder is None else _disk_bytes(Path(folder)),
        weights=weights,
        parameters=parameters,
        parts=parts,
    )


def _compressed(module: nn.Module, name: str = "") -> Iterable[tuple[str, Any]]:
    """The outermost compressed layers: a sum of layers reports the bytes of its terms itself."""
    if isinstance(module, CompressedLayer):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _compressed(child, f"{name}.{child_name}" if name else child_name)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers: what a checkpoint holds (rotary tables are recomputed)."""
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Device, first and last byte address. Meta tensors have no address; their identity is used instead."""
    if tensor.device.type == "meta":
        start = id(tensor) * 2**40
        return "meta", start, start + tensor.numel() * tensor.element_size()
    start = tensor.data_ptr()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), start, start + (extent * tensor.element_size() if tensor.numel() else 0)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes covered by the tensors (not by their storages: those of a memory-mapped file share one)."""
    total, device, end = 0, "", 0
    for where, start, stop in sorted(map(_span, tensors)):
        if where != device:
            device, end = where, start
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _disk_bytes(folder: Path) -> int:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size == 0:
        raise OptionError(f"folder is {str(folder)!r}, which holds no files; save the model there first")
    return size


class PeakMemory:
    """Peak memory inside a ``with`` block, above the memory in use at its start.

    On the CPU a thread reads the resident set every two milliseconds (Linux), so a shorter spike can be
    missed, and pages of memory-mapped files count while they are resident; `anonymous_above_start` leaves
    those pages out, which the system may drop at any time. On macOS only the peak since the process began is
    known: the result is a lower bound. On Windows both are None. With ``device="cuda"`` it is the allocator's
    exact peak.

    Attributes:
        above_start: bytes.
        anonymous_above_start: bytes without file-backed pages; Linux only, elsewhere equal to `above_start`.

    Example:
        >>> with PeakMemory() as peak:
        ...     _ = torch.ones(8 * 2**20).sum()
        >>> peak.above_start is None or peak.above_start >= 0
        True
    """

    above_start: int | None = None
    anonymous_above_start: int | None = None

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._stop = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = (torch.cuda.memory_allocated(self._device),) * 2
            return self
        if sys.platform == "win32":
            return self
        self._start = self._peak = _resident()
        self._stop.clear()
        if sys.platform == "linux":
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._peak = (torch.cuda.max_memory_allocated(self._device),) * 2
        elif sys.platform == "win32":
            return
        elif sys.platform == "linux":
            self._stop.set()
            self._thread.join()
        else:
            self._peak = _resident()
        self.above_start, self.anonymous_above_start = (
            max(0, peak - start) for peak, start in zip(self._peak, self._start, strict=True)
        )

    def _sample(self) -> None:
        done = False
        while not done:
            done = self._stop.wait(0.002)  # one more reading after the block has ended
            now = _resident()
            self._peak = max(self._peak[0], now[0]), max(self._peak[1], now[1])


def _resident() -> tuple[int, int]:
    """Resident bytes, and those that no file backs."""
    if sys.platform == "linux":
        _, resident, shared = (int(part) for part in Path("/proc/self/statm").read_text().split()[:3])
        page = os.sysconf("SC_PAGE_SIZE")
        return resident * page, (resident - shared) * page
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return peak, peak
