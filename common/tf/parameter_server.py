"""Gradients that are pushed to servers, which hold the weights, update them, and give them back.

Each server has one piece of the weights, as if they were one vector, and a pair of ranks exchanges two messages a step:
the worker's push has its gradients of the piece, the server's answer has the new weights. Source: Li et al., "Scaling
Distributed Machine Learning with the Parameter Server", 2014, https://www.usenix.org/system/files/conference/osdi14/osdi14-paper-li_mu.pdf
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from common.buckets import Bucket
from common.compression import local_clip_norm
from common.config import ConfigError, LossyConfig, OnNonfinite, ParameterServerConfig, RunConfig
from common.errors import TrainingError
from common.precision import LossScale
from common.service import NOT_FINITE, Answer, Push, Service, waits
from common.step_sums import StepSums
from common.tf import compression, optimizers, runtime
from common.tf.compression import Channel, Codec, Unit, as_bytes, from_bytes
from common.tf.gradients import Gradients, all_finite, clip_global_norm, squared_norm
from common.tf.optimizers import Optimizer
from common.tf.sharded import ServedOptimizer
from common.tf.stage import Stage
from common.topology import Topology

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf


class ServedGradients(Gradients):
    """What workers and servers have in common; their exchanges belong into no graph.

    Args:
        cfg: the configuration.
        parallel: the part of it that is about servers.
        stage: the model, which all ranks have.
        optimizer: of this rank's piece of the weights, or of none.
    """

    def __init__(
        self, cfg: RunConfig, parallel: ParameterServerConfig, stage: Stage, optimizer: ServedOptimizer
    ) -> None:
        shapes, dtype = [variable.shape for variable in stage.trainable_variables], cfg.precision.dtype.name
        skips = cfg.train.on_nonfinite is OnNonfinite.skip
        alone, scale = Topology(0, 1, 0, 1), LossScale.of(cfg.precision)
        super().__init__(shapes, alone, loss_scale=scale, dtype=dtype, skip_nonfinite=skips)
        self._topology, self._optimizer, self._transfers = stage.topology, optimizer, stage.transfers
        self._waits = waits(parallel)
        self._weights = optimizer.flat
        zeros = tf.zeros((self._weights.num_rows, self._weights.size), self._weights.dtype)
        self.buckets = [Bucket(cfg.compression.name, (), self._weights.size) for _ in self._topology.servers]
        self._code = _Code(cfg, zeros[:1], self._topology.rank)
        has_feedback = isinstance(cfg.compression, LossyConfig) and cfg.compression.error_feedback
        self._residual = tf.Variable(zeros, trainable=False) if has_feedback else None
        is_clipped_before = has_feedback or not self._waits
        num_workers = len(self._topology.workers)
        self._local_clip_norm = local_clip_norm(cfg.train.clip_norm, num_workers) if is_clipped_before else 0.0

    def compiled(self, update: Callable[..., StepSums]) -> Callable[..., StepSums]:
        """As it is: messages between two ranks would hang in a graph."""
        return update

    def clip_global_norm(self, gradients: Sequence[tf.Tensor], max_norm: float) -> list[tf.Tensor]:
        """Has been done where the weights were updated, or before the gradients were pushed."""
        return list(gradients)

    def settle(self) -> None:
        """Gives all ranks the newest weights."""
        self._optimizer.gather()

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The residual by variable's index; of a server it is 0."""
        if self._residual is None:
            return {}
        return {"residual": dict(enumerate(self._weights.parts(self._residual)))}

    def load(self, state: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Takes over what state() gave."""
        if self._residual is not None:
            self._residual.assign(self._weights.rows([array for _, array in sorted(state["residual"].items())]))

    @property
    def variables(self) -> list[tf.Variable]:
        """The residual."""
        return [] if self._residual is None else [self._residual]

    @property
    def share_of_state(self) -> float:
        """The part of a summed state that this rank takes: the same for each worker."""
        return 0.0 if self._topology.is_server else 1 / len(self._topology.workers)

    @property
    def _num_steps(self) -> int:
        return int(self.counters[0])


class Worker(ServedGradients):
    """Pushes gradients, and takes over the weights that come back."""

    def __init__(
        self, cfg: RunConfig, parallel: ParameterServerConfig, stage: Stage, optimizer: ServedOptimizer
    ) -> None:
        super().__init__(cfg, parallel, stage, optimizer)
        self._make_pushes = tf.function(self._pushes)
        self._take_weights = tf.function(self._take)

    def exchange(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, share: tf.Tensor
    ) -> tuple[StepSums, list[tf.Tensor]]:
        """Returns when the servers have answered with new weights; the gradients have been used up."""
        loss_scale = float(self.counters[1])
        messages, errors = self._make_pushes(gradients, loss, stop, self._code.is_on(self._num_steps))
        answers = [_unpacked(Answer, answer) for answer in self._answers(messages)]
        self._take_weights([content for _, content in answers])
        first = answers[0][0]
        if not self._waits and not math.isfinite(first.loss):
            raise TrainingError(NOT_FINITE)
        if self._residual is not None and not first.overflow:
            self._residual.assign(errors)
        self._keep_state([], tf.constant(first.overflow > 0))
        sums = StepSums(
            first.loss,
            first.stop,
            0.0,
            first.overflow,
            wire_bytes=[len(message) for message in messages],
            loss_scale=loss_scale,
            skipped_steps=self.counters[3],
        )
        return sums, []

    def settle(self) -> None:
        """Gives all ranks the newest weights."""
        if not self._waits:
            nothing = _packed(Push(pauses=1), tf.zeros(self._code.num_bytes(self._num_steps), tf.uint8))
            for message in self._send_to_servers([nothing for _ in self._topology.servers]):
                message.result()
        super().settle()

    def _send_to_servers(self, messages: Sequence[tf.Tensor]) -> "list[Future[tf.Tensor]]":
        """Starts a message to each server."""
        name = f"push.{{}}.{self._topology.rank}"
        return [self._transfers.send(name.format(server), message, server) for server, message in enumerate(messages)]

    def _pushes(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, is_coded: bool
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """A message to each server, and what they leave out of the gradients: it is kept for the next step."""
        overflow = tf.zeros((), tf.bool)
        if self._loss_scale.is_dynamic:
            gradients = [gradient / self.loss_scale for gradient in gradients]
        if self._seeks_nonfinite:
            overflow = ~all_finite([loss, *gradients])
        rows = self._weights.rows(clip_global_norm(gradients, self._local_clip_norm))
        if self._residual is not None:
            rows += self._residual
        codes = self._code.encode(rows, self.counters[0], is_coded)
        errors = tf.zeros(()) if self._residual is None else rows - self._code.decode(codes, is_coded)
        push = Push(loss, stop, overflow, self._optimizer.learning_rate)
        return [_packed(push, code) for code in tf.unstack(codes)], errors

    def _answers(self, messages: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What the servers answer to messages, one to each."""
        me, row = self._topology.rank, tf.zeros((1, self._weights.size), self._weights.dtype)
        like = _packed(Answer(0, 0, 0), as_bytes(row)[0])
        pushes = self._send_to_servers(messages)
        answers = [self._transfers.receive(f"answer.{server}.{me}", like, server) for server in self._topology.servers]
        return [message.result() for message in pushes + answers][len(pushes) :]

    def _take(self, contents: Sequence[tf.Tensor]) -> None:
        """Takes over the weights that servers have sent."""
        self._weights.assign(from_bytes(tf.stack(contents), self._weights.dtype))


class Server(ServedGradients):
    """Holds a piece of the weights; takes no part in forward and backward."""

    def __init__(
        self, cfg: RunConfig, parallel: ParameterServerConfig, stage: Stage, optimizer: ServedOptimizer
    ) -> None:
        super().__init__(cfg, parallel, stage, optimizer)
        if optimizer.piece is None:
            raise ValueError(f"rank {stage.topology.rank} holds no piece of the weights")
        self._piece, self._clip_norm = optimizer.piece, cfg.train.clip_norm
        self._update, self._decode = tf.function(self._piece.step), tf.function(self._code.decode)
        self._me = self._topology.rank
        self._service = Service(cfg, parallel, self._topology, self)
        self._expected: dict[int, Future[tf.Tensor]] = {}  # pushes to come, by worker
        self._leaving: list[Future[tf.Tensor]] = []

    def exchange(
        self, gradients: Sequence[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, share: tf.Tensor
    ) -> tuple[StepSums, list[tf.Tensor]]:
        """Returns when the gradients of all workers for another step have arrived and are used."""
        if self._service.clocks.fastest == 0:  # the model may have got other weights since the piece was made
            self._piece.take_weights()
        sums = self._service.serve(bool(stop), float(self.counters[1]))
        self._keep_state([], tf.constant(float(sums.overflow) > 0))
        return sums._replace(skipped_steps=self.counters[3]), []

    def next_push(self) -> tuple[int, Push, tf.Tensor]:
        """The next worker whose push arrives, what it says, and its gradients (P,)."""
        for worker in self._service.pushing:
            if worker not in self._expected:
                like = _packed(Push(), tf.zeros(self._code.num_bytes(self._step_of(worker)), tf.uint8))
                self._expected[worker] = self._transfers.receive(f"push.{self._me}.{worker}", like, worker)
        wait(self._expected.values(), return_when=FIRST_COMPLETED)
        worker = next(worker for worker, push in self._expected.items() if push.done())
        push, content = _unpacked(Push, self._expected.pop(worker).result())
        return worker, push, self._decode(content[None], self._code.is_on(self._step_of(worker)))[0]

    def send(self, worker: int, answer: Answer) -> int:
        """Starts an answer with the weights of now; returns its bytes."""
        for left in [message for message in self._leaving if message.done()]:
            left.result()
            self._leaving.remove(left)
        message = _packed(answer, as_bytes(self._piece.values[None])[0])
        self._leaving.append(self._transfers.send(f"answer.{self._me}.{worker}", message, worker))
        return len(message)

    def settle(self) -> None:
        """Gives all ranks the newest weights."""
        self._service.wait_for_pause()
        super().settle()

    def flush(self) -> None:
        """Returns when all answers have left."""
        for message in self._leaving:
            message.result()

    def update_at_once(self, gradient: tf.Tensor, lr: float) -> None:
        """One update with the gradients (P,) of one worker."""
        optimizers.set_learning_rate(self._piece.optimizer, lr)
        self._update(gradient)

    def total(self, gradients: list[tf.Tensor]) -> tuple[tf.Tensor, float]:
        """The sum of gradients (P,), and that of its squares."""
        total = tf.add_n(gradients)
        return total, float(squared_norm([tf.cast(total, tf.float64)]))

    def update_together(self, total: tf.Tensor, norm: float) -> None:
        """One update with the sum of all workers' gradients, clipped by the norm of all servers' sums."""
        if self._clip_norm and not self._local_clip_norm and norm > self._clip_norm:
            total *= self._clip_norm / norm
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
        """The step, from 0, of the next push of a worker."""
        clocks = self._service.clocks
        return self._num_steps + clocks.steps[worker] - clocks.slowest


def build_gradients(cfg: RunConfig, stage: Stage, optimizer: Optimizer) -> Gradients:
    """The exchange of a stage's gradients: with the ranks that have the same weights, or with servers."""
    if isinstance(optimizer, ServedOptimizer) and isinstance(cfg.parallel, ParameterServerConfig):
        return (Server if stage.topology.is_server else Worker)(cfg, cfg.parallel, stage, optimizer)
    return Gradients.of(cfg, stage, stage.topology)


class _Code:
    """How the gradients of pieces become bytes: as they are, or by a compressor from a step on.

    Args:
        cfg: the configuration.
        like: (1, P) as the pieces are.
        rank: whose random numbers are used.

    Raises:
        ConfigError: the compressor needs other messages.
    """

    def __init__(self, cfg: RunConfig, like: tf.Tensor, rank: int) -> None:
        self._like, self._rank, self._codec = like, rank, None
        self._start = 0
        if isinstance(cfg.compression, LossyConfig):
            name, size = cfg.compression.name, like.shape[1]
            unit = Unit(0, [(size,)], Channel("push", hvd.global_process_set), cfg.seed)
            self._codec = compression.find(name)(cfg.compression, unit)
            self._start = cfg.compression.start_step - 1
            if not isinstance(self._codec, Codec):
                raise ConfigError(
                    [f"compression={name}: cannot be pushed to a server; one that derives from Codec can"]
                )
        self._num_bytes = {is_on: self.encode(like, tf.zeros(()), is_on).shape[1] for is_on in (False, True)}

    def is_on(self, step: int) -> bool:
        """Whether there is compression in a step, from 0."""
        return self._codec is not None and step >= self._start

    def encode(self, values: tf.Tensor, step: tf.Tensor, is_on: bool) -> tf.Tensor:
        """(K, bytes) of (K, P) in a step."""
        if self._codec is None or not is_on:
            return as_bytes(values)
        return self._codec.encode(values, self._codec.unit.random(step, self._rank + 1))

    def decode(self, codes: tf.Tensor, is_on: bool) -> tf.Tensor:
        """(K, P) what the bytes stand for."""
        if self._codec is None or not is_on:
            return from_bytes(codes, self._like.dtype)
        return self._codec.decode(codes, self._like.shape[1])

    def num_bytes(self, step: int) -> int:
        """Number of bytes of a piece in a step."""
        return self._num_bytes[self.is_on(step)]


def _packed(values: Push | Answer, content: tf.Tensor) -> tf.Tensor:
    """Numbers and bytes as one message."""
    head = tf.stack([tf.cast(value, tf.float64) for value in values])
    return tf.concat([as_bytes(head[None])[0], content], 0)


def _unpacked(form: Any, message: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """What _packed() was given."""
    head = 8 * len(form._fields)
    return form(*from_bytes(message[None, :head], tf.float64)[0].numpy().tolist()), message[head:]
