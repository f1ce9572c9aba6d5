"""Tables in Markdown: of audits, score cards, the ledger and the pages of the book."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[object], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A Markdown table, without a newline at its end.

    Bars in a cell are escaped and line breaks become spaces, so a cell stays a cell.

    Args:
        header: what stands above each column.
        rows: cells, one for each column; anything that `str` takes.
        align: a letter for each column, "l" or "r"; all to the left if empty.

    Raises:
        ValueError: a row, or `align`, is of another length than the header.

    Example:
        >>> print(table(["kernel", "ratio"], [["a|b", 1.5]], align="lr"))
        | kernel | ratio |
        | --- | ---: |
        | a\\|b | 1.5 |
    """
    rule = ["---:" if side == "r" else "---" for side in align or "l" * len(header)]
    lines = [header, rule, *rows]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"{len(line)} cells under {len(header)} headings: {list(line)}")
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
