"""Horovod as the code under test sees it: a start with other ranks, and collectives that end or fail."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from common.distributed import consensus
from common.distributed.topology import Topology
from tests.simulation.world import Process, Task, World

import numpy as np

SECONDS_TO_START = 30.0  # Gloo's
SECONDS_TO_STALL = 1800.0
ABORTED = -6


class LostRank(Exception):  # noqa: N818, as HorovodInternalError is
    """A collective has failed, because a rank has left."""


class Mesh:
    """The ranks that have started together.

    Args:
        world: where they are.
        size: number of ranks.
    """

    def __init__(self, world: World, size: int) -> None:
        self._world, self.size = world, size
        self.members: dict[int, Process] = {}
        self._given: dict[int, dict[int, Any]] = {}  # by number of the collective and rank
        self._waiting: list[Task] = []
        self.broken = ""

    def join(self, rank: int, process: Process) -> None:
        """Waits for all ranks; a process that waits in vain ends, as Horovod's start does."""
        if rank in self.members or rank >= self.size:
            self._world.say(f"{process.name} cannot start as rank {rank} of {self.size}")
            process.leave(ABORTED)
        self.members[rank] = process
        process.watch(lambda: self.break_up("Connection closed by peer"))
        deadline = self._world.now + SECONDS_TO_START
        self._notify()
        while len(self.members) < self.size and not self.broken and self._world.now < deadline:
            self._waiting.append(self._world.current)
            self._world.wait(deadline - self._world.now)
        if len(self.members) < self.size or self.broken:
            process.leave(ABORTED)

    def break_up(self, why: str) -> None:
        """Ends all collectives with an error."""
        self.broken = self.broken or why
        self._notify()

    def _notify(self) -> None:
        for task in self._waiting:
            self._world.wake(task)
        self._waiting.clear()

    def gather(self, number: int, rank: int, name: str, value: Any) -> list[Any]:
        """The values of all ranks, in their order.

        Raises:
            LostRank: a rank has left.
        """
        self._world.pause()
        given = self._given.setdefault(number, {})
        given[rank] = name, value
        self._notify()
        deadline = self._world.now + SECONDS_TO_STALL
        while not self._is_complete(given) and not self.broken:
            if self._world.now >= deadline:
                self.break_up("Horovod has been shut down: the ranks have waited too long for each other")
            self._waiting.append(self._world.current)
            self._world.wait(deadline - self._world.now)
        if not self._is_complete(given):
            raise LostRank(self.broken)
        return [given[other][1] for other in range(self.size)]

    def _is_complete(self, given: dict[int, Any]) -> bool:
        """Whether all ranks have come with the same collective; others wait for each other."""
        return len(given) == self.size and len({name for name, _ in given.values()}) == 1


class Runtime:
    """Implements the Runtime of common/distributed/consensus.py for one process.

    Args:
        world: where it runs.
        process: the process.
        meet: waits for this rank's place among the others; returns it, with the others.
        listen: lets the launcher call a function of the process.
    """

    def __init__(
        self,
        world: World,
        process: Process,
        meet: Callable[[], tuple[Topology, Mesh]],
        listen: Callable[[Any], None],
    ) -> None:
        self._world, self._process, self._meet, self._listen = world, process, meet, listen
        self._mesh: Mesh | None = None
        self._number = 0
        self.topology = Topology(0, 1, 0, 1)

    def init(self, process_sets: Iterable[Sequence[int]] = (), reproducible: bool = False) -> Topology:
        """Starts Horovod, unless it runs."""
        if self._mesh is None:
            self.topology, self._mesh = self._meet()
            self._mesh.join(self.topology.rank, self._process)
            self._number = 0
        return self.topology

    def shutdown(self) -> None:
        """Ends Horovod on all ranks."""
        if self._mesh:
            self._mesh.break_up("Horovod has been shut down")
        self._mesh = None

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self._mesh is None:
            raise LostRank("Horovod has been shut down")
        self._number += 1
        return self._mesh.gather(self._number, self.topology.rank, name, value)

    def allgather_object(self, value: Any) -> list[Any]:
        """Returns every rank's JSON value on all ranks."""
        return [json.loads(text) for text in self.gather("allgather", json.dumps(value))]

    def broadcast_object(self, value: Any) -> Any:
        """Returns rank 0's value on all ranks."""
        return json.loads(self.gather("broadcast", json.dumps(value if self.topology.rank == 0 else None))[0])

    def exchange_arrays(self, outgoing: Sequence[Any]) -> list[Any]:
        """Sends named arrays to each rank; returns those from each."""
        sent = [{name: np.array(array) for name, array in arrays.items()} for arrays in outgoing]
        return [of_rank[self.topology.rank] for of_rank in self.gather("exchange", sent)]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks."""
        total: np.ndarray = np.sum(self.gather("allreduce", np.array(values)), axis=0)
        return total

    def raise_on_all_ranks(self) -> AbstractContextManager[None]:
        """A context from which all ranks raise the same errors, or none raises."""
        return consensus.raise_on_all_ranks(self.allgather_object)

    def check_alike(self, facts: Any) -> None:
        """Raises a ConfigError on all ranks if they were not started alike."""
        consensus.check_alike(facts, self.allgather_object)

    def seed(self, number: int) -> None:
        """There are no random weights."""

    def listen_to_launcher(self, listener: Any) -> None:
        """Lets an elastic launcher call listener.on_hosts_updated(timestamp, change)."""
        self._listen(listener)

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether the error means that another rank has exited."""
        return isinstance(error, LostRank) and consensus.is_lost_rank(error)
