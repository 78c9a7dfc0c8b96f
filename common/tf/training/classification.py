"""Loss and evaluation of classification recipes."""

from common.config.schema import RunConfig
from common.data import sampler
from common.data.datasets.examples import Examples
from common.distributed.topology import Topology
from common.tf.distributed import runtime
from common.tf.parallel.pipeline import forward
from common.tf.parallel.stage import Stage

import tensorflow as tf

EVALUATION_BATCH = 1024


def loss_sum(logits: tf.Tensor, targets: tf.Tensor, class_weights: tf.Tensor | None = None) -> tf.Tensor:
    """The cross-entropy () of logits (B, classes) and targets (B,), summed over the examples."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    if class_weights is not None:
        losses *= tf.gather(class_weights, targets)
    return tf.reduce_sum(losses)


def evaluate(model: Stage, examples: Examples, topology: Topology, cfg: RunConfig) -> dict[str, float]:
    """Mean loss and accuracy over all examples; each example is counted once, on one rank."""
    loss = correct = count = 0.0
    for part in sampler.evaluation_batches(len(examples), EVALUATION_BATCH, topology):
        inputs, targets = runtime.to_tensors(examples.get_batch(part), cfg.precision)
        logits, targets = forward(model, inputs, targets)
        loss += float(loss_sum(logits, targets))
        correct += float(tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == targets, tf.int32)))
        count += len(targets)
    loss, correct, count = runtime.sum_over_ranks(loss, correct, count)
    return {"test_loss": loss / count, "test_accuracy": correct / count}
