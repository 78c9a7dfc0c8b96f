"""The Horovod that `make setup` builds: its edits keep what the collectives promise."""

import sys
from pathlib import Path

from tests.helpers.launch import FRAMEWORKS, horovodrun, run

import pytest

TORCH = ("torch", "collectives", "process_sets", "many_in_flight", "join")
TF = ("tf", "collectives", "process_sets", "broadcast_in_place")


needs_torch = pytest.mark.skipif("torch" not in FRAMEWORKS, reason="torch is not installed")


@pytest.mark.parametrize(
    ("job", "event_driven", "num_ranks"),
    [(TORCH, "1", 2), (TORCH, "1", 4), (TF, "1", 2), (TF, "1", 4), (TORCH, "0", 2)],
    ids=["torch-2", "torch-4", "tf-2", "tf-4", "torch-2-fixed-cycle"],
)
def test_collectives_keep_their_promises(job: tuple[str, ...], event_driven: str, num_ranks: int) -> None:
    if job[0] not in FRAMEWORKS:
        pytest.skip(f"{job[0]} is not installed")
    env = {"HOROVOD_CYCLE_TIME": "5", "HOROVOD_EVENT_DRIVEN": event_driven, "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    result = horovodrun(num_ranks, "-m", "tests.helpers.horovod_job", *job, env=env)
    assert result.stdout.count("all as promised") == num_ranks, result.stdout


@needs_torch
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_collective_starts_when_posted_whatever_the_cycle_time(num_ranks: int) -> None:
    # With the fixed cycle, each of the dependent collectives would wait for most of a minute.
    job = ("torch", "collectives", "many_in_flight", "join")
    result = horovodrun(num_ranks, "-m", "tests.helpers.horovod_job", *job, env={"HOROVOD_CYCLE_TIME": "50000"})
    assert result.stdout.count("all as promised") == num_ranks, result.stdout


@needs_torch
def test_an_elastic_job_survives_a_killed_rank(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.sh"
    # Two names for this host, as one that lost a rank is used no more.
    hosts.write_text("#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n")
    hosts.chmod(0o755)
    # fmt: off
    command = ["horovodrun", "--gloo", "-np", "2", "--min-np", "1", "--max-np", "2", "--network-interfaces", "lo",
               "--host-discovery-script", hosts, sys.executable, "-m", "tests.helpers.elastic_job"]
    # fmt: on
    result = run(command)
    assert (result.returncode, "1 rank counted to 20" in result.stdout) == (0, True), result.stdout
