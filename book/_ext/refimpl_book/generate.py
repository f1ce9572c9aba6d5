"""Files of the checkout that follow from others: one command writes them, one test says which are out of date.

    python -m refimpl_book.generate            name what is out of date
    python -m refimpl_book.generate --write    write it (`make generated`)

refimpl/papers.toml decides the exports of `refimpl` and of its parts, the contents of the book and the README's table;
_config.yml decides the first cell of every notebook; the cards of the models decide the table of data/models. What the
pages of the book show is not kept in files: `refimpl_book.pages` makes it when the book is built.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import yaml

from refimpl.core.files.io import atomic_write
from refimpl.markdown import table
from refimpl.papers import PARTS, Paper, papers
from refimpl_book import listing
from refimpl_book.live import ROOT


def between(text: str, start: str, end: str, content: str) -> str:
    """The text with other content between two markers, each of which stands in it once.

    Raises:
        ValueError: a marker is missing, or there are several.

    Example:
        >>> between("a <b> c </b> d", "<b>", "</b>", "!")
        'a <b>!</b> d'
    """
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{start.strip()!r} and {end.strip()!r} must stand in the file once each")
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}{content}{end}{after}"


# -- what `from refimpl import ...` and `from refimpl.<part> import ...` offer --

BEGIN, END = "# -- written by `make generated` from papers.toml and the imports above --\n", "# -- to here --\n"


def formatted(source: str, path: Path) -> str:
    """Python source with sorted imports and the project's layout."""
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--select", "I", "--fix-only", "--quiet"], ["format", "--quiet"]):
        run = subprocess.run(
            [*ruff, *command, "--stdin-filename", path, "-"],
            input=source,
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        source = run.stdout
    return source


def in_order(names: Iterable[str]) -> list[str]:
    """Constants, classes, functions: the order in which imports are sorted.

    Example:
        >>> in_order(["plan", "EoRA", "GPTQ", "compress"])
        ['GPTQ', 'EoRA', 'compress', 'plan']
    """
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def with_exports() -> Iterator[Paper]:
    return (paper for paper in papers() if paper.exports)


def package_source(old: str) -> str:
    """refimpl/__init__.py: where each public name is loaded from, for readers of types and for Python.

    The names of hosts and baselines are those that its first `if TYPE_CHECKING:` imports; papers add their `exports`.
    """
    where: dict[str, list[str]] = {}
    block = next(node for node in ast.parse(old).body if isinstance(node, ast.If))
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module, "only `from refimpl.x import y` is understood here"
        where[node.module.removeprefix("refimpl.")] = [alias.name for alias in node.names]
    ours: dict[str, list[str]] = {}
    for paper in with_exports():
        ours.setdefault(paper.package.removeprefix("refimpl."), []).extend(paper.exports)
    imports = "".join(f"    from refimpl.{module} import {', '.join(names)}\n" for module, names in ours.items())
    every = {module: in_order(names) for module, names in sorted((where | ours).items())}
    rows = "".join(f"    {module!r}: {tuple(names)!r},\n" for module, names in every.items())
    names = in_order(name for names in every.values() for name in names)
    lines = "".join(f"    {name!r},\n" for name in names)
    content = f"if TYPE_CHECKING:\n{imports}\n_WHERE = {{\n{rows}}}\n\n__all__ = [\n{lines}]\n"
    return formatted(between(old, BEGIN, END, content), ROOT / "refimpl" / "__init__.py")


def part_source(part: str, old: str) -> str:
    """refimpl/<part>/__init__.py: its docstring, and the `exports` of its papers."""
    mine = [paper for paper in with_exports() if paper.part == part]
    path = ROOT / mine[0].package.replace(".", "/") / "__init__.py"
    docstring = ast.get_docstring(ast.parse(old), clean=False) or f"{PARTS[part]}: one file or folder per paper."
    imports = "".join(f"from {paper.module} import {', '.join(paper.exports)}\n" for paper in mine)
    names = in_order(name for paper in mine for name in paper.exports)
    return formatted(f'"""{docstring}"""\n\n{imports}\n__all__ = {names!r}\n', path)


# -- the book and the README --


def contents(old: str) -> str:
    """_toc.yml: the parts that have chapters, each with its page and its notebooks in reading order."""
    lines = []
    for part, title in PARTS.items():
        mine = [paper for paper in listing.chapters() if paper.part == part]
        if mine:
            files = [f"book/{part}", *(paper.notebook.removesuffix(".ipynb") for paper in mine)]
            lines += [f"  - caption: {title}", "    chapters:", *(f"      - file: {file}" for file in files)]
    return between(old, "  # chapters, by `make generated`\n", "  # end of chapters\n", "\n".join([*lines, ""]))


def readme(old: str) -> str:
    """README.md: the table of chapters."""
    content = f"\n{listing.state()}\n\n{listing.chapter_table('')}\n\n"
    return between(old, "<!-- chapters -->\n", "<!-- /chapters -->\n", content)


# -- the first cell of every notebook --


def install_cell() -> str:
    """Source of the cell that installs refimpl on Colab and does nothing elsewhere, with the address of _config.yml."""
    address = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))["repository"]["url"]
    action = (
        f'    %pip install -q "refimpl[lab] @ git+{address}"'
        if address
        else (
            '    print("The public address of this book is not decided yet. In a checkout, run")\n'
            '    print("    pip wheel --no-deps -w dist .")\n'
            "    print(\"then upload the file from dist/ here and run  %pip install '<the file>[lab]'\")"
        )
    )
    return (
        "# On Colab this cell installs refimpl; elsewhere it does nothing.\n"
        "import importlib.util\n"
        "import sys\n"
        "\n"
        'if "google.colab" in sys.modules and importlib.util.find_spec("refimpl") is None:\n'
        f"{action}"
    )


def with_install_cell(old: str) -> str:
    """A notebook whose first code cell is the install cell, which the rendered page leaves out."""
    notebook = json.loads(old)
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    if not "".join(cell["source"]).startswith("# On Colab this cell"):
        position = notebook["cells"].index(cell)
        cell = {"cell_type": "code", "execution_count": None, "id": "install", "outputs": [], "source": []}
        notebook["cells"].insert(position, cell)
    source, metadata = install_cell().splitlines(keepends=True), {"tags": ["remove-cell"]}
    if "".join(cell["source"]) == "".join(source) and cell.get("metadata") == metadata:
        return old  # however the notebook's JSON is laid out
    cell["source"], cell["metadata"] = source, metadata
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


# -- the table of the shipped models --

MODELS = ROOT / "data" / "models"


def _model_row(folder: Path) -> list[str]:
    """What the card of one model says, in a line."""
    card = (folder / "README.md").read_text(encoding="utf8")
    (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf8"))["architectures"]
    parameters = _only(r"^- Parameters: ([\d,]*\d)", card, folder)
    measure = _only(r"^\| split \|.*\| ([^|]+) \|$", card, folder)
    value = _only(r"^\| test \|.*\| ([^|]+) \|$", card, folder)
    licence = _only(r"weights (?:are )?under (CC BY(?:-SA)? \d\.\d)", card.replace("\n", " "), folder)
    size = round((folder / "model.safetensors").stat().st_size / 1000)
    link = f"[{folder.name}]({folder.name}/README.md)"
    return [link, f"`{architecture}`", parameters, str(size), value, measure, licence]


def _only(pattern: str, card: str, folder: Path) -> str:
    found = re.findall(pattern, card, flags=re.M)
    if len(found) != 1:
        raise ValueError(f"{folder / 'README.md'}: {len(found)} lines match {pattern!r}, expected one")
    return found[0]


def models(old: str) -> str:
    """data/models/README.md: the table of models."""
    header = ["model", "architecture", "parameters", "weights (kB)", "test split", "measured", "licence of the weights"]
    rows = [_model_row(card.parent) for card in sorted(MODELS.glob("[!.]*/README.md"))]
    return between(old, "<!-- models -->\n", "<!-- /models -->\n", table(header, rows) + "\n")


# -- all of them --


def files() -> dict[Path, Callable[[str], str]]:
    """Each file that is made or has a part that is made, and what it should hold given what it holds."""
    made: dict[Path, Callable[[str], str]] = {ROOT / "refimpl" / "__init__.py": package_source}
    for part in dict.fromkeys(paper.part for paper in with_exports()):
        folder = next(paper.package for paper in with_exports() if paper.part == part).replace(".", "/")
        made[ROOT / folder / "__init__.py"] = partial(part_source, part)
    made |= {ROOT / "_toc.yml": contents, ROOT / "README.md": readme, MODELS / "README.md": models}
    notebooks = (path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    return made | dict.fromkeys(sorted(notebooks), with_install_cell)


def outdated() -> dict[Path, str]:
    """What is not as it should be, with what it should hold."""
    found = {}
    for path, make in files().items():
        old = path.read_text(encoding="utf8") if path.exists() else ""
        try:
            new = make(old)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(ROOT)}: {error}") from error
        if new != old:
            found[path] = new
    return found


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print(__doc__)
        return 2
    found = outdated()
    for path, new in found.items():
        if arguments:
            with atomic_write(path) as temporary:
                temporary.write_text(new, encoding="utf8")
        print(f"{path.relative_to(ROOT)}: {'written' if arguments else 'out of date'}")
    if found and not arguments:
        print("Run `make generated`.")
    return bool(found) and not arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
