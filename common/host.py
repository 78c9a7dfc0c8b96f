"""What a rank takes from its host: cores, and how often Horovod wakes up."""

import os

# Milliseconds. With the event-driven edits this is the longest that Horovod's loop sleeps when nothing is posted, and
# long is good. Measured in docs/horovod-build.md.
CYCLE_TIME = "20"


def set_cycle_time() -> None:
    """Gives HOROVOD_CYCLE_TIME a default that suits the event-driven loop; to be called before Horovod starts."""
    if os.environ.get("HOROVOD_EVENT_DRIVEN", "1") == "1":  # Horovod takes other words for 0
        os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_TIME)


def num_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))
