"""Elastic runs: ranks leave and join, and the others go on from the last commit, which each of them has in memory.

`horovodrun --min-np` starts new workers, and tells the running ones. A commit holds what a checkpoint holds, so that
going on with other ranks is a resume, as from a checkpoint of another number of ranks, but within the process.
"""

from common.config.schema import RunConfig
from common.distributed import launcher_env
from common.distributed.consensus import Runtime
from common.errors import ConfigError
from common.training import preemption
from common.training.checkpoint_files import MEMORY, Checkpoint
from common.training.goodput import goodput

HOW = "horovodrun -np 2 --min-np 1 --host-discovery-script FILE"


class RanksChanged(Exception):  # noqa: N818, as nothing is wrong
    """Ranks will leave or join; all have committed, and start again together."""


class Membership:
    """What a process keeps when its ranks change.

    Attributes:
        commit: the last commit.
        folder: the run's folder.
    """

    def __init__(self) -> None:
        self.commit: Checkpoint | None = None
        self.folder: str | None = None
        self._is_listening = False

    def listen(self, runtime: Runtime) -> None:
        """Lets the launcher announce that ranks will leave or join."""
        if not self._is_listening:
            runtime.listen_to_launcher(self)
            self._is_listening = True

    def on_hosts_updated(self, timestamp: int, change: int) -> None:
        """Called by Horovod when the launcher has found other hosts."""
        preemption.announce_change(True)

    def newest(self, runtime: Runtime, rank: int) -> Checkpoint | None:
        """The newest commit of any rank, on rank 0; None on the others, and if there is none. All ranks call it."""
        times = runtime.allgather_object(goodput.state())
        goodput.take_over(max(times, key=lambda each: each["seconds"]))
        mine = self.commit
        steps = runtime.allgather_object(mine.state["position"]["step"] if mine else -1)
        source = steps.index(max(steps))
        if max(steps) < 0:
            return None
        state = runtime.allgather_object(mine.state if mine and rank == source else None)[source]
        if source == 0:
            return mine if rank == 0 else None
        parts = (mine.weights, mine.optimizer_state, mine.gradients) if mine and rank == source else ({}, {}, {})
        weights, optimizer_state, gradients = (
            runtime.exchange_arrays([arrays, *[{}] * (len(steps) - 1)])[source] for arrays in parts
        )
        return Checkpoint(MEMORY, weights, optimizer_state, gradients, state) if rank == 0 else None


membership = Membership()


def check_launch(cfg: RunConfig) -> None:
    """Raises a ConfigError if the configuration and the launcher differ about whether ranks may leave and join."""
    if launcher_env.is_elastic() and not cfg.elastic:
        raise ConfigError(
            ["elastic=false: horovodrun was started with --min-np, for ranks that leave and join; set elastic=true"]
        )
    if cfg.elastic and not launcher_env.is_elastic():
        raise ConfigError([f"elastic=true: ranks can leave and join only under {HOW}; start it so, or leave it out"])
