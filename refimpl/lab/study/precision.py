"""The dtype a study computes in: its own declaration, or that of the file it goes on with; never the processor's."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from refimpl.lab.models.dtypes import fast_dtype
from refimpl.lab.study.records import Results


def study_dtype(out: str | Path, profile: str, declared: str = "float32") -> torch.dtype:
    """The dtype a run of a study has to compute in, on any machine.

    A file that is there is gone on with in the dtype of its last run, so that its rows can be compared. A new file gets
    the declared dtype; but for a trial at a smaller size, which nobody goes on with elsewhere, bfloat16 is left where
    this processor is slow in it. Where the dtype is slow here, one line on stderr says so.

    Args:
        out: the results file.
        profile: "study" or "quick".
        declared: "float32" or "bfloat16".

    Raises:
        ResultsError: the file is there and cannot be read.

    Example:
        >>> study_dtype("/nowhere/new.json", "study", "float32")
        torch.float32
    """
    if Path(out).exists():
        dtype = getattr(torch, Results.load(out).header["runs"][-1]["dtype"])
    else:
        dtype = getattr(torch, declared)
        if dtype == torch.bfloat16 and profile != "study":
            dtype = fast_dtype()
    if dtype == torch.bfloat16 and fast_dtype() != torch.bfloat16:
        print(
            f"{out}: this study computes in bfloat16, which this processor only emulates: expect many times the hours",
            file=sys.stderr,
        )
    return dtype
