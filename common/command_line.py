"""The command line of a recipe: key=value overrides in, exit status out."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from common.composition import compose
from common.config import ConfigError, to_yaml
from common.run import TrainingError
from common.topology import Topology

SECONDS_TO_GIVE_WAY = 5
HELP = """\
usage: horovodrun -np N python -m {module} [key=value ...]

{doc}
Keys and their defaults (conf/ has the options of each group):

{defaults}"""


class Runtime(Protocol):
    """What a binding's runtime module offers."""

    def init(self) -> Topology:
        """Starts Horovod."""

    def joint_check(self) -> AbstractContextManager[None]:
        """A block that all ranks leave with the same errors or none."""

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's value on all ranks, and so a point where all wait for rank 0."""

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether the error says that another rank has left."""


def run(train: Callable[[Any], Any], task: str, runtime: Runtime, arguments: Sequence[str] | None = None) -> None:
    """Trains with the configuration of the command line and leaves the process with its status.

    Status 2: the configuration cannot be run; rank 0 says why. Status 1: training failed.
    """
    overrides = sys.argv[1:] if arguments is None else list(arguments)
    topology = runtime.init()
    if {"-h", "--help"} & set(overrides):
        if topology.rank == 0:
            module = sys.modules[train.__module__]
            name = f"recipes.{task}" if module.__spec__ is None else module.__spec__.name
            print(HELP.format(module=name, doc=module.__doc__, defaults=to_yaml(compose(task, []))))
        return
    try:
        with runtime.joint_check():
            cfg = compose(task, overrides)
        train(cfg)
    except ConfigError as error:
        if topology.rank == 0:
            print(error, file=sys.stderr, flush=True)
        # Every rank leaves with its own status: not before rank 0 has spoken, and not by the SIGTERM that the launcher
        # sends as soon as the first one is gone.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        runtime.from_rank_zero(None)
        sys.exit(2)
    except TrainingError as error:  # raised by all ranks at the same step
        if topology.rank == 0:
            print(error, file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception as error:
        if not runtime.is_lost_rank(error):
            raise
        print(f"rank {topology.rank} stops: another rank has left the job", file=sys.stderr, flush=True)
        # The job's status is that of the first rank to leave: this one gives way to the one that failed.
        time.sleep(SECONDS_TO_GIVE_WAY)
        sys.exit(1)
