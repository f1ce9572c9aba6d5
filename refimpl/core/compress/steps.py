"""Steps that all drivers share: checks, the compression of one site, and undoing everything when a run fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.compress.inputs import InputSamples
from refimpl.core.compress.method import Method
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.device import read
from refimpl.core.errors import CalibrationError, OptionError
from refimpl.core.files.checkpoint import Reference

CHUNK = 2**20  # input values of a site per pass when its error is measured on samples


@dataclass
class SiteReport:
    """The report of one site.

    Attributes:
        name: the site.
        error: squared output error relative to the squared output, on the calibration inputs of the method;
            None without input statistics, or if no calibration token came to the site (an expert that none chose). The
            target is the reference weight if there is one.
        error_before: the same before this step (methods with a reference), else None.
        seconds: time of the method at this site, statistics excluded.
        log: remarks of the method (a raised damping, ...); "unreached" says what was done with a site that no token reached.
    """

    name: str
    error: float | None
    error_before: float | None
    seconds: float
    log: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Result of `compress`: the model (None when it was streamed to a folder) and one entry per site."""

    model: nn.Module | None
    method: str
    sites: list[SiteReport]
    seconds: float
    folder: Path | None = None

    @property
    def mean_error(self) -> float | None:
        """Mean of the relative squared output error over the sites that have one."""
        errors = [site.error for site in self.sites if site.error is not None]
        return sum(errors) / len(errors) if errors else None

    def __str__(self) -> str:
        error = "" if self.mean_error is None else f", mean relative output error {self.mean_error:.4f}"
        noted = sum(bool(site.log) for site in self.sites)
        remarks = f", {noted} sites with remarks" if noted else ""
        unreached = [site.name for site in self.sites if "unreached" in site.log]
        if unreached:
            remarks += f", of which no calibration token reached {len(unreached)} ({unreached[0]!r} and so on)"
        return f"{self.method}: {len(self.sites)} sites in {self.seconds:.0f} s{error}{remarks}"


def check_finite(tensors: Iterable[tuple[str, Tensor]], argument: str = "model") -> None:
    """Raise `CalibrationError` at the first named tensor with NaN or infinity in it.

    Example:
        >>> check_finite([("w", torch.ones(2))])
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and read((~torch.isfinite(tensor)).any()):
            raise CalibrationError(
                f"{argument}: {name!r} contains NaN or infinity, so no statistics can be gathered with it; "
                "fetch or save the checkpoint again"
            )


def check_samples(method: Method, count: int) -> None:
    """Raise `CalibrationError` if there are fewer calibration samples than the method needs.

    Example:
        >>> from refimpl import GPTQ
        >>> check_samples(GPTQ(), 1)
    """
    if count < method.least_samples:
        raise CalibrationError(
            f"calibration: {count} samples are fewer than the {method.least_samples} that {type(method).__name__} "
            "draws at once; pass more samples, or have it draw fewer"
        )


def reference_of(
    model: nn.Module, method: Method, reference: nn.Module | str | Path | None, sites: list[Site]
) -> Reference | None:
    """The reference of a method that needs one, after checking that it has every weight needed.

    Example:
        >>> from refimpl import RTN
        >>> reference_of(nn.Linear(2, 2), RTN(), None, [])
    """
    if reference is model:
        raise OptionError("reference is the model that is being compressed; pass an untouched copy or its folder")
    if not method.uses_reference:
        return None
    if reference is None:
        raise OptionError(
            f"reference=None: {type(method).__name__} repairs towards the original weights; "
            "pass the original model or the folder of its checkpoint"
        )
    original = Reference(reference, model)
    for site in sites:
        original.weight(site)
    return original


@contextmanager
def original_weights(sites: list[Site], originals: dict[str, Tensor]) -> Iterator[None]:
    """Let sites apply their original weights for the duration of the block; with no originals, do nothing.

    Example:
        >>> block = nn.Sequential(nn.Linear(1, 1, bias=False))
        >>> with original_weights([Site("0", 0, block, "0")], {"0": torch.full((1, 1), 3.0)}):
        ...     block(torch.ones(1)).item()
        3.0
    """
    changed = [site for site in sites if site.name in originals]
    compressed = {site.name: site.placed for site in changed}
    try:
        for site in changed:
            site.replace(site.dense_module(originals[site.name]))
        yield
    finally:
        for site in changed:
            site.replace(compressed[site.name])


@contextmanager
def all_or_nothing(sites: list[Site]) -> Iterator[None]:
    """Put the modules of sites back if the block does not run to its end.

    Example:
        >>> with all_or_nothing([]):
        ...     pass
    """
    before = {site.name: site.placed for site in sites}
    try:
        yield
    except BaseException:
        for site in sites:
            site.replace(before[site.name])
        raise


def compress_one(site: Site, method: Method, stats: InputStats | None, target: Tensor | None) -> SiteReport:
    """Run the method at one site, put the result there, and measure what it did.

    Args:
        site: where.
        method: what to do.
        stats: statistics of its inputs, if the method wanted any.
        target: the reference weight [out, in], if the method wanted one.

    Example:
        >>> from refimpl import RTN
        >>> model = nn.Sequential(nn.Linear(64, 16))
        >>> compress_one(Site("0", 0, model, "0"), RTN(4, 32), None, None).name, model[0]
        ('0', PackedLinear(64 -> 16, 4 bits, groups of 32))
    """
    begin = time.perf_counter()
    before = site.weight
    site.log.clear()
    layer = method.compress_site(site, stats, target)
    seconds = time.perf_counter() - begin
    error = error_before = None
    if stats is not None and method.statistics & {"gram", "abs"} and stats.tokens == 0:
        # its second moment is 0, and methods then take it for the identity: the error of the weights is what counts
        site.log["unreached"] = "no calibration token came here; compressed as if all inputs were alike"
    elif stats is not None and "gram" in method.statistics:
        goal = before if target is None else target
        error = _relative_error(goal, layer.to_dense(), stats.gram)
        error_before = None if target is None else _relative_error(goal, before, stats.gram)
    site.replace(layer)
    if isinstance(stats, InputSamples) and "inputs" in method.statistics:
        error = _error_on_samples(site, stats)
    return SiteReport(site.name, error, error_before, seconds, dict(site.log))


def _relative_error(target: Tensor, weight: Tensor, gram: Tensor) -> float:
    """||(W - V) X||^2 / ||W X||^2 from the second moment of X."""
    target, difference = target.float(), target.float() - weight.float()
    energy = ((target @ gram) * target).sum()
    error = ((difference @ gram) * difference).sum()
    return read(error / energy.clamp_min(torch.finfo(torch.float32).tiny))


def _error_on_samples(site: Site, samples: InputSamples) -> float:
    """||Y - f(X)||^2 / ||Y||^2 with f the site as it is now."""
    error = energy = torch.zeros((), device=samples.low.device)
    size = max(1, CHUNK * len(samples.x) // max(samples.x.numel(), 1))
    for x, y in zip(samples.x.split(size), samples.y.split(size), strict=True):
        error = error + (site.placed(x).float() - y.float()).square().sum()
        energy = energy + y.float().square().sum()
    return read(error / energy.clamp_min(torch.finfo(torch.float32).tiny))
