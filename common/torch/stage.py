"""The layers of a model that a rank has: all of them, or one stage of a pipeline."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common import model_parts
from common.config import PipelineConfig, PrecisionConfig, RunConfig, StageBalance
from common.datasets.examples import Examples
from common.method_choice import median_seconds
from common.passage import Passage
from common.topology import Topology
from common.torch import runtime
from common.torch.precision import Model
from common.torch.split_backward import SplitBackward

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Stage(nn.Sequential):
    """The layers of one rank, by their numbers in the whole model.

    Args:
        layers: of the whole model.
        ranges: numbers of the layers of each part.
        precision: the dtypes.
        passage: how micro-batches pass through the parts.

    Attributes:
        parts: of this rank by their numbers, consecutive layers each.
        splits: the parts whose backward is done in two halves.
        num_parts: of the whole model.
        shapes: of one example as each part of the model puts it out; learnt with the first examples.
        dtype: of what the parts put out.
        tied: weights that other stages have, too, each with all ranks that have it.
        passage: how micro-batches pass through the parts.
        topology: whose stage it is.
    """

    def __init__(
        self, layers: Sequence[nn.Module], ranges: Sequence[range], precision: PrecisionConfig, passage: Passage
    ) -> None:
        topology = passage.topology
        mine = range(topology.stage, len(ranges), topology.num_stages)
        super().__init__()
        self._names: dict[nn.Parameter, str] = {}
        for part in mine:
            for number in ranges[part]:
                self.add_module(str(number), layers[number])
        device = runtime.device(topology)
        self.parts = {part: Model([layers[number] for number in ranges[part]], precision, device) for part in mine}
        self.num_parts, self.topology, self.dtype = len(ranges), topology, runtime.dtype(precision)
        self.passage = passage
        is_split = passage.schedule == "zb_h1"
        self.splits = {number: SplitBackward(part) for number, part in self.parts.items() if is_split and number > 0}
        self.shapes: list[tuple[int, ...]] = []
        self._times = [0.0, 0.0]
        holders: dict[nn.Parameter, dict[int, None]] = {}
        for name, parameter in nn.Sequential(*layers).named_parameters(remove_duplicate=False):
            layer = int(name.partition(".")[0])
            part = next(number for number, layer_range in enumerate(ranges) if layer in layer_range)
            holders.setdefault(parameter, {})[part % topology.num_stages] = None
            self._names.setdefault(parameter, name)
        self.tied = [
            (parameter, topology.ranks_with_tied_weights(list(holders[parameter])))
            for parameter in self.parameters()
            if len(holders[parameter]) > 1
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs of a model that is one part."""
        (part,) = self.parts.values()
        outputs: Tensor = part(inputs)
        return outputs

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The names are those of the whole model; a weight that several layers share has the name of the first."""
        for name, parameter in super().named_parameters(*args, **options):
            yield self._names.get(parameter, name), parameter

    def learn_shapes(self, inputs: Tensor) -> None:
        """Passes one example of zeros, shaped as the inputs (B, ...), through all parts; to be called by all ranks."""
        if self.shapes or self.num_parts == 1:
            return
        values = inputs.new_zeros((1, *inputs.shape[1:]))
        with torch.no_grad(), torch.random.fork_rng():
            for number in range(self.num_parts):
                shape = list(self.parts[number](values).shape[1:]) if number in self.parts else None
                found = next(shape for shape in runtime.gather_json(shape) if shape is not None)
                self.shapes.append(tuple(found))
                values = torch.zeros((1, *found), dtype=self.dtype, device=inputs.device)

    def add_times(self, seconds: float, waited: float) -> None:
        """Counts what a step took on this rank, and how much of it was waiting for other ranks."""
        self._times = [self._times[0] + seconds, self._times[1] + waited]

    def bubbles(self) -> dict[str, Any]:
        """For the summary: the share of time that each stage had nothing to do; to be called by all ranks."""
        return self.passage.bubbles(runtime.gather_json(self._times))


def take_stage(layers: Sequence[nn.Module], cfg: RunConfig, topology: Topology, examples: Examples) -> Stage:
    """Cuts a model and keeps this rank's layers; to be called by all ranks, which have equal weights.

    Args:
        layers: of the whole model, in order.
        cfg: how it is cut.
        topology: which stage this rank has.
        examples: one of which is passed through the layers, where their costs are measured.

    Raises:
        ConfigError: it cannot be cut like that.
    """
    numels = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    costs: Sequence[float] = numels
    if isinstance(cfg.parallel, PipelineConfig) and cfg.parallel.balance is not StageBalance.parameters:
        inputs = runtime.to_tensor(examples.take(np.arange(1))[0], cfg.precision, torch.device("cpu"))
        is_flops = cfg.parallel.balance is StageBalance.flops
        costs = runtime.from_rank_zero(measured_costs(layers, inputs, _flops if is_flops else _seconds))
    ranges = model_parts.cut(cfg.parallel, topology.num_stages, numels, costs)
    return Stage(layers, ranges, cfg.precision, Passage.of(cfg.parallel, topology))


def measured_costs(
    layers: Sequence[nn.Module], inputs: Tensor, measure: Callable[[nn.Module, Tensor], float]
) -> list[float]:
    """What each layer costs for the inputs of the first one."""
    costs = []
    for layer in layers:
        costs.append(measure(layer, inputs))
        with torch.no_grad():
            inputs = layer(inputs)
    return costs


def _flops(layer: nn.Module, inputs: Tensor) -> float:
    """Floating-point operations of products of matrices and of convolutions, forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(inputs)
    return float(counter.get_total_flops())


def _seconds(layer: nn.Module, inputs: Tensor) -> float:
    """Forward and backward; the layer is left without gradients."""
    leaf = inputs.detach().requires_grad_(inputs.is_floating_point())

    def step() -> None:
        outputs = layer(leaf)
        if outputs.requires_grad:
            outputs.sum().backward()

    seconds = median_seconds(step)
    layer.zero_grad()
    return seconds
