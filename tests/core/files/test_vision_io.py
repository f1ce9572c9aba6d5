"""Saving and loading models without decoder blocks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ResNetConfig

from refimpl import GPTQ, METHODS, RTN, EoRA, Magnitude, compress, load, plan, save
from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.compress.fold import fold_batch_norms
from refimpl.core.compress.sites import find_sites
from refimpl.core.errors import CheckpointError
from refimpl.core.layers import PackedConv2d, QuantizedInput

Factory = Callable[..., Any]
KINDS = ["tiny_resnet", "tiny_vit"]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images.to(next(model.parameters()).dtype)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "tiny_convnext"])
def test_saved_models_come_back_exactly(kind, folded, dtype, images, request, state, same, tmp_path) -> None:
    model = request.getfixturevalue(kind)().to(dtype)
    if folded:
        fold_batch_norms(model, images(2).to(dtype))
    reference = copy.deepcopy(model)
    dense = None if kind != "tiny_convnext" else "pointwise|pwconv|classifier|embeddings"
    steps = [None, Magnitude("unstructured", 0.4), RTN(3, None), EoRA(4), QuantizeActivations(8)]
    for number, method in enumerate(steps):
        if method is not None:
            compress(model, method, images(8), reference=reference, targets=dense, progress=False)
        again = load(save(model, tmp_path / str(number)))
        assert type(again) is type(model) and not again.training
        assert same(state(again), state(model))
        assert torch.equal(logits(again, images(4)), logits(model, images(4)))
        kinds = [type(module) for module in again.modules()]
        assert kinds == [type(module) for module in model.modules()]
    assert any(isinstance(m, PackedConv2d) and isinstance(m.base, QuantizedInput) for m in again.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(METHODS))
def test_result_of_every_method_comes_back(name, kind, whole_pipeline, images, request, state, same, tmp_path) -> None:
    model = request.getfixturevalue(kind)()
    reference = copy.deepcopy(model)
    for method in whole_pipeline(name):
        compress(model, method, images(60), reference=reference, progress=False)
    assert same(state(load(save(model, tmp_path))), state(model))


def test_norms_that_were_put_back_come_back(tiny_resnet: Factory, images, state, same, tmp_path) -> None:
    model = tiny_resnet()
    folded = fold_batch_norms(model, images(2))
    compress(model, GPTQ(4, None), images(8), targets="stages.1", progress=False)
    folded.reinsert(model)
    again = load(save(model, tmp_path))
    assert same(state(again), state(model)) and torch.equal(logits(again, images(4)), logits(model, images(4)))
    folded.refold(again), folded.refold(model)
    assert torch.equal(logits(again, images(4)), logits(model, images(4)))


def test_a_loaded_model_can_be_compressed_further(tiny_resnet: Factory, images, tmp_path) -> None:
    dense = tiny_resnet()
    model = copy.deepcopy(dense)
    compress(model, RTN(3, None), progress=False)
    again = load(save(model, tmp_path))
    for m in (model, again):
        compress(m, EoRA(4), images(8), reference=dense, progress=False)
        compress(m, QuantizeActivations(8, "mse"), images(8), progress=False)
    assert torch.equal(logits(model, images(4)), logits(again, images(4)))
    assert plan(tmp_path, EoRA(4), shape=(1, 16, 16)).bytes > 0


def test_load_in_another_dtype(tiny_vit: Factory, images, tmp_path) -> None:
    model = tiny_vit().bfloat16()
    compress(model, RTN(4, None), progress=False)
    compress(model, QuantizeActivations(8), images(8), progress=False)
    again = load(save(model, tmp_path), dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for ours, theirs in zip(find_sites(again), find_sites(model), strict=True):
        assert ours.weight.dtype == torch.float32
        assert torch.equal(ours.module.quantizer.range, theirs.module.quantizer.range)
    assert torch.allclose(logits(again, images(4)), logits(model, images(4)).float(), atol=0.05)


def test_large_models_are_saved_whole(tiny_vit: Factory, state, same, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("refimpl.core.files.io._SINGLE_FILE_LIMIT", 1000)
    model = tiny_vit()
    assert same(state(load(save(model, tmp_path))), state(model))


@pytest.mark.parametrize("folded", [False, True])
def test_from_pretrained_and_save_pretrained(folded, tiny_resnet: Factory, images, tmp_path) -> None:
    model = tiny_resnet()
    if folded:
        fold_batch_norms(model, images())
    compress(model, RTN(4, None), progress=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images()).logits, model(images()).logits)


def test_plain_modules_are_refused_before_anything_is_written(inverted_residuals: Factory, tmp_path) -> None:
    model = inverted_residuals()
    compress(model, RTN(4, None), progress=False)
    with pytest.raises(
        CheckpointError, match=r"model=InvertedResiduals: it has no transformers config.*state_dict\(\)"
    ):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_remedy_for_plain_modules_works(inverted_residuals: Factory, images, tmp_path) -> None:
    model = inverted_residuals()
    compress(model, RTN(4, None), progress=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = inverted_residuals(seed=5)
    compress(again, RTN(4, None), progress=False)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images(3)), model(images(3)))


def test_a_configuration_that_names_no_class(tiny_resnet: Factory, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="ResNetConfig: no causal language model, and config.architectures"):
        plan(ResNetConfig(), RTN(4, None))
    save(tiny_resnet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in (["NoSuchModel"], None, []):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": value}))
        with pytest.raises(CheckpointError, match="no causal language model, and config.architectures"):
            load(tmp_path)


@pytest.mark.parametrize("how", ["tensor", "extra", "identity"])
def test_damaged_folders_are_refused(how: str, tiny_resnet: Factory, images, tmp_path) -> None:
    model = tiny_resnet()
    fold_batch_norms(model, images(2))
    compress(model, RTN(4, None), progress=False)
    save(model, tmp_path)
    file, manifest = tmp_path / "weights.safetensors", tmp_path / "refimpl.json"
    if how == "identity":
        value = json.loads(manifest.read_text())
        value["identities"] = value["identities"][1:]
        manifest.write_text(json.dumps(value))
        message = "lacks 'resnet.embedder.embedder.normalization"
    else:
        tensors = load_file(file)
        if how == "tensor":
            del tensors["resnet.embedder.embedder.convolution.base.scale"]
            message = "lacks 'resnet.embedder.embedder.convolution.base.scale'"
        else:
            tensors["resnet.embedder.embedder.convolution.base.shift"] = torch.zeros(2)
            message = "a tensor of no use"
        save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
