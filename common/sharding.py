"""Which examples a replica sees at which step.

The global batches of an epoch are a permutation of the dataset cut into pieces of `global_batch_size`, and depend on
the seed and the epoch alone. A replica gets a contiguous part of each, so that the number of replicas changes who
computes what, never what is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from common.config import RunConfig
from common.topology import Topology

import numpy as np


@dataclass(frozen=True)
class Step:
    """What one optimizer step takes from the dataset.

    Attributes:
        number: of the step in the whole training, from 1.
        epoch: from 1.
        examples: (n,) int64, numbers of the examples that this replica takes; n may be 0 in an epoch's last step.
        global_size: number of examples of all replicas in this step.
    """

    number: int
    epoch: int
    examples: np.ndarray
    global_size: int


@dataclass(frozen=True)
class Plan:
    """All steps of a training run as one replica sees them.

    Attributes:
        num_examples: size of the training set.
        global_batch_size: examples per step over all replicas; an epoch's last step has what is left.
        epochs: number of passes over the training set.
        max_steps: ends the run earlier; None means all epochs.
        seed: decides the order together with the epoch.
        topology: whose part is taken.
    """

    num_examples: int
    global_batch_size: int
    epochs: int
    max_steps: int | None
    seed: int
    topology: Topology

    @classmethod
    def of(cls, cfg: RunConfig, num_examples: int, topology: Topology) -> Self:
        """The plan that a configuration asks for."""
        train = cfg.train
        return cls(num_examples, train.global_batch_size, train.epochs, train.max_steps, cfg.seed, topology)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that take each example once."""
        return -(-self.num_examples // self.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Number of steps in the whole run."""
        all_steps = self.epochs * self.steps_per_epoch
        return all_steps if self.max_steps is None else min(self.max_steps, all_steps)

    @property
    def total_epochs(self) -> int:
        """Number of epochs that are begun."""
        return -(-self.total_steps // self.steps_per_epoch)

    def steps(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch (from 1) in their order."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)
        first = (epoch - 1) * self.steps_per_epoch
        for number in range(first + 1, min(first + self.steps_per_epoch, self.total_steps) + 1):
            start = (number - first - 1) * self.global_batch_size
            batch = order[start : start + self.global_batch_size]
            yield Step(number, epoch, batch[part(len(batch), self.topology)], len(batch))


def part(num_examples: int, topology: Topology) -> slice:
    """The replica's contiguous part of so many examples; parts differ by one example at most, larger ones first."""
    size, larger = divmod(num_examples, topology.num_replicas)
    start = topology.replica * size + min(topology.replica, larger)
    return slice(start, start + size + (topology.replica < larger))


def evaluation_batches(num_examples: int, batch_size: int, topology: Topology) -> Iterator[slice]:
    """Cuts the replica's part of a dataset into batches, so that each example is in one batch of one replica."""
    mine = part(num_examples, topology)
    for start in range(mine.start, mine.stop, batch_size):
        yield slice(start, min(start + batch_size, mine.stop))
