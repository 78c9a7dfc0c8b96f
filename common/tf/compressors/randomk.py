"""Values at random places."""

from common.compression import num_chosen, random_parts
from common.config import SparseConfig
from common.tf.compression import Compressor as Base
from common.tf.compression import Exchanged, Unit, scatter_add, to_wire, wire_dtype

import tensorflow as tf


class Compressor(Base):
    """A share of the values at places that all ranks draw alike; common/compression.py, random_k()."""

    def __init__(self, cfg: SparseConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._ratio, self._dtype, self._is_unbiased = cfg.ratio, wire_dtype(cfg.values), not cfg.error_feedback

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Sums the chosen values."""
        starts, widths = random_parts(values.shape[0], num_chosen(values.shape[0], self._ratio))
        drawn = tf.cast(self.unit.random(step)(starts.shape) * widths, tf.int32)
        places = starts + tf.minimum(drawn, tf.constant(widths - 1, tf.int32))
        factor = values.shape[0] / len(starts) if self._is_unbiased else 1.0
        sent = to_wire(tf.gather(values, places) * factor, self._dtype, self.unit.channel.size)
        received = tf.cast(self.unit.channel.allreduce(sent), tf.float32)
        error = scatter_add(values, places, -tf.cast(sent, tf.float32))
        return self.exchanged(scatter_add(tf.zeros_like(values), places, received), error)
