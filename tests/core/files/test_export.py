"""Compressed models loaded back by the libraries they are exported for, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from refimpl import GPTQ, RTN, AdaQuant, EoRA, Magnitude, PlainSVD, SparseGPT, Wanda, compress, load, save
from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.compress.fold import fold_batch_norms
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CheckpointError, MissingExtra, OptionError
from refimpl.core.files import export
from refimpl.core.files.export import export_compressed_tensors, export_dense, export_peft, exports
from refimpl.core.files.io import compressed_layers
from refimpl.core.files.serve import serve
from refimpl.core.layers import Factor, LowRankLinear, PackedConv2d, PackedLinear

Factory = Callable[..., PreTrainedModel]
LAYOUTS = ["llama", "gpt2", "mixtral", "qwen3"]
DTYPES = [torch.float32, torch.bfloat16]


def cast(model: Any, dtype: torch.dtype) -> Any:
    """As from_pretrained(dtype=) does it: the weights, but not the rotary tables."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model: Any, tokens: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 8, seed=9)).logits


@pytest.fixture
def loaded(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Load a folder by transformers; whatever it does not understand, or says on the way, fails the test."""

    def load_it(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
        # its logger does not pass records on, and prints to a stream that was opened before ours
        transformers.utils.logging.enable_propagation()
        caplog.clear()
        capfd.readouterr()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*quantization_config")
                model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        finally:
            transformers.utils.logging.disable_propagation()
        assert not any(info.values()), info
        said = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
        assert said == []
        assert "LOAD REPORT" not in "".join(capfd.readouterr())
        return model.eval()

    return load_it


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def compressed(model: Any, steps: list[Any], tokens: Callable[..., Tensor], **options: Any) -> Any:
    reference = copy.deepcopy(model)
    for method in steps:
        compress(model, method, tokens(), reference=reference, progress=False, **options)
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}
    return tensors


def pruned_alike(weight: Tensor) -> bool:
    return bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all())


# ---- plain checkpoints


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_weights_give_equal_logits(layout, tied, dtype, tokens, request, loaded, tmp_path) -> None:
    model = cast(request.getfixturevalue(f"tiny_{layout}")(tie_word_embeddings=tied), dtype)
    for number, method in enumerate((SparseGPT("2:4"), GPTQ(3, 32))):
        compress(model, method, tokens(), progress=False)
        again = loaded(export_dense(model, tmp_path / str(number)))
        ours, theirs = logits(model, tokens), logits(again, tokens)
        assert theirs.dtype == dtype
        if layout == "mixtral" and dtype == torch.bfloat16:  # the experts' sums are rounded in another order
            assert torch.allclose(ours, theirs, atol=0.02)
        elif layout == "mixtral":
            assert torch.allclose(ours, theirs, atol=1e-6)
        else:
            assert torch.equal(ours, theirs)
        assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
        again.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)
        weights = again.state_dict()
        for site in find_sites(model):
            if layout != "mixtral" or ".experts." not in site.name:
                weight = weights[f"{site.name}.weight"]
                assert torch.equal(weight.T if layout == "gpt2" else weight, site.weight)
                assert pruned_alike(site.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_rank_paths_are_multiplied_out(layout, tokens, request, loaded, tmp_path) -> None:
    model = request.getfixturevalue(f"tiny_{layout}")()
    compressed(model, [SparseGPT("2:4"), GPTQ(3, 32), EoRA(4, adapter_bits=4)], tokens)
    again = loaded(export_dense(model, tmp_path / "out"))
    assert torch.allclose(logits(model, tokens), logits(again, tokens), atol=1e-5)
    assert not pruned_alike(again.get_submodule(find_sites(model, "o_proj|c_proj")[0].name).weight)


def test_partly_compressed_and_plain_models(tiny_mixtral: Factory, tokens, loaded, tmp_path) -> None:
    model = tiny_mixtral()
    assert torch.equal(logits(loaded(export_dense(model, tmp_path / "plain")), tokens), logits(model, tokens))
    compress(model, RTN(4, 32), targets="experts.1.down_proj|q_proj", progress=False)
    again = loaded(export_dense(model, tmp_path / "partly"))
    assert torch.allclose(logits(again, tokens), logits(model, tokens), atol=1e-6)
    # checkpoints of this architecture hold experts one by one, whatever transformers makes of them
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in stored(tmp_path / "partly")


def test_large_models_are_split(tiny_llama: Factory, tokens, loaded, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_SHARD_LIMIT", 100_000)
    model = compressed(tiny_llama(num_hidden_layers=4, tie_word_embeddings=True), [RTN(4, 32, True)], tokens)
    for folder in (export_dense(model, tmp_path / "a"), export_compressed_tensors(model, tmp_path / "b")):
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(files) > 1 and files[0] == f"model-00001-of-0000{len(files)}.safetensors"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(stored(folder)) and set(index["weight_map"].values()) == set(files)
        again = loaded(folder)
        assert torch.equal(logits(again, tokens), logits(model, tokens))
        assert again.lm_head.weight is again.get_input_embeddings().weight


def test_one_file_is_in_memory_at_a_time(tiny_llama: Factory, tokens, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_SHARD_LIMIT", 1)
    model = compressed(tiny_llama(num_hidden_layers=6), [RTN(4, 32)], tokens)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    dense = export._Source.dense

    def watched(*args: Any) -> dict[str, Tensor]:
        tensors = dense(*args)
        made.extend(weakref.ref(tensor) for tensor in tensors.values())
        alive.append(sum(ref() is not None for ref in made))
        return tensors

    monkeypatch.setattr(export._Source, "dense", watched)
    export_dense(model, tmp_path / "out")
    assert len(made) == 6 * 7 and max(alive) <= 2 * 7  # a block is made before the one before it is written


def test_models_written_block_by_block(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", GPTQ(4, 32, symmetric=True), tokens(), out=tmp_path / "packed", progress=False)
    model = load(tmp_path / "packed")
    for folder in (export_dense(model, tmp_path / "a"), export_compressed_tensors(model, tmp_path / "b")):
        assert torch.equal(logits(loaded(folder), tokens), logits(model, tokens))
    again = load(save(loaded(tmp_path / "a"), tmp_path / "c"))  # and an export can be worked on further
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_generation_settings_travel(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32, symmetric=True)], tokens)
    model.generation_config.eos_token_id = [2, 7]
    for folder in (export_dense(model, tmp_path / "a"), export_compressed_tensors(model, tmp_path / "b")):
        assert loaded(folder).generation_config.eos_token_id == [2, 7]


# ---- images


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", ["tiny_resnet", "tiny_vit", "tiny_convnext"])
def test_image_models(kind, folded, images, request, loaded, tmp_path) -> None:
    model = request.getfixturevalue(kind)()
    reference = copy.deepcopy(model)
    norms = fold_batch_norms(model, images(2)) if folded else None
    if norms is not None:
        fold_batch_norms(reference, images(2))
    targets = None if kind != "tiny_convnext" else "pointwise|pwconv|classifier|embeddings"
    for number, method in enumerate((Magnitude("unstructured", 0.4), RTN(4, None), PlainSVD(2))):
        compress(model, method, images(8), reference=reference, targets=targets, progress=False)
        again = loaded(export_dense(model, tmp_path / str(number)), type(model))
        with torch.no_grad():
            ours, theirs = model(images(4)).logits, again(images(4)).logits
        moved = folded and kind == "tiny_resnet"  # a bias became the shift of a batch norm: added later, in fp32
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert moved or number == 2 or torch.equal(ours, theirs)
    if norms is not None:
        norms.reinsert(model)
        again = loaded(export_dense(model, tmp_path / "reinserted"), type(model))
        with torch.no_grad():
            assert torch.allclose(model(images(4)).logits, again(images(4)).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny_resnet", "tiny_vit"])
def test_adapters_of_image_models(kind, images, request, loaded, tmp_path) -> None:
    model = request.getfixturevalue(kind)()
    reference = copy.deepcopy(model)
    for method in (RTN(3, None), EoRA(3)):
        compress(model, method, images(8), reference=reference, progress=False)
    export_dense(model, tmp_path / "base", adapter=tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(tmp_path / "base", type(model)), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(model(images(4)).logits, again(images(4)).logits, atol=1e-4)
    assert kind == "tiny_vit" or any(isinstance(layer, PackedConv2d) for layer in model.modules())


# ---- compressed-tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantised_weights_give_equal_logits(
    symmetric, bits, dtype, tiny_llama: Factory, tokens, loaded, tmp_path
) -> None:
    model = compressed(cast(tiny_llama(), dtype), [RTN(bits, 32, symmetric)], tokens)
    again = loaded(export_compressed_tensors(model, tmp_path / "out"))
    assert torch.equal(logits(again, tokens), logits(model, tokens)) and logits(again, tokens).dtype == dtype
    packed = stored(tmp_path / "out")
    layer = "model.layers.0.mlp.up_proj"
    assert packed[f"{layer}.weight_packed"].nbytes == 96 * 64 * bits / 8
    assert (f"{layer}.weight_zero_point" in packed) != symmetric
    assert "lm_head" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    if symmetric and dtype == torch.float32:  # unpacked while loading instead of at the first call
        option = CompressedTensorsConfig(dequantize=True)
        assert torch.equal(logits(loaded(tmp_path / "out", quantization_config=option), tokens), logits(model, tokens))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["llama", "qwen3"])
def test_one_group_per_row_and_biases(layout, symmetric, request, tokens, loaded, tmp_path) -> None:
    model = request.getfixturevalue(f"tiny_{layout}")(attention_bias=True)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    compressed(model, [GPTQ(4, None, symmetric)], tokens)
    again = loaded(export_compressed_tensors(model, tmp_path / "out"))
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert stored(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_scale"].shape == (96, 1)


def test_the_option_may_be_given_by_hand(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    """For a transformers that does not read it from the configuration."""
    model = compressed(tiny_llama(), [RTN(4, 32)], tokens)
    folder = export_compressed_tensors(model, tmp_path / "out")
    assert "CompressedTensorsConfig(dequantize=True)" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"].pop("dequantize") is True
    (folder / "config.json").write_text(json.dumps(config))
    again = loaded(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def mixed(model: Any, symmetric: bool, tokens: Callable[..., Tensor]) -> Any:
    compressed(model, [RTN(4, 32, symmetric)], tokens, targets="mlp")
    compressed(model, [RTN(3, 32, symmetric)], tokens, targets="q_proj|k_proj")
    compressed(model, [RTN(8, None, symmetric)], tokens, targets="v_proj") if symmetric else None
    compressed(model, [RTN(4, 64, symmetric)], tokens, targets="layers.0.*o_proj")  # one group: a row of 64
    return model


def test_mixed_settings(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = mixed(tiny_llama(), True, tokens)
    again = loaded(export_compressed_tensors(model, tmp_path / "out"))
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = {
        (g["weights"]["num_bits"], g["weights"]["group_size"]): g["targets"] for g in config["config_groups"].values()
    }
    assert found.keys() == {(4, 32), (3, 32), (8, None), (4, None)}
    assert set(found[4, None]) == {"model.layers.0.self_attn.o_proj"}
    assert set(config["ignore"]) == {"model.layers.1.self_attn.o_proj", "lm_head"}


def test_asymmetric_mixed_settings_need_the_wider_grid(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = mixed(tiny_llama(), False, tokens)
    with pytest.raises(OptionError, match=r"'model.layers.0.self_attn.q_proj' is asymmetric .* symmetric=True"):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = loaded(export_compressed_tensors(model, tmp_path / "out", symmetric=True))
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = [group["weights"] for group in config["config_groups"].values()]
    assert {entry["num_bits"] for entry in weights} == {4, 5} and all(entry["symmetric"] for entry in weights)
    assert "dequantize" not in config


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_sparse_quantised_layers_keep_their_zeros(
    pattern, symmetric, tiny_llama: Factory, tokens, loaded, tmp_path
) -> None:
    model = compressed(tiny_llama(), [Wanda(pattern), GPTQ(4, 32, symmetric)], tokens)
    again = loaded(export_compressed_tensors(model, tmp_path / "out"))
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    for site in find_sites(model):
        weight = again.get_submodule(site.name).weight
        assert torch.equal(weight, site.weight)
        assert torch.equal(weight == 0, site.weight == 0) and (weight == 0).float().mean() > 0.45
        assert pattern != "2:4" or pruned_alike(weight)


def test_unquantised_layers_are_ordinary_weights(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(tiny_llama(), [SparseGPT("2:4")], tokens, targets="mlp")
    compressed(model, [RTN(4, 32, symmetric=True)], tokens, targets="q_proj")
    again = loaded(export_compressed_tensors(model, tmp_path / "out"))
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert pruned_alike(stored(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj", "lm_head"} <= set(config["ignore"])
    assert "model.layers.0.self_attn.q_proj" not in config["ignore"]


def test_trained_layerwise_calibration(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(tiny_llama(), [AdaQuant(bits=4, group_size=32, iterations=3)], tokens)
    again = loaded(export_compressed_tensors(model, tmp_path / "out"))
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("others", [RTN(4, 32, symmetric=True), RTN(3, None, symmetric=True), None])
def test_experts(others, dequantize, tiny_mixtral: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(tiny_mixtral(), [GPTQ(4, 32, symmetric=True)], tokens, targets="experts")
    if others is not None:
        compressed(model, [others], tokens, targets="attn")
    folder = export_compressed_tensors(model, tmp_path / "out")
    option = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    again = loaded(folder, **option)
    assert torch.allclose(logits(again, tokens), logits(model, tokens), atol=1e-6)
    name = "model.layers.0.block_sparse_moe"
    assert stored(folder)[f"{name}.experts.3.w2.weight_shape"].tolist() == [64, 96]
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", f"{name}.gate"} <= set(ignored)


def test_experts_that_are_refused(tiny_mixtral: Factory, tokens, tmp_path) -> None:
    model = compressed(tiny_mixtral(), [RTN(3, 32)], tokens, targets="experts")
    with pytest.raises(OptionError, match=r"experts.0.gate_up_proj' is asymmetric.*symmetric=True.*export_dense"):
        export_compressed_tensors(model, tmp_path / "out")
    export_compressed_tensors(model, tmp_path / "wide", symmetric=True)
    for targets, named in (
        ("attn", "0.gate_up_proj"),
        ("layers.0.*experts", "0.gate_up_proj"),
        ("gate_up", "0.down_proj"),
    ):
        model = compressed(tiny_mixtral(), [RTN(3, 32, symmetric=True)], tokens, targets=targets)
        with pytest.raises(OptionError, match=rf"experts.{named}' is not quantised like the other.*export_dense"):
            export_compressed_tensors(model, tmp_path / "out")
    compressed(model, [RTN(4, 32, symmetric=True)], tokens, targets="experts.*down_proj")
    with pytest.raises(OptionError, match="experts.0.down_proj' is not quantised like the other"):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- adapters


def check_adapter(model: Any, base: Any, adapter: Path, tokens: Callable[..., Tensor], dtype: torch.dtype) -> None:
    again = PeftModel.from_pretrained(base, adapter)
    exact = dtype == torch.float32  # PEFT computes in fp32 what we round to bf16 after each factor
    assert torch.allclose(logits(model, tokens).float(), logits(again, tokens).float(), atol=1e-4 if exact else 0.05)
    with again.disable_adapter():
        assert not torch.allclose(logits(again, tokens), logits(model, tokens), atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_bits", [None, 4])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "qwen3"])
def test_adapters_on_plain_weights(layout, adapter_bits, dtype, request, tokens, loaded, tmp_path) -> None:
    model = cast(request.getfixturevalue(f"tiny_{layout}")(), dtype)
    compressed(model, [SparseGPT("2:4"), EoRA(8, adapter_bits=adapter_bits)], tokens)
    export_dense(model, tmp_path / "base", adapter=tmp_path / "adapter")
    base = loaded(tmp_path / "base")
    assert pruned_alike(
        base.get_submodule(find_sites(model)[0].name).weight.T
        if layout == "gpt2"
        else base.get_submodule(find_sites(model)[0].name).weight
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")  # PEFT corrects a wrong setting aloud
        check_adapter(model, base, tmp_path / "adapter", tokens, dtype)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {site.name for site in find_sites(model)}
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_on_packed_weights(symmetric, dtype, tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(cast(tiny_llama(), dtype), [Wanda("2:4"), GPTQ(4, 32, symmetric), EoRA(8)], tokens)
    with pytest.raises(
        OptionError, match=r"'model.layers.0.self_attn.q_proj' has a low-rank path.*adapter=.*export_dense"
    ):
        export_compressed_tensors(model, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    export_compressed_tensors(model, tmp_path / "base", adapter=tmp_path / "adapter")
    check_adapter(model, loaded(tmp_path / "base"), tmp_path / "adapter", tokens, dtype)


def test_ranks_of_their_own_and_mixed_settings(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = tiny_llama()
    reference = copy.deepcopy(model)
    compress(model, RTN(3, 32, symmetric=True), targets="mlp", progress=False)
    compress(model, RTN(4, 32, symmetric=True), targets="attn", progress=False)
    for rank, targets in ((4, "up_proj|gate_proj"), (8, "down_proj"), (2, "layers.1.*q_proj")):
        compress(model, EoRA(rank), tokens(), reference=reference, targets=targets, progress=False)
    export_compressed_tensors(model, tmp_path / "base", adapter=tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.1.mlp.down_proj": 8,
        "model.layers.1.self_attn.q_proj": 2,
    }
    assert "run the model once" in (tmp_path / "base" / "README.md").read_text()
    base = loaded(tmp_path / "base")
    logits(base, tokens)
    check_adapter(model, base, tmp_path / "adapter", tokens, torch.float32)


def test_an_adapter_by_itself(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(tiny_llama(), [Magnitude("2:4")], tokens)
    reference = tiny_llama()
    export_dense(model, tmp_path / "base")
    compress(model, EoRA(8), tokens(), reference=reference, progress=False)
    export_peft(model, tmp_path / "adapter", base="someone/pruned")
    check_adapter(model, loaded(tmp_path / "base"), tmp_path / "adapter", tokens, torch.float32)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: someone/pruned" in card and 'from_pretrained("someone/pruned")' in card


# ---- models in the layout of the kernels


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("adapter_bits", [None, 4])
def test_served_models_are_exported_like_others(symmetric, adapter_bits, tiny_llama: Factory, tokens, tmp_path) -> None:
    size = {"intermediate_size": 128}  # multiples of 32
    model = compressed(tiny_llama(**size), [GPTQ(4, 32, symmetric)], tokens, targets="mlp")
    compressed(model, [SparseGPT("2:4")], tokens, targets="attn")
    reference = tiny_llama(**size)
    compress(model, EoRA(32, adapter_bits=adapter_bits), tokens(), reference=reference, progress=False)
    other = copy.deepcopy(model)
    assert not serve(other, device="cuda", progress=False).left or adapter_bits is None
    assert any("Served" in type(module).__name__ for module in other.modules())
    before = [type(module) for module in other.modules()]
    for name, each in (("packed", model), ("served", other)):
        export_dense(each, tmp_path / name / "dense")
        export_compressed_tensors(each, tmp_path / name / "ct", adapter=tmp_path / name / "peft")
    for kind in ("dense", "ct", "peft"):
        ours, theirs = stored(tmp_path / "packed" / kind), stored(tmp_path / "served" / kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [type(module) for module in other.modules()] == before


# ---- the real model


@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2(dtype, smollm2_folder, loaded, tmp_path) -> None:
    from refimpl.lab.models.language import smollm2

    ids = torch.randint(5, 40_000, (4, 32), generator=torch.Generator().manual_seed(0))
    model = smollm2(dtype, layers=2)
    reference = copy.deepcopy(model)

    def same(again: Any, atol: float | None = None) -> None:
        with torch.no_grad():
            ours, theirs = model(ids[:2, :16]).logits, again(ids[:2, :16]).logits
        assert torch.equal(ours, theirs) if atol is None else torch.allclose(ours, theirs.to(ours), atol=atol)

    compress(model, Wanda("2:4"), ids, progress=False)
    compress(model, RTN(4, 64, symmetric=True), targets="layers.0", progress=False)
    same(loaded(export_dense(model, tmp_path / "dense")))
    weights = stored(tmp_path / "dense")
    assert all(pruned_alike(weights[f"{site.name}.weight"]) for site in find_sites(model))
    same(loaded(export_compressed_tensors(model, tmp_path / "packed")))
    compress(model, RTN(3, 64), targets="layers.1", progress=False)
    compress(model, EoRA(16), ids, reference=reference, progress=False)
    export_compressed_tensors(model, tmp_path / "base", symmetric=True, adapter=tmp_path / "adapter")
    same(
        PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter"),
        1e-4 if dtype == torch.float32 else 0.5,
    )


# ---- folders


def test_exports_are_replaced_and_nothing_else_is_touched(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32, symmetric=True)], tokens)
    folder = export_compressed_tensors(model, tmp_path / "out")
    (folder / "tokenizer.json").write_text("{}")
    export_dense(model, folder)
    assert not any("packed" in name for name in stored(folder))
    assert (folder / "tokenizer.json").read_text() == "{}" and "plain weights" in (folder / "README.md").read_text()
    assert torch.equal(logits(loaded(folder), tokens), logits(model, tokens))
    assert (folder.stat().st_mode & 0o777) == 0o755
    for theirs in ("dense", "ours", "README.md", "precious.txt", "folder"):
        other = tmp_path / theirs
        if theirs in ("README.md", "precious.txt"):
            other.mkdir()
            (other / theirs).write_text("mine")
        elif theirs == "folder":
            (other / "inside").mkdir(parents=True)
        else:
            tiny_llama().save_pretrained(other) if theirs == "dense" else save(tiny_llama(), other)
        before = {path.name: path.is_file() and path.read_bytes() for path in other.iterdir()}
        with pytest.raises(CheckpointError, match="refimpl did not export, '.*'; choose another folder"):
            export_dense(model, other)
        assert before == {path.name: path.is_file() and path.read_bytes() for path in other.iterdir()}
    with pytest.raises(CheckpointError, match="folder='/' holds something that refimpl did not export"):
        export_dense(model, "/")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")  # may be there first
    loaded(export_dense(model, tmp_path / "empty"))


def test_exports_of_two_processes_and_of_a_killed_one(tiny_llama: Factory, tokens, loaded, tmp_path) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32, symmetric=True)], tokens)
    with export._whole(tmp_path / "out") as staging:
        (staging / "left").touch()
        with pytest.raises(CheckpointError, match="is being written by process"):
            export_dense(model, tmp_path / "out")
        shutil.copytree(staging, tmp_path / "killed")
    os.replace(tmp_path / "killed", tmp_path / staging.name)  # as a killed process leaves it
    shutil.rmtree(tmp_path / "out")
    export_dense(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "left").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_export_leaves_what_was_there(earlier, tiny_llama, tokens, tmp_path, monkeypatch) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32, symmetric=True)], tokens)
    out = tmp_path / "out"
    if earlier:
        export_dense(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if earlier else None

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_packed_card", stop)
    with pytest.raises(KeyboardInterrupt):
        export_compressed_tensors(model, out)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])
    assert before == ({path.name: path.read_bytes() for path in out.iterdir()} if earlier else None)


def test_between_two_exports_nothing_can_be_loaded(tiny_llama: Factory, tokens, tmp_path, monkeypatch) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32, symmetric=True)], tokens)
    out = export_dense(model, tmp_path / "out")
    replace = export.os.replace

    def stop(source: Path, target: Path) -> None:
        if target.name == "model.safetensors" and target.parent == out:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(export.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            export_compressed_tensors(model, out)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    export_compressed_tensors(model, out)  # the same call again mends it
    AutoModelForCausalLM.from_pretrained(out)


def test_the_lines_of_the_readme_work(tiny_llama: Factory, tokens, tmp_path) -> None:
    model = compressed(tiny_llama(), [Wanda("2:4"), GPTQ(4, 32), EoRA(4)], tokens)
    export_dense(model, tmp_path / "a")
    export_compressed_tensors(model, tmp_path / "b", adapter=tmp_path / "c")
    for name in "abc":
        card = (tmp_path / name / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", card, re.S)
        assert code is not None
        scope: dict[str, Any] = {}
        exec(code[1].replace("THIS FOLDER", str(tmp_path / name)), scope)
        if name != "b":
            assert torch.allclose(logits(scope["model"], tokens), logits(model, tokens), atol=1e-4)
        assert "tokenizer" in card or name == "c"


# ---- loaded back before they are done


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of an architecture that has no fixture."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "num_hidden_layers": 1, "pad_token_id": 0, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


ZAMBA = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "n_mamba_heads": 2,
    "mamba_d_state": 8,
}


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("GPTBigCode", {"n_embd": 64, "n_layer": 1, "n_head": 4}, "transformers cannot run a GPTBigCodeForCausalLM"),
        ("Zamba", ZAMBA, "transformers cannot run a ZambaForCausalLM"),
        (
            "Falcon",
            {},
            "'transformer.h.0.self_attention.query_key_value' is a FalconLinear, which pack-quantized cannot",
        ),
    ],
)
def test_what_transformers_cannot_load_packed(kind, changes, reason, short, tokens, loaded, tmp_path, monkeypatch):
    model = tiny(kind, **changes)
    compress(model, RTN(4, None, symmetric=True), progress=False)
    if short:
        monkeypatch.setattr(export, "_free_memory", lambda: 1.0)
    with pytest.raises((CheckpointError, OptionError), match=reason + ".*; .*export_dense"):
        export_compressed_tensors(model, tmp_path / "packed")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(loaded(export_dense(model, tmp_path / "plain")), tokens), logits(model, tokens))


@pytest.mark.parametrize("memory", [1.0, 1e18])
@pytest.mark.parametrize("lost", ["missing_keys", "unexpected_keys"])
def test_an_export_with_other_tensors_does_not_appear(lost, memory, tiny_llama, tokens, tmp_path, monkeypatch) -> None:
    """Whatever goes wrong while files are written: what transformers would invent or leave out is named."""
    model = compressed(tiny_llama(), [RTN(4, 32, symmetric=True)], tokens)
    written = export._write_checkpoint

    def damaged(staging: Path, *args: Any) -> None:
        written(staging, *args)
        tensors = stored(staging)
        norm = tensors.pop("model.norm.weight") if lost == "missing_keys" else tensors["model.norm.weight"].clone()
        if lost == "unexpected_keys":
            tensors["model.extra.weight"] = norm
        save_file(tensors, staging / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export, "_free_memory", lambda: memory)
    export_dense(model, tmp_path / "good")
    monkeypatch.setattr(export, "_write_checkpoint", damaged)
    for call in (export_dense, export_compressed_tensors):
        with pytest.raises(CheckpointError, match=f"{lost} 'model.(norm|extra).weight', so nothing was"):
            call(model, tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_experts_of_one_group(tokens, loaded, tmp_path) -> None:
    """Experts as wide as a group are in one setting with the others."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    model = tiny("Qwen3Moe", num_key_value_heads=2, head_dim=16, **experts)
    compress(model, RTN(4, 64, symmetric=True), progress=False)
    again = loaded(export_compressed_tensors(model, tmp_path / "out"))
    assert torch.allclose(logits(again, tokens), logits(model, tokens), atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["group_size"] for group in config["config_groups"].values()] == [64]


# ---- refusals


def test_what_no_format_holds(tiny_llama: Factory, tiny_vit: Factory, tokens, images, tmp_path) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32), QuantizeActivations(8)], tokens)
    for write in (export_dense, export_compressed_tensors):
        with pytest.raises(OptionError, match=r"'model.layers.0.self_attn.q_proj' quantises its inputs.*save\(\)"):
            write(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="model=Linear: it has no transformers configuration"):
        export_dense(nn.Linear(2, 2), tmp_path / "out")
    vit = tiny_vit()
    reference = copy.deepcopy(vit)
    for method in (RTN(4, None), PlainSVD(2), QuantizeActivations(8)):
        compress(vit, method, images(8), reference=reference, progress=False)
    with pytest.raises(OptionError, match=r"quantises its inputs, which a LoRA adapter cannot hold; keep.*save\(\)"):
        export_peft(vit, tmp_path / "out", base="x")
    assert not any(tmp_path.iterdir())


def test_what_pack_quantized_does_not_hold(
    tiny_llama: Factory, tiny_gpt2: Factory, tiny_resnet: Factory, tokens, tmp_path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match=r"'transformer.h.0.attn.c_attn' is a Conv1D.*export_dense"):
        export_compressed_tensors(compressed(tiny_gpt2(), [RTN(4, 32)], tokens), out)
    resnet = tiny_resnet()
    compress(resnet, RTN(4, None), progress=False)
    with pytest.raises(OptionError, match=r"embedder.convolution' is a convolution.*export_dense"):
        export_compressed_tensors(resnet, out)
    with pytest.raises(OptionError, match="none of its linear layers is quantised; use export_dense"):
        export_compressed_tensors(compressed(tiny_llama(), [Magnitude("2:4")], tokens), out)
    model = compressed(tiny_llama(), [RTN(8, 32)], tokens)
    with pytest.raises(OptionError, match="symmetric=True: 'model.layers.0.self_attn.q_proj' has 8 bits.*would need 9"):
        export_compressed_tensors(model, out, symmetric=True)
    model = compressed(tiny_llama(), [RTN(4, 32)], tokens)
    model.model.layers[0].mlp.up_proj = LowRankLinear(Factor(torch.ones(2, 64)), Factor(torch.ones(96, 2)))
    with pytest.raises(OptionError, match=r"'model.layers.0.mlp.up_proj' is a product of two factors.*export_dense"):
        export_compressed_tensors(model, out)
    assert torch.equal(
        stored(export_dense(model, tmp_path / "dense"))["model.layers.0.mlp.up_proj.weight"], torch.full((96, 64), 2.0)
    )
    assert not out.exists()


def test_scales_that_the_dtype_does_not_hold(tiny_llama: Factory, tokens, tmp_path) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32)], tokens)
    model.model.layers[1].mlp.up_proj.scale.fill_(1e-7)
    cast(model, torch.float16)
    with pytest.raises(OptionError, match=r"scales of 'model.layers.1.mlp.up_proj' do not fit torch.float16.*float32"):
        export_compressed_tensors(model, tmp_path / "out")
    model.model.layers[1].mlp.up_proj.scale.fill_(1e-3)
    export_compressed_tensors(model, tmp_path / "out")


def test_what_an_adapter_does_not_hold(
    tiny_llama: Factory, tiny_mixtral: Factory, tiny_convnext: Factory, tokens, images, tmp_path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="no layer has a low-rank path.*export_dense"):
        export_peft(tiny_llama(), out, base="x")
    model = compressed(tiny_mixtral(), [RTN(4, 32), PlainSVD(2)], tokens)
    with pytest.raises(
        OptionError, match=r"experts.0.gate_up_proj' belongs to one of several fused experts.*export_dense"
    ):
        export_dense(model, out, adapter=tmp_path / "adapter")
    convnext = tiny_convnext()
    reference = copy.deepcopy(convnext)
    for method in (RTN(4, None), PlainSVD(2)):
        compress(convnext, method, reference=reference, progress=False)
    with pytest.raises(OptionError, match=r"dwconv' is a convolution with groups.*export_dense"):
        export_peft(convnext, out, base="x")
    model = compressed(tiny_llama(), [RTN(4, 32), PlainSVD(2)], tokens)
    with pytest.raises(OptionError, match="adapter=.* is the folder of the model itself"):
        export_dense(model, out, adapter=out)
    assert not any(tmp_path.iterdir())


def test_a_changed_architecture_is_named(tiny_llama: Factory, tokens, tmp_path) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32)], tokens)
    model.model.layers[0].extra = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match="'model.layers.0.extra.weight'.*does not fit a LlamaForCausalLM"):
        export_dense(model, tmp_path / "out")
    del model.model.layers[0].extra
    model.model.norm = nn.Identity()
    with pytest.raises(CheckpointError, match="lacks 'model.norm.weight'"):
        export_dense(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["peft", "compressed_tensors"])
def test_a_missing_library_is_named(library, tiny_llama: Factory, tokens, tmp_path, monkeypatch) -> None:
    model = compressed(tiny_llama(), [RTN(4, 32), PlainSVD(2)], tokens)

    def require(module: str, extra: str) -> Any:
        if module.startswith(library):
            raise MissingExtra(f"this needs the package {module!r}: pip install 'refimpl[{extra}]'")
        return __import__(module, fromlist=["_"])

    monkeypatch.setattr(export, "require", require)
    with pytest.raises(MissingExtra, match=rf"{library}.*refimpl\[export\]"):
        export_compressed_tensors(model, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_which_formats_fit(tiny_llama: Factory, tiny_gpt2: Factory, tokens) -> None:
    reasons = exports(compressed(tiny_llama(), [RTN(4, 32)], tokens))
    assert reasons["compressed-tensors"] is None and reasons["gguf"] is None
    reasons = exports(compressed(tiny_gpt2(), [RTN(4, 32), PlainSVD(2)], tokens))
    assert reasons["dense"] is None and reasons["peft"] is None
    assert "'transformer.h.0.attn.c_attn'" in str(reasons["compressed-tensors"])
    assert "model=GPT2LMHeadModel: export_gguf writes" in str(reasons["gguf"])


def test_the_model_stays_as_it_was(tiny_mixtral: Factory, tokens, state, same, tmp_path) -> None:
    model = compressed(tiny_mixtral(), [Magnitude("2:4"), RTN(4, 32, symmetric=True), PlainSVD(2)], tokens)
    before, config = state(model), copy.deepcopy(model.config.to_dict())
    export_dense(model, tmp_path / "out")
    assert same(state(model), before) and model.config.to_dict() == config
    assert isinstance(compressed_layers(model)["model.layers.0.self_attn.q_proj"].base, PackedLinear)
