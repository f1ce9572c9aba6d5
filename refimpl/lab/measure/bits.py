"""The loss of a language model in nats per symbol, for training, and in bits per byte, for comparing models.

Bits per byte do not depend on the alphabet, so models of bytes and models of tokens can be compared on the same text.
Both functions take an `LSTMLanguageModel` or a Hugging Face causal model, and windows from `refimpl.lab.data.windows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.core.arguments import checked, shown
from refimpl.core.errors import CalibrationError, OptionError, positive_integer
from refimpl.lab.models.lstm import BYTES, LSTMLanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BitsPerByte:
    """Bits that a model needs for each byte of text, with the sums of each document.

    Attributes:
        value: sum of bits / sum of counts; lower is better, and 8 needs no model.
        bits: float64 ``[documents]``, negative log2-likelihood summed over each document's windows.
        counts: int64 ``[documents]``, bytes of text that these bits encode.
        units: the documents, in order of first appearance.
    """

    value: float
    bits: np.ndarray
    counts: np.ndarray
    units: list[str]


@checked("batch")
def language_model_loss(model: nn.Module, batch: Tensor | Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy in nats of every symbol but the first of each row, for `refimpl.core.train.loop.train`.

    Args:
        model: an `LSTMLanguageModel` or a Hugging Face causal model, possibly wrapped for several processes.
        batch: int64 ``[b, T + 1]``, or a sequence with that as its only entry, as a DataLoader gives it.

    Returns:
        A scalar, computed in fp32 from the logits.

    Raises:
        CalibrationError: not such a tensor.

    Example:
        >>> from refimpl.lab.data.windows import windows
        >>> ids, _ = windows("wikipedia", "test", 32)
        >>> language_model_loss(LSTMLanguageModel(), ids[:4]).round().item()   # near ln 256
        6.0
    """
    ids: Any = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    _check_rows(ids, "batch")
    targets = ids[:, 1:].flatten()
    return F.cross_entropy(_logits(model, ids[:, :-1]).float().flatten(0, 1), targets)


@checked()
def bits_per_byte(
    model: nn.Module,
    windows: Tensor,
    units: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 16,
) -> BitsPerByte:
    """Bits that `model` needs for each byte of the text it predicts, added up by document.

    For a model of tokens these are the bits of all predicted tokens divided by the bytes of all predicted tokens. Two
    models with the same alphabet can be compared on the same windows document by
    document: ``paired_bootstrap(a.bits, b.bits, a.counts, statistic=difference)``.

    Args:
        model: as in `language_model_loss`; its training flags are restored.
        windows, units: from `windows`.
        tokenizer: of a model whose symbols are tokens; it must be byte-level. None means that symbols are bytes.
        batch_size: windows in a forward pass.

    Raises:
        CalibrationError: no rows, ids outside the alphabet, or a loss that is not finite (the message names the row).
        OptionError: a model of more than 256 symbols without a tokenizer, a tokenizer that is not byte-level.

    Example:
        >>> from refimpl.lab.data.windows import windows
        >>> ids, units = windows("wikipedia", "test", 64)
        >>> result = bits_per_byte(LSTMLanguageModel(hidden=32), ids[:8], units[:8])
        >>> 7.5 < result.value < 8.5, result.counts.tolist()
        (True, [512])
    """
    _check_rows(windows, "windows")
    positive_integer("batch_size", batch_size)
    if len(units) != len(windows):
        raise CalibrationError(f"windows has {len(windows)} rows, units {len(units)}; give one unit per row")
    size = _vocabulary(model)
    if tokenizer is None and size > BYTES:
        raise OptionError(
            f"tokenizer=None, but the model has {size} symbols: pass its tokenizer, which knows the bytes of a token"
        )
    outside = (windows < 0) | (windows >= size)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise CalibrationError(
            f"windows[{row}, {column}] is {int(windows[row, column])}, outside the model's {size} symbols; cut the "
            "windows with the model's own tokenizer"
        )
    names = list(dict.fromkeys(units))
    place = {name: k for k, name in enumerate(names)}
    where = np.array([place[unit] for unit in units])
    lengths = torch.ones(size, dtype=torch.long) if tokenizer is None else token_bytes(tokenizer, size)
    device = next(model.parameters()).device
    nll = np.zeros(len(windows))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(windows), batch_size):
                rows = windows[start : start + batch_size].to(device)
                logits = _logits(model, rows[:, :-1]).float().transpose(1, 2)
                losses = F.cross_entropy(logits, rows[:, 1:], reduction="none").double().sum(1)
                nll[start : start + batch_size] = losses.cpu().numpy()
    finally:
        for module in training:
            module.training = True
    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
        raise CalibrationError(
            f"the loss of windows row {bad[0]} ({units[bad[0]]!r}) is {nll[bad[0]]:g}: look for NaN in the weights"
        )
    covered = lengths[windows[:, 1:]].sum(1).numpy()
    bits = np.bincount(where, weights=nll, minlength=len(names)) / math.log(2)
    counts = np.bincount(where, weights=covered, minlength=len(names)).astype(np.int64)
    return BitsPerByte(float(bits.sum() / counts.sum()), bits, counts, names)


@checked()
def token_bytes(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> Tensor:
    """Number of bytes of text that each token of a byte-level tokenizer encodes; 0 for special tokens.

    Args:
        tokenizer: a fast tokenizer whose symbols are bytes (GPT-2, SmolLM2, the one shipped here).
        size: length of the result, for models with more rows than tokens; the number of tokens if None.

    Returns:
        int64 ``[size]``.

    Raises:
        OptionError: the tokenizer is not byte-level.

    Example:
        >>> from refimpl.lab.models import small
        >>> tokenizer = small.tokenizer()
        >>> int(token_bytes(tokenizer)[tokenizer("naïve").input_ids].sum())
        6
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.decoder).__name__ != "ByteLevel":
        raise OptionError(
            f"tokenizer={type(tokenizer).__name__} is not byte-level, so the bytes of its tokens are not known; "
            "use perplexity for this model"
        )
    lengths = torch.zeros(len(tokenizer) if size is None else size, dtype=torch.long)
    vocabulary = tokenizer.get_vocab()
    ids = torch.tensor(list(vocabulary.values()))
    # a byte-level alphabet writes each byte as one character
    characters = torch.tensor([len(token) for token in vocabulary])
    counted = (ids < len(lengths)) & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=torch.long))
    lengths[ids[counted]] = characters[counted]
    return lengths


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    inner = getattr(model, "module", model)  # DistributedDataParallel keeps the model there
    if isinstance(inner, LSTMLanguageModel):
        return model(ids)
    return model(input_ids=ids, use_cache=False).logits


def _vocabulary(model: nn.Module) -> int:
    inner = getattr(model, "module", model)
    if isinstance(inner, LSTMLanguageModel):
        return inner.sizes["vocabulary"]
    if not hasattr(inner, "get_input_embeddings"):
        raise OptionError(f"model={shown(inner)}: pass an `LSTMLanguageModel` or a causal model of transformers")
    return cast(nn.Embedding, inner.get_input_embeddings()).num_embeddings  # type: ignore[operator]


def _check_rows(ids: object, name: str) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise CalibrationError(f"{name} is {found}; it must be an int64 tensor [rows, symbols]")
    if len(ids) == 0 or ids.shape[1] < 2:
        raise CalibrationError(f"{name} has shape {list(ids.shape)}; it needs at least one row and two symbols in each")
