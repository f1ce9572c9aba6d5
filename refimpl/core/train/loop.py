"""The one training loop: every chapter that trains anything trains here.

A method changes training in few places: the data and the loss are arguments, and `after_step` hooks see the model
after every update. The loop takes care of what should be the same for all arms of a comparison: the optimiser,
the learning-rate schedule, clipping, accumulation, precision, evaluation, checkpoints and several processes.

Every step starts from a random state made of the seed and the step, so a run that was interrupted goes on bit for
bit (on a CPU) as if it had not been, without any generator's state on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from tqdm.auto import tqdm

from refimpl.core.device import read, read_all
from refimpl.core.errors import CheckpointError, OptionError, TrainingError, nearest
from refimpl.core.files.io import atomic_write

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("fp32", "bf16")

Batch = Any
Loss = Callable[[Any, Batch], Tensor]
Hook = Callable[[int, nn.Module], None]
Evaluate = Callable[[nn.Module], dict[str, float]]

_CHECKPOINT = "checkpoint.safetensors"
_READ_EVERY = 20  # steps between two looks at the losses on a GPU: each look waits for the device


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Args:
        steps: updates of the weights (not micro-batches).
        lr: highest learning rate.
        optimizer: "adamw" or "sgd".
        momentum: of SGD.
        betas: of AdamW.
        weight_decay: decoupled for AdamW; on tensors of two or more dimensions only, so not on biases and norms.
        warmup: steps over which the rate rises linearly from zero.
        schedule: what follows, "cosine" down to ``final_lr * lr`` or "constant".
        final_lr: fraction of `lr` left at the last step of the cosine.
        clip: largest norm of the gradient; None does not clip.
        accumulate: micro-batches per update.
        precision: "fp32", or "bf16" for autocast around the loss (weights and optimiser stay in their own dtype).
        seed: of everything random inside a step.

    Raises:
        OptionError: a value outside its range.

    Example:
        >>> recipe = Recipe(steps=100, lr=0.1, warmup=10)
        >>> [round(recipe.lr_at(step), 3) for step in (0, 9, 10, 55, 99)]
        [0.01, 0.1, 0.1, 0.05, 0.0]
    """

    steps: int
    lr: float = 1e-3
    optimizer: str = "adamw"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "cosine"
    final_lr: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r}: use {nearest(getattr(self, name), known)}")
        if self.steps < 1:
            raise OptionError(f"steps={self.steps}: use 1 or more")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError(f"lr={self.lr}: use a positive number")
        if not 0 <= self.warmup < self.steps:
            raise OptionError(f"warmup={self.warmup}: use 0 to steps - 1 = {self.steps - 1}")
        if self.accumulate < 1:
            raise OptionError(f"accumulate={self.accumulate}: use 1 or more")
        if not 0 <= self.final_lr <= 1:
            raise OptionError(f"final_lr={self.final_lr}: it is a fraction of lr, use 0 to 1")
        if self.clip is not None and not self.clip > 0:
            raise OptionError(f"clip={self.clip}: use a positive norm, or None")

    def scale(self, step: int) -> float:
        """Learning rate of update `step` (from 0) as a fraction of the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step` (from 0)."""
        return self.lr * self.scale(step)


@dataclass
class History:
    """What happened during training.

    Attributes:
        steps: one entry per update: "step" (from 1), "loss" (mean over its micro-batches and processes), "lr", and
            "grad_norm" before clipping where the recipe clips.
        evaluations: "step" and the metrics, one entry per evaluation; step 0 is before training.
        seconds: time of all sittings.
        best: the step whose parameters the model has now, with `keep_best`; else the last.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    best: int = 0

    @property
    def losses(self) -> list[float]:
        """The loss of every update."""
        return [entry["loss"] for entry in self.steps]

    def __str__(self) -> str:
        count = max(1, len(self.steps) // 20)
        recent = self.losses[-count:]
        text = f"{len(self.steps)} steps in {self.seconds:.0f} s"
        return f"{text}, loss {sum(recent) / len(recent):.4f}" if recent else text


def batches(
    *tensors: Tensor, batch_size: int, seed: int = 0, shuffle: bool = True, drop_last: bool = True
) -> DataLoader:
    """A loader over the rows of tensors: a new order each epoch, the same for the same seed.

    Under torchrun each process gets its own share of every epoch, `batch_size` rows at a time.

    Args:
        tensors: equal first dimension n.
        batch_size: rows per batch and process.
        seed, shuffle: the order of epoch e depends on ``seed + e`` alone.
        drop_last: leave out the last, smaller batch of an epoch.

    Returns:
        A DataLoader of tuples of tensors [batch_size, ...].

    Raises:
        OptionError: no tensors, different lengths, or fewer rows than a batch.

    Example:
        >>> loader = batches(torch.arange(6), batch_size=2)
        >>> len(loader), sorted(int(x) for batch in loader for x in batch[0])
        (3, [0, 1, 2, 3, 4, 5])
    """
    if not tensors or len({len(tensor) for tensor in tensors}) > 1:
        raise OptionError(f"tensors have {[len(t) for t in tensors]} rows; pass at least one, all of one length")
    rank, world = _rank_and_world()
    share = len(tensors[0]) // world if drop_last else math.ceil(len(tensors[0]) / world)
    if batch_size < 1 or share < (batch_size if drop_last else 1):
        raise OptionError(
            f"batch_size={batch_size}: there are {share} rows for each process; use 1 to {share}, or pass more rows"
        )
    rows = TensorDataset(*tensors)
    order: DistributedSampler = DistributedSampler(
        rows, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last
    )
    return DataLoader(rows, sampler=BatchSampler(order, batch_size, drop_last), batch_size=None)


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _length(data: DataLoader) -> int | None:
    """Batches per epoch; None for a stream that does not know."""
    try:
        return len(data)
    except TypeError:
        return None


def _set_epoch(data: DataLoader, epoch: int) -> None:
    """Tell the sampler, also one inside a batch sampler, that a new epoch begins."""
    outer: list[Any] = [data.sampler, data.batch_sampler]
    for sampler in [*outer, *(getattr(each, "sampler", None) for each in outer)]:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def _stream(data: DataLoader, start: int) -> Iterator[Batch]:
    """Batches for ever, from number `start` of the whole run on."""
    length = _length(data)
    epoch, skip = divmod(start, length) if length else (0, start)
    while True:
        _set_epoch(data, epoch)
        empty = True
        for batch in islice(data, skip, None):
            empty = False
            yield batch
        if empty and not skip:
            raise OptionError("data: it yields no batches; pass more rows, or a smaller batch")
        skip, epoch = 0, epoch + 1


def _to(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _seed_step(device: torch.device, *numbers: int) -> None:
    mixed = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(mixed, "little") >> 1
    # not torch.manual_seed: before CUDA is first used it keeps a stack trace of every call, 20 ms each
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _optimizer(model: nn.Module, parameters: Sequence[dict[str, Any]] | None, recipe: Recipe) -> torch.optim.Optimizer:
    if parameters is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
    else:
        groups = [
            {"weight_decay": recipe.weight_decay, **group, "params": list(group["params"])} for group in parameters
        ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise OptionError("model: none of its parameters require a gradient; call requires_grad_() on those to train")
    for group in groups:
        group["highest_lr"] = group.setdefault("lr", recipe.lr)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)


def train(
    model: nn.Module,
    data: DataLoader,
    loss: Loss,
    recipe: Recipe,
    *,
    parameters: Sequence[dict[str, Any]] | None = None,
    after_step: Sequence[Hook] = (),
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    keep_best: str | None = None,
    folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place.

    In a process group (torchrun) the model is wrapped in DistributedDataParallel, unless it already is or was
    sharded with ``fully_shard``; every process calls `train` with its own share of the data (`batches` does that).

    Args:
        model: any module; trained on the device it is on.
        data: batches, one micro-batch at a time; started again after each epoch, with ``set_epoch`` where its sampler
            has one. Tensors in tuples, lists and dictionaries are moved to the model's device.
        loss: ``loss(model, batch)``, a scalar: the mean over the micro-batch.
        recipe: optimiser, rates and length.
        parameters: groups as `torch.optim` takes them, each with a learning rate of its own if it wants one
            ("params", "lr"), which follows the recipe's schedule; default: everything that requires a gradient.
        after_step: called as ``hook(step, model)`` after every update, with the number of updates done so far. What a
            hook remembers must live in the model's buffers, so that it is saved with the model.
        evaluate: returns metrics; the model is in evaluation mode and no gradients are kept.
        evaluate_every: steps between evaluations; there is always one before the first step and one after the last.
        keep_best: metric of `evaluate` to minimise; the model ends with its best parameters instead of the last.
        folder: where to keep the checkpoint. The same call goes on from it after an interruption, or returns at once
            if the run had finished.
        checkpoint_every: steps between checkpoints; a twentieth of the run by default.
        progress: show a bar (after a second).

    Returns:
        The history; the model is in the mode it came in.

    Raises:
        OptionError: no trainable parameters, no data, a metric that `evaluate` does not return.
        TrainingError: the loss is NaN or infinite; names the step and the last good checkpoint.
        CheckpointError: `folder` holds another run.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> model = nn.Linear(3, 1)
        >>> mse = lambda model, batch: (model(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        >>> history = train(model, batches(x, batch_size=16), mse, Recipe(steps=200, lr=0.1), progress=False)
        >>> history.losses[-1] < 1e-3
        True
    """
    if keep_best is not None and evaluate is None:
        raise OptionError(f"keep_best={keep_best!r} needs evaluate=, a function that returns that metric")
    for name, value in (("evaluate_every", evaluate_every), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value}: use 1 or more")
    run = _Run(model, data, loss, recipe, parameters, tuple(after_step), evaluate, keep_best, folder)
    was_training = model.training
    device = [run.device] if run.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=device):
            run.go(evaluate_every, checkpoint_every or max(1, recipe.steps // 20), progress)
    finally:
        model.train(was_training)
    return run.history


class _Run:
    """One call of `train`: what its parts share."""

    def __init__(
        self,
        model: nn.Module,
        data: DataLoader,
        loss: Loss,
        recipe: Recipe,
        parameters: Sequence[dict[str, Any]] | None,
        hooks: tuple[Hook, ...],
        evaluate: Evaluate | None,
        keep_best: str | None,
        folder: str | Path | None,
    ) -> None:
        self.model, self.data, self.loss, self.recipe = model, data, loss, recipe
        self.hooks, self.evaluate, self.keep_best = hooks, evaluate, keep_best
        self.optimizer = _optimizer(model, parameters, recipe)
        self.trained: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.device = self.trained[0].device
        self.rank, world = _rank_and_world()
        self.sharded = hasattr(model, "set_requires_gradient_sync")  # by fully_shard
        wrap = world > 1 and not self.sharded and not isinstance(model, DistributedDataParallel)
        self.parallel: nn.Module = DistributedDataParallel(model) if wrap else model
        self.world = world
        self.folder = None if folder is None else Path(folder)
        self.history = History()
        self.best: dict[str, Any] | None = None
        self.saved: int | None = None
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._fingerprint = self._describe() if self.folder else {}

    def go(self, evaluate_every: int | None, checkpoint_every: int, progress: bool) -> None:
        start = self._resume()
        before, begin = self.history.seconds, time.perf_counter()
        if start == 0:
            self._evaluate(0)
        stream = _stream(self.data, start * self.recipe.accumulate)
        silent = not progress or self.rank > 0
        bar = tqdm(total=self.recipe.steps, initial=start, desc="training", unit="step", disable=silent, delay=1)
        read_every = 1 if self.device.type == "cpu" else _READ_EVERY
        with bar:
            for step in range(start + 1, self.recipe.steps + 1):
                self._update(step, stream)
                last = step == self.recipe.steps
                evaluates = last or (evaluate_every is not None and step % evaluate_every == 0)
                saves = self.folder is not None and (last or step % checkpoint_every == 0)
                if evaluates or saves or step % read_every == 0:
                    self._read_losses()
                if evaluates:
                    self._evaluate(step)
                self.history.seconds = before + time.perf_counter() - begin
                if saves:
                    self._save(step)
                bar.update()
                if self.history.steps:
                    bar.set_postfix(loss=f"{self.history.steps[-1]['loss']:.4g}", refresh=False)
        if self.best is not None:
            set_model_state_dict(self.model, self.best, options=StateDictOptions(strict=True))
        else:
            self.history.best = self.recipe.steps

    def _update(self, step: int, stream: Iterator[Batch]) -> None:
        recipe = self.recipe
        self.parallel.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest_lr"] * recipe.scale(step - 1)
        total = torch.zeros((), device=self.device)
        for micro in range(recipe.accumulate):
            batch = _to(next(stream), self.device)
            # only now: a loader that starts an epoch draws a number as well
            _seed_step(self.device, recipe.seed, step, micro, self.rank)
            with self._synchronised(micro == recipe.accumulate - 1):
                mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
                with mixed:
                    value = self.loss(self.parallel, batch) / recipe.accumulate
                value.backward()
            total += value.detach()
        norm = None
        if recipe.clip is not None:
            norm = nn.utils.clip_grad_norm_(self.trained, recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for hook in self.hooks:
            hook(step, self.model)
        self._pending.append((total, norm))

    def _synchronised(self, last: bool) -> Any:
        """Gradients travel between processes with the last micro-batch only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return nullcontext()

    def _read_losses(self) -> None:
        """Bring the losses since the last look to the host, averaged over processes."""
        if not self._pending:
            return
        losses = torch.stack([loss for loss, _ in self._pending]).float()
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.world
        for value, (_, norm) in zip(read_all(losses), self._pending, strict=True):
            step = len(self.history.steps) + 1
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value} at step {step}")
            entry = {"step": step, "loss": value, "lr": self.recipe.lr_at(step - 1)}
            if norm is not None:
                entry["grad_norm"] = float(read(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            self.history.steps.append(entry)
        self._pending.clear()

    def _diverged(self, what: str) -> TrainingError:
        if self.folder is None:
            kept = "no checkpoint was kept (pass folder=)"
        elif self.saved is None:
            kept = f"folder={str(self.folder)!r} holds no checkpoint yet"
        else:
            kept = f"the last good checkpoint, of step {self.saved}, is in folder={str(self.folder)!r}"
        return TrainingError(
            f"{what}; {kept}. Lower lr={self.recipe.lr:g}, add warmup, set clip=1.0, or check the data"
        )

    def _evaluate(self, step: int) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        with torch.no_grad():
            metrics = {name: float(value) for name, value in self.evaluate(self.model).items()}
        if self.keep_best is not None:
            if self.keep_best not in metrics:
                raise OptionError(f"keep_best={self.keep_best!r}: evaluate returns {nearest(self.keep_best, metrics)}")
            value = metrics[self.keep_best]
            others = [entry[self.keep_best] for entry in self.history.evaluations]
            if not any(other <= value for other in others) and not math.isnan(value):
                state: Any = get_model_state_dict(self.model)
                self.best = {name: tensor.detach().clone() for name, tensor in state.items()}
                self.history.best = step
        self.history.evaluations.append({"step": step, **metrics})

    # -- checkpoints --

    def _describe(self) -> dict[str, Any]:
        """What makes this run this run, for a later call that wants to go on with it."""
        digest = hashlib.sha256()
        for tensor in _tensors(next(_stream(self.data, 0))):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        groups = self.optimizer.param_groups
        return {
            "recipe": asdict(self.recipe) | {"betas": list(self.recipe.betas)},
            "parameters": [[list(p.shape), group["highest_lr"]] for group in groups for p in group["params"]],
            "processes": self.world,
            "batches": _length(self.data),
            "first batch": digest.hexdigest() if self.rank == 0 else None,
        }

    def _save(self, step: int) -> None:
        assert self.folder is not None
        gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer: Any = get_optimizer_state_dict(self.model, self.optimizer, options=gather)
        parts: dict[str, Any] = {"model": get_model_state_dict(self.model, options=gather)}
        if self.best is not None:
            parts["best"] = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in self.best.items()}
        if self.rank == 0:
            for parameter, state in optimizer["state"].items():
                parts |= {
                    f"optimizer.{name}": parts.get(f"optimizer.{name}", {}) | {parameter: value}
                    for name, value in state.items()
                }
            tensors: dict[str, Tensor] = {}
            seen = set()
            for part, values in parts.items():
                for name, value in values.items():
                    # a file holds no shared storage, so of tied weights each name gets its own copy
                    value = value.detach().cpu().contiguous()
                    tensors[f"{part}/{name}"] = value.clone() if value.data_ptr() in seen else value
                    seen.add(value.data_ptr())
            for name, tensor in tensors.items():
                if name.startswith("model/") and not tensor.isfinite().all():
                    raise self._diverged(f"{name.removeprefix('model/')!r} is not finite after step {step}")
            about = {
                "step": step,
                "run": self._fingerprint,
                "history": asdict(self.history),
                "groups": optimizer["param_groups"],
            }
            with atomic_write(self.folder / _CHECKPOINT) as temporary:
                save_file(tensors, temporary, metadata={"refimpl": json.dumps(about)})
        if self.world > 1:
            dist.barrier()
        self.saved = step

    def _resume(self) -> int:
        """Take up the checkpoint in the folder, if there is one; the number of steps done."""
        if self.folder is None or not (self.folder / _CHECKPOINT).exists():
            return 0
        path = self.folder / _CHECKPOINT
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["refimpl"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete it to start again") from error
        ours, theirs = self._fingerprint, about["run"]
        for key, value in ours.items():
            if value is not None and theirs.get(key) not in (value, None):
                before, now = theirs[key], value
                if key == "recipe":
                    other = [name for name in value if before.get(name) != value[name]]
                    before, now = ({name: side.get(name) for name in other} for side in (before, now))
                raise CheckpointError(
                    f"folder={str(self.folder)!r} holds a run with another {key} ({str(before)[:200]}, now "
                    f"{str(now)[:200]}); repeat that call to go on with it, or choose another folder"
                )
        model: Any = {}
        best: dict[str, Tensor] = {}
        state: Any = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            if part in ("model", "best"):
                (model if part == "model" else best)[name] = tensor
            else:
                state.setdefault(name, {})[part.removeprefix("optimizer.")] = tensor
        spread = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, model, options=spread)
        if state:  # plain SGD remembers nothing
            groups = {"state": state, "param_groups": about["groups"]}
            set_optimizer_state_dict(self.model, self.optimizer, groups, options=spread)
        if best:
            now = get_model_state_dict(self.model)
            self.best = {name: _like(value, now[name]) for name, value in best.items()}
        self.history = History(**about["history"])
        self.saved = about["step"]
        return about["step"]


def _like(value: Tensor, example: Any) -> Tensor:
    """`value` on the device of `example`, and sharded like it."""
    if hasattr(example, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)
    return value.to(example.device)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif hasattr(batch, "values"):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
