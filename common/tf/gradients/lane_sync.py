"""Sums gradients to the same bits for all numbers of ranks."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.gradient_sync import SyncOptions
from common.gradients.lanes import LaneExchange, Node, TreeSum
from common.gradients.step_metrics import NUM_SCALARS, StepMetrics
from common.tf.gradients import norms
from common.tf.gradients.buckets import BucketBuffers
from common.tf.gradients.lane_compressors import LaneCompressors
from common.tf.gradients.loss_scaler import LossScaler

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


class LaneSync(LaneExchange):
    """Sums the gradients of lanes along one tree (common/gradients/lanes.py): the GradientSync of reproducible runs.

    A rank computes its lanes one after another, and each lane's gradients are kept apart. Then each rank adds up one
    part of the vectors of all lanes, so that it sends about as much as in an allreduce.

    Args:
        weights: the variables of the model, in order.
        topology: the place of this rank, and the number of lanes.
        options: how gradients are summed. Each lane has compressors of its own.

    Attributes:
        buckets: the vectors in which gradients are exchanged.
        gradients: after synchronize(), the sums of the gradients of the variables.
    """

    _scaler: LossScaler

    def __init__(self, weights: Sequence[keras.Variable], topology: Topology, options: SyncOptions) -> None:
        self._topology, self.options = topology, options
        self._dtype = tf.as_dtype(weights[0].dtype)
        self._scaler = LossScaler(options, self._dtype)
        shapes = [tuple(variable.shape) for variable in weights]
        value_bytes = self._dtype.size
        self.buckets = bucketing.of_model(shapes, value_bytes, options.compression, options.op, options.bucket_bytes)
        self._buffers = BucketBuffers(shapes, self.buckets, self._dtype)
        *others, last = (bucket.num_values for bucket in self.buckets)
        self.lengths = [*others, last + NUM_SCALARS]
        self._pack, self._clip = tf.function(self._packed), tf.function(norms.clip)
        self._finish = tf.function(self._finished)
        self._compressors = LaneCompressors(shapes, self.buckets, topology, options)
        self._local_clip_norm = options.local_clip_norm(topology.num_lanes)
        self.gradients: list[tf.Tensor] = []
        self._kept: dict[int, list[tf.Tensor]] = {}  # by bucket that is compressed, the vectors of the lanes
        self._sums: list[TreeSum[tf.Tensor]] = []

    def zero(self) -> None:
        """Starts a step: clears all gradients."""
        self.gradients, self._sums = [], [self._tree() for _ in self.buckets]
        num_steps = int(self._scaler.numbers().num_steps)
        is_on = partial(self._compressors.compresses, num_steps=num_steps)
        self._kept = {number: [] for number in range(len(self.buckets)) if is_on(number)}

    def end_lane(
        self, lane: int, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, fraction: tf.Tensor
    ) -> None:
        """Takes the result of a lane's backward; the lanes of a rank come in order.

        Args:
            lane: the lane's number.
            gradients: the gradients of `loss` times the loss scale.
            loss: () the lane's part of the mean loss over the global batch.
            stop: () this rank's notice to the others (common/training/preemption.py).
            fraction: () the lane's fraction of the examples of the global batch.
        """
        messages = self._pack(list(gradients), loss, stop, fraction)
        for number, (tree, message) in enumerate(zip(self._sums, messages, strict=True)):
            if number in self._kept:
                self._kept[number].append(message)
            else:
                tree.push(Node(lane, lane + 1), message)

    def synchronize(self) -> StepMetrics:
        """Sums the gradients of all lanes; returns the metrics of the step, the same on all ranks."""
        num_steps = int(self._scaler.numbers().num_steps)
        sums = [
            self._compressors.exchange(number, self._kept[number], num_steps)
            if number in self._kept
            else self._exchanged(number)
            for number in range(len(self.buckets))
        ]
        compressed = {number: tf.constant(self._compressors.num_bytes[number]) for number in self._kept}
        metrics, self.gradients = self._finish(sums, compressed)
        if not (self.options.finds_nonfinite and metrics.overflow > 0):
            self._compressors.commit()
        return metrics

    def clip_norm(self, max_norm: float) -> None:
        """Scales the summed gradients down to a global L2 norm of max_norm if theirs is larger; 0: no clipping.

        With error feedback this does nothing, because each lane was clipped before the exchange.
        """
        if max_norm and not self._local_clip_norm:
            self.gradients = self._clip(self.gradients, max_norm, norms.norm(self.gradients))

    def sync_weights(self) -> None:
        """Does nothing: all ranks make the same updates, so that each has the newest weights."""

    def gather_state(self) -> None:
        """Gives each rank the states of all lanes' compressors."""
        self._compressors.gather()

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The state of the lanes' compressors, by name and index of the variable."""
        return self._compressors.state()

    def load(self, state: Mapping[str, Mapping[int, Any]]) -> None:
        """Loads the result of state()."""
        self._compressors.load(state)

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of the compressors' state and of the counters."""
        return [*self._compressors.variables, self._scaler.variable]

    def _tree(self) -> TreeSum[tf.Tensor]:
        return TreeSum(self._topology.num_lanes, tf.add)

    def _packed(
        self, gradients: list[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, fraction: tf.Tensor
    ) -> list[tf.Tensor]:
        fraction, zero = tf.cast(fraction, self._dtype), tf.zeros((), self._dtype)
        gradients, is_bad = self._scaler.unscale(gradients)
        overflow = tf.cast(is_bad | ~tf.math.is_finite(loss), self._dtype) if self.options.finds_nonfinite else zero
        if self._local_clip_norm:
            gradients = norms.clip(gradients, self._local_clip_norm, norms.norm(gradients))
        measures_noise = self.options.measure_noise
        squares = tf.math.divide_no_nan(norms.squared_norm(gradients), fraction**2) if measures_noise else zero
        *others, last = self._buffers.pack(gradients)
        scalars = tf.stack([tf.cast(loss, self._dtype), tf.cast(stop, self._dtype), squares, overflow])
        return [*others, tf.concat([last, scalars], 0)]

    def _exchanged(self, number: int) -> tf.Tensor:
        """The sum of a bucket's vectors of all lanes."""
        nodes, parts = self._sums[number].nodes, self.parts(number)
        message = tf.concat([value[start:end] for start, end in parts for _, value in nodes], 0)
        splits = [len(nodes) * (end - start) for start, end in parts]
        received, _ = hvd.alltoall(message, splits, name=f"lanes.nodes.{number}")
        of_all, tree = [node for of_rank in self.nodes for node in of_rank], self._tree()
        for node, value in zip(of_all, tf.split(received, len(of_all)), strict=True):
            tree.push(node, value)
        ((_, part),) = tree.nodes
        return hvd.allgather(part, name=f"lanes.sums.{number}")

    def _finished(self, sums: list[tf.Tensor], compressed: dict[int, tf.Tensor]) -> tuple[StepMetrics, list[tf.Tensor]]:
        *others, last = sums
        last, scalars = tf.split(last, [-1, NUM_SCALARS])
        gradients = self._buffers.unpack([*others, last])
        squared_norm = norms.squared_norm(gradients) if self.options.measure_noise else 0.0
        values = tf.unstack(scalars, NUM_SCALARS)
        is_skipped = values[-1] > 0 if self.options.finds_nonfinite else False
        gradients = self._compressors.apply_momentum(gradients, is_skipped)
        return self.counted(values, squared_norm, self._dtype.size, compressed), gradients
