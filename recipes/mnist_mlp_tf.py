"""Handwritten digits with a multilayer perceptron, in Keras 3 on TensorFlow.

    horovodrun -np 2 python -m recipes.mnist_mlp_tf
    horovodrun -np 4 python -m recipes.mnist_mlp_tf data=mnist train.epochs=5
    horovodrun -np 2 python -m recipes.mnist_mlp_tf optimizer=adamw parallel.num_micro_batches=4

Test accuracy after the default 20 epochs of the 1,437 digits: 0.99, with the same loss at every step for any -np.
Its twin recipes/mnist_mlp_torch.py has the same functions and reads the same conf/mnist_mlp.yaml.
"""

from collections.abc import Callable
from typing import Any

from common import command_line, datasets, sharding
from common.config import MLPConfig, MnistMLPConfig
from common.learning_rate import learning_rate
from common.run import Run, new_folder
from common.tf import gradients, optimizers, runtime
from common.topology import Topology
from common.validation import validate

import keras
import tensorflow as tf

RECIPE = "mnist_mlp_tf"
EVALUATION_BATCH = 1024


def sum_of_losses(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Cross-entropy, summed over the examples."""
    return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))


def build_layers(cfg: MLPConfig) -> list[keras.Layer]:
    """Layers in order: images (B, 28, 28) in [0, 1] -> logits (B, 10).

    GELU (Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415) has no kink: by rounding alone, a ReLU near 0
    can be on in one layout and off in another, and their loss curves part.
    """
    hidden = [
        layer
        for width in cfg.hidden_sizes
        for layer in (keras.layers.Dense(width, "gelu"), keras.layers.Dropout(cfg.dropout))
    ]
    return [keras.layers.Flatten(), *hidden, keras.layers.Dense(10)]


def make_train_step(
    model: keras.Model, optimizer: keras.Optimizer, topology: Topology, cfg: MnistMLPConfig
) -> Callable[..., tf.Tensor]:
    """Returns the compiled step: (inputs, targets, global_size) -> loss."""

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, 28, 28), cfg.precision.dtype.name),
            tf.TensorSpec((None,), tf.int64),
            tf.TensorSpec((), tf.int32),
        ]
    )
    def train_step(inputs: tf.Tensor, targets: tf.Tensor, global_size: tf.Tensor) -> tf.Tensor:
        """One optimizer step; returns this rank's share of the global batch's mean loss."""
        loss, grads = gradients.forward_backward(
            model, sum_of_losses, inputs, targets, cfg.parallel.num_micro_batches, global_size
        )
        grads = gradients.sum_over_replicas(grads, topology)
        grads = gradients.clip_global_norm(grads, cfg.train.clip_norm)
        optimizer.apply(grads, model.trainable_variables)
        return loss

    return train_step


def evaluate(model: keras.Model, split: datasets.Split, topology: Topology, cfg: MnistMLPConfig) -> dict[str, float]:
    """Loss and accuracy on the whole split; each example is counted once, on one rank."""
    loss = correct = count = 0.0
    for part in sharding.evaluation_batches(len(split), EVALUATION_BATCH, topology):
        inputs, targets = runtime.to_tensors(split.take(part), cfg.precision)
        logits = model(inputs, training=False)
        loss += float(sum_of_losses(logits, targets))
        correct += float(tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == targets, tf.int32)))
        count += len(targets)
    loss, correct, count = runtime.sum_over_ranks(loss, correct, count)
    return {"test_loss": loss / count, "test_accuracy": correct / count}


def train(cfg: MnistMLPConfig) -> dict[str, Any]:
    """The whole run, callable from a test; returns what summary.json says."""
    topology = runtime.init()
    with runtime.joint_check():
        validate(cfg, topology)
        datasets.fetch(cfg.data, topology)
    with runtime.joint_check():
        train_split, test_split = datasets.load(cfg.data)
    cfg.run.dir = runtime.from_rank_zero(new_folder(cfg, RECIPE))

    runtime.seed(cfg.seed, topology)
    runtime.set_dtype(cfg.precision)
    model = keras.Sequential([keras.Input((28, 28)), *build_layers(cfg.model)])
    optimizer = optimizers.build(cfg.optimizer, model)
    runtime.broadcast_state(model, optimizer)
    train_step = make_train_step(model, optimizer, topology, cfg)

    plan = sharding.Plan.of(cfg, len(train_split), topology)
    run = Run(cfg, RECIPE, plan)
    for epoch in range(1, plan.total_epochs + 1):
        for step in run.track(plan.steps(epoch)):
            lr = learning_rate(step.number, plan.total_steps, cfg.optimizer.lr, cfg.lr_schedule)
            optimizers.set_learning_rate(optimizer, lr)
            inputs, targets = runtime.to_tensors(train_split.take(step.examples), cfg.precision)
            loss = train_step(inputs, targets, step.global_size)
            if run.is_log_due(step):
                (train_loss,) = runtime.sum_over_ranks(loss)
                run.log(step, lr=lr, train_loss=train_loss)
        run.log(step, **evaluate(model, test_split, topology, cfg))
    return run.finish(gradients.num_values(model.trainable_variables), runtime.check_in_sync(model))


def main() -> None:
    """Command line entry: conf/mnist_mlp.yaml plus key=value overrides."""
    command_line.run(train, "mnist_mlp", runtime)


if __name__ == "__main__":
    main()
