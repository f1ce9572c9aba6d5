"""The command line. Exit codes: 0 done, 1 an error you can act on, 2 a wrong call, 130 interrupted."""

from __future__ import annotations

import importlib
import importlib.util
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

from refimpl.core.errors import OptionError, RefimplError, nearest, require
from refimpl.core.io import data_path
from refimpl.papers import papers

require("typer", "lab")
import typer  # noqa: E402  (only after the check, so that the message names the extra)

app = typer.Typer(
    help="An open textbook that runs: papers, models and studies from the command line.",
    epilog="Example: refimpl fetch && refimpl study eora --profile quick",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Profile(str, Enum):
    """The size of an experiment."""

    quick = "quick"
    live = "live"
    study = "study"


@app.command("papers", epilog="Example: refimpl papers --planned")
def list_papers(
    planned: Annotated[bool, typer.Option(help="List the planned papers as well.")] = False,
) -> None:
    """List the papers that have a chapter."""
    for paper in papers():
        if paper.status == "chapter" or planned:
            note = "" if paper.status == "chapter" else "  (planned)"
            typer.echo(f"{paper.slug:28} {paper.year}  {paper.part:13} {paper.name}{note}")
    done = sum(paper.status == "chapter" for paper in papers())
    typer.echo(f"{done} of {len(papers())} papers have a chapter.")


@app.command(epilog="Example: refimpl fetch smollm2")
def fetch(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads the annotation at run time)
        typer.Argument(help="What to fetch; everything if left out."),
    ] = None,
) -> None:
    """Fetch the models and texts of the book into the cache, and check their hashes."""
    from refimpl.lab import fetch as fetching

    for name in names or fetching.NAMES:
        typer.echo(f"{name}: {fetching.fetch(name)}")


@app.command(epilog="Example: refimpl study eora --profile quick --out /tmp/eora.json")
def study(
    slug: Annotated[str, typer.Argument(help="A paper with a chapter, such as eora.")],
    profile: Annotated[Profile, typer.Option(help="Size of the experiment.")] = Profile.study,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Results file; data/results/<slug>.json for the study size by default."),
    ] = None,
) -> None:
    """Run a paper's experiment and write its results file. An interrupted run is resumed."""
    known = [paper.slug for paper in papers() if paper.status == "chapter"]
    if slug not in known:
        raise OptionError(f"slug={slug!r} has no study; use {nearest(slug, known)}")
    if importlib.util.find_spec(f"refimpl.studies.{slug}") is None:
        raise RefimplError(f"refimpl.studies.{slug} is missing from this installation; install refimpl again")
    # The ledger reads data/results only; smaller runs stay out of its way.
    target = out or (
        data_path("results", f"{slug}.json")
        if profile is Profile.study
        else Path(f"results-{profile.value}") / f"{slug}.json"
    )
    os.environ["REFIMPL_PROFILE"] = profile.value
    target.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module(f"refimpl.studies.{slug}").run(target, profile.value)
    typer.echo(f"Results: {target}")


@app.command(epilog="Example: refimpl ledger")
def ledger() -> None:
    """Show the claims checked so far, with our numbers and the verdicts."""
    from refimpl.lab.ledger import table

    rows = table()
    for row in rows:
        notes = [*row["problems"], *([f"stale: {', '.join(row['stale'])} changed"] if row["stale"] else [])]
        typer.echo(f"{row['paper']}: {row['text']}")
        typer.echo(f"    paper: {row['paper_number']}")
        typer.echo(
            f"    here: {row['quantity']} {row['estimate']:.4g} [{row['low']:.4g}, {row['high']:.4g}], {row['scale']}"
        )
        typer.echo(f"    verdict: {row['verdict']}" + (f" ({'; '.join(notes)})" if notes else ""))
    if not rows:
        typer.echo("No results recorded yet; `refimpl study <slug>` makes some.")
