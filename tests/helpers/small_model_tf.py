"""tests/helpers/small_model.py in Keras on TensorFlow."""

from collections.abc import Sequence

from common.config.composition import option
from common.config.schema import OptimizerConfig
from common.distributed.topology import Topology
from common.gradients.step_metrics import StepMetrics
from common.parallel.rank_schedule import RankSchedule
from common.tf.distributed import runtime
from common.tf.gradients import optimizers
from common.tf.gradients.gradients import Gradients, clip_global_norm
from common.tf.parallel.pipeline import forward_backward
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

        shapes = [variable.shape for variable in self.model.trainable_variables]
        exchange = Gradients(shapes, self.topology, True, dtype="float64", bucket_bytes=bucket_bytes).exchange

        rank_schedule = RankSchedule("1f1b", 1, num_micro_batches, self.topology)
        stage = Stage(self.model.layers, [range(2)], option("precision", "fp64"), rank_schedule)

        @tf.function
        def step(data: tf.Tensor) -> tuple[StepMetrics, list[tf.Tensor]]:
            loss, grads = forward_backward(stage, half_squares, data, data, global_size)
            return exchange(grads, loss, tf.constant(self.topology.rank == 0), len(inputs) / global_size)

        sums, self.grads = step(tf.constant(inputs))
        return sums

    def exchanged(self, max_norm: float) -> list[np.ndarray]:
        self.grads = clip_global_norm(self.grads, max_norm)
        return [gradient.numpy() for gradient in self.grads]

    def step(self, learning_rate: float) -> None:
        optimizers.set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.apply(self.grads, self.model.trainable_variables)

    def broadcast(self) -> None:
        runtime.broadcast_state(self.model, self.optimizer)

    @property
    def weights(self) -> list[np.ndarray]:
        return [variable.numpy() for variable in self.model.weights]
