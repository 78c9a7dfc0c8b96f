"""Makes Keras' metrics exact that are given one value for a batch, such as its loss."""

import functools
from typing import Any

from common.errors import ConfigError
from common.tf.script import checks, losses, part

import keras
import tensorflow as tf


@functools.cache
def install() -> None:
    """Wraps methods of Keras' metrics, which act as before outside of a distributed step."""
    keras.metrics.Mean.update_state = _mean(keras.metrics.Mean.update_state)
    keras.metrics.Sum.update_state = _sum(keras.metrics.Sum.update_state)
    keras.metrics.MeanMetricWrapper.update_state = _of_function(keras.metrics.MeanMetricWrapper.update_state)


def _is_one_value(values: Any) -> bool:
    return tf.convert_to_tensor(values).shape.rank == 0


def _mean(plain: Any) -> Any:
    @functools.wraps(plain)
    def update_state(self: keras.metrics.Mean, values: Any, sample_weight: Any = None) -> Any:
        of_step = part.current()
        if of_step is not None and sample_weight is None and _is_one_value(values):
            sample_weight = of_step.share(tf.float32)  # over the ranks, it counts as the one value of the batch
        return plain(self, values, sample_weight=sample_weight)

    return update_state


def _sum(plain: Any) -> Any:
    @functools.wraps(plain)
    def update_state(self: keras.metrics.Sum, values: Any, sample_weight: Any = None) -> Any:
        if part.current() is not None and _is_one_value(values):
            raise ConfigError(
                [f"{self.name}: a Sum of one value per batch would differ with the ranks; give it one per example"]
            )
        return plain(self, values, sample_weight=sample_weight)

    return update_state


def _of_function(plain: Any) -> Any:
    @functools.wraps(plain)
    def update_state(self: keras.metrics.MeanMetricWrapper, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        of_step = part.current()
        if of_step is not None and of_step.recorded is None:

            def value(targets: Any, outputs: Any) -> Any:
                return self._fn(targets, outputs, **self._fn_kwargs)

            checks.suspect(losses.is_of_whole_batch(value, y_true, y_pred, None, of_step))
        return plain(self, y_true, y_pred, sample_weight)

    return update_state
