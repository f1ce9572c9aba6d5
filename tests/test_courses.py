"""What is made for lecturers: the planner, the syllabus, the exercises, and notebooks without their solutions."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refimpl_book import courses

from refimpl.papers import papers

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [paper for paper in papers() if paper.status == "chapter"]


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("student", None)
    import student

    return student


def test_what_a_paper_builds_on_is_a_paper_and_never_itself() -> None:
    known = {paper.slug: paper for paper in papers()}

    def before(slug: str, path: tuple[str, ...] = ()) -> None:
        assert slug not in path, f"{slug} builds on itself: {path}"
        for earlier in known[slug].builds_on:
            before(earlier, (*path, slug))

    for slug in known:
        before(slug)


def test_planner_has_a_row_for_each_chapter_and_links_what_it_builds_on(monkeypatch) -> None:
    rows = courses.planner().splitlines()[2:]
    assert len(rows) == len(CHAPTERS)
    assert all(f"../{paper.notebook}" in "\n".join(rows) for paper in CHAPTERS)
    eora = next(row for row in rows if "eora.ipynb" in row)
    assert eora.endswith("| the tour | 45 | 2 of 3 | no |")
    later = [dataclasses.replace(p, builds_on=("eora", "slim"), gpu=True) if p.slug == "eora" else p for p in papers()]
    monkeypatch.setattr(courses, "papers", lambda: tuple(later))
    eora = next(row for row in courses.planner().splitlines() if row.startswith("| [EoRA]"))
    assert "[EoRA](../notebooks/lowrank/eora.ipynb), SLiM (no chapter yet) | 45" in eora
    assert eora.endswith("| needed |")


@pytest.mark.parametrize("count", [0, 1, 3, 7, 20])
def test_syllabus_has_twelve_weeks_and_grows_with_the_chapters(monkeypatch, count: int) -> None:
    entries = [
        dataclasses.replace(paper, status="chapter" if k < count else "planned") for k, paper in enumerate(papers())
    ]
    monkeypatch.setattr(courses, "papers", lambda: tuple(entries))
    monkeypatch.setattr(courses, "all_exercises", lambda: [])
    text, weeks = courses.syllabus(), courses.weeks()
    assert len(weeks) == 12 and len({week.topic for week in weeks}) == 12
    assert [line.split(" | ")[0] for line in text.splitlines() if re.match(r"\| \d+ \|", line)] == [
        f"| {k}" for k in range(1, 13)
    ]
    assert text.startswith(f"{count} of 57 papers have a chapter so far.")
    with_chapter = sum(week.kind == "chapter" for week in weeks)
    assert with_chapter == 7 if count >= 7 else count <= with_chapter <= 2 * count
    assert ("Chapters to exchange" in text) == (count > 7)
    linked = set(re.findall(r"notebooks/\w+/(\w+)\.ipynb", text))
    assert linked == {paper.slug for paper in entries if paper.status == "chapter"}, "planned papers have no link"


def test_syllabus_links_only_pages_that_are_in_the_contents() -> None:
    for text in (courses.syllabus(), courses.exercises(), courses.planner()):
        for target in re.findall(r"\]\((?!https:)([^)]+)\)", text):
            assert (ROOT / "book" / target).is_file(), target
    assert "](ledger.md)" in courses.syllabus()


def test_every_exercise_of_the_notebooks_is_listed_once_at_its_level() -> None:
    opened = 0
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        opened += sum(
            bool(re.search(r"^\w+ = \.\.\.$", "".join(cell["source"]), re.M))
            for cell in cells
            if cell["cell_type"] == "code"
        )
    found = courses.all_exercises()
    assert len(found) == opened
    assert {exercise.level for exercise in found} <= {*courses.LEVELS, ""}
    text = courses.exercises()
    assert text.count("\n- ") + text.count("\n\n- ") >= opened and "details" not in text
    easy = text[text.index("### Easy") : text.index("### Medium")]
    assert "A layer of 1000 x 1000 weights of 16 bits" in easy and "python" not in easy


# -- notebooks for a class --


def execute(source: str, names: dict[str, Any]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(source, "<cell>", "exec"), names)
    return said.getvalue()


def sources(path: Path, kind: str) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_no_solution_is_left_and_everything_else_is(student, tmp_path: Path) -> None:
    written = student.build(tmp_path / "class")
    assert len(written) == len(list((ROOT / "notebooks").rglob("*.ipynb")))
    for path in written:
        before = ROOT / "notebooks" / path.relative_to(tmp_path / "class")
        texts = "\n".join(sources(path, "markdown"))
        assert "<summary>Solution" not in texts and "## On your own model" in texts
        for solution in re.findall(
            r"<summary>Solution.*?```python\n(.*?)```", "\n".join(sources(before, "markdown")), re.S
        ):
            assert solution not in texts
        code, code_before = sources(path, "code"), sources(before, "code")
        assert len(code) == len(code_before)
        for new, old in zip(code, code_before, strict=True):
            if not student.OPEN.search(old):
                assert new == old
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", texts):
            assert (path.parent / target.partition("#")[0]).is_file(), target
        outputs = [cell.get("outputs") for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert sum(map(bool, outputs)) > 5, "the book's own outputs stay"


def test_the_copy_is_replaced_but_nothing_else_is(student, tmp_path: Path) -> None:
    target = tmp_path / "class"
    student.build(target)
    (target / "tour.ipynb").write_text("changed")
    student.build(target)
    assert (target / "tour.ipynb").read_text() != "changed"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="not a student copy"):
        student.build(other)
    assert (other / "thesis.txt").read_text() == "precious"


def test_what_gives_an_answer_away_is_encoded_and_nothing_more(student) -> None:
    number = "import math\n\nx = ...\nscale = 3\ncheck(x, math.pi * scale)"
    hidden = student.without_answer(number)
    assert "math.pi" not in hidden and hidden.startswith("import math\n\nx = ...\nscale = 3\n")
    function = "def expected(a):\n    return a + 41\n\n\nf = ...\ncheck(f, expected, on=[(1,)])"
    assert "41" not in student.without_answer(function) and "f = ..." in student.without_answer(function)
    named = "y = ...\ncheck(y, counted.bits)"
    assert student.without_answer(named) == named
    said: list[tuple] = []
    names = {"check": lambda *args, **more: said.append(args)}
    execute(hidden.replace("x = ...", "x = 9"), names)
    assert said[0] == (9, 3 * 3.141592653589793)


@pytest.mark.parametrize("name", ["pruning/gradual_magnitude.ipynb"])
def test_exercises_of_the_copy_still_tell_right_from_wrong(
    student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The whole notebook at its quick size, as a student runs it; then with the solutions of the original put in."""
    monkeypatch.setenv("REFIMPL_PROFILE", "quick")
    student.build(tmp_path / "class")
    solutions = re.findall(
        r"<summary>Solution.*?```python\n(.*?)```", "\n".join(sources(ROOT / "notebooks" / name, "markdown")), re.S
    )
    names: dict[str, Any] = {"__name__": "__main__"}
    tried = 0
    for source in sources(tmp_path / "class" / name, "code"):
        if "%pip" in source:
            continue
        said = execute(source, names)
        opened = student.OPEN.search(source)
        if opened:
            assert "Not attempted" in said
            assert execute(source.replace(opened[0], solutions[tried]), names).startswith("Right.")
            assert execute(source.replace(opened[0], f"{opened[1]} = 'nonsense'"), names).startswith("Not yet")
            tried += 1
    assert tried == len(solutions) > 0


def test_the_script_runs_and_says_how() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "refimpl_book.courses", "planner"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("| Chapter |")
