"""The values of largest magnitude."""

from common.config.schema import SparseConfig
from common.gradients.compression import num_sent
from common.tf.gradients.compression import CompressionGroup, Sparse

import tensorflow as tf


class Compressor(Sparse):
    """The fraction cfg.ratio of the values, by magnitude; common/gradients/compression.py, top_k()."""

    def __init__(self, cfg: SparseConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._ratio = cfg.ratio

    def choose(self, values: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """The indices of the largest magnitudes."""
        return tf.math.top_k(tf.abs(values), num_sent(values.shape[0], self._ratio), sorted=False).indices
