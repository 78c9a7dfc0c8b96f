"""Finds steps of an author's own whose gradients are not means over the rows of a batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from common.tf.script import checks, part, statistics

import keras
import tensorflow as tf

# How far the gradients of a batch may be from the means of those of its halves, as a fraction of the largest one.
TOLERANCE = {"float32": 5e-3, "float64": 5e-3, "float16": 5e-2, "bfloat16": 1e-1}
PYTHON_CALLS = ("PyFunc", "PyFuncStateless", "EagerPyFunc")


def has_own_code(model: keras.Model) -> bool:
    """Whether a step of a model may have a loss that is not a keras.Loss: what computes it is not Keras' own."""
    methods = (type(model).train_step, type(model).compute_loss)
    classes = [type(layer) for layer in model._flatten_layers() if layer is not model]
    return any(not each.__module__.startswith("keras.") for each in (*methods, *classes, type(model).call))


def is_of_whole_batch(
    step: Callable[[Any], Any], rows: Any, variables: Callable[[], Sequence[keras.Variable]], model: keras.Model
) -> tf.Tensor:
    """() bool, whether the gradients of this rank's rows are not the means of those of its halves.

    The optimizers get nothing, and all else that the step changes is put back. It is computed in the first step of an
    epoch only; else, and if the step draws numbers that cannot be drawn again, it is False.

    Args:
        step: takes rows, and calls optimizers.
        rows: this rank's rows.
        variables: all that the step may change; called before and after it, as it may create some.
        model: tells how exactly it computes.
    """
    of_step = part.current()
    if of_step is None or tf.executing_eagerly():
        return tf.constant(False)
    half = of_step.num_computed // 2

    def gradients(begin: tf.Tensor, end: tf.Tensor) -> list[tf.Tensor]:
        probed = dataclasses.replace(of_step, start=of_step.first + begin, num_rows=end - begin, recorded=[])
        before = statistics.values(variables())
        with part.working_on(probed):
            step(part.cut(rows, begin, end))
        statistics.put_back(variables(), before)
        return [tf.cast(gradient, tf.float32) for gradient in probed.recorded or []]

    def compare() -> tf.Tensor:
        whole = gradients(tf.constant(0), of_step.num_computed)
        halves = gradients(tf.constant(0), half), gradients(half, of_step.num_computed)
        graph = tf.compat.v1.get_default_graph()
        if not whole or any(each.graph is not graph for each in whole) or _draws_anew(graph):
            return tf.constant(False)
        fraction = tf.cast(half / of_step.num_computed, tf.float32)
        differences = [
            tf.reduce_max(tf.abs(value - first * fraction - second * (1 - fraction)))
            for value, first, second in zip(whole, *halves, strict=True)
        ]
        largest = tf.reduce_max([tf.reduce_max(tf.abs(value)) for value in whole])
        return tf.reduce_max(differences) > _tolerance(model) * largest

    return tf.cond(checks.is_first_step() & (half > 0), compare, lambda: tf.constant(False))


def _tolerance(model: keras.Model) -> float:
    return max(TOLERANCE.get(layer.compute_dtype, 0.0) for layer in model._flatten_layers())


def _draws_anew(graph: tf.Graph) -> bool:
    """Whether a graph has operations whose results are others each time: random ones with a state, and Python."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return any("seed2" in node.attr or node.op in PYTHON_CALLS or node.op.startswith("Rng") for node in nodes)
