"""Documents of a corpus cut into windows of equal length, for training language models and measuring them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refimpl.core.arguments import checked
from refimpl.core.errors import CalibrationError, positive_integer
from refimpl.lab.data import text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked()
def windows(
    corpus: str, split: str, length: int, tokenizer: PreTrainedTokenizerBase | None = None, stride: int | None = None
) -> tuple[Tensor, list[str]]:
    """All windows of a split; none of them crosses from one document into another.

    A window holds one symbol more than is predicted, because the first is only read. At the default stride the last
    symbol of a window is the first of the next, so every symbol of a document but its first is predicted at most once.
    The end of a document that does not fill a window is left out.

    Args:
        corpus, split: as in `refimpl.lab.data.text.documents`.
        length: predicted symbols in each window.
        tokenizer: its tokens are the symbols, without special tokens added; None uses bytes (UTF-8).
        stride: symbols between the starts of two windows; ``length`` if None. A smaller stride gives overlapping
            windows, which show a symbol with contexts of several lengths; use it for training only.

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
    positive_integer("length", length)
    stride = length if stride is None else stride
    positive_integer("stride", stride)
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
