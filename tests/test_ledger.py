"""What the ledger says of runs that are right, and of runs that are not."""

import json
from pathlib import Path

from common import ledger
from common.composition import compose
from common.config import ConfigError
from common.ledger import Ledger
from common.sharding import Plan
from common.topology import Topology

import pytest


def note(folder: Path, world_size: int, start: int = 0, stop: int = 99, epochs: int = 2) -> None:
    """Notes the steps of a run of 37 examples from one step to another, on all ranks."""
    cfg = compose("mnist_mlp", [f"train.epochs={epochs}", "train.global_batch_size=8"])
    (alone,) = (Plan.of(cfg, 37, Topology(0, 1, 0, 1)),)
    ends = [alone.start, *(step.end for step in alone.steps())]
    restored = {"position": vars(ends[start]), "batch_sizes": {}}
    for rank in range(world_size):
        plan = Plan.of(cfg, 37, Topology(rank, world_size, rank, world_size), restored)
        book = Ledger(folder, plan)
        for step in plan.steps():
            if step.number <= stop:
                book.add(step)


def lines(folder: Path) -> list[tuple[bool, str]]:
    return list(ledger.check(folder))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_each_example_once_at_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    note(tmp_path, world_size)
    assert lines(tmp_path) == [(True, f"epoch {epoch}: 37 of 37 examples, each once") for epoch in (1, 2)]


def test_steps_that_were_redone_count_once(tmp_path: Path) -> None:
    note(tmp_path, 4, stop=7)
    note(tmp_path, 2, start=3, stop=6)
    ledger.drop(tmp_path, 2)  # before a launch from step 3 on
    note(tmp_path, 3, start=2)
    assert all(is_right for is_right, _ in lines(tmp_path))


def test_a_run_that_ended_within_an_epoch(tmp_path: Path) -> None:
    note(tmp_path, 2, stop=7)
    assert lines(tmp_path)[1] == (True, "epoch 2: 16 of 37 examples, each once; the run ended within the epoch")


def change(folder: Path, step: int, examples: list[int]) -> None:
    """Alters what rank 0 noted."""
    (path,) = folder.glob("ledger/*.rank-0000.jsonl")
    changed = [json.loads(line) for line in path.read_text().splitlines()]
    changed[step]["examples"] = examples
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_lost_doubled_and_foreign_examples_are_found(tmp_path: Path) -> None:
    note(tmp_path, 1, epochs=1)
    (path,) = tmp_path.glob("ledger/*.jsonl")
    examples = json.loads(path.read_text().splitlines()[2])["examples"]
    change(tmp_path, 2, examples[1:])
    assert lines(tmp_path) == [(False, "epoch 1: 36 of 37 examples, each once; 1 were lost")]
    change(tmp_path, 2, [examples[1], *examples[1:]])
    message = f"epoch 1: 1 of 37 examples more than once, such as number {examples[1]}"
    assert lines(tmp_path) == [(False, message)]
    change(tmp_path, 2, [37, *examples[1:]])
    assert lines(tmp_path) == [(False, "epoch 1: example 37 is none of the 37")]
    path.write_text("\n" + path.read_text())
    with pytest.raises(ConfigError, match="is damaged"):
        lines(tmp_path)
    with pytest.raises(ConfigError, match=r"has no ledger; train with data.ledger=true"):
        lines(tmp_path / "elsewhere")
