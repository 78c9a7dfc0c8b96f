"""A few bits per value, by stochastic rounding."""

from common.config.schema import QSGDConfig
from common.tf.gradients.compression import CompressionGroup, Random, ScaledCodec, where_positive

import numpy as np
import tensorflow as tf


class RandomRounding(ScaledCodec):
    """Unbiased stochastic rounding; common/gradients/compression.py, QSGD."""

    def quantize(self, chunks: tf.Tensor, sizes: np.ndarray, random: Random) -> tuple[tf.Tensor, tf.Tensor]:
        """The scale is the largest magnitude."""
        scales, steps = tf.reduce_max(tf.abs(chunks), axis=-1), 2 ** (self.bits - 1) - 1
        exact = chunks / where_positive(scales)[..., None] * steps
        return scales, tf.clip_by_value(tf.floor(exact + random(chunks.shape)), -steps, steps) + steps

    def dequantize(self, scales: tf.Tensor, integers: tf.Tensor) -> tf.Tensor:
        """The number of steps times scale / steps."""
        steps = 2 ** (self.bits - 1) - 1
        return (integers - steps) * (scales / steps)


class Compressor(RandomRounding):
    """QSGD with compression.bits."""

    def __init__(self, cfg: QSGDConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self.bits = cfg.bits
