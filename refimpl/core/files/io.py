"""Saving and loading compressed models (safetensors only), and the few file habits everything shares."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refimpl.core.arguments import checked, fits, misfit
from refimpl.core.compress.sites import experts_put_back, find_blocks, has_blocks, unfuse_experts
from refimpl.core.device import check_device
from refimpl.core.errors import CheckpointError, reading, reason
from refimpl.core.files.checkpoint import MANIFEST, Checkpoint, empty_model, model_class, read_config, set_tensor
from refimpl.core.files.companions import CARD, TOKENIZER, copy_tokenizer, methods_of, model_card, note_methods
from refimpl.core.files.folders import check_file, clear_temporary, holds_files, lock, writing
from refimpl.core.layers import CompressedLayer, PackedLinear, ServedLinear, ServedSparseLinear, empty_layer
from refimpl.core.stored import declare_stored, stored_dtype, stored_dtypes


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the block succeeds.

    A reader therefore never sees half a file, and an interruption leaves the old one untouched.

    Raises:
        FileError: the disk is full or read-only, or something else than a file is at `path`.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_write(target) as temporary:
        ...     _ = temporary.write_text("done")
        >>> target.read_text()
        'done'
    """
    path = Path(path)
    check_file(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o644)  # mkstemp makes files private; a shared cache must stay readable
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def data_path(*parts: str) -> Path:
    """A file of data/: beside the package in a checkout, inside it in an installed wheel.

    Example:
        >>> data_path("results").name
        'results'
    """
    package = Path(__file__).resolve().parents[2]
    inside = package / "_data"
    return (inside if inside.is_dir() else package.parent / "data").joinpath(*parts)


_PROGRESS = "refimpl-progress.json"
_SAVING = ".refimpl-saving"  # a folder inside, in which `save` collects the new model
_SAVED = ".refimpl-saved"  # its name once that is complete, until the files are in their places
_INDEX = "refimpl.safetensors.index.json"  # of a model of several files, for transformers
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "config.json", "adapter_config.json", MANIFEST)
_SINGLE_FILE_LIMIT = 5_000_000_000  # bytes; larger models get one file per block, which suits hubs and small memories


_FIELDS = {"format": int, "dtype": str, "layers": dict[str, dict], "weight_map": dict[str, str]}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON under a temporary name, then rename it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_json(path, {"rank": 4}); read_json(path)
        {'rank': 4}
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is missing or damaged.

    Example:
        >>> read_json(Path("/nowhere"))
        Traceback (most recent call last):
        ...
        refimpl.core.errors.CheckpointError: /nowhere cannot be read ([Errno 2] No such file or directory: \
'/nowhere'); save the model again
    """
    check_file(path)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); save the model again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as one safetensors file under a temporary name, then rename it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> write_tensors(path, {"w": torch.ones(2)}); load_file(path)
        {'w': tensor([1., 1.])}
    """
    with atomic_write(path) as temporary:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"format": "pt"},
        )


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The outermost compressed layers of a model, by name.

    Example:
        >>> compressed_layers(nn.Sequential(PackedLinear(values=torch.eye(2)), nn.ReLU()))
        {'0': PackedLinear(2 -> 2)}
    """
    found: dict[str, CompressedLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):  # one layer can be used at several places
        if isinstance(module, CompressedLayer) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def _layers(model: nn.Module, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Configurations of the outermost compressed layers, by name."""
    return {prefix + name: layer.config() for name, layer in compressed_layers(model).items()}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is stored, with tied weights once: those that `_tie` ties again."""
    tensors, kinds, state = {}, stored_dtypes(model), model.state_dict()
    ties = {name: state[other] for name, other in ties_of(model).items()}
    seen: set[tuple[int, int]] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.is_meta or (name in ties and place == (ties[name].data_ptr(), ties[name].numel())):
            continue
        # what is shared otherwise is written twice, which a file takes copies only of
        tensors[name] = (tensor.clone() if place in seen and tensor.numel() else tensor).to(kinds[name])
        seen.add(place)
    return tensors


def ties_of(model: nn.Module) -> dict[str, str]:
    """The weights that transformers ties, with the ones they are tied to; a compressed layer has none of them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> ties_of(LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50, tie_word_embeddings=True)))
        {'lm_head.weight': 'model.embed_tokens.weight'}
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: other for name, other in tied.items() if {name, other} <= own}


def tie(model: nn.Module, stored: Iterable[str]) -> None:
    """Tie the weights of a model that was just filled, except those of compressed layers.

    Args:
        stored: names of the tensors that the file held.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50, tie_word_embeddings=True))
        >>> set_tensor(model, "model.embed_tokens.weight", torch.ones(50, 32))
        >>> tie(model, ["model.embed_tokens.weight"]); model.lm_head.weight.sum().item()
        1600.0
    """
    tied: Any = model
    if hasattr(model, "all_tied_weights_keys"):
        tied.all_tied_weights_keys = ties_of(model)
        tied.tie_weights(missing_keys=set(model.state_dict()) - set(stored), recompute_mapping=False)


def is_compressed(folder: str | Path) -> bool:
    """Whether `folder` holds a finished model written by `save` or `compress(..., out=)`.

    A `save` that was killed after everything was written, while files were put in their places, is finished first.

    Example:
        >>> is_compressed("/nowhere")
        False
    """
    folder = Path(folder)
    if (folder / _SAVED).is_dir():
        with lock(folder):
            _put_in_place(folder)
    return (folder / MANIFEST).is_file()


def check_transformers(model: nn.Module) -> None:
    """Raise `CheckpointError` if `model` could not be built again: its configuration and class must be of transformers.

    Example:
        >>> check_transformers(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        refimpl.core.errors.CheckpointError: model=Linear: it has no transformers configuration, so it could not be \
built again; keep its state_dict() with safetensors.torch.save_file, and call compress again on a fresh one to load it
    """
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise CheckpointError(
            f"model={type(model).__name__}: it has no transformers configuration, so it could not be built again; keep "
            "its state_dict() with safetensors.torch.save_file, and call compress again on a fresh one to load it"
        )
    config: Any = copy.copy(model.config)
    config.architectures = [type(model).__name__]
    if model_class(config) is not type(model):
        raise CheckpointError(
            f"model={type(model).__name__}: it is no class of transformers, and {type(config).__name__} stands for a "
            f"{model_class(config).__name__}, so it could not be built again; save that model instead, or register the "
            "class with AutoModelForCausalLM.register"
        )


def _write_config(model: nn.Module, folder: Path, weights: str) -> None:
    config: Any = model.config
    value = config.to_diff_dict()
    value.pop("transformers_weights", None)  # with it, a transformers without refimpl would not stop
    value["architectures"] = [type(model).__name__]
    if stored_dtype(model) != next((p.dtype for p in model.parameters() if p.is_floating_point()), None):
        value["dtype"] = str(stored_dtype(model)).removeprefix("torch.")
    # without refimpl, transformers warns of a format it does not know, then finds no file of a name it knows and stops;
    # under its own names it would take what fits and fill in random weights for the rest
    value["quantization_config"] = {"quant_method": "refimpl", "weights": weights}
    write_json(folder / "config.json", value)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        write_json(folder / "generation_config.json", generation.to_diff_dict())


@checked()
def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a compressed (or plain) transformers model, of language or of images, as safetensors that `load` reads.

    What was in the folder before stays whole until the new model is, so the disk needs room for both. A tokenizer that
    lies beside the checkpoint the model came from is copied, unless the folder has one; and a README.md says what the
    model is. `model.save_pretrained(folder)` of a model with compressed layers does the same.

    Floating numbers are written in the dtype they count as, `refimpl.core.stored.stored_dtype`: a model of 16 bits that
    was loaded to compute in float32 is a model of 16 bits again.

    Args:
        model: a transformers model, with any number of compressed layers and folded batch norms.
        folder: created if missing; a model that refimpl wrote there is replaced.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds another checkpoint or another process writes to it, or the model has no
            transformers configuration.
        FileError: the disk is full or read-only, or there is a file where a folder is meant.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress, load, save
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50)).eval()
        >>> _ = compress(model, RTN(bits=4, group_size=32), progress=False)
        >>> again = load(save(model, tempfile.mkdtemp()))
        >>> tokens = torch.arange(8)[None]
        >>> torch.equal(model(tokens).logits, again(tokens).logits)
        True
    """
    check_transformers(model)
    folder = Path(folder)
    with lock(folder), writing(folder):
        if (folder / _SAVED).is_dir():
            _put_in_place(folder)
        ours = (folder / MANIFEST).is_file() or (folder / _SAVING).exists()
        if (folder / _PROGRESS).exists():
            raise CheckpointError(
                f"folder={str(folder)!r} holds an unfinished run of compress; finish it, or choose another folder"
            )
        if not ours and any(next(folder.glob(pattern), None) for pattern in MODEL_FILES):
            raise CheckpointError(
                f"folder={str(folder)!r} holds a checkpoint that refimpl did not write; choose another folder"
            )
        clear_temporary(folder)
        new = folder / _SAVING
        shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
        try:
            new.mkdir()
            with experts_put_back(model, always=True):
                unfuse_experts(model)  # one format, whether any expert was compressed or not
                _save(model, new, beside=folder)
            for path in new.iterdir():
                check_file(folder / path.name)  # or it could be put in its place by half
            os.replace(new, folder / _SAVED)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        _put_in_place(folder)
    return folder


def _put_in_place(folder: Path) -> None:
    """Move a complete new model up into `folder`, the manifest last, and delete what belongs to the old one only.

    It can be killed anywhere and repeated.
    """
    new = folder / _SAVED
    with writing(folder):
        for path in sorted(new.iterdir(), key=lambda path: path.name == MANIFEST):
            os.replace(path, folder / path.name)
        named = set(read_json(folder / MANIFEST)["weight_map"].values())
        for path in folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()
        if len(named) == 1:
            (folder / _INDEX).unlink(missing_ok=True)
        new.rmdir()


def _save(model: nn.Module, folder: Path, beside: Path) -> None:
    tensors = _own_tensors(model)
    prefix = find_blocks(model)[0] if has_blocks(model) else ""
    shards: dict[str, dict[str, Tensor]] = {"weights.safetensors": tensors}
    if sum(tensor.nbytes for tensor in tensors.values()) > _SINGLE_FILE_LIMIT:
        shards = {}
        for name, tensor in tensors.items():
            inside = prefix and name.startswith(prefix + ".")
            file = f"block-{int(name[len(prefix) + 1 :].partition('.')[0]):05d}" if inside else "rest"
            shards.setdefault(f"{file}.safetensors", {})[name] = tensor
    for file, content in shards.items():
        write_tensors(folder / file, content)
    weight_map = {name: file for file, content in shards.items() for name in content}
    _finish(model, folder, beside, weight_map, _layers(model), {"methods": methods_of(model)})


def _finish(
    model: nn.Module,
    folder: Path,
    beside: Path,
    weight_map: dict[str, str],
    layers: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Write what describes the tensors, the manifest last: it is what makes the folder a model.

    Args:
        beside: the folder in which the files will lie in the end, whose own tokenizer and README.md stay.
    """
    files = sorted(set(weight_map.values()))
    weights = files[0] if len(files) == 1 else _INDEX
    if weights == _INDEX:
        write_json(folder / _INDEX, {"metadata": {}, "weight_map": weight_map})
    _write_config(model, folder, weights)
    if not any(next(beside.glob(pattern), None) for pattern in TOKENIZER):
        copy_tokenizer(model, folder)
    if not (beside / "README.md").exists() or CARD in (beside / "README.md").read_text(errors="replace"):
        with atomic_write(folder / "README.md") as temporary:
            tokenizer = any(next(place.glob("tokenizer*"), None) for place in (folder, beside))
            temporary.write_text(model_card(model, layers, run["methods"], tokenizer), encoding="utf-8")
    manifest = {
        "format": 1,
        "dtype": str(stored_dtype(model)).removeprefix("torch."),
        "layers": layers,
        "weight_map": weight_map,
        **run,
    }
    identities = [name for name, module in model.named_modules() if type(module) is nn.Identity]
    if identities:
        manifest["identities"] = identities
    write_json(folder / MANIFEST, manifest)


def restore_layers(
    model: nn.Module, folder: str | Path, device: torch.device | str = "meta", dtype: torch.dtype | None = None
) -> None:
    """Give `model` the compressed layers recorded in `folder`, with uninitialised tensors (of `dtype`, or as stored).

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50))
        >>> restore_layers(model, save(model, tempfile.mkdtemp()))   # nothing was compressed: nothing to do
    """
    manifest = read_json(Path(folder) / MANIFEST)
    check_manifest(manifest, folder)
    unfuse_experts(model)
    with reading(Path(folder) / MANIFEST, "save the model again"):
        _restore(model, manifest, dtype, device)


def _restore(model: nn.Module, manifest: dict[str, Any], dtype: torch.dtype | None, device: torch.device | str) -> None:
    for name in manifest.get("identities", []):  # where a batch norm was folded, the architecture still has it
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity())
    for key in manifest["weight_map"]:  # and what it was folded into has a bias now
        name, _, tensor = key.rpartition(".")
        module = _submodule(model, name)
        if tensor == "bias" and isinstance(module, nn.Conv2d) and module.bias is None:
            bias = torch.empty(module.out_channels, device="meta", dtype=module.weight.dtype)
            module.bias = nn.Parameter(bias, requires_grad=False)
    _place_layers(model, manifest["layers"], dtype or getattr(torch, manifest["dtype"]), device)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # inside a compressed layer that is not there yet
        return None


def _place_layers(model: nn.Module, layers: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> None:
    for name, config in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, empty_layer(config, dtype, device))


@checked()
def load(folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | int = "cpu") -> nn.Module:
    """Read a model written by `save` or by `compress(..., out=)`.

    Args:
        folder: the folder.
        dtype: dtype of the tensors that are not packed; default: as stored. A wider one is used for
            computing only: the model still counts as it is stored (`refimpl.core.stored`).
        device: of the model.

    Returns:
        The model in evaluation mode, ready for ``generate``.

    Raises:
        CheckpointError: not written by refimpl, unfinished, truncated, or with tensors missing or left over.
        OptionError: a device that this machine has not.
        FileError: there is a folder or a named pipe where a file is meant.

    Example:
        >>> load("/nowhere")
        Traceback (most recent call last):
        ...
        refimpl.core.errors.CheckpointError: folder='/nowhere' was not written by refimpl (no refimpl.json); \
use transformers' from_pretrained for plain checkpoints
    """
    check_device(device)
    folder = Path(folder)
    if not is_compressed(folder):
        raise CheckpointError(
            f"folder={str(folder)!r} holds an unfinished run; call compress again with out= to finish it"
            if (folder / _PROGRESS).exists()
            else f"folder={str(folder)!r} holds half a model, its saving was interrupted; save it again"
            if (folder / _SAVING).is_dir()
            else f"folder={str(folder)!r} was not written by refimpl (no {MANIFEST}); "
            "use transformers' from_pretrained for plain checkpoints"
        )
    source = Checkpoint(folder)
    with reading(folder, "save the model again"):
        manifest = read_json(folder / MANIFEST)
        check_manifest(manifest, folder)
        stored = getattr(torch, manifest["dtype"])
        model = empty_model(read_config(folder), stored, folder)
        restore_layers(model, folder)
        check_tensors(model, folder)
    for name in source.keys():
        set_tensor(model, name, source.tensor(name))
    tie(model, source.keys())
    if dtype is not None:
        _cast(model, dtype)
        tie(model, source.keys())  # each got a copy of its own
        declare_stored(model, min(dtype, stored, key=lambda kind: kind.itemsize))
    note_methods(model, manifest.get("methods", []))
    return model.to(device).eval()


def check_manifest(manifest: Any, folder: str | Path) -> None:
    """Raise `CheckpointError` unless a manifest has what every one has.

    Example:
        >>> check_manifest({"format": 2}, "model")
        Traceback (most recent call last):
        ...
        refimpl.core.errors.CheckpointError: model: format 2 is not 1; it needs a newer refimpl
    """
    if isinstance(manifest, dict) and "format" in manifest and manifest["format"] != 1:
        raise CheckpointError(f"{folder}: format {manifest['format']!r} is not 1; it needs a newer refimpl")
    wrong = misfit(manifest, _FIELDS)
    if wrong is None and not isinstance(getattr(torch, manifest["dtype"], None), torch.dtype):
        wrong = f"'dtype' is {manifest['dtype']!r}, which torch has not"
    if wrong is None and not fits(manifest.get("methods", []), list[str]):
        wrong = "'methods' is no list of strings"
    if wrong is not None:
        raise CheckpointError(f"{Path(folder) / MANIFEST} is damaged: {wrong}; save the model again")


def check_tensors(model: nn.Module, folder: Path) -> None:
    """Raise `CheckpointError` unless `folder` holds just the tensors of `model`, which has its layers restored.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50))
        >>> check_tensors(model, save(model, tempfile.mkdtemp()))
    """
    source = Checkpoint(folder)
    left = set(source.keys())
    lacking: dict[int, str] = {}
    held: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in left:
            lacking.setdefault(id(tensor), name)
            continue
        held.add(id(tensor))
        left.discard(name)
        if (shape := source.shape(name)) != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name!r} is {shape}, expected {tuple(tensor.shape)}; save the model again"
            )
    tied = ties_of(model)  # stored once; from_pretrained ties when all is read
    missing = [name for tensor, name in lacking.items() if tensor not in held and tied.get(name) not in source.keys()]
    if missing or left:
        what = f"lacks {missing[0]!r}" if missing else f"has a tensor of no use, {sorted(left)[0]!r}"
        raise CheckpointError(f"{folder} {what}: it is damaged or was written by another version; save the model again")


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of weights, but not of quantisation scales, which are part of the format."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            set_tensor(module, name, parameter.to(dtype))
        if isinstance(module, (PackedLinear, ServedLinear)):
            module.dtype = dtype
        if isinstance(module, ServedSparseLinear) or (isinstance(module, PackedLinear) and module.bits is None):
            module.values = module.values.to(dtype)


def _runs(marks: list[str]) -> list[str]:
    """The part of each mark that identifies options and tokens."""
    return [mark.partition(":")[0] for mark in marks]


class ShardWriter:
    """Writes a model block by block, and continues where an interrupted run stopped.

    Args:
        folder: target, which this process has locked (`refimpl.core.files.folders.lock`).
        model: the model being compressed.
        marks: one text per block, ``run:state``: digests of all that is the same for every block (options, tokens,
            weights outside the blocks), and of the block as it was before.

    Raises:
        CheckpointError: the folder holds another run, or something that refimpl did not write.
    """

    def __init__(self, folder: Path, model: nn.Module, marks: list[str]) -> None:
        self.folder, self.marks, self.dtype = folder, marks, stored_dtype(model)
        self.prefix, _ = find_blocks(model)
        self.state: dict[str, Any] = {"done": 0, "marks": marks, "reports": [], "layers": {}, "weight_map": {}}
        finished, unfinished = folder / MANIFEST, folder / _PROGRESS
        if unfinished.exists():
            state = read_json(unfinished)
            done = state["done"]
            if done and (_runs(state["marks"]) != _runs(marks) or state["marks"][done:] != marks[done:]):
                raise CheckpointError(
                    f"out={str(folder)!r} holds an unfinished run with other options, tokens or weights; "
                    "repeat that call to finish it, or choose another folder"
                )
            if done:
                self.state = state
        elif finished.exists():
            manifest = read_json(finished)
            if manifest.get("marks") != marks and not self._already(manifest, model):
                raise CheckpointError(f"out={str(folder)!r} holds another compressed model; choose another folder")
            self.state |= {
                "done": len(marks),
                "reports": manifest["reports"],
                "layers": manifest["layers"],
                "weight_map": manifest["weight_map"],
            }
            note_methods(model, manifest.get("methods", []))
        elif holds_files(folder):
            raise CheckpointError(f"out={str(folder)!r} is not empty and not one of our runs; choose another folder")

    def _already(self, manifest: dict[str, Any], model: nn.Module) -> bool:
        # the same call made again on the very model it has already compressed; a next step has another run digest
        return _runs(self.marks) == _runs(manifest.get("marks", [])) and manifest["layers"] == _layers(model)

    def start(self) -> None:
        """Make the folder one of ours, so that a run that is killed in its first block resumes."""
        clear_temporary(self.folder)
        if not (self.folder / MANIFEST).exists():
            write_json(self.folder / _PROGRESS, self.state)

    @property
    def finished(self) -> bool:
        """Whether the folder holds the finished model."""
        return (self.folder / MANIFEST).exists()

    @property
    def done(self) -> int:
        """Number of finished blocks."""
        return int(self.state["done"])

    def reports(self, kind: Any) -> list[Any]:
        """Entries of the finished blocks, as `kind`."""
        return [kind(**entry) for entry in self.state["reports"]]

    def add_block(self, index: int, block: nn.Module, hidden: list[Tensor], entries: list[dict[str, Any]]) -> None:
        """Write one finished block and the activations after it; the progress file last."""
        prefix = f"{self.prefix}.{index}."
        kinds = stored_dtypes(block, self.dtype)
        tensors = {prefix + name: tensor.to(kinds[name]) for name, tensor in block.state_dict().items()}
        file = f"block-{index:05d}.safetensors"
        write_tensors(self.folder / file, tensors)
        if hidden:
            write_tensors(self.folder / f"hidden-{index:05d}.safetensors", {str(i): h for i, h in enumerate(hidden)})
        self.state["layers"] |= _layers(block, prefix)
        self.state["weight_map"] |= dict.fromkeys(tensors, file)
        self.state["reports"] += entries
        self.state["done"] = index + 1
        write_json(self.folder / _PROGRESS, self.state)
        (self.folder / f"hidden-{index - 1:05d}.safetensors").unlink(missing_ok=True)

    def hidden(self, like: list[Tensor]) -> list[Tensor]:
        """The activations after the last finished block."""
        stored = load_file(self.folder / f"hidden-{self.done - 1:05d}.safetensors")
        return [stored[str(i)].to(tensor) for i, tensor in enumerate(like)]

    def restore(self, model: nn.Module) -> None:
        """Give an in-memory model the finished blocks."""
        unfuse_experts(model)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        device = next(model.parameters()).device
        source = Checkpoint(self.folder)
        _place_layers(model, self.state["layers"], dtype, "meta")
        for name in self.state["layers"]:
            layer = model.get_submodule(name)
            for tensor, empty in layer.state_dict().items():
                set_tensor(layer, tensor, source.tensor(f"{name}.{tensor}").to(device, empty.dtype))

    def finish(self, model: nn.Module) -> None:
        """Write what lies outside the blocks, and make the folder a loadable model."""
        if not self.finished:
            rest = {n: t for n, t in _own_tensors(model).items() if not n.startswith(self.prefix + ".")}
            write_tensors(self.folder / "rest.safetensors", rest)
            weight_map = self.state["weight_map"] | dict.fromkeys(rest, "rest.safetensors")
            run = {"marks": self.state["marks"], "reports": self.state["reports"], "methods": methods_of(model)}
            _finish(model, self.folder, self.folder, weight_map, self.state["layers"], run)
        for path in (*self.folder.glob("hidden-*.safetensors"), self.folder / _PROGRESS):
            path.unlink(missing_ok=True)
