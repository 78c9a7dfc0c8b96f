"""This rank's part of a global batch, as tensors of the step's graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from common.distributed.topology import Topology

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a global batch; all numbers are () int32.

    Attributes:
        start: number of this rank's first row in the global batch.
        num_rows: number of this rank's rows; may be 0.
        num_global: number of rows of the global batch.
        is_taken: whether this rank has read its rows alone.
        recorded: gradients that optimizers were called with, if they are to be recorded instead of used.
    """

    start: tf.Tensor
    num_rows: tf.Tensor
    num_global: tf.Tensor
    is_taken: bool = False
    recorded: list[tf.Tensor] | None = None

    @property
    def is_empty(self) -> tf.Tensor:
        """() bool, whether this rank has no row. It then takes part with another rank's row, which does not count."""
        return self.num_rows == 0

    @property
    def first(self) -> tf.Tensor:
        """() int32, number of the first row that this rank computes."""
        return tf.minimum(self.start, self.num_global - 1)

    @property
    def num_computed(self) -> tf.Tensor:
        """() int32, number of rows that this rank computes, at least 1."""
        return tf.maximum(self.num_rows, 1)

    def share(self, dtype: tf.DType) -> tf.Tensor:
        """() this rank's share of the rows of the global batch."""
        return tf.cast(self.num_rows, dtype) / tf.cast(self.num_global, dtype)


_current: list[Part] = []


def current() -> Part | None:
    """The part of the step that is being traced or run."""
    return _current[-1] if _current else None


@contextmanager
def working_on(part: Part) -> Iterator[None]:
    """Makes a part the current one."""
    _current.append(part)
    try:
        yield
    finally:
        _current.pop()


def after(operations: list[Any], part: Part) -> Part:
    """The same part; what uses it runs after the operations."""
    with tf.control_dependencies(operations):
        start, num_rows, num_global = map(tf.identity, (part.start, part.num_rows, part.num_global))
    return Part(start, num_rows, num_global, part.is_taken)


def of_batch(data: Any, topology: Topology) -> Part:
    """This rank's part of a global batch that all ranks have read; parts differ by at most one row."""
    num_global = num_rows(data)
    size, larger = num_global // topology.world_size, num_global % topology.world_size
    start = topology.rank * size + tf.minimum(topology.rank, larger)
    return Part(start, size + tf.cast(topology.rank < larger, tf.int32), num_global)


def of_own_batch(data: Any, topology: Topology) -> Part:
    """The part of a rank that has read only its own rows."""
    mine = num_rows(data)
    everyones = tf.ensure_shape(hvd.allgather(mine[None], name="script.rows"), [topology.world_size])
    return Part(tf.reduce_sum(everyones[: topology.rank]), mine, tf.reduce_sum(everyones), is_taken=True)


def take(data: Any, part: Part) -> Any:
    """The rows of a part; one row if it is empty."""
    return data if part.is_taken else cut(data, part.first, part.first + part.num_computed)


def cut(data: Any, begin: tf.Tensor, end: tf.Tensor) -> Any:
    """The rows from begin to end, each () int32."""

    def rows(value: Any) -> Any:
        if not hasattr(value, "shape") or value.shape.rank == 0:
            return value
        if isinstance(value, tf.SparseTensor):
            others = tf.cast(value.dense_shape[1:], tf.int64)
            start = tf.concat([[tf.cast(begin, tf.int64)], tf.zeros_like(others)], 0)
            return tf.sparse.slice(value, start, tf.concat([[tf.cast(end - begin, tf.int64)], others], 0))
        return value[begin:end]

    with tf.device("CPU"):  # only these rows go on to a GPU
        return keras.tree.map_structure(rows, data)


def num_rows(data: Any) -> tf.Tensor:
    """() int32, the number of rows of a batch's first tensor."""
    first = next(value for value in keras.tree.flatten(data) if hasattr(value, "shape") and value.shape.rank != 0)
    number = tf.cast(first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first)[0], tf.int32)
    # Keeps the number from becoming static: by that, a tensor of the batch is told from one of fixed size (noise.py).
    return tf.compat.v1.placeholder_with_default(number, ())
