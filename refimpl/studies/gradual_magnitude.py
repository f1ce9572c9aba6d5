"""The experiment of the gradual-magnitude chapter: with so many non-zero weights to spend, prune a large network or
train a small one?

A residual network on MNIST and a byte-level LSTM on Wikipedia, each at one large and three small sizes. Large networks
are pruned during training to exactly the non-zero numbers of a small one, biases and norms included. All arms of a
network have the same steps, batches and grid of three learning rates, chosen on validation data with a seed that is not
used again. Extras: schedules and structures at one sparsity, and a small Llama pruned from its checkpoint.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.masks import bake
from refimpl.lab import wheels
from refimpl.lab.data import text
from refimpl.lab.data.images import dataset_hash, images
from refimpl.lab.data.windows import windows
from refimpl.lab.measure.bits import bits_per_byte, language_model_loss
from refimpl.lab.measure.classify import classify, cross_entropy_loss, flops, score_rows
from refimpl.lab.measure.metrics import footprint
from refimpl.lab.models import small
from refimpl.lab.models.classifiers import resnet
from refimpl.lab.models.lstm import LSTMLanguageModel
from refimpl.lab.study.claims import ABOVE_ZERO, BELOW_ONE, Bound, Claim, Every, Gap
from refimpl.lab.study.study import Job, Row, Study, curves
from refimpl.pruning.gradual_magnitude import GradualMagnitude, model_storage, sparsity_for

SEEDS = (1, 2, 3, 4, 5)
RESNET, LSTM, LLAMA = "mnist resnet", "wikipedia lstm", "wikipedia llama"
# A pilot on validation data, at other lengths, put the best rates of the first two at 1e-2 or more; the Llama is
# trained already and wants less.
RATES = {RESNET: (3e-3, 1e-2, 3e-2), LSTM: (3e-3, 1e-2, 3e-2), LLAMA: (3e-4, 1e-3, 3e-3)}
WIDTHS = (0.5, 0.25, 0.125)  # of the small residual networks
SMALL_LSTMS = ((24, 48), (12, 28), (8, 14))  # embedding, hidden
LARGE_LSTM = (64, 128)
# methods on the classifier bench: as many as one chart can tell apart
ON_BENCH = ("dense", "small-dense", "cubic", "global", "one-shot", "random", "2:4")


@dataclass(frozen=True)
class Size:
    """Size of the experiment at a profile.

    Attributes:
        resnet, lstm, llama: steps of each network.
        test: validation or test images; None: all.
        windows: of text, validation or test.
    """

    resnet: int = 1000
    lstm: int = 1200
    llama: int = 400
    test: int | None = None
    windows: int = 400


SIZES = {"study": Size(), "quick": Size(20, 20, 20, 50, 8)}


# -- arms --


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        name: in the records; its first word is the method on the classifier bench.
        network: `RESNET`, `LSTM` or `LLAMA`.
        small: index of a small size that is trained dense; None trains the large one.
        budget: what the large network may keep: the index of the small size with as many non-zeros ("nonzeros") or
            bytes ("bytes"); or a sparsity ("sparsity").
        pruning: options of `GradualMagnitude` other than the schedule's place in the run.
        place: where pruning begins and ends, as fractions of the run.
        shares: name of the arm of this network whose learning rate it has; its own by default.
    """

    name: str
    network: str = RESNET
    small: int | None = None
    budget: tuple[str, float] | None = None
    pruning: dict[str, Any] = field(default_factory=dict, hash=False)
    place: tuple[float, float] = (0.1, 0.7)
    shares: str | None = None

    @property
    def condition(self) -> str:
        return self.network

    @property
    def validation(self) -> str:
        return f"{self.network} validation"


def _resnet_arms() -> list[Arm]:
    arms = [Arm("dense")]
    for index, width in enumerate(WIDTHS):
        cubic, budget = f"cubic non-zeros of {width:g}", ("nonzeros", index)
        arms += [
            Arm(f"small-dense width {width:g}", small=index),
            Arm(cubic, budget=budget),
            Arm(f"global non-zeros of {width:g}", budget=budget, pruning={"scope": "global"}, shares=cubic),
        ]
    return arms + [
        Arm(f"cubic bytes of {width:g}", budget=("bytes", index), shares=f"cubic non-zeros of {width:g}")
        for index, width in enumerate(WIDTHS[:2])  # a bit mask alone is larger than the smallest network
    ]


def _schedule_arms() -> list[Arm]:
    """Ways of getting to one sparsity, with the learning rate tuned for the cubic schedule nearest to it."""
    at_95 = functools.partial(Arm, budget=("sparsity", 0.95), shares="cubic non-zeros of 0.25")
    # the stem's kernel has 49 inputs, which groups of four do not divide: it stays dense in both arms
    dense_stem = {"overrides": {"embedder": 0.0}}
    at_50 = functools.partial(Arm, budget=("sparsity", 0.5), shares="cubic non-zeros of 0.5")
    return [
        at_95("cubic 95%"),
        at_95("linear 95%", pruning={"exponent": 1.0}),
        at_95("one-shot 95%", pruning={"updates": 1}, place=(0.1, 0.4)),
        at_95("last-moment 95%", pruning={"updates": 1}, place=(0.99, 1.0)),
        at_95("random 95%", pruning={"ranking": "random"}),
        at_95("global 95%", pruning={"scope": "global"}),
        at_95("blocks-4x1 95%", pruning={"structure": "4x1"}),
        at_95("blocks-4x4 95%", pruning={"structure": "4x4"}),
        at_50("2:4 50% behind a dense stem", pruning={"structure": "2:4", **dense_stem}),
        at_50("cubic 50% behind a dense stem", pruning=dense_stem),
    ]


def _lstm_arms() -> list[Arm]:
    arms = [Arm("dense", LSTM)]
    for index, (_, hidden) in enumerate(SMALL_LSTMS):
        arms.append(Arm(f"small-dense hidden {hidden}", LSTM, small=index))
        arms.append(Arm(f"cubic non-zeros of {hidden}", LSTM, budget=("nonzeros", index)))
    return [*arms, Arm("cubic 90%", LSTM, budget=("sparsity", 0.9), shares=f"cubic non-zeros of {SMALL_LSTMS[1][1]}")]


def _llama_arms() -> list[Arm]:
    return [
        Arm("trained-on", LLAMA),
        Arm("cubic 80%", LLAMA, budget=("sparsity", 0.8)),
        Arm("one-shot 80%", LLAMA, budget=("sparsity", 0.8), pruning={"updates": 1}, place=(0.0, 0.025)),
    ]


def arms(profile: str) -> list[Arm]:
    if profile == "study":
        return [*_resnet_arms(), *_schedule_arms(), *_lstm_arms(), *_llama_arms()]
    return [_resnet_arms()[1], _schedule_arms()[5], _lstm_arms()[2], _llama_arms()[1]]


def seeds(arm: Arm, profile: str) -> Sequence[int]:
    if profile != "study":
        return SEEDS[:1]
    judged = ("cubic 95%", "linear 95%", "one-shot 95%")
    extra = arm.network == LLAMA or (arm in _schedule_arms() and arm.name not in judged)
    return SEEDS[:3] if extra else SEEDS


def tuned_as(arm: Arm) -> Arm:
    (found,) = (a for a in arms("study") if (a.network, a.name) == (arm.network, arm.shares or arm.name))
    return found


# -- the rules, written before the run --


def _gap(a: str, b: str) -> Gap:
    return Gap(Arm(a), Arm(b))


def _lstm_gap(a: str, b: str) -> Gap:
    return Gap(Arm(a, LSTM), Arm(b, LSTM), "bits per byte", "ratio")


_scale = "a residual network of 78k weights on 3500 digits; the paper: MobileNet and InceptionV3 on ImageNet"
_images = functools.partial(Every, bound=ABOVE_ZERO, partly="any", scale=_scale)
_scale = "a byte-level LSTM of 148k weights on 1.2 MB of Wikipedia; the paper: LSTMs of 20M and 66M on PTB"
_text = functools.partial(Every, scale=_scale)

CLAIMS = [
    Claim(
        "gradual-large-sparse",
        "At an equal number of non-zero weights a large pruned network beats a small dense one (CNN).",
        "MobileNet: 69.5 against 68.4 %, 67.7 against 63.7 %, 61.8 against 50.6 %",
        _images(
            tuple(_gap(f"cubic non-zeros of {width:g}", f"small-dense width {width:g}") for width in WIDTHS),
            control="a small dense network, as many non-zeros",
            quantity="accuracy, large-sparse minus small-dense",
        ),
        paper_effect=0.011,
    ),
    Claim(
        "gradual-large-sparse-lstm",
        "At an equal number of non-zero weights a large pruned network beats a small dense one (LSTM).",
        "PTB perplexity with about 4.6M: 115.3 small dense, about 83.9 medium at 80 %",
        _text(
            tuple(_lstm_gap(f"cubic non-zeros of {h}", f"small-dense hidden {h}") for _, h in SMALL_LSTMS),
            BELOW_ONE,
            "any",
            control="a small dense LSTM with as many non-zeros",
            quantity="bits per byte, large-sparse / small-dense",
        ),
        paper_effect=0.06,
    ),
    Claim(
        "gradual-tenfold",
        "Nine of ten weights can go with little loss.",
        "medium LSTM on PTB: perplexity 83.37 to 87.86 at 90 %, 1.2 % in the logarithm",
        _text(
            (_lstm_gap("cubic 90%", "dense"),),
            Bound(high=1.03),
            Bound(high=1.1),
            control="the same LSTM, dense",
            quantity="bits per byte at 90 % sparsity / dense",
        ),
    ),
    Claim(
        "gradual-bytes",
        "The large pruned network still wins when its mask is counted: at equal bytes.",
        "not reported (tables count non-zeros)",
        _images(  # values of 32 bits and a bit mask
            tuple(_gap(f"cubic bytes of {width:g}", f"small-dense width {width:g}") for width in WIDTHS[:2]),
            control="a small dense network of as many bytes",
            quantity="accuracy, large-sparse minus small-dense at equal bytes",
        ),
    ),
    Claim(
        "gradual-cubic",
        "The cubic schedule beats a straight line.",
        "not reported; the paper motivates the curve",
        _images(
            (_gap("cubic 95%", "linear 95%"),),
            control="the same with exponent 1",
            quantity="accuracy, cubic minus linear",
        ),
    ),
    Claim(
        "gradual-one-shot",
        "Pruning step by step beats pruning at once with the same training.",
        "not reported for equal training",
        _images(  # the cut comes at 40 % of the run, which leaves the rest to recover
            (_gap("cubic 95%", "one-shot 95%"),),
            control="one cut, same steps",
            quantity="accuracy, cubic minus one-shot",
        ),
    ),
    Claim(
        "gradual-uniform",
        "The same sparsity in every layer does as well as ranking all weights together.",
        "translation: the layer-wise form was best on average (a secondary source)",
        _images(
            tuple(_gap(f"cubic non-zeros of {width:g}", f"global non-zeros of {width:g}") for width in WIDTHS),
            bound=Bound(low=-0.005),
            control="one ranking for all weights",
            quantity="accuracy, layer-wise minus global",
        ),
    ),
]


# -- one training --


def build(arm: Arm, seed: int) -> nn.Module:
    """The untrained network of an arm; the Llama is the shipped checkpoint."""
    torch.manual_seed(seed)
    if arm.network == RESNET:
        return resnet(1.0 if arm.small is None else WIDTHS[arm.small])
    if arm.network == LSTM:
        embedding, hidden = LARGE_LSTM if arm.small is None else SMALL_LSTMS[arm.small]
        return LSTMLanguageModel(embedding=embedding, hidden=hidden)
    return small.load("llama-small")


def recipe_for(arm: Arm, size: Size, lr: float, seed: int) -> Recipe:
    """The same for all arms of a network but for the learning rate."""
    steps = {RESNET: size.resnet, LSTM: size.lstm, LLAMA: size.llama}[arm.network]
    precision = "fp32" if arm.network == RESNET else "bf16"
    return Recipe(steps, lr=lr, weight_decay=0.05, warmup=steps // 20, clip=1.0, precision=precision, seed=seed)


def pruning_for(arm: Arm, model: nn.Module, steps: int) -> GradualMagnitude | None:
    """The schedule of an arm, its sparsity worked out from what the model may keep."""
    if arm.budget is None:
        return None
    kind, value = arm.budget
    if kind == "sparsity":
        sparsity = value
    else:
        reference = build(replace(arm, budget=None, small=int(value)), 0)
        if kind == "nonzeros":
            sparsity = sparsity_for(model, sum(p.numel() for p in reference.parameters()))
        else:
            sparsity = _sparsity_at_bytes(model, model_storage(reference).dense)
    options = {"updates": 12, **arm.pruning}
    first, last = (round(place * steps) for place in arm.place)
    frequency = max(1, (last - first) // options["updates"])
    return GradualMagnitude(sparsity, start=last - options["updates"] * frequency, frequency=frequency, **options)


def _sparsity_at_bytes(model: nn.Module, wanted: int) -> float:
    """The sparsity at which bit mask, live values and the dense rest take that many bytes."""
    total = sum(p.numel() for p in model.parameters())
    empty = sparsity_for(model, total - 1)  # one weight less: how much sparsity a weight is
    prunable = round(1 / empty)
    rest = model_storage(model).dense - 4 * prunable
    return 1 - (wanted - rest - prunable / 8) / 4 / prunable


def measure(job: Job) -> Iterator[Row]:
    """Train one arm: its quality and what it takes to store it; for the first seed its curve, masks and images as well."""
    assert job.rate is not None
    arm, size = job.arm, SIZES[job.profile]
    model = build(arm, job.seed)
    recipe = recipe_for(arm, size, job.rate, job.seed)
    pruning = pruning_for(arm, model, recipe.steps)
    hook = None if pruning is None else pruning.attach(model, recipe)
    loss = cross_entropy_loss if arm.network == RESNET else language_model_loss
    start = time.process_time()
    hooks = [] if hook is None else [hook]
    history = train(model, _training_data(arm, job.seed), loss, recipe, after_step=hooks, progress=False)
    seconds = time.process_time() - start
    stored = model_storage(model)
    shown = job.split == "test" and job.seed == SEEDS[0]
    benched = shown and arm.network == RESNET and arm.name.startswith(ON_BENCH)
    updates = [] if hook is None else hook.updates
    if hook is not None:
        # packed layers compute the same, and take the bytes that the bench counts
        _ = hook.export() if benched else bake(model)
    if arm.network == RESNET:
        held_out = images("mnist", job.split)
        held_out = held_out if size.test is None else held_out.take(size.test, seed=0)
        scores = classify(model, held_out, progress=False)
        quality = {"mean loss": float(scores.loss.mean()), "accuracy": scores.accuracy}
    else:
        quality = {"bits per byte": _bits_per_byte(job, model, size)}
    if job.split == "validation":  # by loss, because accuracy is too coarse to choose by
        yield Row("validation", next(iter(quality.values())))
        return
    yield from (Row(metric, value) for metric, value in quality.items())
    yield from map(Row, ("nonzeros", "dense bytes"), (stored.nonzeros, stored.dense))
    yield from map(Row, ("bitmask bytes", "csr bytes", "cpu seconds"), (stored.bitmask, stored.csr, seconds))
    if shown:
        yield from curves(history, " training", every=max(1, recipe.steps // 50))
        for update in updates:
            for metric in ("sparsity", "live", "removed", "revived"):
                yield Row(metric, getattr(update, metric), str(update.step), " masks")
    if benched:
        yield from score_rows(scores, nbytes=footprint(model).bytes, flops=sum(flops(model, held_out).values()))


def _training_data(arm: Arm, seed: int) -> Any:
    if arm.network == RESNET:
        rows = images("mnist", "train")
        return batches(rows.pixels, rows.labels, batch_size=50, seed=seed)
    if arm.network == LSTM:
        ids, _ = windows("wikipedia", "calibration", 64)
        return batches(ids, batch_size=32, seed=seed)
    ids, _ = windows("wikipedia", "calibration", 128, small.tokenizer())
    return batches(ids, batch_size=8, seed=seed)


def _bits_per_byte(job: Job, model: nn.Module, size: Size) -> float:
    tokenizer, length = (None, 256) if job.arm.network == LSTM else (small.tokenizer(), 128)
    ids, units = windows("wikipedia", job.split, length, tokenizer)
    step = max(1, len(ids) // size.windows)  # spread over all documents
    return bits_per_byte(model, ids[::step], units[::step], tokenizer).value


def _data() -> dict[str, str]:
    llama = wheels.sha256(small.path("llama-small") / "model.safetensors")
    return {"mnist": dataset_hash("mnist"), "wikipedia": text.corpus_hash("wikipedia"), "llama-small": llama}


STUDY = Study(
    slug="gradual_magnitude",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=seeds,
    data=_data,
    rates=lambda arm: RATES[arm.network],
    tuned_as=tuned_as,
    score=lambda values: -values["validation"],
    kind=lambda arm: f"{arm.name.split()[0]} {arm.network}",
)
