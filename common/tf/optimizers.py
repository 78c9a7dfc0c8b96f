"""The optimizers of conf/optimizer as Keras has them."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from common.config import AdamWConfig, OptimizerConfig, SGDConfig
from common.step_sums import StepSums

import keras
import tensorflow as tf


class Optimizer(Protocol):
    """What training needs of keras.Optimizer, or of what takes its place."""

    @property
    def learning_rate(self) -> Any:
        """A variable."""

    @property
    def variables(self) -> Any:
        """What it keeps, and all ranks with the same weights have."""

    def apply(self, gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> Any:
        """One update of the weights."""


class SGD(keras.optimizers.SGD):
    """Momentum as PyTorch has it: the velocity sums gradients, and the learning rate of the step scales all of it.

    Keras' own sums gradients that are scaled already, so that warm-up and decay reach the velocity late, and the twins
    would part. Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013,
    http://proceedings.mlr.press/v28/sutskever13.html, with the learning rate taken out of the velocity.
    """

    def update_step(self, gradient, variable, learning_rate):  # type: ignore[no-untyped-def]
        """Changes the variable by one step."""
        step = gradient
        if self.momentum:
            velocity = self.momentums[self._get_variable_index(variable)]
            self.assign(velocity, self.momentum * velocity + gradient)
            step = velocity
        self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * step)


class AdamW(keras.optimizers.AdamW):
    """AdamW as its paper and PyTorch have it: epsilon is added to the square root of the corrected second moment.

    Keras adds it before the correction, which makes it larger by up to 1 / sqrt(1 - beta2) in the first steps.

    The second moment may stay as it is after cfg.freeze_step updates. Then the update is linear in the gradients, so
    that what error feedback adds late counts as if it had come in time; squares of compressed gradients are not those
    of the gradients. Source: Tang et al., "1-bit Adam", 2021, https://arxiv.org/abs/2102.02888 (algorithm 1)
    """

    def __init__(self, cfg: AdamWConfig) -> None:
        super().__init__(cfg.lr, cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.epsilon)
        self._freeze_step = cfg.freeze_step

    def update_step(self, gradient, variable, learning_rate):  # type: ignore[no-untyped-def]
        """Changes the variable by one step; the base class has applied the decay."""
        index = self._get_variable_index(variable)
        first, second = self._momentums[index], self._velocities[index]
        step = keras.ops.cast(self.iterations + 1, variable.dtype)
        self.assign_add(first, (1 - self.beta_1) * (gradient - first))
        correction = 1 - self.beta_2 ** keras.ops.minimum(step, self._freeze_step or math.inf)
        square = keras.ops.square(gradient)
        new = second + (1 - self.beta_2) * (square - second)
        if self._freeze_step:
            # What had no gradient before would be divided by nothing: there the first square stays.
            frozen = keras.ops.where(second > 0, second, correction * square)
            new = keras.ops.where(step <= self._freeze_step, new, frozen)
        self.assign(second, new)
        root = keras.ops.sqrt(second / correction)
        rate = keras.ops.cast(learning_rate, variable.dtype) / (1 - self.beta_1**step)
        self.assign_sub(variable, rate * first / (root + self.epsilon))


def build(cfg: OptimizerConfig, model: keras.Model) -> keras.Optimizer:
    """The optimizer of the configuration for the model's variables; only those of two or more dimensions decay."""
    variables = model.trainable_variables
    return build_for(cfg, variables, [variable for variable in variables if len(variable.shape) < 2])


def build_for(
    cfg: OptimizerConfig, variables: Sequence[keras.Variable], others: Sequence[keras.Variable]
) -> keras.Optimizer:
    """The optimizer of the configuration for variables of which some, the others, are not to decay.

    AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101
    """
    optimizer = _build(cfg, others)
    optimizer.build(variables)  # from the start, so that a checkpoint or rank 0 has where to put it
    return optimizer


def moments(optimizer: keras.Optimizer) -> dict[str, list[keras.Variable]]:
    """The variables of the optimizer's state, in the order of the trainable ones, by their names in a checkpoint."""
    if isinstance(optimizer, AdamW):
        return {"first_moment": optimizer._momentums, "second_moment": optimizer._velocities}
    return {"momentum": optimizer.momentums} if optimizer.momentum else {}


def _build(cfg: OptimizerConfig, others: Sequence[keras.Variable]) -> keras.Optimizer:
    if isinstance(cfg, SGDConfig):
        return SGD(cfg.lr, cfg.momentum)
    if isinstance(cfg, AdamWConfig):
        optimizer = AdamW(cfg)
        optimizer.exclude_from_weight_decay(list(others))
        return optimizer
    raise TypeError(f"no optimizer for {type(cfg).__name__}")


def apply(optimizer: Optimizer, gradients: Sequence[tf.Tensor], model: keras.Model, sums: StepSums) -> None:
    """One update of the weights, unless a rank's gradients overflowed."""

    def update() -> bool:
        optimizer.apply(gradients, model.trainable_variables)
        return True

    tf.cond(tf.cast(sums.overflow, tf.bool), lambda: False, update)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets the learning rate of the next step."""
    optimizer.learning_rate.assign(value)
