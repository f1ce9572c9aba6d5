"""Execute a notebook live and keep its outputs under _build/executed/, unless nothing it depends on changed.

The notebook in notebooks/ keeps its committed outputs; the book prefers the live ones while they belong to the
current source.

    python scripts/execute.py notebooks/tour.ipynb
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "book" / "_ext"))

from refimpl_book.live import executed_path, key


def main(notebook: Path) -> int:
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


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
