"""Parameter servers: workers push gradients, servers update the weights and send them back.

All weights are treated as one vector, and each server updates one partition of it. Each pair of a worker and a server
exchanges two messages per step: a GradientPush with the gradients of the partition, and a WeightReply with its new
weights.
Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", 2014,
https://www.usenix.org/system/files/conference/osdi14/osdi14-paper-li_mu.pdf
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.config.schema import LossyConfig, ParallelConfig, ParameterServerConfig
from common.errors import ConfigError, TrainingError
from common.gradients.bucketing import Bucket
from common.gradients.compression import compressor_class, local_clip_norm
from common.gradients.gradient_sync import CountedSync, SyncOptions
from common.gradients.step_metrics import StepMetrics
from common.parallel.parameter_server import (
    NOT_FINITE,
    GradientPush,
    ServerLoop,
    WeightReply,
    is_synchronous,
    message_bytes,
)
from common.tf.distributed import messages, runtime
from common.tf.distributed.messages import Incoming
from common.tf.distributed.runtime import Optimizer
from common.tf.gradients import norms, optimizers
from common.tf.gradients.allreduce import AllreduceSync
from common.tf.gradients.compression import Codec, Communicator, CompressionGroup, as_bytes, from_bytes
from common.tf.gradients.lane_sync import LaneSync
from common.tf.gradients.loss_scaler import LossScaler
from common.tf.parallel.sharded import ServedOptimizer
from common.tf.parallel.stage import Stage
from common.training import preemption

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf


class ServedSync(CountedSync):
    """What workers and servers have in common: the partitions of the weights, their code, and the counters.

    Its methods must not run in a graph.

    Args:
        stage: the whole model, which all ranks have.
        optimizer: the optimizer of this rank's partition of the weights; on a worker it has no partition.
        parallel: the configuration of the servers.
        options: how gradients are summed.

    Attributes:
        gradients: the gradients of the variables; empty after synchronize(), because the servers use them.
    """

    _scaler: LossScaler

    def __init__(
        self, stage: Stage, optimizer: ServedOptimizer, parallel: ParameterServerConfig, options: SyncOptions
    ) -> None:
        self.options, self._stage, self._topology, self._optimizer = options, stage, stage.topology, optimizer
        self._is_synchronous = is_synchronous(parallel)
        self._weights = optimizer.flat
        self._scaler = LossScaler(options, self._weights.dtype)
        zeros = tf.zeros((self._weights.num_rows, self._weights.size), self._weights.dtype)
        self.buckets = [Bucket(options.compression.name, (), self._weights.size) for _ in self._topology.servers]
        self._code = _PartitionCode(options, zeros[:1], self._topology.rank)
        self._residual = tf.Variable(zeros, trainable=False) if options.has_feedback else None
        is_clipped_before = options.has_feedback or not self._is_synchronous
        num_workers = len(self._topology.workers)
        self._local_clip_norm = local_clip_norm(options.clip_norm, num_workers) if is_clipped_before else 0.0
        self.gradients: list[tf.Tensor] = []
        self._loss: tf.Tensor = 0.0  # of the step that runs
        self._stop: tf.Tensor = False

    def zero(self) -> None:
        """Starts a step: clears all gradients."""
        self.gradients = []

    def accept(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, local_batch_fraction: tf.Tensor
    ) -> None:
        """Takes the result of backward; for the arguments see AllreduceSync."""
        self.gradients, self._loss, self._stop = list(gradients), loss, stop

    def clip_norm(self, max_norm: float) -> None:
        """Does nothing: servers have clipped the sum before their update, or workers their parts before the push."""

    def sync_weights(self) -> None:
        """Copies the newest weights from the servers to all ranks."""
        self._optimizer.gather()

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The residual by index of the variable; 0 on a server."""
        if self._residual is None:
            return {}
        return {"residual": dict(enumerate(self._weights.parts(self._residual)))}

    def load(self, state: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Loads the result of state()."""
        if self._residual is not None:
            self._residual.assign(self._weights.rows([array for _, array in sorted(state["residual"].items())]))

    @property
    def variables(self) -> list[tf.Variable]:
        """The residual and the counters."""
        return [*([] if self._residual is None else [self._residual]), self._scaler.variable]

    @property
    def _num_steps(self) -> int:
        return int(self._scaler.variable[0])


class WorkerSync(ServedSync):
    """The GradientSync of a worker: pushes gradients to the servers, and gets the new weights from them."""

    def __init__(
        self, stage: Stage, optimizer: ServedOptimizer, parallel: ParameterServerConfig, options: SyncOptions
    ) -> None:
        super().__init__(stage, optimizer, parallel, options)
        self._make_pushes = tf.function(self._pushes)

    def synchronize(self) -> StepMetrics:
        """Pushes the gradients, and waits until all servers have sent new weights, which the optimizer's step takes."""
        loss_scale, is_coded = float(self._scaler.variable[1]), self._code.is_on(self._num_steps)
        pushes, errors = self._make_pushes(self.gradients, self._loss, self._stop, is_coded)
        self.gradients = []
        self._push(pushes)
        num_bytes = message_bytes(WeightReply, self._weights.size * self._weights.dtype.size)
        reply = tf.TensorSpec(num_bytes, tf.uint8)
        incoming = [messages.receive("reply", reply, server) for server in self._topology.servers]
        replies = [_unpacked(WeightReply, message.wait()) for message in incoming]
        first = replies[0][0]
        if not self._is_synchronous and not all(math.isfinite(reply.loss) for reply, _ in replies):
            raise TrainingError(NOT_FINITE)
        self._optimizer.received = [content for _, content in replies]
        if self._residual is not None and not first.overflow:  # a skipped step does not change the residual
            self._residual.assign(errors)
        self._scaler.count(first.overflow > 0)
        return StepMetrics(
            first.loss,
            first.stop,
            0.0,
            first.overflow,
            wire_bytes=[len(message) for message in pushes],
            loss_scale=loss_scale,
            skipped_steps=self._scaler.counters.skipped_steps,
        )

    def sync_weights(self) -> None:
        """Copies the newest weights from the servers to all ranks."""
        if not self._is_synchronous:
            nothing = _packed(GradientPush(at_barrier=1), tf.zeros(self._code.num_bytes(self._num_steps), tf.uint8))
            self._push([nothing for _ in self._topology.servers])
        super().sync_weights()

    def _push(self, pushes: Sequence[tf.Tensor]) -> None:
        """Sends one message to each server."""
        for server, push in enumerate(pushes):
            messages.send("push", push, server)

    def _pushes(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, is_coded: bool
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """One message to each server, and the compression error, which is kept for the next step."""
        gradients, overflow = self._scaler.unscale(gradients)
        if self.options.finds_nonfinite:
            overflow |= ~tf.math.is_finite(loss)
        if self._local_clip_norm:
            gradients = norms.clip(gradients, self._local_clip_norm, norms.norm(gradients))
        rows = self._weights.rows(gradients)
        if self._residual is not None:
            rows += self._residual
        codes = self._code.encode(rows, self._scaler.variable[0], is_coded)
        errors = tf.zeros(()) if self._residual is None else rows - self._code.decode(codes, is_coded)
        push = GradientPush(loss, stop, overflow, self._optimizer.learning_rate)
        return [_packed(push, code) for code in tf.unstack(codes)], errors


class ServerSync(ServedSync):
    """The GradientSync of a server: updates one partition of the weights; takes no part in forward and backward."""

    def __init__(
        self, stage: Stage, optimizer: ServedOptimizer, parallel: ParameterServerConfig, options: SyncOptions
    ) -> None:
        super().__init__(stage, optimizer, parallel, options)
        if optimizer.partition is None:
            raise ValueError(f"rank {stage.topology.rank} holds no partition of the weights")
        self._partition = optimizer.partition
        self._update, self._decode = tf.function(self._partition.step), tf.function(self._code.decode)
        self._loop = ServerLoop(optimizer.cfg, parallel, self._topology, self)
        self._expected: dict[int, Incoming] = {}  # by worker, the push that is being received

    def synchronize(self) -> StepMetrics:
        """Handles pushes until the gradients of all workers for the next step have arrived and were used."""
        if self._loop.tracker.fastest == 0:  # the model may have loaded other weights since the partition was made
            self._partition.take_weights()
        metrics = self._loop.serve(preemption.requested(), float(self._scaler.variable[1]))
        self._scaler.count(float(metrics.overflow) > 0)
        return metrics._replace(skipped_steps=self._scaler.counters.skipped_steps)

    def next_push(self) -> tuple[int, GradientPush, tf.Tensor]:
        """Waits for the next push; returns its worker, its scalars, and its gradients (P,)."""
        for worker in self._loop.pushing:
            if worker not in self._expected:
                num_bytes = message_bytes(GradientPush, self._code.num_bytes(self._step_of(worker)))
                self._expected[worker] = messages.receive("push", tf.TensorSpec(num_bytes, tf.uint8), worker)
        worker = list(self._expected)[messages.wait_any(list(self._expected.values()))]
        push, content = _unpacked(GradientPush, self._expected.pop(worker).values)
        return worker, push, self._decode(content[None], self._code.is_on(self._step_of(worker)))[0]

    def send(self, worker: int, reply: WeightReply) -> int:
        """Sends a reply with the current weights; returns its number of bytes."""
        message = _packed(reply, as_bytes(self._partition.values[None])[0])
        messages.send("reply", message, worker)
        return len(message)

    def sync_weights(self) -> None:
        """Copies the newest weights from the servers to all ranks."""
        self._loop.wait_for_pause()
        super().sync_weights()

    def update_at_once(self, gradient: tf.Tensor, lr: float) -> None:
        """Updates the weights with the gradients (P,) of one worker."""
        optimizers.set_learning_rate(self._partition.optimizer, lr)
        self._update(gradient)

    def total(self, gradients: list[tf.Tensor]) -> tuple[tf.Tensor, float]:
        """The sum of the workers' gradients (P,), and its squared norm."""
        total = tf.add_n(gradients)
        return total, float(norms.squared_norm([tf.cast(total, tf.float64)]))

    def update_together(self, total: tf.Tensor, norm: float) -> None:
        """Updates the weights with the sum of all workers' gradients, clipped by the norm over all servers."""
        clip_norm = self.options.clip_norm
        if clip_norm and not self._local_clip_norm and norm > clip_norm:
            total *= clip_norm / norm
        self._update(total)

    def sum_over_servers(self, *values: float) -> list[float]:
        """The sum of each value over the servers."""
        if len(self._topology.servers) == 1:
            return list(values)
        process_set = runtime.process_set(self._topology.servers)
        sums: list[float] = (
            hvd.allreduce(tf.constant(values, tf.float64), name="servers", op=hvd.Sum, process_set=process_set)
            .numpy()
            .tolist()
        )
        return sums

    def _step_of(self, worker: int) -> int:
        """The number, from 0, of the step of a worker's next push."""
        tracker = self._loop.tracker
        return self._num_steps + tracker.steps[worker] - tracker.slowest


Sync = AllreduceSync | LaneSync | WorkerSync | ServerSync


def build_sync(stage: Stage, optimizer: Optimizer, options: SyncOptions, parallel: ParallelConfig) -> Sync:
    """What sums the gradients of a stage: allreduce over ranks with the same weights, lanes, or parameter servers."""
    if isinstance(optimizer, ServedOptimizer) and isinstance(parallel, ParameterServerConfig):
        return (ServerSync if stage.topology.is_server else WorkerSync)(stage, optimizer, parallel, options)
    if stage.topology.num_lanes:
        return LaneSync(stage.trainable_variables, stage.topology, options)
    return AllreduceSync(stage.trainable_variables, stage.topology, options, stage.tied)


class _PartitionCode:
    """Encodes the gradients of partitions as bytes: uncompressed, or by a compressor from a start step on.

    Args:
        options: the compression and the seed.
        like: (1, P) a tensor with the shape and dtype of a partition.
        rank: the rank whose random numbers are used.

    Raises:
        ConfigError: the compressor is not a Codec.
    """

    def __init__(self, options: SyncOptions, like: tf.Tensor, rank: int) -> None:
        self._like, self._rank, self._codec = like, rank, None
        self._start = 0
        if isinstance(options.compression, LossyConfig):
            cfg, size = options.compression, like.shape[1]
            group = CompressionGroup(0, [(size,)], Communicator("push", hvd.global_process_set), options.seed)
            self._codec = compressor_class("tf", cfg.name)(cfg, group)
            self._start = cfg.start_step - 1
            if not isinstance(self._codec, Codec):
                raise ConfigError(
                    [f"compression={cfg.name}: cannot be pushed to a server; one that derives from Codec can"]
                )
        self._num_bytes = {is_on: self.encode(like, tf.zeros(()), is_on).shape[1] for is_on in (False, True)}

    def is_on(self, step: int) -> bool:
        """Whether a step, counted from 0, is compressed."""
        return self._codec is not None and step >= self._start

    def encode(self, values: tf.Tensor, step: tf.Tensor, is_on: bool) -> tf.Tensor:
        """The bytes (K, bytes) uint8 of gradients (K, P) in a step."""
        if self._codec is None or not is_on:
            return as_bytes(values)
        return self._codec.encode(values, self._codec.group.random(step, self._rank + 1))

    def decode(self, codes: tf.Tensor, is_on: bool) -> tf.Tensor:
        """The gradients (K, P) of these bytes."""
        if self._codec is None or not is_on:
            return from_bytes(codes, self._like.dtype)
        return self._codec.decode(codes, self._like.shape[1])

    def num_bytes(self, step: int) -> int:
        """Number of bytes of a partition in a step."""
        return self._num_bytes[self.is_on(step)]


def _packed(values: GradientPush | WeightReply, content: tf.Tensor) -> tf.Tensor:
    """Numbers and bytes as one message."""
    head = tf.stack([tf.cast(value, tf.float64) for value in values])
    return tf.concat([as_bytes(head[None])[0], content], 0)


def _unpacked(form: Any, message: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """The numbers and bytes that were given to _packed()."""
    head = 8 * len(form._fields)
    return form(*from_bytes(message[None, :head], tf.float64)[0].numpy().tolist()), message[head:]
