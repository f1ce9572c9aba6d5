"""Score cards: intervals, tables, records, the dense model's card from the cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from refimpl.core.errors import OptionError
from refimpl.lab.measure import tasks
from refimpl.lab.measure.statistics import difference, paired_bootstrap
from refimpl.lab.measure.tasks import Scores, card
from refimpl.lab.models import small
from refimpl.lab.study.claims import Place
from refimpl.lab.study.records import Results
from refimpl.lab.study.study import Job, records


def scores(free, ids=None, chance=0.25):
    free = np.asarray(free, dtype=float)
    ids = ids or [f"t/{k}" for k in range(len(free))]
    return Scores(ids, free, np.maximum(free, 0.5), -1 - free, np.full(len(free), chance))


def make(free, ids=None):
    return tasks.ScoreCard({"mine": scores(free, ids)})


def test_score_takes_the_card_or_everything():
    llama = small.load("llama-small"), small.tokenizer()
    found = tasks.score(*llama, ["copying", "cloze"], progress=False)
    assert list(found.scores) == ["copying", "cloze"] and found.seconds > 0
    assert found.scores["cloze"].ids == [item.id for item in tasks.items("cloze", "card")]
    full = tasks.score(*llama, ["copying"], size="full", progress=False)
    assert full.scores["copying"].ids == [item.id for item in tasks.items("copying")]
    # The card is a part of the whole, so what was scored is the same.
    part = full.on(found, "copying").scores["copying"]
    np.testing.assert_allclose(part.loglik, found.scores["copying"].loglik, atol=1e-3)


def test_score_refuses_a_bare_string():
    with pytest.raises(OptionError, match=r"give a list: \['cloze'\]"):
        tasks.score(small.load("llama-small"), small.tokenizer(), "cloze")


def test_interval_of_a_difference_is_paired():
    rng = np.random.default_rng(0)
    dense = (rng.random(200) < 0.6).astype(float)
    worse = dense.copy()
    worse[np.flatnonzero(dense)[:20]] = 0
    gap = make(worse).interval("mine", "free", make(dense))
    assert gap == paired_bootstrap(worse, dense, statistic=difference)
    assert gap.estimate == pytest.approx(-0.1) and gap.high < 0
    alone = make(worse).interval("mine", "free")
    assert alone.high - alone.low > gap.high - gap.low


def test_items_about_one_text_are_resampled_together():
    free = [1, 1, 1, 1, 0, 0, 0, 0] * 5
    apart, together = [f"t/{k}" for k in range(40)], [f"t/{k // 4}#{k}" for k in range(40)]
    wide, narrow = (make(free, ids).interval("mine", "free") for ids in (together, apart))
    assert wide.n == 10 and narrow.n == 40
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_reference_may_have_more_items_but_not_fewer():
    dense, part = make([1, 0, 1, 1]), make([0, 0], ["t/2", "t/1"])
    gap = part.interval("mine", "free", dense)
    assert gap.estimate == -0.5
    with pytest.raises(OptionError, match="'t/0' for one; score both on the same items"):
        dense.interval("mine", "free", part)


def test_unknown_task_and_metric():
    with pytest.raises(OptionError, match="task='mime' is not on this card.*did you mean 'mine'"):
        make([1, 0]).mean("mime", "free")
    with pytest.raises(OptionError, match="metric='fre' must be one of"):
        make([1, 0]).mean("mine", "fre")


def test_table_alone_and_beside_the_ceiling():
    plain = make([1, 0, 1, 0]).table().splitlines()
    assert plain[0] == "| task | items | free | 95 % | restricted | 95 % | chance |"
    assert plain[2].startswith("| mine | 4 | 50.0 | ") and plain[2].endswith(" | 75.0 | 50.0 to 100.0 | 25.0 |")
    beside = make([0, 0, 1, 0]).table(make([1, 0, 1, 0])).splitlines()
    assert beside[0].count("dense") == 2 and {line.count("|") for line in beside} == {10}
    cells = [cell.strip() for cell in beside[2].split("|")]
    assert cells[1:5] == ["mine", "4", "25.0", "50.0"] and cells[5].startswith("-25.0 (")


def test_table_by_topic():
    found = make([1, 1, 0, 0], ["a/1", "a/2", "b/1", "b/2"])
    lines = found.table(topics=True).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| mine", "| mine: a", "| mine: b"]
    assert "100.0" in lines[3] and lines[4].startswith("| mine: b | 2 | 0.0")
    assert len(make([1, 0]).table(topics=True).splitlines()) == 3  # one topic is no news


def test_records_keep_a_card(tmp_path):
    results = Results(tmp_path / "r.json", {"format": 2, "paper": "demo", "functions": [], "stamps": []})
    given = tasks.ScoreCard(
        {"cloze": scores([1, 0, 1]), "own": scores([0, 0], ["a/1", "b/1"], chance=0.125)}, seconds=3.0
    )
    for arm, seed, bits in (("dense", 0, 16), ("small", 2, 4.5)):
        job = Job("", Place(arm), seed, "study")
        results.add(*records(job, tasks.score_rows(given, bits), "demo"))
    results.save()
    back = Results.load(tmp_path / "r.json")
    assert back.has("dense", "task cloze") and back.cost("small", "task own", 2, metric="free") == 4.5
    for arm, seed in (("dense", 0), ("small", 2)):
        found = tasks.card_from(back, arm, seed)
        assert list(found.scores) == ["cloze", "own"]
        for task, mine in found.scores.items():
            for name in (*card.METRICS, "chance"):
                np.testing.assert_allclose(getattr(mine, name), getattr(given.scores[task], name), rtol=1e-5)
            assert mine.ids == given.scores[task].ids
    with pytest.raises(OptionError, match="no task scores of arm 'none'"):
        tasks.card_from(back, "none")


def test_ceiling_is_scored_once(monkeypatch):
    first = tasks.ceiling("llama-small", ["copying"], dtype=torch.float32, progress=False)
    monkeypatch.setattr(card, "score_items", lambda *_: pytest.fail("scored again"))
    again = tasks.ceiling("llama-small", ["copying"], dtype=torch.float32, progress=False)
    for name in (*card.METRICS, "chance", "ids"):
        np.testing.assert_array_equal(getattr(first.scores["copying"], name), getattr(again.scores["copying"], name))


@pytest.mark.parametrize("change", ["weights", "code", "items", "dtype"])
def test_ceiling_notices_a_change(monkeypatch, tmp_path, change):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    model = small.load("llama-small")
    model.save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    calls = []
    monkeypatch.setattr(card, "score_items", lambda *_: calls.append(1) or scores([1, 0]))
    monkeypatch.setattr(card, "items", lambda task, size: tasks.items("copying", "card")[:2])
    dtype = torch.float32
    for _ in range(2):
        tasks.ceiling(folder, ["copying"], dtype=dtype)
    assert len(calls) == 1
    if change == "weights":
        with torch.no_grad():
            model.model.norm.weight[0] += 1
        model.save_pretrained(folder)
    elif change == "code":
        monkeypatch.setattr(card, "module_hash", lambda name: "other")
    elif change == "items":
        monkeypatch.setattr(card, "items", lambda task, size: tasks.items("copying", "card")[:3])
    else:
        dtype = torch.bfloat16
    tasks.ceiling(folder, ["copying"], dtype=dtype)
    assert len(calls) == 2


def test_ceiling_needs_a_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    small.load("llama-small").save_pretrained(tmp_path / "model")
    with pytest.raises(OptionError, match="has no tokenizer"):
        tasks.ceiling(tmp_path / "model", ["copying"], dtype=torch.float32)


def test_cached_cards_are_json(monkeypatch, tmp_path):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    tasks.ceiling("llama-small", ["copying"], dtype=torch.float32, progress=False)
    (file,) = (tmp_path / "scores").iterdir()
    assert set(json.loads(file.read_text())) == {"ids", "free", "restricted", "loglik", "chance"}


def test_a_compressed_model_scores_like_its_weights():
    from refimpl import RTN, compress
    from refimpl.core.compress.sites import find_sites

    found = {"few": tasks.items("copying", "card")[:8]}
    dense, packed, plain = (small.load("llama-small") for _ in range(3))
    compress(packed, RTN(3, 32), torch.randint(0, 1024, (2, 16)), progress=False)
    layers = {site.name: site.module for site in find_sites(packed)}
    with torch.no_grad():
        for site in find_sites(plain):
            site.module.weight.copy_(layers[site.name].to_dense())
    of_packed, of_plain, of_dense = (
        tasks.score(model, small.tokenizer(), found, progress=False).scores["few"].loglik
        for model in (packed, plain, dense)
    )
    np.testing.assert_allclose(of_packed, of_plain, atol=1e-3)
    assert np.abs(of_dense - of_plain).max() > 0.01
