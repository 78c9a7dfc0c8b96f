"""Who may go on: the rule of a parameter server that does not make workers wait for each other.

Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", 2013,
https://papers.nips.cc/paper/4894
"""

from collections.abc import Sequence


class Clocks:
    """The number of steps that each worker's gradients have arrived of.

    Args:
        workers: their ranks.
        max_staleness: steps that a worker may be ahead of the slowest when it begins another one.

    Attributes:
        steps: by worker.
        staleness: the most that a worker was ahead of the slowest when its gradients arrived, since the last take().
    """

    def __init__(self, workers: Sequence[int], max_staleness: int) -> None:
        self.steps = dict.fromkeys(workers, 0)
        self._max_staleness, self._staleness = max_staleness, 0

    @property
    def slowest(self) -> int:
        """Steps of which all workers' gradients have arrived."""
        return min(self.steps.values())

    @property
    def fastest(self) -> int:
        """Steps of which some worker's gradients have arrived."""
        return max(self.steps.values())

    def tick(self, worker: int) -> None:
        """A worker's gradients have arrived, made from weights that lack the slowest ones' updates since."""
        self._staleness = max(self._staleness, self.steps[worker] - self.slowest)
        self.steps[worker] += 1

    def may_go_on(self, worker: int) -> bool:
        """Whether a worker may begin another step."""
        return self.steps[worker] - self.slowest <= self._max_staleness

    def take_staleness(self) -> int:
        """The largest staleness of gradients that have arrived since the last call."""
        staleness, self._staleness = self._staleness, 0
        return staleness
