"""What tests/install/test_horovod.py runs on ranks: collectives in all the ways that the event-driven edits touch.

horovodrun -np N python -m tests.helpers.horovod_job torch|tf PART [PART ...]
"""

import importlib
import os
import signal
import sys
import time
from typing import Any

import numpy as np
import pytest
from horovod.common.exceptions import HorovodInternalError

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


def sizes_and_dtypes(hvd: Any, tensor: Any) -> None:
    """Messages of no value, of some, and of several pieces of memory, in every dtype that is summed."""
    rank, size = hvd.rank(), hvd.size()
    for dtype in (np.float16, np.float32, np.float64, np.int32, np.int64):
        for count in (0, 1, 1000, 50_000, 3_000_001):
            of_ranks = [
                np.random.default_rng((other, count)).integers(0, 50, count).astype(dtype) for other in range(size)
            ]
            summed = hvd.allreduce(tensor(of_ranks[rank]), op=hvd.Sum, name=f"sum {dtype.__name__} {count}")
            np.testing.assert_array_equal(summed.numpy(), sum(of_ranks))
    values = [np.arange(3_000_001, dtype=np.float32) * (1 + other) for other in range(size)]
    for op, expected in ((hvd.Min, values[0]), (hvd.Max, values[-1]), (hvd.Product, np.prod(values, axis=0))):
        np.testing.assert_allclose(hvd.allreduce(tensor(values[rank]), op=op, name=f"op {op}").numpy(), expected, 1e-6)
    for root in range(size):
        received = hvd.broadcast(tensor(values[rank]), root, name=f"large from {root}")
        np.testing.assert_array_equal(received.numpy(), values[root])
    gathered = hvd.allgather(tensor(values[rank][: 1_500_000 * rank + 1]), name="large and ragged")
    parts = [values[other][: 1_500_000 * other + 1] for other in range(size)]
    np.testing.assert_array_equal(gathered.numpy(), np.concatenate(parts))
    splits = [[(other + 1) * (to + 1) * 100_000 * (other != to) for to in range(size)] for other in range(size)]
    sent = [np.full(sum(splits[other]), other, np.float32) for other in range(size)]
    received, sizes = hvd.alltoall(
        tensor(sent[rank]), splits=tensor(np.array(splits[rank], np.int32)), name="large to all"
    )
    assert sizes.numpy().tolist() == [splits[other][rank] for other in range(size)]
    expected = np.concatenate([np.full(splits[other][rank], other, np.float32) for other in range(size)])
    np.testing.assert_array_equal(received.numpy(), expected)
    part = hvd.reducescatter(tensor(values[rank]), op=hvd.Sum, name="large part").numpy()
    lengths = [len(values[0]) // size + (other < len(values[0]) % size) for other in range(size)]
    bounds = [0, *np.cumsum(lengths).tolist()]
    np.testing.assert_allclose(part, np.sum(values, axis=0)[bounds[rank] : bounds[rank + 1]], rtol=1e-6)


def bfloat16(hvd: Any, tensor: Any) -> None:
    """bfloat16 is summed in fp32: 256 and ones are 258, where each addition that is rounded gives 256 again."""
    rank, size = hvd.rank(), hvd.size()
    framework = importlib.import_module("torch" if "torch" in hvd.__name__ else "tensorflow")

    def cast(array: Any, name: str) -> Any:
        of_dtype = getattr(framework, name)
        return array.to(of_dtype) if framework.__name__ == "torch" else framework.cast(array, of_dtype)

    def half(array: Any) -> Any:
        return cast(tensor(np.asarray(array, np.float32)), "bfloat16")

    def single(array: Any) -> Any:
        return cast(array, "float32").numpy()

    # Sockets and hosts round each sum that they pass on.
    is_one_host = hvd.local_size() == size and os.environ.get("HOROVOD_SHM") != "0"
    for count in (1, 1000, 3_000_001):
        mine = half(np.full(count, 256.0 if rank == 0 else 1.0))
        summed = single(hvd.allreduce(mine, op=hvd.Sum, name=f"bf16 {count}"))
        expected = single(half(256.0 + size - 1))
        np.testing.assert_allclose(summed, np.full(count, expected), rtol=0 if is_one_host else size * 2**-8)
        part = single(hvd.reducescatter(half([256.0 if rank == 0 else 1.0] * size), op=hvd.Sum, name="bf16 part"))
        assert part == expected
    values = single(half(np.random.default_rng(0).random((size, 40_000)) - 0.5))
    for op, result in (
        (hvd.Average, values.mean(axis=0)),
        (hvd.Min, values.min(axis=0)),
        (hvd.Max, values.max(axis=0)),
        (hvd.Product, values.prod(axis=0)),
    ):
        reduced = single(hvd.allreduce(half(values[rank]), op=op, name=f"bf16 op {op}"))
        np.testing.assert_allclose(reduced, result, rtol=size * 2**-8, atol=size * 2**-9)
    not_finite = single(hvd.allreduce(half([np.inf, np.nan, -np.inf, 3e38]), op=hvd.Sum, name="bf16 not finite"))
    np.testing.assert_array_equal(not_finite, [np.inf, np.nan, -np.inf, np.inf])
    received = hvd.broadcast(half(values[rank]), 1, name="bf16 from 1")
    np.testing.assert_array_equal(single(received), values[1])
    gathered = hvd.allgather(half(values[rank][: rank + 1]), name="bf16 gathered")
    np.testing.assert_array_equal(single(gathered), np.concatenate([values[r][: r + 1] for r in range(size)]))
    exchanged = hvd.alltoall(half(values[rank][:size]), name="bf16 to all")
    exchanged = exchanged[0] if isinstance(exchanged, tuple) else exchanged
    np.testing.assert_array_equal(single(exchanged), values[:, rank])


def memory(hvd: Any, tensor: Any) -> None:
    """Tensors of which all, some or none lie in memory that the ranks share are summed alike; only PyTorch."""
    torch, rank, size = importlib.import_module("torch"), hvd.rank(), hvd.size()
    for count in (7, 100_000, 3_000_001):
        of_ranks = [np.random.default_rng((other, count)).random(count, np.float32) for other in range(size)]
        expected = of_ranks[0].copy()
        for other in of_ranks[1:]:
            expected += other
        for shared_ranks in ((), (0,), tuple(range(size))):
            block = hvd.shared_memory(4 * count)
            is_shared = rank in shared_ranks and block is not None
            values = torch.from_numpy(block).view(torch.float32) if is_shared else torch.empty(count)
            values[:] = torch.from_numpy(of_ranks[rank])
            for target in (
                hvd.allreduce(values, op=hvd.Sum, name="out"),
                hvd.allreduce_(values, op=hvd.Sum, name="in"),
            ):
                np.testing.assert_allclose(target.numpy(), expected, rtol=3e-7)
                alike = hvd.allgather(target[None], name="alike")
                assert (alike == target).all()
    halves = hvd.shared_memory(2 * 100_000)
    if halves is not None:
        values = torch.from_numpy(halves).view(torch.bfloat16).fill_(rank + 1.0)
        assert (hvd.allreduce_(values, op=hvd.Sum, name="bf16 in place") == size * (size + 1) / 2).all()
    freed = hvd.shared_memory(1 << 20)
    if freed is not None:
        freed[:] = 1
        del freed, block, values
        kept = hvd.shared_memory(3 << 20)
        assert not kept.any()
        kept[:] = 7
        child = os.fork()  # as a loader of data does; what it frees stays with its parent
        if not child:
            del kept
            os._exit(0)
        os.waitpid(child, 0)
        assert (kept == 7).all()


def messages(hvd: Any, tensor: Any) -> None:
    """Messages arrive whole, by their names, in the order of sending, whatever the receiver waits for first."""
    rank, size = hvd.rank(), hvd.size()
    after, before = (rank + 1) % size, (rank - 1) % size
    for count in (0, 1, 1000, 3_000_001):
        for number in range(3):
            hvd.send(np.full(count, 10 * rank + number, np.int32), after, "the same name")
        hvd.send(np.array([rank]), after, "another name")
        another = np.zeros(1, int)
        hvd.wait_any([hvd.receive(another, before, "another name")])
        assert another == before
        for number in range(3):
            received = np.zeros(count, np.int32)
            hvd.wait_any([hvd.receive(received, before, "the same name")])
            assert (received == 10 * before + number).all()
    # Posted first, filled first, whichever is waited for.
    both = [np.zeros(1, int), np.zeros(1, int)]
    first, second = (hvd.receive(each, before, "in order") for each in both)
    for number in (1, 2):
        hvd.send(np.array([number]), after, "in order")
    hvd.wait_any([second])
    hvd.wait_any([first])
    assert [int(each[0]) for each in both] == [1, 2]
    # More than a queue holds, before anyone receives.
    for number in range(600):
        hvd.send(np.array([number]), after, f"{number}")
    arrived = [np.zeros(1, int) for _ in range(600)]
    expected = {hvd.receive(each, before, f"{number}"): number for number, each in enumerate(arrived)}
    while expected:
        handles = list(expected)
        number = expected.pop(handles[hvd.wait_any(handles)])
        assert arrived[number] == number
    for mistake in (rank, size, -1):
        with pytest.raises(HorovodInternalError, match=f"not rank {mistake}"):
            hvd.send(np.zeros(1), mistake, "nobody")
    hvd.allreduce(tensor([1.0]), name="all have received")


def rank_one_ends(hvd: Any, tensor: Any) -> None:
    """Rank 1 sends a message and is killed; the message arrives, and who waits for the next one is told."""
    if hvd.rank() == 1:
        hvd.send(np.ones(1), 0, "last words")
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from the launcher, which sees that rank 1 has ended
    last = np.zeros(1)
    hvd.wait_any([hvd.receive(last, 1, "last words")])
    assert last == 1
    hvd.wait_any([hvd.receive(last, 1, "more")])


def work_on(hvd: Any, tensor: Any) -> None:
    """Collectives without end."""
    print("at work", flush=True)
    while True:
        hvd.allreduce(tensor([1.0]), name="on and on")


def rank_one_is_silent(hvd: Any, tensor: Any) -> None:
    """Rank 0 waits for a message longer than the stall check allows."""
    if hvd.rank() == 0:
        hvd.wait_any([hvd.receive(np.zeros(1), 1, "a word")])
    time.sleep(10)


def cached(hvd: Any, tensor: Any) -> None:
    """Broadcasts of one name whose root, shape or dtype changes; a rank that has joined takes part in none."""
    rank, size = hvd.rank(), hvd.size()
    for step in range(12):
        root, shape, dtype = step // 2 % size, (1 + step // 4, 2), (np.float32, np.float64)[step // 6]
        received = hvd.broadcast(tensor(np.full(shape, 10 * rank + step, dtype)), root, name="cached")
        np.testing.assert_array_equal(received.numpy(), np.full(shape, 10 * root + step, dtype))
    if rank == 0:
        hvd.join()
        return
    for _ in range(2):
        with pytest.raises(HorovodInternalError, match="Join"):
            hvd.broadcast(tensor(np.zeros((3, 2))), 1, name="cached")
    hvd.join()


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
