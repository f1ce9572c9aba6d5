"""Rates are chosen where they should be, the toy is the theory's, and the language model's arms get the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from refimpl.core.errors import CalibrationError
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.core.train.losses import sequence_losses
from refimpl.lab.data.domains import llama, windows
from refimpl.lab.study.claims import Verdict
from refimpl.lab.study.records import Record, Results
from refimpl.lab.study.study import TUNING_SEED, Job, Run, place
from refimpl.studies import loss_reweighting as study

HOLDS, PARTLY, NOT = Verdict.HOLDS, Verdict.PARTLY, Verdict.DOES_NOT_HOLD
SPREAD = 0.001 * np.array([1.0, -1.0, 0.5, -0.5, 0.0])
LOWER, HIGHER = study.FINER


def put(results: Results, longer: bool = False, **arms: float) -> None:
    """Bits per byte of arms; seeds scatter a little, every arm in a way of its own."""
    for name, value in arms.items():
        for seed, change in zip(study.SEEDS, np.roll(SPREAD, len(name)), strict=True):
            text = study.at(study.TEXT, longer)
            results.add(Record("loss_reweighting", name, text, seed, "", "bits per byte", value + float(change)))


def validated(*scores: Sequence[float], longer: bool = False) -> Results:
    """Scores of the plain mean, LinUpper and Quadratic at the rates of the grid and the extra ones."""
    results = Results("", {"paper": "loss_reweighting"})
    for arm, row in zip(study.LONG, scores, strict=False):
        for lr, score in zip((*study.RATES, *study.EXTRA[longer]), row, strict=True):
            text = study.at(study.VALIDATION, longer)
            results.add(Record("loss_reweighting", f"{arm} at {lr:g}", text, TUNING_SEED, "", "bits per byte", score))
    return results


def verdict(results: Results, identity: str) -> Verdict:
    (claim,) = (claim for claim in study.CLAIMS if claim.id == identity)
    return claim.rule(results).verdict


# -- the rates --


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ((2.3, 2.0, 2.2, 2.1, 2.1), "uniform"),
        ((2.3, 2.0, 2.2, 1.9, 2.1), LOWER),
        ((2.3, 2.0, 2.2, 1.9, 1.8), HIGHER),
        ((1.7, 2.0, 2.2, 1.9, 1.8), "uniform"),  # its own rate is then the first
    ],
)
def test_the_finer_rates(scores, chosen):
    for linupper, quadratic, expected in ((1.9, 1.9, HOLDS), (2.1, 1.9, PARTLY), (1.9, 2.0, PARTLY), (2.0, 2.1, NOT)):
        results = validated(scores)
        assert study.finest(results) == chosen
        put(results, linupper=linupper, quadratic=quadratic)
        put(results, **{arm: 2.0 if arm == chosen else 9.0 for arm in ("uniform", *study.FINER)})
        assert verdict(results, "rw-finer") is expected


@pytest.mark.parametrize(
    ("linupper", "quadratic", "expected"), [(1.9, 1.9, HOLDS), (2.1, 1.9, PARTLY), (1.9, 2.0, PARTLY), (2.0, 2.1, NOT)]
)
def test_the_wider_grid(linupper, quadratic, expected):
    results = validated((3, 2, 2, 2, 1, 4), (3, 2, 2, 2, 3, 1), (3, 2, 1, 2, 3, 4), longer=True)
    put(results, longer=True, uniform=9.0, linupper=9.0, quadratic=quadratic)  # the first two have better rates
    put(results, longer=True, **{"uniform, rate 0.011": 2.0, "linupper, rate 0.016": linupper})
    assert verdict(results, "rw-wider") is expected


def test_rates_are_chosen_on_validation_text_and_only_from_the_grid():
    results = Results("", {"paper": "loss_reweighting"})
    tried: dict[study.Arm, list[float]] = {}
    for jobs in study.stages(Run(study.STUDY, study.__name__, results, "study", "float32", "", 1)):
        for job in jobs:
            if job.split == "validation":
                assert job.seed == TUNING_SEED
                tried.setdefault(job.arm, []).append(job.rate)
                best = 1.1e-2 if job.arm.longer and job.arm.name != "linupper" else 4e-3
                best = 8e-3 if job.arm == study.Arm("quadratic") else best
                score = 2 + abs(math.log(job.rate / best))
                results.add(Record("loss_reweighting", *place(job), "", "bits per byte", score))
    assert {arm: len(rates) for arm, rates in tried.items()} == {
        **{study.Arm(name): 5 if name in study.LONG else 3 for name in study.ARMS},
        **{study.Arm(name, longer=True): 6 for name in study.LONG},
    }
    rates = {(job.arm.name, job.arm.longer): job.rate for job in jobs if isinstance(job.arm, study.Arm)}
    assert rates == {
        **{(arm, False): 8e-3 if arm == "quadratic" else 4e-3 for arm in study.ARMS},
        **{(arm, False): 8e-3 if variant.shape == "quadratic" else 4e-3 for arm, variant in study.VARIANTS.items()},
        **{(study.TWICE, False): 8e-3, (LOWER, False): 2.8e-3, (HIGHER, False): 5.7e-3},
        **{(arm, True): 4e-3 if arm == "linupper" else 8e-3 for arm in study.LONG},
        **{(f"{arm}, rate 0.011", True): 1.1e-2 for arm in ("uniform", "quadratic")},
    }
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


def test_every_arm_weighs_from_the_end_of_burn_in():
    losses = torch.rand(study.BATCH)
    for name, make in study.ARMS.items():
        rule = make(20, 1)
        assert rule(losses, 19) is None, name
        assert (rule(losses, 20) is None) == (name == "uniform")


def test_the_uniform_arm_is_plain_training(monkeypatch):
    size = study.SIZES["quick"]
    monkeypatch.setattr(study.time, "process_time", iter((5.0, 12.5, 0.0, 0.0)).__next__)
    rows = list(study.measure(Job(study.__name__, study.Arm("uniform"), 3, "quick", 1e-2)))
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
    text = {d: windows(d, "test", study.LENGTH, count=size.windows) for d in study.DOMAINS}
    found = {row.metric: row.value for row in rows if row.condition is None}
    assert found == pytest.approx(study.together(model, text), rel=1e-5)
    shares = {row.unit: row.value for row in rows if row.metric == "share of the weight"}
    assert shares == pytest.approx(study.SHARES, abs=0.05)
    assert [row.value for row in rows if row.metric == "cpu seconds"] == [7.5]
    (row,) = study.measure(Job(study.__name__, study.Arm("uniform"), 3, "quick", 1e-2, "validation"))
    text = {d: windows(d, "validation", study.LENGTH, count=size.windows) for d in study.DOMAINS}
    assert row.value == pytest.approx(study.together(model, text)["bits per byte"], rel=1e-5)


def test_a_smaller_batch_is_worth_what_the_weights_are():
    def worth(arm: str) -> float:
        rows = study.measure(Job(study.__name__, study.Arm(arm), 1, "quick", 4e-3))
        return next(row.value for row in rows if row.metric == "effective")

    assert worth("linupper") < worth("linupper, r = 10") < study.BATCH
    assert worth("linupper") == pytest.approx(worth("smaller batch"), rel=0.1)
