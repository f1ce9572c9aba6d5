"""The replay buffer: exact bytes, equal when opened again, uniform when full, and damage that is named."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from refimpl.continual.meta_experience_replay import ReplayBuffer
from refimpl.core.errors import CheckpointError, OptionError


def rows(count: int, start: int = 0, width: int = 3) -> torch.Tensor:
    """Rows that tell their number in the stream."""
    return (torch.arange(start, start + count)[:, None] * 10 + torch.arange(width)) % 60000


@pytest.mark.parametrize(
    ("dtype", "bytes_each"), [("uint8", 1), ("uint16", 2), ("int32", 4), ("int64", 8), ("float32", 4)]
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_bytes_are_counted_exactly(tmp_path: Path, dtype: str, bytes_each: int, on_disk: bool):
    buffer = ReplayBuffer(7, (5, 3), dtype, folder=tmp_path / "b" if on_disk else None)
    buffer.add(torch.zeros(2, 5, 3))
    storage = buffer.storage
    assert storage.row == 15 * bytes_each + 12
    assert storage.used == 2 * storage.row
    if on_disk:
        files = {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}
        assert storage.disk == sum(files.values())
        assert sum(files.values()) - files["buffer.json"] == 7 * storage.row
        assert storage.memory == 0
    else:
        assert (storage.memory, storage.disk) == (7 * storage.row, 0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_rows_come_back_as_they_were(dtype: str):
    most = {"uint8": 255, "uint16": 65535, "int32": 2**31 - 1, "int64": 2**63 - 1}[dtype]
    stored = torch.tensor([[0, 1], [most, most - 1]])
    buffer = ReplayBuffer(4, (2,), dtype)
    buffer.add(stored)
    found, items = buffer.sample(50, draw=3)
    assert found.dtype == torch.int64 and torch.equal(found, stored[items]) and set(items.tolist()) == {0, 1}


def test_floats_come_back_bit_for_bit():
    stored = torch.randn(4, 2, 3)
    buffer = ReplayBuffer(4, (2, 3), "float32")
    buffer.add(stored)
    found, items = buffer.sample(20, draw=0)
    assert found.dtype == torch.float32 and torch.equal(found, stored[items])


def test_memory_and_disk_are_one_buffer_and_opening_again_changes_nothing(tmp_path: Path):
    kept = [ReplayBuffer(20, (3,), "uint16", folder, seed=4) for folder in (None, tmp_path)]
    for buffer in kept:
        buffer.begin("run", {"batch": 8})
        for start in range(0, 64, 8):
            buffer.add(rows(8, start))
    kept += [ReplayBuffer.open(tmp_path), ReplayBuffer(20, (3,), "uint16", tmp_path, seed=4)]
    for buffer in kept[1:]:
        assert (buffer.seen, len(buffer)) == (64, 20)
        assert torch.equal(buffer.items, kept[0].items)
        for mine, other in zip(buffer.sample(30, draw=5), kept[0].sample(30, draw=5), strict=True):
            assert torch.equal(mine, other)
        assert buffer.begin("run", {"batch": 8}) == 0
    assert kept[1].storage == kept[2].storage


def test_cutting_the_stream_otherwise_changes_nothing():
    kept = []
    for size in (1, 7, 100):
        buffer = ReplayBuffer(10, (3,), seed=2)
        for start in range(0, 100, size):
            buffer.add(rows(min(size, 100 - start), start))
        kept.append(buffer)
    for buffer in kept[1:]:
        assert torch.equal(buffer.items, kept[0].items)
        assert torch.equal(buffer.sample(40, draw=0)[0], kept[0].sample(40, draw=0)[0])
    assert torch.equal(kept[0].sample(40, draw=0)[0], rows(100)[kept[0].sample(40, draw=0)[1]])


def test_a_full_buffer_keeps_every_row_with_the_same_probability():
    capacity, seen, trials = 8, 40, 1500
    counts = torch.zeros(seen)
    for seed in range(trials):
        buffer = ReplayBuffer(capacity, (1,), seed=seed)
        buffer.add(torch.zeros(seen, 1))
        assert len(set(buffer.items.tolist())) == capacity
        counts[buffer.items] += 1
    expected = trials * capacity / seen
    # of a draw without replacement the variance is smaller than multinomial by (1 - capacity / seen)
    statistic = float(((counts - expected) ** 2).sum() / expected / (1 - capacity / seen) * (seen - 1) / seen)
    assert stats.chi2(seen - 1).cdf(statistic) < 0.999
    assert float(counts[:capacity].mean()) == pytest.approx(expected, rel=0.05)  # neither old nor new ones


def test_draws_are_uniform_and_differ_from_step_to_step():
    buffer = ReplayBuffer(16, (1,), seed=1)
    buffer.add(torch.arange(16)[:, None])
    drawn = torch.cat([buffer.sample(4, draw=step)[1] for step in range(1000)])
    assert stats.chisquare(torch.bincount(drawn, minlength=16).numpy()).pvalue > 1e-3
    first, again = drawn[:-4].reshape(-1, 4), drawn[4:].reshape(-1, 4)
    same = float((first == again).float().mean())
    assert same == pytest.approx(1 / 16, abs=0.02)  # draws of neighbouring steps know nothing of each other
    assert torch.equal(buffer.sample(4, draw=7)[1], drawn[28:32])


def test_as_it_was_and_back_again():
    buffer = ReplayBuffer(100, (3,), seed=3)
    buffer.add(rows(10))
    early = buffer.sample(6, draw=2)
    buffer.add(rows(50, 10))
    assert torch.equal(buffer.sample(6, draw=2, seen=10)[1], early[1])
    buffer.rewind(10)
    assert torch.equal(buffer.sample(6, draw=2)[0], early[0]) and buffer.seen == 10
    with pytest.raises(OptionError, match="seen=11: the buffer has seen 10 rows"):
        buffer.rewind(11)


def test_what_was_replaced_does_not_come_back():
    buffer = ReplayBuffer(10, (3,))
    buffer.add(rows(8))
    assert buffer.begin("second", {}) == 8
    buffer.add(rows(8, 8))
    for again in (lambda: buffer.rewind(8), lambda: buffer.sample(1, draw=0, seen=8)):
        with pytest.raises(CheckpointError, match="seen=8: some of the rows .* have been replaced"):
            again()
    buffer.rewind(0)  # to the start is always possible: everything is added again
    assert len(buffer) == 0


def test_a_name_belongs_to_one_run(tmp_path: Path):
    buffer = ReplayBuffer(10, (3,), folder=tmp_path)
    buffer.begin("spring", {"replay": 0.25})
    with pytest.raises(CheckpointError, match=r"run='spring': folder=.* other options .*0.25.* now .*0.5"):
        ReplayBuffer.open(tmp_path).begin("spring", {"replay": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity=0"),
        ({"row": ()}, r"row=\(\)"),
        ({"row": (3, 0)}, r"row=\(3, 0\)"),
        ({"dtype": "int23"}, "dtype='int23'.*did you mean 'int32'"),
        ({"limit": 1000}, "capacity=100: takes 2400 bytes, limit=1000 allows 41 rows"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(OptionError, match=message):
        ReplayBuffer(**{"capacity": 100, "row": (3,), **options})


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (torch.zeros(2, 4), r"rows is \[2, 4\], the buffer holds rows of \[3\]"),
        (torch.zeros(3), r"rows is \[3\]"),
        (torch.full((1, 3), 70000), "70000 .*dtype='uint16' cannot hold"),
        (torch.full((1, 3), -1), "from -1 .*dtype='uint16'"),
        (torch.full((1, 3), 0.5), "from 0.5"),
        (torch.full((1, 3), torch.nan), "from nan"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_that_do_not_fit(added: torch.Tensor, message: str):
    buffer = ReplayBuffer(10, (3,), "uint16")
    with pytest.raises(OptionError, match=message):
        buffer.add(added)
    assert buffer.seen == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits on files as Linux knows them")
def test_a_full_disk_is_an_error_before_anything_is_lost(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OptionError, match=r"capacity=10000: takes 240000 bytes, and folder=.* no room"):
            ReplayBuffer(10_000, (3,), folder=tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "b").iterdir())
    assert len(ReplayBuffer(10_000, (3,), folder=tmp_path / "b")) == 0  # with room it works


def test_without_allocation_by_the_system_the_bytes_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    buffer = ReplayBuffer(200_000, (3,), folder=tmp_path)
    assert (tmp_path / "rows.bin").stat().st_size == 200_000 * 12
    assert (tmp_path / "rows.bin").stat().st_blocks * 512 >= 200_000 * 12
    buffer.add(rows(3))


def damaged(folder: Path, what: str) -> None:
    if what == "cut off":
        with (folder / "rows.bin").open("r+b") as file:
            file.truncate(30)
    elif what == "no index":
        (folder / "slots.bin").unlink()
    elif what == "no metadata":
        (folder / "buffer.json").unlink()
    elif what == "broken metadata":
        (folder / "buffer.json").write_text('{"format": 1, "capac')
    elif what == "other metadata":
        (folder / "buffer.json").write_text(json.dumps([1]))
    elif what == "flipped bits":
        content = bytearray((folder / "rows.bin").read_bytes())
        content[:12] = bytes(byte ^ 1 for byte in content[:12])
        (folder / "rows.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut off", "rows.bin has 30 bytes, not 120; the buffer is damaged"),
        ("no index", "slots.bin has 0 bytes, not 120"),
        ("no metadata", "holds rows.bin but no buffer.json"),
        ("broken metadata", "cannot be read"),
        ("other metadata", "does not describe a replay buffer"),
        ("flipped bits", "row 0 of rows.bin is not what was stored"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, what: str, message: str):
    ReplayBuffer(10, (3,), folder=tmp_path).add(rows(1))
    damaged(tmp_path, what)
    with pytest.raises(CheckpointError, match=message):
        ReplayBuffer(10, (3,), folder=tmp_path).sample(1, draw=0)


@pytest.mark.parametrize("options", [{"capacity": 11}, {"row": (4,)}, {"dtype": "int64"}, {"seed": 1}])
def test_another_buffer_in_the_folder(tmp_path: Path, options: dict):
    ReplayBuffer(10, (3,), folder=tmp_path)
    with pytest.raises(CheckpointError, match=f"holds a buffer with {next(iter(options))}="):
        ReplayBuffer(**{"capacity": 10, "row": (3,), "folder": tmp_path, **options})


def test_no_buffer_to_open(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no replay buffer"):
        ReplayBuffer.open(tmp_path)
