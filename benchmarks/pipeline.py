"""A pipeline of two stages against the whole model on one core, and against torch.distributed.pipelining.

    python -m benchmarks.pipeline                  # PyTorch, about 5 minutes on 2 cores
    python -m benchmarks.pipeline --framework tf --rounds 3

All sides train the same language model (width 384, 6 layers, 8 micro-batches, 1F1B) on the same global batch, each rank
on a core of its own. In each round each side trains a block of steps; a block's figure is the median of its steps, a
round's the ratio of two blocks. The table has the median, the smallest and the largest ratio. An ideal pipeline takes
(M + S - 1) / (M S) of the time of one core: 0.5625. benchmarks/results/pipeline.json keeps what was measured, unless
--results names another file.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import kept
from benchmarks.side_by_side import ONE_CORE, write_text
from common.config.composition import compose
from common.distributed.launcher_env import launched_topology

MODEL = ["model=lm_mini", "model.context=128", "model.tied=false", "train.global_batch_size=32"]
STEPS = 5
LENGTH = ["train.epochs=1000", "lr_schedule=constant", "optimizer.lr=0.0003"]
PIPELINE = ["parallel=pipeline", "parallel.num_micro_batches=8"]
# Number of ranks, trainer, overrides.
SIDES: dict[str, tuple[int, str, list[str]]] = {
    "pipeline": (2, "ours", PIPELINE),
    "one_rank": (1, "ours", []),
    "peer": (2, "pipelining", PIPELINE),
}


def on_rank(framework: str, side: str, steps: int, folder: Path) -> None:
    """Runs on each rank; rank 0 prints the median seconds of a step."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[launched_topology().local_rank]})
    _, trainer, overrides = SIDES[side]
    block = [f"train.max_steps={steps}", f"data.path={folder / 'text.txt'}"]
    cfg = compose("transformer_lm", [*MODEL, *LENGTH, *overrides, *block])
    runtime: Any = importlib.import_module(f"common.{framework}.distributed.runtime")
    topology = runtime.init()
    if trainer == "ours":
        cfg.run.dir = str(folder / "run")
        summary = importlib.import_module(f"recipes.transformer_lm_{framework}").train(cfg)
        seconds, more = summary["step_seconds_median"], summary.get("bubble_of_stages")
    else:
        peers = importlib.import_module(f"benchmarks.peers.{framework}_peers")
        seconds, more = statistics.median(getattr(peers, trainer)("transformer_lm", cfg)), None
    if topology.rank == 0:
        shutil.rmtree(folder / "run", ignore_errors=True)
        print("measured", json.dumps([seconds, more]), flush=True)


def measure(framework: str, side: str, steps: int, folder: str) -> tuple[float, Any]:
    """Seconds of a step of one block, and the bubble of each stage."""
    command = ["horovodrun", "--gloo", "-np", str(SIDES[side][0]), sys.executable, "-m", "benchmarks.pipeline"]
    command += ["--framework", framework, "--on-rank", folder, "--side", side, "--steps", str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    output = subprocess.run(command, env=os.environ | ONE_CORE, text=True, **pipes).stdout  # type: ignore[call-overload]
    if "measured " not in output:
        sys.exit(output)
    seconds, more = json.loads(output.partition("measured ")[2].splitlines()[0])
    return seconds, more


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework", default="torch", choices=["torch", "tf"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a block")
    kept.add_option(parser, "pipeline")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(arguments.framework, arguments.side, arguments.steps, arguments.on_rank)
        return
    sides = [side for side in SIDES if side != "peer" or arguments.framework == "torch"]
    blocks: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        for number in range(arguments.rounds):
            for side in sides if number % 2 else reversed(sides):
                seconds, bubbles = measure(arguments.framework, side, arguments.steps, folder)
                blocks[side].append(seconds)
                print(f"{side} {seconds:.3f} s {bubbles or ''}", file=sys.stderr, flush=True)
    results = kept.load(arguments.results)
    results[arguments.framework] = blocks
    kept.keep(arguments.results, results)
    print("| pipeline against | pipeline, ms | the other, ms | ratio | smallest to largest |\n" + "| --- " * 5 + "|")
    for side in sides[1:]:
        ratios = [ours / other for ours, other in zip(blocks["pipeline"], blocks[side], strict=True)]
        ours, other = (1e3 * statistics.median(blocks[name]) for name in ("pipeline", side))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {side} | {ours:.0f} | {other:.0f} | {statistics.median(ratios):.2f} | {spread} |")


if __name__ == "__main__":
    main()
