"""The command line: exit codes, help with examples, no traceback for errors a user can act on."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from refimpl.cli import app
from refimpl.core.errors import OptionError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="refimpl")


def test_papers_lists_chapters_and_marks_the_rest() -> None:
    done = run("papers")
    assert done.exit_code == 0 and "eora" in done.stdout and "planned" not in done.stdout
    assert run("papers", "--planned").stdout.count("(planned)") == 57 - len(done.stdout.splitlines()) + 1


@pytest.mark.parametrize("command", ["papers", "fetch", "study", "ledger"])
def test_help_has_an_example(command: str) -> None:
    shown = run(command, "--help")
    assert shown.exit_code == 0 and f"Example: refimpl {command}" in shown.stdout


def test_wrong_calls_exit_with_two() -> None:
    assert run("studi").exit_code == 2
    assert run("study", "eora", "--profile", "huge").exit_code == 2


def test_ledger_prints_verdicts_or_says_there_are_none() -> None:
    shown = run("ledger")
    assert shown.exit_code == 0
    assert "verdict:" in shown.stdout or "No results recorded yet" in shown.stdout


def test_errors_are_one_line_with_a_remedy() -> None:
    assert isinstance(run("study", "eoar").exception, OptionError)
    process = subprocess.run(
        [sys.executable, "-m", "refimpl", "study", "eoar"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "did you mean 'eora'" in process.stderr and len(process.stderr.splitlines()) == 1
