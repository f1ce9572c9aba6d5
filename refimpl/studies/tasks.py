"""Does perplexity order compressed models as tasks do? The measurement behind "Why perplexity misleads".

SmolLM2-135M is compressed in several ways, each calibrated on the same Wikipedia tokens. Every model is then measured
twice: perplexity on Wikipedia (and Python) test documents, and the six tasks of `refimpl.lab.measure.tasks`, whose items no
method saw. This is no paper's experiment; it serves the language-model bench and all chapters on language models.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from torch import nn
from tqdm.auto import tqdm

from refimpl import GPTQ, RTN, EoRA, SparseGPT, Wanda, compress, load, save
from refimpl.core.compress.method import Method
from refimpl.core.layers import PackedLinear
from refimpl.lab import models, wheels
from refimpl.lab.data import text
from refimpl.lab.measure import tasks
from refimpl.lab.measure.metrics import footprint, perplexity
from refimpl.lab.measure.statistics import compare
from refimpl.lab.measure.tasks.items import group
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.precision import declares
from refimpl.lab.study.records import Results
from refimpl.lab.study.sources import module_hashes

COMPRESSION = [
    "refimpl.lowrank.eora",
    "refimpl.baselines.gptq",
    "refimpl.baselines.obs",
    "refimpl.baselines.pruning",
    "refimpl.baselines.rtn",
    "refimpl.core.layers.grid",
    "refimpl.core.layers.lowrank",
    "refimpl.core.layers.packed",
    "refimpl.core.compress.stats",
    "refimpl.lab.data.text",
]
DEPENDS = [
    *COMPRESSION,
    "refimpl.lab.measure.metrics",
    "refimpl.lab.measure.tasks.items",
    "refimpl.lab.measure.tasks.made",
    "refimpl.lab.measure.tasks.scoring",
]

RANK = 64
SCALE = "SmolLM2, 135M weights; 13 compressed models"


@dataclass(frozen=True)
class Size:
    """What a profile spends: blocks of the model, calibration sequences, windows measured, items of each task."""

    layers: int | None
    sequences: int
    length: int
    windows: dict[str, tuple[int, int]]  # corpus: (windows, tokens each)
    items: dict[str, int]  # of each task, at most
    rank: int
    arms: tuple[str, ...] | None = None


SIZES = {
    "study": Size(
        layers=None,
        sequences=32,
        length=512,
        windows={"wikipedia": (24, 512), "python": (16, 512)},
        items=dict.fromkeys(tasks.TASKS, 128) | {"cloze": 500},  # facts are short, so all of them
        rank=RANK,
    ),
    "live": Size(
        layers=None,
        sequences=8,
        length=512,
        windows={"wikipedia": (12, 512), "python": (12, 512)},
        items=dict.fromkeys(tasks.TASKS, 60),
        rank=RANK,
        arms=("GPTQ 3-bit g64", "SparseGPT 50%"),
    ),
    "quick": Size(
        layers=1,
        sequences=2,
        length=64,
        windows={"wikipedia": (2, 64), "python": (2, 64)},
        items=dict.fromkeys(tasks.TASKS, 4),
        rank=16,
        arms=("RTN 3-bit g64", "SparseGPT 2:4"),
    ),
}

BASES: dict[str, Method] = {
    **{f"RTN {bits}-bit g{group}": RTN(bits, group) for bits, group in ((4, 64), (3, 32), (3, 64))},
    **{f"GPTQ {bits}-bit g{group}": GPTQ(bits, group) for bits, group in ((4, 64), (3, 32), (3, 64))},
    "Wanda 2:4": Wanda("2:4"),
    "SparseGPT 2:4": SparseGPT("2:4"),
    **{f"SparseGPT {share}%": SparseGPT("unstructured", sparsity=share / 100) for share in (40, 50, 60)},
}
#: Arm -> the base that EoRA repairs, with the names that the EoRA study gives them.
REPAIRED = {f"SparseGPT+EoRA 2:4 r{RANK}": "SparseGPT 2:4", f"GPTQ+EoRA 3-bit g64 r{RANK}": "GPTQ 3-bit g64"}
ARMS = (*BASES, *REPAIRED)


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


def comparisons(results: Results, arms: tuple[str, ...] = ARMS) -> Iterator[Disagreement]:
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


def disagreements(results: Results, arms: tuple[str, ...] = ARMS) -> list[Disagreement]:
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


# -- the run --


class _Run:
    """One run of the study: sizes, texts, the folder of compressed models, and the records."""

    def __init__(self, results: Results, profile: str) -> None:
        self.results, self.size = results, SIZES[profile]
        self.dtype = models.compute_dtype()
        self.tokenizer = models.tokenizer()
        self.tokens = {
            corpus: text.evaluation(corpus, sequences=windows, length=length)
            for corpus, (windows, length) in self.size.windows.items()
        }
        made_by = [*module_hashes(COMPRESSION).values(), models.smollm2_hash(), text.corpus_hash("wikipedia")]
        digest = hashlib.sha256("-".join(made_by).encode()).hexdigest()[:12]
        self.work = wheels.cache_folder() / "studies" / "tasks" / f"{profile}-{self.dtype}-{digest}"

    def dense(self) -> Any:
        return models.smollm2(self.dtype, layers=self.size.layers)

    def calibration(self, draw: int) -> text.TokenSet:
        return text.calibration("wikipedia", sequences=self.size.sequences, length=self.size.length, seed=draw)

    def model(self, arm: str) -> nn.Module:
        """The compressed model of an arm, made once and kept on disk."""
        if arm == "dense":
            return self.dense()
        folder = self.work / "".join(c if c.isalnum() else "-" for c in arm)
        if (folder / "refimpl.json").is_file():
            return load(folder, self.dtype)
        if arm in REPAIRED:
            model = self.model(REPAIRED[arm])
            reference = models.smollm2_path()
            compress(model, EoRA(self.size.rank), self.calibration(1), reference=reference, progress=False)
        else:
            model = self.dense()
            compress(model, BASES[arm], self.calibration(0), progress=False)
        save(model, folder)
        return model

    def measure(self, arm: str) -> None:
        if self.results.has(arm, f"task {tasks.TASKS[-1]}"):
            return
        model = self.model(arm)
        bits = footprint(model).bits_per_weight
        _unpack(model)
        for corpus, tokens in self.tokens.items():
            if not self.results.has(arm, corpus):
                found = perplexity(model, tokens, batch_size=8, progress=False)
                self.results.add_perplexity(arm, corpus, 0, found, cost=bits)
        chosen = {task: _spread(tasks.items(task, "full"), most) for task, most in self.size.items.items()}
        card = tasks.score(model, self.tokenizer, chosen, progress=False)
        tasks.add_scores(self.results, arm, 0, card, cost=bits)


def _spread(items: list[tasks.Item], most: int) -> list[tasks.Item]:
    """Items from all over the list."""
    n = min(most, len(items))
    return [items[k * len(items) // n] for k in range(n)]


def _unpack(model: nn.Module) -> None:
    """Put dense weights in place of packed ones, which are unpacked at every forward pass: the same numbers, faster."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(layer.to_dense(), requires_grad=False)
            dense.register_parameter("bias", layer.bias)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense)


@declares("bfloat16")
def run(out: Path, profile: str = "study") -> Results:
    """Run every arm that the results file lacks, and judge the claim.

    Args:
        out: results file; an interrupted run goes on where it stopped.
        profile: "study" (recorded; the rule must be committed), "live" or "quick".
    """
    data = {corpus: text.corpus_hash(corpus) for corpus in ("wikipedia", "python")}
    data["smollm2"] = models.smollm2_hash()
    data["tasks"] = tasks.items_hash([*tasks.items("cloze"), *tasks.items("summary")])  # the others follow from code
    dtype = str(models.compute_dtype()).removeprefix("torch.")
    results = Results.start(
        out,
        paper="tasks",
        study=__name__,
        depends=DEPENDS,
        data=data,
        profile=profile,
        dtype=dtype,
        provisional=profile != "study",
    )
    this = _Run(results, profile)
    arms = this.size.arms or ARMS
    steps = [(arm, functools.partial(this.measure, arm)) for arm in ("dense", *arms)]
    bar = tqdm(steps, desc=f"tasks ({profile})", unit="model")
    for name, step in bar:
        bar.set_postfix_str(name)
        step()
        results.save()
    if profile == "study":
        results.claims = judge(results, CLAIMS)
    results.save()
    return results
