"""A rank that trains small models in one layout after another: parallel_job.py FRAMEWORK FOLDER [resumed].

With `resumed` it trains a model of two stages with compressed gradients, each time whole and again from the middle.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from common.config.composition import compose
from common.config.layout import arranged, process_sets
from common.distributed.launcher_env import launched_topology
from common.distributed.topology import Topology

# 9 steps; the eighth of the digits' epochs of 204 has 9 examples, fewer than there are micro-batches.
TASKS = {
    "mnist_mlp": ["model.hidden_sizes=[32,32,32]", "train.global_batch_size=204"],
    "mnist_cnn": ["model.channels=[8,16]", "model.hidden_size=32", "train.global_batch_size=204"],
    "transformer_lm": [
        *("data.path=README.md", "model.width=32", "model.num_layers=2", "model.num_heads=2", "model.context=16"),
        *("train.global_batch_size=24", "lr_schedule.warmup_steps=10", "optimizer.freeze_step=6"),
    ],
}
COMMON = ["train.max_steps=9", "train.log_every=1", "optimizer=adamw", "data.ledger=true"]
_PIPELINE = ["parallel=pipeline", "parallel.num_micro_batches=2"]
_SERVER = ["parallel=parameter_server"]
_SCHEDULES = {
    "gpipe": [*_PIPELINE, "parallel.schedule=gpipe"],
    "zb_h1": [*_PIPELINE, "parallel.schedule=zb_h1"],
    "interleaved": [*_PIPELINE, "parallel.schedule=interleaved", "parallel.virtual_stages_per_rank=2"],
}
_TWO_STAGES = {"1f1b": _PIPELINE, "sharded": ["optimizer.sharded=true"]}
_FOUR_STAGES = {"four stages": [*_PIPELINE, "parallel.pipeline_stages=4"]}
_TWO_BY_TWO = {"two by two": _PIPELINE}
_THREE_AND_ONE = {"three and one": [*_PIPELINE, "parallel.replicas_per_stage=[3,1]"]}
_SERVERS = {"one server": _SERVER, "two servers": [*_SERVER, "parallel.num_servers=2"]}
# By number of ranks and task; not all pairs, as schedules know nothing of layers.
LAYOUTS: dict[int, dict[str, dict[str, list[str]]]] = {
    1: {task: {"whole": []} for task in TASKS},
    2: {
        "mnist_mlp": _TWO_STAGES | _SCHEDULES,
        "mnist_cnn": _TWO_STAGES,
        "transformer_lm": _TWO_STAGES | {"zb_h1": _SCHEDULES["zb_h1"]},
    },
    3: {"mnist_mlp": _SERVERS, "mnist_cnn": {"one server": _SERVER}, "transformer_lm": {"one server": _SERVER}},
    4: {"mnist_mlp": _FOUR_STAGES, "mnist_cnn": _TWO_BY_TWO, "transformer_lm": _FOUR_STAGES | _THREE_AND_ONE},
}
# Trained whole and resumed: the stages share a weight, and two ranks may have one stage.
RESUMED = {
    name: [*TASKS["transformer_lm"], *_PIPELINE, "train.max_steps=8", "train.log_every=1", "train.clip_norm=1", *values]
    for name, values in {
        "topk": ["compression=topk", "optimizer.freeze_step=6"],
        "powersgd": ["compression=powersgd", "compression.rank=2", "optimizer.freeze_step=6"],
        "dgc": ["compression=dgc", "optimizer=sgd", "optimizer.lr=0.05", "compression.warmup_steps=4"],
    }.items()
}
# Has another curve than the others; comes first, as what it might leave behind would stop them.
NOT_WAITING = [*_SERVER, "parallel.mode=async", "parallel.max_staleness=4", "compression=int8", "train.max_steps=150"]


def resumed(folder: Path, num_ranks: int) -> list[tuple[str, Any]]:
    """Runs that are made whole, and again from their middle."""
    common = ["compression.min_numel=64", "train.checkpoint_every=4", "train.keep_checkpoints=9"]
    common += ["parallel.replicas_per_stage=[2,1]", "train.global_batch_size=24"] if num_ranks == 3 else []
    runs = []
    for name, values in RESUMED.items():
        values = [value for value in values if name != "dgc" or "freeze_step" not in value]
        whole = folder / name
        again = [f"run.dir={folder / name}.again", f"resume={whole}/checkpoints/step-00000004"]
        runs += [
            ("transformer_lm", compose("transformer_lm", [*values, *common, *start]))
            for start in ([f"run.dir={whole}"], again)
        ]
    return runs


def layouts(folder: Path, place: Topology) -> list[tuple[str, Any]]:
    """All tasks in all layouts of a number of ranks."""
    runs = [
        (task, compose(task, [*values, *COMMON, *layout, f"run.dir={folder / task / name}"]))
        for task, values in TASKS.items()
        for name, layout in LAYOUTS[place.world_size][task].items()
    ]
    if place.world_size == 3:
        overrides = [*TASKS["mnist_mlp"], *COMMON, *NOT_WAITING, "optimizer=sgd", f"run.dir={folder / 'not_waiting'}"]
        runs.insert(0, ("mnist_mlp", compose("mnist_mlp", overrides)))
    return runs


def main() -> None:
    framework, folder = sys.argv[1], Path(sys.argv[2])
    runtime: Any = importlib.import_module(f"common.{framework}.distributed.runtime")
    place = launched_topology()
    runs = resumed(folder, place.world_size) if "resumed" in sys.argv else layouts(folder, place)
    runtime.init({tuple(ranks) for _, cfg in runs for ranks in process_sets(arranged(place, cfg), cfg)})
    for task, cfg in runs:
        importlib.import_module(f"recipes.{task}_{framework}").train(cfg)


if __name__ == "__main__":
    main()
