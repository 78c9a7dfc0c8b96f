"""Gradients in flat buckets, summed over the replicas while backward still runs."""

from collections.abc import Callable, Sequence

from common import buckets
from common.step_sums import StepSums
from common.topology import Topology

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


def num_values(variables: Sequence[keras.Variable]) -> int:
    """Number of values in the gradients of all variables."""
    return sum(variable.value.shape.num_elements() for variable in variables)


def forward_backward(
    model: keras.Model,
    sum_of_losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    targets: tf.Tensor,
    num_micro_batches: int,
    global_size: tf.Tensor,
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Forward and backward, one micro-batch after another.

    Args:
        model: whose trainable variables are differentiated.
        sum_of_losses: (outputs, targets) -> sum over the examples, not their mean.
        inputs: (B, ...) this rank's examples of the step; B may be 0.
        targets: (B, ...)
        num_micro_batches: parts to cut the B examples into; they differ by one example at most.
        global_size: () number of examples of all ranks in this step.

    Returns:
        This rank's shares of the mean loss over the global batch and of its gradients: the shares of all ranks add up
        to them, whatever number of examples each rank has.
    """
    sizes = _part_sizes(tf.shape(inputs)[0], num_micro_batches)
    total = tf.zeros((), tf.float64)
    sums: list[tf.Tensor] = []
    for part_inputs, part_targets in zip(tf.split(inputs, sizes), tf.split(targets, sizes), strict=True):
        # The sums so far come first: otherwise all micro-batches run, and hold their activations, at the same time.
        with tf.control_dependencies(sums), tf.GradientTape() as tape:
            loss = sum_of_losses(model(_never_empty(part_inputs), training=True), _never_empty(part_targets))
            loss *= tf.cast(tf.shape(part_inputs)[0] > 0, loss.dtype) / tf.cast(global_size, loss.dtype)
        values = [variable.value for variable in model.trainable_variables]
        # That of a slice has no static shape, that of a gather is sparse.
        gradients = [
            tf.ensure_shape(tf.convert_to_tensor(gradient), value.shape)
            for gradient, value in zip(tape.gradient(loss, values), values, strict=True)
        ]
        sums = [a + b for a, b in zip(sums, gradients, strict=True)] if sums else gradients
        total += tf.cast(loss, tf.float64)
    return total, sums


def sum_over_replicas(
    gradients: Sequence[tf.Tensor], topology: Topology, bucket_bytes: int = buckets.BUCKET_BYTES
) -> list[tf.Tensor]:
    """The sums of the gradients over the replicas, one message per bucket.

    In a graph each bucket is sent off as soon as its gradients are there.
    """
    if topology.num_replicas == 1:
        return list(gradients)
    summed = list(gradients)
    for number, indices in enumerate(buckets.assign([_size(gradient) for gradient in gradients], bucket_bytes)):
        members = [gradients[index] for index in indices]
        flat = tf.concat([tf.reshape(member, [-1]) for member in members], axis=0)
        flat = hvd.allreduce(flat, name=f"gradients.{number}", op=hvd.Sum)
        parts = tf.split(flat, [member.shape.num_elements() for member in members])
        for index, member, part in zip(indices, members, parts, strict=True):
            summed[index] = tf.reshape(part, member.shape)
    return summed


def exchange(
    gradients: Sequence[tf.Tensor],
    topology: Topology,
    loss: tf.Tensor,
    stop: tf.Tensor,
    share: tf.Tensor,
    measure_noise: bool = False,
    bucket_bytes: int = buckets.BUCKET_BYTES,
) -> tuple[StepSums, list[tf.Tensor]]:
    """The sums of the gradients over the replicas, and scalars that travel with them.

    Args:
        gradients: of this rank's share of the global batch's mean loss.
        topology: whose replicas take part.
        loss: () this rank's share of the global batch's mean loss.
        stop: () bool, whether this rank was asked to stop.
        share: () this rank's share of the examples of the global batch; needed to measure the noise alone.
        measure_noise: also takes the squared norms that the gradient noise scale needs.
        bucket_bytes: largest size of a bucket of several gradients.
    """
    dtype = gradients[0].dtype
    zero = tf.zeros((), dtype)
    # The gradients are sums over this rank's examples, divided by the global batch's size.
    mean = tf.math.divide_no_nan(squared_norm(gradients), tf.cast(share, dtype) ** 2) if measure_noise else zero
    scalars = tf.stack([tf.cast(loss, dtype), tf.cast(stop, dtype), mean / topology.num_replicas, zero])
    # As the first gradient they travel in the bucket that backward finishes last.
    scalars, *summed = sum_over_replicas([scalars, *gradients], topology, bucket_bytes)
    loss, stop, local, _ = tf.unstack(scalars)
    return StepSums(loss, stop, local, squared_norm(summed) if measure_noise else zero), summed


def squared_norm(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """() the sum of the squares of all values."""
    return tf.add_n([tf.reduce_sum(tf.square(gradient)) for gradient in gradients])


def clip_global_norm(gradients: Sequence[tf.Tensor], max_norm: float) -> list[tf.Tensor]:
    """The gradients, scaled down to a global L2 norm of max_norm where theirs is larger; 0: as they are.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
    https://arxiv.org/abs/1211.5063 (algorithm 1)
    """
    if not max_norm:
        return list(gradients)
    norm = tf.linalg.global_norm(gradients)
    largest = tf.constant(max_norm, norm.dtype)
    scale = largest / tf.maximum(norm, largest)  # exactly 1 where nothing is to be clipped
    return [gradient * scale for gradient in gradients]


def _never_empty(examples: tf.Tensor) -> tf.Tensor:
    """The examples, or one of zeros where there are none: TensorFlow's convolutions fail without any (oneDNN)."""
    is_empty = tf.cast(tf.shape(examples)[0] == 0, tf.int32)
    return tf.pad(examples, [[0, is_empty], *[[0, 0]] * (len(examples.shape) - 1)])


def _size(tensor: tf.Tensor) -> int:
    """Bytes that the tensor takes."""
    return int(tensor.shape.num_elements() * tensor.dtype.size)


def _part_sizes(size: tf.Tensor, num_parts: int) -> tf.Tensor:
    """(num_parts,) int32 that add up to size and differ by one at most, larger ones first."""
    return size // num_parts + tf.cast(tf.range(num_parts) < size % num_parts, tf.int32)
