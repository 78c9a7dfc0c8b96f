"""What a checkpoint holds of a PyTorch model and its optimizer."""

from collections.abc import Mapping

from common.array_exchange import Arrays
from common.checkpoint import check_names_and_shapes, of_all_stages, of_this_stage
from common.compression import SUMMED
from common.torch import optimizers, runtime
from common.torch.gradients import Gradients
from common.torch.sharded import ShardedOptimizer
from common.torch.stage import Stage

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn


class State:
    """The weights of a model, the state of its optimizer and of its gradients, by the names of common/checkpoint.py."""

    def __init__(self, stage: Stage, optimizer: torch.optim.Optimizer | ShardedOptimizer, gradients: Gradients) -> None:
        self._stage, self._optimizer, self._gradients = stage, optimizer, gradients

    def weights(self) -> Arrays:
        """Those of layer i of the model are named i.<...>."""
        self._gradients.settle()
        return self._of_all_stages(weights(self._stage))

    def moments(self) -> Arrays:
        """The optimizer's state."""
        if isinstance(self._optimizer, ShardedOptimizer):
            return self._optimizer.moments()
        return self._of_all_stages(optimizers.moments(self._optimizer, self._stage))

    def gradients(self) -> Arrays:
        """What the gradients keep, summed over the ranks where each has its own."""
        kept = self._kept()
        summed = {name: tensor for name, tensor in kept.items() if name.endswith(SUMMED)}
        if summed:
            process_set = runtime.process_set(self._stage.topology.group)
            lengths = [tensor.numel() for tensor in summed.values()]
            flat = torch.cat([tensor.flatten() for tensor in summed.values()])
            flat = hvd.allreduce(flat, name="state.summed", op=hvd.Sum, process_set=process_set)
            kept |= {name: part.view_as(kept[name]) for name, part in zip(summed, flat.split(lengths), strict=True)}
        return self._of_all_stages(kept | {"counters": self._gradients.counters()})

    def load(self, new_weights: Arrays, new_moments: Arrays, new_gradients: Arrays) -> None:
        """Takes over weights, and the optimizer's and the gradients' state as far as they suit these.

        Raises:
            ConfigError: they are those of another model.
        """
        names = runtime.gather_json(list(weights(self._stage)))
        new_weights, new_moments, new_gradients = (
            of_this_stage(arrays, names, self._stage.topology, runtime.exchange_arrays)
            for arrays in (new_weights, new_moments, new_gradients)
        )
        if isinstance(self._optimizer, ShardedOptimizer):
            self._optimizer.load_moments(new_moments)
        if not self._stage.topology.leads_group:
            return
        load_weights(self._stage, new_weights)
        for name, tensor in self._kept().items():
            if name in new_gradients and new_gradients[name].shape == tensor.shape:
                tensor.copy_(torch.from_numpy(new_gradients[name]))
        self._gradients.set_counters(torch.from_numpy(new_gradients["counters"]))
        if new_moments and not isinstance(self._optimizer, ShardedOptimizer):
            _load(optimizers.moments(self._optimizer, self._stage), new_moments)
            if "num_updates" in new_moments:
                optimizers.set_num_updates(self._optimizer, float(new_moments["num_updates"]))

    def broadcast(self) -> None:
        """Gives the ranks with a stage what the first of them has; of what is summed, each its share."""
        kept, counters, group = self._kept(), self._gradients.counters(), self._stage.topology.group
        runtime.broadcast_state(self._stage, self._optimizer, [*kept.values(), counters], group)
        self._gradients.set_counters(counters)
        for name, tensor in kept.items():
            if name.endswith(SUMMED):
                tensor.mul_(self._gradients.share_of_state)

    def _kept(self) -> dict[str, Tensor]:
        """What this rank's compressors keep, such as 1.weight.residual."""
        names = list(weights(self._stage))
        return {
            f"{names[index]}.{name}": tensor
            for name, tensors in self._gradients.state().items()
            for index, tensor in tensors.items()
        }

    def _of_all_stages(self, tensors: Mapping[str, Tensor]) -> Arrays:
        """On rank 0 copies of what the first rank with each stage has."""
        topology = self._stage.topology
        return of_all_stages(_copies(tensors) if topology.leads_group else {}, topology, runtime.exchange_arrays)


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
