"""The contract of cache policies: what a reader may rely on, whichever policy makes the cache.

A subclass of `PolicyContract` gives the cases; `test_every_policy.py` runs all policies of the book. For a policy of your
own, subclass it with a `case` fixture of yours. A policy that cannot do something refuses by name, and says what to do
instead: a case declares what its policy refuses, and the contract tests that it does, and that it refuses nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from refimpl.core.cache import CompressedCache, Policy, cache_argument, prefill
from refimpl.core.errors import CheckpointError, OptionError

ARCHITECTURES = ("llama", "qwen3", "qwen2", "gemma3", "mixtral", "gpt2")
TEXT = torch.randint(3, 256, (6, 64), generator=torch.Generator().manual_seed(9))  # for policies that learn
LENGTH = 41

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 9},
    "lookup": {"prompt_lookup_num_tokens": 3},
}

Models = Callable[[str], PreTrainedModel]


@dataclass(frozen=True)
class Case:
    """A policy in a setting that gives something up on models as small as the tests'.

    Attributes:
        build: makes the policy for a model, `Policy.fit` included.
        lossy: the setting gives something up.
        refuses: architectures it cannot work on, and how the error names the reason.
        crops: tokens before the last forward pass can be taken back too.
        least: share of the full cache below which it refuses a budget.
        tolerance: of logits where the order of sums may differ; larger where a sum can tip a number into another code.
        group: slots that are stored together: padding by a multiple of it leaves the groups of a row as they are.
    """

    build: Callable[[PreTrainedModel], Policy]
    lossy: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    crops: bool = True
    least: float = 0.0
    tolerance: float = 1e-4
    group: int = 1


# -- feeding models ----------------------------------------------------------------------------------------------------


def batch(pads: tuple[int, ...] = (6, 0), length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts, row by row with so many padding tokens on the left."""
    ids = torch.randint(3, 256, (len(pads), length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad] = mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: PreTrainedModel, way: str, cache: Any = None, new: int = 9) -> list[list[int]]:
    """Tokens of ``generate`` in one of `WAYS`."""
    # a repeated prompt, so that looking up finds something
    inputs = {k: v[:1].repeat(1, 2) for k, v in batch((0,), 20).items()} if way == "lookup" else batch()
    torch.manual_seed(1)
    return model.generate(
        **inputs, **cache_argument(cache), max_new_tokens=new, eos_token_id=None, **{"do_sample": False} | WAYS[way]
    ).tolist()


@torch.no_grad()
def steps(model: PreTrainedModel, cache: Any, pieces: list[int], pads: tuple[int, ...] = (6, 0)) -> Tensor:
    """Logits of every token of a batch that is fed in pieces."""
    inputs = batch(pads, sum(pieces))
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits, first = [], 0
    for size in pieces:
        last = first + size
        out = model(
            inputs["input_ids"][:, first:last],
            attention_mask=inputs["attention_mask"][:, :last],
            position_ids=positions[:, first:last],
            **cache_argument(cache),
        )
        logits.append(out.logits)
        first = last
    return torch.cat(logits, 1)


@torch.no_grad()
def one_more(model: PreTrainedModel, cache: Any, mask: Tensor, rows: list[int]) -> Tensor:
    """Logits of a token that follows a prompt; ``rows`` of the batch of ``mask``."""
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)[rows]
    return model(
        torch.tensor([[5], [9]])[rows],
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        **cache_argument(cache),
    ).logits


def same_state(a: CompressedCache, b: CompressedCache, tolerance: float = 1e-4) -> bool:
    """Whether two caches hold the same, up to the last bits of sums."""
    for one, other in zip(a.compressed_layers, b.compressed_layers, strict=True):
        assert one.state()[1] == other.state()[1]
        assert one.parts.keys() == other.parts.keys()
        for name, tensor in one.parts.items():
            if tensor.shape != other.parts[name].shape:
                return False
            far = (tensor.float() - other.parts[name].float()).abs() > tolerance
            # the last bit of an fp32 sum may tip a value between two codes, or between two fp16 scales
            if far.float().mean() > (0.01 if name.startswith(("key_", "value_")) else 0.0):
                return False
    return True


# -- the contract ------------------------------------------------------------------------------------------------------


class PolicyContract:
    """Tests of one `Case`, which a subclass gives as the fixture ``case``; ``make`` makes models by architecture."""

    @pytest.fixture
    def llama(self, make: Models) -> PreTrainedModel:
        return make("llama")

    # -- nothing given up --

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_a_full_budget_gives_the_tokens_of_the_library(self, case: Case, name: str, make: Models) -> None:
        stock, model = make(name), make(name)
        if name in case.refuses:
            with pytest.raises(OptionError, match=case.refuses[name]):
                case.build(model).cache(model)
            return
        policy = case.build(model)
        for way in WAYS:
            if name == "gpt2" and way == "chunks":
                continue  # the library's own GPT-2 cannot
            expected = answer(stock, way)
            cache = policy.cache(model, budget=1.0, length=LENGTH + 9)
            assert answer(model, way, cache) == expected, way
            assert cache.get_seq_length() == len(expected[0]) - 1

    def test_a_full_budget_stays_full_beyond_its_length(self, case: Case, make: Models) -> None:
        model = make("qwen3")
        cache = case.build(model).cache(model, budget=1.0, length=20)
        assert torch.allclose(steps(model, cache, [40, 1, 9])[1], steps(model, None, [50])[1], atol=1e-4)

    def test_several_turns(self, case: Case, make: Models) -> None:
        stock, model = make("qwen3"), make("qwen3")
        caches = DynamicCache(config=stock.config), case.build(model).cache(model, budget=1.0, length=200)
        tokens, mask = [batch()["input_ids"]] * 2, batch()["attention_mask"]
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

    # -- one result, however it is fed --

    @pytest.mark.parametrize("name", ["llama", "gemma3"])
    @pytest.mark.parametrize("pads", [(0, 0), (6, 0)])
    def test_streamed_tokens_may_come_in_any_pieces(
        self, case: Case, name: str, pads: tuple[int, int], make: Models
    ) -> None:
        model = make(name)
        policy = case.build(model)
        if "streamed" not in policy.prefills:
            with pytest.raises(OptionError, match=f"prefill='streamed': {type(policy).__name__} can do 'exact'"):
                policy.cache(model, prefill="streamed")
            return
        caches = [policy.cache(model, prefill="streamed") for _ in range(3)]
        whole = steps(model, caches[0], [50], pads)
        given_up = (whole - steps(model, None, [50], pads))[1].abs().max() > 1e-4
        assert given_up == case.lossy
        for cache, pieces in zip(caches[1:], ([1] * 50, [3, 17, 1, 20, 9]), strict=True):
            found = steps(model, cache, pieces, pads)
            for row, pad in enumerate(pads):
                assert torch.allclose(found[row, pad:], whole[row, pad:], atol=case.tolerance)
            if not any(pads):  # numbers that stand for padding may be anything
                assert same_state(cache, caches[0], case.tolerance)

    @pytest.mark.parametrize("pads", [(0, 0), (6, 0)])
    def test_a_prompt_in_chunks_is_the_prompt_in_one_piece(
        self, case: Case, pads: tuple[int, int], make: Models
    ) -> None:
        model = make("qwen3")
        policy = case.build(model)
        inputs = batch(pads, 40)
        mask = inputs["attention_mask"]
        for mode in policy.prefills:
            whole, chunked, direct = (policy.cache(model, prefill=mode) for _ in range(3))
            logits = [prefill(model, c, chunk=size, **inputs) for c, size in ((whole, 40), (chunked, 13))]
            assert torch.allclose(*logits, atol=case.tolerance)
            assert whole.get_seq_length() == 40
            with torch.no_grad():
                model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **cache_argument(direct))
            direct.finish()
            if not any(pads):
                assert same_state(whole, chunked) and same_state(whole, direct)
            answers = [one_more(model, cache, mask, [0, 1]) for cache in (whole, chunked, direct)]
            assert torch.allclose(answers[0], answers[1], atol=case.tolerance)
            assert torch.allclose(answers[0], answers[2], atol=case.tolerance)

    def test_padding_on_the_left_changes_nothing(self, case: Case, llama: PreTrainedModel) -> None:
        policy, pad = case.build(llama), 8
        assert pad % case.group == 0
        pieces = [40, 1, 1, 1, 1]
        for mode in policy.prefills:
            together = steps(llama, policy.cache(llama, prefill=mode), pieces, (pad, 0))
            ids = batch((pad, 0), sum(pieces))["input_ids"][:1, pad:]
            cache, alone = policy.cache(llama, prefill=mode), []
            with torch.no_grad():
                for part in ids.split([40 - pad, 1, 1, 1, 1], 1):
                    alone.append(llama(part, **cache_argument(cache)).logits)
            assert torch.allclose(torch.cat(alone, 1)[0], together[0, pad:], atol=case.tolerance)

    @pytest.mark.parametrize("pieces", [[30], [1] * 30])
    def test_padding_between_turns_changes_nothing(self, case: Case, pieces: list[int], llama: PreTrainedModel) -> None:
        policy, gap, first = case.build(llama), 8, 24
        assert gap % case.group == first % case.group == 0
        ids = batch((0,), first + sum(pieces))["input_ids"]
        for mode in policy.prefills:
            answers = []
            for pad in (0, gap):
                cache = policy.cache(llama, prefill=mode)
                mask = torch.ones(1, first + pad + sum(pieces), dtype=torch.long)
                mask[:, first : first + pad] = 0
                fed = torch.cat([ids[:, :first], torch.zeros(1, pad, dtype=torch.long), ids[:, first:]], 1)
                positions, stop, logits = (mask.cumsum(-1) - 1).clamp(min=0), 0, []
                for size in (first, pad + pieces[0], *pieces[1:]):  # the second turn comes with the padding before it
                    part = slice(stop, stop := stop + size)
                    with torch.no_grad():
                        out = llama(
                            fed[:, part],
                            attention_mask=mask[:, :stop],
                            position_ids=positions[:, part],
                            **cache_argument(cache),
                        )
                    logits.append(out.logits)
                    if stop == first:
                        cache.finish()  # else the second turn, if it is long, goes on with the first prompt
                answers.append(torch.cat(logits, 1)[:, mask[0].bool()])
            assert torch.allclose(*answers, atol=case.tolerance)

    def test_a_turn_goes_on_where_the_last_one_ended(self, case: Case, llama: PreTrainedModel) -> None:
        policy = case.build(llama)
        if "streamed" not in policy.prefills:
            return  # refused: see test_streamed_tokens_may_come_in_any_pieces
        cache = policy.cache(llama, prefill="streamed")
        tokens, mask = batch((6, 0), 30)["input_ids"], batch((6, 0), 30)["attention_mask"]
        for turn in range(3):
            answers = [
                llama.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=6,
                    do_sample=False,
                    eos_token_id=None,
                    **cache_argument(used),
                )
                for used in (cache, policy.cache(llama, prefill="streamed"))
            ]
            assert torch.equal(*answers)  # the conversation, and all of it anew
            tokens = torch.cat([answers[0], batch((0, 0), 9, seed=turn)["input_ids"]], 1)
            mask = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], 1)

    def test_prompt_lookup_finds_the_tokens_of_the_same_policy(self, case: Case, llama: PreTrainedModel) -> None:
        policy = case.build(llama)
        if "streamed" not in policy.prefills:
            return
        inputs = {k: v.repeat(1, 2) for k, v in batch((0,), 20).items()}
        found = [
            llama.generate(
                **inputs,
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                **cache_argument(policy.cache(llama, prefill="streamed")),
                **lookup,
            )
            for lookup in ({}, {"prompt_lookup_num_tokens": 5})
        ]
        assert torch.equal(*found)

    # -- the life of a cache --

    def test_the_last_forward_pass_can_be_taken_back(self, case: Case, llama: PreTrainedModel) -> None:
        policy = case.build(llama)
        for pieces, removed in (([30, 1, 12], 5), ([30, 1, 12], 12), ([30], 4), ([30, 1], 1)):
            cache, direct = policy.cache(llama), policy.cache(llama)
            ids = batch((0, 0), sum(pieces))["input_ids"]
            for one, sizes in ((cache, pieces), (direct, [*pieces[:-1], pieces[-1] - removed])):
                if sizes[:-1]:
                    steps(llama, one, sizes[:-1], (0, 0))
                one.activate_past_recording()
                first = sum(sizes[:-1])
                if sizes[-1]:
                    with torch.no_grad():
                        llama(ids[:, first : first + sizes[-1]], **cache_argument(one))
            cache.crop(-removed)
            assert cache.get_seq_length() == direct.get_seq_length() == sum(pieces) - removed
            with torch.no_grad():
                logits = [llama(torch.full((2, 1), 7), **cache_argument(one)).logits for one in (cache, direct)]
            assert torch.allclose(*logits, atol=case.tolerance)
            assert same_state(cache, direct)

    def test_cropping_further_back_works_or_is_refused(self, case: Case, llama: PreTrainedModel) -> None:
        cache = case.build(llama).cache(llama)
        steps(llama, cache, [38, 1], (0, 0))
        if not case.crops:
            with pytest.raises(OptionError, match=r"crop: .*cache\.copy\(\)"):
                cache.crop(-20)
            return
        before = cache.nbytes
        cache.crop(-20)
        assert cache.get_seq_length() == 19 and cache.nbytes < before
        with torch.no_grad():
            logits = llama(batch((0, 0), 12, seed=4)["input_ids"], **cache_argument(cache)).logits
        assert torch.isfinite(logits).all() and cache.get_seq_length() == 31
        with pytest.raises(OptionError, match="tokens_to_remove=-40"):
            cache.crop(-40)

    def test_rows_can_be_reordered_repeated_and_selected(self, case: Case, make: Models) -> None:
        model = make("gemma3")
        cache, inputs = case.build(model).cache(model), batch((6, 0))
        prefill(model, cache, **inputs)
        mask = inputs["attention_mask"]
        expected = one_more(model, cache.copy(), mask, [0, 1])
        for change, rows in (
            (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        ):
            changed = cache.copy()
            change(changed)
            assert torch.allclose(one_more(model, changed, mask, rows), expected[rows], atol=1e-5)
        assert torch.allclose(one_more(model, copy.deepcopy(cache), mask, [0, 1]), expected, atol=1e-6)
        assert torch.equal(one_more(model, cache, mask, [0, 1]), expected)  # copies leave the original alone

    def test_one_document_many_questions(self, case: Case, tmp_path: Path, make: Models) -> None:
        model, twin = make("gemma3"), make("gemma3")  # the same weights
        policy = case.build(model)
        document = batch((0,), 50)["input_ids"]
        prepared = policy.cache(model)
        prefill(model, prepared, document, chunk=20)
        prepared.save(tmp_path / "document.safetensors")
        policy.save(tmp_path / "policy.safetensors")
        again = Policy.load(tmp_path / "policy.safetensors")
        assert again == policy and type(again) is type(policy) and type(policy).load(tmp_path / "policy.safetensors")
        loaded = CompressedCache.load(tmp_path / "document.safetensors", twin, again)
        assert loaded.policy == policy and loaded.nbytes == prepared.nbytes
        for seed in (1, 2):
            asked = torch.cat([document, batch((0,), 6, seed)["input_ids"]], 1)
            answers = [
                owner.generate(asked, **cache_argument(cache.copy()), max_new_tokens=6, do_sample=False)
                for owner, cache in ((model, prepared), (twin, loaded))
            ]
            assert torch.equal(*answers)
        assert loaded.nbytes == prepared.nbytes and loaded.get_seq_length() == 50
        with pytest.raises(CheckpointError, match="is not the one this cache was made with"):
            CompressedCache.load(tmp_path / "document.safetensors", twin, Other())
        with pytest.raises(CheckpointError, match="another model"):
            CompressedCache.load(tmp_path / "document.safetensors", make("llama"), again)

    # -- bytes --

    @pytest.mark.parametrize("length", [9, 29, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bytes_are_counted_before_and_after(
        self, case: Case, length: int, dtype: torch.dtype, llama: PreTrainedModel
    ) -> None:
        policy = case.build(llama)
        cache = policy.cache(llama.to(dtype))
        prefill(llama, cache, batch((0,), length)["input_ids"])
        expected = sum(policy.nbytes(cache.layer_shape(llama, index), length) for index in range(2))
        assert cache.nbytes == cache.compressed_nbytes == expected
        assert cache.bytes_per_token == expected / length
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in layer.parts.values())
        assert held <= expected + 2 * 64  # no view keeps more alive than is counted

    @pytest.mark.parametrize("budget", [0.9, 0.6, 0.25])
    def test_budgets_are_met_or_refused(self, case: Case, budget: float, llama: PreTrainedModel) -> None:
        model, full = llama.bfloat16(), 2 * 200 * 2 * 2 * 16 * 2
        policy = case.build(model)
        if budget < case.least:
            with pytest.raises(OptionError, match="the least it can do is"):
                policy.cache(model, budget=budget, length=200)
            return
        cache = policy.cache(model, budget=budget, length=200)
        assert cache.policy == policy.cache(model, bytes_per_token=budget * full / 200, length=200).policy
        prefill(model, cache, batch((0,), 200)["input_ids"])
        assert cache.nbytes <= budget * full
        least_lossy = getattr(cache.policy, "density", 0.0) == 1.0  # in codes it cannot keep more
        assert cache.nbytes > (budget - 0.13) * full or least_lossy  # and used: steps are up to an eighth

    # -- models, dtypes, devices --

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_sixteen_bits(self, case: Case, name: str, make: Models) -> None:
        model = make(name)
        if name in case.refuses:
            return  # see test_a_full_budget_gives_the_tokens_of_the_library
        policy = case.build(model)
        expected = steps(model, policy.cache(model), [30, 1, 1, 1])
        model.bfloat16()
        cache = policy.cache(model)
        found = steps(model, cache, [30, 1, 1, 1])
        assert found.dtype == torch.bfloat16
        exact = {"mass"}  # sums of attention
        for layer in cache.compressed_layers:
            for part, tensor in layer.parts.items():
                assert tensor.dtype != torch.float32 or part in exact, part
        assert (found.float() - expected)[1].abs().mean() < 0.05 * expected.abs().mean()
        case.build(model).cache(model)  # and what a policy learns can be learnt in 16 bits

    def test_sliding_windows_are_left_to_the_library(self, case: Case, make: Models) -> None:
        model = make("gemma3")
        cache = case.build(model).cache(model)
        prefill(model, cache, batch((0,), 60)["input_ids"], chunk=17)
        assert type(cache.layers[0]).__name__ == "DynamicSlidingWindowLayer"
        assert cache.layers[1:] == cache.compressed_layers
        assert cache.nbytes - cache.compressed_nbytes == 2 * 2 * 11 * 16 * 4

    @pytest.mark.parametrize("name", ["qwen3", "qwen2"])
    def test_devices(self, case: Case, name: str, make: Models, fake_cuda: Callable[[], Any]) -> None:
        built: Any = make(name)
        policy = case.build(built)  # learnt on the CPU, as one that was loaded
        with fake_cuda() as place:
            model = place(built)
            for mode in policy.prefills:
                cache = policy.cache(model, prefill=mode)
                logits = prefill(model, cache, torch.ones(2, 40, dtype=torch.long, device="cuda"), chunk=16)
                for _ in range(3):
                    logits = model(torch.ones(2, 1, dtype=torch.long, device="cuda"), **cache_argument(cache)).logits
                assert logits.device.type == "cuda"
                assert all(t.device.type == "cuda" for layer in cache.layers for t in layer.parts.values())


@dataclass(frozen=True)
class Other(Policy):
    """A policy that no cache was made with."""

    def layer(self, shape: Any, streamed: bool) -> Any:
        raise NotImplementedError

    def nbytes(self, shape: Any, length: int) -> int:
        raise NotImplementedError
