"""Independent trainings side by side: one process each, one thread each.

Small models do not fill two cores with one training: the operations are too short to be split. Several at once do.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

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
