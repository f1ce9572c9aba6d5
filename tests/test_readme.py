"""The README's code runs, word for word, on the first block of the real model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from refimpl.continual.continual_pretraining import next_token_loss
from refimpl.core.layers import PackedLinear
from refimpl.lab.models import small

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf8")


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refimpl.lab import models
    from refimpl.lab.data import text

    code, exports, caches, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    calibration = text.calibration
    monkeypatch.setattr(models, "load", lambda name: (models.smollm2(layers=1), models.tokenizer()))
    monkeypatch.setattr(
        text, "calibration", lambda *args, **options: calibration(*args, **options, sequences=4, length=256)
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "smaller" / "config.json").is_file()
    ids = names["tokens"].ids[:1, :8]
    assert names["model"](ids).logits.isfinite().all()
    exec(exports, names)
    whole, packed = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("whole", "packed"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("plain"), "repair")
    reference = names["model"](ids).logits.float()
    for exported in (whole, adapted):
        assert torch.allclose(exported(ids).logits.float(), reference, atol=0.05 * reference.abs().max().item())
    assert torch.equal(packed(ids).logits, names["quantised"](ids).logits)
    (tmp_path / "document.txt").write_text(text.documents("wikipedia", "test")[0].text[:4000])
    exec(caches, names)
    assert names["answer"].shape[1] > names["document"].shape[1] + names["question"].shape[1]
    assert names["cache"].compressed_nbytes < 0.35 * names["document"].numel() * 2 * 192 * 2


def test_welcome_page_shows_the_same_code() -> None:
    welcome = (Path(__file__).resolve().parent.parent / "book" / "welcome.md").read_text(encoding="utf8")
    code, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert code in welcome


def test_readme_training_runs() -> None:
    """In fewer steps, which is all that differs."""
    *_, code, data = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(code.replace("steps=700", "steps=20").replace("start=70, frequency=35", "start=2, frequency=1"), names)
    packed = [layer for layer in names["model"].modules() if isinstance(layer, PackedLinear)]
    left = sum(layer.nonzeros for layer in packed) / sum(layer.in_features * layer.out_features for layer in packed)
    assert len(packed) == 10 and left == pytest.approx(0.1, abs=0.001)
    before = small.load("llama-small")
    exec(data.replace("rounds=40", "rounds=3").replace("steps=100", "steps=20"), names)
    rows = names["new"][-64:]
    assert next_token_loss(names["language_model"], rows) < next_token_loss(before, rows) - 0.1


def test_commands_of_the_readme_exist() -> None:
    from typer.main import get_command

    from refimpl.cli import app

    for name in re.findall(r"^refimpl (\w+)", README, flags=re.M):
        assert name in get_command(app).commands
