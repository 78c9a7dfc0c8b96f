"""Statistics of batch normalisation over all ranks."""

from collections.abc import Callable, Iterable
from typing import Any

from common.distributed.topology import Topology
from common.torch.script import part

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def running(model: nn.Module) -> list[Tensor]:
    """The running statistics of the layers that compute them from this rank's rows."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and "forward" not in vars(layer)]
    return [buffer for layer in layers for buffer in layer.buffers() if buffer.is_floating_point()]


@torch.no_grad()
def average(models: Iterable[nn.Module], topology: Topology) -> None:
    """Gives all ranks the means of their running statistics."""
    buffers = [buffer for model in models for buffer in running(model)]
    if buffers:
        flat = torch.cat([buffer.double().flatten() for buffer in buffers])  # the mean of equal numbers is exact
        mean = hvd.allreduce(flat, name="script.statistics", op=hvd.Sum) / topology.world_size
        for buffer, values in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def use_global_batch(model: nn.Module, weight: Callable[[], float]) -> None:
    """Makes each batch normalisation of a model use the statistics of the global batch while it trains.

    Args:
        model: the model.
        weight: in backward, this rank's weight among the gradients of all ranks.
    """
    for number, layer in enumerate(layer for layer in model.modules() if isinstance(layer, _BatchNorm)):
        vars(layer)["forward"] = _GlobalBatchNorm(layer, f"script.moments.{number}", weight)


class _GlobalBatchNorm:
    """Replaces the method `forward` of a layer."""

    def __init__(self, layer: _BatchNorm, name: str, weight: Callable[[], float]) -> None:
        self._layer, self._plain, self._name, self._weight = layer, type(layer).forward, name, weight

    def __call__(self, input: Tensor) -> Tensor:
        layer, of_step = self._layer, part.current()
        if of_step is None or not layer.training:
            return self._plain(layer, input)
        layer._check_input_dim(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        counts = not of_step.is_empty
        per_row = input.numel() / input.shape[1] / of_step.num_computed
        count = of_step.num_global * per_row
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        mean = _Sum.apply(values.sum(axes) * counts, f"{self._name}.mean", self._weight) / count
        centred = values - _beside(mean, input)
        variance = _Sum.apply(centred.square().sum(axes) * counts, f"{self._name}.variance", self._weight) / count
        self._track(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        normal = centred * _beside((variance + layer.eps).rsqrt(), input)
        if layer.affine:
            normal = normal * _beside(layer.weight, input) + _beside(layer.bias, input)
        return normal.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        layer = self._layer
        if layer.running_mean is None or layer.running_var is None:
            return
        layer.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum  # type: ignore[arg-type]
        layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
        layer.running_var.lerp_(variance.to(layer.running_var.dtype), momentum)


def _beside(values: Tensor, input: Tensor) -> Tensor:
    """(channels,) in the shape in which it goes with the input."""
    return values.view(1, -1, *[1] * (input.dim() - 2))


class _Sum(torch.autograd.Function):
    """The sum over the ranks.

    A rank's gradients are those of its own loss. So before the gradients of all ranks with respect to the sum are
    added, each is multiplied by its rank's weight.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, name: str, weight: Callable[[], float]) -> Tensor:
        """The sum of values (...) over the ranks."""
        ctx.name, ctx.weight = name, weight
        return hvd.allreduce(values, op=hvd.Sum, name=name)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """The gradient with respect to this rank's values."""
        weight = ctx.weight()
        weighed = upstream[0] * weight if weight else torch.zeros_like(upstream[0])
        total = hvd.allreduce(weighed, op=hvd.Sum, name=f"{ctx.name}.gradient")
        return total / weight if weight else torch.zeros_like(total), None, None
