"""Starts real jobs for the tests."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

# Those that are installed; `make setup FRAMEWORKS=torch` leaves the other one out.
FRAMEWORKS = [name for name, module in (("torch", "torch"), ("tf", "tensorflow")) if find_spec(module)]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(
    command: Sequence[object], timeout: float = 120, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs a command, from the project's root; stdout has stderr in it; fails the test when it takes too long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_"))}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | dict(env or {})
    with subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
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
    num_ranks: int,
    *arguments: str | Path,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Runs `python <arguments>` on so many ranks of this host, with the launcher's options."""
    launcher = ["horovodrun", "--gloo", "-np", str(num_ranks), *options]
    return run([*launcher, sys.executable, *arguments], timeout, env, cwd)


# Names for this host: each counts as a host of its own.
HOSTS = ("localhost", "127.0.0.1", socket.gethostname())


def elastic_options(folder: Path, min_ranks: int, num_hosts: int = 2) -> list[str]:
    """The launcher's options of an elastic job on hosts of one rank each; one that lost its rank is used no more."""
    script = folder / "hosts.sh"
    script.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
    script.chmod(0o755)
    set_hosts(folder, num_hosts)
    return ["--min-np", str(min_ranks), "--network-interfaces", "lo", "--host-discovery-script", str(script)]


def set_hosts(folder: Path, num_hosts: int) -> None:
    """Lets the launcher of an elastic job find so many hosts from now on."""
    unfinished = folder / "hosts.unfinished"
    unfinished.write_text("".join(f"{host}:1\n" for host in HOSTS[:num_hosts]))
    unfinished.rename(folder / "hosts")


def kill_when(
    ready: Callable[[], bool], num_ranks: int, *arguments: str | Path, signal_number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    """Starts ranks as horovodrun() does, and sends a signal when ready: SIGKILL to all processes, others to the job."""
    launcher = ["horovodrun", "--gloo", "-np", str(num_ranks), sys.executable]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if ready():
                    break
            except (OSError, ValueError):  # not there yet, or a line that is being written
                pass
            time.sleep(0.02)
        processes = [process.pid]
        if signal_number == signal.SIGKILL:
            processes += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        output, _ = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def train(num_ranks: int, recipe: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Trains with a recipe into the folder and returns the events of metrics.jsonl."""
    shutil.rmtree(folder, ignore_errors=True)
    job = horovodrun(num_ranks, "-m", f"recipes.{recipe}", f"run.dir={folder}", *overrides)
    assert job.returncode == 0, job.stdout
    return read_events(folder)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
