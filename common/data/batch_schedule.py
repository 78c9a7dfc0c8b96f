"""The global batch size of each step: constant, growing at given steps, or following the gradient noise scale.

The learning rate grows with the batch size: in proportion for SGD (Goyal et al., "Accurate, Large Minibatch SGD",
2017, https://arxiv.org/abs/1706.02677, section 2.1), by the square root for AdamW (Malladi et al., "On the SDEs and
Scaling Rules for Adaptive Gradient Algorithms", 2022, https://arxiv.org/abs/2205.10287, definition 5.2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.config.schema import BatchSchedule, OptimizerConfig, SGDConfig, TrainConfig

# Number of steps until a change takes effect: the steps in between may have been read ahead (common/data/prefetch.py).
DELAY = 20
SMOOTHING = 0.95  # factor of the two exponential averages whose quotient is the noise scale
MIN_STEPS = 50  # least number of steps between two changes, so that the averages describe the current batch size


@dataclass
class BatchSizes:
    """The batch size of each step, as far as it is known.

    Attributes:
        cfg: the configuration of the growth.
        num_examples: size of the training set, which is the largest batch size.
        changes: (first step, size), ascending; the first is (1, train.global_batch_size).
        noise: smoothed estimate of the trace of the gradients' covariance.
        signal: smoothed estimate of the squared norm of the true gradient.
    """

    cfg: TrainConfig
    num_examples: int
    changes: list[tuple[int, int]] = field(default_factory=list)
    noise: float = 0.0
    signal: float = 0.0

    def __post_init__(self) -> None:
        if self.changes:
            return
        self.changes = [(1, self.cfg.global_batch_size)]
        if self.cfg.batch_schedule is BatchSchedule.steps:
            for step in self.cfg.batch_growth_steps:
                self._double_after(step)

    @classmethod
    def from_json(cls, cfg: TrainConfig, num_examples: int, content: dict[str, Any]) -> "BatchSizes":
        """Restores the batch sizes of a checkpoint; later ones follow the configuration.

        If train.global_batch_size has changed, growth restarts from it.
        """
        sizes = cls(cfg, num_examples)
        if cfg.batch_schedule is BatchSchedule.noise_scale:
            changes = [(step, size) for step, size in content["changes"]]
            sizes.changes = changes if changes[0] == sizes.changes[0] else sizes.changes
            sizes.noise, sizes.signal = content["noise"], content["signal"]
        return sizes

    def to_json(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON values."""
        return {"changes": self.changes, "noise": self.noise, "signal": self.signal}

    def at(self, step: int) -> int:
        """The batch size of a step (from 1)."""
        return next(size for first, size in reversed(self.changes) if first <= step)

    @property
    def noise_scale(self) -> float:
        """The batch size at which gradient noise equals signal; 0 until it is known."""
        return self.noise / self.signal if self.signal > 0 else 0.0

    def observe(self, step: int, local: float, whole: float, sizes: Sequence[int]) -> None:
        """Updates the noise scale from one step's gradients; doubles the batch size if the noise scale exceeds it.

        The expected squared norm of the mean of n gradients is signal + noise / n, for one rank's examples and for all.
        Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
        https://arxiv.org/abs/1812.06162 (appendix A.1), here for ranks with unequal numbers of examples.

        Args:
            step: number of the step, from 1.
            local: squared norm of the mean gradient of a rank's examples, summed over the ranks.
            whole: squared norm of the mean gradient of all examples, before clipping.
            sizes: number of examples of each rank; ranks without examples add nothing to local.
        """
        sizes = [size for size in sizes if size]
        if len(sizes) < 2:  # a single rank has all examples: local and whole are the same
            return
        mean, inverse = local / len(sizes), sum(1 / size for size in sizes) / len(sizes)
        noise = (mean - whole) / (inverse - 1 / sum(sizes))
        self.noise = SMOOTHING * self.noise + (1 - SMOOTHING) * noise
        self.signal = SMOOTHING * self.signal + (1 - SMOOTHING) * (whole - noise / sum(sizes))
        last_change, size = self.changes[-1]
        if step >= last_change + MIN_STEPS and self.noise_scale > size:
            self._double_after(step + DELAY)

    def _double_after(self, step: int) -> None:
        last_size = self.changes[-1][1]
        size = min(2 * last_size, self.cfg.max_batch_size or self.num_examples, self.num_examples)
        if size > last_size:
            self.changes.append((step + 1, size))


def learning_rate_factor(size: int, initial_size: int, optimizer: OptimizerConfig) -> float:
    """The factor on the learning rate when the batch size has grown from initial_size to size."""
    growth = size / initial_size
    return growth if isinstance(optimizer, SGDConfig) else math.sqrt(growth)
