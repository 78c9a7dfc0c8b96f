"""What a checkpoint holds of a Keras model and its optimizer, in PyTorch's names and layouts."""

from collections.abc import Mapping, Sequence

from common.checkpoint import check_names_and_shapes
from common.compression import SUMMED
from common.tf import optimizers, runtime
from common.tf.gradients import Gradients

import horovod.tensorflow as hvd
import keras
import numpy as np

_LEAVES = {"kernel": "weight", "gamma": "weight", "embeddings": "weight", "beta": "bias"}  # Keras' -> PyTorch's
# Keras keeps a kernel's outputs last, PyTorch first: by number of dimensions, how Keras' axes lie in PyTorch's.
_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


class State:
    """The weights of a model, the state of its optimizer and of its gradients, by the names of common/checkpoint.py."""

    def __init__(self, model: keras.Model, optimizer: keras.Optimizer, gradients: Gradients) -> None:
        self._model, self._optimizer, self._gradients = model, optimizer, gradients

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of the weights; those of layer i of the model are named i.<...>."""
        return _copies(self._model, self._model.trainable_variables)

    def moments(self) -> dict[str, np.ndarray]:
        """Copies of the optimizer's state."""
        arrays = {
            f"{name}.{moment}": array
            for moment, variables in optimizers.moments(self._optimizer).items()
            for name, array in _copies(self._model, variables).items()
        }
        if isinstance(self._optimizer, optimizers.AdamW):
            arrays["num_updates"] = np.array(self._optimizer.iterations.numpy(), np.float32)
        return arrays

    def gradients(self) -> dict[str, np.ndarray]:
        """What the gradients keep, summed over the ranks where each has its own; to be called by all ranks."""
        arrays = {"counters": self._gradients.counters.numpy()}
        for kind, by_index in self._gradients.state().items():
            for index, tensor in by_index.items():
                if kind in SUMMED:
                    tensor = hvd.allreduce(tensor, name=f"state.{kind}.{index}", op=hvd.Sum)
                name, axes = self._place(kind, index)
                arrays[f"{name}.{kind}"] = np.ascontiguousarray(tensor.numpy().transpose(axes))
        return arrays

    def load(
        self,
        new_weights: Mapping[str, np.ndarray],
        new_moments: Mapping[str, np.ndarray],
        new_gradients: Mapping[str, np.ndarray],
    ) -> None:
        """Takes over weights, and the optimizer's and the gradients' state as far as they suit these.

        Raises:
            ConfigError: they are those of another model.
        """
        load_weights(self._model, new_weights)
        self._load_gradients(new_gradients)
        if not new_moments:
            return
        left = dict(new_moments)
        self._optimizer.iterations.assign(int(left.pop("num_updates", 0)))
        check_names_and_shapes({name: array.shape for name, array in self.moments().items() if name in left}, left)
        for moment, variables in optimizers.moments(self._optimizer).items():
            ending = f".{moment}"
            arrays = {name.removesuffix(ending): array for name, array in left.items() if name.endswith(ending)}
            _load(self._model, variables, arrays)

    def broadcast(self) -> None:
        """Gives all ranks what rank 0 has; of what is summed, each rank its share."""
        kept = [*self._gradients.variables, self._gradients.counters]
        runtime.broadcast_state(self._model, self._optimizer, kept)
        share = self._gradients.share_of_state
        self._gradients.load(
            {
                kind: {index: tensor.numpy() * (share if kind in SUMMED else 1) for index, tensor in by_index.items()}
                for kind, by_index in self._gradients.state().items()
            }
        )

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
        variable = self._model.trainable_variables[index]
        axes = _axes(variable) if kind in SUMMED else None
        return names(self._model)[index], axes or tuple(range(2 if kind not in SUMMED else len(variable.shape)))


def load_weights(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over the weights of a checkpoint.

    Raises:
        ConfigError: they are those of another model.
    """
    _load(model, model.trainable_variables, arrays)


def names(model: keras.Model) -> list[str]:
    """The names of the trainable variables in a checkpoint: number of the layer, sublayers, weight or bias."""
    places = {layer.name: number for number, layer in enumerate(model.layers)}
    by_name = []
    for variable in model.trainable_variables:
        layer, *inner, leaf = variable.path.removeprefix(f"{model.name}/").split("/")
        by_name.append(".".join([str(places[layer]), *inner, _LEAVES.get(leaf, leaf)]))
    return by_name


def _load(model: keras.Model, variables: Sequence[keras.Variable], arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over arrays into variables that lie as the trainable ones do."""
    check_names_and_shapes({name: array.shape for name, array in _copies(model, variables).items()}, arrays)
    for name, trained, variable in zip(names(model), model.trainable_variables, variables, strict=True):
        axes = _axes(trained)
        variable.assign(arrays[name] if axes is None else arrays[name].transpose(np.argsort(axes)))


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
