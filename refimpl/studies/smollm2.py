"""Four methods for training data and continual training, tried once on a real pre-trained model.

The verdicts of their chapters rest on small networks and five seeds. Here SmolLM2-135M goes on training with the same
code, one training for each arm, so that a reader sees what survives at that size: what it forgets of Wikipedia while
it reads C++ headers (continual pre-training), a chain of three kinds of text behind a buffer that was filled with
Wikipedia (replay and Reptile), weights by loss on a mixture of four kinds of text (loss reweighting), and a small pool
of C++ rows of which a round sees a tenth (RS2). Its own pre-training text is not at hand: Wikipedia stands for it. It
has seen code before, so nothing here is a shift as strong as that of the small models.

All arms share one optimiser and one shape of schedule. Their peak rate is the one that served plain continued training
on C++ best in a pilot on validation text. At that rate two arms of a first run, broken off there, forgot nothing, so
what is about forgetting is also done at a higher rate. Measured is the loss of test documents in bits per byte.
Intervals resample documents and know nothing of the scatter between trainings, so every claim names a direction only.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from refimpl.continual.continual_pretraining import ContinualPretraining, next_token_loss, replay_loader
from refimpl.continual.meta_experience_replay import ReplayBuffer, ReplayLoader, Reptile, Stage
from refimpl.core.train.loop import History, train
from refimpl.core.train.losses import Weighted, sequence_losses
from refimpl.core.train.sampling import Shuffled, loader, mixture_loader
from refimpl.core.train.schedules import Constant, Cosine, Schedule, Scheduled
from refimpl.lab import models
from refimpl.lab.data import domains, text
from refimpl.lab.measure.bits import BitsPerByte, bits_per_byte
from refimpl.lab.measure.statistics import Interval, difference, paired_bootstrap
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.precision import declares
from refimpl.lab.study.records import Record, Results
from refimpl.training_data.loss_reweighting import LossReweighting
from refimpl.training_data.rs2 import RS2, steps, subset_size

DEPENDS = [
    "refimpl.continual.continual_pretraining",
    "refimpl.continual.meta_experience_replay.buffer",
    "refimpl.continual.meta_experience_replay.stream",
    "refimpl.continual.meta_experience_replay.reptile",
    "refimpl.core.train.loop",
    "refimpl.core.train.losses",
    "refimpl.core.train.outer",
    "refimpl.core.train.sampling",
    "refimpl.core.train.schedules",
    "refimpl.training_data.loss_reweighting",
    "refimpl.training_data.rs2",
    "refimpl.lab.data.domains",
    "refimpl.lab.models.lstm",
    "refimpl.lab.models.language",
    "refimpl.lab.data.text",
]

SLUG = "smollm2"
OLD, NEW = "wikipedia", "cpp"
CHAIN = ("prose", "python", "cpp")
# C++ after 32 updates, validation text, bits per byte: 1.039 at this rate, 1.042 at 3e-4, 1.183 at 1e-3
RATE = 1e-4
FASTER, TENFOLD = 3.0, 10.0
LOW = 0.1  # of the peak, at the end
BATCH = 8
EPSILON, MERGES = 0.3, 4  # of the merges; how many in a stage
R = 0.1  # share of the pool in a round of RS2
TEMPERATURE = 0.4
SCALE = "SmolLM2, 135M weights, 31 to 37 thousand tokens, one training an arm: a direction, no more"
CPT, MER, WEIGHTS, POOL = "continual_pretraining", "meta_experience_replay", "loss_reweighting", "rs2"


@dataclass(frozen=True)
class Size:
    """What a profile spends.

    Attributes:
        layers: blocks of the model; None: all.
        length: predicted tokens of a row.
        steps: updates on C++, and of RS2.
        stage: updates of each stage of the chain.
        weighted: updates of the reweighting, and rows in each of its batches.
        pool: rows that RS2 draws from; a round sees a tenth.
        kept: rows of Wikipedia in the buffer at the start.
        look, measured: windows of each kind of text on the way and at the end.
    """

    layers: int | None
    length: int
    steps: int
    stage: int
    weighted: tuple[int, int]
    pool: int
    kept: int
    look: int
    measured: int


SIZES = {
    "study": Size(None, 128, 32, 12, (8, 32), 240, 192, 4, 32),
    "live": Size(None, 128, 8, 4, (2, 32), 80, 64, 2, 8),
    "quick": Size(1, 16, 2, 4, (2, 8), 80, 16, 1, 2),
}


@dataclass(frozen=True)
class Arm:
    """What is done to the model.

    Attributes:
        chapter: slug of the paper it belongs to.
        name: what differs from the other arms of the chapter.
        faster: factor of the peak rate.
    """

    chapter: str
    name: str
    faster: float = 1.0

    @property
    def label(self) -> str:
        """Its name in the records."""
        return self.name if self.faster == 1 else f"{self.name}, {self.faster:g} x rate"


ARMS = (
    *(Arm(CPT, name) for name in ("constant low", "re-warm 0 %", "re-warm 25 %")),
    *(Arm(CPT, name, TENFOLD) for name in ("re-warm 0 %", "re-warm 25 %")),
    *(Arm(MER, name, FASTER) for name in ("sequential", "replay 25 %")),
    Arm(MER, "MER 25 %", TENFOLD),  # with its merges about as far as the others
    *(Arm(WEIGHTS, name) for name in ("uniform", "linupper", "quadratic")),
    *(Arm(POOL, name) for name in ("rs2", "fixed random", "fixed highest loss", "fixed lowest loss")),
)
QUICK = tuple({arm.chapter: arm for arm in ARMS}.values())  # what a test trains: an arm of each chapter
BEFORE = "SmolLM2"
"""The arm of the model as it came."""


# -- the rules, written before the run --


def measured(results: Results, chapter: str, arm: str, kinds: Sequence[str]) -> BitsPerByte:
    """What an arm spends on the test documents of some kinds of text, put together.

    Args:
        results: of this study.
        chapter: slug, or `BEFORE` for the model as it came.
        arm: its label.
        kinds: among `refimpl.lab.data.domains.DOMAINS`.
    """
    found = [
        {metric: results.values(arm, _place(chapter, kind), metric=metric) for metric in ("bits", "bytes")}
        for kind in kinds
    ]
    units = [f"{kind} {unit}" for kind, one in zip(kinds, found, strict=True) for unit in one["bits"]]
    bits = np.array([value for one in found for value in one["bits"].values()])
    counts = np.array([value for one in found for value in one["bytes"].values()])
    return BitsPerByte(float(bits.sum() / counts.sum()), bits, counts, units)


def gap(results: Results, chapter: str, arm: str, other: str, kinds: Sequence[str]) -> Interval:
    """Bits per byte of an arm minus those of another (`BEFORE`: of the model as it came), over documents."""
    a = measured(results, chapter, arm, kinds)
    b = measured(results, BEFORE if other == BEFORE else chapter, other, kinds)
    return paired_bootstrap(a.bits, b.bits, a.counts, statistic=difference)


def _place(chapter: str, kind: str) -> str:
    return f"{chapter}, {kind}"


def _label(name: str, faster: float = 1.0) -> str:
    return Arm("", name, faster).label


def _verdict(good: Sequence[bool]) -> Verdict:
    return Verdict.HOLDS if all(good) else Verdict.PARTLY if any(good) else Verdict.DOES_NOT_HOLD


def _replay(results: Results) -> Outcome:
    without, replayed = (_label(f"re-warm {r} %", TENFOLD) for r in (0, 25))
    forgotten = gap(results, CPT, without, BEFORE, [OLD])
    saved = gap(results, CPT, replayed, without, [OLD])
    verdict = Verdict.HOLDS if saved.high < 0 else Verdict.DOES_NOT_HOLD
    if forgotten.low <= 0:  # nothing was forgotten, so nothing can be saved
        verdict = Verdict.CANNOT_BE_TESTED
    return Outcome.of(
        saved,
        verdict,
        scale=SCALE,
        control="re-warming without replay, as many updates",
        quantity="bits per byte of Wikipedia, 25 % replay minus none",
    )


def _merges(results: Results) -> Outcome:
    merged, control = _label("MER 25 %", TENFOLD), _label("replay 25 %", FASTER)
    found = gap(results, MER, merged, control, domains.DOMAINS)
    way = [results.values(arm, MER, metric="displacement")[""] for arm in (merged, control)]
    verdict = Verdict.HOLDS if found.high < 0 else Verdict.DOES_NOT_HOLD
    if not 0.8 < way[1] / way[0] < 1.25:
        verdict = Verdict.CANNOT_BE_TESTED
    return Outcome.of(
        found,
        verdict,
        scale=SCALE,
        control="replay at 0.3 of the rate, which moves about as far",
        quantity="bits per byte of all four kinds of text, MER minus replay",
    )


def _weights(results: Results) -> Outcome:
    gaps = [gap(results, WEIGHTS, arm, "uniform", domains.DOMAINS) for arm in ("linupper", "quadratic")]
    worst = max(gaps, key=lambda each: each.high)
    return Outcome.of(
        worst,
        _verdict([each.high < 0 for each in gaps]),
        scale=SCALE,
        control="the plain mean",
        quantity="worst of 2: bits per byte of all four kinds of text, weighted minus plain",
    )


def _subsets(results: Results) -> Outcome:
    others = [arm.label for arm in ARMS if arm.chapter == POOL and arm.name != "rs2"]
    gaps = [gap(results, POOL, "rs2", other, [NEW]) for other in others]
    worst = max(gaps, key=lambda each: each.high)
    return Outcome.of(
        worst,
        _verdict([each.high < 0 for each in gaps]),
        scale=SCALE,
        control="subsets chosen once: at random, of the highest and of the lowest losses",
        quantity="worst of 3: bits per byte of C++, RS2 minus fixed subset",
    )


_OVER = "interval over test documents, one training each"
CLAIMS = [
    Claim(
        "smollm2-replay",
        "A pre-trained model that goes on with another kind of text forgets less with a quarter of replay.",
        "405M, English to German: average loss 2.34 without replay, 1.75 with 25 %",
        _replay,
        "SmolLM2 on C++ headers at ten times the rate that is best for C++, Wikipedia as the old text, bits per byte "
        f"of Wikipedia, 25 % replay minus none, {_OVER}: holds if it lies below 0; cannot be tested if nothing is "
        "forgotten without replay (its rise over the model as it came does not lie above 0).",
    ),
    Claim(
        "smollm2-merges",
        "Replay with Reptile retains more than replay whose steps are as short.",
        "560M, 25 %: downstream average 67.5 against 66.4",
        _merges,
        "SmolLM2 on documentation, Python, C++, buffer of Wikipedia, bits per byte of all four kinds at the end, MER "
        f"at ten times the rate minus replay at three times, {_OVER}: holds if it lies below 0; cannot be tested if "
        "the ways of the two from the start are further than 0.8 to 1.25 of each other.",
    ),
    Claim(
        "smollm2-weights",
        "Weights by loss give a better model than the plain mean at equal steps.",
        "lower held-out perplexity from 124M to 7B; no table was available to us",
        _weights,
        "SmolLM2 on four kinds of text in equal parts, batches of 32, bits per byte of all four, LinUpper and "
        f"Quadratic minus the plain mean, {_OVER}: holds if both lie below 0, partly if one does.",
    ),
    Claim(
        "smollm2-rs2",
        "A subset redrawn every round beats subsets chosen once.",
        "CIFAR-10, 10 %: 91.7 against 85.0 (best other) and 78.4 (random); a language model in the repository only",
        _subsets,
        f"SmolLM2, ten rounds over a tenth of 240 rows of C++, bits per byte of other C++, RS2 minus a random tenth, "
        f"the tenth of the highest and of the lowest losses, {_OVER}: holds if all three lie below 0, partly if one or "
        "two do.",
    ),
]


# -- text --


@functools.cache
def _windows(kind: str, split: str, length: int) -> tuple[Tensor, list[str]]:
    """All windows of a split, int64 [n, length + 1], and the document of each."""
    found = domains.documents(kind, split)
    tokens = text.from_texts([document.text for document in found], length=length + 1)
    return tokens.ids, [found[int(unit.removeprefix("text "))].id for unit in tokens.units]


def rows(kind: str, size: Size, count: int | None = None) -> Tensor:
    """Training rows of SmolLM2's tokens, int64 [count, size.length + 1], in an order of their own.

    Example:
        >>> rows("prose", SIZES["quick"], count=3).shape
        torch.Size([3, 17])
    """
    ids, _ = _windows(kind, "calibration", size.length)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order if count is None else order[:count]]


def spent(model: nn.Module, size: Size, count: int) -> dict[str, BitsPerByte]:
    """Bits per byte of each kind of text, on windows evenly spaced over the test documents."""
    found = {}
    for kind in domains.DOMAINS:
        ids, units = _windows(kind, "test", size.length)
        chosen = [k * len(units) // count for k in range(count)]
        with _precise():
            found[kind] = bits_per_byte(model, ids[chosen], [units[k] for k in chosen], _tokenizer(), BATCH)
    return found


@functools.cache
def _tokenizer() -> Any:
    return models.tokenizer()


def _precise() -> contextlib.AbstractContextManager[Any]:
    """The precision of the training: weights in fp32, products in bf16 where that is fast."""
    if models.compute_dtype() is torch.bfloat16:
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


# -- trainings --


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: Arm
    size: Size

    @property
    def peak(self) -> float:
        """Its highest rate."""
        return RATE * self.arm.faster

    def recipe(self, schedule: Schedule) -> Scheduled:
        """What all arms have in common."""
        precision = "bf16" if models.compute_dtype() is torch.bfloat16 else "fp32"
        return Scheduled.of(schedule, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, precision=precision)

    def cosine(self, updates: int) -> Scheduled:
        """Warm-up over a twentieth, then down to a tenth."""
        return self.recipe(Cosine(updates, self.peak, LOW * self.peak, max(1, updates // 20)))

    def watched(self, updates: int) -> dict[str, Any]:
        """Arguments of `train` that draw the curves."""

        def look(model: nn.Module) -> dict[str, float]:
            return {kind: one.value for kind, one in spent(model, self.size, self.size.look).items()}

        return {"progress": False, "evaluate": look, "evaluate_every": max(1, updates // 4)}


def _continued(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    size = job.size
    new, old = rows(NEW, size), rows(OLD, size)
    if job.arm.name == "constant low":
        recipe = job.recipe(Constant(size.steps, LOW * job.peak))
        data = replay_loader(new, [old], 0.0, BATCH, size.steps)
        return train(model, data, next_token_loss, recipe, **job.watched(size.steps))
    method = ContinualPretraining(job.peak, replay=0.25 if job.arm.name.endswith("25 %") else 0.0, warmup=0.05)
    precision = job.cosine(size.steps).precision
    return method.train(
        model,
        new,
        [old],
        steps=size.steps,
        batch_size=BATCH,
        recipe={"precision": precision},
        **job.watched(size.steps),
    )


def _chained(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    size, updates = job.size, len(CHAIN) * job.size.stage
    stages = [Stage(rows(kind, size), size.stage) for kind in CHAIN]
    buffer = ReplayBuffer(size.kept + updates * BATCH, (size.length + 1,), dtype="int32")
    buffer.add(rows(OLD, size, size.kept))
    replay = 0.0 if job.arm.name == "sequential" else 0.25
    data = ReplayLoader(stages, BATCH, replay, buffer, begin=0)
    merging = job.arm.name.startswith("MER")
    merges = Reptile(EPSILON if merging else 1.0, size.stage // MERGES).attach(model)
    options = job.watched(updates) | {"evaluate_every": size.stage}
    history = train(model, data, next_token_loss, job.cosine(updates), after_step=[merges], **options)
    merges.close()
    return history


def _weighted(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    updates, batch = job.size.weighted
    # the last column says where a row is from
    sources = [
        torch.cat([rows(kind, job.size), torch.full((len(rows(kind, job.size)), 1), number)], 1)
        for number, kind in enumerate(domains.DOMAINS)
    ]
    data = mixture_loader(sources, [1 / len(sources)] * len(sources), batch, updates)
    weighted = Weighted(model, sequence_losses, LossReweighting(job.arm.name, TEMPERATURE))
    shares: list[Tensor] = []

    def loss(model: nn.Module, given: Any) -> Tensor:
        ids = given if isinstance(given, Tensor) else given[0]
        value = weighted(model, ids[:, :-1])
        weights = torch.full((batch,), 1 / batch) if weighted.last is None else weighted.last
        shares.append(torch.zeros(len(sources)).index_add_(0, ids[:, -1], weights))
        return value

    history = train(model, data, loss, job.cosine(updates), **job.watched(updates))
    for kind, share in zip(domains.DOMAINS, torch.stack(shares).mean(0).tolist(), strict=True):
        note(f"share of the weight, {kind}", share)
    note("concentration", float(np.mean([entry["concentration"] for entry in weighted.history()])))
    weighted.close()
    return history


def _from_a_pool(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    size, name = job.size, job.arm.name
    pool = rows(NEW, size, size.pool)
    k = subset_size(size.pool, R)
    rounds = round(1 / R)
    updates = steps(size.pool, R, rounds, BATCH)
    if name == "rs2":
        data = loader(pool, RS2(size.pool, R), BATCH)
    else:
        if name == "fixed random":
            kept = torch.randperm(size.pool, generator=torch.Generator().manual_seed(1))[:k]
        else:
            with torch.inference_mode(), _precise():
                losses = torch.cat([sequence_losses(model, part) for part in pool.split(BATCH)])
            kept = losses.argsort(descending=name == "fixed highest loss")[:k]
        data = loader(pool[kept], Shuffled(k), BATCH)
    history = train(model, data, next_token_loss, job.cosine(updates), **job.watched(updates))
    with torch.inference_mode(), _precise():
        note("training loss", float(torch.cat([sequence_losses(model, part) for part in pool.split(BATCH)]).mean()))
    return history


_TRAININGS = {CPT: _continued, MER: _chained, WEIGHTS: _weighted, POOL: _from_a_pool}


def trained(job: Job) -> list[Record]:
    """Train and measure one arm."""
    model = models.smollm2(torch.float32, job.size.layers)
    before = [p.detach().clone() for p in model.parameters()]
    results = Results("", {"paper": SLUG})

    def note(metric: str, value: float) -> None:
        results.add(Record(SLUG, job.arm.label, job.arm.chapter, 0, "", metric, value))

    model.train()
    history = _TRAININGS[job.arm.chapter](job, model, note)
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True))
    note("displacement", math.sqrt(moved))
    note("rate", job.peak)
    note("updates", len(history.steps))
    _add(results, job.arm.chapter, job.arm.label, spent(model, job.size, job.size.measured))
    results.add_history(job.arm.label, f"{job.arm.chapter} curve", 0, history)
    return list(results.records())


def untouched(size: Size) -> list[Record]:
    """Measure the model as it comes."""
    results = Results("", {"paper": SLUG})
    _add(results, BEFORE, BEFORE, spent(models.smollm2(torch.float32, size.layers), size, size.measured))
    return list(results.records())


def _add(results: Results, chapter: str, arm: str, found: dict[str, BitsPerByte]) -> None:
    for kind, one in found.items():
        for unit, bits, count in zip(one.units, one.bits, one.counts, strict=True):
            for metric, value in (("bits", bits), ("bytes", count)):
                results.add(Record(SLUG, arm, _place(chapter, kind), 0, unit, metric, float(value)))


# -- the run --


@declares("bfloat16")
def run(out: Path, profile: str = "study") -> Results:
    """Train every arm that the results file lacks, and judge the claims.

    Args:
        out: results file; an interrupted run goes on where it stopped, training by training.
        profile: "study" (recorded; the rules must be committed), "live" or "quick".
    """
    size = SIZES[profile]
    data = {"smollm2": models.smollm2_hash()} | {kind: domains.domain_hash(kind) for kind in domains.DOMAINS}
    dtype = str(models.compute_dtype()).removeprefix("torch.")
    results = Results.start(
        out,
        paper=SLUG,
        study=__name__,
        depends=DEPENDS,
        data=data,
        profile=profile,
        dtype=dtype,
        provisional=profile != "study",
    )
    if not results.has(BEFORE, _place(BEFORE, OLD)):
        results.add(*untouched(size))
        results.save()
    arms = [arm for arm in ARMS if profile != "quick" or arm in QUICK]
    todo = [Job(arm, size) for arm in arms if not results.has(arm.label, arm.chapter)]
    workers = 1 if profile == "quick" else None
    with tqdm(total=len(todo), desc=f"{SLUG} ({profile})", unit="training") as bar:
        for _, records in in_processes(trained, todo, workers):
            results.add(*records)
            results.save()
            bar.update()
    if profile == "study":
        results.claims = judge(results, CLAIMS)
    results.save()
    return results
