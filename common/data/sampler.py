"""Which examples a replica gets at which step.

The global batches of an epoch are consecutive pieces of a permutation of the dataset, and depend only on the seed and
the epoch. A replica gets a contiguous part of each batch, so that the number of replicas changes which rank computes
what, but never the result.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from common.config.schema import RunConfig, TrainConfig
from common.data.batch_schedule import BatchSizes
from common.distributed.topology import Topology, bounds
from common.errors import ConfigError

import numpy as np


@dataclass(frozen=True)
class SamplerState:
    """The progress of training.

    Attributes:
        step: number of finished optimizer steps.
        epoch: the epoch of the next example, from 1.
        offset: number of examples of this epoch that are already used.
    """

    step: int = 0
    epoch: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Step:
    """The examples of one optimizer step.

    Attributes:
        number: number of the step in the whole training, from 1.
        epoch: number of the epoch, from 1.
        examples: (n,) int64, the numbers of this rank's examples; n may be 0 in an epoch's last step.
        global_size: number of examples of all replicas in this step.
        batch_size: size of the global batch by the batch schedule; global_size may be smaller in an epoch's last step.
        ends_epoch: whether this is the last step of an epoch or of the run.
        progress: the finished fraction of the run after this step; 1 after the last step.
        end: the state of the sampler after this step.
    """

    number: int
    epoch: int
    examples: np.ndarray
    global_size: int
    batch_size: int
    ends_epoch: bool
    progress: float
    end: SamplerState


@dataclass(frozen=True)
class TrainingSampler:
    """All steps of a training run, with the examples of one rank.

    Attributes:
        train: the configuration of the run's length.
        num_examples: size of the training set.
        seed: determines the order together with the epoch.
        topology: the place of the rank.
        batch_sizes: number of examples per step over all replicas; an epoch's last step has the remaining examples.
        start: the state from which the run begins.
        classes: (num_examples,) the class of each example, if an epoch draws all classes equally often with
            replacement; None: an epoch takes each example once.
    """

    train: TrainConfig
    num_examples: int
    seed: int
    topology: Topology
    batch_sizes: BatchSizes
    start: SamplerState = SamplerState()
    classes: np.ndarray | None = None

    @classmethod
    def from_config(
        cls,
        cfg: RunConfig,
        num_examples: int,
        topology: Topology,
        restored: Mapping[str, Any] = MappingProxyType({}),
        classes: np.ndarray | None = None,
    ) -> "TrainingSampler":
        """The sampler of a configuration, which continues from the restored state of a checkpoint, if there is one.

        Raises:
            ConfigError: the checkpoint has used more examples of an epoch than there are.
        """
        sizes = BatchSizes(cfg.train, num_examples)
        if restored:
            sizes = BatchSizes.from_json(cfg.train, num_examples, restored["batch_sizes"])
        start = SamplerState(**restored.get("position", {}))
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

    def progress(self, position: SamplerState) -> float:
        """The finished fraction of the run, by examples or by train.max_steps, whichever ends the run first."""
        examples = (position.epoch - 1) * self.num_examples + position.offset
        by_examples = examples / (self.train.epochs * self.num_examples)
        return max(by_examples, position.step / self.train.max_steps) if self.train.max_steps else by_examples

    @property
    def most_steps(self) -> int:
        """Number of steps of the whole run if the batch size does not grow."""
        by_examples = self.train.epochs * math.ceil(self.num_examples / self.train.global_batch_size)
        return min(by_examples, self.train.max_steps or by_examples)

    def observe_gradients(self, step: Step, local: float, whole: float) -> None:
        """Updates the gradient noise scale, with which the batch may grow; see BatchSizes.observe().

        A single rank, to which an elastic run may shrink, has nothing to compare.

        Args:
            step: the step of the gradients.
            local: squared norm of the mean gradient of a rank's examples, summed over the ranks.
            whole: squared norm of the mean gradient of all examples, before clipping.
        """
        if self.topology.num_batch_slices == 1:
            return
        sizes = [stop - start for start, stop in pairwise(bounds(step.global_size, self.topology.num_batch_slices))]
        self.batch_sizes.observe(step.number, local, whole, sizes)

    def _step(self, position: SamplerState, order: np.ndarray) -> Step:
        batch_size = self.batch_sizes.at(position.step + 1)
        batch = order[position.offset : position.offset + batch_size]
        used = position.offset + len(batch)
        is_whole = used == self.num_examples
        end = SamplerState(position.step + 1, position.epoch + is_whole, 0 if is_whole else used)
        progress = self.progress(end)
        mine = batch[part(len(batch), self.topology)]
        return Step(end.step, position.epoch, mine, len(batch), batch_size, is_whole or progress >= 1, progress, end)

    def _order(self, epoch: int) -> np.ndarray:
        """(num_examples,) the numbers of the epoch's examples, in order."""
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
    """The contiguous part of num_examples examples that belongs to the rank's batch slices; empty for a server.

    The sizes of batch slices differ by at most one example; larger ones come first.
    """
    slices, starts = topology.batch_slices, bounds(num_examples, topology.num_batch_slices)
    return slice(starts[slices.start], starts[slices.stop])


def evaluation_pieces(
    num_examples: int, batch_size: int, topology: Topology
) -> tuple[int, Iterator[tuple[int, slice]]]:
    """The pieces of a dataset that are evaluated one by one, of at most batch_size examples per batch slice.

    A lane is a piece by itself, so that the pieces of a reproducible run are the same for all numbers of ranks.

    Returns:
        The number of pieces of all ranks, and this rank's pieces by their numbers.
    """
    whole, num_slices = batch_size * topology.num_batch_slices, topology.num_batch_slices
    mine = topology.batch_slices
    groups = [range(lane, lane + 1) for lane in mine] if topology.num_lanes else [mine]
    starts = range(0, num_examples, whole)

    def pieces() -> Iterator[tuple[int, slice]]:
        for number, start in enumerate(starts):
            ends = bounds(min(whole, num_examples - start), num_slices)
            for group in groups:
                if ends[group.start] < ends[group.stop]:
                    yield number * num_slices + group.start, slice(start + ends[group.start], start + ends[group.stop])

    return len(starts) * num_slices, pieces()
