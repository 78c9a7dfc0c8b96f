"""Deep gradient compression."""

import math

from common.compression import num_chosen, sparsity_warm_up
from common.config import DGCConfig
from common.torch.compression import Exchange, Sparse, Unit

from torch import Tensor


class Compressor(Sparse):
    """Top-k of each rank's velocity, summed up until sent; common/compression.py, deep_gradient_compression()."""

    def __init__(self, cfg: DGCConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._cfg = cfg
        self.velocity, self.residual = unit.new_zeros(), unit.new_zeros()
        self._next = self.velocity, self.residual

    def choose(self, values: Tensor, step: int) -> Tensor:
        """The largest ones; in warm-up more of them."""
        ratio = sparsity_warm_up(step, self._cfg.warmup_steps, self._cfg.ratio)
        return values.abs().topk(num_chosen(len(values), ratio), sorted=False).indices

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Local clipping, momentum correction, and momentum factor masking of what was sent."""
        if self._cfg.clip_norm:
            largest = self._cfg.clip_norm / math.sqrt(self.unit.channel.size)
            values.mul_(largest / values.norm().clamp(min=largest))
        velocity = self._cfg.momentum * self.velocity + values
        before = self.residual + velocity
        summed, residual = yield from super().exchange(before.clone(), step)
        velocity[residual != before] = 0
        self._next = velocity, residual
        return summed, residual

    def commit(self) -> None:
        """Keeps velocity and residual."""
        self.velocity.copy_(self._next[0])
        self.residual.copy_(self._next[1])

    def state(self) -> dict[str, list[Tensor]]:
        """Velocity and residual."""
        return {"velocity": self.unit.split(self.velocity), "residual": self.unit.split(self.residual)}
