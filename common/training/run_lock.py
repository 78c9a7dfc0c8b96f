"""Allows one job at a time in a run folder: rank 0 locks the file `lock` in it, which names its host and process.

It is a kernel lock (flock), which is released when the process ends in any way. A file that is left behind locks
nothing.
"""

import atexit
import fcntl
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from common.errors import ConfigError

NAME = "lock"
SECONDS = 10.0  # timeout: a network file system without its lock service may never answer

_held: dict[Path, BinaryIO] = {}


def hold(folder: Path, job: str = "", patience: float = 0.0) -> None:
    """Locks an existing folder, unless this process has locked it already.

    If the file system has no locks, prints a warning and continues.

    Args:
        folder: the folder.
        job: name of this job.
        patience: seconds to wait for a lock that another process of this job has.

    Raises:
        ConfigError: another job has locked the folder.
    """
    path = folder.resolve() / NAME
    if path in _held:
        return
    file = path.open("ab+")
    end = time.monotonic() + patience
    while not (is_locked := _lock(file, folder)) and _owner(file)[1] == job != "" and time.monotonic() < end:
        time.sleep(0.2)
    if not is_locked:
        owner = _owner(file)[0] or "another process"
        file.close()
        raise ConfigError([f"run.dir={folder}: is in use by {owner}; wait for its end, or choose another folder"])
    if not _is_at(file, path):  # the previous owner has just removed the file
        file.close()
        hold(folder, job, patience)
        return
    file.truncate(0)
    file.write(f"{socket.gethostname()}, process {os.getpid()}\n{job}\n".encode())
    file.flush()
    _held[path] = file
    atexit.register(let_go, folder)


def _owner(file: BinaryIO) -> tuple[str, str]:
    """Who has locked the file, and the name of its job."""
    file.seek(0)
    process, job, *_ = [*file.read(400).decode(errors="replace").splitlines(), "", ""]
    return process.strip(), job


def let_go(folder: Path) -> None:
    """Releases the lock, if this process has it."""
    path = folder.resolve() / NAME
    file = _held.pop(path, None)
    if file is not None:
        with suppress(OSError):
            path.unlink()
        file.close()


def _lock(file: BinaryIO, folder: Path) -> bool:
    """Tries to lock the file; False if another process has the lock."""
    answers: list[OSError | None] = []

    def ask() -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            answers.append(None)
        except OSError as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    answer = answers[0] if answers else TimeoutError(0, f"no answer in {SECONDS:.0f} s")
    if isinstance(answer, BlockingIOError):
        return False
    if answer is not None:
        print(
            f"run.dir={folder}: its file system has no locks ({answer.strerror}): a second job in this folder would "
            "not be noticed",
            file=sys.stderr,
            flush=True,
        )
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
