"""The measurements for compression=auto in TensorFlow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.config.composition import option
from common.config.schema import CompressionConfig, RunConfig
from common.data.datasets.examples import Examples
from common.distributed.timing import median_seconds
from common.distributed.topology import Topology
from common.gradients import autotune
from common.gradients.autotune import Estimate
from common.gradients.gradient_sync import SyncOptions
from common.gradients.step_metrics import StepMetrics
from common.tf.distributed import runtime
from common.tf.gradients.allreduce import AllreduceSync

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf


class Model(Protocol):
    """The part of the interface of keras.Model that is needed here."""

    @property
    def trainable_variables(self) -> Sequence[Any]:
        """The trained variables, in the model's order."""

    def __call__(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
        """The outputs of the model."""


def choose_compression(cfg: RunConfig, model: Model, examples: Examples, topology: Topology) -> CompressionConfig:
    """Chooses the compression for a model (common/gradients/autotune.py); times a step on some of the examples."""
    return autotune.choose(cfg, _Measure(cfg, model, examples, topology), runtime, topology)


@dataclass(frozen=True)
class _Measure:
    cfg: RunConfig
    model: Model
    examples: Examples
    topology: Topology

    def compute_seconds(self) -> float:
        share = max(1, self.cfg.train.global_batch_size // self.topology.num_replicas)
        inputs = runtime.to_tensor(
            self.examples.get_batch(np.arange(min(share, len(self.examples))))[0], self.cfg.precision
        )
        weights = [variable.value for variable in self.model.trainable_variables]

        @tf.function
        def forward_backward() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                outputs = tf.reduce_sum(self.model(inputs, training=True))
            return tape.gradient(outputs, weights)

        return median_seconds(forward_backward)

    def estimate(self, method: str) -> Estimate:
        variables = self.model.trainable_variables
        noise = [tf.random.normal(variable.shape) for variable in variables]
        gradients = AllreduceSync(variables, self.topology, SyncOptions(option("compression", method)))

        @tf.function
        def exchange() -> tuple[StepMetrics, list[tf.Tensor]]:
            gradients.accept(noise, tf.zeros(()), tf.constant(False), tf.zeros(()))
            return gradients.synchronize(), gradients.gradients

        return Estimate(method, median_seconds(exchange), sum(map(float, exchange()[0].wire_bytes)))

    def allreduce_seconds(self, num_values: int) -> float:
        values = tf.zeros(num_values)
        return median_seconds(lambda: hvd.allreduce(values, name=f"probe.{num_values}", op=hvd.Sum))
