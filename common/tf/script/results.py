"""What a step returns and an epoch reports: values over the examples of all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from common.distributed.topology import Topology
from common.errors import ConfigError
from common.tf.script import part, statistics

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


class Origin(NamedTuple):
    """The metric that a returned value is the result of, and the value's number among those of the result."""

    metric: keras.Metric
    number: int


class Results:
    """The metrics of a model and what its steps return.

    Args:
        model: the model.
        topology: the place of this rank.
        additive: the author's classes of metrics whose variables begin at 0 and are sums over examples.
    """

    def __init__(self, model: keras.Model, topology: Topology, additive: Sequence[type[keras.Metric]]) -> None:
        self._model, self._topology, self._additive = model, topology, tuple(additive)
        self._origins: dict[str, Any] = {}  # of what the last traced step returned

    def check(self) -> None:
        """Checks that the metrics can be computed from sums over the ranks.

        Raises:
            ConfigError: a metric of the author's may not add up.
        """
        problems = [f"{metric.name} ({type(metric).__name__})" for metric in self._inner() if not self._adds_up(metric)]
        if problems:
            raise ConfigError(
                [
                    f"metrics that may not add up over the ranks: {', '.join(problems)}. If all their variables begin "
                    "at 0 and only have sums over examples added to them, pass distribute(additive=[the classes])."
                ]
            )

    def variables(self) -> list[keras.Variable]:
        """The variables of all metrics."""
        return [variable for metric in self._model.metrics for variable in metric.variables]

    def of_step(self, outputs: Any, recorded: Mapping[int, Origin]) -> Any:
        """A step's results: those of metrics as they are, the mean over the global batch of all other values."""
        if not isinstance(outputs, Mapping):
            return means(outputs)
        origins = keras.tree.map_structure(lambda value: recorded.get(id(value)), dict(outputs))
        self._origins = origins
        flat, known = keras.tree.flatten(dict(outputs)), _flat(origins)
        others = [value for value, origin in zip(flat, known, strict=True) if origin is None]
        self._check_underived(others)
        averaged = iter(keras.tree.flatten(means(others)))
        mixed = [value if origin else next(averaged) for value, origin in zip(flat, known, strict=True)]
        return keras.tree.pack_sequence_as(dict(outputs), mixed)

    @contextmanager
    def recording(self) -> Iterator[dict[int, Origin]]:
        """Notes which tensors are results of metrics, by their id."""
        recorded: dict[int, Origin] = {}
        kept: list[Any] = []  # an id is unique only among tensors that exist

        def record(metric: keras.Metric) -> None:
            plain = metric.result

            def result() -> Any:
                value = plain()
                for number, tensor in enumerate(keras.tree.flatten(value)):
                    recorded[id(tensor)] = Origin(metric, number)
                    kept.append(tensor)
                return value

            metric.result = result

        metrics = self._model.metrics
        for metric in metrics:
            record(metric)
        try:
            yield recorded
        finally:
            for metric in metrics:
                metric.__dict__.pop("result", None)

    def sum_metrics(self) -> None:
        """Sums the metrics' variables: each rank then has the state that one rank would have after all examples."""
        statistics.sum_variables(self.variables(), "script.metrics", self._topology)

    def of_epoch(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """What an epoch reports if its steps return other things than Keras' own: the last step's values."""

        def value(origin: Origin | None, of_last_step: Any) -> Any:
            if origin is None:
                return of_last_step
            return keras.tree.flatten(origin.metric.result())[origin.number]

        if set(self._origins) != set(logs):
            return dict(logs)
        flat = [
            value(origin, last) for origin, last in zip(_flat(self._origins), keras.tree.flatten(logs), strict=True)
        ]
        return dict(keras.tree.pack_sequence_as(dict(logs), flat))

    def _inner(self) -> list[keras.Metric]:
        """All metrics; those that were given to compile are in a container."""
        return [inner for metric in self._model.metrics for inner in getattr(metric, "metrics", [metric])]

    def _adds_up(self, metric: keras.Metric) -> bool:
        names = {variable.name for variable in metric.variables}
        is_a_sum = isinstance(metric, keras.metrics.Mean | keras.metrics.Sum) and names <= {"total", "count"}
        return is_a_sum or type(metric).__module__.startswith("keras.") or isinstance(metric, self._additive)

    def _check_underived(self, values: Sequence[Any]) -> None:
        """Raises a ConfigError for a value that is computed from a metric's result: it has no mean over a batch."""
        if tf.executing_eagerly():
            return
        graph = tf.compat.v1.get_default_graph()
        handles = {id(variable.value.handle) for variable in self.variables()}
        inside = {id(inner) for outer, inner in graph.captures if id(outer) in handles}
        for value in values:
            if tf.is_tensor(value) and _reaches(value, inside):
                raise ConfigError(
                    [
                        f"{value.name}: train_step and test_step may return metric.result(), or values of the batch, "
                        "but no value that is computed from metric.result(); add a metric that computes it"
                    ]
                )


def means(values: Any) -> Any:
    """The means over the global batch of values that are means over this rank's rows.

    Raises:
        ConfigError: a value is not a scalar or does not have a fixed shape.
    """
    of_step = part.current()
    tensors = [tf.convert_to_tensor(value) for value in keras.tree.flatten(values)]
    if of_step is None or not tensors:
        return values
    if any(tensor.shape.rank is None or tensor.shape.num_elements() is None for tensor in tensors):
        raise ConfigError(
            ["train_step, test_step: a step must return means over its examples, not a value for each example"]
        )
    flat = tf.concat([tf.reshape(tf.cast(tensor, tf.float64), [-1]) for tensor in tensors], 0)
    weighed = tf.math.multiply_no_nan(flat, of_step.share(tf.float64))
    total = hvd.allreduce(weighed, op=hvd.Sum, name="script.values")
    parts = tf.split(total, [tensor.shape.num_elements() for tensor in tensors])
    of_all = [
        tf.cast(tf.reshape(mean, tensor.shape), tensor.dtype) for mean, tensor in zip(parts, tensors, strict=True)
    ]
    return keras.tree.pack_sequence_as(values, of_all)


def _flat(origins: Any) -> list[Origin | None]:
    """The origins of a nest's values; an Origin is a tuple, which keras.tree would take apart."""
    if origins is None or isinstance(origins, Origin):
        return [origins]
    values = [origins[name] for name in sorted(origins)] if isinstance(origins, Mapping) else list(origins)
    return [origin for value in values for origin in _flat(value)]


def _reaches(tensor: tf.Tensor, targets: set[int]) -> bool:
    """Whether a tensor is computed from one of the tensors with these ids."""
    seen: set[str] = set()
    waiting = [tensor]
    while waiting:
        found = waiting.pop()
        if id(found) in targets:
            return True
        if found.op.name not in seen:
            seen.add(found.op.name)
            waiting += list(found.op.inputs)
    return False
