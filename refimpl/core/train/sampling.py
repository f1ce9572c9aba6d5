"""The order of training data: samplers drawn anew each epoch, and mixtures of sources with fixed shares.

Everything is a pure function of a seed and of a number (the epoch, or the step), so a run that was interrupted goes on
with the same rows, for any number of workers. Under torchrun every process takes its strided share: row ``r``,
``r + world``, ... of what one process would see, so n processes with a batch of b see the batches of one with n b.

The loaders made here go into `refimpl.core.train.loop.train`, which tells their samplers when an epoch begins.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from refimpl.core.arguments import Checked, checked, fits, shown
from refimpl.core.device import rank_and_world
from refimpl.core.errors import CheckpointError, OptionError, reason, require

Shares = Sequence[float] | Callable[[int], Sequence[float]]


def generator(*key: int) -> torch.Generator:
    """A generator of random numbers that depends on all numbers of the key and on nothing else.

    Example:
        >>> draw = lambda *key: torch.rand(1, generator=generator(*key)).item()
        >>> draw(0, 1) == draw(0, 1), draw(0, 1) == draw(1, 0)
        (True, False)
    """
    mixed = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


class EpochSampler(Checked, Sampler[int]):
    """Base of samplers whose epoch is drawn at once: a subclass overrides `draw`.

    Args:
        seed: for `draw`, together with the epoch.

    Example:
        >>> class Backwards(EpochSampler):
        ...     def draw(self, epoch):
        ...         return torch.arange(4).flip(0) + epoch
        >>> sampler = Backwards()
        >>> sampler.set_epoch(1); list(sampler)
        [4, 3, 2, 1]
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.epoch = seed, 0
        self._begin = self._given = 0  # rows of this process: where the next iteration begins, how many were given
        self._drawn: tuple[int, Tensor] | None = None

    def draw(self, epoch: int) -> Tensor:
        """The rows of an epoch, over all processes: int64 ``[n]``, n the same in every epoch.

        Must depend on ``self.seed`` and ``epoch`` only (`generator` helps).
        """
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch."""
        if epoch != self.epoch:
            self.epoch, self._begin, self._given = epoch, 0, 0

    def indices(self) -> Tensor:
        """The rows of the current epoch, over all processes.

        Raises:
            OptionError: `draw` returned something else than int64 ``[n]``, or another n than before.
        """
        if self._drawn is None or self._drawn[0] != self.epoch:
            name = f"{type(self).__name__}.draw({self.epoch})"
            rows = self.draw(self.epoch)
            if rows.dim() != 1 or rows.dtype != torch.int64:
                raise OptionError(f"{name} returned {rows.dtype} {list(rows.shape)}; return int64 [n]")
            if self._drawn is not None and len(rows) != len(self._drawn[1]):
                raise OptionError(
                    f"{name} returned {len(rows)} rows, draw({self._drawn[0]}) {len(self._drawn[1])}; give every epoch "
                    "as many, or a run could not be resumed"
                )
            self._drawn = self.epoch, rows
        return self._drawn[1]

    def __len__(self) -> int:
        """Rows of an epoch for this process: the same for all, so up to ``world - 1`` rows are left out."""
        return len(self.indices()) // rank_and_world()[1]

    def __iter__(self) -> Iterator[int]:
        rank, world = rank_and_world()
        own = self.indices()[rank::world][: len(self)]
        self._given, self._begin = self._begin, 0
        for index in own[self._given :].tolist():
            self._given += 1
            yield index

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is, in values that JSON holds.

        ``position`` counts rows of the epoch over all processes. A loader with workers asks for rows ahead of the
        batches it yields: put the rows of the batches you took there instead.
        """
        position = self._given * rank_and_world()[1]
        return {"epoch": self.epoch, "position": position, "rows": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was called, also with another number of processes.

        `refimpl.core.train.loop.train` needs none of this: it counts its batches itself, unless it is told to
        `remember` this sampler.

        Raises:
            CheckpointError: the state is of another sampler, or its position cannot be shared among these processes.
        """
        world = rank_and_world()[1]
        self.set_epoch(state["epoch"])
        if state["rows"] != self._digest():
            raise CheckpointError(
                f"state of epoch {state['epoch']}: this {type(self).__name__} draws other rows; build it with the "
                "arguments and the seed it had"
            )
        share, rest = divmod(state["position"], world)
        if rest or not 0 <= share <= len(self):
            raise CheckpointError(
                f"position={state['position']}: use a multiple of the {world} processes, up to {len(self) * world}"
            )
        self._begin = self._given = share

    def _digest(self) -> str:
        return hashlib.blake2b(self.indices().numpy().tobytes(), digest_size=8).hexdigest()


class Shuffled(EpochSampler):
    """Every row once, in a new order each epoch.

    Args:
        n: number of rows.
        seed: another seed, other orders.

    Raises:
        OptionError: no rows.

    Example:
        >>> sorted(Shuffled(5, seed=0))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__(seed)
        _positive("n", n)
        self.n = n

    def draw(self, epoch: int) -> Tensor:
        """A permutation of the n rows."""
        try:
            return torch.randperm(self.n, generator=generator(self.seed, epoch))
        except RuntimeError as error:
            raise OptionError(f"n={self.n}: their order takes more memory than there is ({reason(error)})") from error


class Weighted(EpochSampler):
    """Rows drawn in proportion to weights.

    Args:
        weights: ``[n]``, finite, not negative; a row of weight 0 is never drawn.
        size: rows in an epoch; n if None.
        seed: another seed, other rows.
        replacement: a row may be drawn again within an epoch. Without, each next row is drawn among those left.

    Raises:
        OptionError: such weights do not exist, or ``size`` exceeds the rows that can be drawn without replacement.

    Example:
        >>> sorted(Weighted([0.0, 2.0, 1.0], size=2, replacement=False))
        [1, 2]
    """

    def __init__(
        self, weights: Tensor | Sequence[float], size: int | None = None, seed: int = 0, replacement: bool = True
    ) -> None:
        super().__init__(seed)
        self.weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
        if self.weights.dim() != 1 or not len(self.weights):
            raise OptionError(f"weights have shape {list(self.weights.shape)}; pass one weight per row, [n]")
        bad = (~self.weights.isfinite() | (self.weights < 0)).nonzero()
        if len(bad):
            raise OptionError(f"weights[{int(bad[0])}]={float(self.weights[bad[0]])}: use finite weights of 0 or more")
        possible = int(self.weights.count_nonzero())
        if not possible:
            raise OptionError("weights are all 0, no row can be drawn; give one of them a positive weight")
        self.size = len(self.weights) if size is None else size
        _positive("size", self.size)
        if not replacement and self.size > possible:
            raise OptionError(
                f"size={self.size}: without replacement only {possible} rows of positive weight can be drawn"
            )
        self.replacement = replacement

    def draw(self, epoch: int) -> Tensor:
        """`size` rows; not torch.multinomial, which ends at 2^24 rows."""
        source = generator(self.seed, epoch)
        if self.replacement:
            ends = self.weights.cumsum(0)
            points = torch.rand(self.size, dtype=torch.float64, generator=source) * ends[-1]
            last = torch.nextafter(ends[-1], ends.new_zeros(()))  # rounding may not reach a last row of weight 0
            return torch.searchsorted(ends, points.clamp(max=last), right=True)
        # of exponential clocks with these rates, the order of the first rings
        waits = torch.empty_like(self.weights).exponential_(generator=source) / self.weights
        return waits.argsort(stable=True)[: self.size]


class Mixture(Checked, Sampler[list[int]]):
    r"""Batches from several sources with fixed shares, exact at every step.

    Of the first s rows source 0 has $\lfloor s\,r_0 \rfloor$; of those left, source 1 has its share of what is left in
    the same way; the last source has the rest. So with two sources no step is ever a whole row away from the exact
    share. Every source walks through permutations of its own, a new one when it is used up, and a share of 0 changes
    nothing for the sources before it. A batch lists the rows of source 0 first, then those of source 1, ...

    Args:
        lengths: rows of each source.
        shares: of each source, adding up to 1; or a function of the step (from 0) that returns them.
        batch_size: rows per batch and process.
        steps: batches in an epoch; the next epoch goes on behind them.
        seed: of the permutations.
        start: the first step. Batch t is the same whatever the start.

    Raises:
        OptionError: shares that are negative, NaN, do not add up to 1 or are not one for each source; an empty source
            with a share; no positive batch size or number of steps.

    Example:
        >>> mixture = Mixture([100, 8], [0.9, 0.1], batch_size=4, steps=5)
        >>> [mixture.counts(step) for step in range(5)]
        [[3, 1], [4, 0], [3, 1], [4, 0], [4, 0]]
    """

    def __init__(
        self, lengths: Sequence[int], shares: Shares, batch_size: int, steps: int, seed: int = 0, start: int = 0
    ) -> None:
        _positive("batch_size", batch_size)
        _positive("steps", steps)
        if start < 0:
            raise OptionError(f"start={start}: steps are counted from 0")
        self.lengths, self.seed = tuple(lengths), seed
        self.batch_size, self.steps, self.start, self.epoch = batch_size, steps, start, 0
        self._shares = shares
        self._last: tuple[tuple[float, ...], list[Fraction]] | None = None
        self._totals = [[0] * len(self.lengths)]  # rows of each source before step 0, 1, ..., for moving shares
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._before(start + steps)  # whatever is wrong with the shares, now

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch, at step ``start + epoch * steps``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.epoch * self.steps
        rank, world = rank_and_world()
        for step in range(first, first + self.steps):
            yield self.batch(step)[rank::world]

    def counts(self, step: int) -> list[int]:
        """Rows of each source in the batch of this step, over all processes."""
        rows = self._global_batch()
        parts = self._parts(step)
        ends, begins = _apportion(parts, (step + 1) * rows), _apportion(parts, step * rows)
        return [end - begin for end, begin in zip(ends, begins, strict=True)]

    def batch(self, step: int) -> list[int]:
        """The batch of this step over all processes, as rows of the sources laid end to end."""
        rows: list[int] = []
        offset = 0
        for source, (begin, count) in enumerate(zip(self._before(step), self.counts(step), strict=True)):
            rows += [offset + row for row in self._walk(source, begin, count)]
            offset += self.lengths[source]
        return rows

    def _global_batch(self) -> int:
        return self.batch_size * rank_and_world()[1]

    def _parts(self, step: int) -> list[Fraction]:
        found = self._shares(step) if callable(self._shares) else self._shares
        if not fits(found, Sequence[float]):
            raise OptionError(f"shares({step}) returned {shown(found)}; return a finite number for each source")
        shares = tuple(found)
        if self._last is None or self._last[0] != shares:
            where = f"shares({step})" if callable(self._shares) else "shares"
            parts = _fractions(shares, len(self.lengths), where)
            for source, (part, length) in enumerate(zip(parts, self.lengths, strict=True)):
                if part and length < 1:
                    raise OptionError(
                        f"sources[{source}] has no rows but a share of {float(part):g}; pass rows, or a share of 0"
                    )
            self._last = shares, parts
        return self._last[1]

    def _before(self, step: int) -> list[int]:
        """Rows that each source gave to the batches before this step."""
        if not callable(self._shares):
            return _apportion(self._parts(step), step * self._global_batch())
        while len(self._totals) <= step:
            counts = self.counts(len(self._totals) - 1)
            self._totals.append([a + b for a, b in zip(self._totals[-1], counts, strict=True)])
        return self._totals[step]

    def _walk(self, source: int, begin: int, count: int) -> list[int]:
        """Rows number begin to begin + count of a source's endless walk."""
        rows: list[int] = []
        while count:
            lap, at = divmod(begin, self.lengths[source])
            if self._orders.get(source, (None,))[0] != lap:
                key = generator(self.seed, source, lap)
                self._orders[source] = lap, torch.randperm(self.lengths[source], generator=key)
            found = self._orders[source][1][at : at + count].tolist()
            rows += found
            begin, count = begin + len(found), count - len(found)
        return rows


@checked()
def loader(data: Any, sampler: EpochSampler, batch_size: int, drop_last: bool = True, workers: int = 0) -> DataLoader:
    """A loader over the rows that a sampler draws; for `refimpl.core.train.loop.train`, which moves its epochs on.

    Args:
        data: a tensor, a tuple of tensors of equal length, a map-style torch dataset, or a Hugging Face ``Dataset``
            (in torch's format, if it has no other).
        sampler: which rows, in which order.
        batch_size: rows per batch and process.
        drop_last: leave out the last, smaller batch of an epoch.
        workers: processes that fetch rows. The batches do not depend on it.

    Returns:
        A DataLoader of rows collated as torch does it: for tensors, a list of tensors ``[batch_size, ...]``.

    Raises:
        OptionError: data without a length, rows drawn outside the data, an epoch shorter than a batch.

    Example:
        >>> batches = loader(torch.arange(10, 16), Shuffled(6, seed=0), batch_size=2)
        >>> len(batches), sorted(int(x) for batch in batches for x in batch[0])
        (3, [10, 11, 12, 13, 14, 15])
    """
    rows = _rows(data, "data")
    _positive("batch_size", batch_size)
    least = batch_size if drop_last else 1
    if len(sampler) < least:
        raise OptionError(
            f"batch_size={batch_size}: an epoch of the sampler has {len(sampler)} rows for each process; use 1 to "
            f"{len(sampler)}, or draw more rows"
        )
    low, high = int(sampler.indices().min()), int(sampler.indices().max())
    if low < 0 or high >= len(rows):
        raise OptionError(
            f"sampler draws row {low if low < 0 else high}, data has rows 0 to {len(rows) - 1}; build the sampler for "
            f"{len(rows)} rows"
        )
    return _loader(rows, BatchSampler(sampler, batch_size, drop_last), workers)


@checked()
def mixture_loader(
    sources: Sequence[Any], shares: Shares, batch_size: int, steps: int, seed: int = 0, start: int = 0, workers: int = 0
) -> DataLoader:
    """A loader of `steps` batches that mix several sources with fixed shares, as `Mixture` says.

    Args:
        sources: each as ``data`` in `loader`; their rows must collate with one another.
        shares, batch_size, steps, seed, start: as in `Mixture`.
        workers: processes that fetch rows. The batches do not depend on it.

    Returns:
        A DataLoader of length `steps`.

    Raises:
        OptionError: a source without a length, tensors with rows of different shapes, and what `Mixture` refuses.

    Example:
        >>> new, old = torch.arange(100), -torch.arange(1, 100)
        >>> batches = mixture_loader([new, old], [0.75, 0.25], batch_size=8, steps=3)
        >>> [int((batch[0] < 0).sum()) for batch in batches]
        [2, 2, 2]
    """
    found = [_rows(source, f"sources[{i}]") for i, source in enumerate(sources)]
    if not found:
        raise OptionError("sources is empty; pass at least one")
    shapes = [
        [(list(tensor.shape[1:]), tensor.dtype) for tensor in rows.tensors]
        for rows in found
        if isinstance(rows, TensorDataset)
    ]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise OptionError(f"sources: tensors {i} have rows of {shape}, the first {shapes[0]}; cut all alike")
    mixture = Mixture([len(rows) for rows in found], shares, batch_size, steps, seed, start)
    return _loader(ConcatDataset(found), mixture, workers)


@checked()
def interleave(datasets: Sequence[Any], shares: Sequence[float], seed: int = 0) -> Any:
    """Hugging Face datasets, streaming or not, drawn from at random with these shares until each was read once.

    For sources too large to be indexed; the shares hold on average only. Where lengths are known, `mixture_loader`
    is exact and can begin anywhere.

    Args:
        datasets: all ``datasets.Dataset``, or all ``datasets.IterableDataset``.
        shares: of each, adding up to 1. A dataset with a share of 0 is left out.
        seed: of the draws.

    Returns:
        A dataset of the kind of the parts; the smaller ones repeat until all are used up.

    Raises:
        OptionError: shares as in `Mixture`, something that is no such dataset, or both kinds at once.
        MissingExtra: the package ``datasets`` is not installed.

    Example:
        >>> from datasets import Dataset
        >>> a, b = Dataset.from_dict({"x": [1] * 60}), Dataset.from_dict({"x": [0] * 20})
        >>> mixed = interleave([a, b], [0.75, 0.25])
        >>> 0.6 < sum(mixed["x"]) / len(mixed) < 0.9
        True
    """
    hub = require("datasets", "lab")
    parts = _fractions(tuple(shares), len(datasets), "shares")
    kinds = [
        next((kind for kind in (hub.Dataset, hub.IterableDataset) if isinstance(data, kind)), None) for data in datasets
    ]
    for i, (data, kind) in enumerate(zip(datasets, kinds, strict=True)):
        if kind is None or kind is not kinds[0]:
            raise OptionError(
                f"datasets[{i}] is a {type(data).__name__}; pass only Dataset or only IterableDataset objects"
            )
    kept = [(data, float(part)) for data, part in zip(datasets, parts, strict=True) if part]
    return hub.interleave_datasets(
        [data for data, _ in kept], [part for _, part in kept], seed=seed, stopping_strategy="all_exhausted"
    )


def _apportion(parts: Sequence[Fraction], rows: int) -> list[int]:
    """How many of the first `rows` rows each source has. Grows with `rows` for every source."""
    counts = []
    left = Fraction(1)
    for part in parts[:-1]:
        count = math.floor(rows * part / left) if left else 0
        counts.append(count)
        rows, left = rows - count, left - part
    return [*counts, rows]


def _fractions(shares: Sequence[float], sources: int, where: str) -> list[Fraction]:
    """The shares as exact fractions: 0.05 is a twentieth, so no step is off by a row for a rounding error."""
    if len(shares) != sources or not sources:
        raise OptionError(f"{where} has {len(shares)} entries for {sources} sources; pass one for each")
    for i, share in enumerate(shares):
        if not 0 <= share <= 1:  # NaN fails too
            raise OptionError(f"{where}[{i}]={share}: use 0 to 1")
    if abs(sum(shares) - 1) > 1e-6:
        raise OptionError(
            f"{where}={list(shares)} add up to {sum(shares):g}; divide by the sum, so that they add up to 1"
        )
    parts = [Fraction(float(share)).limit_denominator(10**9) for share in shares]
    return [part / sum(parts) for part in parts]


def _rows(data: Any, name: str) -> Any:
    """`data` as a map-style dataset of rows."""
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, (tuple, list)) and data and all(isinstance(part, Tensor) for part in data):
        if len({len(part) for part in data}) > 1:
            raise OptionError(f"{name} has tensors of {[len(part) for part in data]} rows; pass equal lengths")
        return TensorDataset(*data)
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise OptionError(
            f"{name} is a {type(data).__name__}, which has no length or no rows to index; pass tensors or a map-style "
            "dataset (streams are mixed by `interleave`)"
        )
    if hasattr(data, "with_format") and data.format["type"] is None:  # Hugging Face: lists of numbers otherwise
        return data.with_format("torch")
    return data


def _loader(rows: Dataset, batch_sampler: Sampler[list[int]], workers: int) -> DataLoader:
    if workers < 0:
        raise OptionError(f"workers={workers}: use 0 to load in this process, or more")
    return DataLoader(rows, batch_sampler=batch_sampler, num_workers=workers, persistent_workers=workers > 0)


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r}: use 1 or more")
