"""Gradients in flat buckets, summed over the replicas while backward still runs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

from common import buckets
from common.buckets import Bucket
from common.compression import local_clip_norm
from common.config import CompressionConfig, DGCConfig, LossyConfig, OnNonfinite, ReduceOp, RunConfig
from common.precision import LossScale
from common.step_sums import NUM_RIDERS, StepSums
from common.tf import compression, runtime
from common.tf.compression import Adasum, Channel, Compressor, Dense, Exchanged, PlainMomentum, Unit
from common.tf.stage import Stage
from common.topology import Topology

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

NO_COMPRESSION = CompressionConfig("none")


def sum_over_replicas(
    gradients: Sequence[tf.Tensor], topology: Topology, bucket_bytes: int = buckets.BUCKET_BYTES
) -> list[tf.Tensor]:
    """The sums of the gradients over the replicas, one message per bucket.

    In a graph each bucket is sent off as soon as its gradients are there.
    """
    if topology.num_replicas == 1:
        return list(gradients)
    summed = list(gradients)
    for number, indices in enumerate(buckets.assign([_size(gradient) for gradient in gradients], bucket_bytes)):
        members = [gradients[index] for index in indices]
        flat = tf.concat([tf.reshape(member, [-1]) for member in members], axis=0)
        flat = hvd.allreduce(flat, name=f"gradients.{number}", op=hvd.Sum)
        parts = tf.split(flat, [member.shape.num_elements() for member in members])
        for index, member, part in zip(indices, members, parts, strict=True):
            summed[index] = tf.reshape(part, member.shape)
    return summed


class Gradients:
    """The exchange of a model's gradients, in flat buckets that travel as one vector each.

    Args:
        shapes: of the gradients, in the order of the model's variables.
        topology: whose ranks with the same weights take part.
        measure_noise: also takes the squared norms that the gradient noise scale needs.
        compression: what is done to gradients before they travel.
        op: how the ranks' gradients become one.
        loss_scale: that the losses are multiplied with at first.
        clip_norm: with error feedback, what clip_global_norm would keep afterwards: each rank clips its part before.
        seed: of the compressors' random numbers.
        dtype: of the gradients.
        bucket_bytes: largest size of a bucket of several gradients.
        tied: numbers of the gradients of variables that other stages have, too, each with all ranks that have it.
        skip_nonfinite: looks for losses and gradients that are not finite; StepSums.overflow then tells of them.
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
        bucket_bytes: int = buckets.BUCKET_BYTES,
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
        # Steps made, loss scale, steps since it changed, steps skipped; the same on all ranks.
        self.counters = tf.Variable([0.0, self._loss_scale.value, 0.0, 0.0], dtype=tf.float64, trainable=False)
        self._shapes = [tuple(shape) for shape in shapes]
        not_compressed = [number for number, _ in self._tied]
        self.buckets = buckets.of_model(self._shapes, self._dtype.size, compression, op, bucket_bytes, not_compressed)
        self._dense: list[Compressor] = []
        self._compressors: dict[int, Compressor] = {}  # of buckets that are not summed as they are
        if len(topology.group) > 1 or isinstance(compression, LossyConfig):
            for number, bucket in enumerate(self.buckets):
                self._add_compressor(number, bucket)
        self._momentum = self._plain_momentum()

    @classmethod
    def of(cls, cfg: RunConfig, model: Stage, topology: Topology) -> Self:
        """The gradients of a recipe's model."""
        shapes = [variable.shape for variable in model.trainable_variables]
        return cls(
            shapes,
            topology,
            cfg.train.measures_noise,
            cfg.compression,
            cfg.op,
            LossScale.of(cfg.precision),
            cfg.train.clip_norm,
            cfg.seed,
            cfg.precision.dtype.name,
            tied=model.tied,
            skip_nonfinite=cfg.train.on_nonfinite is OnNonfinite.skip,
        )

    def _add_compressor(self, number: int, bucket: Bucket) -> None:
        ranks: Sequence[int] = self._topology.group
        shapes, name = [self._shapes[index] for index in bucket.members], f"gradients.{number}"
        everyone = Unit(number, shapes, Channel(name, runtime.process_set(ranks)), self._seed)
        self._dense.append(Dense(NO_COMPRESSION, everyone))
        if bucket.method == ReduceOp.adasum.name:
            self._compressors[number] = Adasum(NO_COMPRESSION, everyone)
        elif isinstance(self._compression, LossyConfig) and bucket.method != NO_COMPRESSION.name:
            if self._compression.two_level:
                ranks = self._topology.first_ranks_of_hosts
            channel = Channel(f"{name}.{bucket.method}", runtime.process_set(ranks))
            unit = Unit(number, shapes, channel, self._seed)
            self._compressors[number] = compression.build(self._compression, unit, self._topology)

    def _plain_momentum(self) -> PlainMomentum | None:
        """The momentum of what DGC leaves uncompressed."""
        cfg = self._compression
        if not isinstance(cfg, DGCConfig) or not cfg.momentum:
            return None
        plain = [index for bucket in self.buckets if bucket.method != cfg.name for index in bucket.members]
        return PlainMomentum(cfg.momentum, {index: self._shapes[index] for index in plain})

    @property
    def loss_scale(self) -> tf.Tensor | float:
        """What the losses are to be multiplied with."""
        return tf.cast(self.counters[1], self._dtype) if self._loss_scale.is_dynamic else 1.0

    def exchange(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, share: tf.Tensor
    ) -> tuple[StepSums, list[tf.Tensor]]:
        """The sums of the gradients over the replicas, and scalars that travel with them.

        In a graph each bucket is sent off as soon as its gradients are there.

        Args:
            gradients: of this rank's share of the global batch's mean loss, times the loss scale.
            loss: () this rank's share of the global batch's mean loss.
            stop: () bool, whether this rank was asked to stop.
            share: () this rank's share of the examples of the global batch; needed to measure the noise and by adasum.
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
        loss, stop, local_squares, overflow = tf.unstack(self._sum_over_stages("step_sums", riders), NUM_RIDERS)
        loss_scale = self.counters[1]
        self._keep_state(results, overflow > 0)
        measured = squared_norm(gradients) if self._measure_noise else zero
        bytes_sent = tuple(result.num_bytes for result in results)
        cosine, residual_norm = self._health(sent, results)
        if self._momentum:
            gradients = self._momentum.apply(gradients, overflow > 0)
        measures = (measured, bytes_sent, cosine, residual_norm, loss_scale, self.counters[3])
        return StepSums(loss, stop, local_squares, overflow, *measures), list(gradients)

    def clip_global_norm(self, gradients: Sequence[tf.Tensor], max_norm: float) -> list[tf.Tensor]:
        """The exchanged gradients, clipped by the norm over all stages.

        With error feedback the ranks have clipped their parts before, and nothing is done.
        """
        if not max_norm or self._local_clip_norm or self._topology.num_stages == 1:
            return clip_global_norm(gradients, 0.0 if self._local_clip_norm else max_norm)
        # A variable that stages share counts once.
        again = [gradients[number] for number, ranks in self._tied if ranks[0] not in self._topology.group]
        squares = squared_norm(gradients) - sum(tf.reduce_sum(tf.square(tied)) for tied in again)
        (squares,) = tf.unstack(self._sum_over_stages("squares", squares[None]))
        return clip_global_norm(gradients, max_norm, tf.sqrt(squares))

    def compiled(self, update: Callable[..., StepSums]) -> Callable[..., StepSums]:
        """What follows backward, which exchanges gradients, as one graph."""
        return tf.function(update)

    def settle(self) -> None:
        """Returns when this rank has the newest weights; it always has."""

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The compressors' state by name and variable's index; this rank's alone."""
        state: dict[str, dict[int, tf.Tensor]] = {}
        for number, compressor in self._compressors.items():
            for name, tensors in compressor.state().items():
                state.setdefault(name, {}).update(zip(self.buckets[number].members, tensors, strict=True))
        return state | ({"momentum": self._momentum.state()} if self._momentum else {})

    def load(self, state: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Takes over what state() gave."""
        for number, compressor in self._compressors.items():
            names = compressor.state()
            members = self.buckets[number].members
            compressor.load({name: [state[name][index] for index in members] for name in names})
        if self._momentum:
            self._momentum.load(state["momentum"])

    @property
    def variables(self) -> list[tf.Variable]:
        """The compressors' state."""
        of_momentum = list(self._momentum.velocities.values()) if self._momentum else []
        return [*(one for compressor in self._compressors.values() for one in compressor.variables), *of_momentum]

    @property
    def share_of_state(self) -> float:
        """The part of a summed state that this rank takes: the same for each rank that compresses."""
        is_two_level = isinstance(self._compression, LossyConfig) and self._compression.two_level
        if not is_two_level:
            return 1 / len(self._topology.group)
        return 1 / len(self._topology.first_ranks_of_hosts) if self._topology.local_rank == 0 else 0.0

    def set_counters(self, num_steps: float, scale: float, good_steps: float, skipped_steps: float = 0.0) -> None:
        """Takes over counters; the loss scale where there is one. Older checkpoints lack the last of them."""
        of_scale = [scale, good_steps] if self._loss_scale.is_dynamic else [1.0, 0.0]
        self.counters.assign([num_steps, *of_scale, skipped_steps])

    @property
    def _sent_buckets(self) -> list[Bucket]:
        """The buckets that travel; one rank alone has none, unless it compresses."""
        return self.buckets if self._dense else []

    def _flat(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        """(n,) the gradients, one after another; there may be none."""
        return tf.concat([tf.zeros(0, self._dtype), *(tf.reshape(gradient, [-1]) for gradient in gradients)], 0)

    def _exchanged(self, number: int, flat: tf.Tensor, riders: tf.Tensor, share: tf.Tensor) -> Exchanged:
        """The result of a bucket; the riders are the last of the last one's."""
        step = tf.cast(self.counters[0], tf.int32)
        dense, compressor = self._dense[number], self._compressors.get(number)
        dense.unit.channel.begin()
        if compressor is None:
            return dense.exchange(tf.concat([flat, riders], 0) if number == len(self.buckets) - 1 else flat, step)
        if isinstance(compressor, Adasum):
            return compressor.exchange(tf.math.divide_no_nan(flat, share), step)
        compressor.unit.channel.begin()
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
        """Those of variables that stages share are added up; all ranks of a stage have the stage's sum."""
        summed = list(gradients)
        for place, (number, ranks) in enumerate(self._tied):
            mine, process_set = summed[number] / len(self._topology.group), runtime.process_set(ranks)
            summed[number] = hvd.allreduce(mine, name=f"tied.{place}", op=hvd.Sum, process_set=process_set)
        return summed

    def _sum_over_stages(self, name: str, values: tf.Tensor) -> tf.Tensor:
        """(n,) sums of what all ranks of a stage have alike."""
        if self._topology.num_stages == 1:
            return values
        # Zeros of all but one rank of a stage would not do: TensorFlow sends a constant once, before the graph runs.
        return hvd.allreduce(values / len(self._topology.group), name=name, op=hvd.Sum)

    def _keep_state(self, results: Sequence[Exchanged], overflow: tf.Tensor) -> None:
        """Takes over what the exchange has left, unless the step is skipped; counts it."""
        for number, compressor in self._compressors.items():
            for variable, new in zip(compressor.variables, results[number].state, strict=True):
                variable.assign(tf.where(overflow, variable, new))
        num_steps, scale, good_steps, skipped_steps = tf.unstack(self.counters)
        if self._loss_scale.is_dynamic:  # LossScale.update in common/precision.py
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
        """The cosine to the true gradient and the norm of all residuals; by an uncompressed exchange."""
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
    """() bool, whether no value is infinite or not a number."""
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])


def squared_norm(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """() the sum of the squares of all values."""
    return tf.add_n([tf.reduce_sum(tf.square(gradient)) for gradient in gradients])


def clip_global_norm(gradients: Sequence[tf.Tensor], max_norm: float, norm: tf.Tensor | None = None) -> list[tf.Tensor]:
    """The gradients, scaled down to a global L2 norm of max_norm where theirs is larger; 0: as they are.

    Args:
        gradients: of a model, or of a part of it.
        max_norm: of the model's.
        norm: () of the model's, where that is not the gradients' own.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
    https://arxiv.org/abs/1211.5063 (algorithm 1)
    """
    if not max_norm:
        return list(gradients)
    norm = tf.linalg.global_norm(gradients) if norm is None else norm
    largest = tf.constant(max_norm, norm.dtype)
    scale = largest / tf.maximum(norm, largest)  # exactly 1 where nothing is to be clipped
    return [gradient * scale for gradient in gradients]


def _size(tensor: tf.Tensor) -> int:
    """Bytes that the tensor takes."""
    return int(tensor.shape.num_elements() * tensor.dtype.size)
