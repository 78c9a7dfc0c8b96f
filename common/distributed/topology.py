"""The place of a rank in the job: immutable integers, independent of the framework and testable without processes.

The global batch is cut into lcm(replicas_per_stage) batch slices of equal size (up to one example), so that each
replica of a stage works on equally many slices. With one stage, each worker has one slice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Layout:
    """Which rank has which model chunks and which micro-batches.

    Ranks are numbered stage by stage. The batch slices are divided among the replicas of a stage in order, and
    micro-batch j of slice s has the id j * num_batch_slices + s.

    Attributes:
        replicas_per_stage: number of replicas of each stage.
        num_micro_batches: number of micro-batches per batch slice.
        virtual_stages_per_rank: number of model chunks per stage; 1 unless the schedule is interleaved.
    """

    replicas_per_stage: tuple[int, ...]
    num_micro_batches: int
    virtual_stages_per_rank: int = 1

    def __post_init__(self) -> None:
        if min(*(self.replicas_per_stage or [0]), self.num_micro_batches, self.virtual_stages_per_rank) < 1:
            raise ValueError(f"each number must be at least 1. Received: {self}")
        if self.num_stages == 1 and self.virtual_stages_per_rank > 1:
            raise ValueError(
                f"a single stage has nothing to interleave with: virtual_stages_per_rank must be 1. Received: {self}"
            )

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.replicas_per_stage)

    @property
    def num_chunks(self) -> int:
        """Number of model chunks."""
        return self.num_stages * self.virtual_stages_per_rank

    @property
    def num_ranks(self) -> int:
        """Number of ranks: the sum of the replicas of all stages."""
        return sum(self.replicas_per_stage)

    @cached_property
    def num_batch_slices(self) -> int:
        """Number of batch slices of the global batch."""
        return math.lcm(*self.replicas_per_stage)

    @cached_property
    def _first_ranks(self) -> list[int]:
        return [0, *accumulate(self.replicas_per_stage)]

    def stage_of(self, rank: int) -> int:
        """The stage that a rank is a replica of."""
        return next(stage for stage, end in enumerate(self._first_ranks[1:]) if rank < end)

    def replica_of(self, rank: int) -> int:
        """The rank's number among the replicas of its stage."""
        return rank - self._first_ranks[self.stage_of(rank)]

    def batch_slices_of(self, rank: int) -> range:
        """The batch slices that a rank handles."""
        num_batch_slices = self.num_batch_slices // self.replicas_per_stage[self.stage_of(rank)]
        return range(self.replica_of(rank) * num_batch_slices, (self.replica_of(rank) + 1) * num_batch_slices)

    def micro_batches_of(self, rank: int) -> list[int]:
        """The ids of the rank's micro-batches, ascending."""
        slices = self.batch_slices_of(rank)
        rows = range(self.num_micro_batches)
        return [row * self.num_batch_slices + batch_slice for row in rows for batch_slice in slices]

    def chunks_of(self, rank: int) -> range:
        """The model chunks of a rank, ascending."""
        return range(self.stage_of(rank), self.num_chunks, self.num_stages)

    def rank_of(self, chunk: int, micro_batch: int) -> int:
        """The rank that handles a micro-batch on a model chunk."""
        stage, batch_slice = chunk % self.num_stages, micro_batch % self.num_batch_slices
        return self._first_ranks[stage] + batch_slice * self.replicas_per_stage[stage] // self.num_batch_slices


@dataclass(frozen=True)
class Topology:
    """The place of one rank in the job.

    Servers have the first ranks, followed by the stages of the model in order, each with all its replicas.

    Attributes:
        rank: 0 .. world_size - 1; rank 0 writes and prints.
        world_size: number of ranks in the job.
        local_rank: 0 .. local_size - 1, the rank's number on its host.
        local_size: number of ranks on this host.
        replicas_per_stage: number of ranks of each stage; (): one stage, which has all ranks except for servers.
        num_servers: number of parameter servers.
        num_lanes: number of batch slices of a run that is the same to the bit for all numbers of ranks; each rank has
            consecutive ones, and they may be unequally many. 0: any other run.

    Raises:
        ValueError: the integers do not describe a rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    replicas_per_stage: tuple[int, ...] = ()
    num_servers: int = 0
    num_lanes: int = 0

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
        if self.num_lanes and self.num_lanes < self.world_size:
            raise ValueError(f"{self.num_lanes} lanes are too few for {self.world_size} ranks")

    @property
    def stages(self) -> tuple[int, ...]:
        """Number of replicas of each stage."""
        return self.replicas_per_stage or (self.world_size - self.num_servers,)

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @property
    def is_server(self) -> bool:
        """Whether this rank is a parameter server; a server gets no examples."""
        return self.rank < self.num_servers

    @property
    def stage(self) -> int:
        """The stage of this rank; 0 for a server."""
        return next((stage for stage in range(self.num_stages) if self.rank in self.ranks_of_stage(stage)), 0)

    def ranks_of_stage(self, stage: int) -> range:
        """The ranks of a stage."""
        first = self.num_servers + sum(self.stages[:stage])
        return range(first, first + self.stages[stage])

    @property
    def groups(self) -> list[range]:
        """Groups of ranks with the same weights: one per stage, or a single one of all ranks if there are servers."""
        if self.num_servers:
            return [range(self.world_size)]
        return [self.ranks_of_stage(stage) for stage in range(self.num_stages)]

    @property
    def group(self) -> range:
        """The ranks that have the same weights as this one."""
        return self.groups[self.stage]

    @property
    def servers(self) -> range:
        """The parameter servers."""
        return range(self.num_servers)

    @property
    def workers(self) -> range:
        """The ranks that compute gradients for the servers; without servers, the ranks of stage 0."""
        return self.ranks_of_stage(0)

    @property
    def leads_group(self) -> bool:
        """Whether this is the first of the ranks with the same weights."""
        return self.rank == self.group[0]

    @property
    def counts_examples(self) -> bool:
        """Whether this rank counts its examples: those of stage 0 do, as the other stages see the same examples."""
        return not self.is_server and self.stage == 0

    @property
    def num_replicas(self) -> int:
        """Number of replicas of the model; if stages have unequally many, their least common multiple."""
        return self._layout.num_batch_slices

    @property
    def num_batch_slices(self) -> int:
        """Number of batch slices of the global batch."""
        return self.num_lanes or self.num_replicas

    @property
    def _layout(self) -> Layout:
        return Layout(self.stages, num_micro_batches=1)

    @property
    def batch_slices(self) -> range:
        """The batch slices that this rank handles; empty for a server."""
        if self.num_lanes:
            return self.lanes_of(self.rank)
        return range(0) if self.is_server else self._layout.batch_slices_of(self.rank - self.num_servers)

    def lanes_of(self, rank: int) -> range:
        """The lanes of a rank, in a run with lanes."""
        return lanes_of(rank, self.world_size, self.num_lanes)

    @property
    def ranks_of_host(self) -> range:
        """The ranks on this host, which are consecutive."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)

    @property
    def first_ranks_of_hosts(self) -> range:
        """The first rank of each host, if all hosts have as many ranks as this one."""
        return range(0, self.world_size, self.local_size)

    def ranks_with_tied_weights(self, stages: Sequence[int]) -> list[int]:
        """The ranks of the given stages, which share a weight."""
        return [rank for stage in stages for rank in self.ranks_of_stage(stage)]

    def num_threads(self, num_cores: int) -> int:
        """This rank's share of the host's cores, at least 1."""
        return max(1, num_cores // self.local_size)


def lanes_of(rank: int, num_ranks: int, num_lanes: int) -> range:
    """The lanes of a rank; the numbers of lanes of two ranks differ by at most one, larger ones first."""
    starts = bounds(num_lanes, num_ranks)
    return range(starts[rank], starts[rank + 1])


def bounds(num_examples: int, num_parts: int) -> list[int]:
    """(num_parts + 1,) the starts of consecutive parts and the end of the last one, larger parts first; [0] if none."""
    size, larger = divmod(num_examples, max(1, num_parts))
    return [number * size + min(number, larger) for number in range(num_parts + 1)]
