"""A job whose rank 1 fails between two collectives, or is late for one, for tests/recipes/test_recipes.py.

horovodrun -np 2 python -m tests.helpers.troubled_job torch|tf raise|kill|late
"""

import importlib
import os
import signal
import sys
import time
from typing import Any

from common.training import command_line

framework, trouble = sys.argv[1:]
runtime = importlib.import_module(f"common.{framework}.distributed.runtime")


def train(_: Any) -> None:
    """Works until something happens."""
    troubled = runtime.init().rank == 1
    if trouble == "late":
        with runtime.raise_on_all_ranks():
            time.sleep(5 * troubled)
        return
    for step in range(10**6):
        runtime.sum_over_ranks(step)
        if step == 10 and troubled and trouble == "raise":
            raise ValueError("on purpose")
        if step == 10 and troubled:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    train.__module__ = f"recipes.mnist_mlp_{framework}"  # as whose part it runs
    importlib.import_module(train.__module__)
    command_line.run(train, [])
