"""Computing in half precision, and Horovod's exchange of what comes out."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from common.config.composition import compose
from common.errors import TrainingError
from common.gradients.gradient_sync import Counters
from common.gradients.loss_scale import LossScale
from common.training import checkpoint
from tests.helpers.launch import read_events
from tests.helpers.runs import SMALL, TASKS, losses, train_here

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


def poison(runtime: ModuleType, monkeypatch: pytest.MonkeyPatch, value: float, first: int = 1) -> None:
    """Makes rank 1's inputs of the third training step infinite, or no numbers."""
    topology = runtime.init()
    steps, to_tensors = iter(range(first, 100)), runtime.to_tensors

    def poisoned(arrays: Any, *arguments: Any) -> Any:
        inputs, targets = arrays
        is_third = len(targets) == 32 and next(steps) == 3
        bad = np.full_like(inputs, value) if is_third and topology.rank == 1 else inputs
        return to_tensors([bad, targets], *arguments)

    monkeypatch.setattr(runtime, "to_tensors", poisoned)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("keys", ["precision=fp16", "train.on_nonfinite=skip"])
@pytest.mark.parametrize("compression", ["none", "topk"])
def test_what_is_not_finite_on_one_rank_makes_all_skip_the_step(
    framework: str, runtime: ModuleType, shared_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str, compression: str
) -> None:
    folder = shared_path / f"{keys.replace('=', ' ')} {compression}"
    overrides = [*SMALL["mnist_mlp"], "train.log_every=1", keys, f"compression={compression}"]
    recipe = importlib.import_module(f"recipes.mnist_mlp_{framework}")
    poison(runtime, monkeypatch, np.inf if keys == "precision=fp16" else np.nan)
    first = compose("mnist_mlp", [*overrides, "train.max_steps=4", f"run.dir={folder / 'first'}"])
    assert recipe.train(first)["completed"]
    resume = ["train.max_steps=6", f"resume={folder / 'first'}", "resume.allow_changes=[train.max_steps]"]
    assert recipe.train(compose("mnist_mlp", [*overrides, *resume, f"run.dir={folder / 'second'}"]))["completed"]
    events = [event for name in ("first", "second") for event in read_events(folder / name) if "lr" in event]
    if keys == "precision=fp16":
        assert [event["loss_scale"] for event in events] == [65536.0] * 3 + [32768.0] * 3
    assert [event["skipped_steps"] for event in events] == [0, 0, 1, 1, 1, 1]
    assert list(losses(events)) == [1, 2, 4, 5, 6]


@pytest.mark.ranks(2)
def test_a_loss_that_is_no_number_ends_training_at_its_step(
    framework: str, runtime: ModuleType, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(runtime, monkeypatch, np.nan)
    recipe = importlib.import_module(f"recipes.mnist_mlp_{framework}")
    saving = ["train.checkpoint_every=1", "train.keep_checkpoints=1", "train.log_every=1000"]
    with pytest.raises(TrainingError, match="train_loss is nan at step 3"):
        recipe.train(compose("mnist_mlp", [*SMALL["mnist_mlp"], *saving, f"run.dir={shared_path / 'run'}"]))
    runtime.broadcast_object(None)
    checkpoint.finish_writing()
    runtime.broadcast_object(None)
    assert [path.name for path in (shared_path / "run/checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.ranks(2)
def test_the_noise_scale_outlives_overflows(framework: str, shared_path: Path) -> None:
    overflowing = ["precision=fp16", "precision.initial_loss_scale=1e12", "train.max_steps=50", "train.log_every=1"]
    folder = shared_path / "run"
    train_here(framework, "mnist_mlp", folder, *SMALL["mnist_mlp"], *overflowing, "train.batch_schedule=noise_scale")
    events = [event for event in read_events(folder) if "noise_scale" in event]
    assert events[0]["skipped_steps"] == 1
    assert events[-1]["skipped_steps"] < 50
    assert events[-1]["noise_scale"] > 0


def test_the_loss_scale_grows_after_quiet_steps_and_halves_at_an_overflow() -> None:
    rule, counters, values = LossScale(8.0, growth_steps=2), Counters(loss_scale=8.0), []
    for overflow in (False, False, True, False, True, True, True, True, True, True):
        counters = counters.after_step(rule, overflow, lambda condition, a, b: a if condition else b)
        values.append(counters.loss_scale)
    assert values == [8, 16, 8, 8, 4, 2, 1, 1, 1, 1]
    assert counters.skipped_steps == 7
