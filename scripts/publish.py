"""Put a rendered book into the folder of a published site, beside its other versions.

python scripts/publish.py _build/html ../pages v1.0    writes ../pages/v1.0, versions.json and index.html
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

INDEX = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    '<meta http-equiv="refresh" content="0; url={version}/index.html"></head>'
    '<body><a href="{version}/index.html">{title}</a></body></html>\n'
)


def order(version: str) -> tuple[bool, list[int]]:
    """`latest` first, then tags, the newest number first when sorted in reverse."""
    return version == "latest", [int(number) for number in re.findall(r"\d+", version)]


def publish(rendered: Path, site: Path, version: str) -> list[str]:
    """Replace one version of the site and return all of them, newest first."""
    if not re.fullmatch(r"latest|v[\w.-]+", version):
        raise SystemExit(f"version {version!r} must be 'latest' or begin with v, such as v1.0")
    if not (rendered / "index.html").exists():
        raise SystemExit(f"{rendered} holds no rendered book: run make site")
    shutil.rmtree(site / version, ignore_errors=True)
    shutil.copytree(rendered, site / version)
    versions = sorted((path.parent.name for path in site.glob("*/index.html")), key=order, reverse=True)
    (site / "versions.json").write_text(json.dumps(versions) + "\n", encoding="utf8")
    (site / "index.html").write_text(
        INDEX.format(version=versions[0], title="Making models smaller, measured"), encoding="utf8"
    )
    (site / ".nojekyll").touch()  # or folders that begin with an underscore are left out
    return versions


if __name__ == "__main__":
    print("\n".join(publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
