"""What failures cost: an elastic run, one that a supervisor starts again from checkpoints, and one without failures.

    python -m benchmarks.goodput                              # a failure every 30, 60 and 120 s, 35 minutes
    python -m benchmarks.goodput --every 60 --seconds 180     # 10 minutes
    python -m benchmarks.goodput --framework tf

Two ranks, on two names for this host, train transformer_lm for so many steps as take `--seconds` without failures. With
`kill -9`, a rank is lost whenever the run has made the steps of so many seconds. The goodput is the time without
failures over the time with them. The elastic run commits every 10 steps, and a host that lost its rank is used again
after about 2 s; the supervised run has a checkpoint every 10 s, and 1 s between its starts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept
from recipes.commands import elastic_demo

NUM_RANKS = 2
SECONDS_BETWEEN_CHECKPOINTS = 10
FEW_STEPS = 100


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework", default="torch", choices=["torch", "tf"])
    parser.add_argument("--every", default="30,60,120", help="seconds between two failures, separated by commas")
    parser.add_argument("--seconds", type=float, default=240, help="of the run without failures")
    kept.add_option(parser, "goodput")
    arguments = parser.parse_args()
    results = kept.load(arguments.results)
    with tempfile.TemporaryDirectory() as name:
        rows = _measured(arguments, Path(name))
    kept.keep(arguments.results, results | rows)
    print("| run | failure every | seconds | goodput | restarts | steps twice |")
    print("| --- | --- | --- | --- | --- | --- |")
    for key, row in rows.items():
        counts = f"{row['restarts']} | {row['replayed_steps']}"
        print(f"| {key} | {row['every'] or '-'} | {row['seconds']:.1f} | {row['goodput']:.2f} | {counts} |")


def _measured(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table by their names."""
    job = _Job(arguments.framework, folder)
    of_step = job.plain(FEW_STEPS)["step_seconds_median"]
    num_steps = max(FEW_STEPS, round(arguments.seconds / of_step))
    whole = _timed(lambda: job.plain(num_steps))
    rows = {f"{arguments.framework}, undisturbed": _row(0, whole, whole)}
    for every in map(float, arguments.every.split(",")):
        kills = [f"kill:rank={number % NUM_RANKS},step={step}" for number, step in _steps(every / of_step, num_steps)]
        chaos = f"chaos={';'.join(kills)}"
        between = max(1, round(min(SECONDS_BETWEEN_CHECKPOINTS, every / 3) / of_step))
        found = _timed(lambda chaos=chaos: job.elastic(num_steps, chaos))
        rows[f"{arguments.framework}, elastic {every:g}"] = _row(every, found, whole)
        found = _timed(lambda chaos=chaos, between=between: job.supervised(num_steps, chaos, between))
        rows[f"{arguments.framework}, supervised {every:g}"] = _row(every, found, whole) | {"restarts": len(kills)}
    return rows


def _steps(every: float, num_steps: int) -> list[tuple[int, int]]:
    """The failures, by number: the steps before which they happen."""
    num_failures = int((num_steps - 2) / every)
    return [(number, round((number + 1) * every)) for number in range(num_failures)]


def _timed(train: Any) -> tuple[float, dict[str, Any]]:
    start = time.perf_counter()
    summary = train()
    return time.perf_counter() - start, summary


def _row(every: float, found: tuple[float, dict[str, Any]], whole: tuple[float, dict[str, Any]]) -> dict[str, Any]:
    seconds, summary = found
    lost = summary["goodput"]
    return {
        "every": every,
        "seconds": seconds,
        "goodput": whole[0] / seconds,
        "restarts": lost["restarts"],
        "replayed_steps": lost["replayed_steps"],
        "lost": lost,
    }


class _Job:
    """The same training, in several ways."""

    def __init__(self, framework: str, folder: Path) -> None:
        self._module, self._folder, self._number = f"recipes.transformer_lm_{framework}", folder, 0
        self._elastic = elastic_demo.two_hosts(folder)

    def plain(self, num_steps: int) -> dict[str, Any]:
        return self._train([], [], num_steps)

    def elastic(self, num_steps: int, *overrides: str) -> dict[str, Any]:
        return self._train([], self._elastic, num_steps, "elastic=true", *overrides)

    def supervised(self, num_steps: int, chaos: str, between: int) -> dict[str, Any]:
        supervisor = [sys.executable, "-m", "recipes", "supervise", "backoff=1", "--"]
        return self._train(supervisor, [], num_steps, chaos, f"train.checkpoint_every={between}")

    def _train(self, before: Sequence[str], options: Sequence[str], num_steps: int, *overrides: str) -> dict[str, Any]:
        self._number += 1
        folder = self._folder / str(self._number)
        launcher = ["horovodrun", "--gloo", "-np", str(NUM_RANKS), *options, sys.executable, "-m", self._module]
        words = [f"run.dir={folder}", f"train.max_steps={num_steps}", "train.epochs=1000", *overrides]
        # Each name counts as a host with all cores.
        env = os.environ | {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        job = subprocess.run([*before, *launcher, *words], env=env, capture_output=True, text=True)
        if job.returncode:
            sys.exit(f"status {job.returncode}: {' '.join(words)}\n{job.stdout[-2000:]}\n{job.stderr[-2000:]}")
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return summary


if __name__ == "__main__":
    main()
