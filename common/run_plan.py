"""What a configuration means for each rank: layers, memory, messages, and when it works; found without training."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from common import model_parts, pipeline_schedule
from common.buckets import allreduce_bytes
from common.compression import piece_size
from common.config import AdamWConfig, Dtype, PipelineConfig, RunConfig, SGDConfig, StageBalance
from common.passage import Passage
from common.pipeline_schedule import Action, Costs, Kind, Timeline
from common.topology import Topology


@dataclass(frozen=True)
class LayerFacts:
    """What a framework knows of a layer without running it.

    Attributes:
        name: of its class.
        weights: number of values of each weight, by the weight's number; layers that share one have it in common.
        output_values: number of values that it makes of one example.
        kept_bytes: what its forward keeps of one micro-batch for backward, but for what earlier layers keep.
        flops: floating-point operations of its products of matrices and convolutions, forward.
    """

    name: str
    weights: dict[int, int]
    output_values: int
    kept_bytes: int
    flops: float


def micro_batch_size(cfg: RunConfig, topology: Topology) -> int:
    """Examples of the largest micro-batch of the first step."""
    return math.ceil(cfg.train.global_batch_size / topology.num_replicas / cfg.parallel.num_micro_batches)


class RunPlan:
    """The plan of a run.

    Args:
        cfg: a configuration without problems.
        topology: with the stages or servers of the configuration; of any rank.
        layers: of the whole model, in order.

    Attributes:
        topology: who the ranks are.
        layers: of the whole model, in order.
        passage: how micro-batches pass through the parts.
        ranges: numbers of the layers of each part.
        costs: of each part, in units of an even cut.

    Raises:
        ConfigError: the model cannot be cut like that.
    """

    def __init__(self, cfg: RunConfig, topology: Topology, layers: Sequence[LayerFacts]) -> None:
        self.topology, self.layers = topology, layers
        self.passage = Passage.of(cfg.parallel, topology)
        numels = [sum(layer.weights.values()) for layer in layers]
        costs: Sequence[float] = numels
        if isinstance(cfg.parallel, PipelineConfig) and cfg.parallel.balance is StageBalance.flops:
            costs = [layer.flops for layer in layers]
        self.ranges = model_parts.cut(cfg.parallel, topology.num_stages, numels, costs)
        even = sum(costs) / len(self.ranges)
        self.costs = [sum(costs[number] for number in of_part) / even for of_part in self.ranges]
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
        """The weights that several stages have, each with its stages."""
        of_stages = [self.weights_of_stage(stage) for stage in range(self.topology.num_stages)]
        holders = {
            weight: [stage for stage, known in enumerate(of_stages) if weight in known] for weight in self.weights
        }
        return {weight: having for weight, having in holders.items() if len(having) > 1}

    def parameters_of_part(self, part: int) -> int:
        """Number of values of a part's weights."""
        return sum(self._weights_of(self.ranges[part]).values())

    def weights_of_stage(self, stage: int) -> dict[int, int]:
        """Number of values of each weight of a stage."""
        parts = self.ranges[stage :: self.topology.num_stages]
        return self._weights_of([number for of_part in parts for number in of_part])

    @property
    def owners(self) -> range:
        """The ranks that update a piece of the weights each; none where each updates all that it has."""
        return range(self.topology.world_size) if self._is_sharded else self.topology.servers

    def piece(self, rank: int) -> range:
        """What an owner updates of all values, which are one vector with the matrices first."""
        total = sum(self.weights.values())
        size = piece_size(total, len(self.owners))
        return range(min(rank * size, total), min((rank + 1) * size, total))

    def memory(self, rank: int) -> dict[str, float]:
        """Bytes of a rank by what they are for; messages under way and compression's state not counted."""
        weights = self._num_weights(rank) * self._value_bytes
        of_piece = len(self.piece(rank)) * self._value_bytes if rank in self.owners else 0
        updated = of_piece if self.owners else weights
        is_server = rank in self.topology.servers
        return {
            "weights": weights,
            "gradients": of_piece * len(self.topology.workers) if is_server else weights,
            "optimizer": updated * self._num_moments,
            "activations": self._peak_bytes(rank),
        }

    def micro_batches_held(self, rank: int) -> int:
        """The largest number of micro-batches whose activations a rank holds at once, counted once for each part."""
        return 0 if rank in self.topology.servers else self.timeline.peak_activations[self._row(rank)]

    def num_messages(self, rank: int) -> int:
        """Messages that a rank sends to single others in a step."""
        topology = self.topology
        if topology.num_servers:
            return len(topology.workers) if rank in topology.servers else topology.num_servers
        return sum(self._sends(rank).values())

    def sent(self, rank: int) -> dict[str, float]:
        """Bytes that a rank sends in a step, by what they are; gradients not compressed."""
        topology, weights = self.topology, self._num_weights(rank) * self._value_bytes
        if rank in topology.servers:
            return {"answers": len(self.piece(rank)) * self._value_bytes * len(topology.workers)}
        if topology.num_servers:
            return {"pushes": weights}
        replicas = topology.stages[self._stage(rank)]
        others = (topology.world_size - 1) * len(self.piece(rank)) if self._is_sharded else 0
        return {
            "activations": self._sent_bytes(rank, Kind.send_activation, 0),
            "their gradients": self._sent_bytes(rank, Kind.send_gradient, -1),
            "allreduce": allreduce_bytes(weights, replicas),
            "tied": sum(self._tied_bytes(weight, rank) for weight in self.tied),
            "new weights": others * self._value_bytes,
        }

    @cached_property
    def timeline(self) -> Timeline:
        """When each rank but servers computes what, by the costs of the parts."""
        return pipeline_schedule.simulate(self._schedules, self.passage.layout, Costs(part_costs=self.costs))

    def bubble(self, stage: int) -> float:
        """The share of the step in which the ranks of a stage have nothing to do, on average."""
        idle = [self.timeline.bubble[self._row(rank)] for rank in self.topology.ranks_of_stage(stage)]
        return sum(idle) / len(idle)

    @property
    def bubble_in_theory(self) -> float:
        """That share with parts that cost the same, and one rank for each stage."""
        passage = self.passage
        return pipeline_schedule.bubble(
            passage.schedule, self.topology.num_stages, passage.num_micro_batches, passage.parts_per_stage
        )

    @cached_property
    def _schedules(self) -> list[list[Action]]:
        return pipeline_schedule.make(self.passage.schedule, self.passage.layout)

    def _row(self, rank: int) -> int:
        """A rank's number among those that have a schedule."""
        return rank - self.topology.num_servers

    def _stage(self, rank: int) -> int:
        return self.passage.layout.stage_of(self._row(rank))

    def _weights_of(self, numbers: Sequence[int]) -> dict[int, int]:
        return {weight: numel for number in numbers for weight, numel in self.layers[number].weights.items()}

    def _num_weights(self, rank: int) -> int:
        """Values of the weights that a rank has; a server has all, of which it updates some."""
        is_server = rank in self.topology.servers
        return sum((self.weights if is_server else self.weights_of_stage(self._stage(rank))).values())

    def _peak_bytes(self, rank: int) -> int:
        """Of activations, which are held from forward to backward, or to backward_weight where that is split."""
        if rank in self.topology.servers:
            return 0
        kept = [sum(self.layers[number].kept_bytes for number in of_part) for of_part in self.ranges]
        sign = {Kind.forward: 1, Kind.backward_input: 0}
        spans = self.timeline.spans[self._row(rank)]
        return max(accumulate(sign.get(span.action.kind, -1) * kept[span.action.part] for span in spans))

    def _sends(self, rank: int) -> Counter[tuple[Kind, int]]:
        """How often a rank sends what of which part."""
        kinds = (Kind.send_activation, Kind.send_gradient)
        actions = self._schedules[self._row(rank)]
        return Counter((action.kind, action.part) for action in actions if action.kind in kinds)

    def _sent_bytes(self, rank: int, kind: Kind, distance: int) -> int:
        """Of messages that are shaped as what the part puts out that is so far from the sender's."""
        messages = {part: count for (of_kind, part), count in self._sends(rank).items() if of_kind == kind}
        values = {part: self.layers[self.ranges[part + distance][-1]].output_values for part in messages}
        num_values = sum(count * values[part] for part, count in messages.items())
        return num_values * self._micro_batch_size * self._value_bytes

    def _tied_bytes(self, weight: int, rank: int) -> int:
        ranks = self.topology.ranks_with_tied_weights(self.tied[weight])
        return allreduce_bytes(self.weights[weight] * self._value_bytes, len(ranks)) if rank in ranks else 0


def _num_moments(cfg: RunConfig) -> int:
    """Values that the optimizer keeps of each weight."""
    if isinstance(cfg.optimizer, AdamWConfig):
        return 2
    return int(isinstance(cfg.optimizer, SGDConfig) and cfg.optimizer.momentum > 0)
