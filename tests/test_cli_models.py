"""The commands on a model: methods, compress, evaluate, chart, export; on shipped models and on a user's folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from refimpl import load
from refimpl.cli import app
from refimpl.core.errors import CheckpointError, FileError, OptionError, RefimplError

Factory = Callable[..., Any]
FIRST = ["--sequences", "4", "--length", "64"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="refimpl")


def ran(*arguments: str | Path) -> str:
    shown = run(*arguments)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    return shown.stdout


def refused(kind: type[Exception], *arguments: str | Path) -> str:
    shown = run(*arguments)
    assert shown.exit_code == 1 and isinstance(shown.exception, kind), (shown.output, shown.exception)
    return str(shown.exception)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own text: long enough for a few windows, and not one of the book's corpora."""
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("\n\n".join(f"Line {k}: the {k * 7 % 31} birds of house {k} sing {k * k}." for k in range(900)))
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tiny_qwen3: Factory, tiny_gpt2: Factory) -> dict[str, Path]:
    """A Qwen-like and a GPT-2-like checkpoint with a tokenizer, as a user would have them."""
    from refimpl.lab.models import small

    folders = {}
    for name, factory in (("qwen3", tiny_qwen3), ("gpt2", tiny_gpt2)):
        folders[name] = tmp_path_factory.mktemp(name) / "model"
        factory(vocab_size=1024).save_pretrained(folders[name])
        small.tokenizer().save_pretrained(folders[name])
    return folders


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense.json"
    path.write_text(ran("evaluate", "llama-small", "--json", *FIRST))
    return path


# -- methods --


def test_methods_lists_all_and_describes_the_options_of_one() -> None:
    from refimpl.methods import METHODS

    assert [line.split()[0] for line in ran("methods").splitlines()[: len(METHODS)]] == list(METHODS)
    shown = ran("methods", "sparsegpt")
    assert "--set pattern=2:4" in shown and "--set damping=0.01" in shown and "calibration text" in shown
    described = re.findall(r"--set \w+=.*\n {6}\S", shown)
    assert len(described) == 3, "also what a base class documents"
    assert "--reference" in ran("methods", "EoRA")
    assert "did you mean 'GPTQ'" in refused(OptionError, "methods", "GTPQ")


@pytest.mark.parametrize("name", ["RTN", "AdaQuant", "LoftQ", "EoRA", "QuantizeActivations"])
def test_every_option_is_explained(name: str) -> None:
    import dataclasses

    from refimpl.cli.compress import _option_texts
    from refimpl.methods import METHODS

    kind: Any = METHODS[name]
    assert {field.name for field in dataclasses.fields(kind)} <= set(_option_texts(kind))


# -- compress --


def test_compress_plans_without_weights_and_writes_a_loadable_folder(tmp_path: Path, tiny_llama: Factory) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_llama().config.save_pretrained(source)  # a configuration is all a dry run needs
    shown = ran("compress", source, "GPTQ", "--set", "group_size=32", "--dry-run")
    assert "14 sites" in shown and "Embedding: embedding" in shown
    assert ran("compress", source / "config.json", "GPTQ", "--set", "group_size=32", "--dry-run") == shown
    tiny_llama().save_pretrained(source)
    ran("compress", source, "rtn", "--set", "bits=3", "--set", "group_size=32", "--out", out)
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
        (["RTN", "EoRA", "--set", "rank=4", "--dry-run"], "write RTN.rank=4 or EoRA.rank=4"),
        (["RTN", "EoRA", "--set", "EORB.rank=4", "--dry-run"], "did you mean 'EoRA'"),
        (["GPTQ", "--order", "sequental", "--dry-run"], "did you mean 'sequential'"),
        (["GPTQ", "--out", str(tmp_path / "o")], "holds none"),  # no tokenizer for the calibration text
        (["EoRA", "--out", str(tmp_path / "o")], "--reference"),
    ]:
        assert message in refused(OptionError, "compress", source, *arguments), arguments
    assert not (tmp_path / "o").exists()
    assert "llama-small" in refused(OptionError, "compress", "llama-smal", "RTN", "--dry-run")
    assert "describes no model" in refused(CheckpointError, "compress", "lstm", "RTN", "--out", tmp_path / "o")
    assert "no decoder blocks" in refused(OptionError, "compress", "resnet-digits", "RTN", "--out", tmp_path / "o")


def test_a_disk_that_is_full_and_what_is_in_the_way(tmp_path: Path, tiny_llama: Factory) -> None:
    """One line that names the path and the remedy, and exit code 1: in a process of its own, as a person sees it."""
    tiny_llama().save_pretrained(tmp_path / "source")
    (tmp_path / "file").touch()
    for out, limit, message in (
        (
            "full",
            "20",
            r"full/(block-00000|rest).safetensors cannot be written \(File too large\); free some space there, or",
        ),
        ("file", "unlimited", r"file' is no folder; move what is in the way, or choose another path"),
    ):
        line = 'ulimit -f "$1"; shift; exec "$@"'
        call = [sys.executable, "-m", "refimpl", "compress", "source", "RTN", "--set", "group_size=32", "--out", out]
        done = subprocess.run(["bash", "-c", line, "bash", limit, *call], cwd=tmp_path, capture_output=True, text=True)
        *waiting, last = done.stderr.splitlines()
        assert done.returncode == 1 and re.fullmatch(rf"refimpl: .*{message}.*", last), done.stderr
        assert all(text.endswith("...") for text in waiting)


def test_calibration_text_of_your_own(tmp_path: Path, own: dict[str, Path], text_file: Path) -> None:
    call = ["compress", own["qwen3"], "Wanda", "--calibration"]
    assert "did you mean 'wikipedia'" in refused(OptionError, *call, "wikpedia", "--out", tmp_path / "o")
    message = refused(OptionError, *call, text_file, "--sequences", "999", "--length", "64", "--out", tmp_path / "o")
    assert "ask for fewer" in message
    ran(*call, text_file, *FIRST, "--out", tmp_path / "o")
    assert load(tmp_path / "o").model.layers[0].mlp.up_proj.pattern == "2:4"


def test_windows_of_your_own_text_come_from_all_of_it_and_differ_between_methods(text_file: Path) -> None:
    from refimpl.cli.models import own_text
    from refimpl.lab.data import text
    from refimpl.lab.models import small

    tokenizer = small.tokenizer()
    every = text.from_texts(text_file, tokenizer, 64).ids
    first, again, second = (own_text("--on", str(text_file), tokenizer, 64, draw).ids for draw in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first[:4], second[:4])
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, every.tolist()))


def test_a_text_in_another_encoding_is_refused_with_the_byte(tmp_path: Path, own: dict[str, Path]) -> None:
    (tmp_path / "latin.txt").write_bytes(("Café naïve résumé over straße. " * 90).encode("latin-1"))
    (tmp_path / "good.txt").write_text("The quick brown fox jumps over the lazy dog. " * 90)
    for call in (
        ["evaluate", "llama-small", "--on", tmp_path / "latin.txt", *FIRST],
        ["compress", own["qwen3"], "Wanda", "--calibration", tmp_path / "latin.txt", *FIRST, "--out", tmp_path / "o"],
    ):
        assert "latin.txt: byte 3 is 0xe9" in refused(OptionError, *call)
    assert not (tmp_path / "o").exists()
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file or folder" in refused(OptionError, "evaluate", "llama-small", "--on", tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    shown = run("evaluate", "llama-small", "--on", tmp_path, *FIRST)
    assert shown.exit_code == 0 and "1 file was skipped; the first:" in shown.stderr and "latin.txt" in shown.stderr


def test_where_no_file_can_be_written_nothing_is_computed(tmp_path: Path) -> None:
    measured = {"value": 9.0, "documents": [{"document": "d", "nll": 9.0, "tokens": 5}]}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"bits_per_weight": 4.0, "perplexity": {"wikipedia": measured}}))
    for name in ("pipe.svg", "folder.svg", "file/chart.svg"):
        out = tmp_path / name
        os.mkfifo(out) if name == "pipe.svg" else out.mkdir() if name == "folder.svg" else out.parent.touch()
        for call in (["chart", mine], ["study", "eora", "--profile", "quick"]):
            message = refused(FileError, *call, "--out", out)
            assert str(out) in message and ("name a file" in message or "choose another path" in message)
            assert "\n" not in message
    assert "is a named pipe" in refused(FileError, "chart", tmp_path / "pipe.svg", "--out", tmp_path / "chart.svg")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    measured = {"value": 9.0, "documents": [{"document": "d", "nll": 9.0, "tokens": 5}]}
    (tmp_path / "mine.json").write_text(json.dumps({"bits_per_weight": 4.0, "perplexity": {"wikipedia": measured}}))
    line = f"ulimit -f 4; trap '' XFSZ; {sys.executable} -m refimpl chart mine.json --out chart.html"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "chart.html cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


PIPELINE = [
    "SparseGPT",
    "GPTQ",
    "EoRA",
    "--set",
    "SparseGPT.pattern=2:4",
    "--set",
    "gptq.group_size=32",
    "--set",
    "EoRA.rank=4",
]


def test_a_pipeline_is_the_same_as_its_steps_in_python(tmp_path: Path) -> None:
    from refimpl import GPTQ, EoRA, SparseGPT, compress
    from refimpl.lab.data import text
    from refimpl.lab.models import small

    ran("compress", "llama-small", *PIPELINE, *FIRST, "--dtype", "float32", "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the folders in between are gone"
    model, tokenizer = small.load("llama-small"), small.tokenizer()
    for draw, method in enumerate((SparseGPT("2:4"), GPTQ(group_size=32), EoRA(rank=4))):
        tokens = text.calibration("wikipedia", tokenizer, 4, 64, seed=draw)
        compress(model, method, tokens, reference=small.load("llama-small"), progress=False)
    ids = torch.arange(20)[None]
    assert torch.equal(load(tmp_path / "out")(ids).logits, model(ids).logits)


def test_a_pipeline_plans_each_step_on_what_the_last_one_left() -> None:
    shown = ran("compress", "llama-small", *PIPELINE, "--dry-run").splitlines()[-3:]
    bits = [float(re.search(r"([\d.]+) bits per weight", line)[1]) for line in shown]  # type: ignore[index]
    assert [line.partition("(")[0] for line in shown] == ["SparseGPT", "GPTQ", "EoRA"]
    assert bits[0] == 9 and bits[1] < 4 < bits[2] < bits[0]


def test_the_same_call_resumes_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refimpl import GPTQ

    call = ["compress", "llama-small", *PIPELINE, *FIRST, "--out"]
    ran(*call, tmp_path / "whole")
    compress_site, calls = GPTQ.compress_site, []

    def interrupted(self: Any, site: Any, *more: Any) -> Any:
        calls.append(site.name)
        if len(calls) == 9:  # in the second block of the second method
            raise KeyboardInterrupt
        return compress_site(self, site, *more)

    monkeypatch.setattr(GPTQ, "compress_site", interrupted)
    assert run(*call, tmp_path / "out").exit_code == 130
    assert run("evaluate", tmp_path / "out").exit_code == 1
    calls[:] = ["before"] * 20
    ran(*call, tmp_path / "out")
    assert len(calls) - 20 == 7, "the first block was not done again"
    ids = torch.arange(20)[None]
    assert torch.equal(load(tmp_path / "out")(ids).logits, load(tmp_path / "whole")(ids).logits)
    assert "Already there" in ran(*call, tmp_path / "out")
    other = [*call, tmp_path / "out", "--set", "GPTQ.bits=3"]
    assert "another compressed model" in refused(CheckpointError, *other)


# -- evaluate and chart --


def test_evaluate_measures_what_python_measures(dense: Path) -> None:
    from refimpl.lab import models
    from refimpl.lab.data import text
    from refimpl.lab.measure import metrics

    content = json.loads(dense.read_text())
    model, tokenizer = models.load("llama-small")
    expected = metrics.perplexity(model, text.evaluation("wikipedia", tokenizer, 4, 64))
    assert content["perplexity"]["wikipedia"]["value"] == pytest.approx(expected.value, rel=1e-6)
    assert [row["document"] for row in content["perplexity"]["wikipedia"]["documents"]] == expected.by_unit().units
    assert content["bits_per_weight"] == 16, "as stored, whatever this processor computes in"


def test_evaluate_says_it_in_words_for_any_corpus_and_own_text(own: dict[str, Path], text_file: Path) -> None:
    shown = ran("evaluate", own["gpt2"], "--on", "news", "--on", text_file, "--sequences", "3")
    assert "GPT2LMHeadModel" in shown and "bits per weight" in shown
    assert re.search(r"perplexity [\d.]+ on news \(3 documents, 765 tokens, in windows of 256\)", shown), shown
    assert f"on {text_file} (1 documents" in shown


def test_evaluate_refuses_what_it_cannot_measure(tmp_path: Path, own: dict[str, Path], tiny_llama: Factory) -> None:
    assert "did you mean 'news'" in refused(OptionError, "evaluate", "llama-small", "--on", "newz")
    assert "at most 256" in refused(OptionError, "evaluate", own["gpt2"], "--length", "512")
    tiny_llama().save_pretrained(tmp_path / "bare")
    assert "holds none" in refused(OptionError, "evaluate", tmp_path / "bare")
    refused(RefimplError, "evaluate", "resnet-digits")
    (own["qwen3"] / "tokenizer.json").rename(tmp_path / "kept")
    try:
        (own["qwen3"] / "tokenizer.json").write_text("{")
        assert "cannot be read" in refused(CheckpointError, "evaluate", own["qwen3"])
    finally:
        (tmp_path / "kept").replace(own["qwen3"] / "tokenizer.json")


def test_evaluate_adds_the_score_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one task: all of them together are tested with the tasks."""
    from refimpl.lab import models
    from refimpl.lab.measure import tasks

    monkeypatch.setattr("refimpl.lab.measure.tasks.card.TASKS", ("copying",))
    content = json.loads(ran("evaluate", "llama-small", "--tasks", "--json", *FIRST))
    model, tokenizer = models.load("llama-small")
    card = tasks.score(model, tokenizer, ["copying"], progress=False)
    row = content["tasks"]["copying"]
    assert row["free"]["mean"] == pytest.approx(card.mean("copying", "free"))
    assert row["free"]["low"] <= row["free"]["mean"] <= row["free"]["high"] and row["chance"] == 0.25
    assert "| copying |" in ran("evaluate", "llama-small", "--tasks", *FIRST)


def test_chart_of_your_own_models(tmp_path: Path, dense: Path) -> None:
    ran("compress", "llama-small", "RTN", "--set", "bits=3", "--set", "group_size=32", "--out", tmp_path / "r3")
    three = tmp_path / "rtn3.json"
    three.write_text(ran("evaluate", tmp_path / "r3", "--json", *FIRST))
    for suffix, start in ((".html", b"<!doctype html>"), (".png", b"\x89PNG"), (".svg", b"<?xml")):
        out = tmp_path / f"chart{suffix}"
        assert "2 models" in ran("chart", dense, three, "--out", out)
        assert out.read_bytes().startswith(start)
    page = (tmp_path / "chart.html").read_text()
    assert "rtn3" in page and not re.search(r"<(script|link)[^>]*(src|href)=", page), "needs no network"
    value = json.loads(three.read_text())["perplexity"]["wikipedia"]["value"]
    label = re.search(r"rtn3: ([\d.]+) \(([\d.]+) to ([\d.]+)\) at 3.59 bits", page)
    assert label and float(label[2]) < float(label[1]) == pytest.approx(value, rel=0.01) and float(label[3]) > value


def test_chart_of_recorded_results(tmp_path: Path) -> None:
    out = tmp_path / "bench.svg"
    assert "choose with --method" in refused(OptionError, "chart", "--out", out)
    assert "did you mean 'GPTQ'" in refused(OptionError, "chart", "--method", "GPTG", "--out", out)
    ran("chart", "--paper", "eora", "--method", "GPTQ", "--method", "GPTQ+EoRA", "--out", out)
    assert "<svg" in out.read_text()


def test_chart_refuses_other_files(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    assert "not what `refimpl evaluate --json` writes" in refused(OptionError, "chart", tmp_path / "x.json")
    assert "was measured on one of 'wikipedia'" in refused(OptionError, "chart", dense, "--bench", "news")
    assert ".html, .png, .svg" in refused(OptionError, "chart", dense, "--out", tmp_path / "c.pdf")
    assert "'mnist resnet'" in refused(OptionError, "chart", "--bench", "mnist resnett")
    assert run("chart", tmp_path / "nowhere.json").exit_code == 1


# -- export --

WITHOUT_REFIMPL = """
import sys
sys.modules["refimpl"] = None  # any import of it fails
import torch
{code}
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained({tokenizer!r})
torch.save(model(torch.arange(20)[None]).logits.float(), {logits!r})
"""


def logits_without_refimpl(said: str, tokenizer: Path, tmp_path: Path) -> torch.Tensor:
    """Run the lines that `refimpl export` printed, in a process that has no refimpl."""
    code = said.partition("):\n\n")[2]
    script = WITHOUT_REFIMPL.format(code=code, tokenizer=str(tokenizer), logits=str(tmp_path / "logits.pt"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "logits.pt", weights_only=True)


def test_two_methods_on_a_model_of_your_own_and_out_again(
    tmp_path: Path, own: dict[str, Path], text_file: Path
) -> None:
    """Qwen-like: quantise and repair, evaluate, and load the packed base with its adapter without refimpl."""
    out, base, adapter = tmp_path / "out", tmp_path / "base", tmp_path / "adapter"
    ran(
        "compress",
        own["qwen3"],
        "GPTQ",
        "EoRA",
        "--set",
        "GPTQ.group_size=32",
        "--set",
        "EoRA.rank=4",
        "--calibration",
        text_file,
        *FIRST,
        "--dtype",
        "float32",
        "--out",
        out,
    )
    assert "perplexity" in ran("evaluate", out, "--on", text_file, *FIRST)
    assert "low-rank path" in ran("export", out), "says which formats can hold it, and why not"
    said = ran("export", out, "--format", "compressed-tensors", "--out", base, "--adapter", adapter)
    logits = logits_without_refimpl(said, base, tmp_path)
    torch.testing.assert_close(logits, load(out)(torch.arange(20)[None]).logits, atol=1e-4, rtol=1e-4)


def test_a_gpt2_goes_out_as_plain_weights(tmp_path: Path, own: dict[str, Path], text_file: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    ran(
        "compress",
        own["gpt2"],
        "SparseGPT",
        "RTN",
        "--set",
        "RTN.group_size=32",
        "--calibration",
        text_file,
        *FIRST,
        "--dtype",
        "float32",
        "--out",
        out,
    )
    assert "Conv1D" in refused(OptionError, "export", out, "--format", "compressed-tensors", "--out", plain)
    said = ran("export", out, "--format", "dense", "--out", plain)
    logits = logits_without_refimpl(said, plain, tmp_path)
    torch.testing.assert_close(logits, load(out)(torch.arange(20)[None]).logits, atol=1e-5, rtol=1e-4)
    assert "perplexity" in ran("evaluate", plain, "--on", text_file, *FIRST)


def test_a_gguf_holds_the_tokenizer_and_says_what_it_changed(
    tmp_path: Path, own: dict[str, Path], text_file: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    out, file = tmp_path / "out", tmp_path / "model.gguf"
    common = ("--calibration", text_file, *FIRST, "--dtype", "float32", "--out", out)
    ran("compress", own["qwen3"], "RTN", "--set", "bits=4", "--set", "group_size=32", *common)
    assert re.search(r"gguf +yes", ran("export", out))
    said = ran("export", out, "--format", "gguf", "--out", file)
    assert f"Saved: {file}: " in said and "21 Q4_1" in said and f"llama-cli -m {file}" in said
    fields = gguf.GGUFReader(str(file)).fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 1024
    assert "ends in .gguf" in refused(OptionError, "export", out, "--format", "gguf", "--out", tmp_path / "model")
    (out / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(OptionError, "export", out, "--format", "gguf", "--out", file)


def test_export_refuses_calls_that_cannot_work(tmp_path: Path, own: dict[str, Path]) -> None:
    out = tmp_path / "out"
    assert "--out" in refused(OptionError, "export", own["gpt2"], "--format", "dense")
    assert "--base" in refused(OptionError, "export", own["gpt2"], "--format", "peft", "--out", out)
    for option in (["--adapter", str(out)], ["--symmetric"], ["--base", "x"]):
        assert option[0] in refused(OptionError, "export", own["gpt2"], *option)
    assert "not written by refimpl" in refused(
        CheckpointError, "export", own["gpt2"], "--format", "dense", "--out", out
    )
    assert run("export", own["gpt2"], "--format", "onnx", "--out", out).exit_code == 2


# -- kernels --


def test_kernels_audit_prints_a_table_and_names_unknown_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from refimpl.kernels import audit

    assert "did you mean 'sparse_matvec'" in refused(OptionError, "kernels", "audit", "sparse_matve")
    found = audit.launches("sparse_matvec")
    monkeypatch.setattr(audit, "launches", lambda kernel: dict(list(found.items())[:1]))
    shown = run("kernels", "audit", "sparse_matvec", "--out", tmp_path / "audit.json")
    assert next(iter(found)) in shown.stdout and "sm_80" in shown.stdout
    rows = json.loads((tmp_path / "audit.json").read_text())["rows"]
    assert shown.exit_code == (1 if any(row["spills"] for row in rows) else 0)


def test_kernels_bench_says_that_it_needs_a_gpu_and_shows_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from refimpl.kernels import bench

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in refused(RefimplError, "kernels", "bench")
    assert "did you mean 'sparse_matvec'" in refused(OptionError, "kernels", "bench", "sparse_matve")
    times = {"kernel": 0.0125, "torch": 0.1, "torch.compile": 0.05, "dense": 0.04}
    asked: list[Any] = []
    row = bench.Row("sparse_matvec", "demo", 0.010, times, 0.0)
    monkeypatch.setattr(bench, "run", lambda names, out: asked.append((names, out)) or [row])
    assert "80 %" in ran("kernels", "bench", "sparse_matvec", "--out", tmp_path / "b.json")
    assert asked == [(["sparse_matvec"], tmp_path / "b.json")]
