"""compression=auto, measured in TensorFlow."""

from dataclasses import dataclass

from common import method_choice
from common.composition import option
from common.config import CompressionConfig, RunConfig
from common.datasets.examples import Examples
from common.method_choice import Estimate, median_seconds
from common.step_sums import StepSums
from common.tf import runtime
from common.tf.gradients import Gradients
from common.tf.stage import Stage
from common.topology import Topology

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf


def choose_compression(cfg: RunConfig, model: Stage, examples: Examples, topology: Topology) -> CompressionConfig:
    """common/method_choice.py, choose(), for a model's gradients; a step is timed on some of the examples."""
    return method_choice.choose(cfg, _Measure(cfg, model, examples, topology), runtime, topology)


@dataclass(frozen=True)
class _Measure:
    cfg: RunConfig
    model: Stage
    examples: Examples
    topology: Topology

    def compute_seconds(self) -> float:
        share = max(1, self.cfg.train.global_batch_size // self.topology.num_replicas)
        inputs = runtime.to_tensor(self.examples.take(np.arange(min(share, len(self.examples))))[0], self.cfg.precision)
        weights = [variable.value for variable in self.model.trainable_variables]

        @tf.function
        def forward_backward() -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                outputs = tf.reduce_sum(self.model(inputs, training=True))
            return tape.gradient(outputs, weights)

        return median_seconds(forward_backward)

    def estimate(self, method: str) -> Estimate:
        shapes = [variable.shape for variable in self.model.trainable_variables]
        noise = [tf.random.normal(shape) for shape in shapes]
        gradients = Gradients(shapes, self.topology, compression=option("compression", method))

        @tf.function
        def exchange() -> tuple[StepSums, list[tf.Tensor]]:
            return gradients.exchange(noise, tf.zeros(()), tf.constant(False), tf.zeros(()))

        return Estimate(method, median_seconds(exchange), sum(map(float, exchange()[0].wire_bytes)))

    def allreduce_seconds(self, num_values: int) -> float:
        values = tf.zeros(num_values)
        return median_seconds(lambda: hvd.allreduce(values, name=f"probe.{num_values}", op=hvd.Sum))
