"""Least squares by distributed gradient descent, in Keras 3 on TensorFlow: the recipe to read first.

    horovodrun -np 2 python -m recipes.linear_regression_tf
    horovodrun -np 3 python -m recipes.linear_regression_tf data.num_features=100 data.noise=1.0
    horovodrun -np 2 python -m recipes.linear_regression_tf train.global_batch_size=100 optimizer.lr=0.05

At every step, each rank computes the gradient for its part of the examples, these gradients are summed over the ranks,
and all ranks make the same update. After the default 100 steps the weights agree with the closed-form solution to 1e-6,
at any -np. recipes/linear_regression_torch.py is the same recipe in PyTorch, with the same functions and the same
conf/linear_regression.yaml.
"""

from collections.abc import Callable
from typing import Any

from common.config.schema import LinearRegressionConfig
from common.config.validation import validate
from common.data.datasets import linear
from common.data.sampler import TrainingSampler
from common.gradients.step_metrics import StepMetrics
from common.tf.distributed import runtime
from common.tf.distributed.runtime import Optimizer
from common.tf.gradients import optimizers
from common.tf.gradients.autotune import choose_compression
from common.tf.gradients.gradients import Gradients
from common.tf.models import mixed_precision
from common.tf.parallel.parameter_server import build_gradients
from common.tf.parallel.pipeline import compiled, forward_backward
from common.tf.parallel.sharded import build_optimizer
from common.tf.parallel.stage import Stage, build_stage
from common.tf.training.checkpoint import State
from common.training import command_line, preemption, provenance
from common.training.checkpoint import Checkpoints
from common.training.lr_schedule import learning_rate
from common.training.run_log import RunLog, new_folder

import keras
import numpy as np
import tensorflow as tf

RECIPE = "linear_regression_tf"


def build_layers() -> list[keras.Layer]:
    """Layers in order: features (B, F) -> predictions (B, 1)."""
    return [keras.layers.Dense(1, kernel_initializer="zeros")]


def loss_sum(predictions: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Half the squared errors () of predictions (B, 1) and targets (B, 1), summed over the examples."""
    return tf.reduce_sum(tf.square(predictions - targets)) / 2


def make_train_step(
    model: Stage,
    optimizer: Optimizer,
    gradients: Gradients,
    cfg: LinearRegressionConfig,
) -> Callable[..., StepMetrics]:
    """Returns the step, compiled where possible: (inputs, targets, global_size, stop) -> StepMetrics."""

    @gradients.compiled
    def update(grads: list[tf.Tensor], loss: tf.Tensor, stop: tf.Tensor, share: tf.Tensor) -> StepMetrics:
        """The part of a step after backward: exchanges and clips the gradients, and updates the weights."""
        sums, grads = gradients.exchange(grads, loss, stop, share)
        grads = gradients.clip_global_norm(grads, cfg.train.clip_norm)
        optimizers.apply(optimizer, grads, model, sums)
        return sums

    def train_step(inputs: tf.Tensor, targets: tf.Tensor, global_size: tf.Tensor, stop: tf.Tensor) -> StepMetrics:
        """One optimizer step; returns its metrics, such as the mean loss over the global batch."""
        loss, grads = forward_backward(model, loss_sum, inputs, targets, global_size, gradients.loss_scale)
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
    """Runs the whole training; returns the contents of summary.json."""
    topology = runtime.init()
    with runtime.raise_on_all_ranks():
        topology = validate(cfg, topology)
    train_set = linear.load(cfg.data, cfg.seed)
    solution = train_set.least_squares()
    runtime.check_alike(provenance.facts(cfg, train_set.fingerprint))
    cfg.run.dir = runtime.broadcast_object(new_folder(cfg, RECIPE))

    runtime.seed(cfg.seed, topology)
    mixed_precision.set_policy(cfg.precision)
    model = build_stage(build_layers(), cfg, topology, train_set)
    optimizer = build_optimizer(cfg, model)
    cfg.compression = choose_compression(cfg, model, train_set, topology)
    gradients = build_gradients(cfg, model, optimizer)
    checkpoints = Checkpoints(cfg, RECIPE, train_set.fingerprint, State(model, optimizer, gradients), runtime, topology)
    plan = TrainingSampler.from_config(cfg, len(train_set), topology, checkpoints.restore())
    train_step = make_train_step(model, optimizer, gradients, cfg)

    run = RunLog(cfg, RECIPE, plan, runtime)
    for step, batch in run.steps(train_set):
        lr = learning_rate(step, cfg)
        optimizers.set_learning_rate(optimizer, lr)
        inputs, targets = runtime.to_tensors(batch, cfg.precision)
        sums = train_step(inputs, targets, step.global_size, preemption.requested())
        run.record(step, lr, sums)
        if step.ends_epoch:
            gradients.sync_weights()
            run.log(step, **evaluate(model, solution))
        checkpoints.save_if_due(step, sums, plan)
    return run.finish(gradients.buckets, runtime.assert_weights_in_sync(model, topology.groups), model.bubble_report())


def main() -> None:
    """Command line entry: conf/linear_regression.yaml plus key=value overrides."""
    command_line.run(train, "linear_regression", runtime)


if __name__ == "__main__":
    main()
