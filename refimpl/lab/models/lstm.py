"""A byte-level LSTM language model, and how the small language models are fed and measured.

The LSTM is the network of Zhu and Gupta, "To prune, or not to prune" (2017): embedding, LSTM, softmax, with bytes in
the place of words. `language_model_loss` and `bits_per_byte` also take Hugging Face causal models, so that
models with different alphabets stand on one scale: bits for each byte of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.data import text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = 256


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM, linear head.

    Args:
        vocabulary: number of symbols; 256 for bytes.
        embedding: width of the embedding.
        hidden: width of the state; the LSTM holds ``4 hidden (embedding + hidden + 2)`` parameters in its first layer.
        layers: stacked LSTMs.
        tied: the head uses the embedding's matrix; needs ``embedding == hidden``.

    Attributes:
        embedding: ``nn.Embedding``, weight ``[V, E]``.
        lstm: ``nn.LSTM``, batch first; ``weight_ih_l0`` is ``[4 H, E]`` and ``weight_hh_l0`` ``[4 H, H]``,
            gates in the order input, forget, cell, output.
        head: ``nn.Linear``, weight ``[V, H]``.

    Raises:
        OptionError: a size that is no positive integer, or ``tied`` with two widths.

    Example:
        >>> model = LSTMLanguageModel(embedding=16, hidden=32)
        >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 256])
    """

    def __init__(
        self, vocabulary: int = BYTES, embedding: int = 64, hidden: int = 256, layers: int = 1, tied: bool = False
    ) -> None:
        super().__init__()
        self.sizes = {"vocabulary": vocabulary, "embedding": embedding, "hidden": hidden, "layers": layers}
        for name, value in self.sizes.items():
            _positive(name, value)
        if tied and embedding != hidden:
            raise OptionError(
                f"tied=True needs embedding == hidden, got {embedding} and {hidden}; make them equal or untie"
            )
        self.tied = tied
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)
        # Rows of variance 1, torch's default, would drown the state: the gates saturate before they have learned.
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[b, T, V]`` of the symbols that follow; ids int64 ``[b, T]``; the state starts at zero."""
        x = self.embedding(ids)
        with _autocast_of_lstm(x):
            states = self.lstm(x)[0]
        return self.head(states)


def _autocast_of_lstm(x: Tensor) -> AbstractContextManager[object]:
    """Autocast goes on inside the LSTM, except on a CPU that has no LSTM in bf16: there it computes in fp32.

    PyTorch hands a CPU's LSTM to oneDNN, which fails ("could not create a primitive descriptor") instead of emulating
    bf16, as it does for products, where the processor has no AVX-512.
    """
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if x.is_cpu and bf16 and torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", enabled=False)
    return nullcontext()


@dataclass(frozen=True)
class BitsPerByte:
    """How many bits a byte of text costs under a model, and what that is made of.

    Attributes:
        value: sum of bits / sum of counts; lower is better, 8 is no model at all.
        bits: float64 ``[documents]``, negative log2-likelihood summed over each document's windows.
        counts: int64 ``[documents]``, bytes of text that these bits describe.
        units: the documents, in order of first appearance.
    """

    value: float
    bits: np.ndarray
    counts: np.ndarray
    units: list[str]


def windows(
    corpus: str, split: str, length: int, tokenizer: PreTrainedTokenizerBase | None = None, stride: int | None = None
) -> tuple[Tensor, list[str]]:
    """All windows of a split, none of which crosses from one document into another.

    A window holds one symbol more than is predicted: the first is only read. At the default stride the last symbol
    of a window is the first of the next, so every symbol of a document but its first is predicted at most once;
    what fills no whole window at the end of a document is left out.

    Args:
        corpus, split: as in `refimpl.lab.data.text.documents`.
        length: predicted symbols in each window.
        tokenizer: bytes (UTF-8) if None, else its tokens, none added.
        stride: symbols between the starts of two windows; ``length`` if None. Less gives overlapping windows, which
            show a symbol with contexts of several lengths: for training only.

    Returns:
        int64 ``[n, length + 1]``, and the document of each window.

    Raises:
        OptionError: unknown corpus or split, ``length`` or ``stride`` not a positive integer.
        CalibrationError: no document is long enough.

    Example:
        >>> ids, units = windows("wikipedia", "test", 128)
        >>> ids.shape[1], len(units) == len(ids), bytes(ids[0, :11].tolist())
        (129, True, b'An American')
    """
    _positive("length", length)
    stride = length if stride is None else stride
    _positive("stride", stride)
    rows: list[Tensor] = []
    units: list[str] = []
    longest = 0
    for document in text.documents(corpus, split):
        if tokenizer is None:
            ids = torch.tensor(list(document.text.encode("utf-8")), dtype=torch.long)
        else:
            ids = torch.tensor(
                tokenizer(document.text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
            )
        longest = max(longest, len(ids))
        if len(ids) > length:
            cut = ids.unfold(0, length + 1, stride)
            rows.append(cut)
            units += [document.id] * len(cut)
    if not rows:
        raise CalibrationError(
            f"length={length}: no document of corpus {corpus!r}, split {split!r} has more than {longest} "
            f"{'bytes' if tokenizer is None else 'tokens'}; ask for a length below that"
        )
    return torch.cat(rows), units


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
        >>> ids, _ = windows("wikipedia", "test", 32)
        >>> language_model_loss(LSTMLanguageModel(), ids[:4]).round().item()   # near ln 256
        6.0
    """
    ids = batch if isinstance(batch, Tensor) else batch[0]
    _check_rows(ids, "batch")
    targets = ids[:, 1:].flatten()
    return F.cross_entropy(_logits(model, ids[:, :-1]).float().flatten(0, 1), targets)


def bits_per_byte(
    model: nn.Module,
    windows: Tensor,
    units: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 16,
) -> BitsPerByte:
    """Bits that `model` spends on each byte of the text it predicts, added up by document.

    For a model of tokens the bits of a token are spread over its bytes: bits of all predicted tokens divided by the
    bytes of all predicted tokens. Two models with one alphabet can be compared on the same windows document by
    document: ``paired_bootstrap(a.bits, b.bits, a.counts, statistic=difference)``.

    Args:
        model: as in `language_model_loss`. Training flags are left as found.
        windows, units: from `windows`.
        tokenizer: the model's tokenizer if its symbols are tokens; it must be byte-level. None: symbols are bytes.
        batch_size: windows in a forward pass.

    Raises:
        CalibrationError: no rows, ids outside the alphabet, or a loss that is not finite (the message names the row).
        OptionError: a model of more than 256 symbols without a tokenizer, a tokenizer that is not byte-level.

    Example:
        >>> ids, units = windows("wikipedia", "test", 64)
        >>> result = bits_per_byte(LSTMLanguageModel(hidden=32), ids[:8], units[:8])
        >>> 7.5 < result.value < 8.5, result.counts.tolist()
        (True, [512])
    """
    _check_rows(windows, "windows")
    _positive("batch_size", batch_size)
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


def token_bytes(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> Tensor:
    """Bytes of text behind each token of a byte-level tokenizer; none behind a special token.

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
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        if number not in special and number < len(lengths):
            lengths[number] = len(token)  # a byte-level alphabet writes each byte as one character
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
    return cast(nn.Embedding, inner.get_input_embeddings()).num_embeddings  # type: ignore[operator]


def _check_rows(ids: object, name: str) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise CalibrationError(f"{name} is {found}; it must be an int64 tensor [rows, symbols]")
    if len(ids) == 0 or ids.shape[1] < 2:
        raise CalibrationError(f"{name} has shape {list(ids.shape)}; it needs at least one row and two symbols in each")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r} must be a positive integer")
