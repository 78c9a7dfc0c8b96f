"""All of Horovod's operations at once, from several threads, in another order on each rank, while process sets change.

horovodrun -np N python -m tests.helpers.stress_job SECONDS
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor

NUM_THREADS, BATCH = 3, 8
SUMMED = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
MOVED = (*SUMMED, torch.uint8, torch.int8)
Posted = tuple[int, Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]]]
"""The handle of an operation, and what pairs its result with what is expected."""
SIZES = (0, 1, 7, 1000, 70_000, 1_500_001)


@dataclass
class Operation:
    """An operation that was drawn alike on all ranks: its name, its members, and what it needs."""

    kind: str
    name: str
    process_set: hvd.ProcessSet
    dtype: torch.dtype
    size: int
    root: int

    def value(self, rank: int, size: int | None = None) -> Tensor:
        """The input of a member: small integers, so that sums are exact in all dtypes."""
        return ((torch.arange(self.size if size is None else size) + rank) % 5).to(self.dtype)

    def post(self) -> Posted:
        """Posts the operation."""
        return getattr(self, f"_{self.kind}")({"name": self.name, "process_set": self.process_set})

    @property
    def members(self) -> list[int]:
        """The ranks that take part."""
        return list(self.process_set.ranks)

    def _sum(self, size: int | None = None) -> Tensor:
        return torch.stack([self.value(rank, size) for rank in self.members]).sum(0, dtype=self.dtype)

    def _allreduce(self, options: dict[str, object]) -> Posted:
        handle = hvd.allreduce_async(self.value(hvd.rank()), op=hvd.Sum, **options)
        return handle, lambda result: [(result, self._sum())]

    def _shared(self, options: dict[str, object]) -> Posted:
        values = self.value(hvd.rank())
        block = hvd.shared_memory(values.nbytes)
        if block is not None:
            values = torch.from_numpy(block).view(self.dtype).copy_(values)
        handle = hvd.allreduce_async_(values, op=hvd.Sum, **options)
        return handle, lambda result: [(result, self._sum())]

    def _group(self, options: dict[str, object]) -> Posted:
        sizes = (self.size, 3, self.size // 2)
        values = [self.value(hvd.rank(), size) for size in sizes]
        handle = hvd.grouped_allreduce_async(values, op=hvd.Sum, **options)
        return handle, lambda results: zip(results, map(self._sum, sizes), strict=True)

    def _broadcast(self, options: dict[str, object]) -> Posted:
        handle = hvd.broadcast_async(self.value(hvd.rank()), self.root, **options)
        return handle, lambda result: [(result, self.value(self.root))]

    def _allgather(self, options: dict[str, object]) -> Posted:
        handle = hvd.allgather_async(self.value(hvd.rank(), self.size + hvd.rank()), **options)
        parts = [self.value(rank, self.size + rank) for rank in self.members]
        return handle, lambda result: [(result, torch.cat(parts))]

    def _alltoall(self, options: dict[str, object]) -> Posted:
        splits = torch.tensor([self.size // 8 + place for place in range(len(self.members))], dtype=torch.int32)
        handle = hvd.alltoall_async(self.value(hvd.rank(), int(splits.sum())), splits=splits, **options)
        mine = self.members.index(hvd.rank())
        parts = [self.value(rank, int(splits.sum())).split(splits.tolist())[mine] for rank in self.members]
        return handle, lambda result: [(result[0], torch.cat(parts))]

    def _reducescatter(self, options: dict[str, object]) -> Posted:
        size = self.size + len(self.members)  # each member gets something
        handle = hvd.reducescatter_async(self.value(hvd.rank(), size), op=hvd.Sum, **options)
        part = np.array_split(self._sum(size).numpy(), len(self.members))[self.members.index(hvd.rank())]
        return handle, lambda result: [(result, torch.from_numpy(part))]


KINDS = ("allreduce", "shared", "group", "broadcast", "allgather", "alltoall", "reducescatter")


def batches(thread: int, sets: list[hvd.ProcessSet], end: float) -> int:
    """Posts batches of operations in an order of this rank's own until the time is over; returns their number."""
    alike, own = np.random.default_rng(thread), np.random.default_rng((thread, hvd.rank()))
    is_over, number = False, 0
    while not is_over:
        drawn = []
        for place in range(BATCH):
            kind, process_set = str(alike.choice(KINDS)), sets[alike.integers(len(sets))]
            dtypes = MOVED if kind in ("broadcast", "allgather", "alltoall") else SUMMED
            dtype, size = dtypes[alike.integers(len(dtypes))], int(alike.choice(SIZES))
            root = int(alike.choice(process_set.ranks))
            # A name is used again, for other operations and sizes.
            drawn.append(Operation(kind, f"thread {thread} place {place}", process_set, dtype, size, root))
        mine = [operation for operation in drawn if operation.process_set.included()]
        posted = [(mine[place], *mine[place].post()) for place in own.permutation(len(mine))]
        for place in own.permutation(len(posted)):
            operation, handle, compared = posted[place]
            for result, expected in compared(hvd.synchronize(handle)):
                assert torch.equal(result, expected), (operation, result, expected)
        number += BATCH
        flag = torch.tensor([float(time.monotonic() > end)])
        is_over = bool(hvd.allreduce(flag, op=hvd.Max, name=f"thread {thread} is over"))
    return number


def letters(end: float) -> int:
    """Sends messages to all other ranks until the time is over; returns their number."""
    alike, rank, number = np.random.default_rng(99), hvd.rank(), 0
    others = [other for other in range(hvd.size()) if other != rank]
    is_over = False
    while not is_over:
        size = int(alike.choice(SIZES))
        arriving = [np.zeros(size + 1, np.int32) for _ in others]
        handles = {
            hvd.receive(content, other, f"from {other}"): (other, content)
            for other, content in zip(others, arriving, strict=True)
        }
        for other in others:
            content = np.full(size + 1, rank, np.int32)
            content[-1] = time.monotonic() > end
            hvd.send(content, other, f"from {rank}")
        flags = [time.monotonic() > end]
        while handles:
            waiting = list(handles)
            other, content = handles.pop(waiting[hvd.wait_any(waiting)])
            assert (content[:-1] == other).all()
            flags.append(bool(content[-1]))
            number += 1
        is_over = bool(hvd.allreduce(torch.tensor([float(any(flags))]), op=hvd.Max, name="letters are over"))
    return number


def changing_sets(end: float) -> int:
    """Adds and removes process sets until the time is over; returns their number."""
    alike, is_over, number = np.random.default_rng(98), False, 0
    while not is_over:
        ranks = [0, hvd.size() - 1] if hvd.size() > 2 and alike.random() < 0.5 else [int(alike.integers(hvd.size()))]
        added = hvd.add_process_set(ranks)
        if added.included():
            total = hvd.allreduce(torch.ones(1000), op=hvd.Sum, name="in a new set", process_set=added)
            assert (total == len(ranks)).all()
        assert hvd.remove_process_set(added)
        number += 1
        flag = torch.tensor([float(time.monotonic() > end)])
        is_over = bool(hvd.allreduce(flag, op=hvd.Max, name="sets are over"))
        time.sleep(0.01)
    return number


def main() -> None:
    """Runs everything at once; raises the first error of a thread."""
    size = int(os.environ["HOROVOD_SIZE"])
    subsets = [hvd.ProcessSet(list(range(size - 1))), hvd.ProcessSet(list(range(1, size)))] if size > 2 else []
    hvd.init(process_sets=subsets)
    torch.set_num_threads(1)
    end = time.monotonic() + float(sys.argv[1])
    sets = [hvd.global_process_set, *subsets]
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(batches, thread, sets, end) for thread in range(NUM_THREADS)]
        running += [threads.submit(letters, end), threads.submit(changing_sets, end)]
        counts = [each.result() for each in running]
    print(f"rank {hvd.rank()}: {sum(counts[:-2])} operations, {counts[-2]} messages, {counts[-1]} sets", flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
