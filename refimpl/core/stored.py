"""The dtype that a model's floating numbers are stored in: what they cost, whatever dtype computes with them.

A processor without fast bfloat16 computes in float32 with weights that a file holds in 16 bits. Bits per weight, the
bytes of a cache, and what `refimpl.save` writes are those of the file, so that no number depends on the processor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refimpl.core.layers import CompressedLayer, empty_layer

_NAME = "_refimpl_stored_dtype"


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the floating weights, keys and values of a model count as.

    Returns:
        The dtype given to `declare_stored`, otherwise the dtype of the model's first floating parameter (float32 without any).

    Example:
        >>> model = nn.Linear(2, 2)
        >>> stored_dtype(model)
        torch.float32
        >>> declare_stored(model, torch.bfloat16)
        >>> stored_dtype(model), model.weight.dtype
        (torch.bfloat16, torch.float32)
    """
    return getattr(model, _NAME, _computed(model))


def _computed(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def declare_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """Count the floating numbers of a model as numbers of ``dtype``, and have `refimpl.save` write them so.

    The loaders of `refimpl.lab.models.language` and `refimpl.load` call this. Call it with ``model.dtype`` to store
    what the model computes with.

    Example:
        >>> from refimpl.lab.measure.metrics import footprint
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50))
        >>> footprint(model).bits_per_weight
        32.0
        >>> declare_stored(model, torch.bfloat16)
        >>> footprint(model).bits_per_weight
        16.0
    """
    setattr(model, _NAME, dtype)


def stored_dtypes(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.dtype]:
    """The dtype each tensor of a state dict is stored in.

    Scales, ranges and codes of compressed layers have a dtype of their own, which is part of their format.

    Args:
        module: a model, or a part of one.
        dtype: of its floating numbers as stored; ``stored_dtype(module)`` if None.

    Example:
        >>> from refimpl.core.layers import PackedLinear
        >>> codes = torch.ones(2, 32, dtype=torch.uint8)
        >>> layer = PackedLinear(codes=codes, scale=torch.ones(2, 1), bits=4, bias=torch.ones(2))
        >>> stored_dtypes(layer, torch.float16)
        {'bias': torch.float16, 'values': torch.uint8, 'scale': torch.bfloat16}
    """
    dtype, computed = dtype or stored_dtype(module), _computed(module)
    found = {name: tensor.dtype for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    if computed == dtype:
        return found
    found = {name: dtype if own == computed else own for name, own in found.items()}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, CompressedLayer):
            twin = empty_layer(part.config(), dtype, "meta")
            start = f"{name}." if name else ""
            found |= {start + inner: tensor.dtype for inner, tensor in twin.state_dict().items()}
    return found


def stored_parts(layer: CompressedLayer, model: nn.Module) -> dict[str, int]:
    """Bytes of a compressed layer of a model by part, as stored; see `CompressedLayer.parts`.

    Example:
        >>> from refimpl.core.layers import PackedLinear
        >>> model = nn.Sequential(PackedLinear(values=torch.eye(4), bias=torch.ones(4)), nn.Linear(4, 4))
        >>> declare_stored(model, torch.bfloat16)
        >>> model[0].parts(), stored_parts(model[0], model)
        ({'values': 64, 'bias': 16}, {'values': 32, 'bias': 8})
    """
    dtype = stored_dtype(model)
    return layer.parts() if dtype == _computed(model) else empty_layer(layer.config(), dtype, "meta").parts()
