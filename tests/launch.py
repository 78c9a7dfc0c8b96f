"""Starts real jobs for the tests."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Those that are installed; `make setup FRAMEWORKS=torch` leaves the other one out.
FRAMEWORKS = [name for name, module in (("torch", "torch"), ("tf", "tensorflow")) if find_spec(module)]
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(
    command: Sequence[object], timeout: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command from the project's root; stdout has stderr in it; fails the test when it takes too long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_"))}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | dict(env or {})
    with subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # horovodrun then ends its ranks
            try:
                output, _ = process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
            raise AssertionError(f"not finished after {timeout} s: {command}\n{output}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def horovodrun(
    num_ranks: int, *arguments: str | Path, timeout: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python <arguments>` on so many ranks of this host."""
    launcher = ["horovodrun", "--gloo", "-np", str(num_ranks)]
    return run([*launcher, sys.executable, *arguments], timeout, env)


def train(num_ranks: int, recipe: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Trains with a recipe into the folder and returns the events of metrics.jsonl."""
    shutil.rmtree(folder, ignore_errors=True)
    job = horovodrun(num_ranks, "-m", f"recipes.{recipe}", f"run.dir={folder}", *overrides)
    assert job.returncode == 0, job.stdout
    return read_events(folder)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
