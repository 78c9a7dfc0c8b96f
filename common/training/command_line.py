"""The command line of a recipe: key=value overrides in, exit status out."""

import errno
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from common.config.composition import compose, group_options
from common.config.layout import arranged, process_sets
from common.config.schema import RunConfig, to_yaml
from common.distributed import launcher_env
from common.distributed.consensus import Runtime, unusable
from common.distributed.launcher_env import are_hosts_alike, launched_topology
from common.distributed.topology import Topology
from common.errors import ConfigError, Stopped, TrainingError
from common.training import checkpoint, preemption
from common.training.elastic import RanksChanged, membership

SECONDS_TO_GIVE_WAY = 5
SECONDS_TO_MEET = 10
DISK_ERRORS = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOSPC, errno.EROFS)
_STATUS = {ConfigError: 2, TrainingError: 1, Stopped: preemption.EXIT_STATUS}
HELP = """\
usage: horovodrun -np N python -m recipes.{name} [key=value ...]

{doc}
Options: {options}

Keys and their values with these options:

{values}"""


def run(train: Callable[[Any], Any], arguments: Sequence[str] | None = None) -> None:
    """Trains with the configuration of the command line; errors end the process with their exit status.

    The name of the module of `train` tells the task and the framework: <task>_<framework>.py.

    Status 2: the configuration cannot be run; rank 0 prints why. Status 1: training failed. Status 143: training was
    stopped by SIGTERM and has saved a checkpoint.
    """
    task, _, framework = Path(str(sys.modules[train.__module__].__file__)).stem.rpartition("_")
    runtime = importlib.import_module(f"common.{framework}.distributed.runtime")
    words = sys.argv[1:] if arguments is None else arguments
    while not _trained(train, task, runtime, words):
        pass


def _trained(train: Callable[[Any], Any], task: str, runtime: Runtime, words: Sequence[str]) -> bool:
    """Trains to the end; False if ranks have changed and the others must start again, as an elastic run does."""
    overrides = [word for word in words if word not in ("-h", "--help")]
    topology = _started(runtime, *_needed_at_start(task, overrides))
    try:
        if launcher_env.is_elastic():
            membership.listen(runtime)
        with runtime.raise_on_all_ranks():
            cfg = compose(task, overrides)
        if len(overrides) < len(words):
            if topology.rank == 0:
                print(_help(sys.modules[train.__module__], task, cfg))
            return True
        preemption.listen()
        train(cfg)
        return True
    except (ConfigError, TrainingError, Stopped) as error:  # usually raised by all ranks together
        _end_together(error, topology, runtime)
    except OSError as error:  # of this rank alone
        if error.errno not in DISK_ERRORS:
            raise
        _end_together(ConfigError([unusable(error)]), topology, runtime)
    except RanksChanged:
        _say(topology, "ranks join or leave")
    except Exception as error:
        if not runtime.is_lost_rank(error):
            raise
        if not launcher_env.is_elastic():
            _give_way(topology)
        _say(topology, "a rank is lost")
    if problem := checkpoint.finish_writing():
        print(f"a checkpoint could not be written: {problem}", file=sys.stderr, flush=True)
    preemption.announce_change(False)  # what is announced from now on may not be known to the next start
    runtime.shutdown()
    return False


def _end_together(error: ConfigError | TrainingError | Stopped, topology: Topology, runtime: Runtime) -> NoReturn:
    """Ends all ranks with the status of an error.

    After rank 0 has printed, all ranks exit together and without Python's cleanup: shortly after the first rank exits,
    the launcher ends the others, and these would exit with another status.
    """
    if topology.rank == 0:
        checkpoint.finish_writing()
        print(error, file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _meet(runtime):
        runtime.shutdown()
    elif topology.rank > 0:
        print(error, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(_STATUS[type(error)])


def _give_way(topology: Topology) -> NoReturn:
    """Ends a rank because another one has left: after it, as the job's status is that of the first rank to exit."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends the remaining ranks
    print(f"rank {topology.rank} stops: another rank has left the job", file=sys.stderr, flush=True)
    time.sleep(SECONDS_TO_GIVE_WAY)
    sys.exit(1)


def _say(topology: Topology, what: str) -> None:
    """Tells once per host why an elastic run starts again."""
    if topology.local_rank == 0:
        print(f"{what}: going on from the last commit", file=sys.stderr, flush=True)


def _started(runtime: Runtime, process_sets: list[Sequence[int]], reproducible: bool) -> Topology:
    """Starts Horovod, which refuses to start if the ranks ask for different process sets."""
    try:
        return runtime.init(process_sets, reproducible)
    except ValueError as error:
        if membership.folder:  # it has run before, with other ranks
            print(f"this rank cannot start again: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        print(
            "Horovod could not start, as its message above says; give all ranks the same keys: parallel, "
            "compression.two_level and model.tied decide which ranks exchange something among themselves",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


def _meet(runtime: Runtime) -> bool:
    """Whether all ranks arrive here; if a file is lost in the middle of training, one rank arrives alone."""
    arrived: list[Any] = []

    def wait_for_others() -> None:
        with suppress(Exception):  # they have left
            arrived.append(runtime.broadcast_object(None))

    meeting = threading.Thread(target=wait_for_others, daemon=True)
    meeting.start()
    meeting.join(SECONDS_TO_MEET)
    return bool(arrived)


def _needed_at_start(task: str, overrides: Sequence[str]) -> tuple[list[Sequence[int]], bool]:
    """The process sets, and whether the run is reproducible, before ranks can agree on errors in a configuration."""
    try:
        cfg = compose(task, overrides)
        sets = process_sets(arranged(launched_topology(), cfg), cfg) if are_hosts_alike() else []
    except (ConfigError, ValueError):
        return [], False  # the error is reported later, by all ranks together
    return sets, cfg.train.reproducible


def _help(recipe: ModuleType, task: str, cfg: RunConfig) -> str:
    """The text of --help: the recipe's docstring, the options of each group, and all keys with their values."""
    options = "  ".join(f"{group}={'|'.join(names)}" for group, names in group_options(task).items())
    return HELP.format(name=Path(str(recipe.__file__)).stem, doc=recipe.__doc__, options=options, values=to_yaml(cfg))
