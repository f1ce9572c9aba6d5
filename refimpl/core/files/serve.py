"""Change a compressed model into the layout that its device multiplies fastest, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from tqdm.auto import tqdm

from refimpl.core.arguments import checked
from refimpl.core.device import give_back
from refimpl.core.errors import OptionError
from refimpl.core.layers import CompressedLayer, PackedLinear, ProcessorLinear
from refimpl.core.layers.processor import FORMS, PACKED, Dense, measure
from refimpl.core.layers.served import Change, for_kernels, served

_WORTH = 1.2  # how many times faster than unpacked weights a form must be that rounds


@dataclass(frozen=True)
class Choice:
    """What a packed layer multiplies by on a processor.

    Attributes:
        form: a key of `refimpl.core.layers.processor.FORMS`.
        nbytes: of the copy, beside the packed weights.
        milliseconds: for one row, by form and "packed", as measured on a layer of this shape.
    """

    form: str
    nbytes: int
    milliseconds: dict[str, float]


@dataclass
class ServeReport:
    """The result of `serve`.

    Attributes:
        model: the model, changed in place.
        served: names of the layers that now run on kernels if there is a GPU, or on copies for this processor.
        left: layers that stay as they were, in whole or in part, by name, with the reason. They work as before.
        chosen: on a processor, the form of each packed layer or part of one, by name.
    """

    model: nn.Module
    served: list[str]
    left: dict[str, str]
    chosen: dict[str, Choice] = field(default_factory=dict)

    def __str__(self) -> str:
        every = len(set(self.served) | set(self.left))
        text = f"{len(self.served)} of {every} compressed layers are in the layout of the "
        text += "processor" if self.chosen else "kernels"
        if self.chosen:
            choices = list(self.chosen.values())
            now, unpacked, before = (
                sum(choice.milliseconds[of or choice.form] for choice in choices) for of in ("", Dense.name, PACKED)
            )
            counts = Counter(choice.form for choice in choices)
            text += f" ({', '.join(f'{count} {form}' for form, count in counts.most_common())})"
            text += f"; for one token, they are {unpacked / now:.1f} times as fast as unpacked weights and "
            text += f"{before / now:.1f} times as fast as packed ones; the copies take "
            text += f"{sum(choice.nbytes for choice in choices) / 1e6:.1f} MB"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            text += f"\n{names[0]}{others}: {reason}"
        return text


class _ForProcessor:
    """Gives each packed layer the form that is fastest for one row, while there is memory for the copies."""

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.measured: dict[tuple[object, ...], dict[str, float]] = {}

    def __call__(self, layer: PackedLinear) -> tuple[CompressedLayer, str | None]:
        if isinstance(layer, ProcessorLinear) and layer.form is not None:
            return layer, None
        shape = (layer.in_features, layer.out_features, layer.bits, layer.group_size, layer.pattern, layer.symmetric)
        key = (*shape, layer.dtype, layer.bias is None)
        if key not in self.measured:
            self.measured[key] = measure(layer)
        times = self.measured[key]
        # what rounds must be worth it: unpacked weights give the outputs of the packed layer
        worth = {name: taken * (1 if name == Dense.name else _WORTH) for name, taken in times.items()}
        faster = sorted((name for name in times if times[name] < times[PACKED]), key=lambda name: worth[name])
        for name in faster:
            if FORMS[name].fits(layer):
                new = ProcessorLinear.of(layer, name, times)
                assert new.form is not None
                if new.form.nbytes <= self.memory:
                    self.memory -= new.form.nbytes
                    return new, None
        return layer, (
            "memory= has no room left for a copy of it"
            if faster
            else "no form that PyTorch has is faster on this processor"
        )


@checked()
def serve(
    model: nn.Module, progress: bool = True, *, device: str | None = None, memory: int | None = None
) -> ServeReport:
    """Replace every compressed layer by a form that runs fast, in place.

    On a GPU, layers that a kernel can run take its layout and read their packed weights directly. On a processor, a
    few calls of each kind of layer are timed, and each layer gets the fastest of these for one row (one token):
    PyTorch's int4 and int8 operators, which compute in bfloat16; weights unpacked once to float16, with sums in
    float32; or unpacked once as they are. So no layer becomes slower. The copies come on top of the packed weights,
    which are still what is saved, exported, and used for many rows at once where an operator is slow at them.

    Outputs stay the same up to the rounding of the operator. One layer at a time is in memory twice. Served models are
    saved and loaded like others (`save`, `load`); serve again after loading on a processor, or after moving the model
    to another device. Compress first, serve last: to a method that comes later, these layers are dense weights.

    Args:
        model: any model with compressed layers.
        progress: show a bar if it takes more than two seconds.
        device: what the model is to run on, "cpu" or "cuda"; default: where it is.
        memory: bytes that the copies for a processor may take together; a layer whose fastest form does not fit takes
            the next, or stays as it is. Default: no limit but that no copy is larger than the weight was in its dtype.

    Raises:
        OptionError: the model has no compressed layer; `device` is neither of the two, or "cpu" and the model is not
            there; `memory` is negative.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50))
        >>> _ = compress(model, RTN(bits=4, group_size=32), progress=False)
        >>> len(serve(model).served)
        7
        >>> print(serve(model, device="cuda"))   # to be moved there
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
    if device not in (None, "cpu", "cuda"):
        raise OptionError(f"device={device!r}: use 'cpu' or 'cuda', or leave it out to serve the model where it is")
    here = {tensor.device.type for layer in found.values() for tensor in [*layer.parameters(), *layer.buffers()]}
    if device == "cpu" and here != {"cpu"}:
        raise OptionError(f"device='cpu': the model is on {max(here - {'cpu'})!r}; move it first")
    if memory is not None and memory < 0:
        raise OptionError(f"memory={memory}: give a number of bytes, or None for no limit")
    change: Change = for_kernels
    if (device or ("cpu" if here == {"cpu"} else "cuda")) == "cpu":
        change = _ForProcessor(float("inf") if memory is None else memory)
    report = ServeReport(model, [], {})
    made: dict[int, tuple[CompressedLayer, str | None]] = {}
    places: dict[int, int] = {}
    for layer in found.values():
        places[id(layer)] = places.get(id(layer), 0) + 1
    for name in tqdm(list(found), desc="serve", unit="layer", disable=not progress, delay=2):
        layer = found.pop(name)  # the last reference but the model's own
        new, reason = made.get(id(layer)) or served(layer, change)
        if places[id(layer)] > 1:
            made[id(layer)] = new, reason
        if new is not layer or reason is None:  # or it was served before
            report.served.append(name)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
        if reason is not None:
            report.left[name] = reason
        for inner, part in new.named_modules(prefix=name):
            if isinstance(part, ProcessorLinear) and part.form is not None:
                report.chosen[inner] = Choice(part.form.name, part.form.nbytes, part.milliseconds)
    give_back()
    return report
