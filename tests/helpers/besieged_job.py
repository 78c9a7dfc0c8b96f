"""A job that counts until a file is there, for tests/install/test_security.py; in an elastic job, with its services.

horovodrun -np 2 ... python -m tests.helpers.besieged_job FILE
"""

import sys
from pathlib import Path

import horovod.torch as hvd
import torch


def main() -> None:
    """Rank 0 says how many sums there were, if each was right."""
    hvd.init()
    state = hvd.elastic.TorchState(model=torch.nn.Linear(1, 1), steps=0)

    @hvd.elastic.run
    def count(state: hvd.elastic.TorchState) -> None:
        last = torch.zeros(1)
        (Path(sys.argv[1]).parent / f"rank-{hvd.rank()}").touch()
        while not last:
            last = hvd.allreduce(torch.tensor([float(Path(sys.argv[1]).exists())]), op=hvd.Max, name="last")
            assert (hvd.allreduce(torch.full([1000], hvd.rank() + 1.0), op=hvd.Sum, name="sum") == 3).all()
            state.steps += 1

    count(state)
    if hvd.rank() == 0:
        print(f"{state.steps} right sums", flush=True)


if __name__ == "__main__":
    main()
