"""A run of a recipe, from the checks before it to its summary; each of the parts can be used alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from common.config.schema import BatchSchedule, RunConfig
from common.config.validation import validate
from common.data import datasets
from common.data.datasets.augment import Augmented
from common.data.datasets.balance import drawn_classes
from common.data.datasets.examples import Examples
from common.data.sampler import Step, TrainingSampler
from common.distributed.consensus import Runtime
from common.gradients.gradient_sync import GradientSync
from common.gradients.step_metrics import StepMetrics
from common.training import provenance
from common.training.chaos import Chaos
from common.training.checkpoint import Checkpoints, State
from common.training.elastic import check_launch, membership
from common.training.goodput import goodput
from common.training.lr_schedule import learning_rate
from common.training.run_log import RunLog, new_folder

import numpy as np

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound="Engine")


class Engine(Protocol):
    """What a run needs of the engine of a binding (common/<framework>/engine.py)."""

    stage: Any

    @property
    def gradients(self) -> GradientSync:
        """Sums the gradients over the ranks."""

    def to_batch(self, arrays: Iterable[np.ndarray], global_size: int) -> Any:
        """This rank's inputs and targets of a step, as tensors."""

    def seed_dropout(self, seed: int, step: int) -> None:
        """Seeds the random numbers of a step."""

    def replace_weight(self, number: int, value: float) -> float:
        """Sets a value of this rank's weights; returns the old one."""


class Job(ABC, Generic[E]):
    """Starts Horovod and makes the parts of a run; what cannot be run is refused by all ranks together.

    Args:
        cfg: the configuration.
        recipe_file: the file of the recipe, <task>_<framework>.py.

    Raises:
        ConfigError: the configuration cannot be run.
    """

    def __init__(self, cfg: RunConfig, recipe_file: str) -> None:
        self.cfg, self.recipe = cfg, Path(recipe_file).stem
        topology = self.runtime.init(reproducible=cfg.train.reproducible)
        with self.runtime.raise_on_all_ranks():
            check_launch(cfg)
            topology = validate(cfg, topology)
            datasets.prepare(cfg.data, topology)
        self.topology = topology
        self.runtime.seed(cfg.seed)

    @property
    @abstractmethod
    def runtime(self) -> Runtime:
        """The framework's collectives."""

    def load(self, loader: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls a loader of examples; if it fails on one rank, all ranks raise its error."""
        with self.runtime.raise_on_all_ranks():
            return loader(*args, **kwargs)

    def parallelize(self, layers: Any, examples: Examples) -> E:
        """Gives this rank its part of the model: a stage of the pipeline or all of it, as workers and servers have it.

        All ranks must call it, after having built the same layers.

        Args:
            layers: the layers of the whole model, in order.
            examples: the training set.

        Raises:
            ConfigError: the ranks were not started alike, or the model cannot be cut as configured.
        """
        self.runtime.check_alike(provenance.facts(self.cfg, examples.fingerprint))
        self.cfg.run.dir = membership.folder = self.runtime.broadcast_object(new_folder(self.cfg, self.recipe))
        return self._engine(layers, examples)

    def restore_or_broadcast(
        self, engine: E, examples: Examples, extras: Mapping[str, Any] = MappingProxyType({})
    ) -> "Run[E]":
        """Starts the run with one state on all ranks: that of a checkpoint, or rank 0's weights.

        Args:
            engine: the result of parallelize().
            examples: the training set.
            extras: further contents of checkpoints, such as the tokenizer, as JSON values.

        Raises:
            ConfigError: the checkpoint does not suit this run, or the run's folder cannot be used.
        """
        cfg, state = self.cfg, self._state(engine)
        checkpoints = Checkpoints(cfg, self.recipe, examples.fingerprint, state, self.runtime, self.topology, extras)
        restored = checkpoints.restore()
        classes = drawn_classes(examples.cfg, examples.classes) if isinstance(examples, Augmented) else None
        sampler = TrainingSampler.from_config(cfg, len(examples), self.topology, restored, classes)
        checkpoints.commit_start(sampler)
        return Run(cfg, engine, sampler, examples, checkpoints, RunLog(cfg, self.recipe, sampler, self.runtime))

    @abstractmethod
    def _engine(self, layers: Any, examples: Examples) -> E:
        """The engine of the configuration."""

    @abstractmethod
    def _state(self, engine: E) -> State:
        """The access of checkpoints to an engine."""


class Run(Generic[E]):
    """A run that has started: its steps, and what is kept of them.

    Args:
        cfg: the configuration.
        engine: the engine of this rank.
        sampler: decides which examples each rank gets at which step.
        examples: the training set.
        checkpoints: saves the state.
        log: records metrics.
    """

    def __init__(
        self,
        cfg: RunConfig,
        engine: E,
        sampler: TrainingSampler,
        examples: Examples,
        checkpoints: Checkpoints,
        log: RunLog,
    ) -> None:
        self._cfg, self._engine, self._sampler, self._examples = cfg, engine, sampler, examples
        self._checkpoints, self._log = checkpoints, log
        self._chaos = Chaos(cfg, sampler.topology, engine)

    def batches(self) -> Iterator[tuple[Step, Any]]:
        """Yields the steps of the run, each with this rank's part of the global batch, which is read ahead."""
        goodput.begin(self._sampler.start.step)
        for step, arrays in self._log.steps(self._examples):
            self._chaos.before(step.number)
            self._engine.seed_dropout(self._cfg.seed, step.number)
            yield step, self._engine.to_batch(arrays, step.global_size)

    def record(self, step: Step, metrics: StepMetrics) -> None:
        """Logs a finished step; with train.batch_schedule=noise_scale, lets the batch grow.

        Raises:
            TrainingError: the loss is not finite, or too many steps in a row were skipped.
        """
        self._chaos.after()
        is_skipped = float(metrics.overflow) > 0
        if self._cfg.train.batch_schedule is BatchSchedule.noise_scale and not is_skipped:
            local, whole = float(metrics.local_grad_sqnorm), float(metrics.global_grad_sqnorm)
            self._sampler.observe_gradients(step, local, whole)
        self._log.record(step, learning_rate(step, self._cfg), metrics)
        goodput.end_step(step.number)

    def log(self, step: Step, **values: float) -> None:
        """Logs values that are the same on all ranks."""
        self._log.log(step, **values)

    def save_if_due(self, step: Step, metrics: StepMetrics) -> None:
        """Saves a checkpoint every train.checkpoint_every steps, at the end, and if a rank was asked to stop.

        Raises:
            Stopped: a rank was asked to stop; the checkpoint is saved.
        """
        self._checkpoints.save_if_due(step, metrics, self._sampler)

    def finish(self, weights_sha256: str) -> dict[str, Any]:
        """Writes summary.json, which marks the run as finished, and returns its contents.

        Args:
            weights_sha256: the SHA-256 of the final weights, by Engine.assert_weights_in_sync().
        """
        buckets, bubbles = self._engine.gradients.buckets, self._engine.stage.bubble_report()
        return self._log.finish(buckets, weights_sha256, bubbles)
