"""PowerSGD: two factors with few columns for each matrix."""

from collections.abc import Generator

from common.config.schema import PowerSGDConfig
from common.gradients.compression import matrix_shape
from common.torch.gradients.compression import CompressionGroup, Exchange, where_positive, wire_dtype
from common.torch.gradients.compression import Compressor as Base
from common.torch.gradients.norms import norm

import torch
from torch import Tensor


class Compressor(Base):
    """One power iteration from the last step's factor; common/gradients/compression.py, power_sgd()."""

    def __init__(self, cfg: PowerSGDConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._dtype = wire_dtype(cfg.values)
        self._summed = group.new_zeros()
        random = group.random(0)
        columns = [matrix_shape(shape)[1] for shape in group.shapes]
        factors = [torch.randn(n, cfg.rank, generator=random, device=group.device) for n in columns]
        # Stored by columns, as those of later steps: the order in memory may decide how products are rounded.
        self.state["factor"] = [factor.T.contiguous().T for factor in factors]

    def exchange(self, values: Tensor, step: int) -> Exchange:
        """Two allreduces: one of the products with the factors, one of the new factors."""
        matrices = [part.view(matrix_shape(part.shape)) for part in self.group.split(values)]
        factors, scales = self.state["factor"], [torch.ones((), device=values.device)] * len(matrices)
        if self._dtype is torch.float16:
            squares = torch.stack([norm([matrix]).double().square() for matrix in matrices])
            scales = list(where_positive((yield self.group.communicator.allreduce(squares)).sqrt()).float())
            factors = [factor / where_positive(factor.norm(dim=0)) for factor in factors]
        products = yield from self._sum([m @ q for m, q in zip(matrices, factors, strict=True)], scales)
        bases = [torch.linalg.qr(product).Q for product in products]
        # Factors are stored by columns: a product with rows of few values takes five times as long.
        factors = yield from self._sum([p.T @ m for m, p in zip(matrices, bases, strict=True)], scales)
        factors = [factor * scale for factor, scale in zip(factors, scales, strict=True)]
        self.next_state["factor"] = [factor.T for factor in factors]
        for part, p, q in zip(self.group.split(self._summed), bases, factors, strict=True):
            torch.mm(p, q, out=part.view(len(p), -1))
        return self._summed, values.sub_(self._summed, alpha=1 / self.group.communicator.size)

    def _sum(self, tensors: list[Tensor], scales: list[Tensor]) -> Generator[int, Tensor, list[Tensor]]:
        """The sums over the ranks of all tensors divided by their scales, in one message."""
        divided = [(tensor / scale).flatten() for tensor, scale in zip(tensors, scales, strict=True)]
        flat = torch.cat(divided).to(self._dtype)
        received = (yield self.group.communicator.allreduce(flat)).float()
        parts = received.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
