"""Handwritten digits with a convolutional network, in Keras 3 on TensorFlow.

    horovodrun -np 2 python -m recipes.mnist_cnn_tf
    horovodrun -np 2 python -m recipes.mnist_cnn_tf data=mnist train.checkpoint_every=100
    horovodrun -np 4 python -m recipes.mnist_cnn_tf data.balance=weight_loss model.dropout=0.3

Training images get small random shifts and rotations, the same for any -np. Test accuracy: README.md.
recipes/mnist_cnn_torch.py is the same recipe in PyTorch, with the same functions and the same conf/mnist_cnn.yaml.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from common.config.schema import CNNConfig, MnistCNNConfig
from common.config.validation import validate
from common.data import datasets
from common.data.datasets.augment import Augmented
from common.data.datasets.balance import class_weights, drawn_classes
from common.data.sampler import TrainingSampler
from common.gradients.step_metrics import StepMetrics
from common.tf.distributed import runtime
from common.tf.distributed.runtime import Optimizer
from common.tf.gradients import optimizers
from common.tf.gradients.autotune import choose_compression
from common.tf.gradients.gradients import Gradients
from common.tf.models import mixed_precision
from common.tf.models.layers import gelu
from common.tf.parallel.parameter_server import build_gradients
from common.tf.parallel.pipeline import compiled, forward_backward
from common.tf.parallel.sharded import build_optimizer
from common.tf.parallel.stage import Stage, build_stage
from common.tf.training.checkpoint import State
from common.tf.training.classification import evaluate, loss_sum
from common.training import command_line, preemption, provenance
from common.training.checkpoint import Checkpoints
from common.training.lr_schedule import learning_rate
from common.training.run_log import RunLog, new_folder

import keras
import tensorflow as tf

RECIPE = "mnist_cnn_tf"
GROUPS = 8  # number of groups of channels; each group is normalised together


def build_layers(cfg: CNNConfig) -> list[keras.Layer]:
    """Layers in order: images (B, 28, 28) in [0, 1] -> logits (B, 10).

    Group normalisation (Wu and He, 2018, https://arxiv.org/abs/1803.08494) normalises each example separately. Batch
    normalisation would depend on the examples of each rank, and so on the number of ranks. GELU and mean pooling are
    smooth, so that rounding alone does not make the loss curves of two layouts diverge.
    """
    convolutions = [
        layer
        for channels in cfg.channels
        for layer in (
            keras.layers.Conv2D(channels, 3, padding="same"),
            keras.layers.GroupNormalization(GROUPS, epsilon=1e-5),
            keras.layers.Activation(gelu),
            keras.layers.AveragePooling2D(2),
        )
    ]
    return [
        keras.layers.Reshape((28, 28, 1)),
        *convolutions,
        keras.layers.Flatten(),
        keras.layers.Dense(cfg.hidden_size),
        keras.layers.Activation(gelu),
        keras.layers.Dropout(cfg.dropout),
        keras.layers.Dense(10),
    ]


def make_train_step(
    model: Stage,
    loss_function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    optimizer: Optimizer,
    gradients: Gradients,
    cfg: MnistCNNConfig,
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
        loss, grads = forward_backward(model, loss_function, inputs, targets, global_size, gradients.loss_scale)
        return update(grads, loss, stop, tf.shape(inputs)[0] / global_size)

    signature = [
        tf.TensorSpec((None, 28, 28), cfg.precision.dtype.name),
        tf.TensorSpec((None,), tf.int64),
        tf.TensorSpec((), tf.int32),
        tf.TensorSpec((), tf.bool),
    ]
    return compiled(model, train_step, signature)


def train(cfg: MnistCNNConfig) -> dict[str, Any]:
    """Runs the whole training; returns the contents of summary.json."""
    topology = runtime.init()
    with runtime.raise_on_all_ranks():
        topology = validate(cfg, topology)
        datasets.prepare(cfg.data, topology)
    with runtime.raise_on_all_ranks():
        images, test_set = datasets.load_images(cfg.data)
    train_set = Augmented(images, cfg.data, cfg.seed)
    runtime.check_alike(provenance.facts(cfg, train_set.fingerprint))
    cfg.run.dir = runtime.broadcast_object(new_folder(cfg, RECIPE))

    runtime.seed(cfg.seed, topology)
    mixed_precision.set_policy(cfg.precision)
    model = build_stage(build_layers(cfg.model), cfg, topology, images)
    optimizer = build_optimizer(cfg, model)
    cfg.compression = choose_compression(cfg, model, images, topology)
    gradients = build_gradients(cfg, model, optimizer)
    checkpoints = Checkpoints(cfg, RECIPE, train_set.fingerprint, State(model, optimizer, gradients), runtime, topology)
    plan = TrainingSampler.from_config(
        cfg, len(train_set), topology, checkpoints.restore(), drawn_classes(cfg.data, images)
    )
    weights = runtime.to_tensor(class_weights(cfg.data, images), cfg.precision)
    train_step = make_train_step(model, partial(loss_sum, class_weights=weights), optimizer, gradients, cfg)

    run = RunLog(cfg, RECIPE, plan, runtime)
    for step, batch in run.steps(train_set):
        lr = learning_rate(step, cfg)
        optimizers.set_learning_rate(optimizer, lr)
        runtime.seed_dropout(model, cfg.seed, topology, step.number)
        inputs, targets = runtime.to_tensors(batch, cfg.precision)
        sums = train_step(inputs, targets, step.global_size, preemption.requested())
        run.record(step, lr, sums)
        if step.ends_epoch:
            gradients.sync_weights()
            run.log(step, **evaluate(model, test_set, topology, cfg))
        checkpoints.save_if_due(step, sums, plan)
    return run.finish(gradients.buckets, runtime.assert_weights_in_sync(model, topology.groups), model.bubble_report())


def main() -> None:
    """Command line entry: conf/mnist_cnn.yaml plus key=value overrides."""
    command_line.run(train, "mnist_cnn", runtime)


if __name__ == "__main__":
    main()
