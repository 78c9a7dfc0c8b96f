"""Preemption: on SIGTERM, the ranks save a checkpoint after the current step and exit.

Schedulers send SIGTERM before they take a machine away, and horovodrun passes it on to its ranks. The request to
stop is summed with the gradients, so that all ranks stop after the same step.
"""

import signal
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM


_requested = False


def listen() -> None:
    """From now on, records SIGTERM instead of being ended by it."""

    def note(number: int, frame: FrameType | None) -> None:
        global _requested
        _requested = True

    signal.signal(signal.SIGTERM, note)


def requested() -> bool:
    """Whether this rank was asked to stop."""
    return _requested
