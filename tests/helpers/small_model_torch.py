"""tests/helpers/small_model.py in PyTorch."""

from collections.abc import Sequence

from common.config.composition import option
from common.config.schema import OptimizerConfig
from common.distributed.topology import Topology
from common.gradients.gradient_sync import SyncOptions
from common.gradients.step_metrics import StepMetrics
from common.parallel.rank_schedule import RankSchedule
from common.torch.distributed import runtime
from common.torch.engine import Engine
from common.torch.gradients import optimizers
from common.torch.gradients.allreduce import AllreduceSync
from common.torch.parallel.stage import Stage

import numpy as np
import torch
from torch import Tensor, nn


class SmallModel:
    """See tests/helpers/small_model.py."""

    def __init__(self, weights: Sequence[np.ndarray], optimizer: OptimizerConfig, topology: Topology) -> None:
        self.model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)).double()
        with torch.no_grad():
            for parameter, weight in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(weight.T))
        self.optimizer = optimizers.build(optimizer, self.model)
        self.topology = topology

    def gradients(self, inputs: np.ndarray, global_size: int, num_micro_batches: int, bucket_bytes: int) -> StepMetrics:
        def half_squares(outputs: Tensor, _: Tensor) -> Tensor:
            return 0.5 * (outputs**2).sum()

        precision, schedule = option("precision", "fp64"), RankSchedule("1f1b", 1, num_micro_batches, self.topology)
        stage = Stage(list(self.model), [range(2)], precision, schedule)
        options = SyncOptions(measure_noise=True, bucket_bytes=bucket_bytes)
        self.engine = Engine(
            stage, AllreduceSync(stage.parameters(), self.topology, options), self.optimizer, precision
        )
        data = torch.from_numpy(inputs)
        self.engine.gradients.zero()
        self.engine.forward_backward(half_squares, data, data, global_size)
        return self.engine.gradients.synchronize()

    def exchanged(self, max_norm: float) -> list[np.ndarray]:
        self.engine.gradients.clip_norm(max_norm)
        return [np.array(flat.grad.tolist()).T for flat in self.model.parameters() if flat.grad is not None]

    def step(self, learning_rate: float, metrics: StepMetrics) -> None:
        self.engine.set_learning_rate(learning_rate)
        self.engine.step(metrics)

    def broadcast(self) -> None:
        runtime.broadcast_state(self.model, self.optimizer)

    @property
    def weights(self) -> list[np.ndarray]:
        return [parameter.detach().numpy().T for parameter in self.model.parameters()]
