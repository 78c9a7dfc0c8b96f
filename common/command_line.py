"""The command line of a recipe: key=value overrides in, exit status out."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from common.composition import compose, group_options
from common.config import ConfigError, RunConfig, to_yaml
from common.run import TrainingError
from common.topology import Topology

SECONDS_TO_GIVE_WAY = 5
HELP = """\
usage: horovodrun -np N python -m recipes.{name} [key=value ...]

{doc}
Options: {options}

Keys and their values with these options:

{values}"""


class Runtime(Protocol):
    """What a binding's runtime module offers."""

    def init(self) -> Topology:
        """Starts Horovod."""

    def joint_check(self) -> AbstractContextManager[None]:
        """A block that all ranks leave with the same errors or none."""

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's value on all ranks, and so a point where all wait for rank 0."""

    def shutdown(self) -> None:
        """Ends Horovod on all ranks."""

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether the error says that another rank has left."""


def run(train: Callable[[Any], Any], task: str, runtime: Runtime, arguments: Sequence[str] | None = None) -> None:
    """Trains with the configuration of the command line and leaves the process with its status.

    Status 2: the configuration cannot be run; rank 0 says why. Status 1: training failed.
    """
    words = sys.argv[1:] if arguments is None else arguments
    overrides = [word for word in words if word not in ("-h", "--help")]
    topology = runtime.init()
    try:
        with runtime.joint_check():
            cfg = compose(task, overrides)
        if len(overrides) < len(words):
            if topology.rank == 0:
                print(_help(sys.modules[train.__module__], task, cfg))
            return
        train(cfg)
    except (ConfigError, TrainingError) as error:  # raised by all ranks together
        if topology.rank == 0:
            print(error, file=sys.stderr, flush=True)
        # All leave at once, when rank 0 has spoken and without Python's own tidying up: the launcher ends whoever is
        # still there a moment after the first one, and that one would leave with another status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        runtime.from_rank_zero(None)
        runtime.shutdown()
        sys.stdout.flush()
        os._exit(2 if isinstance(error, ConfigError) else 1)
    except Exception as error:
        if not runtime.is_lost_rank(error):
            raise
        print(f"rank {topology.rank} stops: another rank has left the job", file=sys.stderr, flush=True)
        # The job's status is that of the first rank to leave: this one gives way to the one that failed.
        time.sleep(SECONDS_TO_GIVE_WAY)
        sys.exit(1)


def _help(recipe: ModuleType, task: str, cfg: RunConfig) -> str:
    """What the recipe is, the options of each group, and all keys with the values of the configuration."""
    options = "  ".join(f"{group}={'|'.join(names)}" for group, names in group_options(task).items())
    return HELP.format(name=Path(str(recipe.__file__)).stem, doc=recipe.__doc__, options=options, values=to_yaml(cfg))
