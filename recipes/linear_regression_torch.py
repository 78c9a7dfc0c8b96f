"""Least squares by distributed gradient descent, in PyTorch: the recipe to read first.

    horovodrun -np 2 python -m recipes.linear_regression_torch
    horovodrun -np 3 python -m recipes.linear_regression_torch data.num_features=100 data.noise=1.0
    horovodrun -np 2 python -m recipes.linear_regression_torch train.global_batch_size=100 optimizer.lr=0.05

A global batch of n examples has the mean loss L = (l_1 + ... + l_n) / n. Its gradient is a sum over the examples, and a
sum can be cut: with the examples of rank r in B_r,

    grad L = sum over the ranks of g_r,    g_r = (sum over i in B_r of grad l_i) / n

Each rank divides by n, the size of the global batch, and an allreduce gives every rank the sum of the g_r. With 10
examples on 3 ranks (4, 3 and 3 of them) that is exact, where the mean of the ranks' own means would count the examples
of the first rank too little: (1/4) / 3 = 1/12 each instead of 1/10.

So all ranks make the same update, and the loss curve is the same at any -np. After the default 100 steps the weights
agree with the closed-form solution to 1e-6. recipes/linear_regression_tf.py is the same recipe in Keras 3, with
the same functions and the same conf/linear_regression.yaml.
"""

from typing import Any

from common.config.schema import LinearRegressionConfig
from common.data.datasets import linear
from common.gradients.step_metrics import StepMetrics
from common.torch.engine import Batch, Engine
from common.torch.job import Job
from common.training import command_line
from common.training.lr_schedule import learning_rate

import numpy as np
import torch
from torch import Tensor, nn


def build_layers(num_features: int) -> list[nn.Module]:
    """Layers in order: features (B, F) -> predictions (B, 1)."""
    layer = nn.Linear(num_features, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return [layer]


def loss_sum(predictions: Tensor, targets: Tensor) -> Tensor:
    """Half the squared errors () of predictions (B, 1) and targets (B, 1), summed over the examples."""
    return (predictions - targets).square().sum() / 2


def train_step(engine: Engine, batch: Batch, cfg: LinearRegressionConfig) -> StepMetrics:
    """One optimizer step, the same on every rank; returns its metrics, such as the mean loss over the global batch."""
    engine.gradients.zero()
    # Each rank divides its sum by the size of the GLOBAL batch, so that the sum over the ranks is the exact mean.
    # The allreduce of each bucket of gradients starts while backward still runs.
    engine.forward_backward(loss_sum, batch.inputs, batch.targets, batch.global_size)
    metrics = engine.gradients.synchronize()  # waits for the allreduces
    engine.gradients.clip_norm(cfg.train.clip_norm)
    engine.step(metrics)
    return metrics


def distance(engine: Engine, solution: np.ndarray) -> float:
    """Distance between the weights and the closed-form solution, relative to the solution's length."""
    engine.gradients.sync_weights()  # parameter servers may hold newer ones
    weights = torch.cat([weight.flatten() for weight in engine.stage.parameters()]).detach().cpu().double().numpy()
    return float(np.linalg.norm(weights - solution) / np.linalg.norm(solution))


def train(cfg: LinearRegressionConfig) -> dict[str, Any]:
    """Runs the whole training; returns the contents of summary.json."""
    job = Job(cfg, __file__)  # starts Horovod; a bad configuration is refused by all ranks together
    train_set = job.load(linear.load, cfg.data, cfg.seed)
    solution = train_set.least_squares()
    engine = job.parallelize(build_layers(cfg.data.num_features), train_set)
    run = job.restore_or_broadcast(engine, train_set)  # a checkpoint, or rank 0's weights to all ranks

    for step, batch in run.batches():  # this rank's part of each global batch
        engine.set_learning_rate(learning_rate(step, cfg))
        metrics = train_step(engine, batch, cfg)
        run.record(step, metrics)
        if step.ends_epoch:
            run.log(step, test_distance=distance(engine, solution))
        run.save_if_due(step, metrics)  # also if a rank got SIGTERM
    return run.finish(engine.assert_weights_in_sync())


def main() -> None:
    """Command line entry: conf/linear_regression.yaml plus key=value overrides."""
    command_line.run(train)


if __name__ == "__main__":
    main()
