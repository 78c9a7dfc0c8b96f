"""Sharded optimizers: all weights are one vector, and each rank updates one partition of it and keeps its state.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
https://arxiv.org/abs/1910.02054 (stage 1)
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from common.config.schema import OptimizerConfig
from common.distributed.array_exchange import Arrays
from common.gradients.compression import piece_size
from common.tf.distributed import runtime
from common.tf.gradients import optimizers
from common.tf.gradients.compression import from_bytes
from common.tf.parallel.stage import Stage

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf


class FlatWeights:
    """The weights as one matrix of K rows; matrices come first, because only they have weight decay.

    Args:
        weights: the variables of the weights.
        num_rows: number of rows, K.

    Attributes:
        num_rows: number of rows, K.
        size: number of values per row, P; the end is padded with 0.
        num_decaying: number of values that belong to matrices.
    """

    def __init__(self, weights: Sequence[keras.Variable], num_rows: int) -> None:
        self._variables = list(weights)
        self._order = sorted(range(len(self._variables)), key=lambda place: len(self._variables[place].shape) < 2)
        self._lengths = [math.prod(self._variables[place].shape) for place in self._order]
        self._ends = list(accumulate(self._lengths))
        self.num_rows, self.size = num_rows, piece_size(self._ends[-1], num_rows)
        self.num_decaying = sum(math.prod(variable.shape) for variable in weights if len(variable.shape) >= 2)
        self.dtype = tf.as_dtype(self._variables[0].dtype)

    @property
    def values(self) -> list[tf.Tensor]:
        """The values of the variables."""
        return [variable.value for variable in self._variables]

    def assign(self, rows: tf.Tensor) -> None:
        """Assigns rows (K, P) to the variables."""
        for variable, values in zip(self._variables, self.parts(rows), strict=True):
            variable.assign(values)

    def row(self, tensors: Sequence[tf.Tensor], number: int) -> tf.Tensor:
        """One row (P,) of tensors that have the shapes of the weights."""
        start, stop, parts = number * self.size, (number + 1) * self.size, []
        for end, length, place in zip(self._ends, self._lengths, self._order, strict=True):
            first = end - length
            if first < stop and start < end:
                parts.append(tf.reshape(tensors[place], [-1])[max(0, start - first) : stop - first])
        return tf.concat([*parts, tf.zeros(max(0, stop - max(start, self._ends[-1])), self.dtype)], 0)

    def rows(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """All rows (K, P) of tensors that have the shapes of the weights."""
        return tf.stack([self.row(tensors, number) for number in range(self.num_rows)])

    def parts(self, rows: tf.Tensor) -> list[tf.Tensor]:
        """The parts of rows (K, P) that belong to each variable, with its shape."""
        parts = tf.split(tf.reshape(rows, [-1])[: self._ends[-1]], self._lengths)
        by_place = dict(zip(self._order, parts, strict=True))
        return [tf.reshape(by_place[place], variable.shape) for place, variable in enumerate(self._variables)]


class Partition:
    """A copy of one row of flat weights, and the optimizer that updates it; the model's variables are not changed.

    Args:
        cfg: the configuration of the optimizer.
        flat: the weights.
        row: the number of the row.
    """

    def __init__(self, cfg: OptimizerConfig, flat: FlatWeights, row: int) -> None:
        self._flat, self._row = flat, row
        num_decaying = min(max(flat.num_decaying - row * flat.size, 0), flat.size)
        self._sizes = [num_decaying, flat.size - num_decaying]
        values = tf.split(flat.row(flat.values, row), self._sizes)
        self._parts = [keras.Variable(part, dtype=flat.dtype.name) for part in values]
        self.optimizer = optimizers.build_for(cfg, self._parts, self._parts[1:])

    @property
    def values(self) -> tf.Tensor:
        """The weights (P,) of the row."""
        return tf.concat([part.value for part in self._parts], 0)

    def take_weights(self) -> None:
        """Copies the weights of the row from the model."""
        values = tf.split(self._flat.row(self._flat.values, self._row), self._sizes)
        for part, of_part in zip(self._parts, values, strict=True):
            part.assign(of_part)

    def step(self, gradient: tf.Tensor) -> None:
        """Updates the row with its gradient (P,)."""
        self.optimizer.apply(tf.split(gradient, self._sizes), self._parts)

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state by kind, (P,) each, and the number of updates."""
        arrays = {
            moment: np.concatenate([variable.numpy() for variable in variables])
            for moment, variables in optimizers.optimizer_state(self.optimizer).items()
        }
        return arrays | {"num_updates": np.array(self.optimizer.iterations.numpy(), np.float32)}

    def load(self, arrays: Arrays) -> None:
        """Loads the result of state()."""
        for moment, variables in optimizers.optimizer_state(self.optimizer).items():
            parts = np.split(arrays[moment], self._sizes[:1])
            for variable, values in zip(variables, parts, strict=True):
                variable.assign(values)
        self.optimizer.iterations.assign(int(arrays["num_updates"]))


class ShardedOptimizer:
    """An optimizer with several owners: ranks that each update one partition of the weights.

    Args:
        cfg: the configuration of the optimizer.
        stage: the stage with the weights, which are the same on all ranks.
        owners: the ranks that update a partition, in the order of the partitions.

    Attributes:
        flat: the weights.
        partition: the partition of this rank; None if it owns none. Rank 0 owns one.
        learning_rate: the learning rate of this rank's partition; without a partition, the value is only stored.
    """

    def __init__(self, cfg: OptimizerConfig, stage: Stage, owners: Sequence[int]) -> None:
        rank, self._num_ranks = stage.topology.rank, stage.topology.world_size
        self._owners = owners
        self.flat = FlatWeights(stage.trainable_variables, len(owners))
        self._row = owners.index(rank) if rank in owners else -1
        self.partition = Partition(cfg, self.flat, self._row) if rank in owners else None
        self.learning_rate = (
            self.partition.optimizer.learning_rate if self.partition else tf.Variable(cfg.lr, trainable=False)
        )

    @property
    def variables(self) -> list[keras.Variable]:
        """Empty: no state is the same on all ranks."""
        return []

    def apply(self, gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> None:
        """Updates this rank's partition, and gathers those of the others; gradients are the same on all ranks."""
        if self.partition:
            self.partition.take_weights()
            self.partition.step(self.flat.row(gradients, self._row))
        self.gather()

    def gather(self) -> None:
        """Copies the weights from their owners to all ranks."""
        mine = self.partition.values[None] if self.partition else tf.zeros((0, self.flat.size), self.flat.dtype)
        shape = (self.flat.num_rows, self.flat.size)
        self.flat.assign(tf.ensure_shape(hvd.allgather(mine, name="weights"), shape))

    def optimizer_state(self, on_all_ranks: bool = False) -> dict[str, list[tf.Tensor]]:
        """The optimizer's state, on rank 0 or on all ranks, which must all call it.

        Returns:
            For each kind, tensors with the shapes and the order of the weights.
        """
        mine = self.partition.state() if self.partition else {}
        num_receivers = self._num_ranks if on_all_ranks else 1
        received = runtime.exchange_arrays([mine] * num_receivers + [{}] * (self._num_ranks - num_receivers))
        return {
            moment: self.flat.parts(tf.stack([received[owner][moment] for owner in self._owners]))
            for moment in received[0]
            if moment != "num_updates"
        }

    def load_optimizer_state(self, optimizer_state: Mapping[str, Sequence[np.ndarray]], num_updates: int) -> None:
        """Distributes and loads rank 0's result of optimizer_state(); {}: changes nothing. All ranks must call it."""
        sent: list[Arrays] = [{}] * self._num_ranks
        if optimizer_state:
            rows = {moment: self.flat.rows(arrays).numpy() for moment, arrays in optimizer_state.items()}
            for row, owner in enumerate(self._owners):
                of_row = {moment: array[row] for moment, array in rows.items()}
                sent[owner] = of_row | {"num_updates": np.array(num_updates, np.float32)}
        mine = runtime.exchange_arrays(sent)[0]
        if self.partition and mine:
            self.partition.load(mine)


class ServedOptimizer(ShardedOptimizer):
    """The optimizer of a parameter server and its workers (common/tf/parallel/parameter_server.py).

    Attributes:
        cfg: the configuration of the optimizer.
        received: on a worker, the rows of the weights, as bytes, that the servers have sent and apply() has not taken.
    """

    def __init__(self, cfg: OptimizerConfig, stage: Stage, owners: Sequence[int]) -> None:
        super().__init__(cfg, stage, owners)
        self.cfg = cfg
        self.received: list[tf.Tensor] = []
        self._take = tf.function(self._take_received)

    def apply(self, gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> None:
        """On a worker, takes the weights that the servers have sent; a server has updated its partition already."""
        if self.received:
            self._take(self.received)
        self.received = []

    def _take_received(self, contents: Sequence[tf.Tensor]) -> None:
        self.flat.assign(from_bytes(tf.stack(contents), self.flat.dtype))


def build_optimizer(cfg: OptimizerConfig, stage: Stage) -> keras.Optimizer | ShardedOptimizer:
    """The configured optimizer for the weights of a stage: whole, sharded, or divided among servers."""
    topology = stage.topology
    if topology.num_servers:
        return ServedOptimizer(cfg, stage, topology.servers)
    if cfg.sharded and topology.world_size > 1:
        return ShardedOptimizer(cfg, stage, range(topology.world_size))
    return optimizers.build(cfg, stage)
