"""The training loop: what it computes, that it resumes bit for bit, and that several processes agree with one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refimpl.core.errors import CheckpointError, FileError, OptionError, TrainingError
from refimpl.core.train.loop import History, Recipe, batches, train
from refimpl.lab.study.jobs import in_group


def data(n: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator)
    return x, x @ torch.randn(8, 3, generator=generator)


def network(dropout: float = 0.2, norm: bool = True, seed: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 16),
            nn.BatchNorm1d(16) if norm else nn.LayerNorm(16),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 3),
        )


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def validation(model: nn.Module) -> dict[str, float]:
    x, y = data()
    return {"mse": (model(x) - y).square().mean().item()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int, nn.Module], None]:
    def hook(now: int, model: nn.Module) -> None:
        if now == step:
            raise Stop

    return hook


RECIPES = {
    "adamw": Recipe(60, lr=0.01, warmup=5, clip=1.0, accumulate=2, weight_decay=0.1),
    "sgd": Recipe(60, lr=0.05, optimizer="sgd", schedule="constant", seed=3),
    "bf16": Recipe(30, lr=0.01, precision="bf16"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]

    def run(model: nn.Module, **more: Any) -> History:
        loader = batches(*data(), batch_size=16)
        return train(
            model, loader, squared_error, recipe, evaluate=validation, evaluate_every=10, progress=False, **more
        )

    whole = network()
    expected = run(whole)
    for step in (9, 20, 23):  # between checkpoints, on one, and in another epoch
        with pytest.raises(Stop):
            run(network(seed=step), folder=tmp_path, checkpoint_every=7, after_step=[stop_at(step)])
    resumed = network(seed=7)
    history = run(resumed, folder=tmp_path, checkpoint_every=7)
    # the first interrupted run began from another initialisation than `whole`
    assert len(history.steps) == recipe.steps
    again = network()
    other = tmp_path / "other"
    with pytest.raises(Stop):
        run(again, folder=other, checkpoint_every=7, after_step=[stop_at(23)])
    again = network(seed=9)
    history = run(again, folder=other, checkpoint_every=7)
    assert same(whole, again)
    assert history.losses == expected.losses and history.evaluations == expected.evaluations
    finished = network(seed=11)
    assert run(finished, folder=other, checkpoint_every=7).losses == expected.losses
    assert same(whole, finished)


def test_the_best_iterate_survives_an_interruption(tmp_path: Path) -> None:
    # a rate so high that it gets worse after a good start
    recipe = Recipe(40, lr=0.3, optimizer="sgd", momentum=0.0, schedule="constant")

    def run(model: nn.Module, **more: Any) -> History:
        return train(
            model,
            batches(*data(), batch_size=16),
            squared_error,
            recipe,
            evaluate=validation,
            evaluate_every=1,
            keep_best="mse",
            progress=False,
            **more,
        )

    whole = network()
    expected = run(whole)
    values = [entry["mse"] for entry in expected.evaluations]
    assert expected.best == expected.evaluations[values.index(min(values))]["step"]
    assert validation(whole.eval())["mse"] == min(values)
    late = min(expected.best + 1, 39)
    with pytest.raises(Stop):
        run(network(), folder=tmp_path, checkpoint_every=1, after_step=[stop_at(late + 1)])
    resumed = network(seed=5)
    assert run(resumed, folder=tmp_path, checkpoint_every=1).best == expected.best
    assert same(whole, resumed)


def test_a_worse_run_ends_where_it_started() -> None:
    model, before = network(), network()
    recipe = Recipe(5, lr=50.0, optimizer="sgd")
    history = train(
        model,
        batches(*data(), batch_size=16),
        lambda m, b: -squared_error(m, b).clamp(max=1e3),
        recipe,
        evaluate=validation,
        evaluate_every=1,
        keep_best="mse",
        progress=False,
    )
    assert history.best == 0 and same(model, before)


def test_the_schedule_is_that_of_torch() -> None:
    recipe = Recipe(50, lr=0.2, warmup=10, final_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.02)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [10])
    seen = []
    for _ in range(50):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    history = train(network(), batches(*data(), batch_size=16), squared_error, recipe, progress=False)
    assert [entry["lr"] for entry in history.steps] == pytest.approx(seen, rel=1e-6)


def test_accumulated_micro_batches_are_one_large_batch() -> None:
    a, b = network(dropout=0, norm=False), network(dropout=0, norm=False)
    large = train(a, batches(*data(), batch_size=40), squared_error, Recipe(10, lr=0.01), progress=False)
    small = train(b, batches(*data(), batch_size=10), squared_error, Recipe(10, lr=0.01, accumulate=4), progress=False)
    assert small.losses == pytest.approx(large.losses, rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_an_update_is_that_of_the_optimizer_written_out() -> None:
    model, ours = network(dropout=0), network(dropout=0)
    recipe = Recipe(3, lr=0.01, weight_decay=0.1, clip=0.5, warmup=2)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    loader = batches(*data(), batch_size=16)
    loader.sampler.sampler.set_epoch(0)  # type: ignore[attr-defined]
    for step, batch in zip(range(3), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        loss = squared_error(model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*decayed, *rest], 0.5)  # in this order, for the same sum
        optimizer.step()
    train(ours, batches(*data(), batch_size=16), squared_error, recipe, progress=False)
    assert same(model, ours)


def test_groups_have_their_own_rates() -> None:
    model, before = network(), network()
    groups = [{"params": model[0].parameters(), "lr": 0.0 + 1e-12}, {"params": model[4].parameters(), "lr": 0.1}]
    train(model, batches(*data(), batch_size=16), squared_error, Recipe(20), parameters=groups, progress=False)
    torch.testing.assert_close(model[0].weight, before[0].weight)
    assert (model[4].weight - before[4].weight).abs().max() > 0.1
    assert torch.equal(model[1].weight, before[1].weight)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    x = torch.arange(12)
    loader = batches(x, batch_size=4, seed=5)
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(torch.cat([batch[0] for batch in loader]).tolist())
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[1]) == list(range(12))
    assert len(batches(x, batch_size=5)) == 2 and len(batches(x, batch_size=5, drop_last=False)) == 3


def test_steps_are_reproducible_and_leave_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    a, b = network(), network()
    train(a, batches(*data(), batch_size=16), squared_error, Recipe(5), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(10)
    train(b, batches(*data(), batch_size=16), squared_error, Recipe(5), progress=False)
    assert same(a, b)
    c = network()
    train(c, batches(*data(), batch_size=16), squared_error, Recipe(5, seed=1), progress=False)
    assert not same(a, c)  # other dropout


def test_any_loader_and_any_batch() -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = data()
            return {"x": x[index], "y": y[index]}

    model = network()
    loader = torch.utils.data.DataLoader(Rows(), batch_size=5, shuffle=True)
    history = train(model, loader, lambda m, b: squared_error(m, (b["x"], b["y"])), Recipe(9), progress=False)
    assert len(history.steps) == 9 and not math.isnan(history.losses[-1])


def test_a_loss_that_is_not_a_number_names_step_and_checkpoint(tmp_path: Path) -> None:
    calls = []

    def explodes(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return squared_error(model, batch) * (float("nan") if len(calls) == 12 else 1.0)

    with pytest.raises(TrainingError, match=r"nan at step 12; the last good checkpoint, of step 10.*Lower lr"):
        train(
            network(),
            batches(*data(), batch_size=16),
            explodes,
            Recipe(20),
            folder=tmp_path,
            checkpoint_every=5,
            progress=False,
        )
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["refimpl"])["step"] == 10
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys() if name.startswith("model/"))
    calls.clear()
    with pytest.raises(TrainingError, match="no checkpoint was kept"):
        train(network(), batches(*data(), batch_size=16), explodes, Recipe(20), progress=False)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def ruin(step: int, model: nn.Module) -> None:
        if step == 4:
            next(model.parameters()).data[0, 0] = math.inf

    with pytest.raises(TrainingError, match="'0.weight' is not finite after step 4"):
        train(
            network(),
            batches(*data(), batch_size=16),
            squared_error,
            Recipe(20),
            after_step=[ruin],
            folder=tmp_path,
            checkpoint_every=2,
            progress=False,
        )
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["refimpl"])["step"] == 2


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    def run(recipe: Recipe, rows: int = 200) -> None:
        loader = batches(*data(rows), batch_size=16)
        train(network(), loader, squared_error, recipe, folder=tmp_path, progress=False)

    run(Recipe(4))
    with pytest.raises(CheckpointError, match=r"another recipe \(\{'lr': 0.001\}, now \{'lr': 0.01\}\)"):
        run(Recipe(4, lr=0.01))
    with pytest.raises(CheckpointError, match="another"):
        run(Recipe(4), rows=100)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors is damaged .* delete it to start again"):
        run(Recipe(4))


def test_other_data_or_another_loss_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = data(64)

    def run(folder: str, inputs: Tensor = inputs, loss: Any = squared_error, stop: Sequence[Any] = ()) -> None:
        loader = batches(inputs, targets, batch_size=16, shuffle=False)
        train(
            network(),
            loader,
            loss,
            Recipe(8),
            folder=tmp_path / folder,
            checkpoint_every=3,
            after_step=stop,
            progress=False,
        )

    def scaled(factor: float) -> Any:
        return lambda model, batch: factor * squared_error(model, batch)

    later = inputs.clone()
    later[40] += 1  # in the third batch: the first is the same
    with pytest.raises(Stop):
        run("data", stop=[stop_at(4)])
    with pytest.raises(CheckpointError, match=r"data: batch 2 of epoch 0 is not the one .* choose another folder"):
        run("data", later)
    run("data")
    with pytest.raises(Stop):
        run("loss", loss=scaled(1.0), stop=[stop_at(4)])
    for other in (scaled(2.0), squared_error, lambda model, batch: squared_error(model, batch)):
        with pytest.raises(CheckpointError, match="holds a run with another loss"):
            run("loss", loss=other)
    # another Python compiles the same function to other code, so it is told by its name and what it closes over
    monkeypatch.setattr("refimpl.core.train.loop.sys", SimpleNamespace(version_info=(3, 99, 0)))
    for other in (scaled(2.0), squared_error):
        with pytest.raises(CheckpointError, match="holds a run with another loss"):
            run("loss", loss=other)
    run("loss", loss=scaled(1.0))


@pytest.mark.parametrize("kind", ["pipe", "folder", "below a file"])
def test_what_is_in_the_way_of_a_checkpoint_is_named(tmp_path: Path, kind: str) -> None:
    folder, path = tmp_path / "run", tmp_path / "run" / "checkpoint.safetensors"
    if kind == "below a file":
        folder.touch()
    else:
        folder.mkdir()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(FileError, match=r"run.*(is a named pipe|is a folder|cannot be written)") as error:
        train(network(), batches(*data(64), batch_size=16), squared_error, Recipe(4), folder=folder, progress=False)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_weights_optimiser_or_finite_values_is_refused(tmp_path: Path) -> None:
    def run() -> None:
        train(network(), batches(*data(64), batch_size=16), squared_error, Recipe(4), folder=tmp_path, progress=False)

    run()
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["refimpl"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    weight = next(name for name in tensors if name.startswith("model/"))
    moment = next(name for name in tensors if name.endswith("exp_avg_sq"))

    def without(*keys: str) -> dict[str, Any]:
        changed = json.loads(json.dumps(about))
        inner = changed
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return changed

    for description, change, message in (
        (without("model"), {}, "KeyError: 'model'"),
        (without("model", weight.partition("/")[2]), {}, "is missing"),
        (without("optimizer"), {}, "KeyError: 'optimizer'"),
        (
            json.loads(json.dumps(about | {"optimizer": about["optimizer"] | {"state": {}}})),
            {},
            "no state of the optimiser",
        ),
        (about, {weight: torch.full_like(tensors[weight], math.nan)}, "is not finite"),
        (about, {weight: torch.zeros(3)}, r"is Tensor of torch\.float32 \[3\], the model has"),
        (about, {moment: torch.full_like(tensors[moment], math.inf)}, "of the optimiser' is not finite"),
    ):
        save_file(tensors | change, path, {"refimpl": json.dumps(description)})
        with pytest.raises(CheckpointError, match=rf"{message}.*delete it to start again") as error:
            run()
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    run()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(0), "steps=0"),
        (lambda: Recipe(5, lr=-1), "lr=-1"),
        (lambda: Recipe(5, warmup=5), "warmup=5: use 0 to steps - 1 = 4"),
        (lambda: Recipe(5, optimizer="adam"), "did you mean 'adamw'"),
        (lambda: Recipe(5, schedule="cos"), "schedule='cos'"),
        (lambda: Recipe(5, precision="fp16"), "precision='fp16'"),
        (lambda: Recipe(5, clip=0.0), "clip=0.0"),
        (lambda: Recipe(5, accumulate=0), "accumulate=0"),
        (lambda: Recipe(5, final_lr=2), "final_lr=2"),
        (lambda: batches(torch.zeros(3), batch_size=4), "batch_size=4: there are 3 rows"),
        (lambda: batches(torch.zeros(3), torch.zeros(4), batch_size=1), r"tensors have \[3, 4\] rows"),
        (
            lambda: train(network().requires_grad_(False), batches(*data(), batch_size=4), squared_error, Recipe(1)),
            "none of its parameters require a gradient",
        ),
        (
            lambda: train(network(), batches(*data(), batch_size=4), squared_error, Recipe(1), keep_best="mse"),
            "needs evaluate=",
        ),
        (
            lambda: train(
                network(),
                batches(*data(), batch_size=4),
                squared_error,
                Recipe(1),
                keep_best="mze",
                evaluate=validation,
            ),
            "did you mean 'mse'",
        ),
        (
            lambda: train(network(), batches(*data(), batch_size=4), squared_error, Recipe(1), evaluate_every=0),
            "evaluate_every=0",
        ),
    ],
)
def test_bad_input_names_the_remedy(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_tied_weights_and_frozen_parameters_resume(tiny_gpt2: Any, tmp_path: Path) -> None:
    ids = torch.randint(3, 256, (16, 12), generator=torch.Generator().manual_seed(0))

    def run(**more: Any) -> nn.Module:
        model = tiny_gpt2()
        model.transformer.wpe.requires_grad_(False)
        loss = lambda m, b: m(input_ids=b[0], labels=b[0]).loss  # noqa: E731
        train(model, batches(ids, batch_size=4), loss, Recipe(6), progress=False, **more)
        return model

    whole = run()
    with pytest.raises(Stop):
        run(folder=tmp_path, checkpoint_every=2, after_step=[stop_at(5)])
    resumed = run(folder=tmp_path, checkpoint_every=2)
    assert same(whole, resumed)
    assert resumed.lm_head.weight is resumed.transformer.wte.weight


KINDS = ["plain", "interrupted", "fsdp"]


def _worker(rank: int, world: int, folder: str) -> None:
    """All kinds in one pair of processes: starting them is what takes time."""
    for kind in KINDS:
        _train_in_parallel(rank, world, Path(folder, kind), kind)


def _train_in_parallel(rank: int, world: int, folder: Path, kind: str) -> None:
    model: nn.Module = network(dropout=0, norm=False)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    recipe = Recipe(12, lr=0.01, accumulate=2, clip=1.0)
    hooks = [stop_at(9)] if kind == "interrupted" else []
    more: dict[str, Any] = {} if kind == "plain" else {"folder": folder, "checkpoint_every": 4}
    loader = batches(*data(), batch_size=8)
    try:
        history = train(model, loader, squared_error, recipe, after_step=hooks, progress=False, **more)
    except Stop:
        dist.barrier()
        model = network(dropout=0, norm=False, seed=8)
        history = train(model, loader, squared_error, recipe, progress=False, **more)
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
    recipe = Recipe(12, lr=0.01, accumulate=2, clip=1.0)
    single = network(dropout=0, norm=False)
    history = train(single, batches(*data(), batch_size=16), squared_error, recipe, progress=False)
    losses = json.loads((two_processes / kind / "losses.json").read_text())
    assert losses == pytest.approx(history.losses, rel=1e-4)
    found = load_file(two_processes / kind / "result.safetensors")
    for name, value in single.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
