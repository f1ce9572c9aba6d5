"""The study's rules say what their words say, its arms get the same, and the run runs and resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.core.errors import CalibrationError
from refimpl.core.files.io import data_path
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.losses import sequence_losses
from refimpl.lab.data.domains import llama, windows
from refimpl.lab.study.claims import Outcome, Verdict, judge
from refimpl.lab.study.records import Record, Results
from refimpl.studies import loss_reweighting as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 0.001 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])


@pytest.fixture
def results() -> Results:
    return Results("loss_reweighting.json", {"paper": study.SLUG})


def put(results: Results, longer: bool = False, **arms: float) -> None:
    """Bits per byte of arms; seeds scatter a little, every arm in a way of its own. Underscores are spaces."""
    text = study.at(study.TEXT, longer)
    for name, value in arms.items():
        arm = {"twice": study.TWICE, "softmax": "soft-max of losses"}.get(name, name.replace("_", " "))
        for seed, change in zip(study.SEEDS, np.roll(SPREAD, len(arm)), strict=True):
            results.add(Record(study.SLUG, arm, text, seed, "", "bits per byte", value + float(change)))


def rule(results: Results, identity: str) -> Outcome:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results)


@pytest.mark.parametrize("arm", ["linupper", "quadratic"])
@pytest.mark.parametrize(
    ("plain", "twice", "verdict"),
    [(2.1, 2.2, HOLDS), (2.1, 1.9, PARTLY), (1.9, 2.1, PARTLY), (2.0, 2.0, NOT), (1.9, 1.8, NOT)],
)
def test_better_than_the_plain_mean(results, arm, plain, twice, verdict):
    put(results, **{arm: 2.0}, uniform=plain, twice=twice)
    outcome = rule(results, f"rw-{arm}")
    assert outcome.verdict is verdict
    assert outcome.estimate == pytest.approx(2.0 / min(plain, twice), rel=0.01)  # the least favourable is shown


@pytest.mark.parametrize(("shuffled", "thinned", "verdict"), [(2.1, 2.1, HOLDS), (2.1, 2.0, PARTLY), (2.0, 1.9, NOT)])
def test_the_signal(results, shuffled, thinned, verdict):
    put(results, linupper=2.0, linupper_shuffled=shuffled, smaller_batch=thinned)
    assert rule(results, "rw-signal").verdict is verdict


@pytest.mark.parametrize(
    ("others", "verdict"), [((2.1, 2.1, 2.1), HOLDS), ((2.1, 2.0, 1.9), PARTLY), ((2.0, 1.9, 1.9), NOT)]
)
def test_the_cap(results, others, verdict):
    put(results, linupper=2.0, upper=others[0], focal=others[1], softmax=others[2])
    assert rule(results, "rw-capped").verdict is verdict


@pytest.mark.parametrize(("linupper", "quadratic", "verdict"), [(1.9, 1.9, HOLDS), (1.9, 2.1, PARTLY), (2.0, 2.0, NOT)])
def test_low_losses(results, linupper, quadratic, verdict):
    put(results, linupper=linupper, quadratic=quadratic, extremes=2.0)
    assert rule(results, "rw-low-losses").verdict is verdict


@pytest.mark.parametrize(("share", "verdict"), [(1.0, HOLDS), (0.97, HOLDS), (0.8, PARTLY), (0.3, NOT), (0.0, NOT)])
def test_the_bound(results, share, verdict):
    for seed, change in zip(study.SEEDS, SPREAD * (0 < share < 1), strict=True):
        results.add(Record(study.SLUG, "linupper", study.TRAINING, seed, "", "share within 2", share + float(change)))
    assert rule(results, "rw-bound").verdict is verdict


def put_toy(results: Results, outliers: float, **arms: float) -> None:
    names = {"twice": "uniform, twice the step", "matched": "uniform, matched norm"}
    for name, value in arms.items():
        arm = names.get(name, name)
        place = study._place(outliers, None if arm.startswith("uniform") else study.R)
        for draw in range(20):
            noise = 1 + 0.02 * np.sin(draw + len(arm))
            results.add(Record(study.SLUG, arm, place, 0, str(draw), "distance", value * float(noise)))


@pytest.mark.parametrize(("controls", "verdict"), [((20, 12, 9), HOLDS), ((20, 12, 6), PARTLY), ((7, 6, 6), NOT)])
def test_the_toy(results, controls, verdict):
    put_toy(results, 0.0, linupper=8, uniform=controls[0], twice=controls[1], matched=controls[2])
    assert rule(results, "rw-toy").verdict is verdict


@pytest.mark.parametrize(("quadratic", "uniform", "verdict"), [(9, 12, HOLDS), (7, 12, PARTLY), (7, 6, NOT)])
def test_the_order(results, quadratic, uniform, verdict):
    put_toy(results, 0.0, linupper=8, quadratic=quadratic, uniform=uniform)
    assert rule(results, "rw-toy-order").verdict is verdict


@pytest.mark.parametrize(("few", "many", "verdict"), [(9, 9, HOLDS), (9, 7, PARTLY), (7, 7, NOT)])
def test_outliers(results, few, many, verdict):
    put_toy(results, 0.02, linupper=8, uniform=few)
    put_toy(results, 0.1, linupper=8, uniform=many)
    assert rule(results, "rw-outliers").verdict is verdict


LOWER, HIGHER = study.FINER


def put_validation(results: Results, *scores: float, arm: str = "uniform", longer: bool = False) -> None:
    """Of an arm at the three rates of the grid and the extra ones."""
    place = study.at(study.VALIDATION, longer)
    for lr, score in zip((*study.RATES, *study.EXTRA[longer]), scores, strict=True):
        name = f"{arm} at {lr:g}"
        results.add(Record(study.SLUG, name, place, study.TUNING_SEED, "", "bits per byte", score))


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ((2.3, 2.0, 2.2, 2.1, 2.1), "uniform"),
        ((2.3, 2.0, 2.2, 1.9, 2.1), LOWER),
        ((2.3, 2.0, 2.2, 1.9, 1.8), HIGHER),
        ((1.7, 2.0, 2.2, 1.9, 1.8), "uniform"),  # its own rate is then the first
    ],
)
def test_the_finer_rates(results, scores, chosen):
    put_validation(results, *scores)
    assert study.finest(results) == chosen
    for linupper, quadratic, verdict in ((1.9, 1.9, HOLDS), (2.1, 1.9, PARTLY), (1.9, 2.0, PARTLY), (2.0, 2.1, NOT)):
        found = Results("", results.header)
        found.add(*results.records())
        put(found, linupper=linupper, quadratic=quadratic)
        put(found, **{arm: 2.0 if arm == chosen else 9.0 for arm in ("uniform", *study.FINER)})
        assert rule(found, "rw-finer").verdict is verdict


@pytest.mark.parametrize(
    ("linupper", "quadratic", "verdict"), [(1.9, 1.9, HOLDS), (2.1, 1.9, PARTLY), (1.9, 2.0, PARTLY), (2.0, 2.1, NOT)]
)
def test_the_longer_run(results, linupper, quadratic, verdict):
    put(results, uniform=1.0, linupper=9.0, quadratic=9.0)  # the short run has no say
    put(results, longer=True, uniform=2.0, linupper=linupper, quadratic=quadratic)
    assert rule(results, "rw-longer").verdict is verdict


@pytest.mark.parametrize(
    ("linupper", "quadratic", "verdict"), [(1.9, 1.9, HOLDS), (2.1, 1.9, PARTLY), (1.9, 2.0, PARTLY), (2.0, 2.1, NOT)]
)
def test_the_wider_grid(results, linupper, quadratic, verdict):
    put_validation(results, 3, 2, 2, 2, 1, 4, arm="uniform", longer=True)
    put_validation(results, 3, 2, 2, 2, 3, 1, arm="linupper", longer=True)
    put_validation(results, 3, 2, 1, 2, 3, 4, arm="quadratic", longer=True)
    assert study.finest(results, "quadratic", longer=True) == "quadratic"
    put(results, longer=True, uniform=9.0, linupper=9.0, quadratic=quadratic)  # the first two have better rates
    put(results, longer=True, **{"uniform, rate 0.011": 2.0, "linupper, rate 0.016": linupper})
    assert rule(results, "rw-wider").verdict is verdict


def test_rates_are_chosen_on_validation_text_and_only_from_the_grid(results, monkeypatch):
    jobs = []

    def fake(job):
        jobs.append(job)
        best = 1.1e-2 if job.longer and job.arm != "linupper" else 8e-3 if job.arm == "quadratic" else 4e-3
        value = 2 + abs(float(np.log(job.lr / best)))
        return [Record(study.SLUG, job.arm, job.at(study.TEXT), job.seed, "", "bits per byte", value)]

    monkeypatch.setattr(study, "in_processes", lambda run, todo: ((job, fake(job)) for job in todo))
    monkeypatch.setattr(results, "save", lambda: None)
    rates = study._tune(results, study.SIZES["study"])
    assert rates == {
        **{(arm, False): 8e-3 if arm == "quadratic" else 4e-3 for arm in study.ARMS},
        **{(arm, True): 4e-3 if arm == "linupper" else 8e-3 for arm in study.LONG},
        ("uniform, rate 0.011", True): 1.1e-2,
        ("quadratic, rate 0.011", True): 1.1e-2,
    }
    assert {(job.seed, job.split) for job in jobs} == {(study.TUNING_SEED, "validation")}
    for longer, count in ((False, 5), (True, 6)):
        tried = {arm: len([j for j in jobs if j.arm == arm and j.longer == longer]) for arm in study.ARMS}
        assert tried == {arm: count if arm in study.LONG else 0 if longer else 3 for arm in study.ARMS}
    before = len(jobs)
    assert study._tune(results, study.SIZES["study"]) == rates and len(jobs) == before
    assert study.rule_for("quadratic, rate 0.011", 80, 1) == study.rule_for("quadratic", 80, 1)


# -- the toy --


def test_a_draw_alone_is_a_draw_among_others():
    data = study.toy_data(0.1, 3)
    for arm in ("linupper", "uniform", "uniform, matched norm"):
        path = study.toy(arm, 0.1, 0.4, 3, 4)
        theta = data.start[1].clone()
        for step in range(4):
            assert (theta - data.solution[1]).square().sum().item() == pytest.approx(path[step, 1].item(), rel=1e-4)
            residual = data.x[1] @ theta - data.y[1]
            h = 2 * (residual.square() - residual.square().min()) / residual.square().max() - 1
            w = ((h + 1).clamp(max=1) / 0.4).softmax(0)
            plain = residual @ data.x[1] / 500
            gradient = {"linupper": (w * residual) @ data.x[1], "uniform": plain}.get(arm)
            if gradient is None:
                gradient = plain * ((w * residual) @ data.x[1]).norm() / plain.norm()
            theta -= study.TOY_RATE * 2 * gradient
    twice = study.toy("uniform, twice the step", 0.0, 0.4, 3, 1)
    once, before = study.toy("uniform", 0.0, 0.4, 3, 1)[1], study.toy_data(0.0, 3).start
    assert (twice[1] < once).all() and (once < (before - study.toy_data(0.0, 3).solution).square().sum(1)).all()


def test_in_the_toy_the_theory_is_exact():
    """Without outliers a step shortens the squared distance by 4 lr sum w l, less the square of the step."""
    data = study.toy_data(0.0, 4)
    residual = (data.x @ data.start.unsqueeze(-1)).squeeze(-1) - data.y
    losses = residual.square()
    w = study.LossReweighting("linupper", 0.4)(losses, 0)
    gradient = 2 * ((w * residual).unsqueeze(1) @ data.x).squeeze(1)
    path = study.toy("linupper", 0.0, 0.4, 4, 1)
    lr = study.TOY_RATE
    expected = 4 * lr * (w * losses).sum(1) - lr**2 * gradient.square().sum(1)
    torch.testing.assert_close(path[0] - path[1], expected, rtol=1e-3, atol=1e-3)
    assert ((w * losses).sum(1) > losses.mean(1)).all()  # weights that rise with the loss


# -- the language model --


def test_training_text_is_what_it_is_said_to_be():
    ids, sources = study.training_rows(1, 20)
    n = 20 * study.BATCH
    assert ids.shape == (n, study.LENGTH + 1)
    shares = sources.bincount(minlength=5).double() / n
    assert np.allclose(shares, list(study.SHARES.values()), atol=2e-3)
    again, _ = study.training_rows(1, 20)
    assert torch.equal(ids, again) and not torch.equal(ids, study.training_rows(2, 20)[0])
    real = ids[sources < 3]
    assert len(real.unique(dim=0)) > 0.999 * len(real)
    for k, domain in enumerate(study.DOMAINS):
        trained_on = {tuple(row) for row in ids[sources == k].tolist()}
        everything = {tuple(row) for row in study._corpus(domain)[0].tolist()}
        assert trained_on <= everything
        for split in ("validation", "test"):
            assert not trained_on & {tuple(row) for row in windows(domain, split, study.LENGTH, count=64)[0].tolist()}
    copies = ids[sources == 3]
    near = (copies[:, None] != copies[None]).sum(-1)
    alike = near <= 2 * study.CHANGED
    assert (alike.sum(1) > 10).all() and len(copies.unique(dim=0)) > 0.9 * len(copies)
    assert not ((real[:200, None] != copies[None]).sum(-1) <= study.CHANGED).any()


def test_the_longer_run_sees_every_row_once_and_is_as_long_as_the_text_allows():
    longer = study.SIZES["study"].longer
    ids, sources = study.training_rows(1, longer)
    assert len(ids) == longer * study.BATCH
    assert np.allclose(sources.bincount(minlength=5).double() / len(ids), list(study.SHARES.values()), atol=1e-3)
    for k, domain in enumerate(study.DOMAINS):
        real, everything = ids[sources == k], study._corpus(domain)[0]
        again = len(everything) - len(everything.unique(dim=0))  # equal windows of the corpus itself
        assert len(real) - len(real.unique(dim=0)) <= again
    with pytest.raises(CalibrationError, match="prose"):
        study.training_rows(1, longer + 4)


def test_a_variant_changes_one_thing():
    losses = torch.rand(study.BATCH)
    for arm, variant in study.VARIANTS.items():
        rule, start = study.rule_for(arm, 80, 1)
        base, begin = study.rule_for(variant.shape, 80, 1)
        assert (rule.strategy, base.strategy) == (variant.shape, variant.shape)
        assert (rule.r != base.r) + (start != begin) == 1
        assert start in (0, 16, 40) and rule(losses, start) is not None
        assert start == 0 or rule(losses, start - 1) is None
    assert all(study.rule_for(arm, 80, 1)[0](losses, 79) is None for arm in (study.TWICE, *study.FINER))
    assert not set(study.VARIANTS) & {*study.ARMS, study.TWICE, *study.FINER}
    assert [study.rule_for("linupper", steps, 1)[1] for steps in (5, 60, 80, 176)] == [1, 12, 16, 35]


def test_every_arm_gets_the_same():
    size = study.SIZES["study"]
    recipes = {study.recipe_for(size, 1e-2, 1) for _ in study.ARMS}
    assert len(recipes) == 1
    losses = torch.rand(study.BATCH)
    for name, make in study.ARMS.items():
        rule = make(20, 1)
        assert rule(losses, 19) is None, name
        assert (rule(losses, 20) is None) == (name == "uniform")
    assert study.TUNING_SEED not in study.SEEDS and study.TWICE not in study.ARMS


def test_the_uniform_arm_is_plain_training(monkeypatch):
    size = study.SIZES["quick"]
    clock = iter((5.0, 12.5))
    monkeypatch.setattr(study.time, "process_time", lambda: next(clock))
    records = study.trained(study.Job("uniform", 3, 1e-2, size, "validation"))
    ids, _ = study.training_rows(3, size.steps)
    model = llama(context=study.LENGTH, seed=3)
    recipe = Recipe(size.steps, lr=1e-2, weight_decay=0.01, warmup=1, final_lr=0.2, clip=1.0, seed=3)
    train(
        model,
        batches(ids, batch_size=study.BATCH, shuffle=False),
        lambda m, b: sequence_losses(m, b).mean(),
        recipe,
        progress=False,
    )
    text = {d: windows(d, "validation", study.LENGTH, count=size.windows) for d in study.DOMAINS}
    expected = study._together(model, text)
    found = {r.metric: r.value for r in records if r.condition == study.TEXT}
    assert found == pytest.approx(expected, rel=1e-5)
    shares = {r.unit: r.value for r in records if r.metric == "share of the weight"}
    assert shares == pytest.approx(study.SHARES, abs=0.05)
    assert [r.value for r in records if r.metric == "cpu seconds"] == [7.5]


def test_it_runs_and_takes_up_where_it_was(tmp_path: Path):
    out = tmp_path / "r.json"
    first = study.run(out, "quick")
    assert first.header["rule"] is None and not first.claims
    for arm in ("uniform", "linupper", "smaller batch"):
        assert 3 < first.values(arm, study.TEXT, 1, metric="bits per byte")[""] < 8
    long = study.at(study.TEXT, True)
    assert first.values("linupper", long, 1, metric="bits per byte") != first.values(
        "linupper", study.TEXT, 1, metric="bits per byte"
    )
    rates = {arm: first.values(arm, study.TRAINING, 1, metric="rate")[""] for arm in ("linupper, r = 10", LOWER)}
    assert rates == {"linupper, r = 10": 4e-3, LOWER: 2.8e-3}
    mild = first.values("linupper, r = 10", study.TRAINING, 1, metric="effective")[""]
    assert first.values("linupper", study.TRAINING, 1, metric="effective")[""] < mild < study.BATCH
    inside = first.values("linupper", study.TRAINING, 1, metric="effective")[""]
    assert inside == pytest.approx(first.values("smaller batch", study.TRAINING, 1, metric="effective")[""], rel=0.1)
    records = list(first.records())
    assert list(study.run(out, "quick").records()) == records


def test_the_stored_verdicts_follow_from_the_stored_records():
    recorded = Results.load(data_path("results", "loss_reweighting.json"))
    assert recorded.claims, "the study is not finished: `refimpl study loss_reweighting` goes on where it stopped"
    assert recorded.claims == judge(recorded, study.CLAIMS)
