"""What a checkpoint holds of a Keras model and its optimizer, in PyTorch's names and layouts."""

from collections.abc import Mapping, Sequence

from common.array_exchange import Arrays
from common.checkpoint import check_names_and_shapes, of_all_stages, of_this_stage
from common.compression import SUMMED
from common.tf import optimizers, runtime
from common.tf.gradients import Gradients
from common.tf.sharded import ShardedOptimizer
from common.tf.stage import Stage

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

_LEAVES = {"kernel": "weight", "gamma": "weight", "embeddings": "weight", "beta": "bias"}  # Keras' -> PyTorch's
# Keras keeps a kernel's outputs last, PyTorch first: by number of dimensions, how Keras' axes lie in PyTorch's.
_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


class State:
    """The weights of a model, the state of its optimizer and of its gradients, by the names of common/checkpoint.py."""

    def __init__(self, stage: Stage, optimizer: keras.Optimizer | ShardedOptimizer, gradients: Gradients) -> None:
        self._stage, self._optimizer, self._gradients = stage, optimizer, gradients

    def weights(self) -> Arrays:
        """Those of layer i of the model are named i.<...>."""
        self._gradients.settle()
        weights = _copies(self._stage, self._stage.trainable_variables)
        return of_all_stages(weights, self._stage.topology, runtime.exchange_arrays)

    def moments(self) -> Arrays:
        """The optimizer's state."""
        return of_all_stages(self._moments(), self._stage.topology, runtime.exchange_arrays)

    def gradients(self) -> Arrays:
        """What the gradients keep, summed over the ranks where each has its own."""
        state = self._gradients.state()
        kept = {(kind, index): tensor for kind, tensors in state.items() for index, tensor in tensors.items()}
        summed = {place: tensor for place, tensor in kept.items() if place[0] in SUMMED}
        if summed:
            process_set = runtime.process_set(self._stage.topology.group)
            flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in summed.values()], axis=0)
            flat = hvd.allreduce(flat, name="state.summed", op=hvd.Sum, process_set=process_set)
            parts = tf.split(flat, [tensor.shape.num_elements() for tensor in summed.values()])
            kept |= {place: tf.reshape(part, kept[place].shape) for place, part in zip(summed, parts, strict=True)}
        arrays = {"counters": self._gradients.counters.numpy()}
        for (kind, index), tensor in kept.items():
            name, axes = self._place(kind, index)
            arrays[f"{name}.{kind}"] = np.ascontiguousarray(tensor.numpy().transpose(axes))
        return of_all_stages(arrays, self._stage.topology, runtime.exchange_arrays)

    def load(self, new_weights: Arrays, new_moments: Arrays, new_gradients: Arrays) -> None:
        """Takes over weights, and the optimizer's and the gradients' state as far as they suit these.

        Raises:
            ConfigError: they are those of another model.
        """
        everyones_names = runtime.gather_json(names(self._stage))
        new_weights, new_moments, new_gradients = (
            of_this_stage(arrays, everyones_names, self._stage.topology, runtime.exchange_arrays)
            for arrays in (new_weights, new_moments, new_gradients)
        )
        num_updates = int(new_moments.get("num_updates", 0))
        if isinstance(self._optimizer, ShardedOptimizer):
            with runtime.joint_check():
                moments = self._in_order(new_moments)
            self._optimizer.load_moments(moments, num_updates)
        if not self._stage.topology.leads_group:
            return
        load_weights(self._stage, new_weights)
        self._load_gradients(new_gradients)
        if not new_moments or isinstance(self._optimizer, ShardedOptimizer):
            return
        self._optimizer.iterations.assign(num_updates)
        for moment, values in self._in_order(new_moments).items():
            for variable, value in zip(optimizers.moments(self._optimizer)[moment], values, strict=True):
                variable.assign(value)

    def broadcast(self) -> None:
        """Gives the ranks with a stage what the first of them has; of what is summed, each its share."""
        kept = [*self._gradients.variables, self._gradients.counters]
        runtime.broadcast_state(self._stage, self._optimizer, kept, self._stage.topology.group)
        share = self._gradients.share_of_state
        self._gradients.load(
            {
                kind: {index: tensor.numpy() * (share if kind in SUMMED else 1) for index, tensor in by_index.items()}
                for kind, by_index in self._gradients.state().items()
            }
        )

    def _moments(self) -> dict[str, np.ndarray]:
        """The optimizer's state for this rank's layers; of a sharded one only rank 0 has it."""
        is_sharded, inner = isinstance(self._optimizer, ShardedOptimizer), _inner(self._optimizer)
        arrays = {
            f"{name}.{moment}": array
            for moment, tensors in (self._optimizer.moments() if is_sharded else optimizers.moments(inner)).items()
            for name, array in _copies(self._stage, tensors).items()
        }
        if isinstance(inner, optimizers.AdamW):
            arrays["num_updates"] = np.array(inner.iterations.numpy(), np.float32)
        return arrays

    def _in_order(self, arrays: Arrays) -> dict[str, list[np.ndarray]]:
        """The optimizer's state of a checkpoint, in the order and the layout of the variables; of {} there is none.

        Raises:
            ConfigError: it is that of another model.
        """
        left = {name: array for name, array in arrays.items() if name != "num_updates"}
        if not left:
            return {}
        of_weights = _copies(self._stage, self._stage.trainable_variables)
        moments = list(optimizers.moments(_inner(self._optimizer)))
        wanted = {f"{name}.{moment}": array.shape for moment in moments for name, array in of_weights.items()}
        check_names_and_shapes(wanted, left)
        return {
            moment: _in_layout(self._stage, [left[f"{name}.{moment}"] for name in of_weights]) for moment in moments
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
        self._gradients.set_counters(*arrays["counters"])

    def _place(self, kind: str, index: int) -> tuple[str, tuple[int, ...]]:
        """The name of a variable, and how the axes of its state of a kind lie in PyTorch's."""
        variable, is_factor = self._stage.trainable_variables[index], kind == "factor"
        axes = None if is_factor else _axes(variable)
        return names(self._stage)[index], axes or tuple(range(2 if is_factor else len(variable.shape)))


def load_weights(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over the weights of a checkpoint.

    Raises:
        ConfigError: they are those of another model.
    """
    _load(model, model.trainable_variables, arrays)


def names(model: keras.Model) -> list[str]:
    """The names of the trainable variables in a checkpoint: number of the layer, sublayers, weight or bias.

    One that two layers share has the name of the first.
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
    """Takes over arrays into variables that lie as the trainable ones do."""
    check_names_and_shapes({name: array.shape for name, array in _copies(model, variables).items()}, arrays)
    values = _in_layout(model, [arrays[name] for name in names(model)])
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _in_layout(model: keras.Model, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays in PyTorch's layout, in the order of the trainable variables, as these lie."""
    axes = map(_axes, model.trainable_variables)
    return [
        array if order is None else array.transpose(np.argsort(order))
        for array, order in zip(arrays, axes, strict=True)
    ]


def _inner(optimizer: keras.Optimizer | ShardedOptimizer) -> keras.Optimizer | None:
    """Keras' optimizer; of a sharded one that of this rank's piece, if it has one."""
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.piece and optimizer.piece.optimizer
    return optimizer


def _copies(model: keras.Model, variables: Sequence[keras.Variable]) -> dict[str, np.ndarray]:
    """Variables that lie as the trainable ones do, as arrays in PyTorch's layout."""
    arrays = {}
    for name, trained, variable in zip(names(model), model.trainable_variables, variables, strict=True):
        axes = _axes(trained)
        array = variable.numpy()
        arrays[name] = np.ascontiguousarray(array if axes is None else array.transpose(axes))
    return arrays


def _axes(variable: keras.Variable) -> tuple[int, ...] | None:
    return _AXES.get(len(variable.shape)) if variable.path.endswith("/kernel") else None
