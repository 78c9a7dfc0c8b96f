"""tests/gradients/test_compression.py's exchange of gradients in PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.config.composition import option
from common.distributed.topology import Topology
from common.gradients.gradient_sync import SyncOptions
from common.gradients.step_metrics import StepMetrics
from common.parallel.rank_schedule import RankSchedule
from common.torch.gradients.allreduce import AllreduceSync
from common.torch.parallel.stage import Stage
from common.torch.training.checkpoint import State

import numpy as np
import torch
from torch import nn


class Exchange:
    """The gradients of weights that have nothing but shapes."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], topology: Topology, **options: Any) -> None:
        weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.model = Stage([weights], [range(1)], option("precision", "fp32"), RankSchedule("1f1b", 1, 1, topology))
        self.topology = topology
        self.gradients = AllreduceSync(self.model.parameters(), topology, SyncOptions(**options))
        self.checkpoint = State(self.model, torch.optim.SGD(self.model.parameters()), self.gradients)

    def step(self, arrays: Sequence[np.ndarray]) -> tuple[StepMetrics, list[np.ndarray]]:
        """Exchanges this rank's gradients."""
        self.gradients.zero()
        self.gradients.prepare_for_backward(local_batch_fraction=1 / self.topology.num_replicas)
        scale = self.gradients.loss_scale
        weights = list(self.model.parameters())
        terms = [(w * torch.from_numpy(array)).sum() * scale for w, array in zip(weights, arrays, strict=True)]
        torch.stack(terms).sum().backward()
        return self.gradients.synchronize(), [_gradient(weight) for weight in weights]

    def clipped(self, max_norm: float) -> np.ndarray:
        """The first of the exchanged gradients after clipping."""
        self.gradients.clip_norm(max_norm)
        return _gradient(next(self.model.parameters()))

    def state(self) -> dict[str, list[np.ndarray]]:
        """This rank's compressor state, a list over the weights."""
        return {
            name: [tensors[i].numpy().copy() for i in sorted(tensors)]
            for name, tensors in self.gradients.state().items()
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over what a checkpoint has of the gradients, as rank 0 reads it."""
        weights = {name: weight.detach().numpy() for name, weight in self.model.named_parameters()}
        self.checkpoint.load(weights, {}, arrays)
        self.checkpoint.broadcast()

    def coded(self, rows: np.ndarray) -> np.ndarray:
        """Rows (K, P), each encoded and decoded by the dense code of the first weight."""
        compressor: Any = self.gradients._exchange.compressors.lossy[0]
        codes = compressor.encode(torch.from_numpy(rows), compressor.group.random(0))
        return compressor.decode(codes, rows.shape[1]).numpy()


def _gradient(weight: nn.Parameter) -> np.ndarray:
    assert weight.grad is not None
    return weight.grad.numpy().copy()
