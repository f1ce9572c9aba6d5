"""`save_pretrained` and `from_pretrained` of transformers, for compressed models.

`save_pretrained` of a model with compressed layers would write their tensors under names that nothing reads again: it
calls `refimpl.save` instead. `from_pretrained` learns the format of `refimpl.save` in the way transformers has for
formats of others, a registered quantizer. Importing refimpl imports this module as soon as transformers has its models.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.files.checkpoint import MANIFEST
from refimpl.core.files.companions import note_methods
from refimpl.core.files.io import check_tensors, compressed_layers, read_json, restore_layers, save, ties_of
from refimpl.core.layers import CompressedLayer
from refimpl.core.stored import declare_stored

_plain_save_pretrained = PreTrainedModel.save_pretrained
_FIRST = (("is_main_process", True), ("state_dict", None))  # arguments of save_pretrained after the folder


@functools.wraps(_plain_save_pretrained, assigned=())  # for its signature
def save_pretrained(self: nn.Module, save_directory: str | Path, *args: Any, **options: Any) -> Any:
    """As in transformers; a model with compressed layers goes to `refimpl.save`.

    Args:
        self: the model, whose method this is.
        save_directory: the folder.
        args, options: those of transformers. With compressed layers, sizes and formats of files are not asked for, and
            what cannot be done is refused.

    Raises:
        OptionError: `push_to_hub`, `variant` or another `state_dict` than the model's own, for a compressed model.
        CheckpointError: as for `refimpl.save`.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from refimpl import RTN, compress
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
        ...     intermediate_size=64, vocab_size=50)).eval()
        >>> _ = compress(model, RTN(bits=4, group_size=32), progress=False)
        >>> folder = tempfile.mkdtemp(); model.save_pretrained(folder)
        >>> AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj
        PackedLinear(32 -> 64, 4 bits, groups of 32)
    """
    if not compressed_layers(self) or getattr(self, "_hf_peft_config_loaded", False):  # or its adapter only
        return _plain_save_pretrained(self, save_directory, *args, **options)  # type: ignore[arg-type]
    main, given = [*args, *(options.pop(name, default) for name, default in _FIRST[len(args) :])][:2]
    if given is not None and not _same_tensors(
        given, self.state_dict()
    ):  # transformers' Trainer passes the model's own
        raise OptionError(
            "state_dict=... is not that of the model: save_pretrained of a model with compressed layers is refimpl.save, "
            "which writes the model; leave it out"
        )
    if refused := next((name for name in ("push_to_hub", "variant") if options.get(name)), None):
        raise OptionError(
            f"{refused}={options[refused]!r}: save_pretrained of a model with compressed layers is refimpl.save and "
            "takes the folder only; leave it out, and upload the folder afterwards"
        )
    if main:
        save(self, save_directory)
    return None


def _same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].data_ptr() == other[name].data_ptr() for name in one)


@register_quantization_config("refimpl")
class RefimplConfig(QuantizationConfigMixin):
    """What ``quantization_config`` in the config.json of a saved model says.

    Args:
        weights: the file with the weights, or the index of several.
    """

    def __init__(self, weights: str = "weights.safetensors", **_: Any) -> None:
        self.quant_method: Any = "refimpl"
        self.weights = weights


@register_quantizer("refimpl")
class RefimplQuantizer(HfQuantizer):
    """Gives a model the compressed layers of a saved folder before transformers fills them.

    A model that was loaded this way is like one from `refimpl.load`.
    """

    quantization_config: RefimplConfig
    requires_calibration = True  # what is not saved by refimpl cannot become so while loading

    def update_attn_implementation(self, config: Any) -> Any:
        """Called once the configuration is read and before the weights are looked for: names their file."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """None: the file has the names that the model has in memory."""
        return []

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Called with the dtype asked for, or else with that of the configuration."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path()
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(
                f"checkpoint={str(folder)!r} lacks {MANIFEST}; fetch the whole folder (huggingface_hub.snapshot_download) "
                "and pass it"
            )
        del model.config.transformers_weights  # has done its work
        saved = (model.config.architectures or [""])[0]
        if saved != type(model).__name__:
            raise CheckpointError(
                f"checkpoint={str(folder)!r} holds a {saved} in the names of that class, no {type(model).__name__}; "
                f"use {saved}.from_pretrained or refimpl.load"
            )
        manifest = read_json(folder / MANIFEST)
        restore_layers(model, folder, dtype=self.dtype)
        check_tensors(model, folder)
        model.all_tied_weights_keys = ties_of(model)
        for module in model.modules():  # or transformers would initialise weights that some have no more
            if any(isinstance(child, CompressedLayer) for child in module.children()):
                module._is_hf_initialized = not module._non_persistent_buffers_set
        stored = getattr(torch, manifest["dtype"])
        declare_stored(model, min(self.dtype, stored, key=lambda kind: kind.itemsize))
        note_methods(model, manifest.get("methods", []))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """`refimpl.save` can write it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on compressed layers can be trained."""
        return True


PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[assignment, method-assign]
