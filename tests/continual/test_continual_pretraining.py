"""Continual pre-training: what the schedules and the replay promise, alone, in the loop, in two processes, and in the
Hugging Face Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refimpl.continual.continual_pretraining import (
    ContinualPretraining,
    extended,
    infinite,
    next_token_loss,
    phases,
    replay_loader,
    replay_stream,
    rewarm_redecay,
    shares,
)
from refimpl.core.errors import OptionError
from refimpl.core.train.loop import train
from refimpl.core.train.sampling import mixture_loader
from refimpl.core.train.schedules import Constant, Scheduled, trainer_callback
from refimpl.lab.study.jobs import in_group

NEW, OLD = torch.arange(0, 500), torch.arange(1000, 1300)  # a row says where it is from


def rows(loader) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


# -- schedules --


@pytest.mark.parametrize(
    ("T", "warmup", "T_w"), [(400, 0.01, 4), (400, 0.0, 0), (400, 0.005, 2), (150, 0.01, 2), (100, 0.07, 7)]
)
def test_rewarm_and_redecay(T, warmup, T_w):
    high, low = 3e-4, 3e-5
    schedule = rewarm_redecay(T, high, low, warmup)
    assert schedule.warmup == T_w and schedule.horizon == T
    printed = [high * t / T_w for t in range(T_w)]
    printed += [low + (high - low) / 2 * (1 + math.cos(math.pi * (t - T_w) / (T - T_w))) for t in range(T_w, T + 1)]
    assert [schedule.rate(t) for t in range(T + 1)] == pytest.approx(printed, rel=1e-12)
    assert schedule.rate(T_w) == high and schedule.rate(T) == low


@pytest.mark.parametrize("form", ["cosine", "inverse_sqrt"])
def test_an_infinite_schedule_is_extended(form):
    first = infinite(1000, 3e-4, form=form)
    assert first.rate(610) == pytest.approx(1.65e-4, rel=1e-12) and first.horizon == 1000
    assert first.rate(1000) == pytest.approx(3e-5, rel=1e-12)
    longer = extended(first, 500)
    begin = first.constant_until
    assert [longer.rate(t) for t in range(begin + 1)] == [first.rate(t) for t in range(begin + 1)]
    assert {longer.rate(begin + t) for t in range(501)} == {first.constant}
    assert [longer.rate(begin + 500 + t) for t in range(101)] == pytest.approx(
        [first.rate(begin + t) for t in range(101)], rel=1e-12
    )


# -- replay --


@pytest.mark.parametrize("r", [0, 0.01, 0.05, 0.25, 1 / 3, 0.5, 1])
@pytest.mark.parametrize("batch_size", [8, 5])
def test_the_budget_and_the_share_are_kept_at_every_step(r, batch_size):
    steps, seen, old = 160, 0, 0
    for batch in rows(replay_loader(NEW, [OLD], r, batch_size, steps)):
        assert len(batch) == batch_size
        seen, old = seen + len(batch), old + sum(row >= 1000 for row in batch)
        assert abs(old - r * seen) < 1  # so the realised share is within 1 / (T B)
    assert seen == steps * batch_size


def test_the_ends_of_the_range():
    none = rows(replay_loader(NEW, [OLD], 0, 8, 100, seed=3))
    assert none == rows(mixture_loader([NEW], [1.0], 8, 100, seed=3))
    assert none == rows(replay_loader(NEW, [], 0, 8, 100, seed=3))
    only = sum(rows(replay_loader(NEW, [OLD], 1, 8, 100, seed=3)), [])
    assert min(only) >= 1000 and set(only) == set(OLD.tolist())  # 800 rows of 300


def test_it_begins_anywhere():
    whole = rows(replay_loader(NEW, [OLD], 0.3, 8, 100, seed=3))
    assert rows(replay_loader(NEW, [OLD], 0.3, 8, 37, seed=3, start=63)) == whole[63:]
    assert rows(replay_loader(NEW, [OLD], 0.3, 8, 100, seed=4)) != whole


def test_older_data_share_by_size():
    assert shares(0.2, [300, 100]) == pytest.approx([0.8, 0.15, 0.05])
    third = torch.arange(2000, 2100)
    seen = torch.tensor(sum(rows(replay_loader(NEW, [OLD, third], 0.2, 10, 100)), []))
    assert [int(((seen >= low) & (seen < low + 1000)).sum()) for low in (0, 1000, 2000)] == [800, 150, 50]


def test_phases_in_one_run():
    loader = mixture_loader([OLD, NEW], phases((10, [1, 0]), (20, [0.25, 0.75])), 8, 30)
    old = [sum(row >= 1000 for row in batch) for batch in rows(loader)]
    assert old == [8] * 10 + [2] * 20


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_of_hugging_face(streaming):
    datasets = pytest.importorskip("datasets")
    parts: list[Any] = [datasets.Dataset.from_dict({"x": data.tolist()}) for data in (NEW, OLD)]
    if streaming:
        parts = [part.to_iterable_dataset() for part in parts]
    count, r = 600, 0.25
    found = [row["x"] for row, _ in zip(replay_stream(parts[0], [parts[1]], r, seed=1), range(count), strict=False)]
    share = sum(x >= 1000 for x in found) / count
    assert abs(share - r) < 4 * math.sqrt(r * (1 - r) / count)
    if streaming:
        with pytest.raises(OptionError, match=r"old\[0\] is a IterableDataset, which has no length"):
            replay_stream(parts[0], [parts[1], parts[1]], r)
        replay_stream(parts[0], [parts[1], parts[1]], r, sizes=[300, 300])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replay_loader(NEW, [OLD], 1.5, 8, 10), "r=1.5: the replayed share of a batch, use 0 to 1"),
        (lambda: replay_loader(NEW, [OLD], -0.1, 8, 10), "r=-0.1"),
        (lambda: replay_loader(NEW, [OLD], math.nan, 8, 10), "r=nan"),
        (lambda: replay_loader(NEW, [], 0.1, 8, 10), "pass old data, or r=0"),
        (lambda: replay_loader(NEW, [iter([1])], 0.1, 8, 10), "old.0. is a list_iterator, which has no length"),
        (lambda: replay_loader(iter([1]), [OLD], 0.1, 8, 10), "list_iterator, which has no length"),
        (lambda: phases(), "parts is empty"),
        (lambda: phases((0, [1])), "a phase of 0 batches"),
        (lambda: rewarm_redecay(100, 1e-5, 1e-4), "low=0.0001 is above peak=1e-05"),
        (lambda: rewarm_redecay(100, 1e-4, 1e-5, warmup=1.0), "warmup=1.0: it is a share of the phase"),
        (lambda: infinite(100, 1e-4, constant=0.05), "is above constant"),
        (lambda: infinite(100, 1e-4, constant=1.5), "constant=1.5: it is a fraction of eta_max"),
        (lambda: infinite(100, 1e-4, cooldown=0.8, anneal=0.3), "take 111 of T=100 updates"),
        (lambda: extended(infinite(100, 1e-4), -1), "T=-1"),
        (lambda: ContinualPretraining(1e-4, 1e-3), "low=0.001 is above peak=0.0001"),
        (lambda: ContinualPretraining(1e-4, replay=2), "r=2"),
        (lambda: ContinualPretraining(1e-4, warmup=-0.1), "warmup=-0.1"),
        (lambda: ContinualPretraining(1e-4).schedule(100).scale(100), "step=100 lies past the schedule"),
    ],
)
def test_errors(make, message):
    with pytest.raises(OptionError, match=message):
        make()


# -- a model that can be trained in an instant: the next token depends on this one --

SYMBOLS, LENGTH = 12, 16


def source(seed: int, count: int = 400) -> Tensor:
    """Rows of a Markov chain, int64 [count, LENGTH + 1]."""
    g = torch.Generator().manual_seed(seed)
    table = (3 * torch.randn(SYMBOLS, SYMBOLS, generator=g)).softmax(-1)
    ids = [torch.randint(SYMBOLS, (count,), generator=g)]
    for _ in range(LENGTH):
        ids.append(torch.multinomial(table[ids[-1]], 1, generator=g).squeeze(1))
    return torch.stack(ids, 1)


def bigram() -> nn.Module:
    torch.manual_seed(0)
    return nn.Embedding(SYMBOLS, SYMBOLS)


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Tensor]:
    model = bigram()
    recipe = Scheduled.of(rewarm_redecay(250, 0.1, 0.01), clip=1.0)
    train(model, mixture_loader([source(1)], [1.0], 8, 250), next_token_loss, recipe, progress=False)
    return model.state_dict()


def loss_of(model: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        return float(next_token_loss(model, data))


def continued(state: dict[str, Tensor], new: Tensor, method: ContinualPretraining, **options) -> nn.Module:
    model = bigram()
    model.load_state_dict(state)
    settings = {"steps": 80, "batch_size": 8, "progress": False, "seed": 5}
    method.train(model, new, [source(1)], **settings | options)
    return model


def test_replay_keeps_the_old_and_costs_some_of_the_new(pretrained):
    old, new = source(1), source(2)
    before = bigram()
    before.load_state_dict(pretrained)
    found = {r: continued(pretrained, new, ContinualPretraining(0.1, replay=r)) for r in (0.0, 0.05, 0.25)}
    forgotten = {r: loss_of(model, old) - loss_of(before, old) for r, model in found.items()}
    assert forgotten[0.0] > forgotten[0.05] > forgotten[0.25] > 0
    assert loss_of(found[0.0], new) < loss_of(found[0.25], new) < loss_of(before, new) - 0.5


def test_without_a_shift_a_small_rate_does_no_harm_and_a_large_one_does(pretrained):
    """The same chain goes on. The moments begin anew, so the small rate is warmed up as well."""
    old = source(1)
    before = bigram()
    before.load_state_dict(pretrained)
    runs = {}
    for rate in (0.01, 0.3):
        model = bigram()
        model.load_state_dict(pretrained)
        seen: list[float] = []
        train(
            model,
            mixture_loader([old], [1.0], 8, 100, seed=9),
            next_token_loss,
            Scheduled.of(Constant(100, rate, warmup=5), clip=1.0),
            progress=False,
            after_step=[lambda step, model, seen=seen: seen.append(loss_of(model, old))],
        )
        runs[rate] = max(seen) - loss_of(before, old)
    assert runs[0.01] < 0.005 < 0.02 < runs[0.3]


class Stop(Exception):
    pass


def test_an_interrupted_phase_goes_on_bit_for_bit(pretrained, tmp_path):
    def stop(step, model):
        if step == 50:
            raise Stop

    method = ContinualPretraining(0.1, replay=0.05)
    whole = continued(pretrained, source(2), method)
    with pytest.raises(Stop):
        continued(pretrained, source(2), method, folder=tmp_path, checkpoint_every=20, after_step=[stop])
    again = continued(pretrained, source(2), method, folder=tmp_path, checkpoint_every=20)
    assert torch.equal(whole.weight, again.weight)  # type: ignore[attr-defined]


def _worker(rank: int, world: int, folder: str) -> None:
    method = ContinualPretraining(0.1, replay=0.05)
    model = continued(load_file(Path(folder, "before")), source(2), method, batch_size=8 // world, steps=25)
    if rank == 0:
        save_file(model.state_dict(), Path(folder, "after"))


def test_two_processes_compute_what_one_computes(pretrained, tmp_path):
    save_file(pretrained, tmp_path / "before")
    in_group(_worker, 2, str(tmp_path))
    single = continued(pretrained, source(2), ContinualPretraining(0.1, replay=0.05), batch_size=8, steps=25)
    torch.testing.assert_close(load_file(tmp_path / "after"), single.state_dict(), rtol=1e-3, atol=1e-5)


def test_accumulated_batches_replay_as_one(pretrained):
    method = ContinualPretraining(0.1, replay=0.05)
    once = continued(pretrained, source(2), method, steps=20)
    twice = continued(pretrained, source(2), method, steps=20, batch_size=4, recipe={"accumulate": 2})
    # the same shares, other rows beside each other only where a share is carried over
    assert abs(loss_of(once, source(1)) - loss_of(twice, source(1))) < 0.05


def test_an_infinite_run_goes_on_from_its_constant_phase_in_the_trainer(tmp_path):
    """Train, keep the checkpoint of the constant phase, extend the schedule later: the same as having known before."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    first = infinite(20, 1e-2)
    longer = extended(first, 10)
    texts = [{"input_ids": row, "labels": row} for row in source(3, 200)]

    def trainer(folder: Path, schedule, steps: int) -> Trainer:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=SYMBOLS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        settings = TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            max_steps=steps,
            report_to=[],
            learning_rate=schedule.highest,
            lr_scheduler_type="constant",
            use_cpu=True,
            save_steps=first.constant_until,
            disable_tqdm=True,
        )
        return Trainer(LlamaForCausalLM(config), settings, train_dataset=texts, callbacks=[trainer_callback(schedule)])

    trainer(tmp_path / "a", first, first.horizon).train()  # annealed, to be used
    later = trainer(tmp_path / "b", longer, longer.horizon)
    later.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{first.constant_until}"))
    known = trainer(tmp_path / "c", longer, longer.horizon)
    known.train()
    for name, value in known.model.state_dict().items():
        assert torch.equal(later.model.state_dict()[name], value), name
