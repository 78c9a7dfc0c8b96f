"""What a rank takes from its host, and which launchers it refuses."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from common.config.composition import compose
from common.distributed import consensus, launcher_env
from common.distributed.topology import Topology
from common.errors import ConfigError
from common.training import provenance
from tests.helpers.launch import FRAMEWORKS

import numpy as np
import pytest

OTHERS = {
    "torchrun": {"WORLD_SIZE": "4", "RANK": "0"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
    "mpich": {"PMI_SIZE": "4", "PMI_RANK": "0"},
    "srun": {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
}
ALONE = {
    "a batch script": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "a step of one task": {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    "horovodrun -np 1": {"HOROVOD_RANK": "0", "WORLD_SIZE": "4"},
    "one of torchrun": {"WORLD_SIZE": "1", "RANK": "0"},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in which no launcher has left anything."""
    for name in {name for variables in [*OTHERS.values(), *ALONE.values()] for name in variables}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("launcher", OTHERS)
def test_several_programs_that_do_not_know_of_each_other_are_refused(
    launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "a b=1"])
    for rank in ("0", "3"):
        size, *ranks = OTHERS[launcher].keys()
        for name, value in (OTHERS[launcher] | {ranks[-1]: rank}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as leaving:
            launcher_env.refuse_other_launchers()
        assert leaving.value.code == 2
        said = capsys.readouterr().err
        command = "horovodrun -np 4 python train.py 'a b=1'\n"
        assert (said.startswith(f"{size}=4: ") and said.endswith(command)) if rank == "0" else not said


@pytest.mark.parametrize("situation", ALONE)
def test_one_program_may_run_alone(situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ALONE[situation].items():
        monkeypatch.setenv(name, value)
    launcher_env.refuse_other_launchers()


def test_ranks_that_share_a_gpu_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    launcher_env.say_who_shares(["a 1", "a 2", "a 1", "b 1"], 0)
    launcher_env.say_who_shares(["a 1", "a 1"], 1)
    launcher_env.say_who_shares(["a 1", "a 2"], 0)
    assert capsys.readouterr().err.splitlines() == [
        "ranks [0, 2] share one GPU: slower than one rank each (horovodrun -np, -H)"
    ]


@pytest.mark.skipif("torch" not in FRAMEWORKS, reason="needs PyTorch")
def test_a_task_may_see_all_gpus_of_its_host_or_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.torch.distributed import runtime

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for visible, number in ((4, 3), (1, 0), (2, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert runtime.device(Topology(3, 4, 3, 4)) == torch.device("cuda", number)


def test_each_fact_that_differs_is_listed_by_rank() -> None:
    cfg = compose("mnist_mlp", [])
    of_ranks = [
        {**provenance.facts(cfg, data), "number of threads": threads}
        for data, threads in (("abc", 2), ("abc", 2), ("xyz", 1))
    ]

    def check(rank: int) -> None:
        sent: Iterator[list[Any]] = iter([[json.dumps(facts) for facts in of_ranks], of_ranks])
        consensus.check_alike(of_ranks[rank], lambda _: next(sent))

    with pytest.raises(ConfigError) as error:
        check(0)
    threads, data = error.value.problems
    assert threads.startswith("number of threads: differs between ranks, which must be started alike (ranks 0, 1: 2; ")
    assert "set OMP_NUM_THREADS" in threads
    assert 'training set: differs between ranks, which must be started alike (ranks 0, 1: "SHA-256 abc"' in data
    of_ranks[2] = of_ranks[0]
    check(2)


def test_where_the_examples_lie_is_a_matter_of_the_host() -> None:
    keys = [provenance.facts(compose("mnist_mlp", ["data=mnist", f"data.root=/{host}"]), "abc") for host in "ab"]
    assert keys[0] == keys[1]
    assert np.__version__ == keys[0]["version of numpy"]


@pytest.mark.parametrize(
    ("has_process_sets", "local_size", "shm", "expected"),
    [(False, 1, "1", "20"), (True, 4, "1", "20"), (True, 2, "1", "1"), (True, 4, "0", "1")],
    ids=["all-ranks", "one-host", "two-hosts", "sockets"],
)
def test_the_cycle_is_short_where_idle_ranks_are_not_woken(
    has_process_sets: bool, local_size: int, shm: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_rank = {"RANK": "0", "SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": str(local_size), "SHM": shm}
    for name, value in of_rank.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("HOROVOD_CYCLE_TIME", None)
    launcher_env.set_defaults(has_process_sets)
    assert os.environ["HOROVOD_CYCLE_TIME"] == expected


@pytest.mark.parametrize("chosen", [None, "60"])
def test_ranks_do_not_wait_for_each_other_for_ever(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
    monkeypatch.setattr(os, "environ", {name: chosen} if chosen else {})
    launcher_env.set_defaults(has_process_sets=False)
    assert os.environ[name] == (chosen or launcher_env.LONGEST_WAIT)
