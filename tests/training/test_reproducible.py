"""train.reproducible=true: the same bits for all numbers of ranks, with accumulation and after a resume."""

import itertools
import json
import os
from pathlib import Path

from common.gradients.lanes import Node, TreeSum, nodes_of
from tests.helpers.launch import FRAMEWORKS, horovodrun
from tests.helpers.runs import SMALL

import pytest

# REPRODUCIBLE=all: what `make reproducible` runs; else its short form.
IS_SHORT = os.environ.get("REPRODUCIBLE") != "all"
SHORT_KINDS = [("mnist_mlp", "tf", "powersgd"), ("mnist_mlp", "torch", "topk"), ("transformer_lm", "torch", "none")]
METHODS = {"mnist_mlp": ["none", "topk", "powersgd", "int8", "dgc"], "transformer_lm": ["none", "sign"]}
TASKS = {
    "mnist_mlp": ["train.max_steps=30", "train.checkpoint_every=10", "model.dropout=0.1", "seed=3"],
    "transformer_lm": [
        *("train.max_steps=12", "train.checkpoint_every=4", "optimizer=adamw", "model.dropout=0.1", "train.lanes=12"),
        *("precision=bf16", "train.global_batch_size=31"),
    ],
}
KINDS = [
    (task, framework, method)
    for task, framework in itertools.product(TASKS, FRAMEWORKS)
    for method in METHODS[task]
    if not IS_SHORT or (task, framework, method) in SHORT_KINDS
]
LAYOUTS = (
    [(3, 2)] if IS_SHORT else [(1, 1), (3, 1), (4, 1), (5, 1), (6, 1), (8, 1), (1, 8), (2, 2), (2, 4), (3, 2), (4, 2)]
)
RESUMED = [(2, 1)] if IS_SHORT else [(1, 2), (2, 1), (3, 4), (4, 2)]


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 5, 8, 12, 13])
def test_the_order_of_a_sum_does_not_depend_on_the_ranks(num_lanes: int) -> None:
    def of_all(num_ranks: int) -> str:
        whole = TreeSum[str](num_lanes, "({}{})".format)
        for rank in range(num_ranks):
            mine = TreeSum[str](num_lanes, "({}{})".format)
            for lane in range(num_lanes):
                if lane * num_ranks // num_lanes == rank or num_ranks == 1:
                    mine.push(Node(lane, lane + 1), f"[{lane}]")
            for node, value in mine.nodes:
                whole.push(node, value)
        ((node, value),) = whole.nodes
        assert node == (0, num_lanes)
        return value

    divisors = [number for number in range(1, num_lanes + 1) if num_lanes % number == 0]
    assert len({of_all(number) for number in divisors}) == 1
    for num_ranks in range(1, num_lanes + 1):
        nodes = [node for rank in range(num_ranks) for node in nodes_of(rank, num_ranks, num_lanes)]
        assert [node.start for node in nodes[1:]] == [node.end for node in nodes[:-1]]


def outcome(num_ranks: int, recipe: str, folder: Path, *overrides: str) -> tuple[str, dict[int, float], float]:
    """The SHA-256 of the final weights, the losses of all steps, and the loss on the test set."""
    common = ["train.reproducible=true", "train.log_every=1", "train.keep_checkpoints=9"]
    job = horovodrun(num_ranks, "-m", f"recipes.{recipe}", f"run.dir={folder}", *common, *overrides)
    assert job.returncode == 0, job.stdout
    summary = json.loads((folder / "summary.json").read_text())
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = {event["step"]: event["train_loss"] for event in events if "train_loss" in event}
    return summary["weights_sha256"], losses, summary["test_loss"]


@pytest.mark.parametrize(("task", "framework", "method"), KINDS)
def test_weights_are_the_same_to_the_bit(task: str, framework: str, method: str, tmp_path: Path) -> None:
    recipe, overrides = f"{task}_{framework}", [*SMALL[task], *TASKS[task], f"compression={method}"]
    if method != "none":
        overrides += ["compression.min_numel=100", "train.clip_norm=1"]
    expected = outcome(2, recipe, tmp_path / "2-1", *overrides)
    for number, parts in LAYOUTS:
        accumulation = f"parallel.num_micro_batches={parts}"
        assert outcome(number, recipe, tmp_path / f"{number}-{parts}", accumulation, *overrides) == expected
    every = int(next(word for word in overrides if "checkpoint_every" in word).rpartition("=")[2])
    for before, after in RESUMED:
        source = tmp_path / f"{before}-1" / "checkpoints" / f"step-{every:08}"
        found = outcome(after, recipe, tmp_path / f"{before}-then-{after}", f"resume={source}", *overrides)
        assert found == (expected[0], {step: loss for step, loss in expected[1].items() if step > every}, expected[2])
