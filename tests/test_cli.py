"""The command line: exit codes, help with examples, no traceback for errors a user can act on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from refimpl.cli import app
from refimpl.core.errors import OptionError

Factory = Callable[..., Any]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="refimpl")


def test_papers_lists_chapters_and_marks_the_rest() -> None:
    done = run("papers")
    assert done.exit_code == 0 and "eora" in done.stdout and "planned" not in done.stdout
    assert run("papers", "--planned").stdout.count("(planned)") == 57 - len(done.stdout.splitlines()) + 1


@pytest.mark.parametrize("command", ["papers", "fetch", "compress", "study", "ledger"])
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


def test_compress_plans_without_weights_and_writes_a_loadable_folder(
    tmp_path: Path, tiny_llama: Factory
) -> None:
    from refimpl import load

    source, out = tmp_path / "source", tmp_path / "out"
    tiny_llama().config.save_pretrained(source)  # a configuration is all a dry run needs
    shown = run("compress", str(source), "GPTQ", "--set", "group_size=32", "--dry-run")
    assert shown.exit_code == 0 and "14 sites" in shown.stdout and "Embedding: embedding" in shown.stdout
    tiny_llama().save_pretrained(source)
    shown = run(
        "compress", str(source), "rtn", "--set", "bits=3", "--set", "group_size=32", "--out", str(out)
    )
    assert shown.exit_code == 0, shown.output
    assert load(out).model.layers[0].mlp.up_proj.bits == 3


def test_compress_refuses_what_it_cannot_do(tmp_path: Path, tiny_llama: Factory) -> None:
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    for arguments, message in [
        (["GPTG", "--dry-run"], "did you mean 'GPTQ'"),
        (["GPTQ", "--set", "bit=3", "--dry-run"], "did you mean 'bits'"),
        (["GPTQ", "--set", "bits", "--dry-run"], "name=value"),
        (["GPTQ", "--set", "bits=many", "--dry-run"], "expected int"),
        (["RTN", "--set", "group_size=32"], "--out"),
        (["GPTQ", "--set", "group_size=48", "--dry-run"], "does not divide the 64 inputs"),
    ]:
        error = run("compress", str(source), *arguments).exception
        assert isinstance(error, OptionError) and message in str(error), (arguments, error)
