"""Deep gradient compression."""

from common.config.schema import DGCConfig
from common.gradients.compression import WARM_UP_STAGES, num_sent, sparsity_warm_up
from common.tf.gradients.compression import CompressionGroup, Exchanged, Sparse

import tensorflow as tf


class Compressor(Sparse):
    """Top-k of each rank's velocity; common/gradients/compression.py, deep_gradient_compression()."""

    def __init__(self, cfg: DGCConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._cfg = cfg
        self._velocity, self._residual = group.new_variable(), group.new_variable()
        self.state = {"velocity": self._velocity, "residual": self._residual}

    def choose(self, values: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """The indices of the largest magnitudes; more of them during warm-up."""
        warmup_steps = self._cfg.warmup_steps
        ratios = [sparsity_warm_up(stage, WARM_UP_STAGES, self._cfg.ratio) for stage in range(WARM_UP_STAGES + 1)]
        steps = step + 1 - self._cfg.start_step
        stage = tf.minimum(WARM_UP_STAGES * steps // warmup_steps, WARM_UP_STAGES) if warmup_steps else WARM_UP_STAGES
        count = tf.gather([num_sent(values.shape[0], ratio) for ratio in ratios], stage)
        return tf.math.top_k(tf.abs(values), count, sorted=False).indices

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Momentum correction, and momentum factor masking of the sent values."""
        velocity = (self._cfg.momentum or 0.0) * self._velocity + values
        before = self._residual + velocity
        result = super().exchange(before, step)
        return result._replace(state=[tf.where(result.error != before, 0.0, velocity), result.error])
