"""Exercises: solutions pass, wrong answers get a hint, and the hint does not hold the solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refimpl.lab.show.check import check, keep


@pytest.fixture
def said(capsys):
    def run(*arguments, **options):
        assert check(*arguments, **options) is None
        return capsys.readouterr().out.strip()

    return run


def test_dots_are_not_an_attempt(said):
    assert said(..., 4.5) == "Not attempted yet: replace the dots by your answer."
    assert said(..., torch.ones(3)).startswith("Not attempted")
    assert said(..., lambda x: x, on=[(1,)]).startswith("Not attempted")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (4.5, 4.5),
        (4.5 + 1e-9, 4.5),
        (np.float32(4.5), 4.5),
        (torch.tensor(4.5, dtype=torch.bfloat16), 4.5),
        (torch.ones(2, 3), np.ones((2, 3))),
        ([1, 2, 3], torch.tensor([1, 2, 3])),
        (1e6 + 0.5, 1e6),  # the tolerance is relative for large numbers
        (True, True),
        (" EoRA ", "eora"),
    ],
)
def test_solutions_pass(said, answer, expected):
    assert said(answer, expected) == "Right."


@pytest.mark.parametrize(
    ("answer", "expected", "hint"),
    [
        (4.0, 4.5, "too small"),
        (5, 4.5, "too large"),
        (None, 4.5, "None"),
        ("4.5", 4.5, "numbers are asked for, yours is of type str"),
        (float("nan"), 4.5, "NaN"),
        ([1.0], 4.5, "one number is asked for"),
        (np.zeros((3, 2)), np.ones((2, 3)), "its transpose would fit"),
        (np.zeros(4), np.ones((2, 3)), r"the shape should be [2, 3], yours is [4]"),
        (-np.eye(2), np.eye(2), "sign"),
        (np.array([1.0, 7.0, 9.0]), np.array([1.0, 2.0, 3.0]), "2 of 3 entries are off, the first at [1]"),
        (False, True, "think again"),
        (1, True, "True or False"),
        ("svd", "eora", "another word"),
        (3, "eora", "text is asked for"),
        ({"a": 1}, 4.5, "type dict"),
    ],
)
def test_wrong_answers_get_a_hint(said, answer, expected, hint):
    text = said(answer, expected)
    assert text.startswith("Not yet: ") and hint in text
    assert "eora" not in text and "4.5" not in text


def test_tolerance_is_the_callers(said):
    assert said(4.51, 4.5, tol=0.02) == "Right."
    assert "too large" in said(4.51, 4.5, tol=1e-3)


def second_moment(x):
    return x.T @ x


def test_functions_are_compared_on_inputs(said):
    inputs = [(torch.randn(5, 3),), (torch.zeros(1, 2),)]
    assert said(lambda x: torch.einsum("ti,tj->ij", x, x), second_moment, tol=1e-5, on=inputs) == "Right."
    assert "on test input 1, the shape should be [3, 3]" in said(lambda x: x @ x.T, second_moment, on=inputs)
    assert "None" in said(lambda x: None, second_moment, on=inputs)
    assert "still returns the dots" in said(lambda x: ..., second_moment, on=inputs)
    assert "raises RuntimeError on test input 1" in said(lambda x: x @ x @ x, second_moment, on=inputs)
    assert "a function is asked for" in said(3.0, second_moment, on=inputs)


def test_a_function_that_changes_its_input_does_not_spoil_the_rest(said):
    x = torch.ones(2, 2)
    assert said(lambda t: t.mul_(0) + 4, lambda t: t * 4, on=[(x,), (x,)]) == "Right."
    assert x.sum() == 4


def test_what_is_kept_does_not_follow_the_readers_variables(said):
    B, A = torch.randn(4, 2), torch.randn(2, 4)
    right = B @ A
    product = keep(right)
    numbers = [1.0, 2.0]
    wanted = keep(numbers)
    B, A = torch.zeros(4, 2), torch.zeros(2, 4)
    assert said(B @ A, product).startswith("Not yet") and said(right, product, tol=1e-6) == "Right."
    right.zero_()
    numbers[0] = 5.0
    assert said(right, product).startswith("Not yet") and said([1.0, 2.0], wanted) == "Right."
    weights = torch.randn(3, requires_grad=True)
    gone = keep(weights)
    with torch.no_grad():
        weights.zero_()
    assert said(weights, gone).startswith("Not yet")
    assert said(..., product).startswith("Not attempted")
