"""What a rank learns from its host before Horovod starts: its place in the job, its cores, Horovod's settings."""

import os
import shlex
import sys
from collections.abc import Sequence

from common.distributed.topology import Topology

# In milliseconds. With the event-driven edits this is the longest time that Horovod's loop sleeps while nothing is
# posted; longer is better (measurements: docs/horovod-build.md). The loop serves all process sets in turn. The ranks of
# a host wake each other for that, but a rank of another host that sleeps delays an exchange in which it takes no part.
CYCLE_TIME, CYCLE_TIME_IF_OTHERS_SLEEP = "20", "1"
# In seconds. Ranks that wait for each other so long have taken different steps: the job ends then.
LONGEST_WAIT = "1800"


def set_defaults(has_process_sets: bool) -> None:
    """Sets Horovod's longest wait, and the cycle time that suits its loop; must be called before Horovod starts."""
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", LONGEST_WAIT)
    if os.environ.get("HOROVOD_EVENT_DRIVEN", "1") != "1":  # Horovod reads other words as 0
        return
    topology = launched_topology()
    wakes_all = topology.local_size == topology.world_size and os.environ.get("HOROVOD_SHM") != "0"
    cycle_time = CYCLE_TIME_IF_OTHERS_SLEEP if has_process_sets and not wakes_all else CYCLE_TIME
    os.environ.setdefault("HOROVOD_CYCLE_TIME", cycle_time)


def num_threads(topology: Topology) -> int:
    """This rank's share of its host's cores; 1 in an elastic job, whose hosts may get more ranks and fewer."""
    return 1 if is_elastic() else topology.num_threads(num_cores())


def is_elastic() -> bool:
    """Whether horovodrun was started with --min-np."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def job() -> str:
    """A name of the job, the same on all its ranks; "" without horovodrun."""
    address, port = (os.environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{name}", "") for name in ("ADDR", "PORT"))
    return f"{address}:{port}" if port else ""


def num_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def launched_topology() -> Topology:
    """This rank's place from the launcher's environment variables; without a launcher: a single rank."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    for prefix in ("HOROVOD_", "OMPI_COMM_WORLD_"):
        values = [os.environ.get(prefix + name) for name in names]
        if all(values):
            return Topology(*map(int, values))  # type: ignore[arg-type]
    return Topology(0, 1, 0, 1)


def are_hosts_alike() -> bool:
    """Whether all hosts have as many ranks as this one, by the launcher's environment variables."""
    topology = launched_topology()
    num_hosts = os.environ.get("HOROVOD_CROSS_SIZE", topology.world_size // topology.local_size)
    return int(num_hosts) * topology.local_size == topology.world_size


def refuse_other_launchers() -> None:
    """Exits with status 2 if a launcher that Horovod does not know has started several of these programs.

    Each of them would train alone. To be called if Horovod sees a single rank.
    """
    name, num_tasks, number = next((found for found in _started_by_others() if found[1] > 1), ("", 1, 0))
    if num_tasks == 1 or "HOROVOD_RANK" in os.environ:
        return
    if number == 0:
        command = shlex.join(["python", *sys.orig_argv[1:]])
        print(
            f"{name}={num_tasks}: this program was started {num_tasks} times, and Horovod knows nothing of it: each "
            f"would train on its own; start it once, with: horovodrun -np {num_tasks} {command}",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(2)


def _started_by_others() -> list[tuple[str, int, int]]:
    """For torchrun, mpirun and srun: the variable, the number of programs, and the number of this program."""
    names = [("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")]
    if "SLURM_STEP_ID" in os.environ:  # otherwise this is the script of a batch job, which runs once
        of_step = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        names.append((of_step, "SLURM_PROCID"))
    return [(size, _integer(size, 1), _integer(rank, 0)) for size, rank in names]


def _integer(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def say_who_shares(gpus: Sequence[str], rank: int) -> None:
    """On rank 0, prints which ranks share a GPU, if any.

    Args:
        gpus: for each rank, a unique name of its GPU.
        rank: the number of this rank.
    """
    sharing = [[other for other, name in enumerate(gpus) if name == gpu] for gpu in dict.fromkeys(gpus)]
    for ranks in sharing:
        if rank == 0 and len(ranks) > 1:
            print(f"ranks {ranks} share one GPU: slower than one rank each (horovodrun -np, -H)", file=sys.stderr)
