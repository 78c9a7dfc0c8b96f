"""Micro-batches on their way through the stages of a model: forward, backward, and what travels between ranks.

common/pipeline_schedule.py has the order of what each rank does. A model that is not cut belongs into one graph with
the exchange of its gradients. Of a model that is cut, each part's forward is a graph, and its backward another; what
travels goes its way between them.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

from common.passage import Passage
from common.pipeline_schedule import Action, Kind
from common.tf import runtime
from common.tf.stage import Stage

import tensorflow as tf


def compiled(stage: Stage, step: Callable[..., Any], signature: Sequence[tf.TensorSpec]) -> Callable[..., Any]:
    """A step as one graph, if no rank sends to another one in it; else no graph, as transfers in one would hang.

    Args:
        stage: this rank's layers.
        step: what calls forward_backward.
        signature: of its arguments.
    """
    if stage.num_parts == 1 and not stage.topology.num_servers:
        return tf.function(step, input_signature=signature)

    def eager(*arguments: Any) -> Any:
        return step(*(tf.cast(value, spec.dtype) for value, spec in zip(arguments, signature, strict=True)))

    return eager


def forward_backward(
    stage: Stage,
    sum_of_losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    targets: tf.Tensor,
    global_size: tf.Tensor,
    loss_scale: tf.Tensor | float = 1.0,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Forward and backward of all micro-batches; in a graph if there is one stage, outside of any if there are several.

    Args:
        stage: this rank's layers.
        sum_of_losses: (outputs, targets) -> sum over the examples, not their mean; the same object at each step.
        inputs: (B, ...) this rank's examples of the step; B may be 0.
        targets: (B, ...)
        global_size: () number of examples of all lanes in this step.
        loss_scale: that the gradients, but not the loss, are multiplied with.

    Returns:
        This rank's shares of the mean loss over the global batch and of the gradients of the stage's variables: the
        shares of the ranks with the same stage add up to them, whatever number of examples each rank has.
    """
    if stage.topology.is_server:
        return tf.zeros((), tf.float64), []
    if stage.num_parts == 1:
        arguments = inputs, targets, tf.cast(global_size, tf.int32), tf.cast(loss_scale, stage.dtype)
        specs = [
            tf.TensorSpec([None, *value.shape[1:]] if value.shape.rank else [], value.dtype) for value in arguments
        ]
        is_in_graph = tf.inside_function()
        step = partial(_accumulate, stage, sum_of_losses) if is_in_graph else _graph(stage, sum_of_losses, *specs)
        return step(*arguments)
    size = tf.cast(global_size, stage.dtype)
    passes = _Passes(stage, stage.passage, inputs, targets)
    passes.loss_function, passes.loss_gradient = stage.compiled_loss(sum_of_losses), loss_scale / size
    passes.run(stage.passage.actions())
    stage.add_times(passes.seconds, passes.waited_seconds)
    losses = [tf.zeros((), tf.float64), *(tf.cast(loss, tf.float64) for loss in passes.outputs)]
    return tf.add_n(losses) / tf.cast(size, tf.float64), passes.gradients


def forward(stage: Stage, inputs: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The outputs of the whole model and their targets, on the ranks of the last stage; on the others none of them.

    Args:
        stage: this rank's layers.
        inputs: (B, ...) this rank's examples, at least one.
        targets: (B, ...)
    """
    passage = replace(stage.passage, num_micro_batches=1)
    passes = _Passes(stage, passage, inputs, targets)
    passes.run(passage.forward_actions())
    if not passes.outputs:
        return tf.zeros((0, *stage.shapes[-1]), stage.dtype), targets[:0]
    return tf.concat(passes.outputs, 0), targets


@cache
def _graph(
    stage: Stage, sum_of_losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], *specs: tf.TensorSpec
) -> Callable[..., Any]:
    """_accumulate() as a graph of its own, for any number of examples."""
    return tf.function(partial(_accumulate, stage, sum_of_losses), input_signature=specs)


def _accumulate(
    stage: Stage,
    sum_of_losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    targets: tf.Tensor,
    global_size: tf.Tensor,
    loss_scale: tf.Tensor | float,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """forward_backward() of a model that is not cut, one micro-batch after another."""
    sizes = _part_sizes(tf.shape(inputs)[0], stage.passage.num_micro_batches)
    total = tf.zeros((), tf.float64)
    sums: list[tf.Tensor] = []
    for part_inputs, part_targets in zip(tf.split(inputs, sizes), tf.split(targets, sizes), strict=True):
        # The sums so far come first: otherwise all micro-batches run, and hold their activations, at the same time.
        with tf.control_dependencies(sums), tf.GradientTape() as tape:
            loss = sum_of_losses(stage(_never_empty(part_inputs), training=True), _never_empty(part_targets))
            loss *= tf.cast(tf.shape(part_inputs)[0] > 0, loss.dtype) / tf.cast(global_size, loss.dtype)
            scaled = loss * loss_scale
        values = [variable.value for variable in stage.trainable_variables]
        # That of a slice has no static shape, that of a gather is sparse.
        gradients = [
            tf.ensure_shape(tf.convert_to_tensor(gradient), value.shape)
            for gradient, value in zip(tape.gradient(scaled, values), values, strict=True)
        ]
        sums = [a + b for a, b in zip(sums, gradients, strict=True)] if sums else gradients
        total += tf.cast(loss, tf.float64)
    return total, sums


class _Pass(NamedTuple):
    """What backward needs of a forward pass."""

    tape: tf.GradientTape
    inputs: tf.Tensor
    outputs: tf.Tensor


class _Passes:
    """All passes of one step through this rank's parts.

    A compiled backward makes both gradients in one go, so that with schedule=zb_h1 backward_weight has nothing to do
    but to add up: the results are right, and no bubble is filled.

    Attributes:
        loss_function: (inputs of the last part, targets) -> sum of the examples' losses; None: only forward.
        loss_gradient: () of what is minimised with respect to that sum.
        gradients: sums so far, of the stage's trainable variables.
        outputs: of the whole model, or the sums of its losses; none but on ranks of the last stage.
        seconds: that all took.
        waited_seconds: for other ranks.
    """

    def __init__(self, stage: Stage, passage: Passage, inputs: tf.Tensor, targets: tf.Tensor) -> None:
        self._stage, self._passage, self._inputs, self._targets = stage, passage, inputs, targets
        self._micro_batches = passage.micro_batches(len(inputs))
        self.loss_function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None
        self.loss_gradient = tf.ones((), stage.dtype)
        self._places = {id(variable): place for place, variable in enumerate(stage.trainable_variables)}
        self.gradients = [tf.zeros(variable.shape, variable.dtype) for variable in stage.trainable_variables]
        self.outputs: list[tf.Tensor] = []
        self.seconds = self.waited_seconds = 0.0
        # By part and micro-batch: forward passes, gradients of the inputs, and those of weights that are not yet added.
        self._saved: dict[tuple[int, int], _Pass] = {}
        self._input_gradients: dict[tuple[int, int], tf.Tensor] = {}
        self._weight_gradients: dict[tuple[int, int], list[tf.Tensor]] = {}
        self._arriving: dict[Action, Future[tf.Tensor]] = {}
        self._leaving: list[Future[tf.Tensor]] = []

    def run(self, actions: Sequence[Action]) -> None:
        """What the schedule has; of micro-batches without examples there is nothing to do."""
        start = time.perf_counter()
        try:
            for action in actions:
                examples = self._micro_batches[action.micro_batch]
                if examples.start < examples.stop:
                    getattr(self, f"_{action.kind}")(action)
            for message in self._leaving:
                self._wait(message)
        except BaseException:
            runtime.shutdown()  # threads that wait for other ranks would keep this one from leaving
            raise
        self.seconds = time.perf_counter() - start

    def _forward(self, action: Action) -> None:
        number, examples = action.part, self._micro_batches[action.micro_batch]
        inputs = self._inputs[examples] if number == 0 else self._received(action, Kind.receive_activation)
        is_last, is_training = number == self._stage.num_parts - 1, self.loss_function is not None
        with tf.GradientTape(watch_accessed_variables=is_training) as tape:
            if is_training and number > 0:
                tape.watch(inputs)
            if is_last and self.loss_function is not None:
                outputs = self.loss_function(inputs, self._targets[examples])
            else:
                outputs = self._stage.compiled_part(number, is_training)(inputs)
        if is_last:
            self.outputs.append(outputs)
        if is_training or not is_last:
            self._saved[number, action.micro_batch] = _Pass(tape, inputs, outputs)

    def _backward(self, action: Action) -> None:
        self._backward_input(action)
        self._backward_weight(action)

    def _backward_input(self, action: Action) -> None:
        place = action.part, action.micro_batch
        tape, inputs, outputs = self._saved.pop(place)
        variables = [variable.value for variable in self._stage.parts[action.part].trainable_variables]
        ends = variables if action.part == 0 else [inputs, *variables]
        gradients = tape.gradient(outputs, ends, self._output_gradient(action))
        if action.part > 0:
            self._input_gradients[place] = gradients.pop(0)
        self._weight_gradients[place] = gradients

    def _backward_weight(self, action: Action) -> None:
        gradients = self._weight_gradients.pop((action.part, action.micro_batch))
        for variable, gradient in zip(self._stage.parts[action.part].trainable_variables, gradients, strict=True):
            self.gradients[self._places[id(variable)]] += tf.convert_to_tensor(gradient)

    def _output_gradient(self, action: Action) -> tf.Tensor:
        """That of a part's outputs, or of the loss."""
        is_last = action.part == self._stage.num_parts - 1
        return self.loss_gradient if is_last else self._received(action, Kind.receive_gradient)

    def _send_activation(self, action: Action) -> None:
        self._send(action, self._saved[action.part, action.micro_batch].outputs)

    def _send_gradient(self, action: Action) -> None:
        self._send(action, self._input_gradients.pop((action.part, action.micro_batch)))

    def _receive_activation(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.part - 1])

    def _receive_gradient(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.part])

    def _send(self, action: Action, values: tf.Tensor) -> None:
        message = self._stage.transfers.send(self._name(action), values, self._passage.peer(action))
        self._leaving.append(message)

    def _receive(self, action: Action, shape: tuple[int, ...]) -> None:
        examples = self._micro_batches[action.micro_batch]
        like = tf.zeros((examples.stop - examples.start, *shape), self._stage.dtype)
        name, peer = self._name(action.other_end), self._passage.peer(action)
        self._arriving[action] = self._stage.transfers.receive(name, like, peer)

    def _received(self, action: Action, kind: Kind) -> tf.Tensor:
        """What a receive that was posted for a computation has brought."""
        return self._wait(self._arriving.pop(replace(action, kind=kind)))

    def _wait(self, message: Future[tf.Tensor]) -> tf.Tensor:
        start = time.perf_counter()
        values = message.result()
        self.waited_seconds += time.perf_counter() - start
        return values

    def _name(self, sending: Action) -> str:
        """A message is named after its sending end."""
        phase = "train" if self.loss_function else "evaluate"
        return f"{phase}.{sending.kind}.{sending.part}.{sending.micro_batch}"


def _never_empty(examples: tf.Tensor) -> tf.Tensor:
    """The examples, or one of zeros where there are none: TensorFlow's convolutions fail without any (oneDNN)."""
    is_empty = tf.cast(tf.shape(examples)[0] == 0, tf.int32)
    return tf.pad(examples, [[0, is_empty], *[[0, 0]] * (len(examples.shape) - 1)])


def _part_sizes(size: tf.Tensor, num_parts: int) -> tf.Tensor:
    """(num_parts,) int32 that add up to size and differ by one at most, larger ones first."""
    return size // num_parts + tf.cast(tf.range(num_parts) < size % num_parts, tf.int32)
