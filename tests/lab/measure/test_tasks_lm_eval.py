"""The exported tasks give the same scores in EleutherAI's lm-eval, item by item."""

from __future__ import annotations

import json

import pytest
import torch

from refimpl.core.errors import OptionError
from refimpl.lab import models
from refimpl.lab.measure import tasks
from refimpl.lab.models import small

KINDS = ("restricted", "free")


def test_choices_hide_the_answers_place(tmp_path):
    tasks.export_lm_eval(tmp_path, ["cloze"])
    lines = [json.loads(line) for line in (tmp_path / "cloze.json").read_text().splitlines()]
    assert len(lines) == len(tasks.items("cloze"))
    places = [line["gold"] for line in lines]
    assert all(0.15 < places.count(k) / len(places) < 0.35 for k in range(4))
    assert all(line["choices"][line["gold"]] == line["answer"] for line in lines)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OptionError, match="is a file; name a folder"):
        tasks.export_lm_eval(tmp_path / "taken", ["cloze"])


@pytest.fixture(scope="module")
def harness():
    """lm-eval without a network; its imports take several seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        pytest.importorskip("lm_eval")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        def run(model, tokenizer, folder, names):
            return simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
                tasks=names,
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                log_samples=True,
                bootstrap_iters=0,
            )

        yield run


@pytest.mark.parametrize("name", ["llama-small", "smollm2"])
def test_lm_eval_gives_equal_scores(name, harness, tmp_path, request):
    if name == "smollm2":
        request.getfixturevalue("smollm2_folder")
        model, tokenizer, longest = models.smollm2(torch.float32, layers=2), models.tokenizer(), 160
    else:
        # What is longer than the model reads is cut a little differently, see export_lm_eval.
        model, tokenizer, longest = small.load("llama-small"), small.tokenizer(), 240
    chosen = {
        task: [item for item in tasks.items(task) if len(tokenizer.encode(item.prompt)) < longest][:3]
        for task in tasks.TASKS
    }
    chosen = {task: found for task, found in chosen.items() if found}
    assert len(chosen) >= 5
    names = tasks.export_lm_eval(tmp_path, chosen)
    theirs = harness(model, tokenizer, tmp_path, names)
    ours = tasks.score(model, tokenizer, chosen, progress=False)
    for task, scores in ours.scores.items():
        for kind in KINDS:
            samples = theirs["samples"][f"refimpl_{task}_{kind}"]
            place = {id: k for k, id in enumerate(scores.ids)}
            assert {sample["doc"]["id"] for sample in samples} == set(scores.ids)
            for sample in samples:
                k = place[sample["doc"]["id"]]
                assert sample["acc"] == getattr(scores, kind)[k]
                answer = sample["doc"]["gold"] if kind == "restricted" else 0
                loglik = float(sample["filtered_resps"][answer][0])
                assert loglik == pytest.approx(scores.loglik[k], abs=1e-3)
            mean = theirs["results"][f"refimpl_{task}_{kind}"]["acc,none"]
            assert mean == pytest.approx(ours.mean(task, kind))
