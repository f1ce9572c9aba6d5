"""The command that measures a model: evaluate."""

from __future__ import annotations

import dataclasses
import importlib
import platform
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.cli.console import print_json, stdout_for_json, waiting
from refimpl.cli.models import (
    CORPORA,
    DType,
    Length,
    Model,
    Precision,
    checkpoint,
    first,
    has_tokenizer,
    longest,
    own_text,
    precision_of,
    tokenizer_of,
)
from refimpl.core.errors import OptionError

if TYPE_CHECKING:
    from refimpl.lab.data.text import TokenSet
    from refimpl.lab.measure.tasks import ScoreCard


def evaluate(
    model: Model,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            help=f"{', '.join(CORPORA)}, or a text file or folder of your own; may be repeated. [default: wikipedia]",
            autocompletion=lambda: list(CORPORA),
        ),
    ] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="The score card of the tasks as well.")] = False,
    sequences: Annotated[int, typer.Option(help="Sequences of each corpus.", min=1)] = 32,
    length: Length = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)] = 2,
    dtype: Precision = DType.auto,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, by document, as JSON; `refimpl chart` reads it.")
    ] = False,
) -> None:
    """Measure a model, compressed or not: bits per weight, perplexity and, if asked, tasks."""
    start = time.perf_counter()
    with stdout_for_json(as_json):
        with waiting("Loading torch and transformers"):
            import refimpl
            from refimpl.lab import models
            from refimpl.lab.data import text
            from refimpl.lab.measure import metrics

            precision, _ = precision_of(dtype)
        with waiting(f"Loading {model}"):
            folder = checkpoint(model)
            found = has_tokenizer(folder)
            tokenizer = tokenizer_of(folder, "evaluate") if found else None  # a damaged one is found here
            # says so if it is no language model
            loaded, _ = models.load(model, dtype=None if dtype is DType.auto else precision)
            tokenizer = tokenizer or tokenizer_of(folder, "evaluate")
        most = getattr(loaded.config, "max_position_embeddings", None)
        if length is not None and most is not None and length > most:
            raise OptionError(f"--length {length}: {model} reads at most {most} tokens; ask for fewer")
        length = length or longest(loaded.config)
        token_sets: dict[str, TokenSet] = {}
        for corpus in dict.fromkeys(on or ["wikipedia"]):  # all of them before the first is measured
            with waiting(f"Reading {corpus}"):
                token_sets[corpus] = (
                    text.evaluation(corpus, tokenizer, sequences, length)
                    if corpus in text.CORPORA
                    else first(own_text("--on", corpus, tokenizer, length, 0), sequences)
                )
        size = metrics.footprint(loaded, folder)
        measured = {
            corpus: metrics.perplexity(loaded, tokens, batch_size).by_unit() for corpus, tokens in token_sets.items()
        }
        card = None
        if tasks:
            from refimpl.lab.measure import tasks as task_set

            card = task_set.score(loaded, tokenizer, size="card")
    if as_json:
        print_json(
            {
                "made_by": "refimpl evaluate",
                "model": model,
                "architecture": type(loaded).__name__,
                "dtype": str(precision).removeprefix("torch."),
                **dataclasses.asdict(size),
                "length": length,
                "perplexity": {
                    corpus: {
                        "value": result.value,
                        "split": token_sets[corpus].split,
                        "documents": [
                            {"document": unit, "nll": nll, "tokens": count}
                            for unit, nll, count in zip(
                                result.units, result.nll.tolist(), result.counts.tolist(), strict=True
                            )
                        ],
                    }
                    for corpus, result in measured.items()
                },
                "tasks": card and _task_rows(card),
                "seconds": round(time.perf_counter() - start, 1),
                "versions": {
                    "refimpl": refimpl.__version__,
                    "python": platform.python_version(),
                    **{name: importlib.import_module(name).__version__ for name in ("torch", "transformers")},
                },
            }
        )
        return
    typer.echo(f"{model}: {type(loaded).__name__}, {size.parameters / 1e6:.1f} million parameters, {precision}")
    typer.echo(
        f"    {size.bits_per_weight:.2f} bits per weight of the linear maps, {size.bits_per_parameter:.2f} per "
        f"parameter of the whole model; {size.bytes / 1e6:.1f} MB in memory, "
        f"{(size.disk_bytes or 0) / 1e6:.1f} MB on disk"
    )
    for corpus, result in measured.items():
        typer.echo(
            f"    perplexity {result.value:.2f} on {corpus} ({len(result.units)} documents, "
            f"{int(result.counts.sum())} tokens, in windows of {length})"
        )
    if card is not None:
        typer.echo(f"\n{card.table()}")


def _task_rows(card: ScoreCard) -> dict[str, dict[str, Any]]:
    """Means between 0 and 1 with their intervals, by task."""
    rows: dict[str, dict[str, Any]] = {}
    for task, scores in card.scores.items():
        rows[task] = {"items": len(scores.ids), "chance": card.mean(task, "chance")}
        for metric in ("free", "restricted"):
            interval = card.interval(task, metric)
            rows[task][metric] = {"mean": interval.estimate, "low": interval.low, "high": interval.high}
    return rows
