"""Step 2 of MER, the data: batches with new rows of the current stage and rows from the replay buffer."""

from __future__ import annotations

import hashlib
import queue
import threading
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from refimpl.continual.meta_experience_replay.buffer import ReplayBuffer
from refimpl.core.device import rank_and_world
from refimpl.core.errors import OptionError
from refimpl.core.train.sampling import Mixture


@dataclass(frozen=True)
class Stage:
    """One domain of the chain.

    Attributes:
        rows: a tensor [n, ...], or a map-style data set whose entries are such rows or dictionaries with "input_ids".
        steps: batches of this stage.
    """

    rows: Any
    steps: int


class ReplayLoader(DataLoader):
    """Step 2 of MER: the data of `refimpl.core.train.loop.train`.

    From batch number `begin` on, a share `replay` of the rows comes from the buffer, exact to one row after every step
    (`refimpl.core.train.sampling.Mixture`). Old rows are drawn before the new rows of the batch are stored. New rows come
    in seeded permutations of their stage.

    Batch t depends only on the stages, the seed and the buffer at the start. A resumed training goes through the stream
    again from its first step, without the model, and so has the same buffer at every step. Under torchrun each process
    goes through the whole stream with a buffer of its own and takes every world-th row, so that any number of processes
    compute what one computes.

    Args:
        stages: in the order of the chain.
        batch_size: rows per batch and process.
        replay: alpha, share of replayed rows.
        buffer: the buffer M, a separate one for each process.
        begin: number (from 0) of the first batch with replayed rows. The buffer must not be empty by then.
        seed: of the permutations.
        run: name of this run in the buffer; another run with the same buffer needs another name.
        prefetch: batches that a thread prepares in advance; 0 prepares each when it is requested.

    Yields:
        Rows [batch_size, ...], and their numbers in the stream of all rows, int64 [batch_size]. Rows with a number below
        that of the first new row of the batch (of all processes) are replayed ones.

    Raises:
        OptionError: a value outside its range, stages without a length or with rows unlike the buffer's, replay from an
            empty buffer, or more steps requested than the chain has.
        CheckpointError: `run` names another run of this buffer, or the buffer is damaged.

    Example:
        >>> stages = [Stage(torch.zeros(8, 3), steps=2), Stage(torch.ones(8, 3), steps=2)]
        >>> buffer = ReplayBuffer(capacity=16, row=(3,))
        >>> for rows, items in ReplayLoader(stages, 4, replay=0.25, buffer=buffer, begin=2):
        ...     print(rows[:, 0].int().tolist(), items[:3].tolist(), "replayed", items[3:].tolist())
        [0, 0, 0, 0] [0, 1, 2] replayed [3]
        [0, 0, 0, 0] [4, 5, 6] replayed [7]
        [1, 1, 1, 0] [8, 9, 10] replayed [0]
        [1, 1, 1, 0] [11, 12, 13] replayed [0]
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        batch_size: int,
        replay: float,
        buffer: ReplayBuffer,
        *,
        begin: int = 1,
        seed: int = 0,
        run: str = "run",
        prefetch: int = 2,
    ) -> None:
        if not 0 <= replay < 1:
            raise OptionError(f"replay={replay}: it is a share of each batch, use 0 to less than 1")
        if begin < 0 or prefetch < 0:
            raise OptionError(f"begin={begin}, prefetch={prefetch}: use 0 or more")
        if not stages:
            raise OptionError("stages: it is empty; pass at least one")
        for number, stage in enumerate(stages):
            _check(number, stage, buffer)
        self._stages, self._buffer, self._run, self._prefetch = list(stages), buffer, run, prefetch
        self._ends = list(accumulate(stage.steps for stage in stages))
        self._firsts = [0, *accumulate(len(stage.rows) for stage in stages)]

        def shares(step: int) -> list[float]:
            old = replay if step >= begin else 0.0  # alpha
            stage = self._stage(step)
            return [1 - old if other == stage else 0.0 for other in range(len(stages))] + [old]

        # the last source represents the buffer; only the number of its rows in each batch is used
        sizes = [len(stage.rows) for stage in stages] + [1]
        self._mixture = Mixture(sizes, shares, batch_size, self._ends[-1], seed)
        self._about = {
            "stages": [[len(stage.rows), stage.steps] for stage in stages],
            "first rows": [_digest(_take(stage.rows, [0])) for stage in stages],
            "batch": sum(self.counts(0)),
            "replay": replay,
            "begin": begin,
            "seed": seed,
        }
        if replay > 0 and begin >= self._ends[-1]:
            raise OptionError(
                f"begin={begin}: the chain has {self._ends[-1]} batches, so none would have replayed rows; use "
                f"{self._ends[-1] - 1} or less, or replay=0"
            )
        if replay > 0 and begin == 0 and not buffer.begin(run, self._about):
            raise OptionError("begin=0: the buffer is empty then; use 1 or more, or a buffer with rows")
        super().__init__(range(self._ends[-1]), batch_size=None, sampler=_Steps(self._ends[-1]))  # type: ignore[arg-type]

    def counts(self, step: int) -> tuple[int, int]:
        """New and replayed rows of the batch of a step (from 0), over all processes.

        Example:
            >>> loader = ReplayLoader([Stage(torch.zeros(9, 1), 9)], 3, 0.5, ReplayBuffer(99, (1,)))
            >>> [loader.counts(step) for step in range(4)]
            [(3, 0), (2, 1), (1, 2), (2, 1)]
        """
        *new, old = self._mixture.counts(step)  # (1 - alpha) B and alpha B, with the fractions carried over
        return sum(new), old

    def __iter__(self) -> Any:
        return self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        # the first batch does not change the buffer: `train` reads it to identify the run, then starts again
        base = self._buffer.begin(self._run, self._about)
        batch, fresh = self._make(0, base)
        yield batch
        rest = self._rest(base, fresh)
        yield from _ahead(rest, self._prefetch) if self._prefetch else rest

    def _rest(self, base: int, fresh: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        self._buffer.rewind(base)
        self._buffer.add(fresh)
        for step in range(1, self._ends[-1]):
            batch, fresh = self._make(step, self._buffer.seen)
            self._buffer.add(fresh)  # M <- M with the new rows, after the draw: no row is replayed in its own step
            yield batch

    def _make(self, step: int, seen: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """This process's part of a batch, and the new rows of all processes; `seen` rows were added before it."""
        new, old = self.counts(step)
        stage = self._stage(step)
        first = self._firsts[stage]
        rows = _take(self._stages[stage].rows, [row - first for row in self._mixture.batch(step)[:new]])
        together, items = rows, torch.arange(seen, seen + new)
        if old:
            replayed, known = self._buffer.sample(old, draw=step, seen=seen)
            together, items = torch.cat([rows, replayed.to(rows.dtype)]), torch.cat([items, known])
        rank, world = rank_and_world()
        return (together[rank::world], items[rank::world]), rows

    def _stage(self, step: int) -> int:
        return min(bisect(self._ends, step), len(self._ends) - 1)


class _Steps(Sampler[int]):
    """The numbers of the steps, for one pass."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def set_epoch(self, epoch: int) -> None:
        if epoch > 0:
            raise OptionError(
                f"recipe: it asks for more than the {self.steps} batches of the chain; set steps to that, or give the "
                "stages more"
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.steps))


def _check(number: int, stage: Stage, buffer: ReplayBuffer) -> None:
    try:
        length = len(stage.rows)
    except TypeError as error:
        raise OptionError(
            f"stages[{number}].rows is a {type(stage.rows).__name__} without a length, which a permutation of it needs; "
            "pass a map-style data set (a Hugging Face stream: take rows of it with .take and a list)"
        ) from error
    if length < 1 or stage.steps < 1:
        raise OptionError(f"stages[{number}] has {length} rows and {stage.steps} steps; use 1 or more of both")
    shape = tuple(_take(stage.rows, [0]).shape[1:])
    if shape != buffer.row:
        raise OptionError(
            f"stages[{number}].rows are {list(shape)}, the buffer holds rows of {list(buffer.row)}; make it with "
            f"row={shape}"
        )


def _take(rows: Any, indices: Sequence[int]) -> Tensor:
    if isinstance(rows, Tensor):
        return rows[torch.as_tensor(indices, dtype=torch.long)]
    # without indices (a batch of replayed rows only) an empty tensor still needs the shape of a row
    entries = (rows[index] for index in indices or [0])
    found = [torch.as_tensor(e["input_ids"] if isinstance(e, Mapping) else e) for e in entries]
    return torch.stack(found)[: len(indices)]


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]


def _ahead(made: Iterator[Any], count: int) -> Iterator[Any]:
    """The entries of `made`, prepared by a thread up to `count` in advance; the thread ends when the reader does."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(count)
    stop = threading.Event()

    def offer(entry: tuple[Any, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for entry in made:
                offer((entry, None))
                if stop.is_set():
                    return
            offer((None, StopIteration()))
        except BaseException as error:
            offer((None, error))

    thread = threading.Thread(target=work, name="replay", daemon=True)
    thread.start()
    try:
        while True:
            entry, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield entry
    finally:
        stop.set()
        thread.join()
