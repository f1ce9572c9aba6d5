"""Commands that make a model smaller: methods, compress."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.cli.console import waiting
from refimpl.cli.models import (
    DType,
    Length,
    Model,
    Precision,
    checkpoint,
    copy_companions,
    first,
    longest,
    models_and_folders,
    own_text,
    precision_of,
    read_config,
    tokenizer_of,
)
from refimpl.core.errors import CheckpointError, OptionError, nearest
from refimpl.papers import papers

if TYPE_CHECKING:
    import torch

    from refimpl.core.compress.method import Method
    from refimpl.lab.data.text import TokenSet

# For help and completion, which must not wait for the imports that know these names; tests compare them.
METHODS = (
    *("RTN", "GPTQ", "AdaRound", "QuantizeActivations", "Magnitude", "Wanda", "SparseGPT"),
    *("PlainSVD", "ActSVD", "LoftQ"),
    *(name for paper in papers() if paper.host == "compress" for name in paper.exports),
)
CALL = "refimpl-call.json"


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show the options of this method; all methods if left out.", autocompletion=lambda: list(METHODS)
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
    """The texts under "Args:" in the docstrings of a method and of its bases, by option."""
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
        Path | None, typer.Option(help="Folder for the result. The same call resumes after an interruption.")
    ] = None,
    dtype: Precision = DType.auto,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what would be done: sites, bits, peak memory, FLOPs. Reads no weights."
        ),
    ] = False,
) -> None:
    """Compress a checkpoint block by block; the whole model is never in memory.

    The result is a folder that `refimpl evaluate`, `refimpl export` and, in Python, `refimpl.load` read.
    """
    with waiting("Loading torch and transformers"):
        chosen = _methods(method, options or [])
        computed, stored = precision_of(dtype)
    if dry_run:
        _plan(model, chosen, sequences, length, order, batch_size, targets, computed, stored)
        return
    if out is None:
        raise OptionError("--out: name the folder for the result (or ask for a --dry-run)")
    with waiting(f"Looking for {model}"):
        folder = checkpoint(model)
        original = checkpoint(reference) if reference else None
    if original is None and len(chosen) == 1 and chosen[0].uses_reference:
        raise OptionError(
            f"--reference: {method[0]} repairs towards the original weights; name the model as it was before it was "
            "compressed"
        )
    length = length or longest(read_config(folder))
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
        "dtype": str(stored).removeprefix("torch."),
    }
    if _already_there(out, call, len(chosen)):
        typer.echo(f"Already there, from this very call: {out}")
        return
    _run(folder, original or folder, chosen, call, computed, stored, out)
    typer.echo(f"Saved: {out} (next: refimpl evaluate {out}, refimpl export {out} --help)")


def _run(
    folder: Path,
    original: Path,
    chosen: list[Method],
    call: dict[str, Any],
    computed: torch.dtype,
    stored: torch.dtype,
    out: Path,
) -> None:
    """One method after the other, each from the folder the last one wrote."""
    import refimpl
    from refimpl.core.files.io import atomic_write

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
            dtype=computed,
            store=stored,
        )
        typer.echo(report)
        copy_companions(folder, target)
        source = target
    with atomic_write(out / CALL) as temporary:
        temporary.write_text(json.dumps(call, indent=1))
    for step in steps:
        shutil.rmtree(step)


def _already_there(out: Path, call: dict[str, Any], steps: int) -> bool:
    """Whether `out` is the finished result of this call.

    With one method the driver checks this itself; with several, the intermediate folders no longer exist.
    """
    from refimpl.core.files.io import is_compressed

    if steps == 1 or not is_compressed(out):
        return False
    try:
        before = json.loads((out / CALL).read_text())
    except (OSError, ValueError):
        before = None
    if before != call:
        raise CheckpointError(f"--out {out} holds another compressed model; choose another folder")
    return True


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


def _configuration(model: str) -> tuple[Any, Path | None]:
    """The configuration of a model, which is enough to plan with, and its folder if it is a local one."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if "/" in model and not folder.is_dir():
        try:
            return AutoConfig.from_pretrained(model), None
        except (OSError, ValueError):
            folder = checkpoint(model)  # says what is wrong with the name
    elif not folder.is_dir():
        folder = checkpoint(model)
    return read_config(folder), folder


def _plan(
    name: str,
    chosen: list[Method],
    sequences: int,
    length: int | None,
    order: str,
    batch_size: int,
    targets: str | None,
    computed: torch.dtype,
    stored: torch.dtype,
) -> None:
    """Print what each method would do. The layers it would make are put in place before the next one is planned."""
    import refimpl
    from refimpl.core.compress.sites import unfuse_experts
    from refimpl.core.files import io
    from refimpl.core.files.checkpoint import empty_model
    from refimpl.core.layers import empty_layer
    from refimpl.core.stored import declare_stored

    config, folder = _configuration(name)
    model = empty_model(config, computed)
    declare_stored(model, stored)
    if folder is not None and io.is_compressed(folder):
        io.restore_layers(model, folder, device="meta", dtype=computed)
    unfuse_experts(model)
    plans = []
    for method in chosen:
        plan = refimpl.plan(
            model,
            method,
            sequences=sequences,
            length=length or longest(config),
            order=order,
            batch_size=batch_size,
            targets=targets,
        )
        for row in plan.sites:
            parent, _, attribute = row["site"].rpartition(".")
            setattr(model.get_submodule(parent), attribute, empty_layer(row["layer"], computed, "meta"))
        plans.append(plan)
    for row in plans[-1].sites:
        typer.echo(f"{row['site']:50} {row['shape'][0]:6} x {row['shape'][1]:<6} {row['bits']:6.2f} bits per weight")
    for site, reason in plans[-1].skipped.items():
        typer.echo(f"{site:50} left as it is ({reason})")
    for plan in plans:
        typer.echo(plan)


def _calibration(source: str, folder: Path, sequences: int, length: int, draw: int) -> TokenSet:
    from refimpl.lab.data import text

    tokenizer = tokenizer_of(folder, f"--calibration {source}")
    if source in text.CORPORA:
        return text.calibration(source, tokenizer, sequences, length, seed=draw)
    tokens = own_text("--calibration", source, tokenizer, length, draw)
    if len(tokens.ids) < sequences:
        raise OptionError(
            f"--sequences {sequences}: {source} holds {len(tokens.ids)} windows of {length} tokens; "
            "ask for fewer, or for shorter ones"
        )
    return first(tokens, sequences)
