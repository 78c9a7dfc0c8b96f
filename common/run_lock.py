"""One job at a time in a run's folder: rank 0 holds a lock on the file `lock` in it, which names its host and process.

The lock is the kernel's (flock) and ends with the process, however that ends. A file that is left behind locks nothing.
"""

import atexit
import fcntl
import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from common.config import ConfigError

NAME = "lock"
SECONDS = 10.0  # a network file system whose lock service is gone may never answer

_held: dict[Path, BinaryIO] = {}


def hold(folder: Path) -> None:
    """Takes the lock of a folder that is there, unless this process has it already.

    Where the file system has no locks, says so and goes on.

    Raises:
        ConfigError: another job has it.
    """
    path = folder.resolve() / NAME
    if path in _held:
        return
    file = path.open("ab+")
    if not _lock(file, folder):
        file.seek(0)
        owner = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        raise ConfigError([f"run.dir={folder}: is in use by {owner}; wait for its end, or choose another folder"])
    if not _is_at(file, path):  # who had the lock has just let go of it, and removed the file
        file.close()
        hold(folder)
        return
    file.truncate(0)
    file.write(f"{socket.gethostname()}, process {os.getpid()}\n".encode())
    file.flush()
    _held[path] = file
    atexit.register(let_go, folder)


def let_go(folder: Path) -> None:
    """Gives the lock back, if this process has it."""
    path = folder.resolve() / NAME
    file = _held.pop(path, None)
    if file is not None:
        with suppress(OSError):
            path.unlink()
        file.close()


def _lock(file: BinaryIO, folder: Path) -> bool:
    """Whether no other process has the lock."""
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
