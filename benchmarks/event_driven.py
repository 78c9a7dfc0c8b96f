"""Horovod's fixed cycle against the event-driven loop: latency of collectives, and the step of a recipe.

    python benchmarks/event_driven.py [ROUNDS]

Each round runs every mode once, so that a noisy minute meets all of them; the table shows medians over the rounds
and is kept in benchmarks/results/event_driven.json.
"""

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

RESULTS = Path(__file__).parent / "results" / "event_driven.json"
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
REPEATS = 40


def measure_latency() -> None:
    """Runs on each rank; rank 0 prints milliseconds, medians, by collective and number of floats."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.set_num_threads(1)

    def median(collective: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            collective()
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds[REPEATS // 4 :])

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


def latency(mode: str, num_ranks: int) -> dict[str, float]:
    """Milliseconds by collective and number of floats."""
    output = launch(mode, num_ranks, __file__, "--on-rank")
    row: dict[str, float] = json.loads(output.partition("row ")[2].splitlines()[0])
    return row


def step(mode: str, num_ranks: int) -> dict[str, float]:
    """Milliseconds of one optimizer step of mnist_mlp, by framework."""
    row = {}
    for framework in ("torch", "tf"):
        with tempfile.TemporaryDirectory() as folder:
            recipe = f"recipes.mnist_mlp_{framework}"
            launch(mode, num_ranks, "-m", recipe, f"run.dir={folder}/run", "train.epochs=10", "train.log_every=1000")
            summary = json.loads(Path(folder, "run", "summary.json").read_text())
        row[f"mnist_mlp_{framework}"] = 1e3 * summary["step_seconds_median"]
    return row


def main() -> None:
    """Command line entry."""
    if "--on-rank" in sys.argv:
        measure_latency()
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(rounds):
        for num_ranks, measure in ((2, latency), (4, latency), (2, step)):
            for mode in MODES:
                print(f"{num_ranks} ranks, {measure.__name__}, {mode}", file=sys.stderr, flush=True)
                for name, milliseconds in measure(mode, num_ranks).items():
                    values[f"{num_ranks} ranks, {name}"][mode].append(milliseconds)
    table = {name: {mode: statistics.median(row[mode]) for mode in MODES} for name, row in values.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"milliseconds": table, "rounds": rounds}, indent=2) + "\n")
    print("|", " | ".join(["ms, medians", *MODES]), "|")
    print("|", " | ".join(["---"] * (len(MODES) + 1)), "|")
    for name, row in table.items():
        print("|", " | ".join([name, *(f"{row[mode]:.2f}" for mode in MODES)]), "|")


if __name__ == "__main__":
    main()
