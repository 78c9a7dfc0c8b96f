"""Deep gradient compression."""

from common.config.schema import DGCConfig
from common.gradients.compression import num_sent, sparsity_warm_up
from common.torch.gradients.compression import CompressionGroup, Exchange, Sparse

import torch
from torch import Tensor


class Compressor(Sparse):
    """Top-k of each rank's velocity; common/gradients/compression.py, deep_gradient_compression()."""

    def __init__(self, cfg: DGCConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._cfg = cfg
        self.state |= {"velocity": group.new_zeros(), "residual": group.new_zeros()}

    def choose(self, values: Tensor, step: int) -> Tensor:
        """The indices of the largest magnitudes; more of them during warm-up."""
        ratio = sparsity_warm_up(step + 1 - self._cfg.start_step, self._cfg.warmup_steps, self._cfg.ratio)
        self._indices = values.abs().topk(num_sent(len(values), ratio), sorted=False).indices
        return self._indices

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Momentum correction, and momentum factor masking of the sent values."""
        velocity = torch.mul(self.state["velocity"], self._cfg.momentum or 0.0, out=self.next_state.get("velocity"))
        velocity += values
        corrected = torch.add(self.state["residual"], velocity, out=self.next_state.get("residual"))
        summed, residual = yield from super().exchange(corrected, step)
        before = self.state["residual"][self._indices] + velocity[self._indices]
        # Not at all indices: values that are 0 in half precision were not sent.
        velocity[self._indices[residual[self._indices] != before]] = 0
        self.next_state |= {"velocity": velocity, "residual": residual}
        return summed, residual
