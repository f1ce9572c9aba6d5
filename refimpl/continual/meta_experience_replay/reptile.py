"""Step 3 of MER, Reptile: every k updates the weights move to a point between those of k updates ago and now.

theta_0 -> k optimiser steps -> theta,        theta <- theta_0 + epsilon (theta - theta_0),        theta_0 <- theta
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.core.arguments import Checked, checked
from refimpl.core.errors import OptionError
from refimpl.core.train.outer import OuterStep


@torch.no_grad()
def merge(slow: Sequence[Tensor], fast: Sequence[Tensor], epsilon: float) -> None:
    """``theta <- theta_0 + epsilon (theta - theta_0)``, then ``theta_0 <- theta``: in place.

    For an epsilon of a half or more `torch.lerp` computes ``theta - (1 - epsilon) (theta - theta_0)``, so epsilon = 1
    changes no bit of theta; the formula as written would round.

    Args:
        slow: theta_0, the weights of k updates ago, in fp32 or fp64.
        fast: theta, the weights now, of the same shapes.
        epsilon: share of the way from `slow` to `fast`, 0 to 1.

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
class Reptile(Checked):
    """Step 3 of MER. A merge changes neither the optimiser's moments nor the learning rate.

    With ``every=1`` each update of the optimiser is multiplied by epsilon: this is AdamW (or SGD without momentum) with
    a rate epsilon times as large, the control that moves as far without aligning gradients.

    Args:
        epsilon: share of the way that is kept; 1 is plain training, bit for bit, and 0 leaves the weights unchanged.
        every: k, updates between two merges.
        start: updates of plain training before the first k updates that end in a merge.

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
                "updates before it as the others"
            )

    @checked()
    def attach(self, model: nn.Module) -> Merges:
        """The hook for `refimpl.core.train.loop.train`; it keeps the weights of k updates ago in buffers of the model.

        Raises:
            OptionError: trained weights in 16 bits, in which rounding would undo small merges.
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

        During training the model has the buffers of `attach`, and so have its checkpoints. A Trainer does not read them
        back, so let it save after multiples of `every`, where theta_0 equals theta.

        Example:
            >>> from transformers import Trainer
            >>> callbacks = [Reptile(epsilon=0.3, every=50).callback()]       # Trainer(..., callbacks=callbacks)
        """
        from transformers import TrainerCallback  # imported here because it takes seconds

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
        # at step = start the outer step only sets theta_0 = theta; merges follow at start + k, start + 2 k, ...
        self._merging = step > self.options.start
        self._outer(step, model)

    def _update(self, slow: list[Tensor], fast: list[Tensor]) -> None:
        if self._merging:
            merge(slow, fast, self.options.epsilon)

    def close(self) -> None:
        """Remove the buffers from the model."""
        self._outer.close()
