"""Photograph the pages of the rendered book, wide and narrow, light and dark, to look at them (playwright, Chromium).

python scripts/screenshots.py _build/html --out _build/screenshots [--browser /usr/bin/chromium] [PAGE ...]

What can be checked without looking is in tests/browser.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTHS = (1280, 400)
MODES = ("light", "dark")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="*", help="such as book/ledger; default: all")
    parser.add_argument("--out", type=Path, default=Path("_build/screenshots"))
    parser.add_argument("--browser", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.pages or [
        path.relative_to(options.folder).with_suffix("").as_posix()
        for part in ("book", "notebooks")
        for path in sorted((options.folder / part).rglob("*.html"))
    ]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for name in names:
            for width in WIDTHS:
                for mode in MODES:
                    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=mode)
                    page.goto((options.folder / f"{name}.html").resolve().as_uri(), wait_until="networkidle")
                    target = options.out / f"{name.replace('/', '-')}-{width}-{mode}.png"
                    page.screenshot(path=str(target), full_page=True)
                    page.close()
        browser.close()
    print(f"{len(names)} pages in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
