"""The loss scale of a run, and the check for values that are not finite."""

from collections.abc import Sequence
from typing import Any

from common.gradients.gradient_sync import Counters, SyncOptions

import tensorflow as tf


class LossScaler:
    """Divides gradients by the loss scale, and adapts it after each step.

    Args:
        options: the rule of the loss scale, and whether values are checked.
        dtype: the dtype of the gradients.

    Attributes:
        variable: (4,) float64, the counters; the same on all ranks.
    """

    def __init__(self, options: SyncOptions, dtype: tf.DType) -> None:
        self._options, self._dtype = options, dtype
        initial = Counters(loss_scale=options.loss_scale.initial)
        self.variable = tf.Variable(initial, dtype=tf.float64, trainable=False)

    @property
    def loss_scale(self) -> tf.Tensor | float:
        """The factor on the losses of the next step, ()."""
        return tf.cast(self.variable[1], self._dtype) if self._options.loss_scale.is_dynamic else 1.0

    @property
    def counters(self) -> Counters:
        """The number of steps and the state of the loss scale, () float64 each."""
        return Counters(*tf.unstack(self.variable))

    def unscale(self, gradients: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The gradients divided by the loss scale, and whether a value is not finite, () bool."""
        values = list(gradients)
        if self._options.loss_scale.is_dynamic:
            values = [value / self.loss_scale for value in values]
        if not self._options.finds_nonfinite:
            return values, tf.zeros((), tf.bool)
        return values, ~tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])

    def count(self, is_skipped: Any) -> None:
        """Counts a step, and updates the loss scale."""
        self.variable.assign(tf.stack(self.counters.after_step(self._options.loss_scale, is_skipped, _where)))

    def numbers(self) -> Counters:
        """The counters, as numbers."""
        return Counters(*self.variable.numpy().tolist())

    def restore(self, counters: Counters) -> None:
        """Continues from the counters of a checkpoint."""
        self.variable.assign(counters.restored(self._options.loss_scale))


def _where(condition: Any, a: Any, b: Any) -> tf.Tensor:
    return tf.where(condition, tf.cast(a, tf.float64), tf.cast(b, tf.float64))
