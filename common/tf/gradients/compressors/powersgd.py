"""PowerSGD: two factors with few columns for each matrix."""

from common.config.schema import PowerSGDConfig
from common.gradients.compression import matrix_shape
from common.tf.gradients.compression import CompressionGroup, Exchanged, where_positive, wire_dtype
from common.tf.gradients.compression import Compressor as Base

import numpy as np
import tensorflow as tf


class Compressor(Base):
    """One power iteration from the last step's factor; common/gradients/compression.py, power_sgd()."""

    def __init__(self, cfg: PowerSGDConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._dtype = wire_dtype(cfg.values)
        random = np.random.default_rng((group.seed, group.number))
        columns = [matrix_shape(shape)[1] for shape in group.shapes]
        self._factors = [
            tf.Variable(random.standard_normal((n, cfg.rank)).astype(np.float32), trainable=False) for n in columns
        ]
        self.state = {"factor": self._factors}

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Two allreduces: one of the products with the factors, one of the new factors."""
        matrices = [tf.reshape(part, matrix_shape(part.shape)) for part in self.group.split(values)]
        factors, scales = [factor.value() for factor in self._factors], [tf.ones(())] * len(matrices)
        if self._dtype == tf.float16:
            squares = tf.stack([tf.reduce_sum(tf.square(tf.cast(matrix, tf.float64))) for matrix in matrices])
            norms = tf.sqrt(self.group.communicator.allreduce(squares))
            scales = tf.unstack(where_positive(tf.cast(norms, tf.float32)))
            factors = [factor / where_positive(tf.norm(factor, axis=0)) for factor in factors]
        products = self._sum([m @ q for m, q in zip(matrices, factors, strict=True)], scales)
        bases = [tf.linalg.qr(product).q for product in products]
        factors = self._sum([tf.transpose(m) @ p for m, p in zip(matrices, bases, strict=True)], scales)
        factors = [factor * scale for factor, scale in zip(factors, scales, strict=True)]
        summed = tf.concat([tf.reshape(p @ tf.transpose(q), [-1]) for p, q in zip(bases, factors, strict=True)], 0)
        return self.exchanged(summed, values - summed / self.group.communicator.size, factors)

    def _sum(self, tensors: list[tf.Tensor], scales: list[tf.Tensor]) -> list[tf.Tensor]:
        """The sums over the ranks of all tensors divided by their scales, in one message."""
        divided = [tf.reshape(tensor / scale, [-1]) for tensor, scale in zip(tensors, scales, strict=True)]
        flat = tf.cast(tf.concat(divided, 0), self._dtype)
        received = tf.cast(self.group.communicator.allreduce(flat), tf.float32)
        parts = tf.split(received, [tensor.shape.num_elements() for tensor in tensors])
        return [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
