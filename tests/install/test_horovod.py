"""The Horovod that `make setup` builds: its edits keep what the collectives promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.launch import BIN, FRAMEWORKS, ROOT, elastic_options, horovodrun, run

import psutil
import pytest

COMMON = ("collectives", "process_sets", "messages", "sizes_and_dtypes", "bfloat16")
TORCH = ("torch", *COMMON, "many_in_flight", "join", "memory", "cached")
TF = ("tf", *COMMON, "broadcast_in_place")


needs_torch = pytest.mark.skipif("torch" not in FRAMEWORKS, reason="torch is not installed")


@pytest.mark.parametrize(
    ("job", "num_ranks", "switches", "hosts"),
    [
        (TORCH, 2, "", ""),
        (TORCH, 3, "", ""),
        (TF, 2, "", ""),
        (TF, 4, "", ""),
        (TORCH, 2, "HOROVOD_EVENT_DRIVEN=0", ""),
        (TORCH, 4, "HOROVOD_SHM=0", ""),
        (TF, 3, "HOROVOD_SHM=0 HOROVOD_GLOO_TLS=1", ""),
        # Two names for this host count as two hosts.
        (TORCH, 4, "", "localhost:2,127.0.0.1:2"),
        (TF, 3, "", "localhost:1,127.0.0.1:2"),
    ],
    ids=[
        "torch-2",
        "torch-3",
        "tf-2",
        "tf-4",
        "torch-fixed",
        "torch-sockets",
        "tf-tls",
        "torch-2+2",
        "tf-1+2",
    ],
)
def test_collectives_keep_their_promises(job: tuple[str, ...], num_ranks: int, switches: str, hosts: str) -> None:
    if job[0] not in FRAMEWORKS:
        pytest.skip(f"{job[0]} is not installed")
    env = {
        "HOROVOD_CYCLE_TIME": "5",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
        **dict(switch.split("=") for switch in switches.split()),
    }
    options = ("-H", hosts) if hosts else ()
    result = horovodrun(num_ranks, "-m", "tests.helpers.horovod_job", *job, env=env, options=options)
    assert result.stdout.count("all as promised") == num_ranks, result.stdout


STRESS_SECONDS = os.environ.get("STRESS_SECONDS")  # of `make stress`


@needs_torch
@pytest.mark.parametrize("shm", ["1", "0"], ids=["memory", "sockets"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4] if STRESS_SECONDS else [3])
def test_everything_at_once_gives_what_is_expected(num_ranks: int, shm: str) -> None:
    env = {"HOROVOD_SHM": shm, "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    seconds = STRESS_SECONDS or "3"
    command = ("-m", "tests.helpers.stress_job", seconds)
    result = horovodrun(num_ranks, *command, env=env, timeout=120 + 2 * float(seconds))
    assert (result.returncode, result.stdout.count(" operations, ")) == (0, num_ranks), result.stdout


@needs_torch
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_collective_starts_when_posted_whatever_the_cycle_time(num_ranks: int) -> None:
    # With the fixed cycle, each of the dependent collectives would wait for most of a minute.
    job = ("torch", "collectives", "many_in_flight", "join")
    result = horovodrun(num_ranks, "-m", "tests.helpers.horovod_job", *job, env={"HOROVOD_CYCLE_TIME": "50000"})
    assert result.stdout.count("all as promised") == num_ranks, result.stdout


@needs_torch
def test_the_stall_check_names_the_missing_rank_and_ends_the_job() -> None:
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"}
    result = horovodrun(2, "-m", "tests.helpers.horovod_job", "torch", "rank_one_is_late", env=limits)
    assert result.returncode != 0
    assert re.search(r"Missing ranks:\s+(\[0\]<stderr>:)?1: \[allreduce.rank 1 is late\]", result.stdout), result.stdout
    assert "Will shutdown" in result.stdout


@needs_torch
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("rank_one_ends", "Connection closed by rank 1: its process has ended"),
        ("rank_one_is_silent", "Waiting for 3 s for message a word from rank 1"),
    ],
)
def test_who_waits_for_a_message_in_vain_is_told(part: str, said: str) -> None:
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"}
    result = horovodrun(2, "-m", "tests.helpers.horovod_job", "torch", part, env=limits)
    assert result.returncode != 0
    assert f"HorovodInternalError: {said}" in result.stdout, result.stdout


@needs_torch
def test_ranks_end_with_a_launcher_that_was_killed() -> None:
    command = [
        str(BIN / "horovodrun"),
        "--gloo",
        "-np",
        "2",
        sys.executable,
        "-m",
        "tests.helpers.horovod_job",
        "torch",
    ]
    variables = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen([*command, "work_on"], cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as job:
        for line in job.stdout or ():
            if "at work" in line:
                break
        ranks = psutil.Process(job.pid).children(recursive=True)
        maps = {area.path for rank in ranks for area in rank.memory_maps()}
        job.kill()
        _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert not [path for path in maps if path.startswith("/dev/shm") and Path(path).exists()]


def test_a_scope_of_the_rendezvous_is_cleared_by_its_own_ranks() -> None:
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_client import send_request
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts("localhost:2"), 2))

    def ask(method: str, path: str, content: bytes = b"") -> bytes:
        return send_request(method, "127.0.0.1", port, *path.split("/"), content, server.key)

    ask("PUT", "local_localhost/0", b"an address")
    assert ask("GET", "local_localhost/0") == b"an address"
    # One rank has left the host's scope when both have left that of all ranks.
    for path in ("local_localhost/0", "global/0", "global/1", "local_localhost/1"):
        ask("DELETE", path)
    with pytest.raises(RuntimeError, match="status 404"):
        ask("GET", "local_localhost/0")
    server.stop()


@needs_torch
def test_an_elastic_job_survives_a_killed_rank(tmp_path: Path) -> None:
    options = [*elastic_options(tmp_path, 1), "--max-np", "2"]
    result = horovodrun(2, "-m", "tests.helpers.elastic_job", options=options)
    assert (result.returncode, "1 rank counted to 20" in result.stdout) == (0, True), result.stdout


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_rank_that_noticed_a_lost_one_does_not_keep_others_waiting(framework: str, tmp_path: Path) -> None:
    result = horovodrun(3, "-m", "tests.helpers.left_job", framework, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0", "rank-1"], result.stdout


def test_ranks_run_a_function_of_a_program() -> None:
    result = run([sys.executable, "-m", "tests.helpers.run_function"])
    assert "static [3, 13]\nelastic [5, 15]\n" in result.stdout, result.stdout


def test_a_host_that_cannot_be_is_refused_in_a_line() -> None:
    result = run(["horovodrun", "-np", "2", "-H", "[::1]:2", "true"])
    assert result.stdout.splitlines() == [
        "horovodrun: host [::1]:2: not of the form name:slots, such as worker-0:2,worker-1:2. IPv6 addresses are not "
        "supported: give a name that resolves to an IPv4 address."
    ]
    result = run(["horovodrun", "-np", "2", "--network-interfaces", "none", "true"])
    assert result.stdout.startswith("horovodrun: --network-interfaces none: all processes are on this host")


@pytest.mark.skipif("tf" not in FRAMEWORKS, reason="TensorFlow is not installed")
def test_keras_3_trains_with_horovods_own_keras_api(tmp_path: Path) -> None:
    result = horovodrun(2, "-m", "tests.helpers.keras_job", tmp_path)
    assert (result.returncode, result.stdout.count("all as promised")) == (0, 2), result.stdout


def test_a_rank_that_the_launcher_terminates_keeps_its_status() -> None:
    from horovod.runner.common.util.safe_shell_exec import terminate_executor_shell_and_children

    wait = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True); signal.pause()"
    )
    with subprocess.Popen(f"{sys.executable} -c '{wait}'; exit $?", shell=True, stdout=subprocess.PIPE) as shell:
        assert shell.stdout
        shell.stdout.readline()
        terminate_executor_shell_and_children(shell)
        assert shell.wait() == 7
