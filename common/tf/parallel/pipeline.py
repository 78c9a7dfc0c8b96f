"""Runs a rank's pipeline schedule: forward and backward of micro-batches, and transfers between ranks.

common/parallel/pipeline_schedule.py makes the schedule. A model that is not cut runs in one graph with the exchange of
its gradients. In a model that is cut, forward and backward of each model chunk are separate graphs, and transfers run
between them.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

from common.parallel.pipeline_schedule import Action, Kind
from common.parallel.rank_schedule import RankSchedule
from common.tf.distributed import runtime
from common.tf.parallel.stage import Stage

import tensorflow as tf


def compiled(stage: Stage, step: Callable[..., Any], signature: Sequence[tf.TensorSpec]) -> Callable[..., Any]:
    """Compiles the step unless it contains point-to-point transfers, which deadlock inside a graph.

    Args:
        stage: this rank's layers.
        step: the function that calls forward_backward().
        signature: the specs of its arguments.
    """
    if stage.num_chunks == 1 and not stage.topology.num_servers:
        return tf.function(step, input_signature=signature)

    def eager(*arguments: Any) -> Any:
        return step(*(tf.cast(value, spec.dtype) for value, spec in zip(arguments, signature, strict=True)))

    return eager


def forward_backward(
    stage: Stage,
    loss_sum: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    targets: tf.Tensor,
    global_size: tf.Tensor,
    loss_scale: tf.Tensor | float = 1.0,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Runs forward and backward of all micro-batches; with several stages, it must be called outside of graphs.

    Args:
        stage: this rank's layers.
        loss_sum: (outputs, targets) -> sum of the losses over the examples, not their mean; must be the same object at
            each step.
        inputs: (B, ...) inputs of this rank's examples in the step; B may be 0.
        targets: (B, ...) targets of these examples.
        global_size: () number of examples of all lanes in this step.
        loss_scale: factor on the gradients, but not on the returned loss.

    Returns:
        This rank's parts of the mean loss over the global batch and of its gradients for the stage's variables. Their
        sum over the ranks of the stage is exact, even if ranks have unequal numbers of examples.
    """
    if stage.topology.is_server:
        return tf.zeros((), tf.float64), []
    if stage.num_chunks == 1:
        arguments = inputs, targets, tf.cast(global_size, tf.int32), tf.cast(loss_scale, stage.dtype)
        specs = [
            tf.TensorSpec([None, *value.shape[1:]] if value.shape.rank else [], value.dtype) for value in arguments
        ]
        is_in_graph = tf.inside_function()
        step = partial(_accumulate, stage, loss_sum) if is_in_graph else _graph(stage, loss_sum, *specs)
        return step(*arguments)
    size = tf.cast(global_size, stage.dtype)
    passes = _ScheduleExecutor(stage, stage.rank_schedule, inputs, targets)
    passes.loss_function, passes.loss_gradient = stage.compiled_loss(loss_sum), loss_scale / size
    passes.run(stage.rank_schedule.actions())
    stage.add_times(passes.seconds, passes.waited_seconds)
    losses = [tf.zeros((), tf.float64), *(tf.cast(loss, tf.float64) for loss in passes.outputs)]
    return tf.add_n(losses) / tf.cast(size, tf.float64), passes.gradients


def forward(stage: Stage, inputs: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The outputs of the whole model and their targets on the ranks of the last stage; empty tensors on the others.

    Args:
        stage: this rank's layers.
        inputs: (B, ...) inputs of this rank's examples, at least one.
        targets: (B, ...) targets of these examples.
    """
    rank_schedule = replace(stage.rank_schedule, num_micro_batches=1)
    passes = _ScheduleExecutor(stage, rank_schedule, inputs, targets)
    passes.run(rank_schedule.forward_actions())
    if not passes.outputs:
        return tf.zeros((0, *stage.shapes[-1]), stage.dtype), targets[:0]
    return tf.concat(passes.outputs, 0), targets


@cache
def _graph(
    stage: Stage, loss_sum: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], *specs: tf.TensorSpec
) -> Callable[..., Any]:
    """_accumulate() as a separate graph, for any number of examples."""
    return tf.function(partial(_accumulate, stage, loss_sum), input_signature=specs)


def _accumulate(
    stage: Stage,
    loss_sum: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    targets: tf.Tensor,
    global_size: tf.Tensor,
    loss_scale: tf.Tensor | float,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """forward_backward() for a model that is not cut: gradient accumulation."""
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


class _Pass(NamedTuple):
    """The results of a forward pass that backward needs."""

    tape: tf.GradientTape
    inputs: tf.Tensor
    outputs: tf.Tensor


class _ScheduleExecutor:
    """Executes the schedule of one step on this rank's model chunks.

    A compiled backward computes the gradients of inputs and weights together. So with schedule=zb_h1, backward_weight
    only adds gradients: the results are correct, but no bubble is filled.

    Attributes:
        loss_function: (inputs of the last chunk, targets) -> sum of the examples' losses; None: only forward.
        loss_gradient: () gradient of the minimised loss with respect to that sum.
        gradients: sums of the gradients so far, for the stage's trainable variables.
        outputs: outputs of the whole model, or the sums of its losses; empty except on ranks of the last stage.
        seconds: seconds of the whole step.
        waited_seconds: seconds that this rank has waited for other ranks.
    """

    def __init__(self, stage: Stage, rank_schedule: RankSchedule, inputs: tf.Tensor, targets: tf.Tensor) -> None:
        self._stage, self._passage, self._inputs, self._targets = stage, rank_schedule, inputs, targets
        self._micro_batches = rank_schedule.micro_batches(len(inputs))
        self.loss_function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None
        self.loss_gradient = tf.ones((), stage.dtype)
        self._places = {id(variable): place for place, variable in enumerate(stage.trainable_variables)}
        self.gradients = [tf.zeros(variable.shape, variable.dtype) for variable in stage.trainable_variables]
        self.outputs: list[tf.Tensor] = []
        self.seconds = self.waited_seconds = 0.0
        # By chunk and micro-batch: forward passes, gradients of inputs, gradients of weights that are not added yet.
        self._saved: dict[tuple[int, int], _Pass] = {}
        self._input_gradients: dict[tuple[int, int], tf.Tensor] = {}
        self._weight_gradients: dict[tuple[int, int], list[tf.Tensor]] = {}
        self._arriving: dict[Action, Future[tf.Tensor]] = {}
        self._leaving: list[Future[tf.Tensor]] = []

    def run(self, actions: Sequence[Action]) -> None:
        """Executes all actions; skips micro-batches without examples."""
        start = time.perf_counter()
        try:
            for action in actions:
                examples = self._micro_batches[action.micro_batch]
                if examples.start < examples.stop:
                    getattr(self, f"_{action.kind}")(action)
            for message in self._leaving:
                self._wait(message)
        except BaseException:
            runtime.shutdown()  # threads that wait for other ranks would keep this process from exiting
            raise
        self.seconds = time.perf_counter() - start

    def _forward(self, action: Action) -> None:
        number, examples = action.chunk, self._micro_batches[action.micro_batch]
        inputs = self._inputs[examples] if number == 0 else self._received(action, Kind.receive_activation)
        is_last, is_training = number == self._stage.num_chunks - 1, self.loss_function is not None
        with tf.GradientTape(watch_accessed_variables=is_training) as tape:
            if is_training and number > 0:
                tape.watch(inputs)
            if is_last and self.loss_function is not None:
                outputs = self.loss_function(inputs, self._targets[examples])
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
        place = action.chunk, action.micro_batch
        tape, inputs, outputs = self._saved.pop(place)
        variables = [variable.value for variable in self._stage.chunks[action.chunk].trainable_variables]
        ends = variables if action.chunk == 0 else [inputs, *variables]
        gradients = tape.gradient(outputs, ends, self._output_gradient(action))
        if action.chunk > 0:
            self._input_gradients[place] = gradients.pop(0)
        self._weight_gradients[place] = gradients

    def _backward_weight(self, action: Action) -> None:
        gradients = self._weight_gradients.pop((action.chunk, action.micro_batch))
        for variable, gradient in zip(self._stage.chunks[action.chunk].trainable_variables, gradients, strict=True):
            self.gradients[self._places[id(variable)]] += tf.convert_to_tensor(gradient)

    def _output_gradient(self, action: Action) -> tf.Tensor:
        """The gradient of a chunk's outputs, or of the loss."""
        is_last = action.chunk == self._stage.num_chunks - 1
        return self.loss_gradient if is_last else self._received(action, Kind.receive_gradient)

    def _send_activation(self, action: Action) -> None:
        self._send(action, self._saved[action.chunk, action.micro_batch].outputs)

    def _send_gradient(self, action: Action) -> None:
        self._send(action, self._input_gradients.pop((action.chunk, action.micro_batch)))

    def _receive_activation(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.chunk - 1])

    def _receive_gradient(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.chunk])

    def _send(self, action: Action, values: tf.Tensor) -> None:
        message = self._stage.transfers.send(self._name(action), values, self._passage.peer(action))
        self._leaving.append(message)

    def _receive(self, action: Action, shape: tuple[int, ...]) -> None:
        examples = self._micro_batches[action.micro_batch]
        like = tf.zeros((examples.stop - examples.start, *shape), self._stage.dtype)
        name, peer = self._name(action.other_end), self._passage.peer(action)
        self._arriving[action] = self._stage.transfers.receive(name, like, peer)

    def _received(self, action: Action, kind: Kind) -> tf.Tensor:
        """Waits for the message that was posted for a computation."""
        return self._wait(self._arriving.pop(replace(action, kind=kind)))

    def _wait(self, message: Future[tf.Tensor]) -> tf.Tensor:
        start = time.perf_counter()
        values = message.result()
        self.waited_seconds += time.perf_counter() - start
        return values

    def _name(self, sending: Action) -> str:
        """The name of a message, made from its send."""
        phase = "train" if self.loss_function else "evaluate"
        return f"{phase}.{sending.kind}.{sending.chunk}.{sending.micro_batch}"


def _never_empty(examples: tf.Tensor) -> tf.Tensor:
    """The examples, or one example of zeros if there are none: TensorFlow's convolutions fail without any (oneDNN)."""
    is_empty = tf.cast(tf.shape(examples)[0] == 0, tf.int32)
    return tf.pad(examples, [[0, is_empty], *[[0, 0]] * (len(examples.shape) - 1)])


def _part_sizes(size: tf.Tensor, num_parts: int) -> tf.Tensor:
    """Sizes (num_parts,) int32 whose sum is `size`; they differ by at most one, larger ones first."""
    return size // num_parts + tf.cast(tf.range(num_parts) < size % num_parts, tf.int32)
