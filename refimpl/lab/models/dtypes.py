"""The dtype that language models compute in: what a study says, else what the processor is fast in."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NAMED = "REFIMPL_COMPUTE_DTYPE"  # an environment variable, because worker processes inherit it


def compute_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype that models compute in: the one named by `computing_in`, otherwise one that is fast on the device.

    Example:
        >>> compute_dtype() in (torch.bfloat16, torch.float32)
        True
    """
    named = os.environ.get(_NAMED)
    return getattr(torch, named) if named else fast_dtype(device)


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Let `compute_dtype` name this dtype inside the block, in processes that are started there as well.

    Example:
        >>> with computing_in(torch.float32):
        ...     compute_dtype()
        torch.float32
    """
    before = os.environ.get(_NAMED)
    os.environ[_NAMED] = str(dtype).removeprefix("torch.")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NAMED]
        else:
            os.environ[_NAMED] = before


@functools.cache
def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 where this device multiplies bf16 matrices fast, else fp32; measured once per process.

    Many CPUs emulate bf16 at a twentieth of their fp32 speed, and no flag tells reliably: a product of 128x512
    and 512x512 is timed in both (milliseconds; about a second on the slowest).

    Example:
        >>> fast_dtype() in (torch.bfloat16, torch.float32)
        True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if native else torch.float32
    if kind != "cpu":
        return torch.float32

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        return best

    # A clear win is asked for, so that timing noise cannot choose bf16 where both run alike.
    return torch.bfloat16 if seconds(torch.float32) > 1.3 * seconds(torch.bfloat16) else torch.float32
