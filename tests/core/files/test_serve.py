"""Serving: the layouts of kernels and processors give the same model, on every architecture, and are what is called."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from refimpl import GPTQ, RTN, EoRA, Magnitude, SparseGPT, compress, load, save
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import OptionError
from refimpl.core.files.serve import serve
from refimpl.core.layers import (
    CompensatedLinear,
    CompressedLayer,
    Factor,
    Geometry,
    LowRankLinear,
    PackedConv2d,
    PackedLinear,
    ProcessorLinear,
    QuantizedInput,
    ServedCompensatedLinear,
    ServedLinear,
    ServedSparseLinear,
    empty_layer,
)
from refimpl.core.layers.processor import FORMS, PACKED, Dense, Half, Int4
from refimpl.core.layers.served import served
from refimpl.kernels.quant_matmul import BITS

Factory = Callable[..., PreTrainedModel]
LAYOUTS = ["llama", "gpt2", "mixtral", "qwen3"]


def packed(
    bits: int = 4,
    n_in: int = 64,
    n_out: int = 24,
    group: int = 32,
    symmetric: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n_out, n_in), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n_out, n_in // group, generator=generator) / 2**bits
    zero = torch.randint(0, 2**bits, (n_out, n_in // group), dtype=torch.uint8, generator=generator)
    return PackedLinear(
        codes=codes,
        scale=scale,
        zero=None if symmetric else zero,
        bits=bits,
        dtype=dtype,
        bias=torch.randn(n_out, generator=generator).to(dtype) if bias else None,
    )


def sparse(pattern: str = "2:4", n_in: int = 64, n_out: int = 24, bias: bool = True) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    kept = int(pattern[0]) if pattern[0].isdigit() else 2
    every = int(pattern[-1]) if pattern[-1].isdigit() else 4
    order = torch.rand(n_out, n_in // every, every, generator=generator).argsort(-1)
    mask = (order < kept).flatten(1)
    weight = torch.randn(n_out, n_in, generator=generator) * mask
    return PackedLinear(values=weight, mask=mask, pattern=pattern, bias=torch.ones(n_out) if bias else None)


def path(n_in: int = 64, n_out: int = 24, rank: int = 5) -> LowRankLinear:
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator)
    return LowRankLinear(Factor(A), Factor(B))


def packed_path(n_in: int = 64, n_out: int = 24, rank: int = 32) -> LowRankLinear:
    return LowRankLinear(packed(4, n_in, rank, bias=False), packed(4, rank, n_out, bias=False))


LAYERS: dict[str, tuple[Callable[[], CompressedLayer], type[CompressedLayer]]] = {
    **{f"{bits} bits": (lambda bits=bits: packed(bits), ServedLinear) for bits in BITS},
    "symmetric": (lambda: packed(3, symmetric=True, bias=False), ServedLinear),
    "per channel": (lambda: packed(4, group=64), ServedLinear),
    "2:4": (sparse, ServedSparseLinear),
    "repaired": (lambda: CompensatedLinear(packed(3), path()), ServedCompensatedLinear),
    "repaired 2:4": (lambda: CompensatedLinear(sparse(), path()), CompensatedLinear),
    "packed path": (lambda: CompensatedLinear(packed(3), packed_path()), CompensatedLinear),
    "packed path on 2:4": (lambda: CompensatedLinear(sparse(), packed_path()), CompensatedLinear),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer(name: str) -> None:
    make, kind = LAYERS[name]
    layer = make()
    new, reason = served(layer)
    assert reason is None and type(new) is kind and served(new) == (new, None)
    assert not any(isinstance(module, PackedLinear) for module in new.modules())
    for x in (torch.randn(64), torch.randn(2, 3, 64), torch.randn(20, 64)):
        assert torch.allclose(new(x), layer(x), atol=1e-4)
    assert torch.equal(new.to_dense(), layer.to_dense())
    assert new.parts().keys() == layer.parts().keys() and sum(new.parts().values()) == new.nbytes
    assert new.parts()["values"] == layer.parts()["values"]
    zeros = sum(m.zero.nbytes for m in new.modules() if isinstance(m, ServedLinear) and m.zero is not None)
    assert new.nbytes - zeros <= layer.nbytes <= new.nbytes  # zero points take a byte each; nothing else grows
    again = empty_layer(new.config(), torch.float32, "cpu")
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(x), new(x)) and again.config() == new.config()
    if hasattr(new, "packed"):
        back = new.packed().state_dict()
        assert all(torch.equal(tensor, back[key]) for key, tensor in layer.state_dict().items())


@pytest.mark.parametrize(
    "layer, reason",
    [
        (packed(5), "5 bits are not among 2, 3, 4, 8"),
        (packed(4, n_in=48, group=48), "the layer has 48 inputs, no multiple of 32"),
        (packed(4, n_in=96, group=48), "groups of 48 are no multiple of 32"),
        (sparse("4:8"), "4:8 sparse: the only sparse kernel is for 2:4"),
        (sparse("unstructured"), "unstructured sparse: the only sparse kernel is for 2:4"),
        (sparse(n_in=48), "the layer has 48 inputs, no multiple of 32"),
        (PackedLinear(values=torch.ones(24, 64)), "its values are neither quantised nor sparse"),
        (
            PackedLinear(
                codes=torch.ones(24, 64, dtype=torch.uint8),
                scale=torch.ones(24, 2),
                bits=4,
                mask=sparse().nonzero_mask(),
                pattern="2:4",
            ),
            "quantised and 2:4 sparse: no kernel reads both",
        ),
        (path(), "factor A: an ordinary matrix, which an ordinary product serves"),
    ],
)
def test_what_has_no_kernel_stays_and_says_why(layer: CompressedLayer, reason: str) -> None:
    assert served(layer) == (layer, reason)
    model = nn.Sequential(packed(), layer)
    report = serve(model, device="cuda")
    assert report.left == {"1": reason} and report.served == ["0"] and model[1] is layer
    assert str(report) == f"1 of 2 compressed layers are in the layout of the kernels\n1: {reason}"


def test_a_layer_served_in_part_is_named_on_both_sides() -> None:
    model = nn.Sequential(CompensatedLinear(packed(5), packed_path()))
    before = model(torch.ones(1, 64))
    report = serve(model, device="cuda")
    assert report.served == ["0"] and "5 bits" in report.left["0"]
    assert isinstance(model[0].base, PackedLinear) and isinstance(model[0].adapter.A, ServedLinear)
    assert torch.allclose(model(torch.ones(1, 64)), before, atol=1e-4)


def test_quantised_inputs_stay_quantised() -> None:
    from refimpl.core.layers import ActivationQuantizer

    layer = QuantizedInput(packed(), ActivationQuantizer(2, 3.0, -1.0))
    new, reason = served(layer)
    assert reason is None and isinstance(new, QuantizedInput) and isinstance(new.base, ServedLinear)
    assert torch.allclose(new(torch.ones(2, 64)), layer(torch.ones(2, 64)), atol=1e-4)


def test_one_layer_at_several_places_stays_one() -> None:
    shared = packed()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert serve(model, device="cuda").served == ["a", "b.0"]
    assert model["a"] is model["b"][0] and isinstance(model["a"], ServedLinear)


def test_the_packed_layers_are_gone_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from refimpl.core.files import serve as module

    model = nn.Sequential(*(packed() for _ in range(6)))
    watched = [weakref.ref(layer) for layer in model]
    alive = []

    def count(layer: CompressedLayer, change: Any) -> Any:
        alive.append(sum(ref() is not None for ref in watched))
        return served(layer, change)

    monkeypatch.setattr(module, "served", count)
    serve(model, device="cuda")
    assert alive == [6, 5, 4, 3, 2, 1] or alive == [6, 6, 5, 4, 3, 2]


def test_a_model_that_is_not_compressed_is_refused(tiny_llama: Factory) -> None:
    with pytest.raises(OptionError, match="LlamaForCausalLM: it has no compressed layer; call compress first"):
        serve(tiny_llama())


# ---- whole models


def logits(model: Any, tokens: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 8, seed=9)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_architecture_and_saving(layout, dtype, tokens, request, tmp_path, state, same) -> None:
    """Half of each block 2:4 sparse, half quantised, all repaired."""
    model = request.getfixturevalue(f"tiny_{layout}")()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    reference = copy.deepcopy(model)
    compress(model, SparseGPT("2:4"), tokens(), targets="mlp", progress=False)
    compress(model, RTN(4, 32), targets="attn", progress=False)
    compress(model, EoRA(4), tokens(), reference=reference, progress=False)
    before = logits(model, tokens)
    report = serve(model, device="cuda", progress=False)
    assert report.model is model and not report.left
    assert len(report.served) == len(find_sites(model))
    assert torch.allclose(logits(model, tokens), before, atol=1e-4 if dtype == torch.float32 else 0.06)
    kinds = {type(site.module) for site in find_sites(model)}
    assert kinds == {ServedCompensatedLinear, CompensatedLinear}
    again = load(save(model, tmp_path))
    assert same(state(again), state(model)) and torch.equal(logits(again, tokens), logits(model, tokens))
    assert serve(again, device="cuda", progress=False).served == report.served  # a second time changes nothing
    assert same(state(again), state(model))
    again.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)


def test_loading_in_another_dtype(tiny_llama: Factory, tokens, tmp_path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    compress(model, Magnitude("2:4"), targets="mlp", progress=False)
    compress(model, RTN(4, 32), targets="attn", progress=False)
    serve(model, device="cuda", progress=False)
    again = load(save(model, tmp_path), dtype=torch.float32)
    assert {site.weight.dtype for site in find_sites(again)} == {torch.float32}
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.allclose(logits(again, tokens), logits(model, tokens).float(), atol=0.05)


def test_repair_after_serving_and_back_to_files(tiny_llama: Factory, tokens) -> None:
    model = tiny_llama()
    reference = copy.deepcopy(model)
    compress(model, RTN(3, 32), progress=False)
    twin = copy.deepcopy(model)
    serve(model, device="cuda", progress=False)
    for one in (model, twin):
        compress(one, EoRA(4), tokens(), reference=reference, progress=False)
    assert torch.allclose(logits(model, tokens), logits(twin, tokens), atol=1e-4)
    assert serve(model, device="cuda", progress=False).left == {}
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, ServedCompensatedLinear)
    assert torch.equal(layer.packed().to_dense(), layer.to_dense())


# ---- on a processor


def clocked(monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> list[PackedLinear]:
    """Let forms take these times ("int4" for any name with it), and list the layers that are timed."""
    timed = []

    def found(layer: PackedLinear) -> dict[str, float]:
        timed.append(layer)
        known = {PACKED: "packed", Int4.name: "int4", Half.name: "half", Dense.name: "dense"}
        names = [PACKED, *(name for name, form in FORMS.items() if form.fits(layer))]
        return {name: milliseconds.get(known.get(name, ""), 9.0) for name in names}

    monkeypatch.setattr("refimpl.core.files.serve.measure", found)
    return timed


def dense(layer: PackedLinear) -> int:
    return layer.in_features * layer.out_features * layer.dtype.itemsize


@pytest.mark.parametrize(
    "times, form",
    [
        ({"packed": 5.0, "int4": 1.0, "half": 2.0, "dense": 3.0}, Int4.name),
        ({"packed": 5.0, "int4": 4.0, "half": 2.0, "dense": 3.0}, Half.name),
        ({"packed": 5.0, "int4": 4.0, "half": 3.5, "dense": 4.0}, Dense.name),  # not worth the rounding
        ({"packed": 1.0, "int4": 4.0, "half": 2.0, "dense": 3.0}, None),
        ({"packed": 2.5, "int4": 4.0, "half": 2.0, "dense": 3.0}, Half.name),
    ],
)
def test_the_fastest_form_is_taken_and_none_that_is_slower(monkeypatch, times, form) -> None:
    clocked(monkeypatch, **times)
    layer = packed(n_out=48)
    model = nn.Sequential(layer)
    report = serve(model)
    if form is None:
        assert model[0] is layer and not report.served and not report.chosen
        assert report.left == {"0": "no form that PyTorch has is faster on this processor"}
        return
    assert type(model[0]) is ProcessorLinear and model[0].form.name == form == report.chosen["0"].form
    assert report.served == ["0"] and not report.left
    assert report.chosen["0"].nbytes == model[0].form.nbytes <= dense(layer)
    name = {Int4.name: "int4", Half.name: "half", Dense.name: "dense"}[form]
    gain = [f"{times[other] / times[name]:.1f}" for other in ("dense", "packed")]
    assert str(report) == (
        f"1 of 1 compressed layers are in the layout of the processor (1 {form}); for one token, they are {gain[0]} times "
        f"as fast as unpacked weights and {gain[1]} times as fast as packed ones; the copies take 0.0 MB"
    )


def test_copies_stay_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(monkeypatch, packed=5.0, int4=2.0, half=1.0, dense=3.0)
    kinds = [ProcessorLinear.of(packed(n_out=48), name).form.nbytes for name in (Half.name, Int4.name)]
    for memory, forms in ((None, [Half.name] * 3), (sum(kinds), [Half.name, Int4.name, None]), (0, [None] * 3)):
        model = nn.Sequential(*(packed(n_out=48) for _ in forms))
        report = serve(model, memory=memory)
        assert [getattr(getattr(layer, "form", None), "name", None) for layer in model] == forms
        assert [report.chosen[str(i)].form if str(i) in report.chosen else None for i in range(3)] == forms
        assert report.left == {
            str(i): "memory= has no room left for a copy of it" for i, form in enumerate(forms) if form is None
        }
        assert memory is None or sum(choice.nbytes for choice in report.chosen.values()) <= memory
    assert len(timed) == 3  # once for each model: its layers are of one kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_architecture_on_a_processor(layout, dtype, tokens, request, tmp_path, state, same, monkeypatch) -> None:
    clocked(monkeypatch, packed=5.0, int4=1.0, half=2.0, dense=3.0)  # a clock of this machine could say otherwise
    model = request.getfixturevalue(f"tiny_{layout}")()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    reference = copy.deepcopy(model)
    compress(model, SparseGPT("2:4"), tokens(), targets="mlp", progress=False)
    compress(model, RTN(4, 32), targets="attn", progress=False)
    compress(model, EoRA(32, adapter_bits=4), tokens(), reference=reference, progress=False)
    before, files = logits(model, tokens), state(model)
    report = serve(model, progress=False)
    assert len(report.served) == len(find_sites(model)) and not report.left
    assert {type(module) for module in model.modules() if isinstance(module, PackedLinear)} == {ProcessorLinear}
    assert torch.allclose(logits(model, tokens), before, atol=0.02 if dtype == torch.float32 else 0.1)
    assert same(state(model), files)
    once = logits(model, tokens)
    assert serve(model, progress=False).chosen == report.chosen and torch.equal(logits(model, tokens), once)
    again = load(save(model, tmp_path))
    assert same(state(again), files) and torch.equal(logits(again, tokens), before)
    model.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)


def test_from_kernels_to_a_processor_and_back(tiny_llama: Factory, tokens, monkeypatch) -> None:
    clocked(monkeypatch, packed=5.0, dense=1.0)
    model = tiny_llama()
    reference = copy.deepcopy(model)
    compress(model, RTN(3, 32), progress=False)
    compress(model, EoRA(4), tokens(), reference=reference, targets="mlp", progress=False)
    before = logits(model, tokens)
    serve(model, device="cuda", progress=False)
    assert any(isinstance(module, ServedCompensatedLinear) for module in model.modules())
    report = serve(model, progress=False)
    assert len(report.served) == len(report.chosen) == len(find_sites(model))
    assert not any(isinstance(module, (ServedLinear, ServedCompensatedLinear)) for module in model.modules())
    assert torch.equal(logits(model, tokens), before)  # unpacked once: the packed layers to the last bit
    assert not serve(model, device="cuda", progress=False).chosen
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    lonely = nn.Sequential(packed(5))
    serve(lonely)
    serve(lonely, device="cuda")  # no kernel: without the copy for the processor, too
    assert type(lonely[0]) is PackedLinear


def test_what_has_no_form_stays_and_says_why() -> None:
    model = nn.Sequential(packed(), PackedConv2d(packed(n_in=36, group=36), Geometry.of(nn.Conv2d(4, 24, 3))), path())
    report = serve(model)
    assert report.served == ["0"]
    assert report.left == {
        "1": "PackedConv2d: there is no other layout for it",
        "2": "factor A: an ordinary matrix, which an ordinary product serves",
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "gpu"}, "device='gpu': use 'cpu' or 'cuda', or leave it out"),
        ({"memory": -1}, "memory=-1: give a number of bytes, or None for no limit"),
    ],
)
def test_serving_refuses(options, message) -> None:
    with pytest.raises(OptionError, match=message):
        serve(nn.Sequential(packed()), **options)


def test_a_model_elsewhere_is_not_served_for_the_processor() -> None:
    with pytest.raises(OptionError, match="device='cpu': the model is on 'meta'; move it first"):
        serve(nn.Sequential(packed()).to("meta"), device="cpu")


# ---- on a GPU that is not there


class _Calls(TorchDispatchMode):
    """Remembers our operators and refuses whatever leaves the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "refimpl":
            self.ours.append(func._opname)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.numel() > 1:
                assert tensor.device.type == "cuda", f"{func} put a tensor on {tensor.device}"
        return out


@pytest.mark.parametrize(
    "name, op", [("4 bits", "quant_matmul"), ("2:4", "sparse_matvec"), ("repaired", "quant_lowrank_matmul")]
)
def test_layers_on_a_gpu_call_their_operator(name: str, op: str, fake_cuda) -> None:
    layer = served(LAYERS[name][0]())[0]
    with fake_cuda() as place:
        place(layer)
        x = torch.empty(2, 3, 64, device="cuda")
        with _Calls() as calls:
            y = layer(x)
        assert calls.ours == [op] and y.shape == (2, 3, 24) and y.device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whole_model_on_a_gpu(dtype: torch.dtype, tiny_llama: Factory, tokens, fake_cuda) -> None:
    model = tiny_llama(num_hidden_layers=1).to(dtype)
    reference = copy.deepcopy(model)
    compress(model, Magnitude("2:4"), targets="mlp", progress=False)
    compress(model, GPTQ(4, 32), tokens(), targets="attn", progress=False)
    compress(model, EoRA(4), tokens(), reference=reference, targets="q_proj|k_proj", progress=False)
    serve(model, device="cuda", progress=False)
    ids = tokens(1, 8)
    with fake_cuda() as place, torch.no_grad():
        place(model)
        ids = torch.zeros(1, 8, dtype=torch.int64, device="cuda")
        with _Calls() as calls:
            out = model(ids, use_cache=False).logits
        assert out.device.type == "cuda" and out.dtype == dtype
    assert calls.ours == [*(2 * ["quant_lowrank_matmul"]), *(2 * ["quant_matmul"]), *(3 * ["sparse_matvec"])]


# ---- a real model


def test_smollm2_repaired_and_served(smollm2_folder) -> None:
    """The first block of SmolLM2 computes the same for one token and for many."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    reference = copy.deepcopy(model)
    ids = torch.randint(0, 40000, (4, 64), generator=torch.Generator().manual_seed(0))
    compress(model, GPTQ(4, 64), ids, progress=False)
    compress(model, EoRA(16), ids, reference=reference, progress=False)
    with torch.no_grad():
        before = [model.model(ids[:1, :n]).last_hidden_state for n in (1, 40)]
        report = serve(model, device="cuda", progress=False)
        after = [model.model(ids[:1, :n]).last_hidden_state for n in (1, 40)]
    assert len(report.served) == 7 and not report.left
    for ours, theirs in zip(after, before, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().mean()))
