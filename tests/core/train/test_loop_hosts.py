"""What a method hands to the loop: an optimiser, hooks on gradients, states to remember, replicas of its own."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, TensorDataset

from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.train import checkpoints as checkpoints_module
from refimpl.core.train.checkpoints import pack, unpack
from refimpl.core.train.loop import History, Recipe, batches, train
from refimpl.core.train.sampling import Shuffled, loader
from refimpl.lab.study.jobs import in_group

RECIPE = Recipe(24, lr=0.02, warmup=4, clip=1.0, accumulate=2, weight_decay=0.1)


def data(n: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return x, x @ torch.randn(6, 2, generator=generator)


def network(seed: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def run(model: nn.Module, rows: DataLoader | None = None, recipe: Recipe = RECIPE, **more: Any) -> History:
    options = {"progress": False, "checkpoint_every": 5} | more
    return train(model, rows or batches(*data(), batch_size=8), squared_error, recipe, **options)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, kinds and dtypes included."""
    if isinstance(a, nn.Module):
        return same(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int, nn.Module], None]:
    def hook(now: int, model: nn.Module) -> None:
        if now == step:
            raise Stop

    return hook


# -- loop-a: any optimiser --


class Odd(Optimizer):
    """SGD with every kind of state: codes, another shape, another dtype, text, nested, random, and of weights only."""

    def __init__(self, groups: Any, lr: float = 1.0, size: float = 0.5) -> None:
        super().__init__(groups, {"lr": lr, "size": size, "weight_decay": 0.0})
        self.generator = torch.Generator().manual_seed(7)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                move = p.grad.clone()
                if p.dim() >= 2:
                    state = self.state[p]
                    if not state:
                        state |= {"codes": torch.zeros(p.shape, dtype=torch.int8), "updates": 0, "kind": "rows"}
                        state |= {
                            "rows": torch.zeros(len(p), dtype=torch.float64),
                            "extra": {"sizes": [0.0], "at": (1, None)},
                        }
                        state |= {"half": torch.zeros(3, dtype=torch.bfloat16)}
                    state["updates"] += 1
                    assert state["kind"] == "rows" and state["extra"]["at"] == (1, None)
                    state["rows"] += p.grad.double().mean(1) * math.pi
                    state["half"] += state["rows"][0].bfloat16() / 3
                    state["codes"] = (10 * torch.sin(100 * p)).to(torch.int8)
                    state["extra"]["sizes"] = [*state["extra"]["sizes"][-2:], float(p.grad.norm())]
                    noise = torch.rand(p.shape, generator=self.generator)
                    move += (state["rows"][:, None] + 0.01 * state["codes"] * noise).float() / state["updates"]
                    move += float(state["half"].sum()) + sum(state["extra"]["sizes"])
                p -= group["lr"] * group["size"] * move

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"])


MAKERS: dict[str, Callable[[list[dict[str, Any]], Recipe], Optimizer]] = {
    "nesterov": lambda groups, recipe: torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True),
    "coupled": lambda groups, recipe: torch.optim.Adam(groups, betas=recipe.betas, amsgrad=True),
    "adagrad": lambda groups, recipe: torch.optim.Adagrad(groups),  # has a state before the first update
    "odd": lambda groups, recipe: Odd(groups),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_state_of_any_optimizer_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    made: list[Optimizer] = []

    def make(groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
        made.append(MAKERS[name](groups, recipe))
        return made[-1]

    whole, resumed = network(), network(seed=5)
    expected = run(whole, optimizer=make)
    with pytest.raises(Stop):
        run(network(), optimizer=make, folder=tmp_path, after_step=[stop_at(13)])
    found = run(resumed, optimizer=make, folder=tmp_path)
    assert found.steps == expected.steps and same(whole, resumed)
    assert made[0].state and same(made[0].state_dict(), made[2].state_dict())


def test_weights_of_sixteen_bits_keep_a_state_of_32(tmp_path: Path) -> None:
    class Master(Optimizer):
        def __init__(self, groups: Any) -> None:
            super().__init__(groups, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    exact = self.state[p].setdefault("exact", p.float())
                    exact -= group["lr"] * p.grad.float()
                    p.copy_(exact)

    def trained(**more: Any) -> nn.Module:
        model = network().bfloat16()
        rows = batches(*(tensor.bfloat16() for tensor in data()), batch_size=8)
        run(model, rows, Recipe(12), optimizer=lambda groups, recipe: Master(groups), **more)
        return model

    with pytest.raises(Stop):
        trained(folder=tmp_path, after_step=[stop_at(7)])
    assert same(trained(), trained(folder=tmp_path))


def test_the_schedule_moves_every_group_from_the_rate_it_was_made_with() -> None:
    seen: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.append([group["lr"] for group in self.param_groups])
            super().step()

    def make(groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
        assert [group["lr"] for group in groups] == [recipe.lr, 0.3] and groups[0]["weight_decay"] == 0.1
        return Watched([groups[0], groups[1] | {"lr": 0.25}])

    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.3}]
    run(model, parameters=groups, optimizer=make)
    assert seen == [[rate * RECIPE.scale(step) for rate in (RECIPE.lr, 0.25)] for step in range(RECIPE.steps)]


def test_the_built_in_optimizers_can_be_written_as_functions() -> None:
    for name in ("adamw", "sgd"):
        recipe = Recipe(9, lr=0.02, weight_decay=0.1, optimizer=name)
        ours, theirs = network(), network()
        make = {
            "adamw": lambda groups, recipe: torch.optim.AdamW(groups, betas=recipe.betas),
            "sgd": lambda groups, recipe: torch.optim.SGD(groups, momentum=recipe.momentum),
        }[name]
        assert run(ours, recipe=recipe).steps == run(theirs, recipe=recipe, optimizer=make).steps
        assert same(ours, theirs)


def test_a_folder_belongs_to_one_optimizer(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    coupled = MAKERS["coupled"]
    run(network(), recipe=Recipe(2), folder=one)
    run(network(), recipe=Recipe(2), folder=two, optimizer=coupled)
    run(network(), recipe=Recipe(2), folder=three, optimizer=lambda groups, recipe: Odd(groups, size=0.25))
    for folder, other in (
        (one, coupled),
        (two, None),
        (two, MAKERS["nesterov"]),
        (two, lambda groups, recipe: torch.optim.Adam(groups, betas=recipe.betas)),  # without amsgrad
        (three, lambda groups, recipe: Odd(groups, size=0.5)),
    ):
        with pytest.raises(CheckpointError, match="holds a run with another optimizer"):
            run(network(), recipe=Recipe(2), folder=folder, optimizer=other)
    run(network(), recipe=Recipe(2), folder=two, optimizer=coupled)


# -- loop-b: after the backward pass --


def test_hooks_see_the_whole_gradient_before_it_is_clipped() -> None:
    model, seen = network().eval(), []
    model[2].p = 0.0
    before = [p.detach().clone() for p in model.parameters()]

    def hook(step: int, now: nn.Module) -> None:
        if step == 1:
            assert now is model and same([p.detach() for p in now.parameters()], before)
            seen.extend(p.grad.clone() for p in now.parameters())
        for p in now.parameters():
            p.grad.fill_(3.0)

    rows = batches(*data(), batch_size=8)
    history = run(model, rows, Recipe(3, accumulate=2, clip=1e-6, optimizer="sgd", momentum=0.0), after_backward=[hook])
    other = network()
    other[2].p = 0.0
    rows.sampler.sampler.set_epoch(0)  # type: ignore[attr-defined]
    for _, batch in zip(range(2), rows, strict=False):
        (squared_error(other, batch) / 2).backward()
    for found, p in zip(seen, other.parameters(), strict=True):
        assert torch.equal(found, p.grad)
    size = 3.0 * math.sqrt(sum(p.numel() for p in model.parameters()))
    assert [entry["grad_norm"] for entry in history.steps] == pytest.approx([size] * 3, rel=1e-6)


# -- loop-c: what is remembered --


class Noise:
    """A hook with a generator of its own, and with all that a state may hold."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.about: dict[str, Any] = {"last": float("nan"), 3: ("x", None), "$tensor": [True, 2**70]}
        self.sums: dict[str, Tensor] = {}

    def __call__(self, step: int, model: nn.Module) -> None:
        assert self.about[3] == ("x", None)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=self.generator)
            if dist.is_initialized():
                dist.all_reduce(noise)  # what processes draw differs, what they do with it does not
            self.sums[name] = self.sums.get(name, 0) + noise.double()
            p.grad += 0.1 * noise + 0.01 * self.sums[name].float()
        self.about["last"] = float(noise.sum())

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "about": self.about, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.about, self.sums = state["about"], dict(state["sums"])


class Growing(Sampler[int]):
    """Epochs of different lengths from a generator that is not set back: only its state knows where it is."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.epoch, self.order, self.at = 0, torch.empty(0, dtype=torch.int64), 0
        self.within = False  # an epoch that was interrupted, perhaps after its last row

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 24 + 8 * self.epoch

    def __iter__(self) -> Iterator[int]:
        if not self.within:
            self.order, self.at = torch.randperm(96, generator=self.generator)[: len(self)], 0
        self.within = False
        for row in self.order[self.at :].tolist():
            self.at += 1
            yield row

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.at, self.within = state["order"], state["at"], state["at"] > 0


@pytest.mark.parametrize("stop", [6, 7, 13, 24])
@pytest.mark.parametrize("every", [1, 5])
def test_hooks_and_samplers_go_on_where_they_were(stop: int, every: int, tmp_path: Path) -> None:
    def attempt(seed: int, **more: Any) -> tuple[nn.Module, History, Noise]:
        model, noise, sampler = network(seed), Noise(), Growing()
        rows = DataLoader(TensorDataset(*data()), batch_sampler=BatchSampler(sampler, 8, drop_last=True))
        hooks = {"after_backward": [noise], "remember": {"noise": noise, "rows": sampler}}
        return model, run(model, rows, checkpoint_every=every, **hooks, **more), noise

    whole, expected, noise = attempt(1)
    with pytest.raises(Stop):
        attempt(1, folder=tmp_path, after_step=[stop_at(stop)])
    resumed, found, again = attempt(2, folder=tmp_path)
    assert found.steps == expected.steps and same(whole, resumed) and same(noise.state_dict(), again.state_dict())


def test_a_sampler_that_knows_its_place_may_be_remembered_too(tmp_path: Path) -> None:
    """Its state says where it is, and the loop says so as well: no batch is skipped twice."""
    results = []
    for remembered in (False, True):
        for interrupted in (False, True):
            folder = tmp_path / str(remembered)
            for hooks in ([stop_at(13)], []) if interrupted else ([],):
                sampler = Shuffled(52, seed=3)
                rows = loader(data(52), sampler, batch_size=8)
                more: dict[str, Any] = {"remember": {"sampler": sampler}} if remembered else {}
                model = network()
                try:
                    run(model, rows, after_step=hooks, folder=folder if interrupted else None, **more)
                except Stop:
                    continue
                results.append(model)
    assert all(same(results[0], other) for other in results[1:])


def test_what_is_remembered_belongs_to_the_run(tmp_path: Path) -> None:
    def attempt(folder: str | None = None, **remember: Any) -> None:
        run(network(), recipe=Recipe(2), remember=remember, folder=tmp_path / folder if folder else None)

    attempt("with", noise=Noise())
    attempt("without")
    others: list[tuple[str, dict[str, Any]]] = [
        ("with", {}),
        ("with", {"other": Noise()}),
        ("with", {"noise": Growing()}),
        ("with", {"noise": Noise(), "more": Noise()}),
        ("without", {"noise": Noise()}),
    ]
    for folder, names in others:
        with pytest.raises(CheckpointError, match="holds a run with another remember"):
            attempt(folder, **names)
    with pytest.raises(OptionError, match=r"remember\['noise'\] is a dict; it needs state_dict\(\)"):
        attempt(noise={})
    noise = Noise()
    noise.about["last"] = {1, 2}  # type: ignore[assignment]
    with pytest.raises(
        OptionError, match="remember/noise/about/last is a set, which a checkpoint cannot hold; make it"
    ):
        attempt("early", noise=noise)
    assert not (tmp_path / "early" / "checkpoint.safetensors").exists()


def test_values_survive_without_pickle() -> None:
    weight = torch.randn(3, 4)
    value = {
        "a": {"b": weight.t(), "codes": torch.tensor([1, -2], dtype=torch.int8)},
        "a/b": weight[1],
        3: [1, 2.5, math.inf, math.nan, -0.1 - 0.2, None, True, "text", ()],
        ("x", 1): (torch.tensor(2.0, dtype=torch.float64), [torch.empty(0)]),
        "$tuple": {"$dict": "a key like ours"},
    }
    tensors: dict[str, Tensor] = {}
    tree = pack(value, "state", tensors)
    assert same(unpack(tree, tensors), value) and len(tensors) == 5
    for wrong, name in (
        ({"a": [0, {1}]}, "state/a/1 is a set"),
        ({"a": b"x"}, "state/a is a bytes"),
        ({weight: 1}, "state has a tensor as a key"),
        ({"a": weight.to_sparse()}, r"state/a is a torch.sparse_coo tensor"),
    ):
        with pytest.raises(OptionError, match=name):
            pack(wrong, "state", {})


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    save_file({"model/0.weight": torch.zeros(1)}, tmp_path / "checkpoint.safetensors", {"refimpl": '{"step": 1}'})
    with pytest.raises(CheckpointError, match="another version wrote it.*delete it to start again"):
        run(network(), folder=tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"optimizer": "adam"},
            "optimizer='adam': pass a function of the parameter groups and the recipe that makes one, or",
        ),
        ({"optimizer": lambda groups, recipe: groups}, "it made a list; return a torch.optim.Optimizer"),
        ({"sync": "lokal"}, "sync='lokal': use one of 'gradients', 'local'"),
    ],
)
def test_bad_input_names_the_remedy(more: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run(network(), **more)


def test_a_sampler_that_workers_ask_ahead_is_not_remembered() -> None:
    sampler = Shuffled(96)
    with pytest.raises(OptionError, match="whose 1 workers ask it for rows ahead of time; load data with 0 workers"):
        run(network(), loader(data(), sampler, batch_size=8, workers=1), remember={"sampler": sampler})


# -- several processes --


def _killed_at(barrier: int, attempt: Callable[[], Any]) -> None:
    """Every process dies where it would wait for the others for the n-th time while saving."""
    calls, wait = [], dist.barrier

    def dying() -> None:
        wait()
        calls.append(1)
        if len(calls) == barrier:
            raise Stop

    checkpoints_module.dist.barrier = dying  # type: ignore[assignment]
    try:
        attempt()
    except Stop:
        return
    finally:
        checkpoints_module.dist.barrier = wait  # type: ignore[assignment]
    raise AssertionError(f"there was no barrier {barrier}")


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _together(rank: int, world: int, folder: str) -> None:
    """Two processes train one model: its gradients, what each remembers, and any moment in which both die."""

    def attempt(folder: Path | None = None, seed: int = 1, **more: Any) -> tuple[nn.Module, History, Noise]:
        model, noise = network(seed), Noise(rank)
        hooks: dict[str, Any] = {"after_backward": [noise], "remember": {"noise": noise}}
        return model, run(model, optimizer=MAKERS["odd"], folder=folder, **hooks | more), noise

    def averaged(step: int, model: nn.Module) -> None:
        for p in model.parameters():
            mean = p.grad.clone()
            dist.all_reduce(mean)
            assert torch.equal(mean / world, p.grad)

    attempt(after_backward=[averaged], remember={})
    whole, expected, noise = attempt()
    states: list[Any] = [None] * world
    dist.all_gather_object(states, noise.generator.get_state())
    assert not torch.equal(*states)
    # saving at steps 5, 10, ...: two barriers each. At the third, files of step 10 lie beside those of step 5
    for barrier, files in (
        (1, ["checkpoint-rank1-step5.safetensors"]),
        (2, ["checkpoint-rank1-step5.safetensors", "checkpoint.safetensors"]),
        (3, ["checkpoint-rank1-step10.safetensors", "checkpoint-rank1-step5.safetensors", "checkpoint.safetensors"]),
        (4, ["checkpoint-rank1-step10.safetensors", "checkpoint-rank1-step5.safetensors", "checkpoint.safetensors"]),
    ):
        here = Path(folder, str(barrier))
        _killed_at(barrier, lambda: attempt(here))  # noqa: B023
        assert _files(here) == files
        dist.barrier()
        model, history, again = attempt(here, seed=1 if barrier == 1 else 9)
        assert history.steps == expected.steps and same(whole, model)
        assert same(noise.state_dict(), again.state_dict())
        dist.barrier()
        assert _files(here) == ["checkpoint-rank1-step24.safetensors", "checkpoint.safetensors"]
        model, history, again = attempt(here, seed=9)  # finished: it returns at once
        assert same(whole, model) and same(noise.state_dict(), again.state_dict())
    own = here / "checkpoint-rank1-step24.safetensors"
    attempt(Path(folder, "foreign"), recipe=replace(RECIPE, seed=1))
    dist.barrier()
    if rank == 0:
        own.rename(here / "away")
    dist.barrier()
    with pytest.raises(CheckpointError, match="rank1-step24.safetensors is missing: what process 1 alone knew"):
        attempt(here)
    dist.barrier()
    if rank == 0:
        Path(folder, "foreign", own.name).rename(own)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"another recipe \(\{'seed': 1\}, now \{'seed': 0\}\)"):
        attempt(here)
    dist.barrier()
    if rank == 0:
        (here / "away").rename(own)
    dist.barrier()
    with pytest.raises(CheckpointError, match="another sync"):
        attempt(here, sync="local")
    with pytest.raises(OptionError, match="sync='local': model is shared among processes already"):
        train(DistributedDataParallel(network()), batches(*data(), batch_size=8), squared_error, RECIPE, sync="local")
    _sharded(world, Path(folder, "sharded"))


def _sharded(world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Counts(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            super().step()
            self.state[self.param_groups[0]["params"][0]]["counts"] = torch.zeros(3)

    def attempt(make: Any, seed: int = 1, **more: Any) -> dict[str, Tensor]:
        model = fully_shard(network(seed), mesh=init_device_mesh("cpu", (world,)))
        run(model, optimizer=make, **more)
        return {name: value.full_tensor() for name, value in model.state_dict().items()}

    whole = attempt(MAKERS["coupled"])
    with pytest.raises(Stop):
        attempt(MAKERS["coupled"], folder=folder, after_step=[stop_at(13)])
    assert same(whole, attempt(MAKERS["coupled"], seed=9, folder=folder))
    with pytest.raises(
        OptionError, match=r"its state 'counts' \[3\] of a sharded parameter \[8, 6\] is not sharded like it"
    ):
        attempt(lambda groups, recipe: Counts(groups, momentum=0.9), folder=folder.with_name("counts"))


def test_two_processes_remember_what_each_knows(tmp_path: Path) -> None:
    in_group(_together, 2, str(tmp_path))


def _until_killed(rank: int, world: int, folder: str, kill: int) -> None:
    """Trains in a group; process 1 is killed after update `kill`. What a process ends with goes to a file."""

    def killed_at(step: int, model: nn.Module) -> None:
        if rank == 1 and step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    model, noise = network(), Noise(rank)
    more: dict[str, Any] = {"optimizer": MAKERS["odd"], "after_backward": [noise], "remember": {"noise": noise}}
    history = run(model, after_step=[killed_at], folder=Path(folder, "run"), **more)
    end = {name: value.contiguous() for name, value in model.state_dict().items()}
    losses = {"losses": json.dumps(history.losses)}
    save_file(end | {"noise": noise.generator.get_state()}, Path(folder, f"end-{rank}.safetensors"), losses)


def test_a_killed_process_resumes_to_the_bit(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    in_group(_until_killed, 2, str(tmp_path / "whole"), 0)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_group(_until_killed, 2, str(tmp_path / "killed"), 13)
    in_group(_until_killed, 2, str(tmp_path / "killed"), 0)
    for rank in range(2):
        whole, again = ((tmp_path / name / f"end-{rank}.safetensors").read_bytes() for name in ("whole", "killed"))
        assert whole == again
    assert (tmp_path / "whole" / "end-0.safetensors").read_bytes() != whole


def _apart(rank: int, world: int, folder: str) -> None:
    """Two processes train two models."""
    x, y = data()

    def attempt(folder: Path | None = None, seed: int = 1, **more: Any) -> tuple[nn.Module, History]:
        model = network(seed)
        model[2].p = 0.0  # dropout differs from rank to rank, which one process could not repeat
        evaluate = lambda model: {"mse": float((model(x) - y).square().mean())}  # noqa: E731
        options: dict[str, Any] = {"evaluate": evaluate, "evaluate_every": 3, "keep_best": "mse", "folder": folder}
        return model, run(model, recipe=Recipe(24, lr=0.3, accumulate=2), sync="local", **options | more)

    whole, expected = attempt()
    if rank == 1:
        save_file(
            dict(whole.state_dict()), Path(folder, "replica.safetensors"), {"losses": json.dumps(expected.losses)}
        )
    results: list[Any] = [None] * world
    dist.all_gather_object(results, (whole[0].weight.detach(), expected.losses, expected.best))
    assert not torch.equal(results[0][0], results[1][0])
    assert all(a != b for a, b in zip(results[0][1], results[1][1], strict=True))
    for barrier in (1, 2, 3, 4):
        here = Path(folder, f"apart-{barrier}")
        _killed_at(barrier, lambda: attempt(here))  # noqa: B023
        dist.barrier()
        model, history = attempt(here, seed=1 if barrier == 1 else 9)
        assert history.steps == expected.steps and history.evaluations == expected.evaluations
        assert history.best == expected.best and same(whole, model)
    dist.barrier()
    here = Path(folder, "stopped")
    with pytest.raises(Stop):
        attempt(here, after_step=[stop_at(14)])
    dist.barrier()
    model, history = attempt(here, seed=9)
    assert same(whole, model) and history.steps == expected.steps
    dist.barrier()
    with pytest.raises(CheckpointError, match="holds a run with another"):
        run(network(), recipe=Recipe(24, lr=0.3, accumulate=2), folder=here)


def test_replicas_train_on_their_own(tmp_path: Path) -> None:
    in_group(_apart, 2, str(tmp_path))
    rows = TensorDataset(*data())
    order: DistributedSampler = DistributedSampler(rows, num_replicas=2, rank=1, drop_last=True)
    model = network()
    model[2].p = 0.0
    history = run(
        model,
        DataLoader(rows, sampler=BatchSampler(order, 8, drop_last=True), batch_size=None),
        Recipe(24, lr=0.3, accumulate=2),
        evaluate=lambda model: {"mse": float((model(data()[0]) - data()[1]).square().mean())},
        evaluate_every=3,
        keep_best="mse",
        sync="local",  # alone, a process does not notice
    )
    with safe_open(tmp_path / "replica.safetensors", "pt") as file:
        assert json.loads(file.metadata()["losses"]) == history.losses
        assert all(torch.equal(file.get_tensor(name), value) for name, value in model.state_dict().items())
