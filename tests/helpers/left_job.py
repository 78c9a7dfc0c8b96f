"""Three ranks, of which one is killed; the others note when they have closed their connections to each other.

horovodrun -np 3 python -m tests.helpers.left_job FRAMEWORK FOLDER
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import psutil


def main(framework: str, folder: Path) -> None:
    """Sums until rank 2 is gone; a rank that has learned of it stays, as one that will start again does."""
    runtime = importlib.import_module(f"common.{framework}.distributed.runtime")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the launcher, which has learned of it, too
    topology = runtime.init()
    try:
        for turn in range(10**6):
            if turn == 20 and topology.rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            runtime.sum_over_ranks(turn)
    except Exception as error:
        if not runtime.is_lost_rank(error):
            raise
    for _ in range(30):
        if not any(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process().net_connections("tcp")):
            (folder / f"rank-{topology.rank}").touch()
            break
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
