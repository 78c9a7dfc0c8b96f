"""The framework-independent loop of a parameter server: when to update, whom to reply to, when to stop."""

import math
from collections import defaultdict
from typing import Any, NamedTuple, Protocol

from common.config.schema import AdamWConfig, OptimizerConfig, ParameterServerConfig, ParameterServerMode
from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients.step_metrics import StepMetrics
from common.parallel.staleness import StalenessTracker

NOT_FINITE = "train_loss is not finite; a smaller optimizer.lr may help"


class GradientPush(NamedTuple):
    """The scalars that a worker sends with its gradients.

    Attributes:
        loss: the worker's part of the mean loss.
        stop: greater than 0 if the worker was asked to stop.
        overflow: greater than 0 if its loss or gradients are not finite.
        lr: the learning rate of its step.
        at_barrier: 1 if the worker is at a barrier: there are no gradients, and none follow until all ranks are there.
    """

    loss: float = 0.0
    stop: float = 0.0
    overflow: float = 0.0
    lr: float = 0.0
    at_barrier: float = 0.0


class WeightReply(NamedTuple):
    """The scalars that a server sends with its weights: sums over the workers."""

    loss: float
    stop: float
    overflow: float


def message_bytes(form: type[GradientPush] | type[WeightReply], num_bytes: int) -> int:
    """Number of bytes of a message: its scalars, as float64, and num_bytes of gradients or weights."""
    return 8 * len(form._fields) + num_bytes


class Binding(Protocol):
    """A framework's messages and updates for one server; P is the number of values that this server updates."""

    def next_push(self) -> tuple[int, GradientPush, Any]:
        """Waits for the next push; returns its worker, its scalars, and its gradients (P,)."""

    def send(self, worker: int, reply: WeightReply) -> int:
        """Sends a reply with the current weights; returns its number of bytes."""

    def update_at_once(self, gradient: Any, lr: float) -> None:
        """Updates the weights with the gradients (P,) of one worker."""

    def total(self, gradients: list[Any]) -> tuple[Any, float]:
        """The sum of the workers' gradients (P,), and its squared norm."""

    def update_together(self, total: Any, norm: float) -> None:
        """Updates the weights with the sum of all workers' gradients; `norm` is the norm over all servers."""

    def sum_over_servers(self, *values: float) -> list[float]:
        """The sum of each value over the servers."""


def is_synchronous(parallel: ParameterServerConfig) -> bool:
    """Whether updates are synchronous: each needs the gradients of all workers."""
    return parallel.mode is ParameterServerMode.sync or parallel.max_staleness == 0


class ServerLoop:
    """The loop of one server: takes in gradient pushes, updates the weights, sends weight replies.

    Args:
        optimizer: the configuration of the optimizer.
        parallel: the configuration of the servers.
        topology: the place of this rank.
        binding: the framework's messages and updates.

    Attributes:
        tracker: counts the steps of each worker.
    """

    def __init__(
        self, optimizer: OptimizerConfig, parallel: ParameterServerConfig, topology: Topology, binding: Binding
    ) -> None:
        self._topology, self._binding, self._is_synchronous = topology, binding, is_synchronous(parallel)
        self.tracker = StalenessTracker(topology.workers, parallel.max_staleness)
        # The size of Adam's steps does not depend on that of the gradients: each of W workers makes 1 / W of a step.
        is_adam = isinstance(optimizer, AdamWConfig)
        self._rate_factor = 1 / len(topology.workers) if is_adam and not self._is_synchronous else 1.0
        self._unreplied: list[int] = []  # workers that wait for the reply to a push
        self._paused: set[int] = set()
        self._arrived: dict[int, Any] = {}  # gradients that wait for those of the other workers
        self._losses: defaultdict[int, float] = defaultdict(float)  # by step of this launch
        self._overflow, self._bytes_sent, self._stop_at = 0.0, 0, math.inf
        self._told_of_failure: set[int] | None = None

    def serve(self, is_asked_to_stop: bool, loss_scale: float) -> StepMetrics:
        """Handles pushes until the gradients of all workers for the next step have arrived and were used.

        Raises:
            TrainingError: the loss is not finite; all workers were told before.
        """
        step = self.tracker.slowest + 1
        self._overflow, self._bytes_sent = 0.0, 0
        if is_asked_to_stop:
            self._request_stop(step)
        while self.tracker.slowest < step or self._told_of_failure is not None:
            self._use(*self._binding.next_push())
            self._reply()
        return StepMetrics(
            self._losses.pop(step),
            self._agreed_stop(step),
            0.0,
            self._overflow,
            wire_bytes=[self._bytes_sent * (server == self._topology.rank) for server in self._topology.servers],
            loss_scale=loss_scale,
            staleness=self.tracker.take_staleness(),
        )

    @property
    def pushing(self) -> list[int]:
        """The workers from which a push is expected."""
        return [worker for worker in self._topology.workers if worker not in {*self._unreplied, *self._paused}]

    def wait_for_pause(self) -> None:
        """Asynchronous updates: handles pushes until no worker will push before the next barrier."""
        while not self._is_synchronous and self.pushing:
            self._use(*self._binding.next_push())
        self._paused.clear()

    def _use(self, worker: int, push: GradientPush, gradient: Any) -> None:
        """Handles a push: updates the weights with it, or with all pushes of its step once the last has arrived."""
        if push.at_barrier:
            self._paused.add(worker)
            return
        self.tracker.advance(worker)
        step = self.tracker.steps[worker]
        self._losses[step] += push.loss
        self._overflow += push.overflow
        if push.stop:
            self._request_stop(step)
        self._unreplied.append(worker)
        if not self._is_synchronous:
            self._use_at_once(push, gradient)
            return
        self._arrived[worker] = gradient
        if self.tracker.slowest == step:
            self._use_together(step)

    def _use_at_once(self, push: GradientPush, gradient: Any) -> None:
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

    def _reply(self) -> None:
        """Sends the weights to all waiting workers that may begin another step."""
        has_failed = self._told_of_failure is not None
        for worker in list(self._unreplied):
            if has_failed or self.tracker.may_go_on(worker):
                loss = math.nan if has_failed else self._losses.get(self.tracker.slowest, 0.0)
                stop = float(self.tracker.steps[worker] >= self._stop_at)
                self._bytes_sent += self._binding.send(worker, WeightReply(loss, stop, self._overflow))
                self._unreplied.remove(worker)
                if self._told_of_failure is not None:
                    self._told_of_failure.add(worker)
        if self._told_of_failure == set(self._topology.workers):
            raise TrainingError(NOT_FINITE)

    def _agreed_stop(self, step: int) -> float:
        """Whether the run stops after a step, the same on all servers; for asynchronous updates server 0 decides."""
        if self._is_synchronous:
            return float(step >= self._stop_at)
        is_first = self._topology.rank == 0
        decided, asked = self._binding.sum_over_servers(
            float(is_first and step >= self._stop_at), float(not is_first and self._stop_at < math.inf)
        )
        if asked:
            self._request_stop(step)
        return decided

    def _request_stop(self, step: int) -> None:
        """Requests a stop after a step; for asynchronous updates, after the first step that no worker has finished."""
        self._stop_at = min(self._stop_at, step if self._is_synchronous else self.tracker.fastest + 1)
