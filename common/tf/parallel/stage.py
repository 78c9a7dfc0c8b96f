"""The layers of a rank: the whole model, or one stage of a pipeline."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

from common.config.schema import ParallelConfig, PipelineConfig, PrecisionConfig, StageBalance
from common.data.datasets.examples import Examples
from common.distributed.timing import median_seconds
from common.distributed.topology import Topology
from common.parallel import model_parts
from common.parallel.rank_schedule import RankSchedule
from common.tf.distributed import runtime
from common.tf.models.mixed_precision import build_model

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state


class Stage:
    """The layers of one rank, by their numbers in the whole model.

    Args:
        layers: the layers of the whole model, which must have been called.
        ranges: for each model chunk, the numbers of its layers.
        precision: the dtypes.
        rank_schedule: this rank's pipeline schedule.

    Attributes:
        layers: the layers of the whole model; weights of other stages have no values.
        chunks: this rank's model chunks by number; each has consecutive layers.
        num_chunks: number of chunks of the whole model.
        shapes: for each chunk of the whole model, the output shape of one example.
        dtype: the dtype of the chunks' outputs.
        trainable_variables: the trainable variables of this rank's layers.
        tied: for each variable that is shared with other stages: its number, and all ranks that have it.
        rank_schedule: this rank's pipeline schedule.
        topology: the place of this rank.
    """

    def __init__(
        self,
        layers: Sequence[keras.Layer],
        ranges: Sequence[range],
        precision: PrecisionConfig,
        rank_schedule: RankSchedule,
    ) -> None:
        topology = rank_schedule.topology
        self.layers, self.num_chunks, self.topology, self.rank_schedule = (
            list(layers),
            len(ranges),
            topology,
            rank_schedule,
        )
        self.dtype: str = precision.dtype.name
        self.chunks: dict[int, keras.Model] = {
            number: _chunk_model([layers[place] for place in ranges[number]], number, precision)
            for number in range(topology.stage, len(ranges), topology.num_stages)
        }
        self.shapes = [tuple(layers[of_chunk[-1]].output.shape[1:]) for of_chunk in ranges]
        self.trainable_variables = _distinct(chunk.trainable_variables for chunk in self.chunks.values())
        holders: dict[int, dict[int, None]] = {}
        for chunk, of_chunk in enumerate(ranges):
            for variable in _distinct(layers[place].trainable_variables for place in of_chunk):
                holders.setdefault(id(variable), {})[chunk % topology.num_stages] = None
        self.tied = [
            (number, topology.ranks_with_tied_weights(list(holders[id(variable)])))
            for number, variable in enumerate(self.trainable_variables)
            if len(holders[id(variable)]) > 1
        ]
        self._compiled: dict[Hashable, Any] = {}
        self._times = [0.0, 0.0]

    def __call__(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The outputs of a model that is not cut."""
        (chunk,) = self.chunks.values()
        return chunk(inputs, training=training)

    @property
    def weights(self) -> list[keras.Variable]:
        """All weights of this rank's layers, trainable or not."""
        return _distinct(chunk.weights for chunk in self.chunks.values())

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """The non-trainable variables of this rank's layers, such as the state of dropout."""
        return _distinct(chunk.non_trainable_variables for chunk in self.chunks.values())

    def compiled_chunk(self, number: int, training: bool) -> Callable[[tf.Tensor], tf.Tensor]:
        """The compiled forward pass of a model chunk, for any number of examples."""
        chunk = self.chunks[number]
        (inputs,) = chunk.inputs
        signature = [tf.TensorSpec(inputs.shape, inputs.dtype)]
        return self._compiled_once((number, training), partial(chunk, training=training), input_signature=signature)

    def compiled_loss(
        self, loss_sum: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    ) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
        """The compiled forward pass of the last chunk and the loss: (inputs, targets) -> sum of the losses."""

        def forward(inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
            return loss_sum(self.chunks[self.num_chunks - 1](inputs, training=True), targets)

        return self._compiled_once(loss_sum, forward, reduce_retracing=True)

    def _compiled_once(self, key: Hashable, function: Callable[..., tf.Tensor], **options: Any) -> Any:
        if key not in self._compiled:
            self._compiled[key] = tf.function(function, **options)
        return self._compiled[key]

    def add_times(self, seconds: float, waited: float) -> None:
        """Adds the seconds of a step on this rank, and the seconds that it waited for other ranks."""
        self._times = [self._times[0] + seconds, self._times[1] + waited]

    def bubble_report(self) -> dict[str, Any]:
        """The idle fraction of each stage, for the summary; all ranks must call it."""
        return self.rank_schedule.bubble_report(runtime.allgather_object(self._times))


def build_stage(
    layers: Sequence[keras.Layer],
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    topology: Topology,
    examples: Examples,
) -> Stage:
    """Cuts a model and initialises the weights of this rank's layers; all ranks must call it, with equal seeds.

    Args:
        layers: the layers of the whole model, in order.
        parallel: how the model is cut.
        precision: the dtypes.
        topology: the place of this rank.
        examples: a dataset; one example is passed through the layers if costs must be measured.

    Raises:
        ConfigError: the model cannot be cut as configured.
    """
    inputs = runtime.to_tensor(examples.get_batch(np.arange(1))[0], precision)
    build_on_meta(layers, inputs)
    numels = [layer.count_params() for layer in layers]
    costs: Sequence[float] = numels
    if isinstance(parallel, PipelineConfig) and parallel.balance is not StageBalance.parameters:
        is_flops = parallel.balance is StageBalance.flops
        costs = runtime.broadcast_object(measured_costs(layers, inputs, _flops if is_flops else _seconds))
    ranges = model_parts.cut(parallel, topology.num_stages, numels, costs)
    return Stage(layers, ranges, precision, RankSchedule.from_config(parallel, topology))


def build_on_meta(layers: Sequence[keras.Layer], inputs: tf.Tensor) -> None:
    """Builds the layers on symbolic inputs: afterwards their weights have shapes, but no values and no memory.

    Keras keeps a list of such weights to initialise them later; the list is cleared. Its name is that of Keras 3.15.
    """
    with keras.StatelessScope(initialize_variables=False):
        outputs = keras.Input(inputs.shape[1:], dtype=inputs.dtype)
        for layer in layers:
            outputs = layer(outputs)
    global_state.set_global_attribute("uninitialized_variables", [])


def _chunk_model(layers: Sequence[keras.Layer], number: int, precision: PrecisionConfig) -> keras.Model:
    """A model chunk of consecutive layers; initialises their weights as in the whole model.

    An initializer draws its seed when its layer is created, so the weights do not depend on the cut.
    """
    for layer in layers:
        for variable in layer.weights:
            if variable._value is None:
                variable._deferred_initialize()
    first = layers[0].input
    inputs = keras.Input(first.shape[1:], dtype=precision.dtype.name if number else first.dtype)
    return build_model(inputs, layers, precision)


def _distinct(groups: Iterable[Sequence[keras.Variable]]) -> list[keras.Variable]:
    """The variables of all groups, without duplicates."""
    return list({id(variable): variable for group in groups for variable in group}.values())


def measured_costs(
    layers: Sequence[keras.Layer], inputs: tf.Tensor, measure: Callable[[keras.Layer, tf.Tensor], float]
) -> list[float]:
    """The cost of each layer; inputs are those of the first layer."""
    costs = []
    for layer in layers:
        costs.append(measure(layer, inputs))
        inputs = _outputs(layer, inputs, _values(layer))
    return costs


def _values(layer: keras.Layer) -> list[tf.Tensor]:
    """The values of the layer's trainable weights; if it has none yet, new values that it does not keep."""
    return [tf.convert_to_tensor(variable.value) for variable in layer.trainable_variables]


def _outputs(layer: keras.Layer, inputs: tf.Tensor, weights: Sequence[tf.Tensor]) -> tf.Tensor:
    others = [variable.value for variable in layer.non_trainable_variables]
    return layer.stateless_call(weights, others, inputs)[0]


def _flops(layer: keras.Layer, inputs: tf.Tensor) -> float:
    """Floating-point operations of the matrix products and convolutions in forward."""
    forward = tf.function(partial(_outputs, layer)).get_concrete_function(inputs, _values(layer))
    return float(sum(flops_of_product(operation) for operation in forward.graph.get_operations()))


def flops_of_product(operation: tf.Operation) -> int:
    """Floating-point operations of a product: two for each multiplied pair of values; 0 for other operations."""
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
    """Seconds of forward and backward."""
    weights = _values(layer)
    ends = [inputs, *weights] if inputs.dtype.is_floating else weights

    @tf.function
    def step() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(ends)
            outputs = _outputs(layer, inputs, weights)
        return tape.gradient(outputs, ends)

    return median_seconds(step)
