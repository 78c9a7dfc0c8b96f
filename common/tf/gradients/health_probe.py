"""How close compressed gradients are to the true ones."""

from collections.abc import Sequence

from common.distributed.topology import Topology
from common.tf.distributed import runtime
from common.tf.gradients.norms import squared_norm
from common.tf.gradients.stage_sums import StageSums

import horovod.tensorflow as hvd
import tensorflow as tf


class HealthProbe:
    """Compares the exchanged gradients with the true sums, which need an uncompressed exchange.

    Args:
        topology: the place of this rank.
        stages: sums over the stages.
    """

    def __init__(self, topology: Topology, stages: StageSums) -> None:
        self._topology, self._stages = topology, stages

    def measure(
        self, sent: Sequence[tf.Tensor], applied: Sequence[tf.Tensor], errors: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The cosine to the true gradient, and the norm of the residuals of all ranks together.

        Args:
            sent: this rank's gradients of each bucket, before the exchange.
            applied: the exchanged gradients of each bucket.
            errors: this rank's compression error of each bucket.
        """
        squares = squared_norm(errors)
        summed = hvd.allreduce(
            tf.concat([*sent, squares[None]], 0),
            name="health",
            op=hvd.Sum,
            process_set=runtime.process_set(self._topology.group),
        )
        true, squares = tf.split(summed, [sum(flat.shape.num_elements() for flat in sent), 1])
        flat = tf.concat(list(applied), 0)
        products = [tf.reduce_sum(a * b) for a, b in ((true, flat), (true, true), (flat, flat))]
        of_all = self._stages.sum("health_of_stages", tf.stack([*products, squares[0]]))
        product, true_squares, applied_squares, squares = tf.unstack(of_all)
        cosine = tf.math.divide_no_nan(product, tf.sqrt(true_squares) * tf.sqrt(applied_squares))
        return cosine, tf.sqrt(squares)
