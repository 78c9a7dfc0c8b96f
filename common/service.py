"""What a parameter server does with pushes, in any framework: who is answered when, what is summed, when to stop."""

import math
from collections import defaultdict
from typing import Any, NamedTuple, Protocol

from common.clocks import Clocks
from common.config import AdamWConfig, Mode, ParameterServerConfig, RunConfig
from common.errors import TrainingError
from common.step_sums import StepSums
from common.topology import Topology

NOT_FINITE = "train_loss is not finite; a smaller optimizer.lr may help"


class Push(NamedTuple):
    """What comes with a worker's gradients: its shares, and the learning rate of its step.

    Attributes:
        pauses: 1 where there are no gradients, and none will come until the ranks have met.
    """

    loss: float = 0.0
    stop: float = 0.0
    overflow: float = 0.0
    lr: float = 0.0
    pauses: float = 0.0


class Answer(NamedTuple):
    """What comes with a server's weights: sums over the workers."""

    loss: float
    stop: float
    overflow: float


class Binding(Protocol):
    """The messages and updates of one server, in a framework."""

    def next_push(self) -> tuple[int, Push, Any]:
        """The next worker whose push arrives, what it says, and its gradients (P,)."""

    def send(self, worker: int, answer: Answer) -> int:
        """Starts an answer with the weights of now; returns its bytes."""

    def flush(self) -> None:
        """Returns when all answers have left."""

    def update_at_once(self, gradient: Any, lr: float) -> None:
        """One update with the gradients (P,) of one worker."""

    def total(self, gradients: list[Any]) -> tuple[Any, float]:
        """The sum of gradients (P,), and that of its squares."""

    def update_together(self, total: Any, norm: float) -> None:
        """One update with the sum of all workers' gradients; the norm is that of all servers' sums."""

    def sum_over_servers(self, *values: float) -> list[float]:
        """The sum of each value over the servers."""


def waits(parallel: ParameterServerConfig) -> bool:
    """Whether an update needs the gradients of all workers."""
    return parallel.mode is Mode.sync or parallel.max_staleness == 0


class Service:
    """One server's part in the steps of a run.

    Args:
        cfg: the configuration.
        parallel: the part of it that is about servers.
        topology: which rank this is.
        binding: the framework's messages and updates.

    Attributes:
        clocks: steps of which the workers' gradients have arrived.
    """

    def __init__(self, cfg: RunConfig, parallel: ParameterServerConfig, topology: Topology, binding: Binding) -> None:
        self._topology, self._binding, self._waits = topology, binding, waits(parallel)
        self.clocks = Clocks(topology.workers, parallel.max_staleness)
        # Adam's steps have one size, whatever the gradients': each of W workers makes a W-th of one.
        is_adam = isinstance(cfg.optimizer, AdamWConfig)
        self._rate_factor = 1 / len(topology.workers) if is_adam and not self._waits else 1.0
        self._unanswered: list[int] = []  # workers whose push was taken in, and that wait
        self._paused: set[int] = set()
        self._arrived: dict[int, Any] = {}  # gradients that are not used yet
        self._losses: defaultdict[int, float] = defaultdict(float)  # by step of this launch
        self._overflow, self._bytes_sent, self._stop_at = 0.0, 0, math.inf
        self._told_of_failure: set[int] | None = None

    def serve(self, is_asked_to_stop: bool, loss_scale: float) -> StepSums:
        """Returns when the gradients of all workers for another step have arrived and are used.

        Raises:
            TrainingError: the loss is not finite, and all workers know.
        """
        step = self.clocks.slowest + 1
        self._overflow, self._bytes_sent = 0.0, 0
        if is_asked_to_stop:
            self._request_stop(step)
        while self.clocks.slowest < step or self._told_of_failure is not None:
            self._use(*self._binding.next_push())
            self._answer()
        return StepSums(
            self._losses.pop(step),
            self._agreed_stop(step),
            0.0,
            self._overflow,
            wire_bytes=[self._bytes_sent * (server == self._topology.rank) for server in self._topology.servers],
            loss_scale=loss_scale,
            staleness=self.clocks.take_staleness(),
        )

    @property
    def pushing(self) -> list[int]:
        """The workers that a push is to come from."""
        return [worker for worker in self._topology.workers if worker not in {*self._unanswered, *self._paused}]

    def wait_for_pause(self) -> None:
        """Returns when nothing more will be pushed before the ranks have met."""
        while not self._waits and self.pushing:
            self._use(*self._binding.next_push())
        self._paused.clear()

    def _use(self, worker: int, push: Push, gradient: Any) -> None:
        """Takes in a push: updates the weights with it, or with all of its step when the last one is there."""
        if push.pauses:
            self._paused.add(worker)
            return
        self.clocks.tick(worker)
        step = self.clocks.steps[worker]
        self._losses[step] += push.loss
        self._overflow += push.overflow
        if push.stop:
            self._request_stop(step)
        self._unanswered.append(worker)
        if not self._waits:
            self._use_at_once(push, gradient)
            return
        self._arrived[worker] = gradient
        if self.clocks.slowest == step:
            self._use_together(step)

    def _use_at_once(self, push: Push, gradient: Any) -> None:
        if not math.isfinite(push.loss) and self._told_of_failure is None:
            self._told_of_failure = set()
        if self._told_of_failure is None:
            self._binding.update_at_once(gradient, self._rate_factor * push.lr)

    def _use_together(self, step: int) -> None:
        total, squares = self._binding.total([self._arrived[worker] for worker in self._topology.workers])
        self._arrived.clear()
        squares, stop = self._binding.sum_over_servers(squares, float(step >= self._stop_at))
        if stop:
            self._request_stop(step)
        if not self._overflow:
            self._binding.update_together(total, math.sqrt(squares))

    def _answer(self) -> None:
        """Sends the weights to all workers that may go on."""
        has_failed = self._told_of_failure is not None
        for worker in list(self._unanswered):
            if has_failed or self.clocks.may_go_on(worker):
                loss = math.nan if has_failed else self._losses.get(self.clocks.slowest, 0.0)
                stop = float(self.clocks.steps[worker] >= self._stop_at)
                self._bytes_sent += self._binding.send(worker, Answer(loss, stop, self._overflow))
                self._unanswered.remove(worker)
                if self._told_of_failure is not None:
                    self._told_of_failure.add(worker)
        if self._told_of_failure == set(self._topology.workers):
            self._binding.flush()
            raise TrainingError(NOT_FINITE)

    def _agreed_stop(self, step: int) -> float:
        """Whether the run is to stop after a step: server 0 decides for those whose workers do not wait."""
        if self._waits:
            return float(step >= self._stop_at)
        is_first = self._topology.rank == 0
        decided, asked = self._binding.sum_over_servers(
            float(is_first and step >= self._stop_at), float(not is_first and self._stop_at < math.inf)
        )
        if asked:
            self._request_stop(step)
        return decided

    def _request_stop(self, step: int) -> None:
        """Asks for a stop after a step; where workers do not wait, after the first one that none of them has ended."""
        self._stop_at = min(self._stop_at, step if self._waits else self.clocks.fastest + 1)
