"""The engine of training: what a rank does with a batch, in TensorFlow."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from common.config.schema import PrecisionConfig
from common.data.datasets.examples import Examples
from common.data.sampler import evaluation_pieces
from common.distributed.topology import bounds
from common.gradients.step_metrics import StepMetrics
from common.tf.distributed import runtime
from common.tf.gradients import optimizers
from common.tf.gradients.lane_sync import LaneSync
from common.tf.parallel.parameter_server import Sync
from common.tf.parallel.pipeline import ScheduleExecutor, accumulate, compiled_accumulate
from common.tf.parallel.sharded import ShardedOptimizer
from common.tf.parallel.stage import Stage
from common.training import preemption

import keras
import numpy as np
import tensorflow as tf

Measure = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""(outputs, targets) -> (), a sum over the examples."""


class Batch(NamedTuple):
    """This rank's part of a global batch.

    Attributes:
        inputs: (B, ...) the inputs of this rank's examples; B may be 0.
        targets: (B, ...) their targets.
        global_size: () number of examples of all ranks in this step.
    """

    inputs: tf.Tensor
    targets: tf.Tensor
    global_size: tf.Tensor | int


class Engine:
    """A rank's part of the model, what sums its gradients over the ranks, and the optimizer.

    The order of a step: gradients.zero(), forward_backward(), gradients.synchronize(), gradients.clip_norm(), step().

    Args:
        stage: the model, or this rank's stage of it.
        gradients: sums the gradients over the ranks.
        optimizer: updates the weights of the stage.
        precision: the dtypes.
    """

    def __init__(
        self, stage: Stage, gradients: Sync, optimizer: keras.Optimizer | ShardedOptimizer, precision: PrecisionConfig
    ) -> None:
        self.stage, self.gradients, self.optimizer = stage, gradients, optimizer
        self._precision = precision
        self._seed = 0, 0  # of the run, and the number of the step
        self._stop: tf.Tensor | None = None  # in a compiled step, this rank's notice before it
        self._apply = self._update if stage.topology.num_servers else tf.function(self._update)

    def to_batch(self, arrays: Iterable[np.ndarray], global_size: int) -> Batch:
        """This rank's inputs and targets of a step, as tensors."""
        inputs, targets = self.to_tensors(arrays)
        return Batch(inputs, targets, global_size)

    def to_tensors(self, arrays: Iterable[np.ndarray]) -> list[tf.Tensor]:
        """The arrays as tensors on this rank's device, floating-point ones in the run's dtype."""
        return runtime.to_tensors(arrays, self._precision)

    def compile(self, step: Callable[[Batch], StepMetrics]) -> Callable[[Batch], StepMetrics]:
        """Compiles a whole step as one graph, in which each bucket of gradients is sent as soon as it is computed.

        A step with transfers between two ranks (a model that is cut, parameter servers) is not compiled as a whole:
        they would deadlock inside a graph. Nor is one of lanes, which all run in the same graph.
        """

        def whole(inputs: tf.Tensor, targets: tf.Tensor, global_size: tf.Tensor, stop: tf.Tensor) -> StepMetrics:
            self._stop = stop
            metrics = step(Batch(inputs, targets, global_size))
            self._stop = None
            return metrics

        topology = self.stage.topology
        is_cut = self.stage.num_chunks > 1 or topology.num_servers > 0 or topology.num_lanes > 0
        graphs: list[Callable[..., StepMetrics]] = [whole] if is_cut else []

        def compiled(batch: Batch) -> StepMetrics:
            size, stop = tf.cast(batch.global_size, tf.int32), tf.constant(preemption.notice(), tf.float32)
            arguments = batch.inputs, batch.targets, size, stop
            if not graphs:
                graphs.append(tf.function(whole, input_signature=[_any_size(each) for each in arguments]))
            return graphs[0](*arguments)

        return compiled

    def forward_backward(
        self, loss_sum: Measure, inputs: tf.Tensor, targets: tf.Tensor, global_size: tf.Tensor | int
    ) -> None:
        """Runs forward and backward of all micro-batches; the sum of the gradients over the ranks is the exact mean.

        Args:
            loss_sum: (outputs, targets) -> sum of the losses over the examples, not their mean; must be the same object
                at each step.
            inputs: (B, ...) inputs of this rank's examples in the step; B may be 0.
            targets: (B, ...) targets of these examples.
            global_size: () number of examples of all ranks in this step, by which the sums are divided.
        """
        stop = tf.constant(preemption.notice(), tf.float32) if self._stop is None else self._stop
        if isinstance(self.gradients, LaneSync):
            self._run_lanes(self.gradients, loss_sum, inputs, targets, global_size, stop)
            return
        stage, scale = self.stage, self.gradients.loss_scale
        loss, gradients = tf.zeros((), tf.float64), list[tf.Tensor]()
        if stage.num_chunks > 1:
            size = tf.cast(global_size, stage.dtype)
            loss_function = stage.compiled_loss(loss_sum)
            executor = ScheduleExecutor(stage, stage.rank_schedule, inputs, targets, loss_function, scale / size)
            executor.run(stage.rank_schedule.actions())
            stage.add_times(executor.seconds, executor.waited_seconds)
            losses = [loss, *(tf.cast(one, tf.float64) for one in executor.outputs)]
            loss, gradients = tf.add_n(losses) / tf.cast(size, tf.float64), executor.gradients
        elif not stage.topology.is_server:
            arguments = inputs, targets, tf.cast(global_size, tf.int32), tf.cast(scale, stage.dtype)
            if tf.inside_function():
                loss, gradients = accumulate(stage, loss_sum, *arguments)
            else:
                loss, gradients = compiled_accumulate(stage, loss_sum, *map(_any_size, arguments))(*arguments)
        self.gradients.accept(gradients, loss, stop, tf.shape(inputs)[0] / tf.cast(global_size, tf.int32))

    def _run_lanes(
        self,
        gradients: LaneSync,
        loss_sum: Measure,
        inputs: tf.Tensor,
        targets: tf.Tensor,
        global_size: tf.Tensor | int,
        stop: tf.Tensor,
    ) -> None:
        stage, (seed, step) = self.stage, self._seed
        size, scale = tf.cast(global_size, tf.int32), tf.cast(gradients.loss_scale, stage.dtype)
        lanes = stage.topology.batch_slices
        for lane, (start, end) in zip(lanes, pairwise(bounds(len(inputs), len(lanes))), strict=True):
            runtime.seed_dropout(stage, seed, lane, step)
            arguments = inputs[start:end], targets[start:end], size, scale
            loss, of_lane = compiled_accumulate(stage, loss_sum, *map(_any_size, arguments))(*arguments)
            gradients.end_lane(lane, of_lane, loss, stop, (end - start) / size)

    def forward(self, inputs: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The outputs of the whole model and their targets on ranks of the last stage; empty tensors on the others.

        Args:
            inputs: (B, ...) inputs of this rank's examples, at least one.
            targets: (B, ...) targets of these examples.
        """
        stage = self.stage
        if stage.num_chunks == 1:
            return stage.compiled_chunk(0, training=False)(inputs), targets
        schedule = replace(stage.rank_schedule, num_micro_batches=1)
        executor = ScheduleExecutor(stage, schedule, inputs, targets)
        executor.run(schedule.forward_actions())
        if not executor.outputs:
            return tf.zeros((0, *stage.shapes[-1]), stage.dtype), targets[:0]
        return tf.concat(executor.outputs, 0), targets

    def step(self, metrics: StepMetrics) -> None:
        """Updates the weights once, unless a loss or gradient of a rank is not finite."""
        self._apply(self.gradients.gradients, metrics.overflow)

    def set_learning_rate(self, value: float) -> None:
        """Sets the learning rate of the next step."""
        optimizers.set_learning_rate(self.optimizer, value)

    def allreduce_mean(self, examples: Examples, *measures: Measure, batch_size: int = 1024) -> list[float]:
        """The exact mean of each measure over all examples: each is evaluated on one rank, and sums are allreduced.

        Args:
            examples: the examples, the same on all ranks.
            measures: (outputs, targets) -> sum over these examples.
            batch_size: largest number of examples per forward pass.
        """
        self.gradients.sync_weights()
        num_pieces, pieces = evaluation_pieces(len(examples), batch_size, self.stage.topology)
        sums = np.zeros((num_pieces, len(measures)))
        for number, indices in pieces:
            outputs, targets = self.forward(*self.to_tensors(examples.get_batch(indices)))
            sums[number] = [float(measure(outputs, targets)) for measure in measures]
        of_all = np.reshape(runtime.sum_over_ranks(*sums.flat), sums.shape)
        return [math.fsum(of_measure) / len(examples) for of_measure in of_all.T]

    def seed_dropout(self, seed: int, step: int) -> None:
        """Seeds dropout, so that it depends only on the seed, the step, and the rank or the lane."""
        self._seed = seed, step
        runtime.seed_dropout(self.stage, seed, self.stage.topology.rank, step)

    def replace_weight(self, number: int, value: float) -> float:
        """Sets a value of this rank's first weight, by its number modulo their number; returns the old one."""
        variable = self.stage.trainable_variables[0]
        values = variable.numpy()
        flat = values.reshape(-1)
        place = number % len(flat)
        before = float(flat[place])
        flat[place] = value
        variable.assign(values)
        return before

    def assert_weights_in_sync(self) -> str:
        """Checks that ranks with the same stage hold the same weights, bit by bit; returns a SHA-256 of all weights.

        Raises:
            TrainingError: the weights differ.
        """
        return runtime.assert_weights_in_sync(self.stage, self.stage.topology.groups)

    def _update(self, gradients: list[tf.Tensor], overflow: Any) -> None:
        def update() -> bool:
            self.optimizer.apply(gradients, self.stage.trainable_variables)
            return True

        tf.cond(tf.cast(overflow, tf.bool), lambda: False, update)


def _any_size(value: tf.Tensor) -> tf.TensorSpec:
    """The spec of tensors like this one with any number of examples."""
    return tf.TensorSpec([None, *value.shape[1:]] if value.shape.rank else [], value.dtype)
