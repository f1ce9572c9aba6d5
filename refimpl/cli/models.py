"""Commands for a model of your own: methods, compress, evaluate, export."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
import re
import shutil
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.cli.console import print_json, stdout_for_json, waiting
from refimpl.core.errors import CheckpointError, OptionError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from refimpl.core.method import Method
    from refimpl.lab.tasks import ScoreCard
    from refimpl.lab.text import TokenSet

# For help and completion, which must not wait for the imports that know these names; tests compare them.
METHODS = (
    *("RTN", "GPTQ", "AdaRound", "AdaQuant", "QuantizeActivations", "Magnitude", "Wanda", "SparseGPT"),
    *("PlainSVD", "ActSVD", "LoftQ", "EoRA"),
)
MODELS = ("smollm2", "llama-small", "llama-medium", "llama-large")
CORPORA = ("wikipedia", "news", "python", "prose")
LONGEST = 512  # tokens per sequence, or what the model can read if that is less
CALL = "refimpl-call.json"
#: What makes a checkpoint usable beside its weights; copied along.
COMPANIONS = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab.*",
        "merges.txt",
    ),
    "generation_config.json",
)


class DType(str, Enum):
    """The dtype of unpacked weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


def models_and_folders(incomplete: str) -> list[str]:
    """Completions of a model: the book's, and folders."""
    folders = [f"{path}" for path in Path().glob(f"{incomplete}*") if path.is_dir()] if incomplete else []
    return [name for name in MODELS if name.startswith(incomplete)] + folders


Model = Annotated[
    str,
    typer.Argument(
        help=f"{', '.join(MODELS)}, a local folder, or a model id of the Hugging Face Hub.",
        autocompletion=models_and_folders,
    ),
]
Precision = Annotated[
    DType,
    typer.Option(
        help="What to compute in, and to store what is not packed in; auto: bfloat16 where it is fast."
    ),
]
Length = Annotated[
    int | None,
    typer.Option(help=f"Tokens per sequence; {LONGEST} by default, or what the model can read.", min=2),
]


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show the options of this method; all methods if left out.",
            autocompletion=lambda: list(METHODS),
        ),
    ] = None,
) -> None:
    """List the methods that compress takes, or the options of one."""
    with waiting("Loading the methods"):
        from refimpl.methods import METHODS as known
        from refimpl.methods import method_by_name
    if name is None:
        for method in known.values():
            summary = (method.__doc__ or "").partition("\n")[0]
            typer.echo(f"{method.__name__:20} {summary}")
        typer.echo("\n`refimpl methods GPTQ` shows the options of one.")
        return
    chosen: Any = method_by_name(name)
    typer.echo(f"{type(chosen).__name__}: {(chosen.__doc__ or '').partition(chr(10))[0]}")
    typer.echo(
        "Needs "
        + ("calibration text" if chosen.statistics else "no calibration text")
        + (" and the original model (--reference)." if chosen.uses_reference else ".")
    )
    described = _option_texts(type(chosen))
    for field in dataclasses.fields(chosen):
        typer.echo(f"\n  --set {field.name}={getattr(chosen, field.name)}  ({field.type})")
        if field.name in described:
            typer.echo(f"      {described[field.name]}")


def _option_texts(kind: type) -> dict[str, str]:
    """What the docstrings of a method and of its bases say under "Args:"."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(r"\n    Args:\n(.*?)(?:\n\n|\Z)", base.__doc__ or "", flags=re.DOTALL)
        for entry in re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", section[1] if section else "", re.M):
            texts |= dict.fromkeys(entry[0].split(", "), " ".join(entry[1].split()).replace("`", ""))
    return texts


def compress(
    model: Model,
    method: Annotated[
        list[str],
        typer.Argument(
            help=f"One or more, applied in this order: {', '.join(METHODS)}. See `refimpl methods`.",
            autocompletion=lambda: list(METHODS),
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option of the method, as name=value; of several methods as METHOD.name=value. May be repeated.",
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="wikipedia, python or prose, or a text file or folder of text files. Of several methods each "
            "gets another draw.",
            autocompletion=lambda: ["wikipedia", "python", "prose"],
        ),
    ] = "wikipedia",
    sequences: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 32,
    length: Length = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The uncompressed model, for methods that repair; the same kinds as MODEL. Left out, it is MODEL "
            "as it was before the first of several methods.",
            autocompletion=models_and_folders,
        ),
    ] = None,
    order: Annotated[str, typer.Option(help="sequential or parallel.")] = "sequential",
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)] = 4,
    targets: Annotated[
        str | None, typer.Option(help="Regular expression; only matching linear maps are compressed.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the result. The same call resumes after an interruption."),
    ] = None,
    dtype: Precision = DType.auto,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would be done: sites, bits, peak memory, FLOPs. Reads no weights.",
        ),
    ] = False,
) -> None:
    """Compress a checkpoint block by block; the whole model is never in memory.

    The result is a folder that `refimpl evaluate`, `refimpl export` and, in Python, `refimpl.load` read.
    """
    with waiting("Loading torch and transformers"):
        chosen = _methods(method, options or [])
        precision = _dtype(dtype)
    if dry_run:
        _plan(model, chosen, sequences, length, order, batch_size, targets, precision)
        return
    if out is None:
        raise OptionError("--out: name the folder for the result (or ask for a --dry-run)")
    with waiting(f"Looking for {model}"):
        folder = _checkpoint(model)
        original = _checkpoint(reference) if reference else None
    if original is None and len(chosen) == 1 and chosen[0].uses_reference:
        raise OptionError(
            f"--reference: {method[0]} repairs towards the original weights; name the model as it was before it was "
            "compressed"
        )
    length = length or _longest(_read_config(folder))
    call = {
        "model": str(folder.resolve()),
        "weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.glob("*.safetensors"))],
        "methods": [repr(step) for step in chosen],
        "calibration": calibration,
        "sequences": sequences,
        "length": length,
        "reference": str((original or folder).resolve()),
        "order": order,
        "batch_size": batch_size,
        "targets": targets,
        "dtype": str(precision).removeprefix("torch."),
    }  # fmt: skip
    if _already_there(out, call, len(chosen)):
        typer.echo(f"Already there, from this very call: {out}")
        return
    _run(folder, original or folder, chosen, call, precision, out)
    typer.echo(f"Saved: {out} (next: refimpl evaluate {out}, refimpl export {out} --help)")


def _run(
    folder: Path, original: Path, chosen: list[Method], call: dict[str, Any], dtype: torch.dtype, out: Path
) -> None:
    """One method after the other, each from the folder the last one wrote."""
    import refimpl
    from refimpl.core.io import atomic_write

    steps = [out.with_name(f"{out.name}.step{k}") for k in range(1, len(chosen))]
    source = folder
    for k, (method, target) in enumerate(zip(chosen, [*steps, out], strict=True)):
        tokens = None
        if method.statistics:
            with waiting("Reading the calibration text"):
                tokens = _calibration(call["calibration"], folder, call["sequences"], call["length"], k)
        report = refimpl.compress(
            source,
            method,
            tokens,
            reference=original if method.uses_reference else None,
            order=call["order"],
            batch_size=call["batch_size"],
            targets=call["targets"],
            out=target,
            dtype=dtype,
        )
        typer.echo(report)
        for pattern in COMPANIONS:
            for file in folder.glob(pattern):
                shutil.copy(file, target)
        source = target
    with atomic_write(out / CALL) as temporary:
        temporary.write_text(json.dumps(call, indent=1))
    for step in steps:
        shutil.rmtree(step)


def _already_there(out: Path, call: dict[str, Any], steps: int) -> bool:
    """Whether `out` is the finished result of this call.

    Of one method the driver can tell by itself; of several, the folders in between are gone by then.
    """
    from refimpl.core.io import is_compressed

    if steps == 1 or not is_compressed(out):
        return False
    try:
        before = json.loads((out / CALL).read_text())
    except (OSError, ValueError):
        before = None
    if before != call:
        raise CheckpointError(f"--out {out} holds another compressed model; choose another folder")
    return True


def _read_config(folder: Path) -> Any:
    from refimpl.core.checkpoint import read_config

    try:
        return read_config(folder)
    except (ValueError, KeyError, OSError) as error:  # what transformers raises for a kind it does not know
        raise CheckpointError(
            f"{folder / 'config.json'} describes no model of transformers: {str(error).partition(chr(10))[0]}"
        ) from error


def _methods(names: list[str], options: list[str]) -> list[Method]:
    """Methods from the command line's names and options."""
    from refimpl.methods import METHODS as known
    from refimpl.methods import method_by_name

    right = {name.lower(): name for name in known}
    given = [right.get(name.lower(), name) for name in names]
    settings: dict[str, dict[str, str]] = {name: {} for name in given}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f"--set {option}: write it as name=value")
        owner, dot, rest = name.partition(".")
        if dot:
            owner, name = right.get(owner.lower(), owner), rest
            if owner not in settings:
                raise OptionError(f"--set {option}: this call applies {nearest(owner, settings)}")
        elif len(settings) > 1:
            raise OptionError(
                f"--set {option}: several methods are applied; write {given[0]}.{option} or {given[-1]}.{option}"
            )
        else:
            owner = given[0]
        settings[owner][name] = value
    return [method_by_name(name, settings[name]) for name in given]


def _dtype(dtype: DType) -> torch.dtype:
    import torch

    from refimpl.lab.models import compute_dtype

    return compute_dtype() if dtype is DType.auto else getattr(torch, dtype.value)


def _checkpoint(model: str) -> Path:
    """The local folder of a model, fetched if need be."""
    from refimpl.lab import models

    return models.smollm2_path() if model == "smollm2" else models.folder(model)


def _configuration(model: str) -> tuple[Any, Path | None]:
    """The configuration of a model, which is enough to plan with, and its folder if it is a local one."""
    from transformers import AutoConfig

    from refimpl.lab import small

    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not folder.is_dir() and model != "smollm2" and model not in small.names():
        try:
            return AutoConfig.from_pretrained(model), None
        except (OSError, ValueError):
            folder = _checkpoint(model)  # says what is wrong with the name
    elif not folder.is_dir():
        folder = _checkpoint(model)
    return _read_config(folder), folder


def _longest(config: Any) -> int:
    """Tokens per sequence where none were asked for: a model with learned positions cannot read more."""
    return min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)


def _plan(
    name: str,
    chosen: list[Method],
    sequences: int,
    length: int | None,
    order: str,
    batch_size: int,
    targets: str | None,
    dtype: torch.dtype,
) -> None:
    """Print what each method would do. The layers it would make are put in place before the next one is planned."""
    import refimpl
    from refimpl.core import io
    from refimpl.core.checkpoint import empty_model
    from refimpl.core.layers import empty_layer
    from refimpl.core.sites import unfuse_experts

    config, folder = _configuration(name)
    model = empty_model(config, dtype)
    if folder is not None and io.is_compressed(folder):
        io.restore_layers(model, folder, device="meta", dtype=dtype)
    unfuse_experts(model)
    plans = []
    for method in chosen:
        plan = refimpl.plan(
            model,
            method,
            sequences=sequences,
            length=length or _longest(config),
            order=order,
            batch_size=batch_size,
            targets=targets,
        )
        for row in plan.sites:
            parent, _, attribute = row["site"].rpartition(".")
            setattr(model.get_submodule(parent), attribute, empty_layer(row["layer"], dtype, "meta"))
        plans.append(plan)
    for row in plans[-1].sites:
        typer.echo(
            f"{row['site']:50} {row['shape'][0]:6} x {row['shape'][1]:<6} {row['bits']:6.2f} bits per weight"
        )
    for site, reason in plans[-1].skipped.items():
        typer.echo(f"{site:50} left as it is ({reason})")
    for plan in plans:
        typer.echo(plan)


def _tokenizer(folder: Path, purpose: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any(folder.glob("tokenizer*")):
        raise OptionError(
            f"{purpose} needs the model's tokenizer, and {folder} holds none; save it there "
            "(tokenizer.save_pretrained)"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes the tokenizer's library raise
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _calibration(source: str, folder: Path, sequences: int, length: int, draw: int) -> TokenSet:
    from refimpl.lab import text

    tokenizer = _tokenizer(folder, f"--calibration {source}")
    if source in text.CORPORA:
        return text.calibration(source, tokenizer, sequences, length, seed=draw)
    tokens = _own_text("--calibration", source, tokenizer, length, draw)
    if len(tokens.ids) < sequences:
        raise OptionError(
            f"--sequences {sequences}: {source} holds {len(tokens.ids)} windows of {length} tokens; "
            "ask for fewer, or for shorter ones"
        )
    return _first(tokens, sequences)


def _own_text(
    option: str, source: str, tokenizer: PreTrainedTokenizerBase, length: int, draw: int
) -> TokenSet:
    """Windows of the user's own texts in a random but repeatable order, so that the first n come from all of them."""
    import torch

    from refimpl.lab import text

    path = Path(source).expanduser()
    if not path.exists():
        raise OptionError(
            f"{option} {source} is neither a file or folder nor {nearest(source, text.CORPORA)}"
        )
    tokens = text.from_texts(path, tokenizer, length)
    chosen = torch.randperm(len(tokens.ids), generator=torch.Generator().manual_seed(draw))
    return dataclasses.replace(
        tokens, ids=tokens.ids[chosen], units=[tokens.units[k] for k in chosen.tolist()]
    )


def _first(tokens: TokenSet, sequences: int) -> TokenSet:
    return dataclasses.replace(tokens, ids=tokens.ids[:sequences], units=tokens.units[:sequences])


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
            from refimpl.lab import metrics, models, text

            precision = _dtype(dtype)
        with waiting(f"Loading {model}"):
            folder = _checkpoint(model)
            loaded, _ = models.load(model, dtype=precision)
            tokenizer = _tokenizer(folder, "evaluate")
        longest = getattr(loaded.config, "max_position_embeddings", None)
        if length is not None and longest is not None and length > longest:
            raise OptionError(f"--length {length}: {model} reads at most {longest} tokens; ask for fewer")
        length = length or _longest(loaded.config)
        token_sets: dict[str, TokenSet] = {}
        for corpus in dict.fromkeys(on or ["wikipedia"]):  # all of them before the first is measured
            with waiting(f"Reading {corpus}"):
                token_sets[corpus] = (
                    text.evaluation(corpus, tokenizer, sequences, length)
                    if corpus in text.CORPORA
                    else _first(_own_text("--on", corpus, tokenizer, length, 0), sequences)
                )
        size = metrics.footprint(loaded, folder)
        measured = {
            corpus: metrics.perplexity(loaded, tokens, batch_size).by_unit()
            for corpus, tokens in token_sets.items()
        }
        card = None
        if tasks:
            from refimpl.lab import tasks as task_set

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
    typer.echo(
        f"{model}: {type(loaded).__name__}, {size.parameters / 1e6:.1f} million parameters, {precision}"
    )
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
