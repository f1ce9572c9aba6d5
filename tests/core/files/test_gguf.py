"""GGUF files read back: by the library of llama.cpp, tensor by tensor, and by transformers, as whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from refimpl import GPTQ, RTN, EoRA, Magnitude, SparseGPT, compress, export_gguf, serve
from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.files import gguf as module
from refimpl.core.files.io import compressed_layers
from refimpl.core.layers import PackedLinear
from refimpl.lab.models import small

gguf = pytest.importorskip("gguf")
Factory = Callable[..., PreTrainedModel]
SIZE = {"vocab_size": 1030, "intermediate_size": 128}  # more tokens than the tokenizer knows; widths of whole blocks


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = small.tokenizer()
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and fields of a file by name."""
    reader = gguf.GGUFReader(str(path))
    return {t.name: t for t in reader.tensors}, {key: field.contents() for key, field in reader.fields.items()}


def weight(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def halves(rows: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys in the order of transformers."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def stored(layer: PackedLinear) -> Tensor:
    """The weights in float32: ``(code - zero) * scale``, nothing rounded."""
    layer.dtype = torch.float32
    return layer.to_dense()


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "bits, group, symmetric, kind",
    [
        *((4, group, symmetric, "Q4_0" if symmetric else "Q4_1") for group in (32, 64) for symmetric in (True, False)),
        (3, 32, False, "Q4_0"),
        (2, 32, True, "Q4_0"),
        (5, 32, False, "Q8_0"),
        (7, 64, False, "Q8_0"),
        (8, 32, True, "Q8_0"),
    ],
)
def test_packed_weights_are_the_same_to_the_last_bit(
    bits, group, symmetric, kind, dtype, tiny_llama: Factory, tokenizer, tmp_path
) -> None:
    model = tiny_llama(**SIZE).to(dtype)
    compress(model, RTN(bits, group, symmetric=symmetric), progress=False)
    report = export_gguf(model, tmp_path / "a.gguf", tokenizer)
    assert report.types == {kind: 14, "F16": 2, "F32": 5} and report.remarks == {}
    tensors, fields = read(report.path)
    assert len(tensors) == 21 and fields["general.file_type"] == {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}[kind]
    for name, layer in compressed_layers(model).items():
        _, _, block, inner = name.split(".", 3)
        tensor = tensors[f"blk.{block}.{NAMES[inner]}.weight"]
        assert tensor.tensor_type.name == kind
        found = weight(tensor)
        if inner in ("self_attn.q_proj", "self_attn.k_proj"):
            found = halves(found, 4 if inner.endswith("q_proj") else 2)
        assert torch.equal(found, stored(layer)), name


def test_every_zero_point_and_scale_of_4_bits_is_exact() -> None:
    """The offset of Q4_1 has 11 significant bits; a scale of 8 times a zero point of 4 would need 12."""
    scales = torch.arange(128, 256).repeat_interleave(16)[:, None] / 2.0**12
    zero = torch.arange(16, dtype=torch.uint8).repeat(128)[:, None]
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).expand(2048, 32)
    layer = PackedLinear(codes=codes, scale=scales, zero=zero, bits=4, dtype=torch.float32)
    kind, raw, remark = module._quantised(layer, gguf)
    assert kind == "Q4_1" and remark is None
    decoded = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(decoded, layer.to_dense().numpy())


def test_pruned_and_quantised_weights_stay_zero(tiny_llama: Factory, tokens, tokenizer, tmp_path) -> None:
    for symmetric, kind in ((True, "Q4_0"), (False, "Q4_1")):
        model = tiny_llama(**SIZE)
        compress(model, SparseGPT("2:4"), tokens(), progress=False)
        compress(model, GPTQ(4, 32, symmetric), tokens(), progress=False)
        report = export_gguf(model, tmp_path / f"{kind}.gguf", tokenizer)
        assert report.types[kind] == 14 and not report.remarks
        found = weight(read(report.path)[0]["blk.1.ffn_down.weight"])
        assert torch.equal(found, stored(model.model.layers[1].mlp.down_proj))
        assert (found.unflatten(1, (-1, 4)) == 0).sum(-1).min() >= 2


def test_what_no_type_holds_goes_to_the_nearest_with_a_remark(tiny_llama: Factory, tokens, tokenizer, tmp_path) -> None:
    model = tiny_llama(**SIZE)
    reference = tiny_llama(**SIZE)
    compress(model, RTN(8, 32), targets="q_proj", progress=False)  # up to 255 steps from zero
    compress(model, RTN(4, 16), targets="up_proj", progress=False)
    compress(model, Magnitude("2:4"), targets="gate_proj", progress=False)
    compress(model, RTN(3, 32), targets="down_proj", progress=False)
    compress(model, EoRA(4), tokens(), reference=reference, targets="down_proj", progress=False)
    expected = {name: layer.to_dense() for name, layer in compressed_layers(model).items()}
    report = export_gguf(model, tmp_path / "a.gguf", tokenizer)
    assert report.types == {"F16": 12, "F32": 5, "Q8_0": 4}
    again, multiplied = report.remarks
    assert "nearest of Q8_0" in again and len(report.remarks[again]) == 4
    assert "low-rank path" in multiplied and [n.rsplit(".", 1)[1] for n in report.remarks[multiplied]] == [
        "down_proj",
        "down_proj",
    ]
    assert str(report).splitlines()[1] == f"model.layers.0.self_attn.q_proj and 3 more: {again}"
    tensors, _ = read(report.path)
    for inner, name, error in (
        ("up_proj", "ffn_up", 0.01),
        ("gate_proj", "ffn_gate", 1e-3),
        ("down_proj", "ffn_down", 1e-3),
    ):
        exact = expected[f"model.layers.0.mlp.{inner}"]
        found = weight(tensors[f"blk.0.{name}.weight"])
        assert 0 < (found - exact).norm() <= error * exact.norm()


def mistral(**changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return MistralForCausalLM(MistralConfig(sliding_window=None, head_dim=32, **(sizes | SIZE | changes))).eval()


@pytest.mark.parametrize("layout", ["llama", "llama with biases", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(layout: str, tokens, tokenizer, request, tmp_path) -> None:
    options: dict[str, Any] = dict(SIZE)
    if "biases" in layout:
        options["attention_bias"] = True
    if layout == "qwen3":
        options["head_dim"] = 128  # what transformers takes for granted in a file of Qwen3
    factory = mistral if layout == "mistral" else request.getfixturevalue(f"tiny_{layout.split()[0]}")
    model = factory(**options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    compress(model, RTN(4, 32), targets="mlp", progress=False)
    compress(model, RTN(8, 32, symmetric=True), targets="v_proj|o_proj", progress=False)
    report = export_gguf(model, tmp_path / "a.gguf", tokenizer)
    tensors, fields = read(report.path)
    tied = model.config.tie_word_embeddings
    assert ("output.weight" in tensors) is not tied
    assert ("blk.0.attn_q.bias" in tensors) is (layout in ("qwen2", "llama with biases"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    if layout == "llama with biases":  # transformers does not read them: only that they are rows of queries and keys
        bias = weight(tensors["blk.1.attn_k.bias"])
        assert torch.equal(halves(bias, 2), model.model.layers[1].self_attn.k_proj.bias)
        return
    ids = tokens(2, 8, seed=9)
    with torch.no_grad():
        ours, theirs = model(ids).logits, again(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-3)  # embeddings, queries and keys are rounded to float16


def test_metadata_and_tokenizer(tiny_qwen3: Factory, tokenizer, tmp_path) -> None:
    model = tiny_qwen3(**SIZE)
    compress(model, RTN(4, 32), progress=False)
    _, fields = read(export_gguf(model, tmp_path / "a.gguf", tokenizer).path)
    expected = {
        "general.architecture": "qwen3",
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "qwen3.vocab_size": 1030,
        "qwen3.context_length": 256,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 3,
        "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.chat_template": tokenizer.chat_template,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)
    words = fields["tokenizer.ggml.tokens"]
    assert len(words) == 1030 and words[1024:] == [f"[PAD{i}]" for i in range(1024, 1030)]
    assert words[:1024] == tokenizer.convert_ids_to_tokens(range(1024))
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[1024:] == [5] * 6 and {kinds[i] for i in tokenizer.all_special_ids} == {3}
    assert kinds.count(1) == 1024 - len(tokenizer.all_special_ids)
    for kind in ("bos", "eos", "unk", "pad"):
        key = {"unk": "unknown", "pad": "padding"}.get(kind, kind)
        assert fields.get(f"tokenizer.ggml.{key}_token_id") == getattr(tokenizer, f"{kind}_token_id")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="a.gguf")
    said = "The river 1723"
    assert again(said).input_ids == tokenizer(said).input_ids


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("rotation", [LLAMA3, {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}])
def test_frequencies_that_are_scaled(rotation, tiny_llama: Factory, tokenizer, tmp_path) -> None:
    model = tiny_llama(**SIZE, rope_parameters=rotation)
    tensors, fields = read(export_gguf(model, tmp_path / "a.gguf", tokenizer).path)
    assert fields["llama.rope.freq_base"] == rotation["rope_theta"]
    plain = rotation["rope_theta"] ** -(torch.arange(8) / 8)
    factors = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data))
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.max() == pytest.approx(rotation["factor"]) and factors.dtype == torch.float32


def splitting(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def test_how_text_is_split() -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    whole = dict(level, use_regex=False)

    def split(numbers: str) -> dict[str, Any]:
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        return {"type": "Split", "pattern": {"Regex": words + numbers + rest}, "behavior": "Isolated", "invert": False}

    for description, name in (
        ({"pre_tokenizer": level}, "gpt-2"),
        (splitting(digits, level), "smollm"),
        (splitting(split(r"\p{N}{1,3}"), whole), "llama-bpe"),
        (splitting(split(r"\p{N}"), whole), "qwen2"),
        (splitting(split(r"\p{N}{2}"), whole), None),
        (splitting(split(r"\p{N}"), level), None),
        (splitting(dict(digits, individual_digits=False), level), None),
        ({"pre_tokenizer": dict(level, add_prefix_space=True)}, None),
        ({"pre_tokenizer": {"type": "Metaspace"}}, None),
        ({"pre_tokenizer": None}, None),
    ):
        assert module._pre_tokenizer(description) == name


# ---- refusals and files


def test_refusals(tiny_gpt2: Factory, tiny_llama: Factory, tokens, tokenizer, tmp_path) -> None:
    def refused(
        error: type[Exception], message: str, model: Any, path: Any = tmp_path / "a.gguf", own: Any = tokenizer
    ):
        with pytest.raises(error, match=message):
            export_gguf(model, path, own)
        assert [file.name for file in tmp_path.iterdir()] in ([], ["other.gguf"])

    model = tiny_llama(**SIZE)
    refused(OptionError, "model=GPT2LMHeadModel: export_gguf writes LlamaForCausalLM", tiny_gpt2())
    refused(
        OptionError, "its hidden_act is 'gelu', and export_gguf knows 'silu'", tiny_llama(**SIZE, hidden_act="gelu")
    )
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    refused(OptionError, "its rope_type is 'dynamic'", tiny_llama(**SIZE, rope_parameters=dynamic))
    refused(OptionError, "name a file that ends in .gguf", model, tmp_path / "folder")
    refused(OptionError, "tokenizer=str: pass the fast tokenizer", model, own="smollm2")
    refused(OptionError, "it has a token 1023, and the model knows 256 tokens", tiny_llama())
    quantised = tiny_llama(**SIZE)
    compress(quantised, QuantizeActivations(8), tokens(), progress=False)
    refused(OptionError, "quantises its inputs", quantised)
    (tmp_path / "other.gguf").write_text("someone's notes")
    refused(CheckpointError, "holds something that is no GGUF", model, tmp_path / "other.gguf")
    assert (tmp_path / "other.gguf").read_text() == "someone's notes"


def test_an_interruption_leaves_the_old_file(tiny_llama: Factory, tokenizer, tmp_path, monkeypatch) -> None:
    model, path = tiny_llama(**SIZE), tmp_path / "a.gguf"
    export_gguf(model, path, tokenizer)
    before = path.read_bytes()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    compress(model, RTN(4, 32), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", stop)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, path, tokenizer)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.gguf"]
    export_gguf(model, path, tokenizer)
    assert len(path.read_bytes()) < len(before) and [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_served_models_are_exported_like_others(device: str, tiny_llama: Factory, tokenizer, tmp_path) -> None:
    model = tiny_llama(**SIZE)
    compress(model, RTN(4, 32), progress=False)
    export_gguf(model, tmp_path / "a.gguf", tokenizer)
    serve(model, progress=False, device=device)
    export_gguf(model, tmp_path / "b.gguf", tokenizer)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_smollm2(smollm2_folder: Path, tmp_path) -> None:
    """The real tokenizer is told as llama.cpp knows it."""
    from refimpl.lab import models

    model, tokenizer = models.smollm2(torch.float32, layers=1), models.tokenizer()
    compress(model, RTN(4, 32, symmetric=True), progress=False)
    report = export_gguf(model, tmp_path / "a.gguf", tokenizer)
    assert report.types == {"F16": 1, "F32": 3, "Q4_0": 7} and not report.remarks
    tensors, fields = read(report.path)
    assert fields["tokenizer.ggml.pre"] == "smollm" and fields["tokenizer.chat_template"] == tokenizer.chat_template
    description = json.loads((smollm2_folder / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in description["model"]["merges"]]
    found = halves(weight(tensors["blk.0.attn_k.weight"]), 3)
    assert torch.equal(found, stored(model.model.layers[0].self_attn.k_proj))
