"""Taps see what attention sees, change nothing that they only look at, and leave nothing behind; sinks are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from refimpl.core.cache import attention_modules, cache_argument, full_attention_layers, hidden_states, tapped
from refimpl.core.cache.sinks import keep_sinks
from refimpl.core.cache.tap import Recording
from tests.core.cache.policy_contract import batch

Models = Callable[[str], PreTrainedModel]
IDS = batch((0, 0), 12)["input_ids"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_hidden_states_are_what_the_projections_get(name: str, make: Models) -> None:
    model = make(name)
    modules: list[Any] = attention_modules(model)
    assert [module.layer_idx for module in modules] == list(range(model.config.num_hidden_layers))
    with hidden_states(modules[1:]) as seen:
        keys: list[Tensor] = []
        handle = modules[1].k_proj.register_forward_hook(lambda module, args, out: keys.append(out))
        for _ in range(2):
            model(IDS)
        handle.remove()
    assert [len(calls) for calls in seen] == [2] * (len(modules) - 1)
    assert torch.equal(modules[1].k_proj(seen[0][1]), keys[1])
    with pytest.raises(RuntimeError, match="stop"), hidden_states(modules) as seen:
        raise RuntimeError("stop")
    model(IDS)
    assert seen == [[] for _ in modules]  # an error too takes the hooks away


def test_keys_and_values_may_be_looked_at_or_changed(make: Models) -> None:
    model = make("gemma3")
    assert full_attention_layers(model) == [1, 2]
    shapes: dict[int, torch.Size] = {}

    def look(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        shapes[layer] = keys.shape
        return keys, values

    plain = model(IDS).logits
    assert torch.equal(model(IDS, **cache_argument(tapped(model, look))).logits, plain)
    assert shapes == dict.fromkeys((1, 2), (2, 2, 12, 16))
    scale = torch.tensor(0.5, requires_grad=True)
    changed = model(IDS, **cache_argument(tapped(model, lambda layer, keys, values: (keys, scale * values)))).logits
    assert not torch.allclose(changed, plain, atol=1e-3)
    changed.square().sum().backward()
    assert scale.grad is not None and scale.grad != 0


def test_a_recording_gives_all_that_attention_is_made_of(make: Models) -> None:
    model: Any = make("qwen3")
    cache = Recording().cache(model)
    outputs: list[Tensor] = []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, args, out: outputs.append(args[0]))
    with torch.no_grad():
        model(IDS, **cache_argument(cache))
    handle.remove()
    (shown,) = cache.layers[1].take()
    keys, values = (x.repeat_interleave(2, 1) for x in (shown.keys, shown.values))
    scores = (shown.query @ keys.mT * shown.scaling).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    assert torch.allclose((scores.softmax(-1) @ values).transpose(1, 2).flatten(2), outputs[0], atol=1e-6)
    assert cache.layers[1].take() == []


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6]])
@pytest.mark.parametrize("pads", [(0, 0, 0), (0, 4, 10)])
def test_sinks_are_the_first_real_tokens_of_each_row(pieces: list[int], pads: tuple[int, ...]) -> None:
    keys, values = torch.randn(2, 3, 2, 12, 4)
    real = torch.arange(12) >= torch.tensor(pads).unsqueeze(1)
    parts: dict[str, Tensor] = {}
    first = 0
    for size in pieces:
        part = slice(first, first + size)
        valid = real[:, part] if any(pads) else None
        parts |= keep_sinks(parts, 3, keys[:, :, part], values[:, :, part], valid, first)
        first = part.stop
    for row, pad in enumerate(pads):
        wanted = list(range(pad, min(pad + 3, 12)))
        empty = 3 - len(wanted)
        assert parts["sink_slots"][row, 0].tolist() == wanted + [-1] * empty
        for name, states in (("sink_keys", keys), ("sink_values", values)):
            assert torch.equal(parts[name][row, :, : len(wanted)], states[row, :, wanted])
            assert not parts[name][row, :, len(wanted) :].any()
