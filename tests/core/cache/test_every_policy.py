"""Every policy of the book passes the contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

from refimpl import POLICIES
from refimpl.core.cache import Policy
from refimpl.core.errors import OptionError
from refimpl.kvcache import MatryoshkaKV
from tests.core.cache.policy_contract import TEXT, Case, PolicyContract


def case(name: str, options: dict[str, Any], **declared: Any) -> Case:
    return Case(lambda model: POLICIES[name](**options).fit(model, TEXT), **declared)


def ragged(model: PreTrainedModel) -> Policy:
    """Ranks that differ in every head, from 1 to all columns."""
    policy = MatryoshkaKV().fit(model, TEXT)

    def ranks(heads: int, d: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(1 + 5 * h % d for h in range(heads)), tuple(d - 3 * h for h in range(heads))

    return replace(policy, ranks=tuple(None if b is None else ranks(*b.Q_K.shape[:2]) for b in policy.bases))


SMALL = {"density": 0.5, "window": 7, "sinks": 3}
PROJECTIONS = {"gpt2": "k_proj and v_proj, but GPT2Attention has none"}
CASES: dict[str, Case] = {
    "Full": case("Full", {}, lossy=False, least=1.0),
    "StreamingLLM": case(
        "StreamingLLM", {"sinks": 3, "window": 14}, crops=False, refuses={"gpt2": "StreamingLLM .* no rotary embedding"}
    ),
    "H2O": case("H2O", {"capacity": 19}, crops=False),
    "SnapKV": case("SnapKV", {"capacity": 17, "window": 6, "kernel": 3}, crops=False),
    "KIVI": case("KIVI", {"bits": 4, "window": 11, "group": 8, "value_group": 8}, least=0.4, tolerance=2e-2, group=8),
    "ThinK": case("ThinK", {"channels": 0.5, "window": 7, "group": 4}, crops=False, least=0.55, group=4),
    "CSKV": case("CSKV", SMALL, refuses=PROJECTIONS),
    "CSKV in groups": case("CSKV", SMALL | {"group": 4}, refuses=PROJECTIONS, group=4),
    "CSKV in 4 bits": case("CSKV", SMALL | {"bits": 4, "group": 8}, refuses=PROJECTIONS, tolerance=2e-2, group=8),
    "MatryoshkaKV": case("MatryoshkaKV", {"ranks": 5}),
    "MatryoshkaKV, ragged": Case(ragged),
}


class TestEveryPolicy(PolicyContract):
    @pytest.fixture(params=CASES)
    def case(self, request: pytest.FixtureRequest) -> Case:
        return CASES[request.param]


def test_every_policy_has_a_case() -> None:
    assert {name.partition(",")[0].partition(" ")[0] for name in CASES} == set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_learns_is_asked_for_by_name(name: str, make: Any) -> None:
    model = make("llama")
    plain = POLICIES[name]()
    fitted = plain.fit(model, TEXT)
    fitted.cache(model)
    if fitted is plain:
        return
    with pytest.raises(OptionError, match=r"(factors|bases): there are .* layer 0.*; call fit\(model, tokens\)"):
        plain.cache(model)
