"""Every damaged file is refused by name: truncated, not JSON, other values than it should have, NaN, a folder, a pipe.

Each reader of the package gets its own files, damaged in all ways that their format allows. What does no harm may pass.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refimpl
from refimpl.cli import charts
from refimpl.core.cache import CompressedCache, Policy, prefill
from refimpl.core.files.checkpoint import MANIFEST
from refimpl.core.train.loop import Recipe, batches, train
from refimpl.lab import models
from tests.test_bad_inputs import TOKENS, answer, loss, quantised, tiny

#: In place of any value in a JSON file.
VALUES = (None, True, -1, 10**6, 10**30, 0.5, float("nan"), "", "sequental", [], [[1]], {}, {"a": "b"})


def places(tree: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """Places in a JSON value down to a depth: of a list the first entry, of dictionaries with many entries a few."""
    if isinstance(tree, dict) and depth:
        for key in list(tree) if len(tree) < 40 else list(tree)[:3]:
            yield (key,)
            yield from ((key, *rest) for rest in places(tree[key], depth - 1))
    elif isinstance(tree, list) and tree and depth:
        yield (0,)
        yield from ((0, *rest) for rest in places(tree[0], depth - 1))


def changed(tree: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    return copy


def damaged_json(text: str, depth: int) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "half", text[: len(text) // 2].encode()
    yield "no JSON", b"once upon a time"
    yield "Latin-1", b'{"caf\xe9": 1}'
    yield "deep", b"[" * 100_000
    for value in VALUES:
        yield f"{value!r:.20} as a whole", json.dumps(value).encode()
    tree = json.loads(text)
    for place in places(tree, depth):
        where = ".".join(map(str, place))
        yield f"without {where}", json.dumps(changed(tree, place, lambda inner, key: inner.pop(key))).encode()
        for value in VALUES:
            other = changed(tree, place, lambda inner, key, value=value: inner.__setitem__(key, value))  # type: ignore[misc]
            yield f"{where}={value!r:.20}", json.dumps(other).encode()


def damaged_tensors(data: bytes, depth: int) -> Iterator[tuple[str, bytes]]:
    """Damages of a safetensors file: length of the header, header, numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]

    def file(header: Any, numbers: bytes = numbers) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + numbers

    for size in (0, 4, 8, 8 + length // 2, 8 + length, len(data) - 1):
        yield f"{size} bytes", data[:size]
    yield "no safetensors", b"once upon a time " * 9
    yield "a long header", struct.pack("<Q", 10**15) + data[8:]
    yield "NaN", data[: 8 + length] + b"\xff" * len(numbers)
    names = [name for name in header if name != "__metadata__"]
    yield "no tensors", file({"__metadata__": header.get("__metadata__", {})}, b"")
    for name in names[:2]:
        begin, end = header[name]["data_offsets"]
        flat = {**header, name: {**header[name], "dtype": "U8", "shape": [end - begin]}}
        yield f"{name} as bytes", file(flat)
        other = {key: value for key, value in header.items() if key != name}
        yield f"{name} under another name", file({**other, "nobody": header[name]})
    yield "no description", file({name: header[name] for name in names})
    for key, text in header.get("__metadata__", {}).items():
        if text.startswith("{"):
            for label, content in damaged_json(text, depth):
                described = {**header["__metadata__"], key: content.decode("latin-1")}
                yield f"{key}: {label}", file({**header, "__metadata__": described})


def damages(path: Path, depth: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to damage a file, each as a function that does it."""
    data = path.read_bytes()
    found = damaged_tensors(data, depth) if path.suffix == ".safetensors" else damaged_json(data.decode(), depth)
    for label, content in found:
        yield label, lambda content=content: path.write_bytes(content)  # type: ignore[misc]
    yield "missing", lambda: None
    yield "a folder", path.mkdir
    yield "a pipe", lambda: os.mkfifo(path)


def check(
    folder: Path, name: str, read: Callable[[], Any], depth: int = 2, before: Callable[[], Any] = lambda: None
) -> int:
    """Damage one file in all ways, and read it each time; returns the number of ways."""
    path, wrong, count = folder / name, [], 0
    data = path.read_bytes()
    before()
    read()
    for label, damage in damages(path, depth):
        count += 1
        path.unlink()
        damage()
        before()
        found = answer(read)
        if found is not None:
            wrong.append(f"{name}: {label}: {found}")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert not wrong, f"{len(wrong)} of {count}\n" + "\n".join(wrong)
    return count


@pytest.mark.parametrize("name", [MANIFEST, "config.json", "generation_config.json", "weights.safetensors"])
def test_a_saved_model(tmp_path: Path, name: str) -> None:
    folder = refimpl.save(quantised(low_rank=True), tmp_path / "model")
    assert check(folder, name, lambda: refimpl.load(folder)) > 10


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_configuration_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    tiny().save_pretrained(tmp_path)
    assert check(tmp_path, name, lambda: refimpl.plan(tmp_path, refimpl.RTN(4, 16)), depth=1) > 10
    assert check(tmp_path, name, lambda: models.load(tmp_path), depth=1) > 10


def test_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    tiny().save_pretrained(folder)

    def compressed() -> None:
        refimpl.compress(folder, refimpl.RTN(4, 16), out=out, progress=False)

    assert check(folder, "model.safetensors", compressed, before=lambda: shutil.rmtree(out, ignore_errors=True)) > 10
    assert check(folder, "model.safetensors", lambda: models.load(folder)) > 10


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer(tmp_path: Path, name: str) -> None:
    tiny().save_pretrained(tmp_path)
    models.small.tokenizer().save_pretrained(tmp_path)
    check(tmp_path, name, lambda: models.load(tmp_path), depth=1)


def test_a_policy(tmp_path: Path) -> None:
    refimpl.CSKV().fit(tiny(), TOKENS).save(tmp_path / "policy.safetensors")
    read = lambda: Policy.load(tmp_path / "policy.safetensors").cache(tiny())  # noqa: E731
    assert check(tmp_path, "policy.safetensors", read, depth=4) > 100


def test_a_cache(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "cache.safetensors"
    cache = refimpl.KIVI(window=8, group=8, value_group=8).cache(model)
    prefill(model, cache, torch.arange(40)[None])
    cache.save(path)
    read = lambda: prefill(model, CompressedCache.load(path, model), TOKENS[:1])  # noqa: E731
    assert check(tmp_path, "cache.safetensors", read, depth=3) > 100


def test_a_training(tmp_path: Path) -> None:
    data = batches(torch.arange(16.0).reshape(8, 2), batch_size=2)

    def trained() -> None:
        torch.manual_seed(0)
        recipe = Recipe(6, lr=0.01, optimizer="adamw")
        train(nn.Linear(2, 1), data, loss, recipe, folder=tmp_path, checkpoint_every=3, progress=False)

    trained()
    assert check(tmp_path, "checkpoint.safetensors", trained, depth=3) > 100


def test_a_replay_buffer(tmp_path: Path) -> None:
    buffer = refimpl.ReplayBuffer(4, (2,), folder=tmp_path)
    buffer.begin("run", {"seed": 0})
    buffer.add(torch.ones(3, 2, dtype=torch.int64))
    read = lambda: refimpl.ReplayBuffer.open(tmp_path).sample(2, draw=0)  # noqa: E731
    assert check(tmp_path, "buffer.json", read, depth=3) > 100


def test_the_input_of_a_chart(tmp_path: Path) -> None:
    documents = [{"document": f"d{k}", "nll": 10.0 + k, "tokens": 5} for k in range(3)]
    content = {"bits_per_weight": 4.0, "perplexity": {"wikipedia": {"value": 9.0, "documents": documents}}}
    for name in ("dense.json", "mine.json"):
        (tmp_path / name).write_text(json.dumps(content))
    files = [tmp_path / "dense.json", tmp_path / "mine.json"]
    for name in ("dense.json", "mine.json"):
        assert check(tmp_path, name, lambda: charts._own(files, "wikipedia"), depth=5) > 100
