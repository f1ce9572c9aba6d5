"""Samplers and mixtures: the same rows for a seed, exact shares at every step, and goings-on where they were left."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from refimpl.core.errors import CheckpointError, OptionError
from refimpl.core.train import sampling
from refimpl.core.train.loop import Recipe, train
from refimpl.core.train.sampling import EpochSampler, Mixture, Shuffled, Weighted, interleave, loader, mixture_loader

SAMPLERS: dict[str, Callable[[int], EpochSampler]] = {
    "shuffled": lambda seed: Shuffled(50, seed),
    "weighted": lambda seed: Weighted(torch.arange(50.0), 40, seed),
    "without replacement": lambda seed: Weighted(torch.arange(50.0), 40, seed, replacement=False),
}


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(sampling, "rank_and_world", lambda: (rank, world))


def values(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


# --- samplers ---


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_depends_on_seed_and_epoch_only(name: str) -> None:
    make = SAMPLERS[name]
    sampler, other = make(0), make(0)
    epochs = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(sampler) == len(epochs[-1])
    torch.manual_seed(99)
    for epoch in (2, 0, 3, 1):  # in another order, with another global seed
        other.set_epoch(epoch)
        assert list(other) == list(other) == epochs[epoch]
    assert len({tuple(rows) for rows in epochs}) == 4
    assert list(make(1)) not in epochs


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("world", [2, 3])
def test_the_processes_share_the_batches_of_one(name: str, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.arange(50)
    whole = values(loader(data, SAMPLERS[name](0), batch_size=4 * world))
    shares = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        shares.append(values(loader(data, SAMPLERS[name](0), batch_size=4)))
    assert len({len(share) for share in shares}) == 1
    for step, batch in enumerate(whole):
        assert [batch[rank::world] for rank in range(world)] == [share[step] for share in shares]


def test_shuffled_gives_every_row_once() -> None:
    assert sorted(Shuffled(37, seed=5)) == list(range(37))


def test_weighted_draws_in_proportion() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0, 0.0])
    drawn = Counter(Weighted(weights, 40_000, seed=2))
    assert set(drawn) == {1, 2, 3}
    for row in (1, 2, 3):
        expected = float(weights[row]) / 8
        assert drawn[row] / 40_000 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 40_000))


def test_without_replacement_each_next_row_is_drawn_among_those_left() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0, 0.0])
    sampler = Weighted(weights, 3, seed=1, replacement=False)
    orders = Counter(tuple(sampler.draw(epoch).tolist()) for epoch in range(8000))
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    for first, second, third in orders:
        expected = float(weights[first] / 8 * weights[second] / (8 - weights[first]))
        assert orders[first, second, third] / 8000 == pytest.approx(expected, abs=0.025)


def test_extreme_weights() -> None:
    assert set(Weighted([1e-300, 1e300, 0.0], 100)) == {1}
    assert sorted(Weighted([1e-300, 1e300, 0.0], 2, replacement=False)) == [0, 1]
    assert set(Weighted(torch.tensor([3, 0]))) == {0}  # integers


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("taken", [0, 3, 10])
def test_a_saved_iteration_goes_on_bit_for_bit(name: str, taken: int) -> None:
    data = torch.arange(50)
    sampler, whole_sampler = SAMPLERS[name](0), SAMPLERS[name](0)
    sampler.set_epoch(2)
    whole_sampler.set_epoch(2)
    whole = values(loader(data, whole_sampler, batch_size=4))
    iterator = iter(loader(data, sampler, batch_size=4))
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(sampler.state_dict()))
    assert state["position"] == 4 * taken
    resumed = SAMPLERS[name](0)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(2)  # what a loop over epochs does first
    again = loader(data, resumed, batch_size=4)
    assert values(again) == whole[taken:]
    assert values(again) == whole  # only the first iteration is a rest
    resumed.set_epoch(3)
    sampler.set_epoch(3)
    assert list(resumed) == list(sampler)


def test_a_state_fits_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Shuffled(48, seed=0)
    iterator = iter(sampler)
    taken = [next(iterator) for _ in range(12)]
    state, rest = sampler.state_dict(), list(iterator)
    shares = []
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        half = Shuffled(48, seed=0)
        half.load_state_dict(state)
        shares.append(list(half))
    assert [row for pair in zip(*shares, strict=True) for row in pair] == rest
    assert set(taken).isdisjoint(rest)
    with pytest.raises(CheckpointError, match="position=7: use a multiple of the 2 processes"):
        Shuffled(48, seed=0).load_state_dict(state | {"position": 7})


def test_a_state_of_another_sampler_is_refused() -> None:
    state = Shuffled(50, seed=0).state_dict()
    for other in (Shuffled(50, seed=1), Shuffled(51, seed=0), Weighted([1.0] * 50)):
        with pytest.raises(CheckpointError, match="draws other rows"):
            other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="position=51"):
        Shuffled(50, seed=0).load_state_dict(state | {"position": 51})


class Drawn(EpochSampler):
    def __init__(self, rows: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def draw(self, epoch: int) -> Tensor:
        return self.rows(epoch)


def test_an_epoch_of_another_kind_is_refused() -> None:
    with pytest.raises(OptionError, match=r"Drawn.draw\(0\) returned torch.float32 \[3\]"):
        len(Drawn(lambda epoch: torch.zeros(3)))
    sampler = Drawn(lambda epoch: torch.arange(4 + epoch))
    assert list(sampler) == [0, 1, 2, 3]
    sampler.set_epoch(1)
    with pytest.raises(OptionError, match=r"draw\(1\) returned 5 rows, draw\(0\) 4; give every epoch as many"):
        list(sampler)


# --- loaders ---


class Rows(Dataset):
    """Map-style, with dictionaries for rows."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((2,), index), "y": index}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(20))


@pytest.mark.parametrize(
    "make",
    [
        lambda workers: loader(Rows(), Shuffled(20), 3, workers=workers),
        lambda workers: mixture_loader([Rows(), Rows()], [0.6, 0.4], 5, steps=6, workers=workers),
    ],
)
def test_batches_do_not_depend_on_the_workers(make: Callable[[int], Any]) -> None:
    for alone, helped in zip(make(0), make(2), strict=True):
        assert torch.equal(alone["x"], helped["x"])
        assert torch.equal(alone["y"], helped["y"])


def test_hugging_face_rows_arrive_as_tensors() -> None:
    from datasets import Dataset as HuggingFace

    data = HuggingFace.from_dict({"input_ids": [[i, i + 1, i + 2] for i in range(12)]})
    (batch,) = loader(data, Shuffled(12, seed=3), batch_size=12)
    assert batch["input_ids"].shape == (12, 3)
    assert batch["input_ids"][:, 0].tolist() == list(Shuffled(12, seed=3))
    (mixed,) = mixture_loader([data, data], [0.5, 0.5], batch_size=8, steps=1)
    assert mixed["input_ids"].shape == (8, 3)


def test_the_last_batch() -> None:
    data = torch.arange(10), torch.arange(10.0)
    sizes = lambda **more: [len(batch[1]) for batch in loader(data, Shuffled(10), 4, **more)]  # noqa: E731
    assert sizes() == [4, 4]
    assert sizes(drop_last=False) == [4, 4, 2]


def reaches_train(data: Any, recipe: Recipe, **more: Any) -> list[list[int]]:
    """The rows that `train` feeds to a model, batch by batch."""
    seen: list[list[int]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0].int().flatten().tolist())
        return model(batch[0]).mean()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
    train(model, data, loss, recipe, progress=False, **more)
    return seen


ROWS = torch.arange(24.0)[:, None]


@pytest.mark.parametrize("workers", [0, 1])
def test_train_moves_the_epochs_on(workers: int) -> None:
    data = loader(ROWS, Shuffled(24, seed=4), batch_size=8, workers=workers)
    expected = []
    for epoch in range(3):
        sampler = Shuffled(24, seed=4)
        sampler.set_epoch(epoch)
        rows = list(sampler)
        expected += [rows[i : i + 8] for i in range(0, 24, 8)]
    assert reaches_train(data, Recipe(8)) == expected[:8]
    assert reaches_train(data, Recipe(8)) == expected[:8]  # a second run begins at epoch 0 again


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["sampler", "mixture"])
def test_train_resumes_in_the_middle_of_an_epoch(kind: str, tmp_path: Path) -> None:
    def make() -> Any:
        if kind == "sampler":
            return loader(ROWS, Weighted(torch.arange(24.0), 24, seed=4), batch_size=4)
        return mixture_loader([ROWS, -ROWS], [0.7, 0.3], batch_size=4, steps=6)

    def stop(step: int, model: nn.Module) -> None:
        if step == 10:
            raise Stop

    whole = reaches_train(make(), Recipe(16))
    with pytest.raises(Stop):
        reaches_train(make(), Recipe(16), folder=tmp_path, checkpoint_every=4, after_step=[stop])
    assert reaches_train(make(), Recipe(16), folder=tmp_path, checkpoint_every=4) == whole[8:]


# --- mixtures ---


@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.25, 1 / 3, 1])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_shares_are_exact_at_every_step(share: float, batch_size: int) -> None:
    """The counts of the definition, without its rounding: the share as a fraction of whole numbers."""
    numerator, denominator = {0.01: (1, 100), 0.05: (1, 20), 0.25: (1, 4), 1 / 3: (1, 3)}.get(share, (share, 1))
    mixture = Mixture([1000, 77], [share, 1 - share], batch_size, steps=400)
    total = 0
    for step in [*range(400), 10**12]:
        first, last = mixture.counts(step)
        assert first >= 0 and last >= 0 and first + last == batch_size
        if step == 10**12:
            total = step * batch_size * numerator // denominator
        total += first
        assert total == (step + 1) * batch_size * numerator // denominator
        if step < 400:
            rows = mixture.batch(step)
            assert sum(row < 1000 for row in rows) == first


def test_many_sources_stay_near_their_shares() -> None:
    shares = [0.3, 0.0, 0.3, 0.15, 0.05, 0.2]
    for batch_size in (1, 2, 16):
        mixture = Mixture([10] * 6, shares, batch_size, steps=1)
        totals = [0] * 6
        for step in range(1000):
            counts = mixture.counts(step)
            assert min(counts) >= 0 and sum(counts) == batch_size
            totals = [a + b for a, b in zip(totals, counts, strict=True)]
            for total, share in zip(totals, shares, strict=True):
                assert -1 < total - (step + 1) * batch_size * share < 3
        assert totals[1] == 0


def test_every_source_walks_through_permutations_of_its_own() -> None:
    mixture = Mixture([10, 15], [0.4, 0.6], batch_size=5, steps=10)
    walks: list[list[int]] = [[], []]
    for batch in mixture:
        for row in batch:
            walks[row >= 10].append(row if row < 10 else row - 10)
    laps = [walks[0][:10], walks[0][10:]], [walks[1][:15], walks[1][15:]]
    assert all(sorted(lap) == list(range(len(lap))) for source in laps for lap in source)
    assert laps[0][0] != laps[0][1] and laps[1][0] != laps[1][1]


def test_a_share_of_zero_changes_no_batch() -> None:
    new, old = torch.arange(40), torch.arange(100, 130)
    alone = values(mixture_loader([new], [1], batch_size=6, steps=20, seed=3))
    assert values(mixture_loader([new, old], [1, 0], batch_size=6, steps=20, seed=3)) == alone
    assert values(mixture_loader([new, old[:0]], [1.0, 0.0], batch_size=6, steps=20, seed=3)) == alone
    mixed = values(mixture_loader([new, old], [0.75, 0.25], batch_size=8, steps=20, seed=3))
    order = [row for batch in alone for row in batch]
    rest = [row for batch in mixed for row in batch if row < 100]
    assert rest == order[: len(rest)]  # the source walks the same way, only more slowly


def test_a_batch_depends_on_seed_and_step_only() -> None:
    sizes, shares = [30, 20], [0.8, 0.2]
    whole = list(Mixture(sizes, shares, 8, steps=60))
    assert list(Mixture(sizes, shares, 8, steps=10, start=50)) == whole[50:]
    mixture = Mixture(sizes, shares, 8, steps=20)
    assert [mixture.batch(step) for step in (59, 3, 17)] == [whole[59], whole[3], whole[17]]
    mixture.set_epoch(2)
    assert list(mixture) == whole[40:]
    assert list(Mixture(sizes, shares, 8, steps=60, seed=1)) != whole


def test_shares_may_move() -> None:
    chain = lambda step: [1, 0] if step < 5 else [0, 1] if step < 9 else [0.5, 0.5]  # noqa: E731
    mixture = Mixture([12, 16], chain, batch_size=4, steps=12)
    assert [mixture.counts(step) for step in range(12)] == [[4, 0]] * 5 + [[0, 4]] * 4 + [[2, 2]] * 3
    whole = list(mixture)
    first = [row for batch in whole for row in batch if row < 12]
    assert sorted(first[:12]) == list(range(12)) and sorted(first[12:24]) != first[12:24]
    assert list(Mixture([12, 16], chain, batch_size=4, steps=3, start=9)) == whole[9:]


@pytest.mark.parametrize("world", [2, 4])
def test_the_processes_share_a_mixture(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [torch.arange(40), torch.arange(100, 130)]
    whole = values(mixture_loader(sources, [0.7, 0.3], batch_size=12, steps=9))
    shares = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        shares.append(values(mixture_loader(sources, [0.7, 0.3], batch_size=12 // world, steps=9)))
    for step, batch in enumerate(whole):
        assert [batch[rank::world] for rank in range(world)] == [share[step] for share in shares]


@pytest.mark.parametrize("streaming", [False, True])
def test_interleaved_datasets(streaming: bool) -> None:
    from datasets import Dataset as HuggingFace

    parts: list[Any] = [HuggingFace.from_dict({"x": [i] * n}) for i, n in ((0, 300), (1, 100), (2, 5))]
    if streaming:
        parts = [part.to_iterable_dataset() for part in parts]
    found = [row["x"] for row in interleave(parts, [0.75, 0.25, 0.0], seed=1)]
    assert found == [row["x"] for row in interleave(parts, [0.75, 0.25, 0.0], seed=1)]
    assert found != [row["x"] for row in interleave(parts, [0.75, 0.25, 0.0], seed=2)]
    assert 2 not in found and found.count(0) >= 300 and found.count(1) >= 100
    assert found.count(0) / len(found) == pytest.approx(0.75, abs=0.08)


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shuffled(0), "n=0: use 1 or more"),
        (lambda: Weighted(torch.tensor([1.0, math.nan])), r"weights\[1\]=nan: use finite weights of 0 or more"),
        (lambda: Weighted([1.0, math.nan]), r"weights\[1\]=nan: use a finite number"),
        (lambda: Weighted([1.0, -2.0]), r"weights\[1\]=-2.0"),
        (lambda: Weighted([math.inf]), r"weights\[0\]=inf"),
        (lambda: Weighted([0.0, 0.0]), "weights are all 0"),
        (lambda: Weighted(torch.ones(2, 2)), r"weights have shape \[2, 2\]"),
        (lambda: Weighted([]), r"weights have shape \[0\]"),
        (lambda: Weighted([1.0], 0), "size=0"),
        (lambda: Weighted([1.0, 0.0, 1.0], 3, replacement=False), "size=3: without replacement only 2 rows"),
        (lambda: loader(Stream(), Shuffled(20), 4), "data is a Stream, which has no length"),
        (lambda: loader(iter([1]), Shuffled(1), 1), "data is a list_iterator"),
        (lambda: loader((torch.zeros(3), torch.zeros(4)), Shuffled(3), 1), r"data has tensors of \[3, 4\] rows"),
        (lambda: loader(torch.zeros(8), Shuffled(9), 4), "sampler draws row 8, data has rows 0 to 7"),
        (lambda: loader(torch.zeros(8), Drawn(lambda e: torch.arange(-1, 3)), 4), "sampler draws row -1"),
        (lambda: loader(torch.zeros(8), Shuffled(8), 9), "batch_size=9: an epoch of the sampler has 8 rows"),
        (lambda: loader(torch.zeros(8), Shuffled(8), 0), "batch_size=0"),
        (lambda: loader(torch.zeros(8), Shuffled(8), 4, workers=-1), "workers=-1"),
        (lambda: Mixture([5, 5], [0.5, 0.4], 4, 1), r"shares=\[0.5, 0.4\] add up to 0.9"),
        (lambda: Mixture([5, 5], [1.5, -0.5], 4, 1), r"shares\[0\]=1.5: use 0 to 1"),
        (lambda: Mixture([5, 5], [math.nan, 1], 4, 1), r"shares\[0\]=nan"),
        (lambda: Mixture([5, 5], [1.0], 4, 1), "shares has 1 entries for 2 sources"),
        (lambda: Mixture([5, 0], [0.5, 0.5], 4, 1), r"sources\[1\] has no rows but a share of 0.5"),
        (lambda: Mixture([5, 5], lambda step: [1, 0] if step < 3 else [1, 1], 4, 9), r"shares\(3\)=\[1, 1\] add up"),
        (lambda: Mixture([5], [1], 4, 0), "steps=0"),
        (lambda: Mixture([5], [1], 0, 4), "batch_size=0"),
        (lambda: Mixture([5], [1], 4, 4, start=-1), "start=-1"),
        (lambda: mixture_loader([], [], 4, 4), "sources is empty"),
        (lambda: mixture_loader([torch.zeros(4), Stream()], [1, 0], 4, 4), r"sources\[1\] is a Stream"),
        (
            lambda: mixture_loader([torch.zeros(4, 3), TensorDataset(torch.zeros(4, 2))], [1, 0], 4, 4),
            r"tensors 1 have rows of \[\(\[2\], torch.float32\)\]",
        ),
        (lambda: interleave([Rows()], [1.0]), r"datasets\[0\] is a Rows; pass only Dataset or only Iterable"),
        (lambda: interleave([Rows()], [0.5]), "add up to 0.5"),
    ],
)
def test_bad_input_names_the_remedy(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()
