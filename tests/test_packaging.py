"""The wheel works outside the checkout and moves nothing that is already installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("refimpl-*.whl"))


def test_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"refimpl/__init__.py", "refimpl/papers.toml", "refimpl/_data/README.md"} <= set(names)
    assert all(name.startswith(("refimpl/", "refimpl-")) for name in names)
    for result in (ROOT / "data" / "results").glob("*.json"):
        assert f"refimpl/_data/results/{result.name}" in names


def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel],
        check=True,
        capture_output=True,
    )
    code = (
        "import refimpl, refimpl.papers, refimpl.core.files.io as io\n"
        "from refimpl import RTN, compress\n"
        "print(refimpl.__file__)\n"
        "print(len(refimpl.papers.papers()))\n"
        "print(io.data_path('README.md').is_file(), io.data_path('README.md'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    place, count, data = run.stdout.splitlines()
    assert Path(place).is_relative_to(target)
    assert count == "57"
    assert data.startswith("True") and str(target) in data


# No stand-ins with the extra: its packages (scipy) have upper bounds of their own on numpy.
@pytest.mark.parametrize(
    ("extra", "newer"), [("", False), ("", True), ("[lab]", False)], ids=["current", "newer", "lab"]
)
def test_installing_changes_neither_torch_nor_numpy(wheel: Path, tmp_path: Path, extra: str, newer: bool) -> None:
    # the answer must not depend on this machine's pip settings (constraints, indexes)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    if newer:  # stand-ins of versions yet to come, seen by pip before the real ones
        for name in ("torch", "numpy"):
            info = tmp_path / "future" / f"{name}-99.0.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
        environment["PYTHONPATH"] = str(tmp_path / "future")
    report = tmp_path / "report.json"
    # --no-index: a dependency that is not satisfied by what is installed fails here
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "-q",
        "--report",
        report,
        f"refimpl{extra} @ {wheel.as_uri()}",
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path)
    changed = {entry["metadata"]["name"].lower() for entry in json.loads(report.read_text())["install"]}
    assert changed <= {"refimpl"}, changed


def test_dependencies_have_lower_bounds_only(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    hard = [line for line in required if "extra ==" not in line]
    assert {line.split(">=")[0].strip() for line in hard} == {
        "numpy",
        "safetensors",
        "tomli",
        "torch",
        "tqdm",
        "transformers",
    }
    assert not any("<" in line.split(";")[0] or "==" in line.split(";")[0] for line in hard)


def test_conda_and_make_install_the_same_torch() -> None:
    (made,) = re.findall(r"^TORCH := (\S+)", (ROOT / "Makefile").read_text(encoding="utf8"), flags=re.M)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
    assert made in conda["dependencies"][-1]["pip"]
