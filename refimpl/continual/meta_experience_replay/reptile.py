"""Reptile between optimiser steps: every k updates the weights go back to a point between then and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.errors import OptionError
from refimpl.core.train.outer import OuterStep


@torch.no_grad()
def merge(slow: Sequence[Tensor], fast: Sequence[Tensor], epsilon: float) -> None:
    """``theta <- theta_0 + epsilon (theta - theta_0)``, then ``theta_0 <- theta``: in place, from the nearer end.

    `torch.lerp` computes it as ``theta - (1 - epsilon) (theta - theta_0)`` where epsilon is a half or more, so
    epsilon = 1 leaves every bit of theta as it is; the line as written would round.

    Args:
        slow: theta_0, the weights of k updates ago, in fp32 or fp64.
        fast: theta, the weights now, of the same shapes.
        epsilon: how far to go towards `fast`.

    Example:
        >>> slow, fast = [torch.zeros(2)], [torch.ones(2)]
        >>> merge(slow, fast, 0.25)
        >>> fast[0], slow[0]
        (tensor([0.2500, 0.2500]), tensor([0.2500, 0.2500]))
    """
    for theta_0, theta in zip(slow, fast, strict=True):
        theta_0.lerp_(theta, epsilon)  # theta_0 + epsilon (theta - theta_0)
        theta.copy_(theta_0)


@dataclass(frozen=True)
class Reptile:
    """Step 3 of MER. The optimiser's moments and the learning rate go on as they are.

    With ``every=1`` the optimiser's update is cut to a share epsilon: AdamW (or SGD without momentum) with a rate
    epsilon times as large. That is the control which moves as far without aligning gradients.

    Args:
        epsilon: share of the way that is kept; 1 is plain training, bit for bit, and 0 stands still.
        every: k, updates between two merges.
        start: updates before the first k begin, in which training is plain.

    Raises:
        OptionError: a value outside its range.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before = model.weight.detach().clone()
        >>> hook = Reptile(epsilon=0.5, every=1).attach(model)
        >>> _ = nn.init.zeros_(model.weight)
        >>> hook(1, model)                             # `train` calls it: after_step=[hook]
        >>> torch.equal(model.weight, before / 2)
        True
        >>> hook.close()
    """

    epsilon: float = 0.1
    every: int = 500
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise OptionError(f"epsilon={self.epsilon}: it is a share of the way, use 0 to 1")
        if self.every < 1:
            raise OptionError(f"every={self.every}: use 1 or more updates")
        if self.start < 0 or self.start % self.every:
            raise OptionError(
                f"start={self.start}: use a multiple of every={self.every}, so that the first merge has as many "
                "updates behind it as the others"
            )

    def attach(self, model: nn.Module) -> Merges:
        """The hook for `refimpl.core.train.loop.train`; it keeps the weights of k updates ago in buffers of the model.

        Raises:
            OptionError: trained weights in 16 bits, in which a merge would be lost by rounding.
        """
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise OptionError(
                    f"model: {name!r} is trained in {str(parameter.dtype).removeprefix('torch.')}; a merge belongs to "
                    "the fp32 weights, so load the model with dtype=torch.float32 and train it with precision='bf16'"
                )
        return Merges(model, self)

    def callback(self) -> Any:
        """The same as a callback of the Hugging Face Trainer.

        The model has the buffers of `attach` while it trains, and so have checkpoints saved meanwhile; a Trainer does
        not read them back, so let it save after multiples of `every` (there both copies are equal).

        Example:
            >>> from transformers import Trainer
            >>> callbacks = [Reptile(epsilon=0.3, every=50).callback()]       # Trainer(..., callbacks=callbacks)
        """
        from transformers import TrainerCallback  # seconds that the loop does not need

        options = self

        class MergeCallback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                self.merges = options.attach(model)

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                self.merges(state.global_step, model)

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.merges.close()

        return MergeCallback()


class Merges:
    """The hook of one training: see `Reptile.attach`."""

    def __init__(self, model: nn.Module, options: Reptile) -> None:
        self.options = options
        self._merging = False
        self._outer = OuterStep(model, options.every, self._update)

    def __call__(self, step: int, model: nn.Module) -> None:
        self._merging = step > self.options.start
        self._outer(step, model)

    def _update(self, slow: list[Tensor], fast: list[Tensor]) -> None:
        if self._merging:
            merge(slow, fast, self.options.epsilon)

    def close(self) -> None:
        """Take the buffers out of the model again."""
        self._outer.close()
