"""tests/gradients/test_compression.py's exchange of gradients in TensorFlow."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.config.composition import option
from common.distributed.topology import Topology
from common.gradients.gradient_sync import SyncOptions
from common.gradients.step_metrics import StepMetrics
from common.parallel.rank_schedule import RankSchedule
from common.tf.gradients.allreduce import AllreduceSync
from common.tf.parallel.stage import Stage, build_on_meta
from common.tf.training.checkpoint import State

import numpy as np

import keras  # isort: skip
import tensorflow as tf  # isort: skip


class Weights(keras.Layer):
    """Weights that have nothing but shapes."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Makes the weights."""
        for number, shape in enumerate(self.shapes):
            self.add_weight(shape=shape, initializer="zeros", name=f"w{number}")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Nothing."""
        return inputs


class Exchange:
    """The gradients of weights that have nothing but shapes."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], topology: Topology, **options: Any) -> None:
        layers = [Weights(shapes)]
        build_on_meta(layers, tf.zeros((1, 1)))
        rank_schedule = RankSchedule("1f1b", 1, 1, topology)
        self.model = Stage(layers, [range(1)], option("precision", "fp32"), rank_schedule)
        self.topology = topology
        self.gradients = AllreduceSync(self.model.trainable_variables, topology, SyncOptions(**options))
        optimizer = keras.optimizers.SGD()
        optimizer.build(self.model.trainable_variables)
        self.checkpoint = State(self.model, optimizer, self.gradients)
        self._step = tf.function(self._exchange)

    def _exchange(self, gradients: list[tf.Tensor]) -> tuple[StepMetrics, list[tf.Tensor]]:
        scaled = [gradient * self.gradients.loss_scale for gradient in gradients]
        zero, fraction = tf.zeros(()), tf.constant(1 / self.topology.num_replicas)
        self.gradients.accept(scaled, zero, tf.constant(False), fraction)
        return self.gradients.synchronize(), self.gradients.gradients

    def step(self, arrays: Sequence[np.ndarray]) -> tuple[StepMetrics, list[np.ndarray]]:
        """Exchanges this rank's gradients."""
        sums, gradients = self._step([tf.constant(array) for array in arrays])
        self.gradients.gradients = gradients
        return sums, [gradient.numpy() for gradient in gradients]

    def clipped(self, max_norm: float) -> np.ndarray:
        """The first of the exchanged gradients after clipping."""
        self.gradients.clip_norm(max_norm)
        return self.gradients.gradients[0].numpy()

    def state(self) -> dict[str, list[np.ndarray]]:
        """This rank's compressor state, a list over the weights."""
        return {name: [tensors[i].numpy() for i in sorted(tensors)] for name, tensors in self.gradients.state().items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over what a checkpoint has of the gradients, as rank 0 reads it."""
        self.checkpoint.load(self.checkpoint.weights(), {}, arrays)
        self.checkpoint.broadcast()

    def coded(self, rows: np.ndarray) -> np.ndarray:
        """Rows (K, P), each encoded and decoded by the dense code of the first weight."""
        compressor: Any = self.gradients._compressors.lossy[0]
        codes = compressor.encode(tf.constant(rows), compressor.group.random(tf.constant(0)))
        return compressor.decode(codes, rows.shape[1]).numpy()
