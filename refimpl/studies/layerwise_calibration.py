"""The experiment of the layer-wise calibration chapter: weights and activations of few bits from few images.

Three shipped classifiers (residual networks on MNIST and digits, a vision transformer on MNIST) are quantised from
training images without labels; what is measured is the divergence (KL) of the quantised network from the float one, and
accuracy, on test images. Arms that train have the same number of updates and the same grid of three rates, chosen
on the validation images. SmolLM2 is quantised by weights alone, beside rounding and GPTQ.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from refimpl import GPTQ, RTN, compress
from refimpl.baselines.activations import QuantizeActivations
from refimpl.baselines.adaround import AdaRound
from refimpl.baselines.qat import all_logits, divergence, fine_tune
from refimpl.core.compress.fold import FoldedNorms, fold_batch_norms
from refimpl.core.compress.method import Method
from refimpl.core.train.loop import Recipe
from refimpl.lab import models, wheels
from refimpl.lab.data import text
from refimpl.lab.data.images import dataset_hash, images
from refimpl.lab.measure.classify import Scores, bit_operations, classify, flops, kl, score_rows
from refimpl.lab.measure.metrics import footprint, perplexity
from refimpl.lab.models import small
from refimpl.lab.study.claims import BELOW_ONE, Bound, Claim, Every, Gap, Place, over_seeds
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, Row, Run, Stages, Study, documents
from refimpl.quantization.layerwise_calibration import (
    AdaQuant,
    allocate_bits,
    assemble,
    bytes_saved,
    retune_batch_norms,
    sensitivity,
    tune_biases,
)

#: shipped model, dataset
CONDITIONS = {
    "digits resnet": ("resnet-digits", "digits"),
    "mnist resnet": ("resnet-mnist", "mnist"),
    "mnist vit": ("vit-mnist", "mnist"),
}
MAIN = "digits resnet"
SEEDS = (1, 2, 3, 4, 5)  # draws of the calibration images in the rules
SHOWN = 0  # draw of everything else; its images are recorded one by one
RATES = {"AdaQuant": (0.3, 1.0, 3.0), "AdaRound": (0.03, 0.1, 0.3), "QAT": (0.003, 0.01, 0.03)}
LANGUAGE_RATES = {"AdaQuant": (0.5, 1.0, 2.0), "AdaRound": (0.03, 0.1, 0.3)}
BUDGETS = (0.25, 0.5, 0.75)  # of all that going from 4 to 2 bits could save


@dataclass(frozen=True)
class Size:
    """Size of the experiment at a profile.

    Attributes:
        iterations: updates of an arm that trains, for each layer or for the network.
        language_iterations: the same for SmolLM2.
        images: calibration images of mixed precision, and of all at the quick size.
        test: validation or test images; None: all.
        layers: blocks of SmolLM2; None: all.
        calibration, windows: sequences of text and their length, to calibrate on and to measure on.
    """

    iterations: int = 250
    language_iterations: int = 60
    images: int = 50
    test: int | None = None
    layers: int | None = None
    calibration: tuple[int, int] = (32, 512)
    windows: tuple[int, int] = (24, 512)


SIZES = {"study": Size(), "quick": Size(4, 2, 10, 40, 1, (2, 32), (2, 32))}


# -- arms --


@dataclass(frozen=True)
class Classifier:
    """A classifier at one precision.

    Attributes:
        method: key of `BUILD`, or a name of `TUNED`; "dense" is the float network.
        bits: of weights and activations.
        images: to calibrate on.
        condition: key of `CONDITIONS`.
    """

    validation = "validation"
    method: str
    bits: int = 32
    images: int = 50
    condition: str = MAIN

    @property
    def name(self) -> str:
        return (
            self.method if self.method == "dense" else f"{self.method} W{self.bits}A{self.bits}, {self.images} images"
        )

    @property
    def rates(self) -> Sequence[float]:
        return RATES.get(self.trained, ())

    @property
    def trained(self) -> str:
        """The method whose learning rate it has."""
        return self.method.removesuffix("-sequential")

    def trial(self, rate: float) -> str:
        return f"{self.method} rate {rate:g}"


@dataclass(frozen=True)
class Mixed:
    """Layers of 4 and 2 bits. The choices, which rest on the layers' sensitivity, have rows under names of their own."""

    name = "sensitivity"
    condition = MAIN
    rates = ()
    images: int = 50


@dataclass(frozen=True)
class Language:
    """SmolLM2 with 3-bit weights, or as the method says."""

    condition = "wikipedia"
    validation = "validation language"
    method: str

    @property
    def name(self) -> str:
        if self.method == "dense":
            return "dense"
        return f"{self.method} g64" if self.method in ACTIVATION_BITS else f"{self.method} 3-bit g64"

    @property
    def rates(self) -> Sequence[float]:
        return LANGUAGE_RATES.get(self.method, ())

    def trial(self, rate: float) -> str:
        return f"{self.method} rate {rate:g}"


FEW = ("min-max", "AdaQuant", "QAT", "AdaQuant-sequential", "AdaRound-sequential")  # on 10 and 200 images
LIGHT = ("min-max", "AdaQuant-sequential")  # at 8 bits
RARE = ("MSE-clip", "AdaRound")  # at 3 bits, and in the draws of the rules
ACTIVATION_BITS = {"RTN-W4A8": 8, "RTN-W4A4": 4}  # of the language model


def classifiers(profile: str) -> list[Any]:
    dense = [Classifier("dense", condition=condition) for condition in CONDITIONS]
    if profile == "quick":
        count = SIZES[profile].images
        return [*dense, *(Classifier(method, 2, count) for method in BUILD), Mixed(count)]
    most = [method for method in BUILD if method not in RARE]
    at_50 = [
        Classifier(method, bits, 50, condition)
        for bits, methods in {3: list(BUILD), 4: most, 2: most, 8: LIGHT}.items()
        for condition in CONDITIONS
        for method in methods
    ]
    others = [Classifier(method, 2, count) for count in (10, 200) for method in FEW]
    return [*dense, *at_50, *(Classifier(method, 2) for method in RARE), *others, Mixed()]


def languages(profile: str) -> list[Any]:
    more = () if profile == "quick" else ("GPTQ", "AdaRound", *ACTIVATION_BITS)
    return [Language(method) for method in ("dense", "AdaQuant", "RTN", *more)]


def arms(profile: str) -> list[Any]:
    return [*classifiers(profile), *languages(profile)]


def seeds(arm: Any, profile: str) -> Sequence[int]:
    if profile == "quick" or isinstance(arm, Language):
        return (SHOWN,)
    if isinstance(arm, Mixed) or arm.images != 50 or arm in [Classifier(method, 2) for method in RARE]:
        return SEEDS
    return (SHOWN, *SEEDS) if arm.condition == MAIN and arm.bits in (2, 3) else (SHOWN,)


def tuned_as(arm: Any) -> Any:
    """The same training at 2 bits on one draw of 50 images."""
    if isinstance(arm, Mixed):
        return Classifier("AdaQuant", 2)
    return Classifier(arm.trained, 2) if isinstance(arm, Classifier) and arm.rates else arm


def score(values: Mapping[str, float]) -> float:
    """Of a tuning run, which has one number: a divergence or a perplexity."""
    (value,) = values.values()
    return -value


def stages(run: Run) -> Stages:
    """Classifiers side by side, then the language model, which takes all cores."""
    for part in (classifiers, languages):
        if part is languages:
            run.workers = 1
        chosen = part(run.profile)
        rates = yield from run.tuning(chosen)
        yield [run.job(arm, seed, rates[arm]) for arm in chosen for seed in seeds(arm, run.profile)]


# -- the rules, written before the run --


class OverfitGap(Gap):
    """Of the divergences on test images as multiples of those on the calibration images."""

    def numbers(self, results: Results, arm: Any) -> np.ndarray:
        return super().numbers(results, arm) / over_seeds(results, arm, "calibration kl", self.seeds)


def _all_below_one(gaps: Iterable[Gap], control: str, quantity: str, arms: str = "") -> Every:
    scale = "a residual network of 78k weights on 8x8 digits; the paper: ResNet-50 on ImageNet, 1000 images"
    return Every(tuple(gaps), BELOW_ONE, "any", control=control, quantity=quantity, scale=scale, arms=arms)


def _against(ours: str, theirs: str, cases: Sequence[tuple[int, int]], control: str) -> Every:
    """Test divergences of two methods, for each (bits, images)."""
    gaps = (Gap(Classifier(ours, *case), Classifier(theirs, *case), "kl", "ratio", SEEDS) for case in cases)
    return _all_below_one(gaps, control, f"test divergence, {ours} / {theirs}")


def _language(rival: str) -> Every:
    return Every(
        (Gap(Language("AdaQuant"), Language(rival), kind="perplexity", seeds=(SHOWN,)),),
        BELOW_ONE,
        scale="SmolLM2, 135M weights, 3 bits in groups of 64, weights only",
        control=rival,
        quantity=f"perplexity with AdaQuant / with {rival}",
    )


def _at_budget(way: str, budget: float) -> Place:
    return Place(f"{way} {budget:.0%} of the saving", MAIN)


AT_50 = ((3, 50), (2, 50))
FEW_IMAGES = ((2, 10), (2, 50))
CLAIMS = [
    Claim(
        "adaquant-four-bits",
        "Weights and activations of 4 bits cost less than one point of accuracy.",
        "ResNet-50: less than 1 point at 4 bits in all but the two smallest layers",
        Every(
            tuple(
                Gap(
                    Classifier("dense", condition=condition),
                    Classifier("AdaQuant-tuned", 4, 50, condition),
                    "correct",
                    "units",
                    (SHOWN,),
                )
                for condition in CONDITIONS
            ),
            Bound(high=0.01),
            "any",
            control="the float network",
            quantity="accuracy lost at W4A4",
            arms="the float network minus AdaQuant in sequence with batch norms and biases tuned, 50 images, "
            f"{', '.join(CONDITIONS)}",
            scale="three small classifiers of digits; the paper: ResNet-50 on ImageNet",
        ),
        paper_effect=0.01,
    ),
    Claim(
        "adaquant-ranges",
        "Training each layer for its outputs beats measuring ranges.",
        "min-max ranges fail at 4 bits on ImageNet; AdaQuant loses about 4 points (parallel), less in sequence",
        _against("AdaQuant", "min-max", AT_50, "min-max ranges, no training"),
    ),
    Claim(
        "adaquant-adaround",
        "Letting weights move anywhere beats choosing between rounding up and down.",
        "a figure: AdaQuant above AdaRound at every calibration size",
        _against("AdaQuant-sequential", "AdaRound-sequential", AT_50, "AdaRound, tuned alike"),
    ),
    Claim(
        "adaquant-few-images",
        "On few images, training layer by layer beats fine-tuning end to end.",
        "a figure: AdaQuant above end-to-end fine-tuning with KL below about 1000 images",
        _against("AdaQuant", "QAT", FEW_IMAGES, "end-to-end fine-tuning on the same images"),
    ),
    Claim(
        "adaquant-overfits-less",
        "Small per-layer problems over-fit less than the whole network.",
        "stated; shown by the same figure",
        _all_below_one(
            (OverfitGap(Classifier("AdaQuant", *case), Classifier("QAT", *case), "kl", "ratio") for case in FEW_IMAGES),
            "end-to-end fine-tuning on the same images",
            "(test / calibration divergence), AdaQuant / QAT",
        ),
    ),
    Claim(
        "adaquant-sequence",
        "Training layers in sequence, on the inputs that quantised layers give, beats training them in parallel.",
        "0.3 to 1.7 points of accuracy at 4 bits",
        _against("AdaQuant-sequential", "AdaQuant", AT_50, "the same training with float inputs"),
    ),
    Claim(
        "adaquant-norms",
        "Measuring batch-norm statistics again repairs what quantisation did to them.",
        "the step that makes the light pipeline work",
        _against("min-max+norms", "min-max", AT_50, "the same network before"),
    ),
    Claim(
        "adaquant-program",
        "An integer program places the bits well.",
        "less than 1 point lost at 13 % of the float size",
        _all_below_one(
            (
                Gap(_at_budget("IP", budget), _at_budget("random-bits", budget), "kl", "ratio", SEEDS)
                for budget in BUDGETS
            ),
            "random allocations that save as much (geometric mean of five)",
            "test divergence, program / chance",
            "2 and 4 bits, AdaQuant in parallel, 50 images, digits, savings of 25, 50 and 75 % of the possible; chance saves "
            "at least as much (geometric mean of five)",
        ),
    ),
    Claim(
        "adaquant-language",
        "Layer-wise training beats rounding to nearest, on a language model too.",
        "BERT at 8 bits only; not reported at 3",
        _language("RTN"),
    ),
    Claim(
        "adaquant-gptq",
        "Layer-wise training beats GPTQ, which came later.",
        "not compared (GPTQ: 2022)",
        _language("GPTQ"),
    ),
]


# -- classifiers --


class Bench:
    """Inputs shared by the arms on one draw of calibration images."""

    def __init__(self, job: Job) -> None:
        self.job, self.size = job, SIZES[job.profile]
        name, dataset = CONDITIONS[job.arm.condition]
        self.dense = small.load(name)
        self.calibration = images(dataset, "train").take(job.arm.images, seed=job.seed)
        measured = images(dataset, job.split)
        self.measured = measured if self.size.test is None else measured.take(self.size.test, seed=0)
        self.target = all_logits(self.dense, self.calibration.pixels)
        self.reference = classify(self.dense, self.measured, progress=False)
        self.samples = min(50, job.arm.images)

    def folded(self) -> tuple[nn.Module, FoldedNorms]:
        model = copy.deepcopy(self.dense)
        return model, fold_batch_norms(model, self.calibration.pixels)

    def compressed(self, *methods: Method, order: str = "parallel") -> tuple[nn.Module, FoldedNorms]:
        model, norms = self.folded()
        for method in methods:
            compress(model, method, self.calibration, order=order, progress=False)
        return model, norms

    @property
    def rate(self) -> float:
        assert self.job.rate is not None
        return self.job.rate

    def trained(self, method: type[AdaQuant] | type[AdaRound], bits: int) -> Method:
        """AdaQuant or AdaRound with the study's updates and the rate of the job."""
        options = {"samples": self.samples, "iterations": self.size.iterations, "seed": self.job.seed}
        if method is AdaQuant:
            return AdaQuant(bits, bits, speed=self.rate, **options)
        return AdaRound(bits, bits, lr=self.rate, **options)

    def min_max(self, bits: int) -> Method:
        return AdaQuant(bits, bits, samples=self.samples, iterations=0, seed=self.job.seed)

    def tune_norms(self, model: nn.Module, norms: FoldedNorms) -> None:
        if norms.norms:  # a transformer has none
            retune_batch_norms(model, norms, self.calibration)

    def tune_biases(self, model: nn.Module) -> None:
        recipe = Recipe(min(200, self.size.iterations), lr=0.1, optimizer="sgd", momentum=0.0, seed=self.job.seed)
        tune_biases(model, self.calibration, self.target, recipe, batch_size=self.samples, progress=False)

    def quality(self, model: nn.Module) -> tuple[float, float]:
        """Mean divergence from the float network, and accuracy."""
        scores = classify(model, self.measured, progress=False)
        return float(kl(scores, self.reference).mean()), scores.accuracy

    def calibration_kl(self, model: nn.Module) -> float:
        return float(divergence(all_logits(model, self.calibration.pixels), self.target))

    def rows(self, model: nn.Module, arm: str, seconds: float) -> Iterator[Row]:
        """Means for every draw; single images for the one that the bench and the intervals over images read."""
        scores = classify(model, self.measured, progress=False)
        far = kl(scores, self.reference)
        yield Row("kl", float(far.mean()), arm=arm)
        yield Row("accuracy", scores.accuracy, arm=arm)
        yield Row("cpu seconds", seconds, arm=arm)
        yield Row("calibration kl", self.calibration_kl(model), arm=arm)
        if self.job.seed == SHOWN:
            yield from (row._replace(arm=arm) for row in self.images(model, scores))
            for unit, value in zip(scores.units, far.tolist(), strict=True):
                yield Row("image kl", max(value, 0.0), unit, arm=arm)

    def images(self, model: nn.Module, scores: Scores) -> Iterator[Row]:
        """As the classifier bench reads them."""
        yield from score_rows(
            scores,
            nbytes=footprint(model).bytes,
            flops=sum(flops(model, self.measured).values()),
            bit_operations=sum(bit_operations(model, self.measured).values()),
        )


def _min_max(bench: Bench) -> tuple[nn.Module, FoldedNorms]:
    return bench.compressed(bench.min_max(bench.job.arm.bits))


def _mse(bench: Bench) -> tuple[nn.Module, FoldedNorms]:
    bits = bench.job.arm.bits
    return bench.compressed(AdaQuant(bits, iterations=0, clip="mse"), QuantizeActivations(bits, "mse"))


def _gptq(bench: Bench) -> tuple[nn.Module, FoldedNorms]:
    bits = bench.job.arm.bits
    model, norms = bench.compressed(GPTQ(bits, None), order="sequential")
    compress(model, QuantizeActivations(bits), bench.calibration, progress=False)
    return model, norms


def _adaround(bench: Bench, order: str = "parallel") -> tuple[nn.Module, FoldedNorms]:
    return bench.compressed(bench.trained(AdaRound, bench.job.arm.bits), order=order)


def _adaquant(bench: Bench, order: str = "parallel") -> tuple[nn.Module, FoldedNorms]:
    return bench.compressed(bench.trained(AdaQuant, bench.job.arm.bits), order=order)


def _qat(bench: Bench) -> tuple[nn.Module, FoldedNorms]:
    model, norms = bench.folded()
    bits, recipe = bench.job.arm.bits, Recipe(bench.size.iterations, lr=bench.rate, seed=bench.job.seed)
    fine_tune(model, bench.calibration, bits, bits, recipe, batch_size=bench.samples, progress=False)
    return model, norms


BUILD: dict[str, Callable[[Bench], tuple[nn.Module, FoldedNorms]]] = {
    "min-max": _min_max,
    "MSE-clip": _mse,
    "GPTQ": _gptq,
    "AdaRound": _adaround,
    "AdaRound-sequential": functools.partial(_adaround, order="sequential"),
    "AdaQuant": _adaquant,
    "AdaQuant-sequential": functools.partial(_adaquant, order="sequential"),
    "QAT": _qat,
}
#: arms that go on where another ended: (name after batch-norm tuning, name after bias tuning as well)
TUNED = {
    "min-max": ("min-max+norms", None),
    "AdaQuant": ("AdaQuant+norms", None),
    "AdaQuant-sequential": ("AdaQuant-sequential+norms", "AdaQuant-tuned"),
}


def finished(bench: Bench) -> Iterator[tuple[str, nn.Module]]:
    """A method's network, and the same network after each tuning that follows it, with names."""
    method = bench.job.arm.method
    model, norms = BUILD[method](bench)
    yield method, model
    after_norms, after_biases = TUNED.get(method, (None, None))
    if after_norms and norms.norms:
        bench.tune_norms(model, norms)
        yield after_norms, model
    if after_biases:
        bench.tune_biases(model)
        yield after_biases, model


def classifier(job: Job) -> Iterator[Row]:
    """One method, with the tunings that follow it; a tuning run's divergence is that of the last."""
    bench = Bench(job)
    if job.arm.method == "dense":
        yield from bench.images(bench.dense, bench.reference)
        return
    start = time.process_time()
    for method, model in finished(bench):
        if job.split == "test":
            yield from bench.rows(model, replace(job.arm, method=method).name, time.process_time() - start)
    if job.split == "validation":
        yield Row("kl", bench.quality(model)[0])


def mixed_precision(job: Job) -> Iterator[Row]:
    """4 and 2 bits: the program, chance, and the program's opposite, at each budget."""
    bench = Bench(job)
    norms = bench.folded()[1]
    light = {bits: bench.compressed(bench.min_max(bits))[0] for bits in (4, 2)}
    trained = {bits: bench.compressed(bench.trained(AdaQuant, bits))[0] for bits in (4, 2)}
    delta, savings = sensitivity(trained, bench.calibration_kl, reference=4), bytes_saved(trained, reference=4)
    light_delta = sensitivity(light, bench.calibration_kl, reference=4)
    most = sum(values[2] for values in savings.values())
    before = bench.calibration_kl(trained[4])
    yield from (Row("delta", values[2], name) for name, values in delta.items())
    for budget in BUDGETS:
        label, enough = f"{budget:.0%} of the saving", budget * most
        best = allocate_bits(delta, savings, enough, reference=4)
        mixed = assemble(trained, best.policy)
        yield from _choice(bench, f"IP {label}", mixed)
        yield Row("predicted", before + best.delta, arm=f"IP {label}")
        yield Row("calibration kl", bench.calibration_kl(mixed), arm=f"IP {label}")
        if norms.norms:
            bench.tune_norms(mixed, norms)
            yield from _choice(bench, f"IP+norms {label}", mixed)
        bench.tune_biases(mixed)
        yield from _choice(bench, f"IP-tuned {label}", mixed)
        opposite = in_order(sorted(delta, key=lambda name: -delta[name][2] / savings[name][2]), savings, enough)
        yield from _choice(bench, f"opposite-bits {label}", assemble(trained, opposite))
        easy = allocate_bits(light_delta, savings, enough, reference=4)
        ranges = assemble(light, easy.policy)
        yield from _choice(bench, f"light-IP {label}", ranges)
        if norms.norms:
            bench.tune_norms(ranges, norms)
            yield from _choice(bench, f"light-IP+norms {label}", ranges)
        for copies, arm in ((trained, f"random-bits {label}"), (light, f"light-random-bits {label}")):
            chance = []
            for number, policy in enumerate(random_policies(savings, enough, job.seed)):
                drawn = assemble(copies, policy)
                chance.append(bench.quality(drawn))
                if copies is trained:
                    predicted = before + sum(delta[name][2] for name, bits in policy.items() if bits == 2)
                    values = (predicted, bench.calibration_kl(drawn), chance[-1][0])
                    for metric, value in zip(("predicted", "calibration kl", "kl"), values, strict=True):
                        yield Row(metric, value, arm=f"{arm} number {number}")
            far, accuracies = zip(*chance, strict=True)
            yield Row("kl", float(np.exp(np.mean(np.log(far)))), arm=arm)
            yield Row("accuracy", float(np.mean(accuracies)), arm=arm)


def _choice(bench: Bench, arm: str, model: nn.Module) -> Iterator[Row]:
    far, accuracy = bench.quality(model)
    for metric, value in (("kl", far), ("accuracy", accuracy), ("bytes", footprint(model).bytes)):
        yield Row(metric, value, arm=arm)


def random_policies(savings: dict[str, dict[int, float]], budget: float, seed: int) -> Iterator[dict[str, int]]:
    """Five allocations: layers drop to 2 bits in random order until enough is saved."""
    random = np.random.default_rng(seed)
    for _ in range(5):
        yield in_order(list(random.permutation(list(savings))), savings, budget)


def in_order(names: Sequence[str], savings: dict[str, dict[int, float]], budget: float) -> dict[str, int]:
    """The allocation in which layers drop to 2 bits, in this order, until enough is saved."""
    policy, saved = dict.fromkeys(savings, 4), 0.0
    for name in names:
        if saved >= budget:
            break
        policy[name], saved = 2, saved + savings[name][2]
    return policy


# -- the language model --


def _methods(arm: Language, count: int, rate: float | None) -> list[Method]:
    """Steps on the language model, one after the other."""
    if arm.method == "dense":
        return []
    if arm.method in ACTIVATION_BITS:
        return [RTN(4, 64), QuantizeActivations(ACTIVATION_BITS[arm.method])]
    if arm.rates:
        assert rate is not None
        if arm.method == "AdaQuant":
            return [AdaQuant(3, group_size=64, iterations=count, speed=rate)]
        return [AdaRound(3, group_size=64, iterations=count, lr=rate)]
    return [{"RTN": RTN, "GPTQ": GPTQ}[arm.method](3, 64)]


def language(job: Job) -> Iterator[Row]:
    """Compress SmolLM2 and measure its perplexity; a tuning run has two blocks of it and a few articles."""
    size, trial = SIZES[job.profile], job.split == "validation"
    model: Any = models.smollm2(getattr(torch, job.dtype), layers=min(2, size.layers or 2) if trial else size.layers)
    sequences, length = size.calibration
    tokens = text.calibration("wikipedia", sequences=sequences, length=length, seed=0)
    start = time.perf_counter()
    for method in _methods(job.arm, size.language_iterations, job.rate):
        compress(model, method, tokens, progress=False)
    seconds = time.perf_counter() - start
    sequences, length = size.windows
    articles = text.evaluation(
        "wikipedia", sequences=min(8, sequences) if trial else sequences, length=length, split=job.split
    )
    found = perplexity(model, articles, batch_size=8, progress=False)
    if trial:
        yield Row("perplexity", found.value)
        return
    yield Row("seconds", seconds, condition="cost")
    yield from documents(found, cost=footprint(model).bits_per_weight)


def measure(job: Job) -> Iterator[Row]:
    """Measure one arm."""
    part = {Classifier: classifier, Mixed: mixed_precision, Language: language}[type(job.arm)]
    yield from part(job)


def _data() -> dict[str, str]:
    shipped = {name: wheels.sha256(small.path(name) / "model.safetensors") for name, _ in CONDITIONS.values()}
    found = {name: dataset_hash(name) for name in ("digits", "mnist")} | shipped
    return found | {"wikipedia": text.corpus_hash("wikipedia"), "smollm2": models.smollm2_hash()}


STUDY = Study(
    slug="layerwise_calibration",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=seeds,
    data=_data,
    rates=lambda arm: arm.rates,
    tuned_as=tuned_as,
    score=score,
    stages=stages,
    kind=lambda arm: f"{getattr(arm, 'method', 'mixed precision')} {arm.condition}",
    dtype="bfloat16",
)
