"""Which architectures a compressed cache serves; the others are refused by name when it is made, and stay as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from refimpl import H2O, KIVI, SnapKV
from refimpl.baselines.kvcache import Full
from refimpl.core.cache import Policy, cache_argument
from refimpl.core.errors import OptionError
from tests.core.cache.policy_contract import batch, steps

GROUPED = {"num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

SERVED: dict[str, dict[str, Any]] = {
    "GPTNeoX": {},  # gives its cache to attention as `layer_past`
    "GPTBigCode": {"n_embd": 64, "n_head": 4, "n_layer": 2},  # and all query heads share one key head
    "Cohere": GROUPED,
    "Phi": {},
    "Glm": {"head_dim": 16} | GROUPED,
}
OWN = "does not attend through transformers' AttentionInterface"
STATE = "is served by a Linear.* of transformers"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Falcon": ({}, rf"layer 0 of FalconForCausalLM \(FalconAttention\) .*{OWN}"),
    "Bloom": ({"n_head": 4, "n_layer": 2}, rf"layer 0 of BloomForCausalLM \(BloomAttention\) .*{OWN}"),
    "Mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 2}, rf"layer 0 of MptForCausalLM \(MptAttention\) .*{OWN}"),
    "DeepseekV2": (
        {"q_lora_rank": None, "head_dim": 8} | LATENT,
        r"\(DeepseekV2Attention\).* tensors of 16 and 8 channels",
    ),
    "DeepseekV3": ({"q_lora_rank": 16} | LATENT, r"\(DeepseekV3Attention\).* tensors of 16 and 8 channels"),
    "DiffLlama": (
        {"head_dim": 16} | GROUPED,
        r"\(DiffLlamaAttention\).* works on the keys and values that a cache returns",
    ),
    "GptOss": (
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"layer_types": ["sliding_attention", "full_attention"]}
        | GROUPED,
        r"layer 1 of GptOssForCausalLM \(GptOssAttention\).* learned attention sinks",
    ),
    "Zamba2": (
        {
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        },
        rf"layer 0 of Zamba2ForCausalLM {STATE}",
    ),
    "GraniteMoeHybrid": (
        {"layer_types": ["attention", "mamba"], "num_local_experts": 0, "shared_intermediate_size": 64}
        | MAMBA
        | GROUPED,
        rf"layer 1 of GraniteMoeHybridForCausalLM {STATE}",
    ),
    "Qwen3Next": (
        {"num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | EXPERTS
        | GROUPED,
        rf"layer 0 of Qwen3NextForCausalLM {STATE}",
    ),
    "Mamba": ({"state_size": 8}, rf"layer 0 of MambaForCausalLM {STATE}"),
}


def build(name: str, more: dict[str, Any]) -> PreTrainedModel:
    shared: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**shared | more)).eval()


@pytest.mark.parametrize("name", SERVED)
def test_other_architectures_are_served(name: str) -> None:
    model = build(name, SERVED[name])
    expected, pieces = steps(model, None, [40]), [30, 1, 1, 8]
    whole: tuple[Policy, ...] = (Full(), H2O(), SnapKV(), KIVI(bits=16))
    for policy in whole:
        cache = policy.cache(model)
        found = steps(model, cache, pieces)
        assert torch.allclose(found[0, 6:], expected[0, 6:], atol=1e-5)
        assert torch.allclose(found[1], expected[1], atol=1e-5)
    cache = KIVI(bits=4, window=4, group=8, value_group=8).cache(model)
    assert not torch.allclose(steps(model, cache, pieces)[1], expected[1], atol=1e-5)
    heads, width = cache.layers[0].parts["keys"].shape[1::2]
    assert cache.layers[0].parts["value_codes"].shape[1:4] == (heads, 24, width // 8)
    answers = [
        model.generate(**batch(), **cache_argument(used), max_new_tokens=5, do_sample=False, eos_token_id=None)
        for used in (None, Full().cache(model))
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_be_served_are_refused_by_name(name: str) -> None:
    more, reason = REFUSED[name]
    model = build(name, more)
    ids, implementation = batch((0,), 12)["input_ids"], model.config._attn_implementation
    before = model(ids).logits
    for policy in (Full(), KIVI()):
        with pytest.raises(OptionError, match=f"model: .*{reason}.*use the library's own cache") as caught:
            policy.cache(model)
        assert "another model" not in str(caught.value) and "set_attn_implementation" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_is_asked_once_and_stays_as_it_was(tiny_llama: Any) -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    passes: list[nn.Module] = []
    handle = model.base_model.register_forward_hook(lambda module, args, out: passes.append(module))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for policy in (Full(), KIVI(value_group=8), H2O()):
        policy.cache(model)
    assert torch.equal(torch.rand(3), expected)
    assert len(passes) == 1 and model.training and all(parameter.grad is None for parameter in model.parameters())
    again = copy.deepcopy(model)  # knows it too
    passes.clear()
    Full().cache(again)
    assert passes == []
    handle.remove()


def test_a_pass_that_fails_names_the_layer(tiny_llama: Any) -> None:
    model = tiny_llama()

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("two\nlines")

    model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(
        OptionError, match=r"layer 1 of LlamaForCausalLM \(LlamaAttention\) .*ValueError: two lines; use"
    ):
        Full().cache(model)
