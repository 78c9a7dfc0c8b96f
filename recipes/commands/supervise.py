"""Starts a run again after a failure, from its newest checkpoint: for pipelines, parameter servers, whole jobs.

    python -m recipes supervise [restarts=5] [backoff=2] -- COMMAND
    python -m recipes supervise -- horovodrun -np 2 python -m recipes.mnist_mlp_torch run.dir=outputs/a \
        parallel=pipeline train.checkpoint_every=50

After `restarts` failures without a newer checkpoint it gives up. It waits `backoff` seconds before it starts again, and
twice as long each further time, up to a minute. Status 2 (the configuration cannot be run) and 143 (stopped by SIGTERM)
are final. Its status is that of the last start.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.training import checkpoint_files, preemption, run_lock
from recipes.commands import parse

FINAL = (0, 2, preemption.EXIT_STATUS)
LONGEST = 60.0
SECONDS_TO_END = 15.0  # in which the ranks of a launcher that was killed end, too

_signals: list[int] = []  # those that this process has received


@dataclass
class Arguments:
    """The arguments of the command."""

    restarts: int = 5
    backoff: float = 2.0


def main(words: Sequence[str]) -> None:
    """Runs the command until it succeeds or does not get on."""
    place = words.index("--") if "--" in words else len(words)
    arguments, command = parse(Arguments, words[:place]), list(words[place + 1 :])
    folders = [word.partition("=")[2] for word in command if word.startswith("run.dir=")]
    if not folders:
        raise ConfigError(["run.dir=: must be in the command after --, so that it is the same for each start"])
    if arguments.restarts < 0 or arguments.backoff < 0:
        raise ConfigError(["restarts= and backoff=: must be at least 0"])
    sys.exit(_supervised(command, Path(folders[-1]), arguments))


def _supervised(command: Sequence[str], folder: Path, arguments: Arguments) -> int:
    failures, newest = 0, checkpoint_files.last_step(folder / "checkpoints")
    while (status := _started(command)) not in FINAL and not _signals:
        before, newest = newest, checkpoint_files.last_step(folder / "checkpoints")
        failures = 1 if newest > before else failures + 1
        if failures > arguments.restarts:
            print(f"status {status}: {arguments.restarts} restarts without a newer checkpoint; giving up", flush=True)
            break
        seconds = min(LONGEST, arguments.backoff * 2 ** (failures - 1))
        where = f"step {newest}" if newest else "the beginning"
        print(f"status {status}: starting again from {where} in {seconds:g} s", flush=True)
        _wait(seconds, folder)
        if _signals:
            break
    return 128 + _signals[0] if _signals and status else status


def _started(command: Sequence[str]) -> int:
    """The status of the command; signals to this process are passed on to it."""
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise ConfigError([f"{command[0]}: cannot be started ({error.strerror})"]) from error

    def pass_on(number: int, _: object) -> None:
        _signals.append(number)
        process.send_signal(number)  # does nothing if it has ended

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = process.wait()
    return status if status >= 0 else 128 - status


def _wait(seconds: float, folder: Path) -> None:
    """Waits for so long, and until no rank of the last start uses the folder; not after a signal."""
    end = time.monotonic() + seconds
    while not _signals and (time.monotonic() < end or (_is_used(folder) and time.monotonic() < end + SECONDS_TO_END)):
        time.sleep(min(0.2, max(0.0, end - time.monotonic()) or 0.2))


def _is_used(folder: Path) -> bool:
    with suppress(ConfigError):
        if folder.is_dir():
            run_lock.hold(folder)
            run_lock.let_go(folder)
        return False
    return True
