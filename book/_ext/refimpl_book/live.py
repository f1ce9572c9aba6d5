"""Outputs of notebooks that were executed on this machine, kept under _build/executed/ beside a key of their sources."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def key(notebook: Path) -> str:
    """Hash of the notebook's sources and of the package: what decides its outputs."""
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    digest = hashlib.sha256(json.dumps([cell["source"] for cell in cells]).encode())
    for path in sorted((ROOT / "refimpl").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def executed_path(notebook: Path) -> Path:
    """Where the live version of a notebook of this checkout is kept."""
    return ROOT / "_build" / "executed" / notebook.resolve().relative_to(ROOT)
