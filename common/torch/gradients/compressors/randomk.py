"""Values at random indices."""

from common.config.schema import SparseConfig
from common.gradients.compression import num_sent, random_parts
from common.torch.gradients.compression import CompressionGroup, Exchange, to_wire, wire_dtype
from common.torch.gradients.compression import Compressor as Base

import torch
from torch import Tensor


class Compressor(Base):
    """Values at random indices, the same on all ranks; common/gradients/compression.py, random_k()."""

    def __init__(self, cfg: SparseConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._ratio, self._dtype, self._is_unbiased = cfg.ratio, wire_dtype(cfg.values), not cfg.error_feedback

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Sums the chosen values."""
        parts = random_parts(len(values), num_sent(len(values), self._ratio))
        starts, widths = (torch.from_numpy(part).to(values.device) for part in parts)
        uniforms = torch.rand(len(starts), generator=self.group.random(step), device=values.device)
        indices = starts + torch.minimum((uniforms * widths).long(), widths - 1)
        factor = len(values) / len(indices) if self._is_unbiased else 1.0
        sent = to_wire(values[indices] * factor, self._dtype, self.group.communicator.size)
        error = values.index_add(0, indices, -sent.float())
        received = yield self.group.communicator.allreduce(sent)
        return torch.zeros_like(values).index_add_(0, indices, received.float()), error
