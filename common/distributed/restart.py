"""A script of one's own in an elastic job: when ranks leave or join, all ranks start it again.

A process is replaced in its place (exec), so that the launcher does not see it end. The script then goes on from its
own checkpoint, as after any other break; Horovod and the frameworks begin anew.
"""

import multiprocessing
import os
import sys
from types import TracebackType
from typing import NoReturn

from common.distributed import launcher_env
from common.distributed.consensus import Runtime

_AGAIN = "HOROVOD_SCRIPT_STARTED_AGAIN"
_PLACE = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


def rejoin() -> None:
    """Waits for this rank's new place in the job, if the script was started again; to be called before Horovod starts.

    Raises:
        SystemExit: with status 1, if there is none.
    """
    if os.environ.pop(_AGAIN, None) is None:
        return
    from horovod.runner.elastic.rendezvous import GET_RANK_AND_SIZE
    from horovod.runner.http.http_client import send_request

    address, port, host, local_rank = (
        os.environ[f"HOROVOD_{name}"]
        for name in ("GLOO_RENDEZVOUS_ADDR", "GLOO_RENDEZVOUS_PORT", "HOSTNAME", "LOCAL_RANK")
    )
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


class Restart:
    """Starts the script again when a rank is lost, or when the launcher has announced that ranks will leave or join.

    Without an elastic launcher it does nothing.

    Args:
        runtime: the framework's runtime, which has started.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._is_announced = runtime, False
        self._hook = sys.excepthook
        if launcher_env.is_elastic():
            runtime.listen_to_launcher(self)
            sys.excepthook = self._on_error

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
        for child in multiprocessing.active_children():  # those that read examples
            child.kill()
        self._runtime.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ[_AGAIN] = "1"
        os.execv(sys.executable, sys.orig_argv)
