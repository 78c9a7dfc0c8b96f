"""Parameter servers: workers push gradients, servers update the weights and send them back.

All weights are treated as one vector, and each server updates one partition of it. Each pair of a worker and a server
exchanges two messages per step: a GradientPush with the gradients of the partition, and a WeightReply with its new
weights.
Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", 2014,
https://www.usenix.org/system/files/conference/osdi14/osdi14-paper-li_mu.pdf
"""

import math
from collections.abc import Sequence
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
from common.torch.distributed import messages, runtime
from common.torch.distributed.messages import Incoming
from common.torch.distributed.runtime import Optimizer
from common.torch.gradients import norms, optimizers
from common.torch.gradients.allreduce import AllreduceSync
from common.torch.gradients.compression import Codec, Communicator, CompressionGroup
from common.torch.gradients.lane_sync import LaneSync
from common.torch.gradients.loss_scaler import LossScaler
from common.torch.parallel.sharded import ServedOptimizer
from common.torch.parallel.stage import Stage
from common.training import preemption

import horovod.torch as hvd
import torch
from torch import Tensor


class ServedSync(CountedSync):
    """What workers and servers have in common: the partitions of the weights, their code, and the counters.

    Args:
        stage: the whole model, which all ranks have.
        optimizer: the optimizer of this rank's partition of the weights; on a worker it has no partition.
        parallel: the configuration of the servers.
        options: how gradients are summed.
    """

    _scaler: LossScaler

    def __init__(
        self, stage: Stage, optimizer: ServedOptimizer, parallel: ParameterServerConfig, options: SyncOptions
    ) -> None:
        self.options, self._stage, self._topology, self._optimizer = options, stage, stage.topology, optimizer
        self._is_synchronous = is_synchronous(parallel)
        self._scaler, self._rows = LossScaler(options), optimizer.flat.rows
        self.buckets = [Bucket(options.compression.name, (), len(row)) for row in self._rows]
        self._code = _PartitionCode(options, self._rows[:1], self._topology.rank)
        self._residual = torch.zeros_like(self._rows) if options.has_feedback else None
        self._names = [name for name, _ in stage.named_parameters()]
        is_clipped_before = options.has_feedback or not self._is_synchronous
        num_workers = len(self._topology.workers)
        self._local_clip_norm = local_clip_norm(options.clip_norm, num_workers) if is_clipped_before else 0.0
        self._loss, self._stop = 0.0, 0.0  # of the step that runs

    def zero(self) -> None:
        """Starts a step: clears all gradients."""
        for parameter in self._stage.parameters():
            parameter.grad = None

    def prepare_for_backward(
        self, loss: Tensor | float = 0.0, stop: float = 0.0, local_batch_fraction: float = 0.0
    ) -> None:
        """Takes the scalars of the step; for the arguments see AllreduceSync."""
        self._loss, self._stop = float(loss), float(stop)

    def clip_norm(self, max_norm: float) -> None:
        """Does nothing: servers have clipped the sum before their update, or workers their parts before the push."""

    def sync_weights(self) -> None:
        """Copies the newest weights from the servers to all ranks."""
        self._optimizer.gather()

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The residual by index of the parameter; 0 on a server."""
        if self._residual is None:
            return {}
        views = self._optimizer.flat.views(self._residual)
        return {"residual": {index: views[name] for index, name in enumerate(self._names)}}


class WorkerSync(ServedSync):
    """The GradientSync of a worker: pushes gradients to the servers, and gets the new weights from them."""

    def __init__(
        self, stage: Stage, optimizer: ServedOptimizer, parallel: ParameterServerConfig, options: SyncOptions
    ) -> None:
        super().__init__(stage, optimizer, parallel, options)
        self._errors: dict[int, Tensor] = {}  # by server, the compression error of this step

    def synchronize(self) -> StepMetrics:
        """Pushes the gradients, and waits until all servers have sent new weights, which the optimizer's step takes."""
        gradients = [parameter.grad for parameter in self._stage.parameters() if parameter.grad is not None]
        overflow, loss_scale = self._scaler.unscale(gradients), self.loss_scale
        if self.options.finds_nonfinite:
            overflow += float(not math.isfinite(self._loss))
        if self._local_clip_norm:
            norms.clip(gradients, self._local_clip_norm, norms.norm(gradients))
        push = GradientPush(self._loss, self._stop, overflow, self._optimizer.param_groups[0]["lr"])
        servers = self._topology.servers
        pushes = [_packed(push, self._encoded(server)) for server in servers]
        self._push(pushes)
        reply = torch.empty(message_bytes(WeightReply, self._rows[0].nbytes), dtype=torch.uint8)
        incoming = [messages.receive("reply", reply, server) for server in servers]
        replies = [_unpacked(WeightReply, message.wait()) for message in incoming]
        first = replies[0][0]
        if not self._is_synchronous and not all(math.isfinite(reply.loss) for reply, _ in replies):
            raise TrainingError(NOT_FINITE)
        self._optimizer.received = [content.view(self._rows.dtype) for _, content in replies]
        if self._residual is not None and not first.overflow:  # a skipped step does not change the residual
            for server, error in self._errors.items():
                self._residual[server] = error
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
            nothing = torch.zeros(self._code.num_bytes(self._scaler.num_steps), dtype=torch.uint8)
            self._push([_packed(GradientPush(at_barrier=1), nothing) for _ in self._topology.servers])
        super().sync_weights()

    def _push(self, pushes: Sequence[Tensor]) -> None:
        """Sends one message to each server."""
        for server, push in enumerate(pushes):
            messages.send("push", push, server)

    def _encoded(self, server: int) -> Tensor:
        """The bytes of the gradients for a server's partition; the compression error is kept for the next step."""
        values = self._optimizer.flat.gradients(server)[None]
        if self._residual is not None:
            values += self._residual[server]
        content = self._code.encode(values, self._scaler.num_steps)
        if self._residual is not None:
            self._errors[server] = values[0] - self._code.decode(content, self._scaler.num_steps)
        return content


class ServerSync(ServedSync):
    """The GradientSync of a server: updates one partition of the weights; takes no part in forward and backward."""

    def __init__(
        self, stage: Stage, optimizer: ServedOptimizer, parallel: ParameterServerConfig, options: SyncOptions
    ) -> None:
        super().__init__(stage, optimizer, parallel, options)
        if optimizer.partition is None:
            raise ValueError(f"rank {stage.topology.rank} holds no partition of the weights")
        self._partition = optimizer.partition
        self._row = self._rows[self._topology.rank]
        self._loop = ServerLoop(optimizer.cfg, parallel, self._topology, self)
        self._expected: dict[int, Incoming] = {}  # by worker, the push that is being received

    def synchronize(self) -> StepMetrics:
        """Handles pushes until the gradients of all workers for the next step have arrived and were used."""
        metrics = self._loop.serve(preemption.requested(), self.loss_scale)
        self._scaler.count(float(metrics.overflow) > 0)
        return metrics._replace(skipped_steps=self._scaler.counters.skipped_steps)

    def next_push(self) -> tuple[int, GradientPush, Tensor]:
        """Waits for the next push; returns its worker, its scalars, and its gradients (P,)."""
        for worker in self._loop.pushing:
            if worker not in self._expected:
                num_bytes = message_bytes(GradientPush, self._code.num_bytes(self._step_of(worker)))
                like = torch.empty(num_bytes, dtype=torch.uint8)
                self._expected[worker] = messages.receive("push", like, worker)
        worker = list(self._expected)[messages.wait_any(list(self._expected.values()))]
        push, content = _unpacked(GradientPush, self._expected.pop(worker).values)
        return worker, push, self._code.decode(content, self._step_of(worker))

    def send(self, worker: int, reply: WeightReply) -> int:
        """Sends a reply with the current weights; returns its number of bytes."""
        message = _packed(reply, self._row.view(torch.uint8))
        messages.send("reply", message, worker)
        return len(message)

    def sync_weights(self) -> None:
        """Copies the newest weights from the servers to all ranks."""
        self._loop.wait_for_pause()
        super().sync_weights()

    def update_at_once(self, gradient: Tensor, lr: float) -> None:
        """Updates the weights with the gradients (P,) of one worker."""
        optimizers.set_learning_rate(self._partition.optimizer, lr)
        self._partition.step(gradient)

    def total(self, gradients: list[Tensor]) -> tuple[Tensor, float]:
        """The sum of the workers' gradients (P,), and its squared norm."""
        total = torch.stack(gradients).sum(0)
        return total, float(total.double().square().sum())

    def update_together(self, total: Tensor, norm: float) -> None:
        """Updates the weights with the sum of all workers' gradients, clipped by the norm over all servers."""
        clip_norm = self.options.clip_norm
        if clip_norm and not self._local_clip_norm and norm > clip_norm:
            total *= clip_norm / norm
        self._partition.step(total)

    def sum_over_servers(self, *values: float) -> list[float]:
        """The sum of each value over the servers."""
        if len(self._topology.servers) == 1:
            return list(values)
        process_set = runtime.process_set(self._topology.servers)
        sums = torch.tensor(values, dtype=torch.float64)
        return hvd.allreduce(sums, name="servers", op=hvd.Sum, process_set=process_set).tolist()

    def _step_of(self, worker: int) -> int:
        """The number, from 0, of the step of a worker's next push."""
        tracker = self._loop.tracker
        return self._scaler.num_steps + tracker.steps[worker] - tracker.slowest


Sync = AllreduceSync | LaneSync | WorkerSync | ServerSync


def build_sync(stage: Stage, optimizer: Optimizer, options: SyncOptions, parallel: ParallelConfig) -> Sync:
    """What sums the gradients of a stage: allreduce over ranks with the same weights, lanes, or parameter servers."""
    if isinstance(optimizer, ServedOptimizer) and isinstance(parallel, ParameterServerConfig):
        return (ServerSync if stage.topology.is_server else WorkerSync)(stage, optimizer, parallel, options)
    if stage.topology.num_lanes:
        return LaneSync(stage.named_parameters(), stage.topology, options)
    return AllreduceSync(stage.named_parameters(), stage.topology, options, stage.tied)


class _PartitionCode:
    """Encodes the gradients of a partition as bytes: uncompressed, or by a compressor from a start step on.

    Args:
        options: the compression and the seed.
        like: (1, P) a tensor with the shape and dtype of a partition.
        rank: the rank whose random numbers are used.

    Raises:
        ConfigError: the compressor is not a Codec.
    """

    def __init__(self, options: SyncOptions, like: Tensor, rank: int) -> None:
        self._like, self._rank, self._codec = like, rank, None
        self._start, self._code_bytes = 0, like.nbytes
        if isinstance(options.compression, LossyConfig):
            cfg, size = options.compression, like.shape[1]
            group = CompressionGroup(
                0, [(size,)], Communicator("push", hvd.global_process_set), options.seed, like.device
            )
            self._codec = compressor_class("torch", cfg.name)(cfg, group)
            self._start = cfg.start_step - 1
            if not isinstance(self._codec, Codec):
                raise ConfigError(
                    [f"compression={cfg.name}: cannot be pushed to a server; one that derives from Codec can"]
                )
            self._code_bytes = len(self.encode(like, self._start))

    def encode(self, values: Tensor, step: int) -> Tensor:
        """The bytes of gradients (1, P) in a step, counted from 0."""
        if self._codec is None or step < self._start:
            return values.view(torch.uint8).flatten()
        return self._codec.encode(values, self._codec.group.random(step, self._rank + 1)).flatten()

    def decode(self, content: Tensor, step: int) -> Tensor:
        """The gradients (P,) of these bytes."""
        content = content.to(self._like.device)
        if self._codec is None or step < self._start:
            return content.view(self._like.dtype)
        return self._codec.decode(content[None], self._like.shape[1])[0]

    def num_bytes(self, step: int) -> int:
        """Number of bytes of a partition in a step."""
        return self._like.nbytes if step < self._start else self._code_bytes


def _packed(values: GradientPush | WeightReply, content: Tensor) -> Tensor:
    """Numbers and bytes as one message, in CPU memory."""
    return torch.cat([torch.tensor(values, dtype=torch.float64).view(torch.uint8), content.cpu()])


def _unpacked(form: Any, message: Tensor) -> tuple[Any, Tensor]:
    """The numbers and bytes that were given to _packed()."""
    head = 8 * len(form._fields)
    return form(*message[:head].view(torch.float64).tolist()), message[head:].clone()
