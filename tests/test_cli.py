"""The command line: exit codes, help with examples, JSON alone on stdout, no traceback for errors a user can act on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from refimpl.cli import app, book
from refimpl.core.errors import OptionError
from refimpl.papers import papers

COMMANDS = ["papers", "fetch", "study", "ledger", "methods", "compress", "evaluate", "export", "chart"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="refimpl")


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refimpl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


# -- papers, ledger, fetch, study --


def test_papers_lists_chapters_and_marks_the_rest() -> None:
    done = run("papers")
    assert done.exit_code == 0 and "eora" in done.stdout and "planned" not in done.stdout
    assert run("papers", "--planned").stdout.count("(planned)") == 57 - len(done.stdout.splitlines()) + 1
    pruning = run("papers", "--part", "pruning", "--planned").stdout
    assert "gradual_magnitude" in pruning and "eora" not in pruning
    assert f"of {sum(p.part == 'pruning' for p in papers())} papers of part pruning" in pruning


def test_papers_as_json_have_every_field() -> None:
    rows = json.loads(run("papers", "--json").stdout)
    assert {row["slug"] for row in rows} == {p.slug for p in papers() if p.status == "chapter"}
    assert rows[0]["objectives"] and rows[0]["url"].startswith("https://arxiv.org/abs/")
    assert len(json.loads(run("papers", "--planned", "--json").stdout)) == 57


ROWS: list[dict[str, Any]] = [
    {
        "paper": paper,
        "text": f"{paper} helps",
        "paper_number": "0.9",
        "quantity": "ratio",
        "estimate": 0.95,
        "low": 0.9,
        "high": 0.99,
        "scale": "135M",
        "verdict": verdict,
        "problems": [],
        "stale": ["refimpl.core.layers.grid"] if paper == "eora" else [],
    }
    for paper, verdict in [("eora", "holds"), ("gradual_magnitude", "partly"), ("gradual_magnitude", "holds")]
]


def test_ledger_filters_by_part_paper_and_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.lab.study.ledger.table", lambda: ROWS)
    assert run("ledger").stdout.count("verdict:") == 3
    assert "stale: refimpl.core.layers.grid changed" in run("ledger", "--part", "lowrank").stdout
    assert run("ledger", "--part", "pruning").stdout.count("helps") == 2
    assert run("ledger", "--paper", "gradual_magnitude", "--verdict", "holds").stdout.count("helps") == 1
    shown = run("ledger", "--paper", "slim")
    assert shown.exit_code == 0 and "None of the 3 claims fits" in shown.stdout
    rows = json.loads(run("ledger", "--verdict", "holds", "--json").stdout)
    assert [(row["paper"], row["part"]) for row in rows] == [("eora", "lowrank"), ("gradual_magnitude", "pruning")]
    monkeypatch.setattr("refimpl.lab.study.ledger.table", lambda: [])
    assert "No results recorded yet" in run("ledger").stdout
    assert json.loads(run("ledger", "--json").stdout) == []


def test_fetch_refuses_unknown_names_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from refimpl.lab import fetch

    fetched: list[str] = []
    monkeypatch.setattr(fetch, "fetch", lambda name: fetched.append(name) or Path("/cache") / name)
    error = run("fetch", "text", "smolm2").exception
    assert isinstance(error, OptionError) and "did you mean 'smollm2'" in str(error) and not fetched
    assert run("fetch", "text").stdout == f"text: {Path('/cache/text')}\n"
    run("fetch")
    assert fetched == ["text", *fetch.NAMES]


def test_study_writes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from refimpl.lab.study import study

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(study, "run", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("REFIMPL_PROFILE", "quick")  # and put back: the command sets it
    assert run("study", "eora", "--profile", "quick", "--out", str(tmp_path / "a" / "b.json")).exit_code == 0
    monkeypatch.chdir(tmp_path)
    run("study", "eora", "--profile", "quick", "--again", "dense")
    run("study", "eora")
    module = "refimpl.studies.eora"
    assert calls[0] == (module, tmp_path / "a" / "b.json", "quick", ()) and (tmp_path / "a").is_dir()
    assert calls[1] == (module, Path("results-quick/eora.json"), "quick", ["dense"])
    assert calls[2][1].parts[-3:] == ("data", "results", "eora.json") and calls[2][2] == "study"
    assert isinstance(run("study", "eoar").exception, OptionError)


# -- names that are kept twice, because help and completion must not import what knows them --


def test_names_on_the_command_line_are_those_of_the_package() -> None:
    from refimpl.cli import charts, compress, models
    from refimpl.core.files.io import data_path
    from refimpl.lab import fetch
    from refimpl.lab.data import text
    from refimpl.lab.models.language import _is_causal, small
    from refimpl.lab.study.claims import Verdict
    from refimpl.lab.study.records import Results
    from refimpl.methods import METHODS

    assert book.RESOURCES == fetch.NAMES
    assert list(book.VERDICTS) == [verdict.value for verdict in Verdict]
    assert list(compress.METHODS) == list(METHODS)
    assert models.CORPORA == text.CORPORA
    assert set(models.MODELS) == {"smollm2", *filter(_is_causal, small.names())}
    recorded = [Results.load(path).records() for path in data_path("results").glob("*.json")]
    scored = {r.condition for records in recorded for r in records if r.arm == "dense" and r.metric == "correct"}
    assert set(charts.BENCHES) - {"wikipedia"} == {name for name in scored if not name.startswith("task ")}


# -- help, completion, start-up --


@pytest.mark.parametrize("command", [*COMMANDS, "kernels audit", "kernels bench"])
def test_help_has_an_example(command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.exit_code == 0 and f"Example: refimpl {command}" in " ".join(shown.stdout.split())


def test_help_names_every_command() -> None:
    shown = run("--help").stdout
    assert all(command in shown for command in [*COMMANDS, "kernels"])


def test_the_command_line_itself_loads_nothing_heavy() -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('refimpl'); package.__path__ = [sys.argv[1]]; sys.modules['refimpl'] = package\n"
        "import refimpl.cli\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'pandas', 'triton') if name in sys.modules])"
    )
    folder = str(Path(__file__).resolve().parent.parent / "refimpl")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("refimpl led", {"ledger"}),
        (
            "refimpl study ",
            {paper.slug for paper in papers() if paper.status == "chapter"} | {"tasks", "caches", "smollm2"},
        ),
        ("refimpl compress smollm2 Sparse", {"SparseGPT"}),
        ("refimpl evaluate llama-s", {"llama-small"}),
        ("refimpl papers --part prun", {"pruning"}),
        ("refimpl kernels a", {"audit"}),
    ],
)
def test_completion(line: str, expected: set[str]) -> None:
    words = line.split(" ")
    shown = CliRunner().invoke(
        app,
        prog_name="refimpl",
        env={"_REFIMPL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
    )
    assert shown.exit_code == 0 and set(shown.stdout.split()) == expected


def test_completion_script_is_shown_for_a_shell() -> None:
    shown = CliRunner().invoke(
        app,
        prog_name="refimpl",
        env={"_REFIMPL_COMPLETE": "source_bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert "_REFIMPL_COMPLETE=complete_bash" in shown.stdout


# -- exit codes --


def test_wrong_calls_exit_with_two_and_name_the_nearest() -> None:
    for arguments, message in [
        (["studi"], "'study'"),
        (["study", "eora", "--profile", "huge"], "'huge'"),
        (["papers", "--parts", "pruning"], "--part"),
        (["papers", "--part", "prunning"], "did you mean 'pruning'"),
        (["ledger", "--verdict", "hold"], "did you mean 'holds'"),
        (["ledger", "--paper", "eoar"], "did you mean 'eora'"),
        (["compress"], "Missing argument"),
        (["compress", "smollm2", "RTN", "--sequences", "0"], "'--sequences'"),
    ]:
        shown = run(*arguments)
        assert shown.exit_code == 2, arguments
        assert message in " ".join(shown.output.replace("│", " ").split()), (arguments, shown.output)


def test_errors_are_one_line_with_a_remedy() -> None:
    failed = process("study", "eoar")
    assert failed.returncode == 1 and failed.stdout == ""
    assert "did you mean 'eora'" in failed.stderr and len(failed.stderr.splitlines()) == 1


def test_errors_of_the_system_have_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed = process("study", "eora", "--profile", "quick", "--out", str(tmp_path / "file" / "eora.json"))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("refimpl: ") and "file" in failed.stderr


def test_an_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from refimpl import __main__
    from refimpl.lab.study import study

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("REFIMPL_PROFILE", "quick")
    monkeypatch.setattr(study, "run", interrupted)
    assert run("study", "eora", "--profile", "quick", "--out", str(tmp_path / "e.json")).exit_code == 130
    # while the command line is still being imported nobody else catches it
    monkeypatch.setattr("refimpl.cli.app", interrupted)
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 130


def test_json_is_alone_on_stdout() -> None:
    done = process("ledger", "--json")
    assert done.returncode == 0
    assert all("verdict" in row and "part" in row for row in json.loads(done.stdout))
