"""The host of compressed caches, beyond the contract that every policy passes (`test_every_policy`)."""

from __future__ import annotations

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
from transformers import DynamicCache, PreTrainedModel

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
from refimpl.core.cache.content import storable, to_json
from refimpl.core.errors import CheckpointError, OptionError
from tests.core.cache.policy_contract import LENGTH, WAYS, answer, batch, same_state, steps

SMALL_KIVI = KIVI(bits=4, window=11, group=8, value_group=8)
LOSSY: list[Policy] = [
    SMALL_KIVI,
    StreamingLLM(sinks=3, window=14),
    H2O(capacity=19),
    SnapKV(capacity=17, window=6, kernel=3),
    ThinK(channels=0.5, window=7, group=4),
]


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
class Unmarked:
    rank: int = 1


@storable
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
        incoming.check(self.rotary, self.seen)
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


# -- nothing given up --------------------------------------------------------------------------------------------------


def test_the_full_cache_in_sixteen_bits_is_the_librarys_bit_for_bit(make: Callable[[str], PreTrainedModel]) -> None:
    stock, model = make("llama").bfloat16(), make("llama").bfloat16()
    expected = steps(stock, DynamicCache(config=stock.config), [30, 1, 1, 1])
    found = steps(model, Full().cache(model), [30, 1, 1, 1])
    assert torch.equal(found[:, :30], expected[:, :30])
    for row, pad in enumerate((6, 0)):
        assert torch.allclose(found[row, pad:], expected[row, pad:], atol=0.02)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_keys_can_be_kept_as_they_were_before_rotation(name: str, make: Callable[[str], PreTrainedModel]) -> None:
    stock, model = make(name), make(name)
    for way in WAYS:
        for mode in ("exact", "streamed"):
            cache = Unrotated().cache(model, prefill=mode)
            assert answer(model, way, cache) == answer(stock, way), (way, mode)
            assert "stored_keys" in cache.layers[1].parts


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
    for policy in (Full(), *LOSSY):
        cache = policy.cache(model, budget=1.0, length=64)
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=6, do_sample=False, **cache_argument(cache)), expected
        )


# -- one result, however it is fed -------------------------------------------------------------------------------------


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
    open_prompt = SnapKV(capacity=17, window=6).cache(model)
    steps(model, open_prompt, [30], (0, 0))
    with pytest.raises(OptionError, match=r"crop: the prompt is still open .*cache\.copy\(\)"):
        open_prompt.crop(-15)
    answer_only = SnapKV(capacity=17, window=6).cache(model)
    steps(model, answer_only, [30, 1, 1, 1], (0, 0))
    answer_only.crop(-3)  # tokens after the prompt are all kept
    assert answer_only.get_seq_length() == 30
    with pytest.raises(OptionError, match="tokens_to_remove=3"):
        full.crop(3)


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
    assert CompressedCache.load(path, model).policy == SMALL_KIVI  # without tensors the file says it all
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
    for other in (torch.nn.Linear(1, 1), Unmarked()):  # what could not be read again is not written
        with pytest.raises(OptionError, match=rf"A=.*: an? {type(other).__name__} cannot be written to a file"):
            replace(policy, pairs=(Pair(other),)).save(path)  # type: ignore[arg-type]
    assert "a" in load_file(path)  # the old file is as it was


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "KIVI", "module": "refimpl.baselines.kvcache.kivi", "config": {"beats": 4}}, "cannot be built again"),
        ({"kind": "Nothing", "module": "refimpl.baselines.kvcache.kivi", "config": {}}, "no dataclass Nothing"),
        ({"kind": "KIVI", "module": "refimpl.nowhere", "config": {}}, "no dataclass KIVI in refimpl.nowhere"),
        ({"kind": "Popen", "module": "subprocess", "config": {"args": "false"}}, "no dataclass Popen"),
        ({"kind": "X", "module": "antigravity", "config": {}}, "no dataclass X in antigravity"),
        ({"kind": "Incoming", "module": "refimpl.core.cache.layer", "config": {}}, "Incoming .*not made for files"),
        ({"kind": "Report", "module": "refimpl.core.compress.steps", "config": {}}, "Report .*not made for files"),
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


def test_a_question_alone_is_told_what_is_missing(make: Callable[[str], PreTrainedModel]) -> None:
    for name in ("llama", "gemma3"):
        model = make(name)
        document, question = batch((0,), 30)["input_ids"], batch((0,), 6, seed=1)["input_ids"]
        cache = SMALL_KIVI.cache(model)
        prefill(model, cache, document)
        for way in ({}, {"attention_mask": torch.ones_like(question)}, {"prefill_chunk_size": 4}):
            with pytest.raises(OptionError, match=r"input_ids: none is left after the 30 tokens .*document, question"):
                model.generate(question, **cache_argument(cache), max_new_tokens=2, do_sample=False, **way)
        with pytest.raises(
            OptionError, match=r"attention_mask covers 6 tokens, .* have 36; pass the mask of the whole"
        ):
            model(question, attention_mask=torch.ones_like(question), **cache_argument(cache))
        assert cache.get_seq_length() == 30  # nothing was lost
        asked = torch.cat([document, question], 1)
        model.generate(asked, **cache_argument(cache), max_new_tokens=2, do_sample=False, eos_token_id=None)
        assert cache.get_seq_length() == 37


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


def test_wrong_options(make: Callable[[str], PreTrainedModel], tiny_gemma3: Callable[..., PreTrainedModel]) -> None:
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
    with pytest.raises(OptionError, match="no layer with full attention"):
        Full().cache(tiny_gemma3(layer_types=["sliding_attention"] * 3))
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
