"""Handwritten digits with a convolutional network, in PyTorch.

    horovodrun -np 2 python -m recipes.mnist_cnn_torch
    horovodrun -np 2 python -m recipes.mnist_cnn_torch data=mnist train.checkpoint_every=100
    horovodrun -np 4 python -m recipes.mnist_cnn_torch data.balance=weight_loss model.dropout=0.3

Training images get small random shifts and rotations, the same for any -np. Test accuracy: README.md.
recipes/mnist_cnn_tf.py is the same recipe in Keras 3, with the same functions and the same conf/mnist_cnn.yaml.
"""

import itertools
from functools import partial
from typing import Any

from common.config.schema import CNNConfig, MnistCNNConfig
from common.data import datasets
from common.gradients.step_metrics import StepMetrics
from common.torch.engine import Batch, Engine, Measure
from common.torch.job import Job
from common.torch.models import layers
from common.training import command_line
from common.training.lr_schedule import learning_rate

from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8  # number of groups of channels; each group is normalised together


def build_layers(cfg: CNNConfig) -> list[nn.Module]:
    """Layers in order: images (B, 28, 28) in [0, 1] -> logits (B, 10).

    Group normalisation (Wu and He, 2018, https://arxiv.org/abs/1803.08494) normalises each example separately. Batch
    normalisation would depend on the examples of each rank, and so on the number of ranks. GELU and mean pooling are
    smooth, so that rounding alone does not make the loss curves of two layouts diverge.
    """
    convolutions = [
        layer
        for channels_in, channels_out in itertools.pairwise([1, *cfg.channels])
        for layer in (
            layers.convolution(channels_in, channels_out, 3),
            nn.GroupNorm(GROUPS, channels_out),
            nn.GELU(),
            nn.AvgPool2d(2),
        )
    ]
    side = 28 // 2 ** len(cfg.channels)
    return [
        nn.Unflatten(1, (1, 28)),
        *convolutions,
        layers.FlattenChannelsLast(),
        layers.dense(side * side * cfg.channels[-1], cfg.hidden_size),
        nn.GELU(),
        nn.Dropout(cfg.dropout),
        layers.dense(cfg.hidden_size, 10),
    ]


def loss_sum(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The cross-entropy () of logits (B, 10) and targets (B,): a sum, as ranks may hold unequal numbers of examples."""
    return F.cross_entropy(logits, targets, class_weights, reduction="sum")


def num_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """The number () of examples whose class has the largest logit."""
    return (logits.argmax(dim=-1) == targets).sum()


def train_step(engine: Engine, loss_function: Measure, batch: Batch, cfg: MnistCNNConfig) -> StepMetrics:
    """One optimizer step, the same on every rank; returns its metrics, such as the mean loss over the global batch."""
    engine.gradients.zero()
    # Each rank divides its sum by the size of the GLOBAL batch, so that the sum over the ranks is the exact mean.
    # The allreduce of each bucket of gradients starts while backward still runs.
    engine.forward_backward(loss_function, batch.inputs, batch.targets, batch.global_size)
    metrics = engine.gradients.synchronize()  # waits for the allreduces
    engine.gradients.clip_norm(cfg.train.clip_norm)
    engine.step(metrics)
    return metrics


def train(cfg: MnistCNNConfig) -> dict[str, Any]:
    """Runs the whole training; returns the contents of summary.json."""
    job = Job(cfg, __file__)  # starts Horovod; a bad configuration is refused by all ranks together
    images, test_set = job.load(datasets.load_images, cfg.data)
    train_set = datasets.Augmented(images, cfg.data, cfg.seed)
    engine = job.parallelize(build_layers(cfg.model), train_set)  # the whole model, a stage of it, or a server
    run = job.restore_or_broadcast(engine, train_set)  # a checkpoint, or rank 0's weights to all ranks
    loss_function = partial(loss_sum, class_weights=job.class_weights(train_set))

    for step, batch in run.batches():  # this rank's part of each global batch
        engine.set_learning_rate(learning_rate(step, cfg))
        metrics = train_step(engine, loss_function, batch, cfg)
        run.record(step, metrics)
        if step.ends_epoch:
            loss, accuracy = engine.allreduce_mean(test_set, loss_sum, num_correct)  # each example on one rank
            run.log(step, test_loss=loss, test_accuracy=accuracy)
        run.save_if_due(step, metrics)  # also if a rank got SIGTERM
    return run.finish(engine.assert_weights_in_sync())


def main() -> None:
    """Command line entry: conf/mnist_cnn.yaml plus key=value overrides."""
    command_line.run(train)


if __name__ == "__main__":
    main()
