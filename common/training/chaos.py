"""Failures on purpose: chaos="kill:rank=1,step=120", to see what a run does then.

Each failure happens once at its step, also if the step is repeated after it. docs/runs.md lists the kinds.
"""

import os
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from common.config.failures import Failure, parse
from common.config.schema import RunConfig
from common.distributed.topology import Topology
from common.training import checkpoint_files

import numpy as np


class Engine(Protocol):
    """What chaos needs of an engine."""

    def replace_weight(self, number: int, value: float) -> float:
        """Sets a value of this rank's weights; returns the old one."""


class Chaos:
    """Makes the failures of a run.

    Args:
        cfg: the configuration, with run.dir set: in its folder it is noted what has happened.
        topology: the place of this rank.
        engine: the rank's engine.
    """

    def __init__(self, cfg: RunConfig, topology: Topology, engine: Engine) -> None:
        self._failures, self._seed, self._folder = parse(cfg.chaos), cfg.seed, Path(str(cfg.run.dir))
        self._topology, self._engine, self._is_elastic = topology, engine, cfg.elastic
        self._undo: list[Callable[[], object]] = []

    def before(self, step: int) -> None:
        """Makes the failures that are due before a step."""
        for number, failure in enumerate(self._failures):
            if self._is_due(number, failure, step):
                getattr(self, f"_{failure.kind}")(failure, np.random.default_rng((self._seed, number, step)))

    def after(self) -> None:
        """Takes back what lasts for one step only."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _is_due(self, number: int, failure: Failure, step: int) -> bool:
        if failure.rank not in (-1, self._topology.rank):
            return False
        if failure.kind == "kill" and self._is_elastic and self._topology.world_size == 1:
            return False  # with the last rank, the job would be lost
        if failure.kind == "slow":
            return step >= failure.step
        if failure.p:
            drawn = np.random.default_rng((self._seed, number, step, self._topology.rank)).random() < failure.p
            return bool(drawn) and self._is_first_time(f"{number}.{step}")
        return step == failure.step and self._is_first_time(f"{number}.{step}.{self._topology.rank}")

    def _is_first_time(self, name: str) -> bool:
        folder = self._folder / "chaos"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / name).open("x").close()
        except FileExistsError:
            return False
        return True

    def _kill(self, failure: Failure, random: np.random.Generator) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _freeze(self, failure: Failure, random: np.random.Generator) -> None:
        with subprocess.Popen(["sh", "-c", f"sleep {failure.seconds}; kill -CONT {os.getpid()}"]):
            os.kill(os.getpid(), signal.SIGSTOP)

    def _slow(self, failure: Failure, random: np.random.Generator) -> None:
        time.sleep(failure.seconds)

    def _nan(self, failure: Failure, random: np.random.Generator) -> None:
        """A weight of this rank is not a number in this step, so that its gradients are not."""
        number = int(random.integers(2**31))
        before = self._engine.replace_weight(number, float("nan"))
        self._undo.append(lambda: self._engine.replace_weight(number, before))

    def _bitflip(self, failure: Failure, random: np.random.Generator) -> None:
        """Flips a bit of the mantissa of a weight, as memory without error correction may."""
        number, bit = int(random.integers(2**31)), 1 << int(random.integers(23))
        (bits,) = struct.unpack("<I", struct.pack("<f", self._engine.replace_weight(number, 0.0)))
        (value,) = struct.unpack("<f", struct.pack("<I", bits ^ bit))
        self._engine.replace_weight(number, value)

    def _drop_link(self, failure: Failure, random: np.random.Generator) -> None:
        """Cuts this process's connections to other hosts and ranks."""
        for descriptor in _sockets():
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family == socket.AF_INET and connection.type == socket.SOCK_STREAM:
                    connection.getpeername()  # fails for those that listen
                    connection.shutdown(socket.SHUT_RDWR)

    def _corrupt_checkpoint(self, failure: Failure, random: np.random.Generator) -> None:
        """Changes a byte of the newest checkpoint."""
        for folder in checkpoint_files.saved(self._folder / "checkpoints")[-1:]:
            path = folder / checkpoint_files.WEIGHTS
            content = bytearray(path.read_bytes())
            content[int(random.integers(len(content)))] ^= 1
            path.write_bytes(content)

    def _full_disk(self, failure: Failure, random: np.random.Generator) -> None:
        """From now on, this process cannot write a file of more bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (failure.bytes, resource.RLIM_INFINITY))


def _sockets() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                yield int(name)
