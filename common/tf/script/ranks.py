"""Runs a step on this rank's rows of a global batch, so that its result is the one of a single rank."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from common.distributed.topology import Topology
from common.gradients.gradient_sync import SyncOptions
from common.tf.script import checks, losses, metrics, noise, part, statistics
from common.tf.script.exchange import GradientExchange
from common.tf.script.part import Part

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

_numbers = itertools.count()


class Ranks:
    """Splits global batches by rows among the ranks, and puts together what the ranks' steps compute.

    Args:
        topology: the place of this rank.
        options: how gradients are summed.

    Attributes:
        takes_own_batches: whether each rank has read only its rows.
    """

    def __init__(self, topology: Topology, options: SyncOptions) -> None:
        self._topology, self._options = topology, options
        self._exchanges: dict[int, GradientExchange] = {}
        self.takes_own_batches = False
        losses.install()
        metrics.install()
        noise.install(topology)

    def wrap(self, optimizers: Iterable[keras.Optimizer]) -> None:
        """Gives optimizers the gradients of all ranks."""
        for optimizer in optimizers:
            if id(optimizer) not in self._exchanges:
                name = f"script.{next(_numbers)}"
                self._exchanges[id(optimizer)] = GradientExchange(
                    optimizer, self._topology, self._options, name, checks.check_suspects
                )

    def predict(self, step: Callable[[Any], Any], data: Any) -> Any:
        """The outputs of all rows, in their order, on every rank."""
        of_step = self._part(data)
        with part.working_on(of_step):
            outputs = step(part.take(data, of_step))
        flat = [
            hvd.allgather(output[: of_step.num_rows], name=f"script.outputs.{number}")
            for number, output in enumerate(keras.tree.flatten(outputs))
        ]
        return keras.tree.pack_sequence_as(outputs, flat)

    def train(self, step: Callable[[Any], Any], data: Any, state: Callable[[], Sequence[keras.Variable]]) -> Any:
        """Runs a step of training or testing on this rank's rows.

        Args:
            step: takes rows, and updates weights, metrics and statistics.
            data: a global batch.
            state: the variables to put back if this rank has no row; called before and after the step, which may
                create some.
        """
        checks.begin_step()
        of_step = self._part(data)
        if not self.takes_own_batches:
            of_step = part.after(checks.check_batch(data), of_step)
        before = statistics.values(state())
        with part.working_on(of_step):
            noise.seed_tensorflow(self._topology)
            result = step(part.take(data, of_step))
            checks.check_suspects()
        tf.cond(of_step.is_empty, lambda: statistics.put_back(state(), before), lambda: None)
        checks.end_step()
        return result

    def _part(self, data: Any) -> Part:
        return (part.of_own_batch if self.takes_own_batches else part.of_batch)(data, self._topology)
