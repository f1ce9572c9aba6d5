"""The interface of a compression method: a frozen dataclass of hyper-parameters that turns one site into one layer."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from refimpl.core.arguments import Checked
from refimpl.core.compress.sites import Site
from refimpl.core.compress.stats import InputStats
from refimpl.core.errors import OptionError, nearest
from refimpl.core.layers import CompressedLayer, parse_pattern

STATISTICS = (frozenset({"gram", "abs"}), frozenset({"range"}), frozenset({"inputs"}))


class Method(Checked, abc.ABC):
    """Base of all methods that `refimpl.compress` can run.

    A subclass defines these attributes as class variables, or as properties if they depend on its options.

    Attributes:
        statistics: what the driver must collect about the inputs of each site. "gram" and "abs", alone or together,
            are sums over the inputs (`InputStats`); "range" is their range, and "inputs" the inputs themselves with
            the outputs to reproduce (`refimpl.core.compress.inputs.InputSamples`). Empty for methods that use only the
            weights, which need no calibration.
        uses_reference: whether the original weights are needed. The statistics are then those of the original
            block, fed by the already repaired blocks before it.
        least_samples: calibration samples (sequences, images) that the method needs, for example because that many form a
            batch; with fewer, `compress` raises an error before any work.
    """

    uses_reference: ClassVar[bool] = False

    @property
    def statistics(self) -> frozenset[str]:
        return frozenset()

    @property
    def least_samples(self) -> int:
        return 1

    @abc.abstractmethod
    def layer_config(self, site: Site) -> dict[str, Any]:
        """Configuration of the layer `compress_site` will return, from shapes alone (works on "meta").

        Raises:
            OptionError: this method cannot compress this site; called for every site before any work.
        """

    @abc.abstractmethod
    def compress_site(self, site: Site, stats: InputStats | None, original: Tensor | None) -> CompressedLayer:
        """The replacement of one site.

        Args:
            site: the site; `site.weight` is its weight now, `site.log` takes remarks for the report.
            stats: the statistics of its inputs that `statistics` names, if any: `InputSamples` for "range" and "inputs".
            original: weight of the reference [out, in], if `uses_reference`.
        """

    @abc.abstractmethod
    def flops(self, site: Site) -> float:
        """Floating-point operations of `compress_site`, to leading order."""


def check_method(method: object) -> None:
    """Raise `OptionError` unless `method` is an instance of a method; says which one was probably meant.

    Example:
        >>> check_method("gtpq")
        Traceback (most recent call last):
        ...
        refimpl.core.errors.OptionError: method='gtpq': pass an instance, as GPTQ(), of one of 'ActSVD', ... \
(did you mean 'GPTQ'?)
    """
    if isinstance(method, Method):
        if not any(method.statistics <= allowed for allowed in STATISTICS):
            raise OptionError(
                f"method={method!r} asks for the statistics {sorted(method.statistics)}; "
                f"what is gathered together is {' or '.join(str(sorted(allowed)) for allowed in STATISTICS)}"
            )
        return

    def concrete(base: type) -> Iterator[str]:
        kind: type
        for kind in base.__subclasses__():
            if not inspect.isabstract(kind):
                yield kind.__name__
            yield from concrete(kind)

    if isinstance(method, (list, tuple)):
        raise OptionError(
            f"method is a {type(method).__name__} of {len(method)}: compress takes one method; make one call each, in "
            "their order"
        )
    given = method.__name__ if isinstance(method, type) else str(method)
    raise OptionError(f"method={given!r}: pass an instance, as GPTQ(), of {nearest(given, sorted(concrete(Method)))}")


def check_group(site: Site, group_size: int | None) -> int:
    """The group size to use at a site (None: the whole row), if it divides the width.

    Raises:
        OptionError: it does not; lists the sizes that do.

    Example:
        >>> from torch import nn
        >>> check_group(Site("q", 0, nn.Sequential(nn.Linear(96, 16)), "0"), 32)
        32
    """
    width = site.in_features
    size = width if group_size is None else group_size
    if size < 1 or width % size:
        good = [g for g in (32, 64, 96, 128, 192, 256) if width % g == 0]
        good = good or [g for g in range(8, width) if width % g == 0]  # a kernel has odd widths
        raise OptionError(
            f"group_size={group_size} does not divide the {width} inputs of {site.name!r}; "
            f"use {', '.join(map(str, good)) + ' or ' if good else ''}None (one group per row)"
        )
    return size


def check_pattern(site: Site, pattern: str) -> None:
    """Raise `OptionError` if the width of the site is no multiple of the pattern's group.

    Example:
        >>> from torch import nn
        >>> check_pattern(Site("q", 0, nn.Sequential(nn.Linear(96, 16)), "0"), "2:4")
    """
    structure = parse_pattern(pattern)
    if structure and site.in_features % structure[1]:
        raise OptionError(
            f"pattern={pattern!r} needs inputs in groups of {structure[1]}, but {site.name!r} has {site.in_features}; "
            "use pattern='unstructured' or leave this site out with targets="
        )


def check_rank(site: Site, rank: int) -> None:
    """Raise `OptionError` if `rank` is not between 1 and the smaller dimension of the site.

    Example:
        >>> from torch import nn
        >>> check_rank(Site("q", 0, nn.Sequential(nn.Linear(96, 16)), "0"), 16)
    """
    smaller = min(site.in_features, site.out_features)
    if not 1 <= rank <= smaller:
        raise OptionError(
            f"rank={rank}: {site.name!r} is {site.out_features} x {site.in_features}, so the rank must lie between 1 "
            f"and {smaller}"
        )
