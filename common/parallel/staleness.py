"""Which worker of a parameter server may begin another step: the stale synchronous parallel rule.

Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", 2013,
https://papers.nips.cc/paper/4894
"""

from collections.abc import Sequence


class StalenessTracker:
    """Counts the steps of each worker whose gradients have arrived, and bounds how far workers run ahead.

    Args:
        workers: the ranks of the workers.
        max_staleness: number of steps that a worker may be ahead of the slowest one when it begins another step.

    Attributes:
        steps: for each worker, the number of steps whose gradients have arrived.
    """

    def __init__(self, workers: Sequence[int], max_staleness: int) -> None:
        self.steps = dict.fromkeys(workers, 0)
        self._max_staleness, self._staleness = max_staleness, 0

    @property
    def slowest(self) -> int:
        """Number of steps of the slowest worker."""
        return min(self.steps.values())

    @property
    def fastest(self) -> int:
        """Number of steps of the fastest worker."""
        return max(self.steps.values())

    def advance(self, worker: int) -> None:
        """Counts a step of a worker whose gradients have arrived, and notes their staleness."""
        self._staleness = max(self._staleness, self.steps[worker] - self.slowest)
        self.steps[worker] += 1

    def may_go_on(self, worker: int) -> bool:
        """Whether a worker may begin another step."""
        return self.steps[worker] - self.slowest <= self._max_staleness

    def take_staleness(self) -> int:
        """Returns the largest staleness, in steps, of the gradients that have arrived since the last call."""
        staleness, self._staleness = self._staleness, 0
        return staleness
