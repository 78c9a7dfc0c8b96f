"""A recipe in exact numbers: whoever computes what, the weights after each step are known beforehand."""

import hashlib
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from common.config.schema import RunConfig
from common.data.sampler import Step, TrainingSampler
from common.distributed.array_exchange import Arrays
from common.distributed.topology import Topology
from common.gradients.compression import RANK_LOCAL_STATE
from common.gradients.gradient_sync import Counters
from common.gradients.step_metrics import StepMetrics
from common.training import checkpoint, preemption
from common.training.job import Job
from tests.simulation.network import Runtime
from tests.simulation.world import Violation, World

import numpy as np

MODULUS = 1_000_003.0
RESIDUAL = f"0.{RANK_LOCAL_STATE}"
SECONDS = 0.1  # of a step


class Examples:
    """Numbered examples; the gradient of one is a few whole numbers.

    Args:
        num_examples: how many.
    """

    fingerprint = "0" * 64

    def __init__(self, num_examples: int) -> None:
        self._gradients = gradients_of(np.arange(num_examples))

    def __len__(self) -> int:
        return len(self._gradients)

    def get_batch(self, examples: Any, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The gradients (B, 3) of examples."""
        return self._gradients[examples], np.zeros(0)


def gradients_of(examples: np.ndarray) -> np.ndarray:
    """(B, 3) the gradients of the examples with these numbers."""
    return np.stack([examples + 1, examples**2 % 101, examples * 7 % 13], axis=-1).astype(float)


def updated(weights: np.ndarray, momentum: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights (3,) and the momentum (3,) after a step: they depend on the order of all steps before."""
    momentum = (2 * momentum + gradient) % MODULUS
    return (3 * weights + momentum) % MODULUS, momentum


class Engine:
    """What a rank computes.

    Args:
        runtime: sums over the ranks.
        expected: the right weights after each step, and the sum of all gradients so far.
        is_lossy: whether ranks send a part of their sums and keep the rest as residual.
        world: where it runs.
    """

    def __init__(self, runtime: Runtime, expected: Mapping[int, Any], is_lossy: bool, world: World) -> None:
        self._runtime, self._expected, self._is_lossy, self._world = runtime, expected, is_lossy, world
        self.stage = SimpleNamespace(bubble_report=dict)
        self.gradients = SimpleNamespace(buckets=[], counters=Counters)
        self.weights = np.array([1.0, 2.0, 3.0])
        self.momentum, self.sent, self.residual = np.zeros(3), np.zeros(3), np.zeros(3)
        self.num_steps = 0

    def to_batch(self, arrays: Iterable[np.ndarray], global_size: int) -> np.ndarray:
        """The gradients of this rank's examples."""
        return next(iter(arrays))

    def seed_dropout(self, seed: int, step: int) -> None:
        """There is none."""

    def replace_weight(self, number: int, value: float) -> float:
        """No weight is replaced."""
        return value

    def train(self, batch: np.ndarray, step: Step) -> StepMetrics:
        """One step; checks the weights."""
        self._world.pause(SECONDS + self._world.delay(SECONDS / 2))
        mine = batch.sum(axis=0) + self.residual
        kept = mine % 64 if self._is_lossy else np.zeros(3)
        *total, notices = self._runtime.sum(np.array([*(mine - kept), preemption.notice()]))
        self.residual, self.sent = kept, self.sent + total
        self.weights, self.momentum = updated(self.weights, self.momentum, np.array(total))
        self.num_steps += 1
        weights, _ = self._expected[step.number]
        if not self._is_lossy and not np.array_equal(self.weights, weights):
            raise Violation(f"step {step.number} gives the weights {self.weights}, and not {weights}")
        return StepMetrics(float(step.number), notices, 0.0, 0.0)

    def check_residuals(self, total: np.ndarray, step: int) -> None:
        """Checks that what was sent and what was kept are together all gradients so far."""
        _, gradients = self._expected[step]
        if not np.allclose(self.sent + total, gradients, rtol=1e-12):
            raise Violation(f"after step {step}, {self.sent} was sent and {total} kept of the gradients {gradients}")


class State:
    """The State of common/training/checkpoint.py; a rank-local state is summed, and split among the ranks."""

    def __init__(self, engine: Engine, runtime: Runtime, on_all_ranks: bool) -> None:
        self._engine, self._runtime, self._has_copies = engine, runtime, on_all_ranks or runtime.topology.rank == 0

    def weights(self) -> Arrays:
        """The weights."""
        return {"0.weight": self._engine.weights.copy()} if self._has_copies else {}

    def optimizer_state(self) -> Arrays:
        """The momentum, and the sum of what was sent."""
        state = {"0.weight.momentum": self._engine.momentum.copy(), "0.weight.sent": self._engine.sent.copy()}
        return state if self._has_copies else {}

    def gradients(self) -> Arrays:
        """The sum of the residuals."""
        total = self._runtime.sum(self._engine.residual)
        self._engine.check_residuals(total, self._engine.num_steps)
        counters = np.array([self._engine.num_steps, 0.0, 0.0])
        return {RESIDUAL: total, "counters": counters} if self._has_copies else {}

    def load(self, weights: Arrays, optimizer_state: Arrays, gradients: Arrays) -> None:
        """Loads what rank 0 has read."""
        self._runtime.allgather_object(["0.weight"])
        if self._runtime.topology.rank == 0:
            self._engine.weights = weights["0.weight"].copy()
            self._engine.momentum = optimizer_state["0.weight.momentum"].copy()
            self._engine.sent = optimizer_state["0.weight.sent"].copy()
            self._engine.residual = gradients[RESIDUAL].copy()
            self._engine.num_steps = int(gradients["counters"][0])

    def broadcast(self) -> None:
        """Copies rank 0's state; each rank has its part of the residual."""
        engine = self._engine
        flat = np.concatenate([engine.weights, engine.momentum, engine.sent, engine.residual, [engine.num_steps]])
        flat = self._runtime.gather("state", flat)[0]
        engine.weights, engine.momentum, engine.sent, residual = np.split(flat[:12].copy(), 4)
        engine.residual = residual / self._runtime.topology.world_size
        engine.num_steps = int(flat[12])


class Recipe:
    """What each process of a job runs.

    Args:
        world: where it runs.
        cfg: the configuration.
        num_examples: size of the training set.
        is_lossy: whether gradients are compressed, with residuals.
    """

    def __init__(self, world: World, cfg: RunConfig, num_examples: int, is_lossy: bool) -> None:
        self._world, self._examples, self._is_lossy = world, Examples(num_examples), is_lossy
        self.expected = dict(_expected(cfg, num_examples))
        self.last_step = max(self.expected)

    def train(self, cfg: RunConfig) -> dict[str, Any]:
        """Runs the whole training, as a recipe does."""
        job = _Job(cfg, "simulated_exact.py", self._world, self.expected, self._is_lossy)
        engine = job.parallelize([], self._examples)
        run = job.restore_or_broadcast(engine, self._examples)
        for step, batch in run.batches():
            metrics = engine.train(batch, step)
            run.record(step, metrics)
            run.save_if_due(step, metrics)
        digest = hashlib.sha256(engine.weights.tobytes()).hexdigest()
        if set(job.runtime.allgather_object(digest)) != {digest}:
            raise Violation("the ranks have different weights")
        return run.finish(digest)


class _Job(Job[Engine]):
    def __init__(self, cfg: RunConfig, file: str, world: World, expected: Mapping[int, Any], is_lossy: bool) -> None:
        self._world, self._expected, self._is_lossy = world, expected, is_lossy
        super().__init__(cfg, file)

    @property
    def runtime(self) -> Runtime:
        """That of the current process."""
        assert self._world.current.process is not None
        runtime: Runtime = self._world.current.process.runtime
        return runtime

    def _engine(self, layers: Any, examples: Any) -> Engine:
        return Engine(self.runtime, self._expected, self._is_lossy, self._world)

    def _state(self, engine: Engine) -> checkpoint.State:
        return State(engine, self.runtime, on_all_ranks=self.cfg.elastic)


def _expected(cfg: RunConfig, num_examples: int) -> Iterable[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """For each step the right weights, and the sum of all gradients so far, from one process."""
    weights, momentum, total = np.array([1.0, 2.0, 3.0]), np.zeros(3), np.zeros(3)
    yield 0, (weights, total)
    for step in TrainingSampler.from_config(cfg, num_examples, Topology(0, 1, 0, 1)).steps():
        gradient = gradients_of(step.examples).sum(axis=0)
        weights, momentum = updated(weights, momentum, gradient)
        total = total + gradient
        yield step.number, (weights, total)
