"""This rank's pipeline schedule: its micro-batches, the order of its actions, and its peers."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from common.config.schema import ParallelConfig, PipelineConfig
from common.distributed.topology import Layout, Topology, bounds
from common.parallel import pipeline_schedule
from common.parallel.pipeline_schedule import Action, Kind

_FORWARD = (Kind.forward, Kind.send_activation, Kind.receive_activation)
_MAKES_GRADIENTS = (Kind.backward, Kind.backward_weight)


@dataclass(frozen=True)
class RankSchedule:
    """This rank's pipeline schedule; with one stage it is gradient accumulation.

    Attributes:
        schedule: the name of the schedule.
        virtual_stages_per_rank: number of model chunks on each stage.
        num_micro_batches: number of micro-batches of each batch slice in a step.
        topology: the place of this rank.
    """

    schedule: str
    virtual_stages_per_rank: int
    num_micro_batches: int
    topology: Topology

    @classmethod
    def from_config(cls, cfg: ParallelConfig, topology: Topology) -> "RankSchedule":
        """The configured schedule; with one stage, 1F1B, which then is gradient accumulation."""
        if topology.num_lanes:  # each lane is a micro-batch
            return cls("1f1b", 1, 1, topology)
        if not isinstance(cfg, PipelineConfig) or topology.num_stages == 1:
            return cls("1f1b", 1, cfg.num_micro_batches, topology)
        return cls(cfg.schedule, cfg.virtual_stages_per_rank, cfg.num_micro_batches, topology)

    @property
    def layout(self) -> Layout:
        """Which rank has which model chunks and micro-batches."""
        return Layout(self.topology.stages, self.num_micro_batches, self.virtual_stages_per_rank)

    def actions(self) -> list[Action]:
        """This rank's actions in a step, in order; empty for a server."""
        if self.topology.is_server:
            return []
        return _schedules(self.schedule, self.layout)[self.topology.rank - self.topology.num_servers]

    def forward_actions(self) -> list[Action]:
        """This rank's actions to evaluate a batch, in order."""
        return [action for action in self.actions() if action.kind in _FORWARD]

    def peer(self, action: Action) -> int:
        """The rank at the other end of a transfer."""
        other = action.other_end
        return self.topology.num_servers + self.layout.rank_of(other.chunk, other.micro_batch)

    def micro_batches(self, num_examples: int) -> dict[int, slice]:
        """For each micro-batch id of this rank, the slice of its examples; sizes differ by at most one.

        All ranks that share a batch slice cut it alike: the sizes follow from the number of examples alone.
        """
        slices = self.topology.batch_slices
        parts: dict[int, slice] = {}
        for batch_slice, (start, stop) in zip(slices, pairwise(bounds(num_examples, len(slices))), strict=True):
            rows = pairwise(bounds(stop - start, self.num_micro_batches))
            for row, (first, last) in enumerate(rows):
                parts[row * self.topology.num_replicas + batch_slice] = slice(start + first, start + last)
        return parts

    def bubble_report(self, times: list[list[float]]) -> dict[str, Any]:
        """The idle fraction of each stage, measured, and the one in theory, with equal costs.

        Args:
            times: for each rank, the seconds of all its steps and the seconds that it waited in them.
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
            self.schedule, topology.num_stages, self.num_micro_batches, self.virtual_stages_per_rank
        )
        return {"bubble_of_stages": [1 - seconds / longest for seconds in busy], "bubble_in_theory": theory}


def last_backward(actions: list[Action]) -> int:
    """The index of the action that finishes the gradients; -1 if there is none."""
    return max((place for place, action in enumerate(actions) if action.kind in _MAKES_GRADIENTS), default=-1)


@cache
def _schedules(name: str, layout: Layout) -> list[list[Action]]:
    return pipeline_schedule.make(name, layout)
