"""Horovod's fixed cycle against the event-driven loop: latency of collectives, and the step of a recipe.

    python -m benchmarks.event_driven                                 # all modes
    python -m benchmarks.event_driven --rounds 1 --modes "fixed 1 ms,event-driven 20 ms"

Each round runs every mode once, so that a noisy minute meets all of them; the table shows medians over the rounds
and is kept in benchmarks/results/event_driven.json, unless --results names another file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from os import environ
from pathlib import Path
from typing import Any

from benchmarks import kept

# Name -> (HOROVOD_EVENT_DRIVEN, HOROVOD_CYCLE_TIME in milliseconds).
MODES = {
    "fixed 1 ms": ("0", "1"),
    "fixed 5 ms": ("0", "5"),
    "fixed 20 ms": ("0", "20"),
    "event-driven 1 ms": ("1", "1"),
    "event-driven 5 ms": ("1", "5"),
    "event-driven 20 ms": ("1", "20"),
}
NUM_FLOATS = (1, 1_000, 100_000, 1_000_000, 4_000_000)
ROUNDS = 5
REPEATS = 40
EPOCHS = 10


def measure_latency(repeats: int) -> None:
    """Runs on each rank; rank 0 prints milliseconds, medians, by collective and number of floats."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.set_num_threads(1)

    def median(collective: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            collective()
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds[repeats // 4 :])

    row = {}
    for size in NUM_FLOATS:
        tensor = torch.zeros(size)
        row[f"allreduce {size:,}"] = median(lambda: hvd.allreduce_(tensor, op=hvd.Sum, name="allreduce"))  # noqa: B023
        row[f"broadcast {size:,}"] = median(lambda: hvd.broadcast_(tensor, 0, name="broadcast"))  # noqa: B023
    if hvd.rank() == 0:
        print("row", json.dumps(row))


def launch(mode: str, num_ranks: int, *arguments: str) -> str:
    """Starts a job in the mode and returns what it printed."""
    event_driven, cycle_time = MODES[mode]
    variables = {"HOROVOD_EVENT_DRIVEN": event_driven, "HOROVOD_CYCLE_TIME": cycle_time}
    command = ["horovodrun", "--gloo", "-np", str(num_ranks), sys.executable, *arguments]
    return subprocess.run(command, env=environ | variables, check=True, capture_output=True, text=True).stdout


def latency(mode: str, num_ranks: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds by collective and number of floats."""
    work = ["--on-rank", "--repeats", str(arguments.repeats)]
    output = launch(mode, num_ranks, "-m", "benchmarks.event_driven", *work)
    row: dict[str, float] = json.loads(output.partition("row ")[2].splitlines()[0])
    return row


def step(mode: str, num_ranks: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one optimizer step of mnist_mlp, by framework."""
    row = {}
    for framework in ("torch", "tf"):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"run.dir={folder}/run", f"train.epochs={arguments.epochs}", "train.log_every=1000"]
            launch(mode, num_ranks, "-m", f"recipes.mnist_mlp_{framework}", *overrides)
            summary = json.loads(Path(folder, "run", "summary.json").read_text())
        row[f"mnist_mlp_{framework}"] = 1e3 * summary["step_seconds_median"]
    return row


def some_modes(text: str) -> list[str]:
    """Modes of the command line."""
    modes = text.split(",")
    if unknown := set(modes).difference(MODES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(MODES)}")
    return modes


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds, medians over the rounds, by what was measured and mode."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(arguments.rounds):
        for num_ranks, side in ((2, latency), (4, latency), (2, step)):
            for mode in arguments.modes:
                print(f"{num_ranks} ranks, {side.__name__}, {mode}", file=sys.stderr, flush=True)
                for name, milliseconds in side(mode, num_ranks, arguments).items():
                    values[f"{num_ranks} ranks, {name}"][mode].append(milliseconds)
    return {name: {mode: statistics.median(row[mode]) for mode in arguments.modes} for name, row in values.items()}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--modes", type=some_modes, default=list(MODES), help=f"some of {','.join(MODES)}")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each collective in a launch")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the recipe in a launch")
    kept.add_option(parser, "event_driven")
    parser.add_argument("--on-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        measure_latency(arguments.repeats)
        return
    table = measure(arguments)
    results = kept.load(arguments.results)
    for name, row in table.items():
        results.setdefault("milliseconds", {}).setdefault(name, {}).update(row)
    kept.keep(arguments.results, results | {"rounds": arguments.rounds})
    print("|", " | ".join(["ms, medians", *arguments.modes]), "|")
    print("|", " | ".join(["---"] * (len(arguments.modes) + 1)), "|")
    for name, row in table.items():
        print("|", " | ".join([name, *(f"{row[mode]:.2f}" for mode in arguments.modes)]), "|")


if __name__ == "__main__":
    main()
