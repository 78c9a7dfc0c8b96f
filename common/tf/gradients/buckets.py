"""Flat buckets that hold the gradients of a model."""

import math
from collections.abc import Sequence

from common.gradients.bucketing import Bucket

import tensorflow as tf


class BucketBuffers:
    """Packs gradients into one flat tensor per bucket.

    Args:
        shapes: the shapes of the gradients, in the model's order.
        buckets: which gradients each bucket holds.
        dtype: the dtype of the gradients.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], buckets: Sequence[Bucket], dtype: tf.DType) -> None:
        self._shapes, self._buckets, self._dtype = shapes, buckets, dtype

    def pack(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The buckets of gradients as vectors (n,); n may be 0."""
        return [self._flat([gradients[index] for index in bucket.members]) for bucket in self._buckets]

    def unpack(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The gradients of the buckets, in the model's order."""
        by_index: dict[int, tf.Tensor] = {}
        for bucket, flat in zip(self._buckets, values, strict=True):
            lengths = [math.prod(self._shapes[index]) for index in bucket.members]
            for index, part in zip(bucket.members, tf.split(flat, lengths) if lengths else (), strict=True):
                by_index[index] = tf.reshape(part, self._shapes[index])
        return [by_index[index] for index in range(len(self._shapes))]

    def _flat(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        return tf.concat([tf.zeros(0, self._dtype), *(tf.reshape(gradient, [-1]) for gradient in gradients)], 0)
