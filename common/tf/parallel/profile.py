"""Profiles layers from their graphs of forward and backward: parameters, activation bytes, FLOPs."""

import math
from collections.abc import Callable, Sequence

from common.config.schema import PrecisionConfig
from common.parallel.cost_model import LayerProfile
from common.tf.distributed import runtime
from common.tf.models import mixed_precision as precisions
from common.tf.parallel.stage import build_on_meta, flops_of_product

import keras
import numpy as np
import tensorflow as tf

_ALIASES = ("ExpandDims", "Identity", "Reshape", "Squeeze")  # outputs share memory with inputs


def profile_layers(
    build: Callable[[], Sequence[keras.Layer]], inputs: np.ndarray, precision: PrecisionConfig
) -> list[LayerProfile]:
    """Profiles the layers of a model.

    Args:
        build: builds the layers, in order.
        inputs: (B, ...) a micro-batch, of which only shape and dtype matter.
        precision: the dtypes.
    """
    precisions.set_policy(precision)
    layers, spec = build(), tf.TensorSpec.from_tensor(runtime.to_tensor(inputs, precision))
    build_on_meta(layers, spec)
    facts = []
    for layer in layers:
        layer_facts, spec = _facts(layer, spec)
        facts.append(layer_facts)
    return facts


def _facts(layer: keras.Layer, inputs: tf.TensorSpec) -> tuple[LayerProfile, tf.TensorSpec]:
    """The profile of a layer, and the spec of its outputs."""
    forward: list[tf.Operation] = []
    kept: list[tf.Tensor] = []

    def pass_through(inputs: tf.Tensor, *weights: tf.Tensor) -> tf.Tensor:
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape, keras.StatelessScope(zip(layer.trainable_variables, weights, strict=True)):
            ends = [tensor for tensor in (inputs, *weights) if tensor.dtype.is_floating]
            tape.watch(ends)
            outputs = layer(inputs, training=True)
        forward.extend(graph.get_operations())
        tape.gradient(outputs, ends)
        kept.extend(_kept(forward, graph.get_operations()[len(forward) :], weights))
        return outputs

    weights = [tf.TensorSpec(weight.shape, weight.dtype) for weight in layer.trainable_variables]
    graph = tf.function(pass_through, autograph=False).get_concrete_function(inputs, *weights)
    (outputs,) = graph.outputs
    facts = LayerProfile(
        type(layer).__name__,
        {id(weight): math.prod(weight.shape) for weight in layer.trainable_variables},
        outputs.shape[1:].num_elements(),
        sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in kept),
        float(sum(map(flops_of_product, forward))),
    )
    return facts, tf.TensorSpec(outputs.shape, outputs.dtype)


def _kept(
    forward: Sequence[tf.Operation], backward: Sequence[tf.Operation], weights: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """The tensors of forward that backward uses, each once, without weights and constants."""
    names = {operation.name for operation in forward}
    used = [tensor for operation in backward for tensor in operation.inputs if tensor.op.name in names]
    sources = {source.name: source for source in map(_source, used)}
    weight_names = {weight.name for weight in weights}
    return [tensor for name, tensor in sources.items() if name not in weight_names and tensor.op.type != "Const"]


def _source(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor whose memory this tensor shares."""
    while tensor.op.type in _ALIASES:
        tensor = tensor.op.inputs[0]
    return tensor
