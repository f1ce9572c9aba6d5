"""Batch norms: folded, put back, and folded again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from refimpl import GPTQ, RTN, EoRA, LoftQ, SparseGPT, compress, load, save
from refimpl.baselines.activations import QuantizeActivations
from refimpl.core.compress.fold import FoldedNorms, fold_batch_norms
from refimpl.core.compress.sites import find_sites
from refimpl.core.compress.whole import run
from refimpl.core.errors import OptionError
from refimpl.core.layers import PackedLinear

Factory = Callable[..., Any]


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = run(model, x)
    return result if isinstance(result, Tensor) else result.logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1))


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


# ---- folding


@pytest.mark.parametrize("kind", ["tiny_resnet", "inverted_residuals"])
def test_folding_changes_nothing(kind: str, images, request) -> None:
    model = request.getfixturevalue(kind)()
    if kind == "inverted_residuals":
        for name in norms(model):
            module = model.get_submodule(name)
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    names, before = norms(model), output(model, images(8))
    original = copy.deepcopy(model)
    folded = fold_batch_norms(model, images(2))
    assert close(output(model, images(8)), before)
    assert not norms(model) and not folded.left
    assert [norm.name for norm in folded.norms.values()] == names
    for conv, norm in folded.norms.items():
        old = original.get_submodule(norm.name)
        assert isinstance(model.get_submodule(norm.name), nn.Identity)
        assert torch.equal(norm.gamma, old.weight) and torch.equal(norm.beta, old.bias) and norm.eps == old.eps
        assert model.get_submodule(conv).bias is not None
        # the formula, channel by channel
        factor = (old.weight / (old.running_var + old.eps).sqrt()).view(-1, 1, 1, 1)
        assert torch.allclose(model.get_submodule(conv).weight, original.get_submodule(conv).weight * factor, atol=1e-6)
    assert fold_batch_norms(model, images(2)).norms == {}


def test_the_pair_is_found_in_the_data_flow_not_in_names(images) -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.dropout = nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn2(self.conv1(x)))
            return self.bn1(self.dropout(self.conv2(x)))

    model = Crossed().train()
    model(images(8))  # statistics
    before = output(model.eval(), images(3))
    folded = fold_batch_norms(model.train(), images(2))
    assert {conv: norm.name for conv, norm in folded.norms.items()} == {"conv1": "bn2", "conv2": "bn1"}
    assert model.training and model.bn1.training
    assert close(output(model.eval(), images(3)), before)


class Odd(nn.Module):
    """One batch norm for every reason not to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(1)
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4, 4, 4, 4))
        self.f, self.g = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.shared, self.skipped, self.activated = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fresh, self.idle, self.one, self.two = (nn.BatchNorm2d(4) for _ in range(4))
        self.fresh = nn.BatchNorm2d(4, track_running_stats=False)
        self.parametrised, self.good = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        parametrize.register_parametrization(self.f, "weight", nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.first(x))
        y = self.shared(y) + self.shared(self.b(y))
        z = self.c(y)
        y = self.skipped(z) + z
        y = self.activated(F.relu(self.d(y)))
        y = self.fresh(self.e(y))
        y = self.parametrised(self.f(y))
        z = self.b(y)
        y = self.one(z) + self.two(z)
        return self.good(self.g(y))


def test_what_cannot_be_folded_is_left_with_the_reason(images) -> None:
    model = Odd().eval()
    before = output(model, images(4))
    folded = fold_batch_norms(model, images(2))
    assert {conv: norm.name for conv, norm in folded.norms.items()} == {"g": "good"}
    assert torch.equal(folded.norms["g"].gamma, torch.ones(4)) and not folded.norms["g"].beta.any()
    reasons = {
        "first": "no convolution directly before it",
        "shared": "it is called 2 times",
        "skipped": "something else uses the output of 'c' too",
        "activated": "no convolution directly before it",
        "fresh": "it has no running statistics",
        "idle": "it is called 0 times",
        "parametrised": "the weight of 'f' is parametrised; make it a plain one first",
        "one": "the convolution before it, 'b', is called 2 times",
        "two": "the convolution before it, 'b', is called 2 times",
    }
    assert folded.left == reasons
    assert close(output(model, images(4)), before)


def test_a_shared_weight_is_not_changed_under_the_other_layer(images) -> None:
    a, b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
    b.weight = a.weight

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = a, b, nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.b(x)

    model = Tied().eval()
    model.norm.running_var.fill_(4.0)
    before = output(model, images(3))
    assert list(fold_batch_norms(model, images(2)).norms) == ["a"]
    assert close(output(model, images(3)), before)


def test_two_norms_on_one_convolution(images) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.one(y) + self.two(y)

    folded = fold_batch_norms(Two(), images(2))
    assert not folded.norms and set(folded.left) == {"one", "two"}
    assert all("something else uses the output of 'conv' too" in reason for reason in folded.left.values())


def test_folding_in_bfloat16(tiny_resnet: Factory, images) -> None:
    model = tiny_resnet().bfloat16()
    before = output(model, images(8).bfloat16()).float()
    fold_batch_norms(model, images(2).bfloat16())
    after = output(model, images(8).bfloat16())
    assert after.dtype == torch.bfloat16 and (after - before).norm() < 0.05 * before.norm()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- putting back and folding again

STEPS: dict[str, list[Any]] = {
    "dense": [],
    "rounded": [RTN(3, None)],
    "groups": [RTN(3, 8)],
    "symmetric": [RTN(4, None, symmetric=True)],
    "sparse": [SparseGPT("unstructured")],
    "2:4": [SparseGPT("2:4")],
    "sparse and rounded": [SparseGPT("unstructured"), GPTQ(3, None)],
    "repaired": [RTN(2, None), EoRA(2)],
    "packed repair": [RTN(2, None), EoRA(4, adapter_bits=4, adapter_group=4)],
    "low rank": [LoftQ(3, None, rank=2)],
    "quantised inputs": [GPTQ(4, None), QuantizeActivations(6)],
    "everything": [GPTQ(4, None), EoRA(2), QuantizeActivations(8, "mse")],
}


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.values.clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and module.bits is not None
    }


@pytest.mark.parametrize("case", list(STEPS))
def test_reinserted_norms_are_the_identity_and_refold_into_anything(case: str, tiny_resnet: Factory, images, tmp_path):
    dense = tiny_resnet(embedding_size=8, hidden_sizes=[8, 16])
    folded = fold_batch_norms(dense, images(2))
    model = copy.deepcopy(dense)
    targets = "encoder|classifier" if case in ("2:4", "groups") else None
    for method in STEPS[case]:
        compress(model, method, images(12), reference=dense, targets=targets, progress=False)
    kept, before = codes(model), output(model, images(8))
    folded.reinsert(model)
    assert len(norms(model)) == len(folded.norms) == 8
    assert close(output(model, images(8)), before)
    assert not any(model.get_submodule(name).training for name in norms(model))
    # folded again unchanged: nothing happened
    same = copy.deepcopy(model)
    folded.refold(same)
    assert close(output(same, images(8)), before)
    # new statistics, from running the calibration samples in training mode
    model.train()
    for batch in images(40, seed=3).split(10):
        output(model, batch)
    model.eval()
    tuned = output(model, images(8))
    assert not close(tuned, before)
    folded.refold(model)
    assert not norms(model) and close(output(model, images(8)), tuned)
    assert kept.keys() == codes(model).keys()
    assert all(torch.equal(kept[name], value) for name, value in codes(model).items())  # to the last bit
    again = load(save(model, tmp_path))  # the finer scales come back too
    assert torch.equal(output(again, images(8)), output(model, images(8)))


def test_one_full_batch_restores_mean_and_variance(tiny_resnet: Factory, images) -> None:
    """With the cumulative average, the first layer's output has mean beta and variance gamma^2 on the samples."""
    model = tiny_resnet()
    folded = fold_batch_norms(model, images(2))
    compress(model, RTN(2, None), progress=False)
    folded.reinsert(model)
    for name in norms(model):
        model.get_submodule(name).momentum = None
    samples = images(200)
    output(model.train(), samples)
    folded.refold(model.eval())
    conv, norm = next(iter(folded.norms.items()))
    seen: list[Tensor] = []
    model.get_submodule(conv).register_forward_hook(lambda _, args, y: seen.append(y))
    output(model, samples)
    y = seen[0].transpose(0, 1).flatten(1)
    assert torch.allclose(y.mean(1), norm.beta, atol=1e-3)
    assert torch.allclose(y.var(1), norm.gamma.square(), atol=1e-3, rtol=1e-3)


def test_momentum_keeps_its_share(tiny_resnet: Factory, images) -> None:
    model = tiny_resnet()
    folded = fold_batch_norms(model, images(2))
    folded.reinsert(model)
    conv, norm = next(iter(folded.norms.items()))
    batch, rounds = images(50), 20
    seen: list[Tensor] = []
    model.get_submodule(conv).register_forward_hook(lambda _, args, y: seen.append(y.mean((0, 2, 3))))
    model.train()
    for _ in range(rounds):
        output(model, batch)
    share = 0.9**rounds
    expected = share * norm.beta + (1 - share) * seen[0]
    assert torch.allclose(model.get_submodule(norm.name).running_mean, expected, atol=1e-4)


def test_a_channel_with_gamma_zero(tiny_resnet: Factory, images) -> None:
    model = tiny_resnet()
    for name in norms(model):
        model.get_submodule(name).weight.data[::2] = 0.0
        model.get_submodule(name).weight.data[1] = -1.5
    before = output(model, images(6))
    folded = fold_batch_norms(model, images(2))
    assert close(output(model, images(6)), before)
    compress(model, RTN(3, None), progress=False)
    rounded = output(model, images(6))
    folded.reinsert(model)
    assert close(output(model, images(6)), rounded)
    output(model.train(), images(30))
    folded.refold(model.eval())
    assert torch.isfinite(output(model, images(6))).all()
    conv, norm = next(iter(folded.norms.items()))
    weight = find_sites(model, conv)[0].weight
    assert not weight[::2].any() and torch.allclose(model.get_submodule(conv).bias[::2], norm.beta[::2], atol=1e-4)


def test_refold_keeps_the_dtype(tiny_resnet: Factory, images) -> None:
    model = tiny_resnet().bfloat16()
    folded = fold_batch_norms(model, images(2).bfloat16())
    compress(model, GPTQ(4, None), images(8), progress=False)
    before = output(model, images(8).bfloat16()).float()
    folded.reinsert(model)
    folded.refold(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (output(model, images(8).bfloat16()) - before).norm() < 0.05 * before.norm()


def test_wrong_order_and_another_model_are_named(tiny_resnet: Factory, tiny_vit: Factory, images, state, same) -> None:
    model = tiny_resnet()
    folded = fold_batch_norms(model, images(2))
    with pytest.raises(OptionError, match=r"no batch norm at 'resnet\.embedder.*reinsert first"):
        folded.refold(model)
    folded.reinsert(model)
    before = state(model)
    with pytest.raises(OptionError, match="is BatchNorm2d, not the nn.Identity.*reinsert only once"):
        folded.reinsert(model)
    assert same(state(model), before)
    with pytest.raises(OptionError, match="model: it has no 'resnet"):
        folded.reinsert(tiny_vit())
    assert FoldedNorms().norms == {}


def test_on_a_device(tiny_resnet: Factory, images, fake_cuda) -> None:
    model = tiny_resnet()
    with fake_cuda() as place:
        place(model)
        x = torch.empty(4, 1, 16, 16, device="cuda")
        folded = fold_batch_norms(model, x)
        assert len(folded.norms) == 8 and not folded.left
        compress(model, GPTQ(4, None), images(8), progress=False)
        folded.reinsert(model)
        model(x)  # in training mode torch itself writes into a tensor in a way that only a CUDA build can fake
        folded.refold(model)
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
        assert model(x).logits.device.type == "cuda"
