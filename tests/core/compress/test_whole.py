"""Models without decoder blocks: every method on convolutional networks and vision transformers, orders, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refimpl import GPTQ, METHODS, RTN, EoRA, LoftQ, Magnitude, PlainSVD, SparseGPT, Wanda, compress, plan
from refimpl.baselines.activations import QuantizeActivations
from refimpl.baselines.pruning import Pruner
from refimpl.core.compress.fold import fold_batch_norms
from refimpl.core.compress.sites import find_sites, has_blocks, skipped_modules
from refimpl.core.compress.whole import find_stages
from refimpl.core.errors import CalibrationError, CheckpointError, OptionError
from refimpl.core.layers import CompressedLayer, PackedConv2d
from refimpl.lab.measure.metrics import footprint

Factory = Callable[..., Any]
MODELS = ["tiny_resnet", "tiny_vit"]
SHAPE = (1, 16, 16)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def outside(model: nn.Module) -> dict[str, Tensor]:
    prefix = tuple(site.name + "." for site in find_sites(model))
    return {n: t.clone() for n, t in model.state_dict().items() if not n.startswith(prefix)}


# ---- every method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_on_every_model(name, kind, dtype, whole_pipeline, images, request, same) -> None:
    model = request.getfixturevalue(kind)().to(dtype)
    reference = copy.deepcopy(model)
    untouched = outside(model)
    for step, method in enumerate(whole_pipeline(name)):
        order = "sequential" if step % 2 == 0 else "parallel"
        planned = plan(model, method, sequences=60, shape=SHAPE, order=order)
        report = compress(
            model, method, images(60, seed=step), reference=reference, batch_size=25, order=order, progress=False
        )
        assert report.model is model
        assert {site.name for site in report.sites} == {row["site"] for row in planned.sites}
        for site, row in zip(find_sites(model), planned.sites, strict=True):
            assert isinstance(site.module, CompressedLayer), site.name
            assert site.module.config() == row["layer"]
            assert isinstance(site.placed, PackedConv2d) == (site.geometry is not None)
            assert site.weight.dtype == dtype and torch.isfinite(site.weight).all()
        real = footprint(model)
        assert planned.bits_per_weight == pytest.approx(real.bits_per_weight, rel=1e-12)
        assert planned.bytes == real.bytes
        if method.statistics & {"gram", "inputs"}:
            assert all(math.isfinite(site.error) and site.error >= 0 for site in report.sites)
    assert same(outside(model), untouched) and not model.training
    got = logits(model, images(3, seed=9).to(dtype))
    assert torch.isfinite(got).all() and got.dtype == dtype


# without the depthwise convolutions, and for 2:4 without those of one channel
MAPS = {
    "tiny_resnet": "encoder|classifier",
    "tiny_vit": ".",
    "tiny_convnext": "embeddings|pwconv|classifier",
    "inverted_residuals": "expand|project|head",
}
# every kind of layer once: a fake operation takes as long as a large one, and some methods go column by column
NARROW: dict[str, dict[str, Any]] = {
    "tiny_resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
    "tiny_vit": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    "tiny_convnext": {"hidden_sizes": [4, 8]},
    "inverted_residuals": {"width": 4},
}


@pytest.mark.parametrize("kind", list(MAPS))
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_stays_on_its_device(name, kind, whole_pipeline, untrained, images, fake_cuda, request) -> None:
    model, reference = (request.getfixturevalue(kind)(**NARROW[kind]) for _ in range(2))
    last = untrained(whole_pipeline(name)[-1])
    if isinstance(last, Pruner):  # how many weights an unstructured mask keeps is a value, which a fake tensor lacks
        last = type(last)("2:4")
    pixels = images(60)
    with fake_cuda() as place:
        place(model), place(reference)
        for method in [RTN(3, None), last] if last.uses_reference else [last]:
            compress(model, method, pixels, reference=reference, targets=MAPS[kind], progress=False)
        assert sum(isinstance(m, CompressedLayer) for m in model.modules()) >= 4
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
        output = model(torch.empty(2, 1, 16, 16, device="cuda"))
        assert getattr(output, "logits", output).device.type == "cuda"


@pytest.mark.parametrize("kind", MODELS)
def test_more_bits_are_closer(kind: str, images, request) -> None:
    dense = request.getfixturevalue(kind)()
    expected = logits(dense, images(20, seed=5))
    errors = []
    for method in (GPTQ(2, None), GPTQ(4, None), GPTQ(8, None)):
        model = copy.deepcopy(dense)
        compress(model, method, images(40), progress=False)
        errors.append(float((logits(model, images(20, seed=5)) - expected).norm() / expected.norm()))
    assert errors[0] > 3 * errors[1] and errors[1] > 3 * errors[2] and errors[2] < 0.02


@pytest.mark.parametrize("kind", MODELS)
def test_error_compensation_pays_on_what_it_saw(kind: str, images, request) -> None:
    """GPTQ's output error at each site is below that of rounding, the repair's below that of what it repairs."""
    dense = request.getfixturevalue(kind)()
    pixels = images(40)
    model = copy.deepcopy(dense)
    report = compress(model, GPTQ(3, None), pixels, order="parallel", progress=False)
    grams: dict[str, Tensor] = {}

    class Spy(GPTQ):
        def compress_site(self, site, stats, original):
            grams[site.name] = stats.gram.clone()
            return super().compress_site(site, stats, original)

    compress(copy.deepcopy(dense), Spy(3, None), pixels, order="parallel", progress=False)
    rounded = copy.deepcopy(dense)
    compress(rounded, RTN(3, None), progress=False)
    better = 0
    for site, plain, entry in zip(find_sites(dense), find_sites(rounded), report.sites, strict=True):
        entry = next(e for e in report.sites if e.name == site.name)
        W, D, G = site.weight, site.weight - plain.weight, grams[site.name]
        better += entry.error <= float((D @ G * D).sum() / (W @ G * W).sum()) + 1e-9
    assert better >= 0.8 * len(report.sites)
    repaired = compress(model, EoRA(4), pixels, reference=dense, order="parallel", progress=False)
    assert all(entry.error < entry.error_before for entry in repaired.sites)


# ---- what each site sees


def rows_by_hand(model: nn.Module, name: str, pixels: Tensor) -> Tensor:
    """The inputs of a site as rows, from a hook and torch's own unfold."""
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, pixels)
    handle.remove()
    x = torch.cat(seen)
    if x.dim() == 4 and hasattr(layer, "kernel_size"):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_a_site_sees(kind: str, order: str, images, request) -> None:
    """Sequential: inputs through all sites that ran before it, compressed. Parallel: those of the original model."""
    dense = request.getfixturevalue(kind)()
    model, pixels = copy.deepcopy(dense), images(5)
    grams: dict[str, Tensor] = {}

    class Spy(GPTQ):
        def compress_site(self, site, stats, original):
            grams[site.name] = stats.gram.clone()
            assert stats.norm.shape == (site.in_features,)
            return RTN(2, None).compress_site(site, None, None)

    compress(model, Spy(2, None), pixels, order=order, batch_size=2, progress=False)
    stages = find_stages(dense, pixels, find_sites(dense))
    mirror = copy.deepcopy(dense)
    sites = {site.name: site for site in find_sites(mirror)}
    for stage in stages:
        for site in stage.sites:
            X = rows_by_hand(mirror if order == "sequential" else dense, site.name, pixels)
            expected = X.T @ X
            close = torch.allclose(grams[site.name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            assert close, site.name
        for site in stage.sites:  # the mirror keeps torch modules, with the weights that were rounded
            rounded = {s.name: s for s in find_sites(model)}[site.name].weight
            sites[site.name].replace(sites[site.name].dense_module(rounded))
    assert len(grams) == len(find_sites(dense))


def test_stages_follow_the_calls_and_share_inputs(tiny_resnet: Factory, tiny_vit: Factory, images) -> None:
    model = tiny_vit()
    stages = [[s.attribute for s in stage.sites] for stage in find_stages(model, images(1), find_sites(model))]
    assert ["q_proj", "k_proj", "v_proj"] in stages and len(stages) == len(find_sites(model)) - 2 * 2
    assert stages[-1] == ["classifier"]
    model = tiny_resnet()
    names = [
        [s.name.replace("resnet.encoder.", "") for s in stage.sites]
        for stage in find_stages(model, images(1), find_sites(model))
    ]
    # the shortcut comes first among the modules, runs last, and has the input of the first convolution
    assert ["stages.1.layers.0.layer.0.convolution", "stages.1.layers.0.shortcut.convolution"] in names


def test_an_input_changed_in_place_is_another_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.first(x)
            return y + self.second(x.relu_())

    model = Two()
    assert len(find_stages(model, torch.randn(2, 4), find_sites(model))) == 2


def test_a_layer_that_runs_twice_counts_twice(images) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = (nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.again(self.again(self.first(x)).relu()))

    tokens = {}

    class Spy(GPTQ):
        def compress_site(self, site, stats, original):
            tokens[site.name] = stats.tokens
            return super().compress_site(site, stats, original)

    for order in ("sequential", "parallel"):
        compress(Twice(), Spy(4, None), images(3), order=order, batch_size=2, progress=False)
        assert tokens == {"first": 3 * 14**2, "again": 2 * 3 * 14**2, "last": 3 * 14**2}


def test_batch_size_does_not_matter(tiny_resnet: Factory, images) -> None:
    weights = []
    for batch_size in (1, 4, 100):
        model = tiny_resnet()
        compress(model, GPTQ(8, None), images(6), batch_size=batch_size, progress=False)
        weights.append(find_sites(model)[-1].weight)
    assert torch.allclose(weights[0], weights[1], atol=2e-2) and torch.allclose(weights[0], weights[2], atol=2e-2)


def test_training_mode_is_kept_and_batch_norms_learn_nothing(tiny_resnet: Factory, images, same) -> None:
    model = tiny_resnet().train()
    before = outside(model)
    compress(model, GPTQ(4, None), images(6), progress=False)
    assert model.training and same(outside(model), before)


def test_statistics_inside_inference_mode(tiny_vit: Factory, images) -> None:
    model, other = tiny_vit(), tiny_vit()
    compress(model, GPTQ(4, None), images(6), progress=False)
    with torch.inference_mode():
        compress(other, GPTQ(4, None), images(6), progress=False)
    assert torch.equal(logits(model, images(2)), logits(other, images(2)))


# ---- which modules are sites


def test_all_maps_are_sites_down_to_a_head_of_ten(tiny_resnet: Factory, tiny_vit: Factory) -> None:
    for model in (tiny_resnet(), tiny_vit()):
        sites = find_sites(model)
        maps = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert [site.name for site in sites] == maps and sites[-1].out_features == 10
        assert not has_blocks(model)
        assert [site.name for site in find_sites(model, "classifier")] == maps[-1:]
        left = skipped_modules(model, find_sites(model, "classifier"))
        assert left[maps[0]].endswith("not among the targets")
        with pytest.raises(OptionError, match=r"targets='conv9' matches no site; names look like"):
            find_sites(model, "conv9")


def test_modules_that_cannot_be_replaced_are_left_with_the_reason(images) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Standardised(1, 8, 3)
            self.shared = nn.Linear(8, 8)
            self.also = self.shared
            self.mixer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(self.mixer(self.also(self.shared(x))).mean(1))

    model = Model().eval()
    assert [site.name for site in find_sites(model)] == ["head"]
    left = skipped_modules(model, find_sites(model))
    assert left["stem"] == "Standardised: it has a forward of its own"
    assert left["shared"] == "Linear: it is used at 2 places of the model"
    assert "MultiheadAttention reads its weight" in left["mixer.self_attn.out_proj"]
    assert "TransformerEncoderLayer reads its weight" in left["mixer.linear1"]
    compress(model, GPTQ(4, None), images(4), progress=False)
    assert torch.isfinite(logits(model, images(2))).all()


def test_models_with_nothing_to_compress_are_refused() -> None:
    with pytest.raises(OptionError, match=r"Sequential: found no nn\.ModuleList of blocks, and no .*nn\.Conv2d"):
        find_sites(nn.Sequential(nn.ReLU()))


# ---- depthwise convolutions and a model of no library


@pytest.mark.parametrize("kind", ["tiny_convnext", "inverted_residuals"])
def test_depthwise_convolutions(kind: str, images, request, state, same) -> None:
    dense = request.getfixturevalue(kind)()
    grouped = [s.name for s in find_sites(dense) if s.geometry is not None and s.geometry.groups > 1]
    assert grouped
    for method in (
        RTN(8, None),
        Magnitude("unstructured", 0.02),
        LoftQ(8, None, rank=1),
        QuantizeActivations(8, "mse"),
    ):
        model = copy.deepcopy(dense)
        compress(model, method, images(8), progress=False)
        a, b = logits(dense, images(8)), logits(model, images(8))
        assert (a - b).norm() < 0.1 * a.norm(), method
    for method in (GPTQ(4, None), Wanda("unstructured"), EoRA(1)):
        model = copy.deepcopy(dense)
        if method.uses_reference:
            compress(model, RTN(4, None), progress=False)
        before = state(model)
        with pytest.raises(
            OptionError, match=rf"'{grouped[0]}' is a convolution in \d+ groups.*{type(method).__name__}.*targets="
        ):
            compress(model, method, images(8), reference=dense, progress=False)
        assert same(state(model), before)
        with pytest.raises(OptionError, match="is a convolution in"):
            plan(model, method, shape=SHAPE)
    others = "|".join(f"^{s.name}$" for s in find_sites(dense) if s.name not in grouped)
    model = copy.deepcopy(dense)
    compress(model, GPTQ(4, None), images(8), targets=others, progress=False)
    assert {s.name for s in find_sites(model) if not isinstance(s.module, CompressedLayer)} == set(grouped)


def test_a_grouped_kernel_survives_a_pipeline_of_weights(inverted_residuals: Factory, images) -> None:
    """Prune, quantise, repair the depthwise convolutions too, by methods that look at weights alone."""
    dense = inverted_residuals()
    model = copy.deepcopy(dense)
    for method in (Magnitude("unstructured", 0.3), RTN(4, None), PlainSVD(4)):
        compress(model, method, reference=dense, targets="depthwise", progress=False)
    a, b = logits(dense, images(8)), logits(model, images(8))
    assert 0 < (a - b).norm() < 0.5 * a.norm()


# ---- plans


def test_plan_counts_what_a_forward_pass_costs(tiny_resnet: Factory, tiny_vit: Factory) -> None:
    model = tiny_resnet()
    one = plan(model, GPTQ(4, None), sequences=1, shape=SHAPE, order="parallel")
    many = plan(model, GPTQ(4, None), sequences=101, shape=SHAPE, order="parallel")
    by_hand = 0.0
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, a, y, name=name: sizes.__setitem__(name, y.shape))
    logits(model, torch.zeros(1, *SHAPE))
    for site in find_sites(model):
        positions = math.prod(sizes[site.name][2:])
        by_hand += 2 * positions * site.in_features * (site.out_features + site.in_features)
    assert (many.flops - one.flops) / 100 == pytest.approx(by_hand)
    sequential = plan(model, GPTQ(4, None), sequences=101, shape=SHAPE)
    assert sequential.flops > many.flops and sequential.peak_bytes < many.peak_bytes
    assert plan(tiny_vit(), GPTQ(4, None)).flops > 0  # its configuration says what it takes
    assert plan(model, RTN(4, None)).bits_per_weight > 4  # nothing to run
    with pytest.raises(OptionError, match="shape=None.*pass"):
        plan(model, GPTQ(4, None))
    with pytest.raises(OptionError, match=r"shape=\(3, 16, 16\): ResNet.*does not take"):
        plan(model, GPTQ(4, None), shape=(3, 16, 16))


def test_plan_of_inputs_holds_them(tiny_vit: Factory) -> None:
    """What 1000 more images cost: the inputs and outputs of every site, in fp32."""
    method = QuantizeActivations(4, "mse")
    few, many = (plan(tiny_vit(), method, sequences=n, order="parallel").peak_bytes for n in (4000, 5000))
    tokens, width, hidden = 17, 32, 64
    block = tokens * (3 * 2 * width + 2 * width + 2 * (width + hidden))  # q, k, v; out; both of the MLP
    patches, head = 16 * 16 + 16 * width, width + 10
    joined = tokens * hidden  # the largest of them is there twice while its batches are joined
    assert (many - few) / 1000 == pytest.approx(4 * (2 * block + patches + head + joined))


# ---- refusals


pixels = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "none": (CalibrationError, "calibration=None: GPTQ needs floating-point samples", {"calibration": None}),
    "empty": (CalibrationError, r"shape \(0, 1, 16, 16\) is empty", {"calibration": pixels[:0]}),
    "bytes": (CalibrationError, r"scaled as for training, got torch\.uint8", {"calibration": pixels.byte()}),
    "tokens": (CalibrationError, r"got torch\.int64 of shape \(4, 7\)", {"calibration": torch.ones(4, 7).long()}),
    "a list": (CalibrationError, "got list", {"calibration": [1.0]}),
    "NaN": (CalibrationError, "the samples contain NaN", {"calibration": pixels / pixels.clamp_min(0)}),
    "three channels": (
        CalibrationError,
        r"does not take samples of shape \(3, 16, 16\): its images have 1 channels",
        {"calibration": pixels.repeat(1, 3, 1, 1)},
    ),
    "no channels": (CalibrationError, r"does not take samples of shape \(16, 16\)", {"calibration": pixels[:, 0]}),
    "batch size": (OptionError, "batch_size=0", {"batch_size": 0}),
    "order": (OptionError, "order='sequental': use one of", {"order": "sequental"}),
    "group": (OptionError, "group_size=7 does not divide", {"method": GPTQ(4, 10**6)}),
    "folder": (OptionError, r"out='somewhere' writes block by block.*save\(model", {"out": "somewhere"}),
    "no reference": (OptionError, "reference=None: PlainSVD repairs", {"method": PlainSVD(1)}),
    "not compressed": (OptionError, "is not compressed", {"method": EoRA(1), "reference": "other"}),
    "itself": (OptionError, "reference is the model that is being", {"method": EoRA(1), "reference": "itself"}),
    "pattern": (OptionError, "needs inputs in groups of 4", {"method": SparseGPT("2:4")}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", list(BAD))
def test_refusals_name_the_argument_and_change_nothing(case, kind, request, state, same) -> None:
    error, message, options = BAD[case]
    if case == "group":
        message = "group_size=1000000 does not divide"
    if case == "pattern" and kind == "tiny_vit":
        pytest.skip("all its widths are multiples of 4")
    model, other = request.getfixturevalue(kind)().train(), request.getfixturevalue(kind)()
    options = {"method": GPTQ(4, None), "calibration": pixels, **options}
    reference = {"other": other, "itself": model}.get(options.pop("reference", None))
    before = state(model)
    with pytest.raises(error, match=message):
        compress(model, reference=reference, progress=False, **options)
    assert same(state(model), before) and model.training


def test_images_of_another_size(tiny_vit: Factory) -> None:
    with pytest.raises(CalibrationError, match=r"does not take samples of shape \(1, 20, 20\).*20\*20"):
        compress(tiny_vit(), GPTQ(4, None), torch.randn(4, 1, 20, 20), progress=False)


def test_fewer_samples_than_a_method_draws(
    tiny_resnet: Factory, tiny_llama: Factory, tokens, images, state, same
) -> None:
    class Draws(GPTQ):
        least_samples = 50

    for model, samples in ((tiny_resnet(), images(8)), (tiny_llama(), tokens(8))):
        before = state(model)
        with pytest.raises(CalibrationError, match="8 samples are fewer than the 50 that Draws draws at once"):
            compress(model, Draws(4, None), samples, progress=False)
        assert same(state(model), before)


def test_statistics_that_are_not_gathered_together(tiny_vit: Factory, images) -> None:
    class Greedy(GPTQ):
        statistics = frozenset({"gram", "inputs"})

    with pytest.raises(OptionError, match=r"asks for the statistics \['gram', 'inputs'\].*\['abs', 'gram'\] or"):
        compress(tiny_vit(), Greedy(4, None), images(4), progress=False)


def test_a_failure_half_way_puts_everything_back(tiny_resnet: Factory, images, state, same) -> None:
    class Fails(RTN):
        def compress_site(self, site, stats, original):
            if site.name == "classifier.1":
                raise ArithmeticError("the last site")
            return super().compress_site(site, stats, original)

    model = tiny_resnet().train()
    kinds, before = [type(m) for m in model.modules()], state(model)
    with pytest.raises(ArithmeticError, match="the last site"):
        compress(model, Fails(4, None), progress=False)
    assert same(state(model), before) and model.training
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_broken_weights_and_sites_that_never_run(tiny_resnet: Factory, images) -> None:
    model = tiny_resnet()
    model.classifier[1].weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"model: 'classifier\.1\.weight' contains NaN"):
        compress(model, GPTQ(4, None), images(4), progress=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    model.idle = nn.Linear(4, 4)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"'idle' was never run.*targets="):
        compress(model, GPTQ(4, None), images(4), progress=False)
    compress(model, RTN(4, None), progress=False)


def test_activations_that_overflow_are_named(tiny_resnet: Factory, images, state, same) -> None:
    model = tiny_resnet()
    for method in (GPTQ(4, None), QuantizeActivations(8), QuantizeActivations(8, "mse")):
        model.resnet.encoder.stages[0].layers[0].layer[0].normalization.weight.data.fill_(3e38)
        before = state(model)
        with pytest.raises(CalibrationError, match="the inputs of .* contain NaN or infinity"):
            compress(model, method, images(4), progress=False)
        assert same(state(model), before)


def test_reference_with_other_batch_norms(tiny_resnet: Factory, images, tmp_path) -> None:
    """Folding changes the weights: towards the unfolded ones a repair would repair the wrong thing."""
    unfolded = tiny_resnet()
    unfolded.save_pretrained(tmp_path)
    folded = copy.deepcopy(unfolded)
    fold_batch_norms(folded, images(2))
    model = copy.deepcopy(folded)
    compress(model, RTN(3, None), progress=False)
    for reference in (unfolded, tmp_path):
        with pytest.raises(CheckpointError, match="no bias there.*batch norms are folded in one of them only"):
            compress(model, EoRA(2), images(4), reference=reference, targets="convolution", progress=False)
    report = compress(model, EoRA(2), images(4), reference=folded, progress=False)
    assert all(site.error < site.error_before for site in report.sites)


def test_reference_may_be_a_folder(tiny_resnet: Factory, tiny_vit: Factory, images, tmp_path, same) -> None:
    for factory in (tiny_resnet, tiny_vit):
        dense = factory()
        dense.save_pretrained(tmp_path / type(dense).__name__, save_original_format=False)
        results = []
        for reference in (dense, tmp_path / type(dense).__name__):
            model = copy.deepcopy(dense)
            compress(model, RTN(3, None), progress=False)
            compress(model, EoRA(4), images(8), reference=reference, progress=False)
            results.append(model.state_dict())
        assert same(*results)


def test_a_folder_of_such_a_model_is_refused(tiny_resnet: Factory, tmp_path) -> None:
    tiny_resnet().save_pretrained(tmp_path / "model")
    with pytest.raises(OptionError, match="no decoder blocks to read one by one; load it with from_pretrained"):
        compress(tmp_path / "model", RTN(4, None), out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
