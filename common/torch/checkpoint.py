"""What a checkpoint holds of a PyTorch model and its optimizer."""

from collections.abc import Mapping

from common.checkpoint import check_names_and_shapes
from common.compression import SUMMED
from common.torch import optimizers, runtime
from common.torch.gradients import Gradients

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn


class State:
    """The weights of a model, the state of its optimizer and of its gradients, by the names of common/checkpoint.py."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
        self._model, self._optimizer, self._gradients = model, optimizer, gradients

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of the weights; those of layer i of the model are named i.<...>."""
        return _copies(weights(self._model))

    def moments(self) -> dict[str, np.ndarray]:
        """Copies of the optimizer's state."""
        return _copies(optimizers.moments(self._optimizer, self._model))

    def gradients(self) -> dict[str, np.ndarray]:
        """What the gradients keep, summed over the ranks where each has its own; to be called by all ranks."""
        kept = self._kept()
        summed = {name: tensor for name, tensor in kept.items() if name.endswith(SUMMED)}
        if summed:
            flat = torch.cat([tensor.flatten() for tensor in summed.values()])
            parts = hvd.allreduce(flat, name="state.summed", op=hvd.Sum).split(
                [len(t.flatten()) for t in summed.values()]
            )
            kept |= {name: part.view_as(kept[name]) for name, part in zip(summed, parts, strict=True)}
        return _copies(kept | {"counters": self._gradients.counters()})

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
        for name, tensor in self._kept().items():
            if name in new_gradients and new_gradients[name].shape == tensor.shape:
                tensor.copy_(torch.from_numpy(new_gradients[name]))
        self._gradients.set_counters(torch.from_numpy(new_gradients["counters"]))
        if new_moments:
            _load(optimizers.moments(self._optimizer, self._model), new_moments)
            if "num_updates" in new_moments:
                optimizers.set_num_updates(self._optimizer, float(new_moments["num_updates"]))

    def broadcast(self) -> None:
        """Gives all ranks what rank 0 has; of what is summed, each rank its share."""
        kept, counters = self._kept(), self._gradients.counters()
        runtime.broadcast_state(self._model, self._optimizer, [*kept.values(), counters])
        self._gradients.set_counters(counters)
        for name, tensor in kept.items():
            if name.endswith(SUMMED):
                tensor.mul_(self._gradients.share_of_state)

    def _kept(self) -> dict[str, Tensor]:
        """What this rank's compressors keep, such as 1.weight.residual."""
        names = list(weights(self._model))
        return {
            f"{names[index]}.{name}": tensor
            for name, tensors in self._gradients.state().items()
            for index, tensor in tensors.items()
        }


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
