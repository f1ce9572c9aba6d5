"""Who may import whom, and that the public names load without the classroom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from refimpl.papers import PARTS, package

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def test_import_rules() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_logo=True) == 0


def test_import_rules_cover_every_part() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (row,) = [layer for layer in contracts[0]["layers"] if "pruning" in layer]
    assert {name.strip(" ()") for name in row.split("|")} == {package(p).removeprefix("refimpl.") for p in PARTS} | {
        "lab"
    }


def test_public_names_load_no_classroom() -> None:
    unwanted = ["refimpl.lab", "refimpl.studies", "datasets", "matplotlib", "pandas", "altair", "gensim", "triton"]
    # torch itself imports triton where it is installed; then only our own import of it counts.
    code = (
        "import sys, torch, transformers\n"
        "before = set(sys.modules)\n"
        "from refimpl import compress, EoRA\n"
        f"print([name for name in {unwanted} if name in set(sys.modules) - before])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_package_itself_loads_nothing_heavy() -> None:
    code = "import sys, refimpl; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import refimpl

    assert set(refimpl.__all__) == set(refimpl._MODULE_OF)
    assert all(getattr(refimpl, name) is not None for name in refimpl.__all__)


def test_a_blocked_extra_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['typer'] = None\n"  # an import of it now fails as if it were not installed
        "sys.argv = ['refimpl', 'papers']\n"
        "from refimpl.__main__ import main\n"
        "main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "refimpl[lab]" in run.stderr and "Traceback" not in run.stderr
