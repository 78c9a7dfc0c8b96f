"""Two factors of few columns for each matrix."""

from collections.abc import Generator

from common.compression import matrix_shape
from common.config import PowerSGDConfig
from common.torch.compression import Compressor as Base
from common.torch.compression import Exchange, Unit, wire_dtype

import torch
from torch import Tensor


class Compressor(Base):
    """One step of power iteration from the last step's factor; common/compression.py, power_sgd()."""

    def __init__(self, cfg: PowerSGDConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._dtype = wire_dtype(cfg.values)
        random = unit.random(0)
        columns = [matrix_shape(shape)[1] for shape in unit.shapes]
        self._factors = [torch.randn(n, cfg.rank, generator=random, device=unit.device) for n in columns]
        self.kept, self._next = {"factor": self._factors}, self._factors

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Two allreduces: of the products with the factors, then of the new factors."""
        matrices = [part.view(matrix_shape(part.shape)) for part in self.unit.split(values)]
        products = yield from self._sum([m @ q for m, q in zip(matrices, self._factors, strict=True)])
        bases = [torch.linalg.qr(product).Q for product in products]
        self._next = yield from self._sum([m.T @ p for m, p in zip(matrices, bases, strict=True)])
        summed = torch.cat([(p @ q.T).flatten() for p, q in zip(bases, self._next, strict=True)])
        return summed, values.sub_(summed, alpha=1 / self.unit.channel.size)

    def _sum(self, tensors: list[Tensor]) -> Generator[int, Tensor, list[Tensor]]:
        """The sums of all tensors over the ranks, by one message."""
        flat = torch.cat([tensor.flatten() for tensor in tensors]).to(self._dtype)
        received = (yield self.unit.channel.allreduce(flat)).float()
        parts = received.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def left(self) -> list[Tensor]:
        """The new factors."""
        return self._next
