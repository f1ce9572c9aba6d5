"""The consumers of a module's outputs: which operations use them, wherever these are called."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# the same values in another shape, layout or place: their consumers are consumers of the output
_PASSES_ON = {
    "view",
    "_unsafe_view",
    "reshape",
    "alias",
    "detach",
    "clone",
    "contiguous",
    "_to_copy",
    "squeeze",
    "unsqueeze",
    "transpose",
    "permute",
    "t",
}


class Consumers(TorchDispatchMode):
    """While active, records which operations are applied to watched tensors.

    It records the operations that run, so there is no difference between a module, a function and a method of a tensor,
    and a module that returns its input (`nn.Identity`, dropout in evaluation mode) leaves no trace.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 2)
        >>> consumers = Consumers()
        >>> consumers.watch("x", x)
        >>> with consumers:
        ...     _ = torch.nn.ReLU()(x.flatten())
        >>> consumers.found
        {'x': {'relu'}}
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {}
        self._origin: Any = WeakTensorKeyDictionary()

    def watch(self, name: str, tensor: Tensor) -> None:
        """From now on, record under `name` what consumes `tensor`."""
        self.found.setdefault(name, set())
        self._origin[tensor] = name

    def origin(self, tensor: Tensor) -> str | None:
        """The name under which `tensor` is watched, or None."""
        return self._origin.get(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        consumed = {self._origin[t] for t in leaves if isinstance(t, Tensor) and t in self._origin}
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # asks for the device of a tensor, not for its values
            return result
        operation = func._schema.name.partition("::")[2].removesuffix("_")
        if operation in _PASSES_ON:
            for name in consumed:
                self._origin[result] = name
        else:
            for name in consumed:
                self.found[name].add(_clamped(operation, args, kwargs))
            if consumed and func._schema.is_mutable:
                self._origin.pop(args[0], None)  # changed in place, it is the output no longer
        return result


def _clamped(operation: str, args: Any, kwargs: Any) -> str:
    """Call a clamp from below at zero what it is, a ReLU, with a cap (ReLU6) or without."""
    if not operation.startswith(("clamp", "hardtanh")):
        return operation
    low = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val"))
    return "relu" if not isinstance(low, Tensor) and low == 0 else operation
