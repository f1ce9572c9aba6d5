"""The small models that are shipped with the book, each trained by a script in scripts/ and described by its card.

Language models: ``llama-small``, ``llama-medium``, ``llama-large`` (tokens of `tokenizer`) and ``lstm`` (bytes).
Classifiers are in the same folder. A model's folder holds config.json, model.safetensors, README.md (data, licence,
recipe, scores) and curve.json (loss over the steps).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from refimpl.core.arguments import checked
from refimpl.core.errors import CheckpointError, OptionError, nearest
from refimpl.core.files.io import data_path
from refimpl.lab.models.lstm import LSTMLanguageModel

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def names() -> list[str]:
    """The shipped models, sorted.

    Example:
        >>> "llama-small" in names()
        True
    """
    folders = data_path("models").glob("[!.]*/")
    return sorted(folder.name for folder in folders if (folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file())


@checked()
def path(name: str) -> Path:
    """The folder of a shipped model.

    Raises:
        OptionError: no such model.

    Example:
        >>> path("llama-smal")
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: name='llama-smal' must be one of ... (did you mean 'llama-small'?)
    """
    known = names()
    if name not in known:
        raise OptionError(f"name={name!r} must be {nearest(str(name), known)}")
    return data_path("models", name)


@checked()
def load(name: str) -> Any:
    """A shipped model in eval mode, in fp32 (the language models are stored in bf16, the classifiers in fp32).

    Args:
        name: one of `names`.

    Returns:
        An `LSTMLanguageModel`, or the transformers class its config.json names.

    Raises:
        OptionError: no such model.
        CheckpointError: its files are damaged or do not fit together.

    Example:
        >>> model = load("llama-small")
        >>> type(model).__name__, model.training
        ('LlamaForCausalLM', False)
    """
    folder = path(name)
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        (architecture,) = config["architectures"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG} names no architecture; {_REPAIR}") from error
    if architecture == LSTMLanguageModel.__name__:
        return _lstm(folder, config)
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise CheckpointError(f"{folder / _CONFIG}: transformers {transformers.__version__} has no {architecture}")
    try:
        with quietly():
            model, info = model_class.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({error}); {_REPAIR}") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers and go on
        raise CheckpointError(f"{folder} lacks the weight {sorted(info['missing_keys'])[0]!r}; {_REPAIR}")
    return model.eval()


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no load reports from transformers.

    Example:
        >>> with quietly():
        ...     model = load("llama-small")
    """
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the three Llamas: byte-level BPE, 1024 tokens, nothing unknown, nothing added to a text.

    Example:
        >>> tokens = tokenizer()
        >>> tokens.decode(tokens("The river Čapek 1723").input_ids)
        'The river Čapek 1723'
    """
    return PreTrainedTokenizerFast.from_pretrained(path("llama-small"))


_REPAIR = "take the folder again from the repository or the wheel"


def _lstm(folder: Path, config: dict[str, Any]) -> nn.Module:
    sizes = {key: value for key, value in config.items() if key != "architectures"}
    try:
        model = LSTMLanguageModel(**sizes)
        model.load_state_dict(load_file(folder / _WEIGHTS))
    except (TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({error}); {_REPAIR}") from error
    return model.eval()
