"""The experiment behind the gradual-magnitude chapter: with so many non-zero weights to spend, prune a large network or
train a small one?

A residual network on MNIST and a byte-level LSTM on Wikipedia, each at one large and three small sizes. Large networks
are pruned during training to exactly the non-zero numbers of a small one, biases and norms included. All arms of a
network have the same steps, batches and grid of three learning rates, chosen on validation data with a seed that is not
used again. Extras: schedules and structures at one sparsity, and a small Llama pruned from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.masks import bake
from refimpl.lab import wheels
from refimpl.lab.data import text
from refimpl.lab.data.images import dataset_hash, images
from refimpl.lab.data.windows import windows
from refimpl.lab.measure.bits import bits_per_byte, language_model_loss
from refimpl.lab.measure.classify import add_scores, classify, cross_entropy_loss, flops
from refimpl.lab.measure.metrics import footprint
from refimpl.lab.measure.statistics import seeds_ratio, t_interval
from refimpl.lab.models import small
from refimpl.lab.models.classifiers import resnet
from refimpl.lab.models.lstm import LSTMLanguageModel
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.records import Record, Results
from refimpl.pruning.gradual_magnitude import GradualMagnitude, MaskUpdates, model_storage, sparsity_for

DEPENDS = [
    "refimpl.pruning.gradual_magnitude",
    "refimpl.core.train.loop",
    "refimpl.core.train.masks",
    "refimpl.lab.models.classifiers",
    "refimpl.lab.data.images",
    "refimpl.lab.models.lstm",
    "refimpl.lab.data.text",
]

SLUG = "gradual_magnitude"
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 0
RESNET, LSTM, LLAMA = "mnist resnet", "wikipedia lstm", "wikipedia llama"
# A pilot on validation data, at other lengths, put the best rates of the first two at 1e-2 or more; the Llama is
# trained already and wants less.
RATES = {RESNET: (3e-3, 1e-2, 3e-2), LSTM: (3e-3, 1e-2, 3e-2), LLAMA: (3e-4, 1e-3, 3e-3)}
WIDTHS = (0.5, 0.25, 0.125)  # of the small residual networks
SMALL_LSTMS = ((24, 48), (12, 28), (8, 14))  # embedding, hidden
LARGE_LSTM = (64, 128)
# as many as one chart can tell apart
ON_BENCH = ("dense", "small-dense", "cubic", "global", "one-shot", "random", "2:4")
ABLATION = 0.95  # sparsity at which schedules are compared
RESNET_SCALE = "a residual network of 78k weights on 3500 digits; the paper: MobileNet and InceptionV3 on ImageNet"
LSTM_SCALE = "a byte-level LSTM of 148k weights on 1.2 MB of Wikipedia; the paper: LSTMs of 20M and 66M on PTB"


@dataclass(frozen=True)
class Size:
    """What a profile spends: steps of each network, rows of the data (None: all), documents measured."""

    resnet: int
    lstm: int
    llama: int
    test: int | None
    windows: int


SIZES = {
    "study": Size(1000, 1200, 400, None, 400),
    "live": Size(300, 200, 40, None, 60),
    "quick": Size(20, 20, 20, 50, 8),
}


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        name: in the records; its first word is the method on the classifier bench.
        network: `RESNET`, `LSTM` or `LLAMA`.
        small: index of a small size that is trained dense; None trains the large one.
        budget: what the large network may keep: the index of the small size with as many non-zeros ("nonzeros") or
            bytes ("bytes"); or a sparsity ("sparsity").
        pruning: options of `GradualMagnitude` other than the schedule's place in the run.
        place: where pruning begins and ends, as fractions of the run.
        tuned_as: the arm whose learning rate this one shares; its own by default.
    """

    name: str
    network: str
    small: int | None = None
    budget: tuple[str, float] | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    place: tuple[float, float] = (0.1, 0.7)
    tuned_as: str | None = None


def _sparse(index: int) -> str:
    return f"cubic at the non-zeros of {index}"


def _resnet_arms() -> list[Arm]:
    arms = [Arm("dense", RESNET)]
    for index, width in enumerate(WIDTHS):
        arms.append(Arm(f"small-dense width {width:g}", RESNET, small=index))
        arms.append(Arm(f"cubic non-zeros of {width:g}", RESNET, budget=("nonzeros", index)))
        arms.append(
            Arm(
                f"global non-zeros of {width:g}",
                RESNET,
                budget=("nonzeros", index),
                pruning={"scope": "global"},
                tuned_as=f"cubic non-zeros of {width:g}",
            )
        )
    for index, width in enumerate(WIDTHS[:2]):  # a bit mask alone is larger than the smallest network
        arms.append(
            Arm(f"cubic bytes of {width:g}", RESNET, budget=("bytes", index), tuned_as=f"cubic non-zeros of {width:g}")
        )
    return arms


def _schedule_arms() -> list[Arm]:
    """Ways of getting to one sparsity; all with the learning rate tuned for the cubic schedule "
    "nearest to it."""
    ways: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
        "cubic": ({}, (0.1, 0.7)),
        "linear": ({"exponent": 1.0}, (0.1, 0.7)),
        "one-shot": ({"updates": 1}, (0.1, 0.4)),
        "last-moment": ({"updates": 1}, (0.99, 1.0)),
        "random": ({"ranking": "random"}, (0.1, 0.7)),
        "global": ({"scope": "global"}, (0.1, 0.7)),
        "blocks-4x1": ({"structure": "4x1"}, (0.1, 0.7)),
        "blocks-4x4": ({"structure": "4x4"}, (0.1, 0.7)),
    }
    shared = "cubic non-zeros of 0.25"
    arms = [
        Arm(f"{name} {ABLATION:.0%}", RESNET, None, ("sparsity", ABLATION), options, place, shared)
        for name, (options, place) in ways.items()
    ]
    # the stem's kernel has 49 inputs, which groups of four do not divide: it stays dense in both arms
    dense_stem = {"overrides": {"embedder": 0.0}}
    for name, options in (("2:4", {"structure": "2:4"}), ("cubic", {})):
        arms.append(
            Arm(
                f"{name} 50% behind a dense stem",
                RESNET,
                None,
                ("sparsity", 0.5),
                {**options, **dense_stem},
                (0.1, 0.7),
                "cubic non-zeros of 0.5",
            )
        )
    return arms


def _lstm_arms() -> list[Arm]:
    arms = [Arm("dense", LSTM)]
    for index, (_, hidden) in enumerate(SMALL_LSTMS):
        arms.append(Arm(f"small-dense hidden {hidden}", LSTM, small=index))
        arms.append(Arm(f"cubic non-zeros of {hidden}", LSTM, budget=("nonzeros", index)))
    arms.append(Arm("cubic 90%", LSTM, budget=("sparsity", 0.9), tuned_as=f"cubic non-zeros of {SMALL_LSTMS[1][1]}"))
    return arms


def _llama_arms() -> list[Arm]:
    return [
        Arm("trained-on", LLAMA),
        Arm("cubic 80%", LLAMA, budget=("sparsity", 0.8)),
        Arm("one-shot 80%", LLAMA, budget=("sparsity", 0.8), pruning={"updates": 1}, place=(0.0, 0.025)),
    ]


# -- the rules, written before the run --


def _over_seeds(results: Results, arm: str, network: str, metric: str) -> np.ndarray:
    return np.array([results.values(arm, network, seed, metric=metric)[""] for seed in SEEDS])


def _verdict(good: Sequence[bool]) -> Verdict:
    return Verdict.HOLDS if all(good) else Verdict.PARTLY if any(good) else Verdict.DOES_NOT_HOLD


def _accuracy_gaps(
    pairs: Sequence[tuple[str, str]], control: str, quantity: str, margin: float = 0.0
) -> Callable[[Results], Outcome]:
    """Accuracy of the first of each pair minus the second; good where the lower end lies above -margin."""

    def outcome(results: Results) -> Outcome:
        gaps = [
            t_interval(_over_seeds(results, a, RESNET, "accuracy") - _over_seeds(results, b, RESNET, "accuracy"))
            for a, b in pairs
        ]
        worst = min(gaps, key=lambda gap: gap.low)
        label = f"worst of {len(gaps)}: {quantity}" if len(gaps) > 1 else quantity
        return Outcome.of(
            worst, _verdict([gap.low > -margin for gap in gaps]), scale=RESNET_SCALE, control=control, quantity=label
        )

    return outcome


def _lstm_sizes(results: Results) -> Outcome:
    gaps = [
        seeds_ratio(
            _over_seeds(results, f"cubic non-zeros of {hidden}", LSTM, "bits per byte"),
            _over_seeds(results, f"small-dense hidden {hidden}", LSTM, "bits per byte"),
        )
        for _, hidden in SMALL_LSTMS
    ]
    worst = max(gaps, key=lambda gap: gap.high)
    return Outcome.of(
        worst,
        _verdict([gap.high < 1 for gap in gaps]),
        scale=LSTM_SCALE,
        control="a small dense LSTM with as many non-zeros",
        quantity="worst of 3: bits per byte, large-sparse / small-dense",
    )


def _tenfold(results: Results) -> Outcome:
    gap = seeds_ratio(
        _over_seeds(results, "cubic 90%", LSTM, "bits per byte"), _over_seeds(results, "dense", LSTM, "bits per byte")
    )
    verdict = Verdict.HOLDS if gap.high < 1.03 else Verdict.PARTLY if gap.high < 1.1 else Verdict.DOES_NOT_HOLD
    return Outcome.of(
        gap,
        verdict,
        scale=LSTM_SCALE,
        control="the same LSTM, dense",
        quantity="bits per byte at 90 % sparsity / dense",
    )


_SIZES = [(f"cubic non-zeros of {width:g}", f"small-dense width {width:g}") for width in WIDTHS]
_OVER = "t interval over five seeds"

CLAIMS = [
    Claim(
        "gradual-large-sparse",
        "At an equal number of non-zero weights a large pruned network beats a small dense one (CNN).",
        "MobileNet: 69.5 against 68.4 %, 67.7 against 63.7 %, 61.8 against 50.6 %",
        _accuracy_gaps(_SIZES, "a small dense network, as many non-zeros", "accuracy, large-sparse minus small-dense"),
        "Residual network on MNIST, width 1 pruned to the non-zeros of widths 0.5, 0.25 and 0.125, test "
        "accuracy, "
        f"large-sparse minus small-dense, {_OVER}: holds if all three lie above 0, partly if some do.",
        paper_effect=0.011,
    ),
    Claim(
        "gradual-large-sparse-lstm",
        "At an equal number of non-zero weights a large pruned network beats a small dense one (LSTM).",
        "PTB perplexity with about 4.6M: 115.3 small dense, about 83.9 medium at 80 %",
        _lstm_sizes,
        "Byte-level LSTM pruned to the non-zeros of three smaller ones (22, 10 and 5 % of it), bits per "
        "byte on test "
        f"articles, large-sparse / small-dense, {_OVER} of the logarithm: holds if all three lie below "
        "1, partly if some do.",
        paper_effect=0.06,
    ),
    Claim(
        "gradual-tenfold",
        "Nine of ten weights can go with little loss.",
        "medium LSTM on PTB: perplexity 83.37 to 87.86 at 90 %, 1.2 % in the logarithm",
        _tenfold,
        f"Byte-level LSTM at 90 %, bits per byte / dense, {_OVER} of the logarithm: holds if the upper "
        "end is below 1.03, "
        "partly if below 1.1.",
    ),
    Claim(
        "gradual-bytes",
        "The large pruned network still wins when its mask is counted: at equal bytes.",
        "not reported (tables count non-zeros)",
        _accuracy_gaps(
            [(f"cubic bytes of {width:g}", f"small-dense width {width:g}") for width in WIDTHS[:2]],
            "a small dense network of as many bytes",
            "accuracy, large-sparse minus small-dense at equal bytes",
        ),
        "Residual network with 32-bit values and a bit mask, pruned to the bytes of widths 0.5 and "
        "0.25, accuracy minus that of "
        f"the small dense network, {_OVER}: holds if both lie above 0, partly if one does.",
    ),
    Claim(
        "gradual-cubic",
        "The cubic schedule beats a straight line.",
        "not reported; the paper motivates the curve",
        _accuracy_gaps([("cubic 95%", "linear 95%")], "the same with exponent 1", "accuracy, cubic minus linear"),
        f"Residual network at 95 %, accuracy, cubic minus linear, {_OVER}: holds if it lies above 0.",
    ),
    Claim(
        "gradual-one-shot",
        "Pruning step by step beats pruning at once with the same training.",
        "not reported for equal training",
        _accuracy_gaps([("cubic 95%", "one-shot 95%")], "one cut, same steps", "accuracy, cubic minus one-shot"),
        "Residual network at 95 %, accuracy, cubic minus one cut at 40 % of the run with the rest to recover, "
        f"{_OVER}: holds if it lies above 0.",
    ),
    Claim(
        "gradual-uniform",
        "The same sparsity in every layer does as well as ranking all weights together.",
        "translation: the layer-wise form was best on average (a secondary source)",
        _accuracy_gaps(
            [(f"cubic non-zeros of {width:g}", f"global non-zeros of {width:g}") for width in WIDTHS],
            "one ranking for all weights",
            "accuracy, layer-wise minus global",
            margin=0.005,
        ),
        "Residual network at the non-zeros of widths 0.5, 0.25 and 0.125, accuracy, layer-wise minus global, "
        f"{_OVER}: holds if all three lower ends lie above -0.005, partly if some do.",
    ),
]


# -- trainings --


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: Arm
    seed: int
    lr: float
    size: Size
    split: str = "test"


def build(arm: Arm, seed: int) -> nn.Module:
    """The untrained network of an arm; the Llama is the shipped checkpoint.

    Example:
        >>> sum(p.numel() for p in build(Arm("small", RESNET, small=2), 0).parameters())
        1464
    """
    torch.manual_seed(seed)
    if arm.network == RESNET:
        return resnet(1.0 if arm.small is None else WIDTHS[arm.small])
    if arm.network == LSTM:
        embedding, hidden = LARGE_LSTM if arm.small is None else SMALL_LSTMS[arm.small]
        return LSTMLanguageModel(embedding=embedding, hidden=hidden)
    return small.load("llama-small")


def recipe_for(arm: Arm, size: Size, lr: float, seed: int) -> Recipe:
    """The same for all arms of a network but for the learning rate.

    Example:
        >>> recipe_for(Arm("dense", RESNET), SIZES["study"], 3e-3, 1).steps
        1000
    """
    steps = {RESNET: size.resnet, LSTM: size.lstm, LLAMA: size.llama}[arm.network]
    precision = "fp32" if arm.network == RESNET else "bf16"
    return Recipe(steps, lr=lr, weight_decay=0.05, warmup=steps // 20, clip=1.0, precision=precision, seed=seed)


def pruning_for(arm: Arm, model: nn.Module, steps: int) -> GradualMagnitude | None:
    """The schedule of an arm, its sparsity worked out from what the model may keep.

    Example:
        >>> arm = Arm("half", RESNET, budget=("sparsity", 0.5))
        >>> pruning_for(arm, build(arm, 0), 1000).last_step
        700
    """
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


def trained(job: Job) -> list[Record]:
    """Train and measure one arm."""
    arm, size = job.arm, job.size
    results = Results("", {"paper": SLUG})
    model = build(arm, job.seed)
    recipe = recipe_for(arm, size, job.lr, job.seed)
    pruning = pruning_for(arm, model, recipe.steps)
    hook = None if pruning is None else pruning.attach(model, recipe)
    start = time.process_time()
    loss = cross_entropy_loss if arm.network == RESNET else language_model_loss
    hooks = [] if hook is None else [hook]
    history = train(model, _data(arm, size, job.seed), loss, recipe, after_step=hooks, progress=False)
    seconds = time.process_time() - start
    stored = model_storage(model)
    benched = job.split == "test" and job.seed == SEEDS[0] and arm.network == RESNET and arm.name.startswith(ON_BENCH)
    if hook is not None:
        _record_masks(results, job, hook)
        # packed layers compute the same, and take the bytes that the bench counts
        _ = hook.export() if benched else bake(model)
    values = _measure(job, model)
    values |= {
        "nonzeros": stored.nonzeros,
        "dense bytes": stored.dense,
        "bitmask bytes": stored.bitmask,
        "csr bytes": stored.csr,
        "cpu seconds": seconds,
    }
    results.add(*(Record(SLUG, arm.name, arm.network, job.seed, "", name, float(v)) for name, v in values.items()))
    if job.seed == SEEDS[0] and job.split == "test":
        results.add_history(arm.name, f"{arm.network} training", job.seed, history, every=max(1, recipe.steps // 50))
    if benched:
        _record_images(results, job, model)
    return list(results.records())


def _data(arm: Arm, size: Size, seed: int) -> Any:
    if arm.network == RESNET:
        rows = images("mnist", "train")
        return batches(rows.pixels, rows.labels, batch_size=50, seed=seed)
    if arm.network == LSTM:
        ids, _ = windows("wikipedia", "calibration", 64)
        return batches(ids, batch_size=32, seed=seed)
    ids, _ = windows("wikipedia", "calibration", 128, small.tokenizer())
    return batches(ids, batch_size=8, seed=seed)


def _measure(job: Job, model: nn.Module) -> dict[str, float]:
    arm, size = job.arm, job.size
    if arm.network == RESNET:
        rows = images("mnist", job.split)
        scores = classify(model, rows if size.test is None else rows.take(size.test, seed=0), progress=False)
        return {"accuracy": scores.accuracy, "mean loss": float(scores.loss.mean())}
    tokenizer = None if arm.network == LSTM else small.tokenizer()
    ids, units = windows("wikipedia", job.split, 256 if arm.network == LSTM else 128, tokenizer)
    step = max(1, len(ids) // size.windows)  # spread over all documents
    found = bits_per_byte(model, ids[::step], units[::step], tokenizer)
    return {"bits per byte": found.value}


def _record_masks(results: Results, job: Job, hook: MaskUpdates) -> None:
    """The trace of one seed: what each update removed and brought back."""
    if job.seed == SEEDS[0] and job.split == "test":
        for update in hook.updates:
            for metric in ("sparsity", "live", "removed", "revived"):
                value = float(getattr(update, metric))
                results.add(
                    Record(SLUG, job.arm.name, f"{job.arm.network} masks", job.seed, str(update.step), metric, value)
                )


def _record_images(results: Results, job: Job, model: nn.Module) -> None:
    """Image by image, as the classifier bench reads it."""
    rows = images("mnist", "test")
    rows = rows if job.size.test is None else rows.take(job.size.test, seed=0)
    scores = classify(model, rows, progress=False)
    cost = sum(flops(model, rows).values())
    add_scores(results, job.arm.name, RESNET, job.seed, scores, nbytes=footprint(model).bytes, flops=cost)


# -- the run --


def arms_of(profile: str) -> list[Arm]:
    """What a profile trains.

    Example:
        >>> len(arms_of("study")), [arm.network for arm in arms_of("quick")]
        (32, ['mnist resnet', 'mnist resnet', 'wikipedia lstm', 'wikipedia llama'])
    """
    if profile == "study":
        return [*_resnet_arms(), *_schedule_arms(), *_lstm_arms(), *_llama_arms()]
    if profile == "live":
        return [*_resnet_arms()[:7], *_schedule_arms()[:3], *_lstm_arms()[:5]]
    return [_resnet_arms()[1], _schedule_arms()[5], _lstm_arms()[2], _llama_arms()[1]]


def _tune(results: Results, arms: Sequence[Arm], size: Size) -> dict[str, float]:
    """The learning rate of every arm, by validation loss (accuracy is too coarse to choose by)."""
    own = [arm for arm in arms if arm.tuned_as is None]
    jobs = [Job(arm, TUNING_SEED, lr, size, "validation") for arm in own for lr in RATES[arm.network]]
    todo = [job for job in jobs if not results.has(_tuning(job.arm, job.lr), f"{job.arm.network} validation")]
    bar = tqdm(total=len(todo), desc=f"{SLUG}: learning rates", unit="training")
    with bar:
        for job, records in in_processes(trained, todo):
            values = {record.metric: record.value for record in records}
            value = values["mean loss"] if job.arm.network == RESNET else values["bits per byte"]
            name, network = _tuning(job.arm, job.lr), f"{job.arm.network} validation"
            results.add(Record(SLUG, name, network, TUNING_SEED, "", "validation", value))
            results.save()
            bar.update()
    chosen: dict[str, float] = {}
    for arm in own:
        scores = {
            lr: results.values(_tuning(arm, lr), f"{arm.network} validation", TUNING_SEED, metric="validation")[""]
            for lr in RATES[arm.network]
        }
        chosen[f"{arm.network} {arm.name}"] = min(scores, key=scores.__getitem__)
    return {f"{arm.network} {arm.name}": chosen[f"{arm.network} {arm.tuned_as or arm.name}"] for arm in arms}


def _tuning(arm: Arm, lr: float) -> str:
    return f"{arm.name} at {lr:g}"


def _seeds(arm: Arm, profile: str) -> tuple[int, ...]:
    if profile != "study":
        return SEEDS[:1]
    named = {"cubic 95%", "linear 95%", "one-shot 95%"}
    extra = arm.network == LLAMA or (arm in _schedule_arms() and arm.name not in named)
    return SEEDS[:3] if extra else SEEDS


def run(out: Path, profile: str = "study") -> Results:
    """Train every arm that the results file lacks, and judge the claims.

    Args:
        out: results file; an interrupted run goes on where it stopped, training by training.
        profile: "study" (recorded; the rules must be committed), "live" or "quick".
    """
    size, arms = SIZES[profile], arms_of(profile)
    data = {"mnist": dataset_hash("mnist"), "wikipedia": text.corpus_hash("wikipedia")}
    data["llama-small"] = wheels.sha256(small.path("llama-small") / "model.safetensors")
    results = Results.start(
        out, paper=SLUG, study=__name__, depends=DEPENDS, data=data, profile=profile, provisional=profile != "study"
    )
    if profile == "study":
        rates = _tune(results, arms, size)
    else:
        rates = {f"{arm.network} {arm.name}": RATES[arm.network][1] for arm in arms}
    jobs = [Job(arm, seed, rates[f"{arm.network} {arm.name}"], size) for arm in arms for seed in _seeds(arm, profile)]
    jobs.sort(key=lambda job: job.seed)  # whole seeds first: an interrupted study is a small study
    todo = [job for job in jobs if not results.has(job.arm.name, job.arm.network, job.seed)]
    bar = tqdm(total=len(todo), desc=f"{SLUG} ({profile})", unit="training")
    with bar:
        for _, records in in_processes(trained, todo, 1 if profile == "quick" else None):
            results.add(*records)
            results.save()
            bar.update()
    if profile == "study":
        results.claims = judge(results, CLAIMS)
    results.save()
    return results
