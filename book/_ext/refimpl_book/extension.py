"""What Jupyter Book does not do by itself, as a small Sphinx extension.

- `<!-- generated: NAME -->` in a page is replaced by text made from refimpl/papers.toml or data/results/.
- A notebook that `make book` executed is shown with its live outputs. Each gets a line on its paper and on how
  to run it.
- Interactive charts are drawn by a Vega bundle of this site, never by one from another host.
- Two script errors and the unused live-code scripts of the stock theme are removed.
"""

from __future__ import annotations

import html
import json
import os
import re
from typing import Any
from urllib.parse import quote

import yaml

from refimpl.papers import papers
from refimpl_book import pages
from refimpl_book.live import ROOT, executed_path, key


def chart(spec: dict[str, Any], text: str) -> str:
    """HTML of a Vega-Lite chart: the text is read aloud and shown where scripts are off."""
    body = json.dumps(spec).replace("</", "<\\/")
    return (
        f'<div class="vega-chart" role="img" aria-label="{html.escape(text, quote=True)}"></div>'
        f'<script type="application/json" class="vega-spec">{body}</script>'
        f"<noscript>{html.escape(text)}</noscript>"
    )


def repository() -> str:
    """The public address of the repository; empty while it is undecided."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))["repository"]["url"].rstrip("/")


def branch() -> str:
    """The branch that the book is edited on."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))["repository"]["branch"]


def page_links(docname: str) -> str:
    """Links below a page to report an error and to edit its source; nothing while the address is undecided."""
    address = repository()
    source = next(
        (f"{docname}{ending}" for ending in (".md", ".ipynb") if (ROOT / f"{docname}{ending}").exists()), None
    )
    if not address or source is None:
        return ""
    issue = f"{address}/issues/new?title={quote(f'Error in {source}')}&body={quote(f'On the page {docname}: ')}"
    return (
        f'<p class="page-links"><a href="{html.escape(issue)}">Report an error on this page</a> '
        f'<a href="{html.escape(f"{address}/edit/{branch()}/{source}")}">Edit this page</a></p>'
    )


def run_line(path: str) -> str:
    """How a reader runs the page that they are reading."""
    address = repository()
    if not address:
        return (
            f"To run this page, open `{path}` in a checkout after `make book`. "
            "The public address of the repository is not decided yet, so there is no Colab link."
        )
    owner_and_name = address.removeprefix("https://github.com/")
    return (
        f"[Open in Colab](https://colab.research.google.com/github/{owner_and_name}/blob/{branch()}/{path}), "
        f"or open `{path}` in a checkout after `make book`."
    )


def about_line(docname: str) -> str:
    """One line under the title of a notebook: its paper, its cost, how to run it."""
    path = f"{docname}.ipynb"
    for paper in papers():
        if paper.notebook == path:
            venue = f", {paper.venue}" if paper.venue else ""
            return (
                f"*Paper: [{paper.title}]({paper.url}) ({paper.year}{venue}). About {paper.minutes} minutes, "
                f"difficulty {paper.difficulty} of 3.*\n\n{run_line(path)}"
            )
    return run_line(path)


def with_local_charts(output: dict[str, Any]) -> None:
    """Give a Vega-Lite output HTML that needs this site only; other interactive forms are dropped."""
    data = output.get("data", {})
    specs = [name for name in data if name.startswith("application/vnd.vegalite")]
    if specs:
        spec = data[specs[0]]
        text = spec.get("description") or "Chart; the numbers are in the text."
        output["data"] = {"text/html": chart(spec, text), "text/plain": text}


def read_source(app: Any, docname: str, source: list[str]) -> None:
    """Sphinx hands over a page's text before it is parsed; what is put back is what readers see."""
    if docname.startswith("notebooks/"):
        committed = ROOT / f"{docname}.ipynb"
        live = executed_path(committed)
        text = source[0]
        if live.exists() and json.loads(live.read_text(encoding="utf8"))["metadata"]["executed_key"] == key(committed):
            text = live.read_text(encoding="utf8")
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                with_local_charts(output)
        title = next(cell for cell in notebook["cells"] if "".join(cell["source"]).startswith("# "))
        first, _, rest = "".join(title["source"]).partition("\n")
        title["source"] = f"{first}\n\n{about_line(docname)}\n{rest}"
        source[0] = json.dumps(notebook)
        return
    for name, make in pages.GENERATED.items():
        marker = f"<!-- generated: {name} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, make(chart))


def with_literal_blocks(lines: list[str]) -> list[str]:
    """The lines with `::` before each indented paragraph, but for those that belong to a list."""
    found: list[str] = []
    start = ""  # the first line of the last paragraph that is not indented
    for k, line in enumerate(lines):
        opens = bool(line.strip()) and (k == 0 or not lines[k - 1].strip())
        if opens and not line.startswith(" "):
            start = line
        elif opens and not re.match(r"[-*] |\d+\. |::$", start):
            found += ["::", ""]
            start = "::"
        found.append(line)
    return found


def docstring_lines(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `names` in backticks: what reStructuredText would read as markup is escaped.

    What a module's docstring sets off by indentation (steps, equations) is shown as it stands.
    """
    if what == "module":
        lines[:] = with_literal_blocks(lines)
    verbatim = literal = False
    for k, line in enumerate(lines):
        if line.strip():
            literal = (literal and line.startswith(" ")) or line == "::"
        if line.lstrip().startswith(">>>"):
            verbatim = True
        elif not line.strip():
            verbatim = False
        if not verbatim and not literal:
            pieces = re.split(r"(``.*?``|`[^`]*`|:\w+:`[^`]*`)", line)
            for place, piece in enumerate(pieces):
                if place % 2 == 0:
                    plural = "\\ " if place and piece[:1].isalnum() else ""  # `name`s: markup must not touch a letter
                    pieces[place] = plural + re.sub(r"(?<!\*)\*(?!\*)|\|", r"\\\g<0>", piece)
            lines[k] = "".join(pieces)


def outdated(app: Any, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Pages whose content comes from elsewhere are always read again; it costs seconds."""
    generated = [name for name in env.found_docs if name.startswith(("book/", "notebooks/"))]
    return [name for name in generated if name not in added]


def write_vega(app: Any) -> None:
    """The chart library, from the installed package to the site's static files.

    As a classic script: browsers load no modules from disk.
    """
    import vl_convert

    target = ROOT / "_build" / "vega" / "vega.js"
    target.parent.mkdir(parents=True, exist_ok=True)
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks for an argument that it does not need
    target.write_text(f"(() => {{{bundle}}})();", encoding="utf8")
    app.config.html_static_path.append(str(target.parent))


#: Before anything is drawn: the reader's own choice, else the system's (the stock theme flashes light). Paper is light.
EARLY_MODE = """(() => {
  const html = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  if (!["light", "dark"].includes(html.dataset.theme)) html.dataset.theme = dark ? "dark" : "light";
  let shown;
  addEventListener("beforeprint", () => { shown = html.dataset.theme; html.dataset.theme = "light"; });
  addEventListener("afterprint", () => { html.dataset.theme = shown; });
})();"""
#: Summaries in the search results are fetched from the pages, which browsers refuse for files on disk.
SEARCH_FROM_DISK = 'if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;'


def page_scripts(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Per page: the scripts it needs, none of the live-code button's, and the links below it."""
    body = context.get("body", "")
    app.add_js_file(None, body=EARLY_MODE, priority=1)
    if "vega-chart" in body:
        app.add_js_file("vega.js", loading_method="defer")
        app.add_js_file("charts.js", loading_method="defer")
    if "ledger-filter" in body:
        app.add_js_file("ledger.js", loading_method="defer")
    if pagename == "search":
        app.add_js_file(None, body=SEARCH_FROM_DISK)
    if os.environ.get("BOOK_VERSIONS"):  # set where the book is published beside its other versions
        app.add_js_file("versions.js", loading_method="defer")
    if doctree is not None:
        context["body"] = body + page_links(pagename)
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in str(getattr(script, "filename", "")).lower()
        and "thebe" not in str(getattr(script, "attributes", {}).get("body", "")).lower()
    ]


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", write_vega)
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", docstring_lines)
    app.connect("html-page-context", page_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
