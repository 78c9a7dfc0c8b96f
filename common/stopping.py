"""SIGTERM: the ranks save a checkpoint after the step that they are in, and leave.

Schedulers send it before they take a machine away, and horovodrun passes it on to its ranks. Whether to stop is summed
with the gradients, so that all ranks stop after the same step.
"""

import signal
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM


class Stopped(Exception):  # noqa: N818, as nothing is wrong
    """Training ended early, with a checkpoint, because a rank was asked to stop."""


_requested = False


def listen() -> None:
    """Notes SIGTERM from here on instead of dying of it."""

    def note(number: int, frame: FrameType | None) -> None:
        global _requested
        _requested = True

    signal.signal(signal.SIGTERM, note)


def requested() -> bool:
    """Whether this rank was asked to stop."""
    return _requested
