"""Masks beside weights: the product and its gradient, on every kind of layer, and the way back to ordinary models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from refimpl import load, save
from refimpl.core.errors import OptionError
from refimpl.core.layers import PackedLinear
from refimpl.core.layers.conv import PackedConv2d
from refimpl.core.train.masks import MaskedWeight, bake, find_masks, mask_weights, pack, stored_weight, weight_matrices
from refimpl.pruning import GradualMagnitude

Factory = Callable[..., PreTrainedModel]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class First(nn.Module):
    """The outputs of a recurrent layer without its state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Linear(8, 5), lambda: torch.randn(3, 8), 1),
    "conv1d of gpt2": (lambda: Conv1D(5, 8), lambda: torch.randn(3, 8), 1),
    "conv 1-D": (lambda: nn.Conv1d(3, 4, 3), lambda: torch.randn(2, 3, 7), 1),
    "conv 2-D": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), lambda: torch.randn(2, 4, 7, 7), 1),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: torch.randint(0, 9, (3, 6)), 1),
    "lstm": (lambda: First(nn.LSTM(8, 6, 2, batch_first=True)), lambda: torch.randn(3, 5, 8), 4),
    "lstm, both ways, projected": (
        lambda: First(nn.LSTM(8, 6, bidirectional=True, proj_size=3)),
        lambda: torch.randn(3, 5, 8),
        6,
    ),
    "gru": (lambda: First(nn.GRU(8, 6, batch_first=True)), lambda: torch.randn(3, 5, 8), 2),
    "attention": (Attention, lambda: torch.randn(2, 4, 8), 2),
}


def fill(masks: dict[str, MaskedWeight], seed: int = 0, live: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for masked in masks.values():
        masked.mask.copy_(torch.rand(masked.mask.shape, generator=generator) < live)
        assert masked.mask.any() and not masked.mask.all()


def made(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, inputs, _ = LAYERS[kind]
    model, x = layer().to(dtype), inputs()
    return model, x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_gradient_are_those_of_the_product(kind: str, dtype: torch.dtype) -> None:
    model, x = made(kind, dtype)
    plain = copy.deepcopy(model)
    masks = mask_weights(model)
    assert len(masks) == LAYERS[kind][2]
    before = {name: stored_weight(model, name).detach().clone() for name in masks}
    fill(masks)
    with torch.no_grad():
        for name, masked in masks.items():
            plain.get_parameter(name).mul_(masked.mask)
    out, expected = model(x), plain(x)
    assert out.dtype == dtype and torch.equal(out, expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, masked in masks.items():
        W = stored_weight(model, name)
        assert torch.equal(W, before[name]), "the stored weight keeps what is masked"
        assert not W.grad[~masked.mask].any()
        assert torch.equal(W.grad[masked.mask], plain.get_parameter(name).grad[masked.mask])
        assert W.grad[masked.mask].any()


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "embedding"])
def test_gradient_against_finite_differences(kind: str) -> None:
    model, x = made(kind, torch.float64)
    masks = mask_weights(model)
    fill(masks, seed=1)
    model(x).square().sum().backward()
    step = 1e-6
    for name, masked in masks.items():
        W = stored_weight(model, name)
        for live in (True, False):
            place = tuple(int(i) for i in (masked.mask == live).nonzero()[0])
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    W[place] += sign * step
                    found.append(float(model(x).square().sum()))
                    W[place] -= sign * step
            slope = (found[0] - found[1]) / (2 * step)
            assert float(W.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
            assert live or (slope == 0 and W.grad[place] == 0)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_casts_and_state_dicts(kind: str, tmp_path) -> None:
    model, x = made(kind)
    masks = mask_weights(model)
    fill(masks)
    expected = model(x)
    assert expected.requires_grad  # the copy below is taken with a graph about
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    assert torch.equal(copy.deepcopy(twin.double().float())(x), expected)
    with torch.no_grad():
        for name in masks:
            stored_weight(twin, name).zero_()
        for masked in find_masks(twin).values():
            masked.mask.fill_(True)
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected), "a copy shares nothing"
    # through safetensors into a model that was masked, but not pruned
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    other, _ = made(kind)
    mask_weights(other)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_baking_leaves_an_ordinary_model(kind: str) -> None:
    model, x = made(kind)
    plain, parameters = copy.deepcopy(model), {id(p) for p in model.parameters()}
    masks = mask_weights(model)
    assert {id(p) for p in model.parameters()} == parameters, "an optimiser made before must still hold them"
    fill(masks)
    expected = model(x)
    baked = bake(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {id(p) for p in model.parameters()} == parameters and not find_masks(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(x), expected)
    for name, mask in baked.items():
        assert not model.get_parameter(name)[~mask].any()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), expected)
    model(x).sum().backward()  # and it trains: gradients are dense again
    assert any(model.get_parameter(name).grad[~mask].any() for name, mask in baked.items())


def test_an_optimiser_made_before_masking_trains_through_it_and_after_baking() -> None:
    model, x = made("lstm")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = mask_weights(model)
    fill(masks)
    stored = {name: stored_weight(model, name).detach().clone() for name in masks}
    model(x).square().sum().backward()
    optimiser.step()
    for name, masked in masks.items():
        moved = stored_weight(model, name) != stored[name]
        assert moved[masked.mask].any() and not moved[~masked.mask].any()
    bake(model)
    before = model.inner.weight_hh_l0.detach().clone()
    optimiser.zero_grad()
    model(x).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model.inner.weight_hh_l0, before)


def test_an_lstm_never_sees_the_unmasked_list() -> None:
    """PyTorch's LSTM keeps a list of its weights; packed sequences and a change of masks go through it too."""
    model, x = made("lstm")
    masks = mask_weights(model)
    dense = model(x)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 5, 5], batch_first=True)
    for seed in (1, 2):
        fill(masks, seed)
        sparse = model(x)
        assert not torch.equal(sparse, dense)
        assert torch.allclose(nn.utils.rnn.pad_packed_sequence(model.inner(packed)[0], True)[0], sparse, atol=1e-6)
        with torch.no_grad():  # another kernel
            assert torch.allclose(model(x), sparse, atol=1e-6)


def test_tied_weights_have_one_mask(tiny_qwen3: Factory, tokens) -> None:
    model, ids = tiny_qwen3(), tokens(2, 6)
    names = list(weight_matrices(model))
    masks = mask_weights(model)
    assert list(masks) == names == list(find_masks(model)) and "lm_head.weight" not in masks
    fill(masks)
    logits = model(ids).logits
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not model.lm_head.weight[~masks["model.embed_tokens.weight"].mask].any()
    logits.sum().backward()
    W = stored_weight(model, "model.embed_tokens.weight")
    assert not W.grad[~masks["model.embed_tokens.weight"].mask].any()
    packed = pack(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head" not in packed
    assert torch.allclose(model(ids).logits, logits, atol=1e-5)


def test_only_matrices_are_masked(tiny_mixtral: Factory) -> None:
    model = tiny_mixtral()
    masks = mask_weights(model)
    assert not any("norm" in name or "bias" in name for name in masks)
    assert {name.rpartition(".")[2] for name in masks} == {"weight", "gate_up_proj", "down_proj"}
    left = [n for n, p in model.named_parameters() if p.dim() > 1 and "original" not in n]
    assert left == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]  # routers: no nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "layers"), [("gpt2", 8), ("llama", 15), ("qwen3", 21), ("mixtral", 9 + 2 * 2 * 4)])
def test_transformers_models_train_pack_save_and_load(
    layout: str, layers: int, dtype, tokens, tmp_path, request
) -> None:
    model, ids = request.getfixturevalue(f"tiny_{layout}")().to(dtype), tokens(2, 6)
    masks = mask_weights(model)
    fill(masks, live=0.3)
    out = model(ids, labels=ids)
    out.loss.backward()
    for name, masked in masks.items():
        assert not stored_weight(model, name).grad[~masked.mask].any()
    packed = pack(model)
    assert len(packed) == layers
    assert all(type(model.get_submodule(name)) is PackedLinear for name in packed)
    tolerance = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 1e-5}
    assert torch.allclose(model.eval()(ids).logits, out.logits, **tolerance)
    again = load(save(model, tmp_path / "packed"))
    for name in packed:
        assert torch.equal(again.get_submodule(name).to_dense(), model.get_submodule(name).to_dense())
    # not to the bit in bf16: `.to(bfloat16)` rounds the frequencies of the position embedding, which `load` makes anew
    assert torch.allclose(again(ids).logits, model(ids).logits, **tolerance)


class TransposedExperts(nn.Module):
    """Experts in the layout of GPT-OSS: [E, in, out]."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 4))
        self.up_bias = nn.Parameter(torch.randn(2, 4))


def test_matrix_view_and_back() -> None:
    shapes = {
        "linear": (nn.Linear(8, 5), "weight", (5, 8)),
        "gpt2": (Conv1D(5, 8), "weight", (5, 8)),
        "conv": (nn.Conv2d(4, 6, 3, groups=2), "weight", (6, 18)),
        "experts": (TransposedExperts(), "up", (8, 8)),
    }
    for module, name, shape in shapes.values():
        (masked,) = mask_weights(module).values()
        W = stored_weight(module, name).detach()
        matrix = masked.to_matrix(W)
        assert matrix.shape == shape and torch.equal(masked.from_matrix(matrix), W)
    # row e * out + o of the experts is output o of expert e
    W = stored_weight(shapes["experts"][0], "up").detach()
    masked = find_masks(shapes["experts"][0])["up"]
    assert torch.equal(masked.to_matrix(W)[1 * 4 + 3], W[1, :, 3])


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_packed_layers_equal_the_masked_ones(pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 8, 4, stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.Linear(16, 4),
    )
    x = torch.randn(2, 4, 6, 6)
    masks = mask_weights(model)
    for name, masked in masks.items():
        if name != "4.weight":
            matrix = masked.to_matrix(torch.rand(masked.mask.shape))
            runs = matrix.unflatten(1, (-1, 4))
            masked.mask.copy_(
                masked.from_matrix((runs >= runs.sort(-1).values[..., 2:3]).flatten(1))
                if pattern == "2:4"
                else masked.from_matrix(matrix > 0.6)
            )
    expected = model(x)
    assert pack(model, pattern) == ["0", "1", "3"]
    assert type(model[0]) is PackedConv2d and type(model[3]) is PackedLinear and type(model[4]) is nn.Linear
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_mask_that_does_not_follow_the_pattern_is_refused_unchanged() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6))
    masks = mask_weights(model)
    masks["1.weight"].mask[2, 1:] = False
    with pytest.raises(OptionError, match="pattern='2:4': the mask of '1.weight' does not keep 2 of every 4.*unstr"):
        pack(model, "2:4")
    assert list(find_masks(model)) == ["0.weight", "1.weight"]
    with pytest.raises(OptionError, match="pattern='2:5': use"):
        pack(model, "2:5")
    assert pack(model) == ["1"]
    with pytest.raises(OptionError, match="no masks"):
        pack(model)


def test_a_model_that_is_one_layer_is_baked() -> None:
    model = nn.Linear(8, 4)
    fill(mask_weights(model))
    assert pack(model) == [] and type(model) is nn.Linear and (model.weight == 0).any()


def test_targets_and_what_cannot_be_masked(tiny_llama: Factory) -> None:
    model = tiny_llama()
    assert list(mask_weights(model, r"layers\.1\..*q_proj")) == ["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(OptionError, match="masked already; call refimpl.core.train.masks.bake"):
        mask_weights(model)
    bake(model)
    for targets, message in (
        ("vision", "targets='vision' matches no weight matrix; names look like 'model.emb"),
        ("(", "targets='\\(' is not a regular expression"),
    ):
        with pytest.raises(OptionError, match=message):
            mask_weights(model, targets)
    fill(mask_weights(model, "layers"))
    pack(model)
    with pytest.raises(OptionError, match="found no weight matrix to mask"):
        mask_weights(model.model.layers[0])
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(OptionError, match="'weight' is parametrised .weight norm"):
        mask_weights(normed)
    assert not find_masks(normed)


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "4x4"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("layout", ["gpt2", "llama", "mixtral"])
def test_pruning_stays_on_its_device(layout, scope, structure, tokens, fake_cuda, request) -> None:
    """A stray .cpu(), a mixed device, or a value read elsewhere than in `read` fails."""
    if (structure, scope) == ("2:4", "global"):
        pytest.skip("refused: every group keeps as many")
    model, ids = request.getfixturevalue(f"tiny_{layout}")(), tokens(2, 6)
    method = GradualMagnitude(0.5, frequency=1, updates=2, structure=structure, scope=scope)
    with fake_cuda() as place:
        place(model)
        hook = method.attach(model)
        for step in (1, 2, 3):  # no backward, and no fused experts: both ask the driver for the device
            if layout != "mixtral":
                logits = model(torch.ones_like(ids, device="cuda"), use_cache=False).logits
                assert logits.device.type == "cuda"
            hook(step, model)
        for name in find_masks(model):
            owner, _, attribute = name.rpartition(".")
            assert getattr(model.get_submodule(owner), attribute).device.type == "cuda"
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
