"""Language modelling and retrieval at 100, 50, 20 and 5 % of a cache's bytes: all compression policies on one bench.

SmolLM2-135M reads 2048 tokens, the cache keeps what its method keeps within a share of the full cache's bytes (windows,
sinks, scales and slots included), and the model is asked: what follows in the article, facts hidden in it at some
depth, one of many like lines, a variable, and something more after another question. Methods that are fitted saw the
same Wikipedia calibration tokens; none saw the test articles. This is no paper's experiment; it serves the chapters on
caches and their bench.

Everything after the prompt is decoded. A question comes after the prompt was compressed, but for "SnapKV+question",
where each question stands at the end of a prompt of its own, as in that paper. At 100 % every method keeps everything,
so there is one arm: "full".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refimpl.baselines.kvcache import H2O, KIVI, Full, SnapKV, StreamingLLM, ThinK
from refimpl.core.cache import CompressedCache, Policy
from refimpl.core.errors import OptionError
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.lab.measure import longtext
from refimpl.lab.measure.statistics import Interval, compare, difference, paired_bootstrap
from refimpl.lab.measure.tasks.items import group
from refimpl.lab.study.claims import Claim, Outcome, grade
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, Row, Run, Stages, Study, documents
from refimpl.studies import cskv, matryoshka_kv

SCALE = "SmolLM2, 135M weights, 3 key/value heads of 64 channels, 2048 tokens"
BUDGETS = (0.5, 0.2, 0.05)
MAIN = 0.2  # the papers' 80 % compression
RETRIEVAL = ("passkeys", "key_values")
EVICTING = ("StreamingLLM", "H2O", "SnapKV")
NEAR = 1.10  # a perplexity within 10 % of the full cache's is called near


@dataclass(frozen=True)
class Arm:
    """A method at a budget.

    Attributes:
        method: see `METHODS`.
        budget: share of the full cache's bytes; None: as the method comes.
    """

    method: str
    budget: float | None

    @property
    def name(self) -> str:
        """As recorded.

        Example:
            >>> Arm("KIVI", 0.05).name, Arm("full", None).name
            ('KIVI 5%', 'full')
        """
        return self.method if self.budget is None else f"{self.method} {100 * self.budget:.0f}%"


@dataclass(frozen=True)
class Size:
    """Size of the experiment.

    Attributes:
        layers: blocks of the model.
        length: tokens of a context.
        contexts: of each workload, by its name; "positions" are documents.
        rest, lines, asked: of `longtext.articles` and `longtext.key_values`.
        batch: contexts read together.
        methods: all if None.
    """

    layers: int | None
    length: int
    contexts: Mapping[str, int]
    rest: int = 384
    lines: int = 32
    asked: int = 6
    batch: int = 4
    methods: tuple[str, ...] | None = None
    budgets: tuple[float, ...] = BUDGETS


SIZES = {
    "study": Size(None, 2048, {"passkeys": 4, "key_values": 4, "articles": 4, "positions": 4, "variables": 4}),
    "quick": Size(
        1,
        256,
        dict.fromkeys(("passkeys", "key_values", "articles", "variables", "positions"), 2),
        rest=64,
        lines=8,
        asked=2,
        batch=2,
        budgets=(MAIN,),
        methods=(
            "full",
            "KIVI",
            "StreamingLLM",
            "H2O",
            "SnapKV",
            "SnapKV+question",
            "ThinK",
            "CSKV-trained",
            "CSKV-trained-4bit",
            "MKV-PCA",
            "KIVI-8bit",
            "ThinK-half",
        ),
    ),
}

# -- the arms --

Make = Callable[[Any, str, str | Path, float], Policy]  # model, profile, folder of fits, budget


def _cskv(factors: str, bits: int) -> Make:
    def make(model: Any, profile: str, folder: str | Path, budget: float) -> Policy:
        base = cskv.fitted(model, profile, folder, "closed form")
        found = _within(replace(base, bits=bits), model, profile, budget)
        assert isinstance(found, type(base))
        if factors == "closed form":
            return found
        return cskv.fitted(model, profile, folder, factors, found.density, bits)

    return make


def _matryoshka(kind: str) -> Make:
    def make(model: Any, profile: str, folder: str | Path, budget: float) -> Policy:
        return _within(matryoshka_kv.fitted(model, profile, folder, kind), model, profile, budget)

    return make


def _plain(policy: Policy) -> Make:
    return lambda model, profile, folder, budget: _within(policy, model, profile, budget)


def _within(policy: Policy, model: Any, profile: str, budget: float) -> Policy:
    """The policy with its knob at the most that fits."""
    return policy.cache(model, budget=budget, length=SIZES[profile].length).policy


#: Method -> how to make it. "+question": the question is at the end of the prompt.
METHODS: dict[str, Make] = {
    "full": _plain(Full()),
    # the window of its retrieval experiments, and one scale for a value's 64 channels: else two bits need 24 %
    "KIVI": _plain(KIVI(window=32, value_group=64)),
    "StreamingLLM": _plain(StreamingLLM()),
    "H2O": _plain(H2O()),
    "SnapKV": _plain(SnapKV()),
    "SnapKV+question": _plain(SnapKV()),
    "ThinK": _plain(ThinK()),
    "CSKV-SVD": _cskv("SVD", 16),
    "CSKV-ASVD": _cskv("ASVD", 16),
    "CSKV-closed-form": _cskv("closed form", 16),
    "CSKV-trained": _cskv("fit", 16),
    "CSKV-SVD-4bit": _cskv("SVD", 4),
    "CSKV-ASVD-4bit": _cskv("ASVD", 4),
    "CSKV-closed-form-4bit": _cskv("closed form", 4),
    "CSKV-trained-4bit": _cskv("fit", 4),
    "MKV-PCA": _matryoshka("PCA"),
    "MKV-trained": _matryoshka("trained"),
    "MKV-unconstrained": _matryoshka("unconstrained"),
    "MKV-random": _matryoshka("random"),
}
#: As their papers set them, at bytes of their own.
AS_THEY_COME: dict[str, Policy] = {"KIVI-8bit": KIVI(bits=8), "ThinK-half": ThinK(channels=0.5)}
FOUR_BITS = {MAIN: ("CSKV-trained-4bit",), 0.05: tuple(name for name in METHODS if name.endswith("-4bit"))}
AT_MAIN = ("SnapKV+question", "MKV-PCA", "MKV-unconstrained", "MKV-random")  # at the main budget only
IN_ROOM = ("CSKV-SVD", "CSKV-ASVD", "CSKV-closed-form")  # not at the least budget: a rank of 3, for one arm to show
CONVERSATION = ("KIVI", "StreamingLLM", "H2O", "SnapKV", "SnapKV+question", "CSKV-trained", "MKV-trained")
STREAMED = ("KIVI", "StreamingLLM", "H2O", "CSKV-trained", "MKV-trained")  # perplexity by position


def arms(profile: str) -> list[Arm]:
    """All arms of a profile, those that turn out not to reach their budget included."""
    size = SIZES[profile]
    chosen = [Arm("full", None)]
    for budget in size.budgets:
        for method in METHODS:
            if (
                method == "full"
                or (method.endswith("-4bit") and method not in FOUR_BITS.get(budget, ()))
                or (method in AT_MAIN and budget != MAIN)
                or (method in IN_ROOM and budget == min(BUDGETS))
            ):
                continue
            chosen.append(Arm(method, budget))
    chosen += [Arm(method, None) for method in AS_THEY_COME]
    return [arm for arm in chosen if size.methods is None or arm.method in size.methods]


def policy(arm: Arm, model: Any, profile: str, folder: str | Path) -> Policy:
    """Policy of an arm; what is fitted for it is kept in a folder.

    Raises:
        OptionError: it cannot keep so little.
    """
    if arm.budget is None:
        return AS_THEY_COME.get(arm.method) or METHODS[arm.method](model, profile, folder, 1.0)
    return METHODS[arm.method](model, profile, folder, arm.budget)


def least(arm: Arm, model: Any, profile: str, folder: str | Path) -> float:
    """Fewest bytes per token that the method of an arm can keep."""
    length = SIZES[profile].length
    base = METHODS[arm.method](model, profile, folder, 1.0)
    shapes = [CompressedCache.layer_shape(model, index) for index in range(model.config.num_hidden_layers)]
    if base.knob is None:
        return sum(base.nbytes(shape, length) for shape in shapes) / length
    tightest = replace(base, **{base.knob: base.settings(shapes, length)[0]})
    return sum(tightest.nbytes(shape, length) for shape in shapes) / length


# -- the rules, written before the run --


def retrieval(results: Results, arm: str, condition: str | None = None) -> dict[str, tuple[float, float]]:
    """By article: answers written right, and answers asked for. All retrieval if no workload is named."""
    found: dict[str, tuple[float, float]] = {}
    for name in RETRIEVAL if condition is None else (condition,):
        for id, value in results.values(arm, f"task {name}", metric="free").items():
            right, asked = found.get(group(id), (0.0, 0.0))
            found[group(id)] = right + value, asked + 1
    return found


def _gap(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]], share: float = 1.0) -> Interval:
    """Share right of one minus `share` of another's, articles resampled."""
    names = list(a)
    counts = [a[name][1] for name in names]
    assert counts == [b[name][1] for name in names]
    theirs = [share * b[name][0] for name in names]
    return paired_bootstrap([a[name][0] for name in names], theirs, counts, statistic=difference)


def _main(method: str) -> str:
    return Arm(method, MAIN).name


def _cskv_keeps(results: Results) -> Outcome:
    ours = retrieval(results, _main("CSKV-trained"))
    gaps = {control: _gap(ours, retrieval(results, _main(control))) for control in ("StreamingLLM", "H2O", "CSKV-ASVD")}
    control, gap = min(gaps.items(), key=lambda item: item[1].estimate)
    better = [g.low > 0 for g in gaps.values()]
    half = _gap(ours, retrieval(results, "full"), 0.5).estimate >= 0
    return Outcome.of(
        gap,
        grade(all(better) and half, any(better)),
        scale=f"{SCALE}; the paper: 7B, 4k tokens",
        control=_main(control),
        quantity="retrieval: share right, CSKV - the best control",
    )


def _eviction(results: Results) -> Outcome:
    whole, full = retrieval(results, "full"), results.perplexity("full", "wikipedia")
    ratios = {name: compare(results.perplexity(_main(name), "wikipedia"), full) for name in EVICTING}
    lost = {name: _gap(retrieval(results, _main(name)), whole, 0.5) for name in EVICTING}
    found = [ratios[name].high < NEAR and lost[name].high < 0 for name in EVICTING]
    best = min(EVICTING, key=lambda name: ratios[name].estimate)
    gap = _gap(retrieval(results, _main(best)), whole)
    quantity = f"retrieval: share right, {best} (perplexity {ratios[best].estimate:.3f} times) - full"
    return Outcome.of(gap, grade(all(found), any(found)), scale=SCALE, control="full", quantity=quantity)


def _crossing(results: Results) -> Outcome:
    channel, tokens = _main("CSKV-trained"), _main("SnapKV")
    ratio = compare(results.perplexity(channel, "wikipedia"), results.perplexity(tokens, "wikipedia"))
    gap = _gap(retrieval(results, channel), retrieval(results, tokens))
    found = [ratio.low > 1, gap.low > 0]
    quantity = f"retrieval: share right, CSKV (perplexity {ratio.estimate:.3f} times) - SnapKV"
    return Outcome.of(gap, grade(all(found), any(found)), scale=SCALE, control=tokens, quantity=quantity)


def _one_question(results: Results) -> Outcome:
    inside = retrieval(results, _main("SnapKV+question"), "passkeys")
    unknown = _gap(inside, retrieval(results, _main("SnapKV"), "passkeys"))
    second = _gap(inside, retrieval(results, _main("SnapKV+question"), "second_turns"))
    found = [unknown.low > 0, second.low > 0]
    quantity = "passkeys: share right, the question in the prompt - another one in the next turn"
    return Outcome.of(
        second, grade(all(found), any(found)), scale=SCALE, control="the next question", quantity=quantity
    )


CLAIMS = [
    Claim(
        "cskv-retrieval",
        "At 80 % compression CSKV keeps the retrieval that StreamingLLM, H2O and ASVD without a fit lose.",
        "LongEval at 4k tokens, LongChat-7B: .92 against .06, .18 and .26; full cache 1.00",
        _cskv_keeps,
        "Passkeys and key-value lines together, answers written right, at 20 % of the bytes: holds if trained CSKV in "
        "16 bits minus each of the three has an interval above 0 (paired bootstrap over articles) and CSKV keeps at "
        "least half of the full cache's share; partly if it is above at least one. Shown is the smallest of the gaps.",
        paper_effect=0.66,
    ),
    Claim(
        "eviction-hides",
        "Caches that evict tokens lose retrieval while their perplexity stays near that of the full cache.",
        "the reason CSKV gives for leaving all tokens in",
        _eviction,
        "StreamingLLM, H2O and SnapKV (question not known when the prompt is compressed) at 20 % of the bytes: holds "
        "for one if the perplexity of what follows the prompt, divided by the full cache's, has an interval below "
        f"{NEAR:.2f}, and retrieval minus half of the full cache's one below 0. Holds if for all three, partly if for "
        "one. Shown is the one with the lowest perplexity, against the full cache.",
    ),
    Claim(
        "channels-cross-eviction",
        "At equal bytes shrinking channels costs perplexity and keeps retrieval, evicting tokens the reverse.",
        "CSKV's tables, for retrieval; no number for perplexity",
        _crossing,
        "Trained CSKV in 16 bits against SnapKV (question not known) at 20 % of the bytes: holds if the ratio of their "
        "perplexities has an interval above 1 and the gap of retrieval one above 0, partly if one of the two.",
    ),
    Claim(
        "snapkv-one-question",
        "What SnapKV keeps serves the question that it saw, and not the next one.",
        "SnapKV's experiments have the question at the end of the prompt",
        _one_question,
        "Passkeys at 20 % of the bytes: holds if with the question in the prompt more is right than with a question "
        "that comes later (interval above 0), and more than when another question is asked in the next turn (interval "
        "above 0); partly if one of the two.",
    ),
]


# -- what is measured --


@dataclass(frozen=True)
class Task:
    """An arm on the contexts of a workload.

    Attributes:
        arm: a method at a budget.
        workload: of `Size.contexts`; "" where the method cannot keep so little.
        condition: that is recorded last, or alone.
    """

    arm: Arm
    workload: str
    condition: str

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.arm.name


@functools.lru_cache(maxsize=1)
def _model(profile: str, dtype: str) -> Any:
    return models.smollm2(getattr(torch, dtype), layers=SIZES[profile].layers)


_tokenizer = functools.cache(models.tokenizer)


@functools.cache
def _policy(arm: Arm, profile: str, dtype: str, folder: str) -> Policy | None:
    """None if the method cannot keep so little."""
    try:
        return policy(arm, _model(profile, dtype), profile, folder)
    except OptionError as error:
        if not str(error).startswith("budget"):
            raise
        return None


@functools.cache
def _contexts(profile: str, workload: str) -> list[list[Any]]:
    """The batches of a workload."""
    size, tokenizer = SIZES[profile], _tokenizer()
    articles = text.documents("wikipedia", "test")
    count = size.contexts[workload]
    if workload == "positions":
        rows = text.evaluation("wikipedia", sequences=count, length=size.length)
        return [
            [text.TokenSet(ids, rows.units[k * size.batch : (k + 1) * size.batch], rows.corpus, rows.split)]
            for k, ids in enumerate(rows.ids.split(size.batch))
        ]
    made: list[Any]
    if workload == "articles":
        made = longtext.articles(articles, tokenizer, count, size.length, size.rest, apart=size.length // 8)
    elif workload == "key_values":
        made = longtext.key_values(articles, tokenizer, count, size.length, size.lines, size.asked)
    else:
        made = {"passkeys": longtext.passkeys, "variables": longtext.variables}[workload](
            articles, tokenizer, count, size.length
        )
    return longtext.batches(made, size.batch)


@functools.lru_cache(maxsize=1)
def _readings(profile: str, dtype: str, workload: str) -> list[tuple[longtext.Reading, list[Any]]]:
    """The batches of a workload, read once for all arms of a process."""
    model = _model(profile, dtype)
    return [(longtext.read(model, contexts), contexts) for contexts in _contexts(profile, workload)]


def measure(job: Job) -> Iterator[Row]:
    """An arm on all contexts of a workload."""
    arm, workload = job.arm.arm, job.arm.workload
    if not workload:
        yield Row("least bytes per token", least(arm, _model(job.profile, job.dtype), job.profile, job.folder))
        return
    kept = _policy(arm, job.profile, job.dtype, job.folder)
    assert kept is not None
    if workload == "positions":
        for contexts in _contexts(job.profile, workload):
            yield from _positions(kept, _model(job.profile, job.dtype), contexts[0])
        return
    for reading, contexts in _readings(job.profile, job.dtype, workload):
        yield from _ask(arm, kept, workload, reading, contexts)


def _ask(arm: Arm, kept: Policy, workload: str, reading: longtext.Reading, contexts: list[Any]) -> Iterator[Row]:
    factory = functools.partial(_cache, kept)
    cache = reading.cache(factory)
    cost = cache.bytes_per_token
    if workload == "articles":
        continued = longtext.read_on(reading.model, contexts, cache)
        yield from _answers("last_word", continued.words, cost)
        yield from documents(continued.perplexity, cost, condition="wikipedia")
        return
    inside = arm.method.endswith("+question")
    given: dict[str, Any] = {"factory": factory} if inside else {"cache": cache}
    yield from _answers(workload, longtext.answer(reading, contexts, **given), cost)
    if workload == "passkeys" and (arm.method == "full" or (arm.method in CONVERSATION and arm.budget == MAIN)):
        others = text.documents("wikipedia", "validation")
        second = longtext.second_turns(contexts, others, _tokenizer(), words=30)
        yield from _answers("second_turns", longtext.answer(reading, second, **given), cost)


def _cache(kept: Policy, model: Any, prefill: str | None = None) -> CompressedCache:
    return kept.cache(model, prefill=prefill)


def _positions(kept: Policy, model: Any, tokens: text.TokenSet) -> Iterator[Row]:
    length, rows = tokens.ids.shape[1], len(tokens.ids)
    edges = [1, *range(length // 8, length + 1, length // 8)]
    factory = functools.partial(_cache, kept, prefill="streamed")
    for bin, part in longtext.by_position(model, factory, tokens, edges, rows).items():
        yield from documents(part, condition=f"positions {bin}")


def _answers(workload: str, answers: longtext.Answers, cost: float) -> Iterator[Row]:
    for metric in ("free", "restricted", "loglik", "depth", "chance"):
        for unit, value in zip(answers.ids, getattr(answers, metric).tolist(), strict=True):
            yield Row(metric, value, unit, condition=f"task {workload}", cost=cost)


def _takes_part(arm: Arm, workload: str) -> bool:
    if arm.method.endswith("+question"):
        return workload in RETRIEVAL
    if workload == "variables":
        return arm.budget in (None, MAIN)
    if workload == "positions":
        return arm.method == "full" or (arm.method in STREAMED and arm.budget == MAIN)
    return True


def _condition(workload: str, profile: str) -> str:
    first = f"positions 1-{SIZES[profile].length // 8 - 1}"
    return {"articles": "wikipedia", "positions": first}.get(workload, f"task {workload}")


def _fit(jobs: Sequence[Job]) -> list[bool]:
    """Which arms can keep so little; what is fitted for them is kept for the processes that measure."""
    return [_policy(job.arm.arm, job.profile, job.dtype, job.folder) is not None for job in jobs]


def stages(run: Run) -> Stages:
    """First what is fitted, which also tells what cannot be; then every arm on every workload that it takes part in."""
    results, profile = run.results, run.profile
    conditions = {workload: _condition(workload, profile) for workload in SIZES[profile].contexts}
    chosen = arms(profile)
    tasks = {arm: [Task(arm, w, c) for w, c in conditions.items() if _takes_part(arm, w)] for arm in chosen}
    impossible = {arm: Task(arm, "", "cannot") for arm in chosen if results.has(arm.name, "cannot")}
    lacking = [
        run.job(task[0], 0)
        for arm, task in tasks.items()
        if arm not in impossible and not all(results.has(t.name, t.condition) for t in task)
    ]
    if lacking:
        (can,) = run.each(_fit, [lacking], "methods")
        impossible |= {
            job.arm.arm: Task(job.arm.arm, "", "cannot") for job, fits in zip(lacking, can, strict=True) if not fits
        }
    yield [run.job(task, 0) for task in impossible.values()]
    yield [  # by workload: one reading serves all arms
        run.job(task, 0)
        for workload in conditions
        for arm in chosen
        for task in tasks[arm]
        if task.workload == workload and arm not in impossible
    ]


STUDY = Study(
    slug="caches",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=lambda arm, profile: (0,),
    data=lambda: {"wikipedia": text.corpus_hash("wikipedia"), "smollm2": models.smollm2_hash()},
    stages=stages,
    kind=lambda task: f"{task.arm.method}, {task.workload or 'cannot'}",
    dtype="bfloat16",
)
