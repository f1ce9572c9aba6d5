"""The host of compressed caches: unnoticed where nothing is given up, and one result however it is fed."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from refimpl.baselines.kvcache import H2O, KIVI, Full, SnapKV, StreamingLLM, ThinK
from refimpl.core.cache import (
    ByContent,
    CompressedCache,
    Incoming,
    LayerShape,
    Policy,
    Rotary,
    Segment,
    WindowLayer,
    cache_argument,
    check_rank,
    prefill,
    rotate,
    unrotate,
)
from refimpl.core.cache import attention as attention_module
from refimpl.core.cache.attention import DeferredKV
from refimpl.core.cache.content import to_json
from refimpl.core.errors import CheckpointError, OptionError

LENGTH = 41
LOSSLESS = [Full(), KIVI(), StreamingLLM(), H2O(), SnapKV(window=8), ThinK(window=8)]
SMALL_KIVI = KIVI(bits=4, window=11, group=8, value_group=8)
LOSSY: list[Policy] = [
    SMALL_KIVI,
    StreamingLLM(sinks=3, window=14),
    H2O(capacity=19),
    SnapKV(capacity=17, window=6, kernel=3),
    ThinK(channels=0.5, window=7, group=4),
]
STREAMED = [policy for policy in LOSSY if "streamed" in policy.prefills]


@dataclass(frozen=True)
class Unrotated(Policy):
    """A policy of the tests: keys that leave the window are stored as they were before RoPE."""

    window: int = 5

    def layer(self, shape: LayerShape, streamed: bool) -> UnrotatedLayer:
        return UnrotatedLayer(shape, streamed, self.window, shape.rotation(self))

    def nbytes(self, shape: LayerShape, length: int) -> int:
        return length * shape.token_bytes


@dataclass(frozen=True)
class Pair(ByContent):
    """Factors of one layer, as a fitted policy holds them."""

    A: Tensor
    B: Tensor | None = None


@dataclass(frozen=True)
class Plain:
    basis: Tensor


@dataclass(frozen=True)
class Fitted(Policy):
    """A policy of the tests that holds tensors in every kind of container."""

    pairs: tuple[Pair, ...]
    ranks: tuple[tuple[int, ...], ...] = ((1, 2), (3,))
    table: dict[int, list[Plain]] | None = None
    base: Policy = KIVI(bits=4, window=11, group=8, value_group=8)
    share: float = 0.1

    def layer(self, shape: LayerShape, streamed: bool) -> Any:
        return self.base.layer(shape, streamed)

    def nbytes(self, shape: LayerShape, length: int) -> int:
        return self.base.nbytes(shape, length)


def fitted(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Fitted:
    draw = torch.Generator().manual_seed(seed)
    whole = torch.randn(8, 6, generator=draw).to(dtype)
    # a view, a transposed one, a scalar, an empty tensor and a shared one
    pairs = (Pair(whole[2:4], whole.t()), Pair(torch.tensor(3)), Pair(torch.ones(0, 2), whole), Pair(whole, whole))
    return Fitted(pairs, table={2: [Plain(torch.arange(3) > seed)]})


class Turned(Segment):
    def __init__(self, keys: Tensor, values: Tensor, index: range, rotation: tuple[Tensor, Tensor]) -> None:
        self.index, self.plain, self.rotation, self.values = index, keys, rotation, values

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        cos, sin = self.rotation
        return rotate(self.plain, cos.unsqueeze(1), sin.unsqueeze(1))


class UnrotatedLayer(WindowLayer):
    def __init__(self, shape: LayerShape, streamed: bool, window: int, rotary: Rotary) -> None:
        super().__init__(shape.heads, streamed, window, group=3)
        self.rotary = rotary

    def append(self, incoming: Incoming) -> None:
        if self.seen == 0:
            incoming.check(self.rotary)
        assert incoming.rotation is not None
        cos, sin = incoming.rotation  # as the attention module got them: left padding included
        self.extend(bare=unrotate(incoming.keys, cos.unsqueeze(1), sin.unsqueeze(1)))
        super().append(incoming)

    def store(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        count = keys.shape[2]
        self.extend(stored_keys=self.parts["bare"][:, :, :count], stored_values=values)
        self.parts["bare"] = self.parts["bare"][:, :, count:]

    def segments(self, incoming: Incoming) -> list[Segment]:
        if not self.start:
            return [self.tail]
        rotation = self.rotary(incoming.mask.positions(range(self.start)))  # positions, explicitly; nothing is stored
        stored = Turned(self.parts["stored_keys"], self.parts["stored_values"], range(self.start), rotation)
        return [stored, self.tail]


def gemma3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Gemma3TextConfig(
            **{
                "vocab_size": 256,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "sliding_window": 12,
                "max_position_embeddings": 256,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            }
            | changes
        )
        return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def make(request: pytest.FixtureRequest) -> Callable[[str], PreTrainedModel]:
    factories = {name: request.getfixturevalue(f"tiny_{name}") for name in ("llama", "qwen3")} | {"gemma3": gemma3}
    return lambda name: factories[name]()


def batch(pads: tuple[int, ...] = (6, 0), length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 256, (len(pads), length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad] = mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 9},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def answer(model: PreTrainedModel, way: str, cache: Any = None, new: int = 9) -> list[list[int]]:
    # a repeated prompt, so that looking up finds something
    inputs = {k: v[:1].repeat(1, 2) for k, v in batch((0,), 20).items()} if way == "lookup" else batch()
    torch.manual_seed(1)
    return model.generate(
        **inputs, **cache_argument(cache), max_new_tokens=new, eos_token_id=None, **{"do_sample": False} | WAYS[way]
    ).tolist()


def steps(model: PreTrainedModel, cache: Any, pieces: list[int], pads: tuple[int, ...] = (6, 0)) -> Tensor:
    """Logits of every token of a batch that is fed in pieces."""
    inputs = batch(pads, sum(pieces))
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits, first = [], 0
    with torch.no_grad():
        for size in pieces:
            last = first + size
            logits.append(
                model(
                    inputs["input_ids"][:, first:last],
                    attention_mask=inputs["attention_mask"][:, :last],
                    position_ids=positions[:, first:last],
                    **cache_argument(cache),
                ).logits
            )
            first = last
    return torch.cat(logits, 1)


def same_state(a: CompressedCache, b: CompressedCache, tolerance: float = 1e-4) -> bool:
    for one, other in zip(a.compressed_layers, b.compressed_layers, strict=True):
        assert one.state()[1] == other.state()[1]
        assert one.parts.keys() == other.parts.keys()
        for name, tensor in one.parts.items():
            far = (tensor.float() - other.parts[name].float()).abs() > tolerance
            # the last bit of an fp32 sum may tip a value between two codes, or between two fp16 scales
            if far.float().mean() > (0.01 if name.startswith(("key_", "value_")) else 0.0):
                return False
    return True


# -- nothing given up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_full_budget_gives_the_tokens_of_the_library(name: str, make: Callable[[str], PreTrainedModel]) -> None:
    stock = make(name)
    expected = {way: answer(stock, way) for way in WAYS}
    model = make(name)
    for policy in LOSSLESS:
        for way in WAYS:
            cache = policy.cache(model, budget=1.0, length=LENGTH + 9)
            assert answer(model, way, cache) == expected[way], (policy, way)
            assert cache.get_seq_length() == len(expected[way][0]) - 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_keys_can_be_kept_as_they_were_before_rotation(name: str, make: Callable[[str], PreTrainedModel]) -> None:
    stock, model = make(name), make(name)
    for way in WAYS:
        for mode in ("exact", "streamed"):
            cache = Unrotated().cache(model, prefill=mode)
            assert answer(model, way, cache) == answer(stock, way), (way, mode)
            assert "stored_keys" in cache.layers[1].parts


@pytest.mark.parametrize("policy", LOSSLESS, ids=lambda policy: type(policy).__name__)
def test_sixteen_bits(policy: Policy, make: Callable[[str], PreTrainedModel]) -> None:
    stock, model = make("llama").bfloat16(), make("llama").bfloat16()
    expected = steps(stock, DynamicCache(config=stock.config), [30, 1, 1, 1])
    found = steps(model, policy.cache(model, budget=1.0, length=64), [30, 1, 1, 1])
    if isinstance(policy, Full):
        assert torch.equal(found[:, :30], expected[:, :30])
    assert torch.allclose(found[1], expected[1], atol=0.02)
    assert torch.allclose(found[0, 6:], expected[0, 6:], atol=0.02)


def test_other_caches_see_the_attention_of_the_library(make: Callable[[str], PreTrainedModel]) -> None:
    stock, model = make("gemma3"), make("gemma3")
    model.set_attn_implementation("refimpl")
    for way in WAYS:
        assert answer(model, way) == answer(stock, way)
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, stock(**batch()).logits)


def test_softcapped_scores(make: Callable[[str], PreTrainedModel]) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=256,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        num_hidden_layers=2,
        sliding_window=12,
        attn_logit_softcapping=0.05,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    expected = steps(model, DynamicCache(config=model.config), [30, 1, 1])
    found = steps(model, Full().cache(model), [30, 1, 1])
    assert torch.allclose(found[1], expected[1], atol=1e-5)
    assert torch.allclose(found[0, 6:], expected[0, 6:], atol=1e-5)


def test_smollm2(smollm2_folder: Path) -> None:
    from refimpl.lab.models.language import smollm2, tokenizer

    stock, model = (smollm2(torch.float32, layers=2) for _ in range(2))
    tokens = tokenizer()
    tokens.padding_side = "left"
    texts = ["The river Severn rises in Wales and", "A cache"]
    inputs = tokens(texts, return_tensors="pt", padding=True)
    expected = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
    for policy in LOSSLESS:
        cache = policy.cache(model, budget=1.0, length=64)
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=6, do_sample=False, **cache_argument(cache)), expected
        )


# -- one result, however it is fed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", STREAMED, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("pads", [(0, 0), (6, 0)])
def test_streamed_tokens_may_come_in_any_pieces(
    policy: Policy, pads: tuple[int, int], make: Callable[[str], PreTrainedModel]
) -> None:
    model = make("llama")
    caches = [policy.cache(model, prefill="streamed") for _ in range(3)]
    whole = steps(model, caches[0], [50], pads)
    assert not torch.allclose(whole, steps(model, None, [50], pads), atol=1e-4)  # something is given up
    for cache, pieces in zip(caches[1:], ([1] * 50, [3, 17, 1, 20, 9]), strict=True):
        found = steps(model, cache, pieces, pads)
        for row, pad in enumerate(pads):
            assert torch.allclose(found[row, pad:], whole[row, pad:], atol=1e-5)
        if not any(pads):  # what stands for padding may be anything
            assert same_state(cache, caches[0])


@pytest.mark.parametrize("policy", LOSSY, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("pads", [(0, 0), (6, 0)])
def test_a_prompt_in_chunks_is_the_prompt_in_one_piece(
    policy: Policy, pads: tuple[int, int], make: Callable[[str], PreTrainedModel]
) -> None:
    model = make("qwen3")
    inputs = batch(pads, 40)
    whole, chunked = policy.cache(model), policy.cache(model)
    logits = [prefill(model, cache, chunk=chunk, **inputs) for cache, chunk in ((whole, 40), (chunked, 13))]
    assert torch.allclose(*logits, atol=1e-5)
    assert whole.get_seq_length() == 40
    direct = policy.cache(model)
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions, **cache_argument(direct))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        token = {"input_ids": torch.full((2, 1), 9), "attention_mask": mask, "position_ids": positions[:, -1:] + 1}
        if not any(pads):  # what stands for padding may be anything
            direct.finish()
            assert same_state(whole, chunked) and same_state(whole, direct)
        answers = [model(**token, **cache_argument(cache)).logits for cache in (whole, chunked, direct)]
    assert torch.allclose(answers[0], answers[1], atol=1e-5) and torch.allclose(answers[0], answers[2], atol=1e-5)


class Watched(TorchDispatchMode):
    """Bytes of the tensors that are made inside and alive at the same time: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if size and place not in self.alive:
                    self.alive.add(place)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, place, size)
        return out

    def gone(self, place: int, size: int) -> None:
        self.alive.remove(place)
        self.now -= size


@pytest.mark.parametrize(
    "policy", [StreamingLLM(window=14), KIVI(window=32, value_group=8)], ids=lambda policy: type(policy).__name__
)
def test_the_peak_of_a_prompt_in_chunks_is_bounded(policy: Policy, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")

    def peak(length: int, chunk: int, mode: str) -> tuple[int, int]:
        cache = policy.cache(model, prefill=mode)
        ids = batch((0,), length)["input_ids"]
        with Watched() as watched:
            prefill(model, cache, ids, chunk=chunk)
        return watched.peak, cache.nbytes

    (short, kept), (long, kept_long) = peak(128, 16, "streamed"), peak(512, 16, "streamed")
    layer = 384 * 2 * 2 * 16 * 4  # keys and values of the tokens between, in one layer, uncompressed
    masks = 16 * 384  # of a chunk, one byte for each pair
    # a cache of fixed size needs no more however long the prompt is; codes are read one layer at a time
    assert long - short <= (masks if kept_long == kept else kept_long - kept + 4 * layer)
    assert peak(512, 512, "streamed")[0] > 2 * long  # in one piece activations grow with the prompt
    if "exact" in policy.prefills:  # the prompt waits for its end as it came; then a layer is compressed at a time
        exact = peak(512, 16, "exact")[0] - peak(128, 16, "exact")[0]
        assert 2 * layer <= exact <= 5 * layer


@pytest.mark.parametrize("policy", STREAMED, ids=lambda policy: type(policy).__name__)
def test_prompt_lookup_finds_the_tokens_of_the_same_policy(
    policy: Policy, make: Callable[[str], PreTrainedModel]
) -> None:
    model = make("llama")
    inputs = {k: v.repeat(1, 2) for k, v in batch((0,), 20).items()}
    greedy = model.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        **cache_argument(policy.cache(model, prefill="streamed")),
    )
    cache = policy.cache(model, prefill="streamed")
    found = model.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        **cache_argument(cache),
        prompt_lookup_num_tokens=5,
    )
    assert torch.equal(found, greedy)


def test_scores_are_taken_in_turns(make: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    policy = H2O(capacity=19)
    expected, whole = (steps(model, c := policy.cache(model), [60, 1]), c)
    largest = 0
    weights = attention_module.weights

    def measured(*args: Any) -> Tensor:
        nonlocal largest
        found = weights(*args)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(attention_module, "SCORES", 2000)
    monkeypatch.setattr(attention_module, "weights", measured)
    cache = policy.cache(model)
    assert torch.allclose(steps(model, cache, [60, 1])[1], expected[1], atol=1e-5)
    assert same_state(cache, whole)
    assert 0 < largest <= 2000  # 2 rows, 4 heads, 60 x 60 would be 28,800


# -- the life of a cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Full(), *LOSSY], ids=lambda policy: type(policy).__name__)
def test_what_a_forward_pass_brought_can_be_taken_back(policy: Policy, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    for pieces, removed in (([30, 1, 12], 5), ([30, 1, 12], 12), ([30], 4), ([30, 1], 1)):
        cache, direct = policy.cache(model), policy.cache(model)
        logits = []
        for one, sizes in ((cache, pieces), (direct, [*pieces[:-1], pieces[-1] - removed])):
            if sizes[:-1]:
                steps(model, one, sizes[:-1], (0, 0))
            one.activate_past_recording()
            inputs = batch((0, 0), sum(pieces))["input_ids"]
            first = sum(sizes[:-1])
            if sizes[-1]:
                with torch.no_grad():
                    model(inputs[:, first : first + sizes[-1]], **cache_argument(one))
        cache.crop(-removed)
        assert cache.get_seq_length() == direct.get_seq_length() == sum(pieces) - removed
        with torch.no_grad():
            for one in (cache, direct):
                logits.append(model(torch.full((2, 1), 7), **cache_argument(one)).logits)
        assert torch.allclose(*logits, atol=1e-5)
        assert same_state(cache, direct)


def test_cropping_further_back(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    full = Full().cache(model)
    steps(model, full, [30, 1, 1, 1], (0, 0))
    full.crop(-20)
    assert full.get_seq_length() == 13 and full.layers[0].parts["keys"].shape[2] == 13
    kivi = SMALL_KIVI.cache(model)
    steps(model, kivi, [40, 1], (0, 0))  # slots 0 to 23 are in the store
    known = kivi.layers[0]._stored.keys[:, :, 16:21].clone()
    kivi.crop(-20)  # 21 stay: two groups and a part of the third, which goes back to the window
    layer = kivi.layers[0]
    assert (kivi.get_seq_length(), layer.start, layer.parts["key_codes"].shape[2]) == (21, 16, 2)
    assert torch.allclose(layer.parts["keys"], known)
    steps_after = model(torch.full((2, 9), 7), **cache_argument(kivi)).logits
    assert torch.isfinite(steps_after).all() and kivi.get_seq_length() == 30
    for policy, pieces in (
        (H2O(capacity=19), [30, 1]),
        (SnapKV(capacity=17, window=6), [30, 1]),
        (StreamingLLM(window=14), [30, 1]),
        (SnapKV(capacity=17, window=6), [30]),
    ):
        cache = policy.cache(model)
        steps(model, cache, pieces, (0, 0))
        with pytest.raises(OptionError, match=r"crop: .*cache\.copy\(\)"):
            cache.crop(-15)
    answer_only = SnapKV(capacity=17, window=6).cache(model)
    steps(model, answer_only, [30, 1, 1, 1], (0, 0))
    answer_only.crop(-3)  # tokens after the prompt are all kept
    assert answer_only.get_seq_length() == 30
    for wrong in (3, -40):
        with pytest.raises(OptionError, match=f"tokens_to_remove={wrong}"):
            full.crop(wrong)


@pytest.mark.parametrize("policy", [Full(), *LOSSY], ids=lambda policy: type(policy).__name__)
def test_rows_can_be_reordered_repeated_and_selected(policy: Policy, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("gemma3")
    cache = policy.cache(model)
    prefill(model, cache, **batch((6, 0)))

    def more(of: CompressedCache, rows: list[int]) -> Tensor:
        mask = torch.cat([batch((6, 0))["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)[rows]
        tokens = torch.tensor([[5], [9]])[rows]
        with torch.no_grad():
            return model(
                tokens, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, **cache_argument(of)
            ).logits

    expected = more(cache.copy(), [0, 1])
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ):
        changed = cache.copy()
        change(changed)
        assert torch.allclose(more(changed, rows), expected[rows], atol=1e-5)
    assert torch.equal(more(cache, [0, 1]), expected)  # copies leave the original alone


@pytest.mark.parametrize("policy", [SMALL_KIVI, ThinK(channels=0.5, window=7, group=4)])
def test_what_has_left_the_window_is_never_rewritten(policy: Policy, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    cache = policy.cache(model)
    prefill(model, cache, batch((0, 0))["input_ids"])
    layer = cache.layers[0]
    stored = [name for name in layer.parts if name not in ("keys", "values", "channels")]
    before = {name: layer.parts[name].clone() for name in stored}
    grown = False
    for token in range(20):
        with torch.no_grad():
            model(torch.full((2, 1), 3 + token), **cache_argument(cache))
        for name, old in before.items():
            assert torch.equal(layer.parts[name][:, :, : old.shape[2]], old)
            grown |= layer.parts[name].shape[2] > old.shape[2]
    assert grown


@pytest.mark.parametrize("policy", [Full(), *LOSSY], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("length", [9, 29, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_before_and_after(
    policy: Policy, length: int, dtype: torch.dtype, make: Callable[[str], PreTrainedModel]
) -> None:
    model = make("llama").to(dtype)
    cache = policy.cache(model)
    prefill(model, cache, batch((0,), length)["input_ids"])
    expected = sum(policy.nbytes(cache.layer_shape(model, index), length) for index in range(2))
    assert cache.nbytes == cache.compressed_nbytes == expected
    assert cache.bytes_per_token == expected / length
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in layer.parts.values())
    assert held <= expected + 2 * 64  # no view keeps more alive than is counted
    if isinstance(policy, Full):
        assert expected == 2 * length * 2 * 2 * 16 * dtype.itemsize


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.25])
def test_budgets_are_met(budget: float, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama").bfloat16()
    full = 2 * 200 * 2 * 2 * 16 * 2
    met = []
    for policy in (KIVI(window=8, group=16, value_group=16), StreamingLLM(), H2O(), SnapKV(), ThinK(window=8, group=8)):
        try:
            cache = policy.cache(model, budget=budget, length=200)
        except OptionError as error:
            assert "the least it can do" in str(error)
            continue
        assert cache.policy == policy.cache(model, bytes_per_token=budget * full / 200, length=200).policy
        prefill(model, cache, batch((0,), 200)["input_ids"])
        assert cache.nbytes <= budget * full
        assert cache.nbytes > (budget - 0.06) * full  # and used: the smallest step here is a group of 16 tokens
        met.append(type(policy).__name__)
    assert {"StreamingLLM", "H2O", "SnapKV"} <= set(met)
    assert ("ThinK" in met) == (budget > 0.55) and ("KIVI" in met) == (budget > 0.3)


def test_sliding_windows_are_left_to_the_library(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("gemma3")
    cache = H2O(capacity=19).cache(model)
    prefill(model, cache, batch((0,), 60)["input_ids"], chunk=17)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "H2OLayer", "H2OLayer"]
    assert cache.nbytes - cache.compressed_nbytes == 2 * 2 * 11 * 16 * 4


def test_several_turns(make: Callable[[str], PreTrainedModel]) -> None:
    stock, model = make("qwen3"), make("qwen3")
    for policy in LOSSLESS:
        caches = DynamicCache(config=stock.config), policy.cache(model, budget=1.0, length=200)
        tokens = [batch()["input_ids"]] * 2
        mask = batch()["attention_mask"]
        for turn in range(3):
            for index, (owner, cache) in enumerate(zip((stock, model), caches, strict=True)):
                tokens[index] = owner.generate(
                    tokens[index],
                    attention_mask=mask,
                    **cache_argument(cache),
                    max_new_tokens=5,
                    do_sample=False,
                    eos_token_id=None,
                )
            assert torch.equal(*tokens)
            question = batch((0, 0), 7, seed=turn)["input_ids"]
            tokens = [torch.cat([one, question], 1) for one in tokens]
            mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)


@pytest.mark.parametrize("policy", STREAMED, ids=lambda policy: type(policy).__name__)
def test_a_turn_goes_on_where_the_last_one_ended(policy: Policy, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    cache = policy.cache(model, prefill="streamed")
    tokens, mask = batch((6, 0), 30)["input_ids"], batch((6, 0), 30)["attention_mask"]
    for turn in range(3):
        answers = [
            model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                **cache_argument(used),
            )
            for used in (cache, policy.cache(model, prefill="streamed"))
        ]
        assert torch.equal(*answers)  # the conversation, and all of it anew
        tokens = torch.cat([answers[0], batch((0, 0), 9, seed=turn)["input_ids"]], 1)
        mask = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], 1)


@pytest.mark.parametrize("policy", [Full(), *LOSSY], ids=lambda policy: type(policy).__name__)
def test_one_document_many_questions(policy: Policy, tmp_path: Path, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("gemma3")
    document = batch((0,), 50)["input_ids"]
    prepared = policy.cache(model)
    prefill(model, prepared, document, chunk=20)
    prepared.save(tmp_path / "document.safetensors")
    twin = make("gemma3")  # the same weights
    loaded = CompressedCache.load(tmp_path / "document.safetensors", twin)
    assert loaded.policy == policy and loaded.nbytes == prepared.nbytes
    answers = []
    for seed in (1, 2):
        asked = torch.cat([document, batch((0,), 6, seed)["input_ids"]], 1)
        for owner, cache in ((model, prepared), (twin, loaded)):
            answers.append(owner.generate(asked, **cache_argument(cache.copy()), max_new_tokens=6, do_sample=False))
        assert torch.equal(answers[-1], answers[-2])
    assert loaded.nbytes == prepared.nbytes and loaded.get_seq_length() == 50


def test_files_of_others_are_refused(tmp_path: Path, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    cache = SMALL_KIVI.cache(model)
    prefill(model, cache, batch((0,))["input_ids"])
    path = tmp_path / "a.safetensors"
    cache.save(path)
    other = make("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.add_(0.1)
    for wrong in (other, make("qwen3"), make("llama").bfloat16()):
        with pytest.raises(CheckpointError, match="another model"):
            CompressedCache.load(path, wrong)
    with pytest.raises(CheckpointError, match="is not the one"):
        CompressedCache.load(path, model, KIVI(bits=2))
    assert CompressedCache.load(path, model, SMALL_KIVI).policy is SMALL_KIVI
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        CompressedCache.load(path, model)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="no cache written by refimpl"):
        CompressedCache.load(path, model)


def test_a_policy_with_tensors_can_be_kept(tmp_path: Path) -> None:
    policy, path = fitted(), tmp_path / "policy.safetensors"
    policy.save(path)
    loaded = Policy.load(path)
    assert loaded == policy and isinstance(loaded, Fitted) and loaded.config() == policy.config()
    assert isinstance(loaded.ranks, tuple) and isinstance(loaded.ranks[0], tuple)
    assert loaded.table is not None and loaded.table.keys() == {2} and isinstance(loaded.base, KIVI)
    assert loaded.pairs[0].A.dtype == torch.bfloat16 and loaded.pairs[1].A.shape == ()
    assert torch.equal(loaded.pairs[0].B, policy.pairs[0].B)  # type: ignore[arg-type]
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == 6  # what occurs three times is written once
    for plain in LOSSY:
        plain.save(path)
        assert type(plain).load(path) == plain
    with pytest.raises(CheckpointError, match="holds a ThinK, not a KIVI"):
        KIVI.load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Policy.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="no policy written by refimpl"):
        Policy.load(path)
    with pytest.raises(OptionError, match=r"share=.*: a Linear cannot be written to a file"):
        replace(policy, share=torch.nn.Linear(1, 1)).save(path)  # type: ignore[arg-type]
    assert "a" in load_file(path)  # the old file is as it was


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "KIVI", "module": "refimpl.baselines.kvcache.kivi", "config": {"beats": 4}}, "cannot be built again"),
        ({"kind": "Nothing", "module": "refimpl.baselines.kvcache.kivi", "config": {}}, "no dataclass Nothing"),
        ({"kind": "KIVI", "module": "refimpl.nowhere", "config": {}}, "no dataclass KIVI in refimpl.nowhere"),
        ({"kind": "Popen", "module": "subprocess", "config": {"args": "false"}}, "no dataclass Popen"),
        ({"kind": "X", "module": "antigravity", "config": {}}, "no dataclass X in antigravity"),
        ({"tensor": "sha256:0"}, "is not in the file"),
    ],
)
def test_what_a_file_tells_is_not_taken_on_trust(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_file({}, path, {"refimpl-policy": json.dumps({"format": 1} | tree)})
    with pytest.raises(CheckpointError, match=message):
        Policy.load(path)
    assert "antigravity" not in sys.modules  # only modules of refimpl are imported


def test_policies_with_tensors_compare_by_content() -> None:
    policy = fitted()
    assert policy == fitted() and hash(policy) == hash(fitted()) and policy != fitted(1)
    assert policy != replace(policy, share=0.2) and policy != SMALL_KIVI and SMALL_KIVI != "KIVI"
    assert policy != fitted(0, torch.float32)
    assert replace(policy, pairs=policy.pairs[:1]) != policy
    text = repr(policy)
    assert text.startswith("Fitted(pairs=(Pair(A=bfloat16[2, 6], B=bfloat16[6, 8]), Pair(A=int64[], B=None), ")
    assert "... 4 in all), ranks=((1, 2), (3,)), table={2: [Plain(basis=bool[3])]}, base=KIVI(bits=4, " in text
    assert "tensor(" not in text and len(text) < 350
    told = [to_json(Pair(torch.arange(6).view(*shape))) for shape in ((2, 3), (3, 2))]
    assert told[0] != told[1]  # the same numbers in another shape are another tensor


def test_a_cache_knows_the_tensors_of_its_policy(tmp_path: Path, make: Callable[[str], PreTrainedModel]) -> None:
    model, path = make("llama"), tmp_path / "a.safetensors"
    cache = fitted().cache(model)
    prefill(model, cache, batch((0,))["input_ids"])
    cache.save(path)
    assert path.stat().st_size < cache.nbytes + 20_000  # the cache's tensors only
    given = fitted()
    loaded = CompressedCache.load(path, model, given)
    assert loaded.policy is given and same_state(loaded, cache)
    with pytest.raises(CheckpointError, match="not the one this cache was made with: another pairs, table"):
        CompressedCache.load(path, model, fitted(1))
    with pytest.raises(CheckpointError, match="made with: a Fitted of "):
        CompressedCache.load(path, model, SMALL_KIVI)
    with pytest.raises(CheckpointError, match=r"the file alone does not bring back .*pass policy="):
        CompressedCache.load(path, model)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_cannot_work(implementation: str, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    cache = SMALL_KIVI.cache(model)
    steps(model, cache, [20])
    model.set_attn_implementation(implementation)
    with pytest.raises(OptionError, match=f"attn_implementation='{implementation}' .* only 'refimpl' can"):
        model(torch.ones(2, 1, dtype=torch.long), **cache_argument(cache))
    assert cache.get_seq_length() == 20  # nothing was lost
    model.set_attn_implementation("refimpl")
    model(torch.ones(2, 1, dtype=torch.long), **cache_argument(cache))
    deferred: Any = DeferredKV(cache.layers[0])
    for use in (lambda: deferred.shape, lambda: torch.ones(2) @ deferred, lambda: torch.cat([torch.ones(1), deferred])):
        with pytest.raises(OptionError, match="only 'refimpl' can attend"):
            use()


def test_a_cache_belongs_to_its_model(make: Callable[[str], PreTrainedModel]) -> None:
    model, other = make("llama"), make("llama")
    cache = Full().cache(model)
    ids = batch((0,))["input_ids"]
    with pytest.raises(OptionError, match="made for another model"):
        other(ids, **cache_argument(cache))  # never prepared
    Full().cache(other)
    with pytest.raises(OptionError, match="made for another model"):
        other(ids, **cache_argument(cache))  # prepared for its own caches
    model(ids, **cache_argument(cache))
    model.bfloat16()
    with pytest.raises(OptionError, match="holds torch.float32"):
        model(ids[:, :1], **cache_argument(cache))
    model.float()
    with pytest.raises(OptionError, match="holds 1 sequences, but 2 came"):
        model(ids[:, :1].repeat(2, 1), **cache_argument(cache))


def test_a_closed_cache_says_so(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    cache = Full().cache(model)
    model(batch((0,))["input_ids"], **cache_argument(cache))
    cache.close()
    for use in (
        lambda: cache.reorder_cache(torch.tensor([0])),
        cache.get_seq_length,
        lambda: cache.crop(-1),
        cache.copy,
        lambda: model(torch.ones(1, 1, dtype=torch.long), **cache_argument(cache)),
    ):
        with pytest.raises(OptionError, match="was closed"):
            use()


def test_wrong_options(make: Callable[[str], PreTrainedModel], tiny_gpt2: Callable[..., PreTrainedModel]) -> None:
    model = make("llama")
    for options, message in (
        ({"budget": 0.5}, "length=None"),
        ({"budget": 0.5, "length": 0}, "length=0"),
        ({"budget": 1.5, "length": 9}, r"budget=1\.5"),
        ({"budget": 0.5, "bytes_per_token": 9, "length": 9}, "give one of them"),
        ({"bytes_per_token": -1, "length": 9}, "bytes_per_token=-1"),
        ({"prefill": "streamed"}, "SnapKV can do 'exact'"),
        ({"budget": 0.05, "length": 100}, r"the least it can do is \d+ bytes \(3\d\.\d%\) \(capacity=33\)"),
    ):
        with pytest.raises(OptionError, match=message):
            SnapKV().cache(model, **options)
    with pytest.raises(OptionError, match=r"rank=17: the heads of layer 1 have 16 channels; use 1 to 16"):
        check_rank("rank", 17, CompressedCache.layer_shape(model, 1))
    with pytest.raises(OptionError, match="no rotary embedding"):
        StreamingLLM().cache(tiny_gpt2())
    with pytest.raises(OptionError, match="no layer with full attention"):
        Full().cache(gemma3(layer_types=["sliding_attention"] * 3))
    with pytest.raises(OptionError, match="chunk=0"):
        prefill(model, Full().cache(model), batch((0,))["input_ids"], chunk=0)
    cache = SMALL_KIVI.cache(model)
    short = torch.tensor([[0, 1, 1, 1, 1]])
    with pytest.raises(OptionError, match="attention_mask covers 5 tokens"):
        prefill(model, cache, **batch((1,)) | {"attention_mask": short})
    with pytest.raises(OptionError, match="attention_mask covers 5 tokens"):
        model(batch((1,))["input_ids"], attention_mask=short, **cache_argument(H2O().cache(model)))
    with pytest.raises(OptionError, match="two-dimensional mask"):
        model(
            torch.ones(1, 2, dtype=torch.long),
            **cache_argument(SMALL_KIVI.cache(model)),
            attention_mask=torch.zeros(1, 1, 2, 2),
        )


def test_models_without_rotation(tiny_gpt2: Callable[..., PreTrainedModel]) -> None:
    stock, model = tiny_gpt2(), tiny_gpt2()
    for policy in (Full(), KIVI(bits=16), H2O(), SnapKV(window=8), ThinK(channels=1.0, window=8)):
        assert answer(model, "greedy", policy.cache(model)) == answer(stock, "greedy")


def test_unusual_positions_are_refused(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    ids = batch((0,))["input_ids"]
    far = torch.arange(LENGTH).unsqueeze(0) + 40
    with pytest.raises(OptionError, match="pass position_ids"):
        model(ids, position_ids=far, **cache_argument(Unrotated().cache(model)))
    model(ids, position_ids=far, **cache_argument(SMALL_KIVI.cache(model)))  # keys as they come: any positions will do
    from refimpl.core.cache.rope import find_rotary

    model.model.rotary_emb.rope_type = "dynamic"  # frequencies that change with the length
    assert find_rotary(model, None) is None


@pytest.mark.parametrize("policy", [Full(), *LOSSY], ids=lambda policy: type(policy).__name__)
def test_devices(policy: Policy, make: Callable[[str], PreTrainedModel], fake_cuda: Callable[[], Any]) -> None:
    built: Any = make("llama")
    with fake_cuda() as place:
        model = place(built)
        cache = policy.cache(model)
        logits = prefill(model, cache, torch.ones(2, 40, dtype=torch.long, device="cuda"), chunk=16)
        for _ in range(3):
            logits = model(torch.ones(2, 1, dtype=torch.long, device="cuda"), **cache_argument(cache)).logits
        assert logits.device.type == "cuda"
        assert all(tensor.device.type == "cuda" for layer in cache.layers for tensor in layer.parts.values())


def test_a_deep_copy_is_a_cache_of_its_own(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    cache = SMALL_KIVI.cache(model)
    prefill(model, cache, batch((0,))["input_ids"])
    other = copy.deepcopy(cache)
    model(torch.ones(1, 1, dtype=torch.long), **cache_argument(other))
    assert (cache.get_seq_length(), other.get_seq_length()) == (LENGTH, LENGTH + 1)
