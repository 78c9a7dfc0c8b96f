"""A job whose rank 1 fails between two collectives, for tests/test_recipes.py.

horovodrun -np 2 python -m tests.failing_job torch|tf raise|kill
"""

import importlib
import os
import signal
import sys
from typing import Any

from common import command_line

framework, how = sys.argv[1:]
runtime = importlib.import_module(f"common.{framework}.runtime")


def train(_: Any) -> None:
    """Works until something happens."""
    rank = runtime.init().rank
    for step in range(10**6):
        runtime.sum_over_ranks(step)
        if step == 10 and rank == 1 and how == "raise":
            raise ValueError("on purpose")
        if step == 10 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    command_line.run(train, "mnist_mlp", runtime, [])
