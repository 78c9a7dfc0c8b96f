"""Estimates layers, memory, messages and idle time of each rank for a configuration, without training."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from common.config.schema import AdamWConfig, Dtype, PipelineConfig, RunConfig, SGDConfig, StageBalance
from common.distributed.topology import Topology
from common.gradients.bucketing import allreduce_bytes
from common.gradients.compression import piece_size
from common.parallel import model_parts, pipeline_schedule
from common.parallel.pipeline_schedule import Action, Costs, Kind, Timeline
from common.parallel.rank_schedule import RankSchedule


@dataclass(frozen=True)
class LayerProfile:
    """The size and cost of a layer, found without running it.

    Attributes:
        name: the name of the layer's class.
        weights: number of values of each weight, by the weight's number; layers that share a weight share its number.
        output_values: number of output values per example.
        kept_bytes: bytes that forward keeps for backward per micro-batch, without those that earlier layers keep.
        flops: floating-point operations of the matrix products and convolutions in forward.
    """

    name: str
    weights: dict[int, int]
    output_values: int
    kept_bytes: int
    flops: float


def micro_batch_size(cfg: RunConfig, topology: Topology) -> int:
    """Number of examples in the largest micro-batch of the first step."""
    return math.ceil(cfg.train.global_batch_size / topology.num_replicas / cfg.parallel.num_micro_batches)


class CostModel:
    """The cost of a run for each rank.

    Args:
        cfg: a valid configuration.
        topology: the topology of any rank, with the stages or servers of the configuration.
        layers: the layers of the whole model, in order.

    Attributes:
        topology: the topology that was given.
        layers: the layers of the whole model, in order.
        rank_schedule: the pipeline schedule.
        ranges: for each model chunk, the numbers of its layers.
        costs: the cost of each model chunk relative to an even cut.

    Raises:
        ConfigError: the model cannot be cut as configured.
    """

    def __init__(self, cfg: RunConfig, topology: Topology, layers: Sequence[LayerProfile]) -> None:
        self.topology, self.layers = topology, layers
        self.rank_schedule = RankSchedule.from_config(cfg.parallel, topology)
        numels = [sum(layer.weights.values()) for layer in layers]
        costs: Sequence[float] = numels
        if isinstance(cfg.parallel, PipelineConfig) and cfg.parallel.balance is StageBalance.flops:
            costs = [layer.flops for layer in layers]
        self.ranges = model_parts.cut(cfg.parallel, topology.num_stages, numels, costs)
        even = sum(costs) / len(self.ranges)
        self.costs = [sum(costs[number] for number in of_chunk) / even for of_chunk in self.ranges]
        self._is_sharded = cfg.optimizer.sharded and topology.world_size > 1
        self._num_moments = _num_moments(cfg)
        self._value_bytes = 8 if cfg.precision.dtype is Dtype.float64 else 4
        self._micro_batch_size = micro_batch_size(cfg, topology)

    @property
    def weights(self) -> dict[int, int]:
        """Number of values of each weight of the model."""
        return self._weights_of(range(len(self.layers)))

    @property
    def tied(self) -> dict[int, list[int]]:
        """The weights that several stages share, each with these stages."""
        of_stages = [self.weights_of_stage(stage) for stage in range(self.topology.num_stages)]
        holders = {
            weight: [stage for stage, known in enumerate(of_stages) if weight in known] for weight in self.weights
        }
        return {weight: having for weight, having in holders.items() if len(having) > 1}

    def parameters_of_chunk(self, chunk: int) -> int:
        """Number of values of the weights of a model chunk."""
        return sum(self._weights_of(self.ranges[chunk]).values())

    def weights_of_stage(self, stage: int) -> dict[int, int]:
        """Number of values of each weight of a stage."""
        chunks = self.ranges[stage :: self.topology.num_stages]
        return self._weights_of([number for of_chunk in chunks for number in of_chunk])

    @property
    def owners(self) -> range:
        """The ranks that each update one partition of the weights; empty if each rank updates all of its weights."""
        return range(self.topology.world_size) if self._is_sharded else self.topology.servers

    def partition(self, rank: int) -> range:
        """The partition that an owner updates of the vector of all values, in which the matrices come first."""
        total = sum(self.weights.values())
        size = piece_size(total, len(self.owners))
        return range(min(rank * size, total), min((rank + 1) * size, total))

    def memory(self, rank: int) -> dict[str, float]:
        """Bytes of memory of a rank by purpose, without messages in flight and the state of compressors."""
        weights = self._num_weights(rank) * self._value_bytes
        of_partition = len(self.partition(rank)) * self._value_bytes if rank in self.owners else 0
        updated = of_partition if self.owners else weights
        is_server = rank in self.topology.servers
        return {
            "weights": weights,
            "gradients": of_partition * len(self.topology.workers) if is_server else weights,
            "optimizer": updated * self._num_moments,
            "activations": self._peak_bytes(rank),
        }

    def micro_batches_held(self, rank: int) -> int:
        """Peak number of micro-batches whose activations a rank holds, counted once for each model chunk."""
        return 0 if rank in self.topology.servers else self.timeline.peak_activations[self._row(rank)]

    def num_messages(self, rank: int) -> int:
        """Number of point-to-point messages that a rank sends in a step."""
        topology = self.topology
        if topology.num_servers:
            return len(topology.workers) if rank in topology.servers else topology.num_servers
        return sum(self._sends(rank).values())

    def sent(self, rank: int) -> dict[str, float]:
        """Bytes that a rank sends in a step by kind, for uncompressed gradients."""
        topology, weights = self.topology, self._num_weights(rank) * self._value_bytes
        if rank in topology.servers:
            return {"answers": len(self.partition(rank)) * self._value_bytes * len(topology.workers)}
        if topology.num_servers:
            return {"pushes": weights}
        replicas = topology.stages[self._stage(rank)]
        others = (topology.world_size - 1) * len(self.partition(rank)) if self._is_sharded else 0
        return {
            "activations": self._sent_bytes(rank, Kind.send_activation, 0),
            "their gradients": self._sent_bytes(rank, Kind.send_gradient, -1),
            "allreduce": allreduce_bytes(weights, replicas),
            "tied": sum(self._tied_bytes(weight, rank) for weight in self.tied),
            "new weights": others * self._value_bytes,
        }

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated computations of each rank except for servers, by the costs of the model chunks."""
        return pipeline_schedule.simulate(self._schedules, self.rank_schedule.layout, Costs(chunk_costs=self.costs))

    def bubble(self, stage: int) -> float:
        """The idle fraction of the step, averaged over the ranks of a stage."""
        idle = [self.timeline.bubble[self._row(rank)] for rank in self.topology.ranks_of_stage(stage)]
        return sum(idle) / len(idle)

    @property
    def bubble_in_theory(self) -> float:
        """The idle fraction by theory: model chunks of equal cost and one rank per stage."""
        rank_schedule = self.rank_schedule
        return pipeline_schedule.bubble(
            rank_schedule.schedule,
            self.topology.num_stages,
            rank_schedule.num_micro_batches,
            rank_schedule.virtual_stages_per_rank,
        )

    @cached_property
    def _schedules(self) -> list[list[Action]]:
        return pipeline_schedule.make(self.rank_schedule.schedule, self.rank_schedule.layout)

    def _row(self, rank: int) -> int:
        """The rank's number among the ranks that have a schedule."""
        return rank - self.topology.num_servers

    def _stage(self, rank: int) -> int:
        return self.rank_schedule.layout.stage_of(self._row(rank))

    def _weights_of(self, numbers: Sequence[int]) -> dict[int, int]:
        return {weight: numel for number in numbers for weight, numel in self.layers[number].weights.items()}

    def _num_weights(self, rank: int) -> int:
        """Number of values of a rank's weights; a server holds all weights and updates some."""
        is_server = rank in self.topology.servers
        return sum((self.weights if is_server else self.weights_of_stage(self._stage(rank))).values())

    def _peak_bytes(self, rank: int) -> int:
        """Peak bytes of activations, which are held from forward to backward (to backward_weight if it is split)."""
        if rank in self.topology.servers:
            return 0
        kept = [sum(self.layers[number].kept_bytes for number in of_chunk) for of_chunk in self.ranges]
        sign = {Kind.forward: 1, Kind.backward_input: 0}
        spans = self.timeline.spans[self._row(rank)]
        return max(accumulate(sign.get(span.action.kind, -1) * kept[span.action.chunk] for span in spans))

    def _sends(self, rank: int) -> Counter[tuple[Kind, int]]:
        """The number of messages that a rank sends in a step, by kind and model chunk."""
        kinds = (Kind.send_activation, Kind.send_gradient)
        actions = self._schedules[self._row(rank)]
        return Counter((action.kind, action.chunk) for action in actions if action.kind in kinds)

    def _sent_bytes(self, rank: int, kind: Kind, distance: int) -> int:
        """Bytes of a rank's messages of a kind; a message has the output shape of the chunk at `chunk + distance`."""
        messages = {chunk: count for (of_kind, chunk), count in self._sends(rank).items() if of_kind == kind}
        values = {chunk: self.layers[self.ranges[chunk + distance][-1]].output_values for chunk in messages}
        num_values = sum(count * values[chunk] for chunk, count in messages.items())
        return num_values * self._micro_batch_size * self._value_bytes

    def _tied_bytes(self, weight: int, rank: int) -> int:
        ranks = self.topology.ranks_with_tied_weights(self.tied[weight])
        return allreduce_bytes(self.weights[weight] * self._value_bytes, len(ranks)) if rank in ranks else 0


def _num_moments(cfg: RunConfig) -> int:
    """Number of values that the optimizer keeps for each value of the weights."""
    if isinstance(cfg.optimizer, AdamWConfig):
        return 2
    return int(isinstance(cfg.optimizer, SGDConfig) and cfg.optimizer.momentum > 0)
