"""The layers of a rank: the whole model, or one stage of a pipeline."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.config.schema import ParallelConfig, PipelineConfig, PrecisionConfig, StageBalance
from common.data.datasets.examples import Examples
from common.distributed.timing import median_seconds
from common.distributed.topology import Topology
from common.parallel import model_parts
from common.parallel.rank_schedule import RankSchedule
from common.torch.distributed import runtime
from common.torch.models.mixed_precision import Model
from common.torch.parallel.split_backward import SplitBackward

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Stage(nn.Sequential):
    """The layers of one rank, by their numbers in the whole model.

    Args:
        layers: the layers of the whole model.
        ranges: for each model chunk, the numbers of its layers.
        precision: the dtypes.
        rank_schedule: this rank's pipeline schedule.

    Attributes:
        chunks: this rank's model chunks by number; each has consecutive layers.
        split_backwards: the split backward of chunks whose backward is split.
        num_chunks: number of chunks of the whole model.
        shapes: for each chunk of the whole model, the output shape of one example; set by infer_shapes().
        dtype: the dtype of the chunks' outputs.
        tied: weights that are shared with other stages, each with all ranks that have it.
        rank_schedule: this rank's pipeline schedule.
        topology: the place of this rank.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        ranges: Sequence[range],
        precision: PrecisionConfig,
        rank_schedule: RankSchedule,
    ) -> None:
        topology = rank_schedule.topology
        mine = range(topology.stage, len(ranges), topology.num_stages)
        super().__init__()
        self._names: dict[nn.Parameter, str] = {}
        for chunk in mine:
            for number in ranges[chunk]:
                self.add_module(str(number), layers[number])
        device = runtime.device(topology)
        self.chunks = {chunk: Model([layers[number] for number in ranges[chunk]], precision, device) for chunk in mine}
        self.num_chunks, self.topology, self.dtype = len(ranges), topology, runtime.dtype(precision)
        self.rank_schedule = rank_schedule
        is_split = rank_schedule.schedule == "zb_h1"
        self.split_backwards = {
            number: SplitBackward(chunk) for number, chunk in self.chunks.items() if is_split and number > 0
        }
        self.shapes: list[tuple[int, ...]] = []
        self._times = [0.0, 0.0]
        holders: dict[nn.Parameter, dict[int, None]] = {}
        for name, parameter in nn.Sequential(*layers).named_parameters(remove_duplicate=False):
            layer = int(name.partition(".")[0])
            chunk = next(number for number, layer_range in enumerate(ranges) if layer in layer_range)
            holders.setdefault(parameter, {})[chunk % topology.num_stages] = None
            self._names.setdefault(parameter, name)
        self.tied = [
            (parameter, topology.ranks_with_tied_weights(list(holders[parameter])))
            for parameter in self.parameters()
            if len(holders[parameter]) > 1
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs of a model that is not cut."""
        (chunk,) = self.chunks.values()
        outputs: Tensor = chunk(inputs)
        return outputs

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by their names in the whole model; a shared weight has its name in the first layer."""
        for name, parameter in super().named_parameters(*args, **options):
            yield self._names.get(parameter, name), parameter

    def infer_shapes(self, inputs: Tensor) -> None:
        """Finds the chunks' output shapes with one example of zeros like inputs (B, ...); all ranks must call it."""
        if self.shapes or self.num_chunks == 1:
            return
        values = inputs.new_zeros((1, *inputs.shape[1:]))
        with torch.no_grad(), torch.random.fork_rng():
            for number in range(self.num_chunks):
                shape = list(self.chunks[number](values).shape[1:]) if number in self.chunks else None
                found = next(shape for shape in runtime.allgather_object(shape) if shape is not None)
                self.shapes.append(tuple(found))
                values = torch.zeros((1, *found), dtype=self.dtype, device=inputs.device)

    def add_times(self, seconds: float, waited: float) -> None:
        """Adds the seconds of a step on this rank, and the seconds that it waited for other ranks."""
        self._times = [self._times[0] + seconds, self._times[1] + waited]

    def bubble_report(self) -> dict[str, Any]:
        """The idle fraction of each stage, for the summary; all ranks must call it."""
        return self.rank_schedule.bubble_report(runtime.allgather_object(self._times))


def build_stage(
    layers: Sequence[nn.Module],
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    topology: Topology,
    examples: Examples,
) -> Stage:
    """Cuts a model and keeps this rank's layers; all ranks must call it, with equal weights.

    Args:
        layers: the layers of the whole model, in order.
        parallel: how the model is cut.
        precision: the dtypes.
        topology: the place of this rank.
        examples: a dataset; one example is passed through the layers if costs must be measured.

    Raises:
        ConfigError: the model cannot be cut as configured.
    """
    numels = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    costs: Sequence[float] = numels
    if isinstance(parallel, PipelineConfig) and parallel.balance is not StageBalance.parameters:
        inputs = runtime.to_tensor(examples.get_batch(np.arange(1))[0], precision, torch.device("cpu"))
        is_flops = parallel.balance is StageBalance.flops
        costs = runtime.broadcast_object(measured_costs(layers, inputs, _flops if is_flops else _seconds))
    ranges = model_parts.cut(parallel, topology.num_stages, numels, costs)
    return Stage(layers, ranges, precision, RankSchedule.from_config(parallel, topology))


def measured_costs(
    layers: Sequence[nn.Module], inputs: Tensor, measure: Callable[[nn.Module, Tensor], float]
) -> list[float]:
    """The cost of each layer; inputs are those of the first layer."""
    costs = []
    for layer in layers:
        costs.append(measure(layer, inputs))
        with torch.no_grad():
            inputs = layer(inputs)
    return costs


def _flops(layer: nn.Module, inputs: Tensor) -> float:
    """Floating-point operations of the matrix products and convolutions in forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(inputs)
    return float(counter.get_total_flops())


def _seconds(layer: nn.Module, inputs: Tensor) -> float:
    """Seconds of forward and backward; afterwards the layer's gradients are cleared."""
    leaf = inputs.detach().requires_grad_(inputs.is_floating_point())

    def step() -> None:
        outputs = layer(leaf)
        if outputs.requires_grad:
            outputs.sum().backward()

    seconds = median_seconds(step)
    layer.zero_grad()
    return seconds
