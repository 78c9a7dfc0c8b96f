"""The layers of a model that a rank has: all of them, or one stage of a pipeline."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

from common import model_parts
from common.config import PipelineConfig, PrecisionConfig, RunConfig, StageBalance
from common.datasets.examples import Examples
from common.method_choice import median_seconds
from common.passage import Passage
from common.tf import runtime
from common.tf.precision import build_model
from common.tf.transfers import Transfers
from common.topology import Topology

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state


class Stage:
    """The layers of one rank, by their numbers in the whole model.

    Args:
        layers: of the whole model, which have been called.
        ranges: numbers of the layers of each part.
        precision: the dtypes.
        passage: how micro-batches pass through the parts.

    Attributes:
        layers: of the whole model; weights of other stages have no values.
        parts: of this rank by their numbers, consecutive layers each.
        num_parts: of the whole model.
        shapes: of one example as each part of the model puts it out.
        dtype: of what the parts put out.
        trainable_variables: of this rank's layers.
        tied: numbers of the trainable variables that other stages have, too, each with all ranks that have it.
        passage: how micro-batches pass through the parts.
        topology: whose stage it is.
        transfers: to and from ranks with other stages.
    """

    def __init__(
        self, layers: Sequence[keras.Layer], ranges: Sequence[range], precision: PrecisionConfig, passage: Passage
    ) -> None:
        topology = passage.topology
        self.layers, self.num_parts, self.topology, self.passage = list(layers), len(ranges), topology, passage
        self.dtype: str = precision.dtype.name
        self.parts: dict[int, keras.Model] = {
            number: _part([layers[place] for place in ranges[number]], number, precision)
            for number in range(topology.stage, len(ranges), topology.num_stages)
        }
        self.shapes = [tuple(layers[of_part[-1]].output.shape[1:]) for of_part in ranges]
        self.trainable_variables = _distinct(part.trainable_variables for part in self.parts.values())
        holders: dict[int, dict[int, None]] = {}
        for part, of_part in enumerate(ranges):
            for variable in _distinct(layers[place].trainable_variables for place in of_part):
                holders.setdefault(id(variable), {})[part % topology.num_stages] = None
        self.tied = [
            (number, topology.ranks_with_tied_weights(list(holders[id(variable)])))
            for number, variable in enumerate(self.trainable_variables)
            if len(holders[id(variable)]) > 1
        ]
        self.transfers = Transfers(topology.rank)
        self._compiled: dict[Hashable, Any] = {}
        self._times = [0.0, 0.0]

    def __call__(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The outputs of a model that is one part."""
        (part,) = self.parts.values()
        return part(inputs, training=training)

    @property
    def weights(self) -> list[keras.Variable]:
        """All weights of this rank's layers."""
        return _distinct(part.weights for part in self.parts.values())

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """What this rank's layers keep without gradients, such as the state of dropout."""
        return _distinct(part.non_trainable_variables for part in self.parts.values())

    def compiled_part(self, number: int, training: bool) -> Callable[[tf.Tensor], tf.Tensor]:
        """A part's forward pass, for any number of examples."""
        part = self.parts[number]
        (inputs,) = part.inputs
        signature = [tf.TensorSpec(inputs.shape, inputs.dtype)]
        return self._compiled_once((number, training), partial(part, training=training), input_signature=signature)

    def compiled_loss(
        self, sum_of_losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    ) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
        """The last part's forward pass and the losses: (inputs, targets) -> their sum."""

        def forward(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
            return sum_of_losses(self.parts[self.num_parts - 1](inputs, training=True), targets)

        return self._compiled_once(sum_of_losses, forward, reduce_retracing=True)

    def _compiled_once(self, key: Hashable, function: Callable[..., tf.Tensor], **options: Any) -> Any:
        if key not in self._compiled:
            self._compiled[key] = tf.function(function, **options)
        return self._compiled[key]

    def add_times(self, seconds: float, waited: float) -> None:
        """Counts what a step took on this rank, and how much of it was waiting for other ranks."""
        self._times = [self._times[0] + seconds, self._times[1] + waited]

    def bubbles(self) -> dict[str, Any]:
        """For the summary: the share of time that each stage had nothing to do; to be called by all ranks."""
        return self.passage.bubbles(runtime.gather_json(self._times))


def take_stage(layers: Sequence[keras.Layer], cfg: RunConfig, topology: Topology, examples: Examples) -> Stage:
    """Cuts a model and gives this rank's layers their weights; to be called by all ranks, with equal seeds.

    Args:
        layers: of the whole model, in order.
        cfg: how it is cut.
        topology: which stage this rank has.
        examples: one of which is passed through the layers, where their costs are measured.

    Raises:
        ConfigError: it cannot be cut like that.
    """
    inputs = runtime.to_tensor(examples.take(np.arange(1))[0], cfg.precision)
    declare(layers, inputs)
    numels = [layer.count_params() for layer in layers]
    costs: Sequence[float] = numels
    if isinstance(cfg.parallel, PipelineConfig) and cfg.parallel.balance is not StageBalance.parameters:
        is_flops = cfg.parallel.balance is StageBalance.flops
        costs = runtime.from_rank_zero(measured_costs(layers, inputs, _flops if is_flops else _seconds))
    ranges = model_parts.cut(cfg.parallel, topology.num_stages, numels, costs)
    return Stage(layers, ranges, cfg.precision, Passage.of(cfg.parallel, topology))


def declare(layers: Sequence[keras.Layer], inputs: tf.Tensor) -> None:
    """Calls the layers with nothing but shapes: their weights are known from here on, and take no memory yet.

    Keras would give all of them their values at the next opportunity; it is made to forget. Where it notes them is as
    in Keras 3.15.
    """
    with keras.StatelessScope(initialize_variables=False):
        outputs = keras.Input(inputs.shape[1:], dtype=inputs.dtype)
        for layer in layers:
            outputs = layer(outputs)
    global_state.set_global_attribute("uninitialized_variables", [])


def _part(layers: Sequence[keras.Layer], number: int, precision: PrecisionConfig) -> keras.Model:
    """Consecutive layers of the model with their weights, which are those that the whole model would have.

    An initializer has drawn its seed when its layer was made, and so does not depend on what else is made of them.
    """
    for layer in layers:
        for variable in layer.weights:
            if variable._value is None:
                variable._deferred_initialize()
    first = layers[0].input
    inputs = keras.Input(first.shape[1:], dtype=precision.dtype.name if number else first.dtype)
    return build_model(inputs, layers, precision)


def _distinct(groups: Iterable[Sequence[keras.Variable]]) -> list[keras.Variable]:
    """The variables of all groups, each once."""
    return list({id(variable): variable for group in groups for variable in group}.values())


def measured_costs(
    layers: Sequence[keras.Layer], inputs: tf.Tensor, measure: Callable[[keras.Layer, tf.Tensor], float]
) -> list[float]:
    """What each layer costs for the inputs of the first one."""
    costs = []
    for layer in layers:
        costs.append(measure(layer, inputs))
        inputs = _outputs(layer, inputs, _values(layer))
    return costs


def _values(layer: keras.Layer) -> list[tf.Tensor]:
    """The layer's trainable weights, or new ones of which it keeps nothing."""
    return [tf.convert_to_tensor(variable.value) for variable in layer.trainable_variables]


def _outputs(layer: keras.Layer, inputs: tf.Tensor, weights: Sequence[tf.Tensor]) -> tf.Tensor:
    others = [variable.value for variable in layer.non_trainable_variables]
    return layer.stateless_call(weights, others, inputs)[0]


def _flops(layer: keras.Layer, inputs: tf.Tensor) -> float:
    """Floating-point operations of products of matrices and of convolutions, forward."""
    forward = tf.function(partial(_outputs, layer)).get_concrete_function(inputs, _values(layer))
    return float(sum(flops_of_product(operation) for operation in forward.graph.get_operations()))


def flops_of_product(operation: tf.Operation) -> int:
    """Two for each pair of values that are multiplied."""
    if operation.type in ("MatMul", "BatchMatMulV2"):
        is_transposed = operation.get_attr("transpose_a" if operation.type == "MatMul" else "adj_x")
        depth = operation.inputs[0].shape[-2 if is_transposed else -1]
    elif operation.type == "Conv2D":
        depth = operation.inputs[1].shape[:-1].num_elements()
    elif operation.type == "Einsum":
        labels, _, left = operation.get_attr("equation").decode().partition("->")
        sizes = {
            label: size
            for own, each in zip(labels.split(","), operation.inputs, strict=True)
            for label, size in zip(own, each.shape, strict=True)
        }
        depth = math.prod(size for label, size in sizes.items() if label not in left)
    else:
        return 0
    return int(2 * depth * operation.outputs[0].shape.num_elements())


def _seconds(layer: keras.Layer, inputs: tf.Tensor) -> float:
    """Forward and backward."""
    weights = _values(layer)
    ends = [inputs, *weights] if inputs.dtype.is_floating else weights

    @tf.function
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(ends)
            outputs = _outputs(layer, inputs, weights)
        return tape.gradient(outputs, ends)

    return median_seconds(step)
