"""Runs a rank's pipeline schedule: forward and backward of micro-batches, and transfers between ranks.

common/parallel/pipeline_schedule.py makes the schedule; with one stage it is gradient accumulation.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from common.parallel.pipeline_schedule import Action, Kind
from common.parallel.rank_schedule import RankSchedule
from common.torch.distributed import messages
from common.torch.distributed.messages import Incoming
from common.torch.parallel.split_backward import Caught
from common.torch.parallel.stage import Stage

import torch
from torch import Tensor


class ScheduleExecutor:
    """Executes the schedule of one step on this rank's model chunks.

    Args:
        stage: this rank's layers.
        rank_schedule: this rank's pipeline schedule.
        inputs: (B, ...) inputs of this rank's examples in the step; B may be 0.
        targets: (B, ...) targets of these examples.
        loss_function: (outputs, targets) -> part of the mean loss; None: only forward.
        loss_scale: factor on the losses before backward.

    Attributes:
        loss: sum of the parts of the mean loss so far.
        outputs: outputs of the whole model, if there is no loss function.
        waited_seconds: seconds that this rank has waited for messages.
    """

    def __init__(
        self,
        stage: Stage,
        rank_schedule: RankSchedule,
        inputs: Tensor,
        targets: Tensor,
        loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        self._stage, self._rank_schedule, self._inputs, self._targets = stage, rank_schedule, inputs, targets
        self._loss_function, self._loss_scale = loss_function, loss_scale
        self._micro_batches = rank_schedule.micro_batches(len(inputs))
        stage.infer_shapes(inputs)
        self.loss = torch.zeros(())
        self.outputs: list[Tensor] = []
        self.waited_seconds = 0.0
        # By model chunk and micro-batch: inputs and outputs, gradients of the inputs, state for backward_weight.
        self._saved: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._input_gradients: dict[tuple[int, int], Tensor] = {}
        self._caught: dict[tuple[int, int], list[Caught]] = {}
        self._for_weights: dict[tuple[int, int], Callable[[], None]] = {}
        self._arriving: dict[Action, Incoming] = {}

    def run(self, action: Action) -> None:
        """Executes one action of the schedule; skips micro-batches without examples."""
        examples = self._micro_batches[action.micro_batch]
        if examples.start < examples.stop:
            getattr(self, f"_{action.kind}")(action)

    def _forward(self, action: Action) -> None:
        examples = self._micro_batches[action.micro_batch]
        inputs = self._inputs[examples]
        if action.chunk > 0:
            inputs = self._received(action, Kind.receive_activation).requires_grad_(torch.is_grad_enabled())
        outputs = self._stage.chunks[action.chunk](inputs)
        if action.chunk in self._stage.split_backwards:
            self._caught[action.chunk, action.micro_batch] = self._stage.split_backwards[action.chunk].caught()
        if action.chunk == self._stage.num_chunks - 1:
            if self._loss_function is None:
                self.outputs.append(outputs)
                return
            outputs = self._loss_function(outputs, self._targets[examples])
            self.loss = self.loss + outputs.detach()
            outputs = outputs * self._loss_scale
        self._saved[action.chunk, action.micro_batch] = inputs, outputs

    def _backward(self, action: Action) -> None:
        inputs, outputs = self._saved.pop((action.chunk, action.micro_batch))
        outputs.backward(self._output_gradient(action))
        self._keep_gradient((action.chunk, action.micro_batch), inputs)

    def _backward_input(self, action: Action) -> None:
        key = action.chunk, action.micro_batch
        inputs, outputs = self._saved.pop(key)
        gradient = self._output_gradient(action)
        if action.chunk == 0:  # its inputs need no gradient
            self._for_weights[key] = partial(outputs.backward, gradient)
            return
        split, caught = self._stage.split_backwards[action.chunk], self._caught.pop(key)
        caught = split.backward_input(inputs, outputs, gradient, caught)
        self._keep_gradient(key, inputs)
        self._for_weights[key] = partial(split.backward_weight, caught)

    def _keep_gradient(self, key: tuple[int, int], inputs: Tensor) -> None:
        if inputs.grad is not None:
            self._input_gradients[key] = inputs.grad

    def _backward_weight(self, action: Action) -> None:
        self._for_weights.pop((action.chunk, action.micro_batch))()

    def _output_gradient(self, action: Action) -> Tensor | None:
        """The gradient of a chunk's outputs; None for the loss, whose gradient is 1."""
        is_last = action.chunk == self._stage.num_chunks - 1
        return None if is_last else self._received(action, Kind.receive_gradient)

    def _send_activation(self, action: Action) -> None:
        self._send(action, self._saved[action.chunk, action.micro_batch][1].detach())

    def _send_gradient(self, action: Action) -> None:
        self._send(action, self._input_gradients.pop((action.chunk, action.micro_batch)))

    def _receive_activation(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.chunk - 1])

    def _receive_gradient(self, action: Action) -> None:
        self._receive(action, self._stage.shapes[action.chunk])

    # Both ends name a message after its send.
    def _send(self, action: Action, values: Tensor) -> None:
        messages.send(str(action), values, self._rank_schedule.peer(action))

    def _receive(self, action: Action, shape: tuple[int, ...]) -> None:
        examples = self._micro_batches[action.micro_batch]
        like = self._inputs.new_empty((examples.stop - examples.start, *shape), dtype=self._stage.dtype)
        peer = self._rank_schedule.peer(action)
        self._arriving[action] = messages.receive(str(action.other_end), like, peer)

    def _received(self, action: Action, kind: Kind) -> Tensor:
        """Waits for the message that was posted for a computation."""
        start = time.perf_counter()
        values = self._arriving.pop(replace(action, kind=kind)).wait()
        self.waited_seconds += time.perf_counter() - start
        return values
