"""CSKV: the factors against their theorems, the cache against the same rule written out pair by pair."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, Olmo2Config, Olmo2ForCausalLM, PreTrainedModel

from refimpl.baselines import RTN
from refimpl.core.cache import CompressedCache, LayerShape, Mask, Rotary, cache_argument, prefill, rotate
from refimpl.core.compress.driver import compress
from refimpl.core.errors import CalibrationError, CheckpointError, OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.kernels.lowrank_decode import reference
from refimpl.kvcache.cskv import (
    CSKV,
    CSKVLayer,
    Factors,
    Fit,
    Moments,
    asvd_scale,
    closed_form,
    decode,
    factorise,
    fit_loss,
    key_codes,
    key_features,
    moments,
    random,
    reconstruct,
    reconstruction_loss,
    straight_through,
    svd,
    value_codes,
    value_features,
    value_group,
)
from tests.core.cache.policy_contract import TEXT, batch, steps

NAMES = ["llama", "qwen3", "gemma3", "qwen2"]


def policy_for(model: PreTrainedModel, init: str = "closed_form", **options: Any) -> CSKV:
    options = {"density": 0.5, "window": 7, "sinks": 3} | options
    return CSKV(factorise(moments(model, TEXT), init), **options)


class Always(CSKV):
    """At density 1.0 too, keys and values are rebuilt: the policy itself would keep them."""

    def _keeps_all(self, shape: LayerShape) -> bool:
        return False


# -- factors -----------------------------------------------------------------------------------------------------------


def layer_data(seed: int = 0, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Inputs X [n, 24] with unequal channels that hang together, and W [24, 12]; fp64."""
    generator = torch.Generator().manual_seed(seed)
    X, mix, W = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rows, 24), (24, 24), (24, 12))
    )
    return X @ (mix * 0.8 ** torch.arange(24)), W


@pytest.mark.parametrize("init", ["closed_form", "asvd", "svd"])
def test_full_rank_gives_the_projection_back(init: str, make: Callable[[str], PreTrainedModel]) -> None:
    found = moments(make("llama"), TEXT)
    for layer, factors in zip(found, factorise(found, init), strict=True):
        for W, A, B in ((layer.W_K, factors.A_K, factors.B_K), (layer.W_V, factors.A_V, factors.B_V)):
            assert (A @ B - W).norm() <= 1e-5 * W.norm()


def test_the_error_of_a_truncated_svd() -> None:
    _, W = layer_data()
    A, B = svd(W)
    values = torch.linalg.svdvals(W)
    for rank in range(1, 12):
        assert torch.allclose((W - A[:, :rank] @ B[:rank]).norm(), values[rank:].square().sum().sqrt())


def test_a_constant_in_the_scale_changes_no_product() -> None:
    X, W = layer_data()
    s = X.abs().mean(0)
    for alpha in (0.5, 1.0):
        pairs = [svd(W, asvd_scale(c * s, alpha, offset=0.0)) for c in (1.0, 256.0)]
        products = [A[:, :5] @ B[:5] for A, B in pairs]
        assert torch.allclose(*products, atol=1e-12)
    # but it moves size from A to B, which matters to Adam: hence the mean, and not the authors' sum
    assert torch.allclose(pairs[0][0].abs(), pairs[1][0].abs() * 256**0.5, atol=1e-9)


def test_the_closed_form_is_the_least_loss() -> None:
    X, W = layer_data()
    gram, rank = X.T @ X, 4

    def loss(A: Tensor, B: Tensor) -> float:
        value = reconstruction_loss(W, A[:, :rank], B[:rank], gram, len(X)).item()
        assert value == pytest.approx((X @ W - X @ A[:, :rank] @ B[:rank]).square().mean().item(), rel=1e-9)
        return value

    best = loss(*closed_form(W, gram))
    tail = torch.linalg.svdvals(X @ W)[rank:].square().sum().item() / (len(X) * 12)
    assert abs(best - tail) < 1e-12 * (X @ W).square().mean()
    plain, scaled = loss(*svd(W)), loss(*svd(W, asvd_scale(X.abs().mean(0))))
    assert best < scaled < plain  # not a theorem for the last two, but so in these data

    # and no number of Adam steps gets below it
    A, B = (x.float() for x in svd(W))
    fit = Fit(Factors(A, B, A, B), (rank, rank), None)
    rows = X.float().unsqueeze(0)
    loss_of = lambda fit, batch: fit_loss(fit, batch[0], W.float(), W.float())  # noqa: E731
    history = train(fit, batches(rows, batch_size=1), loss_of, Recipe(steps=300, lr=0.02), progress=False)
    assert history.losses[0] == pytest.approx(2 * plain, rel=1e-4)
    assert 2 * best * (1 - 1e-5) <= history.losses[-1] < 2 * best * 1.05


@pytest.mark.parametrize("init", ["closed_form", "asvd", "svd"])
def test_more_rank_loses_less(init: str) -> None:
    X, W = layer_data()
    gram = X.T @ X
    A, B = closed_form(W, gram) if init == "closed_form" else svd(W, X.abs().mean(0) if init == "asvd" else None)
    losses = [reconstruction_loss(W, A[:, :r], B[:r], gram, len(X)).item() for r in range(13)]
    # with a scale the dropped terms have orthonormal right vectors too, so their errors add
    assert all(a >= b - 1e-12 for a, b in zip(losses, losses[1:], strict=False)) and losses[12] < 1e-12


def test_rotation_does_not_change_the_loss() -> None:
    X, W = layer_data()
    A, B = svd(W)
    exact, rebuilt = ((X @ M).unflatten(-1, (2, 6)).transpose(0, 1) for M in (W, A[:, :4] @ B[:4]))
    cos, sin = Rotary(torch.tensor([1.0, 0.1, 0.01]), 1.0)(torch.arange(len(X)).unsqueeze(0))
    turned = [rotate(x, cos.double(), sin.double()) for x in (exact, rebuilt)]
    losses = [(a - b).square().mean().item() for a, b in (turned, (exact, rebuilt))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 1


def test_moments_are_those_of_the_inputs(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("gemma3")
    seen: list[Tensor] = []
    handle = model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = moments(model, TEXT, batch_size=4)
    handle.remove()
    X = torch.cat(seen).flatten(0, 1)
    assert len(found) == 3 and found[1].tokens == len(X) == TEXT.numel()
    assert torch.allclose(found[1].gram, X.T @ X, rtol=1e-4, atol=1e-3)
    assert torch.allclose(found[1].mean_abs, X.abs().mean(0), rtol=1e-4)
    assert torch.equal(found[1].W_V, model.model.layers[1].self_attn.v_proj.weight.T)


def test_random_factors_are_repeatable_and_differ() -> None:
    W = torch.ones(12, 6)
    one = Moments(torch.eye(12), torch.ones(12), 1, W, W)
    first, again = factorise([one, one], "random"), factorise([one, one], "random")
    assert torch.equal(first[0].A_K, again[0].A_K) and not torch.equal(first[0].A_K, first[0].A_V)
    assert not torch.equal(first[0].A_K, first[1].A_K)
    assert not torch.equal(random(W, 0)[0], random(W, 1)[0])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_training_lowers_the_loss_of_every_layer_and_touches_nothing_else(
    name: str, make: Callable[[str], PreTrainedModel]
) -> None:
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = moments(model, TEXT)
    start = policy_for(model, "svd", density=0.25)
    trained = reconstruct(model, start, TEXT, Recipe(steps=60, lr=3e-3), progress=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert replace(trained, factors=start.factors) == start
    best = factorise(found)

    def loss(layer: Moments, factors: Factors, kind: str) -> float:
        W, A, B = getattr(layer, f"W_{kind}"), getattr(factors, f"A_{kind}"), getattr(factors, f"B_{kind}")
        return reconstruction_loss(W, A[:, :8], B[:8], layer.gram, layer.tokens).item()

    for index, layer in enumerate(found):
        assert trained.factors[index].A_K.shape == (64, 8) and trained.factors[index].B_V.shape == (8, 32)
        for kind in "KV":
            least, now, then = (loss(layer, f[index], kind) for f in (best, trained.factors, start.factors))
            assert least * 0.9999 <= now < then


def test_training_for_codes_helps_the_codes(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    plain = policy_for(model, "svd", density=0.5, bits=4, group=8, window=0)
    trained = reconstruct(model, plain, TEXT[:, :60], Recipe(steps=60, lr=3e-3), progress=False)
    seen: list[Tensor] = []
    layer = model.model.layers[1].self_attn
    handle = layer.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TEXT)
    handle.remove()
    W_K, W_V = layer.k_proj.weight.T, layer.v_proj.weight.T
    with torch.no_grad():
        losses = [fit_loss(Fit(p.factors[1], (16, 16), 8), seen[0], W_K, W_V).item() for p in (plain, trained)]
        smooth = fit_loss(Fit(trained.factors[1], (16, 16), None), seen[0], W_K, W_V).item()
    assert smooth < losses[1] < losses[0]


def test_every_gradient_passes_the_quantiser() -> None:
    X, W = layer_data(rows=32)
    A, B = (x.float() for x in svd(W))
    fit = Fit(Factors(A, B, A, B), (4, 4), 8)
    x = X.float().unsqueeze(0)
    K, V = fit(x)
    (K.sum() + V.sum()).backward()
    # the sum's gradient with respect to C is the same for each token: no element of a group is left out
    for A_grad, B_now in ((fit.A_K.grad, fit.B_K), (fit.A_V.grad, fit.B_V)):
        assert A_grad is not None
        assert torch.allclose(A_grad, x[0].T @ B_now.detach().sum(1).expand(32, -1), rtol=1e-4, atol=1e-4)
    values = torch.tensor([-3.0, 0.1, 9.0], requires_grad=True)
    straight_through(values, values.detach().round()).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 1, 1]


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [6, 20, 36])
def test_codes_are_within_half_a_step(rank: int) -> None:
    x = torch.randn(2, 1, 24, rank, generator=torch.Generator().manual_seed(0)) * 3 + 5
    codes, step, least = key_codes(x, 8)
    assert codes.shape == (2, 1, 3, rank, 8) and step.shape == least.shape == (2, 1, 3, rank, 1)
    error = (x - key_features(codes, step, least)).abs().unflatten(2, (3, 8)).transpose(-1, -2)
    assert (error <= 0.5 * step.float() + 2**-9 * x.abs().amax()).all()
    codes, step, least = value_codes(x)
    group = value_group(rank)
    assert rank % group == 0 and group % 2 == 0 and step.shape == (2, 1, 24, rank // group, 1)
    error = (x - value_features(codes, step, least)).abs().unflatten(-1, (-1, group))
    assert (error <= 0.5 * step.float() + 2**-9 * x.abs().amax()).all()


def test_constants_are_exact_and_a_range_may_lack_zero() -> None:
    same = torch.full((1, 1, 8, 2), 5.5)
    assert torch.equal(key_features(*key_codes(same, 8)), same)
    assert torch.equal(value_features(*value_codes(same)), same)
    x = torch.linspace(5, 6, 8).view(1, 1, 8, 1)

    def clamped(x: Tensor) -> Tensor:  # the authors' quantiser: an integer zero point, kept within the codes
        step = (x.max() - x.min()) / 15
        zero = (-x.min() / step).round().clamp(0, 15)
        return ((x / step + zero).round().clamp(0, 15) - zero) * step

    assert (clamped(x) - x).abs().max() > 3.9 and len(clamped(x).unique()) == 1  # all of them become 1
    assert (key_features(*key_codes(x, 8)) - x).abs().max() < 1 / 30 + 0.01


def test_padding_sets_no_scale() -> None:
    x = torch.ones(1, 1, 8, 2)
    x[0, 0, :3] = 1000.0
    valid = torch.arange(8).unsqueeze(0) >= 3
    assert torch.equal(key_features(*key_codes(x, 8, valid))[0, 0, 3:], x[0, 0, 3:])
    assert decode(*key_codes(x, 8)).unique().numel() > 1


# -- the cache against the rule written out ----------------------------------------------------------------------------

B, H, G, D, T, WIDTH = 2, 2, 3, 8, 40, 20
ROTARY = Rotary(1.0 / 100 ** (torch.arange(0, D, 2) / D), 1.0)


class Attention(nn.Module):
    """As much of an attention module as the layer looks at."""

    def __init__(self, norm: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, H * D, bias=bias) for _ in range(2))
        self.num_key_value_groups = G
        if norm:
            self.k_norm = nn.RMSNorm(D)
            self.k_norm.weight.data.uniform_(0.5, 2)


def written_out(policy: CSKV, module: Any, s: dict[str, Any], prompt: int, quantised: bool) -> Tensor:
    """Attention in which the key of slot j is exact for the query of slot t, or rebuilt, pair by pair; fp64."""
    r_K, r_V = (share * H for share in policy.head_ranks(D))
    f = policy.factors[0]
    X = s["hidden"].double()
    C_K, C_V = X @ f.A_K[:, :r_K].double(), X @ f.A_V[:, :r_V].double()
    if quantised:
        whole = T // policy.together * policy.together
        C_K[:, :whole] = key_features(*key_codes(C_K[:, None, :whole].float(), policy.together, s["real"][:, :whole]))[
            :, 0
        ]
        C_V = value_features(*value_codes(C_V[:, None].float()))[:, 0].double()
    k_proj, v_proj = copy.deepcopy(module.k_proj).double(), copy.deepcopy(module.v_proj).double()
    keys = [k_proj(X), C_K @ f.B_K[:r_K].double() + (0 if k_proj.bias is None else k_proj.bias)]
    values = [v_proj(X), C_V @ f.B_V[:r_V].double() + (0 if v_proj.bias is None else v_proj.bias)]
    heads = [[x.unflatten(-1, (H, D)).transpose(1, 2) for x in pair] for pair in (keys, values)]
    if hasattr(module, "k_norm"):
        heads[0] = [copy.deepcopy(module.k_norm).double()(x) for x in heads[0]]
    cos, sin = (x.double().unsqueeze(1) for x in s["rotation"])
    heads[0] = [rotate(x, cos, sin) for x in heads[0]]
    query = s["query"].double()
    out = torch.zeros_like(query)
    g, w = policy.together, policy.window
    for row in range(B):
        real = s["real"][row].tolist()
        sinks = [j for j in range(T) if real[j]][: policy.sinks]
        for t in range(T):
            seen = [j for j in range(t + 1) if real[j]]
            if not seen:
                continue
            begin = 0 if t < prompt else max(0, (t - w) // g * g)
            kind = [0 if j >= begin or j in sinks else 1 for j in seen]
            for head in range(H * G):
                k = torch.stack([heads[0][i][row, head // G, j] for i, j in zip(kind, seen, strict=True)])
                v = torch.stack([heads[1][i][row, head // G, j] for i, j in zip(kind, seen, strict=True)])
                out[row, head, t] = (k @ query[row, head, t] * D**-0.5).softmax(0) @ v
    return out


@pytest.mark.parametrize("prompt", [0, 21])
@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 7, "sinks": 0},  # the paper: a sliding window
        {"window": 0, "sinks": 0, "group": 8},  # its code: blocks
        {"window": 7, "sinks": 3},
        {"window": 3, "sinks": 2, "group": 5},
        {"window": 5, "sinks": 3, "bits": 4, "group": 8},
        {"window": 0, "sinks": 0, "bits": 4, "group": 8},
        {"window": T, "sinks": 0},
        {"window": 7, "sinks": 3, "key_share": 0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize(("norm", "bias"), [(False, False), (True, True)])
def test_each_pair_is_exact_or_rebuilt(
    options: dict[str, Any], pads: tuple[int, int], prompt: int, norm: bool, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, WIDTH, generator=generator)
    module = Attention(norm, bias)
    gram = hidden.flatten(0, 1).T @ hidden.flatten(0, 1)
    layer_moments = Moments(gram, hidden.abs().mean((0, 1)), B * T, module.k_proj.weight.T, module.v_proj.weight.T)
    policy = CSKV(factorise([layer_moments]), density=0.5, **options)
    shape = LayerShape(0, module, H, G, D, torch.float32, ROTARY)
    real = torch.arange(T) >= torch.tensor(pads).unsqueeze(1)
    rotation = ROTARY((real.long().cumsum(-1) - 1).clamp(min=0))
    cos, sin = (x.unsqueeze(1) for x in rotation)
    with torch.no_grad():
        k, v = (p(hidden).unflatten(-1, (H, D)).transpose(1, 2) for p in (module.k_proj, module.v_proj))
        k = rotate(module.k_norm(k) if norm else k, cos, sin)
    query = rotate(torch.randn(B, H * G, T, D, generator=generator), cos, sin)
    s = {"hidden": hidden, "rotation": rotation, "real": real, "query": query}
    expected = written_out(policy, module, s, prompt, policy.bits == 4)
    rows = real[:, None].expand(-1, H * G, -1)
    for pieces in ([T], [1] * T, [7, 1, 20, 12]) if not prompt else ([prompt] + [1] * (T - prompt),):
        layer = policy.layer(shape, streamed=not prompt)
        outputs, first = [], 0
        with torch.no_grad():
            for size in pieces:
                part = slice(first, first + size)
                padding = None if real.all() else real[:, : part.stop]
                mask = Mask.causal(range(part.start, part.stop), B, padding, torch.device("cpu"))
                layer.expect(module, hidden[:, part], tuple(x[:, part] for x in rotation))  # type: ignore[arg-type]
                layer.update(k[:, :, part], v[:, :, part])
                outputs.append(layer.attend(module, query[:, :, part], mask, D**-0.5, None))
                first = part.stop
        found = torch.cat(outputs, 2)
        assert torch.allclose(found[rows].double(), expected[rows], atol=1e-4)


# -- nothing given up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_or_a_long_window_gives_the_models_own_logits(
    name: str, make: Callable[[str], PreTrainedModel]
) -> None:
    stock, model = make(name), make(name)
    pieces = [20] + [1] * 10
    expected = steps(stock, DynamicCache(config=stock.config), pieces)
    base = policy_for(model, window=3, sinks=0)
    full_rank = Always(base.factors, density=1.0, window=3, sinks=0)
    for policy in (full_rank, replace(base, density=1 / 16, window=64), replace(base, density=1.0)):
        for mode in ("exact", "streamed"):
            cache = policy.cache(model, prefill=mode)
            found = steps(model, cache, pieces)
            assert torch.allclose(found[1], expected[1], atol=2e-4)
            assert torch.allclose(found[0, 6:], expected[0, 6:], atol=2e-4)
    assert not torch.allclose(steps(model, base.cache(model), pieces)[1], expected[1], atol=1e-2)


def test_a_prompt_read_exactly_shows_no_loss_at_any_rank(make: Callable[[str], PreTrainedModel]) -> None:
    # the trap: perplexity from one pass over a prompt says that the cache costs nothing
    model = make("llama")
    policy = policy_for(model, density=1 / 16, window=0, sinks=0)
    plain = steps(model, None, [60], (0, 0))
    exact = policy.cache(model)
    assert torch.allclose(steps(model, exact, [60], (0, 0)), plain, atol=1e-5)
    streamed = steps(model, policy.cache(model, prefill="streamed"), [60], (0, 0))
    assert (streamed - plain)[:, 1:].abs().max() > 0.02
    # and the cache that showed no loss is as small as the one that did
    exact.finish()
    assert exact.nbytes == 2 * sum(policy.nbytes(exact.layer_shape(model, i), 60) for i in range(2))


# -- the life of a cache (the contract of policies has the rest) -------------------------------------------------------

LOSSY: dict[str, dict[str, Any]] = {"16": {}, "16 in groups": {"group": 5}, "4": {"bits": 4, "group": 8}}


def test_files_from_before_the_class_moved_are_read(tmp_path: Path, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    policy = policy_for(model)
    cache = policy.cache(model)
    prefill(model, cache, batch((0,))["input_ids"])
    paths = tmp_path / "policy.safetensors", tmp_path / "cache.safetensors"
    policy.save(paths[0])
    cache.save(paths[1])
    for path in paths:  # CSKV and its factors were in one module
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        told = {name: re.sub(r"refimpl\.kvcache\.cskv\.\w+", "refimpl.kvcache.cskv", x) for name, x in metadata.items()}
        told = {name: re.sub(r', "seal": "\w+"', "", x) for name, x in told.items()}  # and files had no seal
        assert told != metadata
        save_file(load_file(path), path, told)
    again = CSKV.load(paths[0])
    assert again == policy
    assert CompressedCache.load(paths[1], model, again).nbytes == cache.nbytes
    with pytest.raises(CheckpointError, match="another factors"):
        CompressedCache.load(paths[1], model, policy_for(model, "svd"))


@pytest.mark.parametrize("init", ["closed_form", "asvd"])
def test_fit_is_its_stages_one_after_the_other(init: str, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("qwen3")
    plain = CSKV(density=0.5, window=7)
    untrained = plain.fit(model, TEXT, init=init)
    assert untrained == replace(plain, factors=factorise(moments(model, TEXT), init))
    recipe = Recipe(steps=3, lr=1e-3)
    trained = plain.fit(model, TEXT, init=init, recipe=recipe, progress=False)
    assert trained == reconstruct(model, untrained, TEXT, recipe, progress=False) != untrained


@pytest.mark.parametrize("options", LOSSY.values(), ids=LOSSY)
@pytest.mark.parametrize("keep", [36, 29, 21, 2])
def test_cropping_further_back(options: dict[str, Any], keep: int, make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    policy = policy_for(model, **options)
    cache = policy.cache(model)
    steps(model, cache, [38, 1], (0, 0))
    layer = cache.layers[1]
    start = layer.start
    whole = layer._stored()
    cache.crop(keep - 39)
    assert cache.get_seq_length() == keep and layer.start <= min(start, keep)
    if keep < start:  # what was stored is what is left of it, or came back as the store knows it
        now = [
            torch.cat([x, layer.parts[name]], 2)
            for x, name in zip(layer._stored(), ("key_pending", "value_pending"), strict=True)
        ]
        for a, b in zip(now, whole, strict=True):
            assert torch.allclose(a, b[:, :, :keep], atol=1e-5)
    more = batch((0, 0), 30, seed=4)["input_ids"]
    out = torch.cat([model(more[:, i : i + 5], **cache_argument(cache)).logits for i in range(0, 30, 5)], 1)
    assert torch.isfinite(out).all() and cache.get_seq_length() == keep + 30
    cache.finish()
    assert layer.start == (keep + 30 - 7) // layer.group * layer.group or layer.group == 5
    assert (layer.parts["sink_slots"] == torch.arange(3)).all()


def test_codes_of_padded_rows_are_not_broken_up(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    cache = policy_for(model, bits=4, group=8).cache(model)
    steps(model, cache, [40, 1])
    with pytest.raises(OptionError, match=r"crop: .* keep 16 or 24, or take cache\.copy"):
        cache.crop(-21)
    cache.crop(-17)
    assert cache.get_seq_length() == 24


@pytest.mark.parametrize("options", LOSSY.values(), ids=LOSSY)
def test_what_has_left_the_window_is_never_rewritten(
    options: dict[str, Any], make: Callable[[str], PreTrainedModel]
) -> None:
    model = make("llama")
    cache = policy_for(model, **options).cache(model)
    prefill(model, cache, batch((0, 0))["input_ids"])
    parts = cache.layers[0].parts
    stored = [n for n in parts if n.startswith(("key_", "value_", "sink_")) and "pending" not in n]
    before = {name: parts[name].clone() for name in stored}
    for token in range(12):
        model(torch.full((2, 1), 3 + token), **cache_argument(cache))
        for name, old in before.items():
            assert torch.equal(cache.layers[0].parts[name][:, :, : old.shape[2]], old)
    grown = [n for n in stored if cache.layers[0].parts[n].shape[2] > before[n].shape[2]]
    assert set(grown) == {n for n in stored if not n.startswith("sink_")}


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LOSSY.values(), ids=LOSSY)
@pytest.mark.parametrize("length", [5, 29, 64])
def test_bytes_at_full_density_are_counted_before_and_after(
    options: dict[str, Any], length: int, make: Callable[[str], PreTrainedModel]
) -> None:
    model = make("llama")
    policy = policy_for(model, density=1.0, **options)
    cache = policy.cache(model)
    prefill(model, cache, batch((0,), length)["input_ids"])
    assert cache.nbytes == sum(policy.nbytes(cache.layer_shape(model, index), length) for index in range(2))
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in layer.parts.values())
    assert held <= cache.nbytes + 2 * 64  # no view keeps more alive than is counted


def test_numbers_kept_after_so_many_tokens(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    sliding = policy_for(model, density=0.25, window=7, sinks=0)
    blocks = policy_for(model, density=0.25, window=0, sinks=0, group=8)
    caches = sliding.cache(model), blocks.cache(model)
    ids = batch((0,), 40)["input_ids"]
    for t in range(1, 41):
        for cache in caches:
            model(ids[:, t - 1 : t], **cache_argument(cache))
            parts = cache.layers[1].parts
            features = [x for name, x in parts.items() if name.startswith(("key_", "value_"))]
            assert sum(x.numel() for x in features) == t * (8 + 8)
            exact = parts["keys"].numel() + parts["values"].numel()
            # a window that counts the query's own token has 8; between two steps 7 of them are kept
            assert exact == 2 * 32 * (min(t, 7) if cache is caches[0] else t % 8)


def test_trained_factors_keep_to_their_rank(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    trained = reconstruct(model, policy_for(model, density=0.25), TEXT, Recipe(steps=2), progress=False)
    with pytest.raises(OptionError, match=r"density=0\.5 needs rank 16, but the factors of layer 0 have 8"):
        replace(trained, density=0.5).cache(model)
    assert trained.cache(model, budget=0.9, length=200).policy.density == 0.25
    assert trained.cache(model, budget=1.0, length=200).policy.density == 1.0  # keeps everything, needs no factor


def test_how_ranks_are_shared() -> None:
    def ranks(density: float, share: float, bits: int = 16) -> tuple[int, int]:
        return CSKV((), density, key_share=share, bits=bits).head_ranks(64)

    assert [ranks(rho, 0.5)[0] for rho in (0.5, 0.33, 0.2)] == [32, 21, 12]  # the code's floor
    assert ranks(0.5, 0.25) == (16, 48)  # the authors' script: 0.25 for keys, 0.75 for values
    assert ranks(0.9, 0.25) == (50, 64) and ranks(1.0, 0.25) == (64, 64)  # no more than there is
    assert ranks(1 / 64, 0.9) == (1, 1)
    assert ranks(0.33, 0.5, 4) == (20, 20)
    assert ranks(0.001, 0.5) == (0, 0)


def test_five_percent_of_smollm2(smollm2_folder: Path) -> None:
    from refimpl.lab.models.language import smollm2

    model = smollm2(torch.bfloat16, layers=1)
    policy = CSKV(factorise(moments(model, TEXT)), bits=4)
    cache = policy.cache(model, budget=0.05, length=2048)
    assert cache.policy.bits == 4 and cache.policy.density * 64 >= 4
    generator = torch.Generator().manual_seed(0)
    prefill(model, cache, torch.randint(0, 49000, (1, 2048), generator=generator))
    assert 0.04 * 2048 * 768 < cache.nbytes <= 0.05 * 2048 * 768


# -- the kernel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads", [(0, 0), (6, 0)])
@pytest.mark.parametrize("options", [{}, {"sinks": 0}, {"bits": 4, "group": 8}, {"window": 0}, {"window": 30}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_kernel_gets_what_the_layer_attends_to(
    name: str,
    options: dict[str, Any],
    pads: tuple[int, int],
    make: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make(name)
    cache = policy_for(model, **options).cache(model)
    steps(model, cache, [32], pads)
    compared = []
    plain = CSKVLayer.attention

    def both(layer: CSKVLayer, incoming: Any) -> Any:
        out, mass = plain(layer, incoming)
        inputs = layer.kernel_inputs(incoming)
        assert inputs is not None
        compared.append((out, reference(inputs)))
        return out, mass

    monkeypatch.setattr(CSKVLayer, "attention", both)
    mask = batch(pads, 32)["attention_mask"]
    for token in range(4):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        model(
            torch.full((2, 1), 3 + token),
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            **cache_argument(cache),
        )
    assert len(compared) == 8
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in compared)


def test_what_the_kernel_is_not_asked(make: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    inputs = CSKVLayer.kernel_inputs
    plain = CSKVLayer.attention

    def spy(layer: CSKVLayer, incoming: Any) -> Any:
        asked.append(inputs(layer, incoming))
        return plain(layer, incoming)

    monkeypatch.setattr(CSKVLayer, "attention", spy)
    model = make("llama")
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[0, 10:13] = 0  # padding in the middle
    for of, pieces, attention_mask in (
        (make("qwen3"), [24, 1], None),
        (model, [24, 2], None),
        (model, [5, 1], None),
        (model, [24, 1], mask),
    ):
        asked.clear()
        cache = policy_for(of).cache(of)
        asked.clear()
        first = 0
        for size in pieces:
            known = None if attention_mask is None else attention_mask[:, : first + size]
            position = None if known is None else (known.cumsum(-1) - 1).clamp(min=0)[:, first:]
            of(torch.full((2, size), 5), attention_mask=known, position_ids=position, **cache_argument(cache))
            first += size
        assert asked and all(answer is None for answer in asked)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group": 8}], ids=str)
def test_a_gpu_runs_the_kernel(
    options: dict[str, Any], tiny_llama: Callable[..., PreTrainedModel], fake_cuda: Callable[[], Any]
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    built: Any = tiny_llama(head_dim=32).bfloat16()  # narrower heads are not for the kernel
    policy = policy_for(built, **options)
    with fake_cuda() as place:
        model = place(built)
        cache = policy.cache(model)
        prefill(model, cache, torch.ones(2, 40, dtype=torch.long, device="cuda"))
        with Watch():
            model(torch.ones(2, 1, dtype=torch.long, device="cuda"), **cache_argument(cache))
    assert sum("lowrank_decode" in name for name in called) == 2  # one a layer


# -- models, dtypes, devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LOSSY.values(), ids=LOSSY)
@pytest.mark.parametrize("name", NAMES)
def test_factors_are_trained_on_sixteen_bit_models(
    name: str, options: dict[str, Any], make: Callable[[str], PreTrainedModel]
) -> None:
    model = make(name).bfloat16()
    assert moments(model, TEXT)[0].gram.dtype == torch.float32
    reconstruct(model, policy_for(model, **options), TEXT, Recipe(steps=1), progress=False).cache(model)


def test_models_that_cannot_work_are_refused_by_name(
    make: Callable[[str], PreTrainedModel], tiny_gpt2: Callable[..., PreTrainedModel]
) -> None:
    model, gpt2 = make("llama"), tiny_gpt2()
    policy = policy_for(model)
    with pytest.raises(OptionError, match="k_proj and v_proj, but GPT2Attention has none"):
        moments(gpt2, TEXT)
    with pytest.raises(OptionError, match="GPT2Attention has none"):
        policy.cache(gpt2)
    olmo = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=256,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            num_hidden_layers=2,
            pad_token_id=0,
        )
    )
    with pytest.raises(OptionError, match="k_norm of Olmo2Attention"):
        moments(olmo, TEXT)
    odd = make("llama")
    odd.model.layers[0].self_attn.v_proj.register_forward_hook(lambda m, a, out: out if a[0].shape[1] == 1 else 2 * out)
    with pytest.raises(OptionError, match="the values of LlamaAttention are not what its projection gives"):
        odd(batch((0,))["input_ids"], **cache_argument(policy.cache(odd)))


def test_wrong_options(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    good = policy_for(model)
    for options, message in (
        ({"density": 1.1}, r"density=1\.1: the rank would be above"),
        ({"density": 0.0}, r"density=0\.0"),
        ({"window": -1}, "window=-1"),
        ({"sinks": -1}, "sinks=-1"),
        ({"bits": 8}, "bits=8"),
        ({"group": 0}, "group=0"),
        ({"bits": 4, "group": 12}, "group=12"),
        ({"key_share": 1.0}, r"key_share=1\.0"),
    ):
        with pytest.raises(OptionError, match=message):
            replace(good, **options)
    with pytest.raises(OptionError, match=r"rank=0: the heads of layer 0 have 16 channels; use 1 to 16"):
        replace(good, density=0.05).cache(model)
    with pytest.raises(OptionError, match="factors: there are 2, but the model has a layer 2; call fit"):
        good.cache(make("gemma3"))
    with pytest.raises(OptionError, match="map 64 channels to 32, its projections 64 to 64"):
        replace(good, factors=good.factors * 2).cache(make("qwen3"))
    with pytest.raises(OptionError, match="init='closedform'.*did you mean 'closed_form'"):
        factorise(moments(model, TEXT), "closedform")
    with pytest.raises(CalibrationError, match="outside the vocabulary"):
        moments(model, TEXT + 1000)
    with pytest.raises(OptionError, match="shorter than a group of 32"):
        reconstruct(model, replace(good, bits=4), TEXT[:, :20])
    far = torch.arange(41).unsqueeze(0) + 40
    with pytest.raises(OptionError, match="pass position_ids"):
        model(batch((0,))["input_ids"], position_ids=far, **cache_argument(good.cache(model)))


def test_factors_on_a_device(make: Callable[[str], PreTrainedModel], fake_cuda: Callable[[], Any]) -> None:
    built: Any = make("llama")
    with fake_cuda() as place:
        model = place(built)
        ids = torch.ones(2, 16, dtype=torch.long, device="cuda")
        found = moments(model, ids)
        for init in ("closed_form", "asvd", "svd", "random"):
            factors = factorise(found, init)
            assert factors[0].A_K.device.type == factors[1].B_V.device.type == "cuda"


def test_a_layer_is_made_of_the_factors_that_were_asked_for(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    policy = policy_for(model, density=0.5, key_share=0.25)
    layer = policy.cache(model).layers[1]
    assert isinstance(layer, CSKVLayer)
    assert (layer.A_K.shape, layer.B_V.shape) == ((64, 8), (24, 32))
    assert torch.equal(layer.B_V, policy.factors[1].B_V[:24])


def test_compressed_weights_are_the_ones_approximated(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    compress(model, RTN(4, 32), TEXT)
    found = moments(model, TEXT)
    for index, layer in enumerate(found):
        assert torch.equal(layer.W_K.T, model.model.layers[index].self_attn.k_proj.to_dense())
    policy = Always(factorise(found), density=1.0, window=0, sinks=0)
    cache = policy.cache(model, prefill="streamed")
    torch.testing.assert_close(steps(model, cache, [41], (0,)), model(batch((0,))["input_ids"]).logits)
