"""Open the pages of the rendered book in a browser at two widths and report what a reader would trip over.

Reported: script errors, requests to other hosts, and pages that scroll sideways. Needs playwright and Chromium:

    python scripts/screenshots.py _build/html --out _build/screenshots
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS = (1280, 400)
OVERFLOW = "() => document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
# Which elements reach beyond the window without a scrolling box around them.
CULPRITS = """() => {
  const boxed = (e) => { for (let p = e.parentElement; p; p = p.parentElement) {
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return true; } return false; };
  return [...document.querySelectorAll("main *")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !boxed(e))
    .slice(0, 3).map((e) => e.tagName + "." + e.className); }"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def visit(page: Page, address: str, name: str, width: int, out: Path) -> list[str]:
    """Open one page at one width, photograph it, and say what is wrong with it."""
    found: list[str] = []
    label = f"{name} at {width} px"
    site = address.split("/", 3)[2]
    page.on(
        "console",
        lambda message: found.append(f"{label}: {message.text}") if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: found.append(f"{label}: {error}"))
    page.on(
        "request",
        lambda request: (
            found.append(f"{label}: asks {request.url}")
            if request.url.startswith("http") and request.url.split("/", 3)[2] != site
            else None
        ),
    )
    page.goto(address, wait_until="networkidle")
    if page.evaluate(OVERFLOW) > 1:
        found.append(f"{label}: scrolls sideways because of {page.evaluate(CULPRITS)}")
    empty = page.evaluate(
        "() => [...document.querySelectorAll('.vega-chart')].filter((c) => !c.querySelector('svg')).length"
    )
    if empty:
        found.append(f"{label}: {empty} chart(s) not drawn")
    page.screenshot(path=str(out / f"{name.replace('/', '-')}-{width}.png"), full_page=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("_build/screenshots"))
    parser.add_argument("--browser", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=options.folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    names = [
        path.relative_to(options.folder).with_suffix("").as_posix()
        for part in ("book", "notebooks")
        for path in sorted((options.folder / part).rglob("*.html"))
    ]
    found: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for name in names:
            for width in WIDTHS:
                page = browser.new_page(viewport={"width": width, "height": 900})
                found += visit(page, f"{root}/{name}.html", name, width, options.out)
                page.close()
        browser.close()
    server.shutdown()
    print(
        "\n".join(found)
        or f"{len(names)} pages at {WIDTHS} px: no script error, no other host, no sideways scrolling"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
