"""Backward in two: first the gradients of a part's inputs, which another rank waits for, later those of its weights.

One pass from the outputs makes the gradients of the inputs and of what each module with weights has put out; the
gradients of a module's weights then follow from that of its own output, and nothing is computed twice. Source: Qi et
al., "Zero Bubble Pipeline Parallelism", 2023, https://arxiv.org/abs/2401.10241
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Caught(NamedTuple):
    """What a module with weights of its own has put out, and later its gradient."""

    module: nn.Module
    output: Tensor
    gradient: Tensor | None = None


class SplitBackward:
    """The two halves for one part of a model.

    Args:
        part: whose modules are watched while they run.
    """

    def __init__(self, part: nn.Module) -> None:
        self._weights = set(part.parameters())
        self._caught: list[Caught] = []
        for module in part.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_hook(self._catch)

    def caught(self) -> list[Caught]:
        """What was put out since the last call."""
        caught, self._caught = self._caught, []
        return caught

    def backward_input(
        self, inputs: Tensor, outputs: Tensor, gradient: Tensor | None, caught: list[Caught]
    ) -> list[Caught]:
        """Leaves the gradient of the inputs in inputs.grad; returns what backward_weight needs.

        A part with a weight that is used in another way than by the module that has it makes all gradients here.
        """
        known = {weight for entry in caught for weight in entry.module.parameters(recurse=False)}
        if known != self._weights:
            outputs.backward(gradient)
            return []
        ends = [inputs, *(entry.output for entry in caught)]
        inputs.grad, *gradients = torch.autograd.grad(outputs, ends, gradient, retain_graph=True)
        return [entry._replace(gradient=each) for entry, each in zip(caught, gradients, strict=True)]

    @staticmethod
    def backward_weight(caught: list[Caught]) -> None:
        """Adds to the gradients of the weights."""
        for module, output, gradient in caught:
            torch.autograd.backward(output, gradient, inputs=list(module.parameters(recurse=False)))

    def _catch(self, module: nn.Module, _: Any, output: Tensor) -> None:
        if output.requires_grad:
            self._caught.append(Caught(module, output))
