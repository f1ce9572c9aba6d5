"""Schedules: their shape on paper, in the loop, in a torch scheduler, and in the Hugging Face Trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.schedules import Constant, Cosine, Infinite, Schedule, Scheduled, Then, trainer_callback

HIGH, MIDDLE, LOW = 3e-4, 1.65e-4, 3e-5


def infinite(**changes) -> Infinite:
    options = {"warmup": 10, "cooldown": 50, "hold": 30, "anneal": 20, "peak": HIGH, "constant": MIDDLE, "low": LOW}
    return Infinite(**options | changes)


SHAPES = [
    Cosine(100, HIGH, LOW, warmup=10),
    Cosine(100, HIGH, LOW),
    Cosine(7, HIGH, 0.0, warmup=3),
    infinite(),
    infinite(form="inverse_sqrt"),
    infinite(form="inverse_sqrt", steepness=0.1),
    infinite(constant=HIGH, cooldown=0),
    infinite(constant=LOW),
    infinite(warmup=0, hold=0),
]


@pytest.mark.parametrize("schedule", SHAPES, ids=str)
def test_shape(schedule):
    """Up to the peak, never up again, nowhere a jump, and the rates that were asked for at the ends."""
    fine = [schedule.rate(k * schedule.horizon / 5000) for k in range(5001)]
    assert schedule.rate(schedule.warmup) == HIGH == schedule.highest and max(fine) <= HIGH
    assert schedule.rate(schedule.horizon) == pytest.approx(schedule.low, rel=1e-12)
    rising = [r for k, r in enumerate(fine) if k * schedule.horizon / 5000 <= schedule.warmup]
    falling = fine[len(rising) :]
    assert rising == sorted(rising) and len(rising) == (1 if schedule.warmup == 0 else len(rising))
    assert all(b <= a * (1 + 1e-12) for a, b in zip(falling, falling[1:], strict=False))
    assert all(schedule.low * (1 - 1e-12) <= r <= HIGH * (1 + 1e-12) for r in falling)
    # continuous: on a finer grid the largest step shrinks with the grid
    assert max(abs(a - b) for a, b in zip(fine, fine[1:], strict=False)) < HIGH * max(
        0.01, 1.1 * schedule.horizon / 5000 / max(1, schedule.warmup)
    )


def test_the_ends_of_every_phase():
    for form in ("cosine", "inverse_sqrt"):
        schedule = infinite(form=form)
        assert [schedule.rate(t) for t in (0, 10, 60, 75, 90)] == pytest.approx(
            [0, HIGH, MIDDLE, MIDDLE, MIDDLE], rel=1e-12
        )
        assert schedule.rate(110) == pytest.approx(LOW, rel=1e-12)
        for end in (10, 60, 90):
            below, above = schedule.rate(end - 1e-7), schedule.rate(end + 1e-7)
            assert below == pytest.approx(above, rel=1e-6)
        ratios = [schedule.rate(t + 1) / schedule.rate(t) for t in range(90, 110)]
        assert ratios == pytest.approx([(LOW / MIDDLE) ** (1 / 20)] * 20, rel=1e-12)


def test_the_inverse_root_is_steep_and_becomes_a_line():
    line = [HIGH + (MIDDLE - HIGH) * tau / 50 for tau in range(51)]

    def cooled(steepness):
        schedule = infinite(form="inverse_sqrt", steepness=steepness)
        return [schedule.rate(10 + tau) for tau in range(51)]

    assert cooled(1e-9) == pytest.approx(line, rel=1e-8)
    assert all(rate < straight for rate, straight in zip(cooled(10.0)[1:-1], line[1:-1], strict=True))
    h = [1 / math.sqrt(1 + 10 * tau / 50) - 1 for tau in range(51)]  # as it is printed
    assert cooled(10.0) == pytest.approx([HIGH + (MIDDLE - HIGH) / h[-1] * x for x in h], rel=1e-12)


def test_special_cases():
    flat = infinite(constant=HIGH, anneal=0)
    assert [flat.rate(t) for t in range(10, flat.horizon + 1)] == pytest.approx([HIGH] * 81, rel=1e-12)
    ordinary = Cosine(100, HIGH, LOW, warmup=10)
    same = Infinite(10, 90, 0, 0, HIGH, LOW, LOW)
    assert [same.rate(t) for t in range(101)] == [ordinary.rate(t) for t in range(101)]


def test_phases_follow_each_other():
    both = Cosine(10, HIGH, LOW, warmup=2).then(Cosine(5, 2 * HIGH, LOW, warmup=1))
    assert isinstance(both, Then) and both.horizon == 15 and both.highest == 2 * HIGH
    assert [both.rate(t) for t in range(11)] == [both.first.rate(t) for t in range(11)]
    assert [both.rate(10 + t) for t in range(1, 6)] == [both.second.rate(t) for t in range(1, 6)]
    assert both.scale(14) == pytest.approx(LOW / (2 * HIGH))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(10, LOW, HIGH), "low=0.0003 is above peak=3e-05"),
        (lambda: infinite(constant=1e-5), "low=3e-05 is above constant=1e-05"),
        (lambda: infinite(constant=1.0), "constant=1.0 is above peak=0.0003; the order must be low <= constant"),
        (lambda: infinite(low=0.0), "never reaches zero"),
        (lambda: infinite(cooldown=0), "cooldown=0 leaves no updates"),
        (lambda: infinite(hold=-1), "hold=-1"),
        (lambda: infinite(form="cosin"), "did you mean 'cosine'"),
        (lambda: infinite(steepness=0.0), "steepness=0.0"),
        (lambda: Infinite(0, 0, 0, 0, HIGH, MIDDLE, LOW), "are all 0"),
        (lambda: Cosine(0, HIGH), "steps=0"),
        (lambda: Cosine(10, HIGH, warmup=10), "warmup=10: use 0 to steps - 1 = 9"),
        (lambda: Constant(10, math.nan), "peak=nan"),
        (lambda: Constant(10, 0.0), "peak=0.0: use a positive rate"),
        (lambda: Cosine(10, HIGH).rate(10.5), "t=10.5 lies past the schedule"),
        (lambda: Cosine(10, HIGH).scale(10), "step=10 lies past the schedule, which has updates 0 to 9"),
        (lambda: Scheduled.of(Cosine(10, HIGH), steps=11), "steps=11 go past the schedule, which ends after 10"),
        (lambda: Scheduled.of(Cosine(10, HIGH), warmup=2), "warmup=2: give it to the schedule"),
        (lambda: Scheduled(10), "rates=None"),
    ],
)
def test_errors(make, message):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        make()


def _regression(schedule, folder: Path | None = None, stop: int | None = None) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    rates = []

    def loss(model, batch):
        if stop is not None and len(rates) == stop:
            raise KeyboardInterrupt
        rates.append(0.0)
        return (model(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    history = train(
        model, batches(x, batch_size=8), loss, Scheduled.of(schedule), folder=folder, checkpoint_every=4, progress=False
    )
    return model, [entry["lr"] for entry in history.steps]


def test_in_the_loop_and_after_an_interruption(tmp_path):
    schedule = Cosine(12, 0.1, 0.01, warmup=3).then(Infinite(2, 4, 4, 2, 0.05, 0.03, 0.01))
    whole, rates = _regression(schedule)
    assert rates == pytest.approx([schedule.rate(t) for t in range(1, 25)], rel=1e-12)
    with pytest.raises(KeyboardInterrupt):
        _regression(schedule, tmp_path / "run", stop=15)
    again, later = _regression(schedule, tmp_path / "run")
    assert later == rates
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    other = Cosine(12, 0.1, 0.01, warmup=3).then(Infinite(2, 4, 4, 2, 0.05, 0.03, 0.005))
    with pytest.raises(CheckpointError, match="another recipe"):
        _regression(other, tmp_path / "run")


def test_the_recipe_is_the_loops_own_where_both_can_say_it():
    ours = Scheduled.of(Cosine(100, 0.1, 0.01, warmup=10))
    theirs = Recipe(100, lr=0.1, warmup=10, final_lr=0.1)
    # the loop reaches its final rate one update after the last
    assert [ours.lr_at(s) for s in range(9, 99)] == pytest.approx([theirs.lr_at(s + 1) for s in range(9, 99)])


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("low", [0.0, 0.1, 0.37, 1.0])
def test_recipe_and_cosine_are_one_curve_read_at_two_moments(warmup, low):
    recipe, cosine = Recipe(60, lr=0.3, warmup=warmup, final_lr=low), Cosine(60, 1.0, low, warmup)
    read = [cosine.rate(step + 1 if step < warmup else step) for step in range(60)]
    assert [recipe.scale(step) for step in range(60)] == pytest.approx(read, rel=4e-16)
    # and to the bit what recorded runs were trained with
    old = [
        (step + 1) / warmup
        if step < warmup
        else low + (1 - low) * 0.5 * (1 + math.cos(math.pi * ((step - warmup) / max(1, 60 - warmup))))
        for step in range(60)
    ]
    assert [recipe.lr_at(step) for step in range(60)] == [0.3 * scale for scale in old]
    weights = [0.5 * (1 + math.cos(math.pi * ((t - warmup) / (60 - warmup)))) for t in range(61)]
    scaled = [1.0 * t / warmup if t < warmup else w * 1.0 + (1 - w) * low for t, w in enumerate(weights)]
    assert [cosine.scale(step) for step in range(60)] == scaled[1:]


def test_a_torch_scheduler():
    schedule = infinite()
    slow, fast = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [slow]}, {"params": [fast], "lr": 2 * HIGH}], lr=HIGH)
    scheduler = schedule.scheduler(optimizer)
    for t in range(1, schedule.horizon + 1):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([schedule.rate(t), 2 * schedule.rate(t)], rel=1e-12)
        optimizer.step()
        scheduler.step()
    with pytest.raises(OptionError, match="past the schedule"):
        scheduler.step()


def _trainer(folder: Path, schedule: Schedule, **options):
    from transformers import Trainer, TrainingArguments

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(2, 1)

        def forward(self, x, labels=None):
            return {"loss": (self.linear(x) - x.sum(-1, keepdim=True)).square().mean()}

    rows = [{"x": torch.tensor([float(k % 5), 1.0]), "labels": 0} for k in range(40)]
    arguments = {"max_steps": 12, "learning_rate": schedule.highest, "lr_scheduler_type": "constant"}
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments | options,
    )
    return Trainer(Squares(), settings, train_dataset=rows, callbacks=[trainer_callback(schedule)])


def test_the_trainer_of_hugging_face(tmp_path):
    schedule = Cosine(12, 0.01, 0.001, warmup=4)
    trainer = _trainer(tmp_path, schedule)
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    seen = [schedule.rate(t) for t in range(1, 13)]
    assert logged == pytest.approx(seen, rel=1e-9)
    weights = trainer.model.linear.weight.detach().clone()
    again = _trainer(tmp_path, schedule)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    logged = [entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry]
    assert logged[-7:] == pytest.approx(seen[-7:], rel=1e-9)
    assert torch.equal(again.model.linear.weight, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_steps": 13}, "max_steps=13 go past the schedule"), ({"learning_rate": 0.5}, "use learning_rate=0.01")],
)
def test_the_trainer_is_told_before_it_starts(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        _trainer(tmp_path, Cosine(12, 0.01, 0.001), **options).train()


def test_the_trainer_must_have_a_scheduler_that_takes_functions(tmp_path):
    trainer = _trainer(tmp_path, Cosine(12, 0.01, 0.001))
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 5)
    with pytest.raises(OptionError, match="lr_scheduler=StepLR takes no function"):
        trainer.train()
