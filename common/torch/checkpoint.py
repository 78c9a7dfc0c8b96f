"""What a checkpoint holds of a PyTorch model and its optimizer."""

from collections.abc import Mapping

from common.checkpoint import check_names_and_shapes
from common.torch import optimizers, runtime

import numpy as np
import torch
from torch import Tensor, nn


class State:
    """The weights of a model and the state of its optimizer, by the names of common/checkpoint.py."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of the weights; those of layer i of the model are named i.<...>."""
        return _copies(weights(self._model))

    def moments(self) -> dict[str, np.ndarray]:
        """Copies of the optimizer's state."""
        return _copies(optimizers.moments(self._optimizer, self._model))

    def load(self, new_weights: Mapping[str, np.ndarray], new_moments: Mapping[str, np.ndarray]) -> None:
        """Takes over weights, and the optimizer's state where there is one.

        Raises:
            ConfigError: they are those of another model.
        """
        load_weights(self._model, new_weights)
        if new_moments:
            _load(optimizers.moments(self._optimizer, self._model), new_moments)
            if "num_updates" in new_moments:
                optimizers.set_num_updates(self._optimizer, float(new_moments["num_updates"]))

    def broadcast(self) -> None:
        """Gives all ranks rank 0's weights and optimizer state."""
        runtime.broadcast_state(self._model, self._optimizer)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name; one that two layers share has the name of the first."""
    return dict(model.named_parameters())


def load_weights(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over the weights of a checkpoint.

    Raises:
        ConfigError: they are those of another model.
    """
    _load(weights(model), arrays)


@torch.no_grad()
def _load(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    check_names_and_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, arrays)
    for name, tensor in tensors.items():
        tensor.copy_(torch.from_numpy(arrays[name]))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
