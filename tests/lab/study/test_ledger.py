"""Verdicts follow their rules, and a rule that came after the numbers, or code that changed, is found out."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from refimpl.core.errors import OptionError
from refimpl.core.files.io import data_path
from refimpl.lab import models, wheels
from refimpl.lab.data import text
from refimpl.lab.measure.statistics import difference, paired_bootstrap
from refimpl.lab.study.claims import Claim, Outcome, Verdict, judge
from refimpl.lab.study.ledger import markdown, rule_problems, stale, table
from refimpl.lab.study.records import Record, Results
from refimpl.papers import papers

STUDY = "LIMIT = 0.0\nCLAIMS = [LIMIT]\n"


def git(folder, *arguments, when=None):
    environment = {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when} if when else {}
    command = ["git", "-C", str(folder), "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    path = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**path, **environment}).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "ledgerstudy.py").write_text(STUDY)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "rule", when="2026-01-01T00:00:00+00:00")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def results(checkout, tmp_path):
    results = Results.start(tmp_path / "out" / "demo.json", paper="demo", study="ledgerstudy", data={"text": "12"})
    for arm, shift in (("ours", 0.1), ("control", 0.0)):
        values = {f"item {k}": 0.5 + shift + 0.01 * (k % 7) * (1 + shift) for k in range(30)}
        results.add(*(Record("demo", arm, "", 0, unit, "accuracy", value) for unit, value in values.items()))
    return results


def better(results):
    ours, control = (results.values(arm, metric="accuracy") for arm in ("ours", "control"))
    interval = paired_bootstrap(list(ours.values()), [control[unit] for unit in ours], statistic=difference)
    verdict = Verdict.HOLDS if interval.low > 0 else Verdict.DOES_NOT_HOLD
    return Outcome.of(
        interval, verdict, scale="30 items; the paper: 1000", control="control", quantity="accuracy gained"
    )


def claim(**options):
    return Claim(
        **{
            "id": "demo-better",
            "text": "Ours is better | than control.",
            "paper_number": "+12 points",
            "rule": better,
            "words": "holds if the interval of the difference lies above 0",
            **options,
        }
    )


def record(results, *claims):
    results.claims = judge(results, claims or [claim()])
    results.save()
    return Results.load(results.path)


def test_a_row_carries_all_that_a_reader_needs(results):
    record(results)
    (row,) = table(results.path.parent)
    assert row["verdict"] == "holds" and 0 < row["low"] < row["estimate"] < row["high"]
    assert row["estimate"] == pytest.approx(0.1, abs=0.02) and 0 < row["mde"] < 0.05
    assert row["paper"] == "demo" and row["control"] == "control" and "1000" in row["scale"]
    assert row["stale"] == [] and row["problems"] == [] and len(row["rule_commit"]) == 40


def test_judging_a_loaded_file_gives_what_is_stored(results):
    again = record(results)
    assert judge(again, [claim()]) == again.claims


def test_a_rule_that_is_not_met_does_not_hold(results):
    def worse(results):
        outcome = better(results)
        return Outcome(
            Verdict.DOES_NOT_HOLD, *(getattr(outcome, n) for n in ("estimate", "low", "high", "mde")), "", "", ""
        )

    assert judge(results, [claim(rule=worse)])[0]["verdict"] == "does not hold here"
    assert judge(results, [claim(rule=worse, paper_effect=-0.12)])[0]["verdict"] == "does not hold here"
    # too small an effect for this study: finding nothing says nothing, finding something does
    assert judge(results, [claim(rule=worse, paper_effect=1e-4)])[0]["verdict"] == "cannot be tested at this scale"
    assert judge(results, [claim(paper_effect=1e-4)])[0]["verdict"] == "holds"


def test_mistakes_in_claims_are_refused(results):
    with pytest.raises(OptionError, match="used twice"):
        judge(results, [claim(), claim()])
    with pytest.raises(OptionError, match="outside"):
        judge(results, [claim(rule=lambda r: Outcome(Verdict.HOLDS, 2.0, 0.0, 1.0, 0.1, "", "", ""))])
    with pytest.raises(OptionError, match="words="):
        claim(words="")
    with pytest.raises(OptionError, match="no arm 'missing'"):
        judge(results, [claim(rule=lambda r: r.values("missing", metric="accuracy"))])


def test_staleness_names_code_and_data(results):
    results.note("ours", ("ours", "", 0), 1.0, [("refimpl.lab.study.sources", "source_hash")])
    results = record(results)
    assert stale(results, {"text": "12"}) == []
    assert stale(results, {"text": "13"}) == ["text"]
    outdate(results)
    assert stale(results) == ["refimpl.lab.study.sources.source_hash"]
    assert table(results.path.parent)[0]["stale"] == ["refimpl.lab.study.sources.source_hash"]


def outdate(results):
    """As if a function had another source when the records were made."""
    results.header["functions"] = [["refimpl.lab.study.sources", "source_hash", "0" * 16]]
    results.save()


def test_data_and_models_are_compared_where_the_cache_has_them(results, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("REFIMPL_CACHE", str(cache))
    article = text.Document("news/0", "", "some words")
    monkeypatch.setitem(text._PARSERS, "news", lambda: [(article.text, article)])
    recorded = {"news": "0", "wikipedia": "0", "smollm2": "0", "python": "0"}
    results.header["data"] = recorded
    record(results)
    assert table(results.path.parent)[0]["stale"] == []
    assert list(cache.iterdir()) == []  # nothing was fetched or parsed to find that out

    text.prepare("news")
    wheels.build_folder(models.SMOLLM2_FOLDER, lambda folder: (folder / "source.json").write_text('{"sha256": "1"}'))
    assert table(results.path.parent)[0]["stale"] == ["news", "smollm2"]
    results.header["data"] = {**recorded, "news": text.corpus_hash("news"), "smollm2": "1"}
    record(results)
    assert table(results.path.parent)[0]["stale"] == []


def test_a_rule_that_came_first_is_accepted_and_later_prose_does_not_hurt(checkout, results):
    results = record(results)
    assert rule_problems(results, checkout) == []
    (checkout / "ledgerstudy.py").write_text('"""Prose."""\n' + STUDY)
    git(checkout, "commit", "-q", "-am", "prose")
    assert rule_problems(results, checkout) == []


def test_a_rule_younger_than_the_run_is_found_out(checkout, results):
    results = record(results)
    results.header["runs"][0]["started"] = "2025-12-31T00:00:00+00:00"
    assert "younger than the run" in rule_problems(results, checkout)[0]
    results.header["rule"]["committed"] = "2025-01-01T00:00:00+00:00"  # a forged date does not help
    assert "younger than the run" in rule_problems(results, checkout)[0]


def test_a_commit_outside_the_history_is_found_out(checkout, results):
    results = record(results)
    git(checkout, "checkout", "-q", "--orphan", "other")
    git(checkout, "commit", "-q", "-m", "another history")
    assert "not in this history" in rule_problems(results, checkout)[0]


def test_a_study_other_than_the_committed_one_is_found_out(checkout, results):
    results = record(results)
    results.header["rule"]["hash"] = "0" * 16
    assert "not the one in the rule's commit" in rule_problems(results, checkout)[0]


def test_without_the_checkout_only_the_date_counts(checkout, results, tmp_path):
    results = record(results)
    git(tmp_path, "init", "-q", "elsewhere")
    for root in (tmp_path / "elsewhere", tmp_path):
        assert rule_problems(results, root) == []
    shutil.rmtree(checkout / ".git")
    results.header["runs"][0]["started"] = "2025-12-31T00:00:00+00:00"
    assert "younger" in rule_problems(results, checkout)[0]


def test_a_shallow_clone_that_lacks_the_commit_is_not_blamed(checkout, results, tmp_path):
    results = record(results)
    (checkout / "note.txt").write_text("later")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "later")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{checkout}", "shallow")
    assert rule_problems(results, tmp_path / "shallow") == []


def test_provisional_and_small_runs_are_marked(checkout, tmp_path):
    results = Results.start(
        tmp_path / "demo.json", paper="demo", study="ledgerstudy", profile="quick", provisional=True
    )
    results.add(
        *(Record("demo", arm, "", 0, str(k), "accuracy", k / 7) for arm in ("ours", "control") for k in range(5))
    )
    record(results)
    problems = table(tmp_path)[0]["problems"]
    assert "provisional" in problems[0] and "'quick'" in problems[1]


def test_markdown_shows_verdicts_and_their_flaws(results):
    record(results)
    outdate(results)
    shown = markdown(table(results.path.parent))
    lines = shown.splitlines()
    assert len(lines) == 3 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "**holds** (stale: refimpl.lab.study.sources.source_hash changed since)" in shown and "+12 points" in shown


def test_the_books_own_results_are_sound():
    rows = table()
    for row in rows:
        assert row["stale"] == [], f"{row['study']}: `refimpl restamp` shows whether it stands; {row['stale']} changed"
        assert row["problems"] == []
    judged = {row["paper"] for row in rows}
    unfinished = {path.stem for path in data_path("results").glob("*.json")} - judged
    assert not unfinished, "results without verdicts: `refimpl study` goes on where it stopped"
    assert {paper.slug for paper in papers() if paper.status == "chapter"} <= judged
