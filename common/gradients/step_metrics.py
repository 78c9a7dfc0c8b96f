"""Metrics of a step, summed over the ranks; they travel at the end of the last bucket to save an allreduce."""

from collections.abc import Sequence
from typing import NamedTuple, SupportsFloat

NUM_SCALARS = 4
"""The number of scalars in the last bucket: loss, stop, local_grad_sqnorm and overflow."""


class StepMetrics(NamedTuple):
    """Sums over the ranks, and values derived from them.

    Attributes:
        loss: mean loss over the global batch.
        stop: the sum of the ranks' notices: how many were asked to stop, and whether ranks will leave or join
            (common/training/preemption.py).
        local_grad_sqnorm: squared norm of a rank's local mean gradient, summed over the ranks that have examples; 0
            unless measured.
        overflow: how often a loss or gradient was found not to be finite; checked in half precision and with
            train.on_nonfinite=skip. If it is not 0, the step is skipped.
        global_grad_sqnorm: squared norm of the gradient that is applied, before clipping; 0 unless measured.
        wire_bytes: bytes that this rank has sent, for each bucket.
        gradient_cosine: cosine of the angle between the true mean gradient and the applied one; 0 unless measured.
        residual_norm: norm of the residuals of all ranks together; 0 unless measured.
        loss_scale: the loss scale of this step.
        skipped_steps: number of skipped steps of the run so far, this step included.
        staleness: largest number of steps by which a worker of a parameter server was ahead of the slowest one.
    """

    loss: SupportsFloat
    stop: SupportsFloat
    local_grad_sqnorm: SupportsFloat
    overflow: SupportsFloat
    global_grad_sqnorm: SupportsFloat = 0.0
    wire_bytes: Sequence[SupportsFloat] = ()
    gradient_cosine: SupportsFloat = 0.0
    residual_norm: SupportsFloat = 0.0
    loss_scale: SupportsFloat = 1.0
    skipped_steps: SupportsFloat = 0
    staleness: SupportsFloat = 0.0
