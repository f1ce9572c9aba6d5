"""The experiment behind the chapter on continual pre-training: what a model forgets and learns when new text arrives.

Five Llamas of 0.17M parameters are trained from scratch on three quarters of the Wikipedia articles for training (D0).
Then text of another kind arrives (D1): Python sources (a strong shift), documentation (a weak one), or the other
articles (none), for a third of the updates that D0 had. Every arm of this second phase has the same updates and the
same batch; replay takes its rows from the new text. Trainings from scratch on both (union) have the updates of both
phases. Rates of what is trained from scratch come from one grid of three, chosen on validation text with a seed that is
not used again; re-warming goes back to the rate of D0, as the paper has it, and is swept beside that. Loss is in
bits per byte of test text; the average is the plain mean of old and new.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from refimpl.continual.continual_pretraining import phases, replay_loader, rewarm_redecay
from refimpl.core.train.loop import History, train
from refimpl.core.train.sampling import mixture_loader
from refimpl.core.train.schedules import Constant, Infinite, Schedule, Scheduled
from refimpl.lab import wheels
from refimpl.lab.data import domains
from refimpl.lab.measure.bits import language_model_loss
from refimpl.lab.measure.statistics import Interval, seeds_ratio, t_interval
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.records import Record, Results
from refimpl.lab.study.sources import module_hash

DEPENDS = [
    "refimpl.continual.continual_pretraining",
    "refimpl.core.train.loop",
    "refimpl.core.train.sampling",
    "refimpl.core.train.schedules",
    "refimpl.lab.data.domains",
    "refimpl.lab.models.lstm",
    "refimpl.lab.data.text",
]

SLUG = "continual_pretraining"
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 0
RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2)
BATCH, LENGTH = 8, 64  # rows a batch, predicted tokens a row
LOW = 0.1  # eta_min as a fraction of eta_max
CONSTANT = 0.55  # eta_const, likewise
NEW = {"strong": "python", "weak": "prose", "none": "wikipedia"}
"""Shifts and the kind of text that arrives."""
SCALE = "a Llama of 0.17M weights, phases of 1.0M and 0.2M tokens; the paper: 405M and 10B weights, phases of 300B"


@dataclass(frozen=True)
class Arm:
    """What happens when new text arrives.

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


ARMS = {
    "re-warm 0 %": Arm(),
    "re-warm 1 %": Arm(0.01),
    "re-warm 5 %": Arm(0.05),
    "re-warm 25 %": Arm(0.25),
    "re-warm 50 %": Arm(0.5),
    "old only": Arm(1.0),
    "constant low": Arm(rates="low"),
    "constant high": Arm(rates="high"),
    "half the rate": Arm(factor=0.5),
    "twice the rate": Arm(factor=2.0),
    "warm-up 0 %": Arm(warmup=0.0),
    "warm-up 10 %": Arm(warmup=0.1),
    "moments kept 25 %": Arm(0.25, start="moments"),
    "infinite 25 %": Arm(0.25, "infinite", start="moments"),
    "infinite 0 %": Arm(0.0, "infinite", start="moments"),
    "infinite root 25 %": Arm(0.25, "infinite root", start="moments"),
    "union": Arm(start="nothing"),
    "new only": Arm(start="nothing"),
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
TUNED = ("moments kept 25 %", "infinite 25 %", "union")
"""What has a rate of its own: the cosine that is re-warmed (its rate serves all that starts at D0), and two others."""
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
    """What a profile spends: updates on D0 and on D1, updates between two looks, windows of a look and of the end,
    seeds.
    """

    first: int
    second: int
    every: int
    look: int
    measured: int
    seeds: tuple[int, ...]


SIZES = {
    "study": Size(2000, 400, 50, 48, 128, SEEDS),
    "live": Size(300, 120, 30, 24, 48, SEEDS[:1]),
    "quick": Size(12, 6, 3, 4, 4, SEEDS[:1]),
}


# -- the rules, written before the run --


def _bits(results: Results, arm: str, shift: str, side: str) -> np.ndarray:
    """Bits per byte of each seed, on "old" or "new" text, or their "average"."""
    if side == "average":
        return (_bits(results, arm, shift, "old") + _bits(results, arm, shift, "new")) / 2
    return np.array([results.values(arm, shift, seed, metric=side)[""] for seed in SEEDS])


def _within(gap: Interval, close: float, near: float) -> Verdict:
    """Holds if a ratio is at most 1 + close, partly if at most 1 + near."""
    return Verdict.HOLDS if gap.high < 1 + close else Verdict.PARTLY if gap.high < 1 + near else Verdict.DOES_NOT_HOLD


def _verdict(good: Sequence[bool]) -> Verdict:
    return Verdict.HOLDS if all(good) else Verdict.PARTLY if any(good) else Verdict.DOES_NOT_HOLD


def _replay(results: Results) -> Outcome:
    start = _bits(results, "D0", "strong", "old")
    with_replay, without = (_bits(results, f"re-warm {r} %", "strong", "old") - start for r in (25, 0))
    removed = t_interval(1 - with_replay / without)
    cost = _bits(results, "re-warm 25 %", "strong", "new") - _bits(results, "re-warm 0 %", "strong", "new")
    price = t_interval(cost / (without - with_replay))
    if t_interval(without).low <= 0 or removed.low <= 0.5:
        verdict = Verdict.DOES_NOT_HOLD
    else:
        verdict = Verdict.HOLDS if price.high < 0.25 else Verdict.PARTLY
    return Outcome.of(
        removed,
        verdict,
        scale=SCALE,
        control="re-warming without replay",
        quantity="strong shift: share of the forgetting that 25 % replay removes",
    )


def _weak(results: Results) -> Outcome:
    gap = seeds_ratio(*(_bits(results, f"re-warm {r} %", "weak", "average") for r in (5, 0)))
    verdict = Verdict.HOLDS if gap.high < 1 else Verdict.DOES_NOT_HOLD
    return Outcome.of(
        gap,
        verdict,
        scale=SCALE,
        control="re-warming without replay",
        quantity="weak shift: average bits per byte, 5 % replay / none",
    )


def _bump(results: Results) -> Outcome:
    rises: dict[str, list[float]] = {}
    for arm in ("re-warm 0 %", "constant low"):
        rises[arm] = []
        for seed in SEEDS:
            curve = results.values(arm, "none curve", seed, metric="old")
            steps = sorted(map(int, curve))
            early = [curve[str(step)] for step in steps if 0 < step <= steps[-1] // 2]
            rises[arm].append(float(np.mean(early)) - curve["0"])
    rise = t_interval(rises["re-warm 0 %"])
    gap = t_interval(np.array(rises["re-warm 0 %"]) - np.array(rises["constant low"]))
    return Outcome.of(
        rise,
        _verdict([rise.low > 0, gap.low > 0]),
        scale=SCALE,
        control="the same text at the constant low rate",
        quantity="no shift: rise of old bits per byte, mean over the phase's first half",
    )


def _union(results: Results) -> Outcome:
    gap = seeds_ratio(*(_bits(results, arm, "strong", "average") for arm in ("re-warm 25 %", "union")))
    return Outcome.of(
        gap,
        _within(gap, 0.01, 0.03),
        scale=SCALE,
        control="both texts from scratch, updates of both phases, rate tuned for it",
        quantity="strong shift: average bits per byte, continued with 25 % replay / union",
    )


def _infinite(results: Results) -> Outcome:
    gap = seeds_ratio(*(_bits(results, arm, "strong", "average") for arm in ("infinite 25 %", "moments kept 25 %")))
    return Outcome.of(
        gap,
        _within(gap, 0.01, 0.03),
        scale=SCALE,
        control="cosine, then re-warm and re-decay, in one run too",
        quantity="strong shift, 25 % replay: average bits per byte, infinite / cosine",
    )


def _warmup(results: Results) -> Outcome:
    gaps = [
        seeds_ratio(*(_bits(results, arm, "strong", "average") for arm in (length, "re-warm 0 %")))
        for length in ("warm-up 0 %", "warm-up 10 %")
    ]
    worst = max(gaps, key=_reach)
    near = _reach(worst)
    verdict = Verdict.HOLDS if near < 0.01 else Verdict.PARTLY if near < 0.03 else Verdict.DOES_NOT_HOLD
    return Outcome.of(
        worst,
        verdict,
        scale=SCALE,
        control="a warm-up of 1 % of the phase",
        quantity="strong shift, worst of 2: average bits per byte, other warm-up / 1 %",
    )


def _reach(gap: Interval) -> float:
    """How far from 1 the interval of a ratio goes, as a logarithm."""
    return float(max(abs(np.log(gap.low)), abs(np.log(gap.high))))


def _constant(results: Results) -> Outcome:
    new, old = (
        t_interval(_bits(results, "constant low", "strong", side) - _bits(results, "re-warm 0 %", "strong", side))
        for side in ("new", "old")
    )
    return Outcome.of(
        new,
        _verdict([new.low > 0, old.high < 0]),
        scale=SCALE,
        control="re-warm and re-decay",
        quantity="strong shift: bits per byte of new text, constant low rate - re-warmed",
    )


_OVER = "t interval over five seeds"
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
        _weak,
        f"Weak shift, average of old and new bits per byte, 5 % / 0 %, {_OVER} of the logarithm: holds if it lies "
        "below 1.",
    ),
    Claim(
        "cpt-rewarm-bump",
        "Re-warming raises the old loss for a while even if the new data are like the old.",
        "a figure, three splits of SlimPajama; no numbers in the text",
        _bump,
        f"Other articles of the same kind; old bits per byte, mean over the looks in the phase's first half minus the "
        f"start, {_OVER}: holds if it lies above 0, and above that of the constant low rate; partly if only one.",
    ),
    Claim(
        "cpt-union",
        "Re-warming, re-decaying and replaying match training on the union from scratch.",
        "405M, strong shift, 25 % replay: average loss 1.75, union 1.75, at about half the union's compute",
        _union,
        f"Strong shift, average bits per byte, 25 % replay / union, {_OVER} of the logarithm: holds if it lies below "
        "1.01, partly below 1.03. The update costs a sixth of the union's tokens.",
        paper_effect=0.03,  # the margin: a gap that cannot be seen is no match and no failure
    ),
    Claim(
        "cpt-infinite",
        "An infinite schedule, annealed at the end, is as good as a cosine that is re-warmed.",
        "405M, SlimPajama: equal losses after 300B tokens; a figure",
        _infinite,
        f"Strong shift, 25 % replay, as many updates, moments kept in both, average bits per byte, infinite / cosine, "
        f"{_OVER} of the logarithm: holds if it lies below 1.01, partly below 1.03.",
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
        _constant,
        f"Strong shift, no replay, constant low rate minus re-warmed, {_OVER}: holds if it lies above 0 on new text "
        "and below 0 on old, partly if only one.",
    ),
]


# -- text --


@functools.cache
def _rows(which: str) -> Tensor:
    """Training windows, int64 [n, LENGTH + 1]: "old", or what a shift brings."""
    if which in ("strong", "weak"):
        return domains.windows(NEW[which], "calibration", LENGTH)[0]
    ids, units = domains.windows("wikipedia", "calibration", LENGTH)
    later = set(list(dict.fromkeys(units))[3::4])  # every fourth article is held back
    return ids[torch.tensor([(unit in later) == (which == "none") for unit in units])]


@functools.cache
def _measured_text(domain: str, split: str, count: int) -> tuple[Tensor, list[str]]:
    return domains.windows(domain, split, LENGTH, count=count)


def measure(model: nn.Module, shift: str, split: str, count: int) -> dict[str, float]:
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


@dataclass(frozen=True)
class Job:
    """One seed of one arm.

    Attributes:
        arm: a key of `ARMS`, or "D0" and "D0 infinite" for the first phase.
        shift: a key of `NEW`.
        seed, size: of the training.
        rate: eta_max.
        folder: where the checkpoints of the first phase are.
        split: "test", or "validation" to choose a rate.
    """

    arm: str
    shift: str
    seed: int
    size: Size
    rate: float
    folder: str = ""
    split: str = "test"


def schedule_of(arm: Arm, size: Size, rate: float) -> Schedule:
    """The rates of an arm: of its second phase, or of the whole run where it is one run.

    Args:
        arm: what happens.
        size: updates.
        rate: eta_max.

    Example:
        >>> schedule_of(ARMS["re-warm 0 %"], SIZES["study"], 0.01)
        Cosine(steps=400, peak=0.01, low=0.001, warmup=4)
        >>> schedule_of(ARMS["infinite 25 %"], SIZES["study"], 0.01).constant_until
        2200
    """
    T, both, high = size.second, size.first + size.second, rate * arm.factor
    if arm.rates == "low":
        return Constant(T, LOW * rate)
    if arm.rates == "high":
        return Constant(T, high, rewarm_redecay(T, high, high).warmup)
    if arm.rates.startswith("infinite"):
        rise, fall, end = -(-size.first // 100), size.first * 6 // 10, size.first // 10
        form = "inverse_sqrt" if arm.rates.endswith("root") else "cosine"
        return Infinite(rise, fall, both - rise - fall - end, end, high, CONSTANT * high, LOW * high, form)
    second = rewarm_redecay(T, high, LOW * rate, arm.warmup)
    return first_phase(size, rate).then(second) if arm.start == "moments" else second


def first_phase(size: Size, rate: float) -> Schedule:
    """The cosine of D0."""
    return rewarm_redecay(size.first, rate, LOW * rate)


def _fit(model: nn.Module, data: Any, schedule: Schedule, job: Job, **options: Any) -> History:
    recipe = Scheduled.of(schedule, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, seed=job.seed)
    if job.split == "test":  # what chooses a rate is measured once
        options["evaluate"] = lambda model: measure(model, job.shift, "test", job.size.look)
        options["evaluate_every"] = job.size.every
    return train(model, data, language_model_loss, recipe, progress=False, **options)


class _Enough(Exception):
    """The first phase of a run in two phases is done."""


def _both_phases(job: Job, arm: Arm, model: nn.Module, folder: Path, hooks: Sequence[Any] = ()) -> History:
    """One run through both phases, or its second if the folder holds the first."""
    size = job.size
    data = mixture_loader(
        [_rows(job.shift), _rows("old")],
        phases((size.first, [0.0, 1.0]), (size.second, [1 - arm.r, arm.r])),
        BATCH,
        size.first + size.second,
        seed=job.seed,
    )
    return _fit(
        model, data, schedule_of(arm, size, job.rate), job, folder=folder, checkpoint_every=size.first, after_step=hooks
    )


def _prefix(job: Job) -> Path:
    return Path(job.folder, f"{job.arm} {job.seed}")


def first(job: Job) -> list[Record]:
    """Train the first phase, "D0" or "D0 infinite", keep it with the optimiser's state, and measure it."""

    def stop(step: int, model: nn.Module) -> None:
        if step > job.size.first:  # the checkpoint of the step before was written
            raise _Enough

    arm = ARMS["infinite 25 %" if job.arm == "D0 infinite" else "moments kept 25 %"]
    model: nn.Module = domains.llama(context=LENGTH, seed=job.seed)
    shutil.rmtree(_prefix(job), ignore_errors=True)
    began = time.process_time()
    try:
        _both_phases(job, arm, model, _prefix(job), [stop])
    except _Enough:
        pass
    seconds = time.process_time() - began
    model, history = _kept(_prefix(job))
    results = Results("", {"paper": SLUG})
    for shift in ("strong", "weak"):
        _note(results, job.arm, shift, job.seed, measure(model, shift, job.split, job.size.measured))
    results.add_history(job.arm, "strong curve", job.seed, history, every=job.size.every)
    _note(results, job.arm, "cost", job.seed, {"cpu seconds": seconds, "tokens": job.size.first * BATCH * LENGTH})
    return list(results.records())


def _kept(folder: Path) -> tuple[nn.Module, History]:
    """The model and the history that a checkpoint holds."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        state = {key.removeprefix("model/"): file.get_tensor(key) for key in file.keys() if key.startswith("model/")}
        history = History(**json.loads(file.metadata()["refimpl"])["history"])
    model = domains.llama(context=LENGTH)
    model.load_state_dict(state)
    return model, history


def second(job: Job) -> list[Record]:
    """Train an arm's second phase (or all of it, from scratch), and measure it."""
    arm, size = ARMS[job.arm], job.size
    new, old = _rows(job.shift), _rows("old")
    began = time.process_time()
    if arm.start == "moments":
        model: nn.Module = domains.llama(context=LENGTH, seed=job.seed)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "run")
            prefix = Path(job.folder, f"{'D0 infinite' if arm.rates == 'infinite' else 'D0'} {job.seed}")
            if job.folder and arm.rates != "infinite root":
                shutil.copytree(prefix, folder)
            history = _both_phases(job, arm, model, folder)
    elif arm.start == "nothing":
        model = domains.llama(context=LENGTH, seed=job.seed)
        steps = size.second + (size.first if job.arm == "union" else 0)
        data = replay_loader(new, [old], 1 - size.second / steps, BATCH, steps, seed=job.seed)
        history = _fit(model, data, rewarm_redecay(steps, job.rate, LOW * job.rate), job)
    else:
        model, _ = _kept(Path(job.folder, f"D0 {job.seed}"))
        data = replay_loader(new, [old], arm.r, BATCH, size.second, seed=100 + job.seed)
        history = _fit(model, data, schedule_of(arm, size, job.rate), job)
    seconds = time.process_time() - began
    results = Results("", {"paper": SLUG})
    _note(results, job.arm, job.shift, job.seed, measure(model, job.shift, job.split, size.measured))
    if job.split == "test":
        results.add_history(job.arm, f"{job.shift} curve", job.seed, history, every=size.every)
        _note(results, job.arm, f"{job.shift} cost", job.seed, {"cpu seconds": seconds})
    return list(results.records())


def _note(results: Results, arm: str, condition: str, seed: int, values: dict[str, float]) -> None:
    results.add(*(Record(SLUG, arm, condition, seed, "", name, value) for name, value in values.items()))


# -- the run --


def _chosen(results: Results, size: Size) -> dict[str, float]:
    """The rate of each way to train: least average of old and new on validation text at the end of both phases."""
    jobs = [Job(arm, "strong", TUNING_SEED, size, rate, "", "validation") for arm in TUNED for rate in RATES]
    todo = [job for job in jobs if not results.has(_tuning(job), "validation", TUNING_SEED)]
    with tqdm(total=len(todo), desc=f"{SLUG}: learning rates", unit="training") as bar:
        for job, records in in_processes(second, todo):
            found = {record.metric: record.value for record in records}
            value = (found["old"] + found["new"]) / 2
            _note(results, _tuning(job), "validation", TUNING_SEED, {"bits per byte": value})
            results.save()
            bar.update()
    best = {}
    for arm in TUNED:
        scores = [
            results.values(_tuning(job), "validation", TUNING_SEED, metric="bits per byte")[""]
            for job in jobs
            if job.arm == arm
        ]
        best[arm] = RATES[int(np.argmin(scores))]
    return best


def _tuning(job: Job) -> str:
    return f"{job.arm} at {job.rate:g}"


def _made(job: Job) -> list[Record]:
    return first(job) if job.arm.startswith("D0") else second(job)


def jobs_of(profile: str, rates: dict[str, float], folder: str) -> tuple[list[Job], list[Job]]:
    """What a profile trains: what needs nothing before it, and the second phases.

    Args:
        profile: "study", "live" or "quick".
        rates: of `TUNED`.
        folder: for the checkpoints of the first phase.

    Example:
        >>> before, after = jobs_of("quick", dict.fromkeys(TUNED, 1e-2), "")
        >>> [job.arm for job in before]
        ['union', 'D0', 'D0 infinite']
    """
    size = SIZES[profile]
    arms = [(arm, shift, seed) for shift in NEW for arm in JUDGED[shift] for seed in size.seeds]
    if profile == "study":
        arms += [(arm, shift, SEEDS[0]) for shift in NEW for arm in SHOWN[shift]]
    if profile == "quick":
        quick = ("union", "re-warm 25 %", "infinite 25 %", "constant low")
        arms = [each for each in arms if each[0] in quick and each[1] != "weak"] + [("moments kept 25 %", "strong", 1)]

    def job(arm: str, shift: str, seed: int) -> Job:
        key = (
            "infinite 25 %"
            if "infinite" in arm
            else "union"
            if ARMS.get(arm, Arm()).start == "nothing"
            else "moments kept 25 %"
        )
        return Job(arm, shift, seed, size, rates[key], folder)

    alone = [each for each in arms if each[0] == "union"]
    before = [job(*each) for each in alone]
    before += [job(arm, "strong", seed) for seed in size.seeds for arm in ("D0", "D0 infinite")]
    return before, [job(*each) for each in arms if each not in alone]


def run(out: Path, profile: str = "study") -> Results:
    """Run every arm that the results file lacks, and judge the claims.

    Args:
        out: results file; an interrupted run goes on where it stopped, training by training.
        profile: "study" (recorded; the rules must be committed), "live" or "quick".
    """
    data = {domain: domains.domain_hash(domain) for domain in dict.fromkeys(NEW.values())}
    results = Results.start(
        out, paper=SLUG, study=__name__, depends=DEPENDS, data=data, profile=profile, provisional=profile != "study"
    )
    rates = _chosen(results, SIZES[profile]) if profile == "study" else dict.fromkeys(TUNED, RATES[-1])
    sources = " ".join(module_hash(name) for name in [__name__, *DEPENDS]) + profile + json.dumps(rates)
    key = hashlib.sha256(sources.encode()).hexdigest()[:12]
    folder = wheels.cache_folder() / "studies" / SLUG / key
    before, after = jobs_of(profile, rates, str(folder))
    workers = 1 if profile == "quick" else None
    with tqdm(total=len(before) + len(after), desc=f"{SLUG} ({profile})", unit="training") as bar:
        for jobs in (before, after):
            todo = [job for job in jobs if not results.has(job.arm, job.shift, job.seed)]
            if jobs is before and any(not results.has(job.arm, job.shift, job.seed) for job in after):
                missing = [job for job in before if job.arm.startswith("D0") and not _prefix(job).exists()]
                todo += [job for job in missing if job not in todo]
            bar.update(len(jobs) - len(todo))
            for job, records in in_processes(_made, todo, workers):
                if not results.has(job.arm, job.shift, job.seed):
                    results.add(*records)
                    results.save()
                bar.update()
    if profile == "study":
        results.claims = judge(results, CLAIMS)
    results.save()
    shutil.rmtree(folder, ignore_errors=True)
    return results
