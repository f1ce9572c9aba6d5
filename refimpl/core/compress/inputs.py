"""Inputs of sites in the forms that methods need: streamed sums, ranges, or the samples themselves.

Both drivers use `collect`. Sums are those of `refimpl.core.compress.stats` over the rows that a flattened kernel multiplies,
so a convolution has a second moment like any linear layer; samples are cached in the shape in which the model calls the
site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refimpl.core.compress.flow import Consumers
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import Collector, InputStats
from refimpl.core.device import read
from refimpl.core.errors import CalibrationError, OptionError


class InputSamples(InputStats):
    """Statistics of a method with ``statistics = {"inputs"}``; with ``{"range"}`` it has only `low` and `high`.

    Args:
        x: inputs of the site, in the dtype of the model and the shape of the call: [n, ..., in], or
            [n, channels, height, width] for a convolution. `Site.apply` computes outputs from them.
        y: the outputs to reproduce, [n, ..., out] or [n, out, height, width]: those of the network before this
            call of `compress`, or of the reference weights if there is a reference.
        low, high: mean over the samples of each sample's smallest and largest value, fp32 [], with
            ``low <= 0 <= high``.
        rectified: whether the only consumer of y is a ReLU (or ReLU6), so that only its positive part matters.

    Example:
        >>> samples = InputSamples(torch.ones(5, 3), torch.zeros(5, 2), torch.tensor(0.0), torch.tensor(1.0), False)
        >>> samples.tokens
        5
    """

    def __init__(self, x: Tensor | None, y: Tensor | None, low: Tensor, high: Tensor, rectified: bool = False) -> None:
        super().__init__(0, low.device, ())
        self._x, self._y, self.low, self.high, self.rectified = x, y, low, high, rectified
        self.tokens = 0 if x is None else len(x)

    @property
    def x(self) -> Tensor:
        """Inputs; only for methods with "inputs" among their statistics."""
        assert self._x is not None
        return self._x

    @property
    def y(self) -> Tensor:
        """Outputs to reproduce; only for methods with "inputs" among their statistics."""
        assert self._y is not None
        return self._y


class SampleCollector:
    """Context manager that measures the ranges of inputs, and caches inputs and outputs, while the caller runs the model.

    Sites fed by the same tensor share the cached inputs, found by identity at every call.

    Args:
        sites: the sites to observe.
        inputs, outputs: whether to cache them.

    Example:
        >>> block = nn.Sequential(nn.Linear(3, 16), nn.ReLU())
        >>> with SampleCollector([Site("0", 0, block, "0")]) as collector, torch.no_grad():
        ...     _ = block(torch.ones(5, 3))
        >>> samples = collector.stats["0"]
        >>> samples.x.shape, samples.y.shape, samples.rectified
        (torch.Size([5, 3]), torch.Size([5, 16]), True)
    """

    def __init__(self, sites: list[Site], inputs: bool = True, outputs: bool = True) -> None:
        self.sites, self.inputs, self.outputs = sites, inputs, outputs
        self.stats: dict[str, InputSamples] = {}
        self._x: dict[str, list[Tensor]] = {}
        self._y: dict[str, list[Tensor]] = {}
        self._ranges: dict[str, Tensor] = {}  # site -> sum of lows, sum of highs, number of samples
        self._consumers = Consumers()
        self._last: tuple[Any, int, Any] = (None, 0, None)  # an input, its version, and its ranges and copy

    def _before(self, site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if self._last[0] is not x or self._last[1] != x._version:
                # a copy: the model may go on to change it in place
                self._last = (x, x._version, (_ranges(x), x.detach().clone() if self.inputs else None))
            ranges, kept = self._last[2]
            self._ranges[site.name] = self._ranges.get(site.name, 0) + ranges
            if kept is not None:
                self._x.setdefault(site.name, []).append(kept)

        return hook

    def _after(self, site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._y.setdefault(site.name, []).append(output.detach().clone())
            self._consumers.watch(site.name, output)

        return hook

    def __enter__(self) -> SampleCollector:
        if (self.inputs or self.outputs) and dist.is_available() and dist.is_initialized():
            raise OptionError(
                "this method works on the inputs of every site, of which each process has only its own; run it in one"
            )
        self._stack = ExitStack()
        for site in self.sites:
            handles = [site.placed.register_forward_pre_hook(self._before(site))]
            if self.outputs:
                handles.append(site.placed.register_forward_hook(self._after(site)))
            for handle in handles:
                self._stack.callback(handle.remove)
        if self.outputs:
            self._stack.enter_context(self._consumers)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        self._last = (None, 0, None)
        if kind is not None:
            return
        joined: dict[tuple[int, ...], Tensor] = {}  # by identity of the pieces, so that shared inputs stay shared
        for name, ranges in self._ranges.items():
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(ranges)
            pieces = self._x.pop(name, [])
            key = tuple(map(id, pieces))
            if pieces and key not in joined:
                joined[key] = _join(name, pieces)
            x = joined.get(key)
            y = _join(name, self._y.pop(name)) if name in self._y else None
            low, high = (ranges[:2] / ranges[2].clamp_min(1)).unbind()
            if read((~torch.isfinite(ranges)).any()):
                raise CalibrationError(
                    f"calibration: the inputs of {name!r} contain NaN or infinity; "
                    "try dtype=float32 for the model, or check the samples and the checkpoint"
                )
            relu = self._consumers.found.get(name) == {"relu"}
            self.stats[name] = InputSamples(x, y, low.clamp(max=0), high.clamp(min=0), relu)


def _join(name: str, pieces: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(piece.shape[1:]) for piece in pieces})
    if len(shapes) > 1:
        raise CalibrationError(
            f"calibration: {name!r} is called with samples of different shapes, {shapes}, which cannot be kept "
            "together; leave it out with targets="
        )
    return torch.cat(pieces)


def _ranges(x: Tensor) -> Tensor:
    """Sum over samples of the smallest value, of the largest, and their number; fp32 [3]."""
    flat = x.detach().flatten(1).float()
    count = torch.tensor(float(len(flat)), device=x.device)
    return torch.stack([flat.amin(1).sum(), flat.amax(1).sum(), count])


@contextmanager
def collect(sites: list[Site], wanted: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Statistics of the inputs of sites while the caller runs the model; the dictionary is complete after the block.

    Args:
        sites: the sites to observe.
        wanted: see `Method.statistics`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3))
        >>> with collect([Site("0", 0, model, "0")], {"gram"}) as stats:
        ...     _ = model(torch.ones(2, 1, 5, 5))
        >>> stats["0"].gram.shape, stats["0"].tokens
        (torch.Size([9, 9]), 18)
    """
    wanted = frozenset(wanted)
    if wanted & {"range", "inputs"}:
        keep = "inputs" in wanted
        with SampleCollector(sites, keep, keep) as samples:
            yield samples.stats
        return
    with ExitStack() as stack:
        seen = [_as_rows(site, stack) for site in sites]
        with Collector(seen, wanted) as collector:
            yield collector.stats


def _as_rows(site: Site, stack: ExitStack) -> Site:
    """`site`, or for a convolution one that is called with its patches as rows whenever the convolution is called."""
    geometry = site.geometry
    if geometry is None:
        return site
    tap = nn.Identity()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        tap(geometry.unfold(args[0]))

    stack.callback(site.placed.register_forward_pre_hook(before).remove)
    holder = nn.Module()
    holder.add_module("tap", tap)
    return Site(site.name, site.block, holder, "tap")
