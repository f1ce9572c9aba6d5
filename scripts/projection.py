"""How long .ci/run would take with all chapters: the fixed part, plus each chapter's share times the number of papers.

A chapter's share is the measured time of its notebook, its tests (tests/<part>/test_<slug>*.py, tests/studies), the
cases of other tests that are there because of it (its exercises, the examples in its files, its method in tests of all
methods) and its page, read in a browser included. Tests run on several cores: their times add up to more than the step
takes, and each counts for the step's own time (idle cores at its end included) in proportion.

    python scripts/projection.py steps.tsv tests.xml
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from refimpl.papers import Paper, papers

LIMIT_MINUTES = 60
HARD_LIMIT_MINUTES = 90  # a slow or busy machine must not fail a change; a suite that grew by half must


def belongs(case: ET.Element, paper: Paper) -> bool:
    """Whether a test case is there because of a paper."""
    place = (case.get("file") or "").replace("\\", "/")
    folders = (paper.package.removeprefix("refimpl."), "studies")
    if place == paper.notebook or re.match(rf"tests/({'|'.join(folders)})/test_{paper.slug}[_.]", place):
        return True
    # a test of all exercises, modules or methods names this one in brackets
    _, _, arguments = (case.get("name") or "").rstrip("]").partition("[")
    return any(
        word in (paper.slug, *paper.exports) or word == paper.module or word.startswith(f"{paper.module}.")
        for word in arguments.split("-")
    )


def seconds_of(case: ET.Element) -> float:
    return float(case.get("time", 0))


def main(steps_file: Path, tests_file: Path) -> int:
    steps = {
        name: float(seconds) for name, seconds in (line.split("\t") for line in steps_file.read_text().splitlines())
    }
    cases = list(ET.parse(tests_file).iter("testcase"))
    chapters = [paper for paper in papers() if paper.status == "chapter"]
    busy = sum(seconds_of(case) for case in cases)
    own = sum(seconds_of(case) for case in cases if any(belongs(case, paper) for paper in chapters))
    if not own:
        print("no test or notebook of a chapter was found in the report: the projection would be empty")
        return 1
    side_by_side = busy / steps["tests"]  # below 1 if collecting took longer than it saved
    # Pages of chapters and of the rest cost about the same: the whole rendering is shared out over all pages.
    pages = len(list(Path("_build/html").glob("book/*.html"))) + len(
        list(Path("_build/html").glob("notebooks/**/*.html"))
    )
    browser = sum(seconds_of(case) for case in cases if "tests/browser" in (case.get("file") or ""))
    page = (steps["book pages"] + browser / side_by_side) / max(pages, 1)
    each = own / side_by_side / len(chapters) + page
    total = sum(steps.values())
    fixed = total - each * len(chapters)
    projected = (fixed + each * len(papers())) / 60
    for name, seconds in steps.items():
        print(f"{name:14} {seconds:7.0f} s")
    print(f"tests: {busy:.0f} s of work in {steps['tests']:.0f} s, {side_by_side:.2f} at a time")
    print(f"{'total':14} {total:7.0f} s, of which {each:.1f} s for each of {len(chapters)} chapter(s)")
    count = len(papers())
    verdict = "; ABOVE THE LIMIT" if projected > LIMIT_MINUTES else ""
    print(
        f"Projection at {count} chapters: {fixed:.0f} s + {count} x {each:.1f} s = {projected:.1f} minutes "
        f"(limit {LIMIT_MINUTES}, fails above {HARD_LIMIT_MINUTES}){verdict}"
    )
    return projected > HARD_LIMIT_MINUTES


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
