"""What a recipe spends on anything but training, on 2 ranks: waiting for data, logging, checkpoints, starting.

    python -m benchmarks.overheads [RECIPE ...]

Waiting, logging and checkpoints are shares of the step's time in one run of the recipe's defaults, with a checkpoint
every 100 steps. Starting is the time from the command to the end of the first step, in parts; medians of 5 launches.
benchmarks/results/overheads.json keeps what was measured, unless --results names another file.
"""

import time

STARTED = time.time()  # before anything is imported

import argparse  # noqa: E402
import importlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import wraps  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks import kept  # noqa: E402

RECIPES = ("mnist_mlp_torch", "transformer_lm_torch")  # unless others are named
LAUNCHES = 5
STEPS = 400
COMMAND_AT = "COMMAND_AT"  # in the environment: when the launcher was started


def clocked(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The method, which notes how long each call takes."""

    @wraps(method)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - start)

    return timed


def on_rank(recipe: str, folder: str, steps: int) -> None:
    """Trains on each rank; rank 0 prints what it noted."""
    module = importlib.import_module(f"recipes.{recipe}")
    imported = time.time()
    from common.config.composition import compose
    from common.training.checkpoint import Checkpoints
    from common.training.run_log import RunLog

    task, _, framework = recipe.rpartition("_")
    runtime = importlib.import_module(f"common.{framework}.distributed.runtime")
    topology = runtime.init()
    joined = time.time()
    logging: list[float] = []
    saving: list[float] = []
    first: list[float] = []
    record = clocked(RunLog.record, logging)

    def note_first(*arguments: Any) -> None:
        record(*arguments)
        first.append(time.time())

    setattr(RunLog, "record", note_first)  # noqa: B010
    setattr(Checkpoints, "save_if_due", clocked(Checkpoints.save_if_due, saving))  # noqa: B010
    cfg = compose(task, [f"run.dir={folder}/run", f"train.max_steps={steps}", "train.checkpoint_every=100"])
    summary = module.train(cfg)
    if topology.rank == 0:
        ends = [float(os.environ[COMMAND_AT]), STARTED, imported, joined, first[0]]
        training = steps * summary["step_seconds_median"]
        shares = {"data": summary["data_wait_share"], "logging": sum(logging) / training}
        shares["checkpoints"] = sum(saving[:-1]) / training  # the last one waits until it is written
        print("noted", json.dumps({"ends": ends, "shares": shares}), flush=True)


def launch(recipe: str, steps: int) -> dict[str, Any]:
    """Starts 2 ranks and returns what rank 0 noted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "benchmarks.overheads", recipe]
        command += ["--on-rank", folder, "--steps", str(steps)]
        environment = os.environ | {COMMAND_AT: str(time.time())}
        job = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "noted " not in job.stdout:
        sys.exit(job.stdout + job.stderr)
    noted: dict[str, Any] = json.loads(job.stdout.partition("noted ")[2].splitlines()[0])
    return noted


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE", help="such as mnist_mlp_tf")
    parser.add_argument("--launches", type=int, default=LAUNCHES, help="that starting is measured in")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the run that gives the shares")
    kept.add_option(parser, "overheads")
    parser.add_argument("--on-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(arguments.recipes[0], arguments.on_rank, arguments.steps)
        return
    results = kept.load(arguments.results)
    print("| recipe | waiting for data | logging | checkpoints | launcher, s | imports | joining | first step | all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for recipe in arguments.recipes:
        ends = [launch(recipe, 2)["ends"] for _ in range(arguments.launches)]
        parts = [[b - a for a, b in itertools.pairwise(of_launch)] for of_launch in ends]
        seconds = [statistics.median(part) for part in zip(*parts, strict=True)]
        shares = launch(recipe, arguments.steps)["shares"]
        results[recipe] = {"shares": shares, "seconds": seconds}
        percent = " | ".join(f"{100 * share:.2f} %" for share in shares.values())
        columns = " | ".join(f"{part:.1f}" for part in (*seconds, sum(seconds)))
        print(f"| {recipe} | {percent} | {columns} |", flush=True)
        kept.keep(arguments.results, results)


if __name__ == "__main__":
    main()
