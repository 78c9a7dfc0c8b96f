"""Splits backward: first the gradients of a model chunk's inputs, for which a rank waits, later those of its weights.

The first part computes the gradients of the inputs and of the output of each module with weights; the gradients of a
module's weights then follow from that of its output, so that nothing is computed twice. Source: Qi et al., "Zero Bubble
Pipeline Parallelism", 2023, https://arxiv.org/abs/2401.10241
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Caught(NamedTuple):
    """The output of a module with weights, and later its gradient."""

    module: nn.Module
    output: Tensor
    gradient: Tensor | None = None


class SplitBackward:
    """The split backward of one model chunk.

    Args:
        chunk: the model chunk; hooks record the outputs of its modules with weights.
    """

    def __init__(self, chunk: nn.Module) -> None:
        self._weights = set(chunk.parameters())
        self._caught: list[Caught] = []
        for module in chunk.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_hook(self._catch)

    def caught(self) -> list[Caught]:
        """Returns the outputs since the last call."""
        caught, self._caught = self._caught, []
        return caught

    def backward_input(
        self, inputs: Tensor, outputs: Tensor, gradient: Tensor | None, caught: list[Caught]
    ) -> list[Caught]:
        """Stores the gradient of the inputs in inputs.grad; returns the entries for backward_weight().

        If a weight is not used by its module in the usual way, all gradients are computed here.
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
        """Adds the gradients of the weights to their .grad."""
        for module, output, gradient in caught:
            torch.autograd.backward(output, gradient, inputs=list(module.parameters(recurse=False)))

    def _catch(self, module: nn.Module, _: Any, output: Tensor) -> None:
        if output.requires_grad:
            self._caught.append(Caught(module, output))
