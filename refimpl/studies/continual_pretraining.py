"""The experiment behind the chapter on continual pre-training: what a model forgets and learns when new text arrives.

Five Llamas of 0.17M parameters are trained from scratch on three quarters of the Wikipedia articles for training (D0).
Then text of another kind arrives (D1): Python sources (a strong shift), documentation (a weak one), or the other
articles (none), for a fifth of the updates that D0 had. Every arm of this second phase has the same updates and the
same batch; replay takes its rows from the new text. Trainings from scratch on both (union) have the updates of both
phases. Rates of what is trained from scratch come from one grid of four, chosen on validation text with a seed that is
not used again; re-warming goes back to the rate of D0, as the paper has it, and is swept beside that. Loss is in
bits per byte of test text; the average is the plain mean of old and new.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from refimpl.continual.continual_pretraining import phases, replay_loader, rewarm_redecay
from refimpl.core.train.loop import History, train
from refimpl.core.train.sampling import mixture_loader
from refimpl.core.train.schedules import Constant, Infinite, Schedule, Scheduled
from refimpl.lab.data import domains
from refimpl.lab.measure.bits import language_model_loss
from refimpl.lab.measure.statistics import Interval, t_interval
from refimpl.lab.study.claims import (
    ABOVE_ZERO,
    BELOW_ONE,
    BELOW_ZERO,
    Both,
    Bound,
    Claim,
    Every,
    Gap,
    Outcome,
    grade,
    over_seeds,
)
from refimpl.lab.study.claims import Arm as AnyArm
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, Row, Run, Stages, Study, curves

SEEDS = (1, 2, 3, 4, 5)
RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2)
BATCH, LENGTH = 8, 64  # rows a batch, predicted tokens a row
LOW = 0.1  # eta_min as a fraction of eta_max
CONSTANT = 0.55  # eta_const, likewise
NEW = {"strong": "python", "weak": "prose", "none": "wikipedia"}
"""Shifts and the kind of text that arrives."""
SCALE = "a Llama of 0.17M weights, phases of 1.0M and 0.2M tokens; the paper: 405M and 10B weights, phases of 300B"


@dataclass(frozen=True)
class Way:
    """A way to go on training when new text arrives.

    Attributes:
        r: replayed share.
        rates: "re-warm" and re-decay; "low": eta_min throughout; "high": re-warm and stay; "infinite" and
            "infinite root": the schedule's two forms, its annealing at the end of the phase.
        factor: of the highest rate.
        warmup: as a share of the phase.
        start: "D0", the model alone; "moments", with the optimiser's state, in one run with D0; "nothing": from
            scratch, on the new text ("new only") or on both.
    """

    r: float = 0.0
    rates: str = "re-warm"
    factor: float = 1.0
    warmup: float = 0.01
    start: str = "D0"


WAYS = {
    "re-warm 0 %": Way(),
    "re-warm 1 %": Way(0.01),
    "re-warm 5 %": Way(0.05),
    "re-warm 25 %": Way(0.25),
    "re-warm 50 %": Way(0.5),
    "old only": Way(1.0),
    "constant low": Way(rates="low"),
    "constant high": Way(rates="high"),
    "half the rate": Way(factor=0.5),
    "twice the rate": Way(factor=2.0),
    "warm-up 0 %": Way(warmup=0.0),
    "warm-up 10 %": Way(warmup=0.1),
    "moments kept 25 %": Way(0.25, start="moments"),
    "infinite 25 %": Way(0.25, "infinite", start="moments"),
    "infinite 0 %": Way(0.0, "infinite", start="moments"),
    "infinite root 25 %": Way(0.25, "infinite root", start="moments"),
    "union": Way(start="nothing"),
    "new only": Way(start="nothing"),
}
JUDGED = {
    "strong": (
        "re-warm 0 %",
        "re-warm 5 %",
        "re-warm 25 %",
        "constant low",
        "warm-up 0 %",
        "warm-up 10 %",
        "moments kept 25 %",
        "infinite 25 %",
        "union",
    ),
    "weak": ("re-warm 0 %", "re-warm 5 %"),
    "none": ("re-warm 0 %", "constant low"),
}
"""Arms that a rule names: five seeds. The others are shown with one."""
SHOWN = {
    "strong": (
        "re-warm 1 %",
        "re-warm 50 %",
        "old only",
        "constant high",
        "half the rate",
        "twice the rate",
        "infinite root 25 %",
        "new only",
    ),
    "weak": ("re-warm 25 %", "constant low", "union"),
    "none": ("infinite 0 %",),
}


@dataclass(frozen=True)
class Size:
    """Size of the experiment at a profile.

    Attributes:
        first, second: updates on D0 and on D1.
        every: updates between two looks.
        look, measured: windows of a look, and of the end.
    """

    first: int = 2000
    second: int = 400
    every: int = 50
    look: int = 48
    measured: int = 128


SIZES = {"study": Size(), "quick": Size(12, 6, 3, 4, 4)}


# -- arms --


@dataclass(frozen=True)
class Arm:
    """A way to train under a shift.

    Attributes:
        name: a key of `WAYS`, or "D0" and "D0 infinite" for the first phase.
        condition: the shift, a key of `NEW`.
        validation: where its tuning runs are kept.
    """

    name: str
    condition: str = "strong"
    validation = "validation"

    @property
    def first(self) -> bool:
        return self.name.startswith("D0")


def arms(profile: str) -> list[Arm]:
    found = [Arm("D0"), Arm("D0 infinite")]
    if profile == "quick":
        found += map(Arm, ("re-warm 25 %", "constant low", "moments kept 25 %", "infinite 25 %", "union"))
        return [*found, Arm("constant low", "none")]
    return found + [Arm(name, shift) for shown in (JUDGED, SHOWN) for shift in NEW for name in shown[shift]]


def seeds(arm: Arm, profile: str) -> Sequence[int]:
    return SEEDS if profile == "study" and (arm.first or arm.name in JUDGED[arm.condition]) else SEEDS[:1]


def tuned_as(arm: Arm) -> Arm:
    """The rate of the cosine that is re-warmed serves all that starts at D0; two others have their own."""
    if "infinite" in arm.name:
        return Arm("infinite 25 %")
    return Arm("moments kept 25 %" if arm.first or WAYS[arm.name].start != "nothing" else "union")


# -- the rules, written before the run --


@dataclass(frozen=True)
class Average(Gap):
    """Of the plain mean of old and new text."""

    def numbers(self, results: Results, arm: AnyArm) -> np.ndarray:
        """Of an arm, one for each seed."""
        return (over_seeds(results, arm, "old", self.seeds) + over_seeds(results, arm, "new", self.seeds)) / 2


@dataclass(frozen=True)
class Rise(Gap):
    """Of the mean over the looks in the first half of the phase, minus the look at its start."""

    def numbers(self, results: Results, arm: AnyArm) -> np.ndarray:
        """Of an arm, one for each seed."""
        found = []
        for seed in self.seeds:
            curve = results.values(arm.name, f"{arm.condition} curve", seed, metric=self.metric)
            steps = sorted(map(int, curve))
            early = [curve[str(step)] for step in steps if 0 < step <= steps[-1] // 2]
            found.append(float(np.mean(early)) - curve["0"])
        return np.array(found)


def _average(a: str, b: str, shift: str = "strong") -> Average:
    return Average(Arm(a, shift), Arm(b, shift), "average", "ratio", SEEDS)


def _replay(results: Results) -> Outcome:
    old, new = (
        [over_seeds(results, Arm(name), side, SEEDS) for name in ("D0", "re-warm 25 %", "re-warm 0 %")]
        for side in ("old", "new")
    )
    with_replay, without = old[1] - old[0], old[2] - old[0]
    removed = t_interval(1 - with_replay / without)
    price = t_interval((new[1] - new[2]) / (without - with_replay))
    forgets = t_interval(without).low > 0 and removed.low > 0.5
    return Outcome.of(
        removed,
        grade(forgets and price.high < 0.25, forgets),
        scale=SCALE,
        control="re-warming without replay",
        quantity="strong shift: share of the forgetting that 25 % replay removes",
    )


def _warmup(results: Results) -> Outcome:
    gaps = [_average(length, "re-warm 0 %").interval(results) for length in ("warm-up 0 %", "warm-up 10 %")]
    worst = max(gaps, key=_reach)
    return Outcome.of(
        worst,
        grade(_reach(worst) < 0.01, _reach(worst) < 0.03),
        scale=SCALE,
        control="a warm-up of 1 % of the phase",
        quantity="strong shift, worst of 2: average bits per byte, other warm-up / 1 %",
    )


def _reach(gap: Interval) -> float:
    """How far from 1 the interval of a ratio goes, as a logarithm."""
    return float(max(abs(np.log(gap.low)), abs(np.log(gap.high))))


_OVER = "t interval over five seeds"
_AS_GOOD, _NEARLY = Bound(high=1.01), Bound(high=1.03)
CLAIMS = [
    Claim(
        "cpt-replay",
        "On a strong shift, replaying a quarter of every batch removes most forgetting at little cost on the new.",
        "405M, English to German: average loss 2.34 without replay, 1.75 with 25 %",
        _replay,
        f"Strong shift, bits per byte. Forgetting is old text's rise over D0. Holds if without replay it is above 0 "
        f"and the share that 25 % replay removes lies above 0.5 ({_OVER}), and the new text costs less than a quarter "
        "of what is kept on the old; partly if only the cost is higher.",
    ),
    Claim(
        "cpt-replay-weak",
        "On a weak shift, five per cent of replay already improve the average.",
        "405M, Pile to SlimPajama: average loss 2.47 without, 2.37 with 5 %",
        Every(
            (_average("re-warm 5 %", "re-warm 0 %", "weak"),),
            BELOW_ONE,
            control="re-warming without replay",
            quantity="weak shift: average bits per byte, 5 % replay / none",
            scale=SCALE,
        ),
    ),
    Claim(
        "cpt-rewarm-bump",
        "Re-warming raises the old loss for a while even if the new data are like the old.",
        "a figure, three splits of SlimPajama; no numbers in the text",
        Both(
            (
                (Rise(Arm("re-warm 0 %", "none"), metric="old"), ABOVE_ZERO),
                (Rise(Arm("re-warm 0 %", "none"), Arm("constant low", "none"), metric="old"), ABOVE_ZERO),
            ),
            control="the same text at the constant low rate",
            quantity="no shift: rise of old bits per byte, mean over the phase's first half",
            scale=SCALE,
        ),
    ),
    Claim(
        "cpt-union",
        "Re-warming, re-decaying and replaying match training on the union from scratch.",
        "405M, strong shift, 25 % replay: average loss 1.75, union 1.75, at about half the union's compute",
        Every(
            (_average("re-warm 25 %", "union"),),
            _AS_GOOD,
            _NEARLY,
            control="both texts from scratch, updates of both phases, rate tuned for it",
            quantity="strong shift: average bits per byte, continued with 25 % replay / union",
            scale=SCALE,
        ),
        paper_effect=0.03,  # the margin: a gap that cannot be seen is no match and no failure
    ),
    Claim(
        "cpt-infinite",
        "An infinite schedule, annealed at the end, is as good as a cosine that is re-warmed.",
        "405M, SlimPajama: equal losses after 300B tokens; a figure",
        Every(
            (_average("infinite 25 %", "moments kept 25 %"),),
            _AS_GOOD,
            _NEARLY,
            control="cosine, then re-warm and re-decay, in one run too",
            quantity="strong shift, 25 % replay: average bits per byte, infinite / cosine",
            scale=SCALE,
        ),
        paper_effect=0.03,
    ),
    Claim(
        "cpt-warmup",
        "The length of the warm-up does not matter in the end.",
        "0, 0.5, 1 and 2 % of the phase: no lasting difference (a figure)",
        _warmup,
        f"Strong shift, no replay, average bits per byte at the end, none / 1 % and 10 % / 1 %, {_OVER} of the "
        "logarithm: holds if both lie within a factor of exp(0.01), partly exp(0.03).",
        paper_effect=0.03,
    ),
    Claim(
        "cpt-constant",
        "Going on at the small final rate adapts less, and forgets less.",
        "405M, a figure: the constant rate adapts worse",
        Both(
            (
                (Gap(Arm("constant low"), Arm("re-warm 0 %"), "new", seeds=SEEDS), ABOVE_ZERO),
                (Gap(Arm("constant low"), Arm("re-warm 0 %"), "old", seeds=SEEDS), BELOW_ZERO),
            ),
            control="re-warm and re-decay",
            quantity="strong shift: bits per byte of new text, constant low rate - re-warmed",
            scale=SCALE,
        ),
    ),
]


# -- text --


@functools.cache
def training_rows(which: str) -> Tensor:
    """Training windows, int64 [n, LENGTH + 1]: "old", or what a shift brings."""
    if which in ("strong", "weak"):
        return domains.windows(NEW[which], "calibration", LENGTH)[0]
    ids, units = domains.windows("wikipedia", "calibration", LENGTH)
    later = set(list(dict.fromkeys(units))[3::4])  # every fourth article is held back
    return ids[torch.tensor([(unit in later) == (which == "none") for unit in units])]


@functools.cache
def _measured_text(domain: str, split: str, count: int) -> tuple[Tensor, list[str]]:
    return domains.windows(domain, split, LENGTH, count=count)


def bits_of(model: nn.Module, shift: str, split: str, count: int) -> dict[str, float]:
    """Bits per byte of old and, where it is another kind, of new text.

    Args:
        model: a small Llama.
        shift: a key of `NEW`.
        split: "test", or "validation" to choose by.
        count: windows of each.
    """
    sides = {"old": "wikipedia"} if shift == "none" else {"old": "wikipedia", "new": NEW[shift]}
    return {
        side: domains.measured(model, *_measured_text(domain, split, count)).value for side, domain in sides.items()
    }


# -- one training --


def schedule_of(way: Way, size: Size, rate: float) -> Schedule:
    """The rates of a way: of its second phase, or of the whole run where it is one run.

    Args:
        way: what happens.
        size: updates.
        rate: eta_max.

    Example:
        >>> schedule_of(WAYS["re-warm 0 %"], SIZES["study"], 0.01)
        Cosine(steps=400, peak=0.01, low=0.001, warmup=4)
        >>> schedule_of(WAYS["infinite 25 %"], SIZES["study"], 0.01).constant_until
        2200
    """
    T, both, high = size.second, size.first + size.second, rate * way.factor
    if way.rates == "low":
        return Constant(T, LOW * rate)
    if way.rates == "high":
        return Constant(T, high, rewarm_redecay(T, high, high).warmup)
    if way.rates.startswith("infinite"):
        rise, fall, end = -(-size.first // 100), size.first * 6 // 10, size.first // 10
        form = "inverse_sqrt" if way.rates.endswith("root") else "cosine"
        return Infinite(rise, fall, both - rise - fall - end, end, high, CONSTANT * high, LOW * high, form)
    second = rewarm_redecay(T, high, LOW * rate, way.warmup)
    return first_phase(size, rate).then(second) if way.start == "moments" else second


def first_phase(size: Size, rate: float) -> Schedule:
    """The cosine of D0."""
    return rewarm_redecay(size.first, rate, LOW * rate)


def _fit(model: nn.Module, data: Any, schedule: Schedule, job: Job, **options: Any) -> History:
    recipe = Scheduled.of(schedule, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, seed=job.seed)
    if job.split == "test":  # what chooses a rate is measured once
        size = SIZES[job.profile]
        options["evaluate"] = lambda model: bits_of(model, job.arm.condition, "test", size.look)
        options["evaluate_every"] = size.every
    return train(model, data, language_model_loss, recipe, progress=False, **options)


class _Enough(Exception):
    """The first phase of a run in two phases is done."""


def both_phases(job: Job, way: Way, folder: Path, hooks: Sequence[Any] = ()) -> tuple[nn.Module, History]:
    """One run through both phases, or its second if the folder holds the first."""
    assert job.rate is not None
    size = SIZES[job.profile]
    model: nn.Module = domains.llama(context=LENGTH, seed=job.seed)
    data = mixture_loader(
        [training_rows(job.arm.condition), training_rows("old")],
        phases((size.first, [0.0, 1.0]), (size.second, [1 - way.r, way.r])),
        BATCH,
        size.first + size.second,
        seed=job.seed,
    )
    schedule = schedule_of(way, size, job.rate)
    history = _fit(model, data, schedule, job, folder=folder, checkpoint_every=size.first, after_step=hooks)
    return model, history


def start_of(job: Job) -> Job | None:
    """The first phase that a job goes on from; None where it has its own, as what chooses a rate has."""
    if job.arm.first or job.split != "test":
        return None
    way = WAYS[job.arm.name]
    if way.start == "nothing" or way.rates == "infinite root":
        return None
    return replace(job, arm=Arm("D0 infinite" if way.rates == "infinite" else "D0"))


def _checkpoint(first: Job) -> Path:
    return Path(first.folder, f"{first.arm.name} {first.seed} at {first.rate:g}", "checkpoint.safetensors")


def keep(first: Job) -> float:
    """Train a first phase, keep it with the optimiser's state in ``job.folder``, and return the processor's seconds."""
    size = SIZES[first.profile]

    def stop(step: int, model: nn.Module) -> None:
        if step > size.first:  # the checkpoint of the step before was written
            raise _Enough

    way = WAYS["infinite 25 %" if first.arm.name == "D0 infinite" else "moments kept 25 %"]
    folder = _checkpoint(first).parent
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    try:
        both_phases(first, way, folder, [stop])
    except _Enough:
        pass
    return time.process_time() - began


def _kept(first: Job) -> tuple[nn.Module, History]:
    """The model and the history of a first phase."""
    with safe_open(_checkpoint(first), "pt") as file:
        state = {key.removeprefix("model/"): file.get_tensor(key) for key in file.keys() if key.startswith("model/")}
        history = History(**json.loads(file.metadata()["refimpl"])["history"])
    model = domains.llama(context=LENGTH)
    model.load_state_dict(state)
    return model, history


def keep_before(run: Run, jobs: Sequence[Job]) -> None:
    """The first phases that jobs go on from, where an earlier run recorded and then lost them."""
    starts = dict.fromkeys(start for job in jobs if (start := start_of(job)) is not None)
    run.each(keep, [start for start in starts if not _checkpoint(start).exists()], "first phases")


def measure(job: Job) -> Iterator[Row]:
    """Bits per byte of old and new text after a first phase or an arm, with curves and seconds."""
    yield from _first(job) if job.arm.first else _second(job)


def _first(job: Job) -> Iterator[Row]:
    size = SIZES[job.profile]
    seconds = keep(job)
    model, history = _kept(job)
    for shift in ("strong", "weak"):
        for side, value in bits_of(model, shift, job.split, size.measured).items():
            yield Row(side, value, condition=shift)
    yield from curves(history, every=size.every)
    yield Row("cpu seconds", seconds, condition="cost")
    yield Row("tokens", size.first * BATCH * LENGTH, condition="cost")


def _second(job: Job) -> Iterator[Row]:
    assert job.rate is not None
    way, size, shift, start = WAYS[job.arm.name], SIZES[job.profile], job.arm.condition, start_of(job)
    new, old = training_rows(shift), training_rows("old")
    began = time.process_time()
    if way.start == "moments":
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "run")
            if start is not None:
                shutil.copytree(_checkpoint(start).parent, folder)
            model, history = both_phases(job, way, folder)
    elif way.start == "nothing":
        model = domains.llama(context=LENGTH, seed=job.seed)
        steps = size.second + (size.first if job.arm.name == "union" else 0)
        data = replay_loader(new, [old], 1 - size.second / steps, BATCH, steps, seed=job.seed)
        history = _fit(model, data, rewarm_redecay(steps, job.rate, LOW * job.rate), job)
    else:
        assert start is not None
        model, _ = _kept(start)
        data = replay_loader(new, [old], way.r, BATCH, size.second, seed=100 + job.seed)
        history = _fit(model, data, schedule_of(way, size, job.rate), job)
    seconds = time.process_time() - began
    found = bits_of(model, shift, job.split, size.measured)
    if job.split != "test":
        yield Row("bits per byte", (found["old"] + found["new"]) / 2)
        return
    yield from (Row(side, value) for side, value in found.items())
    yield from curves(history, every=size.every)
    yield Row("cpu seconds", seconds, suffix=" cost")


def stages(run: Run) -> Stages:
    """Rates, then what starts from scratch, then what goes on from a first phase."""
    every = arms(run.profile)
    rates = yield from run.tuning(every)
    if run.profile == "quick":
        rates = dict.fromkeys(every, RATES[-1])  # a dozen updates at a lower one change nothing that could be seen
    jobs = [run.job(arm, seed, rates[arm]) for arm in every for seed in seeds(arm, run.profile)]
    later = [job for job in jobs if start_of(job) is not None]
    yield [job for job in jobs if job not in later]
    yield later


STUDY = Study(
    slug="continual_pretraining",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=seeds,
    data=lambda: {domain: domains.domain_hash(domain) for domain in dict.fromkeys(NEW.values())},
    rates=RATES,
    tuned_as=tuned_as,
    score=lambda values: -values["bits per byte"],
    stages=stages,
    before=keep_before,
)
