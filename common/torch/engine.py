"""The engine of training: what a rank does with a batch, in PyTorch."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from common.config.schema import PrecisionConfig
from common.data.datasets.examples import Examples
from common.data.sampler import evaluation_pieces
from common.distributed.topology import bounds
from common.gradients.step_metrics import StepMetrics
from common.parallel.rank_schedule import last_backward
from common.torch.distributed import runtime
from common.torch.gradients import optimizers
from common.torch.gradients.lane_sync import LaneSync
from common.torch.parallel.parameter_server import Sync
from common.torch.parallel.pipeline import ScheduleExecutor
from common.torch.parallel.sharded import ShardedOptimizer
from common.torch.parallel.stage import Stage
from common.training import preemption

import numpy as np
import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> (), a sum over the examples."""


class Batch(NamedTuple):
    """This rank's part of a global batch.

    Attributes:
        inputs: (B, ...) the inputs of this rank's examples; B may be 0.
        targets: (B, ...) their targets.
        global_size: number of examples of all ranks in this step.
    """

    inputs: Tensor
    targets: Tensor
    global_size: int


class Engine:
    """A rank's part of the model, what sums its gradients over the ranks, and the optimizer.

    The order of a step: gradients.zero(), forward_backward(), gradients.synchronize(), gradients.clip_norm(), step().

    Args:
        stage: the model, or this rank's stage of it.
        gradients: sums the gradients over the ranks.
        optimizer: updates the weights of the stage.
        precision: the dtypes.
    """

    def __init__(
        self,
        stage: Stage,
        gradients: Sync,
        optimizer: torch.optim.Optimizer | ShardedOptimizer,
        precision: PrecisionConfig,
    ) -> None:
        self.stage, self.gradients, self.optimizer = stage, gradients, optimizer
        self._precision, self._device = precision, runtime.device(stage.topology)
        self._seed = 0, 0  # of the run, and the number of the step

    def to_batch(self, arrays: Iterable[np.ndarray], global_size: int) -> Batch:
        """This rank's inputs and targets of a step, as tensors."""
        inputs, targets = self.to_tensors(arrays)
        return Batch(inputs, targets, global_size)

    def to_tensors(self, arrays: Iterable[np.ndarray]) -> list[Tensor]:
        """The arrays as tensors on this rank's device, floating-point ones in the run's dtype."""
        return runtime.to_tensors(arrays, self._precision, self._device)

    def forward_backward(self, loss_sum: Measure, inputs: Tensor, targets: Tensor, global_size: int) -> None:
        """Runs forward and backward of all micro-batches; the sum of the gradients over the ranks is the exact mean.

        Each bucket of gradients is sent as soon as the last backward has finished it.

        Args:
            loss_sum: (outputs, targets) -> sum of the losses over the examples, not their mean.
            inputs: (B, ...) inputs of this rank's examples in the step; B may be 0.
            targets: (B, ...) targets of these examples.
            global_size: number of examples of all ranks in this step, by which the sums are divided.
        """
        if isinstance(self.gradients, LaneSync):
            self._run_lanes(self.gradients, loss_sum, inputs, targets, global_size)
            return
        schedule, start = self.stage.rank_schedule, time.perf_counter()

        def part_of_mean(outputs: Tensor, of_outputs: Tensor) -> Tensor:
            return loss_sum(outputs, of_outputs) / global_size

        executor = ScheduleExecutor(self.stage, schedule, inputs, targets, part_of_mean, self.gradients.loss_scale)
        actions = schedule.actions()
        last = last_backward(actions)
        for number, action in enumerate(actions):
            if number == last:
                fraction = len(inputs) / global_size
                self.gradients.prepare_for_backward(executor.loss, preemption.notice(), fraction)
            executor.run(action)
        self.stage.add_times(time.perf_counter() - start, executor.waited_seconds)

    def _run_lanes(
        self, gradients: LaneSync, loss_sum: Measure, inputs: Tensor, targets: Tensor, global_size: int
    ) -> None:
        lanes, (seed, step) = self.stage.topology.batch_slices, self._seed
        for lane, (start, end) in zip(lanes, pairwise(bounds(len(inputs), len(lanes))), strict=True):
            loss: Tensor | float = 0.0
            if start < end:
                runtime.seed(seed, lane, step)
                outputs = self.stage(inputs[start:end].clone())  # bits may depend on where values lie in memory
                loss = loss_sum(outputs, targets[start:end]) / global_size
                (loss * gradients.loss_scale).backward()
                loss = loss.detach()
            gradients.end_lane(lane, loss, preemption.notice(), (end - start) / global_size)

    @torch.no_grad()
    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of the whole model and their targets on ranks of the last stage; empty tensors on the others.

        Args:
            inputs: (B, ...) inputs of this rank's examples, at least one.
            targets: (B, ...) targets of these examples.
        """
        stage = self.stage
        if stage.num_chunks == 1:
            return stage(inputs), targets
        schedule = replace(stage.rank_schedule, num_micro_batches=1)
        executor = ScheduleExecutor(stage, schedule, inputs, targets)
        for action in schedule.forward_actions():
            executor.run(action)
        if not executor.outputs:
            return torch.zeros((0, *stage.shapes[-1]), dtype=stage.dtype, device=inputs.device), targets[:0]
        return torch.cat(executor.outputs), targets

    def step(self, metrics: StepMetrics) -> None:
        """Updates the weights once, unless a loss or gradient of a rank is not finite."""
        # Unless it was checked, it is 0; to read it, the host would have to wait for a GPU.
        if not (self.gradients.options.finds_nonfinite and float(metrics.overflow)):
            self.optimizer.step()

    def set_learning_rate(self, value: float) -> None:
        """Sets the learning rate of the next step."""
        optimizers.set_learning_rate(self.optimizer, value)

    def allreduce_mean(self, examples: Examples, *measures: Measure, batch_size: int = 1024) -> list[float]:
        """The exact mean of each measure over all examples: each is evaluated on one rank, and sums are allreduced.

        Args:
            examples: the examples, the same on all ranks.
            measures: (outputs, targets) -> sum over these examples.
            batch_size: largest number of examples per forward pass.
        """
        self.gradients.sync_weights()
        self.stage.eval()
        num_pieces, pieces = evaluation_pieces(len(examples), batch_size, self.stage.topology)
        sums = np.zeros((num_pieces, len(measures)))
        for number, indices in pieces:
            outputs, targets = self.forward(*self.to_tensors(examples.get_batch(indices)))
            sums[number] = [float(measure(outputs, targets)) for measure in measures]
        self.stage.train()
        of_all = np.reshape(runtime.sum_over_ranks(*sums.flat), sums.shape)
        return [math.fsum(of_measure) / len(examples) for of_measure in of_all.T]

    def seed_dropout(self, seed: int, step: int) -> None:
        """Seeds dropout, so that it depends only on the seed, the step, and the rank or the lane."""
        self._seed = seed, step
        runtime.seed(seed, self.stage.topology.rank, step)

    @torch.no_grad()
    def replace_weight(self, number: int, value: float) -> float:
        """Sets a value of this rank's first weight, by its number modulo their number; returns the old one."""
        flat = next(self.stage.parameters()).view(-1)
        place = number % len(flat)
        before = float(flat[place])
        flat[place] = value
        return before

    def assert_weights_in_sync(self) -> str:
        """Checks that ranks with the same stage hold the same weights, bit by bit; returns a SHA-256 of all weights.

        Raises:
            TrainingError: the weights differ.
        """
        return runtime.assert_weights_in_sync(self.stage, self.stage.topology.groups)
