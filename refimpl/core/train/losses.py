"""Losses of single samples, and a loss for `refimpl.core.train.loop.train` that weights the samples of a batch.

`train` takes any ``loss(model, batch)`` that returns a scalar. A method that looks at samples one by one needs their
losses first (`sequence_losses` for language models, `sample_losses` for classifiers), and decides over the batch of all
processes, not over one process's share (`Weighted`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from refimpl.core.arguments import Checked, checked, shown
from refimpl.core.device import rank_and_world, read, read_all
from refimpl.core.errors import CalibrationError, OptionError, reason
from refimpl.kernels.cross_entropy import sequence_cross_entropy

IGNORED = -100
"""Label of a target that does not count, as in PyTorch and transformers."""

Losses = Callable[[Any, Any], Tensor]
Weights = Callable[[Tensor, int], "Tensor | None"]

_STEPS = "weighted_loss_calls"  # it counts updates; checkpoints know it by this name
_READ_EVERY = 64  # batches between two looks at what is kept for `Weighted.history`


@checked()
def sequence_losses(model: nn.Module, batch: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of every sequence of a batch under a causal language model.

    The logits go to one operator (on a GPU a kernel) that keeps one number a token and no probabilities.

    Args:
        model: a causal model of transformers, or a module that maps ids [B, T] to logits [B, T, V]; possibly wrapped
            for several processes.
        batch: int64 [B, T + 1], of which all but the first column are targets; or a sequence with that first; or a
            mapping as transformers takes it, with "input_ids" [B, T] and "labels" [B, T] (the same ids, not shifted,
            -100 where a target does not count; default: "input_ids", so rows with padding need labels); what else it
            holds is passed to the model.

    Returns:
        fp32 [B], in nats a token, each over the targets of its own row; 0 for a row without targets (see `counted`).

    Raises:
        CalibrationError: a batch of another form, or a label outside the vocabulary. On a GPU, where looking would
            wait for the device, the row of such a label gets a loss of NaN, at which `train` stops.

    Example:
        >>> model = nn.Embedding(8, 8)             # the next token depends on this one only
        >>> rows = torch.randint(8, (4, 6))
        >>> losses = sequence_losses(model, rows)
        >>> expected = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        >>> losses.shape, torch.allclose(losses.mean(), expected)
        (torch.Size([4]), True)
    """
    inner = getattr(model, "module", model)  # DistributedDataParallel keeps the model there
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise CalibrationError(f"batch has the keys {sorted(batch)}; it needs 'input_ids'")
        rest = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch.get("labels", batch["input_ids"])
        _check_rows(labels, "batch['labels']")
        with _ids_known():
            logits = model(**rest).logits
        return shifted_losses(logits, labels)
    rows = batch if isinstance(batch, Tensor) else next(iter(batch), None)
    _check_rows(rows, "batch")
    assert isinstance(rows, Tensor)
    with _ids_known():
        if hasattr(inner, "main_input_name"):  # a model of transformers
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        else:
            logits = model(rows[:, :-1])
    return _row_losses(logits, rows[:, 1:])


@contextmanager
def _ids_known() -> Iterator[None]:
    """On a CPU an embedding raises an IndexError for an id it does not know; to look at all ids first would cost time."""
    try:
        yield
    except IndexError as error:
        raise CalibrationError(
            f"batch holds ids that the model does not know ({reason(error)}); use its tokenizer"
        ) from error


@checked()
def shifted_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The same from logits that are there already: what a Trainer's ``compute_loss_func`` gets.

    Args:
        logits: [B, T, V]; those of position t are about label t + 1.
        labels: int64 [B, T], not shifted; -100 where a target does not count.

    Returns:
        fp32 [B].

    Raises:
        CalibrationError: shapes that do not belong together, or a label outside the vocabulary.

    Example:
        >>> labels = torch.tensor([[3, 1, 2], [3, 1, -100]])
        >>> shifted_losses(torch.zeros(2, 3, 4), labels).exp().round().tolist()
        [4.0, 4.0]
    """
    if logits.shape[:2] != labels.shape:
        raise CalibrationError(
            f"labels has shape {list(labels.shape)}, logits {list(logits.shape)}; the first two must be equal"
        )
    # the targets are shifted, not the logits: the gradient of a slice would be copied into a tensor as large again
    return _row_losses(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED))


def counted(losses: Tensor) -> Tensor:
    """Which samples of a batch take part: those whose loss is not exactly 0.

    A row without targets has a loss of 0 and no gradient. It says nothing about the batch, so it must not be its minimum
    nor one of the samples that a mean is over.

    Args:
        losses: [..., M]; each row is a batch of its own.

    Returns:
        bool, the same shape; all True in a batch in which no sample has a loss. A NaN takes part.

    Example:
        >>> counted(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])).tolist()
        [[True, False, True], [True, True, True]]
    """
    there = losses != 0
    return there | (there.sum(-1, keepdim=True) == 0)


@checked()
def sample_losses(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of every sample of a batch under a classifier.

    Args:
        model: maps inputs to logits [B, C], or returns something with ``.logits``.
        batch: inputs [B, ...] and int64 labels [B].

    Returns:
        fp32 [B], in nats.

    Raises:
        CalibrationError: a label that is no class of the model (on a GPU: a loss of NaN).

    Example:
        >>> sample_losses(nn.Linear(3, 10), (torch.zeros(5, 3), torch.arange(5))).shape
        torch.Size([5])
    """
    inputs, labels = batch
    output = model(inputs)
    logits = output.logits if hasattr(output, "logits") else output
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise CalibrationError(
            f"labels has shape {list(labels.shape)}, logits {list(logits.shape)}; they must be [B] and [B, classes]"
        )
    wrong = _check_labels(labels, logits.shape[1], "class", torch.zeros_like(labels, dtype=torch.bool))
    losses = F.cross_entropy(logits.float(), labels.masked_fill(wrong, 0), reduction="none")
    return losses.masked_fill(wrong, torch.nan)


def _row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise CalibrationError(f"logits={shown(logits)}: a causal model gives floating numbers [B, T, V]")
    _check_labels(targets, logits.shape[-1], "token", (targets == IGNORED))
    return sequence_cross_entropy(logits, targets, IGNORED)  # on a GPU it answers a wrong label with NaN


def _check_labels(labels: Tensor, count: int, kind: str, ignored: Tensor) -> Tensor:
    """Where labels are wrong (none on a CPU: there it says so)."""
    wrong = ((labels < 0) | (labels >= count)) & ~ignored
    if labels.device.type == "cpu" and bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        allowed = f"0 to {count - 1}"
        if kind == "token":
            allowed += f", or {IGNORED} for a target that does not count"
        raise CalibrationError(
            f"row {row} of the batch has the label {int(labels[wrong][0])}, which is no {kind} of the model; "
            f"use {allowed}"
        )
    return wrong


def _check_rows(rows: object, name: str) -> None:
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.dtype != torch.int64:
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise CalibrationError(f"{name} is {found}; it must be an int64 tensor [rows, tokens]")
    if rows.shape[0] == 0 or rows.shape[1] < 2:
        raise CalibrationError(f"{name} has shape {list(rows.shape)}; it needs a row and two tokens in each")


class Weighted(Checked):
    """A loss for `train`: samples of the batch of *all* processes, weighted by a function of their losses.

    With W processes and weights that sum to one over the global batch of M samples, process q returns
    ``W * sum_{i in q} w_i l_i``; the mean of gradients over processes, which data parallelism takes, is then that of
    ``sum_i w_i l_i``. Weights are constants for the gradient. The cost is one all-gather of M numbers.

    Samples without a loss (`counted`) have no weight, and a plain mean is over the others.

    How many updates were finished is kept in a buffer of the model, so that a run taken up from a checkpoint is at the
    right step; `close` removes it. An update is finished when an optimiser that has the model's parameters steps. With
    accumulation, weights are those of each micro-batch (over all processes), not of the batch that its micro-batches
    make, and the loss is a mean over a micro-batch: `train` divides by their number, `compute_loss_func` for a Trainer
    does, and a loop of your own must, as for any other mean.

    Args:
        model: that will be trained, before it is wrapped.
        losses: of samples: ``losses(model, batch)`` gives [B], the same B on all processes.
        weights: ``weights(l, step)`` gives [M] that sum to one, from the detached losses l [M] and the number of
            finished updates; or None for the plain mean.
        accumulate: micro-batches per update, for engines whose optimiser has copies of the parameters (DeepSpeed); None
            watches the optimiser.

    Attributes:
        last: weights of the last global batch, [M], in the order of ranks; None after a plain mean.

    Raises:
        OptionError: accumulate below 1, or a model that counts for another such loss.
        CalibrationError: losses that are no vector, or weights of another shape.

    Example:
        >>> from refimpl.core.train.loop import Recipe, batches, train
        >>> model = nn.Embedding(8, 8)
        >>> rows = torch.randint(8, (16, 6))
        >>> loss = Weighted(model, sequence_losses, lambda l, step: l / l.sum())
        >>> history = train(model, batches(rows, batch_size=8), loss, Recipe(steps=4), progress=False)
        >>> loss.last.shape, [sorted(entry) for entry in loss.history()][0]
        (torch.Size([8]), ['concentration', 'effective', 'loss', 'step'])
        >>> loss.close()
    """

    def __init__(self, model: nn.Module, losses: Losses, weights: Weights, accumulate: int | None = None) -> None:
        if accumulate is not None and accumulate < 1:
            raise OptionError(f"accumulate={accumulate}: use 1 or more, as in the recipe")
        if _STEPS in dict(model.named_buffers()):
            raise OptionError(f"model has a buffer {_STEPS!r}: close() the loss it was trained with before")
        self.losses, self.weights, self.accumulate = losses, weights, accumulate
        self.last: Tensor | None = None
        self._model = model
        self._batches = 0  # since the last update
        # on the CPU, where reading it waits for nothing; equal everywhere, so processes need not exchange it
        model.register_buffer(_STEPS, torch.zeros((), dtype=torch.int64))
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        model._ddp_params_and_buffers_to_ignore = [*ignored, _STEPS]  # type: ignore[assignment]
        self._handle = self._watch() if accumulate is None else None
        self._history: list[dict[str, float]] = []
        self._pending: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a micro-batch: a scalar for `train`."""
        return self.combine(self.losses(model, batch))

    def compute_loss_func(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The same for a Trainer of transformers: ``Trainer(..., compute_loss_func=loss.compute_loss_func)``.

        A Trainer does not divide by the micro-batches of an update but tells how many targets they have together. Each
        counts with its share of them, which for micro-batches of equal size is one by their number, also where the data
        end within an update.

        Args:
            outputs: of the model, with ``.logits`` [B, T, V].
            labels: int64 [B, T], not shifted.
            num_items_in_batch: targets of the update, over all processes with
                ``TrainingArguments(average_tokens_across_devices=True)``, where the Trainer multiplies by their number.
                None: the batch is the whole update, unless `accumulate` says otherwise.
        """
        value = self.combine(shifted_losses(outputs.logits, labels))
        if num_items_in_batch is None:
            return value / (self.accumulate or 1)
        return value * ((labels[:, 1:] != IGNORED).sum() / num_items_in_batch)

    def combine(self, own: Tensor) -> Tensor:
        """From this process's losses [B] to the scalar whose gradient is averaged over processes."""
        if not isinstance(own, Tensor) or own.dim() != 1:
            found = f"has shape {list(own.shape)}" if isinstance(own, Tensor) else f"is {shown(own)}"
            raise CalibrationError(f"losses {found}; it must be a vector, one loss a sample")
        rank, world = rank_and_world()
        every = own.detach().float()
        if world > 1:
            parts = [torch.empty_like(every) for _ in range(world)]
            dist.all_gather(parts, every)
            every = torch.cat(parts)
        step = int(read(self._model.get_buffer(_STEPS)))
        present = counted(every)
        with torch.no_grad():
            weights = self.weights(every, step)
        self._batches += 1
        if self._batches == self.accumulate:
            self._update()
        self.last = weights
        if weights is None:
            self._keep(every, present / present.sum(), present)
            return own.mean() * (len(every) / present.sum())
        if not isinstance(weights, Tensor) or weights.shape != every.shape:
            found = f"has shape {list(weights.shape)}" if isinstance(weights, Tensor) else f"is {shown(weights)}"
            raise CalibrationError(f"weights {found}, losses {list(every.shape)}")
        self._keep(every, weights, present)
        mine = weights[rank * len(own) : (rank + 1) * len(own)]
        return world * (mine.detach() * own).sum()

    @torch.no_grad()
    def _update(self) -> None:
        """An update is finished; one for the batches since the last, however many optimisers step."""
        if self._batches:
            self._model.get_buffer(_STEPS).add_(1)
            self._batches = 0

    def _watch(self) -> Any:
        """Call `_update` when an optimiser of the model steps; ends with `close`, or with this object."""
        this = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            loss = this()
            if loss is None:
                return
            trained = {id(parameter) for parameter in loss._model.parameters()}
            if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
                loss._update()

        handle = register_optimizer_step_post_hook(stepped)
        weakref.finalize(self, handle.remove)
        return handle

    def _keep(self, losses: Tensor, weights: Tensor, present: Tensor) -> None:
        share = present.sum() / len(losses)
        found = [losses.mean() / share, len(losses) * share * weights.max(), 1 / weights.square().sum()]
        self._pending.append(torch.stack(found))
        if len(self._pending) >= _READ_EVERY:
            self._read()

    def _read(self) -> None:
        if not self._pending:
            return
        values = read_all(torch.stack(self._pending).flatten())
        for mean, concentration, effective in zip(values[::3], values[1::3], values[2::3], strict=True):
            step = 1 + len(self._history)
            self._history.append({"step": step, "loss": mean, "concentration": concentration, "effective": effective})
        self._pending.clear()

    def history(self) -> list[dict[str, float]]:
        """Values to log, one entry for each batch this object has seen (not those before an interruption).

        "step" (from 1), "loss" (the plain mean over the global batch, comparable between weightings, which the loop's
        own loss is not), "concentration" (M times the largest weight, with M the samples
        that have a loss: 1 is uniform, M is one sample) and "effective"
        (``1 / sum w^2``, the number of equally weighted samples with as much noise).
        """
        self._read()
        return self._history

    def close(self) -> None:
        """Remove the buffer from the model, which is then as it was, to be saved or trained otherwise."""
        if self._handle is not None:
            self._handle.remove()
        if _STEPS in self._model._buffers:
            del self._model._buffers[_STEPS]
            ignored: Any = self._model._ddp_params_and_buffers_to_ignore
            self._model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
                name for name in ignored if name != _STEPS
            ]
