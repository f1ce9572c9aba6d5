"""The driver: every method on every layout, what each order means, dry runs, and refusals that change nothing."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

import refimpl
from refimpl import GPTQ, METHODS, RTN, EoRA, LoftQ, Magnitude, PlainSVD, SparseGPT, Wanda, compress, plan
from refimpl.core.compress.method import Method
from refimpl.core.compress.sites import find_blocks, find_sites
from refimpl.core.errors import CalibrationError, CheckpointError, OptionError
from refimpl.core.layers import CompressedLayer
from refimpl.lab.measure.metrics import footprint

Factory = Callable[..., PreTrainedModel]
LAYOUTS = ["llama", "gpt2", "mixtral", "qwen3"]


def outside(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is not a site: embeddings, head, norms, routers."""
    prefix = tuple(site.name + "." for site in find_sites(model))
    return {n: t.clone() for n, t in model.state_dict().items() if not n.startswith(prefix)}


# ---- every method on every layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_on_every_layout(name, layout, dtype, pipeline, tokens, request, same) -> None:
    model = request.getfixturevalue(f"tiny_{layout}")().to(dtype)
    reference = copy.deepcopy(model)
    untouched = outside(copy.deepcopy(model))
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    for step, method in enumerate(pipeline(name)):
        planned = plan(model, method, sequences=4, length=10, batch_size=3)
        report = compress(model, method, tokens(4, 10, seed=step), reference=reference, batch_size=3, progress=False)
        assert report.model is model
        assert [site.name for site in report.sites] == [row["site"] for row in planned.sites]
        for site, row in zip(find_sites(model), planned.sites, strict=True):
            assert isinstance(site.module, CompressedLayer), site.name
            assert site.module.config() == row["layer"]  # the dry run told the truth
            assert site.weight.dtype == dtype and torch.isfinite(site.weight).all()
        real = footprint(model)
        assert planned.bits_per_weight == pytest.approx(real.bits_per_weight, rel=1e-12)
        assert planned.bytes == real.bytes
        if "gram" in method.statistics:
            assert all(math.isfinite(site.error) and site.error >= 0 for site in report.sites)
            assert report.mean_error > 0
    assert same(outside(model), untouched)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    with torch.no_grad():
        logits = model(tokens(2, 8)).logits
    assert torch.isfinite(logits).all() and logits.dtype == dtype
    assert not model.training


@pytest.mark.parametrize("layout", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_stays_on_its_device(name, layout, pipeline, untrained, tokens, fake_cuda, request) -> None:
    """A stray .cpu(), a mixed device, or a value read elsewhere than in `read` fails."""
    narrow = {"n_embd": 32, "n_layer": 1} if layout == "gpt2" else {"hidden_size": 32, "num_hidden_layers": 1}
    narrow |= {"intermediate_size": 32} if layout != "gpt2" else {"n_inner": 32}
    narrow |= {"num_local_experts": 2} if layout == "mixtral" else {}
    factory, ids = request.getfixturevalue(f"tiny_{layout}"), tokens(4, 10)
    model, reference = factory(**narrow), factory(**narrow)
    with fake_cuda() as place:
        place(model), place(reference)
        last = untrained(pipeline(name)[-1])
        for method in [RTN(3, 32), last] if last.uses_reference else [last]:
            compress(model, method, ids, reference=reference, progress=False)
        assert all(isinstance(site.module, CompressedLayer) for site in find_sites(model))
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
        assert model(torch.ones_like(ids, device="cuda"), use_cache=False).logits.device.type == "cuda"


# ---- orders


def hooked_gram(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    grams = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: grams.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    X = torch.cat(grams)
    return X.T @ X


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_what_a_later_block_sees(order: str, tiny_llama: Factory, tokens) -> None:
    """Sequential: the compressed blocks before it. Parallel: the original ones. Inside a block always the original."""
    model = tiny_llama(num_hidden_layers=3, initializer_range=0.2)
    dense = copy.deepcopy(model)
    ids = tokens()
    seen: dict[str, Tensor] = {}
    original = RTN.compress_site

    class Spy(GPTQ):
        def compress_site(self, site, stats, reference):
            seen[site.name] = stats.gram.clone()
            return original(RTN(2, 32), site, None, None)

    compress(model, Spy(2, 32), ids, order=order, batch_size=4, progress=False)
    _, compressed_blocks = find_blocks(model)
    for index in range(3):
        mirror = copy.deepcopy(dense)
        if order == "sequential":
            for before in range(index):
                mirror.model.layers[before] = compressed_blocks[before]
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{part}"
            expected = hooked_gram(mirror, name, ids)
            assert torch.allclose(seen[name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), name


def test_batch_size_does_not_matter(tiny_llama: Factory, tokens) -> None:
    results = []
    for batch_size in (1, 4, 100):
        model = tiny_llama()
        compress(model, GPTQ(4, 32), tokens(), batch_size=batch_size, progress=False)
        results.append(find_sites(model)[-1].weight)
    assert torch.allclose(results[0], results[1], atol=2e-2) and torch.allclose(results[0], results[2], atol=2e-2)


def test_targets_leave_the_rest_dense(tiny_llama: Factory, tokens) -> None:
    model = tiny_llama()
    compress(model, GPTQ(4, 32), tokens(), targets=r"1\.mlp", progress=False)
    kinds = {site.name: isinstance(site.module, CompressedLayer) for site in find_sites(model)}
    assert {name for name, packed in kinds.items() if packed} == {
        f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")
    }


def test_idle_experts_are_compressed_all_the_same(tiny_mixtral: Factory, tokens) -> None:
    model = tiny_mixtral(num_local_experts=8, num_experts_per_tok=1)
    reference = copy.deepcopy(model)
    ids = tokens(1, 4)
    for method in (SparseGPT("2:4"), GPTQ(4, 32), EoRA(4, adapter_bits=4), refimpl.ActSVD(4)):
        compress(model, method, ids, reference=reference, progress=False)
        for site in find_sites(model):
            assert torch.isfinite(site.weight).all() and site.weight.any()


def test_tokens_may_come_as_a_token_set(tiny_llama: Factory, tokens) -> None:
    class Set:
        ids = tokens()

    model, other = tiny_llama(), tiny_llama()
    compress(model, Wanda("2:4"), Set(), progress=False)
    compress(other, Wanda("2:4"), tokens(), progress=False)
    assert torch.equal(find_sites(model)[-1].weight, find_sites(other)[-1].weight)


def test_reference_may_be_a_folder(tiny_llama: Factory, tiny_mixtral: Factory, tiny_gpt2: Factory, tokens, tmp_path):
    for number, factory in enumerate((tiny_llama, tiny_mixtral, tiny_gpt2)):
        dense = factory()
        folder = tmp_path / str(number)
        dense.save_pretrained(folder, save_original_format=False)
        results = []
        for reference in (dense, folder):
            model = copy.deepcopy(dense)
            compress(model, RTN(3, 32), progress=False)
            compress(model, EoRA(4), tokens(), reference=reference, progress=False)
            results.append(model.state_dict())
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---- dry run


def test_plan_leaves_a_model_as_it_is(tiny_mixtral: Factory, state, same) -> None:
    model = tiny_mixtral()
    before = state(model)
    plan(model, GPTQ(4, 32))
    assert same(state(model), before)


def test_plan_of_a_large_model_is_quick_and_names_everything() -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    start = time.process_time()
    planned = plan(config, GPTQ(4, 128))
    assert time.process_time() - start < 20
    assert len(planned.sites) == 7 * 32
    assert planned.bits_per_weight == pytest.approx(4 + (16 + 4) / 128, rel=1e-6)
    embeddings = 2 * 2 * 128256 * 4096
    assert planned.bytes == pytest.approx(6.98e9 * planned.bits_per_weight / 8 + embeddings, rel=1e-2)
    assert planned.flops > 2 * 2 * 6.98e9 * 128 * 2048  # two forward passes at least
    assert planned.peak_bytes > 4 * 14336**2
    assert planned.skipped["model.embed_tokens"].endswith("embedding") and "lm_head" in planned.skipped
    with pytest.raises(OptionError, match="group_size=100"):
        plan(config, GPTQ(4, 100))


def test_plan_of_a_folder_uses_its_dtype_and_its_layers(tiny_llama: Factory, tmp_path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    assert plan(tmp_path / "dense", Magnitude()).bytes == plan(model, Magnitude()).bytes
    compress(model, Magnitude(), progress=False)
    refimpl.save(model, tmp_path / "sparse")
    planned = plan(tmp_path / "sparse", RTN(4, 32))
    assert planned.sites[0]["layer"]["pattern"] == "2:4"


# ---- bad input: an error that names argument, value and remedy, and a model that is as before


ids = torch.randint(3, 256, (4, 10), generator=torch.Generator().manual_seed(0))
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no calibration": (CalibrationError, "calibration=None: GPTQ needs tokens", {"calibration": None}),
    "empty": (CalibrationError, r"shape \(0, 10\) holds no tokens", {"calibration": ids[:0]}),
    "empty rows": (CalibrationError, r"shape \(4, 0\) holds no tokens", {"calibration": ids[:, :0]}),
    "one token": (CalibrationError, "length 1 are too short; use 2", {"calibration": ids[:, :1]}),
    "one dimension": (CalibrationError, r"got torch.int64 of shape \(10,\)", {"calibration": ids[0]}),
    "floats": (CalibrationError, "integer token ids.*got torch.float32", {"calibration": ids.float()}),
    "booleans": (CalibrationError, "integer token ids.*got torch.bool", {"calibration": ids > 5}),
    "text": (CalibrationError, "got str", {"calibration": "some text"}),
    "vocabulary": (CalibrationError, "token id 256 is outside the vocabulary of 256", {"calibration": ids * 0 + 256}),
    "negative": (CalibrationError, "token id -1 is outside", {"calibration": ids * 0 - 1}),
    "too long": (CalibrationError, "length 280 are longer than the 256 positions", {"calibration": ids.repeat(1, 28)}),
    "batch size": (OptionError, "batch_size=0", {"batch_size": 0}),
    "group": (OptionError, "group_size=48 does not divide the 64 inputs.*use 32, 64", {"method": GPTQ(4, 48)}),
    "bits": (OptionError, "bits=12: use 2 to 8", {"method": LoftQ(12, 32)}),
    "order": (OptionError, "order='sequental': use one of .*did you mean 'sequential'", {"order": "sequental"}),
    "method name": (OptionError, "method='gtpq': pass an instance.*did you mean 'GPTQ'", {"method": "gtpq"}),
    "method class": (OptionError, "method='Wanda': pass an instance.*did you mean 'Wanda'", {"method": Wanda}),
    "rank": (OptionError, "rank=33: .*k_proj.* 32 x 64", {"method": LoftQ(4, 32, rank=33)}),
    "targets": (OptionError, "targets='head' matches no site", {"targets": "head"}),
    "no reference": (OptionError, "reference=None: PlainSVD repairs", {"method": PlainSVD(4)}),
    "not compressed": (OptionError, "q_proj.* is not compressed", {"method": EoRA(4), "reference": "other"}),
    "itself": (OptionError, "reference is the model that is being", {"method": EoRA(4), "reference": "itself"}),
    "missing folder": (CheckpointError, "is not a folder", {"method": EoRA(4), "reference": "/nowhere"}),
    "another model": (CheckpointError, "it is another model", {"method": EoRA(4), "reference": "wider"}),
}


@pytest.mark.parametrize("layout", ["llama", "mixtral"])
@pytest.mark.parametrize("case", list(BAD))
def test_refusals_name_the_argument_and_change_nothing(case, layout, request, state, same) -> None:
    kind, message, options = BAD[case]
    factory = request.getfixturevalue(f"tiny_{layout}")
    model = factory().train()
    references = {"other": factory(), "itself": model, "wider": factory(hidden_size=128)}
    options = {"method": GPTQ(4, 32), "calibration": ids, **options}
    reference = options.pop("reference", None)
    before = state(model)
    with pytest.raises(kind, match=message):
        compress(model, reference=references.get(reference, reference), progress=False, **options)
    assert same(state(model), before)
    assert model.training


def test_width_that_a_pattern_does_not_divide(tiny_llama: Factory, state, same) -> None:
    model = tiny_llama(intermediate_size=90)
    before = state(model)
    with pytest.raises(OptionError, match=r"groups of 4, but 'model\.layers\.0\.mlp\.down_proj' has 90.*targets="):
        compress(model, SparseGPT("2:4"), ids, progress=False)
    assert same(state(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("method", [GPTQ(4, 32), RTN(4, 32)])
def test_broken_weights_are_named_before_any_work(method, where, value, tiny_llama: Factory, state) -> None:
    model = tiny_llama()
    model.get_parameter(where).data[-1] = value
    before = state(model)
    with pytest.raises(CalibrationError, match=f"model: '{where}' contains NaN"):
        compress(model, method, ids, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(torch.nan_to_num(after[name]), torch.nan_to_num(before[name])) for name in before)


def test_broken_reference_is_named(tiny_llama: Factory) -> None:
    reference = tiny_llama()
    model = copy.deepcopy(reference)
    compress(model, RTN(4, 32), progress=False)
    reference.model.layers[0].self_attn.o_proj.weight.data[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"reference: 'model\.layers\.0\.self_attn\.o_proj' contains NaN"):
        compress(model, EoRA(4), ids, reference=reference, progress=False)


def test_activations_that_overflow_are_named_and_leave_the_block_whole(tiny_llama: Factory, state, same) -> None:
    model = tiny_llama().to(torch.float16)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(6e4)
    model.model.layers[0].mlp.gate_proj.weight.data.fill_(6e4)
    before = state(model)
    with pytest.raises(CalibrationError, match=r"inputs of 'model\.layers\.0\.mlp\.down_proj' contain NaN.*float32"):
        compress(model, GPTQ(4, 32), ids, progress=False)
    assert same(state(model), before)


@pytest.mark.parametrize("model", [5, None, "hub/name"])
def test_model_of_another_kind(model: Any, tmp_path) -> None:
    with pytest.raises((OptionError, CheckpointError), match=r"model=|is not a folder"):
        compress(model, RTN(4, 32), out=tmp_path / "out", progress=False)


def test_a_list_of_methods_is_refused_with_the_remedy(tiny_llama: Factory) -> None:
    with pytest.raises(OptionError, match="method is a list of 2: compress takes one method; make one call each"):
        compress(tiny_llama(), [RTN(4, 32), RTN(3, 32)], progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [GPTQ(3, 32), Wanda("2:4")])
def test_experts_that_no_token_reached_are_named_and_not_averaged(method: Method, tiny_mixtral: Factory) -> None:
    model = tiny_mixtral(num_local_experts=8, num_experts_per_tok=1)
    report = compress(
        model, method, torch.zeros(1, 2, dtype=torch.long), progress=False
    )  # two equal tokens: few experts
    unreached = [site for site in report.sites if "unreached" in site.log]
    assert unreached and all("experts" in site.name and site.error is None for site in unreached)
    assert f"no calibration token reached {len(unreached)}" in str(report)
    if isinstance(method, GPTQ):
        reached = [site.error for site in report.sites if site.error is not None]
        assert len(reached) == len(report.sites) - len(unreached)
        assert report.mean_error == pytest.approx(sum(reached) / len(reached))
