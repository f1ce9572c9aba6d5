"""The arms of the study spend what their names say, and all arms of a network get the same."""

from __future__ import annotations

import pytest
import torch

from refimpl.lab.study.study import Job
from refimpl.pruning.gradual_magnitude import model_storage
from refimpl.studies import gradual_magnitude as study

FULL = study.SIZES["study"]


def arm(name: str) -> study.Arm:
    (found,) = (arm for arm in study.arms("study") if (arm.name, arm.network) == (name, study.RESNET))
    return found


def pruned(sparse: study.Arm) -> torch.nn.Module:
    """The network of an arm after the last update of its masks."""
    model = study.build(sparse, 0)
    pruning = study.pruning_for(sparse, model, FULL.resnet)
    pruning.attach(model)(pruning.last_step, model)
    return model


@pytest.mark.parametrize("way", ["cubic", "global"])
@pytest.mark.parametrize("width", study.WIDTHS)
def test_equal_non_zeros_are_equal(width, way):
    wanted = sum(p.numel() for p in study.build(arm(f"small-dense width {width:g}"), 0).parameters())
    found = model_storage(pruned(arm(f"{way} non-zeros of {width:g}"))).nonzeros
    assert found == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("width", study.WIDTHS[:2])
def test_equal_bytes_are_equal(width):
    wanted = model_storage(study.build(arm(f"small-dense width {width:g}"), 0)).dense
    assert model_storage(pruned(arm(f"cubic bytes of {width:g}"))).bitmask == pytest.approx(wanted, rel=2e-3)


def test_every_arm_of_a_network_gets_the_same():
    for network in study.RATES:
        arms = [arm for arm in study.arms("study") if arm.network == network]
        assert len({study.recipe_for(arm, FULL, 1e-2, 1) for arm in arms}) == 1
        assert all(study.tuned_as(arm).shares is None for arm in arms)


def test_pruning_leaves_time_to_recover():
    for arm in study.arms("study"):
        steps = study.recipe_for(arm, FULL, 1e-2, 1).steps
        pruning = study.pruning_for(arm, study.build(arm, 0), steps)
        if pruning is not None and not arm.name.startswith("last-moment"):
            assert pruning.last_step <= 0.7 * steps


def test_a_validation_run_tells_its_loss_alone():
    (row,) = study.measure(Job("refimpl.studies.gradual_magnitude", arm("dense"), 0, "quick", 1e-2, "validation"))
    assert row.metric == "validation" and 0 < row.value < 5
