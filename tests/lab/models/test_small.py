"""The shipped models: all load, their cards say what is measured, and their training had ended."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.files import io
from refimpl.lab import models
from refimpl.lab.data import text
from refimpl.lab.data.windows import windows as cut
from refimpl.lab.measure.bits import bits_per_byte
from refimpl.lab.models import small

ROOT = Path(__file__).resolve().parents[3]
LLAMAS = ("llama-small", "llama-medium", "llama-large")
LANGUAGE = (*LLAMAS, "lstm")
# Most that the validation loss may still fall in the last part of a run, as a share of itself.
FLAT = {"third": 0.03, "tenth": 0.005}


_CUT = {}


def windows(corpus, split, length, tokenizer=None, **more):
    """Windows, cut once for each split and tokenizer: turning the articles into tokens takes longest here."""
    key = (corpus, split, length, tokenizer and tokenizer.backend_tokenizer.to_str(), *more.items())
    if key not in _CUT:
        _CUT[key] = cut(corpus, split, length, tokenizer, **more)
    return _CUT[key]


def measured(name, split):
    """Loss in nats of a symbol and bits per byte, from the card."""
    card = (small.path(name) / "README.md").read_text(encoding="utf8")
    (found,) = re.findall(rf"^\| {split} \| \d+ \| ([\d.]+) \| ([\d.]+) \|$", card, flags=re.M)
    return tuple(map(float, found))


def script():
    spec = importlib.util.spec_from_file_location("train", ROOT / "scripts" / "train_language_models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- what is shipped ---


def test_language_models_are_there():
    assert set(LANGUAGE) <= set(small.names())


@pytest.mark.parametrize("name", small.names())
def test_every_model_loads_whole(name):
    model = small.load(name)
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    card = (small.path(name) / "README.md").read_text(encoding="utf8")
    (stated,) = re.findall(r"^- Parameters: ([\d,]*\d)", card, flags=re.M)
    assert sum(parameter.numel() for parameter in model.parameters()) == int(stated.replace(",", ""))
    stored = load_file(small.path(name) / "model.safetensors")
    state = model.state_dict()
    for key, tensor in stored.items():
        # transformers may store a weight under an older name than the module's
        candidates = [state[key]] if key in state else [t for t in state.values() if t.shape == tensor.shape]
        assert any(torch.equal(t, tensor.to(t.dtype)) for t in candidates), key


@pytest.mark.parametrize("name", LANGUAGE)
def test_weights_are_bf16(name):
    with safe_open(small.path(name) / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}


def test_all_models_together_are_small():
    size = sum(file.stat().st_size for file in io.data_path("models").rglob("*") if file.is_file())
    assert size < 10e6


def test_no_pickles():
    allowed = {".json", ".safetensors", ".md"}
    assert {file.suffix for file in io.data_path("models").rglob("*") if file.is_file()} <= allowed


def test_table_agrees_with_the_cards():
    table = (io.data_path("models") / "README.md").read_text(encoding="utf8")
    for name in small.names():
        assert f"| [{name}]({name}/README.md) |" in table
    for name in LANGUAGE:
        assert f"| {measured(name, 'test')[1]:.4f} | bits per byte | CC BY-SA 4.0 |" in table


@pytest.mark.parametrize("name", LANGUAGE)
def test_card_says_what_it_must(name):
    card = (small.path(name) / "README.md").read_text(encoding="utf8")
    for needed in ("Wikipedia", "CC BY-SA", f"train_language_models.py {name}`", "minutes", "## Not for"):
        assert needed in card
    assert card.count("\n## ") == 4


# --- how they were trained ---


@pytest.mark.parametrize("name", LANGUAGE)
def test_training_had_flattened(name):
    """The validation loss falls by less than 3 % of itself over the last third of the run and by less than 0.5 % over
    the last tenth, and does not rise again; over the first third it fell by more than twenty times as much."""
    curve = json.loads((small.path(name) / "curve.json").read_text())
    steps = [entry["step"] for entry in curve]
    loss = [entry["validation_loss"] for entry in curve]
    assert steps == sorted(set(steps)) and all("train_loss" in entry for entry in curve[1:])

    def at(share):
        return min(zip(steps, loss, strict=True), key=lambda pair: abs(pair[0] - share * steps[-1]))[1]

    assert at(2 / 3) - loss[-1] < FLAT["third"] * loss[-1]
    assert at(9 / 10) - loss[-1] < FLAT["tenth"] * loss[-1]
    assert loss[-1] < 1.005 * min(loss)
    assert loss[0] - at(1 / 3) > 20 * (at(2 / 3) - loss[-1])


def test_larger_is_better_as_far_as_the_text_goes():
    """0.9 MB of text are soon read: the largest is level with the medium one, and both are ahead of the small one."""
    sizes = [sum(p.numel() for p in small.load(name).parameters()) for name in LLAMAS]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] / 3 and sizes[1] < sizes[2] / 2
    for split in ("validation", "test"):
        small_bits, medium, large = (measured(name, split)[1] for name in LLAMAS)
        assert max(medium, large) < small_bits - 0.05
        assert large < medium + 0.01


@pytest.mark.parametrize("name", LANGUAGE)
def test_bits_per_byte_of_the_card(name):
    """A sample of test windows, measured again, is near the card's number of the whole split. Two standard errors
    of a sample of this size are about 0.05 bits; a wrong split, rounding or window would show as more."""
    tokenizer = None if name == "lstm" else small.tokenizer()
    ids, units = windows("wikipedia", "test", 256, tokenizer)
    every = len(ids) // 48
    result = bits_per_byte(small.load(name), ids[::every], units[::every], tokenizer)
    assert len(result.units) > 25
    assert result.value == pytest.approx(measured(name, "test")[1], abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-small", "lstm"])
def test_bits_per_byte_of_the_whole_test_split(name):
    tokenizer = None if name == "lstm" else small.tokenizer()
    ids, units = windows("wikipedia", "test", 256, tokenizer)
    result = bits_per_byte(small.load(name), ids, units, tokenizer)
    assert result.value == pytest.approx(measured(name, "test")[1], abs=1e-3)


def test_context_is_used():
    """Late positions of a window cost fewer bits than early ones: the models read what is before."""
    for name in LANGUAGE:
        tokenizer = None if name == "lstm" else small.tokenizer()
        ids, _ = windows("wikipedia", "test", 256, tokenizer)
        ids = ids[:: len(ids) // 48]
        model = small.load(name)
        with torch.no_grad():
            output = model(ids[:, :-1])
        logits = output if name == "lstm" else output.logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        assert losses[:, 128:].mean() < losses[:, :8].mean() - 0.1, name


def test_large_llama_writes_words_of_the_language():
    """Greedy text of the best model: nearly all words occur in the articles it learned from."""
    tokenizer, model = small.tokenizer(), small.load("llama-large")
    prompt = tokenizer("The history of the city", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    words = re.findall(r"[a-z]+", tokenizer.decode(out[0]))[:-1]
    known = {
        word for document in text.documents("wikipedia", "calibration") for word in re.findall(r"[a-z]+", document.text)
    }
    assert len(words) > 10 and sum(word in known for word in words) > 0.8 * len(words)


# --- the tokenizer ---


def test_tokenizer_is_the_same_for_all_llamas():
    files = [(small.path(name) / "tokenizer.json").read_bytes() for name in LLAMAS]
    assert files[0] == files[1] == files[2]


def test_tokenizer_comes_from_the_calibration_split_alone():
    """Trained again from that split it has the same tokens and merges."""
    again = json.loads(script().train_tokenizer().backend_tokenizer.to_str())
    shipped = json.loads((small.path("llama-small") / "tokenizer.json").read_text(encoding="utf8"))
    assert again["model"]["vocab"] == shipped["model"]["vocab"]
    assert again["model"]["merges"] == shipped["model"]["merges"]


def test_tokenizer_loses_nothing():
    tokenizer = small.tokenizer()
    assert len(tokenizer) == 1024
    for sample in ("naïve 日本 \x00\x01 ﷽", "a  b\n\n\tc", "1723 <|endoftext|>"):
        ids = tokenizer(sample, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == sample
        assert tokenizer.eos_token_id not in ids
    texts = [document.text for document in text.documents("news", "test")[:20]]
    for sample, ids in zip(texts, tokenizer(texts, verbose=False).input_ids, strict=True):
        assert tokenizer.decode(ids) == sample


def test_tokenizer_works_with_the_text_corpora():
    tokens = text.calibration("wikipedia", small.tokenizer(), sequences=4, length=128)
    assert tokens.ids.max() < 1024 and tokens.ids.shape == (4, 128)


# --- loading ---


def test_unknown_name():
    with pytest.raises(OptionError, match="did you mean 'llama-large'"):
        small.load("llama_large")


def test_models_load_knows_the_shipped_llamas():
    model, tokenizer = models.load("llama-medium", dtype=torch.float32)
    plain = small.load("llama-medium")
    ids = tokenizer("The river", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert models.folder("llama-medium") == small.path("llama-medium")


def test_models_load_points_to_the_right_loader():
    with pytest.raises(OptionError, match=r"'lstm' is no causal .*small\.load\('lstm'\)"):
        models.load("lstm")


def test_folder_comes_before_a_shipped_name(tiny_llama, tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "llama-small")
    monkeypatch.chdir(tmp_path)
    assert models.load("llama-small", dtype=torch.float32)[0].config.hidden_size == 64
    assert models.load("llama-small", dtype=torch.float32)[1] is None


@pytest.fixture()
def copied(tmp_path, monkeypatch):
    """Two shipped models in a folder that may be damaged, in the place where a wheel has them."""
    for name in ("lstm", "llama-small"):
        shutil.copytree(small.path(name), tmp_path / "models" / name)
    monkeypatch.setattr(small, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    return tmp_path / "models"


def test_only_whole_folders_are_models(copied):
    (copied / "empty").mkdir()
    shutil.copytree(copied / "lstm", copied / ".lstm.staging")
    (copied / "README.md").write_text("table")
    assert small.names() == ["llama-small", "lstm"]
    (copied / "lstm" / "model.safetensors").unlink()
    assert small.names() == ["llama-small"]


@pytest.mark.parametrize("name", ["lstm", "llama-small"])
def test_damaged_models(name, copied):
    file = copied / name / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        small.load(name)
    file.write_bytes(whole)
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded|lacks the weight"):
        small.load(name)
    file.write_bytes(whole)
    config = json.loads((copied / name / "config.json").read_text())
    for wrong, message in (("NoSuchModel", "has no NoSuchModel"), (None, "names no architecture")):
        config["architectures"] = [wrong] if wrong else []
        (copied / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            small.load(name)


# --- the script ---


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        script().main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(name in said for name in LANGUAGE)


@pytest.mark.parametrize("name", LANGUAGE)
def test_script_builds_what_is_shipped(name):
    """The plan in the script has the shape of the shipped weights."""
    train = script()
    state = train.build(train.PLANS[name]).state_dict()
    stored = load_file(small.path(name) / "model.safetensors")
    assert set(state) - set(stored) <= {"lm_head.weight"}
    assert all(state[key].shape == tensor.shape for key, tensor in stored.items())


@pytest.mark.parametrize("name", ["llama-small", "lstm"])
def test_script_trains_and_resumes(name, tmp_path, monkeypatch):
    """A few steps on real text write a folder that loads; the same call again trains nothing and writes it again."""
    train = script()
    plan = train.PLANS[name]
    plan = dataclasses.replace(
        plan, recipe=dataclasses.replace(plan.recipe, steps=6, warmup=1), validation_windows=8, evaluate_every=3
    )

    def few(*arguments, **options):
        ids, units = windows(*arguments, **options)
        every = max(1, len(ids) // 64)
        return ids[::every], units[::every]

    monkeypatch.setattr(train, "windows", few)
    folder = train.run(name, plan, tmp_path / "out", tmp_path / "runs")
    first = load_file(folder / "model.safetensors")
    curve = json.loads((folder / "curve.json").read_text())
    assert [entry["step"] for entry in curve] == [0, 3, 6]
    assert curve[-1]["validation_loss"] < curve[0]["validation_loss"] - 0.1
    monkeypatch.setattr(small, "data_path", lambda *parts: tmp_path.joinpath("out", *parts[1:]))
    assert small.names() == [name]
    assert not small.load(name).training
    monkeypatch.setattr(torch.Tensor, "backward", lambda *arguments, **options: pytest.fail("trained again"))
    train.run(name, plan, tmp_path / "out", tmp_path / "runs")
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
