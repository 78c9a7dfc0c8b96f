"""Ranks that leave and join: an elastic run ends with the bits of a run that nobody disturbed."""

import json
from pathlib import Path

from common.data import example_log
from tests.helpers.launch import FRAMEWORKS, elastic_options, horovodrun
from tests.helpers.runs import SMALL

import pytest

RUNS = {
    "mnist_mlp": ["train.max_steps=75", "train.lanes=4", "train.commit_every=7", "train.checkpoint_every=30"],
}
# Rank 0 is lost at once; when another rank has joined, it is lost, too. Steps take long enough for that.
CHAOS = "chaos=kill:rank=0,step=5;kill:rank=1,step=68;slow:seconds=0.15"


def options(folder: Path) -> list[str]:
    """Two names for this host; a host whose rank was lost is used again after two seconds."""
    return [*elastic_options(folder, 1), "--max-np", "2", "--blacklist-cooldown-range", "1", "2"]


def outcome(folder: Path) -> tuple[str, float]:
    """The SHA-256 of the final weights, and the test loss."""
    summary = json.loads((folder / "summary.json").read_text())
    return summary["weights_sha256"], summary["test_loss"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("task", RUNS)
def test_lost_ranks_and_new_ones_change_no_bit(task: str, framework: str, tmp_path: Path) -> None:
    module, whole, disturbed = f"recipes.{task}_{framework}", tmp_path / "whole", tmp_path / "disturbed"
    overrides = [*SMALL[task], *RUNS[task], "train.reproducible=true", "train.log_every=1", "data.ledger=true"]
    job = horovodrun(2, "-m", module, *overrides, f"run.dir={whole}")
    assert job.returncode == 0, job.stdout
    job = horovodrun(
        2, "-m", module, *overrides, CHAOS, "elastic=true", f"run.dir={disturbed}", options=options(tmp_path)
    )
    assert job.returncode == 0, job.stdout
    assert "a rank is lost: going on" in job.stdout
    assert "ranks join or leave: going on" in job.stdout, job.stdout
    assert outcome(disturbed) == outcome(whole)
    lines = [json.loads(line) for line in (disturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 76))
    for is_right, line in example_log.check(disturbed):
        assert is_right, line


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_elastic_runs_need_an_elastic_launcher(framework: str, tmp_path: Path) -> None:
    job = horovodrun(2, "-m", f"recipes.mnist_mlp_{framework}", "elastic=true")
    assert (job.returncode, "elastic=true: ranks can leave and join only under" in job.stdout) == (2, True), job.stdout
    job = horovodrun(2, "-m", f"recipes.mnist_mlp_{framework}", options=options(tmp_path))
    assert "elastic=false: horovodrun was started with --min-np" in job.stdout
    assert job.returncode == 2, job.stdout
