"""No cost depends on the dtype that a processor computes in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refimpl import GPTQ, RTN, EoRA, SparseGPT, compress, load, plan, save
from refimpl.baselines.kvcache import H2O, KIVI, Full, SnapKV, StreamingLLM, ThinK
from refimpl.core.cache import Policy, cache_argument
from refimpl.core.errors import OptionError
from refimpl.core.files import io
from refimpl.core.stored import declare_stored, stored_dtype, stored_dtypes
from refimpl.kvcache.cskv import CSKV, factorise, moments
from refimpl.kvcache.matryoshka_kv import MatryoshkaKV, calibrate, pca
from refimpl.lab import models
from refimpl.lab.measure.metrics import footprint
from refimpl.pruning.gradual_magnitude import model_storage

TOKENS = torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(0))


def pair(**more: Any) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """One model of 16 bits, as it is and as a processor without bfloat16 loads it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=50,
        attention_bias=True,
        **more,
    )
    return loaded_twice(LlamaForCausalLM(config))


def loaded_twice(model: Any) -> tuple[Any, Any]:
    """As `from_pretrained` does it: weights in the dtype, rotary tables as they were, the dtype in the configuration."""
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        made.append(copy.deepcopy(model).eval())
        made[-1].config.dtype = dtype
        for parameter in made[-1].parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    declare_stored(made[1], torch.bfloat16)
    return made[0], made[1]


METHODS = {
    "dense": [],
    "4 bits": [RTN(4, 32)],
    "2:4": [SparseGPT("2:4")],
    "unstructured": [SparseGPT("unstructured")],
    "2:4 in 4 bits with a path": [SparseGPT("2:4"), RTN(4, 32), EoRA(rank=4)],
    "2 bits with a path in 4 bits": [GPTQ(2, 32), EoRA(rank=8, adapter_bits=4)],
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_costs_the_same_whatever_computes_it(name: str, tied: bool, tmp_path: Path) -> None:
    found = []
    for dtype, model in zip(("bfloat16", "float32"), pair(tie_word_embeddings=tied), strict=True):
        original = copy.deepcopy(model)
        for method in METHODS[name]:
            planned = plan(model, method, sequences=4, length=24)
            compress(model, method, TOKENS, reference=original, progress=False)
            # of an unstructured mask the plan knows the share, not how many weights each site rounds it to
            assert planned.bytes == footprint(model).bytes
        assert str(model.dtype) == f"torch.{dtype}"
        found.append(footprint(model, save(model, tmp_path / dtype)))
        assert io.read_json(tmp_path / dtype / io.MANIFEST)["dtype"] == "bfloat16"
    assert found[0] == found[1]
    again = [footprint(load(tmp_path / "float32", dtype)) for dtype in (None, torch.float32, torch.bfloat16)]
    assert {size.bits_per_weight for size in again} == {found[0].bits_per_weight}
    assert {size.bytes for size in again} == {found[0].bytes}


def test_what_is_saved_is_what_was_loaded() -> None:
    narrow, wide = pair()
    kinds = stored_dtypes(wide)
    assert all(torch.equal(t, wide.state_dict()[name].to(kinds[name])) for name, t in narrow.state_dict().items())


def test_a_folder_is_stored_in_another_dtype_than_it_is_computed_in(tmp_path: Path) -> None:
    narrow, _ = pair()
    narrow.save_pretrained(tmp_path / "source")
    for out, options in {"16": {"store": torch.bfloat16}, "32": {}}.items():
        method = SparseGPT("2:4")
        compress(
            tmp_path / "source", method, TOKENS, out=tmp_path / out, dtype=torch.float32, progress=False, **options
        )
    stored = [load(tmp_path / out) for out in ("16", "32")]
    assert [model.dtype for model in stored] == [torch.bfloat16, torch.float32]
    assert footprint(stored[1]).bytes > 1.9 * footprint(stored[0]).bytes
    for name, tensor in stored[1].state_dict().items():
        assert torch.equal(tensor.to(stored[0].state_dict()[name].dtype), stored[0].state_dict()[name]), name


def test_an_interrupted_run_goes_on_with_what_it_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: str) -> torch.Tensor:
        _, wide = pair()
        compress(wide, GPTQ(4, 32), TOKENS, out=tmp_path / out, progress=False)
        assert wide.dtype == torch.float32 and load(tmp_path / out).dtype == torch.bfloat16
        return load(tmp_path / out)(TOKENS).logits

    whole = run("whole")
    with monkeypatch.context() as patch:
        done = io.ShardWriter.add_block

        def interrupted(self: Any, index: int, *more: Any) -> None:
            if index:
                raise KeyboardInterrupt
            done(self, index, *more)

        patch.setattr(io.ShardWriter, "add_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    assert torch.equal(run("out"), whole)


def policies(model: LlamaForCausalLM) -> list[Policy]:
    ids = TOKENS
    factors = factorise(moments(model, ids))
    bases = pca(calibrate(model, ids))
    return [
        Full(),
        StreamingLLM(sinks=2, window=6),
        H2O(capacity=8),
        SnapKV(capacity=10, window=4),
        ThinK(channels=0.5, window=4, group=4),
        KIVI(bits=4, window=4, group=8, value_group=8),
        CSKV(factors, density=0.5, window=4),
        CSKV(factors, density=0.5, window=4, bits=4),
        MatryoshkaKV(bases, ranks=8),
    ]


def test_a_cache_costs_the_same_whatever_computes_it() -> None:
    narrow, wide = pair()
    length, found = TOKENS.shape[1], []
    for model in (narrow, wide):
        sizes = []
        for policy in policies(model):
            cache = policy.cache(model)
            with torch.no_grad(), cache.prompt():
                model(TOKENS[:1], **cache_argument(cache))
            assert cache.nbytes == cache.compressed_nbytes
            shapes = [cache.layer_shape(model, i) for i in range(2)]
            assert cache.nbytes == sum(cache.policy.nbytes(shape, length) for shape in shapes), policy
            sizes.append((type(policy).__name__, cache.nbytes, cache.bytes_per_token))
        found.append(sizes)
    assert found[0] == found[1]


@pytest.mark.parametrize("budget", [0.2, 0.3, 0.5])
def test_a_budget_buys_the_same_whatever_computes_it(budget: float) -> None:
    narrow, wide = pair()
    for policy in (
        KIVI(window=0, group=8, value_group=8),
        H2O(),
        SnapKV(window=4),
        StreamingLLM(sinks=0),
        ThinK(window=1),
    ):
        fitted = []
        for model in (narrow, wide):
            try:
                fitted.append(policy.cache(model, budget=budget, length=64).policy)
            except OptionError as error:
                fitted.append(str(error))
        assert fitted[0] == fitted[1]


def test_sliding_windows_count_as_stored() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_hidden_layers=2,
        intermediate_size=32,
        vocab_size=50,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    found = []
    for model in loaded_twice(Gemma3ForCausalLM(config)):
        cache = Full().cache(model)
        with torch.no_grad(), cache.prompt():
            model(TOKENS[:1], **cache_argument(cache))
        found.append((cache.nbytes, cache.compressed_nbytes))
    assert found[0] == found[1] and found[0][0] > found[0][1]


def test_masks_cost_the_same_whatever_computes_them() -> None:
    narrow, wide = pair()
    assert model_storage(narrow) == model_storage(wide)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_loaded_model_counts_as_its_file(dtype: torch.dtype | None) -> None:
    loaded = [models.smollm2(dtype, layers=1), models.load("llama-small", dtype)[0]]
    for model in loaded:
        assert stored_dtype(model) == torch.bfloat16 and footprint(model).bits_per_weight == 16
        assert dtype is None or model.dtype == dtype


def test_a_file_of_32_bits_is_loaded_in_16_unless_32_are_asked_for(tmp_path: Path) -> None:
    pair()[0].float().save_pretrained(tmp_path)
    bits = [
        footprint(models.load(tmp_path, dtype)[0]).bits_per_weight for dtype in (None, torch.bfloat16, torch.float32)
    ]
    assert bits == [16, 16, 32]
