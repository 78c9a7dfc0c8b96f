"""Reads the examples of the next steps while the current one is computed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from common.datasets.examples import Batch, Examples
from common.sharding import Step

DEPTH = 2  # steps; fewer than common/batch_size.py's DELAY


def read_ahead(steps: Iterable[Step], examples: Examples) -> Iterator[tuple[Step, Batch]]:
    """Each step with its inputs and targets; a thread takes those of the DEPTH steps that follow."""
    waiting: deque[tuple[Step, Future[Batch]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_ahead") as reader:
        for step in steps:
            waiting.append((step, reader.submit(examples.take, step.examples, step.epoch)))
            if len(waiting) > DEPTH:
                first, batch = waiting.popleft()
                yield first, batch.result()
        while waiting:
            first, batch = waiting.popleft()
            yield first, batch.result()
