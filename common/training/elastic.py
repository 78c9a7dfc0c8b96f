"""Elastic runs: ranks leave and join, and the others go on from the last commit, which each of them has in memory.

`horovodrun --min-np` starts new workers, and tells the running ones. A commit holds what a checkpoint holds, so that
going on with other ranks is a resume, as from a checkpoint of another number of ranks, but within the process.
"""

from typing import Any

from common.config.schema import RunConfig
from common.distributed import launcher_env
from common.distributed.array_exchange import Arrays
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
        sent = _flat(mine) if mine and rank == source else {}
        received = runtime.exchange_arrays([sent, *[{}] * (len(steps) - 1)])[source]
        return _commit(state, received) if rank == 0 else None


membership = Membership()


def check_launch(cfg: RunConfig) -> None:
    """Raises a ConfigError if the configuration and the launcher differ about whether ranks may leave and join."""
    if launcher_env.is_elastic() and not cfg.elastic:
        raise ConfigError(
            ["elastic=false: horovodrun was started with --min-np, for ranks that leave and join; set elastic=true"]
        )
    if cfg.elastic and not launcher_env.is_elastic():
        raise ConfigError([f"elastic=true: ranks can leave and join only under {HOW}; start it so, or leave it out"])


def _flat(commit: Checkpoint) -> Arrays:
    groups = {"weights": commit.weights, "optimizer": commit.optimizer_state, "gradients": commit.gradients}
    return {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}


def _commit(state: dict[str, Any], flat: Arrays) -> Checkpoint:
    groups: dict[str, dict[str, Any]] = {"weights": {}, "optimizer": {}, "gradients": {}}
    for name, array in flat.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    return Checkpoint(MEMORY, groups["weights"], groups["optimizer"], groups["gradients"], state)
