"""Commands about the Triton kernels: what compilers make of them (no GPU needed), and how fast they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.console import waiting
from refimpl.core.errors import OptionError, RefimplError, nearest, require

app = typer.Typer(help="The Triton kernels: what compilers make of them, and how fast they are.", no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="Kernels, such as sparse_matvec; all if left out.")]


@app.command(epilog="Example: refimpl kernels audit sparse_matvec --out audit.json")
def audit(
    names: Names = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; rows of other kernels in it stay.")] = None,
) -> None:
    """Compile kernels for NVIDIA and AMD GPUs, which need not be here, and read the machine code.

    The table shows registers, spills, shared memory, the width of loads and tensor-core instructions.
    """
    require("triton", "kernels")
    with waiting("Loading the kernels"):
        from refimpl.kernels import audit as auditing
    chosen = _known(names, auditing.all_kernels())
    try:
        rows = auditing.run(chosen, out)
    except RuntimeError as error:  # the kernels know no errors of ours: they are the lowest layer
        raise RefimplError(str(error)) from error
    typer.echo(auditing.table(rows))
    if out is not None:
        typer.echo(f"\nWritten: {out}")
    spilling = [f"{row.kernel} {row.variant} on {row.target}" for row in rows if row.spills]
    if spilling:
        raise RefimplError(f"{len(spilling)} of {len(rows)} launches spill registers, {spilling[0]} for one")


@app.command(epilog="Example: refimpl kernels bench quant_matmul --out bench.json")
def bench(
    names: Names = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, with the device as measured.")] = None,
) -> None:
    """Time kernels on the GPU of this machine, beside PyTorch and against the roofline measured on it."""
    require("triton", "kernels")
    with waiting("Loading the kernels"):
        from refimpl.kernels import audit as auditing
        from refimpl.kernels import bench as timing
    chosen = _known(names, auditing.all_kernels())
    try:
        rows = timing.run(chosen, out)
    except RuntimeError as error:
        raise RefimplError(str(error)) from error
    typer.echo(timing.table(rows))
    if out is not None:
        typer.echo(f"\nWritten: {out}")


def _known(names: list[str] | None, known: list[str]) -> list[str] | None:
    for name in names or ():
        if name not in known:
            raise OptionError(f"{name!r} is no kernel; use {nearest(name, known)}")
    return names or None
