"""The state of a PyTorch model and its optimizer for a checkpoint."""

from collections.abc import Mapping

from common.distributed.array_exchange import Arrays
from common.gradients.compression import RANK_LOCAL_STATE
from common.gradients.gradient_sync import Counters, GradientSync
from common.torch.distributed import runtime
from common.torch.gradients import optimizers
from common.torch.parallel.sharded import ShardedOptimizer
from common.torch.parallel.stage import Stage
from common.training.checkpoint import check_names_and_shapes, of_all_stages, of_this_stage

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn


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
        optimizer: torch.optim.Optimizer | ShardedOptimizer,
        gradients: GradientSync,
        on_all_ranks: bool = False,
    ) -> None:
        self._stage, self._optimizer, self._gradients = stage, optimizer, gradients
        self._on_all_ranks, self._has_copies = on_all_ranks, on_all_ranks or stage.topology.leads_group

    def weights(self) -> Arrays:
        """The weights by name; names of layer i of the model begin with "i."."""
        self._gradients.sync_weights()
        return self._of_all_stages(weights(self._stage))

    def optimizer_state(self) -> Arrays:
        """The optimizer's state by name, on rank 0."""
        if isinstance(self._optimizer, ShardedOptimizer):
            return self._optimizer.optimizer_state(self._on_all_ranks)
        return self._of_all_stages(optimizers.optimizer_state(self._optimizer, self._stage))

    def gradients(self) -> Arrays:
        """The state of compressors and the loss scale, on rank 0; rank-local states as sums over the ranks."""
        self._gradients.gather_state()
        state = self._compressor_state()
        summed = {name: tensor for name, tensor in state.items() if name.endswith(RANK_LOCAL_STATE)}
        if summed:
            process_set = runtime.process_set(self._stage.topology.group)
            lengths = [tensor.numel() for tensor in summed.values()]
            flat = torch.cat([tensor.flatten() for tensor in summed.values()])
            flat = hvd.allreduce(flat, name="state.summed", op=hvd.Sum, process_set=process_set)
            state |= {name: part.view_as(state[name]) for name, part in zip(summed, flat.split(lengths), strict=True)}
        return self._of_all_stages(state | {"counters": self._counters()})

    def load(self, new_weights: Arrays, new_optimizer_state: Arrays, new_gradients: Arrays) -> None:
        """Loads weights and the state of the optimizer; states of the gradients only where their shapes match.

        Raises:
            ConfigError: the arrays belong to another model.
        """
        names = runtime.allgather_object(list(weights(self._stage)))
        new_weights, new_optimizer_state, new_gradients = (
            of_this_stage(arrays, names, self._stage.topology, runtime.exchange_arrays)
            for arrays in (new_weights, new_optimizer_state, new_gradients)
        )
        if isinstance(self._optimizer, ShardedOptimizer):
            self._optimizer.load_optimizer_state(new_optimizer_state)
        if not self._stage.topology.leads_group:
            return
        load_weights(self._stage, new_weights)
        for name, tensor in self._compressor_state().items():
            if name in new_gradients and new_gradients[name].shape == tensor.shape:
                tensor.copy_(torch.from_numpy(new_gradients[name]))
        self._gradients.set_counters(Counters(*new_gradients["counters"].tolist()))  # older ones have three
        if new_optimizer_state and not isinstance(self._optimizer, ShardedOptimizer):
            _load(optimizers.optimizer_state(self._optimizer, self._stage), new_optimizer_state)
            if "num_updates" in new_optimizer_state:
                optimizers.set_num_updates(self._optimizer, float(new_optimizer_state["num_updates"]))

    def broadcast(self) -> None:
        """Copies the state from the first rank of each stage to its other ranks; splits sums of rank-local states."""
        state, counters, group = self._compressor_state(), self._counters(), self._stage.topology.group
        runtime.broadcast_state(self._stage, self._optimizer, [*state.values(), counters], group)
        self._gradients.set_counters(Counters(*counters.tolist()))
        for name, tensor in state.items():
            if name.endswith(RANK_LOCAL_STATE):
                tensor.mul_(self._gradients.local_state_fraction)

    def _counters(self) -> Tensor:
        """(4,) float64, the counters of the gradients' steps."""
        return torch.tensor(self._gradients.counters(), dtype=torch.float64)

    def _compressor_state(self) -> dict[str, Tensor]:
        """The state of this rank's compressors by name, such as 1.weight.residual."""
        names = list(weights(self._stage))
        return {
            f"{names[index]}.{name}": tensor
            for name, tensors in self._gradients.state().items()
            for index, tensor in tensors.items()
        }

    def _of_all_stages(self, tensors: Mapping[str, Tensor]) -> Arrays:
        """Copies of the tensors of all stages on rank 0, from the first rank of each stage."""
        arrays = _copies(tensors) if self._has_copies else {}
        return of_all_stages(arrays, self._stage.topology, runtime.exchange_arrays)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name; a weight that several layers share has its name in the first of them."""
    return dict(model.named_parameters())


def load_weights(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Loads the weights of a checkpoint into a model.

    Raises:
        ConfigError: the weights belong to another model.
    """
    _load(weights(model), arrays)


@torch.no_grad()
def _load(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    check_names_and_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, arrays)
    for name, tensor in tensors.items():
        tensor.copy_(torch.from_numpy(arrays[name]))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
