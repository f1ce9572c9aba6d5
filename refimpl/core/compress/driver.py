"""The driver: go through the decoder blocks, collect statistics, and let a method replace each site.

Models without decoder blocks go to `refimpl.core.compress.whole`.

Only one block's statistics exist at a time, and only the hidden states between two blocks are kept from the
calibration tokens, so memory above the weights does not grow with depth. With a folder instead of a model, the
blocks themselves are read from the checkpoint one by one and the whole model is never in memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from refimpl.core.arguments import checked, shown
from refimpl.core.compress.inputs import collect
from refimpl.core.compress.method import Method, check_method
from refimpl.core.compress.sites import Site, experts_put_back, find_blocks, find_sites, has_blocks, skipped_modules
from refimpl.core.compress.stats import InputStats
from refimpl.core.compress.steps import (
    CHUNK,
    Report,
    SiteReport,
    all_or_nothing,
    check_finite,
    check_samples,
    compress_one,
    original_weights,
    reference_of,
)
from refimpl.core.compress.whole import BATCH as WHOLE_BATCH
from refimpl.core.compress.whole import CallShape, call_shapes, check_groups, compress_whole
from refimpl.core.device import give_back, read
from refimpl.core.errors import CalibrationError, CheckpointError, OptionError, nearest
from refimpl.core.files import io
from refimpl.core.files.checkpoint import (
    MANIFEST,
    Checkpoint,
    Reference,
    empty_model,
    read_config,
    set_tensor,
    weight_key,
)
from refimpl.core.files.companions import methods_of, note_methods
from refimpl.core.files.folders import LOCK, lock
from refimpl.core.layers import empty_layer
from refimpl.core.stored import declare_stored, stored_dtype, stored_dtypes

ORDERS = ("sequential", "parallel")
BATCH = 4  # sequences per forward pass by default


def calibration_batches(
    calibration: Any, batch_size: int, vocabulary: int | None, longest: int | None = None
) -> list[Tensor]:
    """Check calibration tokens and cut them into batches.

    Args:
        calibration: LongTensor [sequences, length], or an object with such a tensor as ``.ids``.
        batch_size: sequences per batch.
        vocabulary: number of token ids the model knows.
        longest: number of positions the model knows.

    Returns:
        LongTensors [<= batch_size, length].

    Raises:
        CalibrationError: no tokens, not integers, ids outside the vocabulary, too short or too long.
        OptionError: batch_size below 1.

    Example:
        >>> [b.shape for b in calibration_batches(torch.zeros(3, 5, dtype=torch.long), 2, 10)]
        [torch.Size([2, 5]), torch.Size([1, 5])]
    """
    ids = getattr(calibration, "ids", calibration)
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}: use 1 or more")
    integers = isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64)
    if not integers or ids.dim() != 2:
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise CalibrationError(f"calibration: expected integer token ids [sequences, length], got {got}")
    if ids.numel() == 0:
        raise CalibrationError(f"calibration: shape {tuple(ids.shape)} holds no tokens; pass at least one sequence")
    if ids.shape[1] < 2:
        raise CalibrationError(f"calibration: sequences of length {ids.shape[1]} are too short; use 2 tokens or more")
    if longest is not None and ids.shape[1] > longest:
        raise CalibrationError(
            f"calibration: sequences of length {ids.shape[1]} are longer than the {longest} positions of the model; "
            "cut them into shorter ones"
        )
    low, high = int(read(ids.min())), int(read(ids.max()))
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise CalibrationError(
            f"calibration: token id {low if low < 0 else high} is outside the vocabulary of {vocabulary}; "
            "use the model's own tokenizer"
        )
    return list(ids.split(batch_size))


class _Recorder(nn.Module):
    """Stands in for a block: remembers how it was called and passes the hidden states on unchanged."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.block = [block]  # in a list, so that it is not registered as a submodule
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block[0], name)  # models read attributes such as block.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden.append(hidden_states)
        # masks and tables are mostly equal for all batches: keep one copy
        self.calls.append(_shared((args, kwargs), self.calls[-1]) if self.calls else (args, kwargs))
        return (hidden_states,) if self.as_tuple else hidden_states


def _shared(new: Any, old: Any) -> Any:
    """`new`, with every tensor that equals its counterpart in `old` replaced by that one."""
    if type(new) is not type(old):
        return new
    if isinstance(new, Tensor) and new.shape == old.shape and new.dtype == old.dtype:
        return new if read((new != old).any()) else old
    if type(new) is tuple and len(new) == len(old):
        return tuple(map(_shared, new, old))
    if type(new) is dict and new.keys() == old.keys():
        return {key: _shared(value, old[key]) for key, value in new.items()}
    return new


@dataclass
class Activations:
    """Hidden states between two blocks, one tensor per batch, and the other arguments of every block."""

    hidden: list[Tensor]
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]  # [block][batch]

    def run(self, block: nn.Module, index: int, keep: bool) -> None:
        """Run block `index` on all batches; with `keep`, its outputs become the inputs of the next block."""
        for batch, (args, kwargs) in enumerate(self.calls[index]):
            output = block(self.hidden[batch], *args, **kwargs)
            if keep:
                self.hidden[batch] = output[0] if isinstance(output, tuple) else output


def block_inputs(model: nn.Module, batches: list[Tensor]) -> Activations:
    """Run everything before the first block, and record the arguments that each block gets.

    The model itself computes masks and rotary tables: they are recorded for each block in a pass in which the blocks do
    nothing, so sliding windows and per-layer rotary bases need no code here.

    Args:
        model: a decoder-only model; its blocks may be on "meta".
        batches: token ids [batch, length] each.

    Raises:
        OptionError: between its blocks the model does more than pass on hidden states.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=9))
        >>> block_inputs(model, [torch.zeros(1, 4, dtype=torch.long)]).hidden[0].shape
        torch.Size([1, 4, 8])
    """
    _, blocks = find_blocks(model)
    originals = list(blocks)
    body: Any = model.base_model if hasattr(model, "base_model") else model
    device = next(p.device for p in model.parameters() if not p.is_meta)

    def record(batches: list[Tensor], as_tuple: bool) -> list[_Recorder]:
        recorders = [_Recorder(block, as_tuple) for block in originals]
        try:
            for index, recorder in enumerate(recorders):
                blocks[index] = recorder
            for batch in batches:
                body(input_ids=batch.to(device), use_cache=False)
        finally:
            for index, block in enumerate(originals):
                blocks[index] = block
        return recorders

    # some models expect a tensor from a block, some a tuple; with the right one each block gets what the block before it
    # returned
    failure: Exception | None = None
    for as_tuple in (False, True):
        try:
            first = record(batches[:1], as_tuple)
        except Exception as error:
            failure = error
            continue
        if all(recorder.hidden and recorder.hidden[0] is first[0].hidden[0] for recorder in first):
            recorders = record(batches, as_tuple)
            return Activations(recorders[0].hidden, [recorder.calls for recorder in recorders])
    raise OptionError(
        f"model={type(model).__name__}: its blocks cannot be run one by one, because it changes the hidden states "
        "between them or does not run them all"
    ) from failure


def _fingerprints(
    model: nn.Module,
    method: Method,
    batches: list[Tensor],
    order: str,
    by_block: dict[int, list[Site]],
    source: Checkpoint | None,
    original: Reference | None,
) -> list[str]:
    """Identify a run for resuming: for each block a digest of all that blocks share, and one of the block before the run.

    Every weight that the run reads goes into one of them. That takes about a second per GB, and from a folder every
    weight is read once more for it.
    """
    prefix, blocks = find_blocks(model)
    run = hashlib.sha256(f"{method!r} {order} {getattr(model, 'config', None)}".encode())
    if (stored := stored_dtype(model)) != next(p.dtype for p in model.parameters() if p.is_floating_point()):
        run.update(f"{stored}".encode())
    run.update(repr([[site.name for site in sites] for sites in by_block.values()]).encode())
    for batch in batches:
        run.update(f"{tuple(batch.shape)}".encode() + batch.cpu().numpy().tobytes())
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{prefix}.") and not (
            source and tensor.is_meta and name not in source
        ):  # a tied weight
            _add_tensor(run, name, tensor, model, source)
    marks = []
    for index, block in enumerate(blocks):
        state = hashlib.sha256()
        for name, layer in io.compressed_layers(block).items():
            state.update(f"{name} {layer.config()}".encode())
        for name, tensor in block.state_dict().items():
            _add_tensor(state, f"{prefix}.{index}.{name}", tensor, model, source)
        if original is not None:
            for site in by_block[index]:
                state.update(_bytes(original.weight(site)))
        marks.append(f"{run.hexdigest()}:{state.hexdigest()}")
    return marks


def _add_tensor(digest: Any, name: str, tensor: Tensor, model: nn.Module, source: Checkpoint | None) -> None:
    """Add a tensor of the model to a digest, read from the checkpoint if it is not in memory yet."""
    if source is not None:
        tensor = source.tensor(*_stored(name, model, source))
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _stored(name: str, model: nn.Module, source: Checkpoint) -> tuple[str, int | None]:
    """Key and index of a tensor in a checkpoint, which holds experts fused or (once compressed) apart."""
    return (name, None) if name in source else weight_key(name, model)


@checked("model", "method")
@torch.inference_mode(False)  # tensors must count their changes in place, see `find_stages`
@torch.no_grad()
def compress(
    model: nn.Module | str | Path,
    method: Method,
    calibration: Any = None,
    *,
    reference: nn.Module | str | Path | None = None,
    order: str = "sequential",
    batch_size: int | None = None,
    targets: str | None = None,
    out: str | Path | None = None,
    dtype: torch.dtype | None = None,
    store: torch.dtype | None = None,
    progress: bool = True,
) -> Report:
    """Compress the linear maps inside a language model's blocks, or all maps of another model, in place.

    Call it again on the result to add a step (prune, then quantise, then repair); each call has its own calibration.
    Under ``torchrun`` each process passes its own share of the calibration sequences; the statistics are summed over
    processes and every process ends with the same model.

    Args:
        model: a decoder-only transformers model, which is changed in place, or a folder with its checkpoint,
            which is read block by block and never held in memory as a whole (needs `out`). Or a model without decoder
            blocks, such as an image classifier, of transformers or not: then all its `nn.Linear` and `nn.Conv2d` are
            sites, and "block" below reads "site" (sites fed by the same tensor count as one).
        method: the method with its options, for example ``GPTQ(bits=4)``.
        calibration: token ids [sequences, length] (or an object with them as ``.ids``). For a model without blocks:
            floats [n, channels, height, width] (or an object with them as ``.pixels``). Methods that use only the
            weights need none.
        reference: for methods that repair: the original model, or (no second model in memory) its folder.
        order: "sequential": each block sees the outputs of the compressed blocks before it; "parallel": all blocks
            see the inputs they had in the original model (cheaper: one forward pass instead of two).
        batch_size: sequences (4 unless given) or images (64) per forward pass; activations inside a block scale
            with it.
        targets: regular expression; only sites whose name matches are touched.
        out: folder for the result, in `save` format, which one process at a time may write. Every finished block is
            written at once; the same call resumes after an interruption. To tell it from other calls, every weight it
            reads is hashed first, about a second per GB. Only for models with blocks; use `save` for others.
        dtype: when `model` is a folder: the dtype to compute in; default: as stored. Many CPUs are slow at bfloat16, and
            float32 is the better choice there.
        store: when `model` is a folder: the dtype to store unpacked weights in; default: `dtype`. A model in memory is
            stored in what `refimpl.core.stored.stored_dtype` says, its own dtype unless a loader said otherwise.
        progress: show a progress bar.

    Returns:
        Report with the model and one entry per site.

    Raises:
        OptionError: an option that cannot work here; raised before any work.
        CalibrationError: missing, empty or too short calibration, or NaN activations.
        CheckpointError: model or reference folder damaged or foreign, or `out` holds another run, or another process
            writes to it.
        FileError: `out` cannot be written: a full disk, a read-only folder, a file in the way.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50))
        >>> report = compress(model, RTN(bits=4, group_size=32), progress=False)
        >>> len(report.sites), model.model.layers[0].mlp.up_proj
        (7, PackedLinear(32 -> 64, 4 bits, groups of 32))
    """
    start = time.perf_counter()
    check_method(method)
    if order not in ORDERS:
        raise OptionError(f"order={order!r}: use {nearest(order, ORDERS)}")
    options = (reference, order, batch_size, targets, out, dtype, store, progress)
    if out is not None and dist.is_available() and dist.is_initialized():
        raise OptionError(f"out={str(out)!r} does not work under torchrun; save(model, ...) on rank 0 afterwards")
    # into a finished folder nothing will be written (it may be read-only), unless it was left by a killed process
    finished = out is not None and (Path(out) / MANIFEST).exists() and not (Path(out) / LOCK).exists()
    with nullcontext() if out is None or finished else lock(out):
        report = _compress(model, method, calibration, *options)
    report.seconds = time.perf_counter() - start
    return report


def _compress(
    model: nn.Module | str | Path,
    method: Method,
    calibration: Any,
    reference: nn.Module | str | Path | None,
    order: str,
    batch_size: int | None,
    targets: str | None,
    out: str | Path | None,
    dtype: torch.dtype | None,
    store: torch.dtype | None,
    progress: bool,
) -> Report:
    """`compress`, with the folder of the result held by this process."""
    source: Checkpoint | None = None
    if isinstance(model, (str, Path)):
        if out is None:
            raise OptionError(
                f"out=None: compressing the folder {str(model)!r} block by block needs a folder to write to"
            )
        source, folder = Checkpoint(model), Path(model)
        dtype = dtype or source.dtype
        model = empty_model(read_config(folder), dtype, folder)
        declare_stored(model, store or dtype)
        if not has_blocks(model):
            raise OptionError(
                f"model={str(folder)!r}: {type(model).__name__} has no decoder blocks to read one by one; "
                "load it with from_pretrained and pass the model"
            )
        if io.is_compressed(folder):
            io.restore_layers(model, folder, device="meta", dtype=dtype)
            note_methods(model, io.read_json(folder / MANIFEST).get("methods", []))
        else:
            source.translate(model)
    elif dtype is not None or store is not None:
        name, given = ("dtype", dtype) if dtype is not None else ("store", store)
        raise OptionError(f"{name}={given} is for models read from a folder; change this one with model.to(dtype)")
    elif not isinstance(model, nn.Module):
        raise OptionError(f"model={shown(model)}: pass a transformers model, or the folder of its checkpoint")
    with experts_put_back(model, always=False):  # if anything below raises, the model stays as it was
        sites = find_sites(model, targets)
        if not has_blocks(model):
            if out is not None:
                raise OptionError(
                    f"out={str(out)!r} writes block by block, and {type(model).__name__} has no decoder blocks; "
                    "save(model, ...) afterwards"
                )
            batch_size = WHOLE_BATCH if batch_size is None else batch_size
            entries = compress_whole(model, method, sites, calibration, reference, order, batch_size, progress)
            note_methods(model, [*methods_of(model), repr(method)])
            return Report(model, repr(method), entries, 0.0)
        original = reference_of(model, method, reference, sites)
        batches = _batches(model, method, calibration, BATCH if batch_size is None else batch_size)
        _, blocks = find_blocks(model)
        by_block = {index: [site for site in sites if site.block == index] for index in range(len(blocks))}
        writer = None
        if out is not None:
            marks = _fingerprints(model, method, batches, order, by_block, source, original)
            writer = io.ShardWriter(Path(out), model, marks)
        done = writer.done if writer else 0
        for site in sites:
            if site.block >= done:
                method.layer_config(site)
        if source is not None:
            _load_outside_blocks(model, source)
        check_finite(model.state_dict().items())
    was_training = model.training
    model.eval()
    activations = None
    if writer and done and source is None:
        writer.restore(model)
    if batches and done < len(blocks):
        activations = block_inputs(model, batches)
        if writer and done:
            activations.hidden = writer.hidden(like=activations.hidden)

    reports: list[SiteReport] = list(writer.reports(SiteReport)) if writer else []
    last = max((index for index, chosen in by_block.items() if chosen), default=-1)
    bar = tqdm(total=len(blocks), initial=done, desc=type(method).__name__, unit="block", disable=not progress, delay=1)
    finished = done
    if writer:
        writer.start()
    try:
        for index in range(done, len(blocks)):
            block, chosen = blocks[index], by_block[index]
            with _materialised(block, index, model, source) if source else nullcontext(), all_or_nothing(chosen):
                entries = _compress_block(
                    block, index, chosen, method, original, activations, order, propagate=index < last
                )
                if writer:
                    hidden = activations.hidden if activations else []
                    writer.add_block(index, block, hidden, [asdict(entry) for entry in entries])
            give_back()
            reports.extend(entries)
            finished = index + 1
            bar.update()
    except KeyboardInterrupt:
        where = f"; call it again with out={str(out)!r} to go on" if writer else " (pass out= to make a run resumable)"
        tqdm.write(f"interrupted after {finished} of {len(blocks)} blocks{where}")
        raise
    finally:
        bar.close()
        model.train(was_training)
    if not (writer and writer.finished):
        note_methods(model, [*methods_of(model), repr(method)])
    if writer:
        writer.finish(model)
    return Report(None if source else model, repr(method), reports, 0.0, Path(out) if out else None)


def _batches(model: nn.Module, method: Method, calibration: Any, batch_size: int) -> list[Tensor]:
    if not method.statistics:
        return []
    if calibration is None:
        raise CalibrationError(f"calibration=None: {type(method).__name__} needs tokens [sequences, length]")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    batches = calibration_batches(calibration, batch_size, _vocabulary(model), longest)
    check_samples(method, sum(len(batch) for batch in batches))
    return batches


def _compress_block(
    block: nn.Module,
    index: int,
    sites: list[Site],
    method: Method,
    reference: Reference | None,
    activations: Activations | None,
    order: str,
    propagate: bool,
) -> list[SiteReport]:
    originals = {site.name: reference.weight(site).to(site.weight) for site in sites} if reference else {}
    check_finite(originals.items(), "reference")
    stats: dict[str, InputStats] = {}
    if activations:
        # one pass with every site's uncompressed weights gives the inputs of all sites of the block
        with original_weights(sites, originals):
            if sites or order == "parallel":
                with collect(sites, method.statistics) as stats:
                    activations.run(block, index, keep=order == "parallel")
    entries = []
    for site in sites:
        input_stats = stats.get(site.name)
        if activations and input_stats is None:
            raise CalibrationError(f"calibration: {site.name!r} was never run; leave it out with targets=")
        entries.append(compress_one(site, method, input_stats, originals.get(site.name)))
    if activations and order == "sequential" and propagate:
        activations.run(block, index, keep=True)
    return entries


def _vocabulary(model: nn.Module) -> int | None:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return None if embedding is None else embedding.weight.shape[0]


def _width(model: nn.Module) -> int:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return 0 if embedding is None else embedding.weight.shape[1]


def _load_outside_blocks(model: nn.Module, source: Checkpoint) -> None:
    """Read embeddings, norms and head; the blocks stay on "meta"."""
    prefix, _ = find_blocks(model)
    for name, tensor in list(model.state_dict().items()):
        if name in source and not name.startswith(prefix + "."):
            set_tensor(model, name, source.tensor(name).to(tensor.dtype))
    model.tie_weights()  # type: ignore[operator]
    left = [n for n, t in model.state_dict().items() if t.is_meta and not n.startswith(prefix + ".")]
    if left:
        source.tensor(left[0])  # raises, naming it


@contextmanager
def _materialised(block: nn.Module, index: int, model: nn.Module, source: Checkpoint) -> Iterator[None]:
    """The weights of one block, read from the checkpoint for the duration of the block."""
    prefix = f"{find_blocks(model)[0]}.{index}"
    for name, tensor in list(block.state_dict().items()):
        value = source.tensor(*_stored(f"{prefix}.{name}", model, source))
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"checkpoint={str(source.folder)!r}: {prefix}.{name} is {tuple(value.shape)}, its configuration "
                f"says {tuple(tensor.shape)}; fetch or save it again"
            )
        set_tensor(block, name, value.to(tensor.dtype))
    try:
        check_finite((f"{prefix}.{name}", tensor) for name, tensor in block.state_dict().items())
        yield
    finally:
        for name in list(block.state_dict()):
            set_tensor(block, name, None)


@dataclass(frozen=True)
class Plan:
    """The result that `compress` would have, computed from shapes alone.

    Attributes:
        sites: per site its name, shape, layer configuration and bits per weight after the step.
        skipped: modules left as they are, with the reason.
        bits_per_weight: of all sites together, everything included (scales, masks, adapters; not biases).
        bytes: of the whole model after the step.
        peak_bytes: above the resident weights, an upper bound: one block's statistics, work space and activations.
        flops: forward passes, statistics and the method itself.
    """

    method: str
    sites: list[dict[str, Any]]
    skipped: dict[str, str]
    bits_per_weight: float
    bytes: int
    peak_bytes: int
    flops: float

    def __str__(self) -> str:
        return (
            f"{self.method}: {len(self.sites)} sites, {len(self.skipped)} modules left as they are, "
            f"{self.bits_per_weight:.2f} bits per weight, model {self.bytes / 1e6:.0f} MB, "
            f"peak {self.peak_bytes / 1e6:.0f} MB above the weights, {self.flops:.2e} FLOPs"
        )


@checked("method")
def plan(
    model: Any,
    method: Method,
    *,
    sequences: int = 128,
    length: int = 2048,
    order: str = "sequential",
    batch_size: int | None = None,
    targets: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, ...] | None = None,
) -> Plan:
    """Dry run on the meta device: no weights are read and none are allocated.

    Args:
        model: a transformers configuration, a model, or a local folder.
        method: the method to plan for.
        sequences, length: size of the calibration set; for a model without blocks, `sequences` is the number of images.
        order, batch_size, targets: as for `compress`.
        dtype: dtype of the weights when `model` is a configuration; else they have their own.
        shape: of one sample, (channels, height, width), for a model without blocks; by default what its
            configuration says.

    Raises:
        OptionError: an option that cannot work, or a method that does not fit a site.

    Example:
        >>> from transformers import LlamaConfig
        >>> from refimpl import GPTQ
        >>> print(plan(LlamaConfig(), GPTQ(bits=4, group_size=128)))   # Llama-2-7B; doctest: +ELLIPSIS
        GPTQ(bits=4, ...): 224 sites, 67 modules left as they are, 4.16 bits per weight, model 3889 MB, peak ...
    """
    check_method(method)
    if order not in ORDERS:
        raise OptionError(f"order={order!r}: use {nearest(order, ORDERS)}")
    if isinstance(model, (str, Path)):
        folder = Path(model)
        model = empty_model(read_config(folder), Checkpoint(folder).dtype)
        if io.is_compressed(folder):
            io.restore_layers(model, folder, device="meta")
    if not isinstance(model, nn.Module):
        if not hasattr(model, "model_type"):
            raise OptionError(f"model={shown(model)}: pass a configuration of transformers, a model, or its folder")
        model = empty_model(model, dtype)
    with experts_put_back(model, always=True):
        if batch_size is None:
            batch_size = BATCH if has_blocks(model) else WHOLE_BATCH
        return _plan(model, method, sequences, length, order, batch_size, targets, shape)


def _plan(
    model: nn.Module,
    method: Method,
    sequences: int,
    length: int,
    order: str,
    batch_size: int,
    targets: str | None,
    shape: tuple[int, ...] | None,
) -> Plan:
    sites = find_sites(model, targets)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    stored = stored_dtype(model)
    whole = not has_blocks(model)
    samples = sequences if method.statistics else 0
    calls: dict[str, CallShape] = {}
    if whole and samples:
        calls = call_shapes(model, sites, shape)
    elif samples:
        calls = {s.name: CallShape(length, length * s.in_features, length * s.out_features) for s in sites}
    rows, bits, weights, saved = [], 0, 0, 0
    held: dict[int, int] = {}  # statistics that are in memory together
    flops = forward = prefixes = 0.0
    targets_held = inside = work = 0
    for site in sites:
        config = method.layer_config(site)
        check_groups(site, method)
        current = site.module
        layer = empty_layer(config, stored, "meta")
        size = layer.nbytes - layer.parts().get("bias", 0)
        count = site.in_features * site.out_features
        kinds = stored_dtypes(current, stored)
        before = sum(tensor.numel() * kinds[name].itemsize for name, tensor in current.state_dict().items())
        rows.append(
            {
                "site": site.name,
                "shape": [site.out_features, site.in_features],
                "layer": config,
                "bits": 8 * size / count,
            }
        )
        bits, weights, saved = bits + 8 * size, weights + count, saved + before - layer.nbytes
        flops += method.flops(site)
        if not samples:
            continue
        call = calls[site.name]
        forward += 2.0 * samples * call.rows * count
        prefixes += forward  # a pass that ends at this site
        together = 0 if whole and order == "parallel" else site.block
        held.setdefault(together, 0)
        inside = max(inside, call.rows * (4 * site.in_features + 2 * site.out_features))
        if "gram" in method.statistics:
            flops += 2.0 * samples * call.rows * site.in_features**2
            held[together] += 4 * site.in_features**2
        if "inputs" in method.statistics:
            held[together] += samples * (call.inputs + call.outputs) * dtype.itemsize
            targets_held += samples * call.outputs * dtype.itemsize if whole and order == "sequential" else 0
            # batches are joined, and the error is measured piece by piece
            measured = 16 * min(CHUNK, samples * call.inputs) * (1 + call.outputs // call.inputs)
            work = max(work, samples * max(call.inputs, call.outputs) * dtype.itemsize + measured)
    flops += forward if order == "parallel" else prefixes if whole else 2 * forward
    widest = max(site.in_features for site in sites)
    tallest = max(site.out_features for site in sites)
    work = max(work, 6 * 4 * widest * tallest)  # fp32 copies of one site
    if "gram" in method.statistics:
        work += 9 * 8 * widest**2  # fp64 factorisation of its second moment
    inside = inside if whole else length * (4 * widest + 2 * tallest)
    inside = 4 * batch_size * inside if samples else 0
    streams = 0 if whole else samples * length * _width(model) * dtype.itemsize
    kinds = stored_dtypes(model)
    tensors = model.state_dict(keep_vars=True)
    total = sum({id(t): t.numel() * kinds[name].itemsize for name, t in tensors.items()}.values())
    return Plan(
        repr(method),
        rows,
        skipped_modules(model, sites),
        bits / weights,
        total - saved,
        max(held.values(), default=0) + targets_held + work + streams + inside,
        flops,
    )
