"""Checkpoints of a training: nested values as safetensors without pickle, and files that stay consistent.

A checkpoint of step 40 with three processes is

    checkpoint.safetensors              what all share, and what the first process knows alone
    checkpoint-rank1-step40.safetensors
    checkpoint-rank2-step40.safetensors what these know alone, if they know anything

The first file is the checkpoint: it names the step, and is replaced after all others of that step are written; those
of the step before are removed only then. So whenever a run is killed, the first file and those of its step are there.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import CellType, CodeType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from refimpl.core.arguments import misfit
from refimpl.core.errors import CheckpointError, OptionError, reading
from refimpl.core.files.folders import check_file
from refimpl.core.files.io import atomic_write

_MAIN = "checkpoint.safetensors"
_FORMAT = 2
_START_AGAIN = "delete it to start again"

Tree = Any
"""A value that JSON holds; ``{"$tensor": name}`` stands for a tensor."""


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Tree:
    """A nested value as JSON and tensors.

    Args:
        value: None, booleans, numbers, strings, tensors (also the state of a torch generator), and lists, tuples and
            dictionaries of such values, with keys of any of these kinds but tensors.
        name: of the value, in messages and as the start of the names of its tensors.
        tensors: takes the tensors found, by name; on the CPU and contiguous.

    Returns:
        What `unpack` reads.

    Raises:
        OptionError: a value of another kind; says where it is.

    Example:
        >>> tensors = {}
        >>> pack({"mean": torch.zeros(2), "seen": (3, None)}, "state", tensors)
        {'mean': {'$tensor': 'state/mean'}, 'seen': {'$tuple': [3, None]}}
        >>> tensors
        {'state/mean': tensor([0., 0.])}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise OptionError(
                f"{name} is a {value.layout} tensor of {value.dtype}; keep it as dense ones of plain types"
            )
        while name in tensors:  # {"a/b": ..., "a": {"b": ...}}
            name += "'"
        tensors[name] = value.detach().cpu().contiguous()
        return {"$tensor": name}
    if isinstance(value, (list, tuple)):
        entries = [pack(entry, f"{name}/{i}", tensors) for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"$tuple": entries}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(entry, f"{name}/{key}" if name else key, tensors) for key, entry in value.items()}
        for key in value:
            if isinstance(key, Tensor):
                raise OptionError(f"{name} has a tensor as a key; number the tensors, and keep the numbers as keys")
        return {"$dict": [[pack(k, f"{name}/key", {}), pack(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    raise OptionError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold; make it of tensors, numbers, strings, None, "
        "lists, tuples and dictionaries"
    )


def unpack(tree: Tree, tensors: dict[str, Tensor]) -> Any:
    """The value that `pack` took apart; its tensors are on the CPU.

    Example:
        >>> tensors = {}
        >>> unpack(pack({1: (torch.ones(1), "a")}, "state", tensors), tensors)
        {1: (tensor([1.]), 'a')}
    """
    if isinstance(tree, list):
        return [unpack(entry, tensors) for entry in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(unpack(entry, tensors) for entry in tree["$tuple"])
    if "$dict" in tree:
        return {unpack(key, tensors): unpack(entry, tensors) for key, entry in tree["$dict"]}
    return {key: unpack(entry, tensors) for key, entry in tree.items()}


class Checkpoints:
    """The checkpoint of a run in a folder, which all processes see.

    Args:
        folder: made if missing.
        rank, world: number of this process, and of all.
        apart: whether processes know something alone, so that each writes a file.

    Example:
        >>> import tempfile
        >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
        >>> list(checkpoints.runs())
        []
        >>> checkpoints.write(40, {"run": {"lr": 0.1}, "weights": torch.ones(2)})
        >>> list(checkpoints.runs()), checkpoints.read()
        ([{'lr': 0.1}], {'step': 40, 'run': {'lr': 0.1}, 'weights': tensor([1., 1.])})
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1, apart: bool = False) -> None:
        self.folder, self.rank, self.world, self.apart = folder, rank, world, apart and world > 1

    def write(self, step: int, content: dict[str, Any]) -> None:
        """Replace the checkpoint; all processes call this at the same step.

        Args:
            step: updates done.
            content: of this process's file, as `pack` takes it, with "run"; not used where it writes none.

        Raises:
            OptionError: a value that `pack` refuses.
        """
        if self.apart:
            if self.rank:
                _write(self._path(self.rank, step), step, content)
            dist.barrier()  # from here on every file of this step is there but the first
        if self.rank == 0:
            _write(self._path(0, step), step, content)
        if self.world > 1:
            dist.barrier()  # from here on nobody needs those of the step before
        if self.apart and self.rank:
            for path in self.folder.glob(f"checkpoint-rank{self.rank}-step*.safetensors"):
                if path != self._path(self.rank, step):
                    path.unlink()

    def runs(self) -> Iterator[dict[str, Any]]:
        """Fingerprints of the run: "run" of the file of each process that has one; none without a checkpoint.

        Each process looks at all files, so that all stop where one is missing.

        Raises:
            CheckpointError: a file is missing, damaged, or of another version.
        """
        if not self._path(0, 0).exists():
            return
        first = _about(self._path(0, 0))
        yield first["run"]
        for rank in range(1, self.world if self.apart else 1):
            path = self._path(rank, first["step"])
            if not path.exists():
                raise CheckpointError(
                    f"{path} is missing: what process {rank} alone knew at step {first['step']}; put it back, or delete "
                    f"{_MAIN} to start again"
                )
            yield _about(path)["run"]

    def read(self, rank: int = 0) -> dict[str, Any]:
        """Contents of the file of a process, with "step"; its tensors are on the CPU.

        Raises:
            CheckpointError: the file is damaged or of another version.
        """
        path = self._path(rank, _about(self._path(0, 0))["step"])
        with reading(path, _START_AGAIN):
            return unpack(_about(path), _tensors(path))

    def _path(self, rank: int, step: int) -> Path:
        return self.folder / (f"checkpoint-rank{rank}-step{step}.safetensors" if rank else _MAIN)


def _write(path: Path, step: int, content: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    about = {"format": _FORMAT, "step": step} | pack(content, "", tensors)
    seen = set()
    for (
        name,
        tensor,
    ) in tensors.items():  # a file holds no shared storage, so of tied weights each name gets its own copy
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"refimpl": json.dumps(about)})


def _about(path: Path) -> dict[str, Any]:
    """The description of a checkpoint, with "run" unpacked."""
    check_file(path)
    with reading(path, _START_AGAIN), safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["refimpl"])
        if about.pop("format", 1) != _FORMAT:
            raise ValueError("another version wrote it")
        wrong = misfit(about, {"step": int, "run": dict})
        if wrong is not None or about["step"] < 1:
            raise ValueError(wrong or f"'step' is {about['step']}")
        return about | {"run": unpack(about["run"], {})}


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def described(value: Any, depth: int = 4) -> Any:
    """What tells a function of the caller from another, as JSON: its name, its code, and what it was made with.

    Of functions the fractions, strings, functions and dataclasses that they close over count, unless they rebind them, but
    no whole numbers and lists, which count and collect; of partial functions the arguments, of callable objects the
    functions and dataclasses among their attributes.

    Args:
        value: a function, or what one was made with.
        depth: levels to go down; below, and of everything else, the type alone counts.

    Example:
        >>> def scaled(factor):
        ...     return lambda model, batch: factor * model(batch)
        >>> described(scaled(0.5)) == described(scaled(0.5)), described(scaled(0.5)) == described(scaled(0.3))
        (True, False)
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(entry, depth) for entry in value]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if depth == 0 or isinstance(value, (type, Tensor, nn.Module)):
        return kind
    if isinstance(value, functools.partial):
        given = {name: described(entry, depth - 1) for name, entry in value.keywords.items()}
        return {"of": described(value.func, depth - 1), "args": described(value.args, depth - 1), "keywords": given}
    if inspect.ismethod(value):
        return {"of": described(value.__func__, depth - 1), "object": described(value.__self__, depth - 1)}
    value = inspect.unwrap(value) if inspect.isfunction(value) else value
    if inspect.isfunction(value):
        code = value.__code__
        rebound = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
        closed = dict(zip(code.co_freevars, value.__closure__ or (), strict=True))
        return {
            "of": f"{value.__module__}.{value.__qualname__}",
            "code": hashlib.sha256("\n".join(_code(code)).encode()).hexdigest(),
            "closed": {n: described(_content(cell), depth - 1) for n, cell in closed.items() if n not in rebound},
            "defaults": described([*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()], depth - 1),
        }
    if dataclasses.is_dataclass(value):
        settings = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        settings = {
            n: v for n, v in getattr(value, "__dict__", {}).items() if callable(v) or dataclasses.is_dataclass(v)
        }
    return {"of": kind, "settings": {name: described(entry, depth - 1) for name, entry in settings.items()}}


def without_code(told: Any) -> Any:
    """What `described` says of a function, but for its code, which depends on the version of Python.

    Example:
        >>> without_code(described(lambda x: x)) == without_code(described(lambda x: 2 * x))
        True
    """
    if isinstance(told, dict):
        return {name: without_code(entry) for name, entry in told.items() if name != "code"}
    return [without_code(entry) for entry in told] if isinstance(told, list) else told


def _code(code: CodeType) -> Iterator[str]:
    """What a function does, without its docstring and line numbers."""
    yield code.co_code.hex()
    yield " ".join(code.co_names)
    for place, value in enumerate(code.co_consts):
        if isinstance(value, CodeType):
            yield from _code(value)
        elif isinstance(value, frozenset):
            yield repr(sorted(map(repr, value)))
        elif place or not isinstance(value, str):
            yield repr(value)


def _content(cell: CellType) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # not bound yet
        return None
    told = isinstance(value, (float, str)) or callable(value) or dataclasses.is_dataclass(value)
    return value if told else None


def whole(value: Any, keep: bool = True) -> Any:
    """A nested value with its sharded tensors gathered on the CPU, which all processes do together.

    Args:
        value: dictionaries, lists and tuples of anything.
        keep: whether this process wants them; None stands for each where it does not.

    Example:
        >>> whole({"step": [torch.ones(1)]})
        {'step': [tensor([1.])]}
    """
    if hasattr(value, "full_tensor"):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None  # one at a time: no device need hold all of them
    if isinstance(value, dict):
        return {key: whole(entry, keep) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(entry, keep) for entry in value)
    return value


def like(value: Tensor, example: Any) -> Tensor:
    """`value` on the device of `example`, and sharded like it.

    Example:
        >>> like(torch.ones(1), torch.zeros(1)).device
        device(type='cpu')
    """
    if hasattr(example, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)
    return value.to(example.device)
