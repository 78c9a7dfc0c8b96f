"""State of layers that is not trained: BatchNormalization's statistics, counters."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.distributed.topology import Topology
from common.errors import ConfigError
from common.tf.script import part

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


def of_layers(model: keras.Model) -> list[keras.Variable]:
    """The variables that layers themselves change; not frozen weights, and not the state of random generators."""
    found = {id(variable): variable for layer in model._flatten_layers() for variable in layer._non_trainable_variables}
    return list(found.values())


def of_ranks(model: keras.Model) -> list[keras.Variable]:
    """Those of them that a rank computes from its rows alone."""
    of_all = {
        id(variable)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized
        for variable in layer._non_trainable_variables
    }
    return [variable for variable in of_layers(model) if id(variable) not in of_all]


def values(variables: Sequence[keras.Variable]) -> dict[int, tf.Tensor]:
    """The values of variables, by their id."""
    return {id(variable): tf.identity(variable.value) for variable in variables}


def put_back(variables: Sequence[keras.Variable], before: Mapping[int, tf.Tensor]) -> None:
    """Gives variables the values that they had before; those that are new begin at 0."""
    for variable in variables:
        variable.assign(before.get(id(variable), tf.zeros_like(variable.value)))


def sums(tensors: Sequence[tf.Tensor], name: str, topology: Topology) -> list[tf.Tensor]:
    """The sums over the ranks in float64, in which the mean of equal numbers is exact; one message."""
    if not tensors or topology.world_size == 1:
        return [tf.cast(tensor, tf.float64) for tensor in tensors]
    shapes = [tf.shape(tensor) for tensor in tensors]
    flat = tf.concat([tf.reshape(tf.cast(tensor, tf.float64), [-1]) for tensor in tensors], 0)
    parts = tf.split(hvd.allreduce(flat, op=hvd.Sum, name=name), [tf.size(tensor) for tensor in tensors])
    return [tf.reshape(values, shape) for values, shape in zip(parts, shapes, strict=True)]


def sum_variables(variables: Sequence[keras.Variable], name: str, topology: Topology) -> None:
    """Gives all ranks the sums of their values of variables."""
    totals = sums([variable.value for variable in variables], name, topology)
    for variable, total in zip(variables, totals, strict=True):
        variable.assign(tf.cast(total, variable.dtype))


def synchronise(model: keras.Model, topology: Topology) -> None:
    """Averages the layers' statistics over the ranks; of integers, all ranks take rank 0's."""
    variables = of_ranks(model)
    floats = [variable for variable in variables if "float" in variable.dtype]
    means = sums([variable.value for variable in floats], "script.statistics", topology)
    for variable, total in zip(floats, means, strict=True):
        variable.assign(tf.cast(total / topology.world_size, variable.dtype))
    for number, variable in enumerate(each for each in variables if "int" in each.dtype):
        variable.assign(hvd.broadcast(variable.value, 0, name=f"script.integers.{number}"))


def use_global_batch(model: keras.Model) -> None:
    """Makes each BatchNormalization(synchronized=True) normalise with the statistics of the global batch."""
    for number, layer in enumerate(model._flatten_layers()):
        if isinstance(layer, keras.layers.BatchNormalization):
            vars(layer)["_moments"] = _Moments(layer, f"script.moments.{number}")


class _Moments:
    """Replaces a layer's method that computes mean and variance of its inputs, each (channels,).

    Where gradients of parts of a batch are compared, they are the moving ones, which do not depend on the part.
    """

    def __init__(self, layer: keras.layers.BatchNormalization, name: str) -> None:
        self._layer, self._plain, self._name = layer, type(layer)._moments, name

    def __call__(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        of_step = part.current()
        if of_step is not None and of_step.recorded is not None:
            return self._layer.moving_mean.value, self._layer.moving_variance.value
        if of_step is None or not self._layer.synchronized:
            return self._plain(self._layer, inputs, mask)
        if mask is not None:
            raise ConfigError(
                [f"{self._layer.name}: BatchNormalization(synchronized=True) takes no mask; use synchronized=False"]
            )
        axes = self._layer._reduction_axes
        values = tf.cast(inputs, tf.float32)
        is_real = 1.0 - tf.cast(of_step.is_empty, tf.float32)
        of_rank = tf.cast(tf.size(values) / values.shape[self._layer.axis], tf.float32)
        count = hvd.allreduce(is_real * of_rank, op=hvd.Sum, name=f"{self._name}.count")
        mean = self._sum(tf.reduce_sum(values, axes, keepdims=True) * is_real, "mean", of_step) / count
        squares = tf.reduce_sum(tf.math.squared_difference(values, mean), axes, keepdims=True)
        variance = self._sum(squares * is_real, "variance", of_step) / count
        return tf.cast(tf.squeeze(mean, axes), inputs.dtype), tf.cast(tf.squeeze(variance, axes), inputs.dtype)

    def _sum(self, values: tf.Tensor, name: str, of_step: part.Part) -> tf.Tensor:
        """The sum over the ranks.

        A rank's gradients are those of the mean over its rows. So before the gradients of all ranks with respect to
        the sum are added, each is multiplied by its rank's number of rows.
        """
        rows = tf.cast(of_step.num_rows, tf.float32)

        @tf.custom_gradient
        def summed(values: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                total = hvd.allreduce(
                    tf.math.multiply_no_nan(upstream, rows), op=hvd.Sum, name=f"{self._name}.{name}.gradient"
                )
                return total / tf.maximum(rows, 1.0)

            return hvd.allreduce(values, op=hvd.Sum, name=f"{self._name}.{name}"), gradient

        return summed(values)
