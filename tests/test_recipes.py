"""The recipes as a user starts them."""

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from common.composition import compose
from common.config import MnistMLPConfig
from common.datasets import digits, mnist
from common.run import TrainingError
from tests.launch import FRAMEWORKS, horovodrun, read_events, run, train
from tests.test_datasets import write_idx

import pytest

RECIPES = [f"mnist_mlp_{framework}" for framework in FRAMEWORKS]


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [event["train_loss"] for event in events if "train_loss" in event]


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_loss_curve_for_every_layout(recipe: str, tmp_path: Path) -> None:
    short = ("train.max_steps=60", "train.log_every=10")
    one, *others = (
        losses(train(num_ranks, recipe, tmp_path / "run", *short, f"parallel.num_micro_batches={parts}"))
        for num_ranks, parts in ((1, 1), (2, 1), (3, 1), (4, 1), (2, 4))
    )
    assert len(one) == 7
    assert one[-1] < 0.5 * one[0]
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.ranks(2)
def test_in_fp64_nothing_but_rounding_is_left(framework: str, shared_path: Path) -> None:
    train_here = importlib.import_module(f"recipes.mnist_mlp_{framework}").train
    curves = []
    for parts in (1, 4):
        folder = shared_path / str(parts)
        overrides = ["precision=fp64", "train.max_steps=30", "train.log_every=5", f"parallel.num_micro_batches={parts}"]
        train_here(compose("mnist_mlp", [*overrides, f"run.dir={folder}"]))
        curves.append(losses(read_events(folder)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)


@pytest.mark.ranks(2)
def test_a_run_without_averaging_is_caught(
    framework: str, runtime: ModuleType, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if framework == "torch":
        from common.torch.gradients import Gradients
        from recipes.mnist_mlp_torch import train as train_here

        monkeypatch.setattr(Gradients, "_send", lambda self, number: None)
    else:
        from common.tf import gradients
        from recipes.mnist_mlp_tf import train as train_here

        monkeypatch.setattr(gradients, "sum_over_replicas", lambda grads, topology: grads)
    folders = {name: shared_path / name for name in ("broken", "sound")}
    cfg = compose("mnist_mlp", ["train.max_steps=3", "train.log_every=1", f"run.dir={folders['broken']}"])
    assert isinstance(cfg, MnistMLPConfig)
    with pytest.raises(TrainingError, match=r"ranks \[1\] hold other weights than rank 0"):
        train_here(cfg)
    monkeypatch.undo()
    cfg.run.dir = str(folders["sound"])
    assert train_here(cfg)["completed"]
    broken, sound = (losses(read_events(folder)) for folder in folders.values())
    assert broken[0] == pytest.approx(sound[0], rel=1e-5)
    assert broken[2] != pytest.approx(sound[2], rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_horovodrun_a_recipe_is_one_rank(recipe: str, tmp_path: Path) -> None:
    overrides = ["train.max_steps=2", "optimizer=adamw", "precision=fp64", "model.dropout=0.5"]
    result = run([sys.executable, "-m", f"recipes.{recipe}", f"run.dir={tmp_path}", *overrides])
    assert result.returncode == 0, result.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["wire_bytes_per_step"]) == (1, 2, 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_idx_files_train_and_the_defaults_reach_their_accuracy(recipe: str, tmp_path: Path) -> None:
    for prefix, split in zip(("train", "t10k"), digits.load(), strict=True):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", split.images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", split.classes)
    events = train(2, recipe, tmp_path / "run", "data=mnist", f"data.root={tmp_path}")
    assert events[-1]["test_accuracy"] >= 0.95


def mistakes(tmp_path: Path) -> dict[str, list[str]]:
    """Overrides that cannot be run -> parts of the message."""
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "summary.json").touch()
    for name in mnist.FILES:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\x00" * 100)[:30])
    return {
        "train.epoch=3": ["train.epoch=3: no such key", "did you mean train.epochs?"],
        "train.epochs=many": ["train.epochs=many: wrong type", "train.epochs=20"],
        "optimizer=adma": ["optimizer=adma: no such option", "optimizer=adamw|gradient_descent|sgd"],
        "train.global_batch_size=1": ["train.global_batch_size=1: must be at least the number of ranks, 2"],
        "data=mnist data.root=/no/folder": ["data.root=/no/folder: there is no such folder", "data=digits"],
        f"data=mnist data.root={tmp_path}": ["train-images-idx3-ubyte.gz is damaged", "get the file again"],
        f"run.dir={tmp_path / 'finished'}": ["holds a finished run", "choose another folder"],
        "optimizer.lr=-0.1 train.epochs=0": ["optimizer.lr=-0.1: must be greater than 0", "train.epochs=0: must be"],
        f"run.dir={'x' * 300}": ["File name too long; choose a path that can be used"],
    }


@pytest.mark.parametrize(
    ("recipe", "number"),
    [(RECIPES[0], number) for number in range(9)] + [(RECIPES[-1], 0), (RECIPES[-1], 5)],  # neutral code but for two
)
def test_a_mistake_has_one_message_and_status_2_on_every_rank(recipe: str, number: int, tmp_path: Path) -> None:
    overrides, message = list(mistakes(tmp_path).items())[number]
    before = sorted(tmp_path.rglob("*"))
    result = horovodrun(2, "-m", f"recipes.{recipe}", *overrides.split(), timeout=60)
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout
    spoken = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert all(line.startswith("[0]<stderr>:") for line in spoken), result.stdout
    for part in message:
        assert result.stdout.count(part) == 1, result.stdout
    for rank in range(2):
        assert f"Process {rank} exit with status code 2." in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("how", "status"), [("raise", 1), ("kill", 137)])
def test_a_rank_that_fails_ends_the_job_with_its_status(framework: str, how: str, status: int) -> None:
    result = horovodrun(2, "-m", "tests.troubled_job", framework, how, timeout=40)
    assert result.returncode == status, result.stdout
    assert "rank 0 stops: another rank has left the job" in result.stdout
    assert ("ValueError: on purpose" in result.stdout) == (how == "raise")


def test_ranks_wait_for_one_that_fetches_data_longer_than_any_timeout() -> None:
    env = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "1"}
    result = horovodrun(2, "-m", "tests.troubled_job", FRAMEWORKS[0], "late", timeout=40, env=env)
    assert result.returncode == 0, result.stdout
