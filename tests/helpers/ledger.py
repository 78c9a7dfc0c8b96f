"""Writes ledgers without training."""

from pathlib import Path

from common.config.composition import compose
from common.data.example_log import Ledger
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology


def note(folder: Path, world_size: int, start: int = 0, stop: int = 99, epochs: int = 2) -> None:
    """Notes the steps of a run of 37 examples from one step to another, on all ranks."""
    cfg = compose("mnist_mlp", [f"train.epochs={epochs}", "train.global_batch_size=8"])
    (alone,) = (TrainingSampler.from_config(cfg, 37, Topology(0, 1, 0, 1)),)
    ends = [alone.start, *(step.end for step in alone.steps())]
    restored = {"position": vars(ends[start]), "batch_sizes": {}}
    for rank in range(world_size):
        plan = TrainingSampler.from_config(cfg, 37, Topology(rank, world_size, rank, world_size), restored)
        book = Ledger(folder, plan)
        for step in plan.steps():
            if step.number <= stop:
                book.add(step)
