"""The experiment behind the layer-wise calibration chapter: weights and activations of few bits from few images.

Three shipped classifiers (residual networks on MNIST and digits, a vision transformer on MNIST) are quantised from
training images without labels; what is measured is the divergence (KL) of the quantised network from the float one, and
accuracy, on test images. Arms that train have the same number of updates and the same grid of three rates, chosen
on the validation images. SmolLM2 is quantised by weights alone, beside rounding and GPTQ.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from refimpl import GPTQ, RTN, compress
from refimpl.baselines.activations import QuantizeActivations
from refimpl.baselines.adaround import AdaRound
from refimpl.baselines.qat import all_logits, divergence, fine_tune
from refimpl.core.compress.fold import FoldedNorms, fold_batch_norms
from refimpl.core.compress.method import Method
from refimpl.core.train.loop import Recipe
from refimpl.lab import models, wheels
from refimpl.lab.data import text
from refimpl.lab.data.images import ImageSet, dataset_hash, images
from refimpl.lab.measure.classify import Scores, add_scores, bit_operations, classify, flops, kl
from refimpl.lab.measure.metrics import footprint, perplexity
from refimpl.lab.measure.statistics import Interval, compare, difference, paired_bootstrap, seeds_ratio
from refimpl.lab.models import small
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.jobs import in_processes
from refimpl.lab.study.precision import declares
from refimpl.lab.study.records import Record, Results
from refimpl.quantization.layerwise_calibration import (
    AdaQuant,
    allocate_bits,
    assemble,
    bytes_saved,
    retune_batch_norms,
    sensitivity,
    tune_biases,
)

# As in the EoRA study, the drivers (core.compress, core.whole) are left out: tests pin their order of work.
DEPENDS = [
    "refimpl.quantization.layerwise_calibration.adaquant",
    "refimpl.quantization.layerwise_calibration.allocation",
    "refimpl.quantization.layerwise_calibration.tuning",
    "refimpl.baselines.activations",
    "refimpl.baselines.adaround",
    "refimpl.baselines.gptq",
    "refimpl.baselines.obs",
    "refimpl.baselines.qat",
    "refimpl.baselines.reconstruction",
    "refimpl.baselines.rtn",
    "refimpl.core.compress.fold",
    "refimpl.core.layers.grid",
    "refimpl.core.layers.activation",
    "refimpl.core.layers.packed",
    "refimpl.core.train.loop",
    "refimpl.core.layers.quantizer",
    "refimpl.core.compress.reconstruct",
    "refimpl.core.compress.stats",
    "refimpl.lab.measure.classify",
    "refimpl.lab.data.images",
    "refimpl.lab.measure.metrics",
    "refimpl.lab.data.text",
]

SLUG = "layerwise_calibration"
MAIN = "digits resnet"
SEEDS = (1, 2, 3, 4, 5)  # draws of the calibration images behind the rules; 0 is the draw of everything else
IMAGES = (10, 50, 200)
SCALE = "a residual network of 78k weights on 8x8 digits; the paper: ResNet-50 on ImageNet, 1000 images"
RATES: dict[str, tuple[float, ...]] = {
    "AdaQuant": (0.3, 1.0, 3.0),
    "AdaRound": (0.03, 0.1, 0.3),
    "QAT": (0.003, 0.01, 0.03),
}
BUDGETS = (0.25, 0.5, 0.75)  # of all that going from 4 to 2 bits could save
LANGUAGE_RATES = {"AdaQuant": (0.5, 1.0, 2.0), "AdaRound": (0.03, 0.1, 0.3)}


@dataclass(frozen=True)
class Size:
    """What a profile spends."""

    iterations: int
    language_iterations: int
    test: int | None  # test images, None for all
    layers: int | None  # blocks of SmolLM2
    calibration: tuple[int, int]  # sequences, length
    windows: tuple[int, int]


SIZES = {
    "study": Size(250, 60, None, None, (32, 512), (24, 512)),
    "live": Size(100, 20, 500, 4, (8, 256), (8, 256)),
    "quick": Size(4, 2, 40, 1, (2, 32), (2, 32)),
}


# -- the rules, written before the run --


def _divergences(results: Results, arm: str, bits: int, count: int, condition: str = MAIN) -> np.ndarray:
    """Mean test divergence of an arm for each draw of the calibration images."""
    name = f"{arm} W{bits}A{bits}, {count} images"
    return np.array([results.values(name, condition, seed, metric="kl")[""] for seed in SEEDS])


def _calibration_divergences(results: Results, arm: str, bits: int, count: int) -> np.ndarray:
    name = f"{arm} W{bits}A{bits}, {count} images"
    return np.array([results.values(name, MAIN, seed, metric="calibration kl")[""] for seed in SEEDS])


def _all_below_one(gaps: Sequence[Interval], control: str, quantity: str, scale: str = SCALE) -> Outcome:
    """Holds if every interval lies below 1, partly if some do; the number shown is the least favourable."""
    below = sum(gap.high < 1 for gap in gaps)
    verdict = Verdict.HOLDS if below == len(gaps) else Verdict.PARTLY if below else Verdict.DOES_NOT_HOLD
    worst = max(gaps, key=lambda gap: gap.high)
    return Outcome.of(worst, verdict, scale=scale, control=control, quantity=f"worst of {len(gaps)}: {quantity}")


def _against(ours: str, theirs: str, cases: Sequence[tuple[int, int]], control: str) -> Callable[[Results], Outcome]:
    """Ratio of test divergences of two arms over the draws, for each (bits, images)."""

    def outcome(results: Results) -> Outcome:
        gaps = [seeds_ratio(_divergences(results, ours, *case), _divergences(results, theirs, *case)) for case in cases]
        return _all_below_one(gaps, control, f"test divergence, {ours} / {theirs}")

    return outcome


def _gap(results: Results) -> Outcome:
    gaps = []
    for count in (10, 50):
        ours, theirs = (
            _divergences(results, arm, 2, count) / _calibration_divergences(results, arm, 2, count)
            for arm in ("AdaQuant", "QAT")
        )
        gaps.append(seeds_ratio(ours, theirs))
    return _all_below_one(
        gaps, "end-to-end fine-tuning on the same images", "(test / calibration divergence), AdaQuant / QAT"
    )


def _four_bits(results: Results) -> Outcome:
    losses = []
    for condition in CONDITIONS:
        dense = results.values("dense", condition, metric="correct")
        ours = results.values("AdaQuant-tuned W4A4, 50 images", condition, metric="correct")
        losses.append(paired_bootstrap(list(dense.values()), list(ours.values()), statistic=difference))
    small_loss = sum(loss.high < 0.01 for loss in losses)
    verdict = Verdict.HOLDS if small_loss == len(losses) else Verdict.PARTLY if small_loss else Verdict.DOES_NOT_HOLD
    worst = max(losses, key=lambda loss: loss.high)
    return Outcome.of(
        worst,
        verdict,
        control="the float network",
        quantity="worst of 3: accuracy lost at W4A4",
        scale="three small classifiers of digits; the paper: ResNet-50 on ImageNet",
    )


def _program(results: Results) -> Outcome:
    gaps = []
    for budget in BUDGETS:
        chosen, chance = (
            np.array([results.values(f"{arm} {budget:.0%} of the saving", MAIN, s, metric="kl")[""] for s in SEEDS])
            for arm in ("IP", "random-bits")
        )
        gaps.append(seeds_ratio(chosen, chance))
    return _all_below_one(
        gaps, "random allocations that save as much (geometric mean of five)", "test divergence, program / chance"
    )


def _language(rival: str) -> Callable[[Results], Outcome]:
    def outcome(results: Results) -> Outcome:
        gap = compare(
            results.perplexity("AdaQuant 3-bit g64", "wikipedia"), results.perplexity(f"{rival} 3-bit g64", "wikipedia")
        )
        verdict = Verdict.HOLDS if gap.high < 1 else Verdict.DOES_NOT_HOLD
        return Outcome.of(
            gap,
            verdict,
            scale="SmolLM2, 135M weights, 3 bits in groups of 64, weights only",
            control=rival,
            quantity=f"perplexity with AdaQuant / with {rival}",
        )

    return outcome


_SEEDS = "t interval of the logarithm over five draws of the calibration images, digits, residual network"

CLAIMS = [
    Claim(
        "adaquant-four-bits",
        "Weights and activations of 4 bits cost less than one point of accuracy.",
        "ResNet-50: less than 1 point at 4 bits in all but the two smallest layers",
        _four_bits,
        "AdaQuant (sequential) with batch-norm and bias tuning, W4A4, 50 images, three classifiers: "
        "holds if the upper end "
        "of the 95 % interval (paired bootstrap over test images) of the accuracy lost is below 0.01 on "
        "all three; partly if on some.",
        paper_effect=0.01,
    ),
    Claim(
        "adaquant-ranges",
        "Training each layer for its outputs beats measuring ranges.",
        "min-max ranges fail at 4 bits on ImageNet; AdaQuant loses about 4 points (parallel), less in sequence",
        _against("AdaQuant", "min-max", [(3, 50), (2, 50)], "min-max ranges, no training"),
        f"Test divergence, AdaQuant (parallel) / min-max ranges, at W3A3 and W2A2, 50 images, {_SEEDS}: "
        "holds if both lie below 1.",
    ),
    Claim(
        "adaquant-adaround",
        "Letting weights move anywhere beats choosing between rounding up and down.",
        "a figure: AdaQuant above AdaRound at every calibration size",
        _against("AdaQuant-sequential", "AdaRound-sequential", [(3, 50), (2, 50)], "AdaRound, tuned alike"),
        f"Test divergence, AdaQuant / AdaRound, both in sequence, at W3A3 and W2A2, 50 images, {_SEEDS}: "
        "holds if both lie "
        "below 1, partly if one does.",
    ),
    Claim(
        "adaquant-few-images",
        "On few images, training layer by layer beats fine-tuning end to end.",
        "a figure: AdaQuant above end-to-end fine-tuning with KL below about 1000 images",
        _against("AdaQuant", "QAT", [(2, 10), (2, 50)], "end-to-end fine-tuning on the same images"),
        "Test divergence, AdaQuant (parallel) / fine-tuning end to end (QAT), W2A2, 10 and 50 images, "
        f"{_SEEDS}: holds if both "
        "lie below 1, partly if one does.",
    ),
    Claim(
        "adaquant-overfits-less",
        "Small per-layer problems over-fit less than the whole network.",
        "stated; shown by the same figure",
        _gap,
        f"(Test / calibration divergence), AdaQuant (parallel) / QAT, W2A2, 10 and 50 images, {_SEEDS}: "
        "holds if both lie below "
        "1, partly if one does.",
    ),
    Claim(
        "adaquant-sequence",
        "Training layers in sequence, on the inputs that quantised layers give, beats training them in parallel.",
        "0.3 to 1.7 points of accuracy at 4 bits",
        _against("AdaQuant-sequential", "AdaQuant", [(3, 50), (2, 50)], "the same training with float inputs"),
        f"Test divergence, sequential / parallel AdaQuant, W3A3 and W2A2, 50 images, {_SEEDS}: holds if "
        "both lie below 1, "
        "partly if one does.",
    ),
    Claim(
        "adaquant-norms",
        "Measuring batch-norm statistics again repairs what quantisation did to them.",
        "the step that makes the light pipeline work",
        _against("min-max+norms", "min-max", [(3, 50), (2, 50)], "the same network before"),
        "Test divergence after / before batch-norm tuning of min-max ranges, W3A3 and W2A2, 50 images, "
        f"{_SEEDS}: holds if "
        "both lie below 1, partly if one does.",
    ),
    Claim(
        "adaquant-program",
        "An integer program places the bits well.",
        "less than 1 point lost at 13 % of the float size",
        _program,
        "Precisions 2 and 4, AdaQuant (parallel), 50 images, savings of 25, 50 and 75 % of the "
        "possible; test divergence, program "
        f"/ geometric mean of five random allocations that save at least as much, {_SEEDS}: holds if all "
        "three lie below 1, "
        "partly if some do.",
    ),
    Claim(
        "adaquant-language",
        "Layer-wise training beats rounding to nearest, on a language model too.",
        "BERT at 8 bits only; not reported at 3",
        _language("RTN"),
        "SmolLM2, 3-bit weights in groups of 64, perplexity on Wikipedia test articles, AdaQuant / "
        "rounding: holds if the 95 % "
        "interval (paired bootstrap over articles) lies below 1.",
    ),
    Claim(
        "adaquant-gptq",
        "Layer-wise training beats GPTQ, which came later.",
        "not compared (GPTQ: 2022)",
        _language("GPTQ"),
        "As adaquant-language, AdaQuant / GPTQ.",
    ),
]


# -- classifiers --

#: shipped model, dataset
CONDITIONS = {
    "digits resnet": ("resnet-digits", "digits"),
    "mnist resnet": ("resnet-mnist", "mnist"),
    "mnist vit": ("vit-mnist", "mnist"),
}


@dataclass(frozen=True)
class Job:
    """One draw of calibration images for one classifier at one precision, and the arms to run on it."""

    condition: str
    bits: int
    count: int
    seed: int
    arms: tuple[str, ...]
    size: Size
    rates: tuple[tuple[str, float], ...] = ()
    split: str = "test"

    def name(self, arm: str) -> str:
        """Of the arm in the records."""
        return f"{arm} W{self.bits}A{self.bits}, {self.count} images"


@dataclass
class _Bench:
    """What the arms of a job share."""

    job: Job
    dense: nn.Module = field(init=False)
    calibration: ImageSet = field(init=False)
    measured: ImageSet = field(init=False)

    def __post_init__(self) -> None:
        name, dataset = CONDITIONS[self.job.condition]
        self.dense = small.load(name)
        self.calibration = images(dataset, "train").take(self.job.count, seed=self.job.seed)
        measured = images(dataset, self.job.split)
        self.measured = measured if self.job.size.test is None else measured.take(self.job.size.test, seed=0)
        self.target = all_logits(self.dense, self.calibration.pixels)
        self.reference = classify(self.dense, self.measured, progress=False)
        self.rates = {name: values[1] for name, values in RATES.items()} | dict(self.job.rates)
        self.samples = min(50, self.job.count)

    def folded(self) -> tuple[nn.Module, FoldedNorms]:
        model = copy.deepcopy(self.dense)
        return model, fold_batch_norms(model, self.calibration.pixels)

    def compressed(self, *methods: Method, order: str = "parallel") -> tuple[nn.Module, FoldedNorms]:
        model, norms = self.folded()
        for method in methods:
            compress(model, method, self.calibration, order=order, progress=False)
        return model, norms

    def adaquant(self, bits: int, **options: Any) -> AdaQuant:
        options = {"iterations": self.job.size.iterations, "speed": self.rates["AdaQuant"], **options}
        return AdaQuant(bits, bits, samples=self.samples, seed=self.job.seed, **options)

    def adaround(self) -> AdaRound:
        return AdaRound(
            self.job.bits,
            self.job.bits,
            samples=self.samples,
            iterations=self.job.size.iterations,
            lr=self.rates["AdaRound"],
            seed=self.job.seed,
        )

    def tune_norms(self, model: nn.Module, norms: FoldedNorms) -> None:
        if norms.norms:  # a transformer has none
            retune_batch_norms(model, norms, self.calibration)

    def tune_biases(self, model: nn.Module) -> None:
        recipe = Recipe(min(200, self.job.size.iterations), lr=0.1, optimizer="sgd", momentum=0.0, seed=self.job.seed)
        tune_biases(model, self.calibration, self.target, recipe, batch_size=self.samples, progress=False)

    def record(self, arm: str, model: nn.Module, results: Results, seconds: float, images_too: bool) -> None:
        """Means for every draw; single images for draw 0, which the bench and the intervals over "
        "images read."""
        job = self.job
        scores = classify(model, self.measured, progress=False)
        add(
            results,
            arm,
            job.condition,
            job.seed,
            {
                "kl": float(kl(scores, self.reference).mean()),
                "accuracy": scores.accuracy,
                "cpu seconds": seconds,
                "calibration kl": float(divergence(all_logits(model, self.calibration.pixels), self.target)),
            },
        )
        if images_too:
            add_images(results, arm, job.condition, job.seed, model, scores, self.measured)
            for unit, value in zip(scores.units, kl(scores, self.reference).tolist(), strict=True):
                results.add(Record(SLUG, arm, job.condition, job.seed, unit, "image kl", max(value, 0.0)))


def add(results: Results, arm: str, condition: str, seed: int, values: dict[str, float]) -> None:
    """Numbers of an arm as a whole.

    Example:
        >>> results = Results("demo.json", {"paper": SLUG})
        >>> add(results, "arm", "digits resnet", 1, {"kl": 0.5})
        >>> results.values("arm", "digits resnet", 1, metric="kl")
        {'': 0.5}
    """
    results.add(*(Record(SLUG, arm, condition, seed, "", metric, value) for metric, value in values.items()))


def add_images(
    results: Results, arm: str, condition: str, seed: int, model: nn.Module, scores: Scores, measured: ImageSet
) -> None:
    """Every image, bytes and operations, as the classifier bench reads them."""
    add_scores(
        results,
        arm,
        condition,
        seed,
        scores,
        nbytes=footprint(model).bytes,
        flops=sum(flops(model, measured).values()),
        bit_operations=sum(bit_operations(model, measured).values()),
    )


def _min_max(bench: _Bench) -> tuple[nn.Module, FoldedNorms]:
    return bench.compressed(bench.adaquant(bench.job.bits, iterations=0))


def _mse(bench: _Bench) -> tuple[nn.Module, FoldedNorms]:
    bits = bench.job.bits
    return bench.compressed(AdaQuant(bits, iterations=0, clip="mse"), QuantizeActivations(bits, "mse"))


def _gptq(bench: _Bench) -> tuple[nn.Module, FoldedNorms]:
    model, norms = bench.compressed(GPTQ(bench.job.bits, None), order="sequential")
    compress(model, QuantizeActivations(bench.job.bits), bench.calibration, progress=False)
    return model, norms


def _qat(bench: _Bench) -> tuple[nn.Module, FoldedNorms]:
    model, norms = bench.folded()
    recipe = Recipe(bench.job.size.iterations, lr=bench.rates["QAT"], seed=bench.job.seed)
    fine_tune(
        model, bench.calibration, bench.job.bits, bench.job.bits, recipe, batch_size=bench.samples, progress=False
    )
    return model, norms


BUILD: dict[str, Callable[[_Bench], tuple[nn.Module, FoldedNorms]]] = {
    "min-max": _min_max,
    "MSE-clip": _mse,
    "GPTQ": _gptq,
    "AdaRound": lambda bench: bench.compressed(bench.adaround()),
    "AdaRound-sequential": lambda bench: bench.compressed(bench.adaround(), order="sequential"),
    "AdaQuant": lambda bench: bench.compressed(bench.adaquant(bench.job.bits)),
    "AdaQuant-sequential": lambda bench: bench.compressed(bench.adaquant(bench.job.bits), order="sequential"),
    "QAT": _qat,
}
ALL = tuple(BUILD)
#: arms that go on where another ended: (name after batch-norm tuning, name after bias tuning as well)
TUNED = {
    "min-max": ("min-max+norms", None),
    "AdaQuant": ("AdaQuant+norms", None),
    "AdaQuant-sequential": ("AdaQuant-sequential+norms", "AdaQuant-tuned"),
}


def classifier(job: Job) -> list[Record]:
    """All arms of a job, measured."""
    bench = _Bench(job)
    results = Results("", {"paper": SLUG})
    images_too = job.seed == 0 and job.split == "test"
    for arm in job.arms:
        start = time.process_time()
        model, norms = BUILD[arm](bench)
        bench.record(job.name(arm), model, results, time.process_time() - start, images_too)
        after_norms, after_biases = TUNED.get(arm, (None, None))
        if after_norms and norms.norms:
            bench.tune_norms(model, norms)
            bench.record(job.name(after_norms), model, results, time.process_time() - start, images_too)
        if after_biases:
            bench.tune_biases(model)
            bench.record(job.name(after_biases), model, results, time.process_time() - start, images_too)
    return list(results.records())


def _random_policies(savings: dict[str, dict[int, float]], budget: float, seed: int) -> Iterator[dict[str, int]]:
    """Five allocations: layers drop to 2 bits in random order until enough is saved."""
    random = np.random.default_rng(seed)
    for _ in range(5):
        yield _in_order(list(random.permutation(list(savings))), savings, budget)


def _in_order(names: Sequence[str], savings: dict[str, dict[int, float]], budget: float) -> dict[str, int]:
    policy, saved = dict.fromkeys(savings, 4), 0.0
    for name in names:
        if saved >= budget:
            break
        policy[name], saved = 2, saved + savings[name][2]
    return policy


def allocation(job: Job) -> list[Record]:
    """Mixed precision of 4 and 2 bits: the program, chance, and the program's opposite, at each budget."""
    bench = _Bench(job)
    results = Results("", {"paper": SLUG})

    def measure(arm: str, model: nn.Module, extra: dict[str, float] | None = None) -> float:
        scores = classify(model, bench.measured, progress=False)
        value = float(kl(scores, bench.reference).mean())
        add(
            results,
            arm,
            job.condition,
            job.seed,
            {"kl": value, "accuracy": scores.accuracy, "bytes": footprint(model).bytes, **(extra or {})},
        )
        return value

    def loss(model: nn.Module) -> float:
        return float(divergence(all_logits(model, bench.calibration.pixels), bench.target))

    norms = bench.folded()[1]
    light = {bits: bench.compressed(bench.adaquant(bits, iterations=0))[0] for bits in (4, 2)}
    trained = {bits: bench.compressed(bench.adaquant(bits))[0] for bits in (4, 2)}
    delta, savings = sensitivity(trained, loss, reference=4), bytes_saved(trained, reference=4)
    light_delta = sensitivity(light, loss, reference=4)
    most = sum(values[2] for values in savings.values())
    before = loss(trained[4])
    for name, values in delta.items():
        results.add(Record(SLUG, "sensitivity", job.condition, job.seed, name, "delta", values[2]))
    for budget in BUDGETS:
        label = f"{budget:.0%} of the saving"
        best = allocate_bits(delta, savings, budget * most, reference=4)
        mixed = assemble(trained, best.policy)
        measure(f"IP {label}", mixed, {"predicted": before + best.delta, "calibration kl": loss(mixed)})
        if norms.norms:
            bench.tune_norms(mixed, norms)
            measure(f"IP+norms {label}", mixed)
        bench.tune_biases(mixed)
        measure(f"IP-tuned {label}", mixed)
        opposite = _in_order(sorted(delta, key=lambda name: -delta[name][2] / savings[name][2]), savings, budget * most)
        measure(f"opposite-bits {label}", assemble(trained, opposite))
        easy = allocate_bits(light_delta, savings, budget * most, reference=4)
        ranges = assemble(light, easy.policy)
        measure(f"light-IP {label}", ranges)
        if norms.norms:
            bench.tune_norms(ranges, norms)
            measure(f"light-IP+norms {label}", ranges)
        for copies, arm in ((trained, "random-bits"), (light, "light-random-bits")):
            chance, accuracies = [], []
            for number, policy in enumerate(_random_policies(savings, budget * most, job.seed)):
                drawn = assemble(copies, policy)
                scores = classify(drawn, bench.measured, progress=False)
                chance.append(float(kl(scores, bench.reference).mean()))
                accuracies.append(scores.accuracy)
                if copies is trained:
                    predicted = before + sum(delta[name][2] for name, bits in policy.items() if bits == 2)
                    add(
                        results,
                        f"{arm} {label} number {number}",
                        job.condition,
                        job.seed,
                        {"predicted": predicted, "calibration kl": loss(drawn), "kl": chance[-1]},
                    )
            add(
                results,
                f"{arm} {label}",
                job.condition,
                job.seed,
                {"kl": float(np.exp(np.mean(np.log(chance)))), "accuracy": float(np.mean(accuracies))},
            )
    return list(results.records())


def _jobs(profile: str) -> list[Job]:
    size = SIZES[profile]
    if profile == "quick":
        return [Job(MAIN, 2, 10, 0, ALL, size)]
    if profile == "live":
        return [Job(MAIN, 2, 50, 0, ALL, size)]
    few = ("min-max", "AdaQuant", "QAT", "AdaQuant-sequential", "AdaRound-sequential")
    jobs = [Job(MAIN, bits, 50, seed, ALL, size) for bits in (2, 3) for seed in SEEDS]
    jobs += [Job(MAIN, 2, count, seed, few, size) for count in (10, 200) for seed in SEEDS]
    jobs += [Job(condition, 3, 50, 0, ALL, size) for condition in CONDITIONS]
    most = tuple(arm for arm in ALL if arm not in ("MSE-clip", "AdaRound"))
    jobs += [Job(condition, bits, 50, 0, most, size) for condition in CONDITIONS for bits in (4, 2)]
    light = ("min-max", "AdaQuant-sequential")
    return jobs + [Job(condition, 8, 50, 0, light, size) for condition in CONDITIONS]


def _tune(results: Results, size: Size) -> tuple[tuple[str, float], ...]:
    """The rate of each arm that trains, by divergence on the validation images: one draw, W2A2, 50 images."""
    arms = {"AdaQuant": "AdaQuant", "AdaRound": "AdaRound", "QAT": "QAT"}
    jobs = [
        Job(MAIN, 2, 50, 0, (arm,), size, ((name, rate),), "validation")
        for name, arm in arms.items()
        for rate in RATES[name]
    ]
    todo = [job for job in jobs if not results.has(f"{job.rates[0][0]} rate {job.rates[0][1]:g}", "validation")]
    for job, records in in_processes(classifier, todo):
        (name, rate), values = job.rates[0], {r.metric: r.value for r in records}
        add(results, f"{name} rate {rate:g}", "validation", 0, {"kl": values["kl"]})
        results.save()
    chosen = {}
    for name in arms:
        scores = {rate: results.values(f"{name} rate {rate:g}", "validation", metric="kl")[""] for rate in RATES[name]}
        chosen[name] = min(scores, key=scores.__getitem__)
    return tuple(chosen.items())


# -- the language model --


class _Language:
    """SmolLM2, weights only; the arms of the language-model bench and ours."""

    def __init__(self, results: Results, size: Size) -> None:
        self.results, self.size = results, size
        self.dtype = models.compute_dtype()
        sequences, length = size.calibration
        self.tokens = text.calibration("wikipedia", sequences=sequences, length=length, seed=0)
        self.test = text.evaluation("wikipedia", sequences=size.windows[0], length=size.windows[1])

    def measure(self, arm: str, *methods: Method) -> None:
        if self.results.has(arm, "wikipedia"):
            return
        model: Any = models.smollm2(self.dtype, layers=self.size.layers)
        start = time.perf_counter()
        for method in methods:
            compress(model, method, self.tokens, progress=False)
        add(self.results, arm, "cost", 0, {"seconds": time.perf_counter() - start})
        found = perplexity(model, self.test, batch_size=8, progress=False)
        self.results.add_perplexity(arm, "wikipedia", 0, found, cost=footprint(model).bits_per_weight)
        self.results.save()

    def rate(self, name: str, make: Callable[[float], Method]) -> float:
        """Chosen on validation articles with the first two blocks quantised."""
        windows = text.evaluation(
            "wikipedia", sequences=min(8, self.size.windows[0]), length=self.size.windows[1], split="validation"
        )
        scores = {}
        for rate in LANGUAGE_RATES[name]:
            arm = f"{name} rate {rate:g}"
            if not self.results.has(arm, "validation language"):
                model: Any = models.smollm2(self.dtype, layers=min(2, self.size.layers or 2))
                compress(model, make(rate), self.tokens, progress=False)
                found = perplexity(model, windows, batch_size=8, progress=False)
                add(self.results, arm, "validation language", 0, {"perplexity": found.value})
                self.results.save()
            scores[rate] = self.results.values(arm, "validation language", metric="perplexity")[""]
        return min(scores, key=scores.__getitem__)

    def steps(self, profile: str) -> list[tuple[str, Callable[[], None]]]:
        count = self.size.language_iterations

        def adaquant(speed: float, bits: int = 3) -> Method:
            return AdaQuant(bits, group_size=64, iterations=count, speed=speed)

        def adaround(lr: float) -> Method:
            return AdaRound(3, group_size=64, iterations=count, lr=lr)

        def trained(name: str, make: Callable[[float], Method]) -> Callable[[], None]:
            def step() -> None:
                rate = self.rate(name, make) if profile == "study" else LANGUAGE_RATES[name][1]
                self.measure(f"{name} 3-bit g64", make(rate))

            return step

        def more_bits() -> None:
            self.measure("AdaQuant 4-bit g64", adaquant(self.rate("AdaQuant", adaquant), 4))

        measure = functools.partial
        steps: list[tuple[str, Callable[[], None]]] = [
            ("dense", measure(self.measure, "dense")),
            ("AdaQuant 3-bit", trained("AdaQuant", adaquant)),
            ("RTN 3-bit", measure(self.measure, "RTN 3-bit g64", RTN(3, 64))),
        ]
        if profile == "quick":
            return steps
        steps += [
            ("GPTQ 3-bit", measure(self.measure, "GPTQ 3-bit g64", GPTQ(3, 64))),
            ("AdaRound 3-bit", trained("AdaRound", adaround)),
        ]
        if profile == "study":
            steps += [("AdaQuant 4-bit", more_bits)]
            for bits in (8, 4):
                arm = f"RTN-W4A{bits} g64"
                steps.append((arm, measure(self.measure, arm, RTN(4, 64), QuantizeActivations(bits))))
        return steps


@declares("bfloat16")
def run(out: Path, profile: str = "study") -> Results:
    """Run every arm that the results file lacks, and judge the claims.

    Args:
        out: results file; an interrupted run goes on where it stopped.
        profile: "study" (recorded; the rules must be committed), "live" or "quick".
    """
    size = SIZES[profile]
    data = {name: dataset_hash(name) for name in ("digits", "mnist")}
    data |= {"wikipedia": text.corpus_hash("wikipedia"), "smollm2": models.smollm2_hash()}
    data |= {name: wheels.sha256(small.path(name) / "model.safetensors") for name, _ in CONDITIONS.values()}
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
    rates = _tune(results, size) if profile == "study" else ()
    jobs = [replace(job, rates=rates) for job in _jobs(profile)]
    for condition, (name, dataset) in CONDITIONS.items():
        if not results.has("dense", condition):
            measured = images(dataset, "test") if size.test is None else images(dataset, "test").take(size.test, seed=0)
            model = small.load(name)
            add_images(results, "dense", condition, 0, model, classify(model, measured, progress=False), measured)
    todo = [job for job in jobs if not results.has(job.name(job.arms[-1]), job.condition, job.seed)]
    mixed = [Job(MAIN, 4, 50, seed, (), size, rates) for seed in SEEDS] if profile == "study" else []
    if profile == "quick":
        mixed = [Job(MAIN, 4, 10, 0, (), size)]
    mixed = [job for job in mixed if not results.has("sensitivity", job.condition, job.seed)]
    bar = tqdm(total=len(todo) + len(mixed), desc=f"{SLUG} ({profile}): classifiers", unit="job")
    with bar:
        for work, waiting in ((classifier, todo), (allocation, mixed)):
            workers = 1 if profile == "quick" else None
            for _, records in in_processes(work, waiting, workers):
                results.add(*records)
                results.save()
                bar.update()
    bar = tqdm(_Language(results, size).steps(profile), desc=f"{SLUG} ({profile}): language model", unit="step")
    for name, step in bar:
        bar.set_postfix_str(name)
        step()
    if profile == "study":
        results.claims = judge(results, CLAIMS)
    results.save()
    return results
