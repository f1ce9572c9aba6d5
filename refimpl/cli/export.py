"""The command that writes a model for other libraries: export."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from refimpl.cli.console import waiting
from refimpl.cli.models import copy_companions
from refimpl.core.errors import OptionError


class Format(str, Enum):
    """Formats of an export."""

    dense = "dense"
    compressed_tensors = "compressed-tensors"
    peft = "peft"
    gguf = "gguf"


def export(
    folder: Annotated[Path, typer.Argument(help="A folder that `refimpl compress` or refimpl.save wrote.")],
    to: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="dense: an ordinary checkpoint of transformers, as large as the original. compressed-tensors: "
            "quantised layers stay packed, for transformers and vLLM. peft: the low-rank paths alone, as an adapter. "
            "gguf: one file for llama.cpp, with the tokenizer; 4 and 8 bits stay packed. "
            "Left out: say which of them can hold this model.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder (gguf: file) to write; an earlier export is replaced.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="For dense and compressed-tensors: write the low-rank paths here, as an adapter for PEFT, instead of "
            "multiplying them out."
        ),
    ] = None,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric",
            help="For compressed-tensors: store asymmetric grids as symmetric ones of one bit more, which load "
            "without an option.",
        ),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="For peft: folder or Hub id of the model that the adapter belongs to.")
    ] = None,
) -> None:
    """Write a compressed model so that it loads without refimpl, and say how."""
    if to is not None and out is None:
        raise OptionError("--out: name the folder to write")
    for name, given, formats in (
        ("--adapter", adapter is not None, (Format.dense, Format.compressed_tensors)),
        ("--symmetric", symmetric, (Format.compressed_tensors,)),
        ("--base", base is not None, (Format.peft,)),
    ):
        if given and to not in formats:
            raise OptionError(f"{name} goes with --format {' or '.join(kind.value for kind in formats)}")
    if to is Format.peft and base is None:
        raise OptionError(
            "--base: name the model that the adapter repairs (--format dense --adapter FOLDER writes both)"
        )
    with waiting(f"Loading {folder}"):
        from refimpl import load
        from refimpl.core.files import export as exporting
        from refimpl.core.files.gguf import export_gguf
        from refimpl.lab.models.small import quietly

        model = load(folder)
    if to is None or out is None:
        for kind, reason in exporting.exports(model).items():
            typer.echo(f"{kind:20} {reason or 'yes'}")
        return
    if to is Format.gguf:
        with waiting(f"Writing {out}"), quietly():
            report = export_gguf(model, out, _tokenizer(folder))
        typer.echo(f"Saved: {report}\n\nRun it without refimpl:\n\nllama-cli -m {out}")
        return
    with waiting(f"Writing {out}"), quietly():
        if to is Format.dense:
            exporting.export_dense(model, out, adapter=adapter)
        elif to is Format.compressed_tensors:
            exporting.export_compressed_tensors(model, out, symmetric=symmetric, adapter=adapter)
        elif base is not None:
            exporting.export_peft(model, out, base=base)
    if to is not Format.peft:
        copy_companions(folder, out)
    typer.echo(f"Saved: {', '.join(str(path) for path in (out, adapter) if path is not None)}")
    readme = out / "README.md"  # the export knows how it is loaded
    code = re.search(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    if code is not None:
        typer.echo(f"\nLoad it without refimpl (more in {readme}):\n")
        typer.echo(code[1].replace("THIS FOLDER", str(out)).rstrip())
    if code is not None and adapter is not None:
        typer.echo("\nfrom peft import PeftModel\n")
        typer.echo(f'model = PeftModel.from_pretrained(model, "{adapter}")')


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise OptionError(f"{folder} has no tokenizer.json, which GGUF contains; save the tokenizer of the model there")
    return AutoTokenizer.from_pretrained(folder)
