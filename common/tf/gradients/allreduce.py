"""Sums gradients over the ranks by allreduce."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.config.schema import LossyConfig
from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.gradient_sync import Allreduce, SyncOptions
from common.gradients.step_metrics import NUM_SCALARS, StepMetrics
from common.tf.gradients import norms
from common.tf.gradients.buckets import BucketBuffers
from common.tf.gradients.compression import Exchanged
from common.tf.gradients.compressor_set import CompressorSet
from common.tf.gradients.health_probe import HealthProbe
from common.tf.gradients.loss_scaler import LossScaler
from common.tf.gradients.stage_sums import StageSums

import keras
import numpy as np
import tensorflow as tf


class AllreduceSync(Allreduce):
    """Sums the gradients of a model over the ranks: the GradientSync of plain, hybrid and compressed training.

    Each rank's loss is a sum over its examples, divided by the number of examples of the global batch. So the sum over
    the ranks is the exact mean, even if ranks have unequal numbers of examples. Gradients travel in flat buckets; in a
    graph, each is sent as soon as its gradients are computed.

    Args:
        weights: the variables of the model or of this rank's stage, in order.
        topology: the place of this rank; the ranks of its group exchange gradients.
        options: how gradients are summed.
        tied: for each variable that is shared with other stages: its number, and all ranks that have it.

    Attributes:
        buckets: the vectors in which gradients are exchanged.
        gradients: the gradients of the variables; after synchronize(), their sums over the ranks.
    """

    _scaler: LossScaler

    def __init__(
        self,
        weights: Sequence[keras.Variable],
        topology: Topology,
        options: SyncOptions = SyncOptions(),  # noqa: B008 (it is frozen)
        tied: Iterable[tuple[int, Sequence[int]]] = (),
    ) -> None:
        tied = list(tied)
        self.options, self._topology = options, topology
        self._dtype = tf.as_dtype(weights[0].dtype)
        shapes = [tuple(variable.shape) for variable in weights]
        not_compressed = [number for number, _ in tied]
        self.buckets = bucketing.of_model(
            shapes, self._dtype.size, options.compression, options.op, options.bucket_bytes, not_compressed
        )
        self._is_exchanged = len(topology.group) > 1 or isinstance(options.compression, LossyConfig)
        exchanged = self.buckets if self._is_exchanged else []
        self._buffers = BucketBuffers(shapes, exchanged, self._dtype)
        self._compressors = CompressorSet(shapes, exchanged, topology, options)
        self._scaler, self._stages = LossScaler(options, self._dtype), StageSums(topology, tied)
        self._probe = HealthProbe(topology, self._stages)
        self._local_clip_norm = options.local_clip_norm(topology.world_size)
        self._synchronize, self._clip = tf.function(self._synchronized), tf.function(self._clipped)
        # The tensors of the step that runs, or whose graph is being made.
        self.gradients: list[tf.Tensor] = []
        self._scalars: tuple[tf.Tensor, ...] = ()
        self._sent: list[tf.Tensor] = []
        self._results: list[Exchanged] = []

    def zero(self) -> None:
        """Starts a step: clears all gradients."""
        self.gradients = []

    def accept(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, local_batch_fraction: tf.Tensor
    ) -> None:
        """Takes the result of backward.

        Args:
            gradients: the gradients of `loss` times the loss scale.
            loss: () this rank's part of the mean loss over the global batch.
            stop: () this rank's notice to the others (common/training/preemption.py).
            local_batch_fraction: () this rank's fraction of the examples of the global batch; needed for the noise
                scale and adasum.
        """
        self.gradients, self._scalars = list(gradients), (loss, stop, local_batch_fraction)

    def synchronize(self) -> StepMetrics:
        """Sums all gradients over the ranks; returns the metrics of the step. Outside of graphs, it runs as one."""
        metrics, self.gradients = self._synchronize(self.gradients, *self._scalars)
        return metrics

    def clip_norm(self, max_norm: float) -> None:
        """Scales the summed gradients down to a global L2 norm of max_norm if theirs is larger; 0: no clipping.

        With error feedback this does nothing, because each rank has clipped its part before the exchange.
        """
        if max_norm and not self._local_clip_norm:
            self.gradients = self._clip(self.gradients, max_norm)

    def sync_weights(self) -> None:
        """Does nothing: all ranks make the same updates, so that each has the newest weights."""

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The state of this rank's compressors, by name and index of the variable."""
        return self._compressors.state()

    def load(self, state: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Loads the result of state()."""
        self._compressors.load(state)

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of the compressors' state and of the counters."""
        return [*self._compressors.variables, self._scaler.variable]

    def _synchronized(
        self, gradients: list[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, fraction: tf.Tensor
    ) -> tuple[StepMetrics, list[tf.Tensor]]:
        fraction, zero = tf.cast(fraction, self._dtype), tf.zeros((), self._dtype)
        gradients, is_bad = self._scaler.unscale(gradients)
        overflow = tf.cast(is_bad | ~tf.math.is_finite(loss), self._dtype) if self.options.finds_nonfinite else zero
        if self._local_clip_norm:
            gradients = norms.clip(gradients, self._local_clip_norm, norms.norm(gradients))
        # The gradients are sums over this rank's examples, divided by the global batch's size.
        measures_noise = self.options.measure_noise
        squares = tf.math.divide_no_nan(norms.squared_norm(gradients), fraction**2) if measures_noise else zero
        scalars = tf.stack([tf.cast(loss, self._dtype), tf.cast(stop, self._dtype), squares, overflow])
        self._sent, num_steps = self._buffers.pack(gradients), self._scaler.variable[0]
        self._results = [
            self._compressors.exchange(number, flat, scalars, fraction, num_steps)
            for number, flat in enumerate(self._sent)
        ]
        self.gradients, self._scalars = list(gradients), (scalars,)
        return Allreduce.synchronize(self), self.gradients

    def _clipped(self, gradients: list[tf.Tensor], max_norm: float) -> list[tf.Tensor]:
        return norms.clip(gradients, max_norm, self._stages.norm(gradients))

    def _finish_buckets(self) -> tuple[list[tf.Tensor], tuple[tf.Tensor, ...]]:
        if self._results:
            last, scalars = tf.split(self._results[-1].summed, [-1, NUM_SCALARS])
            self._results[-1] = self._results[-1]._replace(summed=last)
            self._scalars = (scalars,)
            self.gradients = self._buffers.unpack([result.summed for result in self._results])
        return [result.error for result in self._results], tuple(result.num_bytes for result in self._results)

    def _sum_tied_weights(self) -> None:
        self.gradients = self._stages.sum_tied(self.gradients)

    def _sum_scalars(self) -> Sequence[tf.Tensor]:
        return tf.unstack(self._stages.sum("step_sums", self._scalars[0]), NUM_SCALARS)

    def _commit(self, is_skipped: Any) -> None:
        self._compressors.commit(self._results, is_skipped)

    def _squared_norm(self) -> tf.Tensor:
        return norms.squared_norm(self.gradients)

    def _health(self, errors: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        return self._probe.measure(self._sent, [result.summed for result in self._results], errors)

    def _apply_momentum(self, is_skipped: Any) -> None:
        if self._compressors.momentum:
            self.gradients = self._compressors.momentum.apply(self.gradients, is_skipped)
