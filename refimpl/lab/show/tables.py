"""From the records of a study to the tables of a chapter: numbers over seeds, cells with intervals, Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from refimpl import markdown
from refimpl.core.errors import OptionError, nearest, require
from refimpl.core.files.io import data_path
from refimpl.lab.measure.statistics import Interval, t_interval
from refimpl.lab.study import ledger
from refimpl.lab.study.records import Results

#: Seeds of the book's studies.
SEEDS = (1, 2, 3, 4, 5)


def recorded(slug: str) -> Results:
    """The records that `refimpl study SLUG` made, as they come with the book.

    Raises:
        OptionError: there is no such study.

    Example:
        >>> recorded("eora").has("SparseGPT 2:4", "wikipedia")
        True
    """
    path = data_path("results") / f"{slug}.json"
    if not path.exists():
        raise OptionError(f"slug={slug!r} must be {nearest(slug, sorted(p.stem for p in path.parent.glob('*.json')))}")
    return Results.load(path)


def over_seeds(
    results: Results,
    arm: str,
    condition: str = "",
    metric: str = "accuracy",
    *,
    seeds: Sequence[int] = SEEDS,
    unit: str = "",
) -> np.ndarray:
    """A metric of an arm, one entry for each seed that was recorded.

    Args:
        results: of a study.
        arm, condition, metric, unit: of the records.
        seeds: those that count; one that was not recorded is left out.

    Returns:
        float64 [seeds].

    Raises:
        OptionError: none of the seeds was recorded, or one of them without this metric.

    Example:
        >>> from refimpl.lab.study.records import Record
        >>> study = Results("demo.json", {"paper": "demo"})
        >>> study.add(*(Record("demo", "dense", "mnist", seed, "", "accuracy", 0.9 + seed / 100) for seed in (1, 2)))
        >>> over_seeds(study, "dense", "mnist").round(2).tolist()
        [0.91, 0.92]
    """
    there = [seed for seed in seeds if results.has(arm, condition, seed)] or seeds[:1]
    return np.array([results.values(arm, condition, seed, metric=metric)[unit] for seed in there])


def curve(
    results: Results, arm: str, condition: str, metric: str, *, seeds: Sequence[int] = SEEDS
) -> tuple[list[int], np.ndarray]:
    """A recorded curve: its steps, and its values for each seed that was recorded.

    Args:
        results: of a study whose units are steps (`refimpl.lab.study.records.Results.add_history`).
        arm, condition, metric: of the records.
        seeds: those that count; one that was not recorded is left out.

    Returns:
        The steps in order, and float64 [seeds, steps].

    Raises:
        OptionError: none of the seeds was recorded, or one of them without this metric.

    Example:
        >>> from refimpl.lab.study.records import Record
        >>> study = Results("demo.json", {"paper": "demo"})
        >>> study.add(*(Record("demo", "dense", "training", 1, step, "loss", 2.5) for step in ("20", "100")))
        >>> curve(study, "dense", "training", "loss")
        ([20, 100], array([[2.5, 2.5]]))
    """
    there = [seed for seed in seeds if results.has(arm, condition, seed)] or seeds[:1]
    found = [results.values(arm, condition, seed, metric=metric) for seed in there]
    steps = sorted(found[0], key=int)
    return [int(step) for step in steps], np.array([[values[step] for step in steps] for values in found])


def cell(value: float | Interval | Sequence[float] | np.ndarray, form: str = ".3f") -> str:
    """A number for a table, with its 95 % interval where there is one.

    Args:
        value: a number; an interval, which is shown by its ends; or one number for each seed, of which the mean is shown
            with half the width of Student's t interval (the mean alone if there is one seed or all agree).
        form: format of each number.

    Example:
        >>> cell(1.25, ".1f"), cell([1.0, 1.2, 0.9, 1.1, 1.0], "+.2f")
        ('1.2', '+1.04 ± 0.14')
        >>> cell(t_interval([1.0, 1.2, 0.9, 1.1, 1.0]), ".2f")
        '1.04 [0.90, 1.18]'
    """
    if isinstance(value, Interval):
        return f"{value.estimate:{form}} [{value.low:{form}}, {value.high:{form}}]"
    if not np.ndim(value):
        return f"{value:{form}}"
    if np.ptp(value) == 0:
        return f"{np.mean(value):{form}}"
    interval = t_interval(np.asarray(value))
    return f"{interval.estimate:{form}} ± {interval.high - interval.estimate:{form.lstrip('+')}}"


def table(header: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> Any:
    """A table to show in a notebook; give it back as the last value of a cell.

    Args:
        header: what stands above each column.
        rows: cells, one for each column; numbers that are not texts yet come from `cell`.
        caption: a line above the table.

    Returns:
        ``IPython.display.Markdown``.

    Raises:
        ValueError: a row is of another length than the header.
        MissingExtra: IPython is not installed.

    Example:
        >>> print(table(["method", "perplexity"], [["SVD", cell(34.26, ".1f")]], "Rank 64").data)
        Rank 64
        <BLANKLINE>
        | method | perplexity |
        | --- | --- |
        | SVD | 34.3 |
    """
    text = markdown.table(header, rows)
    return require("IPython.display", "book").Markdown(f"{caption}\n\n{text}" if caption else text)


def verdicts(name: str) -> Any:
    """The ledger's rows about a paper, or one of its claims, to show in a notebook.

    Args:
        name: slug of the paper, or id of the claim.

    Returns:
        ``IPython.display.Markdown``.

    Raises:
        OptionError: the ledger has nothing of that name.
        MissingExtra: IPython is not installed.

    Example:
        >>> verdicts("smollm2-replay").data.count("`smollm2`")
        1
    """
    rows = ledger.table()
    found = [row for row in rows if name in (row["paper"], row["id"])]
    if not found:
        known = dict.fromkeys(row[key] for key in ("paper", "id") for row in rows)
        raise OptionError(f"name={name!r} must be {nearest(name, known)}")
    return require("IPython.display", "book").Markdown(ledger.markdown(found))
