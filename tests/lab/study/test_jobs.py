"""Jobs in processes: every answer once, errors reach the caller, one thread in each process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from refimpl.lab.study.jobs import in_group, in_processes


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


def test_a_group_computes_together(tmp_path: Path) -> None:
    in_group(_sum, 2, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3.0 1", "3.0 1"]
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="no number"):
        in_group(_fails, 2)


def _sum(rank: int, world: int, folder: str) -> None:
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value)
    Path(folder, str(rank)).write_text(f"{value.item()} {torch.get_num_threads()}")


def _fails(rank: int, world: int) -> None:
    raise ValueError("no number")
