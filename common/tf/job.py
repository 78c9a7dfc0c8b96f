"""A run of a recipe in TensorFlow."""

from collections.abc import Sequence
from types import ModuleType

from common.config.schema import RunConfig
from common.data.datasets.augment import Augmented
from common.data.datasets.balance import class_weights
from common.data.datasets.examples import Examples
from common.gradients.gradient_sync import SyncOptions
from common.tf.distributed import runtime
from common.tf.engine import Engine
from common.tf.gradients.autotune import choose_compression
from common.tf.models import mixed_precision
from common.tf.parallel.parameter_server import build_sync
from common.tf.parallel.sharded import build_optimizer
from common.tf.parallel.stage import build_stage
from common.tf.training.checkpoint import State
from common.training import job

import keras
import tensorflow as tf


class Job(job.Job[Engine]):
    """The Job of common/training/job.py."""

    runtime: ModuleType = runtime

    def __init__(self, cfg: RunConfig, recipe_file: str) -> None:
        super().__init__(cfg, recipe_file)
        mixed_precision.set_policy(cfg.precision)

    def class_weights(self, examples: Augmented) -> tf.Tensor:
        """(10,) factors on the losses of each class (data.balance)."""
        return runtime.to_tensor(class_weights(examples.cfg, examples.classes), self.cfg.precision)

    def _engine(self, layers: Sequence[keras.Layer], examples: Examples) -> Engine:
        cfg, topology = self.cfg, self.topology
        stage = build_stage(layers, cfg.parallel, cfg.precision, topology, examples)
        optimizer = build_optimizer(cfg.optimizer, stage)
        cfg.compression = choose_compression(cfg, stage, examples, topology)
        gradients = build_sync(stage, optimizer, SyncOptions.from_config(cfg), cfg.parallel)
        return Engine(stage, gradients, optimizer, cfg.precision)

    def _state(self, engine: Engine) -> State:
        return State(engine.stage, engine.optimizer, engine.gradients, on_all_ranks=self.cfg.elastic)
