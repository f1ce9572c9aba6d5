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
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
from refimpl.lab.study.claims import ABOVE_ZERO, BELOW_ZERO, Bound, Claim, Every, Gap, Outcome, Provided, grade
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import TUNING_SEED, Job, Row, Run, Stages, Study, curves, place

SEEDS = (1, 2, 3, 4, 5)
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
    """Size of the experiment at a profile.

    Attributes:
        first, later: steps of the first stage, and of each later one.
        windows: of each domain, measured.
        pairs: of batches whose gradients are compared.
    """

    first: int = 200
    later: int = 100
    windows: int = 40
    pairs: int = 3


SIZES = {"study": Size(), "quick": Size(5, 5, 4, 1)}


# -- arms --


@dataclass(frozen=True)
class Arm:
    """A way to train on the chain.

    Attributes:
        name: in the records.
        replay: share of replayed rows from the second stage on.
        epsilon, every: of the merges from the second stage on. Merging after every update shortens it to that share.
        joint: the rows of all stages, shuffled, instead of the chain.
        model: sizes of the network.
        batch: rows.
        matched: the arm whose rate this one shares and whose way through the weights it must be as long as; its epsilon
            is found for that.
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
    condition = CHAIN

    @property
    def shares_start(self) -> bool:
        """Whether it goes on from the first stage that the arms of a seed have in common."""
        return not (self.joint or self.model)

    @property
    def kind(self) -> str:
        """The arm that runs the same code."""
        return self.tuned_as or self.name.partition(",")[0]


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


def arms(profile: str) -> tuple[Arm, ...]:
    return (*ARMS, BIGGEST, *swept()) if profile == "study" else ARMS


def seeds(arm: Arm, profile: str) -> Sequence[int]:
    return SEEDS if profile == "study" and arm in ARMS else SEEDS[:1]


def tuned_as(arm: Arm) -> Arm:
    """The arm that has the same rate."""
    name = arm.matched or arm.tuned_as or arm.name
    return next(other for other in ARMS if other.name == name)


def stages(run: Run) -> Stages:
    """Rates, then how much shorter the updates of the controls must be, then the arms."""
    every = arms(run.profile)
    rates: dict[Arm, Any] = dict.fromkeys(every, 1.0)
    found = {arm: replace(arm, epsilon=EPSILON) for arm in every if arm.matched}
    if run.profile == "study":
        rates |= yield from run.tuning(every)
        for arm in found:
            found[arm] = yield from matched(run, arm, rates[arm])
    yield [run.job(found.get(arm, arm), seed, rates[arm]) for arm in every for seed in seeds(arm, run.profile)]


def matched(run: Run, control: Arm, rate: float) -> Generator[Sequence[Job], None, Arm]:
    """A control, every update shortened so that it moves as far as its arm, with the seed of the tuning.

    The distance grows with a power of the share: two tries tell which.
    """

    def distance(job: Job) -> float:
        return run.results.whole(*place(job))["displacement"]

    wanted = distance(run.job(tuned_as(control), TUNING_SEED, rate, "validation"))
    logs: list[tuple[float, float]] = []
    share = EPSILON
    for number in (1, 2):
        job = run.job(replace(control, name=f"{control.name}, try {number}", epsilon=share), TUNING_SEED, rate)
        yield [job]
        logs.append((math.log(share), math.log(distance(job) / wanted)))
        slope = 1.0
        if number == 2 and abs(logs[1][0] - logs[0][0]) > 1e-3:
            slope = (logs[1][1] - logs[0][1]) / (logs[1][0] - logs[0][0])
        share = min(1.0, share * math.exp(-logs[-1][1] / max(slope, 0.25)))
    return replace(control, epsilon=share)


# -- the rules, written before the run --


def _every(
    metric: str, pairs: Sequence[tuple[Arm, Arm]], bound: Bound, control: str, quantity: str, words: str = ""
) -> Every:
    gaps = tuple(Gap(*pair, metric, seeds=SEEDS) for pair in pairs)
    return Every(gaps, bound, "any", control=control, quantity=quantity, scale=SCALE, arms=words)


def _at_equal_distance(metric: str, bound: Bound, quantity: str) -> Provided:
    """With merges against the controls, of which nothing can be said if they did not move as far."""
    pairs = [(REPTILE, SLOWER), (MER, QUARTER_SLOWER)]
    words = (
        f"with merges (epsilon {EPSILON}, k = {EVERY}) minus the same training with every update shortened until the "
        "weights end as far from the first stage's, without replay and with 25 %"
    )
    far = tuple(Gap(control, arm, "displacement", "mean ratio", SEEDS) for arm, control in pairs)
    return Provided(_every(metric, pairs, bound, "as short a way, no merges", quantity, words), far, Bound(0.9, 1.1))


def _better_at_equal_learning(results: Results) -> Outcome:
    gap, learned = (Gap(MER, QUARTER, metric, seeds=SEEDS).interval(results) for metric in ("retained", "learned"))
    return Outcome.of(
        gap,
        grade(gap.high < 0 and learned.high < MARGIN, gap.high < 0),
        scale=SCALE,
        control="replay alone, 25 %, at its own best rate",
        quantity="retained loss, bits per byte, MER minus replay",
    )


def _like_joint(results: Results) -> Outcome:
    gap = Gap(MER, JOINT, "retained", seeds=SEEDS).interval(results)
    return Outcome.of(
        gap,
        grade(gap.high < MARGIN, gap.low < MARGIN),
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
        _every(
            "forgetting",
            [(QUARTER, SEQUENTIAL), (HALF, SEQUENTIAL)],
            BELOW_ZERO,
            "no replay, as many steps and rows",
            "forgetting, bits per byte, replay minus sequential",
        ),
    ),
    Claim(
        "mer-reptile",
        "Reptile forgets less, and not because its steps are smaller.",
        "Reptile lowers forgetting at every size; no control that moves as little",
        _at_equal_distance("forgetting", BELOW_ZERO, "forgetting, bits per byte, Reptile minus its control"),
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
        _at_equal_distance("alignment", ABOVE_ZERO, "mean cosine, Reptile minus its control"),
    ),
    Claim(
        "mer-size",
        "Compute spent on replay is worth more than compute spent on a larger model.",
        "560M with 50 % replay is close to 1B without; from 0 to 25 % replay is worth more than a bigger model",
        _every(
            "retained",
            [(QUARTER, BIGGER)],
            BELOW_ZERO,
            "a larger model of equal compute",
            "retained loss, bits per byte, replay minus larger model",
            "25 % replay minus a model of 4/3 the arithmetic for each row, on as many new rows of the later stages and "
            "none replayed",
        ),
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


def recipe_for(size: Size, seed: int, factor: float, after: int) -> Recipe:
    """One cosine over the whole chain; after its first steps (`after`) the rate is `factor` times as large.

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


def start_before(run: Run, jobs: Sequence[Job]) -> None:
    """The first stages that some jobs go on from."""
    firsts = {_start(job): replace(job, arm=SEQUENTIAL) for job in jobs if job.arm.shares_start}
    run.each(started, [job for folder, job in firsts.items() if not folder.exists()], "first stages")


def started(job: Job) -> None:
    """Train the first stage of a seed, and leave its checkpoint in ``job.folder``."""
    model = llama(context=LENGTH, seed=job.seed)
    first, start = SIZES[job.profile].first, _start(job)
    start.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=start.parent) as temporary:
        folder = Path(temporary) / "run"

        def stop(step: int, model: nn.Module) -> None:
            if step == first:
                folder.mkdir(exist_ok=True)
                save_file(_weights(model), folder / "weights.safetensors")
            if step > first:
                raise _Stop

        try:
            _train(job, model, folder, stop, checkpoint_every=first)
        except _Stop:
            folder.rename(start)  # whole or not at all
            return
    raise AssertionError("the first stage is the whole chain")


def _start(job: Job) -> Path:
    return Path(job.folder) / f"first stage {job.seed}"


def _split(job: Job) -> str:
    """Validation text, by which rates and shares are chosen, or test text."""
    return "validation" if job.seed == TUNING_SEED else "test"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _train(job: Job, model: Any, folder: Path | None, *hooks: Any, checkpoint_every: int) -> Any:
    assert job.rate is not None
    arm, size = job.arm, SIZES[job.profile]
    merges = Reptile(arm.epsilon, arm.every, start=size.first).attach(model)
    watch = _Watch(job)
    history = train(
        model,
        loader_for(arm, size, job.seed),
        language_model_loss,
        recipe_for(size, job.seed, job.rate, after=0 if arm.joint else size.first),
        after_step=[merges, watch, *hooks],
        evaluate=watch.evaluate,
        evaluate_every=size.later if _split(job) == "validation" or size.later < 10 else size.later // 2,
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
        job, size, split = self.job, SIZES[self.job.profile], _split(self.job)
        values = {}
        for domain in DOMAINS:
            values[domain] = measured(model, *_windows(domain, split, size.windows)).value
        stage = math.ceil((self.step - size.first) / size.later)
        if stage > 0 and split == "test" and not job.arm.joint:
            old, new = compared_batches(stage, size.pairs)
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


def measure(job: Job) -> Iterator[Row]:
    """Train one arm: what it forgets, retains and learns, how far it moves, and its cost."""
    arm, size, rate = job.arm, SIZES[job.profile], job.rate
    assert rate is not None
    model = llama(context=LENGTH, seed=job.seed, **dict(arm.model))
    shared = bool(job.folder) and arm.shares_start
    start = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        if shared:
            shutil.copytree(_start(job), folder)
        steps = size.first + 3 * size.later
        history = _train(job, model, folder if shared else None, checkpoint_every=steps)
    yield Row("cpu seconds", time.process_time() - start)
    yield Row("flops", _flops(model, arm.batch) * steps)
    if shared:
        before = load_file(_start(job) / "weights.safetensors")
        moved = sum(float((p.double() - before[n].double()).square().sum()) for n, p in _weights(model).items())
        yield Row("displacement", math.sqrt(moved))
    yield from (Row(*score) for score in _scores(size, history).items())
    yield from (Row("factor", rate), Row("epsilon", arm.epsilon))
    counts = [loader_for(arm, size, job.seed).counts(step) for step in range(steps)]
    yield Row("new rows", sum(new for new, _ in counts))
    yield Row("replayed rows", sum(old for _, old in counts))
    for entry in history.evaluations:
        where = entry["step"] - size.first
        if where in (-size.first, *(k * size.later for k in range(len(DOMAINS)))):
            condition = "before" if where < 0 else f"after {DOMAINS[round(where / size.later)]}"
            yield from (Row("bits per byte", entry[domain], domain, condition=condition) for domain in DOMAINS)
    if job.seed == SEEDS[0]:
        yield from curves(history, "", max(1, steps // 50), "training")


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


def _data() -> dict[str, str]:
    return {domain: domain_hash(domain) for domain in DOMAINS}


STUDY = Study(
    slug="meta_experience_replay",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=seeds,
    data=_data,
    rates=FACTORS,
    tuned_as=tuned_as,
    score=lambda values: -values["retained"],
    stages=stages,
    before=start_before,
    kind=lambda arm: arm.kind,
)
