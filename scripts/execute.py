"""Execute notebooks live and keep their outputs under _build/executed/, unless nothing they depend on changed.

The notebooks in notebooks/ keep their committed outputs; the book prefers the live ones while they belong to the
current source. With --in-place the outputs also go into the notebooks, to be committed.

    python scripts/execute.py notebooks/tour.ipynb
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "book" / "_ext"))

from refimpl_book.live import executed_path, key


def execute(notebook: Path) -> int:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from refimpl.core.files.io import atomic_write

    # Inherited by the kernel: threads that spin starve each other on a shared machine (numbers in the Makefile).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    target, now = executed_path(notebook), key(notebook)
    if target.exists() and nbformat.read(target, as_version=4).metadata.get("executed_key") == now:
        print(f"{notebook}: unchanged since it was executed")
        return 0
    book = nbformat.read(notebook, as_version=4)
    start = time.perf_counter()
    print(f"{notebook}: executing, a few minutes on two cores", flush=True)

    def report(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            print(f"  cell {cell_index + 1} of {len(book.cells)}, {time.perf_counter() - start:.0f} s", flush=True)

    client = NotebookClient(
        book,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(notebook.parent)}},
        on_cell_start=report,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    book.metadata["executed_key"] = now
    with atomic_write(target) as temporary:
        nbformat.write(book, temporary)
    print(f"{notebook}: executed in {time.perf_counter() - start:.0f} s")
    return 0


def put_outputs(notebook: Path) -> None:
    """Write the outputs of the executed version, without progress bars, into a notebook, and change nothing else in it."""
    from refimpl.core.files.io import atomic_write

    book = json.loads(notebook.read_text(encoding="utf8"))
    executed = json.loads(executed_path(notebook).read_text(encoding="utf8"))
    for cell, done in zip(book["cells"], executed["cells"], strict=True):
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in done["outputs"] if output.get("name") != "stderr"]
            cell["execution_count"] = done["execution_count"]
    with atomic_write(notebook) as temporary:
        temporary.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, help="e.g. notebooks/tour.ipynb")
    parser.add_argument("--in-place", action="store_true", help="also write the outputs into the notebooks")
    given = parser.parse_args()
    for notebook in given.notebooks:
        if not notebook.is_file():
            parser.error(f"{notebook} is no file; name a notebook, e.g. notebooks/tour.ipynb")
    for notebook in given.notebooks:
        if code := execute(notebook):
            return code
        if given.in_place:
            put_outputs(notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
