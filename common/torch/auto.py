"""compression=auto, measured in PyTorch."""

from common import method_choice
from common.composition import option
from common.config import AutoCompressionConfig, CompressionConfig, RunConfig
from common.datasets.examples import Examples
from common.method_choice import PROBE_VALUES, Estimate, median_seconds
from common.topology import Topology
from common.torch import runtime
from common.torch.gradients import Gradients

import horovod.torch as hvd
import numpy as np
import torch
from torch import nn


def choose_compression(cfg: RunConfig, model: nn.Module, examples: Examples, topology: Topology) -> CompressionConfig:
    """The configured compression, or in its place what auto finds best; rank 0 prints why.

    Args:
        cfg: the configuration, with run.dir set.
        model: whose gradients are exchanged.
        examples: of which a step's forward and backward are timed.
        topology: whose replicas take part.
    """
    auto = cfg.compression
    if not isinstance(auto, AutoCompressionConfig):
        return auto
    name = runtime.from_rank_zero(method_choice.earlier(cfg))
    if name is None:
        compute = _mean_over_ranks(_compute_seconds(cfg, model, examples, topology))
        estimates = [_estimate(method, model, topology) for method in auto.candidates]
        latency, probe = (_mean_over_ranks(_allreduce_seconds(size)) for size in (1, PROBE_VALUES))
        if topology.rank == 0:
            print(method_choice.report(estimates, compute, latency, probe, auto.min_gain), flush=True)
        name = method_choice.best(estimates, compute, auto.min_gain).method
    chosen: CompressionConfig = option("compression", name)
    return chosen


def _compute_seconds(cfg: RunConfig, model: nn.Module, examples: Examples, topology: Topology) -> float:
    batch = examples.take(np.arange(max(1, cfg.train.global_batch_size // topology.num_replicas)))
    inputs = runtime.to_tensor(batch[0], cfg.precision, runtime.device(topology))
    return median_seconds(lambda: model(inputs).sum().backward())


def _estimate(method: str, model: nn.Module, topology: Topology) -> Estimate:
    weights = [nn.Parameter(torch.zeros_like(parameter)) for parameter in model.parameters()]
    noise = [torch.randn_like(weight) for weight in weights]
    gradients = Gradients(weights, topology, compression=option("compression", method))

    def exchange() -> float:
        gradients.zero()
        gradients.exchange_in_next_backward()
        torch.stack([(weight * values).sum() for weight, values in zip(weights, noise, strict=True)]).sum().backward()
        return sum(map(float, gradients.wait().wire_bytes))

    return Estimate(method, _mean_over_ranks(median_seconds(exchange)), exchange())


def _allreduce_seconds(num_values: int) -> float:
    values = torch.zeros(num_values)
    return median_seconds(lambda: hvd.allreduce(values, name=f"probe.{num_values}", op=hvd.Sum))


def _mean_over_ranks(value: float) -> float:
    """The same on all ranks, so that all choose alike."""
    return runtime.sum_over_ranks(value)[0] / hvd.size()
