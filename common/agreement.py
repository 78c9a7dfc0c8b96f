"""How ranks agree on whether to go on: what is wrong on one, all raise."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from common.config import ConfigError
from common.run import TrainingError
from common.topology import Topology


class Runtime(Protocol):
    """What a binding's runtime module offers."""

    def init(self, process_sets: Iterable[Sequence[int]] = ()) -> Topology:
        """Starts Horovod."""

    def joint_check(self) -> AbstractContextManager[None]:
        """A block that all ranks leave with the same errors or none."""

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's value on all ranks, and so a point where all wait for rank 0."""

    def shutdown(self) -> None:
        """Ends Horovod on all ranks."""

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether the error says that another rank has left."""


@contextmanager
def joint_check(gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Every rank leaves this block without an error, or every rank leaves it with the ConfigErrors of all.

    A file or folder that cannot be used counts as one.

    Args:
        gather: gives each rank's value to all ranks, in the order of ranks.

    Raises:
        ConfigError: with the problems of all ranks, each once.
    """
    problems: list[str] = []
    try:
        yield
    except ConfigError as error:
        problems = error.problems
    except OSError as error:
        problems = [
            f"{error.filename}: {error.strerror}; choose a path that can be used (run.dir, data.root, data.path)"
        ]
    everyones = [problem for of_rank in gather(problems) for problem in of_rank]
    if everyones:
        raise ConfigError(list(dict.fromkeys(everyones))) from None


def same_in_groups(digest: str, groups: Sequence[Sequence[int]], gather: Callable[[Any], list[Any]]) -> str:
    """Checks that the ranks of each group hold the same weights; returns one digest for all.

    Raises:
        TrainingError: ranks hold different ones.
    """
    digests = gather(digest)
    for first, *others in groups:
        differing = [rank for rank in others if digests[rank] != digests[first]]
        if differing:
            raise TrainingError(
                f"ranks {differing} hold other weights than rank {first}: gradients were not exchanged alike"
            )
    of_groups = [digests[first] for first, *_ in groups]
    return of_groups[0] if len(of_groups) == 1 else hashlib.sha256("".join(of_groups).encode()).hexdigest()


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error of a collective says that another rank has left, not that ranks asked for unlike things."""
    signs = ("Horovod has been shut down", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
    return any(sign in str(error) for sign in signs)
