"""An elastic job that loses a rank, for tests/install/test_horovod.py: the survivor goes on from the last commit.

horovodrun -np 2 --min-np 1 ... python -m tests.helpers.elastic_job
"""

import os
import signal

import horovod.torch as hvd
import torch

STEPS = 20


def main() -> None:
    """Counts to STEPS; rank 1 of two is killed on the way."""
    hvd.init()
    state = hvd.elastic.TorchState(model=torch.nn.Linear(1, 1), step=0)

    @hvd.elastic.run
    def count(state: hvd.elastic.TorchState) -> None:
        while state.step < STEPS:
            if state.step == STEPS // 2 and hvd.size() == 2 and hvd.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            hvd.allreduce(torch.ones(1000), name="work")
            state.step += 1
            state.commit()

    count(state)
    if hvd.rank() == 0:
        print(f"{hvd.size()} rank counted to {state.step}", flush=True)


if __name__ == "__main__":
    main()
