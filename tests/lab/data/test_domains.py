from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab import wheels
from refimpl.lab.data import domains, text
from refimpl.lab.data.windows import windows
from refimpl.lab.measure.bits import bits_per_byte
from refimpl.lab.models import small


@pytest.mark.parametrize(("domain", "split"), [("wikipedia", "validation"), ("prose", "test")])
def test_windows_are_those_of_the_reference_reader(domain: str, split: str) -> None:
    for stride in (None, 40):
        ids, units = domains.windows(domain, split, 96, stride)
        expected, names = windows(domain, split, 96, small.tokenizer(), stride)
        assert torch.equal(ids, expected)
        assert units == names


def test_cpp_splits_share_no_header_and_no_licence() -> None:
    splits = {split: domains.documents("cpp", split) for split in text.SPLITS}
    texts = [document.text for found in splits.values() for document in found]
    assert len({document.id for found in splits.values() for document in found}) == len(texts) > 200
    assert 2e6 < sum(len(source.encode()) for source in texts) <= 3e6
    assert not any("license" in source[:300].lower() for source in texts)
    seen = set().union(*(text.phrases(document.text) for document in splits["calibration"]))
    for document in splits["test"][:20]:
        own = text.phrases(document.text)
        assert len(own & seen) < 0.9 * len(own)  # headers share idioms, not contents


def test_a_count_is_spread_over_the_documents() -> None:
    ids, units = domains.windows("cpp", "validation", 128)
    few, names = domains.windows("cpp", "validation", 128, count=40)
    assert few.dtype == torch.int64
    assert few.shape == (40, 129)
    assert len(set(names)) > 15
    at = [i * len(units) // 40 for i in range(40)]
    assert torch.equal(few, ids[at])
    assert names == [units[i] for i in at]


def test_tokens_and_headers_are_the_same_when_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, units = domains.windows("cpp", "validation", 64)
    digest = domains.domain_hash("cpp")
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    domains._tokens.cache_clear()
    try:
        again, names = domains.windows("cpp", "validation", 64)
        assert torch.equal(ids, again)
        assert units == names
        assert domains.domain_hash("cpp") == digest
        assert wheels.cache_folder() == tmp_path
        assert list(tmp_path.glob("tokens-cpp-validation-*/tokens.safetensors"))
    finally:
        domains._tokens.cache_clear()


def test_the_small_llama() -> None:
    state = torch.random.get_rng_state()
    model, same, other = domains.llama(), domains.llama(), domains.llama(seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    embedding = lambda m: m.get_input_embeddings().weight  # noqa: E731
    assert torch.equal(embedding(model), embedding(same))
    assert not torch.equal(embedding(model), embedding(other))
    assert model.lm_head.weight is embedding(model)
    assert domains.llama(96, layers=3).config.num_attention_heads == 3
    ids, units = domains.windows("python", "validation", 64, count=6)
    found = domains.measured(model, ids, units)
    direct = bits_per_byte(model, ids, units, small.tokenizer())
    assert found.value == pytest.approx(direct.value)
    assert found.units == list(dict.fromkeys(units))


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("/* Copyright Ada.\n * Redistribution is permitted. */\n\n#pragma once\n", "#pragma once\n"),
        ("#include <a>\n// Copyright of a line inside\n", "#include <a>\n// Copyright of a line inside\n"),
        ("// SPDX-License-Identifier: MIT", ""),
        ("", ""),
    ],
)
def test_only_a_licence_at_the_head_is_taken_off(source: str, left: str) -> None:
    assert domains.without_licence(source) == left


def test_bad_input_names_the_remedy() -> None:
    for call, message in (
        (lambda: domains.windows("pyton", "test", 64), "domain='pyton'.*did you mean 'python'"),
        (lambda: domains.windows("cpp", "train", 64), "split='train' must be one of 'calibration'"),
        (lambda: domains.windows("cpp", "test", 0), "length=0 must be a positive integer"),
        (lambda: domains.windows("cpp", "test", 64, stride=True), "stride=True"),
        (lambda: domains.windows("cpp", "test", 64, count=0), "count=0"),
        (lambda: domains.domain_hash("news"), "domain='news'"),
        (lambda: domains.llama(width=48), "width=48: heads are 32 wide"),
    ):
        with pytest.raises(OptionError, match=message):
            call()
    with pytest.raises(CalibrationError, match="0 windows of length=10000000"):
        domains.windows("prose", "test", 10_000_000)
    with pytest.raises(CalibrationError, match="count=100000 asked for"):
        domains.windows("prose", "test", 64, count=100_000)


def test_a_torch_without_headers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CalibrationError, match="holds no headers; reinstall torch"):
        list(domains._headers())
