"""Deep gradient compression."""

import math

from common.compression import WARM_UP_STAGES, num_chosen, sparsity_warm_up
from common.config import DGCConfig
from common.tf.compression import Exchanged, Sparse, Unit, assign_flat

import numpy as np
import tensorflow as tf


class Compressor(Sparse):
    """Top-k of each rank's velocity, summed up until sent; common/compression.py, deep_gradient_compression()."""

    def __init__(self, cfg: DGCConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._cfg = cfg
        self.velocity, self.residual = unit.new_variable(), unit.new_variable()
        self.variables = [self.velocity, self.residual]

    def choose(self, values: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """The largest ones; in warm-up more of them."""
        warmup_steps = self._cfg.warmup_steps
        ratios = [sparsity_warm_up(stage, WARM_UP_STAGES, self._cfg.ratio) for stage in range(WARM_UP_STAGES + 1)]
        stage = tf.minimum(WARM_UP_STAGES * step // warmup_steps, WARM_UP_STAGES) if warmup_steps else WARM_UP_STAGES
        count = tf.gather([num_chosen(values.shape[0], ratio) for ratio in ratios], stage)
        return tf.math.top_k(tf.abs(values), count, sorted=False).indices

    def exchange(self, values: tf.Tensor, step: tf.Tensor) -> Exchanged:
        """Local clipping, momentum correction, and momentum factor masking of what was sent."""
        if self._cfg.clip_norm:
            largest = self._cfg.clip_norm / math.sqrt(self.unit.channel.size)
            values *= largest / tf.maximum(tf.norm(values), largest)
        velocity = self._cfg.momentum * self.velocity + values
        before = self.residual + velocity
        result = super().exchange(before, step)
        return result._replace(state=[tf.where(result.error != before, 0.0, velocity), result.error])

    def state(self) -> dict[str, list[tf.Tensor]]:
        """Velocity and residual."""
        return {"velocity": self.unit.split(self.velocity), "residual": self.unit.split(self.residual)}

    def load(self, state: dict[str, list[np.ndarray]]) -> None:
        """Takes them over."""
        assign_flat(self.velocity, state["velocity"])
        assign_flat(self.residual, state["residual"])
