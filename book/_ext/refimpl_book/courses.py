"""What lecturers need, as Markdown from refimpl/papers.toml and the notebooks: a planner, a syllabus, exercises.

python -m refimpl_book.courses planner|syllabus|exercises    print one of them
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from refimpl.markdown import table
from refimpl.papers import PARTS, Paper, papers
from refimpl_book.live import ROOT

LEVELS = ("easy", "medium", "hard")
EXERCISE = re.compile(r"\*\*(\d+) \((\w+)\)\.\*\*\s*(.+?)(?=\n\n\*\*\d+ \(|\n\n#|\Z)", flags=re.DOTALL)
DETAILS = re.compile(r"<details>.*?</details>", flags=re.DOTALL)
WEEKS = 12


def chapters() -> list[Paper]:
    return [paper for paper in papers() if paper.status == "chapter"]


def link(paper: Paper) -> str:
    """A chapter as a link from a page in book/; the name alone while there is none."""
    return f"[{paper.name}](../{paper.notebook})" if paper.status == "chapter" else f"{paper.name} (no chapter yet)"


# -- the planner --


def planner() -> str:
    """The chapters with what they teach, ask for and cost."""
    known = {paper.slug: paper for paper in papers()}
    rows = [
        [
            f"{link(paper)}<br>{PARTS[paper.part]}",
            " ".join(paper.objectives),
            ", ".join(paper.prerequisites),
            ", ".join(link(known[slug]) for slug in paper.builds_on) or "the tour",
            str(paper.minutes),
            f"{paper.difficulty} of 3",
            "needed" if paper.gpu else "no",
        ]
        for paper in sorted(chapters(), key=lambda paper: paper.difficulty)
    ]
    header = ["Chapter", "Objectives", "Prerequisites", "Builds on", "Minutes", "Difficulty", "GPU"]
    return table(header, rows)


# -- exercises --


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook; `level` is "" where the notebook gives none."""

    notebook: str
    title: str
    number: str
    level: str
    text: str


def _exercises_of(path: Path) -> Iterator[Exercise]:
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    texts = [DETAILS.sub("", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown"]
    title = next(text for text in texts if text.startswith("# ")).partition("\n")[0].removeprefix("# ")
    name = path.relative_to(ROOT).as_posix()
    for text in texts:
        found = EXERCISE.findall(text)
        for number, level, task in found:
            yield Exercise(name, title, number, level, " ".join(task.split()))
        single = re.search(r"^## Exercise\n+(.+?)(?=\n\n#|\Z)", text, flags=re.DOTALL | re.MULTILINE)
        if single and not found:
            yield Exercise(name, title, "", "", " ".join(single[1].split()))


def all_exercises() -> list[Exercise]:
    """The exercises of the tour, of the page on kernels and of every chapter, in reading order."""
    notebooks = ["notebooks/tour.ipynb", "notebooks/kernels.ipynb", *(paper.notebook for paper in chapters())]
    return [exercise for name in notebooks for exercise in _exercises_of(ROOT / name)]


def exercises() -> str:
    """The exercises by difficulty."""
    found = all_exercises()
    parts = []
    for level in (*LEVELS, ""):
        mine = [exercise for exercise in found if exercise.level == level]
        if not mine:
            continue
        parts.append(f"### {level.capitalize() or 'Not graded'} ({len(mine)})")
        parts.append(
            "\n".join(
                f"- [{exercise.title}](../{exercise.notebook})"
                + (f", exercise {exercise.number}" if exercise.number else "")
                + f": {exercise.text}"
                for exercise in mine
            )
        )
    return "\n\n".join(parts)


# -- the syllabus --


@dataclass(frozen=True)
class Week:
    """One week: what rests on a chapter, on another page of the book, or on neither."""

    topic: str
    before: str
    in_class: str
    kind: str  # "chapter", "page" or "work"


def pages() -> dict[str, str]:
    """The pages in the contents, with their titles: a page that is not in the book yet is not in a syllabus."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
    names = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    titles = {}
    for name in names:
        page, notebook = ROOT / f"{name}.md", ROOT / f"{name}.ipynb"
        if page.is_file():
            text = page.read_text(encoding="utf8")
        else:
            text = "".join(json.loads(notebook.read_text(encoding="utf8"))["cells"][0]["source"])
        titles[name] = text.partition("\n")[0].removeprefix("# ")
    return titles


def _links(*names: str) -> str:
    """Links to those of the pages that are there."""
    known = pages()

    def target(name: str) -> str:
        return f"../{name}.ipynb" if name.startswith("notebooks/") else f"{name.removeprefix('book/')}.md"

    return " and ".join(f"[{known[name]}]({target(name)})" for name in names if name in known)


def _tasks(paper: Paper) -> str:
    mine = [e for e in all_exercises() if e.notebook == paper.notebook and e.number]
    return ", ".join(f"{exercise.number} ({exercise.level})" for exercise in mine)


def _lecture(paper: Paper) -> Week:
    tasks = _tasks(paper)
    return Week(
        link(paper),
        f"Claim card and guess of {link(paper)}; the paper's introduction ([{paper.year}]({paper.url}))",
        " ".join(paper.objectives) + (f" Hand in exercises {tasks}." if tasks else ""),
        "chapter",
    )


def _second(paper: Paper) -> Week:
    return Week(
        f"{paper.name}, second week",
        f"Run `python -m refimpl study {paper.slug} --profile quick`; the paper's method section",
        "Its rows in the ledger: was the rule fair, what would change the verdict? The section *On your own model*.",
        "chapter",
    )


def _page_weeks() -> list[Week]:
    """Weeks that rest on pages other than chapters, most useful first; those whose pages are missing fall away."""
    candidates = [
        Week(
            "Methods side by side",
            _links("book/language_models", "book/classifiers", "book/tasks"),
            "Read the charts at equal bits. Each group puts one model of its own on the chart: `refimpl compress`, "
            "`refimpl evaluate --json`, `refimpl chart`.",
            "page",
        ),
        Week(
            "What perplexity does not see",
            _links("book/why_perplexity_misleads"),
            "Two models that perplexity and tasks order differently, or the search for them.",
            "page",
        ),
        Week(
            "From a compressed model to a fast one",
            _links("notebooks/kernels"),
            "Bytes, not operations, decide how fast one token is generated. Read one kernel line by line.",
            "page",
        ),
    ]
    return [week for week in candidates if week.before]


def _reading_weeks() -> Iterator[Week]:
    """A paper without a chapter, from each part in turn: the class does what a chapter would."""
    planned = [paper for paper in papers() if paper.status == "planned"]
    parts = [[paper for paper in planned if paper.part == part] for part in PARTS]
    have = {paper.part for paper in chapters()}
    parts.sort(key=lambda found: bool(found) and found[0].part in have)  # parts without any chapter first
    for turn in range(max(map(len, parts), default=0)):
        for found in parts:
            if turn < len(found):
                paper = sorted(found, key=lambda paper: paper.difficulty)[turn]
                yield Week(
                    f"Reading: {paper.name}",
                    f"[{paper.title}]({paper.url}), {paper.year}; no chapter yet",
                    "Write its claim card: the claim in numbers, the control arm, the rule of a verdict, and the "
                    "smallest experiment that could refute it.",
                    "work",
                )


def _selection(count: int) -> list[Paper]:
    """At most `count` chapters: from each part in turn, easy and long ones first, then back in reading order."""
    waiting = [
        sorted((c for c in chapters() if c.part == part), key=lambda c: (c.difficulty, -c.minutes)) for part in PARTS
    ]
    chosen: list[Paper] = []
    while len(chosen) < count and any(waiting):
        for queue in waiting:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return [paper for paper in chapters() if paper in chosen]


def weeks() -> list[Week]:
    """Twelve weeks: two to begin with, seven on chapters and pages, three of project."""
    tour = "[the tour](../notebooks/tour.ipynb)"
    first = [
        Week(
            "A model made smaller",
            "Nothing; laptops with Python",
            f"Run {tour} together. Guess before each step; keep the guesses.",
            "page",
        ),
        Week(
            "What counts as smaller, and as worse",
            _links("book/how_we_measure"),
            "Count the bits of a format by hand. What an interval over documents says and what it does not. "
            "The exercise of the tour.",
            "page",
        ),
    ]
    last = [
        Week(
            "Project: a model and a budget",
            _links("book/choosing_a_method", "book/ledger"),
            "Each group fixes a model, a budget in bits, a pipeline, and its rule of success before it runs anything.",
            "work",
        ),
        Week(
            "Project: runs",
            "A first result with its interval",
            "Half-time reports: what surprised, what is still not controlled for?",
            "work",
        ),
        Week(
            "Project: results",
            "A page: claim, number with interval, verdict by the rule of week 10",
            "Talks. Somebody else's group repeats one number of each.",
            "work",
        ),
    ]
    room = WEEKS - len(first) - len(last)
    chosen = _selection(room)
    extra = _page_weeks()[: room - len(chosen)]
    left = room - len(chosen) - len(extra)
    twice = sorted(chosen, key=lambda paper: -paper.minutes)[:left]
    twice = [paper for paper in twice if paper.minutes >= 30]  # a short chapter does not fill two weeks
    middle = [
        week
        for paper in chosen
        for week in ([_lecture(paper), _second(paper)] if paper in twice else [_lecture(paper)])
    ]
    middle += extra
    middle += [week for week, _ in zip(_reading_weeks(), range(room - len(middle)), strict=False)]
    return first + middle + last


def syllabus() -> str:
    """Twelve weeks from what exists today, and a line that says what they rest on."""
    plan = weeks()
    count = {kind: sum(week.kind == kind for week in plan) for kind in ("chapter", "page", "work")}
    rest = [paper for paper in chapters() if not any(paper.name in week.topic for week in plan)]
    lines = [
        f"{len(chapters())} of {len(papers())} papers have a chapter so far. Of the {WEEKS} weeks, "
        f"{count['chapter']} rest on a chapter, {count['page']} on another page of the book, and {count['work']} on "
        "work of the class (a project, or papers that have no chapter yet). The table is made from the list of papers "
        "and changes as chapters arrive.",
        table(
            ["Week", "Topic", "Before class", "In class, and to hand in"],
            [[str(k), week.topic, week.before, week.in_class] for k, week in enumerate(plan, start=1)],
        ),
    ]
    if rest:
        lines.append(f"Chapters to exchange for any of these: {', '.join(map(link, rest))}.")
    return "\n\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {"planner": planner, "syllabus": syllabus, "exercises": exercises}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in GENERATED:
        sys.exit(f"usage: python -m refimpl_book.courses {'|'.join(GENERATED)}")
    print(GENERATED[sys.argv[1]]())
