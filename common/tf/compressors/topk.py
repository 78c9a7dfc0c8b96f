"""The values of largest magnitude."""

from common.compression import num_chosen
from common.config import SparseConfig
from common.tf.compression import Sparse, Unit

import tensorflow as tf


class Compressor(Sparse):
    """A share of the values, by magnitude; common/compression.py, top_k()."""

    def __init__(self, cfg: SparseConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._ratio = cfg.ratio

    def choose(self, values: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """The largest ones."""
        return tf.math.top_k(tf.abs(values), num_chosen(values.shape[0], self._ratio), sorted=False).indices
