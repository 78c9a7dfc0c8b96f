"""Preemption: on SIGTERM, the ranks save a checkpoint after the current step and exit.

Schedulers send SIGTERM before they take a machine away, and horovodrun passes it on to its ranks. The request to
stop is summed with the gradients, so that all ranks stop after the same step.
"""

import signal
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM
CHANGE = 2**12  # more than there are ranks

_requested = _is_change_announced = False


def listen() -> None:
    """From now on, records SIGTERM instead of being ended by it."""

    def note(number: int, frame: FrameType | None) -> None:
        global _requested
        _requested = True

    signal.signal(signal.SIGTERM, note)


def requested() -> bool:
    """Whether this rank was asked to stop."""
    return _requested


def announce_change(is_announced: bool) -> None:
    """Notes whether this rank knows that ranks will leave or join."""
    global _is_change_announced
    _is_change_announced = is_announced


def notice() -> float:
    """What this rank tells the others in each step: 1 if it was asked to stop, and CHANGE if ranks will change."""
    return _requested + CHANGE * _is_change_announced


def is_stop(notices: float) -> bool:
    """Whether the sum of all ranks' notices means that a rank was asked to stop."""
    return notices % CHANGE > 0


def is_change(notices: float) -> bool:
    """Whether the sum of all ranks' notices means that ranks will leave or join."""
    return notices >= CHANGE
