"""Short runs of the recipes, and their losses."""

import importlib
from pathlib import Path
from typing import Any

from common.config.composition import compose
from tests.helpers.launch import read_events

# What each task is trained with here: small, 36 steps within the third epoch or before, every loss logged.
SMALL = {
    "linear_regression": ["train.global_batch_size=60"],
    "mnist_cnn": ["model.channels=[8,16]", "model.hidden_size=32"],
    "mnist_mlp": ["model.hidden_sizes=[64]"],
    "transformer_lm": [
        *("data.path=LICENSE", "model.width=32", "model.num_layers=1", "model.num_heads=2", "model.context=16"),
        *("train.global_batch_size=20", "lr_schedule.warmup_steps=10"),
    ],
}
# Runs that tests/recipes/test_recipes.py publishes under this name: one folder for each, named after its task.
SHORT_RUNS = "short runs"
COMMON = ["train.max_steps=36", "train.log_every=1"]
TASKS = list(SMALL)


def losses(events: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> train_loss."""
    return {event["step"]: event["train_loss"] for event in events if "train_loss" in event}


def train_here(framework: str, task: str, folder: Path, *overrides: str) -> dict[int, float]:
    """Trains in this process, which is one of the ranks."""
    recipe = importlib.import_module(f"recipes.{task}_{framework}")
    recipe.train(compose(task, [f"run.dir={folder}", *overrides]))
    return losses(read_events(folder))
