"""What a rank takes from its host: cores, how often Horovod wakes up, and who it is before Horovod has started."""

import os

from common.topology import Topology

# Milliseconds. With the event-driven edits this is the longest that Horovod's loop sleeps when nothing is posted, and
# long is good. Measured in docs/horovod-build.md. Where some ranks exchange something among themselves, one that has
# nothing to do with it would hold it up as long: the loop serves all process sets in turn.
CYCLE_TIME, CYCLE_TIME_WITH_PROCESS_SETS = "20", "1"


def set_cycle_time(has_process_sets: bool) -> None:
    """Gives HOROVOD_CYCLE_TIME a default that suits the event-driven loop; to be called before Horovod starts."""
    if os.environ.get("HOROVOD_EVENT_DRIVEN", "1") == "1":  # Horovod takes other words for 0
        os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_TIME_WITH_PROCESS_SETS if has_process_sets else CYCLE_TIME)


def num_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def launched_topology() -> Topology:
    """This rank's place as the launcher has put it into the environment; without one: a single rank."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    for prefix in ("HOROVOD_", "OMPI_COMM_WORLD_"):
        values = [os.environ.get(prefix + name) for name in names]
        if all(values):
            return Topology(*map(int, values))  # type: ignore[arg-type]
    return Topology(0, 1, 0, 1)


def are_hosts_alike() -> bool:
    """Whether all hosts have as many ranks as this one, as far as the launcher has told."""
    topology = launched_topology()
    num_hosts = os.environ.get("HOROVOD_CROSS_SIZE", topology.world_size // topology.local_size)
    return int(num_hosts) * topology.local_size == topology.world_size
