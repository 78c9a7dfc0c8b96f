"""This rank's part of a global batch."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from common.distributed.topology import Topology, bounds
from common.errors import ConfigError

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


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
_last: list[Part] = []
_is_epoch_open = [False]


def current() -> Part | None:
    """The part of the batch that a loader has given last; None after an epoch."""
    return _current[-1] if _current else None


def last() -> Part | None:
    """The part of the batch that was given last, also after its epoch."""
    return _last[-1] if _last else None


def drawing() -> Part | None:
    """The same, but None if the loop over the loader was left: what is drawn then does not belong to the batch."""
    return current() if _is_epoch_open[0] else None


def set_current(part: Part | None, is_open: bool = True) -> None:
    """Makes a part the current one; is_open: whether its loop goes on."""
    _current[:] = [part] if part else []
    _last[:] = _current or _last
    _is_epoch_open[0] = is_open


@contextmanager
def reading() -> Iterator[None]:
    """What is drawn within, by samplers and datasets, does not belong to the batch."""
    was_open, _is_epoch_open[0] = _is_epoch_open[0], False
    try:
        yield
    finally:
        _is_epoch_open[0] = was_open


def of_batch(num_global: int, topology: Topology) -> Part:
    """This rank's part of a global batch; parts differ by at most one row."""
    starts = bounds(num_global, topology.world_size)
    return Part(starts[topology.rank], starts[topology.rank + 1] - starts[topology.rank], num_global)


def take(batch: Any, part: Part) -> Any:
    """The rows of a part, of the tensors and lists of a global batch."""
    if isinstance(batch, Mapping):
        return {name: take(value, part) for name, value in batch.items()}
    if isinstance(batch, PackedSequence):
        raise ConfigError(["a stream gives a PackedSequence, which cannot be cut by rows; pack it in the loop"])
    if isinstance(batch, Tensor):
        return batch[part.rows] if batch.dim() and len(batch) == part.num_global else batch
    if isinstance(batch, list | tuple):
        if len(batch) == part.num_global and not any(isinstance(value, Tensor) for value in batch):
            return batch[part.rows]
        values = [take(value, part) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def without_rows(batch: Any) -> Any:
    """A batch like another one, with no row."""
    if isinstance(batch, Mapping):
        return {name: without_rows(value) for name, value in batch.items()}
    if isinstance(batch, Tensor):
        return batch[:0] if batch.dim() else batch
    if isinstance(batch, list | tuple):
        values = [without_rows(value) for value in batch if isinstance(value, Tensor | list | tuple | Mapping)]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def fingerprint(batch: Any) -> bytes:
    """Bytes that depend on the tensors of a batch."""
    if isinstance(batch, Mapping):
        return b"".join(fingerprint(value) for value in batch.values())
    if isinstance(batch, list | tuple):
        return b"".join(map(fingerprint, batch))
    if not isinstance(batch, Tensor):
        return repr(batch).encode()
    return hashlib.sha256(batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def num_rows(batch: Any) -> int:
    """The number of rows of a batch's first tensor; 0 if it has none."""
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next(filter(None, map(num_rows, values)), 0)
