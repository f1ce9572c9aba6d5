"""Saving, loading, compressing from a folder block by block, and going on after an interruption."""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from refimpl import GPTQ, METHODS, RTN, EoRA, Magnitude, SparseGPT, Wanda, compress, load, save
from refimpl.core.compress import driver as driver
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.files.checkpoint import Checkpoint

Factory = Callable[..., PreTrainedModel]
LAYOUTS = ["llama", "gpt2", "mixtral", "qwen3"]


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As from_pretrained(dtype=) does it: the weights, but not the rotary tables."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def logits(model: Any, tokens: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 8, seed=9)).logits


# ---- save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_models_come_back_exactly(layout, tied, dtype, tokens, request, state, same, tmp_path) -> None:
    model = cast(request.getfixturevalue(f"tiny_{layout}")(tie_word_embeddings=tied), dtype)
    reference = copy.deepcopy(model)
    steps = [Magnitude("unstructured", 0.4), RTN(3, 32), EoRA(4), EoRA(4, adapter_bits=4)]
    for number, method in enumerate(steps):
        compress(model, method, tokens(), reference=reference, progress=False)
        again = load(save(model, tmp_path / str(number)))
        assert same(state(again), state(model))
        assert torch.equal(logits(again, tokens), logits(model, tokens))
        assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
        assert [type(site.module) for site in find_sites(again)] == [type(site.module) for site in find_sites(model)]
    again.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("name", list(METHODS))
def test_result_of_every_method_comes_back(name, pipeline, tiny_llama: Factory, tokens, state, same, tmp_path) -> None:
    model = tiny_llama()
    reference = copy.deepcopy(model)
    for method in pipeline(name):
        compress(model, method, tokens(), reference=reference, progress=False)
    assert same(state(load(save(model, tmp_path))), state(model))


def test_partly_compressed_and_plain_models(tiny_mixtral: Factory, tokens, state, same, tmp_path) -> None:
    model = tiny_mixtral()
    again = load(save(model, tmp_path / "plain"))  # the experts come back apart
    assert torch.allclose(logits(again, tokens), logits(model, tokens), atol=1e-5)
    compress(model, RTN(4, 32), targets="experts.1.down_proj|q_proj", progress=False)
    assert same(state(load(save(model, tmp_path / "partly"))), state(model))


def test_scaled_embeddings_with_a_buffer_beside_them(tokens, state, same, tmp_path) -> None:
    """Gemma3 keeps a computed scale in its embedding; only that may be made anew when loading."""
    config = transformers.Gemma3TextConfig(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        head_dim=16,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "dense")
    compress(model, RTN(4, 32), progress=False)
    again = load(save(model, tmp_path / "packed"))
    assert same(state(again), state(model)) and torch.equal(logits(again, tokens), logits(model, tokens))
    compress(tmp_path / "dense", RTN(4, 32), out=tmp_path / "streamed", progress=False)
    assert torch.equal(logits(load(tmp_path / "streamed"), tokens), logits(model, tokens))


def test_load_in_another_dtype(tiny_llama: Factory, tokens, tmp_path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    compress(model, SparseGPT("2:4"), tokens(), targets="mlp", progress=False)
    compress(model, RTN(4, 32), targets="attn", progress=False)
    again = load(save(model, tmp_path), dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for ours, theirs in zip(find_sites(again), find_sites(model), strict=True):
        assert ours.weight.dtype == torch.float32
        assert torch.allclose(ours.weight, theirs.weight.float(), rtol=1e-2)
    assert torch.allclose(logits(again, tokens), logits(model, tokens).float(), atol=0.05)


def test_from_pretrained_stops_instead_of_inventing_weights(tiny_llama: Factory, tokens, tmp_path) -> None:
    model = tiny_llama()
    save(compress(model, RTN(4, 32), progress=False).model, tmp_path / "saved")
    compress(tiny_llama(), RTN(4, 32), out=tmp_path / "streamed", progress=False)
    for folder in ("saved", "streamed"):
        with pytest.raises(OSError, match="no file named model.safetensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path / folder)


def test_saving_again_replaces_and_never_touches_what_is_not_ours(tiny_llama: Factory, tmp_path, state, same) -> None:
    first, second = tiny_llama(), tiny_llama(num_hidden_layers=1)
    save(first, tmp_path / "a")
    save(second, tmp_path / "a")
    assert same(state(load(tmp_path / "a")), state(second))
    first.save_pretrained(tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    with pytest.raises(CheckpointError, match="refimpl did not write; choose another folder"):
        save(first, tmp_path / "theirs")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}


def test_large_models_are_split_by_block(tiny_llama: Factory, tmp_path, state, same, monkeypatch) -> None:
    monkeypatch.setattr("refimpl.core.files.io._SINGLE_FILE_LIMIT", 1000)
    model = tiny_llama()
    save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "rest.safetensors",
    ]
    assert same(state(load(tmp_path)), state(model))


# ---- damaged and foreign folders


def damage(folder: Path, how: str) -> None:
    file = folder / "weights.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "missing file":
        file.unlink()
    elif how in ("missing tensor", "extra tensor", "other shape"):
        tensors = load_file(file)
        if how == "missing tensor":
            del tensors["model.layers.1.mlp.up_proj.scale"]
        elif how == "extra tensor":
            tensors["model.layers.1.mlp.up_proj.shift"] = torch.zeros(3)
        else:
            tensors["model.norm.weight"] = torch.zeros(3)
        save_file(tensors, file)
    elif how == "manifest":
        (folder / "refimpl.json").write_text('{"format": 1, ')
    elif how == "newer":
        manifest = json.loads((folder / "refimpl.json").read_text())
        (folder / "refimpl.json").write_text(json.dumps({**manifest, "format": 2}))
    elif how == "no config":
        (folder / "config.json").unlink()


DAMAGES = {
    "truncated": "truncated",
    "missing file": "lacks weights.safetensors",
    "missing tensor": "lacks .*scale",
    "extra tensor": "no use, .*shift",
    "other shape": "'model.norm.weight' is",
    "manifest": "cannot be read",
    "newer": "newer refimpl",
    "no config": "no config.json",
}


@pytest.mark.parametrize("how", list(DAMAGES))
def test_damaged_folders_are_refused(how: str, tiny_llama: Factory, tmp_path) -> None:
    save(compress(tiny_llama(), RTN(4, 32), progress=False).model, tmp_path)
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=DAMAGES[how]):
        load(tmp_path)


def test_foreign_folders_are_refused(tiny_llama: Factory, tiny_mixtral: Factory, tokens, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no refimpl\.json.*from_pretrained"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="has no safetensors"):
        compress(tmp_path, RTN(4, 32), out=tmp_path / "out", progress=False)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which can run code.*save_pretrained"):
        Checkpoint(pickled)
    tiny_mixtral().save_pretrained(tmp_path / "old layout")  # experts under the names of the first release
    with pytest.raises(CheckpointError, match=r"older layout.*save_original_format=False"):
        compress(tmp_path / "old layout", RTN(4, 32), out=tmp_path / "out", progress=False)
    dense = tmp_path / "dense"
    tiny_llama().save_pretrained(dense)
    with pytest.raises(OptionError, match="out=None"):
        compress(dense, RTN(4, 32), progress=False)
    with pytest.raises(CheckpointError, match="not empty and not one of our runs"):
        compress(dense, RTN(4, 32), out=dense, progress=False)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="already quantised by 'gptq'"):
        compress(dense, RTN(4, 32), out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_index_that_names_a_missing_shard(tiny_llama: Factory, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="index.json cannot be read"):
        Checkpoint(tmp_path)


# ---- block by block from a folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_gives_the_in_memory_result(layout, dtype, tokens, request, state, same, tmp_path) -> None:
    """A pipeline of three steps, each reading the folder the one before it wrote."""
    model = cast(request.getfixturevalue(f"tiny_{layout}")(), dtype)
    dense = tmp_path / "dense"
    model.save_pretrained(dense, save_original_format=False, max_shard_size="100KB")
    source = dense
    for number, method in enumerate((SparseGPT("2:4"), GPTQ(3, 32), EoRA(4))):
        inside = compress(model, method, tokens(seed=number), reference=dense, progress=False)
        out = tmp_path / str(number)
        outside = compress(source, method, tokens(seed=number), reference=dense, out=out, progress=False)
        assert outside.model is None and outside.folder == out
        assert [(a.name, a.error, a.error_before) for a in inside.sites] == [
            (b.name, b.error, b.error_before) for b in outside.sites
        ]
        assert same(state(load(out)), state(model))
        source = out


def test_streaming_with_targets_and_parallel_order(tiny_llama: Factory, tokens, state, same, tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    options = {"order": "parallel", "targets": "mlp", "progress": False}
    compress(model, GPTQ(3, 32), tokens(), **options)
    compress(tmp_path / "dense", GPTQ(3, 32), tokens(), out=tmp_path / "out", **options)
    assert same(state(load(tmp_path / "out")), state(model))


# ---- interruption


def interrupt_at(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Ctrl-C in the middle of a block."""
    original = driver._compress_block

    def stop(module, index, *args, **kwargs):
        if index == block:
            args[0][0].replace(torch.nn.Identity())  # something half done
            raise KeyboardInterrupt
        return original(module, index, *args, **kwargs)

    monkeypatch.setattr(driver, "_compress_block", stop)


@pytest.mark.parametrize("source", ["the same model", "a fresh model", "a folder"])
@pytest.mark.parametrize("method", [RTN(3, 32), GPTQ(3, 32), EoRA(4)])
@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_resume_gives_the_same_bits(layout, method, source, request, tokens, state, same, tmp_path, monkeypatch):
    factory = request.getfixturevalue(f"tiny_{layout}")
    dense = factory(num_hidden_layers=3)
    dense.save_pretrained(tmp_path / "dense", save_original_format=False)

    def start() -> Any:
        model = copy.deepcopy(dense)
        if method.uses_reference:
            compress(model, Magnitude("2:4"), progress=False)
            if source == "a folder":
                return save(model, tmp_path / "start")
        return tmp_path / "dense" if source == "a folder" else model

    options: dict[str, Any] = {"reference": tmp_path / "dense", "progress": False}
    model, out = start(), tmp_path / "out"
    whole = compress(start(), method, tokens(), out=tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            compress(model, method, tokens(), out=out, **options)
    with pytest.raises(CheckpointError, match="unfinished run; call compress again with out="):
        load(out)
    for change in ({"order": "parallel"}, {"method": RTN(4, 32)}, {"tokens": tokens(seed=5)}, {"targets": "mlp"}):
        given = {"method": method, "tokens": tokens(), **change}
        if "tokens" in change and not method.statistics:
            continue
        with pytest.raises((CheckpointError, OptionError), match="another folder|already"):
            compress(start(), given.pop("method"), given.pop("tokens"), out=out, **options, **given)
    report = compress(start() if source == "a fresh model" else model, method, tokens(), out=out, **options)
    assert same(state(load(out)), state(load(tmp_path / "whole")))
    assert [(a.name, a.error) for a in report.sites] == [(b.name, b.error) for b in whole.sites]
    if source != "a folder":
        assert same(state(report.model), state(whole.model))
    assert not list(out.glob("hidden-*")) and not list(out.glob("*progress*")) and not list(out.glob(".*"))


def test_in_memory_interruption_leaves_whole_blocks(tiny_llama: Factory, tokens, monkeypatch) -> None:
    model = tiny_llama(num_hidden_layers=3)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            compress(model, GPTQ(3, 32), tokens(), progress=False)
    kinds = [type(site.module).__name__ for site in find_sites(model)]
    assert kinds == ["PackedLinear"] * 7 + ["Linear"] * 14
    assert torch.isfinite(logits(model, tokens)).all()


def test_another_model_or_batch_size_does_not_resume(tiny_llama: Factory, tokens, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_llama(), GPTQ(3, 32), tokens(), out=tmp_path, progress=False)
    for model, batch_size in ((tiny_llama(seed=1), 4), (tiny_llama(), 3)):
        with pytest.raises(CheckpointError, match="unfinished run with other options, tokens or weights"):
            compress(model, GPTQ(3, 32), tokens(), out=tmp_path, batch_size=batch_size, progress=False)


def test_repeated_call_is_quick_and_another_step_is_refused(tiny_llama: Factory, tokens, state, same, tmp_path) -> None:
    model = tiny_llama()
    dense = copy.deepcopy(model)
    first = compress(model, SparseGPT("2:4"), tokens(), out=tmp_path, progress=False)
    finished = state(model)

    def refuse(*_: Any) -> None:
        raise AssertionError("no work may be done again")

    for again in (model, copy.deepcopy(dense)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(SparseGPT, "compress_site", refuse)
            patched.setattr(driver, "block_inputs", refuse)
            start = time.process_time()
            report = compress(again, SparseGPT("2:4"), tokens(), out=tmp_path, progress=False)
            assert time.process_time() - start < 2
        assert [site.error for site in report.sites] == [site.error for site in first.sites]
        assert same(state(again), finished)
    with pytest.raises(CheckpointError, match="another compressed model; choose another folder"):
        compress(model, GPTQ(3, 32), tokens(), out=tmp_path, progress=False)  # not silently skipped
    with pytest.raises(CheckpointError, match="another compressed model"):
        compress(dense, Wanda("2:4"), tokens(), out=tmp_path, progress=False)
    assert same(state(model), finished)


def test_interrupted_save_can_be_repeated(tiny_llama: Factory, tmp_path, state, same, monkeypatch) -> None:
    from refimpl.core.files import io

    model = tiny_llama()
    compress(model, RTN(4, 32), progress=False)
    save(model, tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(io, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            save(model, tmp_path)
    with pytest.raises(CheckpointError, match="saving was interrupted"):
        load(tmp_path)
    save(model, tmp_path)
    same(state(load(tmp_path)), state(model))


def test_all_blocks_done_but_not_finished_takes_no_other_run(tiny_llama: Factory, tmp_path, monkeypatch) -> None:
    from refimpl.core.files import io

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(io, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_llama(), RTN(4, 32), out=tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="other options, tokens or weights"):
        compress(tiny_llama(), RTN(3, 32), out=tmp_path / "out", progress=False)
    compress(tiny_llama(), RTN(4, 32), out=tmp_path / "out", progress=False)
    assert load(tmp_path / "out").model.layers[0].mlp.up_proj.bits == 4


def test_end_of_text_ids_and_sampling_defaults_survive(tiny_llama: Factory, tmp_path) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.temperature = 0.5
    again = load(save(model, tmp_path)).generation_config
    assert again.eos_token_id == [2, 7] and again.temperature == 0.5


def test_folder_in_another_dtype_equals_the_converted_model(tiny_llama: Factory, tokens, state, same, tmp_path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = tiny_llama().to(torch.bfloat16).to(torch.float32)
    compress(model, GPTQ(4, 32), tokens(), progress=False)
    out = tmp_path / "out"
    compress(tmp_path / "source", GPTQ(4, 32), tokens(), out=out, dtype=torch.float32, progress=False)
    same(state(load(out)), state(model))
    with pytest.raises(OptionError, match="model.to"):
        compress(model, GPTQ(4, 32), tokens(), dtype=torch.float32, progress=False)
