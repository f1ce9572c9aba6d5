"""What the pages say about tasks, made from data/results/tasks.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from scipy.stats import kendalltau

from refimpl.core.files.io import data_path
from refimpl.lab.measure import tasks
from refimpl.lab.show import plots
from refimpl.lab.study import ledger
from refimpl.lab.study.ledger import markdown
from refimpl.lab.study.records import Results
from refimpl.markdown import table
from refimpl.studies import tasks as study

Chart = Callable[[dict, str], str]

#: What the pages call a task.
NAMES = {
    "cloze": "facts",
    "last_word": "last word",
    "retrieval": "retrieval",
    "summary": "summary",
    "copying": "copying",
    "code": "code",
}
FAMILIES = {"RTN": "rounded", "GPTQ": "rounded", "Wanda": "pruned", "SparseGPT": "pruned"}


@cache
def results() -> Results:
    return Results.load(data_path("results", "tasks.json"))


def mean_points(metric: str) -> list[plots.TaskPoint]:
    return plots.task_points(results(), tasks.TASKS, metric)


def name(point: plots.TaskPoint) -> str:
    return f"{point.method} {point.label}".strip()


def score_table(metric: str) -> str:
    """Every model: bits, perplexity, each task in per cent; chance and the dense model beside them."""
    each = {task: plots.task_points(results(), [task], metric) for task in tasks.TASKS}
    mean = mean_points(metric)
    rows = []
    for k, point in sorted(enumerate(mean), key=lambda at: at[1].perplexity):
        cells = [name(point), f"{point.bits:.2f}", f"{point.perplexity:.1f}"]
        cells += [f"{100 * each[task][k].score:.0f}" for task in tasks.TASKS]
        rows.append([*cells, f"{100 * point.score:.1f}"])
    if metric == "restricted":
        card = tasks.card_from(results(), "dense")
        chances = [100 * card.mean(task, "chance") for task in tasks.TASKS]
        rows.append(["guessing", "", "", *(f"{c:.0f}" for c in chances), f"{sum(chances) / len(chances):.1f}"])
    widest = max(50 * ((point.high or 0.0) - (point.low or 0.0)) for point in mean)
    note = f"95 % intervals of the means, paired with the dense model: at most ±{widest:.1f} points."
    return f"{table(['Model', 'Bits', 'Perplexity', *NAMES.values(), 'Mean'], rows)}\n\n{note}"


def bench(chart: Chart) -> str:
    """The tasks of the language-model bench: the mean against bits, and all scores as tables."""
    points = mean_points("restricted")
    drawing = plots.task_chart(points, "mean of six tasks, among candidates").to_dict()
    return "\n\n".join(
        [
            chart(drawing, drawing["description"]),
            "Right among the candidates, per cent:",
            score_table("restricted"),
            "Right as the model would write it, per cent:",
            score_table("free"),
        ]
    )


def family(point: plots.TaskPoint) -> str:
    """Rounded, pruned, or repaired: what the page compares."""
    if "+" in point.method:
        return "repaired"
    return FAMILIES.get(point.method, point.method)


def scatter(chart: Chart) -> str:
    """Each score against perplexity, one chart for the two scores that perplexity predicts worst and best."""
    rows = correlations()
    chosen = [rows[0], rows[-1]]
    parts = []
    for task, metric, tau in chosen:
        points = [
            plots.TaskPoint(family(p), p.bits, p.perplexity, p.score, p.low, p.high, name(p))
            for p in plots.task_points(results(), [task], metric)
        ]
        drawing = plots.task_chart(points, f"{NAMES[task]}, {metric}", x="perplexity").to_dict()
        parts += [f"**{NAMES[task].capitalize()}, {metric}** (rank correlation {tau:.2f}):"]
        parts += [chart(drawing, drawing["description"])]
    return "\n\n".join(parts)


@cache
def correlations() -> list[tuple[str, str, float]]:
    """Task, metric and rank correlation of its score with (minus) perplexity, weakest first."""
    found = []
    for task in tasks.TASKS:
        for metric in ("free", "restricted"):
            points = [p for p in plots.task_points(results(), [task], metric) if p.method != "dense"]
            tau = kendalltau([-p.perplexity for p in points], [p.score for p in points]).statistic
            found.append((task, metric, float(tau)))
    return sorted(found, key=lambda entry: entry[2])


def correlation_table() -> str:
    values = {(task, metric): tau for task, metric, tau in correlations()}
    rows = [[NAMES[task], f"{values[task, 'free']:.2f}", f"{values[task, 'restricted']:.2f}"] for task in tasks.TASKS]
    return table(["Task", "free", "among candidates"], rows)


@cache
def _disagreements() -> list[study.Disagreement]:
    return study.disagreements(results())


def disagreements() -> str:
    """The comparisons in which a task contradicts perplexity, the most certain first."""
    every = sorted(study.comparisons(results()), key=lambda entry: entry.p)
    found = _disagreements()
    pairs = len({(entry.better, entry.worse) for entry in found})
    head = (
        f"{len(found)} of {len(every)} comparisons, in {pairs} pairs of models:"
        if found
        else f"None of the {len(every)} comparisons survives the correction: perplexity and tasks contradict each "
        "other in no pair beyond doubt. The five that come nearest, *not* proven:"
    )
    perplexity = {name(p): p.perplexity for p in mean_points("free")}
    rows = [
        [
            f"{entry.worse} ({perplexity[entry.worse]:.1f})",
            f"{entry.better} ({perplexity[entry.better]:.1f})",
            f"{NAMES[entry.task]}, {entry.metric}",
            f"{100 * entry.gap:+.1f} points",
            f"{entry.p:.1g}",
        ]
        for entry in (found or every[:5])
    ]
    header = ["Better at the task (perplexity)", "Better by perplexity (perplexity)", "Task", "Gap", "p, uncorrected"]
    return f"{head}\n\n{table(header, rows)}"


def verdict() -> str:
    """The study's claim and what came of it, with whatever has changed since."""
    return markdown(ledger.table(paper="tasks"))


GENERATED: dict[str, Callable[[Chart], str]] = {
    "task_candidates": lambda chart: score_table("restricted"),
    "task_free": lambda chart: score_table("free"),
    "task_bench": bench,
    "task_scatter": scatter,
    "task_correlations": lambda chart: correlation_table(),
    "task_disagreements": lambda chart: disagreements(),
    "task_verdict": lambda chart: verdict(),
}
