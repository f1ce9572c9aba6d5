"""Cached inputs, ranges, and what follows a site."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refimpl import GPTQ, RTN, EoRA, compress
from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.compress.fold import fold_batch_norms
from refimpl.core.compress.inputs import InputSamples, SampleCollector, collect
from refimpl.core.compress.sites import find_sites
from refimpl.core.compress.whole import find_stages, run
from refimpl.core.errors import CalibrationError
from refimpl.core.layers import QuantizedInput

Factory = Callable[..., Any]


class Keep(GPTQ):
    """Rounds coarsely, and keeps what it was given."""

    statistics = frozenset({"inputs"})
    seen: dict[str, InputSamples]

    def compress_site(self, site, stats, original):
        self.seen[site.name] = stats
        return RTN(2, self.group_size).compress_site(site, None, None)


def keep(group: int | None = None) -> Keep:
    method = Keep(2, group)
    object.__setattr__(method, "seen", {})
    return method


def calls(model: nn.Module, names: list[str], samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of modules, by torch hooks."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, y, name=name: seen.__setitem__(name, (args[0].clone(), y.clone()))
        )
        for name in names
    ]
    with torch.no_grad():
        run(model, samples)
    for handle in handles:
        handle.remove()
    return seen


# ---- whole models


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", ["tiny_resnet", "tiny_vit"])
def test_inputs_and_outputs_of_a_whole_model(kind: str, order: str, images, request) -> None:
    """Parallel: both from the float network. Sequential: inputs from the compressed prefix, outputs still float."""
    dense, pixels = request.getfixturevalue(kind)(), images(7)
    model, method = copy.deepcopy(dense), keep()
    report = compress(model, method, pixels, order=order, batch_size=3, progress=False)
    names = [site.name for site in find_sites(dense)]
    assert list(method.seen) == [e.name for e in report.sites] and set(method.seen) == set(names)
    floats = calls(dense, names, pixels)
    mirror = copy.deepcopy(dense)
    for stage in find_stages(dense, pixels, find_sites(dense)):
        here = calls(mirror if order == "sequential" else dense, [s.name for s in stage.sites], pixels)
        for site in stage.sites:
            samples = method.seen[site.name]
            assert torch.allclose(samples.x, here[site.name][0], atol=1e-4), site.name
            assert torch.allclose(samples.y, floats[site.name][1], atol=1e-4), site.name
            flat = here[site.name][0].flatten(1)
            assert samples.low == pytest.approx(min(float(flat.amin(1).mean()), 0), abs=1e-4)
            assert samples.high == pytest.approx(max(float(flat.amax(1).mean()), 0), abs=1e-4)
            assert samples.x.dtype == torch.float32 and samples.tokens == 7
            if order == "parallel":
                assert torch.allclose(site.apply(samples.x, site.weight, site.bias), samples.y, atol=1e-4)
            mirrored = next(s for s in find_sites(mirror) if s.name == site.name)
            compressed = next(s for s in find_sites(model) if s.name == site.name)
            mirrored.replace(mirrored.dense_module(compressed.weight))
            # the error that is reported, from its definition
            got = compressed.placed(samples.x)
            error = float((got - samples.y).square().sum() / samples.y.square().sum())
            assert next(e.error for e in report.sites if e.name == site.name) == pytest.approx(error, rel=1e-4)


def test_shared_inputs_are_kept_once(tiny_vit: Factory, images) -> None:
    method = keep()
    compress(tiny_vit(), method, images(4), order="parallel", progress=False)
    q, k, v = (method.seen[f"vit.layers.0.attention.{name}_proj"] for name in "qkv")
    assert q.x is k.x is v.x and q.y is not k.y


def test_samples_keep_the_models_dtype(tiny_vit: Factory, images) -> None:
    method = keep()
    compress(tiny_vit().bfloat16(), method, images(4), progress=False)
    for samples in method.seen.values():
        assert samples.x.dtype == samples.y.dtype == torch.bfloat16
        assert samples.low.dtype == samples.high.dtype == torch.float32


def test_with_a_reference_the_outputs_are_its_own(tiny_resnet: Factory, images) -> None:
    class Repair(EoRA):
        statistics = frozenset({"inputs"})

        def compress_site(self, site, stats, original):
            error = site.apply(stats.x, original, site.bias) - stats.y
            assert error.abs().max() < 1e-3 * stats.y.abs().max()
            return site.module

        def layer_config(self, site):
            return site.module.config()

    dense = tiny_resnet()
    model = copy.deepcopy(dense)
    compress(model, RTN(2, None), progress=False)
    report = compress(model, Repair(2), images(5), reference=dense, order="parallel", progress=False)
    assert len(report.sites) == len(find_sites(dense))


def test_in_place_changes_do_not_reach_what_was_kept(images) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    with collect(find_sites(model), {"inputs"}) as stats, torch.no_grad():
        model(images(3))
    for site in find_sites(model):
        samples = stats[site.name]
        assert samples.y.min() < 0 and samples.rectified
        assert torch.allclose(site.apply(samples.x, site.weight, site.bias), samples.y, atol=1e-6)


def test_maps_of_several_sizes_cannot_be_kept_together() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).sum((2, 3)) + self.head(F.avg_pool2d(x, 2)).sum((2, 3))

    x = torch.randn(3, 1, 8, 8)
    with pytest.raises(CalibrationError, match=r"'head' is called with samples of different shapes.*targets="):
        compress(Pyramid(), keep(), x, progress=False)
    compress(Pyramid(), GPTQ(4, None), x, progress=False)  # sums do not mind
    compress(Pyramid(), QuantizeActivations(8), x, progress=False)


# ---- decoders


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_inputs_inside_decoder_blocks(layout: str, order: str, tokens, request) -> None:
    """Inside a block the original weights act, on what the blocks before it give; outputs follow from inputs."""
    dense, ids = request.getfixturevalue(f"tiny_{layout}")(), tokens(5)
    model, method = copy.deepcopy(dense), keep(32)
    report = compress(model, method, ids, order=order, batch_size=2, progress=False)
    assert all(entry.error > 0 for entry in report.sites)
    mirror = copy.deepcopy(dense)
    for index in (0, 1):
        names = [site.name for site in find_sites(dense) if site.block == index]
        here = calls(mirror, names, ids)
        for name in names:
            samples = method.seen[name]
            assert samples.x.shape == here[name][0].shape and not samples.rectified
            assert torch.allclose(samples.x, here[name][0], atol=1e-4), name
            assert torch.allclose(samples.y, here[name][1], atol=1e-4), name
        if order == "sequential":
            compressed = {site.name: site for site in find_sites(model)}
            for site in find_sites(mirror):
                if site.block == index:
                    site.replace(site.dense_module(compressed[site.name].weight.contiguous()))


def test_experts_without_tokens_have_empty_samples(tiny_mixtral: Factory, tokens) -> None:
    model, method = tiny_mixtral(num_local_experts=8, num_experts_per_tok=1), keep(32)
    compress(model, method, tokens(1, 4), progress=False)
    sizes = {name: len(samples.x) for name, samples in method.seen.items() if "down_proj" in name}
    assert 0 in sizes.values() and max(sizes.values()) > 0
    idle = next(samples for name, samples in method.seen.items() if "down_proj" in name and not len(samples.x))
    assert idle.low == idle.high == 0
    for clip in ("minmax", "mse"):
        model = tiny_mixtral(num_local_experts=8, num_experts_per_tok=1)
        compress(model, QuantizeActivations(4, clip), tokens(1, 4), progress=False)
        with torch.no_grad():
            assert torch.isfinite(model(tokens(2, 9)).logits).all()


# ---- what follows a site

RELU: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "module": (True, nn.ReLU()),
    "in place": (True, nn.ReLU(inplace=True)),
    "function": (True, F.relu),
    "torch": (True, torch.relu),
    "method": (True, lambda y: y.relu()),
    "method in place, then more": (True, lambda y: y.relu_().add_(1)),
    "clamp": (True, lambda y: y.clamp(min=0)),
    "relu6": (True, nn.ReLU6()),
    "behind an identity": (True, nn.Sequential(nn.Identity(), nn.Dropout(0.5).eval(), nn.ReLU())),
    "flattened": (True, lambda y: F.relu(y.flatten(1))),
    "twice": (True, lambda y: F.relu(y) + torch.relu(y)),
    "nothing": (False, lambda y: y),
    "other activation": (False, F.gelu),
    "leaky": (False, F.leaky_relu),
    "clamp elsewhere": (False, lambda y: y.clamp(min=-1)),
    "added first": (False, lambda y: F.relu(y + 1)),
    "added in place first": (False, lambda y: y.add_(1).relu()),
    "used beside it": (False, lambda y: F.relu(y) + y),
    "batch norm between": (False, nn.Sequential(nn.BatchNorm2d(4).eval(), nn.ReLU())),
    "pooled first": (False, lambda y: F.relu(F.avg_pool2d(y, 2))),
}


@pytest.mark.parametrize("case", list(RELU))
def test_rectified_is_read_off_the_data_flow(case: str, images) -> None:
    rectified, rest = RELU[case]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return rest(self.conv(x))

    model = Model()
    for dtype in (torch.float32, torch.bfloat16):
        with SampleCollector(find_sites(model)) as collector, torch.no_grad():
            model(images(4).to(dtype)) if dtype == torch.float32 else model.to(dtype)(images(4).to(dtype))
        assert collector.stats["conv"].rectified == rectified
        model.float()


def test_rectified_in_a_residual_network(tiny_resnet: Factory, images) -> None:
    """With batch norms folded: the first convolution of a block is, the second is added to the shortcut first."""
    model = tiny_resnet()
    fold_batch_norms(model, images(2))
    for order in ("sequential", "parallel"):
        method = keep()
        compress(copy.deepcopy(model), method, images(4), order=order, progress=False)
        found = {name.replace("resnet.encoder.stages.", ""): s.rectified for name, s in method.seen.items()}
        assert found == {
            "resnet.embedder.embedder.convolution": True,
            "0.layers.0.layer.0.convolution": True,
            "0.layers.0.layer.1.convolution": False,
            "1.layers.0.layer.0.convolution": True,
            "1.layers.0.layer.1.convolution": False,
            "1.layers.0.shortcut.convolution": False,
            "1.layers.1.layer.0.convolution": True,
            "1.layers.1.layer.1.convolution": False,
            "classifier.1": False,
        }


def test_rectified_behind_unfolded_batch_norms_is_false(tiny_resnet: Factory, images) -> None:
    """What a batch norm shifts is not cut at the zero of the convolution."""
    method = keep()
    compress(tiny_resnet(), method, images(4), progress=False)
    assert not any(samples.rectified for samples in method.seen.values())


def test_compressed_layers_are_followed_too(tiny_resnet: Factory, images) -> None:
    model = tiny_resnet()
    fold_batch_norms(model, images(2))
    compress(model, RTN(4, None), progress=False)
    sites = find_sites(model)
    with SampleCollector(sites) as collector, torch.no_grad():
        model(images(3))
    assert sum(s.rectified for s in collector.stats.values()) == 4
    compress(model, QuantizeActivations(4), images(3), progress=False)
    assert all(isinstance(site.module, QuantizedInput) for site in find_sites(model))
