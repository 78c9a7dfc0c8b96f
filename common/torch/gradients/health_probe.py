"""How close compressed gradients are to the true ones."""

import math
from collections.abc import Sequence

from common.distributed.topology import Topology
from common.torch.distributed import runtime
from common.torch.gradients.norms import norm
from common.torch.gradients.stage_sums import StageSums

import horovod.torch as hvd
import torch
from torch import Tensor


class HealthProbe:
    """Compares the exchanged gradients with the true sums, which need an uncompressed exchange.

    Args:
        topology: the place of this rank.
        stages: sums over the stages.
    """

    def __init__(self, topology: Topology, stages: StageSums) -> None:
        self._topology, self._stages = topology, stages
        self._before: dict[int, Tensor] = {}

    def keep(self, number: int, values: Tensor) -> None:
        """Keeps a copy of a bucket's gradients before their exchange."""
        self._before[number] = values.clone()

    def measure(self, applied: Sequence[Tensor], errors: Sequence[Tensor]) -> tuple[float, float]:
        """The cosine to the true gradient, and the norm of the residuals of all ranks together.

        Args:
            applied: the exchanged gradients of each bucket.
            errors: this rank's compression error of each bucket.
        """
        sent = torch.cat([self._before[number] for number in range(len(applied))])
        self._before.clear()
        squares = norm(errors) ** 2
        process_set = runtime.process_set(self._topology.group)
        summed = hvd.allreduce(torch.cat([sent, squares[None]]), name="health", op=hvd.Sum, process_set=process_set)
        true, flat = summed[:-1], torch.cat(list(applied))
        products = torch.stack([(true * flat).sum(), norm([true]) ** 2, norm([flat]) ** 2, summed[-1]])
        product, *norms, residual_norm = self._stages.sum("health_of_stages", products).tolist()
        return product / max(math.sqrt(norms[0] * norms[1]), 1e-30), math.sqrt(residual_norm)
