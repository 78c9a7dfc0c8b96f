"""A DataLoader whose batches are this rank's rows of those that the author's loader gives."""

import hashlib
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from common.distributed.topology import Topology
from common.torch.script import part
from common.torch.script.part import Part

import torch
from torch.utils.data import DataLoader, IterableDataset


class Epochs(Protocol):
    """What a loader needs of its run."""

    def begin_epoch(self) -> bool:
        """All ranks take rank 0's state of the random generator. Returns whether the models are trained."""

    def check_order(self, print_of: str) -> None:
        """Compares the ranks' orders of the examples."""

    def begin_batch(self, of_step: Part, is_second: bool) -> None:
        """Called when a batch is given. is_second: in the epoch of another loader, both of them for training."""

    def evaluating_no_rows(self) -> AbstractContextManager[None]:
        """Around a batch without rows."""

    def end_epoch(self, is_training: bool, order: str) -> None:
        """Called when all batches were given."""


class RankLoader:
    """This rank's rows of each global batch of a DataLoader, in the author's order.

    The ranks' parts of a batch differ by at most one row. A rank without a row gets another rank's row, which does not
    count; in an evaluation, it gets a batch without rows. A rank reads only its rows; of a stream, all.

    Args:
        loader: the author's loader; other attributes of this object are its.
        topology: the place of this rank.
        run: what else happens at the begin and end of epochs and batches.
    """

    def __init__(self, loader: DataLoader[Any], topology: Topology, run: Epochs) -> None:
        self._loader, self._topology, self._run = loader, topology, run
        self._parts: deque[Part] = deque()
        self._num_given, self._skipped = 0, 0
        self._at_begin = torch.get_rng_state()
        self._restored: dict[str, Any] = {}
        self._order = hashlib.sha256()  # of the examples of this epoch so far
        is_stream = isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None
        self._inner = None if is_stream else self._with_rows()

    def __len__(self) -> int:
        """The number of global batches."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        outer = part.drawing() and part.current()  # of a training epoch in which this one is an evaluation
        is_training = self._run.begin_epoch()
        if self._restored:
            torch.set_rng_state(self._restored["at_begin"])
        self._at_begin = torch.get_rng_state()
        parts = self._parts = deque()
        self._skipped, self._num_given = self._restored.get("num_given", 0), self._restored.get("num_given", 0)
        batches = iter(self._inner) if self._inner is not None else self._cut(iter(self._loader))
        given: Part | None = None
        try:
            while True:
                with part.reading():
                    batch = next(batches, None)
                if batch is None:
                    break
                if self._restored:
                    torch.set_rng_state(self._restored.pop("now"))
                    self._restored = {}
                given = parts.popleft()
                self._num_given += 1
                self._run.begin_batch(given, is_second=is_training and outer is not None)
                if given.is_empty and not is_training:
                    with self._run.evaluating_no_rows():
                        yield part.without_rows(batch)
                else:
                    yield batch
        except GeneratorExit:  # the loop was left, but its last batch may still be used
            part.set_current(given, is_open=False)
            raise
        self._run.end_epoch(is_training, self._order.hexdigest())
        part.set_current(outer)
        self._num_given = 0

    def state_dict(self) -> dict[str, Any]:
        """Where in its epoch the loader is, and the state of the random generator; for any number of ranks."""
        return {"at_begin": self._at_begin, "num_given": self._num_given, "now": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next epoch goes on after the batches that had been given; of an IterableDataset, they are read again."""
        self._restored = dict(state) if state["num_given"] else {}
        if not state["num_given"]:
            torch.set_rng_state(state["now"])

    def _with_rows(self) -> DataLoader[Any]:
        """A loader of this rank's rows with the author's options, which keeps its workers if the author's does."""
        author = self._loader
        options: dict[str, Any] = {}
        if author.num_workers:
            options = {
                "prefetch_factor": author.prefetch_factor,
                "persistent_workers": author.persistent_workers,
                "multiprocessing_context": author.multiprocessing_context,
            }
        return DataLoader(
            author.dataset,
            batch_sampler=_Rows(self),
            num_workers=author.num_workers,
            collate_fn=author.collate_fn,
            pin_memory=author.pin_memory,
            timeout=author.timeout,
            worker_init_fn=author.worker_init_fn,
            generator=author.generator,
            **options,
        )

    def _cut(self, batches: Iterator[Any]) -> Iterator[Any]:
        parts = self._parts
        self._order = hashlib.sha256()
        for number, batch in enumerate(batches):
            if self._topology.world_size > 1:
                self._order.update(part.fingerprint(batch))
            if not number:
                self._run.check_order(self._order.hexdigest())
            if number < self._skipped:
                continue
            if self._topology.world_size == 1:
                parts.append(Part(0, 1, 1))
                yield batch
                continue
            of_step = part.of_batch(part.num_rows(batch), self._topology)
            parts.append(of_step)
            yield part.take(batch, of_step)

    def rows(self) -> Iterator[list[int]]:
        """The numbers of this rank's examples, batch by batch."""
        order, parts = iter(self._loader.batch_sampler), self._parts  # type: ignore[arg-type]
        self._order = hashlib.sha256()
        for number, examples in enumerate(order):
            self._order.update(repr(list(examples)).encode())
            if not number:
                self._run.check_order(self._order.hexdigest())
            if number < self._skipped:
                continue
            of_step = part.of_batch(len(examples), self._topology)
            parts.append(of_step)
            yield list(examples[of_step.rows])


class _Rows:
    """The sampler of a RankLoader's inner loader."""

    def __init__(self, loader: RankLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self._loader.rows()

    def __len__(self) -> int:
        return len(self._loader)
