"""A second, slower optimiser around the training loop: every few updates it corrects where the loop has come.

Lookahead, Reptile and federated averaging have this form: the loop's optimiser walks a few steps from the slow weights,
`update` decides how much of the way to keep, and that is where the next walk begins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refimpl.core.device import rank_and_world
from refimpl.core.errors import OptionError

Update = Callable[[list[Tensor], list[Tensor]], None]

_PREFIX = "outer_slow_"  # of the buffers; numbers follow, since the dots of a parameter's name are not allowed


class OuterStep:
    """A hook for ``after_step`` of `refimpl.core.train.loop.train` that remembers where the last outer step ended.

    These slow weights are buffers of the model, ``outer_slow_0``, ...: checkpoints hold them, so a run with ``folder=``
    goes on with them, and DistributedDataParallel does not send them around. They take the memory of the
    trainable parameters once more. What the loop's optimiser remembers is not reset.

    Args:
        model: as it goes into `train`, on its device; where it is sharded, after ``fully_shard``.
        every: updates of the loop per outer step, which comes after steps every, 2 every, ... (counted from 1).
        update: gets the slow and the fast weights (of the trainable parameters in the model's order, outside autograd;
            DTensors where the model is sharded) and changes the fast ones in place. It may use the slow ones as
            scratch: afterwards they become the fast ones.

    Raises:
        OptionError: ``every`` below 1, no trainable parameters, or a model that has an outer step already.

    Example:
        >>> from refimpl.core.train.loop import Recipe, batches, train
        >>> def halfway(slow, fast):
        ...     for before, now in zip(slow, fast):
        ...         now.lerp_(before, 0.5)
        >>> model = nn.Linear(3, 1)
        >>> outer = OuterStep(model, every=5, update=halfway)
        >>> square = lambda model, batch: model(batch[0]).square().mean()
        >>> data = batches(torch.randn(64, 3), batch_size=8)
        >>> _ = train(model, data, square, Recipe(steps=20), after_step=[outer], progress=False)
        >>> outer.close()
        >>> sorted(model.state_dict())
        ['bias', 'weight']
    """

    def __init__(self, model: nn.Module, every: int, update: Update) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"every={every!r}: use 1 or more updates for an outer step")
        if _buffers(model):
            raise OptionError("model has an outer step already; call its close() first")
        self._fast = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._fast:
            raise OptionError(
                "model: none of its parameters require a gradient; call requires_grad_() on those to train"
            )
        self.every, self.update, self._model = every, update, model
        for number, parameter in enumerate(self._fast):
            value = parameter.detach().clone()
            if rank_and_world()[1] > 1 and not hasattr(value, "device_mesh"):
                dist.broadcast(value, 0)  # train begins where the first process is
            model.register_buffer(f"{_PREFIX}{number}", value)
        # otherwise they would travel before every forward pass
        model._ddp_params_and_buffers_to_ignore = [*_ignored(model), *_buffers(model)]  # type: ignore[assignment]

    @property
    def slow(self) -> list[Tensor]:
        """The trainable parameters as the last outer step left them."""
        return [self._model.get_buffer(name) for name in _buffers(self._model)]

    @torch.no_grad()
    def __call__(self, step: int, model: nn.Module) -> None:
        """Called by `train` after update number `step` (from 1)."""
        if step % self.every:
            return
        slow, fast = self.slow, [parameter.detach() for parameter in self._fast]
        self.update(slow, fast)
        for value, now in zip(slow, fast, strict=True):
            value.copy_(now)

    def close(self) -> None:
        """Take the slow weights out of the model, which is then as it was, to be saved or trained otherwise."""
        names = _buffers(self._model)
        for name in names:
            delattr(self._model, name)
        if names:
            kept = [name for name in _ignored(self._model) if name not in names]
            self._model._ddp_params_and_buffers_to_ignore = kept  # type: ignore[assignment]


def _buffers(model: nn.Module) -> list[str]:
    return [name for name in model._buffers if name.startswith(_PREFIX)]


def _ignored(model: nn.Module) -> list[str]:
    return list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
