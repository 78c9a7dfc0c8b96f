"""Checkpoints on disk, and what a run refuses to go on from."""

import errno
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import file_io
from common.config.composition import compose
from common.data import example_log
from common.data.sampler import TrainingSampler
from common.distributed.array_exchange import Arrays
from common.errors import ConfigError, Stopped, TrainingError
from common.gradients.step_metrics import StepMetrics
from common.training import checkpoint_files, run_lock
from common.training.checkpoint import Checkpoints, check_names_and_shapes
from tests.helpers.launch import ROOT
from tests.helpers.one_rank import ALONE, OneRank

import numpy as np
import pytest

SUMS = StepMetrics(0.5, 0, 0, 0)


class Numbers:
    """A model of one weight."""

    def __init__(self) -> None:
        self.weight, self.moment = np.zeros(3, np.float32), np.zeros(3, np.float32)

    def weights(self) -> dict[str, np.ndarray]:
        return {"0.weight": self.weight.copy()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return {"0.weight.momentum": self.moment.copy()}

    def gradients(self) -> dict[str, np.ndarray]:
        return {"counters": np.zeros(4)}

    def load(self, weights: Arrays, optimizer_state: Arrays, gradients: Arrays) -> None:
        check_names_and_shapes({"0.weight": (3,)}, weights)
        self.weight = np.array(weights["0.weight"])
        self.moment = np.array(optimizer_state.get("0.weight.momentum", np.zeros(3, np.float32)))

    def broadcast(self) -> None: ...


def run(
    folder: Path, *overrides: str, stop_at: int = 0, data: str = "data", recipe: str = "mnist_mlp_torch"
) -> Numbers:
    """Trains 10 steps, each of which adds 1 to the weight and 2 to the moment."""
    cfg = compose("mnist_mlp", [f"run.dir={folder}", "train.max_steps=10", "train.checkpoint_every=3", *overrides])
    numbers = Numbers()
    checkpoints = Checkpoints(cfg, recipe, data, numbers, OneRank(), ALONE, {"tokenizer": "abc"})
    plan = TrainingSampler.from_config(cfg, 1000, ALONE, checkpoints.restore())
    for step in plan.steps():
        numbers.weight += 1
        numbers.moment += 2
        checkpoints.save_if_due(step, SUMS._replace(stop=float(step.number == stop_at)), plan)
    return numbers


def saved(folder: Path) -> list[str]:
    return saved_in(folder / "checkpoints")


def saved_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoints_are_kept_and_hold_what_training_needs(tmp_path: Path) -> None:
    run(tmp_path)
    assert saved(tmp_path) == ["step-00000006", "step-00000009", "step-00000010"]
    state = json.loads((tmp_path / "checkpoints/step-00000009/state.json").read_text())
    assert state["position"] == {"step": 9, "epoch": 1, "offset": 576}
    assert (state["task"], state["framework"], state["fingerprint"]) == ("mnist_mlp", "torch", "data")
    assert state["config"]["train"]["max_steps"] == 10
    assert state["batch_sizes"]["changes"] == [[1, 64]]
    assert state["tokenizer"] == "abc"
    assert "numpy" in state["versions"]
    read = checkpoint_files.read(tmp_path / "checkpoints/step-00000009")
    assert read.weights["0.weight"].tolist() == [9] * 3
    assert read.optimizer_state["0.weight.momentum"].tolist() == [18] * 3


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="stopped at step 5"):
        run(tmp_path, stop_at=5)
    assert saved(tmp_path) == ["step-00000003", "step-00000005"]
    numbers = run(tmp_path)
    assert (numbers.weight[0], numbers.moment[0]) == (10, 20)


@pytest.mark.parametrize("how", ["resume=PATH", "damage"])
def test_a_run_that_goes_back_sets_the_steps_beyond_aside(tmp_path: Path, how: str) -> None:
    run(tmp_path)
    (tmp_path / "lock").write_text("another host, process 1\n")  # left behind by a process that is gone
    start = []
    if how == "resume=PATH":
        start = [f"resume={tmp_path}/checkpoints/step-00000006"]
    else:
        for step in (9, 10):
            damage(tmp_path / f"checkpoints/step-{step:08}", "cut")
    with pytest.raises(Stopped):
        run(tmp_path, "train.keep_checkpoints=1", *start, stop_at=7)
    assert saved(tmp_path) == ["abandoned", "step-00000007"]
    assert saved_in(tmp_path / "checkpoints/abandoned") == ["step-00000009", "step-00000010"]
    assert run(tmp_path, "train.keep_checkpoints=1").weight[0] == 10
    if how == "resume=PATH":  # what was set aside is as sound as it was, and another branch may follow
        again = [f"resume={tmp_path}/checkpoints/abandoned/step-00000009", "resume.allow_changes=[train.max_steps]"]
        with pytest.raises(Stopped):
            run(tmp_path, *again, "train.max_steps=12", stop_at=11)
        assert "step-00000010.2" in saved_in(tmp_path / "checkpoints/abandoned")


def test_what_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Numbers.weights

    def broken(self: Numbers) -> dict[str, np.ndarray]:
        return {"0.weight": np.where(self.weight > 5, np.nan, weights(self)["0.weight"])}

    monkeypatch.setattr(Numbers, "weights", broken)
    with pytest.raises(TrainingError, match=r"0\.weight is not finite after step 6, and is not saved"):
        run(tmp_path, "train.keep_checkpoints=1")
    assert saved(tmp_path) == ["step-00000003"]


def test_the_record_is_on_the_disk_before_a_checkpoint_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(method: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, *all_else: Any) -> None:
            order.append(path.name)
            method(path, *all_else)

        return call

    monkeypatch.setattr(example_log, "drop", lambda folder, start: None)
    monkeypatch.setattr(checkpoint_files, "write", noted(checkpoint_files.write))
    monkeypatch.setattr(file_io, "sync_path", noted(file_io.sync_path))
    (tmp_path / "ledger").mkdir()
    for path in ("metrics.jsonl", "ledger/from-step-00000001.rank-0000.jsonl"):
        (tmp_path / path).touch()
    run(tmp_path, "train.checkpoint_every=0")
    names = ["from-step-00000001.rank-0000.jsonl", "metrics.jsonl", "step-00000010"]
    assert [name for name in order if name in names][:3] == names


HOLD = """
import sys, time
from pathlib import Path
from common.training import run_lock
run_lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_job_in_the_folder_is_refused_until_it_ends(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"run.dir=.*: is in use by {socket.gethostname()}, process {job.pid};"):
            run(tmp_path)
        job.kill()
    run(tmp_path)
    run_lock.let_go(tmp_path)
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("answer", ["No locks available", "no answer in 0 s"])
def test_a_file_system_without_locks_is_said_and_does_not_hang(
    tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = threading.Event()

    def flock(*_: Any) -> None:
        if answer.startswith("no answer"):
            given.wait(20)
        raise OSError(errno.ENOLCK, answer)

    monkeypatch.setattr("common.training.run_lock.SECONDS", 0.1)
    monkeypatch.setattr("fcntl.flock", flock)
    run(tmp_path)
    given.set()
    assert f"its file system has no locks ({answer})" in capsys.readouterr().err


def damage(folder: Path, how: str) -> None:
    weights = folder / "weights.safetensors"
    content = weights.read_bytes()
    match how:
        case "cut":
            weights.write_bytes(content[:-1])
        case "flipped":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "gone":
            weights.unlink()
        case "not JSON":
            (folder / "state.json").write_text("{")


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "not JSON"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=5)
    damage(tmp_path / "checkpoints/step-00000005", how)
    assert run(tmp_path).weight[0] == 10
    said = capsys.readouterr().err
    assert "step-00000005: is no sound checkpoint" in said
    assert "going on from step-00000003" in said


@pytest.mark.parametrize(
    "name", ["state.json", *(f"{part}.safetensors" for part in ("weights", "optimizer", "gradients"))]
)
def test_a_checkpoint_that_is_cut_at_any_tenth_is_not_used(name: str, tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000010" / name
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        found, problems = checkpoint_files.newest(tmp_path)
        assert found
        assert (found.folder.name, len(problems)) == ("step-00000009", 1)


def test_without_a_sound_checkpoint_nothing_is_started_or_overwritten(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=2)
    damage(tmp_path / "checkpoints/step-00000002", "cut")
    run_lock.let_go(tmp_path)  # as the end of its process does
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source in ("auto", "never", str(tmp_path), str(tmp_path / "checkpoints/step-00000002")):
        with pytest.raises(ConfigError, match=r"sound checkpoint|holds checkpoints"):
            run(tmp_path, f"resume={source}")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=0.2"], r"optimizer.lr=0.2: is 0.1 in .*step-00000005; .*resume.allow_changes=\[optimizer.lr\]"),
        (["optimizer=adamw"], "optimizer.beta1=0.9: is None in"),
        (["seed=1"], "seed=1: is 0 in"),
        (["train.epochs=21"], "train.epochs=21: is 20 in"),
        (["data.max_shift=1"], "data.max_shift=1: is 0 in"),
        (["train.reproducible=true"], "train.reproducible=True: is False in"),
    ],
)
def test_what_would_change_the_curve_must_be_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=5)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *overrides)
    allowed = ",".join(override.partition("=")[0] for override in overrides)
    numbers = run(tmp_path, *overrides, f"resume.allow_changes=[{allowed}]")
    assert numbers.weight[0] == 10
    assert numbers.moment[0] == (10 if overrides == ["optimizer=adamw"] else 20)  # another optimizer starts afresh


def test_what_does_not_change_the_curve_may_change(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=5)
    changes = ["train.log_every=7", "train.checkpoint_every=0", "parallel.num_micro_batches=2", "data.ledger=true"]
    changes += ["train.lanes=4", "train.commit_every=3", "chaos=kill:step=900"]
    run(tmp_path, *changes, "train.on_nonfinite=skip")


def test_a_checkpoint_from_before_lanes_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=5)
    path = tmp_path / "checkpoints/step-00000005/state.json"
    state = json.loads(path.read_text())
    for key in ("reproducible", "lanes", "commit_every"):
        del state["config"]["train"][key]
    state["sha256"]["state.json"] = checkpoint_files.state_sha256(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"train.reproducible=True: is False in"):
        run(tmp_path, "train.reproducible=true")
    assert run(tmp_path).weight[0] == 10


def test_other_examples_or_another_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=5)
    with pytest.raises(ConfigError, match=r"data: the training examples are not those of .*step-00000005"):
        run(tmp_path, data="other")
    with pytest.raises(ConfigError, match="is a checkpoint of mnist_mlp, not of mnist_cnn"):
        run(tmp_path, recipe="mnist_cnn_torch")
    elsewhere = tmp_path / "elsewhere"
    assert run(elsewhere, f"resume={tmp_path}", "resume.allow_changes=[data]", data="other").weight[0] == 10
    state = json.loads((elsewhere / "checkpoints/step-00000006/state.json").read_text())
    assert state["position"] == {"step": 6, "epoch": 1, "offset": 64}  # the other examples from their beginning


def test_weights_of_another_model_are_named() -> None:
    arrays = {"0.weight": np.zeros((2, 3)), "1.bias": np.zeros(2)}
    with pytest.raises(
        ConfigError, match=r"another model: 0.weight has the shape \(2, 3\) instead of \(3, 3\); 1.bias is"
    ):
        check_names_and_shapes({"0.weight": (3, 3)}, arrays)


def test_a_checkpoint_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    tmp_path.joinpath("checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="checkpoints"):
        run(tmp_path)


def test_writing_does_not_hold_up_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    write = checkpoint_files.write

    def slowly(folder: Path, *content: Any) -> None:
        assert folder.name != "step-00000003" or held.wait(10)
        write(folder, *content)

    monkeypatch.setattr(checkpoint_files, "write", slowly)
    cfg = compose("mnist_mlp", [f"run.dir={tmp_path}", "train.checkpoint_every=3"])
    checkpoints = Checkpoints(cfg, "mnist_mlp_torch", "data", Numbers(), OneRank(), ALONE)
    plan = TrainingSampler.from_config(cfg, 1000, ALONE, checkpoints.restore())
    for step in plan.steps():
        checkpoints.save_if_due(step, SUMS, plan)
        if step.number == 5:
            assert not list(tmp_path.rglob("step-*"))
            held.set()
        if step.number == 6:
            break
    assert (tmp_path / "checkpoints/step-00000003").is_dir()
