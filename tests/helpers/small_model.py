"""One small model in both frameworks and in numpy, so that tests of the bindings are written once."""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from common.config.schema import OptimizerConfig
from common.distributed.topology import Topology
from common.gradients.step_metrics import StepMetrics

import numpy as np

WEIGHTS = [(5, 3), (3,), (3, 4), (4,)]


class Small(Protocol):
    """Two linear layers: inputs (B, 5) -> outputs (B, 4), float64; the loss is half the summed squares."""

    weights: list[np.ndarray]

    def gradients(self, inputs: np.ndarray, global_size: int, num_micro_batches: int, bucket_bytes: int) -> StepMetrics:
        """One forward and backward; returns the scalars that were summed and keeps the exchanged gradients."""

    def exchanged(self, max_norm: float) -> list[np.ndarray]:
        """The exchanged gradients, clipped."""

    def step(self, learning_rate: float, metrics: StepMetrics) -> None:
        """Lets the optimizer use them."""

    def broadcast(self) -> None:
        """Takes rank 0's weights and optimizer state."""


def build(framework: str, weights: Sequence[np.ndarray], optimizer: OptimizerConfig, topology: Topology) -> Small:
    """The model with these weights, matrices as (inputs, outputs)."""
    module = importlib.import_module(f"tests.helpers.small_model_{framework}")
    model: Small = module.SmallModel(weights, optimizer, topology)
    return model


def initial_weights(seed: int) -> list[np.ndarray]:
    """Random weights of the model."""
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for shape in WEIGHTS]


def reference(weights: Sequence[np.ndarray], inputs: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """The mean loss over the inputs and its gradients, by numpy."""
    first, bias, second, shift = weights
    hidden = inputs @ first + bias
    outputs = hidden @ second + shift
    delta = outputs / len(inputs)
    back = delta @ second.T
    loss = 0.5 * float((outputs**2).sum()) / len(inputs)
    return loss, [inputs.T @ back, back.sum(0), hidden.T @ delta, delta.sum(0)]


def updates(cfg: Any, gradients: Sequence[np.ndarray], state: dict[str, Any], rate: float) -> list[Any]:
    """What the optimizer of the configuration adds to weights of zero, by numpy; the state starts as {}."""
    state["t"] = state.get("t", 0) + 1
    zeros = [np.zeros_like(gradient) for gradient in gradients]
    m, v = state.get("m", zeros), state.get("v", zeros)
    if cfg.name == "sgd":
        state["m"] = [cfg.momentum * old + new for old, new in zip(m, gradients, strict=True)]
        return [-rate * velocity for velocity in state["m"]]
    state["m"] = [cfg.beta1 * old + (1 - cfg.beta1) * new for old, new in zip(m, gradients, strict=True)]
    num_squares = min(state["t"], cfg.freeze_step or state["t"])
    correction = 1 - cfg.beta2**num_squares
    if num_squares == state["t"]:
        state["v"] = [cfg.beta2 * old + (1 - cfg.beta2) * new**2 for old, new in zip(v, gradients, strict=True)]
    else:
        state["v"] = [np.where(old > 0, old, correction * new**2) for old, new in zip(v, gradients, strict=True)]
    first = [moment / (1 - cfg.beta1 ** state["t"]) for moment in state["m"]]
    second = [moment / correction for moment in state["v"]]
    return [-rate * a / (np.sqrt(b) + cfg.epsilon) for a, b in zip(first, second, strict=True)]
