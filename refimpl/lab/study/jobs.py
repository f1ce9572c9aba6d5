"""Processes on this machine: independent trainings side by side, or one training shared among several.

Small models do not fill two cores with one training: the operations are too short to be split. Several at once do.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = TypeVar("Job")
Answer = TypeVar("Answer")


def in_processes(
    function: Callable[[Job], Answer], jobs: Sequence[Job], workers: int | None = None
) -> Iterator[tuple[Job, Answer]]:
    """Run ``function(job)`` for every job and yield each with its answer as soon as it is there.

    Args:
        function: importable by name (not a lambda), and so are its argument and its answer picklable.
        jobs: started in this order.
        workers: processes; default: one per processor this process may use. With one, everything runs here.

    Raises:
        Whatever a job raises; jobs that have not started are then dropped. What was yielded before is yours.

    Example:
        >>> sorted(in_processes(abs, [-2, -1], workers=1))
        [(-2, 2), (-1, 1)]
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, function(job)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked process inherits the state of thread pools
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(function, job): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_group(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run ``function(rank, world, *arguments)`` in processes that form a gloo group, as under torchrun.

    To try on a laptop what several machines would do. Each process has one thread.

    Args:
        function: importable by name. What it has to say it writes to a file, from rank 0.
        world: processes.
        arguments: picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the process that failed.

    Example:
        >>> in_group(max, 1)     # calls max(0, 1) in a process; say in_group(train_and_save, 2, "folder")
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_member, (world, str(Path(folder, "store")), function, arguments), nprocs=world, join=True)


def _member(rank: int, world: int, store: str, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        function(rank, world, *arguments)
    finally:
        dist.destroy_process_group()
