"""The command line of a recipe: key=value overrides in, exit status out."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from common import checkpoint, stopping
from common.agreement import Runtime
from common.composition import compose, group_options
from common.config import ConfigError, RunConfig, to_yaml
from common.errors import TrainingError
from common.host import are_hosts_alike, launched_topology
from common.stopping import Stopped
from common.topology import Topology

SECONDS_TO_GIVE_WAY = 5
SECONDS_TO_MEET = 10
_STATUS = {ConfigError: 2, TrainingError: 1, Stopped: stopping.EXIT_STATUS}
HELP = """\
usage: horovodrun -np N python -m recipes.{name} [key=value ...]

{doc}
Options: {options}

Keys and their values with these options:

{values}"""


def run(train: Callable[[Any], Any], task: str, runtime: Runtime, arguments: Sequence[str] | None = None) -> None:
    """Trains with the configuration of the command line and leaves the process with its status.

    Status 2: the configuration cannot be run; rank 0 says why. Status 1: training failed. Status 143: it was stopped by
    SIGTERM and has left a checkpoint.
    """
    words = sys.argv[1:] if arguments is None else arguments
    overrides = [word for word in words if word not in ("-h", "--help")]
    topology = _started(runtime, _process_sets(task, overrides))
    try:
        with runtime.joint_check():
            cfg = compose(task, overrides)
        if len(overrides) < len(words):
            if topology.rank == 0:
                print(_help(sys.modules[train.__module__], task, cfg))
            return
        stopping.listen()
        train(cfg)
    except (ConfigError, TrainingError, Stopped) as error:  # raised by all ranks together, as a rule
        if topology.rank == 0:
            checkpoint.finish_writing()
            print(error, file=sys.stderr, flush=True)
        # All leave at once, when rank 0 has spoken and without Python's own tidying up: the launcher ends whoever is
        # still there a moment after the first one, and that one would leave with another status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if _meet(runtime):
            runtime.shutdown()
        elif topology.rank > 0:
            print(error, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(_STATUS[type(error)])
    except Exception as error:
        if not runtime.is_lost_rank(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends who is left
        print(f"rank {topology.rank} stops: another rank has left the job", file=sys.stderr, flush=True)
        # The job's status is that of the first rank to leave: this one gives way to the one that failed.
        time.sleep(SECONDS_TO_GIVE_WAY)
        sys.exit(1)


def _started(runtime: Runtime, process_sets: list[Sequence[int]]) -> Topology:
    """Starts Horovod, which refuses ranks that want other process sets than each other."""
    try:
        return runtime.init(process_sets)
    except ValueError:
        print(
            "Horovod could not start, as its message above says; give all ranks the same keys: parallel, "
            "compression.two_level and model.tied decide which ranks exchange something among themselves",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


def _meet(runtime: Runtime) -> bool:
    """Whether all ranks have come here; where a file is lost in the middle of training, one rank comes alone."""
    meeting = threading.Thread(target=runtime.from_rank_zero, args=(None,), daemon=True)
    meeting.start()
    meeting.join(SECONDS_TO_MEET)
    return not meeting.is_alive()


def _process_sets(task: str, overrides: Sequence[str]) -> list[Sequence[int]]:
    """What Horovod must know when it starts, before ranks can agree on what is wrong with a configuration."""
    try:
        cfg = compose(task, overrides)
        return launched_topology().arranged(cfg).process_sets(cfg) if are_hosts_alike() else []
    except (ConfigError, ValueError):
        return []  # the ranks will tell


def _help(recipe: ModuleType, task: str, cfg: RunConfig) -> str:
    """What the recipe is, the options of each group, and all keys with the values of the configuration."""
    options = "  ".join(f"{group}={'|'.join(names)}" for group, names in group_options(task).items())
    return HELP.format(name=Path(str(recipe.__file__)).stem, doc=recipe.__doc__, options=options, values=to_yaml(cfg))
