"""Policies and their contents, tensors included: compared and printed by value, written as JSON, built from it again."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from refimpl.core.errors import CheckpointError, OptionError, reading
from refimpl.core.files.folders import check_file

K = TypeVar("K", bound=type)
_SHOWN = 3  # entries printed of a sequence that holds tensors


_STORABLE: set[type] = set()  # what a file may have built: nothing else, whatever it names


def storable(kind: K) -> K:
    """Let a dataclass that is no `ByContent` be written to files and built from them, as a decorator.

    Example:
        >>> from dataclasses import dataclass
        >>> @storable
        ... @dataclass
        ... class Step:
        ...     rank: int
        >>> to_json(Step(2))["config"]
        {'rank': 2}
    """
    _STORABLE.add(kind)
    return kind


class ByContent:
    """Base of frozen dataclasses that hold tensors, also inside tuples, lists, dictionaries and other dataclasses.

    A subclass can be written to files and is built from them.

    The methods that `dataclass` generates fail on tensors: they ask ``bool(a == b)`` and print every number. These
    compare numbers (on any device), print dtypes and shapes, and hash without reading them.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Factors(ByContent):
        ...     A: Tensor
        ...     rank: int = 2
        >>> Factors(torch.ones(4, 2)), Factors(torch.ones(4, 2)) == Factors(torch.ones(4, 2))
        (Factors(A=float32[4, 2], rank=2), True)
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        storable(cls)
        methods: dict[str, Callable[..., Any]] = {"__eq__": _equal, "__hash__": _hash, "__repr__": _shown}
        for name, method in methods.items():  # `dataclass` keeps a method that the class itself defines
            if name not in cls.__dict__:
                setattr(cls, name, method)


def _equal(self: Any, other: Any) -> Any:
    return _same(self, other) if type(self) is type(other) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_outline(self))


def _shown(self: Any) -> str:
    inside = [f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if f.repr]
    return f"{type(self).__qualname__}({', '.join(inside)})"


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.to(a.device))
    if type(a) is type(b) and isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if type(a) is type(b) and isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if type(a) is type(b) and is_dataclass(a):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.compare)
    return bool(a == b)


def _outline(value: Any) -> Any:
    """A hashable stand-in for a value, equal for equal values."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    if isinstance(value, (list, tuple)):
        return tuple(_outline(item) for item in value)
    if isinstance(value, dict):
        return frozenset((key, _outline(item)) for key, item in value.items())
    if is_dataclass(value):
        return type(value), *(_outline(getattr(value, f.name)) for f in fields(value) if f.compare)
    return value


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        texts = [_text(item) for item in value]
        if len(texts) > _SHOWN and any(_holds_tensor(item) for item in value):
            texts = [*texts[:_SHOWN], f"... {len(texts)} in all"]
        left, right = "[]" if isinstance(value, list) else "()"
        return f"{left}{', '.join(texts)}{',' if right == ')' and len(texts) == 1 else ''}{right}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_text(item)}' for key, item in value.items())}}}"
    if is_dataclass(value) and not isinstance(value, (ByContent, type)):
        return _shown(value)
    return repr(value)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    if is_dataclass(value):
        return any(_holds_tensor(getattr(value, f.name)) for f in fields(value))
    return isinstance(value, Tensor)


def to_json(value: Any, tensors: dict[str, Tensor] | None = None, name: str = "value") -> Any:
    """A value as JSON that `from_json` takes; a digest of dtype, shape and numbers stands for each tensor.

    Args:
        value: None, a number, a text, a tensor, or tuples, lists, dictionaries and dataclasses (`ByContent`, or
            marked `storable`) of these.
        tensors: collects the tensors by digest; None drops them.
        name: of the value, for the error.

    Raises:
        OptionError: anything else is in it.

    Example:
        >>> to_json((1, {"a": torch.zeros(2)}))["tuple"][0]
        1
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
        key = f"sha256:{digest.hexdigest()}"
        if tensors is not None:
            tensors[key] = data
        return {"tensor": key}
    if isinstance(value, list):
        return [to_json(item, tensors, f"{name}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [to_json(item, tensors, f"{name}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, (int, str)) for key in value):
        return {"dict": [[key, to_json(item, tensors, f"{name}[{key!r}]")] for key, item in value.items()]}
    if type(value) in _STORABLE and is_dataclass(value):
        kind = type(value)
        config = {f.name: to_json(getattr(value, f.name), tensors, f.name) for f in fields(value) if f.init}
        return {"kind": kind.__qualname__, "module": kind.__module__, "config": config}
    raise OptionError(
        f"{name}={value!r}: a {type(value).__name__} cannot be written to a file; use numbers, texts, tensors, and "
        "tuples, lists, dictionaries or dataclasses (marked refimpl.core.cache.content.storable) of these"
    )


def from_json(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `to_json` described.

    Args:
        tree: JSON.
        tensors: by digest.

    Raises:
        CheckpointError: a tensor is missing, or a class is unknown or not made for files (`ByContent`, `storable`).
            Only modules of refimpl are imported to find one.

    Example:
        >>> tensors = {}
        >>> from_json(to_json([torch.ones(2), (1, 2), {3: "x"}], tensors), tensors)
        [tensor([1., 1.]), (1, 2), {3: 'x'}]
    """
    if isinstance(tree, list):
        return [from_json(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        if tree["tensor"] not in tensors:
            raise CheckpointError(f"the tensor {tree['tensor']} is not in the file")
        return tensors[tree["tensor"]]
    if "tuple" in tree:
        return tuple(from_json(item, tensors) for item in tree["tuple"])
    if "dict" in tree:
        return {key: from_json(item, tensors) for key, item in tree["dict"]}
    kind = _class(tree["kind"], tree["module"])
    config = {name: from_json(item, tensors) for name, item in tree["config"].items()}
    try:
        return kind(**config)
    except (TypeError, OptionError) as error:  # damaged, or written by a version with other fields
        raise CheckpointError(f"{tree['kind']} of {tree['module']} cannot be built again: {error}") from error


def current_modules(tree: Any) -> Any:
    """A description with every class named by the module it is in now, where that is known.

    Files name the module of each dataclass at the time of writing. A class that has moved since is still found under
    the old name, where that imports it, so such descriptions are equal.

    Example:
        >>> from refimpl.baselines.kvcache import SnapKV   # moved into a file of its own below this package
        >>> current_modules({"kind": "SnapKV", "module": "refimpl.baselines.kvcache", "config": {}})["module"]
        'refimpl.baselines.kvcache.snapkv'
    """
    if isinstance(tree, list):
        return [current_modules(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    known = {name: current_modules(item) for name, item in tree.items()}
    if "kind" in tree:
        try:
            known["module"] = _class(tree["kind"], tree["module"]).__module__
        except CheckpointError:
            pass  # a class unknown here keeps its name
    return known


def _class(kind: str, module: str) -> type:
    if module not in sys.modules and module.partition(".")[0] == "refimpl":
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            pass
    found: Any = sys.modules.get(module)
    for name in kind.split("."):
        found = getattr(found, name, None)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise CheckpointError(
            f"no dataclass {kind} in {module}; import the module that defines it, or use the version of refimpl that "
            "wrote the file"
        )
    if found not in _STORABLE:
        raise CheckpointError(
            f"{kind} of {module} is not made for files, so none is built; mark it refimpl.core.cache.content.storable if "
            "it is yours, and do not use a file that you did not write"
        )
    return found


def seal(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A description as the JSON for `load_described`, which finds out whether it or the tensors are others since.

    Args:
        about: JSON.
        tensors: by name; their dtypes and shapes count.

    Example:
        >>> seal({"bits": 4}, {})
        '{"bits": 4, "seal": "...'
    """
    return json.dumps(about | {"seal": _seal(about, tensors)})


def _seal(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    outline = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items())
    return hashlib.sha256(json.dumps([about, outline], sort_keys=True).encode()).hexdigest()


def load_described(
    path: str | Path, key: str, what: str, device: torch.device | str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a safetensors file whose metadata describes its content as JSON.

    Args:
        path: the file.
        key: of the JSON among the metadata.
        what: the kind of file that is expected, for messages.
        device: of the tensors.

    Returns:
        The JSON, and the tensors by name.

    Raises:
        CheckpointError: it cannot be read, or is not such a file.
        FileError: there is a folder or a named pipe instead.

    Example:
        >>> load_described("nowhere.safetensors", "refimpl-policy", "a policy", "cpu")
        Traceback (most recent call last):
        ...
        refimpl.core.errors.CheckpointError: path='nowhere.safetensors' cannot be read...
    """
    check_file(Path(path))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"path={str(path)!r} cannot be read ({error}); save the {what} again") from error
    if key not in metadata:
        raise CheckpointError(f"path={str(path)!r} is no {what} written by refimpl")
    with reading(f"path={str(path)!r}", f"save the {what} again"):
        about = json.loads(metadata[key])
        known = about.pop("seal", None)  # older files have none
        if known is not None and known != _seal(about, tensors):
            raise ValueError("its description is not the one that was written")
    return about, tensors
