"""Optimizers whose state is split over ranks: each updates its piece of the weights, as if they were one vector.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
https://arxiv.org/abs/1910.02054 (stage 1)
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from common.array_exchange import Arrays
from common.checkpoint import check_names_and_shapes
from common.compression import piece_size
from common.config import ConfigError, OptimizerConfig, RunConfig
from common.errors import TrainingError
from common.torch import optimizers, runtime
from common.torch.stage import Stage

import horovod.torch as hvd
import numpy as np
import torch
from torch import Tensor, nn


class FlatWeights:
    """The weights as the rows of one matrix, of which the parameters become views; matrices first, as only they decay.

    Args:
        parameters: by name; their values are moved.
        num_rows: K.

    Attributes:
        rows: (K, P); what does not fill the last ones is 0.
        num_decaying: number of values that are those of matrices.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_rows: int) -> None:
        self._parameters = dict(sorted(parameters.items(), key=lambda item: item[1].ndim < 2))
        values = list(self._parameters.values())
        self.num_decaying = sum(value.numel() for value in values if value.ndim >= 2)
        self._ends = list(accumulate(value.numel() for value in values))
        self.rows = values[0].detach().new_zeros(num_rows, piece_size(self._ends[-1], num_rows))
        for parameter, view in zip(values, self.views(self.rows).values(), strict=True):
            parameter.data = view.copy_(parameter.detach())

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """What of (K, P) belongs to each parameter, by its name, as it is shaped."""
        flat = rows.flatten()
        return {
            name: flat[end - parameter.numel() : end].view(parameter.shape)
            for end, (name, parameter) in zip(self._ends, self._parameters.items(), strict=True)
        }

    def without_gradient(self) -> list[str]:
        """The names of the parameters that have none."""
        return [name for name, parameter in self._parameters.items() if parameter.grad is None]

    def gradients(self, row: int) -> Tensor:
        """(P,) the gradients of a row; 0 where there is none."""
        size = self.rows.shape[1]
        start, stop, parts = row * size, (row + 1) * size, []
        for end, parameter in zip(self._ends, self._parameters.values(), strict=True):
            first = end - parameter.numel()
            if first < stop and start < end:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parts.append(gradient.flatten()[max(0, start - first) : stop - first])
        return torch.cat([*parts, self.rows.new_zeros(max(0, stop - max(start, self._ends[-1])))])


class Piece:
    """One row of flat weights and the optimizer that updates it.

    Args:
        cfg: of the optimizer.
        flat: the weights.
        row: its number.
    """

    def __init__(self, cfg: OptimizerConfig, flat: FlatWeights, row: int) -> None:
        values = flat.rows[row]
        num_decaying = min(max(flat.num_decaying - row * len(values), 0), len(values))
        self._sizes = [num_decaying, len(values) - num_decaying]
        decaying, other = self._parts = [nn.Parameter(part) for part in values.split(self._sizes)]
        self.optimizer = optimizers.build_for(cfg, [decaying], [other])

    def step(self, gradient: Tensor) -> None:
        """One update with the gradient (P,) of the row."""
        for part, of_part in zip(self._parts, gradient.split(self._sizes), strict=True):
            part.grad = of_part
        self.optimizer.step()

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state by its names in a checkpoint; (P,) each, and the number of updates."""
        state = self.optimizer.state
        arrays = {
            canonical: torch.cat([state[part][name] for part in self._parts]).cpu().numpy()
            for canonical, name in optimizers.state_names(self.optimizer).items()
        }
        num_updates = state[self._parts[0]].get("step")
        return arrays if num_updates is None else arrays | {"num_updates": num_updates.cpu().numpy()}

    def load(self, arrays: Arrays) -> None:
        """Takes over what state() gave."""
        for canonical, name in optimizers.state_names(self.optimizer).items():
            parts = torch.from_numpy(arrays[canonical]).split(self._sizes)
            for part, values in zip(self._parts, parts, strict=True):
                self.optimizer.state[part][name].copy_(values)
        if "num_updates" in arrays:
            optimizers.set_num_updates(self.optimizer, float(arrays["num_updates"]))


class ShardedOptimizer:
    """The optimizer of weights that are updated by several ranks, a piece by each.

    Args:
        cfg: of the optimizer.
        stage: whose weights; all ranks have the same.
        owners: the ranks that update a piece, in the order of the pieces.

    Attributes:
        flat: the weights.
        piece: this rank's, if it owns one.
    """

    def __init__(self, cfg: OptimizerConfig, stage: Stage, owners: Sequence[int]) -> None:
        self._owners, self._rank = owners, stage.topology.rank
        self._num_ranks = stage.topology.world_size
        self.flat = FlatWeights(dict(stage.named_parameters()), len(owners))
        self._row = owners.index(self._rank) if self._rank in owners else -1
        self.piece = Piece(cfg, self.flat, self._row) if self._rank in owners else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of this rank's piece."""
        return self.piece.optimizer.param_groups if self.piece else []

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """None that all ranks have."""
        return {}

    def step(self) -> None:
        """Updates this rank's piece with the gradients of the weights, which all ranks have, and gathers the others.

        Raises:
            TrainingError: a weight has no gradient on any rank; as a part of a piece it would be changed all the same.
        """
        missing = self.flat.without_gradient()
        if missing:
            raise TrainingError(
                f"optimizer.sharded=true: {', '.join(missing)} got no gradient on any rank, and cannot be left out of "
                "an update; use optimizer.sharded=false, or make the loss depend on it"
            )
        if self.piece:
            self.piece.step(self.flat.gradients(self._row))
        self.gather()

    def gather(self) -> None:
        """Gives all ranks the weights as their owners have them."""
        mine = self.flat.rows[self._row : self._row + 1] if self.piece else self.flat.rows[:0]
        self.flat.rows.copy_(hvd.allgather(mine, name="weights"))

    def moments(self) -> dict[str, np.ndarray]:
        """The optimizer's state by its names in a checkpoint, on rank 0; to be called by all ranks."""
        mine = self.piece.state() if self.piece else {}
        received = runtime.exchange_arrays([mine, *[{}] * (self._num_ranks - 1)])
        if self._rank > 0:
            return {}
        rows = [received[owner] for owner in self._owners]
        arrays = {name: rows[0][name] for name in rows[0] if name == "num_updates"}
        for canonical in rows[0].keys() - arrays.keys():
            whole = torch.from_numpy(np.stack([row[canonical] for row in rows]))
            arrays |= {f"{name}.{canonical}": view.numpy() for name, view in self.flat.views(whole).items()}
        return arrays

    def load_moments(self, arrays: Arrays) -> None:
        """Takes over what rank 0 has read; {}: nothing. To be called by all ranks.

        Raises:
            ConfigError: it is that of another model.
        """
        sent: list[Arrays] = [{}] * self._num_ranks
        problem = None
        try:
            sent = self._rows(arrays) if arrays else sent
        except ConfigError as error:  # is raised when no rank waits for this one
            problem = error
        mine = runtime.exchange_arrays(sent)[0]
        if problem:
            raise problem
        if self.piece and mine:
            self.piece.load(mine)

    def _rows(self, arrays: Arrays) -> list[Arrays]:
        """What of a checkpoint's optimizer state goes to each rank."""
        kinds = optimizers.state_names(self.piece.optimizer) if self.piece else {}  # rank 0 owns one
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
    """Of weights that servers update when gradients arrive (common/torch/parameter_server.py)."""

    def __init__(self, cfg: OptimizerConfig, stage: Stage, owners: Sequence[int]) -> None:
        super().__init__(cfg, stage, owners)
        self._rate: list[dict[str, Any]] = [{"lr": cfg.lr, "params": []}]  # of a worker, who tells the servers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of a server's piece; of a worker only the learning rate."""
        return super().param_groups or self._rate

    def step(self) -> None:
        """Has been made when the gradients had arrived."""


def build_optimizer(cfg: RunConfig, stage: Stage) -> torch.optim.Optimizer | ShardedOptimizer:
    """The optimizer of a configuration for a stage's weights, whole, sharded, or split over servers."""
    topology = stage.topology
    if topology.num_servers:
        return ServedOptimizer(cfg.optimizer, stage, topology.servers)
    if cfg.optimizer.sharded and topology.world_size > 1:
        return ShardedOptimizer(cfg.optimizer, stage, range(topology.world_size))
    return optimizers.build(cfg.optimizer, stage)
