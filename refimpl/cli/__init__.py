"""The command line. Exit codes: 0 done, 1 an error you can act on, 2 a wrong call, 130 interrupted.

One file for each group of commands. What takes long to import is imported inside the commands: `refimpl --help` and
shell completion load neither torch nor transformers.
"""

from __future__ import annotations

from refimpl.core.errors import require

require("typer", "lab")
import typer  # noqa: E402  (only after the check, so that the message names the extra)

from refimpl.cli import book, charts, compress, evaluate, export, kernels  # noqa: E402

app = typer.Typer(
    help="An open textbook that runs: its papers, methods and measurements from the command line.",
    epilog="Example: refimpl compress smollm2 GPTQ --set bits=3 --out smaller && refimpl evaluate smaller",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
BOOK, YOURS = "The book", "Your own model"
app.command("papers", epilog="Example: refimpl papers --part pruning --planned", rich_help_panel=BOOK)(book.list_papers)
app.command(epilog="Example: refimpl fetch smollm2", rich_help_panel=BOOK)(book.fetch)
app.command(epilog="Example: refimpl study eora --profile quick --out eora.json", rich_help_panel=BOOK)(book.study)
app.command(epilog="Example: refimpl restamp rs2 --minutes 5", rich_help_panel=BOOK)(book.restamp)
app.command(epilog="Example: refimpl ledger --part lowrank --verdict holds", rich_help_panel=BOOK)(book.ledger)
app.command(epilog="Example: refimpl methods GPTQ", rich_help_panel=YOURS)(compress.methods)
app.command(
    epilog="Example: refimpl compress smollm2 SparseGPT EoRA --set SparseGPT.pattern=2:4 --set EoRA.rank=32 "
    "--out smaller",
    rich_help_panel=YOURS,
)(compress.compress)
app.command(
    epilog="Example: refimpl evaluate smaller --on wikipedia --on python --json > smaller.json", rich_help_panel=YOURS
)(evaluate.evaluate)
app.command(epilog="Example: refimpl export smaller --format dense --out for-transformers", rich_help_panel=YOURS)(
    export.export
)
app.command(epilog="Example: refimpl chart dense.json smaller.json --out chart.html", rich_help_panel=YOURS)(
    charts.chart
)
app.add_typer(kernels.app, name="kernels", rich_help_panel=YOURS)
