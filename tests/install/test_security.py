"""The services of horovodrun are closed to everybody but the job's own processes; docs/security.md."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from install.horovod.wheel import apply_edits, fetch_sdist
from tests.helpers.attacks import ATTACKS, PASSWORD
from tests.helpers.launch import BIN, FRAMEWORKS, ROOT, elastic_options, horovodrun, run

import psutil
import pytest

NUM_REQUESTS = 10_000


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Horovod 0.28.1 as it was published."""
    return fetch_sdist(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_door_that_is_open_in_stock_horovod_is_closed(attack: str, stock: Path) -> None:
    def result(horovod: str) -> str:
        # Not by horovodrun: each attack plays the launcher and the stranger in one process.
        done = run([sys.executable, "-m", "tests.helpers.attacks", attack], env={"PYTHONPATH": horovod})
        words = re.findall("^(?:open|closed)$", done.stdout, re.MULTILINE)
        return words[0] if words else done.stdout

    assert (result(str(stock)), result("")) == ("open", "closed")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, stock: Path) -> Path:
    """The same with our edits."""
    root = tmp_path_factory.mktemp("ours") / stock.name
    shutil.copytree(stock, root)
    apply_edits(root, sorted((ROOT / "install" / "horovod" / "edits").glob("*.patch")))
    return root


def test_a_message_that_points_before_its_buffer_is_refused(stock: Path, ours: Path, tmp_path: Path) -> None:
    def result(root: Path) -> str:
        gloo = root / "third_party" / "gloo"
        settings = (gloo / "gloo" / "config.h.in").read_text()
        settings = re.sub("#cmakedefine01 (.*)", r"#define \1 0", re.sub("@GLOO_VERSION_.*@", "0", settings))
        folder = tmp_path / root.parent.name
        (folder / "gloo").mkdir(parents=True)
        (folder / "gloo" / "config.h").write_text(settings)
        folders = [gloo / "gloo" / "transport" / "tcp", gloo / "gloo" / "transport", gloo / "gloo" / "common"]
        sources = [path for place in folders for path in place.glob("*.cc") if path.name != "win.cc"]
        program = folder / "preamble"
        # fmt: off
        run(["c++", "-std=c++17", "-w", "-include", "cstdint", f"-I{folder}", f"-I{gloo}", "-pthread", "-o", program,
             ROOT / "tests" / "helpers" / "gloo_preamble.cc", *sources])
        # fmt: on
        return run([program]).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(result, (stock, ours))) == ["written", "refused"]


@pytest.mark.skipif("torch" not in FRAMEWORKS, reason="torch is not installed")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_encrypt_is_refused(rank: int) -> None:
    start = f"import os; os.environ['HOROVOD_GLOO_TLS'] = str(int(os.environ['HOROVOD_RANK'] != '{rank}'))"
    result = horovodrun(2, "-c", f"{start}; import horovod.torch as hvd; hvd.init(); print('together')")
    assert "together" not in result.stdout
    assert (result.returncode != 0, "handshake" in result.stdout) == (True, True), result.stdout


@pytest.mark.skipif("torch" not in FRAMEWORKS, reason="torch is not installed")
def test_a_misspelt_wish_for_encryption_is_not_taken_for_none() -> None:
    start = "import horovod.torch as hvd; hvd.init(); print('together')"
    result = horovodrun(2, "-c", start, env={"HOROVOD_GLOO_TLS": "true"})
    assert "together" not in result.stdout
    assert (result.returncode != 0, "HOROVOD_GLOO_TLS=true: must be 0 or 1" in result.stdout) == (True, True)


def test_connections_that_say_nothing_hold_up_nobody() -> None:
    from horovod.runner.common.util.network import BasicService
    from horovod.runner.http.http_client import send_request
    from horovod.runner.http.http_server import RendezvousServer

    server, service = RendezvousServer(), BasicService("a service", bytes(32), "lo")
    places = (("127.0.0.1", server.start(address="127.0.0.1")), ("127.0.0.1", service.get_port()))
    server.init([])
    with ExitStack() as silent:
        for number in range(600):
            silent.enter_context(socket.create_connection(places[number % 2])).sendall(b"GET ")
        send_request("PUT", *places[0], "scope", "name", b"value", server.key)
        assert send_request("GET", *places[0], "scope", "name", key=server.key) == b"value"
        service.shutdown()
        server.stop()


def job(folder: Path, *options: str) -> list[object]:
    """The command of a job that counts until folder/stop is there."""
    ranks = [sys.executable, "-m", "tests.helpers.besieged_job", folder / "stop"]
    return ["horovodrun", "--gloo", "-np", "2", *options, *ranks]


class Seen(NamedTuple):
    """What anybody can see of a process, and the secret that it has."""

    line: str
    listening: list[tuple[str, int]]
    secret: str


def look_at(launcher: subprocess.Popen[str], folder: Path) -> list[Seen]:
    """The launcher and all that it has started, once both ranks train."""
    while len(list(folder.glob("rank-*"))) < 2:
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)
    process = psutil.Process(launcher.pid)
    seen = []
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # the script that finds hosts comes and goes
            places = [place.laddr for place in member.net_connections("inet") if place.status == psutil.CONN_LISTEN]
            secret = member.environ().get("_HOROVOD_SECRET_KEY", "")
            seen.append(Seen(" ".join(member.cmdline()), [(ip, port) for ip, port in places], secret))
    return seen


@pytest.mark.skipif("torch" not in FRAMEWORKS, reason="torch is not installed")
@pytest.mark.parametrize("kind", ["static", "elastic"])
def test_strangers_find_nothing_and_disturb_nothing(kind: str, tmp_path: Path) -> None:
    command = job(tmp_path, *(elastic_options(tmp_path, 2) if kind == "elastic" else ()))
    # A word that horovodrun sends to all hosts, and one that it does not.
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NCCL_PASSWORD": PASSWORD, "PASSWORD": PASSWORD}
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as launcher:
        try:
            seen = look_at(launcher, tmp_path)
            listening = [place for process in seen for place in process.listening]
            (secret,) = {process.secret for process in seen} - {""}
            assert {ip for ip, _ in listening} == {"127.0.0.1"}, seen
            assert not [process.line for process in seen if PASSWORD in process.line or secret in process.line]
            statuses = besiege([port for _, port in listening])
        finally:
            (tmp_path / "stop").touch()
        output = launcher.communicate(timeout=60)[0]
    assert statuses <= {b"403", b"400", b"414", b"431", b"505", b""}, statuses
    assert (launcher.returncode, bool(re.search(r"\d+ right sums", output))) == (0, True), output
    assert "Traceback" not in output


def besiege(ports: list[int]) -> set[bytes]:
    """Sends random requests to the ports; returns what the answers began with."""
    chance = random.Random(0)

    def request() -> bytes:
        kind = chance.random()
        if kind < 0.3:
            return chance.randbytes(chance.randrange(1, 2000))
        method = chance.choice(["GET", "PUT", "DELETE", "HEAD", "POST", "PATCH", chance.randbytes(3).hex()])
        path = "/" + "/".join(chance.choice(["global", "worker_addresses", "rank_and_size", "0", "..", "%00"]) * 2)
        length = chance.choice([0, 5, 1 << 40, -1])
        proof = f"Authorization: Horovod {chance.randbytes(16).hex()} x {chance.randbytes(32).hex()}\r\n"
        head = f"{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n{proof * (kind > 0.6)}\r\n"
        return head.encode() + b"value"

    def send(port: int, content: bytes) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(4096)
        except OSError:
            return b""
        return answer.split()[1] if answer.startswith(b"HTTP/") else b""

    with ThreadPoolExecutor(8) as pool:
        requests = [(chance.choice(ports), request()) for _ in range(NUM_REQUESTS)]
        return set(pool.map(send, *zip(*requests, strict=True)))
