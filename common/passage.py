"""Which micro-batches pass through a rank, in which order, and to and from whom."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from common import pipeline_schedule
from common.config import ParallelConfig, PipelineConfig
from common.pipeline_schedule import Action, Kind, Layout
from common.sharding import bounds
from common.topology import Topology

_FORWARD = (Kind.forward, Kind.send_activation, Kind.receive_activation)
_MAKES_GRADIENTS = (Kind.backward, Kind.backward_weight)


@dataclass(frozen=True)
class Passage:
    """The way of micro-batches through a job's stages; one stage alone is the shortest.

    Attributes:
        schedule: its name.
        parts_per_stage: parts of the model that each stage has.
        num_micro_batches: that each lane's examples of a step are cut into.
        topology: which stage this rank has.
    """

    schedule: str
    parts_per_stage: int
    num_micro_batches: int
    topology: Topology

    @classmethod
    def of(cls, cfg: ParallelConfig, topology: Topology) -> "Passage":
        """The way that the configuration asks for; gradients of one stage are accumulated as 1F1B does."""
        if not isinstance(cfg, PipelineConfig) or topology.num_stages == 1:
            return cls("1f1b", 1, cfg.num_micro_batches, topology)
        return cls(cfg.schedule, cfg.parts_per_stage, cfg.num_micro_batches, topology)

    @property
    def layout(self) -> Layout:
        """Who has which parts and micro-batches."""
        return Layout(self.topology.stages, self.num_micro_batches, self.parts_per_stage)

    def actions(self) -> list[Action]:
        """What this rank does in a step, in order; a server does nothing."""
        if self.topology.is_server:
            return []
        return _schedules(self.schedule, self.layout)[self.topology.rank - self.topology.num_servers]

    def forward_actions(self) -> list[Action]:
        """What this rank does to evaluate a batch, in order."""
        return [action for action in self.actions() if action.kind in _FORWARD]

    def peer(self, action: Action) -> int:
        """The rank at the other end of a transfer."""
        other = action.other_end
        return self.topology.num_servers + self.layout.rank_of(other.part, other.micro_batch)

    def micro_batches(self, num_examples: int) -> dict[int, slice]:
        """The rank's examples of each of its micro-batches, by their ids; sizes differ by one at most.

        Every rank of a lane cuts it alike, as its number of examples follows from that of all the rank's lanes.
        """
        lanes = self.topology.lanes
        parts: dict[int, slice] = {}
        for lane, (start, stop) in zip(lanes, pairwise(bounds(num_examples, len(lanes))), strict=True):
            rows = pairwise(bounds(stop - start, self.num_micro_batches))
            for row, (first, last) in enumerate(rows):
                parts[row * self.topology.num_replicas + lane] = slice(start + first, start + last)
        return parts

    def bubbles(self, times: list[list[float]]) -> dict[str, Any]:
        """The share of time in which each stage had nothing to do, by the clock and by the theory of equal costs.

        Args:
            times: of each rank, the seconds of all steps and those of waiting in them.
        """
        topology = self.topology
        if topology.num_stages == 1:
            return {}
        longest = max(seconds for seconds, _ in times)
        busy = [
            sum(times[rank][0] - times[rank][1] for rank in topology.ranks_of_stage(stage)) / topology.stages[stage]
            for stage in range(topology.num_stages)
        ]
        theory = pipeline_schedule.bubble(
            self.schedule, topology.num_stages, self.num_micro_batches, self.parts_per_stage
        )
        return {"bubble_of_stages": [1 - seconds / longest for seconds in busy], "bubble_in_theory": theory}


def last_backward(actions: list[Action]) -> int:
    """The place of the action that finishes the gradients; -1 where nothing is done."""
    return max((place for place, action in enumerate(actions) if action.kind in _MAKES_GRADIENTS), default=-1)


@cache
def _schedules(name: str, layout: Layout) -> list[list[Action]]:
    return pipeline_schedule.make(name, layout)
