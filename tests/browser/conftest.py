"""The rendered book behind a local server, and a headless Chromium to read it with."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
# Whatever decides what a page says.
INPUTS = ["_config.yml", "_toc.yml", "references.bib", "book", "notebooks", "scripts", "refimpl", "data/results"]
NAMES = ("chromium", "chromium-browser", "google-chrome")


def newest(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if "__pycache__" not in p.parts and p.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the rendered book; rendered anew if anything it is made from is younger."""
    rendered = HTML / "searchindex.js"
    if not rendered.exists() or max(newest(ROOT / name) for name in INPUTS) > rendered.stat().st_mtime:
        command = [
            str(Path(sys.executable).with_name("jupyter-book")),
            "build",
            "-W",
            "-n",
            "--keep-going",
            "--quiet",
            str(ROOT),
        ]
        outcome = subprocess.run(command, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-4000:]
    return HTML


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def root(site: Path) -> Iterator[str]:
    """Address of the book."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """A page that somebody reads, and what went wrong on it so far."""

    page: Page
    problems: list[str] = field(default_factory=list)

    def drawn(self, mode: str = "light") -> None:
        """Wait until maths is typeset and charts are drawn in the colours of a mode."""
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        if self.page.locator(".vega-chart").count():
            self.page.wait_for_function("mode => document.documentElement.dataset.chartsDrawn === mode", arg=mode)


@pytest.fixture
def visit(browser: Browser, root: str) -> Iterator[Callable[..., Visit]]:
    """Open a page: visit("book/ledger", width=400). Script errors and requests to other hosts are problems."""
    contexts = []

    def go(name: str, width: int = 1280, height: int = 800, address: str = "", **options: object) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)  # type: ignore[arg-type]
        contexts.append(context)
        seen = Visit(context.new_page())
        base = address or f"{root}/"
        seen.page.on("console", lambda m: seen.problems.append(m.text) if m.type in ("error", "warning") else None)
        seen.page.on("pageerror", lambda error: seen.problems.append(str(error)))
        seen.page.on("requestfailed", lambda request: seen.problems.append(f"failed: {request.url}"))
        seen.page.on(
            "request",
            lambda r: None if r.url.startswith((base, "data:", "blob:")) else seen.problems.append(f"asks {r.url}"),
        )
        path, _, rest = name.partition("?")
        seen.page.goto(f"{base}{path}.html{'?' + rest if rest else ''}", wait_until="load")
        return seen

    yield go
    for context in contexts:
        context.close()
