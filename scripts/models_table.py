"""Write the table of data/models/README.md from the cards of the models.

python scripts/models_table.py            say whether it is up to date
python scripts/models_table.py --write    update it
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "data" / "models"
START, END = "<!-- models -->\n", "<!-- /models -->\n"
HEAD = (
    "| model | architecture | parameters | weights (kB) | test split | measured | licence of the weights |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)


def row(folder: Path) -> str:
    """What the card of one model says, in a line."""
    card = (folder / "README.md").read_text(encoding="utf8")
    (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf8"))["architectures"]
    parameters = _only(r"^- Parameters: ([\d,]*\d)", card, folder)
    measure = _only(r"^\| split \|.*\| ([^|]+) \|$", card, folder)
    value = _only(r"^\| test \|.*\| ([^|]+) \|$", card, folder)
    licence = _only(r"weights (?:are )?under (CC BY(?:-SA)? \d\.\d)", card.replace("\n", " "), folder)
    size = round((folder / "model.safetensors").stat().st_size / 1000)
    link = f"[{folder.name}]({folder.name}/README.md)"
    return f"| {link} | `{architecture}` | {parameters} | {size} | {value} | {measure} | {licence} |\n"


def _only(pattern: str, card: str, folder: Path) -> str:
    found = re.findall(pattern, card, flags=re.M)
    if len(found) != 1:
        sys.exit(f"{folder / 'README.md'}: {len(found)} lines match {pattern!r}, expected one")
    return found[0]


def updated(text: str) -> str:
    """The page with the current table between its markers."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    folders = sorted(card.parent for card in FOLDER.glob("[!.]*/README.md"))
    return f"{before}{START}{HEAD}{''.join(map(row, folders))}{END}{after}"


if __name__ == "__main__":
    page = FOLDER / "README.md"
    old = page.read_text(encoding="utf8")
    new = updated(old)
    if "--write" in sys.argv[1:]:
        page.write_text(new, encoding="utf8")
    elif old != new:
        sys.exit(f"{page}: the table is out of date; run python scripts/models_table.py --write")
