"""Workers and parameter servers: messages between them are late, and workers are slow, stopped or lose their numbers.

The loop of the servers is the product's; the workers do here what WorkerSync does in either framework.
"""

import math
import random
from functools import partial
from typing import Any

from common.config.schema import ParameterServerConfig, ParameterServerMode, SGDConfig
from common.distributed.topology import Topology
from common.errors import TrainingError
from common.parallel.parameter_server import NOT_FINITE, GradientPush, ServerLoop, WeightReply, is_synchronous
from common.training import command_line
from tests.simulation.network import LostRank, Mesh
from tests.simulation.threads import Queue
from tests.simulation.world import Process, Violation, World

MOST_SECONDS = 600.0
LOST = "loses a rank"


class _NoVariables:
    """No module has variables for a process."""

    def new(self) -> Any:
        return None

    take = new

    def put(self, values: Any) -> None:
        pass


class ServerRun:
    """A run with parameter servers, drawn from a seed.

    Args:
        seed: decides about its size, and all that happens.

    Attributes:
        world: what has happened.
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(f"servers {seed}")
        self.world = World(f"delays {seed}", _NoVariables())
        num_servers, num_workers = draw.randint(1, 3), draw.randint(1, 4)
        self.size = num_servers + num_workers
        bound = draw.randint(0, 3)
        mode = ParameterServerMode["async" if bound or draw.random() < 0.5 else "sync"]
        self.cfg = ParameterServerConfig(mode=mode, max_staleness=bound)
        self.num_steps, self.epoch = draw.randint(3, 25), draw.randint(2, 9)
        self.slowness = [draw.choice([0.5, 1, 1, 5]) for _ in range(self.size)]
        self.stop = (draw.randrange(self.size), draw.randint(1, 30)) if draw.random() < 0.4 else None
        self.nan = (draw.randrange(num_servers, self.size), draw.randint(1, 40)) if draw.random() < 0.2 else None
        self.mesh, self.servers_mesh = Mesh(self.world, self.size), Mesh(self.world, num_servers)
        places = [Topology(rank, self.size, rank, self.size, num_servers=num_servers) for rank in range(self.size)]
        self.servers = [_Server(self, place) for place in places[:num_servers]]
        self.workers = [_Worker(self, place) for place in places[num_servers:]]
        self.pushed = 0.0
        self._ended: dict[int, str] = {}

    def run(self) -> None:
        """Raises a Violation if something happens that must not."""
        ranks: list[_Server | _Worker] = [*self.servers, *self.workers]
        for rank in ranks:
            process = Process(self.world, f"rank {rank.place.rank}", "a", {})
            self.world.start(partial(self._run_rank, rank), process)
        self.world.run(lambda: len(self._ended) == self.size, lambda: None, MOST_SECONDS)
        ends = set(self._ended.values())
        if len(ends - {LOST}) != 1 or (LOST in ends and NOT_FINITE not in ends):
            raise Violation(f"ranks end differently: {self._ended}")
        if NOT_FINITE in ends and not self.nan:
            raise Violation(f"it ends with {ends}, and nothing was wrong")
        for server in self.servers:
            if NOT_FINITE not in ends and server.weights != self.pushed:
                raise Violation(f"a server has used {server.weights} of the gradients {self.pushed}")

    def _run_rank(self, rank: "_Server | _Worker") -> None:
        number = rank.place.rank
        try:
            self._ended[number] = rank.train()
        except LostRank:
            self._ended[number] = LOST
        self.world.say(f"rank {number} {self._ended[number]}")
        if self._ended[number] == NOT_FINITE:  # the others are lost to it, unless they end likewise
            self.world.call_at(self.world.now + command_line.SECONDS_TO_MEET, self._break_up)

    def _break_up(self) -> None:
        for mesh in (self.mesh, self.servers_mesh):
            mesh.break_up("Connection closed by peer")
        queues = [queue for worker in self.workers for queue in worker.replies.values()]
        for queue in (*queues, *(server.woken for server in self.servers)):
            queue.put(None)

    def is_asked(self, rank: int, step: int) -> bool:
        """Whether a rank was asked to stop before a step."""
        return self.stop is not None and self.stop[0] == rank and step >= self.stop[1]

    def barrier(self, rank: int, step: int) -> None:
        """All ranks meet at the ends of epochs."""
        self.mesh.gather(step, rank, "barrier", None)


def received(queue: Queue) -> Any:
    """The next message; raises LostRank if none will come."""
    message = queue.get()
    if message is None:
        raise LostRank("Connection closed by peer")
    return message


class _Worker:
    def __init__(self, run: ServerRun, place: Topology) -> None:
        self._run, self._world, self.place = run, run.world, place
        self.replies = {server: Queue(run.world) for server in place.servers}
        self.is_synchronous = is_synchronous(run.cfg)

    def train(self) -> str:
        run, rank = self._run, self.place.rank
        for step in range(1, run.num_steps + 1):
            for server in run.servers:
                ahead = step - 1 - server.loop.tracker.slowest
                if ahead > run.cfg.max_staleness:
                    raise Violation(f"rank {rank} begins step {step}, and is {ahead} steps ahead of the slowest")
            self._world.pause(self._world.delay(0.1) * run.slowness[rank])
            loss = math.nan if run.nan == (rank, step) else 1.0
            is_skipped = self.is_synchronous and math.isnan(loss)
            gradient = float(step * 8 + rank)
            self._push(GradientPush(loss, float(run.is_asked(rank, step)), 0.0, 1.0), gradient)
            run.pushed += 0 if is_skipped else gradient
            replies = [received(reply) for reply in self.replies.values()]
            first = replies[0]
            if not all(math.isfinite(reply.loss) for reply in replies):
                return NOT_FINITE
            if first.stop or step % run.epoch == 0 or step == run.num_steps:
                if not self.is_synchronous:
                    self._push(GradientPush(at_barrier=1), 0.0)
                run.barrier(rank, step)
            if first.stop:
                return f"stops after step {step}"
        return "ends"

    def _push(self, push: GradientPush, gradient: float) -> None:
        for server in self._run.servers:
            server.receive(self.place.rank, push, gradient)


class _Server:
    """Implements the Binding of common/parallel/parameter_server.py."""

    def __init__(self, run: ServerRun, place: Topology) -> None:
        self._run, self._world, self.place = run, run.world, place
        self.loop = ServerLoop(SGDConfig(), run.cfg, place, self)
        self._arrived = {worker: Queue(run.world) for worker in place.workers}
        self.woken = Queue(run.world)
        self._number, self.weights = 0, 0.0

    def train(self) -> str:
        run, rank = self._run, self.place.rank
        bound = run.cfg.max_staleness
        for step in range(1, run.num_steps + 1):
            try:
                metrics = self.loop.serve(run.is_asked(rank, step), 1.0)
            except TrainingError as error:
                return str(error)
            if not math.isfinite(float(metrics.loss)):
                return NOT_FINITE
            if float(metrics.staleness) > bound:
                raise Violation(f"gradients of step {step} are {metrics.staleness} steps old")
            if metrics.stop or step % run.epoch == 0 or step == run.num_steps:
                self.loop.wait_for_pause()
                run.barrier(rank, step)
            if metrics.stop:
                return f"stops after step {step}"
        return "ends"

    def receive(self, worker: int, push: GradientPush, gradient: float) -> None:
        """A message is on its way; those of one worker arrive in order."""
        delay = self._world.delay(0.02)

        def deliver() -> None:
            self._arrived[worker].put((push, gradient))
            self.woken.put(worker)

        self._world.call_at(self._world.now + delay, deliver)

    def next_push(self) -> tuple[int, GradientPush, float]:
        pushing = self.loop.pushing
        while not (ready := [worker for worker in pushing if not self._arrived[worker].empty()]):
            received(self.woken)
        push, gradient = self._arrived[ready[0]].get()
        return ready[0], push, gradient

    def send(self, worker: int, reply: WeightReply) -> int:
        delay = self._world.delay(0.02)
        to = self._run.workers[worker - len(self.place.servers)].replies[self.place.rank]
        self._world.call_at(self._world.now + delay, lambda: to.put(reply))
        return 8

    def update_at_once(self, gradient: float, lr: float) -> None:
        self.weights += gradient

    def total(self, gradients: list[float]) -> tuple[float, float]:
        return sum(gradients), 1.0

    def update_together(self, total: float, norm: float) -> None:
        self.weights += total

    def sum_over_servers(self, *values: float) -> list[float]:
        self._number += 1
        gathered = self._run.servers_mesh.gather(self._number, self.place.rank, "servers", values)
        return [sum(of_value) for of_value in zip(*gathered, strict=True)]


def trace_of(seed: int) -> tuple[list[str], str]:
    """What has happened, and what must not have happened; "" if nothing."""
    run = ServerRun(seed)
    try:
        run.run()
    except Violation as violation:
        return run.world.trace, str(violation)
    return run.world.trace, ""


def problem_of(seed: int) -> str:
    """What goes wrong with a seed; "" if nothing does."""
    return trace_of(seed)[1]
