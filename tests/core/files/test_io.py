"""Saving, loading, compressing from a folder block by block, and going on after an interruption."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from refimpl import (
    GPTQ,
    METHODS,
    RTN,
    EoRA,
    Magnitude,
    QuantizeActivations,
    SparseGPT,
    Wanda,
    compress,
    export_dense,
    load,
    save,
)
from refimpl.core.compress import driver as driver
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CheckpointError, FileError, OptionError
from refimpl.core.files import io
from refimpl.core.files.checkpoint import Checkpoint
from refimpl.core.files.companions import methods_of
from refimpl.core.stored import stored_dtype

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


PRETRAINED = {
    "quantised": [RTN(4, 32)],
    "sparse": [SparseGPT("2:4")],
    "repaired": [SparseGPT("2:4"), GPTQ(3, 32), EoRA(4, adapter_bits=4)],
    "rounded inputs": [RTN(4, 32), QuantizeActivations(8)],
}


@pytest.mark.parametrize("steps", list(PRETRAINED))
@pytest.mark.parametrize("layout", ["llama", "mixtral", "gpt2"])
def test_save_pretrained_and_from_pretrained(layout, steps, request, tokens, state, same, tmp_path) -> None:
    """What an engineer types first: transformers' own calls, both ways, mixed with ours."""
    model = cast(request.getfixturevalue(f"tiny_{layout}")(), torch.bfloat16)
    reference = copy.deepcopy(model)
    for method in PRETRAINED[steps]:
        compress(model, method, tokens(), reference=reference, targets="^((?!lm_head).)*$", progress=False)
    model.save_pretrained(tmp_path / "a")
    save(model, tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        for again in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
            assert same(state(again), state(model))
            assert torch.equal(logits(again, tokens), logits(model, tokens))
            assert methods_of(again) == methods_of(model) == [repr(method) for method in PRETRAINED[steps]]
            assert not {"quantization_config", "transformers_weights"} & again.config.to_dict().keys()
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(logits(wide, tokens), logits(load(tmp_path / "a", dtype=torch.float32), tokens))
    assert stored_dtype(wide) == torch.bfloat16
    again.save_pretrained(tmp_path / "c", state_dict=again.state_dict())  # as transformers' Trainer does
    assert same(state(load(tmp_path / "c")), state(model))


def test_from_pretrained_of_several_files_and_of_runs(tiny_llama: Factory, tokens, tmp_path, monkeypatch) -> None:
    model = tiny_llama()
    compress(model, RTN(4, 32), out=tmp_path / "run", progress=False)
    monkeypatch.setattr("refimpl.core.files.io._SINGLE_FILE_LIMIT", 1000)
    save(model, tmp_path / "split")
    for folder in ("run", "split"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again, tokens), logits(model, tokens))
    monkeypatch.undo()
    save(model, tmp_path / "split")  # one file again, and no index of the others
    assert not list(tmp_path.glob("split/*.index.json")) and len(list(tmp_path.glob("split/*.safetensors"))) == 1


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"variant": "fp16"}, {"state_dict": {}}])
def test_save_pretrained_refuses_what_it_would_ignore(options, tiny_llama: Factory, tmp_path) -> None:
    model = compress(tiny_llama(), RTN(4, 32), progress=False).model
    with pytest.raises(OptionError, match=f"{next(iter(options))}=.*refimpl.save"):
        model.save_pretrained(tmp_path / "a", **options)
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


def test_from_pretrained_names_what_is_missing(tiny_llama: Factory, tmp_path) -> None:
    model = compress(tiny_llama(), RTN(4, 32), progress=False).model
    save(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds a LlamaForCausalLM .*, no LlamaModel; use LlamaForCausalLM"):
        AutoModel.from_pretrained(tmp_path / "a")
    damage(tmp_path / "a", "missing tensor")
    with pytest.raises(CheckpointError, match="lacks .*scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "refimpl.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks refimpl\.json; fetch the whole folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_from_pretrained_without_refimpl_stops_instead_of_inventing_weights(tiny_llama: Factory, tmp_path) -> None:
    model = compress(tiny_llama(), RTN(4, 32), out=tmp_path / "run", progress=False).model
    save(model, tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\nfor folder in sys.argv[1:]:\n    try:\n"
        "        AutoModelForCausalLM.from_pretrained(folder)\n    except OSError as error:\n        print(error)\n"
        "assert 'refimpl' not in sys.modules\n"
        "import refimpl\n"
        "for folder in sys.argv[1:]:\n    AutoModelForCausalLM.from_pretrained(folder)\n"
    )
    folders = [str(tmp_path / name) for name in ("saved", "run", "again")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.count("no file named model.safetensors") == 3
    assert "Unknown quantization type, got refimpl" in done.stderr


def test_a_card_and_the_tokenizer_lie_beside_the_weights(tiny_llama: Factory, tokens, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / name).write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    compress(model, SparseGPT("2:4"), tokens(), progress=False)
    save(model, tmp_path / "a")
    compress(tmp_path / "dense", SparseGPT("2:4"), tokens(), out=tmp_path / "b", progress=False)
    compress(tmp_path / "b", GPTQ(4, 32), tokens(), out=tmp_path / "c", progress=False)
    for folder in "abc":
        assert (tmp_path / folder / "tokenizer.json").exists()
        card = (tmp_path / folder / "README.md").read_text()
        assert 'load("THIS FOLDER")' in card and "AutoTokenizer" in card and "1. `SparseGPT(" in card
        assert ("2. `GPTQ(bits=4" in card) == (folder == "c")
    (tmp_path / "a" / "README.md").write_text("mine")
    (tmp_path / "a" / "tokenizer.json").write_text("mine")
    save(model, tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == (tmp_path / "a" / "tokenizer.json").read_text() == "mine"
    fresh = tiny_llama()
    assert "There is no tokenizer here" in (save(fresh, tmp_path / "d") / "README.md").read_text()


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


# ---- every family of language models


SIZES = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1},
    **{"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "d_model": 64, "num_layers": 2, "num_heads": 4},
    **{"ffn_dim": 96, "word_embed_proj_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "d_inner": 96},
    **{"encoder_layers": 1, "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96},
    **{
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1},
    **{"topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    **{"v_head_dim": 16, "n_ctx": 64, "seq_length": 64, "n_inner": 96, "rotary_dim": 16, "embedding_size": 64},
    **{"eos_token_id": 2, "max_seq_len": 64, "lru_width": 64, "state_size": 8, "mamba_d_state": 8, "conv_kernel": 4},
    **{"expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "n_mamba_heads": 2, "n_groups": 1},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"mamba_num_heads": 4, "mamba_head_dim": 32, "sliding_window": 16, "num_labels": 3},
}
HYBRID = {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3}
OWN_SIZES: dict[str, dict[str, Any]] = {  # where the sizes above contradict each other
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zamba": {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {**HYBRID, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3, 5]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 sarvam_mla "
        "youtu".split(),
        {"num_key_value_heads": 4},
    ),
}
REFUSED = {  # what compress says of them
    **dict.fromkeys(["aria_text", "gpt_oss"], "the fused experts .* because is_transposed is True"),
    **dict.fromkeys(["llama4_text", "longcat_flash"], "the fused experts .* because it has no _apply_gate"),
    **dict.fromkeys(["hy_v4", "minimax_m3_vl_text"], "the fused experts .* because it has no act_fn"),
    **dict.fromkeys(["inkling_text", "jetmoe", "nemotron_h"], "the fused experts .* because its parameters are not"),
    "rwkv": "RwkvForCausalLM is not supported because it scales the weights of its blocks in place",
}
LARGE = 3_000_000  # weights of what needs more than small numbers, mostly a tower for images


def tiny_of(family: str) -> Any:
    """A small random model of a family, or a reason why there is none."""
    kind = CONFIG_MAPPING[family]
    known = {
        *inspect.signature(kind.__init__).parameters,
        *getattr(kind, "__dataclass_fields__", {}),
        *kind.attribute_map,
    }
    sizes = {name: value for name, value in SIZES.items() if name in known} | OWN_SIZES.get(family, {})
    try:
        config = kind(**sizes)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
        if size > LARGE:
            return f"{size} weights"
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # small sizes that its configuration does not take
        return f"{type(error).__name__}: {error}"


def run_plainly(model: Any) -> Tensor:
    ids = torch.randint(3, 120, (1, 8), generator=torch.Generator().manual_seed(1))
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def test_every_family_of_transformers_comes_back_or_is_refused_by_name(tmp_path, state, same) -> None:
    """Saved, loaded by us and by transformers, and read block by block from what transformers saved: the same model."""
    left, seen = {}, 0
    method = RTN(4, None)
    transformers.logging.set_verbosity_error()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = tiny_of(family)
        if isinstance(model, str):
            left[family] = model
            continue
        try:
            run_plainly(model)
        except Exception as error:
            left[family] = f"{type(error).__name__}: {error}"
            continue
        folder = tmp_path / family
        model.save_pretrained(folder / "dense")
        if family in REFUSED:
            for source in (model, folder / "dense"):
                with pytest.raises(OptionError, match=REFUSED[family]):
                    compress(source, method, out=folder / "out", progress=False)
            continue
        compress(model, method, progress=False)
        wanted = run_plainly(model)
        model.save_pretrained(folder / "saved")
        compress(folder / "dense", method, out=folder / "out", progress=False)
        ways = {
            "load": load(folder / "saved"),
            "from_pretrained": type(model).from_pretrained(folder / "saved"),
            "block by block": load(folder / "out"),
        }
        for way, again in ways.items():
            assert type(again) is type(model) and same(state(again), state(model)), f"{family}: {way}"
            # and what is computed anew, such as rotary tables (where a tensor lies may change the last bit)
            assert torch.allclose(run_plainly(again), wanted, rtol=1e-5, atol=1e-6), f"{family}: {way}"
        seen += 1
        shutil.rmtree(folder)
    assert seen > 2 * len(left) and not REFUSED.keys() & left.keys(), left


TASKS = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "CausalLM"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3Moe", "Mixtral"])
def test_task_heads(family, task, tmp_path, tokens) -> None:
    """Whatever class the model is of, that class comes back."""
    kind = getattr(transformers, f"{family}For{task}", None) or getattr(transformers, f"{family}LMHeadModel")
    known = inspect.signature(kind.config_class.__init__).parameters
    torch.manual_seed(0)
    model = kind(kind.config_class(**{k: v for k, v in SIZES.items() if k in known})).eval()
    model.save_pretrained(tmp_path / "dense")
    compress(model, GPTQ(4, 32), tokens() % 128, progress=False)
    save(model, tmp_path / "saved")
    compress(tmp_path / "dense", GPTQ(4, 32), tokens() % 128, out=tmp_path / "out", progress=False)
    ids = tokens() % 120 + 3
    for again in (load(tmp_path / "saved"), load(tmp_path / "out"), kind.from_pretrained(tmp_path / "saved")):
        assert type(again) is kind
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(model(ids)[:1], again(ids)[:1], strict=True))


def test_a_class_that_could_not_be_built_again_is_refused(tiny_llama: Factory, tmp_path) -> None:
    class Mine(type(tiny_llama())):
        pass

    model = Mine(tiny_llama().config)
    with pytest.raises(CheckpointError, match="model=Mine: it is no class of transformers, and LlamaConfig stands for"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_layers_at_several_places(tiny_llama: Factory, tokens, tmp_path) -> None:
    """One module in two blocks is compressed once, and comes back with equal outputs."""
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    report = compress(model, GPTQ(3, 32), tokens(), progress=False)
    assert len({site.name for site in report.sites}) == len(report.sites) == 11
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    for again in (load(save(model, tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("steps", [["layers.1"], ["layers.3"], [None], ["layers.3", "layers.1.*q_proj"]])
def test_tied_layers_compressed_one_by_one(steps, tokens, tmp_path) -> None:
    """Zamba ties the weights of some layers: each may be compressed, others keep what they were tied to."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3, "num_key_value_heads": 4}
    known = inspect.signature(transformers.ZambaConfig.__init__).parameters
    config = transformers.ZambaConfig(
        **{k: v for k, v in SIZES.items() if k in known} | sizes, attn_layer_period=2, attn_layer_offset=1
    )
    model = transformers.ZambaForCausalLM(config).eval()
    ids = tokens() % 128
    for number, targets in enumerate(steps):
        compress(model, GPTQ(4 - number, None), ids, targets=targets, progress=False)
    for again in (load(save(model, tmp_path)), transformers.ZambaForCausalLM.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)


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
    tiny_mixtral().save_pretrained(tmp_path / "other")
    tiny_llama().config.save_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"no tensor 'model.*mlp.*belongs to another model.*save_original_format="
    ):
        compress(tmp_path / "other", RTN(4, 32), out=tmp_path / "out", progress=False)
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


@pytest.mark.parametrize("name", ["../theirs.safetensors", "/etc/passwd", "a/../../b.safetensors", 3])
def test_a_weight_map_stays_inside_its_folder(name, tiny_llama: Factory, tmp_path) -> None:
    folder = tmp_path / "a"
    tiny_llama().save_pretrained(folder, max_shard_size="100KB")
    for file in ("model.safetensors.index.json", "refimpl.json"):
        (folder / file).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(CheckpointError, match=f"{file} names the file .*not inside its folder"):
            Checkpoint(folder)


# ---- disks and paths


def limited(work: Callable[[], Any], size: int = 20_000) -> None:
    """Do the work where no file can be longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_nothing(tiny_llama: Factory, tmp_path, state, same) -> None:
    model = tiny_llama()
    compress(model, RTN(4, 32), progress=False)
    calls = [
        lambda out: save(model, out),
        lambda out: model.save_pretrained(out),
        lambda out: compress(tiny_llama(), RTN(4, 32), out=out, progress=False),
        lambda out: export_dense(model, out),
    ]
    for number, call in enumerate(calls):
        out = tmp_path / str(number)
        with pytest.raises(
            FileError, match=f"{out}.* cannot be written .File too large.; free some space there"
        ) as found:
            limited(lambda call=call, out=out: call(out))
        assert "\n" not in str(found.value)
        call(out)  # and with room it works
    with pytest.raises(FileError):
        limited(lambda: save(tiny_llama(seed=1), tmp_path / "0"))
    assert same(state(load(tmp_path / "0")), state(model))
    assert not list(tmp_path.rglob(".*"))


def test_places_that_cannot_be_written(tiny_llama: Factory, tmp_path) -> None:
    model = tiny_llama()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for out in (Path("/sys/kernel/model"), tmp_path / "file", tmp_path / "pipe", tmp_path / "file" / "inside"):
        for call in (
            lambda out: save(model, out),
            lambda out: compress(tiny_llama(), RTN(4, 32), out=out, progress=False),
            lambda out: export_dense(model, out),
        ):
            with pytest.raises(FileError, match=rf"{out.parent}/.*; (choose a folder that you may|move what is in)"):
                call(out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("file", ["config.json", "refimpl.json", "weights.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "named pipe"])
def test_something_else_where_a_file_is_meant(file, kind, tiny_llama: Factory, tmp_path) -> None:
    save(tiny_llama(), tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir() if kind == "folder" else os.mkfifo(tmp_path / file)
    with pytest.raises((FileError, CheckpointError), match=f"{file}.* is a {kind} where|no {file}|lacks {file}"):
        load(tmp_path)
    with pytest.raises((FileError, CheckpointError), match=f"{file} is a {kind} where a file is meant|did not write"):
        save(tiny_llama(), tmp_path)
    assert not hidden_files(tmp_path)


# ---- block by block from a folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_gives_the_in_memory_result(layout, dtype, tokens, request, state, same, tmp_path) -> None:
    """A pipeline of three steps, each reading the folder the one before it wrote."""
    model = cast(request.getfixturevalue(f"tiny_{layout}")(), dtype)
    dense = tmp_path / "dense"
    model.save_pretrained(dense, max_shard_size="100KB")  # under the names of the first release
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


def shifted(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The same model with another value at the very end of one tensor."""
    model.get_parameter(name).data.flatten()[-1] += 1.0
    return model


READ = ["layers.1.mlp.up_proj", "layers.1.input_layernorm", "embed_tokens", "norm"]


@pytest.mark.parametrize("source", ["a model", "a folder"])
@pytest.mark.parametrize("name", [f"model.{name}.weight" for name in READ] + ["lm_head.weight", "reference"])
def test_other_weights_are_another_run(name, source, tiny_llama: Factory, tokens, tmp_path, monkeypatch) -> None:
    """Whatever the run reads tells it from another: the last value of a weight, a norm, the embeddings, the reference."""
    dense = tiny_llama()
    base = tiny_llama()
    compress(base, Magnitude("2:4"), targets="up_proj", progress=False)

    def run(model: PreTrainedModel, reference: PreTrainedModel, number: int) -> Any:
        method = EoRA(4) if name == "reference" else GPTQ(3, 32)
        given = base if name == "reference" else model
        start = copy.deepcopy(given)
        if source == "a folder":
            start = save(start, tmp_path / f"start{number}")
        return compress(
            start, method, tokens(), reference=reference, targets="up_proj", out=tmp_path / "out", progress=False
        )

    other = shifted(tiny_llama(), READ[0].join(("model.", ".weight")) if name == "reference" else name)
    run(dense, dense, 0)
    monkeypatch.setattr(driver, "_compress_block", lambda *_, **__: 1 / 0)
    run(dense, dense, 1)  # the same again is done already
    with pytest.raises(CheckpointError, match=r"out=.*another compressed model; choose another folder"):
        run(other, other, 2)


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


def killed(work: Callable[[], Any], patch: Callable[[pytest.MonkeyPatch], None]) -> None:
    """Do the work in a process of its own, which `patch` makes kill itself somewhere in the middle."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # rather than to hang
        torch.set_num_threads(1)  # threads do not survive a fork
        try:
            patch(pytest.MonkeyPatch())
            work()
        finally:
            os._exit(7)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def at_call(name: str, number: int, after: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """SIGKILL before or after the n-th call of a function of `io`."""
    original = getattr(io, name)
    calls = 0

    def die(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return lambda patch: patch.setattr(io, name, die)


def half_written(patch: pytest.MonkeyPatch) -> None:
    """SIGKILL while a temporary file is on the disk."""
    patch.setattr(io, "save_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))


def half_in_place(patch: pytest.MonkeyPatch) -> None:
    """SIGKILL when the first file of a complete new model is in its place."""
    patch.setattr(io, "_put_in_place", lambda folder: (replace_one(folder), os.kill(os.getpid(), signal.SIGKILL)))


def replace_one(folder: Path) -> None:
    path = folder / ".refimpl-saved" / "weights.safetensors"
    os.replace(path, folder / path.name)


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


SAVE_KILLS = {
    "half a file": (half_written, False),
    "weights, no manifest": (at_call("_finish", 1, after=False), False),
    "complete, not in place": (at_call("_put_in_place", 1, after=False), True),
    "half in place": (half_in_place, True),
}


@pytest.mark.parametrize("where", list(SAVE_KILLS))
def test_save_replaces_an_older_model_only_when_complete(where, tiny_llama: Factory, tmp_path, state, same) -> None:
    patch, new = SAVE_KILLS[where]
    older, newer = tiny_llama(), tiny_llama(seed=1, num_hidden_layers=1)
    for model in (older, newer):
        compress(model, RTN(4, 32), progress=False)
    save(older, tmp_path / "a")
    killed(lambda: save(newer, tmp_path / "a"), patch)
    assert same(state(load(tmp_path / "a")), state(newer if new else older))
    save(newer, tmp_path / "a")
    assert same(state(load(tmp_path / "a")), state(newer)) and not hidden_files(tmp_path / "a")
    killed(lambda: save(newer, tmp_path / "b"), patch)  # with nothing there before
    if new:
        assert same(state(load(tmp_path / "b")), state(newer))
    else:
        with pytest.raises(CheckpointError, match="saving was interrupted; save it again"):
            load(tmp_path / "b")
    save(newer, tmp_path / "b")
    assert same(state(load(tmp_path / "b")), state(newer)) and not hidden_files(tmp_path / "b")


def test_a_failed_save_leaves_nothing(tiny_llama: Factory, tmp_path, state, same, monkeypatch) -> None:
    model = tiny_llama()
    save(model, tmp_path / "a")
    before = sorted(path.name for path in (tmp_path / "a").iterdir())

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(io, "_finish", stop)
    for folder in ("a", "b/c"):
        with pytest.raises(KeyboardInterrupt):
            save(tiny_llama(seed=1), tmp_path / folder)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before and not (tmp_path / "b").exists()
    assert same(state(load(tmp_path / "a")), state(model))


RUN_KILLS = {
    "before the first file": at_call("write_json", 1, after=False),
    "half a block": half_written,
    "a block without its progress": at_call("write_json", 2, after=False),
    "between two blocks": at_call("write_json", 2, after=True),
    "a manifest, and the progress still there": at_call("_finish", 1, after=True),
}


@pytest.mark.parametrize("where", list(RUN_KILLS))
def test_a_killed_run_resumes(where, tiny_llama: Factory, tokens, tmp_path, state, same) -> None:
    def run(out: str) -> Any:
        return compress(tiny_llama(), GPTQ(3, 32), tokens(), out=tmp_path / out, progress=False)

    whole = run("whole")
    killed(lambda: run("out"), RUN_KILLS[where])
    report = run("out")
    assert same(state(report.model), state(whole.model)) and same(state(load(tmp_path / "out")), state(whole.model))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_of_two_processes_on_one_folder_the_second_is_refused(tiny_llama: Factory, tmp_path, state, same) -> None:
    model = tiny_llama()
    compress(model, RTN(4, 32), progress=False)
    ready, tell = os.pipe()

    def wait(patch: pytest.MonkeyPatch) -> None:
        def stay(*_: Any, **__: Any) -> None:
            os.write(tell, b"x")
            signal.pause()

        patch.setattr(io, "_finish", stay)

    child = os.fork()
    if child == 0:
        signal.alarm(120)  # rather than to hang
        torch.set_num_threads(1)
        try:
            wait(pytest.MonkeyPatch())
            save(model, tmp_path / "a")
        finally:
            os._exit(7)
    os.read(ready, 1)
    for call in (
        lambda: save(model, tmp_path / "a"),
        lambda: compress(tiny_llama(), RTN(4, 32), out=tmp_path / "a", progress=False),
    ):
        with pytest.raises(CheckpointError, match=f"is being written by process {child} on "):
            call()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "a" / ".refimpl-lock").exists()  # nobody holds it now
    save(model, tmp_path / "a")
    assert same(state(load(tmp_path / "a")), state(model)) and not hidden_files(tmp_path / "a")


def test_all_blocks_done_but_not_finished_takes_no_other_run(tiny_llama: Factory, tmp_path, monkeypatch) -> None:
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
