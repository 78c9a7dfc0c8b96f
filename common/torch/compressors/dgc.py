"""Deep gradient compression."""

from common.compression import num_chosen, sparsity_warm_up
from common.config import DGCConfig
from common.torch.compression import Exchange, Sparse, Unit

from torch import Tensor


class Compressor(Sparse):
    """Top-k of each rank's velocity, summed up until sent; common/compression.py, deep_gradient_compression()."""

    def __init__(self, cfg: DGCConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._cfg = cfg
        self._velocity, self._residual = unit.new_zeros(), unit.new_zeros()
        self.kept = {"velocity": self._velocity, "residual": self._residual}
        self._next = [self._velocity, self._residual]

    def choose(self, values: Tensor, step: int) -> Tensor:
        """The largest ones; in warm-up more of them."""
        ratio = sparsity_warm_up(step, self._cfg.warmup_steps, self._cfg.ratio)
        return values.abs().topk(num_chosen(len(values), ratio), sorted=False).indices

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Momentum correction, and momentum factor masking of what was sent."""
        velocity = (self._cfg.momentum or 0.0) * self._velocity + values
        before = self._residual + velocity
        summed, residual = yield from super().exchange(before.clone(), step)
        velocity[residual != before] = 0
        self._next = [velocity, residual]
        return summed, residual

    def left(self) -> list[Tensor]:
        """Velocity and residual."""
        return self._next
