"""The optimizers of conf/optimizer in Keras."""

import math
from collections.abc import Sequence

from common.config.schema import AdamWConfig, OptimizerConfig, SGDConfig
from common.tf.distributed.runtime import Optimizer

import keras


class SGD(keras.optimizers.SGD):
    """SGD with PyTorch's momentum: the velocity sums gradients, and the step's learning rate scales the whole velocity.

    Keras' velocity sums gradients that are already scaled, so that warm-up and decay affect it late, and results would
    differ from PyTorch's. Source: Sutskever et al., "On the importance of initialization and momentum in deep
    learning", 2013, http://proceedings.mlr.press/v28/sutskever13.html, with the learning rate taken out of the
    velocity.
    """

    def update_step(self, gradient, variable, learning_rate):  # type: ignore[no-untyped-def]
        """Updates the variable once."""
        step = gradient
        if self.momentum:
            velocity = self.momentums[self._get_variable_index(variable)]
            self.assign(velocity, self.momentum * velocity + gradient)
            step = velocity
        self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * step)


class AdamW(keras.optimizers.AdamW):
    """AdamW as in its paper and in PyTorch: epsilon is added to the square root of the corrected second moment.

    Keras adds it before the correction, which makes it larger by up to 1 / sqrt(1 - beta2) in the first steps.

    The second moment can be frozen after cfg.freeze_step updates. Then the update is linear in the gradients, so that
    the delayed gradients of error feedback have their full effect; the squares of compressed gradients differ from
    those of the gradients. Source: Tang et al., "1-bit Adam", 2021, https://arxiv.org/abs/2102.02888 (algorithm 1)
    """

    def __init__(self, cfg: AdamWConfig) -> None:
        super().__init__(cfg.lr, cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.epsilon)
        self._freeze_step = cfg.freeze_step

    def update_step(self, gradient, variable, learning_rate):  # type: ignore[no-untyped-def]
        """Updates the variable once; the base class has already applied weight decay."""
        index = self._get_variable_index(variable)
        first, second = self._momentums[index], self._velocities[index]
        step = keras.ops.cast(self.iterations + 1, variable.dtype)
        self.assign_add(first, (1 - self.beta_1) * (gradient - first))
        correction = 1 - self.beta_2 ** keras.ops.minimum(step, self._freeze_step or math.inf)
        square = keras.ops.square(gradient)
        new = second + (1 - self.beta_2) * (square - second)
        if self._freeze_step:
            # Values without a gradient so far would be divided by 0: for them, the first square is kept.
            frozen = keras.ops.where(second > 0, second, correction * square)
            new = keras.ops.where(step <= self._freeze_step, new, frozen)
        self.assign(second, new)
        root = keras.ops.sqrt(second / correction)
        rate = keras.ops.cast(learning_rate, variable.dtype) / (1 - self.beta_1**step)
        self.assign_sub(variable, rate * first / (root + self.epsilon))


def build(cfg: OptimizerConfig, model: keras.Model) -> keras.Optimizer:
    """The configured optimizer for a model; only variables of two or more dimensions have weight decay."""
    variables = model.trainable_variables
    return build_for(cfg, variables, [variable for variable in variables if len(variable.shape) < 2])


def build_for(
    cfg: OptimizerConfig, weights: Sequence[keras.Variable], undecayed: Sequence[keras.Variable]
) -> keras.Optimizer:
    """The configured optimizer for weights, some of which, the undecayed ones, have no weight decay.

    AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, https://arxiv.org/abs/1711.05101
    """
    optimizer = _build(cfg, undecayed)
    optimizer.build(weights)  # created now, so that the state of a checkpoint or of rank 0 can be loaded
    return optimizer


def optimizer_state(optimizer: keras.Optimizer) -> dict[str, list[keras.Variable]]:
    """The variables of the optimizer's state by name in a checkpoint, in the order of the trainable variables."""
    if isinstance(optimizer, AdamW):
        return {"first_moment": optimizer._momentums, "second_moment": optimizer._velocities}
    return {"momentum": optimizer.momentums} if optimizer.momentum else {}


def _build(cfg: OptimizerConfig, undecayed: Sequence[keras.Variable]) -> keras.Optimizer:
    if isinstance(cfg, SGDConfig):
        return SGD(cfg.lr, cfg.momentum)
    if isinstance(cfg, AdamWConfig):
        optimizer = AdamW(cfg)
        optimizer.exclude_from_weight_decay(list(undecayed))
        return optimizer
    raise TypeError(f"no optimizer for {type(cfg).__name__}")


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets the learning rate of the next step."""
    optimizer.learning_rate.assign(value)
