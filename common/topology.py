"""Who a rank is: an immutable value of integers, valid for any framework and testable without processes."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from common.config import LMConfig, LossyConfig, ParameterServerConfig, PipelineConfig, RunConfig
from common.pipeline_schedule import Layout


@dataclass(frozen=True)
class Topology:
    """The place of one rank in the job.

    Servers come first, then the stages of the model, one after another, each with all its replicas. The global batch is
    cut into lanes: as many as make every replica of every stage work on the same number of them.

    Attributes:
        rank: 0 .. world_size - 1; rank 0 is the one that writes and prints.
        world_size: number of ranks in the job.
        local_rank: 0 .. local_size - 1, the rank's number on its host.
        local_size: number of ranks on this host.
        replicas_per_stage: number of ranks that have each stage; (): one stage, which all ranks but servers have.
        num_servers: number of ranks that hold weights for the others.

    Raises:
        ValueError: the integers do not describe a rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    replicas_per_stage: tuple[int, ...] = ()
    num_servers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not within world_size={self.world_size}")
        if not 0 <= self.local_rank < self.local_size <= self.world_size:
            raise ValueError(
                f"local_rank={self.local_rank} is not within local_size={self.local_size}, "
                f"or the host has more ranks than world_size={self.world_size}"
            )
        if min(self.stages) < 1 or sum(self.stages) + self.num_servers != self.world_size:
            raise ValueError(f"{self.stages} replicas and {self.num_servers} servers are not {self.world_size} ranks")

    @property
    def stages(self) -> tuple[int, ...]:
        """Number of replicas of each stage."""
        return self.replicas_per_stage or (self.world_size - self.num_servers,)

    @property
    def num_stages(self) -> int:
        """Number of parts that the model is spread over."""
        return len(self.stages)

    @property
    def is_server(self) -> bool:
        """Whether this rank holds weights for the others, and sees no examples."""
        return self.rank < self.num_servers

    @property
    def stage(self) -> int:
        """The stage that this rank has."""
        return next((stage for stage in range(self.num_stages) if self.rank in self.ranks_of_stage(stage)), 0)

    def ranks_of_stage(self, stage: int) -> range:
        """The ranks that have a stage."""
        first = self.num_servers + sum(self.stages[:stage])
        return range(first, first + self.stages[stage])

    @property
    def groups(self) -> list[range]:
        """The ranks that have the same weights: those of each stage, or all where servers hand them out."""
        if self.num_servers:
            return [range(self.world_size)]
        return [self.ranks_of_stage(stage) for stage in range(self.num_stages)]

    @property
    def group(self) -> range:
        """The ranks that have the same weights as this one."""
        return self.groups[self.stage]

    @property
    def servers(self) -> range:
        """The ranks that hold weights for the others."""
        return range(self.num_servers)

    @property
    def workers(self) -> range:
        """The ranks that compute gradients for servers; without servers, all of a model's that is not cut."""
        return self.ranks_of_stage(0)

    @property
    def leads_group(self) -> bool:
        """Whether this is the first of the ranks with the same weights."""
        return self.rank == self.group[0]

    @property
    def counts_examples(self) -> bool:
        """Whether this rank answers for the examples that it works on: the other stages of a lane have them, too."""
        return not self.is_server and self.stage == 0

    @property
    def num_replicas(self) -> int:
        """Number of lanes that every global batch is cut into; with equally many replicas of all stages, theirs."""
        return self._layout.num_lanes

    @property
    def _layout(self) -> Layout:
        return Layout(self.stages, num_micro_batches=1)

    @property
    def lanes(self) -> range:
        """The lanes that this rank works on."""
        return range(0) if self.is_server else self._layout.lanes_of(self.rank - self.num_servers)

    @property
    def ranks_of_host(self) -> range:
        """The ranks on this host, which follow each other."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)

    @property
    def first_ranks_of_hosts(self) -> range:
        """The first rank of each host; all hosts have as many ranks as this one."""
        return range(0, self.world_size, self.local_size)

    def arranged(self, cfg: RunConfig) -> Self:
        """The topology with the stages or servers that a configuration asks for.

        Raises:
            ValueError: they do not fit the ranks.
        """
        parallel = cfg.parallel
        if isinstance(parallel, PipelineConfig):
            equal = self.world_size // max(1, parallel.pipeline_stages)
            stages = tuple(parallel.replicas_per_stage) or (equal,) * parallel.pipeline_stages
            return dataclasses.replace(self, replicas_per_stage=stages)
        if isinstance(parallel, ParameterServerConfig):
            return dataclasses.replace(self, num_servers=parallel.num_servers)
        return self

    def linked(self) -> list[tuple[int, int]]:
        """The pairs of ranks between which activations pass, each lower rank first."""
        neighbours = [*itertools.pairwise(range(self.num_stages)), (0, self.num_stages - 1)]
        rank_of = self._layout.rank_of
        return sorted(
            {
                (rank_of(stage, lane), rank_of(other, lane))
                for stage, other in neighbours
                if other > stage
                for lane in range(self.num_replicas)
            }
        )

    def ranks_with_tied_weights(self, stages: Sequence[int]) -> list[int]:
        """The ranks of stages that share a weight."""
        return [rank for stage in stages for rank in self.ranks_of_stage(stage)]

    def process_sets(self, cfg: RunConfig) -> list[Sequence[int]]:
        """The sets of ranks, other than all, that exchange something among themselves; the same on every rank."""
        sets: list[Sequence[int]] = []
        is_two_level = isinstance(cfg.compression, LossyConfig) and cfg.compression.two_level
        if is_two_level and self.local_size < self.world_size:
            starts = self.first_ranks_of_hosts
            sets += [*(range(start, start + self.local_size) for start in starts), starts]
        if self.num_stages > 1:
            sets += [*self.groups, *self.linked()]
            if isinstance(cfg.model, LMConfig) and cfg.model.tied:
                sets.append(self.ranks_with_tied_weights((0, self.num_stages - 1)))
        if self.num_servers:
            sets += [self.servers, *itertools.product(self.servers, self.workers)]
        distinct = {tuple(ranks): ranks for ranks in sets}
        least = 1 if isinstance(cfg.compression, LossyConfig) else 2  # one rank alone compresses, too
        return [ranks for ranks in distinct.values() if least <= len(ranks) < self.world_size]

    def num_threads(self, num_cores: int) -> int:
        """This rank's share of the host's cores, at least 1."""
        return max(1, num_cores // self.local_size)
