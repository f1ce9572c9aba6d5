"""The papers as text: tables and lists from refimpl/papers.toml alone, so that nothing else need work to make them."""

from __future__ import annotations

from refimpl.markdown import table
from refimpl.papers import PARTS, Paper, papers


def chapters() -> list[Paper]:
    return [paper for paper in papers() if paper.status == "chapter"]


def chapter_table(prefix: str) -> str:
    """The chapters, with links to the notebooks relative to `prefix`."""
    rows = [
        [
            PARTS[paper.part],
            f"[{paper.name}]({prefix}{paper.notebook})",
            f"[{paper.title}]({paper.url}), {paper.year}",
            f"{paper.minutes} min",
            f"{paper.difficulty} of 3",
        ]
        for paper in chapters()
    ]
    return table(["Part", "Chapter", "Paper", "Time", "Difficulty"], rows)


def planned_list() -> str:
    """What is planned, by part; named as planned."""
    lines = []
    for part, title in PARTS.items():
        names = [paper.name for paper in papers() if paper.part == part and paper.status == "planned"]
        if names:
            lines.append(f"- {title}: {', '.join(names)}.")
    return "\n".join(lines)


def state() -> str:
    done = len(chapters())
    return f"{done} of {len(papers())} papers {'has' if done == 1 else 'have'} a chapter so far."


def part_table(part: str) -> str:
    """The methods of a part and what each optimises, with their state."""
    rows = [
        [
            f"[{paper.name}](../{paper.notebook})" if paper.status == "chapter" else paper.name,
            f"[{paper.title}]({paper.url}), {paper.year}",
            "chapter" if paper.status == "chapter" else "planned",
        ]
        for paper in papers()
        if paper.part == part
    ]
    return table(["Method", "Paper", "State"], rows)
