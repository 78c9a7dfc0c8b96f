"""Who a rank is: an immutable value of integers, valid for any framework and testable without processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.config import LossyConfig, RunConfig


@dataclass(frozen=True)
class Topology:
    """The place of one rank in the job.

    Attributes:
        rank: 0 .. world_size - 1; rank 0 is the one that writes and prints.
        world_size: number of ranks in the job.
        local_rank: 0 .. local_size - 1, the rank's number on its host.
        local_size: number of ranks on this host.

    Raises:
        ValueError: the integers do not describe a rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not within world_size={self.world_size}")
        if not 0 <= self.local_rank < self.local_size <= self.world_size:
            raise ValueError(
                f"local_rank={self.local_rank} is not within local_size={self.local_size}, "
                f"or the host has more ranks than world_size={self.world_size}"
            )

    @property
    def replica(self) -> int:
        """The number of the model copy that this rank works on."""
        return self.rank

    @property
    def num_replicas(self) -> int:
        """Number of model copies, each of which sees its own part of every global batch."""
        return self.world_size

    @property
    def ranks_of_host(self) -> range:
        """The ranks on this host, which follow each other."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)

    @property
    def first_ranks_of_hosts(self) -> range:
        """The first rank of each host; all hosts have as many ranks as this one."""
        return range(0, self.world_size, self.local_size)

    def process_sets(self, cfg: RunConfig) -> list[Sequence[int]]:
        """The sets of ranks, other than all, that exchange something among themselves; the same on every rank."""
        is_two_level = isinstance(cfg.compression, LossyConfig) and cfg.compression.two_level
        if not is_two_level or self.local_size == self.world_size:
            return []
        starts = self.first_ranks_of_hosts
        return [*(range(start, start + self.local_size) for start in starts), starts]

    def num_threads(self, num_cores: int) -> int:
        """This rank's share of the host's cores, at least 1."""
        return max(1, num_cores // self.local_size)
