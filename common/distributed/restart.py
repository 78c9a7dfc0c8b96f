"""A script of one's own in an elastic job: when ranks leave or join, all ranks start it again.

A process is replaced in its place (exec), so that the launcher does not see it end. The script then goes on from its
own checkpoint, as after any other break; Horovod and the frameworks begin anew.
"""

import gc
import io
import logging
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from common.distributed import launcher_env
from common.distributed.consensus import Runtime

_AGAIN = "HOROVOD_SCRIPT_STARTED_AGAIN"
_PLACE = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
_FOLDER = os.getcwd()  # of the start: the script may leave it


class Restart:
    """Starts the script again when a rank is lost, or when the launcher has announced that ranks will leave or join.

    To be made before Horovod starts: after a restart, it waits for this rank's new place in the job. Without an elastic
    launcher it does nothing.

    Args:
        runtime: the framework's runtime.

    Raises:
        SystemExit: with status 1, if this rank has no place any more.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._is_announced = runtime, False
        self._hook = sys.excepthook
        if launcher_env.is_elastic():
            runtime.listen_to_launcher(self)  # from now on, so that no change is missed
            sys.excepthook = self._on_error
            if os.environ.pop(_AGAIN, None):
                _rejoin()

    def on_hosts_updated(self, timestamp: int, change: int) -> None:
        """Called by Horovod when the launcher has found other hosts; on one rank, whose connections the others lose."""
        self._is_announced = True

    def between_batches(self) -> None:
        """Called where a script can be interrupted without harm."""
        if self._is_announced:
            self._again("ranks join or leave")

    def _on_error(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if self._is_of_lost_rank(error):
            self._again("a rank is lost")
        self._hook(kind, error, traceback)

    def _is_of_lost_rank(self, error: BaseException | None) -> bool:
        while error is not None:
            if self._runtime.is_lost_rank(error):
                return True
            error = error.__cause__ or error.__context__
        return False

    def _again(self, why: str) -> NoReturn:
        if os.environ["HOROVOD_LOCAL_RANK"] == "0":
            print(f"{why}: the script starts again, and goes on from its checkpoint", file=sys.stderr)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would raise an error for each of its readers
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        self._runtime.shutdown()
        _flush_files()
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if int(name) > 2:
                    os.close(int(name))
        os.environ[_AGAIN] = "1"
        os.chdir(_FOLDER)
        os.execv(sys.executable, sys.orig_argv)


def _rejoin() -> None:
    """Waits for this rank's new place in the job, which it takes from the environment when Horovod starts."""
    from horovod.runner.elastic.rendezvous import GET_RANK_AND_SIZE
    from horovod.runner.http.http_client import send_request

    names = ("GLOO_RENDEZVOUS_ADDR", "GLOO_RENDEZVOUS_PORT", "HOSTNAME", "LOCAL_RANK")
    address, port, host, local_rank = (os.environ[f"HOROVOD_{name}"] for name in names)
    try:
        place = send_request("GET", address, port, GET_RANK_AND_SIZE, f"{host}:{local_rank}").decode().split(",")
    except RuntimeError as error:
        _end(f"this rank cannot start again: {error}")
    if place[0] == "-1":
        _end(f"{host} has no place in the job any more")
    os.environ.update((f"HOROVOD_{name}", value) for name, value in zip(_PLACE, place, strict=True))


def _end(why: str) -> NoReturn:
    print(why, file=sys.stderr, flush=True)
    sys.exit(1)


def _flush_files() -> None:
    """Writes out what open files still hold, as the end of a process does."""
    logging.shutdown()
    for each in gc.get_objects():
        if isinstance(each, io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with suppress(OSError, ValueError):
                each.flush()
