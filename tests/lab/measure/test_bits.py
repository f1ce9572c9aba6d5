"""Bits per byte mean the same for every alphabet, and the loss is the one a Hugging Face model computes itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import PreTrainedTokenizerFast

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.data import text
from refimpl.lab.data.windows import windows
from refimpl.lab.measure.bits import bits_per_byte, language_model_loss, token_bytes
from refimpl.lab.measure.statistics import difference, paired_bootstrap
from refimpl.lab.models import small
from refimpl.lab.models.lstm import LSTMLanguageModel


@pytest.fixture(scope="module")
def test_bytes():
    return windows("wikipedia", "test", 64)


def test_loss_of_a_hugging_face_model_is_its_own(tiny_llama, test_bytes):
    model, ids = tiny_llama(), test_bytes[0][:3]
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(language_model_loss(model, ids), expected)
    torch.testing.assert_close(language_model_loss(model, (ids,)), expected)


def test_loss_through_a_wrapper(test_bytes):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments, **options):
            return self.module(*arguments, **options)

    model, ids = LSTMLanguageModel(hidden=16), test_bytes[0][:2]
    assert language_model_loss(Wrapper(model), ids) == language_model_loss(model, ids)


@pytest.mark.parametrize(
    "batch", [torch.zeros(3, dtype=torch.long), torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.long), [[1, 2]]]
)
def test_batches_that_are_none(batch):
    with pytest.raises(CalibrationError, match="batch"):
        language_model_loss(LSTMLanguageModel(hidden=8), batch)


def test_bits_of_known_distributions(test_bytes):
    """A head of zeros spends 8 bits on a byte; one whose bias holds the log-frequencies spends their cross-entropy."""
    ids, units = test_bytes
    ids, units = ids[:20], units[:20]
    model = LSTMLanguageModel(hidden=8)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    assert bits_per_byte(model, ids, units).value == pytest.approx(8, abs=1e-6)
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=256).double()
    frequency = counts / counts.sum()
    with torch.no_grad():
        model.head.bias.copy_((frequency + 1e-12).log())
    entropy = -frequency.xlogy(frequency).sum().item() / math.log(2)
    assert bits_per_byte(model, ids, units).value == pytest.approx(entropy, abs=1e-4)


def test_bits_add_up_by_document(test_bytes):
    ids, units = test_bytes
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:60]
    chosen, names = ids[order], [units[k] for k in order]
    torch.manual_seed(0)
    model = LSTMLanguageModel(hidden=16).train()
    result = bits_per_byte(model, chosen, names, batch_size=7)
    assert model.training and model.lstm.training
    assert result.units == list(dict.fromkeys(names)) and result.counts.sum() == 60 * 64
    for name, bits, count in zip(result.units, result.bits, result.counts, strict=True):
        own = chosen[[other == name for other in names]]
        assert count == own[:, 1:].numel()
        assert bits == pytest.approx(language_model_loss(model, own).item() * count / math.log(2), rel=1e-5)
    assert result.value == pytest.approx(result.bits.sum() / result.counts.sum())


def test_bits_per_byte_of_tokens_counts_the_bytes_of_the_text():
    """Bytes of the predicted tokens are those of the decoded text, multi-byte characters included."""
    tokenizer = small.tokenizer()
    ids, units = windows("wikipedia", "test", 60, tokenizer)
    ids, units = ids[:40], units[:40]
    result = bits_per_byte(small.load("llama-small"), ids, units, tokenizer)
    pieces = [tokenizer.convert_ids_to_tokens(row[1:].tolist()) for row in ids]
    assert result.counts.sum() == sum(len(token) for row in pieces for token in row)
    whole = torch.cat([ids[:1, 1:], ids[1 : units.count(units[0]), 1:]]).flatten()
    first = text.documents("wikipedia", "test")[0].text.encode()
    covered = int(token_bytes(tokenizer)[whole].sum())
    skipped = int(token_bytes(tokenizer)[ids[0, 0]])
    assert tokenizer.decode(whole).encode() == first[skipped : skipped + covered]


def test_token_bytes_give_back_any_text():
    tokenizer = small.tokenizer()
    lengths = token_bytes(tokenizer)
    for sample in ("Čapek’s naïve “robots”", "日本語 text", "\x00\x7f \t\r\n", "émigré" * 30):
        assert lengths[tokenizer(sample).input_ids].sum() == len(sample.encode())
    assert lengths[tokenizer.eos_token_id] == 0 and (lengths == 0).sum() == 1


def test_paired_interval_over_documents(test_bytes):
    """The arms share documents: a model against itself with noise on its head gives an interval above zero."""
    ids, units = test_bytes
    ids, units = ids[::20], units[::20]
    model = small.load("lstm")
    dense = bits_per_byte(model, ids, units)
    with torch.no_grad():
        model.head.weight += 0.1 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(0))
    noisy = bits_per_byte(model, ids, units)
    interval = paired_bootstrap(noisy.bits, dense.bits, dense.counts, n=1000, statistic=difference)
    assert interval.n == len(dense.units) > 20
    assert 0 < interval.low < interval.estimate < interval.high
    assert interval.estimate == pytest.approx(noisy.value - dense.value)


def test_bits_refuse_what_they_cannot_measure(test_bytes, tiny_llama):
    ids, units = test_bytes[0][:4], test_bytes[1][:4]
    model = LSTMLanguageModel(hidden=8)
    with pytest.raises(CalibrationError, match="4 rows, units 3"):
        bits_per_byte(model, ids, units[:3])
    with pytest.raises(CalibrationError, match=r"windows\[2, 5\] is 256, outside the model's 256"):
        wrong = ids.clone()
        wrong[2, 5] = 256
        bits_per_byte(model, wrong, units)
    with pytest.raises(OptionError, match="1000 symbols: pass its tokenizer"):
        bits_per_byte(tiny_llama(vocab_size=1000), ids, units)
    words = PreTrainedTokenizerFast(tokenizer_object=_words())
    with pytest.raises(OptionError, match="not byte-level"):
        bits_per_byte(tiny_llama(), ids, units, words)
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(CalibrationError, match="row 0 .* is nan"):
        bits_per_byte(model, ids, units)


def _words():
    backend = Tokenizer(tokenizer_models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def test_bits_agree_with_perplexity():
    from refimpl.lab.measure.metrics import perplexity

    tokenizer, model = small.tokenizer(), small.load("llama-small")
    ids, units = windows("wikipedia", "test", 64, tokenizer)
    ids, units = ids[:20], units[:20]
    bits = bits_per_byte(model, ids, units, tokenizer)
    nll = perplexity(model, text.TokenSet(ids, units, "wikipedia", "test"), progress=False).by_unit()
    np.testing.assert_allclose(bits.bits * math.log(2), nll.nll, rtol=1e-5)
