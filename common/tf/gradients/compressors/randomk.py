"""Values at random indices."""

from common.config.schema import SparseConfig
from common.gradients.compression import num_sent, random_parts
from common.tf.gradients.compression import CompressionGroup, Exchanged, scatter_add, to_wire, wire_dtype
from common.tf.gradients.compression import Compressor as Base

import tensorflow as tf


class Compressor(Base):
    """Values at random indices, the same on all ranks; common/gradients/compression.py, random_k()."""

    def __init__(self, cfg: SparseConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._ratio, self._dtype, self._is_unbiased = cfg.ratio, wire_dtype(cfg.values), not cfg.error_feedback

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Sums the chosen values."""
        starts, widths = random_parts(values.shape[0], num_sent(values.shape[0], self._ratio))
        drawn = tf.cast(self.group.random(step)(starts.shape) * widths, tf.int32)
        indices = starts + tf.minimum(drawn, tf.constant(widths - 1, tf.int32))
        factor = values.shape[0] / len(starts) if self._is_unbiased else 1.0
        sent = to_wire(tf.gather(values, indices) * factor, self._dtype, self.group.communicator.size)
        received = tf.cast(self.group.communicator.allreduce(sent), tf.float32)
        error = scatter_add(values, indices, -tf.cast(sent, tf.float32))
        return self.exchanged(scatter_add(tf.zeros_like(values), indices, received), error)
