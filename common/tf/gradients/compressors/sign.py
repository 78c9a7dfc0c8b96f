"""One bit per value."""

from common.tf.gradients.compression import Random, ScaledCodec

import numpy as np
import tensorflow as tf


class Compressor(ScaledCodec):
    """Plus or minus the chunk's mean magnitude; common/gradients/compression.py, Sign."""

    bits = 1

    def quantize(self, chunks: tf.Tensor, sizes: np.ndarray, random: Random) -> tuple[tf.Tensor, tf.Tensor]:
        """The scale is the mean magnitude."""
        scales = tf.reduce_sum(tf.cast(tf.abs(chunks), tf.float64), axis=-1) / sizes
        return tf.cast(scales, tf.float32), chunks >= 0

    def dequantize(self, scales: tf.Tensor, integers: tf.Tensor) -> tf.Tensor:
        """Plus or minus the scale."""
        return (2 * integers - 1) * scales
