"""-1, 0 or 1 times a scale."""

from common.config.schema import TernGradConfig
from common.tf.gradients.compression import CompressionGroup, Random
from common.tf.gradients.compressors.qsgd import RandomRounding

import numpy as np
import tensorflow as tf


class Compressor(RandomRounding):
    """Stochastic rounding to two bits per value, after clipping; common/gradients/compression.py, TernGrad."""

    bits = 2

    def __init__(self, cfg: TernGradConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._clip = cfg.clip

    def quantize(self, chunks: tf.Tensor, sizes: np.ndarray, random: Random) -> tuple[tf.Tensor, tf.Tensor]:
        """The scale is the largest magnitude after clipping."""
        if self._clip:
            squares = tf.reduce_sum(tf.square(tf.cast(chunks, tf.float64)), axis=-1) / sizes
            bounds = tf.cast(self._clip * tf.sqrt(squares), tf.float32)[..., None]
            chunks = tf.clip_by_value(chunks, -bounds, bounds)
        return super().quantize(chunks, sizes, random)
