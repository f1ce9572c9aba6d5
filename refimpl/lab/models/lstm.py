"""A byte-level LSTM language model: embedding, LSTM, softmax, with bytes in the place of words.

The architecture is the one of Zhu and Gupta, "To prune, or not to prune" (2017). The windows of text it reads come from
`refimpl.lab.data.windows`, its loss and its bits per byte from `refimpl.lab.measure.bits`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from refimpl.core.errors import OptionError, positive_integer

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
            positive_integer(name, value)
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
