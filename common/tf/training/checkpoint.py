"""The state of a Keras model and its optimizer for a checkpoint, in PyTorch's names and layouts."""

from collections.abc import Mapping, Sequence

from common.distributed.array_exchange import Arrays
from common.gradients.compression import RANK_LOCAL_STATE
from common.gradients.gradient_sync import Counters
from common.tf.distributed import runtime
from common.tf.gradients import optimizers
from common.tf.parallel.parameter_server import Sync
from common.tf.parallel.sharded import ShardedOptimizer
from common.tf.parallel.stage import Stage
from common.training.checkpoint import check_names_and_shapes, of_all_stages, of_this_stage

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

_LEAVES = {"kernel": "weight", "gamma": "weight", "embeddings": "weight", "beta": "bias"}  # Keras' -> PyTorch's
# The output axis of a kernel is the last in Keras, the first in PyTorch: number of dimensions -> transposition.
_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


class State:
    """The state of a model, its optimizer and its gradients: the State of common/training/checkpoint.py.

    Args:
        stage: the model.
        optimizer: its optimizer.
        gradients: sums its gradients.
        on_all_ranks: whether all ranks get copies of the state, not only rank 0; only without stages.
    """

    def __init__(
        self,
        stage: Stage,
        optimizer: keras.Optimizer | ShardedOptimizer,
        gradients: Sync,
        on_all_ranks: bool = False,
    ) -> None:
        self._stage, self._optimizer, self._gradients = stage, optimizer, gradients
        self._on_all_ranks, self._has_copies = on_all_ranks, on_all_ranks or stage.topology.leads_group

    def weights(self) -> Arrays:
        """The weights by name; names of layer i of the model begin with "i."."""
        self._gradients.sync_weights()
        weights = _copies(self._stage, self._stage.trainable_variables) if self._has_copies else {}
        return of_all_stages(weights, self._stage.topology, runtime.exchange_arrays)

    def optimizer_state(self) -> Arrays:
        """The optimizer's state by name, on rank 0."""
        is_sharded = isinstance(self._optimizer, ShardedOptimizer)  # whose ranks must all take part
        arrays = self._optimizer_state() if self._has_copies or is_sharded else {}
        return of_all_stages(arrays, self._stage.topology, runtime.exchange_arrays)

    def gradients(self) -> Arrays:
        """The state of compressors and the loss scale, on rank 0; rank-local states as sums over the ranks."""
        self._gradients.gather_state()
        state = self._gradients.state()
        tensors_of = {(kind, index): tensor for kind, tensors in state.items() for index, tensor in tensors.items()}
        summed = {place: tensor for place, tensor in tensors_of.items() if place[0] in RANK_LOCAL_STATE}
        if summed:
            process_set = runtime.process_set(self._stage.topology.group)
            flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in summed.values()], axis=0)
            flat = hvd.allreduce(flat, name="state.summed", op=hvd.Sum, process_set=process_set)
            parts = tf.split(flat, [tensor.shape.num_elements() for tensor in summed.values()])
            tensors_of |= {
                place: tf.reshape(part, tensors_of[place].shape) for place, part in zip(summed, parts, strict=True)
            }
        arrays = {"counters": np.array(self._gradients.counters(), np.float64)}
        for (kind, index), tensor in tensors_of.items() if self._has_copies else ():
            name, axes = self._place(kind, index)
            arrays[f"{name}.{kind}"] = np.ascontiguousarray(tensor.numpy().transpose(axes))
        return of_all_stages(arrays, self._stage.topology, runtime.exchange_arrays)

    def load(self, new_weights: Arrays, new_optimizer_state: Arrays, new_gradients: Arrays) -> None:
        """Loads weights and the state of the optimizer; states of the gradients only where their shapes match.

        Raises:
            ConfigError: the arrays belong to another model.
        """
        everyones_names = runtime.allgather_object(names(self._stage))
        new_weights, new_optimizer_state, new_gradients = (
            of_this_stage(arrays, everyones_names, self._stage.topology, runtime.exchange_arrays)
            for arrays in (new_weights, new_optimizer_state, new_gradients)
        )
        num_updates = int(new_optimizer_state.get("num_updates", 0))
        if isinstance(self._optimizer, ShardedOptimizer):
            with runtime.raise_on_all_ranks():
                optimizer_state = self._in_order(new_optimizer_state)
            self._optimizer.load_optimizer_state(optimizer_state, num_updates)
        if not self._stage.topology.leads_group:
            return
        load_weights(self._stage, new_weights)
        self._load_gradients(new_gradients)
        if not new_optimizer_state or isinstance(self._optimizer, ShardedOptimizer):
            return
        self._optimizer.iterations.assign(num_updates)
        for kind, values in self._in_order(new_optimizer_state).items():
            for variable, value in zip(optimizers.optimizer_state(self._optimizer)[kind], values, strict=True):
                variable.assign(value)

    def broadcast(self) -> None:
        """Copies the state from the first rank of each stage to its other ranks; splits sums of rank-local states."""
        runtime.broadcast_state(self._stage, self._optimizer, self._gradients.variables, self._stage.topology.group)
        fraction = self._gradients.local_state_fraction
        self._gradients.load(
            {
                kind: {
                    index: tensor.numpy() * (fraction if kind in RANK_LOCAL_STATE else 1)
                    for index, tensor in by_index.items()
                }
                for kind, by_index in self._gradients.state().items()
            }
        )

    def _optimizer_state(self) -> dict[str, np.ndarray]:
        """The optimizer's state for this rank's layers; that of a sharded optimizer for all of them."""
        inner = _inner(self._optimizer)
        if isinstance(self._optimizer, ShardedOptimizer):
            state = self._optimizer.optimizer_state(self._on_all_ranks)
        else:
            state = optimizers.optimizer_state(inner)
        arrays = {
            f"{name}.{kind}": array
            for kind, tensors in state.items()
            for name, array in _copies(self._stage, tensors).items()
        }
        if isinstance(inner, optimizers.AdamW):
            arrays["num_updates"] = np.array(inner.iterations.numpy(), np.float32)
        return arrays

    def _in_order(self, arrays: Arrays) -> dict[str, list[np.ndarray]]:
        """The optimizer's state of a checkpoint, in the order and the layout of the variables; {} for {}.

        Raises:
            ConfigError: the state belongs to another model.
        """
        left = {name: array for name, array in arrays.items() if name != "num_updates"}
        if not left:
            return {}
        of_weights = _copies(self._stage, self._stage.trainable_variables)
        optimizer_state = list(optimizers.optimizer_state(_inner(self._optimizer)))
        wanted = {f"{name}.{kind}": array.shape for kind in optimizer_state for name, array in of_weights.items()}
        check_names_and_shapes(wanted, left)
        return {
            kind: _in_layout(self._stage, [left[f"{name}.{kind}"] for name in of_weights]) for kind in optimizer_state
        }

    def _load_gradients(self, arrays: Mapping[str, np.ndarray]) -> None:
        state = {}
        for kind, by_index in self._gradients.state().items():
            state[kind] = {index: tensor.numpy() for index, tensor in by_index.items()}
            for index, array in state[kind].items():
                name, axes = self._place(kind, index)
                new = arrays.get(f"{name}.{kind}")
                if new is not None and new.transpose(np.argsort(axes)).shape == array.shape:
                    state[kind][index] = new.transpose(np.argsort(axes))
        self._gradients.load(state)
        self._gradients.set_counters(Counters(*arrays["counters"].tolist()))  # older ones have three

    def _place(self, kind: str, index: int) -> tuple[str, tuple[int, ...]]:
        """The name of a variable, and the transposition of its state to PyTorch's layout."""
        variable, is_factor = self._stage.trainable_variables[index], kind == "factor"
        axes = None if is_factor else _axes(variable)
        return names(self._stage)[index], axes or tuple(range(2 if is_factor else len(variable.shape)))


def load_weights(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Loads the weights of a checkpoint into a model.

    Raises:
        ConfigError: the weights belong to another model.
    """
    _load(model, model.trainable_variables, arrays)


def names(model: keras.Model) -> list[str]:
    """The names of the trainable variables in a checkpoint: number of the layer, sublayers, weight or bias.

    A variable that several layers share has its name in the first of them.
    """
    by_variable: dict[int, str] = {}
    for number, layer in enumerate(model.layers):
        for variable in layer.trainable_variables:
            if id(variable) not in by_variable:
                path = variable.path.split("/")
                *inner, leaf = path[path.index(layer.name) + 1 :]
                by_variable[id(variable)] = ".".join([str(number), *inner, _LEAVES.get(leaf, leaf)])
    return [by_variable[id(variable)] for variable in model.trainable_variables]


def _load(model: keras.Model, variables: Sequence[keras.Variable], arrays: Mapping[str, np.ndarray]) -> None:
    """Loads arrays into variables that have the order and layout of the trainable ones."""
    check_names_and_shapes({name: array.shape for name, array in _copies(model, variables).items()}, arrays)
    values = _in_layout(model, [arrays[name] for name in names(model)])
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _in_layout(model: keras.Model, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Converts arrays from PyTorch's layout to that of the trainable variables, whose order they have."""
    axes = map(_axes, model.trainable_variables)
    return [
        array if order is None else array.transpose(np.argsort(order))
        for array, order in zip(arrays, axes, strict=True)
    ]


def _inner(optimizer: keras.Optimizer | ShardedOptimizer) -> keras.Optimizer | None:
    """Keras' optimizer; for a sharded optimizer, that of this rank's partition, or None."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.partition and optimizer.partition.optimizer
    return optimizer


def _copies(model: keras.Model, variables: Sequence[keras.Variable]) -> dict[str, np.ndarray]:
    """Copies variables, in the order and layout of the trainable ones, to arrays in PyTorch's layout."""
    arrays = {}
    for name, trained, variable in zip(names(model), model.trainable_variables, variables, strict=True):
        axes = _axes(trained)
        array = variable.numpy()
        arrays[name] = np.ascontiguousarray(array if axes is None else array.transpose(axes))
    return arrays


def _axes(variable: keras.Variable) -> tuple[int, ...] | None:
    return _AXES.get(len(variable.shape)) if variable.path.endswith("/kernel") else None
