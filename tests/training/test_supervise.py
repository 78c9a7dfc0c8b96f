"""A supervisor that starts a run again after failures."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.data import example_log
from tests.helpers.launch import BIN, FRAMEWORKS, ROOT, run
from tests.helpers.runs import SMALL

SUPERVISE = [sys.executable, "-m", "recipes", "supervise"]
PIPELINE = [*SMALL["mnist_mlp"], "model.hidden_sizes=[64,64]", "parallel=pipeline", "data.ledger=true"]


def test_a_pipeline_that_loses_ranks_is_completed(tmp_path: Path) -> None:
    recipe = f"recipes.mnist_mlp_{FRAMEWORKS[0]}"
    command = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", recipe, *PIPELINE]
    command += [f"run.dir={tmp_path}", "train.max_steps=30", "train.checkpoint_every=5"]
    chaos = "chaos=kill:rank=1,step=8;kill:rank=0,step=18;slow:seconds=0.02"
    job = run([*SUPERVISE, "backoff=0.1", "--", *command, chaos])
    assert job.returncode == 0, job.stdout
    assert "status 137: starting again from step " in job.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 30
    for is_right, line in example_log.check(tmp_path):
        assert is_right, line


def test_what_cannot_succeed_is_given_up(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "import sys; print('tried'); sys.exit(7)", f"run.dir={tmp_path}"]
    job = run([*SUPERVISE, "restarts=2", "backoff=0.01", "--", *failing])
    assert (job.returncode, job.stdout.count("tried")) == (7, 3), job.stdout
    job = run([*SUPERVISE, "--", sys.executable, "-c", "import sys; sys.exit(2)", f"run.dir={tmp_path}"])
    assert (job.returncode, job.stdout) == (2, "")
    for words, message in (([], "run.dir=: must be in the command"), (["restart=1", "--"], "restart=1: no such key")):
        job = run([*SUPERVISE, *words])
        assert (job.returncode, message in job.stdout) == (2, True), job.stdout


def test_a_signal_between_two_starts_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(7)", f"run.dir={tmp_path}"]
    with subprocess.Popen(
        [*SUPERVISE, "backoff=30", "--", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        assert job.stdout
        assert "starting again from the beginning in 30 s" in job.stdout.readline()
        job.send_signal(signal.SIGTERM)
        assert (job.communicate(timeout=20)[0], job.returncode) == ("", 143)


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    command = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", f"recipes.mnist_mlp_{FRAMEWORKS[0]}"]
    command += [f"run.dir={tmp_path}", "train.epochs=1000", "chaos=slow:seconds=0.05"]
    with subprocess.Popen(
        [*SUPERVISE, "--", *command],
        cwd=ROOT,
        env={"PATH": f"{BIN}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=60)
    assert (job.returncode, "as asked by a signal" in output) == (143, True), output
