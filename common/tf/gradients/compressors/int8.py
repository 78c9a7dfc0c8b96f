"""Eight bits per value."""

from common.tf.gradients.compression import Random, ScaledCodec, where_positive

import numpy as np
import tensorflow as tf


class Compressor(ScaledCodec):
    """Rounds to the nearest of 255 steps; common/gradients/compression.py, Int8."""

    bits = 8

    def quantize(self, chunks: tf.Tensor, sizes: np.ndarray, random: Random) -> tuple[tf.Tensor, tf.Tensor]:
        """The scale is one step."""
        scales = tf.reduce_max(tf.abs(chunks), axis=-1) * (1 / 127)
        return scales, tf.round(chunks / where_positive(scales)[..., None]) + 127

    def dequantize(self, scales: tf.Tensor, integers: tf.Tensor) -> tf.Tensor:
        """The number of steps times the scale."""
        return (integers - 127) * scales
