"""Recipes against peers that do the same work: step times, side by side.

    python -m benchmarks.side_by_side                          # all but the last kind, about 10 minutes on 2 cores
    python -m benchmarks.side_by_side lm_tiny.torch.ddp        # one
    python -m benchmarks.side_by_side lm_384_batch_24.torch.one_rank   # 2 ranks against 1, each on one core
    python -m benchmarks.side_by_side --list

The sides of a comparison take turns, a block of steps each: in one job where ranks and environment are alike, else job
by job. A block's figure is the median of its steps; a pair's is the ratio of two blocks that follow each other; the
table has the median of the pairs' ratios, with the smallest and the largest. benchmarks/results/side_by_side.json keeps
what was measured, unless --results names another file; docs/performance.md discusses it.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import kept
from common.config.composition import compose

PAIRS = 5
TEXT_CHARACTERS = 60_000  # of the default corpus, so that the evaluation at the end of a block is short
STOCK = {"HOROVOD_EVENT_DRIVEN": "0"}
ONE_CORE = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        task: name of the recipe without the framework.
        steps: optimizer steps in a block.
        batch: examples of one rank in one step.
        overrides: of the recipe's configuration.
    """

    task: str
    steps: int
    batch: int
    overrides: tuple[str, ...] = ()


CASES = {
    "lm_tiny": Case("transformer_lm", 40, 6),
    "lm_384": Case("transformer_lm", 10, 6, ("model.width=384", "model.num_heads=6")),
    "lm_384_batch_24": Case("transformer_lm", 6, 24, ("model.width=384", "model.num_heads=6")),
    "mnist_cnn": Case("mnist_cnn", 60, 32),
    "mnist_mlp": Case("mnist_mlp", 150, 32),
}


@dataclass(frozen=True)
class Side:
    """Who trains, on how many ranks, with what in the environment."""

    trainer: str
    num_ranks: int
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS = {
    "torch": {
        "plain": (Side("ours", 1), Side("plain", 1)),
        "ddp": (Side("ours", 2), Side("ddp", 2)),
        "script": (Side("script", 2), Side("ddp", 2)),
        "stock": (Side("ours", 2), Side("stock", 2, STOCK)),
        "one_rank": (Side("ours", 2), Side("ours", 1, ONE_CORE)),
    },
    "tf": {
        "fit": (Side("ours", 1), Side("fit", 1)),
        "one_rank": (Side("ours", 2), Side("ours", 1, ONE_CORE)),
    },
}
MAIN = ("lm_tiny", "lm_384", "mnist_cnn", "mnist_mlp")
CASES_OF = {"stock": ("lm_tiny", "mnist_mlp"), "one_rank": ("mnist_mlp", "lm_384", "lm_384_batch_24")}
NAMES = [
    f"{case}.{framework}.{peer}"
    for framework, peers in PEERS.items()
    for peer in peers
    for case in CASES_OF.get(peer, MAIN)
]


def write_text(folder: Path) -> None:
    """Puts the text there that blocks of transformer_lm read."""
    from pydoc_data.topics import topics

    (folder / "text.txt").write_text("".join(topics[key] for key in sorted(topics))[:TEXT_CHARACTERS])


def block(case: Case, framework: str, trainer: str, num_ranks: int, folder: Path) -> float:
    """Runs on each rank: trains for a block of steps and returns the median seconds of one."""
    text = [f"data.path={folder / 'text.txt'}"] if case.task == "transformer_lm" else []
    batch = f"train.global_batch_size={case.batch * num_ranks}"
    length = [f"train.max_steps={case.steps}", "train.epochs=1000", "lr_schedule=constant"]
    cfg = compose(case.task, [*length, batch, *text, *case.overrides])
    if trainer != "ours":
        peers = importlib.import_module(f"benchmarks.peers.{framework}_peers")
        return statistics.median(getattr(peers, trainer)(case.task, cfg))
    runtime: Any = importlib.import_module(f"common.{framework}.distributed.runtime")
    recipe: Any = importlib.import_module(f"recipes.{case.task}_{framework}")
    cfg.run.dir = str(folder / "run")
    seconds: float = recipe.train(cfg)["step_seconds_median"]
    if runtime.init().rank == 0:
        shutil.rmtree(folder / "run")
    runtime.broadcast_object(None)
    return seconds


def job(name: str, sides: tuple[Side, ...], num_blocks: int, steps: int, folder: str) -> list[list[float]]:
    """Launches ranks that take turns with the sides; seconds of each side's blocks."""
    trainers = ",".join(side.trainer for side in sides)
    launch = ["horovodrun", "--gloo", "-np", str(sides[0].num_ranks), sys.executable, "-m", "benchmarks.side_by_side"]
    command = [*launch, name, "--on-rank", folder, "--trainers", trainers, "--pairs", str(num_blocks)]
    command += ["--steps", str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    output = subprocess.run(command, env=os.environ | sides[0].environment, text=True, **pipes).stdout  # type: ignore[call-overload]
    if "blocks " not in output:
        sys.exit(output)
    blocks: list[list[float]] = json.loads(output.partition("blocks ")[2].splitlines()[0])
    return blocks


def on_rank(name: str, folder: Path, trainers: list[str], num_blocks: int, steps: int) -> None:
    """Runs on each rank; rank 0 prints the seconds of each side's blocks."""
    of_case, framework, _ = name.split(".")
    case = replace(CASES[of_case], steps=steps)
    runtime: Any = importlib.import_module(f"common.{framework}.distributed.runtime")
    topology = runtime.init()
    blocks: list[list[float]] = [[] for _ in trainers]
    for number in range(num_blocks):
        for place in in_turn(len(trainers), number):
            seconds = block(case, framework, trainers[place], topology.world_size, folder)
            blocks[place].append(seconds)
    if topology.rank == 0:
        print("blocks", json.dumps(blocks), flush=True)


def in_turn(num_sides: int, number: int) -> Iterator[int]:
    """The sides in the order of this round: each comes first as often as the others."""
    return iter(range(num_sides) if number % 2 else reversed(range(num_sides)))


def measure(name: str, num_pairs: int, steps: int | None) -> dict[str, Any]:
    """Milliseconds of a step of both sides, and the ratio of ours to the other: median, smallest, largest."""
    case, framework, peer = name.split(".")
    sides, steps = PEERS[framework][peer], steps or CASES[case].steps
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder))
        if len({(side.num_ranks, *side.environment) for side in sides}) == 1:
            blocks = job(name, sides, num_pairs, steps, folder)
        else:
            blocks = [[] for _ in sides]
            for number in range(num_pairs):
                for place in in_turn(len(sides), number):
                    blocks[place] += job(name, (sides[place],), 1, steps, folder)[0]
    # Per example, as one side may have more ranks and with them a larger global batch.
    per_example = [[seconds / side.num_ranks for seconds in mine] for side, mine in zip(sides, blocks, strict=True)]
    ratios = [ours / other for ours, other in zip(*per_example, strict=True)]
    return {
        "milliseconds": [1e3 * statistics.median(mine) for mine in blocks],
        "ratio": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
    }


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="COMPARISON", choices=[*NAMES, []])
    parser.add_argument("--list", action="store_true", help="print the names of the comparisons")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, help="of a block, instead of those of the case")
    kept.add_option(parser, "side_by_side")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trainers", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        trainers = arguments.trainers.split(",")
        on_rank(arguments.names[0], arguments.on_rank, trainers, arguments.pairs, arguments.steps)
        return
    if arguments.list:
        print("\n".join(NAMES))
        return
    results = kept.load(arguments.results)
    print("| comparison | ours, ms | peer, ms | ours : peer, per example | smallest to largest |")
    print("| --- | --- | --- | --- | --- |")
    for name in arguments.names or [name for name in NAMES if not name.endswith(".one_rank")]:
        row = results[name] = measure(name, arguments.pairs, arguments.steps)
        ours, other = row["milliseconds"]
        spread = f"{row['smallest']:.2f} to {row['largest']:.2f}"
        print(f"| {name} | {ours:.1f} | {other:.1f} | {row['ratio']:.2f} | {spread} |", flush=True)
        kept.keep(arguments.results, results)


if __name__ == "__main__":
    main()
