"""Horovod's collectives and messages within one host, through memory and through sockets, beside those of others.

    python -m benchmarks.collectives            # 2 and 4 ranks, about 2 minutes
    python -m benchmarks.collectives --rounds 1

Each round runs every variant once, so that a noisy minute meets all of them; the table has medians over the rounds and
is kept in benchmarks/results/collectives.json, unless --results names another file. With a Horovod that was built
with MPI, MPI's shared memory is a variant, too.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks import kept

SIZES = (1, 1_000, 100_000, 1_000_000, 4_000_000)
PORT = "29543"
ROUNDS, REPEATS = 5, 41
# Variant -> options of horovodrun, and variables.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "sockets": (["--gloo"], {"HOROVOD_SHM": "0"}),
    "memory": (["--gloo"], {}),
    "torch.distributed": (["--gloo"], {}),
    "MPI": (["--mpi"], {}),
}


def medians(calls: dict[str, Callable[[], Any]], meet: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of each call, medians; the ranks meet before each."""
    row = {}
    for name, call in calls.items():
        seconds = []
        for _ in range(repeats):
            meet()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        row[name] = 1e3 * statistics.median(seconds[repeats // 4 :])
    return row


def of_horovod(repeats: int) -> dict[str, float]:
    """Collectives and messages of Horovod."""
    import horovod.torch as hvd
    import numpy as np
    import torch

    hvd.init()
    torch.set_num_threads(1)
    rank = hvd.rank()
    row: dict[str, float] = {}
    for size in SIZES:
        values, shared, content = torch.zeros(size), hvd.shared_memory(4 * size), np.zeros(size, np.float32)
        calls: dict[str, Callable[[], Any]] = {
            f"allreduce {size:,}": lambda: hvd.allreduce_(values, op=hvd.Sum, name="allreduce"),  # noqa: B023
            f"broadcast {size:,}": lambda: hvd.broadcast_(values, 0, name="broadcast"),  # noqa: B023
        }
        if shared is not None:
            in_place = torch.from_numpy(shared).view(torch.float32)
            calls[f"allreduce in place {size:,}"] = lambda: hvd.allreduce_(in_place, op=hvd.Sum, name="in place")  # noqa: B023

        def there_and_back() -> None:
            if rank < 2:
                handle = hvd.receive(content, 1 - rank, "message")  # noqa: B023
                if rank == 0:
                    hvd.send(content, 1, "message")  # noqa: B023
                hvd.wait_any([handle])
                if rank == 1:
                    hvd.send(content, 0, "message")  # noqa: B023

        if hvd.gloo_enabled():
            calls[f"message there and back {size:,}"] = there_and_back
        row |= medians(calls, hvd.barrier, repeats)
    hvd.barrier()  # the first rank that leaves ends Horovod for all
    return row


def of_torch(repeats: int) -> dict[str, float]:
    """Collectives of torch.distributed over Gloo."""
    import torch
    import torch.distributed as dist

    rank, num_ranks = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=num_ranks)
    torch.set_num_threads(1)
    row: dict[str, float] = {}
    for size in SIZES:
        values = torch.zeros(size)
        calls = {
            f"allreduce {size:,}": lambda: dist.all_reduce(values),  # noqa: B023
            f"broadcast {size:,}": lambda: dist.broadcast(values, 0),  # noqa: B023
        }
        row |= medians(calls, dist.barrier, repeats)
    dist.destroy_process_group()
    return row


def launch(variant: str, num_ranks: int, repeats: int) -> dict[str, float]:
    """Starts a job; milliseconds by call."""
    options, variables = VARIANTS[variant]
    command = ["horovodrun", *options, "-np", str(num_ranks), sys.executable, "-m", "benchmarks.collectives"]
    command += ["--on-rank", variant, "--repeats", str(repeats)]
    output = subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True).stdout
    output = re.sub(r"\[\d+,\d+\]<stdout>:", "", output)  # mpirun's marks, also within a line
    row: dict[str, float] = json.loads(output.partition("row ")[2].splitlines()[0])
    return row


def measure(rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds, medians over the rounds, by what was measured and variant."""
    from horovod.common.util import mpi_built

    variants = [variant for variant in VARIANTS if variant != "MPI" or mpi_built()]
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for num_ranks in (2, 4):
            for variant in variants:
                print(f"{num_ranks} ranks, {variant}", file=sys.stderr, flush=True)
                for name, milliseconds in launch(variant, num_ranks, repeats).items():
                    values[f"{num_ranks} ranks, {name}"][variant].append(milliseconds)
    return {name: {side: statistics.median(of_side) for side, of_side in row.items()} for name, row in values.items()}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each call in a launch")
    kept.add_option(parser, "collectives")
    parser.add_argument("--on-rank", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        row = (of_torch if arguments.on_rank == "torch.distributed" else of_horovod)(arguments.repeats)
        if os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "0":
            print("row", json.dumps(row))
        return
    table = measure(arguments.rounds, arguments.repeats)
    kept.keep(arguments.results, {"milliseconds": table, "rounds": arguments.rounds})
    variants = [variant for variant in VARIANTS if any(variant in row for row in table.values())]
    print("|", " | ".join(["ms, medians", *variants]), "|")
    print("|", " | ".join(["---"] * (len(variants) + 1)), "|")
    for name, row in sorted(table.items(), key=lambda item: (item[0].rpartition(" ")[0], list(table).index(item[0]))):
        figures = (f"{row[variant]:.3f}" if variant in row else "" for variant in variants)
        print("|", " | ".join([name, *figures]), "|")


if __name__ == "__main__":
    main()
