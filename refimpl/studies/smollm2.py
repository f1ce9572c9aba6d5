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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
from refimpl.lab.study.claims import ABOVE_ZERO, BELOW_ZERO, Bound, Claim, Every, Gap, Provided
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, Row, Study, curves
from refimpl.training_data.loss_reweighting import LossReweighting
from refimpl.training_data.rs2 import RS2, steps, subset_size

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
    """Size of the experiment at a profile.

    Attributes:
        layers: blocks of the model; None: all.
        length: predicted tokens of a row.
        steps: updates on C++, and of RS2.
        stage: updates of each stage of the chain.
        weighted: updates of the reweighting, and rows in each of its batches.
        pool: rows that RS2 draws from; a round sees a tenth.
        kept: rows of Wikipedia in the buffer at the start.
        look, measured: windows of each kind of text on the way and at the end.
        texts: documents of each kind of text that are read; None: all.
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
    texts: int | None = None


SIZES = {"study": Size(None, 128, 32, 12, (8, 32), 240, 192, 4, 32), "quick": Size(1, 8, 2, 4, (2, 2), 80, 8, 1, 2, 4)}


# -- arms --


@dataclass(frozen=True)
class Arm:
    """A way to go on training the model.

    Attributes:
        condition: slug of the chapter it belongs to; `BEFORE` for the model as it came.
        method: where it differs from the other arms of the chapter.
        faster: factor of the peak rate.
    """

    condition: str
    method: str
    faster: float = 1.0

    @property
    def name(self) -> str:
        """Of the arm in the records.

        Example:
            >>> Arm("rs2", "rs2").name, Arm("meta_experience_replay", "MER 25 %", 10.0).name
            ('rs2', 'MER 25 %, 10 x rate')
        """
        return self.method if self.faster == 1 else f"{self.method}, {self.faster:g} x rate"


BEFORE = "SmolLM2"
"""The arm of the model as it came."""
UNTOUCHED = Arm(f"{BEFORE}, {OLD}", BEFORE)  # it has no numbers but those of each kind of text
RE_WARMED, REPLAYED = (Arm(CPT, f"re-warm {share} %", TENFOLD) for share in (0, 25))
REPLAY = Arm(MER, "replay 25 %", FASTER)
MERGED = Arm(MER, "MER 25 %", TENFOLD)  # with its merges about as far as the others
UNIFORM, *REWEIGHTED = (Arm(WEIGHTS, name) for name in ("uniform", "linupper", "quadratic"))
REDRAWN, *FIXED = (Arm(POOL, name) for name in ("rs2", "fixed random", "fixed highest loss", "fixed lowest loss"))
ARMS = (
    *(Arm(CPT, name) for name in ("constant low", "re-warm 0 %", "re-warm 25 %")),
    *(RE_WARMED, REPLAYED),
    *(Arm(MER, "sequential", FASTER), REPLAY, MERGED),
    *(UNIFORM, *REWEIGHTED),
    *(REDRAWN, *FIXED),
)
QUICK = (ARMS[0], REPLAYED, MERGED, REWEIGHTED[1], FIXED[1])  # whatever runs other code


def arms(profile: str) -> tuple[Arm, ...]:
    return (UNTOUCHED, *(ARMS if profile == "study" else QUICK))


# -- the rules, written before the run --


def measured(results: Results, chapter: str, arm: str, kinds: Sequence[str]) -> BitsPerByte:
    """Bits and bytes of an arm on the test documents of some kinds of text, put together.

    Args:
        results: of this study.
        chapter: slug, or `BEFORE` for the model as it came.
        arm: its name.
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


@dataclass(frozen=True)
class Spent(Gap):
    """Of bits per byte on the test documents of some kinds of text."""

    metric: str = "bits per byte"
    kinds: Sequence[str] = domains.DOMAINS

    @property
    def method(self) -> str:
        """How the interval is made, in words."""
        return "paired bootstrap over test documents, one training each"

    def interval(self, results: Results) -> Interval:
        """The estimate with its 95 % interval."""
        assert self.b is not None
        return gap(results, self.a.condition, self.a.name, self.b.name, self.kinds)


def _below_zero(ours: Sequence[Arm], others: Sequence[Arm], kinds: Sequence[str], **words: str) -> Every:
    gaps = tuple(Spent(arm, other, kinds=kinds) for arm in ours for other in others)
    return Every(gaps, BELOW_ZERO, "any", scale=SCALE, **words)


CLAIMS = [
    Claim(
        "smollm2-replay",
        "A pre-trained model that goes on with another kind of text forgets less with a quarter of replay.",
        "405M, English to German: average loss 2.34 without replay, 1.75 with 25 %",
        Provided(
            _below_zero(
                [REPLAYED],
                [RE_WARMED],
                [OLD],
                control="re-warming without replay, as many updates",
                quantity="bits per byte of Wikipedia, 25 % replay minus none",
                arms="SmolLM2 on C++ headers at ten times the rate that is best for C++, Wikipedia as the old text",
            ),
            (Spent(RE_WARMED, UNTOUCHED, "bits per byte of Wikipedia", kinds=[OLD]),),  # if nothing was forgotten
            ABOVE_ZERO,  # nothing can be saved
        ),
    ),
    Claim(
        "smollm2-merges",
        "Replay with Reptile retains more than replay whose steps are as short.",
        "560M, 25 %: downstream average 67.5 against 66.4",
        Provided(
            _below_zero(
                [MERGED],
                [REPLAY],
                domains.DOMAINS,
                control="replay at 0.3 of the rate, which moves about as far",
                quantity="bits per byte of all four kinds of text, MER minus replay",
                arms="SmolLM2 on documentation, Python, C++, buffer of Wikipedia, at the end, MER at ten times the rate "
                "minus replay at three times",
            ),
            (Gap(REPLAY, MERGED, "displacement", "mean ratio", (0,)),),
            Bound(0.8, 1.25),
        ),
    ),
    Claim(
        "smollm2-weights",
        "Weights by loss give a better model than the plain mean at equal steps.",
        "lower held-out perplexity from 124M to 7B; no table was available to us",
        _below_zero(
            REWEIGHTED,
            [UNIFORM],
            domains.DOMAINS,
            control="the plain mean",
            quantity="bits per byte of all four kinds of text, weighted minus plain",
            arms="SmolLM2 on four kinds of text in equal parts, batches of 32, LinUpper and Quadratic minus the plain mean",
        ),
    ),
    Claim(
        "smollm2-rs2",
        "A subset redrawn every round beats subsets chosen once.",
        "CIFAR-10, 10 %: 91.7 against 85.0 (best other) and 78.4 (random); a language model in the repository only",
        _below_zero(
            [REDRAWN],
            FIXED,
            [NEW],
            control="subsets chosen once: at random, of the highest and of the lowest losses",
            quantity="bits per byte of C++, RS2 minus fixed subset",
            arms="SmolLM2, ten rounds over a tenth of 240 rows of C++, other C++ measured, RS2 minus a random tenth and the "
            "tenths of the highest and of the lowest losses",
        ),
    ),
]


# -- text --


@functools.cache
def _windows(kind: str, split: str, size: Size) -> tuple[Tensor, list[str]]:
    """All windows of a split, int64 [n, length + 1], and the document of each."""
    found = domains.documents(kind, split)[: size.texts]
    tokens = text.from_texts([document.text for document in found], length=size.length + 1)
    return tokens.ids, [found[int(unit.removeprefix("text "))].id for unit in tokens.units]


def rows(kind: str, size: Size, count: int | None = None) -> Tensor:
    """Training rows of SmolLM2's tokens, int64 [count, size.length + 1], in an order of their own.

    Example:
        >>> rows("prose", SIZES["quick"], count=3).shape
        torch.Size([3, 9])
    """
    ids, _ = _windows(kind, "calibration", size)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order if count is None else order[:count]]


def spent(model: nn.Module, job: Job, count: int) -> dict[str, BitsPerByte]:
    """Bits per byte of each kind of text, on windows evenly spaced over the test documents."""
    found = {}
    size = SIZES[job.profile]
    for kind in domains.DOMAINS:
        ids, units = _windows(kind, "test", size)
        chosen = [k * len(units) // count for k in range(count)]
        with _precise(job):
            found[kind] = bits_per_byte(model, ids[chosen], [units[k] for k in chosen], _tokenizer(), BATCH)
    return found


@functools.cache
def _tokenizer() -> Any:
    return models.tokenizer()


def _precise(job: Job) -> contextlib.AbstractContextManager[Any]:
    """The precision of the training: weights in fp32, products in the job's dtype."""
    if job.dtype == "bfloat16":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


# -- trainings --


def peak(arm: Arm) -> float:
    """Its highest rate.

    Example:
        >>> peak(Arm("rs2", "rs2", 3.0)) == 3 * RATE
        True
    """
    return RATE * arm.faster


def recipe_for(job: Job, schedule: Schedule) -> Scheduled:
    """Settings that all arms share."""
    precision = "bf16" if job.dtype == "bfloat16" else "fp32"
    return Scheduled.of(schedule, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, precision=precision)


def cosine(job: Job, updates: int) -> Scheduled:
    """Warm-up over a twentieth, then down to a tenth."""
    high = peak(job.arm)
    return recipe_for(job, Cosine(updates, high, LOW * high, max(1, updates // 20)))


def watched(job: Job, updates: int) -> dict[str, Any]:
    """Arguments of `train` that draw the curves."""

    def look(model: nn.Module) -> dict[str, float]:
        return {kind: one.value for kind, one in spent(model, job, SIZES[job.profile].look).items()}

    return {"progress": False, "evaluate": look, "evaluate_every": max(1, updates // 4)}


def _continued(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    size = SIZES[job.profile]
    new, old = rows(NEW, size), rows(OLD, size)
    if job.arm.method == "constant low":
        recipe = recipe_for(job, Constant(size.steps, LOW * peak(job.arm)))
        data = replay_loader(new, [old], 0.0, BATCH, size.steps)
        return train(model, data, next_token_loss, recipe, **watched(job, size.steps))
    method = ContinualPretraining(peak(job.arm), replay=0.25 if job.arm.method.endswith("25 %") else 0.0, warmup=0.05)
    precision = cosine(job, size.steps).precision
    return method.train(
        model,
        new,
        [old],
        steps=size.steps,
        batch_size=BATCH,
        recipe={"precision": precision},
        **watched(job, size.steps),
    )


def _chained(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    size = SIZES[job.profile]
    updates = len(CHAIN) * size.stage
    stages = [Stage(rows(kind, size), size.stage) for kind in CHAIN]
    buffer = ReplayBuffer(size.kept + updates * BATCH, (size.length + 1,), dtype="int32")
    buffer.add(rows(OLD, size, size.kept))
    replay = 0.0 if job.arm.method == "sequential" else 0.25
    data = ReplayLoader(stages, BATCH, replay, buffer, begin=0)
    merging = job.arm.method.startswith("MER")
    merges = Reptile(EPSILON if merging else 1.0, size.stage // MERGES).attach(model)
    options = watched(job, updates) | {"evaluate_every": size.stage}
    history = train(model, data, next_token_loss, cosine(job, updates), after_step=[merges], **options)
    merges.close()
    return history


def _weighted(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    size = SIZES[job.profile]
    updates, batch = size.weighted
    # the last column says where a row is from
    sources = [
        torch.cat([rows(kind, size), torch.full((len(rows(kind, size)), 1), number)], 1)
        for number, kind in enumerate(domains.DOMAINS)
    ]
    data = mixture_loader(sources, [1 / len(sources)] * len(sources), batch, updates)
    weighted = Weighted(model, sequence_losses, LossReweighting(job.arm.method, TEMPERATURE))
    shares: list[Tensor] = []

    def loss(model: nn.Module, given: Any) -> Tensor:
        ids = given if isinstance(given, Tensor) else given[0]
        value = weighted(model, ids[:, :-1])
        weights = torch.full((batch,), 1 / batch) if weighted.last is None else weighted.last
        shares.append(torch.zeros(len(sources)).index_add_(0, ids[:, -1], weights))
        return value

    history = train(model, data, loss, cosine(job, updates), **watched(job, updates))
    for kind, share in zip(domains.DOMAINS, torch.stack(shares).mean(0).tolist(), strict=True):
        note(f"share of the weight, {kind}", share)
    note("concentration", float(np.mean([entry["concentration"] for entry in weighted.history()])))
    weighted.close()
    return history


def _from_a_pool(job: Job, model: nn.Module, note: Callable[[str, float], None]) -> History:
    size, name = SIZES[job.profile], job.arm.method
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
            with torch.inference_mode(), _precise(job):
                losses = torch.cat([sequence_losses(model, part) for part in pool.split(BATCH)])
            kept = losses.argsort(descending=name == "fixed highest loss")[:k]
        data = loader(pool[kept], Shuffled(k), BATCH)
    history = train(model, data, next_token_loss, cosine(job, updates), **watched(job, updates))
    with torch.inference_mode(), _precise(job):
        note("training loss", float(torch.cat([sequence_losses(model, part) for part in pool.split(BATCH)]).mean()))
    return history


_TRAININGS = {CPT: _continued, MER: _chained, WEIGHTS: _weighted, POOL: _from_a_pool}


def measure(job: Job) -> Iterator[Row]:
    """Train one arm: how far it moves, and what it spends on each kind of text."""
    size, arm = SIZES[job.profile], job.arm
    model = models.smollm2(torch.float32, size.layers)
    if arm != UNTOUCHED:
        before = [p.detach().clone() for p in model.parameters()]
        noted: list[Row] = []
        model.train()
        history = _TRAININGS[arm.condition](job, model, lambda metric, value: noted.append(Row(metric, value)))
        yield from noted
        moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True))
        yield from map(Row, ("displacement", "rate", "updates"), (math.sqrt(moved), peak(arm), len(history.steps)))
        yield from curves(history)
    chapter = BEFORE if arm == UNTOUCHED else arm.condition
    for kind, one in spent(model, job, size.measured).items():
        for unit, bits, count in zip(one.units, one.bits, one.counts, strict=True):
            for metric, value in (("bits", bits), ("bytes", count)):
                yield Row(metric, float(value), unit, condition=_place(chapter, kind))


def _data() -> dict[str, str]:
    return {"smollm2": models.smollm2_hash()} | {kind: domains.domain_hash(kind) for kind in domains.DOMAINS}


STUDY = Study(
    slug="smollm2",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=lambda arm, profile: (0,),
    data=_data,
    kind=lambda arm: arm.condition,
    dtype="bfloat16",
)
