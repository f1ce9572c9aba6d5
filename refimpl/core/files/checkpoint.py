"""Reading a Hugging Face checkpoint tensor by tensor, and building a model without its weights.

`Checkpoint` opens safetensors files memory-mapped: a tensor takes memory only while it is referenced. So a
repair method can read the original weights without a second model, and a model larger than memory can be compressed
block by block.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from refimpl.core.arguments import fits, shown
from refimpl.core.compress.sites import Site, UnfusedExperts, is_conv1d
from refimpl.core.errors import CheckpointError, reason
from refimpl.core.files.folders import check_file

MANIFEST = "refimpl.json"  # identifies a folder written by refimpl: layers, files and the run that wrote them
_MOST_LAYERS = 2000  # to build a million, even without weights, would take hours
_EXPERT = re.compile(r"^(?P<experts>.*)\.(?P<index>\d+)\.(?P<map>gate_up_proj|down_proj)\.weight$")


@dataclass
class _Group:
    """Tensors of a checkpoint that become one or more of a model, the first of which is `name`."""

    name: str
    converter: Any  # of transformers; None if only the name is another
    sources: list[tuple[str, str | None]]  # with the pattern of the converter that they match


class Checkpoint:
    """The tensors of a folder of safetensors files, read on demand.

    Args:
        folder: a local folder as written by ``save_pretrained``.

    Raises:
        CheckpointError: no folder, no safetensors (pickle is refused), or a damaged file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        >>> Checkpoint(folder).tensor("w").shape
        torch.Size([2, 3])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"checkpoint={str(folder)!r} is not a folder; pass the path of a saved model")
        files = self._listed() or sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            raise CheckpointError(
                f"checkpoint={str(folder)!r} has no safetensors file"
                + (
                    f"; {pickled[0]} is a pickle, which can run code when read and is refused: "
                    "convert it with save_pretrained in an environment you trust"
                    if pickled
                    else ""
                )
            )
        self._files: dict[str, Path] = {}
        self._groups: dict[str, _Group] | None = None  # by name in the model, after `translate`
        self._tied: dict[str, str] = {}
        self._recent: dict[str, dict[str, Tensor]] = {}
        for path in files:
            check_file(path)
            try:
                with safe_open(path, framework="pt") as handle:
                    self._files.update(dict.fromkeys(handle.keys(), path))
            except SafetensorError as error:
                raise CheckpointError(f"{path} is truncated or not safetensors ({error}); fetch it again") from error

    def _listed(self) -> list[Path]:
        """The files an index names: that of transformers, or our own manifest; [] without one."""
        for index in (self.folder / MANIFEST, self.folder / "model.safetensors.index.json"):
            if not index.exists():
                continue
            check_file(index)
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{index} cannot be read ({reason(error)}); copy or download it again") from error
            for name in names:
                if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                    raise CheckpointError(
                        f"{index} names the file {name!r}, which is not inside its folder; do not use this checkpoint"
                    )
                if not (self.folder / name).exists():
                    raise CheckpointError(f"checkpoint={str(self.folder)!r} lacks {name}; copy or download it again")
            return [self.folder / name for name in names]
        return []

    def translate(self, model: nn.Module) -> None:
        """From now on take names of `model`, for a checkpoint that transformers renames or converts while loading.

        Checkpoints keep the names and the layout of their first release: experts one by one, say, which the model has as
        one tensor. `tensor` does to them what ``from_pretrained`` does, for one tensor of the model at a time.

        Args:
            model: a model of transformers as it is built, its weights on "meta".

        Example:
            >>> import tempfile
            >>> from transformers import MixtralConfig, MixtralForCausalLM
            >>> config = MixtralConfig(hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
            ...     num_key_value_heads=1, num_local_experts=2, vocab_size=9)
            >>> folder = tempfile.mkdtemp(); MixtralForCausalLM(config).save_pretrained(folder)
            >>> checkpoint = Checkpoint(folder)
            >>> checkpoint.translate(empty_model(config, torch.float32))
            >>> checkpoint.tensor("model.layers.0.mlp.experts.gate_up_proj").shape   # from w1 and w3 of two experts
            torch.Size([2, 8, 8])
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        layout: Any = copy.deepcopy(model)
        transforms = get_model_conversion_mapping(layout)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        known, prefix = layout.state_dict(), layout.base_model_prefix
        self._layout, self._groups = layout, {}
        for key in sorted(self._files, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            converter: Any = by_pattern.get(pattern) if pattern is not None else None
            group = self._groups.setdefault(name, _Group(name, converter, []))
            group.sources.append((key, pattern))
            for other in converter.target_patterns if converter is not None else ():
                self._groups[name.replace(converter.target_patterns[0], other)] = group
        for pair in layout.all_tied_weights_keys.items():  # of which one is stored
            for absent, present in (pair, pair[::-1]):
                if absent not in self._groups and present in self._groups:
                    self._tied[absent] = present

    def _converted(self, group: _Group) -> dict[str, Tensor]:
        """What transformers makes of the tensors of a group, by name in the model."""
        if group.name not in self._recent:
            converter = copy.deepcopy(group.converter)
            for key, pattern in group.sources:
                converter.add_tensor(group.name, key, pattern, self._read(key, None))
            made = converter.convert(group.name, model=self._layout, config=self._layout.config)
            made = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
            # experts are asked for one by one, and of two tensors in turn: those are kept
            self._recent = {**dict(list(self._recent.items())[-1:]), group.name: made}
        return self._recent[group.name]

    def __contains__(self, key: str) -> bool:
        return self._tied.get(key, key) in self._groups if self._groups is not None else self._find(key) is not None

    def keys(self) -> list[str]:
        """Names of all tensors, as stored."""
        return list(self._files)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, read off the first.

        Raises:
            CheckpointError: there are none.
        """
        for key in self.keys():
            if key.endswith("weight"):
                return (self.tensor(key) if self._groups is None else self._read(key, None)).dtype
        raise CheckpointError(f"checkpoint={str(self.folder)!r} has no weights")

    def _find(self, key: str) -> str | None:
        # base models are saved without the prefix of the causal-LM wrapper ("transformer.h.0" as "h.0")
        for candidate in (key, key.partition(".")[2]):
            if candidate in self._files:
                return candidate
        return None

    def tensor(self, key: str, index: int | None = None) -> Tensor:
        """One tensor, or one slice along its first dimension, read now.

        Raises:
            CheckpointError: there is none of that name.
        """
        if key not in self:
            raise CheckpointError(
                f"checkpoint={str(self.folder)!r} has no tensor {key!r}: it belongs to another model, or keeps names that "
                "transformers does not read as this model; load it with from_pretrained and save it again with "
                "save_pretrained(..., save_original_format=False)"
            )
        if self._groups is None:
            return self._read(str(self._find(key)), index)
        key = self._tied.get(key, key)
        group = self._groups[key]
        if group.converter is None:
            return self._read(group.sources[0][0], index)  # of several, transformers takes the first
        value = self._converted(group).get(key)
        if value is None:
            raise CheckpointError(
                f"checkpoint={str(self.folder)!r}: transformers makes no {key!r} of {group.sources[0][0]!r}; load it with "
                "from_pretrained and pass the model"
            )
        return value if index is None else value[index]

    def _read(self, key: str, index: int | None) -> Tensor:
        # opened anew each time: an open file stays mapped as a whole, and the shards together may exceed memory
        with safe_open(self._files[key], framework="pt") as handle:
            return handle.get_tensor(key) if index is None else handle.get_slice(key)[index]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor that is there."""
        found = self._find(key) or key
        with safe_open(self._files[found], framework="pt") as handle:
            return tuple(handle.get_slice(found).get_shape())


def weight_key(name: str, model: nn.Module) -> tuple[str, int | None]:
    """The place of a parameter of `model` in a checkpoint: its name there, and the expert's index if experts are fused.

    Example:
        >>> weight_key("0.weight", nn.Sequential(nn.Linear(2, 2)))
        ('0.weight', None)
    """
    match = _EXPERT.match(name)
    if match and isinstance(model.get_submodule(match["experts"]), UnfusedExperts):
        return f"{match['experts']}.{match['map']}", int(match["index"])
    return name, None


class Reference:
    """The uncompressed model a repair method compares with: a folder (read lazily) or a model in memory.

    Args:
        source: path of the original checkpoint, or the original model.
        model: the model being compressed, whose names are used.

    Example:
        >>> dense = nn.Sequential(nn.Linear(4, 16))
        >>> Reference(dense, dense).weight(Site("0", 0, dense, "0")).shape
        torch.Size([16, 4])
    """

    def __init__(self, source: str | Path | nn.Module, model: nn.Module) -> None:
        self.model = model
        self.checkpoint: Checkpoint | None = None
        if isinstance(source, nn.Module):
            self.layout = source
        else:
            self.checkpoint = Checkpoint(source)
            self.layout = empty_model(read_config(source), torch.float32)
            if not (Path(source) / MANIFEST).exists():
                self.checkpoint.translate(self.layout)

    def weight(self, site: Site) -> Tensor:
        """The original weight of `site`, [out, in].

        Raises:
            CheckpointError: the reference has no such weight, or one of another shape.
        """
        key, index = weight_key(f"{site.name}.weight", self.model)
        transposed = False
        try:
            if index is None or isinstance(self.layout.get_submodule(key.rpartition(".")[0]), UnfusedExperts):
                module = self.layout.get_submodule(site.name)
                transposed = is_conv1d(module)
                key, index = (f"{site.name}.weight", None) if self.checkpoint is None else (key, index)
            weight = self.checkpoint.tensor(key, index) if self.checkpoint else self.layout.get_parameter(key).detach()
        except AttributeError as error:
            raise CheckpointError(
                f"reference: it has no uncompressed weight {key!r}; pass the model (or its folder) as it was before "
                "any compression"
            ) from error
        if self.checkpoint is None and index is not None:
            weight = weight[index]
        weight = weight.T if transposed else weight.flatten(1)
        shape = (site.out_features, site.in_features)
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"reference: {site.name!r} is {tuple(weight.shape)} there and {shape} in the model; it is another model"
            )
        if site.geometry is not None and (biased := self._has_bias(site)) != (site.bias is not None):
            raise CheckpointError(
                f"reference: {site.name!r} has {'a' if biased else 'no'} bias there, unlike in the model: batch norms "
                "are folded in one of them only; pass the folded float model"
            )
        return weight

    def _has_bias(self, site: Site) -> bool:
        if self.checkpoint is not None:
            return f"{site.name}.bias" in self.checkpoint
        return getattr(self.layout.get_submodule(site.name), "bias", None) is not None


def read_config(folder: str | Path) -> Any:
    """The transformers configuration of a local checkpoint.

    Raises:
        CheckpointError: there is no readable config.json.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config
        >>> folder = tempfile.mkdtemp(); GPT2Config().save_pretrained(folder)
        >>> read_config(folder).model_type
        'gpt2'
    """
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"checkpoint={str(folder)!r} has no config.json; pass a folder saved by save_pretrained")
    check_file(Path(folder) / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever a damaged value makes transformers raise
        raise CheckpointError(
            f"{Path(folder) / 'config.json'} describes no model of transformers ({reason(error)}); copy or save it again"
        ) from error
    if not fits(getattr(config, "architectures", None), list[str] | None):
        raise CheckpointError(
            f"{Path(folder) / 'config.json'} says architectures={shown(config.architectures)}, which is no list of names; copy "
            "or save it again"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise CheckpointError(
            f"{Path(folder) / 'config.json'} says num_hidden_layers={layers}, of which no model has so many; copy or save "
            "it again"
        )
    if hasattr(config, "quantization_config"):  # our own mark, or a format that transformers would unpack itself
        marked = config.quantization_config
        format_name = marked.get("quant_method") if isinstance(marked, dict) else marked
        if format_name != "refimpl":
            raise CheckpointError(
                f"checkpoint={str(folder)!r} is already quantised by {format_name!r}; start from the unquantised model"
            )
        del config.quantization_config
    return config


def model_class(config: Any) -> Any:
    """The class that `empty_model` builds: the one the configuration names, or else its causal language model.

    Raises:
        CheckpointError: transformers knows neither.

    Example:
        >>> from transformers import LlamaConfig
        >>> model_class(LlamaConfig(architectures=["LlamaForSequenceClassification"])).__name__
        'LlamaForSequenceClassification'
        >>> model_class(LlamaConfig()).__name__
        'LlamaForCausalLM'
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as causal

    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    try:
        return causal[type(config)]
    except KeyError as error:
        raise CheckpointError(
            f"config={type(config).__name__}: no causal language model, and config.architectures names no other class "
            "of transformers"
        ) from error


def empty_model(config: Any, dtype: torch.dtype, folder: str | Path | None = None) -> nn.Module:
    """A model of this configuration with its weights on "meta" and its computed buffers (rotary tables) real.

    It is of the class that `model_class` finds.

    Args:
        config: a transformers configuration.
        dtype: dtype of the weights.
        folder: where to look for a generation_config.json (end-of-text ids, sampling defaults).

    Raises:
        CheckpointError: transformers knows no causal language model of this configuration, and it names no class.

    Example:
        >>> from transformers import LlamaConfig
        >>> model = empty_model(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=32, vocab_size=9), torch.bfloat16)
        >>> model.lm_head.weight.device.type, model.model.rotary_emb.inv_freq.device.type
        ('meta', 'cpu')
    """
    from transformers import GenerationConfig

    kind = model_class(config)
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=dtype)
    except Exception as error:  # whatever a damaged value makes transformers raise
        raise CheckpointError(f"config={type(config).__name__} describes no model ({reason(error)})") from error
    for (
        module
    ) in model.modules():  # some are made with a dtype or from random numbers, and are no weights on "meta" yet
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    if folder is not None and (Path(folder) / "generation_config.json").is_file():
        check_file(Path(folder) / "generation_config.json")
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(
                f"{Path(folder) / 'generation_config.json'} cannot be read ({reason(error)}); save it again, or delete it"
            ) from error
    for module in model.modules():
        computed = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if computed and set(computed) <= module._non_persistent_buffers_set:
            # the buffers only: a scaled embedding holds one beside its weight, which must stay on "meta"
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            model._init_weights(module)
    return model.eval()


def set_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Replace parameter or buffer `name` (dotted) of `module`; None moves it back to "meta".

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> set_tensor(layer, "weight", None); layer.weight.device.type
        'meta'
    """
    parent, _, attribute = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = getattr(owner, attribute)
    new = old.to("meta") if tensor is None else tensor
    if attribute in owner._parameters:
        new = nn.Parameter(new.detach(), requires_grad=False)
    setattr(owner, attribute, new)
