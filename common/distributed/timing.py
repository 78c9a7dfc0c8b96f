"""Measures how long something takes."""

import statistics
from collections.abc import Callable
from time import perf_counter

REPEATS = 5


def median_seconds(action: Callable[[], object]) -> float:
    """The median time of REPEATS calls, in seconds, after one call to warm up."""
    action()
    seconds = []
    for _ in range(REPEATS):
        start = perf_counter()
        action()
        seconds.append(perf_counter() - start)
    return statistics.median(seconds)
