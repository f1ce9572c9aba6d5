"""Perplexity against the model's own loss, footprint against sums by hand, peak memory of a known block."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.layers import CompensatedLinear, Factor, LowRankLinear, PackedLinear
from refimpl.lab.measure.metrics import PeakMemory, footprint, perplexity

VOCABULARY = 97


def tiny(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        **options,
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
    monkeypatch.setattr("refimpl.lab.measure.metrics._CHUNK_BYTES", 4 * VOCABULARY * 3)
    np.testing.assert_allclose(perplexity(model, rows()).nll, whole, rtol=1e-6)


def test_softcapped_logits_are_the_models_own():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    capped = transformers.Gemma2ForCausalLM(config).eval()
    ids = rows()
    with torch.no_grad():
        loss = capped(input_ids=ids, labels=ids).loss.item()
    assert perplexity(capped, ids).value == pytest.approx(math.exp(loss), rel=1e-5)


def test_bf16_is_close_to_fp32(model):
    """The loss is fp32 in both; what is left is the bf16 forward pass (8 bits of mantissa): 1 % here."""
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


def packed(linear, bits=4, group=16, pattern=None):
    """A packed layer of the right shapes; which codes it holds does not matter here."""
    rows, columns = linear.weight.shape
    mask = None
    if pattern:
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        mask[:, ::2] = True
    return PackedLinear(
        codes=torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8),
        scale=torch.ones(rows, columns // group),
        zero=torch.zeros(rows, columns // group, dtype=torch.uint8),
        bits=bits,
        mask=mask,
        pattern=pattern,
        bias=linear.bias,
        dtype=linear.weight.dtype,
    )


def replace_sites(model, make):
    for site in find_sites(model):
        site.replace(make(site.module))
    return model


def test_footprint_of_a_plain_model_is_its_dtype():
    model = tiny(tie_word_embeddings=True).to(torch.bfloat16)
    result = footprint(model)
    assert result.bits_per_weight == result.bits_per_parameter == 16
    assert result.parameters == model.num_parameters()
    assert result.bytes == 2 * model.num_parameters()  # the tied head is not counted twice
    assert result.weights == 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert result.disk_bytes is None


def test_footprint_counts_scales_zeros_and_masks():
    dense = footprint(tiny().to(torch.bfloat16))
    result = footprint(replace_sites(tiny().to(torch.bfloat16), packed))
    assert result.bits_per_weight == pytest.approx(4 + (16 + 4) / 16)
    assert result.parts["values"] * 8 == 4 * result.weights and result.parts["scales"] * 8 == result.weights
    assert (result.weights, result.parameters) == (dense.weights, dense.parameters)
    assert dense.bytes - result.bytes == result.weights * 2 - sum(result.parts.values())
    sparse = footprint(replace_sites(tiny(), lambda linear: packed(linear, pattern="2:4")))
    assert sparse.bits_per_weight == pytest.approx(4 / 2 + 2 / 2 + (16 + 4) / 16)


def test_footprint_counts_adapters_and_leaves_biases_out():
    def compensated(linear):
        rows, columns = linear.weight.shape
        adapter = LowRankLinear(Factor(torch.zeros(2, columns)), Factor(torch.zeros(rows, 2)))
        return CompensatedLinear(packed(linear), adapter)

    plain = footprint(replace_sites(tiny(attention_bias=True), compensated))
    shapes = [(32, 32)] * 4 + [(48, 32)] * 2 + [(32, 48)]
    adapter_bits = 2 * sum(32 * 2 * (rows + columns) for rows, columns in shapes)
    assert plain.parts["adapter"] * 8 == adapter_bits
    assert plain.parts["bias"] == 2 * 4 * 32 * 4
    assert plain.bits_per_weight == pytest.approx(5.25 + adapter_bits / plain.weights)
    assert plain.parameters == tiny(attention_bias=True).num_parameters()


def test_footprint_needs_no_memory_and_counts_only_compressed_sites_if_there_are_any():
    with torch.device("meta"):
        model = tiny(tie_word_embeddings=True)
    assert footprint(model).bytes == 4 * model.num_parameters()
    model = tiny()
    model.model.layers[0].mlp.up_proj = packed(model.model.layers[0].mlp.up_proj)
    assert footprint(model).weights == 32 * 48


def test_footprint_of_views_counts_what_they_cover():
    """Tensors of a memory-mapped checkpoint are slices of one storage as long as the file."""
    model = tiny()
    expected = footprint(model).bytes
    arena = torch.zeros(10**6)
    start = 0
    for parameter in model.parameters():
        parameter.data = arena[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    assert footprint(model).bytes == expected


def test_footprint_refuses_parts_that_hide_bytes():
    class Hiding(PackedLinear):
        def parts(self):
            return {"values": super().parts()["values"]}

    model = tiny()
    layer = packed(model.model.layers[1].mlp.up_proj)
    layer.__class__ = Hiding
    model.model.layers[1].mlp.up_proj = layer
    with pytest.raises(OptionError, match=r"layers\.1\.mlp\.up_proj.* must name every tensor"):
        footprint(model)


def test_footprint_of_a_folder_is_the_size_of_its_files(tmp_path):
    model = tiny()
    with pytest.raises(OptionError, match="holds no files"):
        footprint(model, tmp_path)
    model.save_pretrained(tmp_path)
    on_disk = footprint(model, tmp_path).disk_bytes
    assert on_disk == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert on_disk == pytest.approx(4 * model.num_parameters(), rel=0.1)
