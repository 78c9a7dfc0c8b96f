"""A job of one rank without Horovod."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from common.distributed.array_exchange import Arrays
from common.distributed.topology import Topology

ALONE = Topology(0, 1, 0, 1)


class OneRank:
    """The runtime of a job of one rank."""

    def init(self, process_sets: Iterable[Sequence[int]] = (), reproducible: bool = False) -> Topology:
        return ALONE

    def seed(self, number: int) -> None: ...

    def raise_on_all_ranks(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check_alike(self, facts: Mapping[str, Any]) -> None: ...

    def broadcast_object(self, value: Any) -> Any:
        return value

    def allgather_object(self, value: Any) -> list[Any]:
        return [value]

    def exchange_arrays(self, outgoing: Sequence[Arrays]) -> Sequence[Arrays]:
        return outgoing

    def shutdown(self) -> None: ...

    def listen_to_launcher(self, listener: Any) -> None: ...

    def is_lost_rank(self, error: BaseException) -> bool:
        return False
