"""Values at random places."""

from common.compression import num_chosen, random_parts
from common.config import SparseConfig
from common.torch.compression import Compressor as Base
from common.torch.compression import Exchange, Unit, to_wire, wire_dtype

import torch
from torch import Tensor


class Compressor(Base):
    """A share of the values at places that all ranks draw alike; common/compression.py, random_k()."""

    def __init__(self, cfg: SparseConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._ratio, self._dtype, self._is_unbiased = cfg.ratio, wire_dtype(cfg.values), not cfg.error_feedback

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Sums the chosen values."""
        parts = random_parts(len(values), num_chosen(len(values), self._ratio))
        starts, widths = (torch.from_numpy(part).to(values.device) for part in parts)
        uniforms = torch.rand(len(starts), generator=self.unit.random(step), device=values.device)
        places = starts + torch.minimum((uniforms * widths).long(), widths - 1)
        factor = len(values) / len(places) if self._is_unbiased else 1.0
        sent = to_wire(values[places] * factor, self._dtype, self.unit.channel.size)
        error = values.index_add(0, places, -sent.float())
        received = yield self.unit.channel.allreduce(sent)
        return torch.zeros_like(values).index_add_(0, places, received.float()), error
