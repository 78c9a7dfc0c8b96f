"""The measurements for compression=auto in PyTorch."""

from dataclasses import dataclass

from common.config.composition import option
from common.config.schema import CompressionConfig, RunConfig
from common.data.datasets.examples import Examples
from common.distributed.timing import median_seconds
from common.distributed.topology import Topology
from common.gradients import autotune
from common.gradients.autotune import Estimate
from common.gradients.gradient_sync import SyncOptions
from common.gradients.step_metrics import StepMetrics
from common.torch.distributed import runtime
from common.torch.gradients.allreduce import AllreduceSync

import horovod.torch as hvd
import numpy as np
import torch
from torch import nn


def choose_compression(cfg: RunConfig, model: nn.Module, examples: Examples, topology: Topology) -> CompressionConfig:
    """Chooses the compression for a model (common/gradients/autotune.py); times a step on some of the examples."""
    return autotune.choose(cfg, _Measure(cfg, model, examples, topology), runtime, topology)


@dataclass(frozen=True)
class _Measure:
    cfg: RunConfig
    model: nn.Module
    examples: Examples
    topology: Topology

    def compute_seconds(self) -> float:
        share = max(1, self.cfg.train.global_batch_size // self.topology.num_replicas)
        inputs = self.examples.get_batch(np.arange(min(share, len(self.examples))))[0]
        tensor = runtime.to_tensor(inputs, self.cfg.precision, runtime.device(self.topology))
        return median_seconds(lambda: self.model(tensor).sum().backward())

    def estimate(self, method: str) -> Estimate:
        weights = [nn.Parameter(torch.zeros_like(parameter)) for parameter in self.model.parameters()]
        noise = [torch.randn_like(weight) for weight in weights]
        gradients = AllreduceSync(weights, self.topology, SyncOptions(option("compression", method)))

        def exchange() -> StepMetrics:
            gradients.zero()
            gradients.prepare_for_backward()
            products = [(weight * values).sum() for weight, values in zip(weights, noise, strict=True)]
            torch.stack(products).sum().backward()
            return gradients.synchronize()

        return Estimate(method, median_seconds(exchange), sum(map(float, exchange().wire_bytes)))

    def allreduce_seconds(self, num_values: int) -> float:
        values = torch.zeros(num_values, device=runtime.device(self.topology))
        return median_seconds(lambda: hvd.allreduce(values, name=f"probe.{num_values}", op=hvd.Sum))
