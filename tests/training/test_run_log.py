"""What a run records, without training."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.config.composition import compose
from common.data.datasets.linear import Measurements
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients.bucketing import Bucket
from common.gradients.step_metrics import StepMetrics
from common.training.progress import Progress
from common.training.run_log import RunLog
from tests.helpers.one_rank import OneRank

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

NUMBERS = Measurements(np.zeros((10, 1)), np.zeros((10, 1)))


def record(folder: Path, rank: int = 0, loss: float = 0.5, restored: Mapping[str, Any] = MappingProxyType({})) -> None:
    """A run of two steps over ten examples, on rank `rank` of two."""
    overrides = [f"run.dir={folder}", "train.global_batch_size=5", "train.epochs=1", "train.log_every=1"]
    cfg = compose("mnist_mlp", [*overrides, "data.ledger=true"])
    plan = TrainingSampler.from_config(cfg, 10, Topology(rank, 2, rank, 2), restored)
    run = RunLog(cfg, "some_recipe_torch", plan, OneRank())
    for step, _ in run.steps(NUMBERS):
        run.record(step, 0.1, StepMetrics(loss, 0, 0, 0, wire_bytes=[1000]))
    run.log(step, test_loss=0.25)
    run.finish([Bucket("none", (0,), 250)], weights_sha256="00")


def test_rank_zero_leaves_the_files_of_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{**event, "wall_seconds": 0} for event in events] == [
        {"step": 1, "epoch": 1, "lr": 0.1, "train_loss": 0.5, "wire_bytes": 1000, "wall_seconds": 0},
        {"step": 2, "epoch": 1, "lr": 0.1, "train_loss": 0.5, "wire_bytes": 1000, "wall_seconds": 0},
        {"step": 2, "epoch": 1, "test_loss": 0.25, "wall_seconds": 0},
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    measured = {"wall_seconds", "examples_per_second", "step_seconds_median", "data_wait_share"}
    assert all(summary.pop(name) > 0 for name in measured)
    lost = summary.pop("goodput")
    assert 0 < lost["useful_share"] <= 1
    assert (lost["restarts"], lost["replayed_steps"]) == (0, 0)
    assert summary == {
        "recipe": "some_recipe_torch",
        "framework": "torch",
        "world_size": 2,
        "num_stages": 1,
        "num_replicas": 2,
        "steps": 2,
        "resumed_from_step": 0,
        "examples": 10,
        "wire_bytes_per_step": 1000,
        "dense_bytes_per_step": 1000,
        "buckets": [{"method": "none", "num_values": 250, "wire_bytes_per_step": 1000}],
        "weights_sha256": "00",
        "lr": 0.1,
        "train_loss": 0.5,
        "wire_bytes": 1000,
        "test_loss": 0.25,
        "completed": True,
    }
    assert "global_batch_size: 5" in (tmp_path / "config.yaml").read_text()
    (file,) = (tmp_path / "tensorboard").iterdir()
    scalars = [(event.step, value.tag) for event in EventFileLoader(str(file)).Load() for value in event.summary.value]
    of_step = ["lr", "train_loss", "wire_bytes"]
    assert scalars == [*((step, name) for step in (1, 2) for name in of_step), (2, "test_loss")]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("some_recipe_torch: 2 ranks, 10 examples")
    assert lines[1].startswith("note: lr_schedule.warmup_steps=20: the run has 2 steps, and ends before")
    assert lines[2].startswith("step 1  epoch 1  50 %  lr 0.1  train_loss 0.5")
    assert lines[-1].endswith(str(tmp_path))


def test_a_run_that_goes_on_keeps_the_events_before_and_drops_those_after(tmp_path: Path) -> None:
    record(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    restored = {"position": {"step": 1, "epoch": 1, "offset": 5}, "batch_sizes": {}}
    record(tmp_path, restored=restored)
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after[0] == before[0]
    assert [json.loads(line)["step"] for line in after] == [1, 2, 2]
    (file,) = (tmp_path / "tensorboard").iterdir()
    scalars = [event.step for event in EventFileLoader(str(file)).Load() for _ in event.summary.value]
    assert scalars == [1, 1, 1, 2, 2, 2, 2]
    assert json.loads((tmp_path / "summary.json").read_text())["resumed_from_step"] == 1


def test_other_ranks_write_their_ledger_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, rank=1)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_ends_training_on_every_rank(tmp_path: Path, rank: int) -> None:
    with pytest.raises(TrainingError, match=r"train_loss is nan at step 1; a smaller optimizer.lr may help"):
        record(tmp_path, rank, loss=float("nan"))
    assert not (tmp_path / "summary.json").exists()


def test_a_damaged_record_is_kept_aside_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    path = tmp_path / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    foreign = [
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"step": "1"}\n',
        b'{"step": 1, "epoch": 1, "x": 1e999}\n',
        b"[" * 9999 + b"\n",
    ]
    damaged = b"".join([*foreign, first, *others, b'{"step": 2, "ep'])
    path.write_bytes(damaged)
    record(tmp_path, restored={"position": {"step": 1, "epoch": 1, "offset": 5}, "batch_sizes": {}})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damaged
    assert "is damaged, and kept as metrics.damaged.jsonl: line 1 is not JSON" in capsys.readouterr().err


def test_a_line_of_progress_fits_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    plan = TrainingSampler.from_config(compose("mnist_mlp", ["train.max_steps=9"]), 1000, Topology(0, 1, 0, 1))
    step = next(plan.steps())
    for columns in (20, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        Progress(plan).show(step, {"train_loss": 0.123456, "test_loss": 0.5, "noise_scale": 1234.5, "staleness": 3})
        line = capsys.readouterr().out.removeprefix("\r\033[K")
        assert len(line) < columns
        assert ("noise_scale" in line) == (columns == 200)
        assert line.endswith("ETA 0:00") == (columns > 20)


def test_one_rank_is_not_one_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose("mnist_mlp", [f"run.dir={tmp_path}"])
    RunLog(cfg, "some_recipe_torch", TrainingSampler.from_config(cfg, 10, Topology(0, 1, 0, 1)), OneRank())
    said = capsys.readouterr().out
    assert said.startswith("some_recipe_torch: 1 rank, 10 examples")
    assert "note: train.global_batch_size=64: a step takes all 10 examples, as there are no more" in said
