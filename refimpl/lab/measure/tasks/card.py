"""The score card of a model: all tasks, beside chance and the dense model's scores."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from refimpl import markdown
from refimpl.core.errors import OptionError, nearest
from refimpl.core.files.io import atomic_write
from refimpl.lab import models, wheels
from refimpl.lab.measure.statistics import Interval, difference, paired_bootstrap
from refimpl.lab.measure.tasks.items import TASKS, Item, group, items, items_hash, topic
from refimpl.lab.measure.tasks.scoring import Scores, score_items
from refimpl.lab.study.records import Results
from refimpl.lab.study.sources import module_hash
from refimpl.lab.study.study import Row

METRICS = ("free", "restricted", "loglik")


@dataclass(frozen=True)
class ScoreCard:
    """Scores of one model on several tasks.

    Attributes:
        scores: by task.
        seconds: the scoring took; 0 if it was read from records.
    """

    scores: dict[str, Scores]
    seconds: float = 0.0

    def mean(self, task: str, metric: str) -> float:
        """Mean over the items of a task of ``"free"``, ``"restricted"``, ``"loglik"`` or ``"chance"``.

        Raises:
            OptionError: the card lacks the task, or there is no such metric.
        """
        return float(self._values(task, metric).mean())

    def interval(self, task: str, metric: str, reference: ScoreCard | None = None) -> Interval:
        """A mean with its 95 % interval, or its difference from another card's on the same items.

        Items about the same text are resampled together (bootstrap over articles, files, summaries).

        Raises:
            OptionError: a card lacks the task, no such metric, or the reference was scored on other items.

        Example:
            >>> ids, ones = ["a/1", "a/2", "a/3"], np.ones(3)
            >>> right = ScoreCard({"t": Scores(ids, ones, ones, -ones, ones / 4)})
            >>> print(right.interval("t", "free"))
            1 [1, 1]
            >>> right.interval("t", "free", reference=right).estimate
            0.0
        """
        mine = self._values(task, metric)
        other = np.zeros_like(mine) if reference is None else reference.on(self, task)._values(task, metric)
        names = [group(id) for id in self.scores[task].ids]
        place = {name: k for k, name in enumerate(dict.fromkeys(names))}
        where = np.array([place[name] for name in names])
        a, b, sizes = (np.bincount(where, weights=values) for values in (mine, other, np.ones_like(mine)))
        return paired_bootstrap(a, b, sizes, statistic=difference)

    def on(self, card: ScoreCard, task: str) -> ScoreCard:
        """This card's scores of one task on the items that another card has.

        Raises:
            OptionError: it lacks some of them.
        """
        mine = self.scores[self._known(task)]
        place = {id: k for k, id in enumerate(mine.ids)}
        wanted = card.scores[card._known(task)].ids
        lacking = [id for id in wanted if id not in place]
        if lacking:
            raise OptionError(
                f"task {task!r}: {len(lacking)} of {len(wanted)} items were not scored in both cards, "
                f"{lacking[0]!r} for one; score both on the same items"
            )
        rows = np.array([place[id] for id in wanted])
        values = (mine.free, mine.restricted, mine.loglik, mine.chance)
        return ScoreCard({task: Scores(list(wanted), *(array[rows] for array in values))})

    def table(self, reference: ScoreCard | None = None, topics: bool = False) -> str:
        """The card as a Markdown table, in per cent.

        Args:
            reference: the dense model's card: its scores become the ceiling, and differences from it are shown with
                95 % intervals. Without it, the intervals are those of the scores.
            topics: a line for each topic too (lengths, subjects).

        Example:
            >>> ids, half = ["1", "2"], np.array([0.0, 1.0])
            >>> card = ScoreCard({"mine": Scores(ids, half, half, -half, np.full(2, 0.25))})
            >>> print(card.table().splitlines()[0])
            | task | items | free | 95 % | restricted | 95 % | chance |
        """
        shown: list[tuple[str, ScoreCard, str]] = []
        for task, scores in self.scores.items():
            shown.append((task, self, task))
            names = list(dict.fromkeys(map(topic, scores.ids)))
            if topics and len(names) > 1:
                shown += [(f"{task}: {name}", self._only(task, name), task) for name in names]
        columns = ["free", "restricted"]
        if reference is None:
            header = ["task", "items", "free", "95 %", "restricted", "95 %", "chance"]
        else:
            header = ["task", "items"]
            for name in columns:
                header += [name, f"dense {name}", "difference, 95 %"]
            header.append("chance")
        lines = []
        for label, card, task in shown:
            cells = [label, str(len(card.scores[task].ids))]
            for name in columns:
                cells.append(f"{100 * card.mean(task, name):.1f}")
                if reference is None:
                    interval = card.interval(task, name)
                    cells.append(f"{100 * interval.low:.1f} to {100 * interval.high:.1f}")
                else:
                    gap = card.interval(task, name, reference)
                    cells.append(f"{100 * reference.on(card, task).mean(task, name):.1f}")
                    cells.append(f"{100 * gap.estimate:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})")
            lines.append([*cells, f"{100 * card.mean(task, 'chance'):.1f}"])
        return markdown.table(header, lines, align="l" + "r" * (len(header) - 1))

    def _only(self, task: str, name: str) -> ScoreCard:
        scores = self.scores[task]
        keep = np.array([topic(id) == name for id in scores.ids])
        values = (scores.free, scores.restricted, scores.loglik, scores.chance)
        ids = [id for id, kept in zip(scores.ids, keep, strict=True) if kept]
        return ScoreCard({task: Scores(ids, *(array[keep] for array in values))})

    def _known(self, task: str) -> str:
        if task not in self.scores:
            raise OptionError(f"task={task!r} is not on this card; it must be {nearest(str(task), self.scores)}")
        return task

    def _values(self, task: str, metric: str) -> np.ndarray:
        scores = self.scores[self._known(task)]
        if metric not in (*METRICS, "chance"):
            raise OptionError(f"metric={metric!r} must be {nearest(str(metric), (*METRICS, 'chance'))}")
        return cast(np.ndarray, getattr(scores, metric))


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | Mapping[str, Sequence[Item]] | None = None,
    size: str = "card",
    progress: bool = True,
) -> ScoreCard:
    """Score a model on tasks.

    Args:
        model: a Hugging Face causal LM on any device, compressed or not. Training flags are left as found.
        tokenizer: that belongs to it.
        tasks: names of tasks (all six if None), or your own items by name (see `load`).
        size: ``"card"`` (a fixed part of the items) or ``"full"``.
        progress: show bars.

    Raises:
        OptionError: unknown task or size, or a tokenizer that does not belong to the model.
        CalibrationError: log-likelihoods that are not finite.

    Example:
        >>> from refimpl.lab.models import small
        >>> card = score(small.load("llama-small"), small.tokenizer(), ["copying"], progress=False)
        >>> 0 <= card.mean("copying", "free") <= card.mean("copying", "restricted") <= 1
        True
    """
    chosen = chosen_items(tasks, size)
    start = time.perf_counter()
    scores = {name: score_items(model, tokenizer, found, progress, name) for name, found in chosen.items()}
    return ScoreCard(scores, time.perf_counter() - start)


def chosen_items(tasks: Sequence[str] | Mapping[str, Sequence[Item]] | None, size: str) -> dict[str, list[Item]]:
    """Items by task, from names or from items that are given."""
    if isinstance(tasks, Mapping):
        return {name: list(found) for name, found in tasks.items()}
    if isinstance(tasks, str):
        raise OptionError(f"tasks={tasks!r} is a string; give a list: [{tasks!r}]")
    return {name: items(name, size) for name in (TASKS if tasks is None else tasks)}


def ceiling(
    name_or_path: str | Path = "smollm2",
    tasks: Sequence[str] | None = None,
    size: str = "card",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ScoreCard:
    """The card of a model on disk, scored once and then read from the cache.

    The cache knows a card by the hashes of the weights, of the tokenizer, of the items and of the source that scores.

    Args:
        name_or_path: as for `refimpl.lab.models.language.load`; the model has to have a tokenizer.
        tasks, size, progress: as for `score`.
        dtype: of the weights; `refimpl.lab.models.language.compute_dtype()` if None.

    Raises:
        OptionError: unknown task or size, or a model without a tokenizer.

    Example:
        >>> card = ceiling("llama-small", ["copying"], dtype=torch.float32, progress=False)
        >>> card.mean("copying", "chance")
        0.25
    """
    chosen = chosen_items(tasks, size)
    dtype = dtype or models.compute_dtype()
    folder = models.folder(models.smollm2_path() if name_or_path == "smollm2" else name_or_path)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    marks = [wheels.sha256(path) for path in files] + [str(dtype), module_hash("refimpl.lab.measure.tasks.scoring")]
    scores: dict[str, Scores] = {}
    loaded: Any = None
    for task, found in chosen.items():
        key = hashlib.sha256("".join([*marks, items_hash(found)]).encode()).hexdigest()[:16]
        path = wheels.cache_folder() / "scores" / f"{task}-{key}.json"
        if not path.is_file():
            if loaded is None:
                loaded = models.load(name_or_path, dtype)
            model, tokenizer = loaded
            if tokenizer is None:
                raise OptionError(f"name_or_path={str(name_or_path)!r} has no tokenizer; use `score` with one")
            path.parent.mkdir(exist_ok=True)
            _write(score_items(model, tokenizer, found, progress, task), path)
        scores[task] = _read(path)
    return ScoreCard(scores)


def _write(scores: Scores, path: Path) -> None:
    columns = {name: getattr(scores, name).tolist() for name in (*METRICS, "chance")}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"ids": scores.ids, **columns}))


def _read(path: Path) -> Scores:
    columns = json.loads(path.read_text())
    return Scores(columns["ids"], *(np.array(columns[name]) for name in (*METRICS, "chance")))


def _condition(task: str) -> str:
    return f"task {task}"


def score_rows(card: ScoreCard, cost: float | None = None) -> Iterator[Row]:
    """A card as rows: condition "task <name>", the metrics "free", "restricted" and "loglik" of each item.

    "chance" is a mean over each topic of a task (unit: the topic), without a cost.

    Args:
        card: of a model.
        cost: of the model, in bits per weight.

    Example:
        >>> one = np.ones(1)
        >>> rows = score_rows(ScoreCard({"mine": Scores(["a"], one, one, -one, one / 4)}), cost=16)
        >>> [(row.condition, row.unit, row.metric, row.value) for row in rows][2:]
        [('task mine', 'a', 'loglik', -1.0), ('task mine', '', 'chance', 0.25)]
    """
    for task, scores in card.scores.items():
        where = _condition(task)
        for metric in METRICS:
            for id, value in zip(scores.ids, getattr(scores, metric), strict=True):
                yield Row(metric, float(value), id, condition=where, cost=cost)
        # Lists of units are shared between series, so the topics cost a line in the file, not one for each arm.
        chances: dict[str, list[float]] = {}
        for id, value in zip(scores.ids, scores.chance, strict=True):
            chances.setdefault(topic(id), []).append(float(value))
        for name, values in chances.items():
            yield Row("chance", sum(values) / len(values), name, condition=where)


def card_from(results: Results, arm: str, seed: int = 0) -> ScoreCard:
    """The card of an arm as recorded from `score_rows`; chance is the mean of each topic.

    Raises:
        OptionError: no card was recorded for this arm.
    """
    names = [line.condition for line in results.records() if line.arm == arm and line.metric == "chance"]
    scores = {}
    for condition in dict.fromkeys(names):
        columns = {metric: results.values(arm, condition, seed, metric=metric) for metric in METRICS}
        ids = list(columns["loglik"])
        chance = results.values(arm, condition, seed, metric="chance")
        free, restricted, loglik = (np.array([float(columns[name][id]) for id in ids]) for name in METRICS)
        chances = np.array([float(chance[topic(id)]) for id in ids])
        scores[condition.removeprefix("task ")] = Scores(ids, free, restricted, loglik, chances)
    if not scores:
        raise OptionError(f"{results.path.name} has no task scores of arm {arm!r}; record them with `score_rows`")
    return ScoreCard(scores)
