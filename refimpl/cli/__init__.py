"""The command line. Exit codes: 0 done, 1 an error you can act on, 2 a wrong call, 130 interrupted."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
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


class DType(str, Enum):
    """The dtype of unpacked weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


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


@app.command(epilog="Example: refimpl compress smollm2 GPTQ --set bits=4 --set group_size=64 --out smaller")
def compress(
    model: Annotated[
        str, typer.Argument(help="smollm2, a local checkpoint folder, or a model id of the Hugging Face Hub.")
    ],
    method: Annotated[str, typer.Argument(help="RTN, GPTQ, SparseGPT, EoRA, ...")],
    options: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="An option of the method, as name=value; may be repeated."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="wikipedia, python or prose, or a text file or folder of text files.")
    ] = "wikipedia",
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The uncompressed model, for methods that repair; the same kinds as MODEL."),
    ] = None,
    order: Annotated[str, typer.Option(help="sequential or parallel.")] = "sequential",
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 4,
    targets: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Regular expression; only matching linear maps are compressed."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the result. The same call resumes after an interruption."),
    ] = None,
    dtype: Annotated[
        DType,
        typer.Option(help="What to compute and store in; auto: bfloat16 where this processor is fast at it."),
    ] = DType.auto,
    dry_run: Annotated[
        bool,
        typer.Option(help="Only say what would be done: sites, bits, peak memory, FLOPs. Reads no weights."),
    ] = False,
) -> None:
    """Compress a checkpoint block by block; the whole model is never in memory."""
    import refimpl
    from refimpl.core.checkpoint import read_config
    from refimpl.methods import method_by_name

    settings = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f"--set {option}: write it as name=value")
        settings[name] = value
    chosen = method_by_name(method, settings)
    if dry_run:
        path = Path(model).expanduser()
        source = path.parent if path.name == "config.json" else path if path.is_dir() else _checkpoint(model)
        has_weights = any(source.glob("*.safetensors"))  # a configuration is enough to plan with
        plan = refimpl.plan(
            source if has_weights else read_config(source),
            chosen,
            sequences=sequences,
            length=length,
            order=order,
            batch_size=batch_size,
            targets=targets,
        )
        for row in plan.sites:
            typer.echo(
                f"{row['site']:50} {row['shape'][0]:6} x {row['shape'][1]:<6} {row['bits']:6.2f} bits per weight"
            )
        for name, reason in plan.skipped.items():
            typer.echo(f"{name:50} left as it is ({reason})")
        typer.echo(plan)
        return
    if out is None:
        raise OptionError("--out: name the folder for the result (or ask for a --dry-run)")
    folder = _checkpoint(model)
    tokens = None
    if chosen.statistics:
        tokens = _calibration(calibration, folder, sequences, length)
    from refimpl.lab.models import compute_dtype

    report = refimpl.compress(
        folder,
        chosen,
        tokens,
        reference=_checkpoint(reference) if reference else None,
        order=order,
        batch_size=batch_size,
        targets=targets,
        out=out,
        dtype=compute_dtype()
        if dtype is DType.auto
        else getattr(importlib.import_module("torch"), dtype.value),
    )
    typer.echo(report)
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.*", "merges.txt"):
        for file in folder.glob(pattern):
            shutil.copy(file, out)
    typer.echo(f"Saved: {out}")


def _checkpoint(model: str) -> Path:
    """The local folder of a model, fetched if need be."""
    from refimpl.lab import models

    return models.smollm2_path() if model == "smollm2" else models.folder(model)


def _calibration(source: str, folder: Path, sequences: int, length: int) -> object:
    from transformers import AutoTokenizer

    from refimpl.lab import text

    if not any(folder.glob("tokenizer*")):
        raise OptionError(
            f"--calibration {source} needs the model's tokenizer, and {folder} holds none; save it there"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if source in text.CORPORA:
        return text.calibration(source, tokenizer, sequences, length)
    if not Path(source).expanduser().exists():
        raise OptionError(
            f"--calibration {source} is neither a file or folder nor {nearest(source, text.CORPORA)}"
        )
    ids = text.from_texts(Path(source), tokenizer, length).ids
    if len(ids) < sequences:
        raise OptionError(
            f"--sequences {sequences}: {source} holds {len(ids)} windows of {length} tokens; "
            "ask for fewer, or for shorter ones"
        )
    return ids[:sequences]


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
