"""Least squares by distributed gradient descent, in PyTorch: the recipe to read first.

    horovodrun -np 2 python -m recipes.linear_regression_torch
    horovodrun -np 3 python -m recipes.linear_regression_torch data.num_features=100 data.noise=1.0
    horovodrun -np 2 python -m recipes.linear_regression_torch train.global_batch_size=100 optimizer.lr=0.05

At every step each rank computes the gradient of its part of the examples, the parts are summed over the ranks, and all
take the same step. After the default 100 steps the weights agree with the closed-form solution to 1e-6, at any -np.
Its twin recipes/linear_regression_tf.py has the same functions and reads the same conf/linear_regression.yaml.
"""

from typing import Any

from common import command_line
from common.checkpoint import Checkpoints
from common.config import LinearRegressionConfig
from common.datasets import linear
from common.learning_rate import learning_rate
from common.run import Run, new_folder
from common.sharding import Plan
from common.step_sums import StepSums
from common.torch import optimizers, runtime
from common.torch.auto import choose_compression
from common.torch.checkpoint import State
from common.torch.gradients import Gradients
from common.torch.optimizers import Optimizer
from common.torch.parameter_server import build_gradients
from common.torch.pipeline import forward_backward
from common.torch.sharded import build_optimizer
from common.torch.stage import Stage, take_stage
from common.validation import validate

import numpy as np
import torch
from torch import Tensor, nn

RECIPE = "linear_regression_torch"


def build_layers(num_features: int) -> list[nn.Module]:
    """Layers in order: features (B, F) -> predictions (B, 1)."""
    layer = nn.Linear(num_features, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return [layer]


def sum_of_losses(predictions: Tensor, targets: Tensor) -> Tensor:
    """() half the squared errors of predictions (B, 1) and targets (B, 1), summed over the examples."""
    return (predictions - targets).square().sum() / 2


def train_step(
    model: Stage,
    optimizer: Optimizer,
    gradients: Gradients,
    inputs: Tensor,
    targets: Tensor,
    global_size: int,
    cfg: LinearRegressionConfig,
) -> StepSums:
    """One optimizer step; returns the global batch's mean loss and what else travelled with the gradients."""
    sums = forward_backward(model, sum_of_losses, inputs, targets, global_size, gradients)
    gradients.clip_global_norm(cfg.train.clip_norm)
    optimizers.step(optimizer, sums)
    return sums


@torch.no_grad()
def evaluate(model: nn.Module, solution: np.ndarray) -> dict[str, float]:
    """Distance between the weights and the closed-form solution, relative to the solution's length."""
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()]).cpu().double().numpy()
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
    device = runtime.device(topology)
    model = take_stage(build_layers(cfg.data.num_features), cfg, topology, train_set)
    optimizer = build_optimizer(cfg, model)
    cfg.compression = choose_compression(cfg, model, train_set, topology)
    gradients = build_gradients(cfg, model, optimizer)
    checkpoints = Checkpoints(cfg, RECIPE, train_set.fingerprint, State(model, optimizer, gradients), runtime, topology)
    plan = Plan.of(cfg, len(train_set), topology, checkpoints.restore())

    run = Run(cfg, RECIPE, plan, runtime)
    for step, batch in run.steps(train_set):
        lr = learning_rate(step, cfg)
        optimizers.set_learning_rate(optimizer, lr)
        inputs, targets = runtime.to_tensors(batch, cfg.precision, device)
        sums = train_step(model, optimizer, gradients, inputs, targets, step.global_size, cfg)
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
