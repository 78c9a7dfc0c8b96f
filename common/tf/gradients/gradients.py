"""Packs gradients into flat buckets and sums them over the replicas while backward still runs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from common.config.schema import CompressionConfig, DGCConfig, LossyConfig, ReduceOp
from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.bucketing import Bucket
from common.gradients.compression import local_clip_norm
from common.gradients.loss_scale import LossScale
from common.gradients.step_metrics import NUM_RIDERS, StepMetrics
from common.tf.distributed import runtime
from common.tf.gradients import compression
from common.tf.gradients.compression import (
    Adasum,
    Communicator,
    CompressionGroup,
    Compressor,
    Dense,
    Exchanged,
    PlainMomentum,
)

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

NO_COMPRESSION = CompressionConfig("none")


def sum_over_replicas(
    gradients: Sequence[tf.Tensor], topology: Topology, bucket_bytes: int = bucketing.BUCKET_BYTES
) -> list[tf.Tensor]:
    """The sums of the gradients over the replicas, with one message per bucket.

    In a graph, each bucket is sent as soon as its gradients are computed.
    """
    if topology.num_replicas == 1:
        return list(gradients)
    summed = list(gradients)
    for number, indices in enumerate(bucketing.assign([_size(gradient) for gradient in gradients], bucket_bytes)):
        members = [gradients[index] for index in indices]
        flat = tf.concat([tf.reshape(member, [-1]) for member in members], axis=0)
        flat = hvd.allreduce(flat, name=f"gradients.{number}", op=hvd.Sum)
        parts = tf.split(flat, [member.shape.num_elements() for member in members])
        for index, member, part in zip(indices, members, parts, strict=True):
            summed[index] = tf.reshape(part, member.shape)
    return summed


class Gradients:
    """The exchange of a model's gradients, in flat buckets, each of which is exchanged as one vector.

    Args:
        shapes: the shapes of the gradients, in the order of the model's variables.
        topology: the place of this rank; the ranks of its group exchange gradients.
        measure_noise: also measures the squared norms that the gradient noise scale needs.
        compression: the compression of the gradients.
        op: how the gradients of the ranks are combined.
        loss_scale: the factor on the losses at the start.
        clip_norm: largest global norm; used with error feedback only, where each rank clips its part before the
            exchange.
        seed: the seed of the compressors' random numbers.
        dtype: the dtype of the gradients.
        bucket_bytes: largest size of a bucket that holds several gradients.
        tied: for each variable that stages share: the number of its gradient, and all ranks that have it.
        skip_nonfinite: checks for losses and gradients that are not finite and reports them in StepMetrics.overflow.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        topology: Topology,
        measure_noise: bool = False,
        compression: CompressionConfig = NO_COMPRESSION,
        op: ReduceOp = ReduceOp.average,
        loss_scale: LossScale | None = None,
        clip_norm: float = 0.0,
        seed: int = 0,
        dtype: str = "float32",
        bucket_bytes: int = bucketing.BUCKET_BYTES,
        tied: Iterable[tuple[int, Sequence[int]]] = (),
        skip_nonfinite: bool = False,
    ) -> None:
        self._topology, self._tied = topology, list(tied)
        self._measure_noise = measure_noise
        self._compression, self._seed = compression, seed
        has_feedback = isinstance(compression, LossyConfig) and compression.error_feedback
        self._local_clip_norm = local_clip_norm(clip_norm, topology.world_size) if has_feedback else 0.0
        self._loss_scale = loss_scale or LossScale()
        self._seeks_nonfinite = self._loss_scale.is_dynamic or skip_nonfinite
        self._dtype = tf.as_dtype(dtype)
        # Number of steps, loss scale, steps since it changed, skipped steps; the same on all ranks.
        self.counters = tf.Variable([0.0, self._loss_scale.value, 0.0, 0.0], dtype=tf.float64, trainable=False)
        self._shapes = [tuple(shape) for shape in shapes]
        not_compressed = [number for number, _ in self._tied]
        self.buckets = bucketing.of_model(self._shapes, self._dtype.size, compression, op, bucket_bytes, not_compressed)
        self._dense: list[Compressor] = []
        self._compressors: dict[int, Compressor] = {}  # of buckets that are not simply summed
        if len(topology.group) > 1 or isinstance(compression, LossyConfig):
            for number, bucket in enumerate(self.buckets):
                self._add_compressor(number, bucket)
        self._momentum = self._plain_momentum()

    def _add_compressor(self, number: int, bucket: Bucket) -> None:
        ranks: Sequence[int] = self._topology.group
        shapes, name = [self._shapes[index] for index in bucket.members], f"gradients.{number}"
        everyone = CompressionGroup(number, shapes, Communicator(name, runtime.process_set(ranks)), self._seed)
        self._dense.append(Dense(NO_COMPRESSION, everyone))
        if bucket.method == ReduceOp.adasum.name:
            self._compressors[number] = Adasum(NO_COMPRESSION, everyone)
        elif isinstance(self._compression, LossyConfig) and bucket.method != NO_COMPRESSION.name:
            if self._compression.two_level:
                ranks = self._topology.first_ranks_of_hosts
            communicator = Communicator(f"{name}.{bucket.method}", runtime.process_set(ranks))
            group = CompressionGroup(number, shapes, communicator, self._seed)
            self._compressors[number] = compression.build(self._compression, group, self._topology)

    def _plain_momentum(self) -> PlainMomentum | None:
        """The momentum of gradients that DGC leaves uncompressed."""
        cfg = self._compression
        if not isinstance(cfg, DGCConfig) or not cfg.momentum:
            return None
        plain = bucketing.members_without(cfg.name, self.buckets)
        return PlainMomentum(cfg.momentum, {index: self._shapes[index] for index in plain})

    @property
    def loss_scale(self) -> tf.Tensor | float:
        """The factor on the losses of the next step."""
        return tf.cast(self.counters[1], self._dtype) if self._loss_scale.is_dynamic else 1.0

    def exchange(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, share: tf.Tensor
    ) -> tuple[StepMetrics, list[tf.Tensor]]:
        """The step's metrics and the sums of the gradients over the replicas.

        In a graph, each bucket is sent as soon as its gradients are computed.

        Args:
            gradients: the gradients of `loss` times the loss scale.
            loss: () this rank's part of the mean loss over the global batch.
            stop: () bool, whether this rank was asked to stop.
            share: () this rank's fraction of the examples of the global batch; needed for the noise scale and adasum.
        """
        share, zero = tf.cast(share, self._dtype), tf.zeros((), self._dtype)
        gradients = [gradient / self.loss_scale for gradient in gradients] if self._loss_scale.is_dynamic else gradients
        overflow = tf.cast(~all_finite([loss, *gradients]), self._dtype) if self._seeks_nonfinite else zero
        gradients = clip_global_norm(gradients, self._local_clip_norm)
        # The gradients are sums over this rank's examples, divided by the global batch's size.
        squares = tf.math.divide_no_nan(squared_norm(gradients), share**2) if self._measure_noise else zero
        loss, stop = tf.cast(loss, self._dtype), tf.cast(stop, self._dtype)
        riders = tf.stack([loss, stop, squares, overflow])
        sent = [self._flat([gradients[index] for index in bucket.members]) for bucket in self._sent_buckets]
        results = [self._exchanged(number, flat, riders, share) for number, flat in enumerate(sent)]
        if results:
            last, riders = tf.split(results[-1].summed, [-1, NUM_RIDERS])
            results[-1] = results[-1]._replace(summed=last)
            gradients = self._unpacked([result.summed for result in results])
        gradients = self._with_tied_sums(gradients)
        loss, stop, local_grad_sqnorm, overflow = tf.unstack(self._sum_over_stages("step_sums", riders), NUM_RIDERS)
        loss_scale = self.counters[1]
        self._keep_state(results, overflow > 0)
        measured = squared_norm(gradients) if self._measure_noise else zero
        bytes_sent = tuple(result.num_bytes for result in results)
        cosine, residual_norm = self._health(sent, results)
        if self._momentum:
            gradients = self._momentum.apply(gradients, overflow > 0)
        measures = (measured, bytes_sent, cosine, residual_norm, loss_scale, self.counters[3])
        return StepMetrics(loss, stop, local_grad_sqnorm, overflow, *measures), list(gradients)

    def clip_global_norm(self, gradients: Sequence[tf.Tensor], max_norm: float) -> list[tf.Tensor]:
        """The exchanged gradients, clipped by their global norm over all stages.

        With error feedback they are returned unchanged, because each rank has clipped its part before the exchange.
        """
        if not max_norm or self._local_clip_norm or self._topology.num_stages == 1:
            return clip_global_norm(gradients, 0.0 if self._local_clip_norm else max_norm)
        # A variable that several stages share counts once.
        again = [gradients[number] for number, ranks in self._tied if ranks[0] not in self._topology.group]
        squares = squared_norm(gradients) - sum(tf.reduce_sum(tf.square(tied)) for tied in again)
        (squares,) = tf.unstack(self._sum_over_stages("squares", squares[None]))
        return clip_global_norm(gradients, max_norm, tf.sqrt(squares))

    def compiled(self, update: Callable[..., StepMetrics]) -> Callable[..., StepMetrics]:
        """Compiles the part of a step after backward, which exchanges gradients, as one graph."""
        return tf.function(update)

    def sync_weights(self) -> None:
        """No-op for allreduce; ranks of a parameter server fetch the newest weights here."""

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The state of this rank's compressors, by name and index of the variable."""
        state: dict[str, dict[int, tf.Tensor]] = {}
        for number, compressor in self._compressors.items():
            for name, tensors in compressor.state_by_gradient().items():
                state.setdefault(name, {}).update(zip(self.buckets[number].members, tensors, strict=True))
        return state | ({"momentum": self._momentum.state()} if self._momentum else {})

    def load(self, state: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Loads the result of state_by_gradient()."""
        for number, compressor in self._compressors.items():
            names = compressor.state_by_gradient()
            members = self.buckets[number].members
            compressor.load({name: [state[name][index] for index in members] for name in names})
        if self._momentum:
            self._momentum.load(state["momentum"])

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of the compressors' state and of the momentum."""
        of_momentum = list(self._momentum.velocities.values()) if self._momentum else []
        return [*(one for compressor in self._compressors.values() for one in compressor.variables), *of_momentum]

    @property
    def local_state_fraction(self) -> float:
        """The fraction of a summed state that this rank gets: equal for all ranks that compress, 0 for others."""
        is_two_level = isinstance(self._compression, LossyConfig) and self._compression.two_level
        if not is_two_level:
            return 1 / len(self._topology.group)
        return 1 / len(self._topology.first_ranks_of_hosts) if self._topology.local_rank == 0 else 0.0

    def set_counters(self, num_steps: float, scale: float, good_steps: float, skipped_steps: float = 0.0) -> None:
        """Sets the counters; the loss scale only if it is dynamic. Older checkpoints have no skipped_steps."""
        of_scale = [scale, good_steps] if self._loss_scale.is_dynamic else [1.0, 0.0]
        self.counters.assign([num_steps, *of_scale, skipped_steps])

    @property
    def _sent_buckets(self) -> list[Bucket]:
        """The buckets that are exchanged; none with a single rank, unless it compresses."""
        return self.buckets if self._dense else []

    def _flat(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        """The gradients as one vector (n,); n may be 0."""
        return tf.concat([tf.zeros(0, self._dtype), *(tf.reshape(gradient, [-1]) for gradient in gradients)], 0)

    def _exchanged(self, number: int, flat: tf.Tensor, riders: tf.Tensor, share: tf.Tensor) -> Exchanged:
        """Exchanges a bucket; the riders are appended to the last bucket."""
        step = tf.cast(self.counters[0], tf.int32)
        dense, compressor = self._dense[number], self._compressors.get(number)
        dense.group.communicator.begin()
        if compressor is None:
            return dense.exchange(tf.concat([flat, riders], 0) if number == len(self.buckets) - 1 else flat, step)
        if isinstance(compressor, Adasum):
            return compressor.exchange(tf.math.divide_no_nan(flat, share), step)
        compressor.group.communicator.begin()
        if not isinstance(self._compression, LossyConfig) or self._compression.start_step <= 1:
            return compressor.exchange(flat, step)

        def uncompressed() -> Exchanged:
            kept = [variable.value() for variable in compressor.variables]
            return dense.exchange(flat, step)._replace(state=kept, error=tf.zeros_like(flat))

        return tf.cond(step + 1 >= self._compression.start_step, lambda: compressor.exchange(flat, step), uncompressed)

    def _unpacked(self, summed: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The gradients of the buckets, in the order of the model's variables."""
        by_index: dict[int, tf.Tensor] = {}
        for bucket, flat in zip(self.buckets, summed, strict=True):
            lengths = [math.prod(self._shapes[index]) for index in bucket.members]
            for index, part in zip(bucket.members, tf.split(flat, lengths) if lengths else (), strict=True):
                by_index[index] = tf.reshape(part, self._shapes[index])
        return [by_index[index] for index in range(len(self._shapes))]

    def _with_tied_sums(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums the gradients of variables that stages share; all ranks of a stage have the stage's sum before."""
        summed = list(gradients)
        for place, (number, ranks) in enumerate(self._tied):
            mine, process_set = summed[number] / len(self._topology.group), runtime.process_set(ranks)
            summed[number] = hvd.allreduce(mine, name=f"tied.{place}", op=hvd.Sum, process_set=process_set)
        return summed

    def _sum_over_stages(self, name: str, values: tf.Tensor) -> tf.Tensor:
        """Sums (n,) over the stages of values that are the same on all ranks of a stage."""
        if self._topology.num_stages == 1:
            return values
        # Not zeros on all ranks of a stage except one: TensorFlow sends a constant once, before the graph runs.
        return hvd.allreduce(values / len(self._topology.group), name=name, op=hvd.Sum)

    def _keep_state(self, results: Sequence[Exchanged], overflow: tf.Tensor) -> None:
        """Updates the compressors' state, unless the step is skipped, and the counters."""
        for number, compressor in self._compressors.items():
            for variable, new in zip(compressor.variables, results[number].state, strict=True):
                variable.assign(tf.where(overflow, variable, new))
        num_steps, scale, good_steps, skipped_steps = tf.unstack(self.counters)
        if self._loss_scale.is_dynamic:  # LossScale.update in common/gradients/loss_scale.py
            is_grown = good_steps + 1 >= self._loss_scale.growth_steps
            good = tf.stack(
                [tf.where(is_grown, 2 * scale, scale), tf.where(is_grown, tf.zeros_like(scale), good_steps + 1)]
            )
            bad = tf.stack([tf.maximum(scale / 2, 1), tf.zeros_like(scale)])
            scale, good_steps = tf.unstack(tf.where(overflow, bad, good))
        if self._seeks_nonfinite:
            skipped_steps += tf.cast(overflow, tf.float64)
        self.counters.assign([num_steps + 1, scale, good_steps, skipped_steps])

    def _health(self, sent: Sequence[tf.Tensor], results: Sequence[Exchanged]) -> tuple[tf.Tensor, tf.Tensor]:
        """The cosine to the true gradient and the norm of all residuals, measured by an uncompressed exchange."""
        zero = tf.zeros(())
        if not (isinstance(self._compression, LossyConfig) and self._compression.health):
            return zero, zero
        squares = squared_norm([result.error for result in results])
        true, squares = tf.split(
            hvd.allreduce(
                tf.concat([*sent, squares[None]], 0),
                name="health",
                op=hvd.Sum,
                process_set=runtime.process_set(self._topology.group),
            ),
            [sum(flat.shape.num_elements() for flat in sent), 1],
        )
        applied = tf.concat([result.summed for result in results], 0)
        products = [tf.reduce_sum(a * b) for a, b in ((true, applied), (true, true), (applied, applied))]
        of_all = self._sum_over_stages("health_of_stages", tf.stack([*products, squares[0]]))
        product, true_squares, applied_squares, squares = tf.unstack(of_all)
        cosine = tf.math.divide_no_nan(product, tf.sqrt(true_squares) * tf.sqrt(applied_squares))
        return cosine, tf.sqrt(squares)


def all_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Whether all values are finite, () bool."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])


def squared_norm(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum of the squares of all values, ()."""
    return tf.add_n([tf.reduce_sum(tf.square(gradient)) for gradient in gradients])


def clip_global_norm(gradients: Sequence[tf.Tensor], max_norm: float, norm: tf.Tensor | None = None) -> list[tf.Tensor]:
    """The gradients, scaled down to a global L2 norm of max_norm if theirs is larger.

    Args:
        gradients: the gradients of a model, or of a part of it.
        max_norm: the largest norm of the model's gradients; 0: no clipping.
        norm: () the norm of the model's gradients; None: that of `gradients`.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
    https://arxiv.org/abs/1211.5063 (algorithm 1)
    """
    if not max_norm:
        return list(gradients)
    norm = tf.linalg.global_norm(gradients) if norm is None else norm
    largest = tf.constant(max_norm, norm.dtype)
    scale = largest / tf.maximum(norm, largest)  # exactly 1 if no clipping is needed
    return [gradient * scale for gradient in gradients]


def _size(tensor: tf.Tensor) -> int:
    """Size of the tensor in bytes."""
    return int(tensor.shape.num_elements() * tensor.dtype.size)
