"""From records to tables: seeds that are missing, numbers with and without intervals, names that do not exist."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.core.errors import OptionError
from refimpl.lab.measure.statistics import t_interval
from refimpl.lab.show.tables import SEEDS, cell, curve, over_seeds, recorded, table, verdicts
from refimpl.lab.study.records import Record, Results


@pytest.fixture
def results():
    found = Results("demo.json", {"paper": "demo"})
    for seed in (3, 1, 2):
        found.add(Record("demo", "dense", "mnist", seed, "", "accuracy", 0.9 + seed / 100))
        found.add(*(Record("demo", "dense", "mnist", seed, source, "share", seed / 8) for source in ("web", "code")))
        for step in (100, 20, 3):
            found.add(Record("demo", "dense", "training", seed, str(step), "loss", seed + step))
    return found


def test_seeds_come_in_their_order_and_missing_ones_are_left_out(results):
    assert SEEDS == (1, 2, 3, 4, 5)
    assert over_seeds(results, "dense", "mnist").tolist() == [0.91, 0.92, 0.93]
    assert over_seeds(results, "dense", "mnist", seeds=[3, 1]).tolist() == [0.93, 0.91]
    assert over_seeds(results, "dense", "mnist", "share", unit="code").tolist() == [0.125, 0.25, 0.375]
    assert over_seeds(results, "dense", "mnist").dtype == np.float64


def test_nothing_recorded_is_an_error_and_no_empty_mean(results):
    with pytest.raises(OptionError, match="no arm 'dens'; it has dense"):
        over_seeds(results, "dens", "mnist")
    with pytest.raises(OptionError, match="mnist"):
        over_seeds(results, "dense", "mnist", seeds=[7])
    with pytest.raises(OptionError, match="loss"):
        over_seeds(results, "dense", "mnist", "loss")
    with pytest.raises(OptionError, match="no rows"):
        curve(results, "dense", "tuning", "loss")


def test_a_curve_is_ordered_by_step_not_by_its_digits(results):
    steps, values = curve(results, "dense", "training", "loss", seeds=(1, 3, 4))
    assert steps == [3, 20, 100]
    assert values.tolist() == [[4, 21, 101], [6, 23, 103]]


def test_cells_have_an_interval_where_there_is_one():
    values = np.array([1.0, 1.2, 0.9, 1.1, 1.0])
    interval = t_interval(values)
    half = interval.high - interval.estimate
    assert cell(values, ".4f") == f"1.0400 ± {half:.4f}" and half > 0.1
    assert cell(list(-values), "+.2f") == "-1.04 ± 0.14", "a sign is for the number, not for its spread"
    assert cell(interval, ".4f") == f"1.0400 [{interval.low:.4f}, {interval.high:.4f}]"
    assert cell(3.14159) == cell(np.float64(3.14159)) == cell([3.14159]) == cell([3.14159] * 5) == "3.142"
    with pytest.raises(OptionError, match="finite"):
        cell([1.0, float("nan")])


def test_a_table_is_markdown_with_its_caption():
    shown = table(["a", "b"], [["x|y", cell(0.5, ".1f")], [1, ""]], "Rank 64")
    assert shown.data == "Rank 64\n\n| a | b |\n| --- | --- |\n| x\\|y | 0.5 |\n| 1 |  |"
    assert type(shown).__module__ == "IPython.core.display"
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        table(["a", "b"], [["x"]])


def test_records_and_verdicts_are_found_by_name():
    assert recorded("eora").header["paper"] == "eora"
    with pytest.raises(OptionError, match="did you mean 'eora'"):
        recorded("eoar")
    rows = verdicts("rs2").data.splitlines()[2:]
    assert len(rows) > 5 and all("(`rs2`)" in row for row in rows)
    assert len(verdicts("smollm2-rs2").data.splitlines()) == 3
    with pytest.raises(OptionError, match="did you mean 'smollm2-rs2'"):
        verdicts("smollm2-rs")
