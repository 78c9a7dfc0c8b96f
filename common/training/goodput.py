"""Where the time of a run goes: useful steps, and what is lost to failures, checkpoints and waiting."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CAUSES = ("restart", "replay", "checkpoint", "waiting")
MOST_STEPS = 1000  # whose ends are kept, where there are no commits


class Goodput:
    """The times of a run in this process, which may start again with other ranks in between.

    A process that joins takes over the times of the oldest one.

    Attributes:
        lost: seconds by cause. restart: from the last step before ranks changed to the end of the first one after it;
            replay: steps that were done and not committed; checkpoint: what steps waited for checkpoints and commits;
            waiting: for examples.
        num_restarts: how often ranks have changed.
        num_replayed: number of steps that were done again.
    """

    def __init__(self) -> None:
        self._start = self._last_end = time.perf_counter()
        self.lost = dict.fromkeys(CAUSES, 0.0)
        self.num_restarts = self.num_replayed = 0
        self._ends: dict[int, float] = {}  # the ends of the steps since the last commit, and of the one before
        self._since_commit = 0.0  # seconds that were lost to other causes in these steps
        self._is_restarting = False

    def begin(self, first_step: int) -> None:
        """A run begins after the step `first_step`; not the first time, if ranks have changed."""
        if self._ends:
            committed = self._ends.get(first_step, self._last_end)
            self.lost["replay"] += max(0.0, self._last_end - committed - self._since_commit)
            self.num_replayed += max(0, max(self._ends) - first_step)
            self.num_restarts += 1
            self._is_restarting = True
        self._ends, self._since_commit = {first_step: time.perf_counter()}, 0.0

    def end_step(self, step: int) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._is_restarting:
            self.lost["restart"] += now - self._last_end
            self._is_restarting = False
        self._last_end = self._ends[step] = now
        if len(self._ends) > MOST_STEPS:
            del self._ends[next(iter(self._ends))]

    @contextmanager
    def losing(self, cause: str) -> Iterator[None]:
        """The time within is lost."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if not self._is_restarting:  # else it is part of the restart
                self.lost[cause] += time.perf_counter() - start
                self._since_commit += time.perf_counter() - start

    def committed(self, step: int) -> None:
        """The steps so far will not be done again."""
        self._ends, self._since_commit = {step: self._last_end}, 0.0

    def state(self) -> dict[str, Any]:
        """The times so far, for a process that takes them over."""
        now = time.perf_counter()
        return {
            "seconds": now - self._start,
            "since_last_step": now - self._last_end,
            "lost": self.lost,
            "num_restarts": self.num_restarts,
            "num_replayed": self.num_replayed,
            "ends": {str(step): now - end for step, end in self._ends.items()},
        }

    def take_over(self, state: dict[str, Any]) -> None:
        """Goes on from the state of another process."""
        now = time.perf_counter()
        self._start, self._last_end = now - state["seconds"], now - state["since_last_step"]
        self.lost, self.num_restarts, self.num_replayed = state["lost"], state["num_restarts"], state["num_replayed"]
        self._ends = {int(step): now - ago for step, ago in state["ends"].items()}

    def summary(self) -> dict[str, Any]:
        """The values of goodput for summary.json."""
        seconds = time.perf_counter() - self._start
        useful = seconds - sum(self.lost.values())
        return {
            "useful_seconds": useful,
            **{f"{cause}_seconds": lost for cause, lost in self.lost.items()},
            "useful_share": useful / seconds,
            "restarts": self.num_restarts,
            "replayed_steps": self.num_replayed,
        }

    def text(self) -> str:
        """The summary in a line."""
        seconds = time.perf_counter() - self._start
        shares = ", ".join(f"{cause} {100 * lost / seconds:.1f} %" for cause, lost in self.lost.items())
        useful = 1 - sum(self.lost.values()) / seconds
        return (
            f"useful time {100 * useful:.1f} %; {shares}; {self.num_restarts} restarts, {self.num_replayed} steps twice"
        )


goodput = Goodput()
