"""tests/helpers/small_model.py in Keras on TensorFlow."""

from collections.abc import Sequence

from common.config.composition import option
from common.config.schema import OptimizerConfig
from common.distributed.topology import Topology
from common.gradients.gradient_sync import SyncOptions
from common.gradients.step_metrics import StepMetrics
from common.parallel.rank_schedule import RankSchedule
from common.tf.distributed import runtime
from common.tf.engine import Engine
from common.tf.gradients import optimizers
from common.tf.gradients.allreduce import AllreduceSync
from common.tf.parallel.stage import Stage

import numpy as np

import keras  # isort: skip
import tensorflow as tf  # isort: skip


class SmallModel:
    """See tests/helpers/small_model.py."""

    def __init__(self, weights: Sequence[np.ndarray], optimizer: OptimizerConfig, topology: Topology) -> None:
        layers = [keras.layers.Dense(size, dtype="float64") for size in (3, 4)]
        self.model = keras.Sequential([keras.Input((5,), dtype="float64"), *layers])
        for variable, weight in zip(self.model.weights, weights, strict=True):
            variable.assign(weight)
        self.optimizer = optimizers.build(optimizer, self.model)
        self.topology = topology

    def gradients(self, inputs: np.ndarray, global_size: int, num_micro_batches: int, bucket_bytes: int) -> StepMetrics:
        def half_squares(outputs: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
            return 0.5 * tf.reduce_sum(outputs**2)

        precision, schedule = option("precision", "fp64"), RankSchedule("1f1b", 1, num_micro_batches, self.topology)
        stage = Stage(self.model.layers, [range(2)], precision, schedule)
        options = SyncOptions(measure_noise=True, bucket_bytes=bucket_bytes)
        sync = AllreduceSync(stage.trainable_variables, self.topology, options)
        self.engine = Engine(stage, sync, self.optimizer, precision)
        self.engine.gradients.zero()
        self.engine.forward_backward(half_squares, tf.constant(inputs), tf.constant(inputs), global_size)
        return self.engine.gradients.synchronize()

    def exchanged(self, max_norm: float) -> list[np.ndarray]:
        self.engine.gradients.clip_norm(max_norm)
        return [gradient.numpy() for gradient in self.engine.gradients.gradients]

    def step(self, learning_rate: float, metrics: StepMetrics) -> None:
        self.engine.set_learning_rate(learning_rate)
        self.engine.step(metrics)

    def broadcast(self) -> None:
        runtime.broadcast_state(self.model, self.optimizer)

    @property
    def weights(self) -> list[np.ndarray]:
        return [variable.numpy() for variable in self.model.weights]
