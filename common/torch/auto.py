"""compression=auto, measured in PyTorch."""

from dataclasses import dataclass

from common import method_choice
from common.composition import option
from common.config import CompressionConfig, RunConfig
from common.datasets.examples import Examples
from common.method_choice import Estimate, median_seconds
from common.step_sums import StepSums
from common.topology import Topology
from common.torch import runtime
from common.torch.gradients import Gradients

import horovod.torch as hvd
import numpy as np
import torch
from torch import nn


def choose_compression(cfg: RunConfig, model: nn.Module, examples: Examples, topology: Topology) -> CompressionConfig:
    """common/method_choice.py, choose(), for a model's gradients; a step is timed on some of the examples."""
    return method_choice.choose(cfg, _Measure(cfg, model, examples, topology), runtime, topology)


@dataclass(frozen=True)
class _Measure:
    cfg: RunConfig
    model: nn.Module
    examples: Examples
    topology: Topology

    def compute_seconds(self) -> float:
        share = max(1, self.cfg.train.global_batch_size // self.topology.num_replicas)
        inputs = self.examples.take(np.arange(min(share, len(self.examples))))[0]
        tensor = runtime.to_tensor(inputs, self.cfg.precision, runtime.device(self.topology))
        return median_seconds(lambda: self.model(tensor).sum().backward())

    def estimate(self, method: str) -> Estimate:
        weights = [nn.Parameter(torch.zeros_like(parameter)) for parameter in self.model.parameters()]
        noise = [torch.randn_like(weight) for weight in weights]
        gradients = Gradients(weights, self.topology, compression=option("compression", method))

        def exchange() -> StepSums:
            gradients.zero()
            gradients.exchange_in_next_backward()
            products = [(weight * values).sum() for weight, values in zip(weights, noise, strict=True)]
            torch.stack(products).sum().backward()
            return gradients.wait()

        return Estimate(method, median_seconds(exchange), sum(map(float, exchange().wire_bytes)))

    def allreduce_seconds(self, num_values: int) -> float:
        values = torch.zeros(num_values, device=runtime.device(self.topology))
        return median_seconds(lambda: hvd.allreduce(values, name=f"probe.{num_values}", op=hvd.Sum))
