"""compression=auto, measured in TensorFlow."""

from common import method_choice
from common.composition import option
from common.config import AutoCompressionConfig, CompressionConfig, RunConfig
from common.datasets.examples import Examples
from common.method_choice import PROBE_VALUES, Estimate, median_seconds
from common.step_sums import StepSums
from common.tf import runtime
from common.tf.gradients import Gradients
from common.topology import Topology

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf


def choose_compression(cfg: RunConfig, model: keras.Model, examples: Examples, topology: Topology) -> CompressionConfig:
    """The configured compression, or in its place what auto finds best; rank 0 prints why.

    Args:
        cfg: the configuration, with run.dir set.
        model: whose gradients are exchanged.
        examples: of which a step's forward and backward are timed.
        topology: whose replicas take part.
    """
    auto = cfg.compression
    if not isinstance(auto, AutoCompressionConfig):
        return auto
    name = runtime.from_rank_zero(method_choice.earlier(cfg))
    if name is None:
        compute = _mean_over_ranks(_compute_seconds(cfg, model, examples, topology))
        estimates = [_estimate(method, model, topology) for method in auto.candidates]
        latency, probe = (_mean_over_ranks(_allreduce_seconds(size)) for size in (1, PROBE_VALUES))
        if topology.rank == 0:
            print(method_choice.report(estimates, compute, latency, probe, auto.min_gain), flush=True)
        name = method_choice.best(estimates, compute, auto.min_gain).method
    chosen: CompressionConfig = option("compression", name)
    return chosen


def _compute_seconds(cfg: RunConfig, model: keras.Model, examples: Examples, topology: Topology) -> float:
    batch = examples.take(np.arange(max(1, cfg.train.global_batch_size // topology.num_replicas)))
    inputs = runtime.to_tensor(batch[0], cfg.precision)
    weights = [variable.value for variable in model.trainable_variables]

    @tf.function
    def forward_backward() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = tf.reduce_sum(model(inputs, training=True))
        return tape.gradient(outputs, weights)

    return median_seconds(forward_backward)


def _estimate(method: str, model: keras.Model, topology: Topology) -> Estimate:
    shapes = [variable.shape for variable in model.trainable_variables]
    noise = [tf.random.normal(shape) for shape in shapes]
    gradients = Gradients(shapes, topology, compression=option("compression", method))

    @tf.function
    def exchange() -> tuple[StepSums, list[tf.Tensor]]:
        return gradients.exchange(noise, tf.zeros(()), tf.constant(False), tf.zeros(()))

    return Estimate(method, _mean_over_ranks(median_seconds(exchange)), sum(map(float, exchange()[0].wire_bytes)))


def _allreduce_seconds(num_values: int) -> float:
    values = tf.zeros(num_values)
    return median_seconds(lambda: hvd.allreduce(values, name=f"probe.{num_values}", op=hvd.Sum))


def _mean_over_ranks(value: float) -> float:
    """The same on all ranks, so that all choose alike."""
    return runtime.sum_over_ranks(value)[0] / hvd.size()
