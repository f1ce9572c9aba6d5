"""Change a compressed model into the layout of the GPU kernels, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from tqdm.auto import tqdm

from refimpl.core.arguments import checked
from refimpl.core.device import give_back
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompressedLayer
from refimpl.core.layers.served import served


@dataclass
class ServeReport:
    """The result of `serve`.

    Attributes:
        model: the model, changed in place.
        served: names of the layers that now run on kernels if there is a GPU.
        left: layers that stay as they were, in whole or in part, by name, with the reason. They work as before.
    """

    model: nn.Module
    served: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        every = len(set(self.served) | set(self.left))
        text = f"{len(self.served)} of {every} compressed layers are in the layout of the kernels"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text += f"\n{names[0]}{others}: {reason}"
        return text


@checked()
def serve(model: nn.Module, progress: bool = True) -> ServeReport:
    """Replace every compressed layer that a kernel can run by its served form, in place.

    Outputs stay the same up to rounding. On a GPU the layers then read their packed weights directly; elsewhere they
    compute in PyTorch. One layer at a time is in memory twice. Served models are saved and loaded like others
    (`save`, `load`). Compress first, serve last: to a method that comes later, these layers are dense weights.

    Args:
        model: any model with compressed layers.
        progress: show a bar if it takes more than two seconds.

    Raises:
        OptionError: the model has no compressed layer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50))
        >>> _ = compress(model, RTN(bits=4, group_size=32), progress=False)
        >>> print(serve(model))
        7 of 7 compressed layers are in the layout of the kernels
        >>> model.model.layers[0].mlp.up_proj
        ServedLinear(32 -> 64, 4 bits, groups of 32)
    """
    found: dict[str, CompressedLayer] = {}
    for name, module in model.named_modules(remove_duplicate=False):  # one layer can be used at several places
        outer = any(name.startswith(other + ".") for other in found)
        if isinstance(module, CompressedLayer) and name and not outer:
            found[name] = module
    if not found:
        raise OptionError(
            f"model={type(model).__name__}: it has no compressed layer; call compress first, and serve last"
        )
    report = ServeReport(model, [], {})
    made: dict[int, tuple[CompressedLayer, str | None]] = {}
    places: dict[int, int] = {}
    for layer in found.values():
        places[id(layer)] = places.get(id(layer), 0) + 1
    for name in tqdm(list(found), desc="serve", unit="layer", disable=not progress, delay=2):
        layer = found.pop(name)  # the last reference but the model's own
        new, reason = made.get(id(layer)) or served(layer)
        if places[id(layer)] > 1:
            made[id(layer)] = new, reason
        if new is not layer or reason is None:  # or it was served before
            report.served.append(name)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
        if reason is not None:
            report.left[name] = reason
    give_back()
    return report
