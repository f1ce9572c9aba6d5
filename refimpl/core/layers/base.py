"""The interface of all packed replacements of linear layers, and the registry from which `load` builds them."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from refimpl.core.errors import CheckpointError


class CompressedLayer(nn.Module, abc.ABC):
    """A linear map ``y = x W.T + b`` stored in fewer bytes than ``W``.

    To a model that reads ``.weight`` instead of calling the layer, it gives `to_dense`: right, and slow.

    Attributes:
        in_features, out_features: sizes of the map, as in `torch.nn.Linear`.
    """

    in_features: int
    out_features: int
    is_its_weight: ClassVar[bool] = True  # whether it does nothing else than apply `to_dense`
    types: ClassVar[dict[str, type[CompressedLayer]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        CompressedLayer.types[cls.__name__] = cls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # state-space and sparse attention layers of transformers multiply with the weight of a child themselves;
            # a layer with tensors of that name never comes here, nor one that is just being made
            if name == "weight" and self.is_its_weight and (self._buffers or self._modules):
                return self.to_dense()
            raise

    @abc.abstractmethod
    def to_dense(self) -> Tensor:
        """The weight this layer applies, shape ``[out_features, in_features]``, in the layer's dtype."""

    @abc.abstractmethod
    def parts(self) -> dict[str, int]:
        """Bytes by part ("values", "scales", "zeros", "mask", "adapter", "bias"); they sum to `nbytes`."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON description from which `empty` builds a layer with tensors of the same shapes."""

    @classmethod
    @abc.abstractmethod
    def empty(cls, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> CompressedLayer:
        """A layer of this configuration with uninitialised tensors (on "meta": shapes only)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this layer."""
        return sum(tensor.nbytes for tensor in [*self.parameters(), *self.buffers()])


def empty_layer(config: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> CompressedLayer:
    """Build the layer a `CompressedLayer.config` describes, with uninitialised tensors.

    Args:
        config: what `CompressedLayer.config` returned; its "type" names the class.
        dtype: dtype of floating-point weights.
        device: where; "meta" allocates nothing.

    Raises:
        CheckpointError: the type is not one this version knows.

    Example:
        >>> layer = empty_layer({"type": "PackedLinear", "in_features": 64, "out_features": 8, "bits": 4,
        ...     "group_size": 32, "symmetric": False, "pattern": None, "nonzeros": None, "bias": False},
        ...     torch.bfloat16, "meta")
        >>> 8 * layer.nbytes / (64 * 8)   # 4 bits, a 16-bit scale and a 4-bit zero point per 32 weights
        4.625
    """
    kind = config.get("type")
    if kind not in CompressedLayer.types:
        raise CheckpointError(
            f"layer type {kind!r} is unknown (known: {sorted(CompressedLayer.types)}); "
            "the checkpoint was written by a newer refimpl or by another library"
        )
    return CompressedLayer.types[kind].empty(config, dtype, device)
