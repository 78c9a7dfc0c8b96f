"""What every rank knows after a step: scalars that travel with the gradients instead of in messages of their own."""

from collections.abc import Sequence
from typing import NamedTuple, SupportsFloat

NUM_RIDERS = 4
"""Loss, stop, local_squares and overflow are summed over the ranks together with the gradients."""


class StepSums(NamedTuple):
    """Sums over the ranks, and what follows from them.

    Attributes:
        loss: mean over the global batch.
        stop: number of ranks that were asked to stop.
        local_squares: sum over the ranks that have examples of the squared norm of a rank's own mean gradient; 0 unless
            measured.
        overflow: number of findings of losses or gradients that are not finite; looked for in half precision and with
            train.on_nonfinite=skip. The step is to be skipped when there is one.
        whole_squares: squared norm of the gradient that is applied, before clipping; 0 unless measured.
        wire_bytes: what this rank has sent, of each bucket.
        gradient_cosine: of the angle between the true mean gradient and the one that is applied; 0 unless measured.
        residual_norm: root of the sum over the ranks of their residuals' squares; 0 unless measured.
        loss_scale: of this step.
        skipped_steps: of the run so far, this one included.
        staleness: most steps that a worker of a parameter server was ahead of the slowest one.
    """

    loss: SupportsFloat
    stop: SupportsFloat
    local_squares: SupportsFloat
    overflow: SupportsFloat
    whole_squares: SupportsFloat = 0.0
    wire_bytes: Sequence[SupportsFloat] = ()
    gradient_cosine: SupportsFloat = 0.0
    residual_norm: SupportsFloat = 0.0
    loss_scale: SupportsFloat = 1.0
    skipped_steps: SupportsFloat = 0
    staleness: SupportsFloat = 0.0
