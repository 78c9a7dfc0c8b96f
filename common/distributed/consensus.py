"""How ranks agree on whether to continue: if a check fails on one rank, every rank raises."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, Protocol

from common.distributed.array_exchange import Arrays
from common.distributed.topology import Topology
from common.errors import ConfigError, TrainingError


class Runtime(Protocol):
    """The interface of a framework's runtime module."""

    def init(self, process_sets: Iterable[Sequence[int]] = (), reproducible: bool = False) -> Topology:
        """Starts Horovod."""

    def seed(self, number: int) -> None:
        """Seeds the random numbers for the initial weights, the same on all ranks."""

    def raise_on_all_ranks(self) -> AbstractContextManager[None]:
        """A context from which all ranks raise the same errors, or none raises."""

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raises a ConfigError on all ranks if they were not started alike."""

    def broadcast_object(self, value: Any) -> Any:
        """Returns rank 0's value on all ranks, which wait for rank 0."""

    def allgather_object(self, value: Any) -> list[Any]:
        """Returns every rank's JSON value, in the order of ranks, on all ranks."""

    def exchange_arrays(self, outgoing: Sequence[Arrays]) -> Sequence[Arrays]:
        """Sends named arrays to each rank; returns the arrays received from each rank."""

    def shutdown(self) -> None:
        """Ends Horovod on all ranks."""

    def listen_to_launcher(self, listener: Any) -> None:
        """Lets an elastic launcher call listener.on_hosts_updated(timestamp, change) when hosts come or go."""

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether the error means that another rank has exited."""


@contextmanager
def raise_on_all_ranks(gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """If the block fails on one rank, every rank raises the errors of all ranks.

    An OSError (a file or folder that cannot be used) counts as a ConfigError.

    Args:
        gather: returns each rank's value on all ranks, in the order of ranks.

    Raises:
        ConfigError: with the problems of all ranks, each once.
        TrainingError: likewise, if no rank has a ConfigError.
    """
    problems: list[str] = []
    failures: list[str] = []
    try:
        yield
    except ConfigError as error:
        problems = error.problems
    except TrainingError as error:
        failures = [str(error)]
    except OSError as error:
        problems = [unusable(error)]
    everyones = gather([problems, failures])
    all_problems, all_failures = (list(dict.fromkeys(chain(*kind))) for kind in zip(*everyones, strict=True))
    if all_problems:
        raise ConfigError(all_problems) from None
    if all_failures:
        raise TrainingError("\n".join(all_failures)) from None


def unusable(error: OSError) -> str:
    """The problem of a file or folder that cannot be used; a disk without room does not say which."""
    name = error.filename or "a file of the run"
    return f"{name}: {error.strerror}; choose a path that can be used (run.dir, data.root, data.path)"


def check_alike(facts: Mapping[str, Any], gather: Callable[[Any], list[Any]]) -> None:
    """Checks that all ranks were started alike; all ranks must call it.

    Args:
        facts: the facts of this rank by name, as JSON values (see provenance.facts()).
        gather: returns each rank's value on all ranks, in the order of ranks.

    Raises:
        ConfigError: facts differ between ranks; the message lists their values by rank.
    """
    content = json.dumps(facts, sort_keys=True).encode()
    if len(set(gather(hashlib.sha256(content).hexdigest()))) == 1:
        return
    everyones = gather(dict(facts))
    problems = []
    for name in sorted({name for of_rank in everyones for name in of_rank}):
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(everyones):
            ranks.setdefault(json.dumps(of_rank.get(name)), []).append(rank)
        if len(ranks) > 1:
            values = "; ".join(f"{_ranks(of_value)}: {value}" for value, of_value in ranks.items())
            problems.append(f"{name}: differs between ranks, which must be started alike ({values}); {_remedy(name)}")
    raise ConfigError(problems)


def _ranks(numbers: Sequence[int]) -> str:
    """The text for a list of ranks; it names at most eight of them."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}{' and more' if len(numbers) > 8 else ''}"


def _remedy(name: str) -> str:
    remedies = {
        "training set": "give all ranks the same data.root or data.path, with the same files",
        "number of threads": "set OMP_NUM_THREADS (torch) or TF_NUM_INTRAOP_THREADS (tf) alike, as sums are rounded so",
        "code": "copy this folder to all hosts again",
    }
    of_version = "install the same version on all hosts (make setup)"
    return remedies.get(name, of_version if name.startswith("version of") else "start all ranks with the same keys")


def assert_weights_in_sync_in_groups(
    digest: str, groups: Sequence[Sequence[int]], gather: Callable[[Any], list[Any]]
) -> str:
    """Checks that the ranks of each group hold the same weights; returns one digest for all groups.

    Raises:
        TrainingError: the ranks of a group hold different weights.
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
    """Whether the error of a collective means that another rank has exited, not that the ranks' requests differ."""
    signs = ("Horovod has been shut down", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
    return any(sign in str(error) for sign in signs)
