"""Check the rendered book without a browser: nothing is loaded from another host, no local link,
anchor or image is broken.

python scripts/check_book.py _build/html
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "video": "src"}


class Page(HTMLParser):
    """Collects what a page loads and where it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.images_without_text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        passive = tag == "link" and values.get("rel") not in ("stylesheet", "preload", "icon", "modulepreload")
        address = values.get(LOADS.get(tag, ""))
        if address and not passive:
            self.loads.append(address)
        self.anchors |= {str(values[key]) for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        if tag == "img" and not values.get("alt"):
            self.images_without_text.append(str(address)[:80])


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf8"))
    return page


def problems(folder: Path) -> list[str]:
    found = []
    pages: dict[Path, Page] = {}
    for path in sorted(folder.rglob("*.html")):
        if "_static" in path.parts:  # templates of the theme, not pages
            continue
        text = path.read_text(encoding="utf8")
        page = pages.setdefault(path.resolve(), read(path))
        name = path.relative_to(folder).as_posix()
        for address in page.loads:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") or parts.netloc:
                found.append(f"{name}: loads {address} from another host")
        for address in page.loads + page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path) if parts.path else path).resolve()
            if not target.exists():
                found.append(f"{name}: {address} does not exist")
            elif parts.fragment and target.suffix == ".html":
                if target not in pages:
                    pages[target] = read(target)
                if unquote(parts.fragment) not in pages[target].anchors:
                    found.append(f"{name}: {address} leads to no such place in the page")
        for image in page.images_without_text:
            found.append(f"{name}: image {image} has no alt text")
        body = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", text, flags=re.S)
        if "<!-- generated:" in body:
            found.append(f"{name}: a generated part was not filled in")
    return found


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]}: nothing from other hosts, no broken local link or anchor")
    sys.exit(bool(found))
