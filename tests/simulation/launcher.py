"""Starts jobs on simulated hosts: with Horovod's own elastic driver, or with a fixed number of ranks."""

import itertools
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from common.distributed.topology import Topology
from tests.simulation.network import ABORTED, Mesh, Runtime
from tests.simulation.world import Process, World

from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.elastic.driver import ElasticDriver
from horovod.runner.elastic.rendezvous import create_rendezvous_handler

SECONDS_TO_BOOT = 1.0
SECONDS_TO_TERMINATE = 5.0  # between SIGTERM and kill -9


class Cluster:
    """The hosts, and the processes on them.

    Args:
        world: where it is.
        slots: for each host that is there, its number of ranks; changes with time.
        main: what a process of a job does; gives its exit status.

    Attributes:
        workers: all processes of jobs.
    """

    def __init__(self, world: World, slots: dict[str, int], main: Callable[[Process], int]) -> None:
        self.world, self.slots, self._main = world, slots, main
        self.workers: list[Process] = []
        self._numbers = itertools.count(1)

    def launch(self, job: Callable[[Process], int], name: str) -> Process:
        """Starts a launcher; its status is that of its job."""
        launcher = Process(self.world, f"{name} {next(self._numbers)}", "launchers", {})
        self.world.start(lambda: launcher.end(job(launcher)), launcher)
        return launcher

    def spawn(self, launcher: Process, host: str, environ: Mapping[str, Any]) -> Process:
        """Starts a process of a job, which ends some time after its launcher."""
        name = f"worker {next(self._numbers)} on {host}"
        environ = {**environ, "HOROVOD_GLOO_RENDEZVOUS_PORT": launcher.name}
        worker = Process(self.world, name, host, {key: str(value) for key, value in environ.items()})
        self.workers.append(worker)
        self.world.say(f"{launcher.name} starts {name} as rank {environ['HOROVOD_RANK']} of {environ['HOROVOD_SIZE']}")
        launcher.watch(lambda: self.terminate(worker))
        return worker

    def run(self, worker: Process) -> None:
        """Lets a process of a job begin."""

        def main() -> None:
            self.world.pause(SECONDS_TO_BOOT / 2 + self.world.delay(SECONDS_TO_BOOT / 2))
            worker.end(self._main(worker))

        self.world.start(main, worker)

    def terminate(self, worker: Process) -> None:
        """SIGTERM, and kill -9 later."""
        if worker.is_alive:
            self.world.send_signal(worker, signal.SIGTERM)
            self.world.call_at(self.world.now + SECONDS_TO_TERMINATE, worker.kill)


def plain_job(cluster: Cluster, placed: Sequence[str], launcher: Process) -> int:
    """Starts one rank on each of the hosts, and ends all when one fails; returns the status of the first that fails."""
    mesh, size = Mesh(cluster.world, len(placed)), len(placed)
    workers: list[Process] = []

    def meet(place: Topology) -> tuple[Topology, Mesh]:
        return place, mesh

    for rank, host in enumerate(placed):
        place = Topology(rank, size, placed[:rank].count(host), placed.count(host))
        workers.append(cluster.spawn(launcher, host, _environ(place, is_elastic=False)))
        workers[-1].runtime = Runtime(cluster.world, workers[-1], partial(meet, place), lambda listener: None)
    for worker in workers:
        cluster.run(worker)
    while any(worker.is_alive for worker in workers):
        cluster.world.pause(0.2)
        if any(worker.status for worker in workers):
            for worker in workers:
                cluster.terminate(worker)
    failed = [worker.status for worker in workers if worker.status]
    return failed[0] if failed else 0


def elastic_job(cluster: Cluster, min_np: int, max_np: int, launcher: Process) -> int:
    """Starts a job whose ranks leave and join, by Horovod's elastic driver; returns its status."""
    launch = _ElasticLaunch(cluster, launcher, min_np, max_np)
    launch.driver.start(min_np, launch.create_worker)
    results = launch.driver.get_results()
    launch.driver.stop()
    statuses = [status for status, _ in results.worker_results.values()]
    return next((status for status in statuses if status), 0 if statuses else 1)


class _ElasticLaunch:
    """What horovodrun has around the driver: discovery, rendezvous, and the processes."""

    def __init__(self, cluster: Cluster, launcher: Process, min_np: int, max_np: int) -> None:
        self._cluster, self._launcher, self._world = cluster, launcher, cluster.world
        self._mesh = Mesh(cluster.world, 0)
        self.driver = ElasticDriver(self, self, min_np, max_np, timeout=60, cooldown_range=(1, 2))
        self._handler = create_rendezvous_handler(self.driver)

    def find_available_hosts_and_slots(self) -> dict[str, int]:
        """For the driver: the hosts that are there."""
        return dict(self._cluster.slots)

    def init(self, assignments: Sequence[Any]) -> None:
        """For the driver: other ranks are to meet from now on."""
        self._mesh = Mesh(self._world, len(assignments))
        self._world.say(f"{len(assignments)} ranks: {', '.join(slot.hostname for slot in assignments)}")

    def stop(self) -> None:
        """For the driver: the job is over."""

    def create_worker(self, slot: Any, events: Sequence[Any]) -> tuple[int, float]:
        """For the driver: starts a process, and waits for its end."""
        environ = _environ(_topology(slot), is_elastic=True)
        worker = self._cluster.spawn(self._launcher, slot.hostname, environ)
        key = (slot.hostname, slot.local_rank)
        starts = itertools.count()
        worker.runtime = Runtime(
            self._world,
            worker,
            lambda: self._meet(worker, slot if next(starts) == 0 else self._ask(worker, *key)),
            lambda listener: self._listen(worker, key, listener),
        )
        self._cluster.run(worker)
        while worker.is_alive:
            self._world.pause(0.2)
            if any(event.is_set() for event in events):
                self._cluster.terminate(worker)
                while worker.is_alive:
                    self._world.pause(0.2)
        assert worker.status is not None
        return worker.status, self._world.now

    def _meet(self, worker: Process, slot: Any) -> tuple[Topology, Mesh]:
        if slot.rank < 0:  # Horovod aborts, which may take a while
            self._world.pause(self._world.delay(0.5))
            worker.leave(ABORTED)
        return _topology(slot), self._mesh

    def _ask(self, worker: Process, host: str, local_rank: int) -> Any:
        """What the rendezvous server answers to a worker that starts again."""
        answers: list[Any] = []
        asking = self._world.current

        def serve() -> None:
            try:
                content = self._handler._get_rank_and_size(None, host, local_rank).decode()
                answers.append(SlotInfo(host, *(int(content.split(",")[place]) for place in (0, 2, 4, 1, 3, 5))))
            except Exception as error:
                self._world.say(f"the rendezvous server answers {worker.name}: {error}")
                answers.append(None)
            self._world.wake(asking)

        self._world.start(serve, self._launcher, "rendezvous")
        while not answers and self._launcher.is_alive:
            self._world.wait(1.0)
        if not answers or answers[0] is None:
            worker.leave(ABORTED)
        return answers[0]

    def _listen(self, worker: Process, key: tuple[str, int], listener: Any) -> None:
        self.driver._worker_clients[key] = _Client(self._world, worker, listener)


class _Client:
    """Tells a worker that there are other hosts; the message may be late, or come twice."""

    def __init__(self, world: World, worker: Process, listener: Any) -> None:
        self._world, self._worker, self._listener = world, worker, listener

    def notify_hosts_updated(self, timestamp: int, change: int) -> None:
        """Sends the message."""
        if not self._worker.is_alive:
            raise ConnectionError("connection refused")
        for _ in range(1 + (self._world.delay() > 0.004)):
            delay = self._world.delay(0.05)

            def deliver() -> None:
                self._world.pause(delay)  # noqa: B023
                self._world.say(f"{self._worker.name} hears of other hosts")
                self._listener.on_hosts_updated(timestamp, change)

            self._world.start(deliver, self._worker, "notification")


def _topology(slot: Any) -> Topology:
    return Topology(slot.rank, slot.size, slot.local_rank, slot.local_size)


def _environ(place: Topology, is_elastic: bool) -> dict[str, Any]:
    names = {"RANK": place.rank, "SIZE": place.world_size, "LOCAL_RANK": place.local_rank}
    values = {f"HOROVOD_{name}": value for name, value in names.items()} | {"HOROVOD_LOCAL_SIZE": place.local_size}
    return values | ({"HOROVOD_ELASTIC": "1"} if is_elastic else {})
