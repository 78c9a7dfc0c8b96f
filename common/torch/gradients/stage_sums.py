"""Sums over the stages of a pipeline."""

from collections.abc import Iterable, Sequence

from common.distributed.topology import Topology
from common.torch.distributed import runtime
from common.torch.gradients.norms import norm

import horovod.torch as hvd
import torch
from torch import Tensor, nn


class StageSums:
    """Sums of values of all stages, and of the gradients of weights that stages share.

    Args:
        topology: the place of this rank.
        tied: the parameters that stages share, each with all ranks that have it.
    """

    def __init__(self, topology: Topology, tied: Iterable[tuple[nn.Parameter, Sequence[int]]] = ()) -> None:
        self._topology, self._tied = topology, list(tied)

    def sum(self, name: str, values: Tensor) -> Tensor:
        """Sums (n,) over the stages of values that are the same on all ranks of a stage."""
        if self._topology.num_stages == 1:
            return values.clone()
        return hvd.allreduce(values * self._topology.leads_group, name=name, op=hvd.Sum)

    def sum_tied(self) -> None:
        """Sums the gradients of weights that stages share; all ranks of a stage have the stage's sum before."""
        for tied, ranks in self._tied:
            if not tied.requires_grad:
                continue
            if tied.grad is None:
                tied.grad = torch.zeros_like(tied)
            if not self._topology.leads_group:
                tied.grad.zero_()
            hvd.allreduce_(tied.grad, name="tied", op=hvd.Sum, process_set=runtime.process_set(ranks))

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm () of the gradients of all stages; a weight that several stages share counts once."""
        whole = norm(gradients)
        if self._topology.num_stages == 1:
            return whole
        again = [tied for tied, ranks in self._tied if ranks[0] not in self._topology.group]
        squares = whole**2 - sum(norm([tied.grad]) ** 2 for tied in again if tied.grad is not None)
        return self.sum("squares", squares[None])[0].sqrt()
