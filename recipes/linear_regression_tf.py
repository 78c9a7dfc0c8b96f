"""Least squares by distributed gradient descent, in Keras 3 on TensorFlow: the recipe to read first.

    horovodrun -np 2 python -m recipes.linear_regression_tf
    horovodrun -np 3 python -m recipes.linear_regression_tf data.num_features=100 data.noise=1.0
    horovodrun -np 2 python -m recipes.linear_regression_tf train.global_batch_size=100 optimizer.lr=0.05

At every step each rank computes the gradient of its part of the examples, the parts are summed over the ranks, and all
take the same step. After the default 100 steps the weights agree with the closed-form solution to 1e-6, at any -np.
Its twin recipes/linear_regression_torch.py has the same functions and reads the same conf/linear_regression.yaml.
"""

from collections.abc import Callable
from typing import Any

from common import command_line, stopping
from common.checkpoint import Checkpoints
from common.config import LinearRegressionConfig
from common.datasets import linear
from common.learning_rate import learning_rate
from common.run import Run, new_folder
from common.sharding import Plan
from common.step_sums import StepSums
from common.tf import optimizers, precision, runtime
from common.tf.auto import choose_compression
from common.tf.checkpoint import State
from common.tf.gradients import Gradients
from common.tf.optimizers import Optimizer
from common.tf.parameter_server import build_gradients
from common.tf.pipeline import compiled, forward_backward
from common.tf.sharded import build_optimizer
from common.tf.stage import Stage, take_stage
from common.validation import validate

import keras
import numpy as np
import tensorflow as tf

RECIPE = "linear_regression_tf"


def build_layers() -> list[keras.Layer]:
    """Layers in order: features (B, F) -> predictions (B, 1)."""
    return [keras.layers.Dense(1, kernel_initializer="zeros")]


def sum_of_losses(predictions: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """() half the squared errors of predictions (B, 1) and targets (B, 1), summed over the examples."""
    return tf.reduce_sum(tf.square(predictions - targets)) / 2


def make_train_step(
    model: Stage,
    optimizer: Optimizer,
    gradients: Gradients,
    cfg: LinearRegressionConfig,
) -> Callable[..., StepSums]:
    """Returns the step, as far as it can be compiled: (inputs, targets, global_size, stop) -> sums."""

    @gradients.compiled
    def update(grads: list[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, share: tf.Tensor) -> StepSums:
        """What follows backward: the exchange of the gradients, clipping, and the optimizer."""
        sums, grads = gradients.exchange(grads, loss, stop, share)
        grads = gradients.clip_global_norm(grads, cfg.train.clip_norm)
        optimizers.apply(optimizer, grads, model, sums)
        return sums

    def train_step(inputs: tf.Tensor, targets: tf.Tensor, global_size: tf.Tensor, stop: tf.Tensor) -> StepSums:
        """One optimizer step; returns the global batch's mean loss and what else travelled with the gradients."""
        loss, grads = forward_backward(model, sum_of_losses, inputs, targets, global_size, gradients.loss_scale)
        return update(grads, loss, stop, tf.shape(inputs)[0] / global_size)

    signature = [
        tf.TensorSpec((None, cfg.data.num_features), cfg.precision.dtype.name),
        tf.TensorSpec((None, 1), cfg.precision.dtype.name),
        tf.TensorSpec((), tf.int32),
        tf.TensorSpec((), tf.bool),
    ]
    return compiled(model, train_step, signature)


def evaluate(model: Stage, solution: np.ndarray) -> dict[str, float]:
    """Distance between the weights and the closed-form solution, relative to the solution's length."""
    weights = np.concatenate([weight.numpy().flatten() for weight in model.weights]).astype(np.float64)
    return {"test_distance": float(np.linalg.norm(weights - solution) / np.linalg.norm(solution))}


def train(cfg: LinearRegressionConfig) -> dict[str, Any]:
    """The whole run, callable from a test; returns what summary.json says."""
    topology = runtime.init()
    with runtime.joint_check():
        topology = validate(cfg, topology)
    train_set = linear.load(cfg.data, cfg.seed)
    solution = train_set.least_squares()
    runtime.check_alike(cfg, train_set.fingerprint)
    cfg.run.dir = runtime.from_rank_zero(new_folder(cfg, RECIPE))

    runtime.seed(cfg.seed, topology)
    precision.set_policy(cfg.precision)
    model = take_stage(build_layers(), cfg, topology, train_set)
    optimizer = build_optimizer(cfg, model)
    cfg.compression = choose_compression(cfg, model, train_set, topology)
    gradients = build_gradients(cfg, model, optimizer)
    checkpoints = Checkpoints(cfg, RECIPE, train_set.fingerprint, State(model, optimizer, gradients), runtime, topology)
    plan = Plan.of(cfg, len(train_set), topology, checkpoints.restore())
    train_step = make_train_step(model, optimizer, gradients, cfg)

    run = Run(cfg, RECIPE, plan, runtime)
    for step, batch in run.steps(train_set):
        lr = learning_rate(step, cfg)
        optimizers.set_learning_rate(optimizer, lr)
        inputs, targets = runtime.to_tensors(batch, cfg.precision)
        sums = train_step(inputs, targets, step.global_size, stopping.requested())
        run.record(step, lr, sums)
        if step.ends_epoch:
            gradients.settle()
            run.log(step, **evaluate(model, solution))
        checkpoints.save_if_due(step, sums, plan)
    return run.finish(gradients.buckets, runtime.check_in_sync(model, topology.groups), model.bubbles())


def main() -> None:
    """Command line entry: conf/linear_regression.yaml plus key=value overrides."""
    command_line.run(train, "linear_regression", runtime)


if __name__ == "__main__":
    main()
