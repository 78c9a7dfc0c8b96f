"""Gives Keras' optimizers the gradients of all ranks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from common.config.schema import ReduceOp
from common.distributed.topology import Topology
from common.gradients.gradient_sync import NO_COMPRESSION, SyncOptions
from common.tf.gradients.allreduce import AllreduceSync
from common.tf.script import part

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


class GradientExchange:
    """Makes an optimizer use the gradients of the global batch; it keeps its class and is saved as usual.

    A rank's gradients are means over its rows. They are multiplied by the rank's share of the rows before they are
    summed, so that the sums are the means over the global batch. With the optimizer's gradient_accumulation_steps=k,
    the ranks exchange once in k steps. A sparse gradient, that of an embedding, stays sparse as in Keras: its rows are
    gathered.

    Args:
        optimizer: an optimizer of Keras.
        topology: the place of this rank.
        options: how gradients are summed.
        name: of the messages; unique, and the same on all ranks.
        before: called before each exchange; returns operations that must run before it.
    """

    def __init__(
        self,
        optimizer: keras.Optimizer,
        topology: Topology,
        options: SyncOptions,
        name: str,
        before: Callable[[], list[Any]],
    ) -> None:
        self._optimizer, self._topology, self._options = optimizer, topology, options
        self._name, self._before = name, before
        self._syncs: dict[Any, AllreduceSync] = {}
        self._apply, optimizer.apply = optimizer.apply, self.apply
        # A loss scale must see whether the sums are finite; else the sums come after a possible accumulation.
        self._at_once = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if not self._at_once:
            self._clip, optimizer._clip_gradients = optimizer._clip_gradients, self.clip

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[keras.Variable] | None = None) -> None:
        """Replaces the optimizer's method: weighs this rank's gradients by its share of the rows."""
        grads = list(grads)
        of_step = part.current()
        if of_step is not None and of_step.recorded is not None:
            of_step.recorded.extend(tf.convert_to_tensor(gradient) for gradient in grads if gradient is not None)
            return
        variables = self._optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
        with tf.control_dependencies(self._before()):
            weighed = [self._weighed(gradient, variable) for gradient, variable in zip(grads, variables, strict=True)]
        self._apply(self._sum(weighed) if self._at_once else weighed, trainable_variables)

    def clip(self, grads: Sequence[Any]) -> Any:
        """Replaces the optimizer's method, which it calls once per update: sums gradients before they are clipped."""
        return self._clip(self._sum(grads))

    def _weighed(self, gradient: Any, variable: keras.Variable) -> Any:
        if gradient is None:
            return None
        if isinstance(gradient, tf.IndexedSlices) and self._is_plain:
            return tf.IndexedSlices(self._scaled(gradient.values), gradient.indices, tf.constant(tuple(variable.shape)))
        # The gradient of a layer over a dimension of unknown size has no static shape.
        return tf.ensure_shape(self._scaled(tf.convert_to_tensor(gradient)), variable.shape)

    def _scaled(self, values: tf.Tensor) -> tf.Tensor:
        of_step = part.current()
        share = of_step.share(values.dtype) if of_step else tf.constant(1 / self._topology.world_size, values.dtype)
        return tf.math.multiply_no_nan(values, share)  # the gradient of an empty part may be NaN

    @property
    def _is_plain(self) -> bool:
        return self._options.compression == NO_COMPRESSION and self._options.op is ReduceOp.average

    def _sum(self, grads: Sequence[Any]) -> list[Any]:
        summed = list(grads)
        by_dtype: dict[tf.DType, list[int]] = {}
        for number, gradient in enumerate(grads):
            if isinstance(gradient, tf.IndexedSlices):
                summed[number] = self._gathered(gradient, number)
            elif gradient is not None:
                by_dtype.setdefault(_wide(gradient.dtype), []).append(number)
        for dtype, numbers in by_dtype.items():
            sums = self._dense_sums([tf.cast(grads[number], dtype) for number in numbers])
            for number, total in zip(numbers, sums, strict=True):
                summed[number] = tf.cast(total, grads[number].dtype)
        return summed

    def _gathered(self, gradient: tf.IndexedSlices, number: int) -> tf.IndexedSlices:
        """The rows of all ranks, in the order of the global batch.

        Keras' optimizers square the rows before they add those of the same number. So they must get what they would
        get on one rank: a row for each lookup of the batch, but only one for each position of a sequence, where rows
        have already been added over the batch.
        """
        name, size = f"{self._name}.rows.{number}", self._topology.world_size
        values = hvd.allgather(gradient.values, name=f"{name}.values")
        indices = hvd.allgather(gradient.indices, name=f"{name}.indices")
        mine, num_rows = gradient.indices, tf.shape(gradient.indices)[0]
        if mine.shape[0] is None:
            is_fixed = tf.reduce_all(mine == tf.range(num_rows, dtype=mine.dtype))
        else:
            is_fixed = tf.constant(True)
        is_same = tf.cond(
            is_fixed & (tf.shape(indices)[0] == size * num_rows),
            lambda: tf.reduce_all(tf.reshape(indices, [size, -1]) == mine),
            lambda: tf.constant(False),
        )
        agreed = hvd.allreduce(tf.cast(is_same, tf.float32), op=hvd.Sum, name=f"{name}.same") == size

        def summed() -> tuple[tf.Tensor, tf.Tensor]:
            return tf.reduce_sum(tf.reshape(values, [size, num_rows, *gradient.values.shape[1:]]), 0), mine

        values, indices = tf.cond(agreed, summed, lambda: (values, indices))
        return tf.IndexedSlices(values, indices, gradient.dense_shape)

    def _dense_sums(self, grads: list[tf.Tensor]) -> list[tf.Tensor]:
        key = (grads[0].dtype, *(tuple(gradient.shape) for gradient in grads))
        if key not in self._syncs:
            name = f"{self._name}.{len(self._syncs)}"
            with tf.init_scope():  # its variables outlive the graph
                self._syncs[key] = AllreduceSync(grads, self._topology, self._options.named(name))
        sync, of_step = self._syncs[key], part.current()
        share = of_step.share(tf.float32) if of_step else 1 / self._topology.world_size
        sync.accept(grads, tf.zeros(()), tf.zeros((), tf.bool), share)
        sync.synchronize()
        return sync.gradients


def _wide(dtype: tf.DType) -> tf.DType:
    """The dtype of a sum: many values of 16 bits would overflow or lose bits."""
    return tf.float32 if dtype in (tf.float16, tf.bfloat16) else dtype


def find_optimizers(*owners: Any) -> list[keras.Optimizer]:
    """The optimizers among the attributes of objects, each once, in the attributes' order."""
    found: dict[int, keras.Optimizer] = {}
    nested = [layer for owner in owners if isinstance(owner, keras.Model) for layer in owner._flatten_layers()]
    for owner in dict.fromkeys([*owners, *(layer for layer in nested if isinstance(layer, keras.Model))]):
        values = [owner] if isinstance(owner, keras.Optimizer) else list(vars(owner).values())
        for value in values:
            inner = list(value.values()) if isinstance(value, dict) else value
            for each in inner if isinstance(inner, list | tuple) else [inner]:
                if isinstance(each, keras.Optimizer):
                    found[id(each)] = each
    return list(found.values())
