"""Write the README's table of chapters from refimpl/papers.toml.

python scripts/readme_table.py            say whether it is up to date
python scripts/readme_table.py --write    update it
"""

from __future__ import annotations

import sys
from pathlib import Path

import pages

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- chapters -->\n", "<!-- /chapters -->\n"


def updated(text: str) -> str:
    """The README with the current table between its markers."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{pages.state()}\n\n{pages.chapter_table('')}\n\n{END}{after}"


if __name__ == "__main__":
    old = README.read_text(encoding="utf8")
    new = updated(old)
    if "--write" in sys.argv[1:]:
        README.write_text(new, encoding="utf8")
    elif old != new:
        sys.exit("README.md: the table of chapters is out of date; run python scripts/readme_table.py --write")
