"""Least squares by distributed gradient descent, in PyTorch: the recipe to read first.

    horovodrun -np 2 python -m recipes.linear_regression_torch
    horovodrun -np 3 python -m recipes.linear_regression_torch data.num_features=100 data.noise=1.0
    horovodrun -np 2 python -m recipes.linear_regression_torch train.global_batch_size=100 optimizer.lr=0.05

At every step, each rank computes the gradient for its part of the examples, these gradients are summed over the ranks,
and all ranks make the same update. After the default 100 steps the weights agree with the closed-form solution to 1e-6,
at any -np. recipes/linear_regression_tf.py is the same recipe in Keras 3, with the same functions and the same
conf/linear_regression.yaml.
"""

from typing import Any

from common.config.schema import LinearRegressionConfig
from common.config.validation import validate
from common.data.datasets import linear
from common.data.sampler import TrainingSampler
from common.gradients.step_metrics import StepMetrics
from common.torch.distributed import runtime
from common.torch.distributed.runtime import Optimizer
from common.torch.gradients import optimizers
from common.torch.gradients.autotune import choose_compression
from common.torch.gradients.gradients import Gradients
from common.torch.parallel.parameter_server import build_gradients
from common.torch.parallel.pipeline import forward_backward
from common.torch.parallel.sharded import build_optimizer
from common.torch.parallel.stage import Stage, build_stage
from common.torch.training.checkpoint import State
from common.training import command_line, provenance
from common.training.checkpoint import Checkpoints
from common.training.lr_schedule import learning_rate
from common.training.run_log import RunLog, new_folder

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


def loss_sum(predictions: Tensor, targets: Tensor) -> Tensor:
    """Half the squared errors () of predictions (B, 1) and targets (B, 1), summed over the examples."""
    return (predictions - targets).square().sum() / 2


def train_step(
    model: Stage,
    optimizer: Optimizer,
    gradients: Gradients,
    inputs: Tensor,
    targets: Tensor,
    global_size: int,
    cfg: LinearRegressionConfig,
) -> StepMetrics:
    """One optimizer step; returns its metrics, such as the mean loss over the global batch."""
    sums = forward_backward(model, loss_sum, inputs, targets, global_size, gradients)
    gradients.clip_global_norm(cfg.train.clip_norm)
    optimizers.step(optimizer, sums)
    return sums


@torch.no_grad()
def evaluate(model: nn.Module, solution: np.ndarray) -> dict[str, float]:
    """Distance between the weights and the closed-form solution, relative to the solution's length."""
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()]).cpu().double().numpy()
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
    device = runtime.device(topology)
    model = build_stage(build_layers(cfg.data.num_features), cfg, topology, train_set)
    optimizer = build_optimizer(cfg, model)
    cfg.compression = choose_compression(cfg, model, train_set, topology)
    gradients = build_gradients(cfg, model, optimizer)
    checkpoints = Checkpoints(cfg, RECIPE, train_set.fingerprint, State(model, optimizer, gradients), runtime, topology)
    plan = TrainingSampler.from_config(cfg, len(train_set), topology, checkpoints.restore())

    run = RunLog(cfg, RECIPE, plan, runtime)
    for step, batch in run.steps(train_set):
        lr = learning_rate(step, cfg)
        optimizers.set_learning_rate(optimizer, lr)
        inputs, targets = runtime.to_tensors(batch, cfg.precision, device)
        sums = train_step(model, optimizer, gradients, inputs, targets, step.global_size, cfg)
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
