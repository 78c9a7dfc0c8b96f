"""Makes Keras' losses exact on a part of a batch, and finds those that cannot be."""

import functools
from collections.abc import Callable
from typing import Any

from common.errors import ConfigError
from common.tf.script import checks, part

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

MEANS = ("sum_over_batch_size", "mean")
# The loss of a batch against the mean of the losses of its halves, in float32 or float16.
TOLERANCE = {tf.float16: 1e-2, tf.bfloat16: 5e-2}


@functools.cache
def install() -> None:
    """Wraps keras.Loss.__call__, which acts as before outside of a distributed step."""
    keras.Loss.__call__ = _wrapped(keras.Loss.__call__)


def _wrapped(plain: Any) -> Any:
    @functools.wraps(plain)
    def call(self: keras.Loss, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        of_step = part.current()
        if of_step is None:
            return plain(self, y_true, y_pred, sample_weight)
        if self.reduction not in MEANS:
            name = type(self).__name__
            raise ConfigError(
                [
                    f"{name}(reduction={self.reduction!r}): a loss must be a mean over the examples, for ranks to "
                    f"weight it by their numbers of examples; use {name}(reduction='sum_over_batch_size')"
                ]
            )
        loss, mask = _with_mask(self, plain, y_true, y_pred, sample_weight)
        if of_step.recorded is None:
            checks.suspect(is_of_whole_batch(self.call, y_true, y_pred, self.dtype, of_step))
        return loss if mask is None else loss * tf.cast(_correction(mask, of_step), loss.dtype)

    return call


def _with_mask(
    loss: keras.Loss, plain: Any, y_true: Any, y_pred: Any, sample_weight: Any
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """The mean loss, and what it is the mean of: the mask of the outputs, and that of the values (ignore_class)."""
    masks = [getattr(y_pred, "_keras_mask", None)]
    call = loss.call

    def noted(*args: Any) -> Any:
        values = call(*args)
        masks.append(getattr(values, "_keras_mask", None))
        return values

    vars(loss)["call"] = noted
    try:
        value = plain(loss, y_true, y_pred, sample_weight)
    finally:
        del vars(loss)["call"]
    given = [tf.cast(mask, tf.bool) for mask in masks if mask is not None]
    return value, tf.logical_and(*given) if len(given) == 2 else next(iter(given), None)


def _correction(mask: tf.Tensor, of_step: part.Part) -> tf.Tensor:
    """The factor () on a mean over this rank's unmasked timesteps that makes its share of rows a share of timesteps."""
    mine = tf.where(of_step.is_empty, 0.0, tf.reduce_sum(tf.cast(mask, tf.float32)))
    if of_step.recorded is not None:
        return mine / tf.cast(of_step.num_computed, tf.float32)  # up to a factor that is the same for all rows
    total = hvd.allreduce(mine, op=hvd.Sum, name="script.timesteps")
    return tf.math.divide_no_nan(mine, total * of_step.share(tf.float32))


def is_of_whole_batch(
    function: Callable[[Any, Any], Any], y_true: Any, y_pred: Any, dtype: str | None, of_step: part.Part
) -> tf.Tensor:
    """() bool, whether a value of a batch is not that of its examples, such as the root of a mean or Dice.

    It is computed in the first step of an epoch only; else it is False.
    """
    half = of_step.num_computed // 2

    def values(begin: Any = None, end: Any = None) -> tf.Tensor:
        def rows(value: Any) -> tf.Tensor:
            return keras.ops.convert_to_tensor(value, dtype=dtype)[begin:end]

        targets, outputs = keras.tree.map_structure(rows, (y_true, y_pred))
        return tf.convert_to_tensor(function(targets, outputs))

    def compare() -> tf.Tensor:
        whole, first, second = values(), values(end=half), values(begin=half)
        if whole.shape.rank == 0:
            fraction = tf.cast(half / of_step.num_computed, whole.dtype)
            of_halves = first * fraction + second * (1 - fraction)
        else:
            of_halves = tf.concat([first, second], 0)
        bound = TOLERANCE.get(whole.dtype, 1e-4) * (tf.reduce_max(tf.abs(whole)) + 1e-3)
        return tf.reduce_any(tf.abs(whole - of_halves) > tf.cast(bound, whole.dtype))

    return tf.cond(checks.is_first_step() & (half > 0), compare, lambda: tf.constant(False))
