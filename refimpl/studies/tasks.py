"""Does perplexity order compressed models as tasks do? The measurement of "Why perplexity misleads".

SmolLM2-135M is compressed in several ways, each calibrated on the same Wikipedia tokens. Every model is then measured
twice: perplexity on Wikipedia (and Python) test documents, and the six tasks of `refimpl.lab.measure.tasks`, whose items no
method saw. This is no paper's experiment; it serves the language-model bench and all chapters on language models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binomtest
from torch import nn

from refimpl import EoRA, compress
from refimpl.core.layers import PackedLinear
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.lab.measure import tasks
from refimpl.lab.measure.metrics import footprint, perplexity
from refimpl.lab.measure.statistics import compare
from refimpl.lab.measure.tasks.items import group
from refimpl.lab.study.claims import Claim, Outcome, Verdict
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, Row, Run, Study, documents
from refimpl.studies._bases import RANK, Base, make_before, repaired

SCALE = "SmolLM2, 135M weights; 13 compressed models"


@dataclass(frozen=True)
class Size:
    """Size of the experiment at a profile.

    Attributes:
        layers: blocks of the model; None: all.
        sequences, length: calibration sequences, and tokens of each.
        windows: of each corpus, how many are measured, and tokens of each.
        items: of each task, at most.
        rank: of the repair.
    """

    layers: int | None
    sequences: int
    length: int
    windows: dict[str, tuple[int, int]]
    items: dict[str, int]
    rank: int


SIZES = {
    "study": Size(
        layers=None,
        sequences=32,
        length=512,
        windows={"wikipedia": (24, 512), "python": (16, 512)},
        items=dict.fromkeys(tasks.TASKS, 128) | {"cloze": 500},  # facts are short, so all of them
        rank=RANK,
    ),
    "quick": Size(1, 2, 64, {"wikipedia": (2, 64), "python": (2, 64)}, dict.fromkeys(tasks.TASKS, 4), 16),
}

ROUNDED = tuple(f"{method} {label}" for method in ("RTN", "GPTQ") for label in ("4-bit g64", "3-bit g32", "3-bit g64"))
PRUNED = ("Wanda 2:4", "SparseGPT 2:4", "SparseGPT 40%", "SparseGPT 50%", "SparseGPT 60%")
#: What EoRA repairs, by name of the repaired model.
REPAIRED = {repaired(base, "EoRA", f"r{RANK}"): base for base in ("SparseGPT 2:4", "GPTQ 3-bit g64")}
#: The compressed models that are compared.
COMPRESSED = (*ROUNDED, *PRUNED, *REPAIRED)


@dataclass(frozen=True)
class Arm:
    """A model that is measured: "dense" or one of `COMPRESSED`."""

    name: str
    condition: str = "wikipedia"

    @property
    def base(self) -> str:
        """The compressed model that it is, or that is repaired; "" for the dense one."""
        return "" if self.name == "dense" else REPAIRED.get(self.name, self.name)


def arms(profile: str) -> list[Arm]:
    compressed = COMPRESSED if profile == "study" else ("RTN 3-bit g64", "SparseGPT 2:4")
    return [Arm(name) for name in ("dense", *compressed)]


# -- the rule, written before the run --


@dataclass(frozen=True)
class Disagreement:
    """Two models that perplexity and one task order differently.

    Attributes:
        better, worse: arms, as perplexity on Wikipedia orders them.
        task, metric: the score that orders them the other way.
        ratio: perplexity of `worse` / `better`.
        gap: mean score of `worse` minus that of `better`, above 0.
        p: of a one-sided exact sign test over groups of items (those about one text belong together): in how many
            `worse` gets more right, of those in which the two differ. For single items that is McNemar's test.
    """

    better: str
    worse: str
    task: str
    metric: str
    ratio: float
    gap: float
    p: float


def comparisons(results: Results, arms: Sequence[str] = COMPRESSED) -> Iterator[Disagreement]:
    """Every pair of arms that perplexity tells apart (95 % interval of the ratio over articles), for every score."""
    for pair in itertools.combinations(arms, 2):
        ratio = compare(*(results.perplexity(arm, "wikipedia") for arm in pair))
        if ratio.low <= 1 <= ratio.high:
            continue
        better, worse = pair if ratio.high < 1 else pair[::-1]
        for task, metric in itertools.product(tasks.TASKS, ("free", "restricted")):
            gaps = _gaps(results, worse, better, task, metric)
            groups: dict[str, float] = {}
            for item, gap in gaps.items():
                groups[group(item)] = groups.get(group(item), 0.0) + gap
            wins, losses = (sum(sign * gap > 0 for gap in groups.values()) for sign in (1, -1))
            p = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
            distance = max(ratio.estimate, 1 / ratio.estimate)
            mean = sum(gaps.values()) / len(gaps)
            yield Disagreement(better, worse, task, metric, distance, mean, float(p))


def _gaps(results: Results, a: str, b: str, task: str, metric: str) -> dict[str, float]:
    """Score of `a` minus score of `b`, item by item."""
    theirs, others = (results.values(arm, f"task {task}", metric=metric) for arm in (a, b))
    return {item: theirs[item] - others[item] for item in theirs}


def disagreements(results: Results, arms: Sequence[str] = COMPRESSED) -> list[Disagreement]:
    """Those comparisons in which the task contradicts perplexity, at 5 % over all of them together (Holm, 1979)."""
    found = sorted(comparisons(results, arms), key=lambda entry: entry.p)
    kept = itertools.takewhile(lambda at: at[1].p <= 0.05 / (len(found) - at[0]), enumerate(found))
    return [entry for _, entry in kept]


def _one_order(results: Results) -> Outcome:
    strongest = min(comparisons(results), key=lambda entry: entry.p)
    cards = [tasks.card_from(results, arm) for arm in (strongest.worse, strongest.better)]
    gap = cards[0].interval(strongest.task, strongest.metric, reference=cards[1])
    verdict = Verdict.DOES_NOT_HOLD if disagreements(results) else Verdict.HOLDS
    quantity = f"{strongest.task}, {strongest.metric}: share right, {strongest.worse} - control"
    control = f"{strongest.better} (better by perplexity)"
    return Outcome.of(gap, verdict, scale=SCALE, control=control, quantity=quantity)


CLAIMS = [
    Claim(
        "tasks-one-order",
        "Of two compressed models, the one with the lower perplexity is also the better one at tasks.",
        "the working assumption of most papers on compression; LLM-KICK (arXiv 2310.01382) disputes it at 7B",
        _one_order,
        "All pairs of the 13 compressed models whose perplexities on Wikipedia differ (95 % interval of the ratio, "
        "paired bootstrap over articles, excludes 1), six tasks, each scored free and restricted: does not hold if in "
        "at least one comparison the model with the higher perplexity gets more right, by a one-sided exact sign test "
        "over groups of items (items about one text are a group) with Holm's correction over all comparisons at 5 %; "
        "holds otherwise. Shown is the comparison with the smallest p.",
    )
]


# -- one model --


def _base(job: Job) -> Base:
    size = SIZES[job.profile]
    return Base(job.arm.base, size.layers, size.sequences, size.length, job.dtype, job.folder)


def bases_before(run: Run, jobs: Sequence[Job]) -> None:
    """The compressed models that some jobs read."""
    make_before(run, [_base(job) for job in jobs if job.arm.base])


def _model(job: Job) -> nn.Module:
    size = SIZES[job.profile]
    if not job.arm.base:
        dense: Any = models.smollm2(getattr(torch, job.dtype), layers=size.layers)
        return dense
    model = _base(job).model()
    if job.arm.name in REPAIRED:
        tokens = text.calibration("wikipedia", sequences=size.sequences, length=size.length, seed=1)
        compress(model, EoRA(size.rank), tokens, reference=models.smollm2_path(), progress=False)
    return model


def measure(job: Job) -> Iterator[Row]:
    """One model: perplexity by document, and scores by item."""
    size, model = SIZES[job.profile], _model(job)
    bits = footprint(model).bits_per_weight
    unpack(model)
    for corpus, (windows, length) in size.windows.items():
        tokens = text.evaluation(corpus, sequences=windows, length=length)
        yield from documents(perplexity(model, tokens, batch_size=8, progress=False), bits, condition=corpus)
    chosen = {task: spread(tasks.items(task, "full"), most) for task, most in size.items.items()}
    yield from tasks.score_rows(tasks.score(model, models.tokenizer(), chosen, progress=False), bits)


def spread(items: list[tasks.Item], most: int) -> list[tasks.Item]:
    """Items from all over the list."""
    n = min(most, len(items))
    return [items[k * len(items) // n] for k in range(n)]


def unpack(model: nn.Module) -> None:
    """Put dense weights in place of packed ones, which are unpacked at every forward pass: the same numbers, faster."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(layer.to_dense(), requires_grad=False)
            dense.register_parameter("bias", layer.bias)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense)


def _data() -> dict[str, str]:
    data = {corpus: text.corpus_hash(corpus) for corpus in ("wikipedia", "python")}
    # the items of the other tasks follow from code
    made = tasks.items_hash([*tasks.items("cloze"), *tasks.items("summary")])
    return data | {"smollm2": models.smollm2_hash(), "tasks": made}


STUDY = Study(
    slug="tasks",
    claims=CLAIMS,
    measure=measure,
    arms=arms,
    seeds=lambda arm, profile: (0,),
    data=_data,
    before=bases_before,
    kind=lambda arm: arm.name.partition(" ")[0],  # "dense", or the method
    workers=1,  # every step uses all cores
    dtype="bfloat16",
)
