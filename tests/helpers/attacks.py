"""Attacks on the services of horovodrun; each says whether the door that it tries is open or closed.

python -m tests.helpers.attacks NAME     (PYTHONPATH chooses the Horovod that is attacked)
"""

import base64
import hashlib
import hmac
import http.client
import os
import pickle
import re
import socketserver
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
import psutil

PASSWORD = "a-password-that-nobody-may-see"


class CodeToRun:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "was here")


def send(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """The status and the body that a server gives to somebody without the secret of the job."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""  # the server has hung up, which stock's does after it has run the code
    finally:
        connection.close()


@contextmanager
def elastic_launcher() -> Iterator[int]:
    """The port of a launcher that serves an elastic job of one host."""
    from horovod.runner.elastic.discovery import FixedHosts
    from horovod.runner.elastic.driver import ElasticDriver
    from horovod.runner.elastic.rendezvous import create_rendezvous_handler
    from horovod.runner.http.http_server import RendezvousServer

    rendezvous = RendezvousServer()
    driver = ElasticDriver(rendezvous, FixedHosts({"localhost": 2}), 2, 2)
    if hasattr(rendezvous, "environment"):
        os.environ.update(rendezvous.environment())  # of the honest ranks, which are in this process
    yield rendezvous.start(create_rendezvous_handler(driver))
    driver.stop()


def pickle_as_an_address(folder: Path) -> bool:
    """A pickle in the place of a worker's address is unpickled by the launcher."""
    with elastic_launcher() as port:
        send(port, "PUT", "/worker_addresses/x:9", base64.b64encode(pickle.dumps(CodeToRun(folder / "marker"))))
    return (folder / "marker").exists()


def answer_of_a_false_worker(folder: Path) -> bool:
    """The launcher connects to an address that somebody has put there, and unpickles the answer."""
    key = bytes(32)

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            message = pickle.dumps(CodeToRun(folder / "marker"))
            digest = hmac.new(key, message, hashlib.sha256).digest()
            self.wfile.write(digest + struct.pack("i", len(message)) + message)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as worker, elastic_launcher() as port:
        from horovod.runner.util.threads import in_thread

        in_thread(worker.serve_forever)
        addresses = {"lo": [worker.server_address]}
        send(port, "PUT", "/worker_addresses/localhost:0", base64.b64encode(cloudpickle.dumps((addresses, key))))
        worker.shutdown()
    return (folder / "marker").exists()


def key_of_a_worker(folder: Path) -> bool:
    """The launcher hands out the key that a worker has given to it."""
    from horovod.runner.elastic.worker import WorkerNotificationManager

    with elastic_launcher() as port:
        WorkerNotificationManager().init("127.0.0.1", port, "lo", "localhost", 0)
        status, body = send(port, "GET", "/worker_addresses/localhost:0")
    return status == 200 and len(pickle.loads(base64.b64decode(body))[1]) == 32


def worker_on_all_interfaces(folder: Path) -> bool:
    """The worker's own service listens where nobody has asked it to."""
    from horovod.runner.elastic.worker import WorkerNotificationManager

    with elastic_launcher() as port:
        WorkerNotificationManager().init("127.0.0.1", port, "lo", "localhost", 0)
        listening = [place.laddr for place in psutil.Process().net_connections("tcp") if place.status == "LISTEN"]
        return any(place.port != port and place.ip != "127.0.0.1" for place in listening)


def store_for_everybody(folder: Path) -> bool:
    """Values of the rendezvous are read, written and deleted by anybody."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    server.init([])
    methods = ("PUT", "GET", "HEAD", "DELETE", "POST", "PATCH", "OPTIONS", "NONSENSE")
    statuses = [send(port, method, "/scope/key", b"value" * (method == "PUT"))[0] for method in methods]
    return statuses != [403] * len(methods)


def large_value(folder: Path) -> bool:
    """A value of any size is kept in the launcher's memory."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    before = psutil.Process().memory_info().rss
    body = bytes(64 << 20)
    send(port, "PUT", "/scope/key", body)
    return psutil.Process().memory_info().rss - before > len(body) // 2


def environment_on_the_command_line(folder: Path) -> bool:
    """What stands in the launcher's environment is in the command line of a process."""
    return PASSWORD in launched("localhost", folder)


def environment_by_ssh(folder: Path) -> bool:
    """What stands in the launcher's environment is in the command line of ssh."""
    return PASSWORD in launched("far", folder)


def host_of_any_key(folder: Path) -> bool:
    """No host has to prove that it is the one that is meant."""
    return "StrictHostKeyChecking=no" in launched("far", folder)


def key_by_ssh(folder: Path) -> bool:
    """The key of the services that look for networks is in the command line of ssh."""
    from horovod.runner.common.util.settings import Settings
    from horovod.runner.common.util.timeout import Timeout
    from horovod.runner.driver.driver_service import _launch_task_servers

    key = os.urandom(32)
    with stand_in_for_ssh(folder):
        settings = Settings(key=key, start_timeout=Timeout(30, "{activity}"))
        _launch_task_servers(["far"], [], {"lo": [("127.0.0.1", 1)]}, settings)
        while not (folder / "lines").exists():
            time.sleep(0.05)
    words = re.findall(r"[A-Za-z0-9+/=]{16,}", (folder / "lines").read_text())
    return any(key in base64.b64decode(word + "==") for word in words if len(word) % 4 == 0) or key.hex() in words


@contextmanager
def stand_in_for_ssh(folder: Path) -> Iterator[None]:
    """A program named ssh that writes its command line to the file "lines"."""
    program = folder / "ssh"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/new; mv {folder}/new {folder}/lines; cat > /dev/null\n')
    program.chmod(0o755)
    with mock.patch.dict(os.environ, {"PATH": f"{folder}:{os.environ['PATH']}"}):
        yield


def launched(host: str, folder: Path) -> str:
    """The command lines of a job's processes, on this host or by ssh on another."""
    from horovod.runner.common.util.settings import Settings
    from horovod.runner.gloo_run import gloo_run

    settings = Settings(num_proc=1, hosts=f"{host}:1", verbose=0, key=bytes(32))
    look = "import psutil, sys; open(sys.argv[1], 'w').write(str([p.info for p in psutil.process_iter(['cmdline'])]))"
    with stand_in_for_ssh(folder):
        env = {**os.environ, "HOROVOD_PASSWORD": PASSWORD}
        gloo_run(settings, ["lo"], env, "127.0.0.1", [sys.executable, "-c", look, str(folder / "lines")])
    return (folder / "lines").read_text()


# fmt: off
ATTACKS: dict[str, Callable[[Path], bool]] = {attack.__name__: attack for attack in (
    pickle_as_an_address, answer_of_a_false_worker, key_of_a_worker, worker_on_all_interfaces, store_for_everybody,
    large_value, environment_on_the_command_line, environment_by_ssh, host_of_any_key, key_by_ssh,
)}
# fmt: on


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        is_open = ATTACKS[sys.argv[1]](Path(temporary))
    print("open" if is_open else "closed", flush=True)
    os._exit(0)  # the services' threads do not end by themselves
