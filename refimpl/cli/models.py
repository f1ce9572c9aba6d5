"""Helpers of the commands about a model: its name on the command line, its folder, its tokenizer, texts."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.core.errors import CalibrationError, CheckpointError, OptionError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from refimpl.lab.data.text import TokenSet

MODELS = ("smollm2", "llama-small", "llama-medium", "llama-large")
CORPORA = ("wikipedia", "news", "python", "prose")
LONGEST = 512  # tokens per sequence, or what the model can read if that is less


#: What makes a checkpoint usable beside its weights; copied along.
class DType(str, Enum):
    """The dtype of unpacked weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


def models_and_folders(incomplete: str) -> list[str]:
    """Completions of a model: the book's, and folders."""
    folders = [f"{path}" for path in Path().glob(f"{incomplete}*") if path.is_dir()] if incomplete else []
    return [name for name in MODELS if name.startswith(incomplete)] + folders


Model = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(MODELS)}, a local folder, or a model id of the Hugging Face Hub.",
        autocompletion=models_and_folders,
    ),
]
Precision = Annotated[
    DType,
    typer.Option(
        help="What to compute in, and to store what is not packed in; auto: stored in bfloat16, and computed in it where "
        "it is fast."
    ),
]
Length = Annotated[
    int | None, typer.Option(help=f"Tokens per sequence; {LONGEST} by default, or what the model can read.", min=2)
]


def precision_of(dtype: DType) -> tuple[torch.dtype, torch.dtype]:
    """The dtype to compute in, which may depend on the processor, and the dtype to store in, which never does."""
    import torch

    from refimpl.lab.models.language import compute_dtype

    if dtype is DType.auto:
        return compute_dtype(), torch.bfloat16
    return (getattr(torch, dtype.value),) * 2


def checkpoint(model: str) -> Path:
    """The local folder of a model, fetched if need be."""
    from refimpl.lab import models

    # a Hub id has an owner, a few old ones apart; asking the Hub for a typing error takes long without a network
    if "/" not in model and model not in MODELS and not Path(model).expanduser().exists():
        if "did you mean" in (known := nearest(model, MODELS)):
            raise OptionError(f"{model} is no local folder; use {known}, a folder or a Hub id ('owner/model')")
    return models.smollm2_path() if model == "smollm2" else models.folder(model)


def read_config(folder: Path) -> Any:
    from refimpl.core.files.checkpoint import read_config

    return read_config(folder)


def longest(config: Any) -> int:
    """Default tokens per sequence: a model with learned positions cannot read more."""
    return min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)


def has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))


def tokenizer_of(folder: Path, purpose: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise OptionError(
            f"{purpose} needs the model's tokenizer, and {folder} holds none; save it there (tokenizer.save_pretrained)"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes the tokenizer's library raise
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error


def own_text(option: str, source: str, tokenizer: PreTrainedTokenizerBase, length: int, draw: int) -> TokenSet:
    """Windows of the user's own texts in a random but repeatable order, so that the first n come from all of them."""
    import torch

    from refimpl.lab.data import text

    path = Path(source).expanduser()
    if not (path.is_file() or path.is_dir()):
        raise OptionError(f"{option} {source} is neither a file or folder nor {nearest(source, text.CORPORA)}")
    try:
        tokens = text.from_texts(path, tokenizer, length)
    except CalibrationError as error:
        raise OptionError(
            f"{option} {source}: no text in it has {length} tokens in one piece; give more text, or --length with a "
            "smaller number"
        ) from error
    chosen = torch.randperm(len(tokens.ids), generator=torch.Generator().manual_seed(draw))
    return dataclasses.replace(tokens, ids=tokens.ids[chosen], units=[tokens.units[k] for k in chosen.tolist()])


def first(tokens: TokenSet, sequences: int) -> TokenSet:
    return dataclasses.replace(tokens, ids=tokens.ids[:sequences], units=tokens.units[:sequences])


def copy_companions(source: Path, target: Path) -> None:
    """The tokenizer and what else belongs to a checkpoint beside its weights."""
    from refimpl.core.files.companions import TOKENIZER, copy_files

    copy_files(source, target, (*TOKENIZER, "generation_config.json"))
