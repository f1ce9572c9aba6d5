"""Each rule against the same rule written out slowly, on random queries, keys and values of one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refimpl.baselines.kvcache import H2O, KIVI, SnapKV, StreamingLLM, ThinK
from refimpl.baselines.kvcache.kivi import quantise
from refimpl.core.cache import KVLayer, LayerShape, Mask, Policy, Rotary, rotate
from refimpl.core.errors import OptionError

B, H, G, D, T = 2, 2, 3, 16, 40
SCALE = D**-0.5
ROTARY = Rotary(1.0 / 100 ** (torch.arange(0, D, 2) / D), 1.0)
SHAPE = LayerShape(0, nn.Identity(), H, G, D, torch.float32, ROTARY)


def states(pads: tuple[int, ...] = (0, 0), seed: int = 0) -> dict[str, Any]:
    """Queries [B, H * G, T, D], keys and values [B, H, T, D] before rotation, and which slots are real."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, heads, T, D, generator=generator) * 1.5 for heads in (H * G, H, H))
    k[..., 3] += 6  # a channel that is large in every token, as real keys have
    real = torch.arange(T) >= torch.tensor(pads).unsqueeze(1)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    rotation = ROTARY(positions)
    cos, sin = (t.unsqueeze(1) for t in rotation)
    return {
        "bare_q": q,
        "bare_k": k,
        "q": rotate(q, cos, sin),
        "k": rotate(k, cos, sin),
        "v": v,
        "real": real,
        "positions": positions,
        "rotation": rotation,
    }


def feed(layer: KVLayer, s: dict[str, Any], pieces: list[int]) -> Tensor:
    """Outputs [B, H * G, T, D] of the layer, fed in pieces."""
    outputs, first = [], 0
    module = nn.Identity()
    module.num_key_value_groups = G  # type: ignore[assignment]
    for size in pieces:
        part = slice(first, first + size)
        padding = None if s["real"].all() else s["real"][:, : part.stop]
        mask = Mask.causal(range(part.start, part.stop), B, padding, torch.device("cpu"))
        layer.expect(module, torch.zeros(B, size, 1), tuple(t[:, part] for t in s["rotation"]))  # type: ignore[arg-type]
        layer.update(s["k"][:, :, part], s["v"][:, :, part])
        outputs.append(layer.attend(module, s["q"][:, :, part], mask, SCALE, None))
        first = part.stop
    return torch.cat(outputs, 2)


def softmax(scores: list[float]) -> list[float]:
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()


def close(a: Tensor, b: Tensor, real: Tensor | None = None) -> bool:
    if real is not None:
        a, b = (t[real[:, None].expand(-1, H * G, -1)] for t in (a, b))
    return torch.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
@pytest.mark.parametrize("pieces", [[T], [1] * T, [7, 1, 20, 12]])
def test_streaming_counts_positions_in_the_cache(pads: tuple[int, int], pieces: list[int]) -> None:
    s = states(pads)
    policy = StreamingLLM(sinks=3, window=6)
    found = feed(policy.layer(SHAPE, True), s, pieces)
    expected = torch.zeros_like(found)
    for row in range(B):
        real = [t for t in range(T) if s["real"][row, t]]
        for rank, t in enumerate(real):
            cached = [*real[:3], *real[max(3, rank - 5) : rank + 1]] if rank >= 3 else real[: rank + 1]
            places = torch.arange(len(cached)).unsqueeze(0)  # positions are places in the cache
            cos, sin = (x[0] for x in ROTARY(places))
            for head in range(H * G):
                keys = rotate(s["bare_k"][row, head // G, cached], cos, sin)
                query = rotate(s["bare_q"][row, head, t], cos[-1], sin[-1])
                share = (keys @ query * SCALE).softmax(0)
                expected[row, head, t] = share @ s["v"][row, head // G, cached]
    assert close(found, expected, s["real"])


@pytest.mark.parametrize("prompt", [0, 25])
def test_h2o_lets_the_least_regarded_go(prompt: int) -> None:
    s = states()
    policy = H2O(capacity=10, recent=0.4)
    layer = policy.layer(SHAPE, streamed=prompt == 0)
    found = feed(layer, s, [T] if prompt == 0 else [prompt] + [1] * (T - prompt))
    expected = torch.zeros_like(found)
    for row in range(B):
        for head in range(H):
            kept: list[int] = []
            mass: dict[int, float] = {}
            for t in range(T):
                kept.append(t)
                mass[t] = 0.0
                for g in range(G):
                    query = s["q"][row, head * G + g, t]
                    share = softmax([float(s["k"][row, head, j] @ query) * SCALE for j in kept])
                    for j, w in zip(kept, share, strict=True):
                        mass[j] += w
                        expected[row, head * G + g, t] += w * s["v"][row, head, j]
                if t >= prompt - 1:  # a prompt is cut when it ends
                    while len(kept) > 10:
                        kept.remove(min(kept[:-4], key=lambda j: mass[j]))
            assert layer.parts["slots"][row, head].tolist() == kept
            assert torch.allclose(layer.parts["mass"][row, head], torch.tensor([mass[j] for j in kept]), atol=1e-4)
    assert close(found, expected)


@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
def test_snapkv_keeps_what_the_end_of_the_prompt_looks_at(pads: tuple[int, int]) -> None:
    s = states(pads)
    prompt, window, capacity, kernel = 33, 4, 12, 3
    layer = SnapKV(capacity, window, kernel).layer(SHAPE, False)
    found = feed(layer, s, [20, 13] + [1] * (T - prompt))
    expected = torch.zeros_like(found)
    for row in range(B):
        for head in range(H):
            votes = [0.0] * prompt
            for t in range(prompt - window, prompt):
                seen = [j for j in range(t + 1) if s["real"][row, j]]
                for g in range(G):
                    query = s["q"][row, head * G + g, t]
                    share = softmax([float(s["k"][row, head, j] @ query) * SCALE for j in seen])
                    for j, w in zip(seen, share, strict=True):
                        votes[j] += w
            older = prompt - window
            votes = votes[:older]  # the window is no candidate, and no neighbour
            pooled = {j: sum(votes[max(0, j - 1) : j + 2]) / kernel for j in range(older) if s["real"][row, j]}
            best = sorted(sorted(pooled, key=lambda j: -pooled[j])[: capacity - window])
            assert layer.parts["kept_slots"][row, head].tolist() == best
            for t in range(T):
                seen = [j for j in range(t + 1) if s["real"][row, j]]
                seen = seen if t < prompt else [*best, *range(older, t + 1)]
                for g in range(G):
                    if seen:
                        share = (s["k"][row, head, seen] @ s["q"][row, head * G + g, t] * SCALE).softmax(0)
                        expected[row, head * G + g, t] = share @ s["v"][row, head, seen]
    assert close(found, expected, s["real"])


@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
def test_think_drops_the_channels_that_queries_use_least(pads: tuple[int, int]) -> None:
    s = states(pads)
    prompt, window, group = 30, 5, 3
    policy = ThinK(channels=0.4, window=window, group=group)
    layer = policy.layer(SHAPE, False)
    found = feed(layer, s, [18, 12] + [1] * (T - prompt))
    kept = policy.kept(D)
    assert kept == 6
    for row in range(B):
        real = [j for j in range(prompt) if s["real"][row, j]]
        for head in range(H):
            norms = []
            for i in range(D):  # the norm of what channel i adds to the scores
                queries = s["q"][row, head * G : head * G + G, prompt - window : prompt, i].flatten()
                norms.append(torch.outer(queries, s["k"][row, head, real, i]).norm().item())
            channels = sorted(sorted(range(D), key=lambda i: -norms[i])[:kept])
            assert layer.parts["channels"][row, head].tolist() == channels
            for t in range(prompt, T):
                stored = (t - window) // group * group  # as many have left when token t is attended to
                narrow = torch.zeros(t + 1, D)
                narrow[:, channels] = s["k"][row, head, : t + 1, channels]
                keys = torch.cat([narrow[:stored], s["k"][row, head, stored : t + 1]])
                seen = [j for j in range(t + 1) if s["real"][row, j]]
                for g in range(G):
                    share = (keys[seen] @ s["q"][row, head * G + g, t] * SCALE).softmax(0)
                    expected = share @ s["v"][row, head, seen]
                    assert torch.allclose(found[row, head * G + g, t], expected, atol=2e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
def test_kivi_quantises_keys_by_channel_and_values_by_token(bits: int, pads: tuple[int, int]) -> None:
    s = states(pads)
    window, group = 6, 8
    layer = KIVI(bits, window, group, value_group=8).layer(SHAPE, True)
    feed(layer, s, [17, 1, 22])
    stored = (T - window) // group * group
    assert layer.start == stored == 32
    segment = layer._stored
    levels = 2**bits - 1

    def rounded(x: Tensor, setting: Tensor) -> Tensor:
        low = setting.min().half().float()
        step = ((setting.max() - low) / levels).half().float()
        return ((x - low) / step).round().clamp(0, levels) * step + low

    for row in range(B):
        for head in range(H):
            for first in range(0, stored, group):
                real = [j for j in range(first, first + group) if s["real"][row, j]]
                for i in range(D):
                    column = s["k"][row, head, first : first + group, i]
                    expected = rounded(column, s["k"][row, head, real, i])
                    assert torch.allclose(segment.keys[row, head, real, i], expected[[j - first for j in real]])
            for j in range(pads[row], stored):
                for first in range(0, D, 8):
                    block = s["v"][row, head, j, first : first + 8]
                    assert torch.allclose(segment.values[row, head, j, first : first + 8], rounded(block, block))
    codes = layer.parts["key_codes"].nbytes + layer.parts["value_codes"].nbytes
    assert codes == 2 * B * H * stored * D * bits // 8  # real packed bits


def test_kivi_in_a_prompt_and_in_a_stream() -> None:
    s = states()
    policy = KIVI(4, 6, 8, 8)
    prompt, stream = policy.layer(SHAPE, False), policy.layer(SHAPE, True)
    exact, felt = feed(prompt, s, [T]), feed(stream, s, [T])
    prompt.finish()
    full = torch.nn.functional.scaled_dot_product_attention(
        s["q"], s["k"].repeat_interleave(G, 1), s["v"].repeat_interleave(G, 1), is_causal=True
    )
    assert close(exact, full)  # a prompt does not feel its compression, a stream does once a group has left
    assert close(felt[:, :, :14], full[:, :, :14]) and not close(felt[:, :, 14:], full[:, :, 14:])
    assert all(torch.equal(prompt.parts[name], stream.parts[name]) for name in stream.parts)


def test_codes_stay_within_half_a_step() -> None:
    x = torch.tensor([[5.0, 5.3, 6.0], [-2.0, -2.0, -2.0], [0.0, 1e-9, 0.0], [-7.0, 0.0, 900.0]])
    for bits in (2, 4, 8):
        codes, step, least = quantise(x, bits)
        error = (codes * step.float() + least.float() - x).abs()
        assert (error <= step.float() * 0.5 + x.abs().amax(-1, keepdim=True) * 2**-10 + 1e-8).all()
        assert torch.equal(codes[1] * step[1].float() + least[1].float(), x[1])  # a constant is exact
    codes, step, least = quantise(x, 4, torch.tensor([True, True, False]))
    assert (codes * step + least)[3, 1] == 0.0 and float(step[3]) < 0.5  # what is not valid sets no range


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KIVI, {"bits": 3}, "bits=3: use 2, 4, 8"),
        (KIVI, {"window": -1}, "window=-1"),
        (KIVI, {"group": 12}, "group=12: use a multiple of 8"),
        (StreamingLLM, {"sinks": -1}, "sinks=-1"),
        (StreamingLLM, {"window": 0}, "window=0"),
        (H2O, {"capacity": 1}, "capacity=1"),
        (H2O, {"recent": 1.0}, r"recent=1\.0"),
        (SnapKV, {"capacity": 32}, "capacity=32: use more than the window=32"),
        (SnapKV, {"kernel": 4}, "kernel=4: use an odd number"),
        (SnapKV, {"window": 0}, "window=0"),
        (ThinK, {"channels": 0.0}, r"channels=0\.0"),
        (ThinK, {"group": 0}, "group=0"),
    ],
)
def test_options(kind: type[Policy], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**options)


def test_shapes_that_do_not_fit() -> None:
    odd = LayerShape(3, nn.Identity(), H, G, 20, torch.float32, None)
    with pytest.raises(OptionError, match="layer 3 have 20 channels"):
        KIVI().layer(odd, False)
    with pytest.raises(OptionError, match="StreamingLLM turns keys"):
        StreamingLLM().layer(odd, True)
    with pytest.raises(OptionError, match="320 channels a head"):
        ThinK().layer(LayerShape(3, nn.Identity(), H, G, 320, torch.float32, None), False)


def test_no_sinks_is_a_sliding_window() -> None:
    s = states()
    layer = StreamingLLM(sinks=0, window=6).layer(SHAPE, True)
    found = feed(layer, s, [13, 27])
    near = torch.arange(T).unsqueeze(1) - torch.arange(T)
    mask = (near >= 0) & (near < 6)
    expected = torch.nn.functional.scaled_dot_product_attention(
        s["q"], s["k"].repeat_interleave(G, 1), s["v"].repeat_interleave(G, 1), attn_mask=mask
    )
    assert close(found, expected)
    assert layer.parts["keys"].shape[2] == 6
