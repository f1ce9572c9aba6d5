"""Models for the tests of caches, and readable failures of the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

pytest.register_assert_rewrite("tests.core.cache.policy_contract")


@pytest.fixture(scope="session")
def make(request: pytest.FixtureRequest) -> Callable[[str], PreTrainedModel]:
    """Fresh tiny models by architecture, with norms and biases that do something; the same weights at every call."""

    def build(name: str) -> PreTrainedModel:
        model = request.getfixturevalue(f"tiny_{name}")()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for key, parameter in model.named_parameters():
                if "k_norm" in key or key.endswith(("k_proj.bias", "v_proj.bias")):
                    parameter.data += 0.3 * torch.randn_like(parameter)
        return model

    return build
