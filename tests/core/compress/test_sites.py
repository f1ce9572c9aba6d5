"""Sites, fused experts, the walk over blocks and the statistics gathered on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from refimpl import RTN, compress
from refimpl.core.compress.driver import block_inputs
from refimpl.core.compress.sites import Site, UnfusedExperts, find_blocks, find_sites, skipped_modules, unfuse_experts
from refimpl.core.compress.stats import Collector, InputStats
from refimpl.core.errors import CalibrationError, OptionError

Factory = Callable[..., PreTrainedModel]
SMALL = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
MORE = {
    "Gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "Phi3": ("Phi3Config", "Phi3ForCausalLM", {"intermediate_size": 96, "pad_token_id": 0}),
    "OPT": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"intermediate_size": 96}),
    "GPTJ": ("GPTJConfig", "GPTJForCausalLM", {"n_embd": 64, "n_head": 4, "n_layer": 3, "rotary_dim": 8}),
    "Bloom": ("BloomConfig", "BloomForCausalLM", {}),
    "Qwen3Moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
}


def make(name: str, request: pytest.FixtureRequest) -> PreTrainedModel:
    if name in MORE:
        config, model, options = MORE[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **options})).eval()
    return request.getfixturevalue(f"tiny_{name.lower()}")()


ALL = ["Llama", "GPT2", "Mixtral", "Qwen3", *MORE]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_walking_the_blocks_reproduces_the_model(name: str, attention: str, request: pytest.FixtureRequest) -> None:
    model = make(name, request)
    model.set_attn_implementation(attention)
    tokens = torch.randint(3, 256, (5, 12), generator=torch.Generator().manual_seed(1))
    _, blocks = find_blocks(model)
    seen: list[list[Tensor]] = []
    handles = [
        block.register_forward_hook(lambda _, args, out: seen[-1].append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        for batch in tokens.split(2):
            seen.append([])
            model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        walk = block_inputs(model, list(tokens.split(2)))
        assert list(find_blocks(model)[1]) == list(blocks)
        for index, block in enumerate(blocks):
            walk.run(block, index, keep=True)
            for batch, hidden in enumerate(walk.hidden):
                assert torch.equal(hidden, seen[batch][index]), (index, batch)


def test_masks_are_kept_once_for_all_batches(request: pytest.FixtureRequest) -> None:
    model = make("Gemma3", request)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        walk = block_inputs(model, list(torch.randint(3, 256, (8, 12)).split(2)))
    for calls in walk.calls:
        assert len({id(kwargs["attention_mask"]) for _, kwargs in calls}) == 1
    sliding, full = (walk.calls[index][0][1]["attention_mask"] for index in (0, 1))
    assert not torch.equal(sliding, full)


def test_model_that_works_between_its_blocks_is_refused() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = layer(hidden) * 2
            return hidden

    with pytest.raises(OptionError, match="changes the hidden states between them"):
        block_inputs(Between(), [torch.zeros(1, 4, dtype=torch.long)])


@pytest.mark.parametrize(
    ("name", "count", "example"),
    [
        ("Llama", 14, "model.layers.0.self_attn.q_proj"),
        ("GPT2", 8, "transformer.h.0.attn.c_attn"),
        ("Mixtral", 24, "model.layers.1.mlp.experts.3.down_proj"),
        ("Qwen3", 21, "model.layers.2.mlp.gate_proj"),
        ("Gemma3", 21, "model.layers.0.self_attn.o_proj"),
        ("Phi3", 12, "model.layers.0.self_attn.qkv_proj"),
        ("OPT", 18, "model.decoder.layers.0.fc1"),
        ("NeoX", 12, "gpt_neox.layers.0.attention.query_key_value"),
    ],
)
def test_sites(name: str, count: int, example: str, request: pytest.FixtureRequest) -> None:
    model = make(name, request)
    sites = find_sites(model)
    names = [site.name for site in sites]
    assert len(sites) == count == len(set(names)) and example in names
    assert [site.block for site in sites] == sorted(site.block for site in sites)
    for site in sites:
        assert site.weight.shape == (site.out_features, site.in_features)
        assert model.get_submodule(site.name) is site.module
        x = torch.randn(3, site.in_features)
        bias = 0 if site.bias is None else site.bias
        assert torch.allclose(site.module(x), x @ site.weight.T + bias, atol=1e-5)
    skipped = skipped_modules(model, sites)
    assert not set(skipped) & set(names)
    held = sum(p.numel() for name in {*skipped, *names} for p in model.get_submodule(name).parameters(recurse=False))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    shared = model.get_input_embeddings().weight.numel() if tied and "lm_head" in skipped else 0
    assert held - shared == sum(p.numel() for p in model.parameters())  # nothing is forgotten


def test_routers_and_embeddings_are_no_sites(tiny_mixtral: Factory) -> None:
    model = tiny_mixtral()
    skipped = skipped_modules(model, find_sites(model))
    assert "model.embed_tokens" in skipped and "lm_head" in skipped
    assert any("gate" in name or "router" in name for name in skipped)


def test_targets(tiny_llama: Factory) -> None:
    model = tiny_llama()
    assert [site.name for site in find_sites(model, r"1\.mlp\.up")] == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(OptionError, match=r"targets='nothing' matches no site; names look like 'model\.layers\.0"):
        find_sites(model, "nothing")
    with pytest.raises(OptionError, match=r"targets='\(' is not a regular expression"):
        find_sites(model, "(")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_unfused_experts_compute_the_same(name: str, request: pytest.FixtureRequest) -> None:
    model = make(name, request)
    fused = {n: m for n, m in model.named_modules() if type(m).__name__.endswith("Experts")}
    assert fused
    generator = torch.Generator().manual_seed(0)
    for module in fused.values():
        width, experts = module.down_proj.shape[1], module.down_proj.shape[0]
        hidden = torch.randn(7, width, generator=generator)
        index = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [0, 1], [1, 0], [2, 0]])  # the last one stays idle
        weights = torch.rand(7, 2, generator=generator)
        ours = UnfusedExperts(module)
        assert experts == ours.num_experts == 4
        with torch.no_grad():
            assert torch.allclose(ours(hidden, index, weights), module(hidden, index, weights), atol=1e-6)
        assert ours.get_submodule("2.down_proj").weight.data_ptr() == module.down_proj[2].data_ptr()  # no copy
    tokens = torch.randint(3, 256, (2, 9), generator=generator)
    with torch.no_grad():
        before = model(tokens).logits
        assert unfuse_experts(model) == list(fused) and unfuse_experts(model) == []
        assert torch.allclose(model(tokens).logits, before, atol=1e-5)


def test_experts_of_another_layout_are_refused_by_name() -> None:
    config = transformers.GptOssConfig(
        **SMALL, num_local_experts=4, intermediate_size=32, num_key_value_heads=2, head_dim=16
    )
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    with pytest.raises(OptionError, match=r"'model\.layers\.0\.mlp\.experts' \(GptOssExperts\).*convert"):
        compress(model, RTN(4, 32), progress=False)


def test_experts_held_as_matrices_are_refused_by_name() -> None:
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        vocab_size=20,
        max_seq_len=16,
        attn_config={"rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4},
    )
    with torch.device("meta"):
        model = transformers.DbrxForCausalLM(config)
    with pytest.raises(OptionError, match=r"Dbrx.*not supported"):
        find_sites(model)


def test_wide_router_is_no_site() -> None:
    class TokenRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 64)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.proj = TokenRouter(), nn.Linear(32, 32)

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    assert [site.name for site in find_sites(model)] == ["layers.0.proj", "layers.1.proj"]
    assert skipped_modules(model, find_sites(model))["layers.0.router.gate"] == "Linear: router or gate"


def test_encoder_decoder_and_modules_without_blocks_are_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=20)
    )
    with pytest.raises(OptionError, match="T5ForConditionalGeneration: encoder-decoder"):
        find_sites(t5)
    with pytest.raises(OptionError, match="no nn.ModuleList"):
        find_sites(nn.Linear(4, 4))


# ---- statistics


def test_streamed_statistics_equal_one_shot() -> None:
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    stats = InputStats(6, "cpu", {"gram", "abs"})
    for piece in X.view(4, 10, 6).split([1, 2, 1]):
        stats.add(piece)
    assert stats.tokens == 40
    assert torch.allclose(stats.gram, X.T @ X, atol=1e-4)
    assert torch.allclose(stats.mean_abs, X.abs().mean(0), atol=1e-6)
    assert torch.allclose(stats.norm, X.norm(dim=0), atol=1e-5)
    only_gram = InputStats(6, "cpu", {"gram"})
    only_gram.add(X.bfloat16())
    assert only_gram.gram.dtype == torch.float32
    assert torch.allclose(only_gram.norm, X.bfloat16().float().norm(dim=0), atol=1e-4)


def test_sites_with_one_input_share_one_statistic(tiny_llama: Factory) -> None:
    model = tiny_llama()
    sites = find_sites(model, r"layers\.0\.")
    with Collector(sites, {"gram"}) as collector, torch.no_grad():
        for batch in torch.randint(3, 256, (4, 8)).split(2):
            model(batch)
    stats = {site.name.rpartition(".")[2]: collector.stats[site.name] for site in sites}
    assert stats["q_proj"] is stats["k_proj"] is stats["v_proj"]
    assert stats["gate_proj"] is stats["up_proj"]
    assert len({id(value) for value in stats.values()}) == 4
    assert all(value.tokens == 32 for value in stats.values())
    assert not any(site.module._forward_pre_hooks for site in sites)


def test_layers_with_unlike_inputs_do_not_share() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x.clone())

    block = Two()

    with Collector([Site("a", 0, block, "a"), Site("b", 0, block, "b")], {"gram"}) as collector:
        block(torch.randn(3, 4))
    assert collector.stats["a"] is not collector.stats["b"]


def test_nan_inputs_are_named(tiny_llama: Factory) -> None:
    model = tiny_llama()
    sites = find_sites(model, "mlp")
    model.model.layers[0].post_attention_layernorm.weight.data[3] = float("inf")
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.mlp\.gate_proj.*NaN"):
        with Collector(sites, {"gram"}), torch.no_grad():
            model(torch.randint(3, 256, (2, 8)))
