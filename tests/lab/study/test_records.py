"""Results survive a round trip, an interruption and a resumed run, and refuse to mix what must not be mixed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.core.errors import OptionError
from refimpl.lab.measure.metrics import Perplexity
from refimpl.lab.study import records
from refimpl.lab.study.records import Record, Results, ResultsError, RuleNotCommitted, rule_commit


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study module in a git checkout of its own; returns its file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    file = folder / "recordstudy.py"
    file.write_text("LIMIT = 0.9\nCLAIMS = [LIMIT]\n")
    commit(folder)
    monkeypatch.syspath_prepend(folder)
    return file


def commit(folder):
    if not (folder / ".git").exists():
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
    command = ["git", "-C", str(folder), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run([*command, "add", "-A"], check=True)
    subprocess.run([*command, "commit", "-q", "-m", "rule"], check=True)


def start(path, **options):
    return Results.start(path, **{"paper": "demo", "study": "recordstudy", **options})


def row(arm="dense", unit="a", value=1.0, **options):
    return Record(
        **{"paper": "demo", "condition": "", "seed": 0, "metric": "nll", **options}, arm=arm, unit=unit, value=value
    )


def test_round_trip(study, tmp_path):
    results = start(tmp_path / "r.json", data={"text": "12ab"}, dtype="bfloat16")
    rows = [row(unit=u, value=v, cost=4.25) for u, v in (("a", 1.5), ("b", 1234567.0), ("ü|\n", -1e-9))]
    rows += [row("eora", u, condition="rank=4", seed=3, metric="seconds") for u in ("", "b")]
    results.add(*rows)
    results.claims = [{"id": "x"}]
    results.save()
    again = Results.load(results.path)
    assert list(again.records()) == [*rows[:1], row(unit="b", value=1234570, cost=4.25), *rows[2:]]
    assert again.header == results.header and again.claims == [{"id": "x"}]
    assert again.cost("dense", metric="nll") == 4.25 and again.cost("eora", "rank=4", 3, metric="seconds") is None
    frame = again.frame()
    assert list(frame.columns) == ["paper", "arm", "condition", "seed", "unit", "metric", "value", "cost"]
    assert len(frame) == 5 and frame.value[1] == 1234570
    again.save()
    assert Results.load(again.path).header == results.header


def test_frame_without_pandas_is_a_list_of_dicts(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    results = start(tmp_path / "r.json")
    results.add(row())
    assert results.frame()[0]["value"] == 1.0


def test_header_says_what_ran_where(study, tmp_path):
    header = start(tmp_path / "r.json", dtype="bfloat16", data={"text": "12ab"}, profile="study").header
    head = subprocess.run(["git", "-C", study.parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert header["rule"]["commit"] == head.stdout.strip() and header["rule"]["file"] == "recordstudy.py"
    run = header["runs"][0]
    root = Path(__file__).resolve().parents[3]
    if (root / ".git").exists():
        here = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        assert run["commit"] == here.stdout.strip() and isinstance(run["modified"], bool)
    assert {"started", "python", "torch", "transformers", "refimpl", "cpu", "threads"} < set(run)
    assert run["dtype"] == "bfloat16" and run["cpu"]
    assert header["functions"] == [] and header["data"] == {"text": "12ab"} and len(header["rule"]["hash"]) == 16


def test_header_says_whether_the_package_was_modified(tmp_path, monkeypatch):
    file = tmp_path / "repository" / "package" / "lab" / "study" / "records.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(records, "__file__", str(file))
    assert records._checkout() == {"commit": None, "modified": None}
    commit(tmp_path / "repository")
    assert len(records._checkout()["commit"]) == 40 and records._checkout()["modified"] is False
    (tmp_path / "repository" / "notes.md").write_text("outside the package")
    assert records._checkout()["modified"] is False
    (file.parent / "new.py").write_text("")
    assert records._checkout()["modified"] is True


def test_twenty_thousand_rows_stay_below_a_megabyte(study, tmp_path):
    results = start(tmp_path / "r.json")
    rng = np.random.default_rng(0)
    units = [f"Article {k} of the sample" for k in range(200)]
    for arm in range(50):
        counts = np.full(200, 511)
        result = Perplexity(0.0, rng.normal(1500, 300, 200), counts, units)
        results.add_perplexity(f"arm {arm}", "rank=64 python", 0, result, cost=3.25)
    assert sum(1 for _ in results.records()) == 20_000
    results.save()
    assert results.path.stat().st_size < 500_000


def test_a_perplexity_comes_back_by_document(study, tmp_path):
    results = start(tmp_path / "r.json")
    nll, counts = np.array([30.0, 20.0, 45.0]), np.array([10, 10, 15])
    measured = Perplexity(math.exp(95 / 35), nll, counts, ["a", "b", "a"], "prose")
    results.add_perplexity("dense", "prose", 0, measured, cost=16.0)
    back = results.perplexity("dense", "prose")
    assert back.value == pytest.approx(measured.value, rel=1e-5)
    assert back.units == ["a", "b"] and back.counts.tolist() == [25, 10] and back.nll.tolist() == [75, 20]


def test_a_resumed_study_skips_what_is_there(study, tmp_path):
    first = start(tmp_path / "r.json")
    first.add(row())
    first.save()
    study.write_text('"""The claim."""\nLIMIT = (0.9)  # chosen before\nCLAIMS = [LIMIT]\nELSE = 1\n')
    commit(study.parent)
    second = start(tmp_path / "r.json")
    assert second.has("dense") and not second.has("eora") and not second.has("dense", seed=1)
    second.add(row("eora"))
    second.save()
    again = Results.load(first.path)
    assert again.has("dense") and again.has("eora") and len(again.header["runs"]) == 2
    assert again.header["rule"] == first.header["rule"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"text": "other"}}, "text"),
        ({"profile": "quick"}, "profile"),
        ({"provisional": True}, "whether the rule is committed"),
        ({"paper": "other"}, "paper"),
        ({"dtype": "bfloat16"}, "dtype: float32 then, bfloat16 now"),
    ],
)
def test_rows_of_other_sources_are_not_mixed_in(study, tmp_path, options, message):
    results = start(tmp_path / "r.json", data={"text": "12ab"})
    results.add(row())
    results.save()
    before = results.path.read_bytes()
    options = {"data": {"text": "12ab"}, **options}
    with pytest.raises(ResultsError, match=f"{message}.*delete the file"):
        start(tmp_path / "r.json", **options)
    assert results.path.read_bytes() == before
    results.path.unlink()  # the remedy
    assert not start(tmp_path / "r.json", **options).has("dense")


def test_a_changed_rule_is_refused_even_when_committed(study, tmp_path):
    start(tmp_path / "r.json").save()
    study.write_text("LIMIT = 0.95\nCLAIMS = [LIMIT]\n")
    commit(study.parent)
    with pytest.raises(ResultsError, match="the rule"):
        start(tmp_path / "r.json")


def test_the_rule_must_be_committed(study, tmp_path):
    study.write_text("LIMIT = 0.95\nCLAIMS = [LIMIT]\n")
    with pytest.raises(RuleNotCommitted, match="not committed.*--profile quick"):
        start(tmp_path / "r.json")
    assert start(tmp_path / "r.json", provisional=True).header["rule"] is None


def test_untracked_and_homeless_rules_are_refused(study, tmp_path, monkeypatch):
    (study.parent / "newrule.py").write_text("CLAIMS = [1]\n")
    with pytest.raises(RuleNotCommitted, match="not committed"):
        rule_commit("newrule")
    (study.parent / ".gitignore").write_text("newrule.py\n")
    with pytest.raises(RuleNotCommitted, match="not committed"):
        rule_commit("newrule")
    (tmp_path / "homeless").mkdir()
    (tmp_path / "homeless" / "alonerule.py").write_text("CLAIMS = [1]\n")
    monkeypatch.syspath_prepend(tmp_path / "homeless")
    with pytest.raises(RuleNotCommitted, match="no git checkout"):
        rule_commit("alonerule")


def test_the_rule_is_as_old_as_its_oldest_equal(study):
    first = rule_commit("recordstudy")
    study.write_text("import math\nLIMIT = 0.9\nCLAIMS = [LIMIT]\ndef run():\n    return math.pi\n")
    commit(study.parent)
    assert rule_commit("recordstudy") == first
    study.write_text("LIMIT = 0.8\nCLAIMS = [LIMIT]\n")
    commit(study.parent)
    assert rule_commit("recordstudy")["commit"] != first["commit"]


SOURCES = "refimpl.lab.study.sources"


def test_functions_that_change_are_named_with_what_used_them(study, tmp_path):
    results = start(tmp_path / "r.json")
    results.note("slow", ("slow", "", 1), 9.0, [(SOURCES, "source_hash"), (SOURCES, "module_hash")])
    results.note("fast", ("fast", "", 1), 2.0, [(SOURCES, "source_hash")])
    results.note("fast", ("fast", "b", 2), 1.0, [])
    assert results.changed_functions() == []
    assert results.header["kinds"]["fast"] == {
        "functions": [1],
        "arm": "fast",
        "condition": "b",
        "seed": 2,
        "seconds": 1.0,
    }
    results.header["functions"][0][2] = "0" * 16
    assert results.changed_functions() == [f"{SOURCES}.module_hash"]
    assert results.kinds_resting_on(results.changed_functions()) == {"slow": [f"{SOURCES}.module_hash"], "fast": []}
    results.save()
    with pytest.raises(ResultsError, match=r"module_hash; used by slow\)\. `refimpl restamp demo`"):
        start(tmp_path / "r.json")


def test_a_function_that_moved_is_followed(study, tmp_path):
    results = start(tmp_path / "r.json")
    results.note("arm", ("arm", "", 1), 1.0, [(SOURCES, "source_hash")])
    results.header["functions"][0][0] = "refimpl.lab.where_it_was"
    assert results.changed_functions() == []
    results.header["functions"][0][1] = "other_name"
    assert results.changed_functions() == ["refimpl.lab.where_it_was.other_name"]


def test_an_arm_can_be_dropped(study, tmp_path):
    results = start(tmp_path / "r.json")
    results.add(row(), row("eora"))
    results.drop("eora")
    assert results.has("dense") and not results.has("eora")
    with pytest.raises(OptionError, match="no arm 'eora'; it has one of 'dense'"):
        results.drop("eora")


def test_bad_records_are_refused(study, tmp_path):
    results = start(tmp_path / "r.json")
    results.add(row(cost=4.0))
    for record, message in [
        (row(cost=4.0), "already there"),
        (row(unit="b", cost=3.0), "but 4 in its earlier units"),
        (row(unit="b", value=float("nan"), cost=4.0), "value is nan"),
        (row(unit="b", paper="other", cost=4.0), "this file is about 'demo'"),
    ]:
        with pytest.raises(OptionError, match=message):
            results.add(record)
    with pytest.raises(OptionError, match="no arm 'gptq'"):
        results.values("gptq", metric="nll")
    assert len(list(results.records())) == 1


def test_damaged_files_are_named(study, tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(ResultsError, match="does not exist"):
        Results.load(path)
    results = start(path)
    results.add(row())
    results.save()
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ResultsError, match="not a results file"):
        Results.load(path)
    content = json.loads(whole)
    content["header"]["format"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="format 99"):
        Results.load(path)
    path.write_text("[]")
    with pytest.raises(ResultsError, match="not a results file"):
        Results.load(path)


def test_an_interrupted_save_leaves_the_old_file(study, tmp_path):
    results = start(tmp_path / "r.json")
    results.add(row())
    results.save()
    before = results.path.read_bytes()
    results.header["oops"] = object()  # cannot be written
    with pytest.raises(TypeError):
        results.save()
    assert results.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["r.json"]


def test_curves_of_a_real_training(study, tmp_path):
    from torch import nn

    from refimpl.core.train.loop import Recipe, batches, train

    x = torch.linspace(-1, 1, 32)[:, None]
    loss = lambda model, batch: (model(batch[0]) - 3 * batch[0]).square().mean()  # noqa: E731
    history = train(
        nn.Linear(1, 1),
        batches(x, batch_size=8),
        loss,
        Recipe(10, lr=0.1),
        evaluate=lambda model: {"error": float(loss(model, (x,)))},
        evaluate_every=5,
        progress=False,
    )
    results = start(tmp_path / "r.json")
    results.add_history("dense", "training", 0, history, every=4)
    curve = results.values("dense", "training", metric="train loss")
    assert list(curve) == ["4", "8"]  # steps 9 and 10 are no full mean
    assert curve["8"] == pytest.approx(sum(history.losses[4:8]) / 4, rel=1e-5)
    assert list(results.values("dense", "training", metric="error")) == ["0", "5", "10"]
    assert not results.has("dense")
