"""Norms of long vectors."""

from collections.abc import Sequence

import tensorflow as tf


def squared_norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum of the squares of all values, ()."""
    return tf.add_n([tf.reduce_sum(tf.square(tensor)) for tensor in tensors])


def norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The L2 norm () of all values."""
    return tf.linalg.global_norm(tensors)


def clip(gradients: Sequence[tf.Tensor], max_norm: float, whole: tf.Tensor) -> list[tf.Tensor]:
    """The gradients times max_norm / whole if `whole`, the norm () of all gradients, exceeds max_norm.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
    https://arxiv.org/abs/1211.5063 (algorithm 1)
    """
    largest = tf.constant(max_norm, whole.dtype)
    scale = largest / tf.maximum(whole, largest)  # exactly 1 if no clipping is needed
    return [gradient * scale for gradient in gradients]
