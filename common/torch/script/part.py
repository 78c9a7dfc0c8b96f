"""This rank's part of a global batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.data.sampler import bounds
from common.distributed.topology import Topology

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a global batch.

    Attributes:
        start: number of this rank's first row in the global batch.
        num_rows: number of this rank's rows; may be 0.
        num_global: number of rows of the global batch.
    """

    start: int
    num_rows: int
    num_global: int

    @property
    def is_empty(self) -> bool:
        """Whether this rank has no row. It then takes part with another rank's row, which does not count."""
        return self.num_rows == 0

    @property
    def first(self) -> int:
        """Number of the first row that this rank computes."""
        return min(self.start, self.num_global - 1)

    @property
    def num_computed(self) -> int:
        """Number of rows that this rank computes, at least 1."""
        return max(self.num_rows, 1)

    @property
    def share(self) -> float:
        """This rank's share of the rows of the global batch."""
        return self.num_rows / self.num_global

    @property
    def rows(self) -> slice:
        """The rows that this rank computes."""
        return slice(self.first, self.first + self.num_computed)


_current: list[Part] = []


def current() -> Part | None:
    """The part of the batch that a loader has given last; None outside of an epoch."""
    return _current[-1] if _current else None


def set_current(part: Part | None) -> None:
    """Makes a part the current one."""
    _current[:] = [part] if part else []


def of_batch(num_global: int, topology: Topology) -> Part:
    """This rank's part of a global batch; parts differ by at most one row."""
    starts = bounds(num_global, topology.world_size)
    return Part(starts[topology.rank], starts[topology.rank + 1] - starts[topology.rank], num_global)


def take(batch: Any, part: Part) -> Any:
    """The rows of a part, of the tensors and lists of a global batch."""
    if isinstance(batch, Mapping):
        return {name: take(value, part) for name, value in batch.items()}
    if isinstance(batch, Tensor):
        return batch[part.rows] if batch.dim() and len(batch) == part.num_global else batch
    if isinstance(batch, list | tuple):
        if len(batch) == part.num_global and not any(isinstance(value, Tensor) for value in batch):
            return batch[part.rows]
        values = [take(value, part) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def num_rows(batch: Any) -> int:
    """The number of rows of a batch's first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, Tensor):
        return len(batch)
    return (
        next(filter(None, map(num_rows, values)), 0) if isinstance(values, list | tuple) or values is not batch else 0
    )
