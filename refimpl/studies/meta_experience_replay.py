"""The experiment behind the chapter on replay and Reptile: one small Llama, four kinds of text one after the other.

Wikipedia, then Python, documentation, C++; one optimiser and one cosine over the whole chain, nothing is reset. The
first stage has nothing to forget: it is trained once for each seed, without replay and merges, and every arm of the
chain goes on from its checkpoint, moments included. Batches and steps are the same for all arms, so replayed rows take
the place of new ones. Every arm has the same grid of four rates for the later stages (joint training: for all of it),
chosen by the mean loss at the end on validation text with a seed that is not used again. The controls share the rate of
the arm they control, and shorten every update to such a share that the weights end as far from the first stage's as in
that arm.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from refimpl.continual.meta_experience_replay import (
    ReplayBuffer,
    ReplayLoader,
    Reptile,
    Stage,
    chain_scores,
    gradient_alignment,
)
from refimpl.core.train.loop import Recipe, train
from refimpl.lab.data.domains import DOMAINS, domain_hash, llama, measured, windows
from refimpl.lab.measure.bits import language_model_loss
from refimpl.lab.measure.statistics import t_interval
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.records import Record, Results

DEPENDS = [
    "refimpl.continual.meta_experience_replay.buffer",
    "refimpl.continual.meta_experience_replay.stream",
    "refimpl.continual.meta_experience_replay.reptile",
    "refimpl.continual.meta_experience_replay.measures",
    "refimpl.core.train.loop",
    "refimpl.core.train.outer",
    "refimpl.core.train.sampling",
    "refimpl.lab.data.domains",
    "refimpl.lab.models.lstm",
    "refimpl.lab.data.text",
]

SLUG = "meta_experience_replay"
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 0
LR = 2e-3  # for the first stage the best of 2e-3, 5e-3 and 1.25e-2 in a pilot, on validation text
# Of the rate in the later stages. A first tuning had a third, 1 and 3, on validation text: a third was the worst for
# every arm, and 3 the best for every chain, so merges could not make up for what they take away. A second had 1, 3 and
# 10, and 10 was the best for arms with replay or merges: hence 30.
FACTORS = (1.0, 3.0, 10.0, 30.0)
LENGTH = 64
BATCH = 8
EVERY = 5  # updates between two merges: twenty merges in a stage, the paper has twenty-four
EPSILON = 0.3
SWEPT = (0.1, 0.5)
CHAIN = "chain"
SMALL: dict[str, int] = {}
LARGER = {"layers": 3, "hidden": 200}  # 4/3 of the arithmetic for each token
LARGEST = {"width": 96, "hidden": 288}  # twice
SCALE = "a Llama of 0.17M weights, four stages of 50 to 100 thousand tokens; the paper: 99M to 6B, 100 billion"


@dataclass(frozen=True)
class Size:
    """What a profile spends: steps of the first stage and of each later one, windows of each domain measured, pairs
    of batches whose gradients are compared.
    """

    first: int
    later: int
    windows: int
    pairs: int


SIZES = {"study": Size(200, 100, 40, 3), "live": Size(200, 100, 32, 2), "quick": Size(5, 5, 4, 1)}


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        name: in the records.
        replay: share of replayed rows from the second stage on.
        epsilon, every: of the merges from the second stage on.
        joint: the rows of all stages, shuffled, instead of the chain.
        model: sizes of the network.
        batch: rows.
        matched: the arm whose rate this one shares and whose way through the weights it must be as long as.
        tuned_as: the arm whose rate this one shares; its own by default.
    """

    name: str
    replay: float = 0.0
    epsilon: float = 1.0
    every: int = 1
    joint: bool = False
    model: tuple[tuple[str, int], ...] = ()
    batch: int = BATCH
    matched: str | None = None
    tuned_as: str | None = None


SEQUENTIAL = Arm("sequential")
QUARTER = Arm("replay 25%", replay=0.25)
HALF = Arm("replay 50%", replay=0.5)
REPTILE = Arm("Reptile", epsilon=EPSILON, every=EVERY)
MER = Arm("MER", replay=0.25, epsilon=EPSILON, every=EVERY)
SLOWER = Arm("slower", matched="Reptile")
QUARTER_SLOWER = Arm("replay 25% slower", replay=0.25, matched="MER")
JOINT = Arm("joint", joint=True)
BIGGER = Arm("larger", model=tuple(LARGER.items()), batch=BATCH * 3 // 4)
BIGGEST = Arm("twice as large", model=tuple(LARGEST.items()), batch=BATCH // 2, tuned_as="larger")
ARMS = (SEQUENTIAL, QUARTER, HALF, REPTILE, MER, SLOWER, QUARTER_SLOWER, JOINT, BIGGER)
"""Arms of the verdicts: five seeds."""


def swept() -> list[Arm]:
    """Other epsilons, and the control of each, at one seed.

    Example:
        >>> [arm.name for arm in swept()][:3]
        ['Reptile 0.1', 'slower 0.1', 'MER 0.1']
    """
    arms = []
    for epsilon in SWEPT:
        for arm, control in ((REPTILE, SLOWER), (MER, QUARTER_SLOWER)):
            name = f"{arm.name} {epsilon:g}"
            arms.append(replace(arm, name=name, epsilon=epsilon, tuned_as=arm.name))
            if arm is REPTILE:
                name = f"{control.name} {epsilon:g}"
                arms.append(replace(control, name=name, epsilon=epsilon, matched=None, tuned_as=arm.name))
    return arms


# -- the rules, written before the run --


def _over_seeds(results: Results, arm: str, metric: str) -> np.ndarray:
    return np.array([results.values(arm, CHAIN, seed, metric=metric)[""] for seed in SEEDS])


def _gap(results: Results, arm: str, other: str, metric: str) -> Any:
    return t_interval(_over_seeds(results, arm, metric) - _over_seeds(results, other, metric))


def _verdict(good: Sequence[bool]) -> Verdict:
    return Verdict.HOLDS if all(good) else Verdict.PARTLY if any(good) else Verdict.DOES_NOT_HOLD


def _lower(
    metric: str, pairs: Sequence[tuple[Arm, Arm]], control: str, quantity: str, raised: bool = False
) -> Callable[[Results], Outcome]:
    """A metric of the first of each pair minus the second; good where it lies below 0 (above 0 if `raised`).

    Nothing can be said of a pair of which the second was to move as far as the first, and did not.
    """

    def outcome(results: Results) -> Outcome:
        gaps = [_gap(results, a.name, b.name, metric) for a, b in pairs]
        good = [gap.low > 0 if raised else gap.high < 0 for gap in gaps]
        worst = min(gaps, key=lambda gap: gap.low) if raised else max(gaps, key=lambda gap: gap.high)
        verdict = _verdict(good)
        if not all(_as_far(results, a, b) for a, b in pairs if b.matched == a.name):
            verdict = Verdict.CANNOT_BE_TESTED
        label = f"worst of {len(gaps)}: {quantity}" if len(gaps) > 1 else quantity
        return Outcome.of(worst, verdict, scale=SCALE, control=control, quantity=label)

    return outcome


def _as_far(results: Results, arm: Arm, control: Arm) -> bool:
    ratio = _over_seeds(results, control.name, "displacement") / _over_seeds(results, arm.name, "displacement")
    return bool(0.9 < ratio.mean() < 1.1)


def _better_at_equal_learning(results: Results) -> Outcome:
    gap = _gap(results, MER.name, QUARTER.name, "retained")
    learned = _gap(results, MER.name, QUARTER.name, "learned")
    verdict = Verdict.DOES_NOT_HOLD
    if gap.high < 0:
        verdict = Verdict.HOLDS if learned.high < MARGIN else Verdict.PARTLY
    return Outcome.of(
        gap,
        verdict,
        scale=SCALE,
        control="replay alone, 25 %, at its own best rate",
        quantity="retained loss, bits per byte, MER minus replay",
    )


def _like_joint(results: Results) -> Outcome:
    gap = _gap(results, MER.name, JOINT.name, "retained")
    verdict = Verdict.HOLDS if gap.high < MARGIN else Verdict.PARTLY if gap.low < MARGIN else Verdict.DOES_NOT_HOLD
    return Outcome.of(
        gap,
        verdict,
        scale=SCALE,
        control="the rows of all stages shuffled, as many steps",
        quantity="retained loss, bits per byte, MER minus joint training",
    )


MARGIN = 0.02  # bits per byte: less counts as equal
_OVER = "t interval over five seeds"
CLAIMS = [
    Claim(
        "mer-replay",
        "Replay cuts forgetting.",
        "560M, three languages: validation loss at the end about 3.3 without replay, 3.0 with 50 %",
        _lower(
            "forgetting",
            [(QUARTER, SEQUENTIAL), (HALF, SEQUENTIAL)],
            "no replay, as many steps and rows",
            "forgetting, bits per byte, replay minus sequential",
        ),
        f"Forgetting in bits per byte on test text after four stages, with replay minus sequential, {_OVER}: holds if "
        "it lies below 0 for 25 and for 50 %, partly if for one.",
    ),
    Claim(
        "mer-reptile",
        "Reptile forgets less, and not because its steps are smaller.",
        "Reptile lowers forgetting at every size; no control that moves as little",
        _lower(
            "forgetting",
            [(REPTILE, SLOWER), (MER, QUARTER_SLOWER)],
            "as short a way, no merges",
            "forgetting, bits per byte, Reptile minus its control",
        ),
        "Forgetting, with merges (epsilon 0.3, k = 5) minus the same training with every update shortened until the "
        f"weights end as far from the first stage's, {_OVER}: holds if it lies below 0 without replay and with 25 %, "
        "partly if for one; cannot be tested if the mean distance is off by a tenth.",
    ),
    Claim(
        "mer-whole",
        "Replay with Reptile retains more than replay alone.",
        "560M, 25 %: downstream average 67.5 against 66.4",
        _better_at_equal_learning,
        f"Mean loss of the four domains at the end, MER minus replay (25 %, each at its best rate), {_OVER}: holds if "
        f"it lies below 0 while the loss right after each domain's own stage is higher by less than {MARGIN} bits per "
        "byte (upper end); partly if only the first.",
    ),
    Claim(
        "mer-alignment",
        "Reptile makes gradients of old and new rows point more the same way.",
        "the motivation of the method; not measured",
        _lower(
            "alignment",
            [(REPTILE, SLOWER), (MER, QUARTER_SLOWER)],
            "as short a way, no merges",
            "mean cosine, Reptile minus its control",
            raised=True,
        ),
        "Mean cosine between gradients of old and new batches at two points of each later stage, with merges minus "
        f"the control that moves as far, {_OVER}: holds if it lies above 0 without replay and with 25 %, partly if for "
        "one; cannot be tested if the mean distance is off by a tenth.",
    ),
    Claim(
        "mer-size",
        "Compute spent on replay is worth more than compute spent on a larger model.",
        "560M with 50 % replay is close to 1B without; from 0 to 25 % replay is worth more than a bigger model",
        _lower(
            "retained",
            [(QUARTER, BIGGER)],
            "a larger model of equal compute",
            "retained loss, bits per byte, replay minus larger model",
        ),
        "Mean loss at the end, 25 % replay minus a model of 4/3 the arithmetic for each row, on as many new rows of "
        f"the later stages and none replayed, {_OVER}: holds if it lies below 0.",
    ),
    Claim(
        "mer-joint",
        "Replay with Reptile comes up to joint training.",
        "560M: downstream average 67.5 against 67.33",
        _like_joint,
        f"Mean loss at the end, MER minus training on the rows of all stages shuffled, {_OVER}: holds if the upper end "
        f"lies below {MARGIN}, partly if only the lower end does.",
    ),
]


# -- trainings --


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        arm, seed, size: what is trained.
        factor: of the learning rate after the first stage (of the whole rate for joint training).
        share: epsilon of a control, which has been matched; None takes the arm's own.
        split: "test", or "validation" to choose by.
        starts: folder of the first stages that were trained already; "" trains everything.
    """

    arm: Arm
    seed: int
    factor: float
    size: Size
    share: float | None = None
    split: str = "test"
    starts: str = ""


def recipe_for(size: Size, seed: int, factor: float, after: int) -> Recipe:
    """One cosine over the whole chain; behind its first steps (`after`) the rate is `factor` times as large.

    The factor is none of the recipe's fields, which a checkpoint remembers: whatever it is, the runs have their first
    steps in common and go on from one checkpoint.

    Example:
        >>> recipe = recipe_for(SIZES["study"], seed=1, factor=3.0, after=200)
        >>> recipe.steps, round(recipe.scale(200) / recipe.scale(199), 1)
        (500, 3.0)
    """

    class Later(Recipe):
        def scale(self, step: int) -> float:
            return super().scale(step) * (factor if step >= after else 1.0)

    steps = size.first + 3 * size.later
    return Later(
        steps, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, warmup=max(1, steps // 50), final_lr=0.1, clip=1.0, seed=seed
    )


def stages_of(size: Size) -> list[Stage]:
    """Every window of each domain's training text.

    Example:
        >>> [stage.steps for stage in stages_of(SIZES["study"])]
        [200, 100, 100, 100]
    """
    lengths = (size.first, *[size.later] * (len(DOMAINS) - 1))
    return [Stage(_windows(name, "calibration")[0], steps) for name, steps in zip(DOMAINS, lengths, strict=True)]


@functools.cache
def _windows(domain: str, split: str, count: int | None = None) -> tuple[Tensor, list[str]]:
    return windows(domain, split, LENGTH, count=count)


def loader_for(arm: Arm, size: Size, seed: int) -> ReplayLoader:
    """The batches of an arm, with a buffer in memory that holds the whole stream.

    Joint training sees the rows that the chain without replay sees.

    Example:
        >>> len(loader_for(SEQUENTIAL, SIZES["study"], seed=1))
        500
    """
    stages = stages_of(size)
    total = sum(stage.steps for stage in stages)
    buffer = ReplayBuffer(total * arm.batch, (LENGTH + 1,), dtype="uint16", seed=seed)
    if arm.joint:
        chain = ReplayLoader(stages, arm.batch, 0.0, buffer, seed=seed)
        stages = [Stage(torch.cat([rows for rows, _ in chain]), total)]
        buffer = ReplayBuffer(total * arm.batch, (LENGTH + 1,), dtype="uint16", seed=seed)
    return ReplayLoader(stages, arm.batch, arm.replay, buffer, begin=size.first, seed=seed)


class _Stop(Exception):
    """The first stage is over."""


def started(job: Job) -> None:
    """Train the first stage of a seed, and leave its checkpoint in ``job.starts``."""
    model = llama(context=LENGTH, seed=job.seed)
    folder = _start(job)

    def stop(step: int, model: nn.Module) -> None:
        if step == job.size.first:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_weights(model), folder / "weights.safetensors")
        if step > job.size.first:
            raise _Stop

    try:
        _train(job, model, folder, stop, checkpoint_every=job.size.first)
    except _Stop:
        return
    raise AssertionError("the first stage is the whole chain")


def _start(job: Job) -> Path:
    return Path(job.starts) / f"{job.split}-{job.seed}"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _train(job: Job, model: Any, folder: Path | None, *hooks: Any, checkpoint_every: int) -> Any:
    arm, size = job.arm, job.size
    epsilon = arm.epsilon if job.share is None else job.share
    merges = Reptile(epsilon, arm.every, start=size.first).attach(model)
    watch = _Watch(job)
    history = train(
        model,
        loader_for(arm, size, job.seed),
        language_model_loss,
        recipe_for(size, job.seed, job.factor, after=0 if arm.joint else size.first),
        after_step=[merges, watch, *hooks],
        evaluate=watch.evaluate,
        evaluate_every=size.later if job.split == "validation" or size.later < 10 else size.later // 2,
        folder=folder,
        checkpoint_every=checkpoint_every,
        progress=False,
    )
    merges.close()
    return history


class _Watch:
    """Loss on every domain, and the cosine between old and new gradients, at a training's evaluations."""

    def __init__(self, job: Job) -> None:
        self.job, self.step = job, 0

    def __call__(self, step: int, model: nn.Module) -> None:
        self.step = step

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        job = self.job
        values = {}
        for domain in DOMAINS:
            values[domain] = measured(model, *_windows(domain, job.split, job.size.windows)).value
        stage = math.ceil((self.step - job.size.first) / job.size.later)
        if stage > 0 and job.split == "test" and not job.arm.joint:
            old, new = compared_batches(stage, job.size.pairs)
            values["alignment"] = float(gradient_alignment(model, language_model_loss, old, new).mean())
        return values


@functools.cache
def compared_batches(stage: int, pairs: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of 8 rows of the training text of all earlier domains, and of the domain of a stage.

    Example:
        >>> old, new = compared_batches(2, pairs=1)
        >>> len(old), len(new), new[0].shape
        (1, 1, torch.Size([8, 65]))
    """

    def draw(domains: Sequence[str], seed: int) -> list[Tensor]:
        source = torch.Generator().manual_seed(seed)
        found = []
        for number in range(8 * pairs):
            rows, _ = _windows(domains[number % len(domains)], "calibration")
            found.append(rows[torch.randint(len(rows), (1,), generator=source)])
        return list(torch.cat(found).split(8))

    return draw(DOMAINS[:stage], stage), draw([DOMAINS[stage]], 100 + stage)


def trained(job: Job) -> list[Record]:
    """Train and measure one arm."""
    arm, size = job.arm, job.size
    results = Results("", {"paper": SLUG})
    model = llama(context=LENGTH, seed=job.seed, **dict(arm.model))
    shared = bool(job.starts) and not arm.joint and not arm.model
    start = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        if shared:
            shutil.copytree(_start(job), folder)
        steps = size.first + 3 * size.later
        history = _train(job, model, folder if shared else None, checkpoint_every=steps)
    values = {"cpu seconds": time.process_time() - start, "flops": _flops(model, arm.batch) * steps}
    if shared:
        before = load_file(_start(job) / "weights.safetensors")
        moved = sum(float((p.double() - before[n].double()).square().sum()) for n, p in _weights(model).items())
        values["displacement"] = math.sqrt(moved)
    values |= _scores(size, history)
    counts = [loader_for(arm, size, job.seed).counts(step) for step in range(steps)]
    values |= {"factor": job.factor, "epsilon": arm.epsilon if job.share is None else job.share}
    values |= {"new rows": sum(new for new, _ in counts), "replayed rows": sum(old for _, old in counts)}
    results.add(*(Record(SLUG, arm.name, CHAIN, job.seed, "", name, float(v)) for name, v in values.items()))
    for entry in history.evaluations:
        where = entry["step"] - size.first
        if where in (-size.first, *(k * size.later for k in range(len(DOMAINS)))):
            condition = "before" if where < 0 else f"after {DOMAINS[round(where / size.later)]}"
            results.add(*(Record(SLUG, arm.name, condition, job.seed, d, "bits per byte", entry[d]) for d in DOMAINS))
    if job.seed == SEEDS[0]:
        results.add_history(arm.name, "training", job.seed, history, every=max(1, steps // 50))
    return list(results.records())


def _scores(size: Size, history: Any) -> dict[str, float]:
    at = {entry["step"]: torch.tensor([entry[d] for d in DOMAINS]) for entry in history.evaluations}
    ends = [size.first + k * size.later for k in range(len(DOMAINS))]
    scores = chain_scores(torch.stack([at[step] for step in ends]), at[0])
    values = {name.replace("_", " "): value for name, value in vars(scores).items()}
    cosines = [entry["alignment"] for entry in history.evaluations if "alignment" in entry]
    return values | ({"alignment": float(np.mean(cosines))} if cosines else {})


def _flops(model: Any, batch: int) -> int:
    """Of one step: matrix products, forward and backward."""
    rows = torch.zeros(batch, LENGTH + 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        language_model_loss(model, rows).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


# -- the run --


class _Study:
    """One call of `run`: jobs, and what has been recorded."""

    def __init__(self, results: Results, profile: str, starts: str) -> None:
        self.results, self.profile, self.size, self.starts = results, profile, SIZES[profile], starts
        self.workers = 1 if profile == "quick" else None

    def train(self, jobs: Sequence[Job], what: str) -> None:
        """Train what has not been recorded, first stages first."""
        todo = [job for job in jobs if not self.results.has(job.arm.name, CHAIN, job.seed)]
        firsts = {
            _start(job): replace(job, arm=SEQUENTIAL, share=None)
            for job in todo
            if not (job.arm.joint or job.arm.model)
        }
        missing = [job for folder, job in firsts.items() if not folder.exists()]
        bar = tqdm(total=len(todo) + len(missing), desc=f"{SLUG}: {what}", unit="training")
        with bar:
            for _ in in_processes(started, missing, self.workers):
                bar.update()
            for _, records in in_processes(trained, todo, self.workers):
                self.results.add(*records)
                self.results.save()
                bar.update()

    def value(self, arm: str, seed: int, metric: str) -> float:
        return self.results.values(arm, CHAIN, seed, metric=metric)[""]

    def job(self, arm: Arm, factor: float, **more: Any) -> Job:
        return Job(arm, factor=factor, size=self.size, starts=self.starts, **more)

    def tuned(self, arms: Sequence[Arm]) -> dict[str, float]:
        """The factor of every arm, by the mean loss at the end on validation text."""
        own = [arm for arm in arms if not (arm.matched or arm.tuned_as)]
        tries = {(arm.name, f): replace(arm, name=_try(arm.name, f)) for arm in own for f in FACTORS}
        self.train(
            [self.job(arm, f, seed=TUNING_SEED, split="validation") for (_, f), arm in tries.items()], "learning rates"
        )
        factors = {}
        for arm in own:
            loss = {f: self.value(_try(arm.name, f), TUNING_SEED, "retained") for f in FACTORS}
            factors[arm.name] = min(loss, key=loss.__getitem__)
        return factors

    def matched(self, control: Arm, factor: float) -> float:
        """The share of every update with which the control moves as far as its arm, with the seed of the tuning.

        The distance grows with a power of the share: two tries tell which.
        """
        assert control.matched is not None
        wanted = self.value(_try(control.matched, factor), TUNING_SEED, "displacement")
        logs: list[tuple[float, float]] = []
        share = EPSILON
        for number in (1, 2):
            arm = replace(control, name=f"{control.name}, try {number}")
            self.train([self.job(arm, factor, seed=TUNING_SEED, split="validation", share=share)], "as far")
            logs.append((math.log(share), math.log(self.value(arm.name, TUNING_SEED, "displacement") / wanted)))
            slope = 1.0
            if number == 2 and abs(logs[1][0] - logs[0][0]) > 1e-3:
                slope = (logs[1][1] - logs[0][1]) / (logs[1][0] - logs[0][0])
            share = min(1.0, share * math.exp(-logs[-1][1] / max(slope, 0.25)))
        return share


def _try(arm: str, factor: float) -> str:
    return f"{arm} at {factor:.2g}"


def run(out: Path, profile: str = "study") -> Results:
    """Train every arm that the results file lacks, and judge the claims.

    Args:
        out: results file; an interrupted run goes on where it stopped, training by training.
        profile: "study" (recorded; the rules must be committed), "live" or "quick".
    """
    data = {domain: domain_hash(domain) for domain in DOMAINS}
    results = Results.start(
        out, paper=SLUG, study=__name__, depends=DEPENDS, data=data, profile=profile, provisional=profile != "study"
    )
    with tempfile.TemporaryDirectory() as starts:
        study = _Study(results, profile, starts)
        if profile == "study":
            _study(study)
            results.claims = judge(results, CLAIMS)
        else:
            arms = ARMS if profile == "quick" else (SEQUENTIAL, QUARTER, MER, QUARTER_SLOWER)
            study.train(
                [study.job(arm, 1.0, seed=SEEDS[0], share=EPSILON if arm.matched else None) for arm in arms], profile
            )
    results.save()
    return results


def _study(study: _Study) -> None:
    factors = study.tuned(ARMS)
    shares: dict[str, float] = {}
    for control in (SLOWER, QUARTER_SLOWER):
        assert control.matched is not None
        factors[control.name] = factors[control.matched]
        shares[control.name] = study.matched(control, factors[control.name])
    study.train(
        [study.job(arm, factors[arm.name], seed=seed, share=shares.get(arm.name)) for seed in SEEDS for arm in ARMS],
        "five seeds",
    )
    single = [study.job(arm, factors[arm.tuned_as or arm.name], seed=SEEDS[0]) for arm in (BIGGEST, *swept())]
    study.train(single, "sweeps")
