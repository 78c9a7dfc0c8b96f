"""What tests/install/test_horovod.py runs on ranks: collectives in all the ways that the event-driven edits touch.

horovodrun -np N python -m tests.helpers.horovod_job torch|tf PART [PART ...]
"""

import importlib
import os
import sys
import time
from typing import Any

import numpy as np

SETS: dict[tuple[int, ...], Any] = {}


def collectives(hvd: Any, tensor: Any) -> None:
    """Each collective gives what it promises; one rank after another posts late, so that the others wait."""
    rank, size = hvd.rank(), hvd.size()
    for late in range(size):
        time.sleep(0.05 * (rank == late))
        total = hvd.allreduce(tensor([rank, 1.0]), op=hvd.Sum, name="sum")
        assert total.numpy().tolist() == [size * (size - 1) / 2, size]
        pair = hvd.grouped_allreduce([tensor([1.0]), tensor([[2.0]])], op=hvd.Sum, name="group")
        assert [part.numpy().item() for part in pair] == [size, 2 * size]
        gathered = hvd.allgather(tensor([float(rank)] * (rank + 1)), name="ragged")
        assert gathered.numpy().tolist() == [float(other) for other in range(size) for _ in range(other + 1)]
        assert hvd.broadcast(tensor([float(rank)]), late, name=f"from {late}").numpy().tolist() == [late]
        received = hvd.alltoall(tensor([10.0 * rank + other for other in range(size)]), name="all to all")
        received = received[0] if isinstance(received, tuple) else received
        assert received.numpy().tolist() == [10.0 * other + rank for other in range(size)]
        # Under a name that another operation has had, and with unequal parts.
        rows = hvd.reducescatter(tensor([float(row + rank) for row in range(size + 1)]), op=hvd.Sum, name="sum")
        first = rank + (rank > 0)
        expected = [float(size * row + size * (size - 1) / 2) for row in range(first, first + 1 + (rank == 0))]
        assert rows.numpy().tolist() == expected


def process_sets(hvd: Any, tensor: Any) -> None:
    """Sets that overlap work at the same time; a set can come and go."""
    rank, size = hvd.rank(), hvd.size()
    for _ in range(20):
        for members, process_set in SETS.items():
            if rank in members:
                total = hvd.allreduce(tensor([1.0 + rank]), op=hvd.Sum, name=f"{members}", process_set=process_set)
                assert total.numpy().tolist() == [sum(1.0 + member for member in members)]
    assert hvd.allreduce(tensor([1.0]), op=hvd.Sum, name="after sets").numpy().tolist() == [size]
    if size > 2:
        pair = hvd.add_process_set([0, size - 1])
        if pair.included():
            assert hvd.allreduce(tensor([1.0]), op=hvd.Sum, name="pair", process_set=pair).numpy().tolist() == [2]
        assert hvd.remove_process_set(pair)


def broadcast_in_place(hvd: Any, tensor: Any) -> None:
    """TensorFlow's operation that changes variables where they are."""
    variables = [importlib.import_module("tensorflow").Variable([float(hvd.rank() + number)]) for number in range(3)]
    hvd.broadcast_variables(variables, root_rank=1)
    assert [variable.numpy().tolist() for variable in variables] == [[1.0], [2.0], [3.0]]


def rank_one_is_late(hvd: Any, tensor: Any) -> None:
    """Ranks wait for rank 1 longer than the stall check allows."""
    hvd.allreduce(tensor([1.0]), name="all are here")
    time.sleep(6 * (hvd.rank() == 1))
    hvd.allreduce(tensor([1.0]), name="rank 1 is late")


def many_in_flight(hvd: Any, tensor: Any) -> None:
    """Handles posted in another order on each rank."""
    for round_number in range(10):
        order = np.random.default_rng((round_number, hvd.rank())).permutation(50)
        handles = {item: hvd.allreduce_async(tensor([float(item)]), name=f"{item}", op=hvd.Sum) for item in order}
        for item in reversed(order):
            assert hvd.synchronize(handles[item]).tolist() == [item * hvd.size()]


def join(hvd: Any, tensor: Any) -> None:
    """Ranks with unequal numbers of steps, and a barrier after them."""
    rank, size = hvd.rank(), hvd.size()
    for step in range(5 * (rank + 1)):
        working = sum(step < 5 * (other + 1) for other in range(size))
        assert hvd.allreduce(tensor([1.0]), op=hvd.Sum, name="until join").tolist() == [working]
    assert hvd.join() == size - 1
    hvd.barrier()


def main() -> None:
    """Runs the parts three times, with a shutdown and a new start between."""
    framework, *parts = sys.argv[1:]
    if framework == "torch":
        hvd = importlib.import_module("horovod.torch")
        tensor = importlib.import_module("torch").tensor
    else:
        hvd = importlib.import_module("horovod.tensorflow")
        tensor = importlib.import_module("tensorflow").constant
    size = int(os.environ["HOROVOD_SIZE"])
    for _ in range(3):
        SETS.clear()
        if "process_sets" in parts:
            SETS.update({ranks: hvd.ProcessSet(ranks) for ranks in (tuple(range(size - 1)), tuple(range(1, size)))})
        hvd.init(process_sets=list(SETS.values()))
        for part in parts:
            globals()[part](hvd, tensor)
        hvd.shutdown()
    print("all as promised", flush=True)


if __name__ == "__main__":
    main()
