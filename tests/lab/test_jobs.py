"""Jobs in processes: every answer once, errors reach the caller, one thread in each process."""

from __future__ import annotations

import math

import pytest
import torch

from refimpl.lab.jobs import in_processes


def test_every_job_is_answered_once() -> None:
    assert sorted(in_processes(math.factorial, [5, 3, 4], workers=2)) == [(3, 6), (4, 24), (5, 120)]
    assert list(in_processes(math.factorial, [], workers=2)) == []


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ValueError):
        list(in_processes(math.factorial, [-1, 3, 4], workers=2))


def test_a_process_has_one_thread() -> None:
    assert [threads for _, threads in in_processes(_threads, [0, 1], workers=2)] == [1, 1]


def _threads(job: int) -> int:
    return torch.get_num_threads()
