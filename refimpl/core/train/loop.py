"""The one training loop: every chapter that trains anything trains here.

A method changes training in few places: the data, the loss and the optimiser are arguments, `after_backward` hooks see
the gradients of every update, and `after_step` hooks the model after it. The loop takes care of what should be the same
for all arms of a comparison: the learning-rate schedule, clipping, accumulation, precision, evaluation, checkpoints and
several processes.

Every step starts from a random state made of the seed and the step, so a run that was interrupted goes on bit for
bit (on a CPU) as if it had not been, without any generator's state on disk. A hook or a sampler that draws from a
generator of its own, or knows anything else, is handed to `remember`.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from tqdm.auto import tqdm

from refimpl.core.arguments import Checked, checked, fits, shown
from refimpl.core.device import rank_and_world, read, read_all
from refimpl.core.errors import CheckpointError, OptionError, TrainingError, nearest, reading
from refimpl.core.train.checkpoints import Checkpoints, described, like, pack, whole, without_code
from refimpl.core.train.optimizers import (
    OPTIMIZERS,
    MakeOptimizer,
    identity,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parameter_groups,
)

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("fp32", "bf16")
SYNCS = ("gradients", "local")

Batch = Any
Loss = Callable[[Any, Batch], Tensor]
Hook = Callable[[int, nn.Module], None]
Evaluate = Callable[[nn.Module], dict[str, float]]

_READ_EVERY = 20  # steps between two looks at the losses on a GPU: each look waits for the device


@dataclass(frozen=True)
class Recipe(Checked):
    """How long and how fast to train.

    Args:
        steps: updates of the weights (not micro-batches).
        lr: highest learning rate.
        optimizer: "adamw" or "sgd".
        momentum: of SGD.
        betas: of AdamW.
        weight_decay: decoupled for AdamW; on tensors of two or more dimensions only, so not on biases and norms.
        warmup: steps over which the rate rises linearly from zero.
        schedule: what follows, "cosine" down to ``final_lr * lr`` or "constant". The cosine is that of
            `refimpl.core.train.schedules.Cosine`, which is the definition, read as torch's CosineAnnealingLR reads it: at the
            beginning of an update, not at its end. So the first update after the warm-up still has the highest rate, and
            the last is one update short of `final_lr`; take ``Scheduled.of(Cosine(...))`` for one that gets there.
        final_lr: fraction of `lr` left after the last step of the cosine.
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
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum={self.momentum}: use 0 to below 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OptionError(f"betas={self.betas}: use two numbers from 0 to below 1")
        if self.weight_decay < 0:
            raise OptionError(f"weight_decay={self.weight_decay}: use 0 or more")

    def scale(self, step: int) -> float:
        """Learning rate of update `step` (from 0) as a fraction of the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * half_cosine(done)

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step` (from 0)."""
        return self.lr * self.scale(step)


def half_cosine(share: float) -> float:
    """The cosine of all schedules: falls from 1 to 0 while the share of elapsed time grows from 0 to 1.

    Example:
        >>> half_cosine(0.0), round(half_cosine(0.5), 3), half_cosine(1.0)
        (1.0, 0.5, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class History:
    """Record of a training, as each process knows it.

    Attributes:
        steps: one entry per update: "step" (from 1), "loss" (mean over its micro-batches and, unless each trains on its
            own, processes), "lr" (the recipe's), and "grad_norm" before clipping where the recipe clips.
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


@checked()
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
    rank, world = rank_and_world()
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


def _length(data: DataLoader) -> int | None:
    """Batches per epoch; None for a stream that does not know."""
    try:
        return len(data)
    except TypeError:
        return None


def _samplers(data: DataLoader) -> list[Any]:
    """The samplers of a loader, also one inside a batch sampler."""
    outer: list[Any] = [data.sampler, data.batch_sampler]
    return [*outer, *(getattr(each, "sampler", None) for each in outer)]


class _Stream:
    """Batches for ever: epoch after epoch, the first of them without its first `skip` batches.

    Attributes:
        epoch: that of the last batch given.
        last: the last batch given.

    Raises:
        CheckpointError: the last batch that is left out is not the one that was used.
    """

    def __init__(self, data: DataLoader, epoch: int = 0, skip: int = 0, resumed: bool = False) -> None:
        self.data, self.epoch, self.skip = data, epoch, skip
        self.last: Batch = None
        self.before: str | None = None  # digest of the last skipped batch; None: not known
        self._may_be_empty = resumed or skip > 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for sampler in _samplers(self.data):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(self.epoch)
            empty = not self._may_be_empty
            for place, batch in enumerate(self.data):
                empty = False
                if place >= self.skip:
                    self.last = batch
                    yield batch
                elif place == self.skip - 1 and self.before not in (None, _digest(batch)):
                    raise CheckpointError(
                        f"data: batch {place} of epoch {self.epoch} is not the one that the run in folder was trained on; "
                        "repeat that call to go on with it, or choose another folder"
                    )
            if empty:
                raise OptionError("data: it yields no batches; pass more rows, or a smaller batch")
            self.skip, self.epoch, self._may_be_empty = 0, self.epoch + 1, False


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


@checked("optimizer", "remember")
def train(
    model: nn.Module,
    data: DataLoader,
    loss: Loss,
    recipe: Recipe,
    *,
    parameters: Sequence[dict[str, Any]] | None = None,
    optimizer: MakeOptimizer | None = None,
    after_backward: Sequence[Hook] = (),
    after_step: Sequence[Hook] = (),
    remember: Mapping[str, Stateful] | None = None,
    sync: str = "gradients",
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
        optimizer: ``optimizer(groups, recipe)`` makes one in place of the recipe's "adamw" or "sgd". Groups have
            "params", "lr" and "weight_decay"; the rates it has when made are the highest, and follow the schedule. Its
            ``state_dict()`` is saved, whatever its shapes and dtypes; its class and options tell this run from others.
        after_backward: called as ``hook(step, model)`` when the gradients of update number `step` (from 1) are there,
            accumulated and averaged over processes, and before they are clipped: it may change them in place.
        after_step: called as ``hook(step, model)`` after every update, with the number of updates done so far.
        remember: what hooks, samplers or the loss know beyond the model's buffers, by names of your choice: objects with
            ``state_dict()`` and ``load_state_dict(state)``. Each process saves its own with every checkpoint, and gets
            it back (tensors on the CPU) before it goes on. A state holds tensors, numbers, strings, None, and lists,
            tuples and dictionaries of these. If the sampler of `data` is among them, its next iteration must go on in
            the middle of the epoch (and be empty where that was over); otherwise the loop skips the batches it had.
        sync: what processes exchange: "gradients", or nothing in "local", where each trains a replica of its own from
            the weights it has, on its own data, as far as hooks do not exchange anything. Each then has its own history
            and its own file in `folder`; all make the same number of steps. Alone, a process does not notice.
        evaluate: returns metrics; the model is in evaluation mode and no gradients are kept.
        evaluate_every: steps between evaluations; there is always one before the first step and one after the last.
        keep_best: metric of `evaluate` to minimise; the model ends with its best parameters instead of the last.
        folder: where to keep the checkpoint. The same call goes on from it after an interruption, or returns at once
            if the run had finished. Processes share it.
        checkpoint_every: steps between checkpoints; a twentieth of the run by default.
        progress: show a bar (after a second).

    Returns:
        The history; the model is in the mode it came in.

    Raises:
        OptionError: no trainable parameters, no data, a metric that `evaluate` does not return, an optimiser that is
            none, a state that cannot be saved.
        TrainingError: the loss is NaN or infinite; names the step and the last good checkpoint.
        CheckpointError: `folder` holds another run, or not all of it.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> model = nn.Linear(3, 1)
        >>> mse = lambda model, batch: (model(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        >>> history = train(model, batches(x, batch_size=16), mse, Recipe(steps=200, lr=0.1), progress=False)
        >>> history.losses[-1] < 1e-3
        True

        Another optimiser, and gradients with noise whose generator an interruption does not set back:

        >>> class Noise:
        ...     def __init__(self):
        ...         self.generator = torch.Generator().manual_seed(0)
        ...     def __call__(self, step, model):
        ...         for p in model.parameters():
        ...             p.grad += 0.01 * torch.randn(p.shape, generator=self.generator)
        ...     def state_dict(self):
        ...         return {"generator": self.generator.get_state()}
        ...     def load_state_dict(self, state):
        ...         self.generator.set_state(state["generator"])
        >>> import tempfile
        >>> noise, folder = Noise(), tempfile.mkdtemp()
        >>> nesterov = lambda groups, recipe: torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=True)
        >>> history = train(model, batches(x, batch_size=16), mse, Recipe(steps=50, lr=0.01), optimizer=nesterov,
        ...     after_backward=[noise], remember={"noise": noise}, folder=folder, progress=False)
        >>> len(history.steps)
        50
    """
    if keep_best is not None and evaluate is None:
        raise OptionError(f"keep_best={keep_best!r} needs evaluate=, a function that returns that metric")
    for name, value in (("evaluate_every", evaluate_every), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value}: use 1 or more")
    if not isinstance(remember, (Mapping, type(None))):
        raise OptionError(f"remember={shown(remember)}: use a dictionary of objects with state_dict()")
    if sync not in SYNCS:
        raise OptionError(f"sync={sync!r}: use {nearest(sync, SYNCS)}")
    run = _Run(
        model,
        data,
        loss,
        recipe,
        parameters=parameters,
        optimizer=optimizer,
        after_backward=after_backward,
        after_step=after_step,
        remember=remember or {},
        local=sync == "local",
        evaluate=evaluate,
        keep_best=keep_best,
        folder=folder,
    )
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
        *,
        parameters: Sequence[dict[str, Any]] | None,
        optimizer: MakeOptimizer | None,
        after_backward: Sequence[Hook],
        after_step: Sequence[Hook],
        remember: Mapping[str, Stateful],
        local: bool,
        evaluate: Evaluate | None,
        keep_best: str | None,
        folder: str | Path | None,
    ) -> None:
        self.model, self.data, self.loss, self.recipe = model, data, loss, recipe
        self.after_backward, self.after_step = tuple(after_backward), tuple(after_step)
        self.evaluate, self.keep_best = evaluate, keep_best
        self.optimizer = make_optimizer(parameter_groups(model, parameters, recipe), recipe, optimizer)
        self.trained: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.device = self.trained[0].device
        self.rank, self.world = rank_and_world()
        self.sharded = hasattr(model, "set_requires_gradient_sync")  # by fully_shard
        wrapped = isinstance(model, DistributedDataParallel)
        if local and (self.sharded or wrapped):
            raise OptionError("sync='local': model is shared among processes already; pass a plain module in each")
        self.local = local and self.world > 1
        wrap = self.world > 1 and not (self.local or self.sharded or wrapped)
        self.parallel: nn.Module = DistributedDataParallel(model) if wrap else model
        self.remember = dict(remember)
        for name, thing in self.remember.items():
            if not isinstance(thing, Stateful):
                raise OptionError(
                    f"remember[{name!r}] is a {type(thing).__name__}; it needs state_dict() and load_state_dict(state)"
                )
        self.remembers_sampler = any(thing is each for thing in self.remember.values() for each in _samplers(data))
        if self.remembers_sampler and data.num_workers:
            raise OptionError(
                f"remember: it has the sampler of data, whose {data.num_workers} workers ask it for rows ahead of time; "
                "load data with 0 workers"
            )
        self.history = History()
        self.best: dict[str, Any] | None = None
        self.saved: int | None = None
        self.stream = _Stream(data)
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self.checkpoints: Checkpoints | None = None
        if folder is not None:
            self.checkpoints = Checkpoints(Path(folder), self.rank, self.world, self.local or bool(self.remember))
            self._fingerprint = self._describe(recipe.optimizer if optimizer is None else identity(self.optimizer))

    def go(self, evaluate_every: int | None, checkpoint_every: int, progress: bool) -> None:
        start = 0 if self.checkpoints is None else self._resume(self.checkpoints)
        before, begin = self.history.seconds, time.perf_counter()
        if start == 0:
            self._evaluate(0)
        stream = iter(self.stream)
        silent = not progress or self.rank > 0
        bar = tqdm(total=self.recipe.steps, initial=start, desc="training", unit="step", disable=silent, delay=1)
        read_every = 1 if self.device.type == "cpu" else _READ_EVERY
        with bar:
            for step in range(start + 1, self.recipe.steps + 1):
                self._update(step, stream)
                last = step == self.recipe.steps
                evaluates = last or (evaluate_every is not None and step % evaluate_every == 0)
                saves = self.checkpoints is not None and (last or step % checkpoint_every == 0)
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
                    value = self.loss(self.parallel, batch)
                    if not isinstance(value, Tensor) or value.dim():
                        raise OptionError(f"loss returned {shown(value)}; return a tensor that holds one number")
                    value = value / recipe.accumulate
                value.backward()
            total += value.detach()
        for hook in self.after_backward:
            hook(step, self.model)
        norm = None
        if recipe.clip is not None:
            norm = nn.utils.clip_grad_norm_(self.trained, recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for hook in self.after_step:
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
        """Bring the losses since the last look to the host, averaged over processes that train together."""
        if not self._pending:
            return
        losses = torch.stack([loss for loss, _ in self._pending]).float()
        if self.world > 1 and not self.local:
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
        if self.checkpoints is None:
            kept = "no checkpoint was kept (pass folder=)"
        elif self.saved is None:
            kept = f"folder={str(self.checkpoints.folder)!r} holds no checkpoint yet"
        else:
            kept = f"the last good checkpoint, of step {self.saved}, is in folder={str(self.checkpoints.folder)!r}"
        return TrainingError(
            f"{what}; {kept}. Lower lr={self.recipe.lr:g}, add warmup, set clip=1.0, or check the data"
        )

    def _evaluate(self, step: int) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        with torch.no_grad():
            found = self.evaluate(self.model)
            if not isinstance(found, Mapping):
                raise OptionError(f"evaluate returned {shown(found)}; return a dictionary of numbers by name")
            metrics = {name: float(value) for name, value in found.items()}
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

    def _describe(self, optimizer: str | dict[str, Any]) -> dict[str, Any]:
        """Fingerprint of this run, for a later call that goes on with it."""
        before = self._remembered()
        pack(before, "remember", {})  # what cannot be saved is refused now, not when it is to be saved
        before = deepcopy(before)
        first = _digest(next(iter(_Stream(self.data))))
        for name, thing in self.remember.items():  # the look at the first batch has left no trace in it
            thing.load_state_dict(before[name])
        groups = self.optimizer.param_groups
        return {
            "recipe": asdict(self.recipe) | {"betas": list(self.recipe.betas)},
            "optimizer": optimizer,
            "parameters": [[list(p.shape), group["highest_lr"]] for group in groups for p in group["params"]],
            "remember": {name: type(thing).__name__ for name, thing in self.remember.items()},
            "sync": "local" if self.local else "gradients",
            "processes": self.world,
            "batches": _length(self.data),
            "first batch": first,
            "python": list(sys.version_info[:2]),  # each compiles a function to other code
            "loss": described(self.loss),
        }

    def _remembered(self) -> dict[str, Any]:
        return {name: thing.state_dict() for name, thing in self.remember.items()}

    def _save(self, step: int) -> None:
        assert self.checkpoints is not None
        content: dict[str, Any] = {"run": self._fingerprint, "epoch": self.stream.epoch, "remember": self._remembered()}
        content["last batch"] = _digest(self.stream.last)
        writes = self.rank == 0 or self.local
        if writes or self.sharded:  # what is sharded is gathered by all
            shared: dict[str, Any] = {
                "history": asdict(self.history),
                "model": whole(get_model_state_dict(self.model), keep=writes),
                "best": whole(self.best, keep=writes),
                "optimizer": optimizer_state(self.optimizer, keep=writes),
            }
        if writes:
            content |= shared
            for name, tensor in shared["model"].items():
                if not tensor.isfinite().all():
                    raise self._diverged(f"{name!r} is not finite after step {step}")
        self.checkpoints.write(step, content)
        self.saved = step

    def _resume(self, checkpoints: Checkpoints) -> int:
        """Take up the checkpoint in the folder, if there is one; the number of steps done."""
        files = 0
        for files, theirs in enumerate(checkpoints.runs(), 1):
            self._compare(theirs, others=files - 1 != self.rank)
        if not files:
            return 0
        own = checkpoints.read(self.rank if checkpoints.apart else 0)
        shared = own if self.local or self.rank == 0 else checkpoints.read()
        with reading(f"folder={str(checkpoints.folder)!r}: the checkpoint", "delete it to start again"):
            return self._take_up(own, shared, last=own is shared or checkpoints.apart)

    def _take_up(self, own: dict[str, Any], shared: dict[str, Any], last: bool) -> int:
        self._check_states(shared)
        set_model_state_dict(self.model, shared["model"], options=StateDictOptions(full_state_dict=True))
        load_optimizer_state(self.optimizer, shared["optimizer"])
        if shared["best"] is not None:
            now = get_model_state_dict(self.model)
            self.best = {name: like(value, now[name]) for name, value in shared["best"].items()}
        for name, thing in self.remember.items():
            thing.load_state_dict(own["remember"][name])
        if self.remembers_sampler:
            self.stream = _Stream(self.data, own["epoch"], resumed=True)
        else:
            done, length = shared["step"] * self.recipe.accumulate, _length(self.data)
            self.stream = _Stream(self.data, *(divmod(done, length) if length else (0, done)))
            self.stream.before = own.get("last batch") if last else None
        self.history = History(**shared["history"])
        if not fits(self.history.steps, list[dict]) or len(self.history.steps) != shared["step"]:
            raise ValueError(f"the history of step {shared['step']} has {len(self.history.steps)} entries")
        self.saved = shared["step"]
        return shared["step"]

    def _check_states(self, shared: dict[str, Any]) -> None:
        """Raise unless weights and the optimiser's state are all there, of the right shapes, and finite."""
        found: dict[str, Tensor] = shared["model"]
        expected: Any = get_model_state_dict(self.model)
        for weights in (found, shared["best"]):
            if weights is None and weights is not found:
                continue
            if weights.keys() != expected.keys():
                name = min(weights.keys() ^ expected.keys())
                raise ValueError(f"{name!r} is {'missing' if name in expected else 'of no model here'}")
            for name, tensor in weights.items():
                if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
                    raise ValueError(f"{name!r} is {shown(tensor)}, the model has {shown(expected[name])}")
        states, options = shared["optimizer"]["state"], self.optimizer.defaults
        if not states and (options.get("momentum") or "exp_avg" in _kept_by(self.optimizer)):
            raise ValueError("it has no state of the optimiser")
        for number, state in states.items():
            lacking = _kept_by(self.optimizer) - state.keys()
            if lacking:
                raise ValueError(f"the optimiser's state of parameter {number} lacks {min(lacking)!r}")
        every = [*found.items(), *((f"state {n} of the optimiser", t) for n, s in states.items() for t in _tensors(s))]
        for name, tensor in every:
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name!r} is not finite")

    def _compare(self, theirs: dict[str, Any], others: bool = False) -> None:
        """Refuse a checkpoint of another run; that of another process (`others`) begins with other rows."""
        assert self.checkpoints is not None
        for key, value in self._fingerprint.items():
            if theirs.get(key) == value or key == "python" or (others and key == "first batch"):
                continue
            if key == "loss" and key not in theirs:  # an older checkpoint
                continue
            if key == "loss" and theirs.get("python") != self._fingerprint["python"]:
                if without_code(theirs[key]) == without_code(value):
                    continue
            before: Any = theirs.get(key)
            now: Any = value
            if key == "recipe" and isinstance(before, dict):
                names = [name for name in value if before.get(name) != value[name]]
                before, now = ({name: side.get(name) for name in names} for side in (before, now))
            raise CheckpointError(
                f"folder={str(self.checkpoints.folder)!r} holds a run with another {key} ({str(before)[:200]}, now "
                f"{str(now)[:200]}); repeat that call to go on with it, or choose another folder"
            )


def _kept_by(optimizer: Optimizer) -> set[str]:
    """Names of what every parameter has in the state of an optimiser of torch; of others none are known."""
    adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return {"step", "exp_avg", "exp_avg_sq"} if adam else set()


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(batch):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif hasattr(batch, "values"):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
