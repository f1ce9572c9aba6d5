"""The experiment behind the CSKV chapter: which factors to store features by, and what is lost with them.

SmolLM2-135M keeps features of its keys and values at rank 36 of 192 (80 %) beside a window of 32 exact tokens, with
factors from the weights alone (SVD), scaled by inputs (ASVD), trained layer by layer from ASVD or from random numbers
(the paper), or in closed form. All factors that look at text see the same Wikipedia tokens. Errors of keys and values
are measured on validation articles, perplexity on test articles of 1024 tokens. Perplexity is read from a cache that is
filled token by token: with the paper's exact prefill one pass over a document shows no loss at all, whatever is stored.
As in the paper there are no sink tokens, but for two arms that show what they bring.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.core.cache import CompressedCache, Policy, cache_argument
from refimpl.core.files.io import atomic_write
from refimpl.core.stored import stored_dtype
from refimpl.core.train.loop import Recipe
from refimpl.kvcache.cskv import CSKV, Factors, Moments, factorise, moments, reconstruct
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.measure.statistics import Interval, compare, difference, paired_bootstrap
from refimpl.lab.study.claims import BELOW_ONE, Bound, Claim, Every, Gap, Outcome, grade
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, Row, Run, Study, documents

SCALE = "SmolLM2, 135M weights, 3 key/value heads of 64 channels, 1024 tokens; the paper: 7B, up to 32k tokens"
FROM = 128  # positions scored: before, little has left the window
PIECE = 256  # tokens fed at a time; the result is that of one at a time
MAIN = 0.2  # density of the 80 % setting


@dataclass(frozen=True)
class Size:
    """Size of the experiment: blocks of the model, calibration windows and their tokens, steps of a fit, draws, articles
    that errors are measured on, articles that perplexity is measured on, their tokens, and the first one that is scored.
    """

    layers: int | None
    sequences: int
    length: int
    steps: int
    draws: int
    held_out: int
    documents: int
    tokens: int
    first: int = FROM


SIZES = {"study": Size(None, 32, 512, 200, 3, 16, 8, 1024), "quick": Size(2, 4, 64, 10, 1, 2, 2, 96, 48)}

INITS = {"SVD": "svd", "ASVD": "asvd", "closed form": "closed_form"}
STARTS = {"fit": "asvd", "random fit": "random"}  # trained, and from where


@dataclass(frozen=True)
class Arm:
    """One way of storing, and what of it is measured.

    Attributes:
        factors: "closed form", "ASVD", "SVD", "fit", "random fit"; "full" stores everything.
        density, window, bits, key_share, sinks, group: of `CSKV`.
        condition: "wikipedia" for perplexity, read token by token, or in "one pass"; "held-out" for errors of keys and
            values; "cost" for processor time.
    """

    factors: str = "closed form"
    density: float = MAIN
    window: int = 32
    bits: int = 16
    key_share: float = 0.5
    sinks: int = 0
    group: int = 1
    condition: str = "wikipedia"

    @property
    def name(self) -> str:
        """The factors, and what differs from the 80 % setting.

        Example:
            >>> Arm().name, Arm("fit", bits=4, group=32).name, Arm(density=0.5, key_share=0.25).name
            ('closed form', 'fit, bits 4, group 32', 'closed form, density 0.5, key_share 0.25')
        """
        plain = Arm()
        changed = ("density", "window", "bits", "key_share", "sinks", "group")
        told = [f"{n} {getattr(self, n):g}" for n in changed if getattr(self, n) != getattr(plain, n)]
        return ", ".join([self.factors, *told])


FITTED = ("SVD", "ASVD", "closed form", "fit")
WINDOWS = (0, 8, 32, 128)
ARMS = {
    "study": [
        *(Arm(factors) for factors in ("full", "closed form", "fit", "ASVD", "SVD", "random fit")),
        *(Arm(window=window) for window in WINDOWS if window != 32),
        *(Arm(factors, bits=bits, group=32) for factors in ("closed form", "fit") for bits in (4, 16)),
        *(Arm(key_share=share) for share in (0.25, 0.75)),
        *(Arm(density=0.5, key_share=share) for share in (0.25, 0.5)),
        Arm(density=0.1),
        Arm("ASVD", density=0.5),
        *(Arm(factors, sinks=4) for factors in ("closed form", "ASVD")),
        # read in one pass too, where the paper's exact prefill hides what is stored: the worst arms there are
        *(Arm(factors, condition="one pass") for factors in ("SVD", "random fit")),
    ],
    "quick": [
        *(Arm(factors) for factors in ("full", "closed form", "ASVD", "fit")),
        Arm(window=0),
        Arm("fit", bits=4, group=32),
        Arm(key_share=0.25),
        Arm("ASVD", condition="one pass"),
    ],
}


def arms(profile: str) -> list[Arm]:
    """`ARMS`, and the arms whose costs and errors alone are measured."""
    held_out = [Arm(factors, condition="held-out") for factors in (*FITTED, "random fit")]
    return [Arm("forward", condition="cost"), *held_out, *ARMS[profile]]


def seeds(arm: Arm, profile: str) -> Sequence[int]:
    """Calibration draws: errors are measured for several, of random factors for one."""
    return range(SIZES[profile].draws if arm.condition == "held-out" and arm.factors in FITTED else 1)


# -- the rules, written before the run --


def _errors(results: Results, arm: str, draw: int) -> np.ndarray:
    return np.array(list(results.values(arm, "held-out", draw, metric="relative_error").values()))


def _ratio(results: Results, a: str, b: str) -> tuple[Interval, bool]:
    """Geometric mean over layers, keys and values of the errors a / b, draws averaged; do all draws agree it is < 1?"""
    gaps: list[np.ndarray] = []
    while results.has(a, "held-out", len(gaps)) and results.has(b, "held-out", len(gaps)):
        gaps.append(np.log(_errors(results, a, len(gaps))) - np.log(_errors(results, b, len(gaps))))
    mean = np.mean(gaps, axis=0)
    return paired_bootstrap(mean, np.zeros_like(mean)), all(gap.mean() < 0 for gap in gaps)


def _order(results: Results) -> Outcome:
    steps = [_ratio(results, *pair) for pair in (("closed form", "fit"), ("fit", "ASVD"), ("ASVD", "SVD"))]
    won = sum(interval.high < 1 and agree for interval, agree in steps)
    worst = max((interval for interval, _ in steps), key=lambda interval: interval.high)
    return Outcome.of(
        worst,
        grade(won == 3, won > 0),
        scale=SCALE,
        control="the next one in the order",
        quantity="worst of 3 neighbours: held-out error of keys and values, ratio",
    )


def _start(results: Results) -> Outcome:
    untrained, _ = _ratio(results, "random fit", "ASVD")
    trained, _ = _ratio(results, "random fit", "fit")
    return Outcome.of(
        untrained,
        grade(untrained.low > 1, trained.low > 1),
        scale=SCALE,
        control="ASVD without any training",
        quantity="held-out error, trained from random factors / ASVD untrained",
    )


def _perplexity(results: Results, arm: Arm) -> Perplexity:
    return results.perplexity(arm.name, "wikipedia")


def _against_asvd(results: Results) -> Outcome:
    full = results.perplexity("full", "wikipedia")
    fit, asvd = _perplexity(results, Arm("fit")), _perplexity(results, Arm("ASVD"))
    gap = compare(fit, asvd)
    # half of what ASVD loses: the mean loss of the arm twice, less the one of ASVD, is below that of the full cache
    half = paired_bootstrap(2 * fit.nll - asvd.nll, full.nll, full.counts, statistic=difference)
    return Outcome.of(
        gap,
        grade(gap.high < 1 and half.high < 0, gap.high < 1),
        scale=SCALE,
        control="ASVD with the same rank and window, untrained",
        quantity="perplexity at 80 %, CSKV (fit) / ASVD",
    )


def _window(results: Results) -> Outcome:
    none, some, much = (_perplexity(results, Arm(window=window)) for window in (0, 32, 128))
    gap = compare(some, none)
    later = paired_bootstrap(some.nll - much.nll, none.nll - some.nll, none.counts, statistic=difference)
    return Outcome.of(
        gap,
        grade(gap.high < 1 and later.high < 0, gap.high < 1),
        scale=SCALE,
        control="no exact token but the query's own",
        quantity="perplexity at 80 %, window 32 / window 0",
    )


def _gap(a: Arm, b: Arm) -> Gap:
    return Gap(a, b, "nll", "perplexity", seeds=(0,))


READ = "read token by token, window 32"
CLAIMS = [
    Claim(
        "cskv-order",
        "Factors start best from the activation-aware SVD, training improves them, and none beats the closed form.",
        "training from ASVD is its method; the closed form is our addition (a theorem on the calibration tokens only)",
        _order,
        "Relative error of keys and of values of every layer at rank 36 of 192 on validation articles, three "
        "calibration draws: holds if closed form / fit, fit / ASVD and ASVD / SVD all have a 95 % interval (geometric "
        "mean, bootstrap over the keys and the values of each layer, logarithms averaged over draws) below 1 and every "
        "draw agrees; partly if one or two do.",
    ),
    Claim(
        "cskv-start",
        "Starting from an SVD is essential: from random factors the same training fails.",
        "stated in its ablation",
        _start,
        "As cskv-order, one draw, 200 steps: holds if the interval of trained random factors / ASVD without training "
        "lies above 1; partly if only the one of trained random / trained from ASVD does.",
    ),
    Claim(
        "cskv-asvd",
        "At 80 % compression CSKV keeps what ASVD without training loses.",
        "LongEval 0.90-0.94 with CSKV, 0.04-0.26 with ASVD (LongChat-7B, 4k-10k tokens)",
        _against_asvd,
        "Perplexity of test articles at rank 36, window 32, read token by token: holds if the 95 % interval (paired "
        "bootstrap over articles) of fit / ASVD lies below 1 and the fit adds less than half of what ASVD adds to the "
        "loss of the full cache (interval of the difference below 0); partly if only the ratio does.",
    ),
    Claim(
        "cskv-closed-form",
        "The closed form, which needs no training, serves the model better than the training it is the optimum of.",
        "not in the paper, which trains",
        Every(
            (_gap(Arm(), Arm("fit")),),
            BELOW_ONE,
            partly=Bound(high=1.01),
            quantity="perplexity at 80 %, closed form / fit",
            control="the paper's training, 200 steps a layer from ASVD",
            scale=SCALE,
            arms=f"test articles, {READ}",
        ),
    ),
    Claim(
        "cskv-window",
        "A window of 32 exact tokens helps, and a larger one adds less and less.",
        "stated in its ablation: about 32 is enough",
        _window,
        "Closed form, rank 36: holds if perplexity with window 32 / 0 has an interval below 1 and going from 32 to 128 "
        "lowers the mean loss by less than going from 0 to 32 (interval of the difference below 0); partly if only the "
        "first.",
    ),
    Claim(
        "cskv-bits",
        "Storing the features in 4 bits costs almost nothing.",
        "little loss at 80 % times 4 bits, 95 % in total (its counting leaves the scales out)",
        Every(
            # both in groups of 32, so that both keep as many exact tokens
            tuple(_gap(Arm(f, bits=4, group=32), Arm(f, group=32)) for f in ("closed form", "fit")),
            Bound(high=1.02),
            partly="any",
            quantity="perplexity at 80 %, 4 bits / 16 bits",
            control="the same rank and groups of tokens in 16 bits",
            scale=SCALE,
            arms=f"closed form, and the fit trained through the quantiser, both in groups of 32 tokens, {READ}",
        ),
    ),
    Claim(
        "cskv-keys",
        "At equal size, keys should get fewer features than values.",
        "its scripts: density 0.25 for keys, 0.75 for values; the main table: equal",
        Every(
            tuple(_gap(Arm(density=density, key_share=0.25), Arm(density=density)) for density in (MAIN, 0.5)),
            BELOW_ONE,
            partly="any",
            quantity="perplexity, a quarter of the rank for keys / half",
            control="equal ranks, same bytes",
            scale=SCALE,
            arms=f"closed form, ranks 18 and 54 / 36 and 36, 48 and 144 / 96 and 96, {READ}",
        ),
    ),
]


# -- what is measured --


@torch.inference_mode()
def streamed_perplexity(
    model: Any, policy: Policy | None, tokens: text.TokenSet, first: int = FROM, prefill: str = "streamed"
) -> tuple[Perplexity, float]:
    """Perplexity from a cache that is filled as if every token had been decoded.

    Args:
        model: a language model.
        policy: None for the full cache.
        tokens: documents, [n, T].
        first: first position that is predicted and counted.
        prefill: "exact" takes each document for a prompt, whose tokens see it uncompressed.

    Returns:
        The perplexity, and the bits kept for each number of keys and values after T tokens.
    """
    nll, kept = np.zeros(len(tokens.ids)), 8.0 * stored_dtype(model).itemsize
    for index, ids in enumerate(tokens.ids.split(1)):
        cache = None if policy is None else policy.cache(model, prefill=prefill)
        if cache is None:
            nll[index] = _nll(model(ids).logits[0, first - 1 : -1], ids[0, first:])
            continue
        for start in range(0, ids.shape[1], PIECE):
            logits = model(ids[:, start : start + PIECE], **cache_argument(cache)).logits[0]
            begin = max(0, first - 1 - start)
            target = ids[0, start + begin + 1 : start + PIECE + 1]
            nll[index] += _nll(logits[begin : begin + len(target)], target)
        cache.finish()
        full = ids.shape[1] * sum(CompressedCache.layer_shape(model, i).token_bytes for i in range(len(cache.layers)))
        kept = 8.0 * stored_dtype(model).itemsize * cache.compressed_nbytes / full
    counts = np.full(len(nll), tokens.ids.shape[1] - first)
    value = math.exp(nll.sum() / counts.sum())
    return Perplexity(value, nll, counts, list(tokens.units), tokens.corpus), kept


def _nll(logits: Tensor, target: Tensor) -> float:
    return F.cross_entropy(logits.float(), target, reduction="sum").item() if len(target) else 0.0


def relative_errors(held_out: Sequence[Moments], factors: Sequence[Factors], rank: int) -> dict[str, float]:
    """||X W - X A B||^2 / ||X W||^2 of keys and values of every layer, from the second moment of held-out inputs."""
    errors = {}
    for index, (layer, found) in enumerate(zip(held_out, factors, strict=True)):
        for kind in "KV":
            W, A, B = (
                getattr(layer, f"W_{kind}").float(),
                getattr(found, f"A_{kind}")[:, :rank],
                getattr(found, f"B_{kind}")[:rank],
            )
            lost, G = W - A @ B, layer.gram
            errors[f"layer {index} {kind}"] = float(((G @ lost) * lost).sum() / ((G @ W) * W).sum())
    return errors


def _path(folder: str | Path, factors: str, density: float, bits: int, draw: int) -> Path:
    trained = f" density {density:g} bits {bits}" if factors in STARTS else ""
    return Path(folder) / f"{factors}{trained} draw {draw}.safetensors".replace(" ", "-")


def _calibration(profile: str, draw: int) -> text.TokenSet:
    size = SIZES[profile]
    return text.calibration("wikipedia", sequences=size.sequences, length=size.length, seed=draw)


def fitted(
    model: Any,
    profile: str,
    folder: str | Path,
    factors: str = "closed form",
    density: float = MAIN,
    bits: int = 16,
    draw: int = 0,
) -> CSKV:
    """A policy with factors from the calibration text.

    Args:
        model: SmolLM2, or another model of its tokenizer.
        profile: "study" or "quick": how much text, and how many steps.
        folder: where it is kept, so that the next call reads it; one for each model and profile.
        factors: "closed form", "ASVD", "SVD", "fit" (trained from ASVD) or "random fit".
        density, bits: of the policy. What is trained is trained for them; the others are nested, so that any density
            can be cut from them.
        draw: of the calibration text.

    Returns:
        The policy with window 32 and four sinks.
    """
    path = _path(folder, factors, density, bits, draw)
    if path.exists():
        return replace(CSKV.load(path), density=density, bits=bits)
    if factors != "SVD":
        _moments(model, profile, draw)
    began = time.process_time()  # other programs on the machine do not count
    if factors in STARTS:
        start = CSKV(_untrained(model, profile, STARTS[factors], draw), density=density, bits=bits)
        recipe = Recipe(steps=SIZES[profile].steps, lr=1e-3, seed=draw)
        policy = reconstruct(model, start, _calibration(profile, draw), recipe, progress=False)
    else:
        policy = CSKV(_untrained(model, profile, INITS[factors], draw), density=density, bits=bits)
    seconds = time.process_time() - began
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"seconds": seconds}))
    policy.save(path)
    return policy


@functools.lru_cache(maxsize=1)  # one pass over the text serves all factors of a draw
def _moments(model: Any, profile: str, draw: int) -> tuple[tuple[Moments, ...], float]:
    start = time.process_time()
    found = moments(model, _calibration(profile, draw))
    return found, time.process_time() - start


def _untrained(model: Any, profile: str, init: str, draw: int) -> tuple[Factors, ...]:
    return factorise(_moments(model, profile, draw)[0], init, seed=draw)


@functools.lru_cache(maxsize=1)
def _model(profile: str, dtype: str) -> Any:
    return models.smollm2(getattr(torch, dtype), layers=SIZES[profile].layers)


@functools.lru_cache(maxsize=1)
def _held_out(profile: str, dtype: str) -> tuple[Moments, ...]:
    articles = text.evaluation(
        "wikipedia", sequences=SIZES[profile].held_out, length=SIZES[profile].length, split="validation"
    )
    return moments(_model(profile, dtype), articles)


def _fitted(job: Job) -> CSKV:
    arm = job.arm
    model = _model(job.profile, job.dtype)
    return fitted(model, job.profile, job.folder, arm.factors, arm.density, arm.bits, job.seed)


def fit_before(run: Run, jobs: Sequence[Job]) -> None:
    """The factors that some jobs need, draw by draw."""
    fits: dict[Job, None] = {}
    for job in jobs:
        for factors in FITTED if job.arm.condition == "cost" else (job.arm.factors,):
            trained = {"density": job.arm.density, "bits": job.arm.bits} if factors in STARTS else {}
            if factors != "full":
                fits[replace(job, arm=Arm(factors, **trained))] = None
    run.each(_fitted, list(fits), "factors")


def measure(job: Job) -> Iterator[Row]:
    """Costs, errors of keys and values, or a perplexity with the bits that are kept."""
    arm, size = job.arm, SIZES[job.profile]
    model = _model(job.profile, job.dtype)
    if arm.condition == "cost":
        yield from _costs(job, model)
    elif arm.condition == "held-out":
        policy = _fitted(job)
        rank = policy.ranks(CompressedCache.layer_shape(model, 0))[0]
        for unit, error in relative_errors(_held_out(job.profile, job.dtype), policy.factors, rank).items():
            yield Row("relative_error", error, unit)
    else:
        policy = None
        if arm.factors != "full":
            fields = ("window", "key_share", "sinks", "group")
            policy = replace(_fitted(job), **{name: getattr(arm, name) for name in fields})
        tokens = text.evaluation("wikipedia", sequences=size.documents, length=size.tokens)
        prefill = "streamed" if arm.condition == "wikipedia" else "exact"
        found, bits = streamed_perplexity(model, policy, tokens, size.first, prefill)
        yield from documents(found, cost=bits)


def _costs(job: Job, model: Any) -> Iterator[Row]:
    """Processor time of a forward pass over the calibration text without the head; of each fit, in such passes."""
    ids = _calibration(job.profile, 0).ids
    with torch.inference_mode():
        model.base_model(ids[:4])
        began = time.process_time()
        model.base_model(ids[:4])
    forward = (time.process_time() - began) * len(ids) / len(ids[:4])
    yield Row("seconds", forward)
    yield Row("forward_passes", _moments(model, job.profile, 0)[1] / forward, arm="moments")
    for factors in FITTED:
        told = json.loads(_path(job.folder, factors, MAIN, 16, 0).with_suffix(".json").read_text())
        yield Row("forward_passes", told["seconds"] / forward, arm=factors)


STUDY = Study(
    slug="cskv",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=seeds,
    data=lambda: {"wikipedia": text.corpus_hash("wikipedia"), "smollm2": models.smollm2_hash()},
    before=fit_before,
    kind=lambda arm: f"{arm.factors}, {arm.condition}",
    workers=1,
)
