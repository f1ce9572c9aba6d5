"""The list of papers (papers.toml) as dataclasses.

Tables of contents, the README's table, the badges and the completeness tests read this list; no method does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from refimpl.core.errors import OptionError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has a reader since 3.11
    import tomli as tomllib

#: Parts of the book in reading order: folder name -> title.
PARTS = {
    "measuring": "Measuring",
    "pruning": "Pruning",
    "quantization": "Quantization",
    "lowrank": "Low rank",
    "kvcache": "Key-value caches",
    "prompting": "Prompting and adapting",
    "distillation": "Distillation",
    "data": "Training data",
    "continual": "Continual learning",
    "communication": "Communication",
    "codec": "Learned codecs",
}


@dataclass(frozen=True)
class Paper:
    """One entry of papers.toml.

    Attributes:
        slug: name of the notebook, the study and the results file.
        name: short name used in running text.
        title: full title of the paper.
        year: year of the first public version.
        arxiv: arXiv identifier, such as ``"2410.21271"``.
        venue: where it was published; empty for a preprint.
        part: one of `PARTS`.
        host: what the method plugs into: compress, loop, cache, sampling or evaluation.
        status: ``"chapter"`` when notebook, code, tests and study exist, else ``"planned"``.
        files: the method's own files, relative to the package.
        kernels: names of the kernels it calls.
        exports: names that `from refimpl import ...` offers of it.
        objectives: what a reader can do afterwards.
        prerequisites: what a reader should know before.
        minutes: reading and running time of the chapter, in minutes.
        difficulty: 1 (start here) to 3.
        builds_on: slugs of papers to read before.
        gpu: whether a reader needs a GPU to run the chapter.
    """

    slug: str
    name: str
    title: str
    year: int
    arxiv: str
    venue: str
    part: str
    host: str
    status: str
    files: tuple[str, ...]
    kernels: tuple[str, ...]
    objectives: tuple[str, ...]
    prerequisites: tuple[str, ...]
    minutes: int
    difficulty: int
    exports: tuple[str, ...] = ()
    builds_on: tuple[str, ...] = ()
    gpu: bool = False

    @property
    def package(self) -> str:
        """The package that holds the method, such as ``refimpl.lowrank``."""
        return package(self.part)

    @property
    def module(self) -> str:
        """The file or folder of the method itself, such as ``refimpl.lowrank.eora``."""
        return f"{self.package}.{self.slug}"

    @property
    def notebook(self) -> str:
        """Path of the notebook in a checkout."""
        return f"notebooks/{self.part}/{self.slug}.ipynb"

    @property
    def url(self) -> str:
        """Address of the paper's abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


def package(part: str) -> str:
    """The package of a part: its name, but for "data", which would collide with the folder ``data/``.

    Example:
        >>> package("lowrank"), package("data")
        ('refimpl.lowrank', 'refimpl.training_data')
    """
    return f"refimpl.{'training_data' if part == 'data' else part}"


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, part by part, in reading order.

    Example:
        >>> len(papers())
        57
        >>> {p.status for p in papers()} <= {"planned", "chapter"}
        True
    """
    with (Path(__file__).parent / "papers.toml").open("rb") as file:
        entries = tomllib.load(file)["paper"]
    frozen: list[dict[str, Any]] = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()} for entry in entries
    ]
    rows = [Paper(**entry) for entry in frozen]
    order = list(PARTS)
    return tuple(sorted(rows, key=lambda paper: order.index(paper.part)))


def paper(slug: str) -> Paper:
    """One paper by its slug.

    Raises:
        OptionError: for an unknown slug, with the nearest one.

    Example:
        >>> paper("eora").year
        2024
    """
    for entry in papers():
        if entry.slug == slug:
            return entry
    known = [entry.slug for entry in papers()]
    raise OptionError(f"slug={slug!r} is no paper of this book; use {nearest(slug, known)}")
