"""The outer step: what it computes, that it resumes bit for bit, and that two processes agree with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refimpl.core.errors import OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.outer import OuterStep
from refimpl.core.train.sampling import Shuffled, loader, mixture_loader
from refimpl.lab.study.jobs import in_group


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, 8, generator=generator)
    return x, x @ torch.randn(8, 3, generator=generator)


def network(seed: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def keep(epsilon: float) -> Callable[[list[Tensor], list[Tensor]], None]:
    """fast <- slow + epsilon (fast - slow)."""

    def update(slow: list[Tensor], fast: list[Tensor]) -> None:
        for before, now in zip(slow, fast, strict=True):
            now.copy_(torch.lerp(before, now, epsilon))

    return update


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int, nn.Module], None]:
    def hook(now: int, model: nn.Module) -> None:
        if now == step:
            raise Stop

    return hook


SGD = Recipe(30, lr=0.04, optimizer="sgd", momentum=0.0, schedule="constant")


def test_after_every_step_of_plain_sgd_it_scales_the_rate() -> None:
    stepped, scaled = network(), network()
    outer = OuterStep(stepped, every=1, update=keep(0.25))
    first = train(stepped, batches(*data(), batch_size=8), squared_error, SGD, after_step=[outer], progress=False)
    recipe = Recipe(30, lr=0.01, optimizer="sgd", momentum=0.0, schedule="constant")
    second = train(scaled, batches(*data(), batch_size=8), squared_error, recipe, progress=False)
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    for name, value in weights(scaled).items():
        torch.testing.assert_close(weights(stepped)[name], value, rtol=1e-4, atol=1e-6)
    assert first.losses[-1] < 0.7 * first.losses[0]


def test_its_steps_are_those_of_a_loop_written_out() -> None:
    model, ours = network(), network()
    epsilon, every = 0.3, 4
    seen: list[int] = []

    def counted(slow: list[Tensor], fast: list[Tensor]) -> None:
        seen.append(len(slow))
        keep(epsilon)(slow, fast)

    rows = list(batches(*data(), batch_size=8))
    outer = OuterStep(model, every, counted)
    train(
        model,
        batches(*data(), batch_size=8),
        squared_error,
        Recipe(10, lr=0.01, schedule="constant"),
        after_step=[outer],
        progress=False,
    )
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.0)
    slow = weights(ours)
    parameters = dict(ours.named_parameters())
    for step in range(1, 11):
        squared_error(ours.train(), rows[step - 1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(slow[name] + epsilon * (parameter - slow[name]))
            slow = weights(ours)
    for name, value in weights(ours).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-6)
    for value, expected in zip(outer.slow, slow.values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)  # of step 8, not of step 10
    assert seen == [6, 6]


def test_to_keep_everything_changes_no_bit() -> None:
    plain, stepped = network(), network()
    recipe = Recipe(12, lr=0.01, clip=1.0)
    outer = OuterStep(stepped, every=3, update=lambda slow, fast: None)
    train(plain, batches(*data(), batch_size=8), squared_error, recipe, progress=False)
    train(stepped, batches(*data(), batch_size=8), squared_error, recipe, after_step=[outer], progress=False)
    assert same(plain, stepped)
    # 12 is an outer step
    assert all(torch.equal(value, p) for value, p in zip(outer.slow, plain.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_run_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    recipe = Recipe(30, lr=0.02, optimizer=optimizer, accumulate=2, clip=1.0)

    def run(model: nn.Module, *hooks: Any, **more: Any) -> None:
        outer = OuterStep(model, every=4, update=keep(0.5))
        source = mixture_loader([data(), data(1)], [0.75, 0.25], batch_size=8, steps=12)
        train(model, source, squared_error, recipe, after_step=[outer, *hooks], progress=False, **more)

    whole, broken, resumed = network(), network(), network(seed=9)
    run(whole)
    for stop in (9, 21):  # checkpoints at 7 and 21, neither an outer step
        with pytest.raises(Stop):
            run(network() if stop == 9 else broken, stop_at(stop), folder=tmp_path, checkpoint_every=7)
    run(resumed, folder=tmp_path, checkpoint_every=7)
    assert same(whole, resumed)
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in resumed.state_dict().items())


def test_frozen_and_tied_parameters_and_what_close_leaves(tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    model.transformer.wpe.requires_grad_(False)
    names = set(model.state_dict())
    outer = OuterStep(model, every=2, update=keep(0.5))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(outer.slow) == len(trained) == len(list(model.parameters())) - 1
    assert not any(buffer.requires_grad for buffer in outer.slow)
    assert len(set(model.state_dict()) - names) == len(trained)
    with pytest.raises(OptionError, match="model has an outer step already"):
        OuterStep(model, every=2, update=keep(0.5))
    outer.close()
    outer.close()
    assert set(model.state_dict()) == names
    assert not any(name.startswith("outer_slow") for name in model._ddp_params_and_buffers_to_ignore)
    OuterStep(model, every=2, update=keep(0.5)).close()


def test_slow_weights_move_with_the_model() -> None:
    model = network()
    outer = OuterStep(model, every=1, update=keep(0.5))
    model.double()
    outer(1, model)
    assert all(value.dtype == torch.float64 for value in outer.slow)


def test_bad_input_names_the_remedy() -> None:
    for every in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match=f"every={every}: use 1 or more"):
            OuterStep(network(), every, keep(0.5))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="none of its parameters require a gradient"):
        OuterStep(network().requires_grad_(False), 1, keep(0.5))


# --- two processes: samplers, mixture and outer step at once ---

KINDS = ["mixture", "shuffled", "interrupted", "fsdp"]
RECIPE = Recipe(14, lr=0.01, accumulate=2, clip=1.0)


def source(kind: str, batch_size: int) -> Any:
    if kind == "shuffled":
        return loader(data(), Shuffled(96, seed=2), batch_size)
    return mixture_loader([data(), data(1)], [0.7, 0.3], batch_size, steps=10)


def _worker(rank: int, world: int, folder: str) -> None:
    """All kinds in one pair of processes: starting them is what takes time."""
    for kind in KINDS:
        _train_in_parallel(rank, world, Path(folder, kind), kind)


def _train_in_parallel(rank: int, world: int, folder: Path, kind: str) -> None:
    def build(seed: int) -> tuple[nn.Module, OuterStep]:
        model: nn.Module = network(seed)
        if kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        return model, OuterStep(model, every=3, update=keep(0.5))

    # without sharding, a process that starts elsewhere is brought to where the first one is, slow weights included
    model, outer = build(seed=1 if kind == "fsdp" else 1 + rank)
    more: dict[str, Any] = {"progress": False}
    if kind in ("interrupted", "fsdp"):
        more |= {"folder": folder, "checkpoint_every": 4}
        with pytest.raises(Stop):
            train(model, source(kind, 8), squared_error, RECIPE, after_step=[outer, stop_at(11)], **more)
        dist.barrier()
        model, outer = build(seed=8)
    history = train(model, source(kind, 8), squared_error, RECIPE, after_step=[outer], **more)
    values = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).contiguous()
        for name, value in model.state_dict().items()
    }
    if rank == 0:
        folder.mkdir(exist_ok=True)
        save_file(values, folder / "result.safetensors")
        (folder / "losses.json").write_text(json.dumps(history.losses))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_group(_worker, 2, str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_computes(kind: str, two_processes: Path) -> None:
    single = network()
    outer = OuterStep(single, every=3, update=keep(0.5))
    history = train(single, source(kind, 16), squared_error, RECIPE, after_step=[outer], progress=False)
    losses = json.loads((two_processes / kind / "losses.json").read_text())
    assert losses == pytest.approx(history.losses, rel=1e-4)
    found = load_file(two_processes / kind / "result.safetensors")
    assert found.keys() == single.state_dict().keys()
    for name, value in single.state_dict().items():  # the slow weights among them
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
