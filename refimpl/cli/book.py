"""Commands about the book: its papers, the data it fetches, its studies and the ledger."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.console import one_of, print_json, stdout_for_json, waiting
from refimpl.core.errors import OptionError, RefimplError, nearest
from refimpl.papers import PARTS, papers

#: What can be fetched; a test compares it with `refimpl.lab.fetch`, whose import is too slow for completion.
RESOURCES = ("smollm2", "text", "mnist")
#: As in `refimpl.lab.study.claims.Verdict`.
VERDICTS = ("holds", "partly", "does not hold here", "cannot be tested at this scale")


class Profile(str, Enum):
    """The size of an experiment."""

    quick = "quick"
    study = "study"


def chapters() -> list[str]:
    return [paper.slug for paper in papers() if paper.status == "chapter"]


def studies() -> list[str]:
    return [*chapters(), "tasks", "caches", "smollm2"]  # studies that serve several chapters


Part = Annotated[
    str | None,
    typer.Option(
        help=f"Only papers of this part: {', '.join(PARTS)}.",
        callback=one_of("--part", lambda: list(PARTS)),
        autocompletion=lambda: list(PARTS),
    ),
]


def list_papers(
    part: Part = None,
    planned: Annotated[bool, typer.Option(help="List the planned papers as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every field of every entry, as JSON.")] = False,
) -> None:
    """List the papers that have a chapter."""
    chosen = [paper for paper in papers() if (paper.status == "chapter" or planned) and part in (None, paper.part)]
    if as_json:
        print_json([{**asdict(paper), "notebook": paper.notebook, "url": paper.url} for paper in chosen])
        return
    for paper in chosen:
        note = "" if paper.status == "chapter" else "  (planned)"
        typer.echo(f"{paper.slug:28} {paper.year}  {paper.part:13} {paper.name}{note}")
    listed = [paper for paper in papers() if part in (None, paper.part)]
    done = sum(paper.status == "chapter" for paper in listed)
    of_part = f" of part {part}" if part else ""
    typer.echo(f"{done} of {len(listed)} papers{of_part} have a chapter.")


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(RESOURCES)}; everything if left out.", autocompletion=lambda: list(RESOURCES)),
    ] = None,
) -> None:
    """Fetch the models and texts of the book into the cache, and check their hashes."""
    for name in names or ():
        if name not in RESOURCES:
            raise OptionError(f"{name!r} cannot be fetched; use {nearest(name, RESOURCES)}")
    with waiting("Looking into the cache"):
        from refimpl.lab import fetch as fetching
    for name in names or RESOURCES:
        with waiting(f"Preparing {name}"):
            folder = fetching.fetch(name)
        typer.echo(f"{name}: {folder}")


def study(
    slug: Annotated[
        str, typer.Argument(help="A paper with a chapter, such as eora; or tasks.", autocompletion=studies)
    ],
    profile: Annotated[Profile, typer.Option(help="Size of the experiment.")] = Profile.study,
    out: Annotated[
        Path | None, typer.Option(help="Results file; data/results/<slug>.json for the study size by default.")
    ] = None,
    again: Annotated[
        list[str] | None, typer.Option(help="Arm to measure anew, its records dropped; may be repeated.")
    ] = None,
) -> None:
    """Run a paper's experiment and write its results file. An interrupted run is resumed."""
    known = studies()
    if slug not in known:
        raise OptionError(f"slug={slug!r} has no study; use {nearest(slug, known)}")
    if importlib.util.find_spec(f"refimpl.studies.{slug}") is None:
        raise RefimplError(f"refimpl.studies.{slug} is missing from this installation; install refimpl again")
    from refimpl.core.files.folders import check_file, writing
    from refimpl.core.files.io import data_path

    # The ledger reads data/results only; smaller runs stay out of its way.
    target = out or (
        data_path("results", f"{slug}.json")
        if profile is Profile.study
        else Path(f"results-{profile.value}") / f"{slug}.json"
    )
    os.environ["REFIMPL_PROFILE"] = profile.value
    check_file(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with waiting(f"Loading the study of {slug}"):
        module = importlib.import_module(f"refimpl.studies.{slug}")
        from refimpl.lab.study.study import run
    run(module.__name__, target, profile.value, again or ())
    typer.echo(f"Results: {target}")


def restamp(
    slugs: Annotated[
        list[str] | None, typer.Argument(help="Studies; all of them if left out.", autocompletion=studies)
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only say which records the code has moved away from; exit 1 if there are any."),
    ] = False,
    minutes: Annotated[
        float, typer.Option(help="For full-size jobs of each study, both sides together; the quick size always runs.")
    ] = 10.0,
) -> None:
    """Show that recorded numbers stand although the code has changed, and stamp the records.

    Runs part of a study with the code it was recorded with and with the code as it is, on this machine, and compares
    everything unrounded. Example: refimpl restamp rs2 --minutes 5
    """
    for slug in slugs or ():
        if slug not in studies():
            raise OptionError(f"slug={slug!r} has no study; use {nearest(slug, studies())}")
    with waiting("Comparing records with the functions they rest on"):
        from refimpl.core.files.io import data_path
        from refimpl.lab.study import replay
        from refimpl.lab.study.ledger import stale
        from refimpl.lab.study.records import Results
    failed = False
    for slug in slugs or studies():
        path = data_path("results", f"{slug}.json")
        if not path.exists():
            typer.echo(f"{slug}: not recorded yet")
            continue
        results = Results.load(path)
        if check:
            changed = stale(results)
            arms = [kind for kind, names in results.kinds_resting_on(changed).items() if names]
            typer.echo(
                f"{slug}: " + (f"{', '.join(changed)} changed; used by {', '.join(arms)}" if changed else "stands")
            )
            failed |= bool(changed)
            continue
        try:
            stamped = replay.restamp(results, minutes, lambda words: typer.echo(f"{words} ...", err=True))
        except replay.NotStanding as error:
            typer.echo(str(error), err=True)
            failed = True
            continue
        if not stamped:
            typer.echo(f"{slug}: nothing it rests on has changed")
            continue
        told = results.header["stamps"][-1]["compared"]
        typer.echo(
            f"{slug}: stands; {told['values']} values, {told['trainings']} trainings with {told['steps']} steps, "
            f"{len(told['jobs'])} jobs at full size are equal"
        )
    if failed:
        raise typer.Exit(1)


def ledger(
    part: Part = None,
    paper: Annotated[
        str | None,
        typer.Option(
            help="Only claims of this paper.",
            callback=one_of("--paper", lambda: [paper.slug for paper in papers()]),
            autocompletion=chapters,
        ),
    ] = None,
    verdict: Annotated[
        str | None,
        typer.Option(
            help=f"Only claims with this verdict: {', '.join(VERDICTS)}.",
            callback=one_of("--verdict", lambda: list(VERDICTS)),
            autocompletion=lambda: list(VERDICTS),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rows as JSON.")] = False,
) -> None:
    """Show the claims checked so far, with our numbers and the verdicts."""
    with waiting("Comparing results with the sources they were made from"), stdout_for_json(as_json):
        from refimpl.lab.study.ledger import table

        everything = table()
    parts = {entry.slug: entry.part for entry in papers()}
    rows = [
        {**row, "part": parts.get(row["paper"])}
        for row in everything
        if part in (None, parts.get(row["paper"]))
        and paper in (None, row["paper"])
        and verdict in (None, row["verdict"])
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        notes = [*row["problems"], *([f"stale: {', '.join(row['stale'])} changed"] if row["stale"] else [])]
        typer.echo(f"{row['paper']}: {row['text']}")
        typer.echo(f"    paper: {row['paper_number']}")
        typer.echo(
            f"    here: {row['quantity']} {row['estimate']:.4g} [{row['low']:.4g}, {row['high']:.4g}], {row['scale']}"
        )
        typer.echo(f"    verdict: {row['verdict']}" + (f" ({'; '.join(notes)})" if notes else ""))
    if not everything:
        typer.echo("No results recorded yet; `refimpl study <slug>` makes some.")
    elif not rows:
        typer.echo(f"None of the {len(everything)} claims fits; leave out --part, --paper or --verdict.")
