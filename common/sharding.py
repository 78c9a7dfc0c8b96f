"""Which examples a replica sees at which step.

The global batches of an epoch are a permutation of the dataset cut into pieces, and depend on the seed and the epoch
alone. A replica gets a contiguous part of each, so that the number of replicas changes who computes what, never what
is computed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from common.batch_size import BatchSizes
from common.config import ConfigError, RunConfig, TrainConfig
from common.topology import Topology

import numpy as np


@dataclass(frozen=True)
class Position:
    """How far training has come.

    Attributes:
        step: number of optimizer steps that are done.
        epoch: of the next example, from 1.
        offset: number of the epoch's examples that are used up.
    """

    step: int = 0
    epoch: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Step:
    """What one optimizer step takes from the dataset.

    Attributes:
        number: of the step in the whole training, from 1.
        epoch: from 1.
        examples: (n,) int64, numbers of the examples that this replica takes; n may be 0 in an epoch's last step.
        global_size: number of examples of all replicas in this step.
        batch_size: what global_size is but for an epoch's last step.
        ends_epoch: whether it is the last step of an epoch or of the run.
        progress: share of the run that is done with this step; 1 at the last one.
        end: where training stands after it.
    """

    number: int
    epoch: int
    examples: np.ndarray
    global_size: int
    batch_size: int
    ends_epoch: bool
    progress: float
    end: Position


@dataclass(frozen=True)
class Plan:
    """All steps of a training run as one replica sees them.

    Attributes:
        train: how long the run is.
        num_examples: size of the training set.
        seed: decides the order together with the epoch.
        topology: whose part is taken.
        batch_sizes: examples per step over all replicas; an epoch's last step has what is left.
        start: where the run begins.
        classes: (num_examples,) given when an epoch draws all classes equally often instead of each example once.
    """

    train: TrainConfig
    num_examples: int
    seed: int
    topology: Topology
    batch_sizes: BatchSizes
    start: Position = Position()
    classes: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        cfg: RunConfig,
        num_examples: int,
        topology: Topology,
        restored: Mapping[str, Any] = MappingProxyType({}),
        classes: np.ndarray | None = None,
    ) -> Self:
        """The plan that a configuration asks for, from where the restored state of a checkpoint stands.

        Raises:
            ConfigError: it stands beyond the end of an epoch.
        """
        sizes = BatchSizes(cfg.train, num_examples)
        if restored:
            sizes = BatchSizes.from_json(cfg.train, num_examples, restored["batch_sizes"])
        start = Position(**restored.get("position", {}))
        if start.offset >= num_examples:
            raise ConfigError(
                [f"resume: the checkpoint has used {start.offset} of {num_examples} examples of an epoch"]
            )
        return cls(cfg.train, num_examples, cfg.seed, topology, sizes, start, classes)

    def steps(self) -> Iterator[Step]:
        """The steps from the start to the end of the run."""
        position, order = self.start, np.empty(0)
        while self.progress(position) < 1:
            if not len(order):
                order = self._order(position.epoch)
            step = self._step(position, order)
            yield step
            if step.end.epoch > position.epoch:
                order = np.empty(0)
            position = step.end

    def progress(self, position: Position) -> float:
        """Share of the run that is done, by examples or by train.max_steps, whichever ends it first."""
        examples = (position.epoch - 1) * self.num_examples + position.offset
        by_examples = examples / (self.train.epochs * self.num_examples)
        return max(by_examples, position.step / self.train.max_steps) if self.train.max_steps else by_examples

    @property
    def most_steps(self) -> int:
        """Number of steps of the whole run, if the batch does not grow."""
        by_examples = self.train.epochs * math.ceil(self.num_examples / self.train.global_batch_size)
        return min(by_examples, self.train.max_steps or by_examples)

    def _step(self, position: Position, order: np.ndarray) -> Step:
        batch_size = self.batch_sizes.at(position.step + 1)
        batch = order[position.offset : position.offset + batch_size]
        used = position.offset + len(batch)
        is_whole = used == self.num_examples
        end = Position(position.step + 1, position.epoch + is_whole, 0 if is_whole else used)
        progress = self.progress(end)
        mine = batch[part(len(batch), self.topology)]
        return Step(end.step, position.epoch, mine, len(batch), batch_size, is_whole or progress >= 1, progress, end)

    def _order(self, epoch: int) -> np.ndarray:
        """(num_examples,) the numbers of the epoch's examples."""
        if self.classes is None:
            return shuffled(self.num_examples, self.seed, epoch)
        random = np.random.default_rng((self.seed, epoch))
        by_class = np.argsort(self.classes, kind="stable")
        _, sizes = np.unique(self.classes, return_counts=True)
        drawn = random.integers(len(sizes), size=self.num_examples)
        chosen: np.ndarray = by_class[np.cumsum(sizes)[drawn] - 1 - random.integers(sizes[drawn])]
        return chosen


def shuffled(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """(num_examples,) int64, the order in which an epoch takes all examples once."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def part(num_examples: int, topology: Topology) -> slice:
    """The contiguous part of so many examples that the rank's lanes take; a server takes none.

    Lanes' parts differ by one example at most, larger ones first.
    """
    lanes, starts = topology.lanes, bounds(num_examples, topology.num_replicas)
    return slice(starts[lanes.start], starts[lanes.stop])


def bounds(num_examples: int, num_parts: int) -> list[int]:
    """(num_parts + 1,) where consecutive parts begin and the last one ends, larger ones first; of 0 parts [0]."""
    size, larger = divmod(num_examples, max(1, num_parts))
    return [number * size + min(number, larger) for number in range(num_parts + 1)]


def evaluation_batches(num_examples: int, batch_size: int, topology: Topology) -> Iterator[slice]:
    """Cuts a dataset into batches of which each lane takes so many examples at most; the rank's parts of them."""
    whole = batch_size * topology.num_replicas
    for start in range(0, num_examples, whole):
        mine = part(min(whole, num_examples - start), topology)
        if mine.start < mine.stop:
            yield slice(start + mine.start, start + mine.stop)
