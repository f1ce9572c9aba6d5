"""Perplexity against the model's own loss, footprint against sums done by hand, peak memory against a known block."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.metrics import PeakMemory, perplexity

VOCABULARY = 97


def tiny(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, **options,
    )
    return transformers.LlamaForCausalLM(config)


def rows(n=5, length=17, seed=1):
    return torch.randint(0, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return tiny().eval()


def test_equals_the_models_own_loss(model):
    ids = rows()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert perplexity(model, ids, progress=False).value == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_batch_size_does_not_matter(model, batch_size):
    reference = perplexity(model, rows(), batch_size=3)
    np.testing.assert_allclose(perplexity(model, rows(), batch_size=batch_size).nll, reference.nll, rtol=1e-5)


def test_slicing_the_loss_does_not_matter(model, monkeypatch):
    whole = perplexity(model, rows()).nll
    monkeypatch.setattr("refimpl.lab.metrics._CHUNK_BYTES", 4 * VOCABULARY * 3)
    np.testing.assert_allclose(perplexity(model, rows()).nll, whole, rtol=1e-6)


def test_softcapped_logits_are_the_models_own():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5,
    )
    capped = transformers.Gemma2ForCausalLM(config).eval()
    ids = rows()
    with torch.no_grad():
        loss = capped(input_ids=ids, labels=ids).loss.item()
    assert perplexity(capped, ids).value == pytest.approx(math.exp(loss), rel=1e-5)


def test_bf16_is_close_to_fp32(model):
    """The loss itself is fp32 in both; what is left is the bf16 forward pass (8 bits of mantissa): 1 % here."""
    half = tiny().to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    assert perplexity(half, rows(16, 33)).value == pytest.approx(perplexity(model, rows(16, 33)).value, rel=1e-2)


def test_training_flags_are_restored_and_dropout_is_off():
    model = tiny(attention_dropout=0.5).train()
    model.lm_head.eval()
    first, second = perplexity(model, rows()), perplexity(model, rows())
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]
    np.testing.assert_array_equal(first.nll, second.nll)


def test_rows_of_one_document_are_added_up(model):
    tokens = SimpleNamespace(ids=rows(4), units=["a", "b", "a", "c"], corpus="prose")
    result = perplexity(model, tokens)
    grouped = result.by_unit()
    assert result.corpus == grouped.corpus == "prose"
    assert grouped.units == ["a", "b", "c"] and grouped.counts.tolist() == [32, 16, 16]
    assert grouped.nll[0] == pytest.approx(result.nll[0] + result.nll[2])
    assert math.exp(grouped.nll.sum() / grouped.counts.sum()) == pytest.approx(grouped.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((2, 5), VOCABULARY), "outside the model's vocabulary of 97"),
        (torch.full((2, 5), -1), r"tokens\[0, 0\] is -1"),
        (torch.zeros(3, 1, dtype=torch.long), "two tokens a row"),
        (torch.zeros(0, 5, dtype=torch.long), "at least one row"),
        (torch.zeros(5, dtype=torch.long), r"LongTensor \[rows, length\]"),
        (torch.zeros(2, 5), "torch.float32"),
        (SimpleNamespace(ids=torch.zeros(2, 5, dtype=torch.long), units=["a"]), "2 rows but 1 units"),
    ],
)
def test_unusable_tokens_are_refused(model, ids, message):
    with pytest.raises(CalibrationError, match=message):
        perplexity(model, ids)


def test_a_loss_that_is_not_finite_names_the_row():
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    ids = rows(4).clamp(min=8)
    ids[2, 3] = 7
    with pytest.raises(CalibrationError, match=r"row 2 \('2'\) is nan"):
        perplexity(model, ids, batch_size=4)
    assert model.training


def test_batch_size_zero_is_refused(model):
    with pytest.raises(OptionError, match="batch_size is 0"):
        perplexity(model, rows(), batch_size=0)


def test_peak_memory_sees_a_block_that_is_gone_at_the_end():
    with PeakMemory() as peak:
        block = torch.ones(64 * 2**20 // 4)
        time.sleep(0.02)
        del block
    if peak.above_start is None:
        return  # Windows: nothing to read
    assert 60 * 2**20 < peak.above_start < 100 * 2**20
    assert 60 * 2**20 < peak.anonymous_above_start <= peak.above_start + 2**20


def test_peak_memory_of_nothing_is_small_and_survives_an_error():
    with pytest.raises(RuntimeError), PeakMemory() as peak:
        raise RuntimeError
    assert peak.above_start is None or peak.above_start < 8 * 2**20
