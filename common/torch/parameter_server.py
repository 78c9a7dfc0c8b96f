"""Gradients that are pushed to servers, which hold the weights, update them, and give them back.

Each server has one piece of the weights, as if they were one vector, and a pair of ranks exchanges two messages a step:
the worker's push has its gradients of the piece, the server's answer has the new weights. Source: Li et al., "Scaling
Distributed Machine Learning with the Parameter Server", 2014, https://www.usenix.org/system/files/conference/osdi14/osdi14-paper-li_mu.pdf
"""

import math
import time
from collections.abc import Sequence
from typing import Any

from common import stopping
from common.buckets import Bucket
from common.compression import local_clip_norm
from common.config import ConfigError, LossyConfig, OnNonfinite, ParameterServerConfig, RunConfig
from common.errors import TrainingError
from common.precision import LossScale
from common.service import NOT_FINITE, Answer, Push, Service, waits
from common.step_sums import StepSums
from common.topology import Topology
from common.torch import compression, optimizers, runtime
from common.torch.compression import Channel, Codec, Unit
from common.torch.gradients import Gradients
from common.torch.norms import norm
from common.torch.optimizers import Optimizer
from common.torch.sharded import ServedOptimizer
from common.torch.stage import Stage

import horovod.torch as hvd
import torch
from torch import Tensor

SECONDS_BETWEEN_LOOKS = 0.0002


class ServedGradients(Gradients):
    """What workers and servers have in common.

    Args:
        cfg: the configuration.
        parallel: the part of it that is about servers.
        stage: the model, which all ranks have.
        optimizer: of this rank's piece of the weights, or of none.
    """

    def __init__(
        self, cfg: RunConfig, parallel: ParameterServerConfig, stage: Stage, optimizer: ServedOptimizer
    ) -> None:
        skips = cfg.train.on_nonfinite is OnNonfinite.skip
        alone, scale = Topology(0, 1, 0, 1), LossScale.of(cfg.precision)
        super().__init__(stage.named_parameters(), alone, loss_scale=scale, skip_nonfinite=skips)
        self._topology, self._optimizer = stage.topology, optimizer
        self._waits = waits(parallel)
        self._rows = optimizer.flat.rows
        self.buckets = [Bucket(cfg.compression.name, (), len(row)) for row in self._rows]
        self._code = _Code(cfg, self._rows[:1], self._topology.rank)
        has_feedback = isinstance(cfg.compression, LossyConfig) and cfg.compression.error_feedback
        self._residual = torch.zeros_like(self._rows) if has_feedback else None
        self._names = [name for name, _ in stage.named_parameters()]
        is_clipped_before = has_feedback or not self._waits
        num_workers = len(self._topology.workers)
        self._local_clip_norm = local_clip_norm(cfg.train.clip_norm, num_workers) if is_clipped_before else 0.0

    def clip_global_norm(self, max_norm: float) -> None:
        """Has been done where the weights were updated, or before the gradients were pushed."""

    def settle(self) -> None:
        """Gives all ranks the newest weights."""
        self._optimizer.gather()

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The residual by parameter's index; of a server it is 0."""
        if self._residual is None:
            return {}
        views = self._optimizer.flat.views(self._residual)
        return {"residual": {index: views[name] for index, name in enumerate(self._names)}}

    @property
    def share_of_state(self) -> float:
        """The part of a summed state that this rank takes: the same for each worker."""
        return 0.0 if self._topology.is_server else 1 / len(self._topology.workers)

    def _transfer(self, what: str, server: int, worker: int, root: int, message: Tensor) -> int:
        """Starts a message of bytes between a server and a worker."""
        process_set = runtime.process_set((server, worker))
        handle: int = hvd.broadcast_async_(message, root, name=f"{what}.{server}.{worker}", process_set=process_set)
        return handle


class Worker(ServedGradients):
    """Pushes gradients, and takes over the weights that come back."""

    def __init__(
        self, cfg: RunConfig, parallel: ParameterServerConfig, stage: Stage, optimizer: ServedOptimizer
    ) -> None:
        super().__init__(cfg, parallel, stage, optimizer)
        self._left: dict[int, Tensor] = {}  # of this step, by server: what its code leaves out

    def wait(self) -> StepSums:
        """Returns when the servers have answered with new weights."""
        overflow, loss_scale = float(self._riders[3]), self.loss_scale.value
        if self._seeks_nonfinite:
            overflow += float(self._unscaled_alone())
        if self._local_clip_norm:
            self._clip(self._local_clip_norm, norm(self._all_values()))
        push = Push(float(self._riders[0]), float(self._riders[1]), overflow, self._optimizer.param_groups[0]["lr"])
        me, servers = self._topology.rank, self._topology.servers
        messages = [_packed(push, self._encoded(row)) for row in servers]
        answers = [torch.empty(_size(Answer, row.nbytes), dtype=torch.uint8) for row in self._rows]
        handles = self._send_to_servers(messages)
        handles += [self._transfer("answer", server, me, server, answers[server]) for server in servers]
        for handle in handles:
            hvd.synchronize(handle)
        for row, answer in zip(self._rows, answers, strict=True):
            row.copy_(_unpacked(Answer, answer)[1].view(row.dtype))
        first = _unpacked(Answer, answers[0])[0]
        if not self._waits and not math.isfinite(first.loss):
            raise TrainingError(NOT_FINITE)
        if self._seeks_nonfinite:
            self.loss_scale.update(first.overflow > 0)
        if self._residual is not None and not first.overflow:  # a step that is skipped leaves nothing behind
            for server, left in self._left.items():
                self._residual[server] = left
        self.num_steps += 1
        return StepSums(
            first.loss,
            first.stop,
            0.0,
            first.overflow,
            wire_bytes=[len(message) for message in messages],
            loss_scale=loss_scale,
            skipped_steps=self.loss_scale.skipped_steps,
        )

    def settle(self) -> None:
        """Gives all ranks the newest weights."""
        if not self._waits:
            nothing = torch.zeros(self._code.num_bytes(self.num_steps), dtype=torch.uint8)
            for handle in self._send_to_servers([_packed(Push(pauses=1), nothing) for _ in self._topology.servers]):
                hvd.synchronize(handle)
        super().settle()

    def _send_to_servers(self, messages: Sequence[Tensor]) -> list[int]:
        """Starts a message to each server."""
        me = self._topology.rank
        return [self._transfer("push", server, me, me, message) for server, message in enumerate(messages)]

    def _encoded(self, server: int) -> Tensor:
        """The bytes of this rank's gradients of a server's piece; what they leave out is kept for the next step."""
        values = self._optimizer.flat.gradients(server)[None]
        if self._residual is not None:
            values += self._residual[server]
        content = self._code.encode(values, self.num_steps)
        if self._residual is not None:
            self._left[server] = values[0] - self._code.decode(content, self.num_steps)
        return content


class Server(ServedGradients):
    """Holds a piece of the weights; takes no part in forward and backward."""

    def __init__(
        self, cfg: RunConfig, parallel: ParameterServerConfig, stage: Stage, optimizer: ServedOptimizer
    ) -> None:
        super().__init__(cfg, parallel, stage, optimizer)
        if optimizer.piece is None:
            raise ValueError(f"rank {stage.topology.rank} holds no piece of the weights")
        self._piece, self._clip_norm = optimizer.piece, cfg.train.clip_norm
        self._me, self._row = self._topology.rank, self._rows[self._topology.rank]
        self._service = Service(cfg, parallel, self._topology, self)
        self._expected: dict[int, tuple[int, Tensor]] = {}  # pushes to come, by worker
        self._leaving: list[tuple[int, Tensor]] = []

    def wait(self) -> StepSums:
        """Returns when the gradients of all workers for another step have arrived and are used."""
        sums = self._service.serve(stopping.requested(), self.loss_scale.value)
        if self._seeks_nonfinite:
            self.loss_scale.update(float(sums.overflow) > 0)
        self.num_steps += 1
        return sums._replace(skipped_steps=self.loss_scale.skipped_steps)

    def next_push(self) -> tuple[int, Push, Tensor]:
        """The next worker whose push arrives, what it says, and its gradients (P,)."""
        for worker in self._service.pushing:
            if worker not in self._expected:
                message = torch.empty(_size(Push, self._code.num_bytes(self._step_of(worker))), dtype=torch.uint8)
                self._expected[worker] = self._transfer("push", self._me, worker, worker, message), message
        while True:
            for worker, (handle, message) in self._expected.items():
                if hvd.poll(handle):
                    hvd.synchronize(handle)
                    del self._expected[worker]
                    push, content = _unpacked(Push, message)
                    return worker, push, self._code.decode(content, self._step_of(worker))
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def send(self, worker: int, answer: Answer) -> int:
        """Starts an answer with the weights of now; returns its bytes."""
        self._leaving = runtime.under_way(self._leaving)
        message = _packed(answer, self._row.view(torch.uint8))
        self._leaving.append((self._transfer("answer", self._me, worker, self._me, message), message))
        return len(message)

    def settle(self) -> None:
        """Gives all ranks the newest weights."""
        self._service.wait_for_pause()
        super().settle()

    def flush(self) -> None:
        """Returns when all answers have left."""
        for handle, _ in self._leaving:
            hvd.synchronize(handle)

    def update_at_once(self, gradient: Tensor, lr: float) -> None:
        """One update with the gradients (P,) of one worker."""
        optimizers.set_learning_rate(self._piece.optimizer, lr)
        self._piece.step(gradient)

    def total(self, gradients: list[Tensor]) -> tuple[Tensor, float]:
        """The sum of gradients (P,), and that of its squares."""
        total = torch.stack(gradients).sum(0)
        return total, float(total.double().square().sum())

    def update_together(self, total: Tensor, norm: float) -> None:
        """One update with the sum of all workers' gradients, clipped by the norm of all servers' sums."""
        if self._clip_norm and not self._local_clip_norm and norm > self._clip_norm:
            total *= self._clip_norm / norm
        self._piece.step(total)

    def sum_over_servers(self, *values: float) -> list[float]:
        """The sum of each value over the servers."""
        if len(self._topology.servers) == 1:
            return list(values)
        process_set = runtime.process_set(self._topology.servers)
        sums = torch.tensor(values, dtype=torch.float64)
        return hvd.allreduce(sums, name="servers", op=hvd.Sum, process_set=process_set).tolist()

    def _step_of(self, worker: int) -> int:
        """The step, from 0, of the next push of a worker."""
        clocks = self._service.clocks
        return self.num_steps + clocks.steps[worker] - clocks.slowest


def build_gradients(cfg: RunConfig, stage: Stage, optimizer: Optimizer) -> Gradients:
    """The exchange of a stage's gradients: with the ranks that have the same weights, or with servers."""
    if isinstance(optimizer, ServedOptimizer) and isinstance(cfg.parallel, ParameterServerConfig):
        return (Server if stage.topology.is_server else Worker)(cfg, cfg.parallel, stage, optimizer)
    return Gradients.of(cfg, stage, stage.topology)


class _Code:
    """How the gradients of a piece become bytes: as they are, or by a compressor from a step on.

    Args:
        cfg: the configuration.
        like: (1, P) as the pieces are.
        rank: whose random numbers are used.

    Raises:
        ConfigError: the compressor needs other messages.
    """

    def __init__(self, cfg: RunConfig, like: Tensor, rank: int) -> None:
        self._like, self._rank, self._codec = like, rank, None
        self._start, self._code_bytes = 0, like.nbytes
        if isinstance(cfg.compression, LossyConfig):
            name, size = cfg.compression.name, like.shape[1]
            unit = Unit(0, [(size,)], Channel("push", hvd.global_process_set), cfg.seed, like.device)
            self._codec = compression.find(name)(cfg.compression, unit)
            self._start = cfg.compression.start_step - 1
            if not isinstance(self._codec, Codec):
                raise ConfigError(
                    [f"compression={name}: cannot be pushed to a server; one that derives from Codec can"]
                )
            self._code_bytes = len(self.encode(like, self._start))

    def encode(self, values: Tensor, step: int) -> Tensor:
        """The bytes of (1, P) in a step, from 0."""
        if self._codec is None or step < self._start:
            return values.view(torch.uint8).flatten()
        return self._codec.encode(values, self._codec.unit.random(step, self._rank + 1)).flatten()

    def decode(self, content: Tensor, step: int) -> Tensor:
        """(P,) what the bytes stand for."""
        content = content.to(self._like.device)
        if self._codec is None or step < self._start:
            return content.view(self._like.dtype)
        return self._codec.decode(content[None], self._like.shape[1])[0]

    def num_bytes(self, step: int) -> int:
        """Number of bytes in a step."""
        return self._like.nbytes if step < self._start else self._code_bytes


def _size(form: type[Push] | type[Answer], num_bytes: int) -> int:
    return 8 * len(form._fields) + num_bytes


def _packed(values: Push | Answer, content: Tensor) -> Tensor:
    """Numbers and bytes as one message, in the CPU's memory."""
    return torch.cat([torch.tensor(values, dtype=torch.float64).view(torch.uint8), content.cpu()])


def _unpacked(form: Any, message: Tensor) -> tuple[Any, Tensor]:
    """What _packed() was given."""
    head = 8 * len(form._fields)
    return form(*message[:head].view(torch.float64).tolist()), message[head:].clone()
