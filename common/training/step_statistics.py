"""How long the steps of a run took, and what this rank has sent in them."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from common.data.datasets.examples import Batch
from common.data.sampler import Step
from common.gradients.bucketing import Bucket, allreduce_bytes
from common.training.goodput import goodput


class StepStatistics:
    """Measures the steps of a run."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: list[float] = []
        self._waiting_seconds: list[float] = []
        self._examples = 0
        self._wire_bytes: list[float] = []  # for each bucket, the sum over all steps

    @property
    def num_steps(self) -> int:
        """Number of finished steps."""
        return len(self._seconds)

    @property
    def wall_seconds(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self._start

    def timed(self, steps: Iterator[tuple[Step, Batch]]) -> Iterator[tuple[Step, Batch]]:
        """Yields the steps, and measures each until the next one is asked for."""
        while True:
            start = time.perf_counter()
            try:
                with goodput.losing("waiting"):
                    step, batch = next(steps)
            except StopIteration:
                return
            waited = time.perf_counter()
            yield step, batch
            self._waiting_seconds.append(waited - start)
            self._seconds.append(time.perf_counter() - start)
            self._examples += step.global_size

    def count_bytes(self, wire_bytes: Sequence[float]) -> None:
        """Adds the bytes that this rank has sent in a step, for each bucket."""
        before = self._wire_bytes or [0.0] * len(wire_bytes)
        self._wire_bytes = [a + b for a, b in zip(before, wire_bytes, strict=True)]

    def summary(self, context: int) -> dict[str, Any]:
        """The values of times for summary.json.

        Args:
            context: number of tokens of an example; 0: examples are no text.
        """
        seconds = sum(self._seconds)
        rate = self._examples / seconds if self._seconds else None  # a run may be resumed at its very end
        return {
            "examples": self._examples,
            "wall_seconds": self.wall_seconds,
            "examples_per_second": rate,
            **({"tokens_per_second": rate and rate * context} if context else {}),
            "step_seconds_median": statistics.median(self._seconds) if self._seconds else None,
            "data_wait_share": sum(self._waiting_seconds) / seconds if self._seconds else None,
        }

    def bytes_per_step(self, buckets: Sequence[Bucket], num_ranks: int) -> dict[str, Any]:
        """The values of bytes for summary.json: means over the steps; a single rank sends nothing.

        Args:
            buckets: the gradient buckets.
            num_ranks: number of ranks with the same weights.
        """
        num_steps = max(1, self.num_steps)
        of_buckets = [total / num_steps for total in self._wire_bytes or [0.0] * len(buckets)]
        return {
            "wire_bytes_per_step": sum(self._wire_bytes) / num_steps,
            "dense_bytes_per_step": allreduce_bytes(4 * sum(bucket.num_values for bucket in buckets), num_ranks),
            "buckets": [
                {"method": bucket.method, "num_values": bucket.num_values, "wire_bytes_per_step": num_bytes}
                for bucket, num_bytes in zip(buckets, of_buckets, strict=True)
            ],
        }
