"""Answers to exercises: a hint where one is wrong, never the solution."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Kept:
    """An expected value that later assignments to the variables it was made from do not reach; see `keep`."""

    value: Any


def keep(value: Any) -> Kept:
    """The expected value of an exercise as it is now, for `check`.

    An exercise that compares with variables of the chapter would follow a reader who uses their names for an answer, and
    take any answer for right. So what they hold is copied in the cell that makes them.

    Args:
        value: a number, text, bool, list, array or tensor.

    Example:
        >>> A = np.eye(2)
        >>> product = keep(A @ A)
        >>> A = np.zeros((2, 2))
        >>> check(A @ A, product)
        Not yet: 2 of 4 entries are off, the first at [0, 0].
    """
    return Kept(copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value))


def check(answer: Any, expected: Any, tol: float = 1e-6, *, on: Sequence[tuple[Any, ...]] | None = None) -> None:
    """Print whether an answer is right; if not, what is wrong with it.

    Args:
        answer: the reader's answer. ``...`` means that it is still to come.
        expected: the right one: a number, text, bool, list, array or tensor. If the answer is a function, the right
            function. What was computed in the chapter comes from `keep`.
        tol: largest accepted error, relative to the largest entry of `expected` (absolute if that is below one).
        on: for functions: tuples of arguments to compare them on.

    Example:
        >>> check(..., 4.5)
        Not attempted yet: replace the dots by your answer.
        >>> check(4 + 16 / 32, 4.5)
        Right.
        >>> check(4, 4.5)
        Not yet: your number is too small.
    """
    if answer is ...:
        print("Not attempted yet: replace the dots by your answer.")
        return
    if isinstance(expected, Kept):
        expected = expected.value
    problem = _function_problem(answer, expected, tol, on) if callable(expected) else _problem(answer, expected, tol)
    print("Right." if problem is None else f"Not yet: {problem}.")


def _function_problem(
    answer: Any, expected: Callable[..., Any], tol: float, on: Sequence[tuple[Any, ...]] | None
) -> str | None:
    if not callable(answer):
        return f"a function is asked for, yours is of type {type(answer).__name__}"
    for number, arguments in enumerate(on or [()], start=1):
        right = expected(*_copies(arguments))
        try:
            result = answer(*_copies(arguments))
        except Exception as error:  # the reader's code may raise anything, and should see what
            return f"your function raises {type(error).__name__} on test input {number}: {error}"
        if result is ...:
            return "your function still returns the dots"
        problem = _problem(result, right, tol)
        if problem is not None:
            return f"on test input {number}, {problem}"
    return None


def _copies(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments that a function may change in place without spoiling the next comparison."""
    return [
        argument.clone()
        if isinstance(argument, torch.Tensor)
        else argument.copy()
        if hasattr(argument, "copy")
        else argument
        for argument in arguments
    ]


def _problem(answer: Any, expected: Any, tol: float) -> str | None:
    """A description of the error in the answer, None if it is right."""
    if answer is None:
        return "your answer is None (a function without a return gives that)"
    if isinstance(expected, (bool, np.bool_)):
        if not isinstance(answer, (bool, np.bool_)):
            return f"True or False is asked for, yours is of type {type(answer).__name__}"
        return None if bool(answer) == bool(expected) else "think again about what would have to be true"
    if isinstance(expected, str):
        if not isinstance(answer, str):
            return f"text is asked for, yours is of type {type(answer).__name__}"
        return None if answer.strip().lower() == expected.strip().lower() else "that is another word"
    return _array_problem(answer, expected, tol)


def _array_problem(answer: Any, expected: Any, tol: float) -> str | None:
    right = _array(expected)
    try:
        given = _array(answer)
    except (TypeError, ValueError):
        return f"numbers are asked for, yours is of type {type(answer).__name__}"
    if given.shape != right.shape:
        if right.ndim == 0:
            return f"one number is asked for, yours has shape {list(given.shape)}"
        transposed = given.ndim == 2 and given.T.shape == right.shape
        hint = " (its transpose would fit)" if transposed else ""
        return f"the shape should be {list(right.shape)}, yours is {list(given.shape)}{hint}"
    if not np.isfinite(given).all():
        return "it contains NaN or infinity" if given.ndim else "it is NaN or infinity"
    error = np.abs(given - right)
    wrong = error > tol * max(1.0, float(np.abs(right).max(initial=0.0)))
    if not wrong.any():
        return None
    if right.ndim == 0:
        return "your number is too large" if given > right else "your number is too small"
    if np.allclose(given, -right, atol=tol):
        return "the sign is the wrong way round"
    first = [int(index) for index in np.argwhere(wrong)[0]]
    return f"{int(wrong.sum())} of {wrong.size} entries are off, the first at {first}"


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    if isinstance(value, (numbers.Number, np.ndarray, Sequence, np.generic)) and not isinstance(value, str):
        return np.asarray(value, dtype=np.float64)
    raise TypeError(type(value).__name__)
