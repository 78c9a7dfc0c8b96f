"""Sums over the stages of a pipeline."""

from collections.abc import Iterable, Sequence

from common.distributed.topology import Topology
from common.tf.distributed import runtime
from common.tf.gradients.norms import norm, squared_norm

import horovod.tensorflow as hvd
import tensorflow as tf


class StageSums:
    """Sums of values of all stages, and of the gradients of weights that stages share.

    Args:
        topology: the place of this rank.
        tied: for each variable that stages share: the number of its gradient, and all ranks that have it.
    """

    def __init__(self, topology: Topology, tied: Iterable[tuple[int, Sequence[int]]] = ()) -> None:
        self._topology, self._tied = topology, list(tied)

    def sum(self, name: str, values: tf.Tensor) -> tf.Tensor:
        """Sums (n,) over the stages of values that are the same on all ranks of a stage."""
        if self._topology.num_stages == 1:
            return values
        # Not zeros on all ranks of a stage except one: TensorFlow sends a constant once, before the graph runs.
        return hvd.allreduce(values / len(self._topology.group), name=name, op=hvd.Sum)

    def sum_tied(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums the gradients of variables that stages share; all ranks of a stage have the stage's sum before."""
        summed = list(gradients)
        for place, (number, ranks) in enumerate(self._tied):
            mine, process_set = summed[number] / len(self._topology.group), runtime.process_set(ranks)
            summed[number] = hvd.allreduce(mine, name=f"tied.{place}", op=hvd.Sum, process_set=process_set)
        return summed

    def norm(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        """The norm () of the gradients of all stages; a variable that several stages share counts once."""
        if self._topology.num_stages == 1:
            return norm(gradients)
        again = [gradients[number] for number, ranks in self._tied if ranks[0] not in self._topology.group]
        squares = squared_norm(gradients) - sum(tf.reduce_sum(tf.square(tied)) for tied in again)
        (squares,) = tf.unstack(self.sum("squares", squares[None]))
        return tf.sqrt(squares)
