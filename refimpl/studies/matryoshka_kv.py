"""The experiment behind the MatryoshkaKV chapter: bases by PCA, trained, and trained without one of the paper's parts.

Main part: our own Llama (4 layers, 4 heads of 32 channels). Five seeds; a seed draws the windows of text, all from the
calibration split, that PCA sees once and that every trained arm trains on in the same order, for the same steps. The
trained arms have one grid of learning rates, chosen on validation articles with a seed that is not used again. Caches
keep 75, 50, 37.5 and 25 % of the channels, uniformly or as a greedy search on other calibration text says; the measured
text is of test articles. What is lost is told in bits per byte, in divergence from the model as it is, and in how often
the most probable token is right. Attention sees projected keys and values while it reads (`projected`), which tests
compare with the real cache.

Beside it, SmolLM2 with one training: direction only.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refimpl.core.cache import Policy, cache_argument
from refimpl.core.files.io import atomic_write
from refimpl.core.train.loop import History, Recipe
from refimpl.kvcache.matryoshka_kv import (
    MatryoshkaKV,
    Moments,
    Table,
    calibrate,
    fit_bases,
    pca,
    projected,
    random_orthogonal,
    search,
)
from refimpl.kvcache.ragged import Bases
from refimpl.lab import models, wheels
from refimpl.lab.data import text
from refimpl.lab.data.windows import windows
from refimpl.lab.measure.bits import token_bytes
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.measure.statistics import t_interval
from refimpl.lab.models import small
from refimpl.lab.study.claims import ABOVE_ZERO, BELOW_ONE, Bound, Claim, Every, Gap, Outcome, Place, grade, over_seeds
from refimpl.lab.study.claims import Arm as Compared
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, Row, Study, curves, documents

SEEDS = (1, 2, 3, 4, 5)
RATES = (3e-3, 1e-2, 3e-2)
BATCH = 4  # windows a step
LENGTH = 256
FULL = 1.0
BUDGETS = (0.75, 0.5, 0.375, 0.25)
OWN = 0.5  # budget whose rank the fixed-rank arm is trained for
LLAMA, SMOLLM2 = "wikipedia llama", "wikipedia smollm2"
SCALE = "a Llama of 0.8M weights, 4 heads of 32 channels, contexts of 256 tokens; the paper: 7B, heads of 128"
TRAINED: dict[str, dict[str, Any]] = {"MKV": {}, "fixed rank": {"fixed": True}, "unconstrained": {"orthogonal": False}}
"""Trained arms, and the options in which they differ."""
SEARCHED = "MKV searched"


@dataclass(frozen=True)
class Size:
    """Size of the experiment on the small Llama: steps, windows measured and searched on, seeds, entries lowered in a
    round of the search, its step. And on SmolLM2: blocks, sequences of 512 tokens to calibrate and train on, steps,
    documents measured, their tokens.
    """

    steps: int
    measured: int
    searched: int
    seeds: tuple[int, ...]
    share: float
    step: int
    layers: int | None
    sequences: int
    smollm2_steps: int
    documents: int
    tokens: int


SIZES = {
    "study": Size(250, 128, 4, SEEDS, 1 / 8, 4, None, 32, 80, 16, 256),
    "quick": Size(6, 8, 1, SEEDS[:1], 1.0, 16, 2, 2, 2, 2, 48),
}


@dataclass(frozen=True)
class Arm:
    """Bases of a model, measured at every budget; its records are complete when the least one is there.

    Attributes:
        name: a key of `TRAINED` or, for SmolLM2, "trained" or "unconstrained"; "PCA", "random" (rotations), "original"
            (the model as it is).
        model: `LLAMA` or `SMOLLM2`.
    """

    name: str
    model: str = LLAMA

    @property
    def condition(self) -> str:
        """Of the least budget."""
        return self.model if self.name == "original" else f"{self.model} {BUDGETS[-1]:.1%}"

    @property
    def validation(self) -> str:
        """Of the trainings that choose a rate."""
        return f"{self.model} validation"


def arms(profile: str) -> list[Arm]:
    """Jobs of a profile, the longest first.

    Example:
        >>> [arm.name for arm in arms("quick")]
        ['trained', 'original', 'original', 'MKV', 'PCA']
    """
    if profile == "quick":
        smol, llama = ["trained", "original"], ["original", "MKV", "PCA"]
    else:
        smol = ["trained", "unconstrained", "original", "PCA", "random"]
        llama = ["original", *TRAINED, "PCA", "random"]
    return [*(Arm(name, SMOLLM2) for name in smol), *map(Arm, llama)]


def seeds(arm: Arm, profile: str) -> Sequence[int]:
    """Several of the small Llama's text; one where nothing is drawn, and for SmolLM2."""
    return SIZES[profile].seeds if arm.model == LLAMA and arm.name != "original" else (0,)


# -- the rules, written before the run --


def _condition(budget: float) -> str:
    return f"{LLAMA} {budget:.1%}"


def _at(arm: str, budget: float) -> Place:
    return Place(arm, _condition(budget))


def _gap(a: str, b: str, budget: float) -> Gap:
    return Gap(_at(a, budget), _at(b, budget), "bits per byte", seeds=SEEDS)


class Lost(Gap):
    """Of bits per byte above those of the model as it is."""

    def numbers(self, results: Results, arm: Compared) -> np.ndarray:
        """One for each seed."""
        whole = results.values("original", LLAMA, metric="bits per byte")[""]
        return over_seeds(results, arm, "bits per byte", self.seeds) - whole


def _lost(a: str, b: str) -> tuple[Gap, ...]:
    small_budgets = (budget for budget in BUDGETS if budget <= 0.5)
    return tuple(Lost(_at(a, x), _at(b, x), "bits per byte", "ratio", SEEDS) for x in small_budgets)


class LostToWhole(Gap):
    """Of bits per byte above those of the whole method, means over all budgets."""

    def numbers(self, results: Results, arm: Compared) -> np.ndarray:
        """One for each seed."""

        def over(name: str, budget: float) -> np.ndarray:
            return over_seeds(results, _at(name, budget), "bits per byte", self.seeds)

        return np.mean([over(arm.name, budget) - over("MKV", budget) for budget in BUDGETS], 0)


def _low(results: Results) -> Outcome:
    gaps = [gap.interval(results) for gap in _lost("MKV", "PCA")]
    worst = max(gaps, key=lambda gap: gap.high)
    return Outcome.of(
        worst,
        grade(worst.high < 0.9, any(gap.high < 1 for gap in gaps)),
        scale=SCALE,
        control="PCA of the same text",
        quantity="worst of 3: bits per byte lost, trained / PCA",
    )


def _own_rank(results: Results) -> Outcome:
    others = [_gap("fixed rank", "MKV", budget).interval(results) for budget in BUDGETS if budget != OWN]
    own = _gap("fixed rank", "MKV", OWN).interval(results)
    worst = min(others, key=lambda g: g.low)
    return Outcome.of(
        worst,
        grade(worst.low > 0 and own.high < 0, any(g.low > 0 for g in others)),
        scale=SCALE,
        control="ranks drawn in every step, as many steps",
        quantity="worst of 3 other ranks: bits per byte, one rank minus drawn ranks",
    )


def _orthogonality(results: Results) -> Outcome:
    def gap(budget: float) -> np.ndarray:
        free, bound = (
            over_seeds(results, _at(arm, budget), "bits per byte", SEEDS) for arm in ("unconstrained", "MKV")
        )
        return free - bound

    slope = t_interval(gap(0.75) - gap(0.25))
    worst = min((t_interval(gap(budget)) for budget in (FULL, 0.75)), key=lambda g: g.low)
    good = [worst.low > 0, slope.low > 0]
    return Outcome.of(
        worst,
        grade(all(good), any(good)),
        scale=SCALE,
        control="the same training through Cayley",
        quantity="worst of 100 and 75 %: bits per byte, unconstrained minus orthogonal",
    )


def _ninety(results: Results) -> Outcome:
    whole = results.values("original", LLAMA, metric="accuracy")[""]
    share = t_interval(over_seeds(results, _at("MKV", 0.375), "accuracy", SEEDS) / whole)
    return Outcome.of(
        share,
        grade(share.low > 0.9, share.high > 0.9),
        scale=SCALE,
        control="the model as it is",
        quantity="share of its accuracy on next tokens kept at 37.5 % of the cache",
    )


_OVER = "t interval over five seeds"
CLAIMS = [
    Claim(
        "mkv-high-rank",
        "While three quarters of the cache are kept, PCA does as well as trained bases.",
        "average accuracy at 75 %: 60.67 PCA, 61.55 trained (LLaMA2-7B); 63.23 and 65.90 (Mistral-7B)",
        Every(
            (Gap(_at("MKV", 0.75), _at("PCA", 0.75), "bits per byte", "ratio", SEEDS),),
            Bound(0.99, 1.01),
            partly=Bound(0.97, 1.03),
            quantity="bits per byte at 75 % of the cache, trained / PCA",
            control="PCA of the same text",
            scale=SCALE,
            arms="test articles",
        ),
    ),
    Claim(
        "mkv-low-rank",
        "At half of the cache and less, trained bases are clearly better than PCA.",
        "average accuracy at 50, 37.5, 25 %: 43.07, 33.14, 32.92 PCA; 59.11, 56.94, 48.73 trained (LLaMA2-7B, 61.16)",
        _low,
        f"Bits per byte lost against the whole cache, trained / PCA, at 50, 37.5 and 25 %, {_OVER} of the logarithm: "
        "holds if all three upper ends lie below 0.9, partly if one lies below 1.",
        paper_effect=1 - (61.16 - 59.11) / (61.16 - 43.07),
    ),
    Claim(
        "mkv-own-rank",
        "Bases trained at one rank are best at that rank only.",
        "an ablation figure; no numbers in the text",
        _own_rank,
        f"Trained at rank 16 (50 %) against drawn ranks, bits per byte, {_OVER}: holds if drawn ranks win at 75, 37.5 "
        "and 25 % and lose at 50 %; partly if they win at all three and do not lose, or win at one or two.",
    ),
    Claim(
        "mkv-sampling",
        "Of the method's parts, drawing ranks during training matters most.",
        "an ablation figure, as its reviewers read it",
        Every(
            (LostToWhole(Place("fixed rank"), Place("unconstrained"), "bits per byte", seeds=SEEDS),),
            ABOVE_ZERO,
            quantity="mean of 4 budgets, bits per byte: without drawn ranks - without Cayley",
            control="training without the orthogonality",
            scale=SCALE,
            arms="bases trained at one rank, and without orthogonality, each less the whole method",
        ),
    ),
    Claim(
        "mkv-orthogonal",
        "Orthogonality matters mainly where much of the cache is kept.",
        "an ablation figure, as its reviewers read it: above 50 %",
        _orthogonality,
        f"Bits per byte, unconstrained minus orthogonal, {_OVER}: holds if it lies above 0 at 100 and at 75 %, and the "
        "gap at 75 % minus that at 25 % lies above 0; partly if only one of the two.",
    ),
    Claim(
        "mkv-search",
        "Ranks found by greedy search serve better than the same rank everywhere.",
        "an ablation figure: a little",
        Every(
            _lost(SEARCHED, "MKV"),
            BELOW_ONE,
            partly="any",
            quantity="bits per byte lost, searched / uniform ranks",
            control="the same rank everywhere",
            scale=SCALE,
            arms="trained bases at 50, 37.5 and 25 %, ranks lowered by 4, four entries a round, by divergence on "
            "calibration text that was not trained on",
        ),
    ),
    Claim(
        "mkv-ninety",
        "Over 90 % of the performance remains with 40 % of the cache.",
        "average accuracy 56.94 of 61.16 at 37.5 % (LLaMA2-7B, 93 %), 61.29 of 66.17 (Mistral-7B, 93 %)",
        _ninety,
        f"How often the most probable token is right on test articles, at 37.5 %, uniform ranks, as a share of the "
        f"whole cache's, {_OVER}: holds if it lies above 0.9, partly if it reaches above.",
    ),
]


# -- text --


@functools.cache
def _windows(split: str) -> tuple[Tensor, list[str]]:
    return windows("wikipedia", split, LENGTH, small.tokenizer())


def training_text(seed: int, size: Size) -> tuple[Tensor, Tensor]:
    """Windows of the calibration split, drawn by a seed: to calibrate and train on, and others to search on.

    Returns:
        int64 [steps * BATCH, LENGTH] and [size.searched, LENGTH].

    Example:
        >>> [len(rows) for rows in training_text(1, SIZES["quick"])]
        [24, 1]
    """
    ids, _ = _windows("calibration")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    count = size.steps * BATCH
    return ids[order[:count], :LENGTH], ids[order[count : count + size.searched], :LENGTH]


def measured_text(split: str, size: Size) -> Tensor:
    """Windows spread over all documents of a split, int64 [size.measured, LENGTH + 1].

    Example:
        >>> measured_text("test", SIZES["quick"]).shape
        torch.Size([8, 257])
    """
    ids, _ = _windows(split)
    return ids[:: len(ids) // size.measured][: size.measured]


# -- measuring --

Change = Callable[[], Any] | None  # makes the cache of one forward pass


@torch.inference_mode()
def scores(model: Any, rows: Tensor, change: Change, exact: Sequence[Tensor] | None) -> dict[str, float]:
    """Scores of a small Llama on windows of text.

    Args:
        model: the small Llama.
        rows: int64 [n, LENGTH + 1].
        change: makes the cache of a forward pass; None for the model as it is.
        exact: log-probabilities of the model as it is (`exact_scores`).

    Returns:
        "bits per byte", "accuracy" (share of tokens that are the most probable one), and "divergence" in nats a token.
    """
    lengths = token_bytes(small.tokenizer(), model.config.vocab_size)
    nll = right = gap = 0.0
    for k, batch in enumerate(rows.split(16)):
        cache = {} if change is None else cache_argument(change())
        log_q = model(batch[:, :-1], **cache).logits.float().log_softmax(-1)
        targets = batch[:, 1:]
        nll -= float(log_q.gather(-1, targets.unsqueeze(-1)).double().sum())
        right += float((log_q.argmax(-1) == targets).sum())
        if exact is not None:
            gap += float((exact[k].exp() * (exact[k] - log_q)).double().sum())
    count = rows[:, 1:].numel()
    values = {"bits per byte": nll / np.log(2) / float(lengths[rows[:, 1:]].sum()), "accuracy": right / count}
    return values if exact is None else values | {"divergence": gap / count}


@torch.inference_mode()
def exact_scores(model: Any, rows: Tensor) -> list[Tensor]:
    """Log-probabilities of the model as it is, batch by batch as `scores` takes them."""
    return [model(batch[:, :-1]).logits.float().log_softmax(-1) for batch in rows.split(16)]


# -- the small Llama --


def rank_of(budget: float, d: int = 32) -> int:
    """The uniform rank of a budget.

    Example:
        >>> [rank_of(budget) for budget in BUDGETS]
        [24, 16, 12, 8]
    """
    return int(budget * d)


def measure(job: Job) -> Iterator[Row]:
    """One seed of one arm: bases are made, trained or not, and measured at every budget."""
    if job.arm.model == SMOLLM2:
        yield from _smollm2(job)
        return
    arm, seed, size = job.arm.name, job.seed, SIZES[job.profile]
    model, rows = small.load("llama-medium"), measured_text(job.split, size)
    if arm == "original":
        yield from (Row(*found) for found in scores(model, rows, None, None).items())
        return
    ids, other = training_text(seed, size)
    moments = calibrate(model, ids, batch_size=16)
    began = time.process_time()
    bases, history = _bases(job, model, ids, moments)
    seconds = time.process_time() - began
    exact = exact_scores(model, rows)

    def found(ranks: int | None | Table) -> dict[str, float]:
        return scores(model, rows, lambda: projected(model, bases, ranks), exact)

    if job.split == "validation":
        own = [OWN] if arm == "fixed rank" else BUDGETS  # what the arm is made for
        lost = [found(rank_of(budget))["divergence"] for budget in own]
        yield Row("log divergence", float(np.mean(np.log(lost))))  # budgets count alike
        return
    for budget in (FULL, *BUDGETS):
        yield from (Row(*pair, condition=_condition(budget)) for pair in found(rank_of(budget)).items())
    if history is not None:
        yield Row("cpu seconds", seconds, condition=f"{LLAMA} training")
        if seed == SEEDS[0]:
            yield from curves(history, every=max(1, size.steps // 50), condition=LLAMA)
    if arm == "MKV":
        yield from _searches(job, model, bases, other, found)


def _bases(
    job: Job, model: Any, ids: Tensor, moments: Sequence[Moments | None]
) -> tuple[tuple[Bases | None, ...], History | None]:
    arm, steps = job.arm.name, SIZES[job.profile].steps
    if job.rate is None:
        return (pca(moments) if arm == "PCA" else random_orthogonal(moments, job.seed)), None
    options = dict(TRAINED[arm])
    if options.pop("fixed", False):
        options["rank"] = rank_of(OWN)
    recipe = Recipe(steps, lr=job.rate, warmup=steps // 10, clip=1.0, seed=job.seed)
    return fit_bases(model, pca(moments), ids, recipe, batch_size=BATCH, progress=False, **options)


def _searches(
    job: Job, model: Any, bases: tuple[Bases | None, ...], other: Tensor, found: Callable[[Table], dict[str, float]]
) -> Iterator[Row]:
    """Search for ranks on text that was not trained on; for one seed also as Algorithm 1 and as the authors' code."""
    size, first = SIZES[job.profile], job.seed == SEEDS[0]
    ways: dict[str, dict[str, Any]] = {SEARCHED: {"step": size.step, "share": size.share}}
    if first and job.profile == "study":
        ways["MKV searched one by one"] = {"step": size.step}
        ways["MKV searched as the code"] = {"step": 8, "share": 0.75, "error": "hidden"}
    for arm, options in ways.items():
        began = time.process_time()
        path = search(model, bases, other[:, : LENGTH // 2], budget=BUDGETS[-1], progress=False, **options)
        yield Row("cpu seconds", time.process_time() - began, arm=arm, condition=f"{LLAMA} search")
        for budget in BUDGETS:
            fitting = [table for table in path if _share(table) <= budget + 1e-9]
            if not fitting:  # the least rank is a step
                continue
            table, condition = fitting[-1], _condition(budget)
            for metric, value in (found(table) | {"share": _share(table)}).items():
                yield Row(metric, value, arm=arm, condition=condition)
            if first and arm == SEARCHED:
                for unit, rank in _entries(table):
                    yield Row("rank", rank, unit, " ranks", condition, arm)


def _share(table: Table, d: int = 32) -> float:
    ranks = [rank for row in table if row is not None for side in row for rank in side]
    return sum(ranks) / (d * len(ranks))


def _entries(table: Table) -> Iterator[tuple[str, int]]:
    for layer, row in enumerate(table):
        for side, ranks in zip("KV", row or (), strict=True):
            for head, rank in enumerate(ranks):
                yield f"{side} layer {layer} head {head}", rank


# -- SmolLM2 --


def fitted(model: Any, profile: str, folder: str | Path, arm: str = "trained") -> MatryoshkaKV:
    """A policy with bases from the calibration text.

    Args:
        model: SmolLM2, or another model of its tokenizer.
        profile: "study" or "quick": how much text, and how many steps.
        folder: where it is kept, so that the next call reads it; one for each model and profile.
        arm: "PCA", "random" (rotations), "trained" or "unconstrained" (trained without orthogonality). All see the
            same text.

    Returns:
        The policy at full rank; a budget sets uniform ranks.
    """
    path = _path(folder, arm)
    if path.exists():
        policy = Policy.load(path)
        assert isinstance(policy, MatryoshkaKV)
        return policy
    size = SIZES[profile]
    ids = text.calibration("wikipedia", sequences=size.sequences, length=512, seed=0).ids
    began = time.process_time()
    moments = calibrate(model, ids, batch_size=2)
    if arm == "random":
        bases = random_orthogonal(moments)
    else:
        bases = pca(moments)
        if arm != "PCA":
            recipe = Recipe(size.smollm2_steps, lr=3e-3, warmup=size.smollm2_steps // 10, clip=1.0)
            bases, _ = fit_bases(
                model, bases, ids.view(-1, 256), recipe, batch_size=2, orthogonal=arm == "trained", progress=False
            )
    seconds = time.process_time() - began
    policy = MatryoshkaKV(tuple(b and Bases(*(x.cpu() for x in (b.Q_K, b.Q_V, b.mu_K, b.mu_V))) for b in bases))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"seconds": seconds}))
    policy.save(path)
    return policy


def _path(folder: str | Path, arm: str) -> Path:
    return Path(folder) / f"{arm}.safetensors"


def _smollm2(job: Job) -> Iterator[Row]:
    """Make the policy of an arm and measure its perplexity and divergence, article by article, at every budget."""
    arm, size = job.arm.name, SIZES[job.profile]
    model = models.smollm2(getattr(torch, job.dtype), layers=size.layers)
    bases: tuple[Bases | None, ...] = ()
    ranks: dict[str, int | None] = {SMOLLM2: None}
    if arm != "original":
        bases = fitted(model, job.profile, job.folder, arm).bases
        told = json.loads(_path(job.folder, arm).with_suffix(".json").read_text())
        yield Row("cpu seconds", told["seconds"], condition=f"{SMOLLM2} cost")
        ranks = {f"{SMOLLM2} {budget:.1%}": rank_of(budget, 64) for budget in (FULL, *BUDGETS)}
    tokens = text.evaluation("wikipedia", sequences=size.documents, length=size.tokens)
    nll, gap = (np.zeros((len(ranks), len(tokens.ids))) for _ in range(2))
    for k, row in enumerate(tokens.ids):
        with torch.inference_mode():
            log_p = model(row[None]).logits[0, :-1].float().log_softmax(-1)
            for i, rank in enumerate(ranks.values()):
                log_q = log_p
                if rank is not None:
                    cache = cache_argument(projected(model, bases, rank))
                    log_q = model(row[None], **cache).logits[0, :-1].float().log_softmax(-1)
                nll[i, k] = -float(log_q.gather(-1, row[1:, None]).double().sum())
                gap[i, k] = float((log_p.exp() * (log_p - log_q)).double().sum())
    counts = np.full(len(tokens.ids), tokens.ids.shape[1] - 1, dtype=np.int64)
    for i, condition in enumerate(ranks):
        value = float(np.exp(nll[i].sum() / counts.sum()))
        yield from documents(Perplexity(value, nll[i], counts, tokens.units), condition=condition)
        yield Row("divergence", float(gap[i].sum() / counts.sum()), condition=condition)


def _data() -> dict[str, str]:
    weights = wheels.sha256(small.path("llama-medium") / "model.safetensors")
    return {"wikipedia": text.corpus_hash("wikipedia"), "smollm2": models.smollm2_hash(), "llama-medium": weights}


STUDY = Study(
    slug="matryoshka_kv",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=seeds,
    data=_data,
    rates=lambda arm: RATES if arm.model == LLAMA and arm.name in TRAINED else (),
    score=lambda values: -values["log divergence"],
    kind=lambda arm: f"{arm.name}, {arm.model}",
    dtype="bfloat16",  # of SmolLM2; the small Llama computes in fp32
)
