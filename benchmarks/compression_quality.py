"""What each compressor does to the result of training, with and without error feedback.

    python -m benchmarks.compression_quality                                   # all, both tasks, three seeds
    python -m benchmarks.compression_quality --tasks mnist_cnn --sides none,sign,sign-plain --seeds 1
    python -m benchmarks.compression_quality --overrides data=mnist data.root=FOLDER --tasks mnist_cnn

Each side trains in turn in one job of 2 ranks, once per seed; the table has the mean over the seeds of the last test
result, and how far it is from that of uncompressed gradients. `-plain` is without error feedback. The bytes are of a
compressed step. benchmarks/results/compression_quality.json keeps what was measured, unless --results names another
file.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import kept
from common.config.composition import compose

SEEDS = 3
NUM_RANKS = 2
TASKS = {"mnist_cnn": "test_accuracy", "transformer_lm": "test_perplexity"}
LENGTH = {"mnist_cnn": ("train.epochs=4",), "transformer_lm": ()}
PLAIN = "compression.error_feedback=false"
# Uncompressed first steps, a tenth of the run, with AdamW three tenths: gradients change fast, and what is fed back
# comes late. AdamW's second moment stays from then on: squares of compressed gradients are not those of the gradients.
START = {
    "mnist_cnn": ("compression.start_step=50",),
    "transformer_lm": ("compression.start_step=493", "optimizer.freeze_step=492"),
}
# Deep gradient compression has a warm-up of its own, from the first step on with SGD, whose momentum it has.
START_OF_DGC = {"mnist_cnn": (), "transformer_lm": (*START["transformer_lm"], "compression.warmup_steps=800")}
STARTS_LATE = ("sign", "topk", "randomk", "powersgd")
SIDES: dict[str, tuple[str, ...]] = {
    **{method: (f"compression={method}",) for method in ("none", "fp16", "bf16", "int8", "qsgd", "terngrad")},
    **{method: (f"compression={method}",) for method in (*STARTS_LATE, "dgc")},
    **{f"{method}-plain": (f"compression={method}", PLAIN) for method in ("int8", "sign", "topk", "powersgd")},
    "adasum": ("op=adasum",),
}


def overrides(task: str, side: str, seed: int) -> list[str]:
    """What a side's run of a task sets."""
    starts = START_OF_DGC[task] if side == "dgc" else START[task] if side.removesuffix("-plain") in STARTS_LATE else ()
    return [*LENGTH[task], *SIDES[side], *starts, f"seed={seed}", "train.log_every=100"]


def on_rank(arguments: argparse.Namespace) -> None:
    """Runs on each rank; rank 0 prints the results, task -> side -> one of each seed."""
    runtime: Any = importlib.import_module(f"common.{arguments.framework}.distributed.runtime")
    topology = runtime.init()
    for task in arguments.tasks:
        recipe: Any = importlib.import_module(f"recipes.{task}_{arguments.framework}")
        for side in arguments.sides:
            for seed in range(arguments.seeds):
                folder = f"run.dir={arguments.on_rank}/{task}-{side}-{seed}"
                summary = recipe.train(compose(task, [*overrides(task, side, seed), *arguments.overrides, folder]))
                if topology.rank == 0:
                    result = {"result": summary[TASKS[task]], "wire_bytes": summary["wire_bytes"]}
                    print("measured", json.dumps([task, side, result]), flush=True)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework", default="torch", choices=["torch", "tf"])
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE")
    kept.add_option(parser, "compression_quality")
    parser.add_argument("--on-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for given, known in ((arguments.tasks, TASKS), (arguments.sides, SIDES)):
        if not set(given) <= set(known):
            parser.error(f"choose from {','.join(known)}")
    if arguments.on_rank:
        on_rank(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        launch = ["horovodrun", "--gloo", "-np", str(NUM_RANKS), sys.executable, "-m", "benchmarks.compression_quality"]
        command = [*launch, *sys.argv[1:], "--on-rank", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
            output = [_echoed(line) for line in job.stdout or ()]
    if job.returncode:
        sys.exit("".join(output))
    measured = [json.loads(line.partition("measured ")[2]) for line in output if "measured " in line]
    results = kept.load(arguments.results)
    for task in arguments.tasks:
        for side in arguments.sides:
            rows = [row for of_task, of_side, row in measured if (of_task, of_side) == (task, side)]
            results.setdefault(arguments.framework, {}).setdefault(task, {})[side] = {
                "results": [row["result"] for row in rows],
                "wire_bytes": rows[0]["wire_bytes"],
            }
    kept.keep(arguments.results, results)
    print(table(results[arguments.framework]))


def _echoed(line: str) -> str:
    if "measured " in line:
        print(line.partition("measured ")[2], end="", file=sys.stderr, flush=True)
    return line


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each side; accuracy differs by points, perplexity by percent."""
    tasks = [task for task in TASKS if task in results]
    head = " | ".join(f"{task}, {TASKS[task]} | to none | bytes of a step" for task in tasks)
    lines = [f"| side | {head} |", "| --- |" + " --- | --- | --- |" * len(tasks)]
    for side in SIDES:
        cells = [cell for task in tasks for cell in _cells(task, results[task], side)]
        if any(cells):
            lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(task: str, results: dict[str, Any], side: str) -> list[str]:
    if side not in results or "none" not in results:
        return ["", "", ""]
    mean, plain = (statistics.mean(results[name]["results"]) for name in (side, "none"))
    is_accuracy = TASKS[task] == "test_accuracy"
    away = f"{100 * (mean - plain):+.2f} points" if is_accuracy else f"{100 * (mean / plain - 1):+.1f} %"
    value = f"{mean:.4f}" if is_accuracy else f"{mean:.3f}"
    return [value, away, f"{results[side]['wire_bytes']:,.0f}"]


if __name__ == "__main__":
    main()
