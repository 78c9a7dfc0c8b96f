"""Reads the examples of the next steps while the current one is computed."""

import threading
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from queue import SimpleQueue

from common.data.datasets.examples import Batch, Examples
from common.data.sampler import Step

GROUP = 8  # steps that the reader gets at once: waking it takes longer than reading a small step
DEPTH = 2 * GROUP  # largest number of steps that are read ahead; less than DELAY in common/data/batch_schedule.py


def read_ahead(steps: Iterable[Step], examples: Examples) -> Iterator[tuple[Step, Batch]]:
    """Yields each step with its inputs and targets, while a thread reads those of the following steps."""
    wanted: SimpleQueue[list[Step]] = SimpleQueue()
    taken: SimpleQueue[tuple[Step, Batch] | BaseException] = SimpleQueue()

    def read() -> None:
        while group := wanted.get():
            for step in group:
                try:
                    taken.put((step, examples.get_batch(step.examples, step.epoch)))
                except BaseException as error:
                    taken.put(error)

    reader = threading.Thread(target=read, name="read_ahead")
    reader.start()
    try:
        to_come = iter(steps)
        groups = iter(lambda: list(islice(to_come, GROUP)), [])
        current: list[Step] = []
        for following in chain(groups, [[]]):
            if following:
                wanted.put(following)
            for _ in current:
                batch = taken.get()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
            current = following
    finally:
        wanted.put([])
        reader.join()
