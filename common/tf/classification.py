"""Loss and evaluation of recipes that tell classes apart."""

from common import sharding
from common.config import RunConfig
from common.datasets.examples import Examples
from common.tf import runtime
from common.tf.pipeline import forward
from common.tf.stage import Stage
from common.topology import Topology

import tensorflow as tf

EVALUATION_BATCH = 1024


def sum_of_losses(logits: tf.Tensor, targets: tf.Tensor, class_weights: tf.Tensor | None = None) -> tf.Tensor:
    """() cross-entropy of logits (B, classes) and targets (B,), summed over the examples."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    if class_weights is not None:
        losses *= tf.gather(class_weights, targets)
    return tf.reduce_sum(losses)


def evaluate(model: Stage, examples: Examples, topology: Topology, cfg: RunConfig) -> dict[str, float]:
    """Loss and accuracy on all examples; each is counted once, on one rank."""
    loss = correct = count = 0.0
    for part in sharding.evaluation_batches(len(examples), EVALUATION_BATCH, topology):
        inputs, targets = runtime.to_tensors(examples.take(part), cfg.precision)
        logits, targets = forward(model, inputs, targets)
        loss += float(sum_of_losses(logits, targets))
        correct += float(tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == targets, tf.int32)))
        count += len(targets)
    loss, correct, count = runtime.sum_over_ranks(loss, correct, count)
    return {"test_loss": loss / count, "test_accuracy": correct / count}
