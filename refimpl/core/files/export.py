"""Exports: compressed models as checkpoints that other libraries load without refimpl.

There are three, each with a README that says how to load it and what it leaves out:

- `export_dense`: an ordinary transformers checkpoint. Every compressed layer becomes a plain layer again: zeros are stored,
  codes are decoded, low-rank paths are multiplied out. Any library can load it, and it is as large as the original.
- `export_compressed_tensors`: quantised linear layers stay quantised, in the ``pack-quantized`` format of
  compressed-tensors, which transformers and vLLM read.
- `export_peft`: the low-rank paths as a LoRA adapter, beside either of the two.

(`refimpl.core.files.gguf` writes the file format of llama.cpp.)

A format that cannot hold a layer refuses it by name before anything is written. A folder appears complete or
not at all. The model is written piece by piece: besides the model itself, only the tensors of one file and of one block
are in memory.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from refimpl.core.arguments import checked
from refimpl.core.compress.fold import fed_norms
from refimpl.core.compress.sites import _ROUTER, UnfusedExperts, find_blocks, is_conv1d
from refimpl.core.device import read
from refimpl.core.errors import CheckpointError, FileError, OptionError, require
from refimpl.core.files.companions import TOKENIZER, front_matter
from refimpl.core.files.folders import LOCK, check_file, lock, writing
from refimpl.core.files.io import (
    MODEL_FILES,
    check_transformers,
    compressed_layers,
    read_json,
    write_json,
    write_tensors,
)
from refimpl.core.layers import (
    CompensatedLinear,
    CompressedLayer,
    LowRankLinear,
    PackedConv2d,
    PackedLinear,
    QuantizedInput,
    ServedCompensatedLinear,
    ServedLinear,
    ServedSparseLinear,
)

_MARK = "<!-- written by refimpl.core.files.export -->"
_PACKED = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
_EXPERTS = "re:.*[.]experts[.].*"  # every map of every expert
_TWO_TOKENS: dict[str, Any] = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "use_cache": False}
_SHARD_LIMIT = 2_000_000_000  # bytes of one file, all of which are in memory while it is written


# ---- the three formats


@checked()
@torch.no_grad()
def export_dense(model: nn.Module, folder: str | Path, *, adapter: str | Path | None = None) -> Path:
    """Write an ordinary transformers checkpoint, in which every compressed layer is a plain one again.

    A quantised or sparse layer becomes exactly the weight it applies, so the logits of a model of `nn.Linear` are equal
    to the last bit (a Conv1D of GPT-2 multiplies in another order). A low-rank path is added in fp32 and rounded once
    to the dtype of its layer. Experts are fused again; batch norms that were folded are put back as the shift
    that folding left.

    Args:
        model: a transformers model, of language or of images.
        folder: made if missing; an earlier export there is replaced. The tokenizer is yours to save beside it.
        adapter: another folder: the low-rank paths go there as a PEFT adapter (`export_peft`) instead of being
            multiplied out, and `folder` holds what they repair.

    Returns:
        The folder; ``from_pretrained`` reads it.

    Raises:
        OptionError: a layer with quantised inputs, by name; `adapter` for a model without low-rank paths.
        CheckpointError: the folder holds something else, the model is not one of transformers, or transformers does not
            read what was written, which it is asked before the folder appears.
        FileError: the disk is full or read-only.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from refimpl import Magnitude, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50)).eval()
        >>> _ = compress(model, Magnitude("2:4"), progress=False)
        >>> plain = AutoModelForCausalLM.from_pretrained(export_dense(model, tempfile.mkdtemp() + "/plain"))
        >>> tokens = torch.arange(8)[None]
        >>> torch.equal(plain(tokens).logits, model(tokens).logits)
        True
    """
    source = _Source(model)
    source.check_dense()
    if adapter is not None:
        source.check_peft(adapter, beside=folder)
    bases = adapter is not None
    with _whole(folder) as staging, nullcontext() if adapter is None else _whole(adapter) as beside:
        pieces = source.pieces(lambda name, layer: source.dense(name, layer, bases), source.fused)
        _write_checkpoint(staging, source, pieces)
        (staging / "README.md").write_text(_dense_card(source, bases))
        if beside is not None:
            _write_adapter(beside, source, folder)
        source.check_loads(staging, beside, folder, "keep the model with save()")
    return Path(folder)


@checked()
@torch.no_grad()
def export_compressed_tensors(
    model: nn.Module, folder: str | Path, *, symmetric: bool = False, adapter: str | Path | None = None
) -> Path:
    """Write the quantised layers as a ``pack-quantized`` checkpoint of compressed-tensors.

    With compressed-tensors installed, ``AutoModelForCausalLM.from_pretrained(folder)`` reads it; it is the format of
    vLLM too. The weights are the same to the last bit. Layers may differ in bits and group size. Sparse quantised
    layers are written as quantised ones with their zeros; layers that are not quantised as ordinary weights.

    transformers reads asymmetric grids only with the option ``dequantize=True``, which is written into the
    configuration, and then takes the settings of the first layer for all. So asymmetric layers must share one setting
    or be written with ``symmetric=True``.

    Args:
        model: a transformers model whose quantised layers are `nn.Linear` or fused experts in the original. Experts
            must all be quantised, on symmetric grids of one setting.
        folder: as for `export_dense`.
        symmetric: store each asymmetric layer on a symmetric grid of one bit more, which has room for all its values
            (2 bits as 3, 3 as 4): the same weights, loadable without an option.
        adapter: another folder: the low-rank paths go there as a PEFT adapter.

    Returns:
        The folder.

    Raises:
        OptionError: a layer that the format cannot hold (convolutions, Conv1D, experts, quantised inputs, a low-rank
            path without `adapter`), by name, with the alternative; nothing is quantised; asymmetric layers of several
            settings.
        CheckpointError: as for `export_dense`.
        MissingExtra: compressed-tensors is not installed.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50)).eval()
        >>> _ = compress(model, RTN(bits=4, group_size=32, symmetric=True), progress=False)
        >>> folder = export_compressed_tensors(model, tempfile.mkdtemp() + "/packed")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'config.json', 'generation_config.json', 'model.safetensors']
    """
    source = _Source(model)
    quantised = source.check_compressed_tensors(symmetric, with_adapter=adapter is not None)
    if adapter is not None:
        source.check_peft(adapter, beside=folder)
    pack = require("compressed_tensors.compressors", "export").pack_to_int32

    def tensors(name: str, layer: CompressedLayer) -> dict[str, Tensor]:
        return source.packed(name, quantised[name], pack) if name in quantised else source.dense(name, layer, True)

    settings = _settings(quantised)
    config = {
        "quant_method": "compressed-tensors",
        "version": require("compressed_tensors", "export").__version__,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": _config_groups(source, settings),
        "ignore": source.unquantised(quantised),
    }
    if len(settings) == 1 and (adapter is not None or not all(q.symmetric for q in quantised.values())):
        config["dequantize"] = True  # while loading: asymmetric grids are not read otherwise, and PEFT wants weights
    with _whole(folder) as staging, nullcontext() if adapter is None else _whole(adapter) as beside:
        pieces = source.pieces(tensors, lambda name: source.packed_experts(name, quantised, pack))
        _write_checkpoint(staging, source, pieces, config)
        (staging / "README.md").write_text(_packed_card(source, quantised, config, adapter is not None))
        if beside is not None:
            _write_adapter(beside, source, folder)
        source.check_loads(staging, beside, folder, "use export_dense")
    return Path(folder)


@checked()
@torch.no_grad()
def export_peft(model: nn.Module, folder: str | Path, *, base: str | Path) -> Path:
    """Write the low-rank paths of a model as a LoRA adapter for PEFT.

    An adapter belongs to the compressed layers it repairs, not to the original model: `base` is where those were
    written, by the `adapter=` argument of `export_dense` or `export_compressed_tensors` (which calls this).

    Args:
        model: a transformers model with layers that have a low-rank path beside them.
        folder: as for `export_dense`.
        base: the folder (or Hub id) of the model without the low-rank paths, written into the adapter's configuration.

    Returns:
        The folder; ``PeftModel.from_pretrained(base_model, folder)`` reads it. Quantised factors are dequantised.

    Raises:
        OptionError: no layer has a low-rank path, or one that PEFT cannot hold, by name.
        CheckpointError: as for `export_dense`.
        MissingExtra: peft is not installed.

    Example:
        >>> import tempfile, copy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, PlainSVD, compress
        >>> dense = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50)).eval()
        >>> model = copy.deepcopy(dense)
        >>> for method in (RTN(bits=3, group_size=32), PlainSVD(rank=4)):
        ...     _ = compress(model, method, reference=dense, progress=False)
        >>> folder = export_peft(model, tempfile.mkdtemp() + "/adapter", base="me/llama-3bit")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    source = _Source(model)
    source.check_peft(folder)
    with _whole(folder) as staging:
        _write_adapter(staging, source, base)
    return Path(folder)


def exports(model: nn.Module) -> dict[str, str | None]:
    """For each format None if the whole model fits, or why not: the layer that hinders and the alternative.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50))
        >>> _ = compress(model, RTN(bits=4, group_size=32), progress=False)
        >>> exports(model)
        {'dense': None, 'compressed-tensors': None, 'peft': 'model: no layer has a low-rank path beside it; use \
export_dense or export_compressed_tensors', 'gguf': None}
    """
    from refimpl.core.files.gguf import check_gguf

    source = _Source(model)
    checks: dict[str, Callable[[], Any]] = {
        "dense": source.check_dense,
        "compressed-tensors": lambda: source.check_compressed_tensors(False, with_adapter=False),
        "peft": lambda: source.check_peft(None),
        "gguf": lambda: check_gguf(model),
    }
    reasons: dict[str, str | None] = dict.fromkeys(checks)
    for name, check in checks.items():
        try:
            check()
        except OptionError as error:
            reasons[name] = str(error)
    return reasons


# ---- contents of an export


@dataclass(frozen=True)
class _Quantised:
    """How one quantised layer is written; `bits` counts the one more of a widened grid."""

    bits: int
    group_size: int
    symmetric: bool
    per_row: bool
    sparse: bool

    def setting(self, group_sizes: set[tuple[int, int, bool]]) -> tuple[int, int | None, bool]:
        """Bits, group size (None: one group per row) and symmetry; a row of one group joins a setting of its size."""
        full = (self.bits, self.group_size, self.symmetric)
        return (self.bits, None, self.symmetric) if self.per_row and full not in group_sizes else full


class _Source:
    """A model to be exported, beside its architecture without weights, which says what it was before."""

    def __init__(self, model: nn.Module) -> None:
        check_transformers(model)
        kind: Any = type(model)
        self.model: Any = model
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        with torch.device("meta"):
            # a new model of the same configuration still has its Conv1D, fused experts and batch norms
            self.architecture = kind._from_config(copy.deepcopy(self.model.config), dtype=self.dtype).eval()
        if self.architecture.can_generate():
            self.architecture.generation_config = copy.deepcopy(self.model.generation_config)
        self.layers = compressed_layers(model)
        self.experts = {name: m for name, m in model.named_modules() if isinstance(m, UnfusedExperts)}
        self.expected = {name: t.shape for name, t in self.architecture.state_dict().items()}

    def layer(self, name: str) -> CompressedLayer:
        """The compressed layer of that name; one in the layout of the kernels comes in that of files."""
        return _in_files(self.layers[name])

    def original(self, name: str) -> nn.Module | None:
        """The module at `name` in the architecture; None for one of several fused experts."""
        return None if self.owner(name, self.experts) else self.architecture.get_submodule(name)

    @staticmethod
    def owner(key: str, among: dict[str, Any]) -> str | None:
        """Which of the modules `among` holds the tensor or module `key`."""
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in among), None)

    # -- checks, all before anything is written

    def check_dense(self) -> None:
        """Raise `OptionError` for a layer that is more than its weight."""
        for name, layer in self.layers.items():
            if any(isinstance(module, QuantizedInput) for module in layer.modules()):
                raise OptionError(
                    f"model: {name!r} quantises its inputs, which an ordinary checkpoint has no place for; compress "
                    "without QuantizeActivations to export the weights, or keep the model with save()"
                )

    def check_compressed_tensors(self, symmetric: bool, with_adapter: bool) -> dict[str, _Quantised]:
        """The quantised layers by name; raises `OptionError` for one that the format cannot hold."""
        self.check_dense()
        quantised: dict[str, _Quantised] = {}
        for name in self.layers:
            layer = self.layer(name)
            reason = self.why_not_packed(name, layer, with_adapter)
            if reason is not None:
                raise OptionError(f"model: {name!r} {reason}")
            base = _base(layer)
            assert isinstance(base, PackedLinear)
            if base.bits is None:
                continue
            wide = symmetric and not base.symmetric
            if wide and base.bits == 8:
                raise OptionError(
                    f"symmetric=True: {name!r} has 8 bits and would need 9; leave symmetric=False and give all "
                    "quantised layers one setting, or use export_dense"
                )
            if read((base.scale.to(self.dtype).float() != base.scale.float()).any()):
                raise OptionError(
                    f"model: the scales of {name!r} do not fit {self.dtype}, in which they would be stored; load the "
                    "model with dtype=torch.float32 first, or use export_dense"
                )
            quantised[name] = _Quantised(
                base.bits + wide,
                base.group_size,
                symmetric or base.symmetric,
                per_row=base.group_size == base.in_features,
                sparse=base.pattern is not None,
            )
        if not quantised:
            raise OptionError("model: none of its linear layers is quantised; use export_dense")
        self.check_experts(quantised)
        settings = _settings(quantised)
        asymmetric = next((name for name, layer in quantised.items() if not layer.symmetric), None)
        if len(settings) > 1 and asymmetric is not None:
            raise OptionError(
                f"model: {asymmetric!r} is asymmetric and the quantised layers have {len(settings)} settings, but "
                "transformers would read them all with the first; pass symmetric=True (the same weights with one bit "
                "more), give all layers one setting, or use export_dense"
            )
        return quantised

    def why_not_packed(self, name: str, layer: CompressedLayer, with_adapter: bool) -> str | None:
        """Why pack-quantized cannot hold a layer, with the alternative; None if it can, packed or as plain weights."""
        base, original = _base(layer), self.original(name)
        if isinstance(layer, CompensatedLinear) and not with_adapter:
            return (
                "has a low-rank path beside it, which pack-quantized cannot hold; pass adapter= to write it as a PEFT "
                "adapter, or multiply it out with export_dense"
            )
        if isinstance(layer, PackedConv2d):
            kind = "convolution"
        elif isinstance(base, LowRankLinear):
            kind = "product of two factors"
        elif not isinstance(base, PackedLinear):
            kind = type(base).__name__
        elif base.bits is not None and original is not None and type(original).forward is not nn.Linear.forward:
            kind = type(original).__name__  # also one that reads its own weight, which is not there any more
        else:
            return None
        return f"is a {kind}, which pack-quantized cannot hold; export_dense writes it as plain weights"

    def check_experts(self, quantised: dict[str, _Quantised]) -> None:
        """Raise `OptionError` unless all experts are quantised alike, on symmetric grids: only so they are read."""
        maps = [
            f"{name}.{i}.{part}"
            for name, experts in self.experts.items()
            for i in range(experts.num_experts)
            for part in ("gate_up_proj", "down_proj")
        ]
        if not maps:
            return
        first = quantised.get(maps[0])
        grouped = _grouped(quantised)
        for name in maps:
            layer = quantised.get(name)
            if layer is None or first is None or layer.setting(grouped) != first.setting(grouped):
                raise OptionError(
                    f"model: {name!r} is not quantised like the other layers of the experts, and transformers reads "
                    "experts from pack-quantized only if all have the same bits and group size; use export_dense"
                )
        if first is not None and not first.symmetric:
            raise OptionError(
                f"model: {maps[0]!r} is asymmetric, and transformers reads experts from pack-quantized only on "
                "symmetric grids; pass symmetric=True (the same weights with one bit more), or use export_dense"
            )
        if (fused := self.fused_on_disk(maps[0])) is not None:
            raise OptionError(
                f"model: the checkpoints of a {type(self.model).__name__} hold its experts as one tensor, {fused!r}, "
                "which pack-quantized cannot hold; use export_dense"
            )

    def check_peft(self, folder: str | Path | None, beside: str | Path | None = None) -> None:
        """Raise `OptionError` if there is no low-rank path or one that PEFT cannot hold."""
        if beside is not None and folder is not None and Path(folder).resolve() == Path(beside).resolve():
            raise OptionError(f"adapter={str(folder)!r} is the folder of the model itself; choose another")
        paths = self.low_rank_paths()
        if not paths:
            raise OptionError(
                "model: no layer has a low-rank path beside it; use export_dense or export_compressed_tensors"
            )
        for name in paths:
            original, remedy = self.original(name), "export_dense multiplies it out"
            if any(isinstance(module, QuantizedInput) for module in self.layers[name].modules()):
                reason, remedy = "quantises its inputs", "keep the model with save()"
            elif original is None:
                reason = "belongs to one of several fused experts"
            elif isinstance(original, nn.Conv2d) and (
                original.groups > 1 or set(original.dilation) != {1} or original.padding_mode != "zeros"
            ):
                reason = "is a convolution with groups, dilation or another padding than zeros"
            else:
                continue
            raise OptionError(f"model: {name!r} {reason}, which a LoRA adapter cannot hold; {remedy}")

    def low_rank_paths(self) -> dict[str, LowRankLinear]:
        """The low-rank paths beside compressed layers, by name of the layer."""
        return {
            name: module.adapter
            for name in self.layers
            for module in self.layer(name).modules()
            if isinstance(module, CompensatedLinear)
        }

    def unquantised(self, quantised: dict[str, _Quantised]) -> list[str]:
        """The other `nn.Linear`, and routers, which some readers build as linear layers, by their names in the file."""
        names = [
            name
            for name, module in self.architecture.named_modules()
            if name not in quantised
            and (isinstance(module, nn.Linear) or (self.experts and _ROUTER.search(type(module).__name__)))
        ]
        if not self.experts:
            return names
        stored = self.stored({f"{name}.weight": torch.zeros(1) for name in names})
        return [key.removesuffix(".weight") for key in stored]

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as a checkpoint of this architecture names and splits them."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.architecture, tensors)

    def fused_on_disk(self, name: str) -> str | None:
        """The key of an expert's map, if checkpoints do not hold experts one by one."""
        _, part = name.rsplit(".", 1)
        key = f"{self.owner(name, self.experts)}.{part}"
        stored = self.stored({key: torch.zeros(2, 2, 2)})
        return next((k for k, tensor in stored.items() if tensor.dim() != 2 or not k.endswith(".weight")), None)

    def check_loads(self, staging: Path, adapter: Path | None, folder: str | Path, remedy: str) -> None:
        """Raise `CheckpointError` unless transformers reads what was written, all of it, and the result runs.

        Where memory is short for a second model, its tensors are read one by one and not kept, and it does not run.

        Args:
            staging: what was written.
            adapter: the adapter that was written beside it, which PEFT must find a place for.
            folder, remedy: for the message.
        """
        from transformers.utils import is_accelerate_available, logging

        size = sum(shape.numel() for shape in self.expected.values()) * self.dtype.itemsize
        short = size > _free_memory()
        if short and not is_accelerate_available():
            warnings.warn(f"{folder}: memory is short to load it back, so it was not (accelerate helps)", stacklevel=4)
            return
        level = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            with _no_bars(), redirect_stderr(StringIO()):  # compressed-tensors has bars of its own
                model, found = type(self.model).from_pretrained(
                    staging, output_loading_info=True, device_map={"": "meta"} if short else None
                )
                runs = not short and self.runs(self.model)
                if runs:
                    model(**_TWO_TOKENS)
                if runs and adapter is not None:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("error", message=".*adapter keys")
                        require("peft", "export").PeftModel.from_pretrained(model, adapter)(**_TWO_TOKENS)
        except Exception as error:  # of libraries of others, whatever it is
            raise CheckpointError(
                f"folder={str(folder)!r}: transformers cannot run a {type(self.model).__name__} from what was written "
                f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}), so nothing was; {remedy}"
            ) from error
        finally:
            logging.set_verbosity(level)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if found.get(kind):
                raise CheckpointError(
                    f"folder={str(folder)!r}: transformers reads what was written with {kind} {sorted(found[kind])[0]!r}, "
                    f"so nothing was; {remedy}"
                )

    @staticmethod
    def runs(model: Any) -> bool:
        """Whether a model can be tried on two tokens."""
        if getattr(model, "main_input_name", None) != "input_ids":
            return False
        try:
            model(**{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in _TWO_TOKENS.items()})
        except Exception:  # it wants more than tokens, or a library that is not here
            return False
        return True

    # -- tensors

    def dense(self, name: str, layer: CompressedLayer, bases: bool) -> dict[str, Tensor]:
        """Weight and bias of one compressed layer, in the layout of the module it was.

        Args:
            bases: leave the low-rank path out.
        """
        weight = _weight(_base(layer) if bases else layer)
        original = self.original(name)
        if original is not None and is_conv1d(original):
            weight = weight.T
        elif isinstance(layer, PackedConv2d):
            weight = layer.geometry.kernel_of(weight)
        tensors = {f"{name}.weight": weight}
        bias = getattr(layer, "bias", None)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach()
        return tensors

    def packed(self, name: str, quantised: _Quantised, pack: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The tensors of one ``pack-quantized`` layer; `pack` is the library's own packing of int8 into int32."""
        layer, bits = _base(self.layer(name)), quantised.bits
        assert isinstance(layer, PackedLinear)
        steps = copy.copy(layer)
        steps._buffers = {**layer._buffers, "scale": torch.ones_like(layer.scale)}
        steps.dtype = torch.float32
        codes = steps.to_dense()  # how many steps from zero, [out, in]; 0 where a weight is pruned
        tensors = {f"{name}.weight_scale": layer.scale.to(self.dtype)}
        if not quantised.symmetric:
            zero = torch.as_tensor(layer._grid()[1]).to(torch.int16) - 2 ** (bits - 1)  # [out, groups]
            codes = (codes.unflatten(1, (zero.shape[1], -1)) + zero.unsqueeze(-1)).flatten(1)
            tensors[f"{name}.weight_zero_point"] = pack(zero.to(torch.int8), bits, packed_dim=0)
        tensors[f"{name}.weight_packed"] = pack(codes.to(torch.int8), bits)
        tensors[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach()
        return tensors

    def packed_experts(
        self, name: str, quantised: dict[str, _Quantised], pack: Callable[..., Tensor]
    ) -> dict[str, Tensor]:
        """The ``pack-quantized`` tensors of all experts, under the names single experts have in checkpoints."""
        tensors: dict[str, Tensor] = {}
        for part in ("gate_up_proj", "down_proj"):
            names = [f"{name}.{index}.{part}" for index in range(self.experts[name].num_experts)]
            packed = [self.packed(n, quantised[n], pack) for n in names]
            for kind in ("weight_packed", "weight_scale"):
                # rows of codes and scales are split and named like the rows of the weight that they encode
                stack = torch.stack([p[f"{n}.{kind}"] for n, p in zip(names, packed, strict=True)])
                for key, rows in self.stored({f"{name}.{part}": stack}).items():
                    stem = key.removesuffix(".weight")
                    tensors[f"{stem}.{kind}"] = rows
                    tensors[f"{stem}.weight_shape"] = torch.tensor([len(rows), self.layers[names[0]].in_features])
        return tensors

    def pieces(
        self, tensors: Callable[[str, CompressedLayer], dict[str, Tensor]], experts: Callable[[str], dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """All tensors under the names of the architecture: what lies outside the blocks, then block by block.

        Args:
            tensors: gives the tensors of one compressed layer.
            experts: gives the tensors of all experts of one block.
        """
        state = self.model.state_dict()
        keys: dict[str, list[str]] = {"": []}
        prefix = self.block_prefix()
        for key in state:
            inside = prefix is not None and key.startswith(prefix + ".")
            keys.setdefault(key[len(prefix or "") + 1 :].partition(".")[0] if inside else "", []).append(key)
        norms, moved = self.unfolded_norms()
        written: dict[str, None] = {}  # tensors, and the layers they belong to
        for block in keys.values():
            piece: dict[str, Tensor] = norms if block is keys[""] else {}
            for key in block:
                if key in moved or key in norms:
                    continue
                name = self.owner(key, self.experts) or self.owner(key, self.layers)
                if name is None:
                    piece[key] = state[key]
                elif name not in written:
                    written[name] = None
                    piece |= experts(name) if name in self.experts else tensors(name, self.layer(name))
            for key in moved & piece.keys():
                del piece[key]
            for key, tensor in piece.items():
                if not key.endswith(_PACKED) and self.expected.get(key) != tensor.shape:
                    raise CheckpointError(
                        f"model: {key!r} {tuple(tensor.shape)} does not fit a {type(self.model).__name__} of its "
                        "configuration; undo the change to the architecture first, or keep the model with save()"
                    )
            written |= dict.fromkeys(piece)
            yield piece
        for key in self.expected:
            if key not in written and not self.owner(key, written):
                raise CheckpointError(
                    f"model: it lacks {key!r}, which a {type(self.model).__name__} of its configuration has; undo the "
                    "change to the architecture first, or keep the model with save()"
                )

    def block_prefix(self) -> str | None:
        """Name of the stack of blocks, if there is one."""
        try:
            return find_blocks(self.model)[0]
        except OptionError:
            return None

    def fused(self, name: str) -> dict[str, Tensor]:
        """The two parameters of fused experts, from the maps of the single ones."""
        experts = self.experts[name]

        def weight(index: int, part: str) -> Tensor:
            module: Any = experts.get_submodule(f"{index}.{part}")
            return _weight(_in_files(module)) if isinstance(module, CompressedLayer) else module.weight.detach()

        return {
            f"{name}.{part}": torch.stack([weight(index, part) for index in range(experts.num_experts)])
            for part in ("gate_up_proj", "down_proj")
        }

    def unfolded_norms(self) -> tuple[dict[str, Tensor], set[str]]:
        """Tensors of batch norms that were folded away, and the biases that move into them.

        A folded convolution has a bias where the architecture has none: the batch norm after it gets the bias as its
        mean, with a minus sign, and is the identity otherwise.
        """
        norms = {n: m for n, m in self.architecture.named_modules() if isinstance(m, nn.BatchNorm2d)}
        device = next(self.model.parameters()).device
        tensors: dict[str, Tensor] = {}
        for name, norm in norms.items():
            if type(self.model.get_submodule(name)) is nn.Identity:
                one = torch.ones(norm.num_features, dtype=self.dtype, device=device)
                tensors |= {
                    f"{name}.weight": one,
                    f"{name}.bias": 0 * one,
                    f"{name}.running_mean": 0 * one,
                    f"{name}.running_var": one - norm.eps,
                    f"{name}.num_batches_tracked": torch.zeros((), dtype=torch.long),
                }
        moved: set[str] = set()
        convs = [n for n, m in self.architecture.named_modules() if isinstance(m, nn.Conv2d) and m.bias is None]
        biases = {n: b for n in convs if (b := getattr(self.model.get_submodule(n), "bias", None)) is not None}
        if biases:
            size = getattr(self.model.config, "image_size", None) or 224
            channels = next(m.in_channels for m in self.architecture.modules() if isinstance(m, nn.Conv2d))
            shape = (1, channels, *([size, size] if isinstance(size, int) else size))
            # the same search as at the time of folding tells which batch norm follows which convolution
            behind, _ = fed_norms(self.architecture, torch.empty(shape, dtype=self.dtype, device="meta"))
            for conv, bias in biases.items():
                if conv not in behind:
                    continue  # the check of shapes and names will say so
                key = f"{behind[conv]}.running_mean"
                mean = tensors[key] if key in tensors else self.model.state_dict()[key]
                tensors[key] = mean - bias.detach()
                moved.add(f"{conv}.bias")
        return tensors, moved


def _in_files(layer: CompressedLayer) -> CompressedLayer:
    """A layer without the layouts of kernels, in itself or in its parts."""
    if isinstance(layer, (ServedLinear, ServedCompensatedLinear, ServedSparseLinear)):
        return layer.packed()
    if isinstance(layer, CompensatedLinear):
        base, adapter = _in_files(layer.base), _in_files(layer.adapter)
        unchanged = base is layer.base and adapter is layer.adapter
        return layer if unchanged else CompensatedLinear(base, adapter)  # type: ignore[arg-type]
    if isinstance(layer, LowRankLinear):
        a, b = _in_files(layer.A), _in_files(layer.B)
        return layer if a is layer.A and b is layer.B else LowRankLinear(a, b)  # type: ignore[arg-type]
    return layer


def _base(layer: CompressedLayer) -> CompressedLayer:
    """The layer without the low-rank path beside it."""
    if isinstance(layer, PackedConv2d):
        layer = layer.base
    return layer.base if isinstance(layer, CompensatedLinear) else layer


def _weight(layer: CompressedLayer) -> Tensor:
    """The weight [out, in] in the layer's dtype, products and sums taken in fp32."""
    if isinstance(layer, PackedConv2d):
        return _weight(layer.base)
    if isinstance(layer, CompensatedLinear):
        base = layer.base.to_dense()
        return (base.float() + _product(layer.adapter)).to(base.dtype)
    if isinstance(layer, LowRankLinear):
        return _product(layer).to(layer.B.to_dense().dtype)
    return layer.to_dense()


def _product(path: LowRankLinear) -> Tensor:
    return path.B.to_dense().float() @ path.A.to_dense().float()


# ---- files


@contextmanager
def _whole(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place if the block succeeds.

    An earlier export is replaced; other files, such as a tokenizer, are kept. Its config is removed first and written
    last, so in between nothing can be loaded. A second process that exports to the same place is refused.
    """
    folder = Path(folder)
    place = Path(os.path.abspath(folder))
    card = place / "README.md"
    check_file(card)
    ours = card.is_file() and _MARK in card.read_text(errors="replace")
    if place.exists() and not ours and (foreign := _foreign(place)) is not None:
        raise CheckpointError(
            f"folder={str(folder)!r} holds something that refimpl did not export, {foreign!r}; choose another folder, or "
            "an empty one"
        )
    staging = place.parent / f".{place.name}.refimpl-export"
    with writing(folder), lock(staging):
        for path in staging.iterdir():  # of an export that was killed
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield staging
            for path in staging.iterdir():
                check_file(place / path.name)
            (staging / LOCK).unlink()
            if not place.exists():
                os.replace(staging, place)
                return
            for pattern in sorted(MODEL_FILES, key=lambda name: "config" not in name):
                for path in place.glob(pattern):
                    path.unlink()
            for path in sorted(staging.iterdir(), key=lambda path: path.name.endswith("config.json")):
                os.replace(path, place / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _foreign(place: Path) -> str | None:
    """Something at `place` that an export may not stand beside, if it is no folder of ours; a tokenizer may be there."""
    if not place.is_dir():
        raise FileError(f"folder={str(place)!r} is no folder; move what is in the way, or choose another path")
    known = {path.name for pattern in (*TOKENIZER, "generation_config.json") for path in place.glob(pattern)}
    return next((path.name for path in sorted(place.iterdir()) if path.name not in known), None)


def _shards(pieces: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Pieces joined up to the size of one file."""
    shard: dict[str, Tensor] = {}
    size = 0
    for piece in pieces:
        more = sum(tensor.nbytes for tensor in piece.values())
        if shard and size + more > _SHARD_LIMIT:
            yield shard
            shard, size = {}, 0
        shard, size = {**shard, **piece}, size + more
    yield shard


def _free_memory() -> float:
    """Bytes of memory that are free, page cache included; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, one for each file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_checkpoint(
    staging: Path, source: _Source, pieces: Iterator[dict[str, Tensor]], quantization: dict[str, Any] | None = None
) -> None:
    """Write tensors, index and configurations as ``save_pretrained`` does, file by file.

    Each file goes through ``save_pretrained`` itself, which knows tied weights and the names that checkpoints of this
    architecture have outside transformers (single experts, for example).
    """
    part = staging / "part"
    files: list[Path] = []
    for shard in _shards(pieces):
        with _no_bars():
            source.architecture.save_pretrained(part, state_dict={n: t.contiguous() for n, t in shard.items()})
        for path in sorted(part.glob("*.safetensors")):
            files.append(path.rename(staging / f"{len(files)}.safetensors"))
        del shard  # or it would live on while the next is made
    for path in part.glob("*config.json"):
        path.rename(staging / path.name)
    shutil.rmtree(part)
    if quantization is not None:
        config = read_json(staging / "config.json")
        write_json(staging / "config.json", {**config, "quantization_config": quantization})
    if len(files) == 1:
        files[0].rename(staging / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    size = 0
    for number, path in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path = path.rename(staging / name)
        size += path.stat().st_size
        with safe_open(path, framework="pt") as handle:
            weight_map.update(dict.fromkeys(handle.keys(), name))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(staging / "model.safetensors.index.json", index)


def _write_adapter(staging: Path, source: _Source, base: str | Path) -> None:
    """Write the low-rank paths as PEFT names them: A is lora_A, B is lora_B, and alpha / r = 1."""
    peft = require("peft", "export")
    paths = source.low_rank_paths()
    tensors: dict[str, Tensor] = {}
    for name, path in paths.items():
        a, b = path.A.to_dense(), path.B.to_dense()
        if isinstance(layer := source.layers[name], PackedConv2d):
            a, b = layer.geometry.kernel_of(a), b[:, :, None, None]
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    ranks = {name: path.rank for name, path in paths.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {name: rank for name, rank in ranks.items() if rank != usual}
    peft.LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=unusual,
        alpha_pattern=dict(unusual),
        target_modules=list(paths),
        fan_in_fan_out=any(is_conv1d(m) for n in paths if (m := source.original(n)) is not None),
        task_type="CAUSAL_LM" if _auto_class(source) == "AutoModelForCausalLM" else None,
        base_model_name_or_path=str(base),
        inference_mode=True,
    ).save_pretrained(staging)
    write_tensors(staging / "adapter_model.safetensors", tensors)
    (staging / "README.md").write_text(_adapter_card(source, ranks, base))


# ---- settings of compressed-tensors


def _grouped(quantised: dict[str, _Quantised]) -> set[tuple[int, int, bool]]:
    """Bits, group size and symmetry of the layers with several groups in a row."""
    return {(q.bits, q.group_size, q.symmetric) for q in quantised.values() if not q.per_row}


def _settings(quantised: dict[str, _Quantised]) -> dict[tuple[int, int | None, bool], list[str]]:
    """Names of the quantised layers by (bits, group size, symmetric)."""
    grouped = _grouped(quantised)
    settings: dict[tuple[int, int | None, bool], list[str]] = {}
    for name, layer in quantised.items():
        settings.setdefault(layer.setting(grouped), []).append(name)
    return settings


def _config_groups(source: _Source, settings: dict[tuple[int, int | None, bool], list[str]]) -> dict[str, Any]:
    """The ``config_groups`` of the format: the settings with the layers they are for."""
    groups: dict[str, Any] = {}
    for number, ((bits, group_size, symmetric), names) in enumerate(settings.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "dynamic": False,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
        }
        # with one setting, what is not ignored is quantised; with several, each lists its layers, but experts, which
        # are no modules of transformers, are found by a pattern that names them
        targets = [name for name in names if not source.owner(name, source.experts)]
        targets += [_EXPERTS] if len(targets) < len(names) else []
        groups[f"group_{number}"] = {"targets": ["Linear"] if len(settings) == 1 else targets, "weights": weights}
    return groups


# ---- the README of each folder


def _auto_class(source: _Source) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    name = type(source.model).__name__
    return "AutoModelForCausalLM" if name in causal.values() else name


def _card(title: str, library: str, body: str, code: str, base: str | Path | None = None) -> str:
    load = f"Load it, without refimpl:\n\n```python\n{code}\n```\n"
    return f"{front_matter(library, base)}{_MARK}\n\n# {title}\n\n{body.strip()}\n\n{load}"


def _what(source: _Source) -> str:
    return f"A {type(source.model).__name__}, {str(source.dtype).removeprefix('torch.')}, compressed with refimpl."


def _not_here(adapter: bool) -> str:
    lines = [
        "A tokenizer is no part of an export: if there is none here, save it beside the model with its own "
        "`save_pretrained`."
    ]
    if adapter:
        lines.append("The low-rank paths are not here: they are a PEFT adapter in a folder of their own.")
    return "\n".join(f"- {line}" for line in lines)


def _dense_card(source: _Source, bases: bool) -> str:
    sums = (
        ""
        if bases or not source.low_rank_paths()
        else (" Low-rank paths are multiplied out and rounded once, so logits agree up to rounding.")
    )
    body = f"""
{_what(source)} Every layer is an ordinary one: pruned weights are zeros, quantised weights are the numbers their codes
stand for, so the files are as large as those of the original model.{sums}

{_not_here(bases)}
"""
    auto = _auto_class(source)
    code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("THIS FOLDER")'
    return _card("A compressed model as plain weights", "transformers", body, code)


def _packed_card(source: _Source, quantised: dict[str, _Quantised], config: dict[str, Any], adapter: bool) -> str:
    settings, version = _settings(quantised), config["version"]
    rows = "\n".join(
        f"| {len(names)} | {bits} | {size or 'one per row'} | {'symmetric' if symmetric else 'asymmetric'} |"
        for (bits, size, symmetric), names in settings.items()
    )
    notes = [f"Linear layers that are ordinary weights: {len(source.unquantised(quantised))}."]
    if any(q.sparse for q in quantised.values()):
        notes.append("Pruned weights are stored as quantised zeros: the sparsity is kept but saves no bytes here.")
    odd = sorted({bits for bits, _, _ in settings} - {2, 4, 8})
    if odd:
        notes.append(
            f"{' and '.join(map(str, odd))} bits: older versions of compressed-tensors pack them differently; use "
            f"{version} or newer."
        )
    if any(bits not in (4, 8) or size not in (None, 32, 64, 128) for bits, size, _ in settings):
        notes.append("vLLM: its usual kernels take 4 and 8 bits, in groups of 32, 64 or 128 or one per row.")
    if len(settings) > 1:
        notes.append("vLLM joins q, k and v (gate and up) into one layer, so they need the same setting.")
    auto = _auto_class(source)
    code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("THIS FOLDER")'
    if "dequantize" in config:
        notes.append(
            "`dequantize` in `config.json` unpacks the weights while loading, without which transformers reads no "
            "asymmetric grids and PEFT finds no weights. A transformers that does not heed it there wants "
            "`quantization_config=CompressedTensorsConfig(dequantize=True)` in the call."
        )
    elif adapter:
        notes.append("Before the adapter is loaded, run the model once on any tokens: that unpacks the weights.")
    body = f"""
{_what(source)} Its quantised layers are in the `pack-quantized` format of compressed-tensors
(`pip install compressed-tensors`, written with {version}); the weights are exactly those of the compressed model.

| layers | bits | group size | grid |
|---|---|---|---|
{rows}

{chr(10).join(f"- {note}" for note in notes)}
{_not_here(adapter)}
"""
    return _card("A quantised model", "transformers", body, code)


def _adapter_card(source: _Source, ranks: dict[str, int], base: str | Path) -> str:
    counts = Counter(ranks.values())
    by_rank = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(counts.items()))
    auto = _auto_class(source)
    body = f"""
The low-rank paths of a {type(source.model).__name__} compressed with refimpl, as a LoRA adapter: {by_rank}.
They repair the compressed model in `{base}`; on the original model they would do harm.

Load that model as its README says, then the adapter. Factors that were quantised are stored dequantised.
"""
    code = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")'
    )
    return _card("Low-rank paths of a compressed model", "peft", body, code, None if Path(base).exists() else base)
