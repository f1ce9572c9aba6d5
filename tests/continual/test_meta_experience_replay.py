"""MER's invariants: closed forms of the merge, exact accounting of the stream, resuming, two processes, measures."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refimpl.continual.meta_experience_replay import (
    ReplayBuffer,
    ReplayLoader,
    Reptile,
    Stage,
    chain_scores,
    gradient_alignment,
    merge,
)
from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.train.loop import Recipe, train
from refimpl.lab.study.jobs import in_group

# -- the merge --


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_the_merge_is_a_point_between(dtype: torch.dtype, epsilon: float):
    torch.manual_seed(0)
    slow, fast = ([torch.randn(5, 7, dtype=dtype), torch.randn(3, dtype=dtype)] for _ in range(2))
    expected = [(1 - epsilon) * a + epsilon * b for a, b in zip(slow, fast, strict=True)]
    before = [tensor.clone() for tensor in slow], [tensor.clone() for tensor in fast]
    merge(slow, fast, epsilon)
    for side in (slow, fast):
        for found, wanted in zip(side, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    if epsilon in (0.0, 1.0):  # to the bit
        assert all(torch.equal(a, b) for a, b in zip(fast, before[int(epsilon)], strict=True))


def test_the_one_sided_form_rounds_where_the_merge_does_not():
    torch.manual_seed(0)
    slow, fast = torch.randn(10_000), torch.randn(10_000)
    assert float((slow + 1.0 * (fast - slow) != fast).float().mean()) > 0.2
    kept = fast.clone()
    merge([slow], [fast], 1.0)
    assert torch.equal(fast, kept)


def test_the_merge_is_linear():
    torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 50, dtype=torch.float64)

    def merged(slow: Tensor, fast: Tensor) -> Tensor:
        fast = fast.clone()
        merge([slow.clone()], [fast], 0.3)
        return fast

    torch.testing.assert_close(merged(a + 2 * b, c + 2 * d), merged(a, c) + 2 * merged(b, d), rtol=1e-12, atol=1e-12)


class Point(nn.Module):
    """A vector of weights."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return self.theta


def loader_of(steps: int) -> ReplayLoader:
    """A stream of which the losses below use nothing."""
    return ReplayLoader([Stage(torch.zeros(4, 1), steps)], 2, 0.0, ReplayBuffer(2 * steps, (1,)))


def sgd(steps: int, lr: float) -> Recipe:
    return Recipe(steps, lr=lr, optimizer="sgd", momentum=0.0, schedule="constant")


@pytest.mark.parametrize(("epsilon", "every"), [(0.1, 3), (0.3, 7), (1.0, 4), (0.0, 5), (0.5, 1)])
def test_a_quadratic_has_a_closed_form(epsilon: float, every: int):
    torch.manual_seed(1)
    root = torch.randn(6, 6, dtype=torch.float64)
    A, start = root @ root.T / 6, torch.randn(6, dtype=torch.float64)
    model, lr = Point(start), 0.05
    hook = Reptile(epsilon, every).attach(model)
    train(
        model,
        loader_of(2 * every),
        lambda m, _: 0.5 * m() @ A @ m(),
        sgd(2 * every, lr),
        after_step=[hook],
        progress=False,
    )
    identity = torch.eye(6, dtype=torch.float64)
    once = (1 - epsilon) * identity + epsilon * torch.linalg.matrix_power(identity - lr * A, every)
    torch.testing.assert_close(model.theta.detach(), once @ once @ start, rtol=1e-12, atol=1e-12)


def test_with_one_step_it_is_a_smaller_rate():
    """k = 1: SGD with rate epsilon eta, and AdamW too: the control that moves as far without aligning anything."""
    torch.manual_seed(2)
    start, inputs = torch.randn(6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)

    def loss(model: Any, batch: Any) -> Tensor:
        return (batch[0] @ model()).square().mean() + model().pow(4).sum()

    def ends(recipe: Recipe, *epsilon: float) -> Tensor:
        model = Point(start)
        hooks = [Reptile(e, every=1).attach(model) for e in epsilon]
        data = ReplayLoader([Stage(inputs, 12)], 4, 0.0, ReplayBuffer(48, (6,), "float32"))
        train(model, _doubles(data), loss, recipe, after_step=hooks, progress=False)
        return model.theta.detach()

    torch.testing.assert_close(ends(sgd(12, 0.02), 0.25), ends(sgd(12, 0.005)), rtol=1e-12, atol=1e-12)
    adamw = [Recipe(12, lr=lr, weight_decay=0.1, schedule="cosine", warmup=2) for lr in (0.02, 0.005)]
    torch.testing.assert_close(ends(adamw[0], 0.25), ends(adamw[1]), rtol=1e-12, atol=1e-12)


def _doubles(data: ReplayLoader) -> ReplayLoader:
    """The buffer of a test that needs fp64 rows only counts them."""
    data._buffer.add = lambda rows: None  # type: ignore[method-assign]
    return data


def test_two_steps_raise_the_product_of_two_gradients():
    """The mean over both orders of the second-order part of two SGD steps is beta^2 / 2 grad(g1 . g2)."""
    torch.manual_seed(3)
    start = torch.randn(5, dtype=torch.float64)
    batches = torch.randn(2, 8, 5, dtype=torch.float64)

    def loss(theta: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(rows @ theta).pow(2).mean() + (rows @ theta).pow(3).mean() / 30

    def gradient(theta: Tensor, rows: Tensor, graph: bool = False) -> Tensor:
        point = theta if graph else theta.detach().requires_grad_()
        return torch.autograd.grad(loss(point, rows), point, create_graph=graph)[0]

    def gap(beta: float) -> tuple[float, float]:
        ends = []
        for order in ((0, 1), (1, 0)):
            model = Point(start)
            hook = Reptile(1.0, every=2).attach(model)
            data = ReplayLoader([Stage(batches[list(order)].reshape(2, 40), 2)], 1, 0.0, ReplayBuffer(2, (40,)))
            data._mixture.batch = lambda step: [step]  # type: ignore[method-assign]
            train(
                model,
                _doubles(data),
                lambda m, b: loss(m(), b[0].reshape(8, 5)),
                sgd(2, beta),
                after_step=[hook],
                progress=False,
            )
            ends.append(model.theta.detach() - start)
        found = sum(ends) / 2 + beta * (gradient(start, batches[0]) + gradient(start, batches[1]))
        theta = start.clone().requires_grad_()
        product = gradient(theta, batches[0], True) @ gradient(theta, batches[1], True)
        wanted = beta**2 / 2 * torch.autograd.grad(product, theta)[0]
        return float((found - wanted).norm()), float(wanted.norm())

    (coarse, _), (fine, size) = gap(1e-2), gap(1e-3)
    assert fine < 0.05 * size
    assert coarse / fine == pytest.approx(1000, rel=0.2)  # what is left is of third order


class Network(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.outer, self.dropout = nn.Linear(4, 8), nn.Linear(8, 1), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(self.inner(x).tanh()))


def squared(model: Any, batch: Any) -> Tensor:
    rows = batch[0]
    return (model(rows) - rows.sin().sum(1, keepdim=True)).square().mean()


def chain(replay: float = 0.25, capacity: int = 300, **options: Any) -> ReplayLoader:
    source = torch.Generator().manual_seed(5)
    stages = [Stage(torch.randn(30, 4, generator=source) + shift, 10) for shift in range(3)]
    options = {"batch_size": 8, "buffer": ReplayBuffer(capacity, (4,), "float32", seed=1), **options}
    return ReplayLoader(stages, replay=replay, begin=10, seed=2, **options)


def fit(model: nn.Module, hooks: Any = (), loader: ReplayLoader | None = None, **more: Any) -> nn.Module:
    recipe = Recipe(30, lr=0.02, warmup=3, weight_decay=0.1, clip=1.0)
    train(model, loader or chain(), squared, recipe, after_step=hooks, progress=False, **more)
    return model


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_epsilon_one_is_plain_training_to_the_bit():
    plain = fit(Network())
    model = Network()
    hook = Reptile(1.0, every=5).attach(model)
    fit(model, [hook])
    hook.close()
    assert all(torch.equal(plain.state_dict()[n], v) for n, v in model.state_dict().items())
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_epsilon_zero_comes_back_to_the_start():
    model = Network()
    before = parameters(model)
    fit(model, [Reptile(0.0, every=5).attach(model)])
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


def test_merges_begin_after_their_start():
    seen: dict[int, list[Tensor]] = {}

    def watch(step: int, model: nn.Module) -> None:
        seen[step] = parameters(model)

    ends = []
    for start in (0, 10):
        model = Network()
        fit(model, [Reptile(0.0, every=5, start=start).attach(model), watch])
        ends.append(parameters(model))
    plain = Network()
    fit(plain, [lambda step, m: ends.append(parameters(m)) if step == 10 else None])
    assert all(torch.equal(a, b) for a, b in zip(ends[1], ends[2], strict=True))  # it stood still from there on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.5}, "epsilon=1.5"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"every": 0}, "every=0"),
        ({"every": 5, "start": 7}, "start=7: use a multiple of every=5"),
    ],
)
def test_merges_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        Reptile(**options)


def test_sixteen_bits_are_refused_for_they_would_lose_the_merge():
    with pytest.raises(OptionError, match=r"'inner.weight' is trained in bfloat16.*precision='bf16'"):
        Reptile().attach(Network().bfloat16())
    frozen = Network().bfloat16().requires_grad_(False)
    frozen.head = nn.Linear(1, 1)  # what is not trained may have any dtype
    Reptile().attach(frozen).close()


class Squares(Network):
    """As the Trainer wants it: a dictionary in, a dictionary with the loss out."""

    def forward(self, x: Tensor, return_loss: bool = True) -> Any:  # type: ignore[override]
        return {"loss": (super().forward(x) - x.sin().sum(1, keepdim=True)).square().mean()}


def test_in_the_trainer_of_hugging_face(tmp_path: Path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class Feed(Trainer):
        def get_train_dataloader(self) -> Any:
            return chain()

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return model(inputs[0])["loss"]

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=10,
        learning_rate=0.02,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    ends = []
    for epsilon in (0.0, 0.3, 1.0):
        model = Squares()
        before = parameters(model)
        Feed(model, arguments, callbacks=[Reptile(epsilon, every=10).callback()]).train()
        assert not any("outer" in name and "slow" in name for name in model.state_dict())
        ends.append(parameters(model))
    for start, none, some, whole in zip(before, *ends, strict=True):
        assert torch.equal(none, start) and not torch.equal(whole, start)
        torch.testing.assert_close(some, start + 0.3 * (whole - start))


# -- the stream --


def walked(loader: ReplayLoader) -> list[tuple[Tensor, Tensor]]:
    return [(rows.clone(), items.clone()) for rows, items in loader]


@pytest.mark.parametrize("replay", [0.0, 0.25, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_row_is_accounted_for(replay: float, prefetch: int):
    loader = chain(replay, prefetch=prefetch)
    new_before = old_before = 0
    stored: dict[int, Tensor] = {}
    for step, (rows, items) in enumerate(walked(loader)):
        new, old = loader.counts(step)
        assert new + old == len(rows) == 8
        assert items[:new].tolist() == list(range(new_before, new_before + new))
        for row, item in zip(rows[new:], items[new:].tolist(), strict=True):
            assert item < new_before  # seen in an earlier step
            assert torch.equal(row, stored[item])  # and the same bytes
        stored |= dict(zip(items[:new].tolist(), rows[:new], strict=True))
        new_before, old_before = new_before + new, old_before + old
        expected = max(0, step + 1 - 10) * 8 * replay
        assert abs(old_before - expected) <= 1  # exact to one row at every step
    assert loader._buffer.seen == new_before and step == 29 == len(loader) - 1
    assert (old_before == 0) == (replay == 0)


def test_a_stage_gives_each_of_its_rows_before_it_repeats_one():
    batches = walked(chain(0.0))
    for number in range(3):
        rows = torch.cat([rows for rows, _ in batches[10 * number : 10 * number + 10]])
        first, second = rows[:30], rows[30:60]
        assert len(torch.unique(first, dim=0)) == 30 == len(torch.unique(rows, dim=0))
        assert len(torch.unique(second, dim=0)) == 30 and not torch.equal(first, second)


def test_replay_draws_from_the_whole_buffer():
    loader = chain(0.5)
    replayed = torch.cat([items[loader.counts(step)[0] :] for step, (_, items) in enumerate(loader)])
    assert len(replayed) == 80 and float((replayed < 80).float().mean()) > 0.5  # of the first stage
    assert int((replayed >= 80).sum()) > 5 and len(set(replayed.tolist())) > 50


def test_a_small_buffer_still_holds_a_share_of_the_first_stage():
    buffer = ReplayBuffer(24, (4,), "float32")
    list(chain(0.25, buffer=buffer))
    assert len(buffer) == 24 and buffer.seen == 80 + 20 * 6
    assert 3 <= int((buffer.items < 80).sum()) <= 17  # of 24 about 80 / 200


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def hook(number: int, model: nn.Module) -> None:
        if number == step:
            raise Stop

    return hook


@pytest.mark.parametrize("capacity", [300, 24])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, capacity: int):
    def buffer(name: str) -> ReplayBuffer:
        return ReplayBuffer(capacity, (4,), "float32", tmp_path / name, seed=1)

    def run(name: str, *hooks: Any) -> nn.Module:
        model = Network()
        merges = Reptile(0.3, every=5).attach(model)
        return fit(
            model, [merges, *hooks], chain(buffer=buffer(name)), folder=tmp_path / f"run-{name}", checkpoint_every=4
        )

    whole = run("whole")
    for step in (6, 17, 23):  # in the first stage, between two merges, twice
        with pytest.raises(Stop):
            run("broken", stop_at(step))
    resumed = run("broken")
    assert all(torch.equal(whole.state_dict()[n], v) for n, v in resumed.state_dict().items())
    kept = [ReplayBuffer.open(tmp_path / name) for name in ("whole", "broken")]
    assert kept[0].seen == kept[1].seen and torch.equal(kept[0].items, kept[1].items)
    assert torch.equal(kept[0].sample(50, draw=1)[0], kept[1].sample(50, draw=1)[0])
    # a run that is finished is left alone, and so is its buffer
    again = run("broken")
    assert all(torch.equal(whole.state_dict()[n], v) for n, v in again.state_dict().items())
    assert ReplayBuffer.open(tmp_path / "broken").seen == kept[0].seen


def test_a_later_run_replays_the_rows_of_the_first(tmp_path: Path):
    buffer = ReplayBuffer(500, (4,), "float32", tmp_path)
    first = ReplayLoader([Stage(torch.zeros(9, 4), 5)], 8, 0.0, buffer, run="first")
    list(first)
    for _ in range(2):  # the second time as after an interruption
        later = ReplayLoader([Stage(torch.ones(9, 4), 5)], 8, 0.5, ReplayBuffer.open(tmp_path), begin=0, run="later")
        batches = walked(later)
        assert [int((rows == 0).all(1).sum()) for rows, _ in batches][0] == 4
        assert batches[0][1].min() < 40 <= batches[0][1].max()
        assert later._buffer.seen == 60
    with pytest.raises(CheckpointError, match="run='later': .* other options"):
        next(iter(ReplayLoader([Stage(torch.ones(9, 4), 5)], 8, 0.25, buffer.open(tmp_path), begin=0, run="later")))


def test_looking_at_the_first_batch_changes_nothing():
    loader = chain()
    first = next(iter(loader))
    assert loader._buffer.seen == 0
    assert torch.equal(next(iter(loader))[0], first[0])


def test_the_thread_ends_with_its_reader_and_hands_on_errors():
    def threads() -> int:
        return sum(thread.name == "replay" for thread in threading.enumerate())

    walk = iter(chain(prefetch=2))
    for _ in range(5):
        next(walk)
    assert threads() == 1
    walk.close()
    assert threads() == 0

    class Broken(list[Tensor]):
        def __getitem__(self, index: Any) -> Any:
            if index == 7:
                raise ConnectionError("row 7 is gone")
            return super().__getitem__(index)

    loader = ReplayLoader([Stage(Broken(torch.zeros(10, 2)), 10)], 2, 0.0, ReplayBuffer(20, (2,)))
    with pytest.raises(ConnectionError, match="row 7 is gone"):
        list(loader)
    assert threads() == 0


def test_rows_of_a_hugging_face_dataset():
    datasets = pytest.importorskip("datasets")
    ids = torch.arange(40).reshape(10, 4)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    found, plain = (walked(ReplayLoader([Stage(r, 5)], 2, 0.5, ReplayBuffer(10, (4,)))) for r in (rows, ids))
    assert all(torch.equal(a, b) for x, y in zip(found, plain, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay": 1.0}, "replay=1.0"),
        ({"replay": -0.1}, "replay=-0.1"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"stages": []}, "stages: it is empty"),
        ({"stages": [Stage(torch.zeros(4, 5), 2)]}, r"stages\[0\].rows are \[5\], .* make it with row=\(5,\)"),
        ({"stages": [Stage(torch.zeros(0, 3), 2)]}, r"stages\[0\] has 0 rows"),
        ({"stages": [Stage(torch.zeros(4, 3), 0)]}, r"stages\[0\] has 4 rows and 0 steps"),
        ({"stages": [Stage((row for row in torch.zeros(4, 3)), 1)]}, r"stages\[0\].rows is a generator without a len"),
        ({"begin": 0}, "begin=0: the buffer is empty"),
        ({"begin": 2}, "begin=2: the chain has 2 batches.* use 1 or less"),
    ],
)
def test_streams_that_cannot_be(change: dict[str, Any], message: str):
    options: dict[str, Any] = {"stages": [Stage(torch.zeros(4, 3), 2)], "batch_size": 2, "replay": 0.5}
    with pytest.raises(OptionError, match=message):
        ReplayLoader(**{**options, "buffer": ReplayBuffer(9, (3,)), **change})


def test_a_chain_has_an_end():
    with pytest.raises(OptionError, match="more than the 30 batches of the chain"):
        train(Network(), chain(), squared, Recipe(31), progress=False)


# -- several processes --


def _worker(rank: int, world: int, folder: str) -> None:
    for kind in ("ddp", "fsdp"):
        model = _in_parallel(world, kind)
        values = {n: (v.full_tensor() if hasattr(v, "full_tensor") else v) for n, v in model.items()}
        if rank == 0:
            save_file({n: v.contiguous() for n, v in values.items()}, Path(folder, f"{kind}.safetensors"))


def _in_parallel(world: int, kind: str) -> dict[str, Tensor]:
    model: nn.Module = Network(dropout=0)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    hook = Reptile(0.3, every=5).attach(model)
    fit(model, [hook], chain(0.25, batch_size=8 // world))
    hook.close()
    return dict(model.state_dict())


def test_two_processes_compute_what_one_computes(tmp_path: Path):
    in_group(_worker, 2, str(tmp_path))
    single = _in_parallel(1, "one")
    for kind in ("ddp", "fsdp"):
        found = load_file(tmp_path / f"{kind}.safetensors")
        assert found.keys() == single.keys()
        for name, value in single.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


# -- measures --


def test_forgetting_with_one_earlier_evaluation_is_what_was_lost():
    losses = torch.tensor([[1.0, 9.0], [1.4, 2.0]])
    scores = chain_scores(losses, torch.tensor([5.0, 9.5]))
    assert scores.forgetting == pytest.approx(0.4) and scores.backward_transfer == pytest.approx(-0.4)
    assert scores.forward_transfer == pytest.approx(0.5)
    assert scores.retained == pytest.approx(1.7) and scores.learned == pytest.approx(1.5)


def test_forgetting_counts_from_the_best_and_can_be_negative():
    losses = torch.tensor([[2.0, 7.0, 7.0], [1.5, 3.0, 7.0], [1.8, 2.5, 1.0]])
    scores = chain_scores(losses, torch.full((3,), 8.0))
    assert scores.forgetting == pytest.approx((0.3 - 0.5) / 2)  # from 1.5, not from 2.0; and 2.5 is below 3.0
    assert scores.backward_transfer == pytest.approx((0.2 + 0.5) / 2)
    assert chain_scores(losses - torch.eye(3)[2] * 2, torch.full((3,), 8.0)).forgetting == pytest.approx(-0.1)


def test_one_domain_forgets_nothing():
    scores = chain_scores(torch.tensor([[2.0]]), torch.tensor([3.0]))
    assert (scores.forgetting, scores.backward_transfer, scores.forward_transfer) == (0, 0, 0)
    assert scores.retained == scores.learned == 2


@pytest.mark.parametrize(
    ("losses", "before"),
    [(torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(2, 2), torch.zeros(3)), (torch.zeros(2), torch.zeros(2))],
)
def test_a_matrix_is_square(losses: Tensor, before: Tensor):
    with pytest.raises(OptionError, match="one row a stage, one column a domain"):
        chain_scores(losses, before)
    with pytest.raises(OptionError, match="not finite"):
        chain_scores(torch.full((2, 2), torch.nan), torch.zeros(2))


def test_alignment_is_the_cosine_of_all_gradients_together():
    model = Network().train()
    old, new = ([(torch.randn(6, 4),) for _ in range(n)] for n in (2, 3))
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():  # as in the evaluation of a training
        found = gradient_alignment(model, squared, old, new)
    assert model.training and torch.equal(weight.grad, torch.ones_like(weight))
    model.eval()
    for i, a in enumerate(old):
        for j, b in enumerate(new):
            sides = []
            for batch in (a, b):
                model.zero_grad()
                squared(model, batch).backward()
                sides.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            assert float(found[i, j]) == pytest.approx(float(torch.cosine_similarity(*sides, dim=0)), abs=1e-6)
    assert float(gradient_alignment(model, squared, old[:1], old[:1])) == pytest.approx(1)
    against = gradient_alignment(model, lambda m, b: squared(m, b) * b[1], [(old[0][0], 1.0)], [(old[0][0], -2.0)])
    assert float(against) == pytest.approx(-1)


def test_alignment_without_a_direction():
    model = Network()
    with pytest.raises(OptionError, match="old has 0 batches"):
        gradient_alignment(model, squared, [], [(torch.zeros(1, 4),)])
    with pytest.raises(OptionError, match="zero or not finite"):
        gradient_alignment(model, lambda m, b: 0 * squared(m, b), [(torch.zeros(1, 4),)], [(torch.zeros(1, 4),)])
    with pytest.raises(OptionError, match="none of its parameters"):
        gradient_alignment(model.requires_grad_(False), squared, [1], [1])


def test_metadata_is_plain_json(tmp_path: Path):
    buffer = ReplayBuffer(300, (4,), "float32", tmp_path)
    list(chain(buffer=buffer))
    about = json.loads((tmp_path / "buffer.json").read_text())
    assert about["seen"] == 80 + 20 * 6 and about["marks"]["run"]["about"]["replay"] == 0.25
