"""Handwritten digits with a convolutional network, in Keras 3 on TensorFlow.

    horovodrun -np 2 python -m recipes.mnist_cnn_tf
    horovodrun -np 2 python -m recipes.mnist_cnn_tf data=mnist train.checkpoint_every=100
    horovodrun -np 4 python -m recipes.mnist_cnn_tf data.balance=weight_loss model.dropout=0.3

Training images get small random shifts and rotations, the same for any -np. Test accuracy: README.md.
recipes/mnist_cnn_torch.py is the same recipe in PyTorch, with the same functions and the same conf/mnist_cnn.yaml.
"""

from functools import partial
from typing import Any

from common.config.schema import CNNConfig, MnistCNNConfig
from common.data import datasets
from common.gradients.step_metrics import StepMetrics
from common.tf.engine import Batch, Engine, Measure
from common.tf.job import Job
from common.tf.models.layers import gelu
from common.training import command_line
from common.training.lr_schedule import learning_rate

import keras
import tensorflow as tf

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


def loss_sum(logits: tf.Tensor, targets: tf.Tensor, class_weights: tf.Tensor | None = None) -> tf.Tensor:
    """The cross-entropy () of logits (B, 10) and targets (B,): a sum, as ranks may hold unequal numbers of examples."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    if class_weights is not None:
        losses *= tf.gather(class_weights, targets)
    return tf.reduce_sum(losses)


def num_correct(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The number () of examples whose class has the largest logit."""
    return tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == targets, tf.int32))


def train_step(engine: Engine, loss_function: Measure, batch: Batch, cfg: MnistCNNConfig) -> StepMetrics:
    """One optimizer step, the same on every rank; returns its metrics, such as the mean loss over the global batch."""
    engine.gradients.zero()
    # Each rank divides its sum by the size of the GLOBAL batch, so that the sum over the ranks is the exact mean.
    engine.forward_backward(loss_function, batch.inputs, batch.targets, batch.global_size)
    metrics = engine.gradients.synchronize()  # the allreduces, each as soon as backward has finished its gradients
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
    step_in_graph = engine.compile(lambda batch: train_step(engine, loss_function, batch, cfg))

    for step, batch in run.batches():  # this rank's part of each global batch
        engine.set_learning_rate(learning_rate(step, cfg))
        metrics = step_in_graph(batch)
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
