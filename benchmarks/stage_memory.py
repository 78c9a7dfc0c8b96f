"""Peak memory of a language model, whole and cut into four stages.

    python -m benchmarks.stage_memory                       # PyTorch, about 2 minutes
    python -m benchmarks.stage_memory --framework tf

The model is lm_small, of 86 million weights, unless --model names another one. It trains for one step of 8 examples,
whole and as 8 micro-batches by 1F1B; the table has the largest resident memory of each rank's process, Python and
libraries included.
"""

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import write_text
from common.config.composition import compose
from common.config.layout import arranged, process_sets
from common.distributed.launcher_env import launched_topology

MODEL = "lm_small"
TRAINING = ["train.global_batch_size=8", "train.max_steps=1"]
STAGES = 4
PIPELINE = ["parallel=pipeline", f"parallel.pipeline_stages={STAGES}", "parallel.num_micro_batches=8"]


def on_rank(framework: str, model: str, folder: Path) -> None:
    """Runs on each rank; rank 0 prints the megabytes of all."""
    place = launched_topology()
    layout = PIPELINE if place.world_size > 1 else []
    folders = [f"data.path={folder / 'text.txt'}", f"run.dir={folder / str(place.world_size)}"]
    cfg = compose("transformer_lm", [f"model={model}", *TRAINING, *layout, *folders])
    runtime: Any = importlib.import_module(f"common.{framework}.distributed.runtime")
    runtime.init(process_sets(arranged(place, cfg), cfg))
    importlib.import_module(f"recipes.transformer_lm_{framework}").train(cfg)
    of_ranks = runtime.allgather_object(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    if place.rank == 0:
        print("measured", json.dumps(of_ranks), flush=True)


def measure(framework: str, model: str, num_ranks: int, folder: str) -> list[float]:
    """Megabytes of each rank."""
    command = ["horovodrun", "--gloo", "-np", str(num_ranks), sys.executable, "-m", "benchmarks.stage_memory"]
    command += ["--framework", framework, "--model", model, "--on-rank", folder]
    job = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if "measured " not in job.stdout:
        sys.exit(job.stdout)
    of_ranks: list[float] = json.loads(job.stdout.partition("measured ")[2].splitlines()[0])
    return of_ranks


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework", default="torch", choices=["torch", "tf"])
    parser.add_argument("--model", default=MODEL, help="of conf/model, such as lm_tiny")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(arguments.framework, arguments.model, arguments.on_rank)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        (whole,) = measure(arguments.framework, arguments.model, 1, folder)
        print("| layers | MB | to the whole model |\n| --- | --- | --- |")
        print(f"| all | {whole:,.0f} | 1.00 |", flush=True)
        of_stages = measure(arguments.framework, arguments.model, STAGES, folder)
        for stage, megabytes in enumerate(of_stages):
            print(f"| stage {stage} | {megabytes:,.0f} | {megabytes / whole:.2f} |")


if __name__ == "__main__":
    main()
