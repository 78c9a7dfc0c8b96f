"""Runs a rank's pipeline schedule: forward and backward of micro-batches, and transfers between ranks.

common/parallel/pipeline_schedule.py makes the schedule. A model that is not cut runs in one graph with the exchange of
its gradients. In a model that is cut, forward and backward of each model chunk are separate graphs, and transfers run
between them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

from common.parallel.pipeline_schedule import Action, Kind
from common.parallel.rank_schedule import RankSchedule
from common.tf.distributed import messages
from common.tf.distributed.messages import Incoming
from common.tf.parallel.stage import Stage

import tensorflow as tf


def accumulate(
    stage: Stage,
    loss_sum: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    targets: tf.Tensor,
    global_size: tf.Tensor,
    loss_scale: tf.Tensor,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Runs forward and backward of all micro-batches of a model that is not cut: gradient accumulation.

    Args:
        stage: the whole model.
        loss_sum: (outputs, targets) -> sum of the losses over the examples, not their mean.
        inputs: (B, ...) inputs of this rank's examples in the step; B may be 0.
        targets: (B, ...) targets of these examples.
        global_size: () number of examples of all ranks in this step.
        loss_scale: () factor on the gradients, but not on the returned loss.

    Returns:
        This rank's parts of the mean loss over the global batch, () float64, and of its gradients.
    """
    sizes = _part_sizes(tf.shape(inputs)[0], stage.rank_schedule.num_micro_batches)
    total = tf.zeros((), tf.float64)
    sums: list[tf.Tensor] = []
    for part_inputs, part_targets in zip(tf.split(inputs, sizes), tf.split(targets, sizes), strict=True):
        # The sums so far come first: otherwise all micro-batches run, and hold their activations, at the same time.
        with tf.control_dependencies(sums), tf.GradientTape() as tape:
            loss = loss_sum(stage(_never_empty(part_inputs), training=True), _never_empty(part_targets))
            loss *= tf.cast(tf.shape(part_inputs)[0] > 0, loss.dtype) / tf.cast(global_size, loss.dtype)
            scaled = loss * loss_scale
        values = [variable.value for variable in stage.trainable_variables]
        # The gradient of a slice has no static shape, that of a gather is sparse.
        gradients = [
            tf.ensure_shape(tf.convert_to_tensor(gradient), value.shape)
            for gradient, value in zip(tape.gradient(scaled, values), values, strict=True)
        ]
        sums = [a + b for a, b in zip(sums, gradients, strict=True)] if sums else gradients
        total += tf.cast(loss, tf.float64)
    return total, sums


@cache
def compiled_accumulate(
    stage: Stage, loss_sum: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], *specs: tf.TensorSpec
) -> Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]:
    """accumulate() as a graph, for arguments of these specs."""
    return tf.function(partial(accumulate, stage, loss_sum), input_signature=specs)


class _Pass(NamedTuple):
    """The results of a forward pass that backward needs."""

    tape: tf.GradientTape
    inputs: tf.Tensor
    outputs: tf.Tensor


class ScheduleExecutor:
    """Executes the schedule of one step on this rank's model chunks.

    A compiled backward computes the gradients of inputs and weights together. So with schedule=zb_h1, backward_weight
    only adds gradients: the results are correct, but no bubble is filled.

    Args:
        stage: this rank's layers.
        rank_schedule: this rank's pipeline schedule.
        inputs: (B, ...) inputs of this rank's examples in the step; B may be 0.
        targets: (B, ...) targets of these examples.
        loss_function: (inputs of the last chunk, targets) -> sum of the examples' losses; None: only forward.
        loss_gradient: () gradient of the minimised loss with respect to that sum.

    Attributes:
        gradients: sums of the gradients so far, for the stage's trainable variables.
        outputs: outputs of the whole model, or the sums of its losses; empty except on ranks of the last stage.
        seconds: seconds of the whole step.
        waited_seconds: seconds that this rank has waited for other ranks.
    """

    def __init__(
        self,
        stage: Stage,
        rank_schedule: RankSchedule,
        inputs: tf.Tensor,
        targets: tf.Tensor,
        loss_function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
        loss_gradient: tf.Tensor | float = 1.0,
    ) -> None:
        self._stage, self._rank_schedule, self._inputs, self._targets = stage, rank_schedule, inputs, targets
        self._loss_function, self._loss_gradient = loss_function, loss_gradient
        self._micro_batches = rank_schedule.micro_batches(len(inputs))
        self._indices = {id(variable): index for index, variable in enumerate(stage.trainable_variables)}
        self.gradients = [tf.zeros(variable.shape, variable.dtype) for variable in stage.trainable_variables]
        self.outputs: list[tf.Tensor] = []
        self.seconds = self.waited_seconds = 0.0
        # By chunk and micro-batch: forward passes, gradients of inputs, gradients of weights that are not added yet.
        self._saved: dict[tuple[int, int], _Pass] = {}
        self._input_gradients: dict[tuple[int, int], tf.Tensor] = {}
        self._weight_gradients: dict[tuple[int, int], list[tf.Tensor]] = {}
        self._arriving: dict[Action, Incoming] = {}

    def run(self, actions: Sequence[Action]) -> None:
        """Executes all actions; skips micro-batches without examples."""
        start = time.perf_counter()
        for action in actions:
            examples = self._micro_batches[action.micro_batch]
            if examples.start < examples.stop:
                getattr(self, f"_{action.kind}")(action)
        self.seconds = time.perf_counter() - start

    def _forward(self, action: Action) -> None:
        number, examples = action.chunk, self._micro_batches[action.micro_batch]
        inputs = self._inputs[examples] if number == 0 else self._received(action, Kind.receive_activation)
        is_last, is_training = number == self._stage.num_chunks - 1, self._loss_function is not None
        with tf.GradientTape(watch_accessed_variables=is_training) as tape:
            if is_training and number > 0:
                tape.watch(inputs)
            if is_last and self._loss_function is not None:
                outputs = self._loss_function(inputs, self._targets[examples])
            else:
                outputs = self._stage.compiled_chunk(number, is_training)(inputs)
        if is_last:
            self.outputs.append(outputs)
        if is_training or not is_last:
            self._saved[number, action.micro_batch] = _Pass(tape, inputs, outputs)

    def _backward(self, action: Action) -> None:
        self._backward_input(action)
        self._backward_weight(action)

    def _backward_input(self, action: Action) -> None:
        key = action.chunk, action.micro_batch
        tape, inputs, outputs = self._saved.pop(key)
        variables = [variable.value for variable in self._stage.chunks[action.chunk].trainable_variables]
        ends = variables if action.chunk == 0 else [inputs, *variables]
        gradients = tape.gradient(outputs, ends, self._output_gradient(action))
        if action.chunk > 0:
            self._input_gradients[key] = gradients.pop(0)
        self._weight_gradients[key] = gradients

    def _backward_weight(self, action: Action) -> None:
        gradients = self._weight_gradients.pop((action.chunk, action.micro_batch))
        for variable, gradient in zip(self._stage.chunks[action.chunk].trainable_variables, gradients, strict=True):
            self.gradients[self._indices[id(variable)]] += tf.convert_to_tensor(gradient)

    def _output_gradient(self, action: Action) -> tf.Tensor:
        """The gradient of a chunk's outputs, or of the loss."""
        is_last = action.chunk == self._stage.num_chunks - 1
        return self._loss_gradient if is_last else self._received(action, Kind.receive_gradient)

    def _send_activation(self, action: Action) -> None:
        self._send(action, self._saved[action.chunk, action.micro_batch].outputs)

    def _send_gradient(self, action: Action) -> None:
        self._send(action, self._input_gradients.pop((action.chunk, action.micro_batch)))

    def _receive_activation(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.chunk - 1])

    def _receive_gradient(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.chunk])

    # Both ends name a message after its send.
    def _send(self, action: Action, values: tf.Tensor) -> None:
        messages.send(str(action), values, self._rank_schedule.peer(action))

    def _receive(self, action: Action, shape: tuple[int, ...]) -> None:
        examples = self._micro_batches[action.micro_batch]
        like = tf.TensorSpec((examples.stop - examples.start, *shape), self._stage.dtype)
        peer = self._rank_schedule.peer(action)
        self._arriving[action] = messages.receive(str(action.other_end), like, peer)

    def _received(self, action: Action, kind: Kind) -> tf.Tensor:
        """Waits for the message that was posted for a computation."""
        start = time.perf_counter()
        values = self._arriving.pop(replace(action, kind=kind)).wait()
        self.waited_seconds += time.perf_counter() - start
        return values


def _never_empty(examples: tf.Tensor) -> tf.Tensor:
    """The examples, or one example of zeros if there are none: TensorFlow's convolutions fail without any (oneDNN)."""
    is_empty = tf.cast(tf.shape(examples)[0] == 0, tf.int32)
    return tf.pad(examples, [[0, is_empty], *[[0, 0]] * (len(examples.shape) - 1)])


def _part_sizes(size: tf.Tensor, num_parts: int) -> tf.Tensor:
    """Sizes (num_parts,) int32 whose sum is `size`; they differ by at most one, larger ones first."""
    return size // num_parts + tf.cast(tf.range(num_parts) < size % num_parts, tf.int32)
