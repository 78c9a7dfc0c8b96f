"""The loss scale of a run, and the check for values that are not finite."""

from typing import Any

from common.gradients.gradient_sync import Counters, SyncOptions

import torch
from torch import Tensor


class LossScaler:
    """Divides gradients by the loss scale, and adapts it after each step.

    Args:
        options: the rule of the loss scale, and whether values are checked.

    Attributes:
        counters: the number of steps and the state of the loss scale, the same on all ranks.
    """

    def __init__(self, options: SyncOptions) -> None:
        self._options = options
        self.counters = Counters(loss_scale=options.loss_scale.initial)

    @property
    def loss_scale(self) -> float:
        """The factor on the losses of the next step."""
        return float(self.counters.loss_scale)

    @property
    def num_steps(self) -> int:
        """Number of steps so far."""
        return int(self.counters.num_steps)

    def unscale(self, gradients: list[Tensor]) -> float:
        """Divides gradients by the loss scale in place; returns 1 if a value is not finite, else 0."""
        if self._options.loss_scale.is_dynamic:
            torch._foreach_div_(gradients, self.loss_scale)
        return float(self._options.finds_nonfinite and not all(values.isfinite().all() for values in gradients))

    def count(self, is_skipped: Any) -> None:
        """Counts a step, and updates the loss scale."""
        self.counters = self.counters.after_step(
            self._options.loss_scale, is_skipped, lambda condition, a, b: a if condition else b
        )

    def numbers(self) -> Counters:
        """The counters, as numbers."""
        return self.counters

    def restore(self, counters: Counters) -> None:
        """Continues from the counters of a checkpoint."""
        self.counters = counters.restored(self._options.loss_scale)
