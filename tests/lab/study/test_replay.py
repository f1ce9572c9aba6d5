"""A replay lets words and moves pass and catches the last bits; stamps form a chain; what was not executed is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from refimpl.cli.book import studies
from refimpl.core.files.io import data_path
from refimpl.lab.study import replay, study
from refimpl.lab.study.records import Results, git
from refimpl.lab.study.sources import Sources

ROOT = Path(__file__).resolve().parents[3]
QUICK = {"module": "refimpl.studies.rs2", "quick": True, "jobs": [], "recorded": ""}
SCHEDULES = "refimpl/core/train/schedules.py"
COSINE = ("return weight * high + (1 - weight) * low", "return low + weight * (high - low)")


@pytest.fixture
def edited(tmp_path: Path):
    """A copy of the package to make changes in: ``edited({file: (old, new)})`` returns its folder."""

    def make(changes: dict[str, tuple[str, str]]) -> Path:
        shutil.copytree(ROOT / "refimpl", tmp_path / "refimpl", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / "data").symlink_to(ROOT / "data")
        for file, (old, new) in changes.items():
            text = (tmp_path / file).read_text()
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
            (tmp_path / file).write_text(text.replace(old, new))
        return tmp_path

    return make


@pytest.fixture
def rs2() -> Results:
    return Results.load(data_path("results", "rs2.json"))


def test_the_words_of_an_error_change_nothing(edited, rs2):
    folder = edited({})
    file = folder / "refimpl/core/train/loop.py"
    text = file.read_text()
    file.write_text(text.replace("use 1 or more", "one is the least"))
    assert file.read_text() != text
    assert rs2.changed_functions(Sources.of_tree(folder)) == []


def test_a_change_is_named_with_the_arms_that_used_it(edited, rs2):
    folder = edited({SCHEDULES: COSINE})
    (changed,) = rs2.changed_functions(Sources.of_tree(folder))
    assert changed.startswith("refimpl.core.train.schedules._cosine")
    assert {"short", "full", "rs2 without"} <= {k for k, names in rs2.kinds_resting_on([changed]).items() if names}


@pytest.mark.slow
def test_a_cosine_that_rounds_otherwise_is_caught(edited):
    """Re-associated: every record stays as it is, and only the rates of single steps differ in their last bits."""
    now, other = replay.run_probe(ROOT, QUICK), replay.run_probe(edited({SCHEDULES: COSINE}), QUICK)
    assert replay.compare(now, now).differences == []
    found = replay.compare(now, other)
    assert any("rate of step" in words or "loss of step" in words for words in found.differences), found.differences
    assert found.trainings == 10 and found.steps == 210


def test_a_moved_module_is_followed(edited, rs2):
    folder = edited({})
    old, new = folder / "refimpl/training_data/rs2.py", folder / "refimpl/training_data/subsets/rs2.py"
    new.parent.mkdir()
    (new.parent / "__init__.py").write_text("")
    old.rename(new)
    for file in folder.rglob("refimpl/**/*.py"):
        text = file.read_text()
        if "refimpl.training_data.rs2" in text:
            file.write_text(text.replace("refimpl.training_data.rs2", "refimpl.training_data.subsets.rs2"))
    now = Sources.of_tree(folder)
    assert any(module == "refimpl.training_data.rs2" for module, _, _ in rs2.functions())
    assert rs2.changed_functions(now) == []
    replay.stamp(rs2, replay.Comparison(), now, {})
    assert any(module == "refimpl.training_data.subsets.rs2" for module, _, _ in rs2.functions())
    assert rs2.changed_functions(now) == []


def test_a_stamp_takes_over_what_changed_and_what_is_new(rs2):
    now, functions = Sources.of_tree(ROOT), rs2.functions()
    rs2.header["functions"][0][2] = "0" * 16
    rs2.header["functions"].append(["refimpl.gone", "away", "0" * 16])
    gone = len(rs2.header["functions"]) - 1
    rs2.header["kinds"]["short"]["functions"].append(gone)
    records = list(rs2.records())
    replaced = ("refimpl.lab.study.sources", "source_hash")
    replay.stamp(rs2, replay.Comparison(values=3, functions={functions[0][:2], replaced}), now, {})
    assert rs2.changed_functions(now) == [] and list(rs2.records()) == records
    assert rs2.functions()[0] == functions[0]
    assert replaced in [row[:2] for row in rs2.functions()]
    assert len(rs2.header["functions"]) - 1 in rs2.header["kinds"]["short"]["functions"], (
        "with what used the one that is gone"
    )


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (replay.Comparison(differences=["loss of step 3"]), "loss of step 3.*--again"),
        (replay.Comparison(), "did not run in the replay.*run again what used it: .*short"),
    ],
)
def test_what_a_replay_does_not_show_is_refused(rs2, monkeypatch, outcome, message):
    index = rs2.header["kinds"]["short"]["functions"][0]
    rs2.header["functions"][index][2] = "0" * 16
    for stamp in rs2.header["stamps"]:
        stamp["functions"].pop(str(index), None)
    before = copy.deepcopy(rs2.header)
    monkeypatch.setattr(replay, "replay", lambda *arguments: outcome)
    monkeypatch.setattr(replay, "problems", lambda results: [])
    monkeypatch.setattr(rs2, "save", lambda: pytest.fail("a record that does not stand was saved"))
    with pytest.raises(replay.NotStanding, match=message):
        replay.restamp(rs2)
    assert rs2.header == before


def test_arms_that_are_measured_again_need_not_stand(rs2, monkeypatch):
    index = rs2.header["kinds"]["short"]["functions"][0]
    (module, name, digest), rows = rs2.functions()[index], [["short", "mnist", 1, "", "accuracy", "0x1p-1"]]
    rows.append(["full size: short", "mnist", 2, "", "accuracy", "0x1p-1"])
    rs2.header["functions"][index][2] = "0" * 16
    for stamp in rs2.header["stamps"]:
        stamp["functions"].pop(str(index), None)
    answers = [
        {"values": [["full", "mnist", 1, "", "accuracy", "0x1p-1"]], "trainings": [], "functions": [(module, name)]}
    ]
    answers.append({**answers[0], "values": answers[0]["values"] + rows})
    asked: list[dict] = []

    def probe(root: Path, request: dict) -> dict:
        asked.append(request)
        return answers[len(asked) - 1]

    monkeypatch.setattr(replay, "run_probe", probe)
    monkeypatch.setattr(replay, "rules_agree", lambda results, then: [])
    monkeypatch.setattr(replay, "problems", lambda results: [])
    monkeypatch.setattr(rs2, "save", lambda: None)
    with pytest.raises(replay.NotStanding, match="accuracy of short, mnist, seed 1: new"):
        replay.restamp(copy.deepcopy(rs2), 0)
    asked.clear()
    assert replay.restamp(rs2, 60, without=["short"])
    assert all(job[0] != "short" for job in asked[0]["jobs"]) and asked[0]["jobs"]
    assert rs2.header["stamps"][-1]["compared"]["without"] == ["short"]
    assert rs2.functions()[index] == (module, name, digest) and rs2.changed_functions() == []


def test_arms_are_dropped_only_if_the_others_stand(rs2, monkeypatch, tmp_path):
    rs2.path = tmp_path / "rs2.json"
    rs2.save()
    arm = next(iter(rs2.records())).arm

    def refused(*arguments: object, **more: object) -> bool:
        raise replay.NotStanding("a value differs")

    monkeypatch.setattr(study, "restamp", refused)
    with pytest.raises(replay.NotStanding, match="a value differs"):
        study.run("refimpl.studies.rs2", rs2.path, again=[arm])
    assert Results.load(rs2.path).has(arm, *next((r.condition, r.seed) for r in rs2.records()))


def test_other_data_are_refused(rs2, monkeypatch):
    rs2.header["functions"][0][2] = "0" * 16
    rs2.header["data"]["mnist"] = "0"
    monkeypatch.setattr(replay, "current_data", lambda recorded: {**recorded, "mnist": "1"})
    with pytest.raises(replay.NotStanding, match="data or models changed: mnist"):
        replay.restamp(rs2)


@pytest.mark.parametrize("slug", studies())
def test_stamps_form_an_unbroken_chain(slug):
    header = Results.load(data_path("results", f"{slug}.json")).header
    bases = {run.get("commit") for run in header["runs"]}  # the oldest runs do not say
    for stamp in header["stamps"]:
        assert stamp["base"] in bases and stamp["compared"]["values"] + stamp["compared"]["trainings"] > 0
        assert json.dumps(stamp["functions"]) and stamp["digest"]
        bases = {stamp["commit"], *(run["commit"] for run in header["runs"] if run["started"] > stamp["when"])}
    if git(ROOT, "rev-parse", "--is-shallow-repository") == "false":
        for commit in {header["runs"][-1]["commit"], *(stamp["commit"] for stamp in header["stamps"])}:
            git(ROOT, "merge-base", "--is-ancestor", commit, "HEAD")
