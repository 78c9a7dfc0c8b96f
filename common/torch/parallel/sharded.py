"""Sharded optimizers: all weights are one vector, and each rank updates one partition of it and keeps its state.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
https://arxiv.org/abs/1910.02054 (stage 1)
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from common.config.schema import OptimizerConfig
from common.distributed.array_exchange import Arrays
from common.errors import ConfigError, TrainingError
from common.gradients.compression import piece_size
from common.torch.distributed import runtime
from common.torch.gradients import optimizers
from common.torch.parallel.stage import Stage
from common.training.checkpoint import check_names_and_shapes

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn


class FlatWeights:
    """The weights as one matrix of K rows; matrices come first, because only they have weight decay.

    Args:
        weights: the weights by name; they become views of the rows.
        num_rows: number of rows, K.

    Attributes:
        rows: (K, P); the end is padded with 0.
        num_decaying: number of values that belong to matrices.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], num_rows: int) -> None:
        self._parameters = dict(sorted(weights.items(), key=lambda item: item[1].ndim < 2))
        values = list(self._parameters.values())
        self.num_decaying = sum(value.numel() for value in values if value.ndim >= 2)
        self._ends = list(accumulate(value.numel() for value in values))
        self.rows = values[0].detach().new_zeros(num_rows, piece_size(self._ends[-1], num_rows))
        for parameter, view in zip(values, self.views(self.rows).values(), strict=True):
            parameter.data = view.copy_(parameter.detach())

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of rows (K, P) for each parameter, by name and with its shape."""
        flat = rows.flatten()
        return {
            name: flat[end - parameter.numel() : end].view(parameter.shape)
            for end, (name, parameter) in zip(self._ends, self._parameters.items(), strict=True)
        }

    def without_gradient(self) -> list[str]:
        """The names of the parameters that have no gradient."""
        return [name for name, parameter in self._parameters.items() if parameter.grad is None]

    def gradients(self, row: int) -> Tensor:
        """The gradients (P,) of a row; 0 for parameters without one."""
        size = self.rows.shape[1]
        start, stop, parts = row * size, (row + 1) * size, []
        for end, parameter in zip(self._ends, self._parameters.values(), strict=True):
            first = end - parameter.numel()
            if first < stop and start < end:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parts.append(gradient.flatten()[max(0, start - first) : stop - first])
        return torch.cat([*parts, self.rows.new_zeros(max(0, stop - max(start, self._ends[-1])))])


class Partition:
    """One row of flat weights and the optimizer that updates it.

    Args:
        cfg: the configuration of the optimizer.
        flat: the weights.
        row: the number of the row.
    """

    def __init__(self, cfg: OptimizerConfig, flat: FlatWeights, row: int) -> None:
        values = flat.rows[row]
        num_decaying = min(max(flat.num_decaying - row * len(values), 0), len(values))
        self._sizes = [num_decaying, len(values) - num_decaying]
        self._parts = [nn.Parameter(part) for part in values.split(self._sizes)]
        self.optimizer = optimizers.build_for(cfg, self._parts, self._parts[1:])

    def step(self, gradient: Tensor) -> None:
        """Updates the row with its gradient (P,)."""
        for part, of_part in zip(self._parts, gradient.split(self._sizes), strict=True):
            part.grad = of_part
        self.optimizer.step()

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state by kind, (P,) each, and the number of updates."""
        state = self.optimizer.state
        arrays = {
            canonical: torch.cat([state[part][name] for part in self._parts]).cpu().numpy()
            for canonical, name in optimizers.state_names(self.optimizer).items()
        }
        num_updates = state[self._parts[0]].get("step")
        return arrays if num_updates is None else arrays | {"num_updates": num_updates.cpu().numpy()}

    def load(self, arrays: Arrays) -> None:
        """Loads the result of state()."""
        for canonical, name in optimizers.state_names(self.optimizer).items():
            parts = torch.from_numpy(arrays[canonical]).split(self._sizes)
            for part, values in zip(self._parts, parts, strict=True):
                self.optimizer.state[part][name].copy_(values)
        if "num_updates" in arrays:
            optimizers.set_num_updates(self.optimizer, float(arrays["num_updates"]))


class ShardedOptimizer:
    """An optimizer with several owners: ranks that each update one partition of the weights.

    Args:
        cfg: the configuration of the optimizer.
        stage: the stage with the weights, which are the same on all ranks.
        owners: the ranks that update a partition, in the order of the partitions.

    Attributes:
        flat: the weights.
        partition: the partition of this rank; None if it owns none.
    """

    def __init__(self, cfg: OptimizerConfig, stage: Stage, owners: Sequence[int]) -> None:
        self._owners, self._rank = owners, stage.topology.rank
        self._num_ranks = stage.topology.world_size
        self.flat = FlatWeights(dict(stage.named_parameters()), len(owners))
        self._row = owners.index(self._rank) if self._rank in owners else -1
        self.partition = Partition(cfg, self.flat, self._row) if self._rank in owners else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of this rank's partition."""
        return self.partition.optimizer.param_groups if self.partition else []

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Empty: no state is the same on all ranks."""
        return {}

    def step(self) -> None:
        """Updates this rank's partition, and gathers those of the others; gradients are the same on all ranks.

        Raises:
            TrainingError: a weight has no gradient on any rank; as a part of a partition, it would still be changed.
        """
        missing = self.flat.without_gradient()
        if missing:
            raise TrainingError(
                f"optimizer.sharded=true: {', '.join(missing)} got no gradient on any rank, and cannot be left out of "
                "an update; use optimizer.sharded=false, or make the loss depend on it"
            )
        if self.partition:
            self.partition.step(self.flat.gradients(self._row))
        self.gather()

    def gather(self) -> None:
        """Copies the weights from their owners to all ranks."""
        mine = self.flat.rows[self._row : self._row + 1] if self.partition else self.flat.rows[:0]
        self.flat.rows.copy_(hvd.allgather(mine, name="weights"))

    def optimizer_state(self, on_all_ranks: bool = False) -> dict[str, np.ndarray]:
        """The optimizer's state by name in a checkpoint, on rank 0 or on all ranks, which must all call it."""
        mine = self.partition.state() if self.partition else {}
        num_receivers = self._num_ranks if on_all_ranks else 1
        received = runtime.exchange_arrays([mine] * num_receivers + [{}] * (self._num_ranks - num_receivers))
        if self._rank >= num_receivers:
            return {}
        rows = [received[owner] for owner in self._owners]
        arrays = {name: rows[0][name] for name in rows[0] if name == "num_updates"}
        for canonical in rows[0].keys() - arrays.keys():
            whole = torch.from_numpy(np.stack([row[canonical] for row in rows]))
            arrays |= {f"{name}.{canonical}": view.numpy() for name, view in self.flat.views(whole).items()}
        return arrays

    def load_optimizer_state(self, arrays: Arrays) -> None:
        """Distributes and loads the state that rank 0 has read; {}: changes nothing. All ranks must call it.

        Raises:
            ConfigError: the state belongs to another model.
        """
        sent: list[Arrays] = [{}] * self._num_ranks
        problem = None
        try:
            sent = self._rows(arrays) if arrays else sent
        except ConfigError as error:  # raised after the exchange, so that no rank waits for this one
            problem = error
        mine = runtime.exchange_arrays(sent)[0]
        if problem:
            raise problem
        if self.partition and mine:
            self.partition.load(mine)

    def _rows(self, arrays: Arrays) -> list[Arrays]:
        """For each rank, its partition of a checkpoint's optimizer state."""
        kinds = optimizers.state_names(self.partition.optimizer) if self.partition else {}  # rank 0 owns one
        places = {kind: torch.zeros_like(self.flat.rows, device="cpu") for kind in kinds}
        views = {f"{name}.{kind}": view for kind in kinds for name, view in self.flat.views(places[kind]).items()}
        given = {name: array for name, array in arrays.items() if name != "num_updates"}
        check_names_and_shapes({name: tuple(view.shape) for name, view in views.items()}, given)
        for name, view in views.items():
            view.copy_(torch.from_numpy(arrays[name]))
        shared = {name: array for name, array in arrays.items() if name == "num_updates"}
        of_rows = [
            shared | {kind: place[row].numpy() for kind, place in places.items()} for row in range(len(self._owners))
        ]
        sent: list[Arrays] = [{}] * self._num_ranks
        for owner, of_row in zip(self._owners, of_rows, strict=True):
            sent[owner] = of_row
        return sent


class ServedOptimizer(ShardedOptimizer):
    """The optimizer of a parameter server and its workers (common/torch/parallel/parameter_server.py).

    Attributes:
        cfg: the configuration of the optimizer.
        received: on a worker, the rows of the weights that the servers have sent and step() has not taken.
    """

    def __init__(self, cfg: OptimizerConfig, stage: Stage, owners: Sequence[int]) -> None:
        super().__init__(cfg, stage, owners)
        self.cfg = cfg
        self.received: list[Tensor] = []
        self._rate: list[dict[str, Any]] = [{"lr": cfg.lr, "params": []}]  # of a worker, which sends it to the servers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of a server's partition; for a worker, only the learning rate."""
        return super().param_groups or self._rate

    def step(self) -> None:
        """On a worker, takes the weights that the servers have sent; a server has updated its partition already."""
        for row, values in zip(self.flat.rows, self.received, strict=False):
            row.copy_(values)
        self.received = []


def build_optimizer(cfg: OptimizerConfig, stage: Stage) -> torch.optim.Optimizer | ShardedOptimizer:
    """The configured optimizer for the weights of a stage: whole, sharded, or divided among servers."""
    topology = stage.topology
    if topology.num_servers:
        return ServedOptimizer(cfg, stage, topology.servers)
    if cfg.sharded and topology.world_size > 1:
        return ShardedOptimizer(cfg, stage, range(topology.world_size))
    return optimizers.build(cfg, stage)
