"""What every rank knows after a step: scalars that travel with the gradients instead of in messages of their own."""

from typing import NamedTuple, SupportsFloat


class StepSums(NamedTuple):
    """Sums over the ranks.

    Attributes:
        loss: mean over the global batch.
        stop: number of ranks that were asked to stop.
        local_squares: mean over the ranks of the squared norm of a rank's own mean gradient; 0 unless measured.
        whole_squares: squared norm of the global batch's mean gradient, before clipping; 0 unless measured.
    """

    loss: SupportsFloat
    stop: SupportsFloat
    local_squares: SupportsFloat
    whole_squares: SupportsFloat
