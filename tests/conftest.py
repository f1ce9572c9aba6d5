"""What several test files share: the fetched model, and tiny random models of the four layouts methods must handle."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: kernels run on CPU tensors in the tests

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Factory = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws without a seed of its own gets the same numbers whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The converted SmolLM2 folder; the first test run on a machine downloads it."""
    from refimpl.lab.models.language import smollm2_path

    return smollm2_path()


def _factory(model_class: Any, config_class: Any, **defaults: Any) -> Factory:
    def make(seed: int = 0, **changes: Any) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_class(config_class(**{**defaults, **changes})).eval()

    return make


_SHARED = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="session")
def tiny_llama() -> Factory:
    """Call it for a fresh random Llama: grouped queries, untied embeddings; keywords change its configuration."""
    return _factory(
        LlamaForCausalLM,
        LlamaConfig,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        **_SHARED,
        **_SPECIAL,
    )


@pytest.fixture(scope="session")
def tiny_gpt2() -> Factory:
    """Call it for a fresh random GPT-2: Conv1D layers (weights stored input first), biases, tied embeddings."""
    return _factory(
        GPT2LMHeadModel, GPT2Config, vocab_size=256, n_embd=64, n_head=4, n_layer=2, n_positions=256, **_SPECIAL
    )


@pytest.fixture(scope="session")
def tiny_mixtral() -> Factory:
    """Call it for a fresh random Mixtral: experts fused into three-dimensional parameters."""
    return _factory(
        MixtralForCausalLM,
        MixtralConfig,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        **_SHARED,
        **_SPECIAL,
    )


@pytest.fixture(scope="session")
def tiny_qwen3() -> Factory:
    """Call it for a fresh random Qwen3: norms on queries and keys, tied embeddings, heads wider than width / heads."""
    return _factory(
        Qwen3ForCausalLM,
        Qwen3Config,
        intermediate_size=96,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        **_SHARED,
        **_SPECIAL,
    )


@pytest.fixture(scope="session")
def tiny_qwen2() -> Factory:
    """Call it for a fresh random Qwen2: biases on queries, keys and values."""
    return _factory(
        Qwen2ForCausalLM,
        Qwen2Config,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        **_SHARED,
        **_SPECIAL,
    )


@pytest.fixture(scope="session")
def tiny_gemma3() -> Factory:
    """Call it for a fresh random Gemma 3: a sliding window below two layers with full attention, two rotations."""
    return _factory(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        intermediate_size=96,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        **_SHARED,
        **_SPECIAL,
    )
