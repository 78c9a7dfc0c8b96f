"""A few bits a value, rounded at random."""

from common.config import QSGDConfig
from common.tf.compression import Random, ScaledCodec, Unit, where_positive

import numpy as np
import tensorflow as tf


class RandomRounding(ScaledCodec):
    """Rounds up or down at random so that the mean is right; common/compression.py, QSGD."""

    def quantize(self, chunks: tf.Tensor, sizes: np.ndarray, random: Random) -> tuple[tf.Tensor, tf.Tensor]:
        """The scale is the largest magnitude."""
        scales, steps = tf.reduce_max(tf.abs(chunks), axis=-1), 2 ** (self.bits - 1) - 1
        exact = chunks / where_positive(scales)[..., None] * steps
        return scales, tf.clip_by_value(tf.floor(exact + random(chunks.shape)), -steps, steps) + steps

    def dequantize(self, scales: tf.Tensor, integers: tf.Tensor) -> tf.Tensor:
        """Steps times the scale over the number of steps."""
        steps = 2 ** (self.bits - 1) - 1
        return (integers - steps) * (scales / steps)


class Compressor(RandomRounding):
    """QSGD with compression.bits."""

    def __init__(self, cfg: QSGDConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self.bits = cfg.bits
