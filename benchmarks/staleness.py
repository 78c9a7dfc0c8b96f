"""Workers of a parameter server of which one is five times slower than the others.

    python -m benchmarks.staleness                                # PyTorch, one server and three workers, 2 minutes
    python -m benchmarks.staleness --framework tf --max-staleness 1000

One job trains mnist_mlp several times: all workers alike, then with one that sleeps in each step, synchronously and
asynchronously. The table has the median step of the other workers, how it compares with their step when all are alike,
the largest staleness and the test accuracy.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.config.composition import compose
from common.config.layout import arranged, process_sets
from common.distributed.launcher_env import launched_topology

NUM_RANKS = 4
SLOWER = 5
EPOCHS = 10
TRAINING = ["parallel=parameter_server", "train.log_every=1"]


def on_rank(framework: str, max_staleness: int, epochs: int, folder: Path) -> None:
    """Runs on each rank; each run's figures are printed by rank 0."""
    runtime: Any = importlib.import_module(f"common.{framework}.distributed.runtime")
    recipe: Any = importlib.import_module(f"recipes.mnist_mlp_{framework}")
    asynchronous = ["parallel.mode=async", f"parallel.max_staleness={max_staleness}"]
    place = launched_topology()
    training = [*TRAINING, f"train.epochs={epochs}"]
    cfg = compose("mnist_mlp", training)
    runtime.init(process_sets(arranged(place, cfg), cfg))
    seconds = 0.0
    runs: list[tuple[str, list[str], bool]] = [
        ("sync, all alike", [], False),
        ("sync, one slow", [], True),
        ("async, all alike", asynchronous, False),
        ("async, one slow", asynchronous, True),
    ]
    for number, (name, overrides, is_slow) in enumerate(runs):
        slow = [f"chaos=slow:rank={NUM_RANKS - 1},seconds={(SLOWER - 1) * seconds}"] if is_slow else []
        summary = recipe.train(compose("mnist_mlp", [*training, *overrides, *slow, f"run.dir={folder / str(number)}"]))
        of_ranks = runtime.allgather_object(summary["step_seconds_median"])
        others = sorted(of_ranks[1:-1])[0]
        seconds = seconds or others
        if place.rank == 0:
            events = [json.loads(line) for line in (folder / str(number) / "metrics.jsonl").read_text().splitlines()]
            staleness = max(event.get("staleness", 0) for event in events)
            print("measured", json.dumps([name, others, staleness, summary["test_accuracy"]]), flush=True)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework", default="torch", choices=["torch", "tf"])
    parser.add_argument("--max-staleness", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each training")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(arguments.framework, arguments.max_staleness, arguments.epochs, arguments.on_rank)
        return
    with tempfile.TemporaryDirectory() as folder:
        launch = ["horovodrun", "--gloo", "-np", str(NUM_RANKS), sys.executable, "-m", "benchmarks.staleness"]
        command = [*launch, *sys.argv[1:], "--on-rank", folder]
        job = subprocess.run(command, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if job.returncode:
        sys.exit(job.stdout)
    rows = [json.loads(line.partition("measured ")[2]) for line in job.stdout.splitlines() if "measured " in line]
    print("| workers | step of the others, ms | speed to all alike | largest staleness | test accuracy |")
    print("| --- | --- | --- | --- | --- |")
    for place, (name, seconds, staleness, accuracy) in enumerate(rows):
        alike = rows[place - place % 2][1]
        print(f"| {name} | {1e3 * seconds:.1f} | {alike / seconds:.2f} | {staleness:.0f} | {accuracy:.3f} |")


if __name__ == "__main__":
    main()
