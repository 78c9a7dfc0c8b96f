"""Failures on purpose, and what runs do then."""

from pathlib import Path

from common.config import failures
from common.config.failures import Failure
from common.errors import ConfigError, TrainingError
from common.training import checkpoint_files
from tests.helpers.launch import FRAMEWORKS, horovodrun, read_events
from tests.helpers.runs import SMALL, train_here

import pytest

RUN = [*SMALL["mnist_mlp"], "train.max_steps=12", "train.log_every=1", "train.checkpoint_every=5"]


def test_a_text_says_what_fails_and_when() -> None:
    assert failures.parse("") == []
    assert failures.parse("kill:rank=1,step=120; slow:seconds=0.5") == [
        Failure("kill", rank=1, step=120),
        Failure("slow", seconds=0.5),
    ]
    for text in (
        "kill",
        "kill:rank=1",
        "kill:step=0",
        "kill:step=1,p=2",
        "die:step=1",
        "kill:when=1",
        "kill:kind=x",
        "slow:p=0.5,seconds=1",
    ):
        with pytest.raises(ConfigError, match=r"must be kill\|freeze"):
            failures.parse(text)
    for text, missing in (("freeze:step=3", "seconds"), ("full_disk:step=3", "bytes")):
        with pytest.raises(ConfigError, match=f"needs {missing}="):
            failures.parse(text)


@pytest.mark.ranks(2)
def test_a_rank_that_stops_for_a_while_changes_nothing(framework: str, shared_path: Path) -> None:
    chaos = "chaos=freeze:rank=1,step=3,seconds=0.3;slow:rank=0,step=8,seconds=0.01"
    undisturbed = train_here(framework, "mnist_mlp", shared_path / "whole", *RUN)
    assert train_here(framework, "mnist_mlp", shared_path / "disturbed", *RUN, chaos) == undisturbed


@pytest.mark.ranks(2)
def test_all_ranks_skip_the_step_in_which_one_has_no_number(framework: str, shared_path: Path) -> None:
    overrides = [*RUN, "train.on_nonfinite=skip", "chaos=nan:rank=1,step=5"]  # there is a checkpoint after it
    losses = train_here(framework, "mnist_mlp", shared_path / "run", *overrides)
    assert sorted(losses) == [step for step in range(1, 13) if step != 5]
    skipped = {event["step"]: event["skipped_steps"] for event in read_events(shared_path / "run") if "lr" in event}
    assert skipped == {step: int(step >= 5) for step in range(1, 13)}


@pytest.mark.ranks(2)
def test_a_flipped_bit_is_found(framework: str, shared_path: Path) -> None:
    with pytest.raises(TrainingError, match="hold other weights than rank 0"):
        train_here(framework, "mnist_mlp", shared_path / "run", *RUN, "chaos=bitflip:rank=1,step=12")


@pytest.mark.ranks(2)
def test_a_damaged_checkpoint_is_found(framework: str, shared_path: Path) -> None:
    chaos = "chaos=slow:step=11,seconds=0.5;corrupt_checkpoint:rank=0,step=12"
    train_here(framework, "mnist_mlp", shared_path / "run", *RUN, chaos)
    older, damaged, newest = checkpoint_files.saved(shared_path / "run" / "checkpoints")
    for folder in (older, newest):
        checkpoint_files.read(folder)
    with pytest.raises(ConfigError, match="is no sound checkpoint"):
        checkpoint_files.read(damaged)


def test_a_full_disk_and_a_cut_connection_end_a_run(tmp_path: Path) -> None:
    words = ["-m", f"recipes.mnist_mlp_{FRAMEWORKS[0]}", *RUN]
    job = horovodrun(
        2, *words, f"run.dir={tmp_path}/a", "chaos=slow:step=6,seconds=0.3;full_disk:rank=0,step=9,bytes=9000"
    )
    assert job.returncode == 2, job.stdout
    assert "Traceback" not in job.stdout
    assert [folder.name for folder in checkpoint_files.saved(tmp_path / "a" / "checkpoints")] == ["step-00000005"]
    job = horovodrun(2, *words, f"run.dir={tmp_path}/b", "chaos=drop_link:rank=1,step=7", env={"HOROVOD_SHM": "0"})
    assert (job.returncode, "another rank has left the job" in job.stdout) == (1, True), job.stdout
