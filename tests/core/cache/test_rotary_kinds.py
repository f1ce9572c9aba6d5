"""Policies that turn keys themselves do it as each layer of the model does, or say before the first token that they cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from refimpl import CSKV, POLICIES, StreamingLLM
from refimpl.core.cache import LayerShape, Policy, Rotary, cache_argument, rotate
from refimpl.core.errors import OptionError
from tests.core.cache.policy_contract import TEXT

SINKS, WINDOW = 2, 8
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all channels": ("Llama", {}),
    "with norms": ("Qwen3", {"head_dim": 16}),
    "a factor on cos and sin": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "no channel": ("SmolLM3", {"no_rope_layers": [0]}),
    "neighbours": ("Helium", {"head_dim": 16}),
    "neighbours, layout of Cohere": ("Cohere", {}),
    "neighbours, complex": (
        "Llama4Text",
        {"head_dim": 16, "moe_layers": [], "no_rope_layers": [1], "layer_types": ["full_attention"]},
    ),
    "half of the channels": ("Phi", {}),
    "a quarter of the channels": ("StableLm", {}),
    "neighbours, half of the channels": ("Glm", {"head_dim": 16}),
    "a fused projection": ("GPTNeoX", {}),
}


@dataclass(frozen=True)
class WholeRank(CSKV):
    """CSKV that rebuilds keys and values although it could keep them: at full rank they are what they were."""

    def _keeps_all(self, shape: LayerShape) -> bool:
        return False


def build(kind: str, layers: int = 1) -> PreTrainedModel:
    name, more = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        **({} if name in ("GPTNeoX", "Phi") else {"num_key_value_heads": 2}),
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def streaming(model: PreTrainedModel, ids: Tensor, pieces: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of the last token, and those of the model on the tokens that are left."""
    policy = StreamingLLM(sinks=SINKS, window=WINDOW)
    expected = model(torch.cat([ids[:, :SINKS], ids[:, -WINDOW:]], 1)).logits[0, -1]
    return fed(model, policy, ids, pieces)[-1], expected


@torch.no_grad()
def rebuilding(model: PreTrainedModel, ids: Tensor, pieces: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of all tokens, and those of the model with its own cache."""
    policy = WholeRank(density=1.0, window=4, sinks=0).fit(model, TEXT[:4])
    return fed(model, policy, ids, pieces), model(ids).logits[0]


def fed(model: PreTrainedModel, policy: Policy, ids: Tensor, pieces: list[int]) -> Tensor:
    cache = policy.cache(model, prefill="streamed")
    found = torch.cat([model(piece, **cache_argument(cache)).logits[0] for piece in ids.split(pieces, 1)])
    assert all(type(layer).__name__ in ("StreamingLayer", "CSKVLayer") for layer in cache.layers)
    return found


Oracle = Callable[[PreTrainedModel, Tensor, list[int]], tuple[Tensor, Tensor]]
TURNING: dict[str, Oracle] = {"StreamingLLM": streaming, "CSKV": rebuilding}


@pytest.mark.parametrize("pieces", [[40], [1] * 40], ids=["at once", "one by one"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", TURNING)
def test_keys_are_turned_as_the_layer_turns_them(policy: str, kind: str, pieces: list[int]) -> None:
    model = build(kind)
    ids = torch.randint(3, 256, (1, 40), generator=torch.Generator().manual_seed(3))
    if policy == "CSKV" and kind == "a fused projection":
        with pytest.raises(OptionError, match="k_proj and v_proj, but GPTNeoXAttention has none"):
            TURNING[policy](model, ids, pieces)
        return
    if policy == "CSKV" and kind == "neighbours, complex":
        with pytest.raises(OptionError, match="keys of Llama4TextAttention are not what its projection gives"):
            TURNING[policy](model, ids, pieces)
        return
    found, expected = TURNING[policy](model, ids, pieces)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_layers_of_one_model_may_differ() -> None:
    name, more = KINDS["no channel"]
    KINDS["mixed"] = name, more | {"no_rope_layers": [1, 0]}
    try:
        model = build("mixed", layers=2)
    finally:
        del KINDS["mixed"]
    cache = StreamingLLM(sinks=SINKS, window=WINDOW).cache(model)
    assert [len(layer.rotary.frequencies) for layer in cache.layers] == [8, 0]


def test_every_policy_that_turns_keys_is_tested() -> None:
    model = build("all channels")
    model.model.rotary_emb.rope_type = "dynamic"  # frequencies that move with the length
    refusing = set()
    for name, kind in POLICIES.items():
        policy = kind().fit(model, TEXT[:4])
        try:
            policy.cache(model)
        except OptionError as error:
            refusing.add(name)
            assert f"{name} turns keys by their positions, but layer 0 of LlamaForCausalLM (LlamaAttention)" in str(
                error
            )
            assert "KIVI or SnapKV" in str(error)
    assert refusing == set(TURNING)


@pytest.mark.parametrize("policy", TURNING)
def test_a_layer_that_turns_keys_in_its_own_way_is_refused(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model = build("all channels")
    fitted = POLICIES[policy]().fit(model, TEXT[:4])
    rotated = modeling_llama.apply_rotary_pos_emb
    turn = lambda x, k, cos, sin: rotated(x, k, cos, sin * 1.5)  # noqa: E731
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn)
    with pytest.raises(
        OptionError, match=rf"{policy} turns keys .* layer 0 of LlamaForCausalLM .* such as KIVI or SnapKV"
    ):
        fitted.cache(model)
    POLICIES["KIVI"](value_group=8).cache(model)  # takes keys as they come


@pytest.mark.parametrize("policy", TURNING)
def test_positions_of_later_pieces_are_checked(policy: str) -> None:
    model = build("all channels")
    cache = POLICIES[policy]().fit(model, TEXT[:4]).cache(model)
    ids = TEXT[:1, :10]
    model(ids, **cache_argument(cache))
    with pytest.raises(OptionError, match="position_ids: .* pass position_ids as generate makes them"):
        model(ids, position_ids=torch.arange(10).unsqueeze(0), **cache_argument(cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [0, 8, 16])
@pytest.mark.parametrize("alternate", [False, True])
def test_a_pairing_is_seen_through_large_channels_and_rounding(
    alternate: bool, turned: int, dtype: torch.dtype
) -> None:
    found = Rotary(1e6 ** -(torch.arange(turned / 2) / 8), 1.2, alternate)
    cos, sin = (x.unsqueeze(1) for x in found(torch.arange(4).unsqueeze(0)))
    key = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    key[..., 15] += 200.0  # as the biases of Qwen2
    shown = found.turn(key.expand(-1, -1, 4, -1), cos, sin).to(dtype)
    known = Rotary(found.frequencies if turned else 1e4 ** -(torch.arange(8) / 8), 1.2)
    seen = known.seen_in(shown)
    assert seen is not None
    assert (len(seen.frequencies) * 2, seen.alternate) == (turned, alternate and turned > 0)
    if turned == 16 and not alternate:
        assert torch.equal(
            found.turn(key, cos[..., :1, :], sin[..., :1, :]), rotate(key, cos[..., :1, :], sin[..., :1, :])
        )
