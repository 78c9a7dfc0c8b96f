"""Computing in half precision, and Horovod's exchange of what comes out."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from common.composition import compose
from common.precision import LossScale
from tests.launch import read_events
from tests.test_recipes import SMALL, TASKS, losses, train_here

import numpy as np
import pytest

STEPS = ["train.max_steps=12", "train.log_every=1"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_follows_the_curve_of_single(framework: str, task: str, shared_path: Path) -> None:
    single, *halves = (
        train_here(framework, task, shared_path / f"{task}-{name}", *SMALL[task], *STEPS, f"precision={name}")
        for name in ("fp32", "bf16", "fp16")
    )
    for half in halves:
        assert half != single
        # Steps may have been skipped at first, until the loss scale is right; least squares end near 0.
        assert half[12] == pytest.approx(single[12], rel=0.02, abs=0.005)


@pytest.mark.ranks(2)
def test_an_overflow_on_one_rank_makes_all_skip_the_step(
    framework: str, runtime: ModuleType, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = runtime.init()
    steps, to_tensors = iter(range(1, 100)), runtime.to_tensors

    def poisoned(arrays: Any, *arguments: Any) -> Any:
        inputs, targets = arrays
        is_third = len(targets) == 32 and next(steps) == 3
        bad = np.full_like(inputs, np.inf) if is_third and topology.rank == 1 else inputs
        return to_tensors([bad, targets], *arguments)

    monkeypatch.setattr(runtime, "to_tensors", poisoned)
    folder = shared_path / "run"
    overrides = ["train.max_steps=6", "train.log_every=1", "precision=fp16", "compression=topk", f"run.dir={folder}"]
    recipe = importlib.import_module(f"recipes.mnist_mlp_{framework}")
    assert recipe.train(compose("mnist_mlp", [*SMALL["mnist_mlp"], *overrides]))["completed"]
    events = [event for event in read_events(folder) if "loss_scale" in event]
    assert [event["loss_scale"] for event in events] == [65536.0] * 3 + [32768.0] * 3
    assert [event["skipped_steps"] for event in events] == [0, 0, 1, 1, 1, 1]
    assert list(losses(events)) == [1, 2, 4, 5, 6]


def test_the_loss_scale_grows_after_quiet_steps_and_halves_at_an_overflow() -> None:
    scale = LossScale(8.0, growth_steps=2)
    values = []
    for overflow in (False, False, True, False, True, True, True, True, True, True):
        scale.update(overflow)
        values.append(scale.value)
    assert values == [8, 16, 8, 8, 4, 2, 1, 1, 1, 1]
