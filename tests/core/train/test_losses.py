"""Losses of single samples are what they say, and a weighted batch is one batch however many processes share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from refimpl.core.errors import CalibrationError, OptionError, TrainingError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.losses import Weighted, sample_losses, sequence_losses, shifted_losses
from refimpl.lab.study.jobs import in_group
from refimpl.training_data.loss_reweighting import SHAPES, LossReweighting

VOCABULARY = 11


def bigrams(seed: int = 3) -> nn.Embedding:
    """The smallest causal model: the next token depends on this one."""
    torch.manual_seed(seed)
    return nn.Embedding(VOCABULARY, VOCABULARY)


def rows(n: int = 8, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def by_loss(losses: Tensor, step: int) -> Tensor:
    return (2 * losses).softmax(0)


# -- losses of samples --


def test_three_ways_to_say_a_batch(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model, ids = tiny_llama(), rows(4, 9)
    whole = model(ids[:, :-1]).logits
    expected = F.cross_entropy(whole.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    for batch in (ids, [ids], (ids, torch.arange(4)), {"input_ids": ids, "labels": ids}, {"input_ids": ids}):
        torch.testing.assert_close(sequence_losses(model, batch), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shifted_losses(model(ids).logits, ids), expected, rtol=1e-5, atol=1e-6)
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel holds it
    wrapped.forward = model.forward  # type: ignore[method-assign]
    torch.testing.assert_close(sequence_losses(wrapped, ids), expected, rtol=1e-5, atol=1e-6)


def test_targets_that_do_not_count(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model, ids = tiny_llama(), rows(3, 9)
    labels = ids.clone()
    labels[0, 4:] = -100
    labels[2] = -100
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    found = sequence_losses(model, {"input_ids": ids, "labels": labels, "attention_mask": mask})
    alone = sequence_losses(model, ids[:1, :4])
    torch.testing.assert_close(found[:1], alone, rtol=1e-5, atol=1e-6)
    assert found[2] == 0 and found[1] > 0
    found[2].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradients_are_those_of_each_row() -> None:
    model, ids = bigrams(), rows()
    weights = torch.rand(8)
    (weights * sequence_losses(model, ids)).sum().backward()
    found = model.weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    plain = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    (weights * plain).sum().backward()
    torch.testing.assert_close(found, model.weight.grad)


def test_a_classifier() -> None:
    model, x, y = nn.Linear(3, 5), torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 4, 0])
    torch.testing.assert_close(sample_losses(model, (x, y)), F.cross_entropy(model(x), y, reduction="none"))


@pytest.mark.parametrize("wrong", [VOCABULARY, -1, -101])
def test_labels_out_of_range(wrong: int) -> None:
    ids = rows()
    ids[2, 3] = wrong
    model = nn.Embedding(20, VOCABULARY)  # knows more tokens than it predicts
    labels = {"input_ids": rows(), "labels": ids}
    with pytest.raises(CalibrationError, match=f"row 2 of the batch has the label {wrong}.*use 0 to 10, or -100"):
        shifted_losses(model(labels["input_ids"]), labels["labels"])
    if wrong > 0:
        with pytest.raises(CalibrationError, match=f"row 2 of the batch has the label {wrong}"):
            sequence_losses(model, ids)
    y = torch.tensor([0, 4, wrong])
    with pytest.raises(CalibrationError, match=f"row 2 of the batch has the label {wrong}.*class.*use 0 to 4"):
        sample_losses(nn.Linear(3, 5), (torch.zeros(3, 3), y))


def test_batches_of_another_form() -> None:
    model = bigrams()
    for batch, message in (
        (rows().float(), r"batch is torch.float32 \[8, 7\]"),
        (rows()[0], r"batch is torch.int64 \[7\]"),
        (rows()[:, :1], "two tokens"),
        (rows()[:0], "needs a row"),
        ({"ids": rows()}, "'input_ids'"),
    ):
        with pytest.raises(CalibrationError, match=message):
            sequence_losses(model, batch)
    with pytest.raises(CalibrationError, match=r"labels has shape \[8, 6\]"):
        shifted_losses(torch.zeros(8, 7, 11), rows()[:, 1:])
    with pytest.raises(CalibrationError, match=r"\[B\] and \[B, classes\]"):
        sample_losses(nn.Linear(3, 5), (torch.zeros(3, 3), torch.zeros(4, dtype=torch.long)))


class Watch(TorchDispatchMode):
    """Names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(name in called for called in self.called)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_runs_the_kernel(
    dtype: torch.dtype, tiny_llama: Callable[..., PreTrainedModel], fake_cuda: Callable[[], Any]
) -> None:
    built = tiny_llama().to(dtype)
    loss = Weighted(built, sequence_losses, by_loss)
    with fake_cuda() as place:
        model = place(built)
        batch = torch.ones(4, 17, dtype=torch.long, device="cuda")
        with Watch() as watch, torch.no_grad():
            value = loss(model, batch)
        assert value.device.type == "cuda" and value.dtype == torch.float32
    assert watch.count("refimpl.sequence_cross_entropy.default") == 1
    assert watch.count("log_softmax") == watch.count("nll_loss") == 0


def test_forwards_and_backwards_are_one_operator_each(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    """Fake tensors on a GPU have no backward pass; the operators are the same everywhere, and a GPU has its own."""
    model = tiny_llama()
    with Watch() as watch:
        Weighted(model, sequence_losses, by_loss)(model, rows()).backward()
    for name in ("sequence_cross_entropy", "sequence_cross_entropy_backward"):
        assert watch.count(f"refimpl.{name}.default") == 1
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"refimpl::{name}", "CUDA")
    assert watch.count("log_softmax") == watch.count("nll_loss") == 0


# -- weighted batches --


def test_the_gradient_is_that_of_frozen_weights() -> None:
    model, ids = bigrams(), rows()
    losses = sequence_losses(model, ids)
    weights = by_loss(losses, 0).detach()
    gradients = torch.stack(
        [torch.autograd.grad(l, model.weight, retain_graph=True)[0] for l in losses]  # noqa: E741
    )
    expected = (weights[:, None, None] * gradients).sum(0)
    loss = Weighted(model, sequence_losses, by_loss)
    (found,) = torch.autograd.grad(loss(model, ids), model.weight)
    torch.testing.assert_close(found, expected)
    # the other algorithm, whose weights answer to the parameters, is another one
    attached = (by_loss(losses, 0) * losses).sum()
    (other,) = torch.autograd.grad(attached, model.weight)
    assert (other - expected).norm() > 0.1 * expected.norm()


def test_plain_means_are_plain() -> None:
    ids, recipe = rows(32), Recipe(6, lr=0.1)
    ours, theirs = bigrams(), bigrams()
    loss = Weighted(ours, sequence_losses, lambda losses, step: None)
    train(ours, batches(ids, batch_size=8), loss, recipe, progress=False)
    train(theirs, batches(ids, batch_size=8), lambda m, b: sequence_losses(m, b).mean(), recipe, progress=False)
    assert torch.equal(ours.weight, theirs.weight)
    assert loss.last is None
    assert all(entry["concentration"] == pytest.approx(1) for entry in loss.history())


def test_history_keeps_the_plain_mean() -> None:
    model, ids = bigrams(), rows(640)
    loss = Weighted(model, sequence_losses, by_loss)
    with torch.no_grad():
        before = sequence_losses(model, ids[:8])
        value = loss(model, ids[:8])
    assert loss.last is not None
    (entry,) = loss.history()
    assert entry["loss"] == pytest.approx(before.mean().item()) and value > before.mean()
    assert entry["concentration"] == pytest.approx(8 * by_loss(before, 0).max().item())
    assert entry["effective"] == pytest.approx(1 / by_loss(before, 0).square().sum().item())
    with torch.no_grad():
        for batch in ids.split(8)[1:]:
            loss(model, batch)
    assert [entry["step"] for entry in loss.history()] == list(range(1, 81))


@pytest.mark.parametrize("strategy", [*SHAPES, "uniform"])
def test_rows_without_targets_change_nothing(strategy: str) -> None:
    """They have a loss of 0 and no gradient; they must not be what the others are compared or averaged with."""
    ids = rows(5)
    labels = torch.cat([ids[:2], torch.full_like(ids[:3], -100), ids[2:]])
    gradients, entries = [], []
    for batch in ({"input_ids": ids}, {"input_ids": torch.cat([ids[:2], ids[:3], ids[2:]]), "labels": labels}):
        model = Causal()
        loss = Weighted(model, sequence_losses, LossReweighting(strategy))
        gradients.append(torch.autograd.grad(loss(model, batch), model.inner.weight)[0])
        entries.append(loss.history()[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert entries[0] == pytest.approx(entries[1])
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    model = Causal()
    assert Weighted(model, sequence_losses, LossReweighting(strategy))(model, nothing).item() == 0


class Causal(nn.Module):
    """`bigrams` that takes a batch as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bigrams()

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.inner(input_ids))


def test_a_loop_that_accumulates_is_at_the_right_step() -> None:
    """Burn-in counts updates, whatever an update consists of; a last one of fewer batches too."""
    seen: list[int] = []
    model = bigrams()
    loss = Weighted(model, sequence_losses, lambda l, step: seen.append(step))  # noqa: E741
    other = torch.optim.SGD(bigrams().parameters(), lr=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for micro_batches in (3, 3, 2):
        for batch in rows(4 * micro_batches).split(4):
            (loss(model, batch) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        other.step()  # of another model
        optimizer.step()  # a second optimiser, or an outer one
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2]
    loss.close()
    optimizer.step()
    assert list(model.state_dict()) == ["weight"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_is_at_the_right_step(accumulate: int, told: bool, tmp_path: Path) -> None:
    seen: list[int] = []

    def late(losses: Tensor, step: int) -> Tensor | None:
        seen.append(step)
        return None if step < 4 else by_loss(losses, step)

    def stop(step: int, model: nn.Module) -> None:
        if step == 6:
            raise Stop

    recipe = Recipe(8, lr=0.1, accumulate=accumulate)

    def run(**options: Any) -> nn.Module:
        model = bigrams()
        loss = Weighted(model, sequence_losses, late, accumulate if told else None)
        train(model, batches(rows(64), batch_size=8), loss, recipe, progress=False, **options)
        loss.close()
        return model

    whole = run()
    assert seen == [step for step in range(8) for _ in range(accumulate)]
    seen.clear()
    with pytest.raises(Stop):
        run(folder=tmp_path, checkpoint_every=3, after_step=[stop])
    resumed = run(folder=tmp_path, checkpoint_every=3)
    assert seen[6 * accumulate :] == [step for step in range(3, 8) for _ in range(accumulate)]
    assert list(resumed.state_dict()) == ["weight"]  # close takes the counter away
    assert torch.equal(whole.weight, resumed.weight)  # type: ignore[arg-type]


def test_a_loss_of_nan_stops_the_run(tmp_path: Path) -> None:
    model = bigrams()

    def spoilt(model: nn.Module, batch: Any) -> Tensor:
        losses = sequence_losses(model, batch)
        return losses.masked_fill((batch[0] == 5).sum(1) > 5, torch.nan)

    ids = rows(64)
    ids[17] = 5
    loss = Weighted(model, spoilt, by_loss)
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+; .*last good checkpoint, of step"):
        train(
            model,
            batches(ids, batch_size=4, seed=1),
            loss,
            Recipe(30, lr=0.1),
            folder=tmp_path,
            checkpoint_every=1,
            progress=False,
        )
    assert load_file(tmp_path / "checkpoint.safetensors")["model/weight"].isfinite().all()


def test_wrong_use() -> None:
    model, ids = bigrams(), rows()
    with pytest.raises(OptionError, match="accumulate=0"):
        Weighted(model, sequence_losses, by_loss, 0)
    loss = Weighted(model, sequence_losses, by_loss)
    with pytest.raises(OptionError, match=r"close\(\) the loss"):
        Weighted(model, sequence_losses, by_loss)
    loss.close()
    loss.close()
    with pytest.raises(CalibrationError, match=r"losses has shape \[\]"):
        Weighted(model, lambda m, b: sequence_losses(m, b).mean(), by_loss)(model, ids)
    other = bigrams()
    with pytest.raises(CalibrationError, match=r"weights has shape \[3\], losses \[8\]"):
        Weighted(other, sequence_losses, lambda losses, step: torch.ones(3))(other, ids)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("number", [16, 24])
def test_a_trainer_takes_it(
    number: int, told: bool, tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Accumulation too: the Trainer does not divide by it, so we do; with 24 rows an epoch ends within an update."""
    from transformers import Trainer, TrainingArguments

    ids = rows(number, 9)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    seen: list[int] = []

    def rule(losses: Tensor, step: int) -> Tensor:
        seen.append(step)
        return by_loss(losses, step)

    model = tiny_llama()
    loss = Weighted(model, sequence_losses, rule, accumulate=4 if told and number == 16 else None)
    Sequential = type("Sequential", (Trainer,), {"_get_train_sampler": lambda self, *a: None})  # in the data's order
    Sequential(model, arguments, train_dataset=data, compute_loss_func=loss.compute_loss_func).train()
    # updates of four micro-batches, and where the data end within one, of two
    updates = [(0, 4)] * 4 if number == 16 else [(0, 4), (4, 2)] * 2
    assert seen == [step for step, (_, count) in enumerate(updates) for _ in range(count)]
    expected = tiny_llama()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    own = Weighted(expected, sequence_losses, by_loss)
    for start, count in updates:
        optimizer.zero_grad()
        for micro in range(start, start + count):
            (own(expected, {"input_ids": ids[4 * micro : 4 * micro + 4]}) / count).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# -- two processes --

KINDS = ["plain", "fsdp"]


def _worker(rank: int, world: int, folder: str) -> None:
    for kind in KINDS:
        _train(Path(folder, kind), kind)


def _train(folder: Path, kind: str) -> None:
    model: nn.Module = nn.Sequential(bigrams())
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    loss = Weighted(model, sequence_losses, lambda l, step: by_loss(l, step) if step > 1 else None)  # noqa: E741
    loader = batches(rows(64), batch_size=8)
    options: dict[str, Any] = {"folder": folder, "checkpoint_every": 3, "progress": False}

    def stop(step: int, model: nn.Module) -> None:
        if step == 4:
            raise Stop

    try:
        train(model, loader, loss, RECIPE, after_step=[stop], **options)
    except Stop:
        dist.barrier()
        train(model, loader, loss, RECIPE, **options)
    loss.close()
    found = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    if dist.get_rank() == 0:
        assert loss.last is not None
        save_file({**found, "last": loss.last}, folder / "result.safetensors")


RECIPE = Recipe(8, lr=0.1, optimizer="sgd", momentum=0.0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_group(_worker, 2, str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_weight_one_batch(kind: str, two_processes: Path) -> None:
    model = nn.Sequential(bigrams())
    loss = Weighted(model, sequence_losses, lambda l, step: by_loss(l, step) if step > 1 else None)  # noqa: E741
    train(model, batches(rows(64), batch_size=16), loss, RECIPE, progress=False)
    found = load_file(two_processes / kind / "result.safetensors")
    torch.testing.assert_close(found["0.weight"], model[0].weight.data, rtol=1e-6, atol=1e-6)
    assert len(found["last"]) == 16  # weights of the whole batch, on each
    torch.testing.assert_close(found["last"].sort().values, loss.last.sort().values, rtol=1e-4, atol=1e-6)
